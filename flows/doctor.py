"""What this machine has, what it lacks, and how to get it. Called by ``eqm doctor``."""

import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata

from eqm.cores import cores
from eqm.errors import EqmError

LEAST_DISK_BYTES = 5 * 2**30
PINNED = {
    "torch": "2.13.0",
    "prefect": "3.8.8",
    "mlflow": "3.17.2",
    "diffusers": "0.42.1",
    "webdataset": "1.0.2",
    "torch-fidelity": "0.4.0",
}
"""Versions that are known to work together; the rest is in requirements.lock."""
CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
"""Programs that take pictures of pages."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    found: str
    remedy: str = ""
    needed: bool = True


def examine() -> Iterator[Finding]:
    """Look at everything, cheapest first."""
    yield python()
    yield from packages()
    yield disk()
    yield compiler()
    yield chromium()
    yield accelerator()
    yield from services()


def python() -> Finding:
    """The interpreter."""
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python", sys.version_info >= (3, 11), version, "install Python 3.11 or newer")


def packages() -> Iterator[Finding]:
    """Packages whose versions matter."""
    for name, wanted in PINNED.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            found = "missing"
        ok = found.partition("+")[0] == wanted
        yield Finding(name, ok, found, "" if ok else f"make setup (wants {wanted})")


def disk() -> Finding:
    """Space where the services keep their data."""
    from flows.settings import current_home

    home = current_home()
    there = next(folder for folder in (home, *home.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    text = f"{free / 2**30:.1f} GiB free at {there}"
    return Finding("disk", free >= LEAST_DISK_BYTES, text, "free some space", needed=False)


def compiler() -> Finding:
    """What kernels are compiled with where they run: of GPUs, and of a CPU."""
    found = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    return Finding(
        "C++ compiler",
        found is not None,
        found or "none",
        ""
        if found
        else "compute.compile and fused, and train.precision 'float16', need one: install g++",
        needed=False,
    )


def chromium() -> Finding:
    """What `make pages` opens the pages with."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    remedy = "" if found else "only pictures of pages (make pages) need it: install chromium"
    return Finding("Chromium", found is not None, found or "none", remedy, needed=False)


def accelerator() -> Finding:
    """GPU, or the cores there are instead."""
    import torch

    from eqm.compute import bfloat16_products, check_for_training, quickest_precision
    from eqm.config import ComputeConfig
    from eqm.distributed import why_unusable

    if torch.cuda.is_available():
        name, cuda = torch.cuda.get_device_name(), torch.device("cuda")
        try:
            check_for_training(ComputeConfig(compile=True, fused=True), cuda)
        except EqmError as error:
            return Finding("accelerator", False, name, str(error), needed=False)
        return Finding("accelerator", True, name, needed=False)
    if (why := why_unusable()) is not None:
        told = f"a GPU that torch cannot use: {why}"
        remedy = f"a driver for CUDA {torch.version.cuda} that nvidia-smi shows the GPU with"
        return Finding("accelerator", False, told, remedy, needed=False)
    quickest = quickest_precision(bfloat16_products())
    text = f"none; {cores()} cores, {torch.backends.cpu.get_cpu_capability()}"
    text += f"; train.precision '{quickest}' trains wide transformers quickest"
    return Finding("accelerator", False, text, "fine for the demo", needed=False)


def services() -> Iterator[Finding]:
    """Store, MLflow and Prefect, as this environment has them."""
    from eqm.registry import check, default_uri
    from flows.plan import store_of
    from flows.settings import activate, check_prefect

    try:
        settings = activate()
    except EqmError as error:
        yield Finding("services", False, str(error), "eqm up")
        return
    probes = {
        f"store {settings.store}": lambda: store_of(settings).list("history/"),
        "MLflow": lambda: check(settings.mlflow_uri or default_uri()),
        "Prefect": check_prefect,
    }
    for what, probe in probes.items():
        try:
            probe()
        except EqmError as error:
            yield Finding(what, False, str(error), "eqm up")
        else:
            yield Finding(what, True, "answers")
