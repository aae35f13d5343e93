"""``eqm data``: encode images into sealed latents, verify them, look at them. Needs no services.

A store is ``s3://bucket/prefix`` or a plain folder. What a command does is in eqm; here is how it
is asked and how it answers.
"""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from eqm.words import counted
from flows.addresses import sealed_by_digits, sealed_digests
from flows.calling import interrupts_told
from flows.options import changes_of, check_file, check_given
from flows.terminal import show
from flows.terminal import table as table_of

app = typer.Typer(
    no_args_is_help=True,
    help="Latents: encode images, verify shards, look at what is in them.",
)
out = Console()
err = Console(stderr=True)

LatentsArgument = Annotated[
    str,
    typer.Argument(
        metavar="LATENTS",
        help="<store>/latents/<digest>, or the first digits of a digest in EQM_STORE.",
    ),
]


@app.command()
def encode(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder of class folders, folder of ILSVRC2012 tars, .tar or .parquet files; "
            "local or s3://."
        ),
    ],
    to: Annotated[str, typer.Option(metavar="STORE", help="Folder or s3://bucket/prefix.")],
    image_size: Annotated[int, typer.Option(help="Pixels a side, after ADM's centre crop.")],
    autoencoder: Annotated[
        str | None,
        typer.Option(
            help="identity, fit (a small one, on these images), a folder or .safetensors file, "
            "s3://..., or owner/name@revision of the hub; fit, or that of --earlier."
        ),
    ] = None,
    autoencoder_sha256: Annotated[
        str | None, typer.Option(help="Of its weights; needed unless they lie on this machine.")
    ] = None,
    earlier: Annotated[
        str | None,
        typer.Option(
            metavar="LATENTS",
            help="Of the same store: images that are in them are copied, the others encoded by "
            "their autoencoder.",
        ),
    ] = None,
    kind: Annotated[
        str, typer.Option(help="folder, imagenet, webdataset, parquet, digits; auto looks.")
    ] = "auto",
    channels: Annotated[int, typer.Option(help="3 for colour, 1 for gray.")] = 3,
    mirror: Annotated[
        bool, typer.Option(help="Whether mirror images are images of their class too.")
    ] = True,
    held_out: Annotated[
        float | None,
        typer.Option(
            help="Share of images kept from training; 0.05, or ImageNet's validation images."
        ),
    ] = None,
    on_corrupt: Annotated[str, typer.Option(help="refuse, or skip and name them.")] = "refuse",
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    shard_images: Annotated[int, typer.Option(help="Images a shard.")] = 1024,
    batch_size: Annotated[int, typer.Option(help="Images a call of the autoencoder.")] = 64,
    processes: Annotated[int, typer.Option(help="Encoders on this machine, one a GPU.")] = 1,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as in a config file.")
    ] = None,
) -> None:
    """Encode images into sealed shards of latents; interrupted, it goes on with what is left."""
    from eqm.records import to_json
    from eqm.stage import open_ref
    from flows.jobs import autoencoder_job, ensure, latents_job
    from flows.plan import read_config

    for option, value in (("SOURCE", source), ("--to", to), ("--autoencoder", autoencoder)):
        check_given(option, value)
    changes = changes_of(set_)
    found = _kind(source) if kind == "auto" else kind
    share = (0.0 if found == "imagenet" else 0.05) if held_out is None else held_out
    table: dict[str, Any] = {
        "preset": "demo",
        "name": "data",
        "source_uri": source,
        "source": {
            "kind": found,
            "image_size_px": image_size,
            "channels": channels,
            "mirror": mirror,
            "held_out_fraction": share,
            "on_corrupt": on_corrupt,
        },
        "autoencoder": _autoencoder(autoencoder or "fit", autoencoder_sha256, image_size),
        "encode": {
            "shard_images": shard_images,
            "batch_size": batch_size,
            "precision": precision,
        },
        "processes": processes,
        # Nothing is trained here: whatever divides among the processes.
        "train": {"batch_size": _batch(changes.get("processes", processes))},
    }
    config = read_config(table, changes)
    plan = _plan(config, to)
    known = None if earlier is None else _earlier(plan.store, earlier, autoencoder)
    with interrupts_told():
        _say(f"listing {source}")
        listed = _listed(plan)
        if known is None:
            made = ensure(plan, autoencoder_job(plan, listed), say=_say)
        else:
            made = open_ref(plan.store, known.inputs["autoencoder"])
        job = latents_job(plan, listed, made, known)
        record = ensure(plan, job, say=_say, processes=plan.processes)
    values = to_json(record.values)
    out.print(
        f"{counted(values['images'], 'image')} of {counted(values['classes'], 'class', 'classes')} "
        f"in {counted(values['shards'], 'shard')} "
        f"({values['train_images']} to train on, {values['held_out_images']} held out)"
        f"{_copied(record)}{_left_out(values['skipped'])}",
        soft_wrap=True,
    )
    out.print(plan.store.where(f"latents/{record.digest}"), soft_wrap=True)


@app.command()
def verify(latents: LatentsArgument) -> None:
    """Check every byte of a set in its store; names all damage, and then exits with 1."""
    from eqm.damage import damages
    from eqm.progress import Progress
    from eqm.shards import beside_manifest, manifest_of, place_of

    store, record = _opened(latents)
    manifest = manifest_of(store, record)
    where, beside, found = place_of(store, record), beside_manifest(manifest, record), 0
    with Progress("verifying", total=manifest.count) as bar:
        for damage in damages(manifest, store, where, beside=beside, done=bar.advance):
            found += 1
            out.print(f"[bold red]damaged:[/] {escape(damage.text)}", soft_wrap=True)
    if found:
        out.print(
            f"{counted(found, 'damage')}: restore these files from a copy, or delete them and "
            f"the record {store.where(f'latents/{record.digest}/record.json')} and encode again",
            soft_wrap=True,
        )
        raise typer.Exit(1)
    samples, shards = counted(manifest.count, "sample"), counted(len(manifest.shards), "shard")
    out.print(f"{samples} in {shards}: every byte is sound")


@app.command()
def stats(latents: LatentsArgument) -> None:
    """Counts, class balance and moments of a set, and what looks wrong with them."""
    from eqm.inspection import statistics
    from eqm.latent_set import open_manifest

    store, record = _opened(latents)
    data = open_manifest(record, store)
    found, spec = statistics(data), data.manifest.spec
    data.close()
    facts = table_of("", "", header=False)
    facts.add_row(
        "images",
        f"{found.images:,} ({found.train:,} train, {found.held_out:,} held out){_copied(record)}",
    )
    smallest, largest = (f"{escape(n)} ({c:,})" for n, c in (found.smallest, found.largest))
    balanced = found.smallest[1] == found.largest[1]
    span = f"{found.smallest[1]:,} each" if balanced else f"from {smallest} to {largest}"
    facts.add_row("classes", f"{found.classes:,}, training images: {span}")
    facts.add_row("latents", f"{spec.shape} of {spec.image_size_px} px, {escape(spec.autoencoder)}")
    facts.add_row("mirrors", "yes" if data.manifest.mirrored else "no")
    facts.add_row("shards", f"{len(data.manifest.shards):,} of {data.manifest.shard_images:,}")
    show(facts, out)
    moments = table_of("channel", "mean", "std", "low", "high", "posterior std", "whitened std")
    columns = ("mean", "std", "low", "high", "posterior_std", "whitened_std")
    for channel in range(spec.shape[0]):
        moments.add_row(str(channel), *(f"{getattr(found, c)[channel]:.4g}" for c in columns))
    out.print(f"moments of {counted(found.looked_at, 'sample')}", highlight=False)
    show(moments, out)
    for warning in found.warnings:
        out.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)


@app.command()
def preview(
    latents: LatentsArgument,
    to: Annotated[Path, typer.Option("--out", help="PNG file to write.")] = Path("preview.png"),
) -> None:
    """Draw images beside what comes back from their latents, and their mirrors."""
    from eqm.inspection import preview as drawn
    from eqm.latent_set import open_manifest

    check_file("--out", to)
    store, record = _opened(latents)
    data = open_manifest(record, store)
    to.write_bytes(drawn(data, record, store))
    data.close()
    out.print(str(to), soft_wrap=True)


@app.command()
def digest(
    kind: Annotated[str, typer.Argument(help="folder, cifar10, svhn or dtd.")],
    source: Annotated[
        str, typer.Argument(help="Folder of its files; local or s3://bucket/prefix.")
    ],
    split: Annotated[
        str | None, typer.Option(help="Of the files: test unless given (dtd: test1).")
    ] = None,
) -> None:
    """Digest of a set of images for tests of what lies out of distribution (evaluate.ood.sets)."""
    from eqm.image_sets import digest_of

    check_given("SOURCE", source)
    out.print(digest_of(kind, source, split, setting="SOURCE"), soft_wrap=True)


@app.command("list")
def list_(
    store: Annotated[
        str | None, typer.Argument(metavar="STORE", help="EQM_STORE unless given.")
    ] = None,
) -> None:
    """List the sealed sets of latents of a store."""
    from eqm.errors import DataError, EqmError
    from eqm.records import LatentSpec, from_json
    from eqm.storage import LocalStore

    check_given("STORE", store)
    opened = _store(store)
    if isinstance(opened, LocalStore) and not opened.root.is_dir():
        what = "is a file" if opened.root.exists() else "does not exist"
        raise DataError(
            f"{'EQM_STORE' if store is None else 'STORE'} is {opened.uri}, which {what}: name the "
            "folder that `eqm data encode` wrote to"
        )
    table = table_of("latents", "images", "classes", "shape", "autoencoder", "sealed")
    for digest in sealed_digests(opened, "latents"):
        try:
            record = opened.record("latents", digest)
            if record is None:
                continue
            values = record.values
            spec = from_json(LatentSpec, values["spec"], "spec")
        except EqmError as error:
            table.add_row(digest[:12], f"[red]{escape(str(error))}[/]")
            continue
        table.add_row(
            digest[:12],
            f"{values['images']:,}",
            f"{values['classes']:,}",
            " x ".join(map(str, spec.shape)),
            escape(spec.autoencoder[:28]),
            str(record.provenance.get("ended", "")),
        )
    if table.row_count:
        show(table, out)
    else:
        out.print(f"{opened.uri} holds no sealed latents: make some with `eqm data encode`")


# -- how it is asked ----------------------------------------------------------------------------


def _kind(source: str) -> str:
    """What lies at a place, by its looks. Raises ConfigError where that does not tell."""
    from eqm.errors import ConfigError

    endings = {".tar": "webdataset", ".parquet": "parquet"}
    if source == "digits":
        return "digits"
    if Path(source).suffix in endings:
        return endings[Path(source).suffix]
    if source.startswith("s3://"):
        raise ConfigError(f"{source}: say --kind folder, imagenet, webdataset or parquet")
    if "://" in source:
        raise ConfigError(
            f"SOURCE is {source!r}; it must be a folder, .tar or .parquet file on this machine, or "
            "s3://bucket/prefix"
        )
    path = Path(source)
    if not path.is_dir():
        raise ConfigError(f"{source} is no folder, .tar or .parquet file on this machine")
    names = sorted(one.name for one in path.iterdir())
    if "ILSVRC2012_img_train.tar" in names:
        return "imagenet"
    found = {endings[Path(name).suffix] for name in names if Path(name).suffix in endings}
    if len(found) > 1:
        raise ConfigError(f"{source} holds tars and parquet files: say --kind")
    return found.pop() if found else "folder"


LATENT_SIDE = 16
"""A fitted autoencoder halves the images until their latents are at most so large."""
FIT_IMAGES = 10_000


def _autoencoder(given: str, sha256: str | None, image_size: int) -> dict[str, Any]:
    from eqm.autoencoder import weights_file
    from eqm.disk import hash_file
    from eqm.errors import ConfigError

    if given in ("identity", "fit") and sha256 is not None:
        raise ConfigError(
            f"--autoencoder-sha256 is {sha256}, and no weights are read: leave it out, or say "
            "which ones with --autoencoder"
        )
    if given == "identity":
        return {"kind": given}
    if given == "fit":
        halvings = max(1, (max(1, image_size - 1) // LATENT_SIDE).bit_length())
        widths = [min(16 * 2**level, 64) for level in range(halvings + 1)]
        return {"kind": given, "fit": {"widths": widths, "images": FIT_IMAGES}}
    uri, at, revision = given.partition("@") if "://" not in given else (given, "", "")
    path = Path(given)
    if path.exists():
        uri, at, revision = given, "", ""
        weights = weights_file(path)
        if not weights.is_file():
            raise ConfigError(
                f"--autoencoder is {given}, a folder without {weights.name}: give the one that "
                "diffusers wrote, or the .safetensors file itself"
            )
        sha256 = sha256 or hash_file(weights)
    if sha256 is None:
        raise ConfigError(
            f"--autoencoder is {given}, which is not on this machine: say what its weights hash to "
            "with --autoencoder-sha256, as sha256sum prints it"
        )
    pretrained: dict[str, Any] = {"uri": uri, "sha256": sha256}
    return {
        "kind": "pretrained",
        "pretrained": {**pretrained, **({"revision": revision} if at else {})},
    }


def _batch(processes: object) -> int:
    """One that these processes share; of a number that is none, the config tells."""
    return processes if isinstance(processes, int) and processes > 0 else 1


def _plan(config: Any, store: str) -> Any:
    """A plan whose results go to a store of their own, without Prefect and MLflow."""
    from flows.checks import check_apart
    from flows.jobs import Plan
    from flows.launch import LocalLauncher
    from flows.plan import store_of

    settings = _settings(store)
    launcher = LocalLauncher(
        folder=settings.home / "jobs", environment=settings.child_environment()
    )
    check_apart(config, settings, named="--to")
    return Plan(config, settings, store_of(settings), launcher)


def _settings(store: str | None) -> Any:
    from flows.settings import activate

    settings = activate()
    if store is None:
        return settings
    return dataclasses.replace(settings, store=_place(store))


def _place(store: str) -> str:
    """A store as all of its users write it."""
    return store.rstrip("/") if "://" in store else str(Path(store).absolute())


def _store(store: str | None) -> Any:
    from flows.plan import store_of

    return store_of(_settings(store))


def _listed(plan: Any) -> Any:
    from eqm.listing import told_of_twins
    from flows.jobs import list_source, source_ref

    source = list_source(plan)
    if (twins := told_of_twins(source.entries)) is not None:
        _say(f"warning: {twins}")
    return source_ref(source)


def _opened(latents: str) -> tuple[Any, Any]:
    """Store and record of an address or of the first digits of a digest."""
    from eqm.errors import DataError
    from eqm.shards import sealed_latents

    if "/" in latents:
        settings = _settings(None)
        return sealed_latents(latents, settings.home / "cache", settings.cache_bytes)
    store = _store(None)
    record = sealed_by_digits(store, "latents", latents)
    if record is None:
        raise DataError(f"{store.uri} has no latents {latents}: `eqm data list` shows what it has")
    return store, record


def _earlier(store: Any, latents: str, autoencoder: str | None) -> Any:
    """Record of the set to copy images from. Raises ConfigError, DataError."""
    from eqm.errors import ConfigError, DataError

    if autoencoder is not None:
        raise ConfigError(
            f"--autoencoder is {autoencoder}, but images are encoded by that of --earlier: leave "
            "one of them out"
        )
    place, _, digits = latents.rstrip("/").removesuffix("/record.json").rpartition("/latents/")
    here = not place or _place(place) == store.uri
    record = sealed_by_digits(store, "latents", digits) if here else None
    if record is None:
        raise DataError(
            f"--earlier is {latents}, but {store.uri} has no such latents: they must be of the "
            f"store that --to names; `eqm data list {store.uri}` shows what it has"
        )
    return record


def _copied(record: Any) -> str:
    """How many images of a set were copied from which, where any were asked for."""
    if "copied" not in record.values:
        return ""
    ref = record.inputs["earlier"]
    return f", {record.values['copied']:,} copied from latents {ref.digest[:12]}"


def _left_out(skipped: int) -> str:
    """How many images are in no set for they cannot be decoded, where there are any."""
    return f", {counted(skipped, 'image')} left out that cannot be decoded" if skipped else ""


def _say(line: str) -> None:
    err.print(line, highlight=False, soft_wrap=True)
