"""How samples look while a training goes on: grids, and a quick distance, of the EMA weights."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from eqm import glimpse, model
from eqm.errors import EqmError
from eqm.model import Model
from eqm.run import Run, crossed, gathers, total_images


def look_is_due(run: Run, before: int, last: bool) -> bool:
    """Whether samples are looked at here."""
    every = run.context.job.runtime.grid_every_images
    return every is not None and (last or crossed(before, run.images_seen, every))


def look_missed(run: Run, asked: Sequence[int] = ()) -> bool:
    """Look where samples were due when the run was stopped, for there was no time for it then.

    As :func:`look` says whether to go on.
    """
    before, last = run.images_seen - run.config.batch_size, run.images_seen >= total_images(run)
    if run.images_seen == 0 or not look_is_due(run, before, last):
        missed = 0
    else:
        missed = not any(
            event.kind == "samples" and event.images_seen == run.images_seen
            for event in run.log.events
        )
    # The log is the first rank's.
    return look(run, asked) if run.world.first_says(missed) else True


class _Left(Exception):
    """The first process was told to end while it looked."""


def look(run: Run, asked: Sequence[int] = ()) -> bool:
    """Note how samples of the EMA weights look, and how far they are: eqm.glimpse.

    The first process looks, and the others wait for it. As soon as it has been told to end
    (``asked`` is not empty), or hears that another one has, the look is left for whoever goes on:
    the time that is left is the checkpoint's. All processes return whether to go on.
    """
    tensors = {}
    if gathers(run):
        tensors = {**run.learner.weights(), **run.learner.whole(run.learner.ema.state_dict())}
    left = False
    with run.world.first_at_work(lambda: bool(asked)) as others:
        if run.world.is_first:
            try:
                note_look(run, tensors, lambda: bool(asked) or others.is_set())
            except _Left:
                left = True
    return not run.world.first_says(left)


def note_look(run: Run, tensors: dict[str, Tensor], leaves: Callable[[], bool]) -> None:
    """What :func:`look` does by itself. A look that fails is told: it costs no training."""

    def leave_if_asked(*_: object) -> None:
        if leaves():
            raise _Left

    settings = run.context.job.runtime.grid_sampler
    try:
        seen = glimpse.take(model_of(run, tensors), settings, run.around, leave_if_asked)
        grid = run.context.store.put(seen.grid)
    except (EqmError, torch.OutOfMemoryError) as error:
        reason = str(error).partition(". ")[0] if isinstance(error, RuntimeError) else error
        sys.stderr.write(f"warning: no samples at image {run.images_seen:,}: {reason}\n")
        return
    figures = {"latent_distance": seen.distance}
    run.log.append("samples", run.images_seen, figures, blobs={"grid.png": grid})


def model_of(run: Run, tensors: dict[str, Tensor]) -> Model:
    """The model with averaged weights."""
    net = model.filled(run.spec.build().to(run.world.device), tensors, "EMA weights")
    return Model(run.spec, net, autoencoder=lambda: _autoencoder(run))


def _autoencoder(run: Run) -> Any:
    from eqm.autoencoder import load_autoencoder
    from eqm.stage import open_ref

    latents = run.context.input("latents")
    return load_autoencoder(
        open_ref(run.context.store, latents.inputs["autoencoder"]), run.context.store
    )
