"""The pipeline of a schedule: what is new of the images decides what is done.

Without a champion the whole pipeline runs, from nothing. With one, the images are listed again. New
ones: they are encoded by the champion's own autoencoder, and the others copied from its latents;
training goes on from its weights for a budget of images, and the two are judged under one protocol.
Nothing new: all that a next run would use is verified, down to the last byte. Either way a record
says what was found, ``watch/<digest>``.
"""

import datetime
from typing import Any

from prefect import flow

from eqm import champion
from eqm.config import LatentsStage, PretrainedFile, replace
from eqm.earlier import INPUT, differences
from eqm.images import checked_source
from eqm.records import Record, Ref
from eqm.stage import listing_key, open_ref, verify
from eqm.words import counted
from flows.encode import list_images, open_plan
from flows.evaluate import Standing, find_champion
from flows.jobs import Plan
from flows.pipeline import Base, images_to_decision
from flows.prefect_tools import day_asked, logged, page, stage

WEEK_SECONDS = 6.5 * 24 * 3600.0
"""Before the next week begins, a run that does not end is ended, and told of."""


@flow(name="weekly", timeout_seconds=WEEK_SECONDS)
def weekly(
    config: str | dict[str, Any] = "demo",
    changes: dict[str, Any] | None = None,
    as_of: str | None = None,
    encode_all: bool = False,
) -> dict[str, Any]:
    """List the images again; where they changed, go on from the champion, else verify.

    ``as_of``: day of the record (YYYY-MM-DD); unless given, the day (UTC) on which it was due.
    ``encode_all``: copy no image from the champion's latents.
    """
    day = day_asked(as_of)
    plan = open_plan(config, changes)
    source = list_images(plan)
    standing = find_champion(plan)
    if standing is None:
        logged(f"{plan.model_name} has no champion yet: training from nothing")
        return {"outcome": "first", **images_to_decision(plan, source)}
    entry, known = standing.entry, standing.evaluation.inputs["source"]
    if known == source:
        return {"outcome": "nothing new", "watch": verify_all(plan, entry, source, day).digest}
    changed = compare_listings(plan, known, source)
    base = base_of(plan, standing, encode_all)
    result = images_to_decision(continued(plan, standing), source, base)
    seal_look(plan, entry, source, day, {"outcome": "continued", **changed, **_told(result)})
    return {"outcome": "continued", **result}


def _told(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a result that is the same wherever it is made."""
    names = ("latents", "train", "evaluation", "version", "promoted")
    return {name: result[name] for name in names}


# -- new images ---------------------------------------------------------------------------------


def continued(plan: Plan, standing: Standing) -> Plan:
    """The plan of a training that begins with the champion's averaged weights."""
    blob, version = standing.trained.outputs["ema.safetensors"], standing.entry.version
    weights = PretrainedFile(uri=plan.store.where(blob.key), sha256=blob.sha256)
    train = replace(plan.config.train, images=plan.config.continue_images, init_from=weights)
    logged(f"training goes on from version {version}, for {train.images:,} images at most")
    return replace(plan, config=replace(plan.config, train=train))


@stage
def base_of(plan: Plan, standing: Standing, encode_all: bool) -> Base:
    """The champion's autoencoder, without which its weights mean nothing, and what it was fed."""
    latents = open_ref(plan.store, standing.trained.inputs["latents"])
    base = Base(
        autoencoder=open_ref(plan.store, latents.inputs["autoencoder"]),
        extractor=standing.extractor,
        further=standing.further,
        latents=None if encode_all else copied_from(plan, latents),
    )
    for record in (base.autoencoder, base.extractor, *base.further.values()):
        verify(plan.store, record)
    return base


def copied_from(plan: Plan, latents: Record) -> Record | None:
    """The champion's latents, where images that they hold may be copied; else None, said aloud."""
    asked = LatentsStage(source=plan.config.source, encode=plan.config.encode)
    wrong = differences(latents, asked, latents.inputs["autoencoder"])
    if wrong:
        logged(f"all images are encoded, none is copied from the champion's: {'; '.join(wrong)}")
        return None
    return latents


@stage
def compare_listings(plan: Plan, then: Ref, now: Ref) -> dict[str, int]:
    """How many images are new, or gone, since the champion was trained; a changed one is both."""
    before, after = (_images(plan, ref) for ref in (then, now))
    counts = {"new_images": len(after - before), "gone_images": len(before - after)}
    new, gone = counts["new_images"], counts["gone_images"]
    logged(f"images that are new: {new:,}, that are gone: {gone:,}")
    return counts


def _images(plan: Plan, ref: Ref) -> set[tuple[str, str]]:
    listing = plan.store.read(listing_key(ref.digest))
    source = checked_source(plan.config.source, plan.config.source_uri, ref, listing=listing)
    return {(entry.key, entry.sha256) for entry in source.entries}


# -- nothing new --------------------------------------------------------------------------------


@stage
def verify_all(plan: Plan, standing: champion.Entry, source: Ref, day: datetime.date) -> Record:
    """Verify every byte behind the champion, and seal a record that says so."""
    chain = _chain(plan, standing)
    for record in chain:
        verify(plan.store, record)
    blobs = {blob for record in chain for blob in record.outputs.values()}
    logged(
        f"nothing new since version {standing.version} was judged: "
        f"{counted(len(chain), 'record')} and {counted(len(blobs), 'file')} verified"
    )
    text = f"Nothing new on {day}: version {standing.version} stands, and all of it is undamaged."
    page(f"{plan.model_name}-watch", text, "The last look at the images")
    found = {"outcome": "nothing new", "records": len(chain), "files": len(blobs)}
    return seal(plan, standing, source, day, found)


def _chain(plan: Plan, standing: champion.Entry) -> list[Record]:
    """The champion's records, back to the images.

    Without latents from which its own were copied: all that was used of them is in its own.
    """
    found: dict[str, Record] = {}
    open_ends = [standing.evaluation, standing.train]
    while open_ends:
        ref = open_ends.pop()
        if ref.stage != "source" and ref.digest not in found:
            record = found[ref.digest] = open_ref(plan.store, ref)
            open_ends.extend(used for name, used in record.inputs.items() if name != INPUT)
    return list(found.values())


def seal(
    plan: Plan, standing: champion.Entry, source: Ref, day: datetime.date, found: dict[str, Any]
) -> Record:
    """Keep what a look at the images found, create-once for its day."""
    return plan.store.seal(
        Record(
            stage="watch",
            algorithm=1,
            config={"model": plan.model_name, "day": day.isoformat()},
            inputs={"source": source, "train": standing.train, "evaluation": standing.evaluation},
            outputs={},
            values=found,
        )
    )


seal_look = stage(seal)
"""``seal`` of a flow, which waits for a store that is away."""
