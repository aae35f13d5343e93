"""A checkpoint is complete or not there; a damaged one is refused by name."""

import dataclasses
from pathlib import Path

import pytest
import torch

from eqm import checkpoint
from eqm.checkpoint import TrainState, load, newest, save
from eqm.errors import IntegrityError
from eqm.records import note_from_bytes
from eqm.storage import LocalStore

RUN = "d" * 64


def a_state(images_seen: int = 128) -> TrainState:
    generator = torch.Generator().manual_seed(images_seen)

    def tensors() -> dict[str, torch.Tensor]:
        return {"a.weight": torch.randn(3, 2, generator=generator), "b": torch.zeros(())}

    return TrainState(
        images_seen=images_seen,
        parameters=tensors(),
        ema=tensors(),
        optimiser={f"exp_avg/{k}": v for k, v in tensors().items()},
        history={"images": [64.0], "loss": [0.1], "gradient_norm": [2.0]},
        pending=[[0.25, 1.5]],
    )


def with_averages() -> TrainState:
    averages = {name: a_state(k).ema for k, name in enumerate(("ema-2000.5", "power-0.05"))}
    return dataclasses.replace(a_state(), averages=averages)


def load_newest(store: LocalStore, run: str) -> TrainState | None:
    position = newest(store, run)
    return None if position is None else load(store, run, position)


def assert_same(left: TrainState, right: TrainState) -> None:
    assert (left.images_seen, left.history, left.pending) == (
        right.images_seen,
        right.history,
        right.pending,
    )
    for name in ("parameters", "ema", "optimiser"):
        one, other = getattr(left, name), getattr(right, name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert left.averages.keys() == right.averages.keys()
    for name, tensors in left.averages.items():
        assert tensors.keys() == right.averages[name].keys()
        assert all(torch.equal(a, right.averages[name][k]) for k, a in tensors.items())


def test_round_trip(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    assert load_newest(store, RUN) is None
    save(store, RUN, a_state())
    found = load_newest(store, RUN)
    assert found is not None
    assert_same(found, a_state())


def test_further_averages_come_back_under_their_names(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    save(store, RUN, with_averages())
    found = load_newest(store, RUN)
    assert found is not None
    assert_same(found, with_averages())


def test_a_checkpoint_without_further_averages_is_as_ever(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    commit = note_from_bytes(checkpoint.Commit, store.read(save(store, RUN, a_state())), "commit")
    assert commit.files.keys() == {"parameters", "ema", "optimiser", "curve"}


def test_the_one_with_most_images_is_found(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for images in (1000, 128, 99_999):
        save(store, RUN, a_state(images))
    found = load_newest(store, RUN)
    assert found is not None
    assert found.images_seen == 99_999


def test_files_without_their_commit_are_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    save(store, RUN, a_state(128))

    def killed(*_: object) -> bool:
        raise KeyboardInterrupt

    real = store.write_once
    monkeypatch.setattr(
        store, "write_once", lambda k, d: killed() if k.endswith(".json") else real(k, d)
    )
    with pytest.raises(KeyboardInterrupt):
        save(store, RUN, a_state(256))
    found = load_newest(store, RUN)
    assert found is not None
    assert found.images_seen == 128


@pytest.mark.parametrize("file", ["parameters", "ema", "optimiser", "curve", "averages"])
def test_one_flipped_bit_is_refused_with_the_way_on(tmp_path: Path, file: str) -> None:
    store = LocalStore(tmp_path)
    key = save(store, RUN, with_averages())
    commit = note_from_bytes(checkpoint.Commit, store.read(key), "commit")
    path = store.root / commit.files[file].key
    path.chmod(0o644)
    data = bytearray(path.read_bytes())
    data[-1] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match=rf"damaged.*delete .*{key}"):
        load_newest(store, RUN)
    (store.root / key).unlink()
    assert load_newest(store, RUN) is None


def test_another_schema_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    with monkeypatch.context() as older:
        older.setattr(checkpoint, "SCHEMA", "eqm-checkpoint/0")
        save(store, RUN, a_state())
    with pytest.raises(IntegrityError, match="schema 'eqm-checkpoint/0'"):
        load_newest(store, RUN)


@pytest.mark.parametrize("old", ["128", "sha256", '"size_bytes": '])
def test_a_changed_commit_is_refused(tmp_path: Path, old: str) -> None:
    store = LocalStore(tmp_path)
    key = save(store, RUN, a_state())
    path = store.root / key
    text = path.read_text()
    edited = text.replace(old, old.replace("128", "192").replace("sha", "shb") + "1" * (":" in old))
    assert edited != text
    path.chmod(0o644)
    path.write_text(edited)
    with pytest.raises(IntegrityError, match=rf"delete .*{key}"):
        load_newest(store, RUN)


def test_a_lost_file_is_told_with_the_way_on(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    key = save(store, RUN, a_state())
    next(p for p in (tmp_path / "blobs" / "sha256").iterdir()).unlink()
    with pytest.raises(IntegrityError, match=rf"does not exist.*delete .*{key}"):
        load_newest(store, RUN)


def test_optimiser_state_goes_on_bit_equal() -> None:
    def parameters() -> list[torch.nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return [torch.nn.Parameter(torch.randn(4, generator=generator)) for _ in range(2)]

    def steps(optimiser: torch.optim.Optimizer, ps: list[torch.nn.Parameter], n: int) -> None:
        for _ in range(n):
            for p in ps:
                p.grad = p.detach() ** 2
            optimiser.step()

    straight = parameters()
    steps(torch.optim.AdamW(straight, lr=0.1, fused=True), straight, 6)

    broken = parameters()
    first = torch.optim.AdamW(broken, lr=0.1, fused=True)
    steps(first, broken, 3)
    names = {p: f"p{i}" for i, p in enumerate(broken)}
    saved = checkpoint.tensors_from_bytes(
        checkpoint.tensors_to_bytes(checkpoint.optimiser_to_tensors(first, names))
    )
    second = torch.optim.AdamW(broken, lr=0.1, fused=True)
    checkpoint.tensors_to_optimiser(saved, second, names)
    steps(second, broken, 3)
    assert all(torch.equal(a, b) for a, b in zip(straight, broken, strict=True))


def test_optimiser_state_of_another_network_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.AdamW([parameter])
    with pytest.raises(IntegrityError, match="do not match at"):
        checkpoint.tensors_to_optimiser(
            {"exp_avg/other": torch.zeros(1)}, optimiser, {parameter: "p"}
        )


# -- snapshots ----------------------------------------------------------------------------------

KEPT = {0.05: a_state(1).ema, 0.1: a_state(2).ema}


def test_snapshots_come_back_and_the_first_of_a_position_stands(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    key = checkpoint.save_snapshot(store, RUN, 128, KEPT)
    assert key == f"train/{RUN}/snapshots/000000000128.json"
    again = {sigma: a_state(7).ema for sigma in KEPT}
    assert checkpoint.save_snapshot(store, RUN, 128, again) == key
    commit = checkpoint.read_snapshot(store, RUN, 128)
    assert [track.sigma_rel for track in commit.tracks] == [0.05, 0.1]
    for track in commit.tracks:
        found = checkpoint.tensors_from_bytes(store.get(track.tensors))
        assert all(torch.equal(found[name], a) for name, a in KEPT[track.sigma_rel].items())
    assert newest(store, RUN) is None


@pytest.mark.parametrize("harm", ["flip", "lose", "edit", "move", "never"])
def test_snapshots_that_cannot_be_used_are_told_with_the_way_on(tmp_path: Path, harm: str) -> None:
    store = LocalStore(tmp_path)
    key = checkpoint.save_snapshot(store, RUN, 128, KEPT)
    commit = store.root / key
    (blob,) = (
        store.root / track.tensors.key
        for track in checkpoint.read_snapshot(store, RUN, 128).tracks
        if track.sigma_rel == 0.1
    )
    data = blob.read_bytes()
    for path in (blob, commit):
        path.chmod(0o644)
    if harm == "flip":
        blob.write_bytes(data[:-1] + bytes([data[-1] ^ 4]))
    elif harm == "lose":
        blob.unlink()
    elif harm == "edit":
        commit.write_text(commit.read_text().replace("0.05", "0.06"))
    elif harm == "never":
        commit.unlink()
    else:
        commit.rename(commit.with_name("000000000192.json"))
    images = 192 if harm == "move" else 128
    with pytest.raises(IntegrityError, match=rf"snapshot .*/0*{images}\.json cannot .* from image"):
        checkpoint.read_snapshot(LocalStore(tmp_path), RUN, images)
