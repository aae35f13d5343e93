"""From a name, a file or a table to a :class:`flows.jobs.Plan`: all checked, services asked."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eqm import recipes
from eqm.config import PRESETS, PipelineConfig, pipeline_config
from eqm.errors import ConfigError, TrackingError
from eqm.records import to_json
from eqm.registry import check
from eqm.storage import Store, open_store
from flows.checks import check_config
from flows.clusters import Slurm
from flows.jobs import Plan
from flows.launch import Launcher, LocalLauncher
from flows.settings import Settings, current_settings

Changes = Mapping[str, Any] | None
"""Single settings by dotted name, as ``{"train.images": 1000}``."""


def read_config(config: str | Mapping[str, Any], changes: Changes = None) -> PipelineConfig:
    """A name of a preset or recipe, a TOML file or a table, with changes. Raises ConfigError.

    Only what comes of both is checked: a change may mend a file, and two may need each other. The
    policy may be the name of a file of its own, beside the config that names it.
    """
    table, rest = dict(_table(config)), dict(changes or {})
    folder = Path(config).parent if isinstance(config, str) else Path()
    file = None
    if isinstance(table.get("policy"), str):
        file = folder / table.pop("policy")
    if isinstance(rest.get("policy"), str):
        file = Path(rest.pop("policy"))
    if file is not None:
        # As a whole: floors of a preset that the file does not name are not meant.
        rest = {"policy": _toml(file, "policy"), **rest}
    return pipeline_config(table, rest)


def _table(config: str | Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(config, str):
        return config
    if config in PRESETS:
        return {"preset": config}
    known = recipes.recipes()
    if config in known:
        return {"preset": "defaults", **to_json(known[config].config)}
    path = Path(config)
    if path.suffix != ".toml":
        raise ConfigError(
            f"config {config!r} is neither a preset ({', '.join(PRESETS)}), nor one of `eqm "
            "recipes`, nor a .toml file"
        )
    return _toml(path, "config")


def _toml(path: Path, what: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{what} {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{what} {path} is not TOML: {error}") from error


def store_of(settings: Settings) -> Store:
    """The store of this environment. Raises ConfigError where it is an S3 that nobody named."""
    nobody = settings.s3_endpoint is None and settings.s3_access_key is None
    if settings.store.startswith("s3://") and nobody:
        raise ConfigError(
            f"store {settings.store}: no S3 is running or given; start it with `eqm up`, or set "
            "EQM_S3_ENDPOINT, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for AWS itself"
        )
    cache = settings.home / "cache"
    return open_store(settings.store, cache=cache, cache_bytes=settings.cache_bytes)


def make_plan(
    config: str | Mapping[str, Any], changes: Changes = None, *, tracked: bool = True
) -> Plan:
    """Read config and environment, and open the store.

    ``tracked``: MLflow will be needed. Raises ConfigError, StoreError, TrackingError.
    """
    checked = read_config(config, changes)
    settings = current_settings()
    check_config(checked, settings)
    store = store_of(settings)
    # Asks before anything is begun whether the store is there and lets us in.
    store.list("history/")
    plan = Plan(checked, settings, store, make_launcher(settings))
    if tracked:
        _ask_mlflow(plan)
    return plan


def _ask_mlflow(plan: Plan) -> None:
    """Refuse an MLflow that is away now, not after an hour of encoding: a person can mend it.

    A run that nobody watches goes on: training does without it, and what needs it waits.
    """
    from flows.prefect_tools import is_deployed, logged

    uri = plan.mlflow_uri
    try:
        check(uri)
    except TrackingError as error:
        if not is_deployed():
            raise
        logged(f"warning: {error}")


def make_launcher(settings: Settings) -> Launcher:
    """What runs stage programs in this environment."""
    cluster, environment = settings.cluster, settings.child_environment()
    if cluster is None:
        return LocalLauncher(folder=settings.home / "jobs", environment=environment)
    from flows.launch_kubernetes import KubernetesLauncher
    from flows.launch_slurm import SlurmLauncher
    from flows.prefect_tools import is_moved, logged

    if isinstance(cluster, Slurm):
        return SlurmLauncher(cluster, environment=environment, say=logged, leaves=is_moved)
    return KubernetesLauncher(cluster, environment=environment, say=logged, leaves=is_moved)
