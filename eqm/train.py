"""Stage "train": sealed latents -> a trained gradient field. ``python -m eqm.train CONFIG.json``

The loop is setup / step / report / persist. Everything random about training image number n is a
function of (seed, n), and the position is one integer, so a killed run that is started again ends
in the same bits. Gradients are summed over ranks flat, in one call: nothing is bucketed.
"""

import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from eqm import checkpoint, model, objective
from eqm.batches import Batch, batches
from eqm.checkpoint import TrainState
from eqm.config import SamplerConfig, TrainConfig, TrainStage
from eqm.distributed import World
from eqm.ema import EMA
from eqm.errors import DataError, EqmError
from eqm.field import Field
from eqm.latents import sample_latents
from eqm.model import Model, ModelSpec
from eqm.progress import Progress
from eqm.randomness import Stream, normal, uniform
from eqm.records import to_json
from eqm.registry import RunMirror
from eqm.report import sample_grid
from eqm.shards import LatentSet, open_manifest
from eqm.stage import Context, Outcome
from eqm.stage import main as stage_main

HISTORY_POINTS = 200
"""The training curve has about so many points, whatever the length of the run."""
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
    network: torch.nn.Module
    gradient_field: Field
    optimiser: torch.optim.Optimizer
    ema: EMA
    images_seen: int = 0
    history: dict[str, list[float]] = field(
        default_factory=lambda: {"images": [], "loss": [], "gradient_norm": []}
    )
    since_report: list[Tensor] = field(default_factory=list)
    """(loss, gradient norm) of the updates since the last point of the curve, on the device."""
    persisted: int = -1
    """Position of the newest durable checkpoint."""

    @property
    def world(self) -> World:
        """Where this process stands among its peers."""
        return self.context.world

    @property
    def config(self) -> TrainConfig:
        """Settings of the optimisation."""
        return self.stage.train

    @property
    def names(self) -> dict[Tensor, str]:
        """Trained parameters and their names."""
        return {p: n for n, p in self.network.named_parameters() if p.requires_grad}

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
    net = spec.build()
    # The l2 energy of a head of zeros has no slope anywhere: it would never train.
    net.initialise(stage.train.seed, zero_head=stage.objective.energy != "l2")
    net.to(context.world.device)
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    run = Run(
        context=context,
        stage=stage,
        spec=spec,
        data=data,
        network=net,
        gradient_field=Field(net, energy=stage.objective.energy),
        optimiser=torch.optim.AdamW(
            trained.values(),
            lr=stage.train.learning_rate,
            betas=stage.train.betas,
            weight_decay=stage.train.weight_decay,
            fused=True,
        ),
        ema=EMA(trained, half_life_images=stage.train.ema_half_life_images),
    )
    resume(run)
    return run


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
    run.ema.load_state_dict(state.ema)
    checkpoint.tensors_to_optimiser(state.optimiser, run.optimiser, run.names)
    run.images_seen = run.persisted = state.images_seen
    run.history = state.history
    run.since_report = [torch.tensor(pair, device=run.world.device) for pair in state.pending]
    if run.world.is_first:
        sys.stderr.write(f"training goes on from image {state.images_seen:,}\n")


# -- step ---------------------------------------------------------------------------------------


def step(run: Run, batch: Batch, stop: bool) -> bool:
    """One optimiser update; returns whether any rank wants to stop."""
    config = run.config
    losses = batch_losses(run, batch)
    # A mean over the global batch, whatever the number of ranks.
    loss = losses.sum() / config.batch_size
    loss.backward()
    flags = torch.stack([loss.detach(), loss.new_tensor(float(stop))])
    flat = torch.cat([*map(gradient_of, run.names), flags])
    run.world.sum_(flat)
    gradient, flags = flat[:-2], flat[-2:]
    norm = gradient.norm()
    if config.gradient_clip is not None:
        gradient.mul_((config.gradient_clip / (norm + 1e-12)).clamp(max=1.0))
    put_gradients(run, gradient)
    for group in run.optimiser.param_groups:
        group["lr"] = learning_rate(config, run.images_seen)
    run.optimiser.step()
    run.ema.update({n: p for p, n in run.names.items()}, images=config.batch_size)
    run.optimiser.zero_grad(set_to_none=True)
    run.images_seen += config.batch_size
    run.since_report.append(torch.stack([flags[0], norm]))
    return bool(flags[1] > 0) if run.world.size > 1 else stop


def batch_losses(run: Run, batch: Batch) -> Tensor:
    """Loss of each image of this rank's share, (B,) (Eq. 3)."""
    config, device = run.config, run.world.device
    numbers = batch.image_numbers.to(device)
    shape = run.spec.latent.shape
    noise = normal(config.seed, Stream.POSTERIOR, numbers, shape)
    x = sample_latents(batch.moments.to(device), noise, run.spec.latent)
    eps = normal(config.seed, Stream.EPS, numbers, shape)
    gamma = uniform(config.seed, Stream.GAMMA, numbers).squeeze(1)
    dropped = uniform(config.seed, Stream.LABEL_DROP, numbers).squeeze(1) < config.label_dropout
    labels = batch.labels.to(device).masked_fill(dropped, len(run.spec.classes))
    c = objective.decay(run.stage.objective)
    return objective.eqm_loss(run.gradient_field, x, eps, gamma, labels, c=c, create_graph=True)


def gradient_of(parameter: Tensor) -> Tensor:
    """Gradient of a parameter, flat; zeros where the loss does not depend on it."""
    gradient = parameter.grad
    return torch.zeros_like(parameter).flatten() if gradient is None else gradient.flatten()


def put_gradients(run: Run, flat: Tensor) -> None:
    """Give each parameter its part of the summed gradient."""
    start = 0
    for parameter in run.names:
        count = parameter.numel()
        parameter.grad = flat[start : start + count].view_as(parameter)
        start += count


def learning_rate(config: TrainConfig, images_seen: int) -> float:
    """Rate of the update that begins at a position: warm-up, constant, linear decay to zero."""
    warm = min(1.0, (images_seen + config.batch_size) / max(config.warmup_images, 1))
    left = config.images - images_seen
    falling = config.decay_fraction * config.images
    decay = min(1.0, left / falling) if falling else 1.0
    return config.learning_rate * warm * decay


# -- report -------------------------------------------------------------------------------------


def report(run: Run, mirror: RunMirror | None, bar: Progress) -> None:
    """Add a point to the curve where one is due, and show it."""
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
    if mirror is not None:
        rate = learning_rate(run.config, run.images_seen - run.config.batch_size)
        figures = {"loss": loss, "gradient_norm": norm, "learning_rate": rate}
        mirror.metrics(run.images_seen, {**figures, "images_per_second": bar.per_second})


def show_grid(run: Run, mirror: RunMirror) -> None:
    """Send a grid of samples of the EMA weights to MLflow."""
    classes = run.spec.classes[:GRID_CLASSES]
    labels = [k for k in range(len(classes)) for _ in range(GRID_SAMPLES_A_CLASS)]
    settings: SamplerConfig = run.context.job.runtime.grid_sampler
    found = model.sample(
        ema_model(run),
        labels=labels,
        seeds=range(len(labels)),
        rule=model.rule_of(settings),
        updates=settings.updates,
    )
    images = found.images().cpu().numpy()
    grid = images.reshape(len(classes), GRID_SAMPLES_A_CLASS, *images.shape[1:])
    png = sample_grid(grid, classes, scale=max(1, 64 // images.shape[-1]))
    mirror.file(f"samples/{run.images_seen:012d}.png", png)


def ema_model(run: Run) -> Model:
    """The model as it stands, with averaged weights."""
    tensors = {**run.network.state_dict(), **run.ema.state_dict()}
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
        checkpoint.save(run.context.store, run.context.digest, state_of(run))
    run.persisted = run.images_seen


def state_of(run: Run) -> TrainState:
    """All that the rest of the run is a function of."""
    return TrainState(
        images_seen=run.images_seen,
        parameters={name: p.detach() for p, name in run.names.items()},
        ema=run.ema.state_dict(),
        optimiser=checkpoint.optimiser_to_tensors(run.optimiser, run.names),
        history=run.history,
        pending=torch.stack(run.since_report).tolist() if run.since_report else [],
    )


def outcome_of(run: Run) -> Outcome:
    """What the stage leaves behind."""
    weights = run.network.state_dict()
    return Outcome(
        outputs={
            "model.json": model.spec_to_bytes(run.spec),
            "ema.safetensors": checkpoint.tensors_to_bytes({**weights, **run.ema.state_dict()}),
            "raw.safetensors": checkpoint.tensors_to_bytes(weights),
            "history.json": json.dumps(run.history).encode(),
        },
        values={
            "images_seen": run.images_seen,
            "parameters": sum(p.numel() for p in run.names),
            "final_loss": run.history["loss"][-1],
        },
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
    if mirror is not None:
        mirror.close("FINISHED")
    return outcome_of(run) if context.world.is_first else None


def loop(run: Run, mirror: RunMirror | None) -> None:
    """Step, report, persist until all images are seen."""
    runtime, total = run.context.job.runtime, total_images(run)
    bar = run.context.progress("training", total, done=run.images_seen)
    with StopSignals() as asked, bar:
        for batch in islice(feed(run), (total - run.images_seen) // run.config.batch_size):
            before = run.images_seen
            stop = step(run, batch, bool(asked))
            report(run, mirror, bar)
            last = run.images_seen >= total
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
    )


def total_images(run: Run) -> int:
    """Images of the whole run: whole updates."""
    return run.config.updates * run.config.batch_size


def crossed(before: int, after: int, interval: int) -> bool:
    """Whether a multiple of an interval lies in (before, after]."""
    return before // interval != after // interval


def open_mirror(run: Run) -> RunMirror | None:
    """The MLflow run of the first rank, where MLflow is given."""
    runtime = run.context.job.runtime
    if runtime.mlflow_uri is None or not run.world.is_first:
        return None
    settings = to_json(run.stage)
    return RunMirror(
        runtime.mlflow_uri,
        experiment=runtime.mlflow_experiment,
        run_name=f"{runtime.run_name or 'train'}-{run.context.digest[:8]}",
        digest=run.context.digest,
        params={f"{s}.{k}": v for s, table in settings.items() for k, v in table.items()},
    )


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
    return stage_main(("train",), program, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
