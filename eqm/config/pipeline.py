"""The config of a whole run, and how it is computed and kept."""

import re
from dataclasses import dataclass, field
from typing import Literal

from eqm.config.checks import is_plain_name, known, positive
from eqm.config.data import (
    AutoencoderConfig,
    EncodeConfig,
    ExtractorConfig,
    FurtherConfig,
    ReferenceConfig,
    SourceConfig,
)
from eqm.config.evaluation import EvaluateConfig, GenerateConfig
from eqm.config.model import NetworkConfig, ObjectiveConfig, TrainConfig, check_fit
from eqm.errors import ConfigError, require
from eqm.names import kind_of
from eqm.policy import PolicyConfig

MOST_THREADS = 1024
"""Of a process: of more than a machine has cores, each takes memory and waits for the others."""


@dataclass(frozen=True, kw_only=True)
class ComputeConfig:
    """How a training step is computed: in no digest, for it changes no result beyond rounding.

    Its place is that of the number of processes and threads, which change bits in the same way: a
    run goes on from its checkpoint on a machine with other memory. Provenance keeps what it was.
    """

    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """"ddp": every process holds all weights. "fsdp2": each holds its share of weights, moments and
    averages, for networks that would not fit. Checkpoints are the same."""
    micro_batch: int | None = None
    """Images of a process in one backward, of which an update then has several; null: its whole
    share of the batch."""
    checkpointing: bool = False
    """Whether the backward computes each block's activations again in place of keeping them."""
    compile: bool = False
    """Whether torch.compile makes kernels of the blocks; on a CPU it needs a C++ compiler."""
    fused: bool = False
    """Whether what a transformer's blocks do between their products are kernels of ours
    (eqm.kernels); on GPUs of NVIDIA alone."""
    attention: Literal["auto", "torch", "eqm"] = "auto"
    """Whose kernels mix the tokens of a fused block. "auto": ours ("eqm") in bfloat16, and torch's
    for networks that ours does not know."""
    replay: Literal["auto", "never"] = "auto"
    """Whether the kernels of a fused step are started one by one ("never"), or by one call that
    replays them ("auto"), which saves the host's time and keeps the step's memory for it. Only
    Eq. 3 of implicit fields has such a call, and not under FSDP2."""
    timeout_seconds: float = 600.0
    """How long ranks wait for one that stalls before they end, and name it."""

    def __post_init__(self) -> None:
        known(self, "compute")
        positive(self, "compute", "timeout_seconds")
        rule = "'auto' where compute.fused is false, for ours is a kernel of a fused block"
        require(self.fused or self.attention != "eqm", "compute.attention", self.attention, rule)
        size = self.micro_batch
        require(size is None or size > 0, "compute.micro_batch", size, "greater than 0, or null")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a training makes its state durable: in no digest."""

    every_images: int = 25_600
    keep: int = 3
    """The newest so many stay."""
    grid_every_images: int = 51_200
    """Images between two grids of samples that MLflow is sent."""

    def __post_init__(self) -> None:
        positive(self, "checkpoints", "every_images", "keep", "grid_every_images")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """A whole run."""

    name: str = "digits"
    """Names the registered model, ``eqm-<name>``."""
    source_uri: str | None = None
    """Where the images lie; in no digest, the listing of the images is."""
    source: SourceConfig = field(default_factory=SourceConfig)
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    extractor: ExtractorConfig = field(default_factory=ExtractorConfig)
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    further: dict[str, FurtherConfig] = field(default_factory=dict)
    """Name -> another extractor, whose numbers stand beside those of the main one: "fd_NAME" beside
    "distance" (eqm.names). Without any, every digest is what it would be if there were no such
    table."""
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    network: NetworkConfig = field(default_factory=NetworkConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    processes: int = 1
    """Processes that encode, train, generate and look at real images; several run under torchrun.
    Where this machine has GPUs, one starts on each at most."""
    threads: int | None = None
    """CPU threads of each process; null: all cores, shared among the processes."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """How training computes its steps; in no digest."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When training makes its state durable; in no digest."""
    continue_images: int = 50_000
    """Length of a scheduled training that goes on from the champion, when there are new images."""

    def __post_init__(self) -> None:
        ok = self.name.replace("-", "").isalnum() and self.name.isascii() and len(self.name) <= 60
        require(ok, "name", self.name, "letters, digits and dashes, at most 60")
        require(
            self.source.kind == "digits" or bool(self.source_uri),
            "source_uri",
            self.source_uri,
            "where the images lie (docs/data.md)",
        )
        if re.match(r"[a-zA-Z0-9+.-]+://[^/]*@", self.source_uri or ""):
            # Not shown: what stands before the @ may be a password.
            raise ConfigError("source_uri holds a user or a password: give the bare address")
        if self.autoencoder.kind == "fit":
            self._check_halved(len(self.autoencoder.fit.widths) - 1)
        positive(self, "config", "processes", "continue_images")
        check_fit(self.network, self.objective)
        rule = self.generate.sampler.rule
        integrates = self.network.time != "conditioned" or rule in ("euler", "heun")
        wanted = "'euler' or 'heun' for a network that is conditioned on gamma"
        require(integrates, "generate.sampler.rule", rule, wanted)
        require(
            self.threads is None or 0 < self.threads <= MOST_THREADS,
            "threads",
            self.threads,
            f"from 1 to {MOST_THREADS}, or null for all cores, shared among the processes",
        )
        require(
            self.train.batch_size % self.processes == 0,
            "train.batch_size",
            self.train.batch_size,
            f"a multiple of processes ({self.processes})",
        )
        for name in self.further:
            require(is_plain_name(name), "further", name, "lower-case letters, digits and dashes")
        for key in self.policy.metrics:
            extractor = kind_of(key)[1]
            known = extractor is None or extractor in self.further
            rule = f"of an extractor of [further] ({', '.join(self.further) or 'there are none'})"
            require(known, "policy.metrics", key, rule)
        gated = sorted(one.name for one in self.evaluate.ood.sets if one.gated)
        for name in self.policy.minimum_auroc:
            read = name.partition("/")[0]
            rule = f"of a gated set of evaluate.ood.sets ({', '.join(gated) or 'there are none'})"
            require(read in gated, "policy.minimum_auroc", name, rule)

    def _check_halved(self, times: int) -> None:
        size = self.source.image_size_px
        require(
            size % 2**times == 0,
            "source.image_size_px",
            size,
            f"a multiple of {2**times}, which the {times + 1} entries of autoencoder.fit.widths "
            "halve down: choose another size, or fewer widths",
        )
