"""A night, with real services: schedules fire, and everything that they need is killed once.

New pictures lie there; the weekly pipeline and the nightly look at the champion fall due. While
the weekly one trains, its worker and every process under it are killed. While it is started again,
the Prefect server is killed; before it registers its model, MLflow is. In the morning all runs have
ended well, the one that was killed went on from its checkpoint, and the reports are there.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from deployed import ended, pictures, start_deployment
from mlflow import MlflowClient
from own_home import Home, own_home

from eqm import champion, checkpoint, lease
from eqm.dossier import chain_of
from eqm.records import Record
from eqm.stage import open_ref, verify
from eqm.storage import Store

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(900)]

NAME = "test-night"
MODEL = f"eqm-{NAME}"


@pytest.fixture
def night(tmp_path: Path) -> Iterator[Home]:
    with own_home(tmp_path, NAME) as home:
        yield home


def test_in_the_morning_all_is_done_once(night: Home) -> None:
    pictures(night.pictures)
    state = ended(
        night.api, start_deployment(night.api, "weekly", {"config": night.config}), seconds=400
    )
    assert state["type"] == "COMPLETED", night.log()[-6000:]
    (first,) = champion.history(night.store, MODEL)

    pictures(night.pictures / "new", seed=1)
    for name in ("circles", "squares"):
        for file in (night.pictures / "new" / name).iterdir():
            file.rename(night.pictures / name / f"new-{file.name}")
        (night.pictures / "new" / name).rmdir()
    (night.pictures / "new").rmdir()
    night.due("weekly", {"config": night.config})
    digest = night.until(night.training, seconds=240)
    night.kill_worker()
    before = checkpoint.newest(night.store, digest)
    assert before is not None

    # The keeper starts a worker, and the run that nobody works on again.
    night.until(lambda: "is Running, and its process is gone" in night.log())
    night.kill("prefect")
    night.up()
    night.until(lambda: lease.read(night.store, checkpoint.lease_key(digest)).token == 2)
    night.kill("mlflow")
    night.until(lambda: night.store.record("train", digest))
    night.until(lambda: "MLflow" in night.log() and "Retry" in night.log())
    night.up()
    # While it waits to ask MLflow again, another run may have its slot, and look at the first one.
    night.until(lambda: len(champion.history(night.store, MODEL)) == 2, seconds=240)
    night.due("reevaluate-champion", {"config": night.config})

    def morning() -> bool:
        runs = [*night.runs("weekly"), *night.runs("reevaluate-champion")]
        return len(runs) == 3 and all(run["state"]["type"] == "COMPLETED" for run in runs)

    night.until(morning, seconds=240)
    assert sorted(run["run_count"] for run in night.runs("weekly")) == [1, 2]
    assert [run["run_count"] for run in night.runs("reevaluate-champion")] == [1]

    entries = champion.history(night.store, MODEL)
    assert [entry.version for entry in entries] == [1, 2]
    trained = open_ref(night.store, entries[1].train)
    assert trained.digest == digest
    assert trained.config["train"]["init_from"]["sha256"] == (
        open_ref(night.store, first.train).outputs["ema.safetensors"].sha256
    )
    for record in chain_of(night.store, open_ref(night.store, entries[1].evaluation)):
        verify(night.store, record)
    # Two trainings were done, the second by two processes one after the other.
    assert len(night.trainings()) == 2
    held = lease.read(night.store, checkpoint.lease_key(digest))
    assert held is not None
    assert (held.token, held.released) == (2, True)
    for entry in entries:
        assert night.store.exists(entry.report)
    (watch,) = records(night.store, "watch")
    assert (watch.values["outcome"], watch.values["new_images"]) == ("continued", 24)
    (looked,) = records(night.store, "night")
    assert looked.inputs["train"] == entries[1].train
    assert looked.values["drift"]["outcome"] in ("none", "drift")
    shown = MlflowClient().get_model_version_by_alias(MODEL, "champion")
    assert int(shown.version) == 2
    metrics = MlflowClient().get_run(shown.run_id).data.metrics
    assert "nightly/drift" in metrics
    assert not night.taken_slots()


def records(store: Store, stage: str) -> list[Record]:
    keys = [key for key in store.list(f"{stage}/") if re.fullmatch(r".*/record\.json", key)]
    return [record for key in keys if (record := store.record(stage, key.split("/")[1]))]
