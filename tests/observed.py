"""eqm.train as a program that writes down what it trains on, and that asks itself to stop.

``python tests/observed.py JOB.json FOLDER STOP_IMAGE`` (alone or under torchrun) trains as
``python -m eqm.train JOB.json`` does. Each rank leaves a digest of every image as the network is
given it, in a file of its own in FOLDER; at image STOP_IMAGE the first rank sends itself SIGTERM,
as a scheduler would. Tests in the same process use :func:`observing`.
"""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from eqm import train
from eqm.batches import Batch
from eqm.objective import Corrupted
from eqm.records import sha256


def digests(batch: Batch, at: Corrupted) -> dict[int, str]:
    """Image number -> what was made of it: sample, label, gamma, x_gamma and target, bit by bit."""
    found = {}
    for i, number in enumerate(batch.image_numbers.tolist()):
        parts = (batch.sample_numbers[i], at.labels[i], at.gamma[i], at.x[i], at.goal[i])
        found[number] = sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts))
    return found


@contextlib.contextmanager
def observing(folder: Path, *, stop: int | None = None) -> Iterator[None]:
    """Write down what training in this process is given; ask it to stop at an image."""
    plain = train.corrupted
    folder.mkdir(parents=True, exist_ok=True)

    def noted(run: train.Run, batch: Batch) -> Corrupted:
        at = plain(run, batch)
        with (folder / f"{run.world.size}-{run.world.rank}.txt").open("a") as file:
            file.writelines(f"{number} {told}\n" for number, told in digests(batch, at).items())
        # An update that has begun does not look for signals: the one after it ends the run.
        if run.world.is_first and run.images_seen + 2 * run.config.batch_size == stop:
            os.kill(os.getpid(), signal.SIGTERM)
        return at

    train.corrupted = noted
    try:
        yield
    finally:
        train.corrupted = plain


def read(folder: Path) -> dict[str, dict[int, str]]:
    """ "<world size>-<rank>" -> image number -> digest; an image seen twice is an error."""
    found: dict[str, dict[int, str]] = {}
    for file in sorted(folder.iterdir()):
        pairs = [line.split() for line in file.read_text().splitlines()]
        found[file.stem] = {int(number): told for number, told in pairs}
        assert len(found[file.stem]) == len(pairs), f"{file.stem} saw an image twice"
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with observing(Path(sys.argv[2]), stop=int(sys.argv[3])):
        status = train.main(sys.argv[1:2])
    sys.exit(status)
