"""``eqm import-reference``: statistics that the field hands around, sealed in the store.

What a file must be is said by eqm.adm; here is how it is asked and how it answers.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

out = Console()

INCEPTION_FEATURES = 2048
OF_IMAGENET = 1_281_167
"""Training images of ILSVRC2012, of which ADM took its moments."""


def import_reference(
    file: Annotated[Path, typer.Argument(help="A reference batch of ADM, .npz.")],
    sha256: Annotated[
        str | None, typer.Option(help="What the file must hash to, where you know it.")
    ] = None,
    images: Annotated[
        int | None,
        typer.Option(min=2, help="Images that its moments are of: the file does not say."),
    ] = None,
) -> None:
    """Check reference statistics (ADM's .npz), seal them by their digest, and say how to use them.

    Nothing in the file is unpickled or run.
    """
    from eqm.adm import read_batch
    from eqm.errors import DataError, IntegrityError
    from eqm.records import Record
    from eqm.records import sha256 as hashed
    from flows.plan import store_of
    from flows.settings import activate

    if not file.is_file():
        raise DataError(f"there is no file {file}: give the path of a reference batch (.npz)")
    data = file.read_bytes()
    found = hashed(data)
    if sha256 is not None and found != sha256.lower():
        raise IntegrityError(
            f"{file} has SHA-256 {found}, but --sha256 is {sha256}: fetch the file again, or "
            "correct the digest if you trust this file"
        )
    batch = read_batch(data, str(file))
    store = store_of(activate())
    blob = store.put(data)
    # A record that names it, or the next `eqm clean` would take it for nobody's.
    store.seal(
        Record(
            stage="import",
            algorithm=1,
            config={"kind": "reference", "sha256": found},
            inputs={},
            outputs={"reference.npz": blob},
            values=_contents(batch),
        )
    )
    out.print(f"{file}: {_told(batch)}", soft_wrap=True, highlight=False)
    out.print(f"sealed as {store.where(blob.key)}", soft_wrap=True, highlight=False)
    out.print(_usage(store.where(blob.key), found, batch, images), soft_wrap=True, highlight=False)


def _contents(batch: Any) -> dict[str, Any]:
    return {
        "images": 0 if batch.images is None else len(batch.images),
        "image_size_px": None if batch.images is None else batch.images.shape[1],
        "features": None if batch.features is None else len(batch.features[0]),
        "spatial_features": None if batch.spatial is None else len(batch.spatial[0]),
    }


def _told(batch: Any) -> str:
    """What is in a file, for people."""
    has = _contents(batch)
    parts = []
    if has["images"]:
        parts.append(f"{has['images']:,} images of {has['image_size_px']} px")
    if has["features"]:
        known = " (Inception)" if has["features"] == INCEPTION_FEATURES else ""
        parts.append(f"moments of {has['features']} features{known}")
    if has["spatial_features"]:
        parts.append(f"moments of {has['spatial_features']} spatial features")
    return ", ".join(parts)


def _usage(uri: str, sha256: str, batch: Any, images: int | None) -> str:
    """What to write into a config."""
    lines = ["In a config:", "", "    \\[reference]"]
    lines.append(f'    file = {{ uri = "{uri}", sha256 = "{sha256}" }}')
    if batch.features is not None:
        lines.append(
            f"    file_images = {images or OF_IMAGENET}"
            + ("" if images else "   # of ADM's ImageNet batches: the file does not say")
        )
        lines += ["", 'Its moments hold for extractor.kind = "inception" alone.']
    if batch.images is not None:
        size = batch.images.shape[1]
        lines += ["", f"Its images are compared with samples of {size} px (source.image_size_px)."]
    return "\n".join(lines)
