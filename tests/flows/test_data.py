"""``eqm data``: a folder becomes sealed latents in a plain directory, and damage has a name."""

import io
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eqm
from eqm.config import OODSet
from eqm.errors import DataError, IntegrityError
from eqm.image_sets import check_set, digest_of
from eqm.records import from_json
from eqm.shards import INDEX, KEYS, MANIFEST, ORIGINALS, sealed_latents
from flows import cli


@dataclass
class Told:
    status: int
    out: str
    err: str


Run = Callable[..., Told]


@pytest.fixture(autouse=True, scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> None:
    global MADE
    MADE = tmp_path_factory.mktemp("made") / "store"


MADE = Path()


@pytest.fixture
def eqm_(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """The command, in a folder of its own, with no services of anybody."""
    before = dict(os.environ)
    for name in list(os.environ):
        if name.startswith(("EQM_", "AWS_", "MLFLOW_", "PREFECT_")):
            del os.environ[name]
    monkeypatch.chdir(tmp_path)
    os.environ["EQM_HOME"] = str(tmp_path / "home")
    os.environ["COLUMNS"] = "200"

    def run(*words: str) -> Told:
        monkeypatch.setattr(sys, "argv", ["eqm", "data", *words])
        capfd.readouterr()
        status = 0
        try:
            cli.run()
        except SystemExit as ended:
            status = int(ended.code or 0)
        told = capfd.readouterr()
        return Told(status, told.out, told.err)

    yield run
    os.environ.clear()
    os.environ.update(before)


def make_images(folder: Path, count: int = 40) -> Path:
    draw = np.random.default_rng(0)
    for i in range(count):
        place = folder / ("cat" if i % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        pixels = draw.integers(0, 256, (12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i:03d}.png")
    return folder


def encoded(run: Run, *more: str) -> str:
    """Encode the images of a folder; the address of the latents, which the first test makes."""
    if not MADE.exists() or more:
        where = encoded_now(run, *more)
        if not more:
            shutil.copytree("store", MADE)
        return where
    shutil.copytree(MADE, "store", symlinks=True)
    return next(str(path.parent) for path in Path("store/latents").glob("*/record.json"))


def encoded_now(run: Run, *more: str) -> str:
    if not Path("pictures").exists():
        make_images(Path("pictures"))
    line = ("encode", "pictures", "--image-size", "8", "--autoencoder", "identity", "--to", "store")
    told = run(*line, "--shard-images", "16", "--held-out", "0.2", *more)
    assert told.status == 0, told.err
    return told.out.split()[-1]


def test_a_folder_becomes_latents_without_services(eqm_: Run) -> None:
    where = encoded_now(eqm_)
    data = eqm.open_manifest(where)
    assert (len(data), len(data.manifest.shards)) == (40, 3)
    assert data.manifest.classes == ("cat", "dog")
    assert encoded_now(eqm_) == where  # and nothing is made again
    listed = eqm_("list", "store").out
    assert where.rpartition("/")[2][:12] in listed
    assert "3 x 8 x 8" in listed
    assert "every byte is sound" in eqm_("verify", where).out


@pytest.mark.parametrize("store", ["pictures", "pictures/", "pictures/new", "link", "link/new"])
def test_a_store_among_the_images_is_refused(eqm_: Run, store: str) -> None:
    before = set(make_images(Path("pictures"), 4).rglob("*"))
    Path("link").symlink_to("pictures")
    line = ("encode", "--image-size", "8", "--autoencoder", "identity")
    for source in ("pictures", "link"):
        told = eqm_(*line, source, "--to", store)
        assert told.status == 2, told
        assert "the source" in told.err
        assert "its folders would be read as images; name a place outside of it" in told.err
    assert set(Path("pictures").rglob("*")) == before


def test_a_hidden_store_among_the_images_spoils_nothing(eqm_: Run) -> None:
    make_images(Path("pictures"), 4)
    line = ("encode", "pictures", "--image-size", "8", "--autoencoder", "identity")
    made, again = (eqm_(*line, "--held-out=0", "--to", "pictures/.eqm/store") for _ in range(2))
    assert made.status == 0, made.err
    assert again.out == made.out


def test_what_was_left_out_is_told(eqm_: Run) -> None:
    make_images(Path("pictures"))
    assert "left out" not in eqm_("stats", encoded(eqm_)).out
    for name in ("a", "b"):
        Path(f"pictures/cat/{name}.png").write_bytes(b"none")
    line = ("encode", "pictures", "--image-size", "8", "--autoencoder", "identity", "--to", "store")
    told = eqm_(*line, "--on-corrupt", "skip")
    assert told.status == 0, told.err
    assert "held out), 2 images left out that cannot be decoded\n" in told.out


def test_a_store_without_latents_lists_none(eqm_: Run) -> None:
    Path("store").mkdir()
    told = eqm_("list", "store")
    assert (told.status, "holds no sealed latents" in told.out) == (0, True)
    os.environ["EQM_STORE"] = "nowhere"
    told = eqm_("list")
    assert (told.status, "EQM_STORE is " in told.err) == (2, True)


def test_any_number_of_processes_encodes(eqm_: Run) -> None:
    where = encoded(eqm_)
    # What is sealed is found again, by however many.
    assert encoded_now(eqm_, "--processes", "3").endswith(where)
    assert encoded_now(eqm_, "--set", "processes=5").endswith(where)


def test_latents_are_named_by_their_first_digits(eqm_: Run) -> None:
    digest = encoded(eqm_).rpartition("/")[2]
    os.environ["EQM_STORE"] = "store"
    assert eqm_("verify", digest[:8]).status == 0
    wrong = eqm_("verify", "0000")
    assert (wrong.status, "has no latents 0000" in wrong.err) == (2, True)


def test_images_of_earlier_latents_are_copied(eqm_: Run) -> None:
    where = encoded(eqm_)
    digest = where.rpartition("/")[2]
    make_images(Path("pictures"), 42)
    line = ("encode", "pictures", "--image-size", "8", "--to", "store", "--shard-images", "16")
    told = eqm_(*line, "--held-out", "0.2", "--earlier", digest[:10])
    assert told.status == 0, told.err
    assert f"held out), 40 copied from latents {digest[:12]}" in told.out
    later = told.out.split()[-1]
    assert later != where
    shown = eqm_("stats", later)
    assert "42 (" in shown.out
    assert f"40 copied from latents {digest[:12]}" in shown.out
    assert "every byte is sound" in eqm_("verify", later).out


def test_an_address_of_earlier_latents_is_of_this_store(eqm_: Run) -> None:
    where = encoded(eqm_)
    digest = where.rpartition("/")[2]
    make_images(Path("pictures"), 42)
    line = ("encode", "pictures", "--image-size", "8", "--to", "store", "--held-out", "0.2")
    for store in ("s3://elsewhere/store", "another"):
        told = eqm_(*line, "--earlier", f"{store}/latents/{digest}")
        assert (told.status, "has no such latents: they must be of" in told.err) == (2, True), told
    # One set, however it is named.
    named = (where, f"{where}/record.json", str(Path(where).absolute()))
    made = {eqm_(*line, "--earlier", address).out for address in named}
    assert len(made) == 1
    assert f"copied from latents {digest[:12]}" in made.pop()


def test_verify_names_all_damage_and_exits_with_1(eqm_: Run) -> None:
    where = encoded(eqm_)
    data = eqm.open_manifest(where)
    shards, keys = data.manifest.shards, data.keys
    cut, flipped, gone = (Path("store") / shard.tar.key for shard in shards)
    at = int(data._offset[20, 1]) + 200
    for path, change in (
        (cut, lambda b: b[: len(b) // 2]),
        (flipped, lambda b: b[:at] + bytes([b[at] ^ 8]) + b[at + 1 :]),
    ):
        path.chmod(0o644)
        path.write_bytes(change(path.read_bytes()))
    gone.unlink()
    told = eqm_("verify", where)
    assert told.status == 1
    assert f"sample 20 ({keys[20]}), byte {int(data._offset[20, 1])}" in told.out
    assert "mirror.npy does not match its CRC" in told.out
    for shard, word in ((0, "cut"), (1, "CRC"), (2, "does not exist")):
        assert any(f"shard {shard} (" in line and word in line for line in told.out.splitlines())
    assert "restore these files" in told.out


def test_every_file_of_a_set_is_verified(eqm_: Run) -> None:
    where = encoded(eqm_)
    _, record = sealed_latents(where)
    others = {name: blob for name, blob in record.outputs.items() if "shard-" not in name}
    assert sorted(others) == sorted([MANIFEST, INDEX, KEYS, ORIGINALS])
    for name, blob in others.items():
        path = Path("store") / blob.key
        path.chmod(0o644)
        sound = path.read_bytes()
        path.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        told = eqm_("verify", where)
        assert told.status, name
        assert f"{blob.key} is damaged" in told.out + told.err
        if name != MANIFEST:  # without which there is nothing to verify
            assert told.status == 1
            assert f"/{name}: " in told.out
            assert "1 damage:" in told.out
        path.write_bytes(sound)
    assert "every byte is sound" in eqm_("verify", where).out


def test_a_tar_beside_a_damaged_index_is_named_as_well(eqm_: Run) -> None:
    where = encoded(eqm_)
    shard = eqm.open_manifest(where).manifest.shards[1]
    for blob in (shard.index, shard.tar):
        path = Path("store") / blob.key
        path.chmod(0o644)
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    told = eqm_("verify", where)
    assert told.status == 1
    for blob in (shard.index, shard.tar):
        assert f"{blob.key} is damaged" in told.out
    assert "2 damages" in told.out


def test_stats_tell_counts_and_warn(eqm_: Run) -> None:
    make_images(Path("pictures"))
    told = eqm_("stats", encoded(eqm_))
    assert told.status == 0
    for words in ("training images: 15 each", "(3, 8, 8)", "moments of 40 samples", "mirrors"):
        assert words in told.out
    assert "warning" not in told.out
    for path in Path("pictures/dog").iterdir():
        flat = np.zeros((12, 10, 3), dtype=np.uint8)
        flat[..., 0] = 200
        Image.fromarray(flat).save(path)
    for path in sorted(Path("pictures/cat").iterdir())[1:]:
        path.unlink()
    flat = np.zeros((12, 10, 3), dtype=np.uint8)
    Image.fromarray(flat).save("pictures/cat/001.png")
    told = eqm_("stats", encoded(eqm_, "--set", "source.held_out_fraction=0"))
    assert "channel 1 is constant" in told.out
    assert "the largest class has 20 times the images of the smallest" in told.out


def test_a_preview_shows_images_and_what_comes_back(eqm_: Run) -> None:
    where = encoded(eqm_)
    assert eqm_("preview", where, "--out", "seen.png").status == 0
    picture = Image.open("seen.png").convert("RGB")
    # Three bands of three rows, eight columns of 96 px: image, decoded and mirror.
    assert picture.width > 8 * 96
    assert picture.height > 9 * 96
    wrong = eqm_("preview", where, "--out", "nowhere/seen.png")
    assert (wrong.status, "there is no folder" in wrong.err) == (2, True)


def test_the_identity_comes_back_as_it_was(eqm_: Run) -> None:
    from eqm.inspection import preview
    from eqm.latent_set import open_manifest

    store, record = sealed_latents(encoded(eqm_))
    png = preview(open_manifest(record, store), record, store, columns=4)
    pixels = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    rows = [
        y
        for y in range(1, len(pixels))
        if (pixels[y] != 255).any() and (pixels[y - 1, -300:] == 255).all()
    ]
    heights = 96
    first, second = pixels[rows[0] : rows[0] + heights], pixels[rows[1] : rows[1] + heights]
    right = slice(pixels.shape[1] - 4 * 90, None)
    assert np.abs(first[:, right].astype(int) - second[:, right]).max() <= 1


def test_a_set_has_a_digest_for_configs(eqm_: Run) -> None:
    make_images(Path("pictures"), 4)
    told = eqm_("digest", "folder", "pictures")
    assert (told.status, told.out.strip()) == (0, digest_of("folder", "pictures"))
    given = {"name": "pictures", "kind": "folder", "uri": "pictures", "sha256": told.out.strip()}
    check_set(from_json(OODSet, given), 9)
    whole = Path("pictures/cat/001.png").read_bytes()
    Path("pictures/cat/001.png").write_bytes(whole[:40])
    wrong = eqm_("digest", "folder", "pictures")
    assert (wrong.status, wrong.out) == (2, "")
    assert "cannot be decoded: cat/001.png (" in wrong.err
    Path("pictures/cat/001.png").unlink()
    with pytest.raises(IntegrityError, match="set 'pictures' at pictures has digest"):
        check_set(from_json(OODSet, given), 9)
    with pytest.raises(DataError, match=r"ood.sets\['pictures'\].uri elsewhere does not exist"):
        check_set(from_json(OODSet, {**given, "uri": "elsewhere"}), 9)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("encode", "nowhere", "--image-size", "8", "--to", "s"), "is no folder, .tar or .parquet"),
        (("encode", "s3://b/x", "--image-size", "8", "--to", "s"), "say --kind"),
        (
            ("encode", "http://a/b", "--image-size", "8", "--to", "s"),
            "SOURCE is 'http://a/b'; it must be a folder, .tar or .parquet file on this machine",
        ),
        (("digest", "folder", "http://a/b"), "SOURCE is 'http://a/b'; it must be a folder on this"),
        (("digest", "folder", "nowhere"), "SOURCE nowhere does not exist: give the folder"),
        (("encode", "pictures", "--image-size", "8", "--to", "ftp://x/y"), "only s3://"),
        (
            ("encode", "pictures", "--image-size", "8", "--to", "s", "--autoencoder", "a/b@c"),
            "--autoencoder-sha256",
        ),
        (
            ("encode", "pictures", "--image-size", "8", "--to", "s", "--autoencoder", "pictures"),
            "a folder without diffusion_pytorch_model.safetensors",
        ),
        (("encode", "pictures", "--image-size", "1", "--to", "s"), "image_size_px"),
        (
            ("encode", "pictures", "--image-size", "8", "--to", "s", "--earlier", "s/latents/0a"),
            "has no such latents: they must be of the store that --to names",
        ),
        (
            ("encode", "pictures", "--image-size=8", "--to=s", "--earlier=0a", "--autoencoder=fit"),
            "leave one of them out",
        ),
        (
            ("encode", "pictures", "--image-size=8", "--to=s", "--autoencoder-sha256", "0" * 64),
            "and no weights are read: leave it out",
        ),
        (
            (
                *("encode", "pictures", "--image-size=8", "--to=s", "--earlier=0a"),
                *("--autoencoder-sha256", "0" * 64),
            ),
            "and no weights are read: leave it out",
        ),
        (("encode", "", "--image-size", "8", "--to", "s"), "SOURCE is empty: name what is meant"),
        (("encode", "pictures", "--image-size", "8", "--to", ""), "--to is empty: name what is m"),
        (("encode", "pictures", "--image-size=8", "--to=s", "--autoencoder="), "--autoencoder is"),
        (("digest", "folder", ""), "SOURCE is empty"),
        (("list", ""), "STORE is empty"),
        (("list", "typo"), "/typo, which does not exist: name the folder that `eqm data encode`"),
        (("list", "pictures/cat/001.png"), "/pictures/cat/001.png, which is a file: name the"),
        (("verify", "store/latents/abc"), "is no set of latents"),
        (("digest", "svhn", "pictures"), "test_32x32.mat does not exist: give the folder of train"),
        (("digest", "mnist", "pictures"), "kind is 'mnist'; it must be one of folder, cifar10"),
        (("verify", f"nowhere/latents/{'0' * 64}"), "there is no store"),
        (("stats", f"pictures/latents/{'0' * 64}"), "is not sealed"),
    ],
)
def test_mistakes_are_one_message(eqm_: Run, words: tuple[str, ...], message: str) -> None:
    make_images(Path("pictures"), 4)
    told = eqm_(*words)
    assert (told.status, message in told.err) == (2, True), told.err
    assert "Traceback" not in told.err
