"""A whole chain of sealed stages in seconds, for tests of the stages near its end.

``build`` runs autoencoder -> latents -> train -> extractor -> samples -> reference -> evaluation
in this process, on 8 x 8 digits that are their own latents. What is sealed in the folder already is
not run again, so the test modules of a session share one chain.
"""

import dataclasses
import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eqm import encode, evaluate, fit, generate, reference, stage, train
from eqm.config import (
    AutoencoderConfig,
    AutoencoderStage,
    EvaluationStage,
    ExtractorStage,
    Job,
    LatentsStage,
    PipelineConfig,
    ReferenceStage,
    Runtime,
    SamplesStage,
    SourceConfig,
    TrainStage,
    replace,
    tiny,
    with_settings,
)
from eqm.images import open_source
from eqm.records import Record, Ref, to_json
from eqm.storage import LocalStore

STAGES = ("autoencoder", "latents", "train", "extractor", "samples", "reference", "evaluation")
PROGRAMS: dict[str, stage.Program] = {
    "autoencoder": fit.program,
    "extractor": fit.program,
    "latents": encode.program,
    "train": train.program,
    "samples": generate.program,
    "reference": reference.program,
    "evaluation": evaluate.program,
}
UPDATES = 20


def tiniest(changes: Mapping[str, Any] | None = None) -> PipelineConfig:
    """The tiny preset with identity latents and 20 updates; changes by dotted name."""
    config = replace(
        tiny(),
        source=SourceConfig(image_size_px=8),
        autoencoder=AutoencoderConfig(kind="identity"),
    )
    settings = {
        "encode.shard_images": 600,
        "extractor.fit.images": 320,
        "train.images": UPDATES * 32,
        "train.batch_size": 32,
        "train.learning_rate": 4e-3,
        "train.decay_fraction": 0.25,
        "train.ema_half_life_images": 160.0,
        "generate.samples": 50,
        "generate.keep_images": 40,
        "generate.trajectory_points": 3,
        "generate.sampler.batch_size": 20,
        "generate.sampler.step_size": 0.1,
        "evaluate.ood.images": 30,
        "evaluate.ood.descent_updates": 3,
    }
    return with_settings(config, {**settings, **(changes or {})})


@dataclass(frozen=True)
class Chain:
    """Sealed records of the stages of one config, in one store."""

    config: PipelineConfig
    store: LocalStore
    records: dict[str, Record]

    def __getitem__(self, name: str) -> Record:
        return self.records[name]

    def job(self, name: str, **runtime: Any) -> Job:
        """The job that made a record."""
        return job(self.config, self.store, name, self.records, **runtime)

    def uri(self, name: str) -> str:
        """Address of a record, as users write it."""
        return f"{self.store.uri}/{name}/{self.records[name].digest}"


def build(
    folder: Path, changes: Mapping[str, Any] | None = None, *, until: str = "evaluation"
) -> Chain:
    """Run every stage up to one, in a store at ``folder``."""
    config, store = tiniest(changes), LocalStore(folder)
    records: dict[str, Record] = {}
    for name in STAGES[: STAGES.index(until) + 1]:
        records[name] = run(job(config, store, name, records))
    return Chain(config, store, records)


def job(
    config: PipelineConfig,
    store: LocalStore,
    name: str,
    records: Mapping[str, Record],
    **runtime: Any,
) -> Job:
    """Job of a stage on the records it builds on."""
    source = listing(config.source, config.source_uri)
    asked, needs = {
        "autoencoder": (
            AutoencoderStage(source=config.source, autoencoder=config.autoencoder),
            ("source",),
        ),
        "extractor": (
            ExtractorStage(source=config.source, extractor=config.extractor),
            ("source",),
        ),
        "latents": (
            LatentsStage(source=config.source, encode=config.encode),
            ("source", "autoencoder"),
        ),
        "train": (
            TrainStage(network=config.network, objective=config.objective, train=config.train),
            ("latents",),
        ),
        "samples": (SamplesStage(generate=config.generate), ("train", "extractor")),
        "reference": (
            ReferenceStage(source=config.source, reference=config.reference),
            ("source", "extractor"),
        ),
        "evaluation": (
            EvaluationStage(source=config.source, evaluate=config.evaluate),
            ("source", "train", "extractor", "samples", "reference"),
        ),
    }[name]
    inputs = {need: source if need == "source" else records[need].ref for need in needs}
    where = {"store": store.uri, "device": "cpu", "threads": 1, "source_uri": config.source_uri}
    return Job(
        stage=name, config=to_json(asked), inputs=inputs, runtime=Runtime(**{**where, **runtime})
    )


@functools.cache
def listing(source: SourceConfig, uri: str | None) -> Ref:
    """What images there are, looked at once."""
    found = open_source(source, uri).digest
    return Ref(stage="source", digest=found, content=found)


def run(asked: Job) -> Record:
    """Run a job in this process; what it chooses of torch ends with the test (conftest)."""
    return stage.run(asked, PROGRAMS[asked.stage])


def elsewhere(asked: Job, folder: Path) -> Job:
    """The same job in another store."""
    return dataclasses.replace(asked, runtime=replace(asked.runtime, store=str(folder)))


def untrained(chain: Chain, folder: Path, **runtime: Any) -> Job:
    """The training job of a chain, in a store where it was never begun."""
    store = copied(chain, folder / "store", without=("train", "samples", "evaluation"))
    return elsewhere(chain.job("train", **runtime), store.root)


def store_of(asked: Job) -> LocalStore:
    """The store of a job."""
    return LocalStore(Path(asked.runtime.store))


def copied(chain: Chain, folder: Path, *, without: tuple[str, ...]) -> LocalStore:
    """A copy of a chain's store in which some stages were never begun."""

    def left_out(directory: str, _: list[str]) -> set[str]:
        return set(without) if Path(directory) == chain.store.root else set()

    return LocalStore(Path(shutil.copytree(chain.store.root, folder, ignore=left_out)))
