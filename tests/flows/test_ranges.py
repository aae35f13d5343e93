"""Encoding on a work pool: ranges of shards that flow runs share."""

import json
from pathlib import Path

import pytest
from deployed import ended, pictures, start_deployment

from eqm.latent_set import open_manifest
from eqm.storage import open_store
from flows.encode import encode, ranges
from infra.deployments import PrefectApi


@pytest.mark.parametrize("shards", [1, 2, 7, 1250])
@pytest.mark.parametrize("workers", [1, 2, 3, 8])
def test_ranges_hold_every_shard_once_and_are_of_nearly_one_size(shards: int, workers: int) -> None:
    found = ranges(shards, workers)
    assert [n for first, end in found for n in range(first, end)] == list(range(shards))
    sizes = [end - first for first, end in found]
    assert len(sizes) == min(shards, workers)
    assert max(sizes) - min(sizes) <= 1
    assert min(sizes) > 0


def test_no_worker_is_refused() -> None:
    from eqm.errors import ConfigError

    with pytest.raises(ConfigError, match="workers is 0; it must be 1 or greater"):
        encode.fn(workers=0)


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.timeout(400)
def test_a_deployed_run_shares_its_shards_among_flow_runs(
    all_environment: dict[str, str], tmp_path: Path
) -> None:
    pictures(tmp_path / "pictures", seed=1)
    config = {
        "preset": "tiny",
        "name": "test-ranges",
        "source_uri": str(tmp_path / "pictures"),
        "source": {"kind": "folder", "image_size_px": 8, "channels": 3},
        "autoencoder": {"kind": "identity"},
        "encode": {"shard_images": 4},
    }
    api = PrefectApi(all_environment["PREFECT_API_URL"], all_environment)
    home = Path(all_environment["EQM_HOME"])
    run = start_deployment(api, "encode", {"config": config, "workers": 2})
    log = home / "logs" / "worker.log"
    assert ended(api, run, seconds=300)["type"] == "COMPLETED", log.read_text()
    jobs = [json.loads(file.read_text()) for file in (home / "jobs").glob("latents-*.json")]
    ours = [job for job in jobs if job["runtime"]["source_uri"] == config["source_uri"]]
    assert sorted(job["runtime"]["shards"] or [] for job in ours)[-2:] == [[0, 3], [3, 6]]
    store = open_store(ours[0]["runtime"]["store"], cache=home / "cache")
    asked = api._post("/flow_runs/filter", {"flow_runs": {"name": {"like_": "shards-"}}})
    assert {(one["name"], one["state"]["type"]) for one in asked} == {
        ("shards-0-3", "COMPLETED"),
        ("shards-3-6", "COMPLETED"),
    }
    digest = ours[0]["inputs"]["source"]["digest"]
    assert store.exists(f"source/{digest}/listing")
    records = [
        record
        for key in store.list("latents/")
        if key.endswith("record.json")
        and (record := store.record("latents", key.split("/")[-2])) is not None
        and record.inputs["source"].digest == digest
    ]
    (record,) = records
    manifest = open_manifest(record, store).manifest
    assert [shard.count for shard in manifest.shards] == [4] * 6
