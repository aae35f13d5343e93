"""A set in which one image in a hundred is new: all encoded, and copied from the set before it.

The small autoencoder on JPEGs at 64 px (bench.encoding). Both sides are the whole stage, into one
folder, turn by turn; seconds, and those of all cores, which compare on a machine that others use.
"""

import functools
import statistics
import tempfile
from pathlib import Path

from bench.encoding import CASES, CORES, Measured, measured, pictures
from eqm import encode, stage
from eqm.autoencoder import autoencoder_to_bytes
from eqm.config import AutoencoderConfig, AutoencoderStage, Job, LatentsStage, Runtime
from eqm.images import open_source
from eqm.records import Ref, to_json
from eqm.stage import Outcome, listing_key
from eqm.storage import LocalStore

CASE = CASES[1]
NEW_IMAGES = CASE.images // 100
ROUNDS = 3


class Sides:
    """Pictures of which some were not there at first, and the set of the others."""

    def __init__(self, folder: Path) -> None:
        self.uri = pictures(folder, CASE)
        self.store = LocalStore(folder / "store")
        self.runtime = Runtime(store=self.store.uri, source_uri=self.uri, device="cpu")
        asked = AutoencoderStage(source=CASE.source, autoencoder=AutoencoderConfig(kind="identity"))
        job = Job(stage="autoencoder", config=to_json(asked), inputs={}, runtime=self.runtime)
        files = autoencoder_to_bytes(CASE.make(CASE.source))
        self.autoencoder = stage.run(job, lambda _: Outcome(outputs=files)).ref
        new = sorted((folder / "images").rglob("*.jpg"))[:: CASE.images // NEW_IMAGES][:NEW_IMAGES]
        kept = {path: path.read_bytes() for path in new}
        for path in new:
            path.unlink()
        self.earlier = stage.run(self.job(), encode.program)
        for path, data in kept.items():
            path.write_bytes(data)

    def job(self, **inputs: Ref) -> Job:
        """The job for the pictures that are there now."""
        source = open_source(CASE.source, self.uri)
        self.store.write_once(listing_key(source.digest), source.listing_bytes())
        listed = Ref(stage="source", digest=source.digest, content=source.digest)
        asked = LatentsStage(source=CASE.source, encode=CASE.encode)
        named = {"source": listed, "autoencoder": self.autoencoder, **inputs}
        return Job(stage="latents", config=to_json(asked), inputs=named, runtime=self.runtime)

    def forget(self, digest: str) -> None:
        """Have a set be as if it had never been made."""
        record = self.store.record("latents", digest)
        assert record is not None
        for key in self.store.list(f"latents/{digest}/"):
            self.store.delete(key)
        for blob in record.outputs.values():
            if blob not in self.earlier.outputs.values():
                self.store.delete(blob.key)


def main() -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as folder:
        sides = Sides(Path(folder))
        jobs = {
            "all encoded": sides.job(),
            "the others copied": sides.job(earlier=sides.earlier.ref),
        }
        found: dict[str, list[Measured]] = {name: [] for name in jobs}
        for number in range(ROUNDS + 1):
            for name, job in jobs.items():
                one = measured(functools.partial(stage.run, job, encode.program))
                sides.forget(stage.job_digest(job))
                if number:
                    found[name].append(one)
    print(f"-- {CASE.name}, {CASE.images} images of which {NEW_IMAGES} are new, {CORES} cores")
    for name, runs in found.items():
        seconds = statistics.median(one.seconds for one in runs)
        work = statistics.median(one.busy * one.seconds for one in runs) * CORES
        print(f"{name:18} {seconds:6.2f} s, {work:6.2f} s of cores", flush=True)


if __name__ == "__main__":
    main()
