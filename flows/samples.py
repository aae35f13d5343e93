"""``eqm samples``: what was generated, made again or written as files of the field.

What a command does is in eqm.generate and eqm.samples; here is how it is asked and how it answers.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from eqm.words import counted
from flows.addresses import open_sealed
from flows.options import check_file

app = typer.Typer(
    no_args_is_help=True,
    help="Samples: make any of them again, write them as an .npz.",
)
out = Console()

SamplesArgument = Annotated[
    str,
    typer.Argument(
        metavar="SAMPLES",
        help="<store>/samples/<digest>, or the first digits of a digest in EQM_STORE.",
    ),
]


@app.command()
def remake(
    samples: SamplesArgument,
    seed: Annotated[int, typer.Option(min=0, help="Of the sample.")],
    to: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("sample.png"),
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", help="In the batch it was made in, to the last bit; takes as long as that."
        ),
    ] = False,
    scale: Annotated[int, typer.Option(min=1, help="Width of a pixel in the file.")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Make a sample again as it was made, and compare: exit status 1 where it is another."""
    import torch

    from eqm.distributed import pick_device
    from eqm.figures import strip_png
    from eqm.generate import remake as made_again

    check_file("--to", to)
    store, record = open_sealed(samples, "samples")
    if exact:
        # Sums are cut among threads: as many as then.
        torch.set_num_threads(int(record.provenance["threads"]))
    made = made_again(store, record, [seed], device=pick_device(device), exact=exact)
    images = made["images"].numpy()
    to.write_bytes(strip_png(images, cell_px=scale * max(images.shape[-2:])))
    label, cost = int(made["labels"]), int(made["evaluations"])
    out.print(
        f"{to}: seed {seed}, class {label}, {counted(cost, 'field evaluation')}", soft_wrap=True
    )
    if not _is_same(store, record, seed, made, exact=exact):
        raise typer.Exit(1)


def _is_same(store: Any, record: Any, seed: int, made: Any, *, exact: bool) -> bool:
    """Say how a sample that was made again compares with the sealed one."""
    from eqm.samples import config_of, difference, kept

    config = config_of(record)
    if not config.first_seed <= seed < config.first_seed + config.samples:
        out.print("it is not one of the sealed samples: nothing to compare it with")
        return True
    sealed = kept(store, record, [seed])
    found = difference(made, sealed)
    what = "its features (its image was not kept)" if found.levels is None else "the kept image"
    if not found.bits:
        out.print(f"equal to {what} and all that is sealed of it, to the last bit")
    elif found.levels is None:
        out.print(f"{found.features:.1e} of their norm away from {what}", soft_wrap=True)
    else:
        apart = f"{found.values} of {made['images'].numel()} values differ"
        out.print(
            f"beside the kept image, {apart}, by at most {found.levels} of 255; features are "
            f"{found.features:.1e} of their norm away",
            soft_wrap=True,
        )
    same = not found.bits if exact else found.is_rounding
    if not same:
        out.print(
            "[bold red]another sample than the sealed one[/]"
            if not found.is_rounding
            else "not the same to the last bit: another kind of machine or of versions"
        )
    elif found.bits:
        out.print("that is rounding: --exact makes it in the batch that it was made in")
    return same


@app.command()
def export(
    samples: SamplesArgument,
    to: Annotated[Path, typer.Option(help="File to write.")] = Path("samples.npz"),
    count: Annotated[
        int | None, typer.Option(min=1, help="The first so many; all unless given.")
    ] = None,
) -> None:
    """Write kept images as the .npz that ADM's evaluator reads: arr_0 uint8 (N, H, W, 3)."""
    from eqm.samples import export_npz

    check_file("--to", to)
    store, record = open_sealed(samples, "samples")
    written = export_npz(store, record, to, count=count)
    out.print(f"{to}: {counted(written, 'image')}", soft_wrap=True)
