"""Pictures of pages: small, of the right shape, and whoever does not answer is named.

The browser is one that answers as Chromium does, or does not.
"""

import base64
import io
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.server import ServerConnection, serve

from bench import pages
from infra.stack import ServiceError

PAGE = pages.Page("report", "http://127.0.0.1/report", ("digits",))
Answers = Callable[[str, dict[str, Any]], dict[str, Any] | None]


def test_a_picture_is_made_small_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A smaller one under a smaller limit, which is quicker.
    monkeypatch.setattr(pages, "LARGEST_BYTES", 12_500)
    noise = np.random.default_rng(0).integers(0, 256, size=(225, 320, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(noise).save(data, "PNG")
    size = pages.save(data.getvalue(), tmp_path / "new" / "noise.png")
    assert size == (tmp_path / "new" / "noise.png").stat().st_size <= pages.LARGEST_BYTES
    with Image.open(tmp_path / "new" / "noise.png") as picture:
        assert abs(picture.size[0] / picture.size[1] - 320 / 225) < 0.02


def test_a_page_of_few_colours_keeps_its_size(tmp_path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (1280, 860), "white").save(data, "PNG")
    assert pages.save(data.getvalue(), tmp_path / "x.png") < 5000
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (1280, 860)


# -- the browser --------------------------------------------------------------------------------


@contextmanager
def tab(answers: Answers, lines: list[str] | None = None, **limits: float) -> Iterator[pages.Tab]:
    """A tab of a browser whose answers are those of a function; None: it says something else."""

    def speak(connection: ServerConnection) -> None:
        for text in connection:
            asked = json.loads(text)
            told = answers(asked["method"], asked["params"])
            if told is not None:
                connection.send(json.dumps({"id": asked["id"], **told}))
            while told is None:
                try:
                    connection.send(json.dumps({"method": "Network.dataReceived"}))
                    connection.recv(timeout=0.02)
                except TimeoutError:
                    continue
                except ConnectionClosed:
                    return

    with serve(speak, "127.0.0.1", 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.socket.getsockname()[1]
        with connect(f"ws://127.0.0.1:{port}", proxy=None) as connection:
            say = (lines if lines is not None else []).append
            yield pages.Tab(connection, say=say, **limits)
        server.shutdown()


def shows(text: str, *, but: str = "") -> Answers:
    """A browser whose page says a text, and which does not answer one command."""

    def answers(method: str, words: dict[str, Any]) -> dict[str, Any] | None:
        if method == but:
            return None
        if method == "Page.captureScreenshot":
            return {"result": {"data": base64.b64encode(json.dumps(words).encode()).decode()}}
        value: Any = text
        if words.get("expression") == pages.SECTIONS:
            value = [["Decision", 100.0, 400.0], ["Samples", 440.0, 900.0]]
        return {"result": {"result": {"value": value}}}

    return answers


def test_a_number_is_no_fault_of_a_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "STILL_SECONDS", 0.1)
    with tab(shows("digits: FD 1.4043, 404 images")) as one:
        assert json.loads(one.picture(PAGE)) == {"format": "png"}


def test_the_picture_ends_with_a_section(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "STILL_SECONDS", 0.1)
    page = pages.Page("report", "http://127.0.0.1/", ("digits",), sections=("Samples", "Samples"))
    with tab(shows("digits")) as one:
        clip = json.loads(one.picture(page))["clip"]
    assert (clip["y"], clip["height"]) == (440 - pages.MARGIN_PX, 460 + 2 * pages.MARGIN_PX)
    gone = pages.Page("report", "http://127.0.0.1/", ("digits",), sections=("", "Lineage"))
    told = re.escape("report at http://127.0.0.1/ has no section ['Lineage']: ['Decision', 'Sam")
    with tab(shows("digits")) as one, pytest.raises(ServiceError, match=told):
        one.picture(gone)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Please wait", "'digits' is not there yet. It says: 'Please wait'"),
        ("digits: Something went wrong", "it says 'something went wrong'. It says: 'digits"),
    ],
)
def test_a_page_that_does_not_come_is_named(
    monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    monkeypatch.setattr(pages, "TELL_SECONDS", 0.3)
    lines: list[str] = []
    with (
        tab(shows(text), lines, page_seconds=0.6) as one,
        pytest.raises(
            ServiceError, match=re.escape(f"http://127.0.0.1/report, after 1 s: {reason}")
        ),
    ):
        one.picture(PAGE)
    # While it lasts, one sees what is waited for.
    assert lines[0] == "report: opening http://127.0.0.1/report"
    assert lines[1].startswith("report: waited for 0 s: ")


def test_a_browser_that_only_tells_of_other_things_does_not_answer() -> None:
    silent = shows("digits", but="Page.navigate")
    told = "Chromium does not answer Page.navigate on http://127.0.0.1/report within 0 s"
    with tab(silent, answer_seconds=0.3) as one, pytest.raises(ServiceError, match=re.escape(told)):
        one.picture(PAGE)


def test_a_browser_that_dies_is_named() -> None:
    def answers(method: str, words: dict[str, Any]) -> dict[str, Any] | None:
        if method == "Page.navigate":
            raise RuntimeError
        return {"result": {}}

    told = "Chromium ended at Page.navigate on http://127.0.0.1/report"
    with tab(answers) as one, pytest.raises(ServiceError, match=re.escape(told)):
        one.picture(PAGE)


def test_a_service_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any, **__: Any) -> httpx.Response:
        raise httpx.ReadTimeout("")

    monkeypatch.setattr(httpx, "request", silent)
    told = "MLflow does not answer GET http://127.0.0.1:1/x (ReadTimeout): is it up?"
    with pytest.raises(ServiceError, match=re.escape(told)):
        pages._answer("MLflow", "GET", "http://127.0.0.1:1/x")


def test_the_name_of_a_config_is_the_one_of_all_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The preset `demo` makes the model `eqm-digits`."""
    monkeypatch.setenv("EQM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("EQM_STORE", str(tmp_path / "store"))
    assert pages.main(["demo"]) == 1
    assert capsys.readouterr().err == (
        "error: eqm-digits has no champion: run `eqm pipeline` first\n"
    )
