"""What the program of each stage is given: its config, its inputs, and where and how it runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from eqm.config.checks import positive
from eqm.config.data import (
    AutoencoderConfig,
    EncodeConfig,
    ExtractorConfig,
    ReferenceConfig,
    SourceConfig,
)
from eqm.config.evaluation import EvaluateConfig, GenerateConfig, SamplerConfig
from eqm.config.model import NetworkConfig, ObjectiveConfig, TrainConfig, check_fit
from eqm.config.pipeline import ComputeConfig
from eqm.errors import require
from eqm.records import Ref, from_json

ALGORITHMS = {
    "autoencoder": 1,
    "extractor": 1,
    "latents": 2,
    "train": 1,
    "samples": 4,
    "reference": 1,
    "evaluation": 8,
    "study": 2,
}
"""Stage -> number that is raised when the stage's output for the same input would change."""


PROGRAMS = {
    "autoencoder": "eqm.fit",
    "extractor": "eqm.fit",
    "latents": "eqm.encode",
    "train": "eqm.train",
    "samples": "eqm.generate",
    "reference": "eqm.reference",
    "evaluation": "eqm.evaluate",
    "study": "eqm.study",
}
"""Stage -> module that is run as a program, ``python -m MODULE CONFIG.json``."""


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Where things lie and how they run: changes no result, is hashed into no digest."""

    store: str
    """s3://bucket/prefix or a local directory."""
    cache: str | None = None
    """Directory for verified local copies of blobs."""
    cache_bytes: int | None = None
    """How much of them is kept at most; null: all."""
    source_uri: str | None = None
    mlflow_uri: str | None = None
    mlflow_experiment: str = "eqm"
    run_name: str = ""
    device: str = "auto"
    threads: int | None = None
    """CPU threads a process; null: all cores over the local processes."""
    collective_timeout_seconds: float = 600.0
    """How long ranks wait for one that stalls and says nothing."""
    patience_seconds: float = 300.0
    """How long a training asks a store again that is away; at most half of the time above, for the
    others may wait for the rank that asks."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    """How a training step is computed."""
    checkpoint_every_images: int = 25_600
    keep_checkpoints: int = 3
    """The newest of a training that stay; older ones are deleted."""
    lease_seconds: float = 30.0
    """A training that is not heard of for so long is taken over by another process that was started
    for it. Less than the default is for tests: a store that answers late would end a training."""
    grid_every_images: int | None = None
    """None: samples are not looked at while training goes on."""
    grid_sampler: SamplerConfig = field(default_factory=SamplerConfig)
    """How the grids that training shows are sampled."""
    error_file: str | None = None
    """Where a failed program leaves its message for whoever started it."""
    workers: int | None = None
    """Processes that decode images beside each encoding one; 0 decodes in its own threads, null is
    its share of the cores less one, at least 1."""
    shards: tuple[int, int] | None = None
    """Encode only the shards from the first number to before the second; null: all."""

    def __post_init__(self) -> None:
        positive(self, "runtime", "collective_timeout_seconds")
        count, span = self.workers, self.shards
        require(count is None or count >= 0, "runtime.workers", count, "0 or greater, or null")
        require(
            self.patience_seconds >= 0,
            "runtime.patience_seconds",
            self.patience_seconds,
            "0 or greater",
        )
        for name in ("keep_checkpoints", "lease_seconds", "checkpoint_every_images"):
            value = getattr(self, name)
            require(value >= 1, f"runtime.{name}", value, "1 or greater")
        ok = span is None or 0 <= span[0] < span[1]
        require(ok, "runtime.shards", span, "a first number and a greater end, or null")


@dataclass(frozen=True, kw_only=True)
class Job:
    """The CONFIG.json of one stage program."""

    stage: str
    config: dict[str, Any]
    inputs: dict[str, Ref]
    runtime: Runtime


@dataclass(frozen=True, kw_only=True)
class AutoencoderStage:
    """Config of stage "autoencoder"."""

    source: SourceConfig
    autoencoder: AutoencoderConfig


@dataclass(frozen=True, kw_only=True)
class ExtractorStage:
    """Config of stage "extractor"."""

    source: SourceConfig
    extractor: ExtractorConfig


@dataclass(frozen=True, kw_only=True)
class LatentsStage:
    """Config of stage "latents"."""

    source: SourceConfig
    encode: EncodeConfig


@dataclass(frozen=True, kw_only=True)
class TrainStage:
    """Config of stage "train"."""

    network: NetworkConfig
    objective: ObjectiveConfig
    train: TrainConfig

    def __post_init__(self) -> None:
        check_fit(self.network, self.objective)


@dataclass(frozen=True, kw_only=True)
class SamplesStage:
    """Config of stage "samples"."""

    generate: GenerateConfig


@dataclass(frozen=True, kw_only=True)
class ReferenceStage:
    """Config of stage "reference"."""

    source: SourceConfig
    reference: ReferenceConfig


@dataclass(frozen=True, kw_only=True)
class EvaluationStage:
    """Config of stage "evaluation"."""

    source: SourceConfig
    evaluate: EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One row of a study: what it changes of the base config, and what was published for it."""

    label: str
    changes: dict[str, Any]
    """Settings by dotted name."""
    published: float | None = None
    """The paper's figure, of another protocol than ours."""
    series: str = ""
    """The line it is a point of, in a picture with lines."""
    x: float | None = None
    """Where on that line."""


@dataclass(frozen=True, kw_only=True)
class PublishedRow:
    """A row of the paper alone."""

    label: str
    published: float


@dataclass(frozen=True, kw_only=True)
class StudyStage:
    """Config of stage "study": all that its table shows beside the numbers (eqm.studies)."""

    study: str
    title: str
    asks: str
    published_as: str
    notes: tuple[str, ...]
    x_label: str
    others: tuple[PublishedRow, ...]
    """Published rows that nothing here corresponds to."""
    rows: tuple[StudyRow, ...]
    seeds: int
    """Repetitions of each row; input "<row>-<repetition>" is an evaluation, unless it failed."""
    base: dict[str, Any]
    """Tables of the config that the rows change."""
    outliers: bool = False
    """Whether its table tells what lies out of distribution as well."""
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """Name of an input that there is none of -> why: that training or its samples diverged."""

    def __post_init__(self) -> None:
        positive(self, "study", "seeds")
        require(len(self.rows) > 0, "study.rows", self.rows, "at least one row")
        labels = [row.label for row in self.rows]
        require(len(set(labels)) == len(labels), "study.rows", labels, "rows of different labels")


def study_input(row: int, repetition: int) -> str:
    """Name of the input of stage "study" that is one cell of its table."""
    return f"{row:02d}-{repetition:02d}"


def stage_config(stage: str, config: Mapping[str, Any]) -> Any:
    """Build the typed config of a stage from the JSON of its job. Raises ConfigError."""
    classes = {
        "autoencoder": AutoencoderStage,
        "extractor": ExtractorStage,
        "latents": LatentsStage,
        "train": TrainStage,
        "samples": SamplesStage,
        "reference": ReferenceStage,
        "evaluation": EvaluationStage,
        "study": StudyStage,
    }
    require(stage in classes, "stage", stage, f"one of {', '.join(classes)}")
    return from_json(classes[stage], config, stage)
