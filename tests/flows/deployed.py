"""Deployments of the embedded Prefect, run from tests, and pictures for them."""

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from infra.deployments import PrefectApi


def start_deployment(api: PrefectApi, name: str, parameters: dict[str, Any]) -> str:
    """Create a run; its id."""
    found = api._post("/deployments/filter", {"limit": 200})
    which = next(one["id"] for one in found if one["name"] == name)
    return api._post(f"/deployments/{which}/create_flow_run", {"parameters": parameters})["id"]


def ended(api: PrefectApi, run: str, *, seconds: float = 180) -> dict[str, Any]:
    """How a run ended, once it has."""
    deadline = time.monotonic() + seconds
    while True:
        (shown,) = api._post("/flow_runs/filter", {"flow_runs": {"id": {"any_": [run]}}})
        if shown["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED"):
            return shown["state"]
        assert time.monotonic() < deadline, shown["state"]
        time.sleep(0.5)


def pictures(folder: Path, seed: int = 0) -> None:
    """Two classes of twelve PNGs."""
    random = np.random.default_rng(seed)
    for name in ("circles", "squares"):
        (folder / name).mkdir(parents=True)
        for number in range(12):
            pixels = random.integers(0, 256, size=(10, 12, 3), dtype=np.uint8)
            data = io.BytesIO()
            Image.fromarray(pixels).save(data, "PNG")
            (folder / name / f"{number:02d}.png").write_bytes(data.getvalue())
