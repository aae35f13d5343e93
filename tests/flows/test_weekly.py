"""What a schedule makes of a folder of pictures: at first, with nothing new, with something new."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from deployed import pictures
from test_pipeline import STAGES_IN_THIS_PROCESS, run_flow

from eqm import champion
from eqm.config import ALGORITHMS, LatentsStage, replace
from eqm.records import Record, Ref, to_json
from eqm.stage import open_ref, verify
from eqm.storage import Store, open_store
from flows import weekly
from flows.plan import read_config

pytestmark = [pytest.mark.services, pytest.mark.timeout(400)]

NAME = "test-weekly"
CONFIG = """
preset = "tiny"
name = "{name}"
source_uri = "{folder}"
continue_images = 256

[source]
kind = "folder"
image_size_px = 8
channels = 3

[autoencoder]
kind = "identity"

[extractor.fit]
width = 8
dimension = 8
images = 64

[further.wide.extractor.fit]
width = 16
dimension = 4
images = 64

[network]
width = 16
depth = 1
heads = 2

[train]
images = 512

[generate]
samples = 128

[generate.sampler]
updates = 4

[evaluate]
grid_rows = 1

[evaluate.ood]
images = 20

[policy]
minimum_samples = 40
maximum_distance_ratio = 1000.0

[policy.metrics.fd_wide]
maximum_ratio = 1000.0
"""
WEEKS = """
import shutil
from flows.evaluate import reevaluate_champion
from flows.weekly import weekly

def pipeline(config):
    folder = Path(config).parent
    first = weekly(config, as_of="2026-03-02")
    same = weekly(config, as_of="2026-03-09")
    night = reevaluate_champion(config, as_of="2026-03-10")
    shutil.copytree(folder / "more", folder / "pictures", dirs_exist_ok=True)
    gone_on = weekly(config, as_of="2026-03-16")
    reevaluate_champion(config, as_of="2026-03-17")
    still = weekly(config, as_of="2026-03-23")
    again = weekly(config, as_of="2026-03-23")
    return [first, same, gone_on, still, again]
"""


@pytest.mark.slow
def test_weeks_of_a_folder(all_environment: dict[str, str], tmp_path: Path) -> None:
    pictures(tmp_path / "pictures")
    pictures(tmp_path / "more", seed=1)
    for file in sorted((tmp_path / "more").rglob("*.png")):
        file.rename(file.with_name(f"new-{file.name}"))
    # One picture is another one from now on.
    (tmp_path / "more" / "circles" / "new-00.png").rename(tmp_path / "more" / "circles" / "00.png")
    config = tmp_path / "weekly.toml"
    config.write_text(CONFIG.format(name=NAME, folder=tmp_path / "pictures"))
    first, same, gone_on, still, again = run_flow(
        config, tmp_path / "result.json", os.environ, before=STAGES_IN_THIS_PROCESS + WEEKS
    )
    assert (first["outcome"], first["promoted"], first["version"]) == ("first", True, 1)
    assert same["outcome"] == "nothing new"
    assert (gone_on["outcome"], gone_on["promoted"], gone_on["version"]) == ("continued", True, 2)
    assert still["outcome"] == "nothing new"
    assert again == still, "a day asks for the same thing"

    store = open_store("s3://eqm/store", cache=Path(all_environment["EQM_HOME"]) / "cache")
    old, new = champion.history(store, f"eqm-{NAME}")
    trained = open_ref(store, new.train)
    begun_from = open_ref(store, old.train).outputs["ema.safetensors"]
    assert trained.config["train"]["init_from"]["sha256"] == begun_from.sha256
    assert trained.config["train"]["images"] == 256
    evaluations = [open_ref(store, entry.evaluation) for entry in (old, new)]
    assert evaluations[0].inputs["source"] != evaluations[1].inputs["source"]
    assert evaluations[0].inputs["extractor"] == evaluations[1].inputs["extractor"]
    latents = [open_ref(store, open_ref(store, e.train).inputs["latents"]) for e in (old, new)]
    assert latents[0].inputs["autoencoder"] == latents[1].inputs["autoencoder"]
    # Only what is new was encoded: 24 pictures, one of which is another one now, and 24 more.
    assert latents[1].inputs["earlier"] == latents[0].ref
    assert (latents[1].values["images"], latents[1].values["copied"]) == (47, 23)

    looked = {
        record.config["day"]: record
        for record in records(store, "watch")
        if record.config["model"] == f"eqm-{NAME}"
    }
    assert sorted(looked) == ["2026-03-09", "2026-03-16", "2026-03-23"]
    assert looked["2026-03-09"].values["outcome"] == "nothing new"
    # An extractor and a reference more than there would be without the further one.
    assert looked["2026-03-09"].values["records"] == 9
    # Champion and chain are other ones then; the set that was copied from is not looked at again.
    assert looked["2026-03-23"].values["records"] == 9
    went_on = looked["2026-03-16"].values
    assert (went_on["new_images"], went_on["gone_images"]) == (24, 1)
    for record in looked.values():
        verify(store, record)

    nights = {r.config["day"]: r for r in records(store, "night") if r.inputs["train"] == old.train}
    drift = nights["2026-03-10"].values["drift"]
    assert drift["outcome"] in ("none", "drift")
    assert drift["low"] <= drift["difference"] <= drift["high"]
    assert drift["difference"] == pytest.approx(drift["now"] - drift["then"])

    # The further extractor is the champion's too, on new images and by night.
    by_night = open_ref(store, nights["2026-03-10"].inputs["evaluation"])
    rulers = {
        open_ref(store, e.inputs["samples"]).inputs["extractor-wide"].digest
        for e in (*evaluations, by_night)
    }
    assert len(rulers) == 1
    assert by_night.inputs["reference-wide"] == evaluations[0].inputs["reference-wide"]
    assert "fd_wide" in by_night.values["evaluation"]["metrics"]
    # Measured again on the new images, or there were nothing to compare.
    judged = {reason["check"]: reason for reason in new.decision["reasons"]}
    assert judged["champion fd_wide"]["passed"]


def test_latents_that_do_not_fit_are_told_and_not_copied_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setattr(weekly, "logged", said.append)
    config = read_config("tiny", {"encode.precision": "float32"})
    plan: Any = SimpleNamespace(config=config)
    asked = LatentsStage(source=config.source, encode=config.encode)
    ref = Ref(stage="autoencoder", digest="a" * 64, content="b" * 64)
    latents = Record(
        stage="latents",
        algorithm=ALGORITHMS["latents"],
        config=to_json(asked),
        inputs={"autoencoder": ref},
        outputs={},
        values={},
    )
    assert weekly.copied_from(plan, latents) is latents
    assert said == []
    half = replace(asked, encode=replace(asked.encode, precision="bfloat16"))
    assert weekly.copied_from(plan, replace(latents, config=to_json(half))) is None
    (line,) = said
    assert line.startswith("all images are encoded, none is copied")
    assert "encode.precision is 'float32', it was 'bfloat16'" in line


def records(store: Store, stage: str) -> list[Record]:
    keys = [key for key in store.list(f"{stage}/") if key.endswith("/record.json")]
    return [record for key in keys if (record := store.record(stage, key.split("/")[1]))]
