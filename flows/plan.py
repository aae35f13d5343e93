"""From a config to jobs: what each stage is asked, and whether it has been answered already.

A :class:`Plan` holds what all stages of a run share. ``ensure`` is the one way in which a flow
gets a result: the sealed record if there is one, else a launched program and then its record.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqm import recipes
from eqm.config import (
    PRESETS,
    PROGRAMS,
    AutoencoderStage,
    ComputeConfig,
    EvaluationStage,
    ExtractorStage,
    Job,
    LatentsStage,
    PipelineConfig,
    ReferenceStage,
    Runtime,
    SamplesStage,
    StudyStage,
    TrainStage,
    pipeline_config,
    replace,
)
from eqm.errors import ConfigError, DataError, TrackingError
from eqm.images import ImageSource, checked_source, open_source
from eqm.names import further_input
from eqm.records import LatentSpec, Record, Ref, to_json
from eqm.registry import check
from eqm.stage import job_digest, listing_key, verify
from eqm.storage import Store, open_store
from flows.clusters import Slurm
from flows.launch import Launcher, LocalLauncher
from flows.settings import Settings, current_settings

Changes = Mapping[str, Any] | None
"""Single settings by dotted name, as ``{"train.images": 1000}``."""
Records = Mapping[str, Record]
"""Name of a further extractor -> its record, or that of the reference that it made."""


@dataclass(frozen=True)
class Plan:
    """What all stages of a run share."""

    config: PipelineConfig
    settings: Settings
    store: Store
    launcher: Launcher

    @property
    def model_name(self) -> str:
        """Name of the registered model."""
        return f"eqm-{self.config.name}"

    @property
    def mlflow_uri(self) -> str:
        """The tracking server. Raises ConfigError."""
        if self.settings.mlflow_uri is None:
            raise ConfigError(
                "no MLflow is running or given: start it with `eqm up`, or set MLFLOW_TRACKING_URI"
            )
        return self.settings.mlflow_uri

    @property
    def processes(self) -> int:
        """Processes of a stage that can use several: not more than there are GPUs, if any."""
        if self.settings.cluster is not None:
            # The GPUs of the machine that the flow is on say nothing of the cluster's.
            return self.config.processes
        import torch

        gpus = torch.cuda.device_count()
        return min(self.config.processes, gpus) if gpus else self.config.processes

    def runtime(self, stage: str) -> Runtime:
        """Where things lie: in no digest."""
        return Runtime(
            store=self.store.uri,
            cache=str(self.settings.home / "cache"),
            cache_bytes=self.settings.cache_bytes,
            source_uri=self.config.source_uri,
            mlflow_uri=self.settings.mlflow_uri if stage == "train" else None,
            mlflow_experiment=self.model_name,
            run_name=self.config.name,
            grid_sampler=self.config.generate.sampler,
            threads=self.config.threads,
            compute=self.config.compute if stage == "train" else ComputeConfig(),
            collective_timeout_seconds=self.config.compute.timeout_seconds,
            checkpoint_every_images=self.config.checkpoints.every_images,
            keep_checkpoints=self.config.checkpoints.keep,
            grid_every_images=self.config.checkpoints.grid_every_images,
        )


def read_config(config: str | Mapping[str, Any], changes: Changes = None) -> PipelineConfig:
    """A name of a preset or recipe, a TOML file or a table, with changes. Raises ConfigError.

    Only what comes of both is checked: a change may mend a file, and two may need each other. The
    policy may be the name of a file of its own, beside the config that names it.
    """
    table, rest = dict(_table(config)), dict(changes or {})
    folder = Path(config).parent if isinstance(config, str) else Path()
    file = None
    if isinstance(table.get("policy"), str):
        file = folder / table.pop("policy")
    if isinstance(rest.get("policy"), str):
        file = Path(rest.pop("policy"))
    if file is not None:
        # As a whole: floors of a preset that the file does not name are not meant.
        rest = {"policy": _toml(file, "policy"), **rest}
    return pipeline_config(table, rest)


def _table(config: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(config, str):
        return config
    if config in PRESETS:
        return {"preset": config}
    known = recipes.recipes()
    if config in known:
        return {"preset": "defaults", **to_json(known[config].config)}
    path = Path(config)
    if path.suffix != ".toml":
        raise ConfigError(
            f"config {config!r} is neither a preset ({', '.join(PRESETS)}), nor one of `eqm "
            "recipes`, nor a .toml file"
        )
    return _toml(path, "config")


def _toml(path: Path, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {path} is not TOML: {error}") from error


def store_of(settings: Settings) -> Store:
    """The store of this environment. Raises ConfigError where it is an S3 that nobody named."""
    nobody = settings.s3_endpoint is None and settings.s3_access_key is None
    if settings.store.startswith("s3://") and nobody:
        raise ConfigError(
            f"store {settings.store}: no S3 is running or given; start it with `eqm up`, or set "
            "EQM_S3_ENDPOINT, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for AWS itself"
        )
    cache = settings.home / "cache"
    return open_store(settings.store, cache=cache, cache_bytes=settings.cache_bytes)


def make_plan(
    config: str | Mapping[str, Any], changes: Changes = None, *, tracked: bool = True
) -> Plan:
    """Read config and environment, and open the store.

    ``tracked``: MLflow will be needed. Raises ConfigError, StoreError, TrackingError.
    """
    checked = read_config(config, changes)
    check_training(checked)
    settings = current_settings()
    settings.check_sources(to_json(checked))
    check_apart(checked, settings)
    store = store_of(settings)
    # Asks before anything is begun whether the store is there and lets us in.
    store.list("history/")
    plan = Plan(checked, settings, store, make_launcher(settings))
    if tracked:
        _ask_mlflow(plan)
    return plan


def check_apart(config: PipelineConfig, settings: Settings, *, named: str = "EQM_STORE") -> None:
    """Refuse a store among the images: every later listing would take it for classes of them.

    ``named``: what gave the store. Raises ConfigError.
    """
    source, place = config.source_uri, settings.store
    if config.source.kind == "digits" or source is None or "://" in source or "://" in place:
        return
    around, within = Path(source).resolve(), Path(place).resolve()
    if not within.is_relative_to(around):
        return
    # What is hidden, as .eqm, is in no listing.
    if not any(part.startswith(".") for part in within.relative_to(around).parts):
        raise ConfigError(
            f"{named} is {place}, which is {'' if within == around else 'in '}the source {source}: "
            "its folders would be read as images; name a place outside of it"
        )


def check_training(config: PipelineConfig) -> None:
    """Refuse now, not after a night of encoding, what training would refuse. Raises ConfigError.

    What depends on the latents, or on the machine that trains, is told by ``check_foreseen`` and
    ``check_trainable``.
    """
    from torch.nn import Module

    from eqm.compute import (
        blocks_of,
        check_attention,
        check_double,
        check_halves,
        check_micro_batch,
    )

    compute, objective = config.compute, config.objective
    check_micro_batch(compute, objective, config.train.batch_size // config.processes)
    check_double(compute, objective)
    check_attention(compute, config.network, config.train)
    check_halves(config.train, objective, config.network)
    if config.network.kind == "unet":
        # As any network without blocks.
        blocks_of(Module(), compute)
    if compute.parallel == "fsdp2":
        # Half a second that nobody else should wait for.
        from eqm.sharding import check_shardable

        check_shardable(objective, config.processes)


def check_foreseen(plan: Plan, autoencoder: Job) -> None:
    """As ``check_trainable``, before an autoencoder is fitted. Raises ConfigError.

    Of one that somebody else made, the shape of its latents is known when it is sealed.
    """
    config = plan.config
    there = plan.store.record("autoencoder", job_digest(autoencoder)) is not None
    if there or config.autoencoder.kind == "pretrained":
        return
    from eqm.recipes import latent_shape

    shape = latent_shape(config)
    network = _untrained(
        config,
        LatentSpec(
            autoencoder="",
            image_size_px=config.source.image_size_px,
            image_channels=config.source.channels,
            shape=shape,
            shift=(0.0,) * shape[0],
            scale=(1.0,) * shape[0],
        ),
    )
    if plan.settings.cluster is None:
        _check_machine(plan, network)


def check_trainable(plan: Plan, autoencoder: Record, latents: Job) -> None:
    """Refuse before latents are made what could not be trained on them. Raises ConfigError.

    Patches that do not tile them, levels of a U-Net that do not halve them; and what this machine
    cannot do, where it is the one that trains.
    """
    from eqm.autoencoder import latent_spec

    network = _untrained(plan.config, latent_spec(autoencoder, plan.store))
    # Of latents that are there, the model may be as well, trained on another machine.
    if plan.settings.cluster is None and plan.store.record("latents", job_digest(latents)) is None:
        _check_machine(plan, network)


def _untrained(config: PipelineConfig, latent: LatentSpec) -> Any:
    """The network of a config on latents, without weights: of XL/2 they are 2.7 GB."""
    import torch

    from eqm.model import SCHEMA, ModelSpec

    spec = ModelSpec(
        schema=SCHEMA,
        network=config.network,
        objective=config.objective,
        latent=latent,
        classes=(),
        null_label=False,
    )
    with torch.device("meta"):
        return spec.build()


def _check_machine(plan: Plan, network: Any) -> None:
    """Refuse what the devices of this machine, or so many of them, cannot do."""
    from eqm.compute import check_halves, check_kernels
    from eqm.distributed import pick_device
    from eqm.precision import check_products

    config, started, device = plan.config, plan.processes, pick_device("auto")
    check_kernels(network, config.compute, device)
    check_products(config.train.precision, device)
    check_halves(config.train, config.objective, device=device)
    sampled = config.generate.sampler.precision
    check_products(sampled, device, setting="generate.sampler.precision")
    if started == config.processes:
        return
    # What was asked for was checked when the config was read.
    gpus = f"{started} GPU{'s' if started > 1 else ''}"
    why = f"processes is {config.processes}, but this machine has {gpus}, one a process"
    if config.compute.parallel == "fsdp2" and started == 1:
        raise ConfigError(
            f"{why}: compute.parallel is 'fsdp2', which shares weights among several; set it to "
            "'ddp', or train where there are more"
        )
    size, part = config.train.batch_size, config.compute.micro_batch or 1
    if size % (started * part):
        parts = "" if part == 1 else f" in parts of compute.micro_batch ({part})"
        raise ConfigError(
            f"{why}: these cannot share a train.batch_size of {size}{parts} equally; change one of "
            "the settings"
        )


def _ask_mlflow(plan: Plan) -> None:
    """Refuse an MLflow that is away now, not after an hour of encoding: a person can mend it.

    A run that nobody watches goes on: training does without it, and what needs it waits.
    """
    from flows.prefect_tools import is_deployed, logged

    uri = plan.mlflow_uri
    try:
        check(uri)
    except TrackingError as error:
        if not is_deployed():
            raise
        logged(f"warning: {error}")


def make_launcher(settings: Settings) -> Launcher:
    """What runs stage programs in this environment."""
    cluster, environment = settings.cluster, settings.child_environment()
    if cluster is None:
        return LocalLauncher(folder=settings.home / "jobs", environment=environment)
    from flows.launch_kubernetes import KubernetesLauncher
    from flows.launch_slurm import SlurmLauncher
    from flows.prefect_tools import is_moved, logged

    if isinstance(cluster, Slurm):
        return SlurmLauncher(cluster, environment=environment, say=logged, leaves=is_moved)
    return KubernetesLauncher(cluster, environment=environment, say=logged, leaves=is_moved)


# -- what each stage is asked -------------------------------------------------------------------


def list_source(plan: Plan) -> ImageSource:
    """List the images, and keep the listing for the jobs that build on it. Raises DataError.

    New, changed or missing images make another digest.
    """
    config, memory = plan.config, plan.settings.home / "scans"
    source = open_source(config.source, config.source_uri, memory=memory)
    plan.store.write_once(listing_key(source.digest), source.listing_bytes())
    return source


def listed(plan: Plan, source: Ref) -> ImageSource:
    """The images of a listing that :func:`list_source` kept. Raises StoreError, IntegrityError."""
    kept = plan.store.read(listing_key(source.digest))
    return checked_source(plan.config.source, plan.config.source_uri, source, listing=kept)


def source_ref(source: ImageSource) -> Ref:
    """How stages name a listing."""
    return Ref(stage="source", digest=source.digest, content=source.digest)


def autoencoder_job(plan: Plan, source: Ref) -> Job:
    """Fit, or check and seal, the autoencoder."""
    config = plan.config
    asked = AutoencoderStage(source=config.source, autoencoder=config.autoencoder)
    return _job(plan, "autoencoder", asked, {"source": source})


def extractor_job(plan: Plan, source: Ref, further: str | None = None) -> Job:
    """Fit, or check and seal, the feature extractor, or a further one by its name."""
    config = plan.config
    extractor = config.extractor if further is None else config.further[further].extractor
    asked = ExtractorStage(source=config.source, extractor=extractor)
    return _job(plan, "extractor", asked, {"source": source})


def latents_job(plan: Plan, source: Ref, autoencoder: Record, earlier: Record | None = None) -> Job:
    """Encode the images into shards; those in ``earlier`` latents are copied."""
    asked = LatentsStage(source=plan.config.source, encode=plan.config.encode)
    inputs = {"source": source, "autoencoder": autoencoder.ref}
    if earlier is not None:
        inputs["earlier"] = earlier.ref
    return _job(plan, "latents", asked, inputs)


def to_be_trained_on(plan: Plan, latents: Job) -> Job:
    """The same latents, whose program refuses what a training where it runs would refuse."""
    return replace(latents, runtime=replace(latents.runtime, compute=plan.config.compute))


def train_job(plan: Plan, latents: Record) -> Job:
    """Train on the latents."""
    config = plan.config
    asked = TrainStage(network=config.network, objective=config.objective, train=config.train)
    return _job(plan, "train", asked, {"latents": latents.ref})


def samples_job(
    plan: Plan, trained: Record, extractor: Record, further: Records | None = None
) -> Job:
    """Generate samples and their features, also those of further extractors."""
    asked = SamplesStage(generate=plan.config.generate)
    inputs = {"train": trained.ref, "extractor": extractor.ref}
    return _job(plan, "samples", asked, {**inputs, **_further("extractor", further)})


def reference_job(plan: Plan, source: Ref, extractor: Record, further: str | None = None) -> Job:
    """Look at the real images that samples are held against, by the extractor that is given.

    ``further``: its name, unless it is the main one.
    """
    config = plan.config
    kept = config.reference if further is None else config.further[further].reference
    asked = ReferenceStage(source=config.source, reference=kept)
    return _job(plan, "reference", asked, {"source": source, "extractor": extractor.ref})


def evaluation_job(
    plan: Plan,
    source: Ref,
    trained: Record,
    extractor: Record,
    samples: Record,
    reference: Record,
    further: Records | None = None,
) -> Job:
    """Measure the samples and the model; ``further``: references of further extractors by name."""
    asked = EvaluationStage(source=plan.config.source, evaluate=plan.config.evaluate)
    inputs = {
        "source": source,
        "train": trained.ref,
        "extractor": extractor.ref,
        "samples": samples.ref,
        "reference": reference.ref,
        **_further("reference", further),
    }
    return _job(plan, "evaluation", asked, inputs)


def study_job(plan: Plan, asked: StudyStage, cells: Mapping[str, Ref]) -> Job:
    """Put evaluations into the table of a study."""
    return _job(plan, "study", asked, dict(cells))


def _further(stage: str, records: Records | None) -> dict[str, Ref]:
    return {further_input(stage, name): record.ref for name, record in (records or {}).items()}


def _job(plan: Plan, stage: str, asked: Any, inputs: dict[str, Ref]) -> Job:
    return Job(stage=stage, config=to_json(asked), inputs=inputs, runtime=plan.runtime(stage))


# -- how it is answered -------------------------------------------------------------------------


def sealed(plan: Plan, job: Job) -> Record | None:
    """The sealed record of a job, with every byte that it names verified."""
    record = plan.store.record(job.stage, job_digest(job))
    if record is not None:
        verify(plan.store, record)
    return record


def ensure(plan: Plan, job: Job, *, say: Any, processes: int = 1) -> Record:
    """The record of a job: the sealed one, or that of a program launched now.

    Raises StageError or AwayError where the program fails, DataError where it seals nothing.
    """
    name = f"{job.stage} {job_digest(job)[:12]}"
    record = sealed(plan, job)
    if record is not None:
        say(f"{name}: sealed and verified, skipped")
        return record
    say(f"{name}: starting {PROGRAMS[job.stage]}")
    plan.launcher.run(job, processes=processes)
    record = plan.store.record(job.stage, job_digest(job))
    if record is None:
        raise DataError(f"{name} ended well but sealed no record in {plan.store.uri}")
    say(f"{name}: sealed, content {record.content[:12]}")
    return record


def require_sealed(plan: Plan, job: Job) -> Record:
    """The sealed record of a job that must have been done before. Raises DataError."""
    record = sealed(plan, job)
    if record is None:
        raise DataError(
            f"{job.stage} {job_digest(job)[:12]} is not sealed in {plan.store.uri}: run "
            "`eqm evaluate` with the same config first"
        )
    return record
