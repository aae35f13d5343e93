"""Pictures of the pages that a run leaves: report, MLflow, Prefect. ``make pages``.

Opens every page of a running installation in headless Chromium, waits until it shows what it
should (a password form, an error or an empty table is a failure), and writes docs/pages/*.png.
Needs `eqm up`, a pipeline that has run, and Chromium (`eqm doctor` says whether it is there).
Every page says when it is opened, and what is still waited for; whoever does not answer is named.
"""

import argparse
import base64
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from eqm import champion
from eqm.errors import DataError, EqmError
from eqm.registry import AMONG_TRAININGS, Registry
from eqm.storage import Store
from flows.doctor import CHROMIUM
from flows.plan import make_plan
from flows.settings import Settings, activate
from infra.stack import ServiceError

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pages"
WIDTH_PX, HEIGHT_PX = 1280, 860
LARGEST_BYTES = 200_000
PAGE_SECONDS = 120.0
"""Until a page must show what it should."""
ANSWER_SECONDS = 30.0
"""Until Chromium, MLflow or Prefect must answer one question."""
TELL_SECONDS = 10.0
"""Between two lines about what is waited for."""
STILL_SECONDS = 2.0
"""A page is taken when its text has not changed for so long."""
BAD = ("something went wrong", "unauthorized", "failed to fetch", "enter your password")
"""What no page may say. No number: a page that is not found lacks what is wanted, and any number
may stand in a table."""
MARGIN_PX = 24
SECTIONS = """[...document.querySelectorAll('section')].map(one => {
  const edges = one.getBoundingClientRect();
  return [one.querySelector('h2').innerText, edges.top + scrollY, edges.bottom + scrollY];
})"""
REPORT = {
    "report": ("", "Samples"),
    "report-descent": ("Descent", "Metrics"),
    "report-outside": ("Out of distribution", "Out of distribution"),
    "report-lineage": ("Training", "Lineage"),
}
"""Pictures of a report, and the sections on each; "" is the top."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class Page:
    """One page, and what it must show before its picture is taken."""

    name: str
    url: str
    wanted: tuple[str, ...]
    width_px: int = WIDTH_PX
    height_px: int = HEIGHT_PX
    sections: tuple[str, str] | None = None
    """Headings of the first and last section that the picture shows, whole; None: the window."""


def main(argv: list[str]) -> int:
    """Take all pictures; 1 and the reason where a page does not show what it should."""
    parser = argparse.ArgumentParser(prog="python -m bench.pages", description=__doc__)
    parser.add_argument("config", nargs="?", default="demo", help="preset or .toml that was run")
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder of the pictures")
    asked = parser.parse_args(argv)
    try:
        settings = activate()
        plan = make_plan(asked.config, tracked=False)
        with tempfile.TemporaryDirectory() as scratch:
            found = list(pages(settings, plan.store, plan.model_name, Path(scratch)))
            with browser(say=_say) as tab:
                tab.sign_in(settings)
                for page in found:
                    size = save(tab.picture(page), asked.to / f"{page.name}.png")
                    _say(f"{page.name}: {size:,} bytes")
    except EqmError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    # At once, also into a pipe: whoever waits sees what for.
    sys.stdout.flush()


# -- which pages --------------------------------------------------------------------------------


def pages(settings: Settings, store: Store, model: str, scratch: Path) -> Iterator[Page]:
    """Pages of the champion of a model, its run, and the deployments around it.

    Raises DataError where nothing has run yet, ServiceError where a service does not answer.
    """
    entry = champion.current(store, model)
    if entry is None:
        raise DataError(f"{model} has no champion: run `eqm pipeline` first")
    yield from _report(store, entry.report, model, scratch)
    mlflow = str(settings.mlflow_uri)
    version = Registry(mlflow).by_number(model, entry.version)
    run = _run_of(mlflow, model, entry.version)
    yield Page("mlflow-run", run, ("loss", "gradient_norm"))
    address = f"{mlflow}/#/models/{model}/versions/{version.number}?{AMONG_TRAININGS}"
    yield Page("mlflow-version", address, ("champion", "eqm.evaluation"))
    yield from _prefect_pages(settings)


def _report(store: Store, key: str, model: str, scratch: Path) -> Iterator[Page]:
    file = scratch / "report.html"
    file.write_bytes(store.read(key))
    wanted = (model.removeprefix("eqm-"),)
    for name, sections in REPORT.items():
        yield Page(name, file.as_uri(), wanted, sections=sections)


def _run_of(mlflow: str, model: str, version: int) -> str:
    asked = {"name": model, "version": str(version)}
    told = _answer("MLflow", "GET", f"{mlflow}/api/2.0/mlflow/model-versions/get", params=asked)
    run = told["model_version"]["run_id"]
    of_run = {"run_id": run}
    found = _answer("MLflow", "GET", f"{mlflow}/api/2.0/mlflow/runs/get", params=of_run)
    experiment = found["run"]["info"]["experiment_id"]
    return f"{mlflow}/#/experiments/{experiment}/runs/{run}?{AMONG_TRAININGS}"


def _prefect_pages(settings: Settings) -> Iterator[Page]:
    site = str(settings.prefect_ui)
    yield Page("prefect-runs", f"{site}/runs", ("pipeline",))
    asked = {
        "flows": {"name": {"any_": ["pipeline"]}},
        "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
        "sort": "END_TIME_DESC",
        "limit": 1,
    }
    address = f"{settings.prefect_api_url}/flow_runs/filter"
    found = _answer("Prefect", "POST", address, json=asked, auth=_pair(settings))
    if not found:
        raise DataError("no run of `pipeline` has completed in this Prefect: run `eqm pipeline`")
    (run,) = found
    yield Page("prefect-run", f"{site}/runs/flow-run/{run['id']}", (run["name"], "Completed"))
    # Narrower, it does not say when a schedule fires.
    wanted = ("reevaluate-champion", "pipeline", "every day")
    yield Page("prefect-deployments", f"{site}/deployments", wanted, width_px=1680)
    yield Page("prefect-artifacts", f"{site}/artifacts", ("mlflow",), height_px=520)


def _answer(service: str, method: str, address: str, **more: Any) -> Any:
    """JSON that a service answers. Raises ServiceError with its name."""
    try:
        return (
            httpx.request(method, address, timeout=ANSWER_SECONDS, **more).raise_for_status().json()
        )
    except httpx.HTTPError as error:
        why = str(error) or type(error).__name__
        raise ServiceError(
            f"{service} does not answer {method} {address} ({why}): is it up? `eqm status` says so"
        ) from error


def _pair(settings: Settings) -> tuple[str, str]:
    user, _, password = settings.environ["PREFECT_API_AUTH_STRING"].partition(":")
    return user, password


# -- the browser --------------------------------------------------------------------------------


class Tab:
    """One tab, spoken to by the DevTools protocol."""

    def __init__(
        self,
        connection: ClientConnection,
        *,
        say: Say,
        page_seconds: float = PAGE_SECONDS,
        answer_seconds: float = ANSWER_SECONDS,
    ) -> None:
        self._connection, self._number, self._say = connection, 0, say
        self._page_seconds, self._answer_seconds = page_seconds, answer_seconds
        self._at = "about:blank"
        self.ask("Page.enable")

    def ask(self, method: str, **words: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises ServiceError."""
        self._number += 1
        # Of all that comes meanwhile: events alone would never let a wait for one message end.
        deadline = time.monotonic() + self._answer_seconds
        command = {"id": self._number, "method": method, "params": words}
        try:
            self._connection.send(json.dumps(command))
            while (left := deadline - time.monotonic()) > 0:
                told = json.loads(self._connection.recv(timeout=left))
                if told.get("id") == self._number:
                    if "error" in told:
                        raise ServiceError(f"Chromium refuses {method}: {told['error']['message']}")
                    return told["result"]
        except TimeoutError:
            pass
        except ConnectionClosed as error:
            raise ServiceError(
                f"Chromium ended at {method} on {self._at}: is there memory left? (`free -h`)"
            ) from error
        raise ServiceError(
            f"Chromium does not answer {method} on {self._at} within {self._answer_seconds:.0f} s: "
            "the page keeps it busy, or the machine is"
        )

    def sign_in(self, settings: Settings) -> None:
        """Give Prefect's pages their password, where they look for it."""
        pair = base64.b64encode(":".join(_pair(settings)).encode()).decode()
        script = (
            f"if (location.origin === {json.dumps(settings.prefect_ui)}) "
            f"localStorage.setItem('prefect-password', {json.dumps(pair)})"
        )
        self.ask("Page.addScriptToEvaluateOnNewDocument", source=script)

    def picture(self, page: Page) -> bytes:
        """PNG of a page once it shows what it should. Raises ServiceError."""
        self._say(f"{page.name}: opening {page.url}")
        size = {"width": page.width_px, "height": page.height_px, "deviceScaleFactor": 1}
        self.ask("Emulation.setDeviceMetricsOverride", **size, mobile=False)
        self._at = page.url
        self.ask("Page.navigate", url=page.url)
        self._wait(page)
        # MLflow's assistant covers a quarter of its pages.
        close = "[data-component-id='mlflow.assistant.chat_panel.close']"
        self.ask("Runtime.evaluate", expression=f'document.querySelector("{close}")?.click()')
        self._wait(page)
        part = self._clip(page) if page.sections else {}
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png", **part)["data"])

    def _clip(self, page: Page) -> dict[str, Any]:
        """Where the sections of a page lie, from the top of the first to the end of the last."""
        told = self.ask("Runtime.evaluate", expression=SECTIONS, returnByValue=True)
        edges = {name: (top, bottom) for name, top, bottom in told["result"]["value"]}
        first, last = page.sections or ("", "")
        lacking = [name for name in (first, last) if name and name not in edges]
        if lacking:
            raise ServiceError(f"{page.name} at {page.url} has no section {lacking}: {[*edges]}")
        top = max(0, edges[first][0] - MARGIN_PX) if first else 0
        height = edges[last][1] + MARGIN_PX - top
        area = {"x": 0, "y": top, "width": page.width_px, "height": height, "scale": 1}
        return {"clip": area, "captureBeyondViewport": True}

    def _wait(self, page: Page) -> None:
        began = told = since = time.monotonic()
        last = ""
        while True:
            text = self._text()
            now = time.monotonic()
            if text != last:
                last, since = text, now
            faults = _faults(page, text)
            if not faults and now - since > STILL_SECONDS:
                return
            waited = "; ".join(faults) or "its text still changes"
            if now - began > self._page_seconds:
                raise ServiceError(
                    f"{page.name} at {page.url}, after {now - began:.0f} s: {waited}. It says: "
                    f"{text[:300]!r}"
                )
            if now - told > TELL_SECONDS:
                told = now
                self._say(f"{page.name}: waited for {now - began:.0f} s: {waited}")
            time.sleep(0.2)

    def _text(self) -> str:
        asked = {"expression": "document.body ? document.body.innerText : ''"}
        return str(self.ask("Runtime.evaluate", **asked)["result"].get("value", ""))


def _faults(page: Page, text: str) -> list[str]:
    """What a page says and should not, and what it does not say and should."""
    low = text.lower()
    bad = [f"it says {word!r}" for word in BAD if word in low]
    return bad + [f"{word!r} is not there yet" for word in page.wanted if word.lower() not in low]


@contextmanager
def browser(*, say: Say) -> Iterator[Tab]:
    """A tab of a Chromium with a profile of its own, which is gone afterwards."""
    program = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if program is None:
        raise ServiceError(f"there is no {CHROMIUM[0]} here: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            program,
            "--headless=new",
            "--remote-debugging-port=0",
            f"--user-data-dir={profile}",
            *("--disable-gpu", "--no-first-run", "--hide-scrollbars", "--disable-sync"),
            *("--disable-background-networking", "--disable-component-update"),
            # Chromium's sandbox does not run as root.
            *(["--no-sandbox"] if os.geteuid() == 0 else []),
        ]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        say(f"{program}: starting")
        process = subprocess.Popen(command, **quiet, start_new_session=True)
        try:
            yield Tab(_connect(Path(profile), process), say=say)
        finally:
            # Its children with it: they are in its group, and may outlive it.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _connect(profile: Path, process: subprocess.Popen[bytes]) -> ClientConnection:
    port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + ANSWER_SECONDS
    while not (port_file.is_file() and port_file.read_text().strip()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServiceError("Chromium does not start: run it by hand with --headless=new")
        time.sleep(0.1)
    port = port_file.read_text().split()[0]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    new = urllib.request.Request(f"http://127.0.0.1:{port}/json/new", method="PUT")
    try:
        with opener.open(new, timeout=ANSWER_SECONDS) as answer:
            address = json.load(answer)["webSocketDebuggerUrl"]
        return connect(address, max_size=None, proxy=None, open_timeout=ANSWER_SECONDS)
    except OSError as error:
        raise ServiceError(
            f"Chromium is there and opens no tab on port {port} ({error}): run it by hand with "
            "--headless=new"
        ) from error


# -- pictures -----------------------------------------------------------------------------------


def save(png: bytes, path: Path) -> int:
    """Write a picture in 256 colours, scaled down until it is small enough; its bytes."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        small = io.BytesIO()
        reduced = picture.quantize(256, dither=Image.Dither.NONE)
        reduced.save(small, "PNG", optimize=True)
        if small.tell() <= LARGEST_BYTES:
            path.write_bytes(small.getvalue())
            return small.tell()
        width, height = (round(0.9 * side) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
