"""What is refused before anything is begun, and not after a night of encoding or training.

Each stage refuses what it cannot do. Here the same is asked of all of them at once, as soon as what
it depends on is known: the config, the listing of the images, the latents' shape, the machine.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from eqm import image_sets
from eqm.baselines import LEAST_ROWS
from eqm.config import Job, PipelineConfig, PretrainedFile, demo_policy
from eqm.errors import ConfigError, DataError
from eqm.features import SMALLEST_IMAGE_PX
from eqm.images import ImageSource
from eqm.records import LatentSpec, Record, Ref, to_json
from eqm.stage import job_digest
from eqm.words import counted
from flows.jobs import Plan, extractor_job, listed, reference_job
from flows.settings import Settings


def check_config(config: PipelineConfig, settings: Settings) -> None:
    """Refuse what config and environment alone show to be wrong. Raises ConfigError."""
    check_training(config)
    settings.check_sources(to_json(config))
    check_apart(config, settings)


def check_apart(config: PipelineConfig, settings: Settings, *, named: str = "EQM_STORE") -> None:
    """Refuse a store among the images: every later listing would take it for classes of them.

    ``named``: what gave the store. Raises ConfigError.
    """
    source, place = config.source_uri, settings.store
    # Other kinds look for files of their own, which no store has.
    if config.source.kind != "folder" or source is None:
        return
    around, within = _way(source), _way(place)
    rest = within[len(around) :]
    # What is hidden, as .eqm, is in no listing.
    if within[: len(around)] == around and not any(part.startswith(".") for part in rest):
        raise ConfigError(
            f"{named} is {place}, which is {'in ' if rest else ''}the source {source}: "
            "its folders would be read as images; name a place outside of it"
        )


def _way(address: str) -> tuple[str, ...]:
    """The folders that lead to a place on this machine, or to one in a bucket, and its name."""
    scheme, found, rest = address.partition("://")
    if not found:
        return Path(address).resolve().parts
    return (scheme, *(part for part in rest.split("/") if part))


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
    """As ``check_trainable``, before an autoencoder is fitted. Raises as that.

    Of one that somebody else made, the shape of its latents is known when it is sealed.
    """
    config = plan.config
    if plan.store.record("autoencoder", job_digest(autoencoder)) is not None:
        return
    _check_file(plan, config.train.init_from)
    if config.autoencoder.kind == "pretrained":
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

    Patches that do not tile them, levels of a U-Net that do not halve them; weights to begin with
    that are not there, or others (DataError, IntegrityError); and what this machine cannot do,
    where it is the one that trains.
    """
    from eqm.autoencoder import latent_spec

    network = _untrained(plan.config, latent_spec(autoencoder, plan.store))
    # Of latents that are there, the model may be as well, trained on another machine.
    if plan.store.record("latents", job_digest(latents)) is not None:
        return
    _check_file(plan, plan.config.train.init_from)
    if plan.settings.cluster is None:
        _check_machine(plan, network)


def _check_file(plan: Plan, file: PretrainedFile | None) -> None:
    """Refuse a file that is not there, or another one. Raises DataError, IntegrityError.

    What lies on the disks of a cluster is not seen from here.
    """
    if file is None or (plan.settings.cluster is not None and not file.uri.startswith("s3://")):
        return
    from eqm.autoencoder import check_pretrained

    check_pretrained(file)


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


def check_evaluation(plan: Plan, source: Ref | None, *, say: Callable[[str], None]) -> None:
    """Refuse before a training what its evaluation would refuse. Raises ConfigError, DataError.

    Sets that scores are tested on and that are not what they should be, no held-out images, too few
    samples; of a ``source`` only one class or images too small for a fitted extractor, too few
    images for a baseline, a reference batch that is not there or another one (IntegrityError).
    """
    check_counts(plan.config)
    if source is not None:
        _check_images(plan.config, listed(plan, source))
        _check_references(plan, source)
    for one in plan.config.evaluate.ood.sets:
        image_sets.check_set(one, plan.config.evaluate.ood.images)
        if one.sha256 is not None:
            say(f"set {one.name}: {one.kind} {one.sha256[:12]}")


def told_of_policy(config: PipelineConfig) -> Iterator[str]:
    """What to say of a policy that asks for more samples than are made, or that is the demo's."""
    asked, made = config.policy.minimum_samples, config.generate.samples
    if asked > made:
        yield (
            f"policy.minimum_samples is {asked:,} and generate.samples {made:,}: no model will "
            "pass; generate more, or ask for fewer"
        )
    if config.policy.name == demo_policy().name and config.source.kind != "digits":
        yield (
            "policy.name is 'demo', the policy of the preset, whose thresholds were made for its "
            "digits: set those of [policy] for these images, and a name"
        )


def check_counts(config: PipelineConfig) -> None:
    """Refuse no held-out images, and fewer samples than neighbours. Raises ConfigError."""
    source = config.source
    # ImageNet's own validation images are held out then.
    if source.held_out_fraction == 0 and source.kind != "imagenet":
        raise ConfigError(
            "source.held_out_fraction is 0, which leaves no image to measure a model against: set "
            "it higher (0.1), or use `eqm train`, which measures nothing"
        )
    least = config.evaluate.neighbours + 1
    if config.generate.samples < least:
        raise ConfigError(
            f"generate.samples is {config.generate.samples}, and each sample has "
            f"evaluate.neighbours ({least - 1}) others beside it: generate {least} at least, and "
            "thousands to tell models apart"
        )


def _check_references(plan: Plan, source: Ref) -> None:
    """Refuse a file in place of real images that nothing could be held against."""
    for name in (None, *plan.config.further):
        by = plan.config if name is None else plan.config.further[name]
        if by.reference.file is None:
            continue
        job = extractor_job(plan, source, name)
        extractor = plan.store.record("extractor", job_digest(job))
        if extractor is not None:
            asked = reference_job(plan, source, extractor, name)
            if plan.store.record("reference", job_digest(asked)) is not None:
                # It was read once, and is needed no more.
                continue
        _check_file(plan, by.reference.file)


def _check_images(config: PipelineConfig, found: ImageSource) -> None:
    held = int(found.entries.held_out.sum())
    if held < image_sets.LEAST_IMAGES:
        raise DataError(
            f"of {counted(len(found.entries), 'image')} only {held} is held out, and a model is "
            f"measured against {image_sets.LEAST_IMAGES} at least: set source.held_out_fraction "
            f"({config.source.held_out_fraction:g}) higher, or add images"
        )
    extractors = {"extractor": config.extractor} | {
        f"further.{name}.extractor": one.extractor for name, one in config.further.items()
    }
    fitted = [name for name, one in extractors.items() if one.kind == "fit"]
    size = config.source.image_size_px
    if fitted and size < SMALLEST_IMAGE_PX:
        raise DataError(
            f"{fitted[0]}.kind is 'fit', which takes images of {SMALLEST_IMAGE_PX} px at least, "
            f"and source.image_size_px is {size}: set that to {SMALLEST_IMAGE_PX}, or the kind to "
            "'inception'"
        )
    if fitted and len(found.classes) < 2:
        raise DataError(
            f"{fitted[0]}.kind is 'fit', which tells classes apart, and the source has only "
            f"{', '.join(found.classes)}: set it to 'inception', or add a class"
        )
    _check_baselines(config, int((~found.entries.held_out).sum()))


def _check_baselines(config: PipelineConfig, training: int) -> None:
    """Refuse baselines that cannot be fitted on so many training images. Raises DataError."""
    ood = config.evaluate.ood
    # A model without a null label has no scores that baselines would be held against.
    if config.train.label_dropout == 0:
        return
    used = min(training, ood.baseline_images)
    least = {**LEAST_ROWS, "feature_neighbours": ood.neighbours}
    for name in ood.baselines:
        if used >= least[name]:
            continue
        asked = f" with evaluate.ood.neighbours {ood.neighbours}" if name not in LEAST_ROWS else ""
        lower = ", lower evaluate.ood.neighbours" if asked else ""
        more = (
            f"raise evaluate.ood.baseline_images ({ood.baseline_images})"
            if training >= least[name]
            else "add images"
        )
        raise DataError(
            f"baseline {name!r}{asked} is fitted on {least[name]:,} training images at least, and "
            f"there are {used:,}: {more}{lower}, or leave it out of evaluate.ood.baselines"
        )
