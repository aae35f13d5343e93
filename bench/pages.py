"""Pictures of the pages that a run leaves: report, MLflow, Prefect. ``make pages``.

Opens every page of a running installation in headless Chromium, waits until it shows what it
should (a password form, an error or an empty table is a failure), and writes docs/pages/*.png.
Needs `eqm up`, a pipeline that has run, and Chromium (`eqm doctor` says whether it is there).
"""

import argparse
import base64
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from eqm import champion
from eqm.errors import DataError, EqmError
from eqm.registry import Registry
from eqm.storage import Store
from flows.doctor import CHROMIUM
from flows.plan import store_of
from flows.settings import Settings, activate
from infra.stack import ServiceError

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "pages"
WIDTH_PX, HEIGHT_PX = 1280, 860
LARGEST_BYTES = 200_000
PAGE_SECONDS = 120.0
STILL_SECONDS = 2.0
"""A page is taken when its text has not changed for so long."""
BAD = ("something went wrong", "unauthorized", "failed to fetch", "enter your password", "404")
"""What no page may say."""


@dataclass(frozen=True)
class Page:
    """One page, and what it must show before its picture is taken."""

    name: str
    url: str
    wanted: tuple[str, ...]
    height_px: int = HEIGHT_PX


def main(argv: list[str]) -> int:
    """Take all pictures; 1 and the reason where a page does not show what it should."""
    parser = argparse.ArgumentParser(prog="python -m bench.pages", description=__doc__)
    parser.add_argument("config", nargs="?", default="demo", help="name of the run: eqm-NAME")
    parser.add_argument("--to", type=Path, default=FOLDER, help="folder of the pictures")
    asked = parser.parse_args(argv)
    try:
        settings = activate()
        with tempfile.TemporaryDirectory() as scratch, browser() as tab:
            tab.sign_in(settings)
            for page in pages(settings, f"eqm-{asked.config}", Path(scratch)):
                size = save(tab.picture(page), asked.to / f"{page.name}.png")
                sys.stdout.write(f"{page.name}: {size:,} bytes\n")
    except EqmError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    return 0


# -- which pages --------------------------------------------------------------------------------


def pages(settings: Settings, model: str, scratch: Path) -> Iterator[Page]:
    """Pages of the champion of a model, its run, and the deployments around it."""
    store = store_of(settings)
    entry = champion.current(store, model)
    if entry is None:
        raise DataError(f"{model} has no champion: run `eqm pipeline` first")
    yield _report(store, entry.report, model, scratch)
    mlflow = str(settings.mlflow_uri)
    version = Registry(mlflow).by_number(model, entry.version)
    run = _run_of(mlflow, model, entry.version)
    yield Page("mlflow-run", run, ("loss", "gradient_norm"))
    address = f"{mlflow}/#/models/{model}/versions/{version.number}"
    yield Page("mlflow-version", address, ("champion", "eqm.evaluation"))
    yield from _prefect_pages(settings)


def _report(store: Store, key: str, model: str, scratch: Path) -> Page:
    file = scratch / "report.html"
    file.write_bytes(store.read(key))
    return Page("report", file.as_uri(), (model.removeprefix("eqm-"),), height_px=2 * HEIGHT_PX)


def _run_of(mlflow: str, model: str, version: int) -> str:
    asked = {"name": model, "version": str(version)}
    told = httpx.get(f"{mlflow}/api/2.0/mlflow/model-versions/get", params=asked).json()
    run = told["model_version"]["run_id"]
    found = httpx.get(f"{mlflow}/api/2.0/mlflow/runs/get", params={"run_id": run}).json()
    experiment = found["run"]["info"]["experiment_id"]
    return f"{mlflow}/#/experiments/{experiment}/runs/{run}"


def _prefect_pages(settings: Settings) -> Iterator[Page]:
    site = str(settings.prefect_ui)
    yield Page("prefect-runs", f"{site}/runs", ("pipeline",))
    asked = {
        "flows": {"name": {"any_": ["pipeline"]}},
        "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}},
        "sort": "END_TIME_DESC",
        "limit": 1,
    }
    answer = httpx.post(
        f"{settings.prefect_api_url}/flow_runs/filter", json=asked, auth=_pair(settings)
    )
    found = answer.raise_for_status().json()
    if not found:
        raise DataError("no run of `pipeline` has completed in this Prefect: run `eqm pipeline`")
    (run,) = found
    yield Page("prefect-run", f"{site}/runs/flow-run/{run['id']}", (run["name"], "Completed"))
    yield Page("prefect-deployments", f"{site}/deployments", ("reevaluate-champion", "pipeline"))
    yield Page("prefect-artifacts", f"{site}/artifacts", ("mlflow",))


def _pair(settings: Settings) -> tuple[str, str]:
    user, _, password = settings.environ["PREFECT_API_AUTH_STRING"].partition(":")
    return user, password


# -- the browser --------------------------------------------------------------------------------


class Tab:
    """One tab, spoken to by the DevTools protocol."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection, self._number = connection, 0
        self.ask("Page.enable")

    def ask(self, method: str, **words: Any) -> dict[str, Any]:
        """Send a command and wait for its answer. Raises ServiceError."""
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": words}))
        while True:
            told = json.loads(self._connection.recv(timeout=PAGE_SECONDS))
            if told.get("id") == self._number:
                if "error" in told:
                    raise ServiceError(f"Chromium refuses {method}: {told['error']['message']}")
                return told["result"]

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
        size = {"width": WIDTH_PX, "height": page.height_px, "deviceScaleFactor": 1}
        self.ask("Emulation.setDeviceMetricsOverride", **size, mobile=False)
        self.ask("Page.navigate", url=page.url)
        self._wait(page)
        # MLflow's assistant covers a quarter of its pages.
        close = "[data-component-id='mlflow.assistant.chat_panel.close']"
        self.ask("Runtime.evaluate", expression=f'document.querySelector("{close}")?.click()')
        self._wait(page)
        return base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"])

    def _wait(self, page: Page) -> None:
        deadline, last, since = time.monotonic() + PAGE_SECONDS, "", time.monotonic()
        while True:
            text = self._text()
            if text != last:
                last, since = text, time.monotonic()
            bad = [word for word in BAD if word in text.lower()]
            missing = [word for word in page.wanted if word.lower() not in text.lower()]
            still = time.monotonic() - since > STILL_SECONDS
            if still and not bad and not missing:
                return
            if time.monotonic() > deadline:
                raise ServiceError(
                    f"{page.name} at {page.url} shows {bad or 'nothing bad'} and lacks {missing}; "
                    f"it says: {text[:300]!r}"
                )
            time.sleep(0.2)

    def _text(self) -> str:
        asked = {"expression": "document.body ? document.body.innerText : ''"}
        return str(self.ask("Runtime.evaluate", **asked)["result"].get("value", ""))


@contextmanager
def browser() -> Iterator[Tab]:
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
        process = subprocess.Popen(command, **quiet)
        try:
            yield Tab(_connect(Path(profile), process))
        finally:
            process.terminate()
            process.wait()


def _connect(profile: Path, process: subprocess.Popen[bytes]) -> ClientConnection:
    port_file, deadline = profile / "DevToolsActivePort", time.monotonic() + PAGE_SECONDS
    while not (port_file.is_file() and port_file.read_text().strip()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise ServiceError("Chromium does not start: run it by hand with --headless=new")
        time.sleep(0.1)
    port = port_file.read_text().split()[0]
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{port}/json/list", timeout=PAGE_SECONDS) as answer:
        targets = json.load(answer)
    address = next(one["webSocketDebuggerUrl"] for one in targets if one["type"] == "page")
    return connect(address, max_size=None, proxy=None)


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
