"""Stage "train": sealed latents -> a trained gradient field. ``python -m eqm.train CONFIG.json``

The loop is setup / step / report / persist. Everything random about training image number n is a
function of (seed, n), and the position is one integer, so a killed run that is started again ends
in the same bits. Gradients are summed over ranks flat, in one call: nothing is bucketed.
"""

import json
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from eqm import checkpoint, gauges, model, sampling
from eqm.autoencoder import read_pretrained
from eqm.batches import Batch, batches
from eqm.checkpoint import TrainState
from eqm.config import PretrainedFile, SamplerConfig, TrainConfig, TrainStage
from eqm.distributed import World
from eqm.errors import DataError, EqmError
from eqm.events import EventLog, log_of, restore
from eqm.latent_set import LatentSet, open_manifest
from eqm.latents import sample_latents
from eqm.learner import Learner, check_slope, learning_rate
from eqm.model import Model, ModelSpec
from eqm.objective import Corrupted
from eqm.official import import_official, read_official
from eqm.progress import Progress
from eqm.randomness import Stream, normal
from eqm.records import Blob, Record, sha256, to_json
from eqm.registry import RunMirror
from eqm.report import sample_grid
from eqm.stage import Context, Outcome
from eqm.stage import main as stage_main
from eqm.storage import Store

HISTORY_POINTS = 200
"""The training curve has about so many points, whatever the length of the run."""
EVENTS = "events.jsonl"
"""The log of the run, among the logs of the sealed record."""
CATCH_UP_SECONDS = 600.0
"""How long MLflow may take for what it has missed of a sealed run, while it answers."""
GRID_SAMPLES_A_CLASS = 6
GRID_CLASSES = 10


class InterruptedTraining(EqmError):
    """The run was asked to stop, and has made its state durable."""


@dataclass
class Run:
    """What the loop carries."""

    context: Context
    stage: TrainStage
    spec: ModelSpec
    data: LatentSet
    learner: Learner
    images_seen: int = 0
    history: dict[str, list[float]] = field(
        default_factory=lambda: {"images": [], "loss": [], "gradient_norm": []}
    )
    since_report: list[Tensor] = field(default_factory=list)
    """(loss, gradient norm) of the updates since the last point of the curve, on the device."""
    persisted: int = -1
    """Position of the newest durable checkpoint."""
    log: EventLog = field(default_factory=EventLog)
    """Of the first rank; that of another stays empty."""
    stopwatch: gauges.Stopwatch = field(default_factory=gauges.Stopwatch)

    @cached_property
    def tally(self) -> Tensor:
        """Losses by band since the last report (gauges.by_band), float64, on the device."""
        return torch.zeros(2 * gauges.BANDS, dtype=torch.float64, device=self.world.device)

    @property
    def world(self) -> World:
        """Where this process stands among its peers."""
        return self.context.world

    @property
    def config(self) -> TrainConfig:
        """Settings of the optimisation."""
        return self.stage.train

    @property
    def network(self) -> torch.nn.Module:
        """What is trained."""
        return self.learner.network

    @property
    def names(self) -> dict[Tensor, str]:
        """Trained parameters and their names."""
        return self.learner.names

    @cached_property
    def snapshots(self) -> frozenset[int]:
        """Positions at which power-function averages are kept."""
        return frozenset(self.config.snapshots)

    @property
    def report_every(self) -> int:
        """Images between two points of the curve: a function of the config alone."""
        return self.config.batch_size * max(1, self.config.updates // HISTORY_POINTS)


# -- setup --------------------------------------------------------------------------------------


def setup(context: Context) -> Run:
    """Open the data, build the network, and go on from the newest complete checkpoint."""
    stage: TrainStage = context.config
    data = open_manifest(context.input("latents"), context.store)
    world_divides(stage.train, context.world)
    spec = ModelSpec(
        schema=model.SCHEMA,
        network=stage.network,
        objective=stage.objective,
        latent=data.manifest.spec,
        classes=data.manifest.classes,
        null_label=stage.train.label_dropout > 0,
    )
    run = Run(
        context=context,
        stage=stage,
        spec=spec,
        data=data,
        learner=Learner(
            first_network(stage, spec, context.world.device, context.store),
            stage.objective,
            stage.train,
            device=context.world.device,
        ),
    )
    resume(run)
    begin_log(run)
    return run


def first_network(
    stage: TrainStage, spec: ModelSpec, device: torch.device, store: Store
) -> torch.nn.Module:
    """The network as the run begins: drawn from the seed, or with the weights of another model."""
    net = spec.build()
    # The l2 energy of a head of zeros has no slope anywhere: it would never train.
    net.initialise(stage.train.seed, zero_head=stage.objective.energy != "l2")
    if stage.train.init_from is not None:
        found = read_weights(stage.train.init_from, stage.network.heads)
        known = known_spec(stage.train.init_from, store)
        if known is not None:
            model.check_same(known, spec, stage.train.init_from.uri)
        model.filled(net, found, stage.train.init_from.uri)
    check_slope(net, stage.objective)
    return net.to(device)


def read_weights(file: PretrainedFile, heads: int) -> dict[str, Tensor]:
    """Weights of another training, or of a checkpoint of the official code or of SiT (``.pt``)."""
    data = read_pretrained(file)
    if not file.uri.lower().endswith(".pt"):
        return model.weights_from_bytes(data, file.uri)
    with tempfile.NamedTemporaryFile(suffix=".pt") as copy:
        copy.write(data)
        copy.flush()
        # Heads are the config's: no weight's shape depends on them.
        return import_official(read_official(copy.name), num_heads=heads, where=file.uri).tensors


def known_spec(file: PretrainedFile, store: Store) -> ModelSpec | None:
    """What weights of this digest were trained as; None where nobody says it.

    A directory of ``Model.save`` says it of the weights in it, and the store of all that were
    trained there, wherever the file lies now.
    """
    folder = Path(file.uri).parent
    if (folder / "digests.json").is_file():
        files = model.read_folder(folder)
        if sha256(files["ema.safetensors"]) == file.sha256:
            return model.spec_from_bytes(files["model.json"], str(folder / "model.json"))
    seals = [key for key in store.list("train/") if key.endswith("/record.json")]
    for record in (store.record("train", key.split("/")[1]) for key in seals):
        if record is not None and file.sha256 in {b.sha256 for b in record.outputs.values()}:
            data = store.get(record.outputs["model.json"])
            return model.spec_from_bytes(data, f"model.json of {record.digest[:12]}")
    return None


def world_divides(config: TrainConfig, world: World) -> None:
    """Refuse a global batch that the processes cannot share equally."""
    if config.batch_size % world.size:
        raise DataError(
            f"train.batch_size is {config.batch_size}, which {world.size} processes cannot share "
            "equally: change one of them"
        )


def resume(run: Run) -> None:
    """Put the newest checkpoint's state in place, if there is one."""
    store, digest = run.context.store, run.context.digest
    # Ranks that looked for themselves might see different ones, while another process writes.
    found = checkpoint.newest(store, digest) if run.world.is_first else None
    position = run.world.first_says(-1 if found is None else found)
    if position < 0:
        return
    state = checkpoint.load(store, digest, position)
    with torch.no_grad():
        for parameter, name in run.names.items():
            parameter.copy_(state.parameters[name])
    run.learner.ema.load_state_dict(state.ema)
    run.learner.load_averages(state.averages)
    checkpoint.tensors_to_optimiser(state.optimiser, run.learner.optimiser, run.names)
    run.images_seen = run.persisted = state.images_seen
    run.history = state.history
    run.since_report = [torch.tensor(pair, device=run.world.device) for pair in state.pending]
    if run.world.is_first:
        run.log = restore(store, state.events)
        restore_tally(run)
        sys.stderr.write(f"training goes on from image {state.images_seen:,}\n")


def restore_tally(run: Run) -> None:
    """Go on adding up losses by band: what the checkpoint had of them is in its event."""
    last = run.log.events[-1] if run.log.events else None
    if last is not None and last.images_seen == run.images_seen and last.facts.get("tally"):
        run.tally.copy_(torch.tensor(last.facts["tally"], dtype=torch.float64))


def begin_log(run: Run) -> None:
    """Note that the run starts or goes on."""
    if not run.world.is_first:
        return
    cache, log = run.context.job.runtime.cache, run.log
    if cache is not None:
        log.follow(Path(cache) / "events" / f"{run.context.digest}.jsonl")
    for lost in log.lost:
        sys.stderr.write(f"warning: the log of the run lacks {lost}; training is unaffected\n")
    kind = "start" if run.persisted < 0 else "resume"
    where = {"world_size": run.world.size, "device": str(run.world.device.type)}
    log.append(kind, run.images_seen, **where, lost=list(log.lost))


# -- step ---------------------------------------------------------------------------------------


def step(run: Run, batch: Batch, stop: bool) -> bool:
    """One optimiser update; returns whether any rank wants to stop."""
    # A mean over the global batch, whatever the number of ranks.
    losses = accumulate(run, batch)
    loss = losses.sum() / run.config.batch_size
    numbers = batch.image_numbers.to(run.world.device, non_blocking=True)
    told = gauges.by_band(losses, run.learner.levels(numbers))
    flags = torch.cat([torch.stack([loss, loss.new_tensor(float(stop))]), told])
    flat = torch.cat([run.learner.gradient(), flags])
    run.world.sum_(flat)
    gradient, flags = flat[: -len(flags)], flat[-len(flags) :]
    norm = run.learner.apply(gradient, images_seen=run.images_seen)
    run.images_seen += run.config.batch_size
    run.since_report.append(torch.stack([flags[0], norm]))
    run.tally.add_(flags[2:])
    return bool(flags[1] > 0) if run.world.size > 1 else stop


def accumulate(run: Run, batch: Batch) -> Tensor:
    """Add the gradient of this rank's share; returns the loss of each of its images, (B,)."""
    return run.learner.backward(corrupted(run, batch))


def corrupted(run: Run, batch: Batch) -> Corrupted:
    """Latents sampled from the autoencoder's posterior, with noise and dropped labels."""
    here = batch.to(run.world.device)
    noise = normal(run.config.seed, Stream.POSTERIOR, here.image_numbers, run.spec.latent.shape)
    x = sample_latents(here.moments, noise, run.spec.latent)
    return run.learner.corrupted(x, here.labels, here.image_numbers)


# -- report -------------------------------------------------------------------------------------


def report(run: Run, bar: Progress) -> None:
    """Add a point to the curve where one is due, and log it with all that is measured beside it."""
    if run.images_seen % run.report_every and run.images_seen < total_images(run):
        bar.advance(run.config.batch_size)
        return
    loss, norm = torch.stack(run.since_report).double().mean(dim=0).tolist()
    run.since_report.clear()
    if not (loss == loss and norm < float("inf")):
        raise DataError(
            f"loss {loss} and gradient norm {norm} at image {run.images_seen:,}: training has "
            "diverged; lower train.learning_rate or set train.gradient_clip"
        )
    for name, value in (("images", run.images_seen), ("loss", loss), ("gradient_norm", norm)):
        run.history[name].append(value)
    bar.advance(run.config.batch_size, loss=loss, gradient=norm)
    if run.world.is_first:
        run.log.append("metrics", run.images_seen, gauges.finite(figures_of(run, loss, norm)))
    run.tally.zero_()


def figures_of(run: Run, loss: float, norm: float) -> dict[str, float]:
    """What is logged at a point of the curve."""
    figures = {
        "loss": loss,
        "gradient_norm": norm,
        "learning_rate": learning_rate(run.config, run.images_seen - run.config.batch_size),
        "parameter_norm": gauges.parameter_norm(run.names),
    }
    rates = run.stopwatch.figures(run.config.batch_size)
    return figures | gauges.band_figures(run.tally) | rates | gauges.peak_memory(run.world.device)


def show_grid(run: Run, mirror: RunMirror) -> None:
    """Send a grid of samples of the EMA weights to MLflow."""
    classes = run.spec.classes[:GRID_CLASSES]
    labels = [k for k in range(len(classes)) for _ in range(GRID_SAMPLES_A_CLASS)]
    settings: SamplerConfig = run.context.job.runtime.grid_sampler
    found = sampling.sample(
        ema_model(run),
        labels=labels,
        seeds=range(len(labels)),
        rule=sampling.rule_of(settings),
        updates=settings.updates,
    )
    images = found.images().cpu().numpy()
    grid = images.reshape(len(classes), GRID_SAMPLES_A_CLASS, *images.shape[1:])
    png = sample_grid(grid, classes, scale=max(1, 64 // images.shape[-1]))
    mirror.file(f"samples/{run.images_seen:012d}.png", png)


def ema_model(run: Run) -> Model:
    """The model as it stands, with averaged weights."""
    tensors = {**run.network.state_dict(), **run.learner.ema.state_dict()}
    net = model.filled(run.spec.build().to(run.world.device), tensors, "EMA weights")
    return Model(run.spec, net, autoencoder=lambda: _autoencoder(run))


def _autoencoder(run: Run) -> Any:
    from eqm.autoencoder import load_autoencoder
    from eqm.stage import open_ref

    latents = run.context.input("latents")
    return load_autoencoder(
        open_ref(run.context.store, latents.inputs["autoencoder"]), run.context.store
    )


# -- persist ------------------------------------------------------------------------------------


def persist(run: Run) -> None:
    """Make the state durable, once a position."""
    if run.world.is_first and run.persisted != run.images_seen:
        tally = run.tally.tolist() if bool(run.tally.isfinite().all()) else None
        run.log.append("checkpoint", run.images_seen, tally=tally)
        state = state_of(run)
        checkpoint.save(run.context.store, run.context.digest, state)
        run.log.commit(state.events)
    run.persisted = run.images_seen


def state_of(run: Run) -> TrainState:
    """All that the rest of the run is a function of."""
    return TrainState(
        images_seen=run.images_seen,
        parameters={name: p.detach() for p, name in run.names.items()},
        ema=run.learner.ema.state_dict(),
        optimiser=checkpoint.optimiser_to_tensors(run.learner.optimiser, run.names),
        history=run.history,
        pending=torch.stack(run.since_report).tolist() if run.since_report else [],
        averages=run.learner.averages(),
        events=run.log.segments(),
    )


def keep_snapshot(run: Run) -> None:
    """Keep the power-function averages, where the config wants them kept."""
    if run.world.is_first and run.images_seen in run.snapshots:
        averages = {sigma: track.state_dict() for sigma, track in run.learner.power.items()}
        checkpoint.save_snapshot(run.context.store, run.context.digest, run.images_seen, averages)


def further_outputs(run: Run, weights: dict[str, Tensor]) -> dict[str, bytes | Blob]:
    """Averages beside the main ones: those at the end, and the snapshots on the way there."""
    further = run.learner.averages()
    found: dict[str, bytes | Blob] = {
        f"{name}.safetensors": checkpoint.tensors_to_bytes({**weights, **averages})
        for name, averages in further.items()
    }
    for images in sorted(run.snapshots):
        kept = checkpoint.read_snapshot(run.context.store, run.context.digest, images)
        for track in kept.tracks:
            found[model.snapshot_name(track.sigma_rel, images)] = track.tensors
    return found


def outcome_of(run: Run) -> Outcome:
    """What the stage leaves behind."""
    weights, averages = run.network.state_dict(), run.learner.ema.state_dict()
    return Outcome(
        outputs={
            "model.json": model.spec_to_bytes(run.spec),
            "ema.safetensors": checkpoint.tensors_to_bytes({**weights, **averages}),
            "raw.safetensors": checkpoint.tensors_to_bytes(weights),
            **further_outputs(run, weights),
            "history.json": json.dumps(run.history).encode(),
        },
        values={
            "images_seen": run.images_seen,
            "parameters": sum(p.numel() for p in run.names),
            "final_loss": run.history["loss"][-1],
        },
        logs={EVENTS: run.log.to_bytes()},
    )


# -- the loop -----------------------------------------------------------------------------------


def program(context: Context) -> Outcome | None:
    """Train to the end of the config; the first rank returns the outcome."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    run = setup(context)
    mirror = open_mirror(run)
    try:
        loop(run, mirror)
    except BaseException:
        if mirror is not None:
            mirror.close("KILLED")
        raise
    if context.world.is_first:
        run.log.append("finished", run.images_seen)
    if mirror is not None:
        mirror.close("FINISHED")
    return outcome_of(run) if context.world.is_first else None


def loop(run: Run, mirror: RunMirror | None) -> None:
    """Step, report, persist until all images are seen."""
    runtime, total = run.context.job.runtime, total_images(run)
    bar = run.context.progress("training", total, done=run.images_seen)
    with StopSignals() as asked, bar:
        coming = islice(feed(run), (total - run.images_seen) // run.config.batch_size)
        for batch in run.stopwatch.waiting_for(coming):
            before = run.images_seen
            stop = step(run, batch, bool(asked))
            report(run, bar)
            last = run.images_seen >= total
            if stop and not last and run.world.is_first:
                run.log.append("interrupted", run.images_seen)
            # Before the checkpoint: whoever goes on from that finds all snapshots up to there.
            keep_snapshot(run)
            if stop or last or crossed(before, run.images_seen, runtime.checkpoint_every_images):
                persist(run)
            if mirror and (last or crossed(before, run.images_seen, runtime.grid_every_images)):
                show_grid(run, mirror)
            if stop and not last:
                raise InterruptedTraining(
                    f"stopped at image {run.images_seen:,} of {total:,}, with a checkpoint there: "
                    "start it again to go on"
                )


def feed(run: Run) -> Iterator[Batch]:
    """This rank's share of the batches from the current position on."""
    return batches(
        run.data,
        batch_size=run.config.batch_size,
        seed=run.config.seed,
        first_image=run.images_seen,
        rank=run.world.rank,
        world=run.world.size,
        pin=run.world.device.type == "cuda",
    )


def total_images(run: Run) -> int:
    """Images of the whole run: whole updates."""
    return run.config.updates * run.config.batch_size


def crossed(before: int, after: int, interval: int) -> bool:
    """Whether a multiple of an interval lies in (before, after]."""
    return before // interval != after // interval


def open_mirror(run: Run) -> RunMirror | None:
    """The MLflow run of the first rank, where MLflow is given."""
    return mirror_of(run.context, run.log)


def mirror_of(context: Context, log: EventLog) -> RunMirror | None:
    """What shows a log in MLflow, where MLflow is given: by the first rank."""
    runtime, settings = context.job.runtime, to_json(context.config)
    if runtime.mlflow_uri is None or not context.world.is_first:
        return None
    return RunMirror(
        runtime.mlflow_uri,
        experiment=runtime.mlflow_experiment,
        run_name=f"{runtime.run_name or 'train'}-{context.digest[:8]}",
        digest=context.digest,
        params={f"{s}.{k}": v for s, table in settings.items() for k, v in table.items()},
        log=log,
    )


def catch_up(context: Context, record: Record) -> None:
    """Send MLflow what it has missed of a run that is sealed."""
    if context.job.runtime.mlflow_uri is None or EVENTS not in record.logs:
        return
    data = context.store.get(record.logs[EVENTS])
    mirror = mirror_of(context, log_of(data, f"{EVENTS} of {record.digest[:12]}"))
    if mirror is not None:
        mirror.close("FINISHED", seconds=CATCH_UP_SECONDS)


class StopSignals:
    """Collect SIGTERM and SIGINT while the loop runs, so that it ends between two updates."""

    def __enter__(self) -> list[int]:
        self.asked: list[int] = []
        kinds = (signal.SIGTERM, signal.SIGINT)
        self._before = {kind: signal.signal(kind, self._note) for kind in kinds}
        return self.asked

    def __exit__(self, *_: object) -> None:
        for kind, handler in self._before.items():
            signal.signal(kind, handler)

    def _note(self, kind: int, _: FrameType | None) -> None:
        self.asked.append(kind)


def main(argv: list[str]) -> int:
    """Run the stage program."""
    return stage_main(("train",), program, argv, sealed=catch_up)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
