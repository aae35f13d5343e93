"""How samples look while a training goes on: grids, and a quick distance, of the EMA weights."""

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eqm import glimpse, model
from eqm.errors import EqmError, PeerError
from eqm.model import Model
from eqm.run import Run, crossed, gathers


def look_is_due(run: Run, before: int, last: bool) -> bool:
    """Whether samples are looked at here."""
    every = run.context.job.runtime.grid_every_images
    return every is not None and (last or crossed(before, run.images_seen, every))


def look_missed(run: Run) -> None:
    """Look where samples were due when the run was stopped, for there was no time for it then."""
    before = run.images_seen - run.config.batch_size
    if run.images_seen == 0 or not look_is_due(run, before, last=False):
        missed = 0
    else:
        missed = not any(
            event.kind == "samples" and event.images_seen == run.images_seen
            for event in run.log.events
        )
    # The log is the first rank's.
    if run.world.first_says(missed):
        look(run)


def look(run: Run) -> None:
    """Note how samples of the EMA weights look, and how far they are: eqm.glimpse.

    The first process looks. It tells the others on the way that it is at it, for that may take
    longer than they would wait for somebody who says nothing.
    """
    tensors = {}
    if gathers(run):
        tensors = {**run.learner.weights(), **run.learner.whole(run.learner.ema.state_dict())}
    if not run.world.is_first:
        while run.world.first_says(False):
            pass
        return
    told, pause = time.monotonic(), run.world.timeout_seconds / 10

    def at_it(*_: object) -> None:
        nonlocal told
        if time.monotonic() - told > pause:
            run.world.first_says(True)
            told = time.monotonic()

    try:
        note_look(run, tensors, at_it)
    except PeerError:
        raise
    except (EqmError, torch.OutOfMemoryError) as error:
        # A look costs no training, and where one rank alone ended, the others would wait for it.
        reason = str(error).partition(". ")[0] if isinstance(error, RuntimeError) else error
        sys.stderr.write(f"warning: no samples at image {run.images_seen:,}: {reason}\n")
    run.world.first_says(False)


def note_look(run: Run, tensors: dict[str, Tensor], at_it: Callable[..., None]) -> None:
    """What :func:`look` does by itself; ``at_it`` is called on the way."""
    settings = run.context.job.runtime.grid_sampler
    seen = glimpse.take(model_of(run, tensors), settings, run.around, on_update=at_it)
    grid = run.context.store.put(seen.grid)
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
