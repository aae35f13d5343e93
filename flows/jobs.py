"""What each stage of a run is asked, and whether it has been answered already.

A :class:`Plan` holds what all stages of a run share. ``ensure`` is the one way in which a flow
gets a result: the sealed record if there is one, else a launched program and then its record.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eqm.config import (
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
    replace,
)
from eqm.errors import ConfigError, DataError
from eqm.images import ImageSource, checked_source, open_source
from eqm.names import further_input
from eqm.records import Record, Ref, to_json
from eqm.stage import job_digest, listing_key, verify
from eqm.storage import Store
from flows.launch import Launcher
from flows.settings import Settings

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
