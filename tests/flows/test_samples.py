"""``eqm samples``: a sample again from the seal of its set, and the set as a file of the field."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import chain
import numpy as np
import pytest
import torch
from PIL import Image

from eqm import samples
from flows import cli

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> chain.Chain:
    return chain.build(tmp_path_factory.getbasetemp() / "chain", until="samples")


@pytest.fixture
def eqm_(
    tiny: chain.Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> Iterator[Run]:
    """The command, in a folder of its own; EQM_STORE is that of the chain."""
    before = dict(os.environ)
    monkeypatch.chdir(tmp_path)
    os.environ |= {"EQM_HOME": str(tmp_path / "home"), "EQM_STORE": tiny.store.uri}
    monkeypatch.setattr("flows.samples.out", cli.Console(width=300))

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["eqm", "samples", *words])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.run()
        told = capfd.readouterr()
        assert "Traceback" not in told.out + told.err
        return int(ended.value.code or 0), told.out + told.err

    yield run
    os.environ.clear()
    os.environ.update(before)


def test_a_sample_is_made_again_by_one_command(eqm_: Run, tiny: chain.Chain) -> None:
    words = ("--seed", "17", "--scale", "3")
    status, told = eqm_("remake", tiny.uri("samples"), *words, "--to", "one.png", "--exact")
    assert status == 0, told
    assert "one.png: seed 17, class 7, 5 field evaluations" in told
    assert "equal to the kept image and all that is sealed of it, to the last bit" in told
    image = np.asarray(Image.open("one.png").convert("L"))
    sealed = samples.kept(tiny.store, tiny["samples"], [17])["images"][0, 0].numpy()
    assert np.array_equal(image, sealed.repeat(3, 0).repeat(3, 1))
    # By digits of its digest; in a batch of one, where only rounding may differ.
    status, told = eqm_("remake", tiny["samples"].digest[:8], "--seed", "17")
    assert status == 0, told
    status, told = eqm_("remake", tiny.uri("samples"), "--seed", "44")
    assert (status, "features" in told) == (0, True), told
    status, told = eqm_("remake", tiny.uri("samples"), "--seed", "99")
    assert (status, "not one of the sealed samples" in told) == (0, True), told


def test_a_sample_that_is_another_one_now_is_told(
    eqm_: Run, tiny: chain.Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    sealed = samples.kept(tiny.store, tiny["samples"], [17])
    sealed["images"] = 255 - sealed["images"]
    monkeypatch.setattr(samples, "kept", lambda *_: sealed)
    status, told = eqm_("remake", tiny.uri("samples"), "--seed", "17")
    assert (status, "another sample than the sealed one" in told) == (1, True), told


def test_the_kept_images_become_an_npz(eqm_: Run, tiny: chain.Chain) -> None:
    status, told = eqm_("export", tiny.uri("samples"), "--to", "all.npz", "--count", "40")
    assert (status, "all.npz: 40 images" in told) == (0, True), told
    with np.load("all.npz", allow_pickle=False) as archive:
        first = torch.from_numpy(archive["arr_0"][0])
    sealed = samples.kept(tiny.store, tiny["samples"], [0])["images"][0]
    assert torch.equal(first.permute(2, 0, 1), sealed.expand(3, -1, -1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("export", "SAMPLES"), "set generate.keep_images to 50"),
        (("export", "TRAIN"), "is no address of samples"),
        (("export", "nothing"), "is not sealed in"),
        (("export", "samples/abc"), "is no address of samples"),
        (("remake", "SAMPLES", "--seed", "50", "--exact"), "seed 50 is not among the samples"),
        (("remake", "SAMPLES", "--seed", "1", "--to", "no/where.png"), "--to is"),
        (("export", "SAMPLES", "--to", "no/where.npz"), "--to is no/where.npz"),
    ],
)
def test_mistakes_are_one_message(
    eqm_: Run, tiny: chain.Chain, words: tuple[str, ...], message: str
) -> None:
    known = {"SAMPLES": tiny.uri("samples"), "TRAIN": tiny.uri("train")}
    status, told = eqm_(*(known.get(word, word) for word in words))
    assert (status, told.count("error: ")) == (2, 1), told
    assert message in told
    assert not any(path.suffix in (".png", ".npz") for path in Path().iterdir())
