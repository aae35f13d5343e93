"""Images -> latents: the autoencoder, and the shards that it makes.

Wraps ``python -m eqm.fit`` and ``python -m eqm.encode``. Locally: ``eqm encode demo``. With
``workers`` the shards are cut into ranges that run as deployments of their own, on every machine
that serves the work pool; whatever is missing after them is encoded here, and the set is sealed.
A run that is cancelled, fails or crashes cancels its ranges.
"""

import time
from collections.abc import Sequence
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound

from eqm.config import Job, replace
from eqm.errors import ConfigError, DataError
from eqm.images import checked_source
from eqm.listing import told_of_twins
from eqm.records import Record, Ref
from eqm.stage import job_digest, listing_key
from eqm.walk import shard_plans
from eqm.words import counted
from flows.checks import check_foreseen, check_trainable
from flows.jobs import (
    Plan,
    autoencoder_job,
    ensure,
    latents_job,
    list_source,
    sealed,
    source_ref,
    to_be_trained_on,
)
from flows.plan import Changes, make_plan
from flows.prefect_tools import (
    MONTH_SECONDS,
    cancel_children,
    logged,
    run_id,
    stage,
    unfinished_children,
)

open_plan = stage(make_plan)
"""``make_plan`` for runs that nobody watches: services that are away are waited for."""

RANGE_DEPLOYMENT = "encode-range/encode-range"
POLL_SECONDS = 2.0
ENDING_SECONDS = 90.0
"""Given to ranges of an earlier start of the same run, which were cancelled, to end."""


@stage
def list_images(plan: Plan) -> Ref:
    """List the images of the source; its digest stands for all of them."""
    source = list_source(plan)
    found = counted(len(source.entries), "image")
    logged(f"source {source.digest[:12]}: {found}{left_out(source.skipped)}")
    if (twins := told_of_twins(source.entries)) is not None:
        logged(f"warning: {twins}")
    return source_ref(source)


def left_out(skipped: Sequence[str]) -> str:
    """What to say of images that cannot be decoded; the manifest names them all."""
    if not skipped:
        return ""
    more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return f"; corrupt, and left out: {', '.join(skipped[:3])}{more}"


@stage
def fit_autoencoder(plan: Plan, source: Ref, *, to_train: bool = True) -> Record:
    """Fit the autoencoder on the training images, or seal the one that is given.

    ``to_train``: what could not be trained on its latents is refused before.
    """
    job = autoencoder_job(plan, source)
    if to_train:
        check_foreseen(plan, job)
    return ensure(plan, job, say=logged)


@stage
def encode_images(
    plan: Plan,
    source: Ref,
    autoencoder: Record,
    earlier: Record | None = None,
    *,
    to_train: bool = True,
) -> Record:
    """Encode all images into sealed shards of moments; copy those that earlier latents hold.

    ``to_train``: what could not be trained on them is refused before.
    """
    job = latents_job(plan, source, autoencoder, earlier)
    if to_train:
        check_trainable(plan, autoencoder, job)
        job = to_be_trained_on(plan, job)
    return ensure(plan, job, say=logged, processes=plan.processes)


@flow(name="fit-autoencoder")
def fit(config: str | dict[str, Any] = "demo", changes: dict[str, Any] | None = None) -> str:
    """Fit the autoencoder of a config; returns the address of its record."""
    plan = make_plan(config, changes, tracked=False)
    made = fit_autoencoder(plan, list_images(plan), to_train=False)
    return plan.store.where(f"autoencoder/{made.digest}")


def _cancel_ranges(flow: Any, flow_run: Any, state: Any) -> None:
    """Where the process of a run is gone, its worker calls this."""
    cancel_children(flow_run.id)


@flow(
    name="encode",
    timeout_seconds=MONTH_SECONDS,
    on_cancellation=[_cancel_ranges],
    on_crashed=[_cancel_ranges],
)
def encode(
    config: str | dict[str, Any] = "demo",
    changes: dict[str, Any] | None = None,
    workers: int = 1,
) -> str:
    """Encode the images of a config; returns the address of the sealed latents.

    ``workers``: so many flow runs on the work pool share the shards.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}; it must be 1 or greater")
    plan = make_plan(config, changes, tracked=False)
    source = list_images(plan)
    made = fit_autoencoder(plan, source, to_train=False)
    if workers > 1:
        fan_out(plan, source, made, config, changes, workers)
    latents = encode_images(plan, source, made, to_train=False)
    return plan.store.where(f"latents/{latents.digest}")


# -- ranges of shards ---------------------------------------------------------------------------


def ranges(shards: int, workers: int) -> list[tuple[int, int]]:
    """So many ranges of nearly one size that hold every shard once; fewer where shards are."""
    count = min(shards, workers)
    return [(i * shards // count, (i + 1) * shards // count) for i in range(count)]


def fan_out(
    plan: Plan,
    source: Ref,
    autoencoder: Record,
    config: str | dict[str, Any],
    changes: Changes,
    workers: int,
) -> None:
    """Encode on the work pool. What fails there is left for whoever encodes the rest.

    Whatever ends this before its ranges have ended (cancelled, interrupted, an error) cancels them.
    """
    if sealed(plan, latents_job(plan, source, autoencoder)) is not None:
        return
    given: dict[str, Any] = {"config": config, "changes": changes, "source": source.digest}
    parts = ranges(_shards(plan, source), workers)
    _end_earlier()
    asked, of = counted(workers, "worker"), counted(len(parts), "range")
    logged(f"{asked} asked for: {of} of shards on the work pool")
    try:
        running = [encode_on_pool.submit(given, part) for part in parts]
        for (first, end), one in zip(parts, running, strict=True):
            state = one.result()
            if state != "COMPLETED":
                logged(
                    f"shards {first} to {end - 1} ended {state}: what is missing is encoded here"
                )
    except BaseException:
        # Those who wait for the ranges are threads of this process: it could not end before them.
        cancel_children(run_id())
        raise


def _end_earlier() -> None:
    """Cancel ranges that an earlier start of this run left, and see them end: they have locks."""
    cancel_children(run_id())
    deadline = time.monotonic() + ENDING_SECONDS
    while (left := unfinished_children(run_id())) and time.monotonic() < deadline:
        logged(f"ranges of an earlier start of this run that are ending: {len(left)}")
        time.sleep(POLL_SECONDS)


def _shards(plan: Plan, source: Ref) -> int:
    asked, listing = plan.config.source, plan.store.read(listing_key(source.digest))
    images = checked_source(asked, plan.config.source_uri, source, listing=listing).entries
    return len(shard_plans(len(images), plan.config.encode))


@task(cache_policy=NO_CACHE, persist_result=False, retries=0)
def encode_on_pool(given: dict[str, Any], shards: tuple[int, int]) -> str:
    """Have a range of shards encoded by a flow run on the work pool; returns how that ended."""
    try:
        run: Any = run_deployment(
            RANGE_DEPLOYMENT,
            parameters={**given, "shards": list(shards)},
            flow_run_name=f"shards-{shards[0]}-{shards[1]}",
            poll_interval=POLL_SECONDS,
        )
    except ObjectNotFound as error:
        raise ConfigError(
            f"Prefect knows no deployment {RANGE_DEPLOYMENT}: register those of prefect.yaml with "
            "`eqm up` or `prefect deploy --all`, or encode with workers 1"
        ) from error
    return str(run.state.type.value) if run.state else "without a state"


@stage
def encode_part(plan: Plan, job: Job) -> None:
    """Encode some shards of a set."""
    if plan.store.record(job.stage, job_digest(job)) is not None:
        logged(f"{job.stage} {job_digest(job)[:12]}: sealed already, skipped")
        return
    plan.launcher.run(job, processes=plan.processes)


@flow(name="encode-range", timeout_seconds=MONTH_SECONDS)
def encode_range(
    config: str | dict[str, Any],
    source: str,
    shards: tuple[int, int],
    changes: dict[str, Any] | None = None,
) -> None:
    """Encode the shards from the first number to before the second of a config's images.

    ``source``: digest of their listing, which lies in the store. Only one set can be meant, so a
    range may be run again, or beside others, at any time.
    """
    plan = make_plan(config, changes, tracked=False)
    listed = Ref(stage="source", digest=source, content=source)
    autoencoder = sealed(plan, autoencoder_job(plan, listed))
    if autoencoder is None:
        raise DataError(
            f"no autoencoder is sealed in {plan.store.uri} for source {source[:12]}: run `eqm "
            "encode` with the same config first"
        )
    job = latents_job(plan, listed, autoencoder)
    encode_part(plan, replace(job, runtime=replace(job.runtime, shards=tuple(shards))))
