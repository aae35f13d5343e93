"""``eqm import-reference``: what it seals, says and refuses."""

import datetime
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from eqm.adm import read_batch
from eqm.autoencoder import read_pretrained
from eqm.clean import survey
from eqm.config import PretrainedFile, ReferenceConfig
from eqm.records import from_json, sha256
from eqm.storage import LocalStore
from flows import cli

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
ROWS = RANDOM.normal(size=(50, 6))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalStore]:
    before = dict(os.environ)
    for name in before:
        if name.startswith(("EQM_", "AWS_", "MLFLOW_", "PREFECT_")):
            monkeypatch.delenv(name)
    os.environ["EQM_HOME"] = str(tmp_path / "home")
    os.environ["EQM_STORE"] = str(tmp_path / "store")
    yield LocalStore(tmp_path / "store")
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    file = tmp_path / "batch.npz"
    np.savez(file, arr_0=IMAGES, mu=ROWS.mean(0), sigma=np.cov(ROWS, rowvar=False))
    return file


def asked(*words: str):
    return CliRunner().invoke(cli.app, ["import-reference", *words])


def table(output: str) -> ReferenceConfig:
    """The table that is printed, read as a config would be."""
    lines = output.splitlines()
    start = lines.index("    [reference]")
    return from_json(
        ReferenceConfig, tomllib.loads("\n".join(lines[start : start + 3]))["reference"]
    )


def test_what_is_printed_can_be_used(store: LocalStore, batch: Path) -> None:
    digest = sha256(batch.read_bytes())
    told = asked(str(batch), "--images", "1234", "--sha256", digest)
    assert told.exit_code == 0, told.output
    assert "5 images of 8 px, moments of 6 features" in told.output
    config = table(told.output)
    assert config.file_images == 1234
    assert config.file is not None
    assert config.file.sha256 == digest
    found = read_batch(read_pretrained(config.file), config.file.uri)
    assert found.images is not None
    assert np.array_equal(found.images, IMAGES)
    # Once more changes nothing, and says the same.
    keys = store.list("")
    assert asked(str(batch), "--images", "1234", "--sha256", digest).output == told.output
    assert store.list("") == keys


def test_cleaning_does_not_take_it_for_nobodys(store: LocalStore, batch: Path) -> None:
    assert asked(str(batch)).exit_code == 0
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=99)
    assert survey(store, older_than_seconds=2 * 24 * 3600.0, now=later).keys == []
    for key in store.list("import/"):
        store.delete(key)
    gone = survey(store, older_than_seconds=2 * 24 * 3600.0, now=later).keys
    assert gone == [f"blobs/sha256/{sha256(batch.read_bytes())}"]


def test_moments_without_a_count_are_those_of_imagenet(store: LocalStore, batch: Path) -> None:
    told = asked(str(batch))
    assert table(told.output).file_images == 1281167
    assert "the file does not say" in told.output


def test_what_is_no_batch_is_refused_and_not_kept(store: LocalStore, tmp_path: Path) -> None:
    pickled, text = tmp_path / "pickled.npz", tmp_path / "text.npz"
    np.savez(pickled, arr_0=np.array([{"a": 1}], dtype=object))
    text.write_text("no archive")
    whole = tmp_path / "whole.npz"
    np.savez(whole, arr_0=IMAGES)
    for words, message in (
        ([str(tmp_path / "none.npz")], "there is no file"),
        ([str(pickled)], "is of type object"),
        ([str(text)], "cannot be read as .npz"),
        ([str(whole), "--sha256", "0" * 64], "but --sha256 is 0000"),
    ):
        told = asked(*words)
        assert told.exit_code != 0
        assert message in str(told.exception), (words, told.exception)
    assert store.list("") == []


def test_a_file_of_s3_may_end_in_npz() -> None:
    """It is a file, not a folder of weights."""
    from eqm.autoencoder import _place

    place = _place(PretrainedFile(uri="s3://bucket/adm/batch.npz", sha256="0" * 64))
    assert (place.name, place.weights) == ("s3://bucket/adm", "batch.npz")
