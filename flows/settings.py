"""The environment, read in one place, as one frozen value. Nothing else here looks at it.

| variable              | what it is                                     | if it is not set |
|-----------------------|------------------------------------------------|------------------|
| EQM_HOME              | folder of services, caches and reports         | `.eqm` here      |
| EQM_STORE             | where records and blobs are: s3:// or a folder | s3://eqm/store   |
| EQM_S3_ENDPOINT       | S3 to use instead of the embedded one          | embedded         |
| EQM_CACHE_SIZE        | most of S3 that is kept on this machine: 200GB | no limit         |
| EQM_SOURCES           | where configs may read: s3://images/,/data/    | everywhere       |
| AWS_ACCESS_KEY_ID     | who we are to that S3                          | boto3's chain    |
| AWS_SECRET_ACCESS_KEY | and our secret                                 | boto3's chain    |
| AWS_DEFAULT_REGION    | and its region                                 | boto3's chain    |
| MLFLOW_TRACKING_URI   | MLflow to use instead of the embedded one      | embedded         |
| PREFECT_API_URL       | Prefect to use instead of the embedded one     | embedded         |
| EQM_ALARM_WEBHOOK     | where `eqm up` has alarms posted (a secret)    | nowhere          |
| EQM_ALARM_PRIVATE     | "allow": also to a host that is not public     | refused          |
| EQM_LAUNCHER          | where stages run: local, slurm or kubernetes   | local            |
| EQM_NODE_*, EQM_PROCESS_*, EQM_SLURM_*, EQM_KUBERNETES_*: flows/clusters.py has the table   |

An unknown EQM_* variable is refused: a misspelt one would be silently without effect. So is an
address of another machine without credentials: a server that lets everybody in belongs on loopback.
"""

import difflib
import ipaddress
import os
import pwd
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import SecretStr

from eqm.errors import ConfigError
from flows.clusters import VARIABLES, Cluster, read_cluster
from infra import local
from infra.deployments import PrefectApi
from infra.stack import BUCKET, SERVICES, External, ServiceError, Stack, child_environment

KNOWN = (
    *("EQM_HOME", "EQM_STORE", "EQM_S3_ENDPOINT", "EQM_CACHE_SIZE", "EQM_SOURCES"),
    *("EQM_ALARM_WEBHOOK", "EQM_ALARM_PRIVATE"),
    *VARIABLES,
)
LETS_IN = {
    "MLFLOW_TRACKING_URI": (
        ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"),
        ("MLFLOW_TRACKING_TOKEN",),
        ("MLFLOW_TRACKING_AUTH",),
        ("MLFLOW_TRACKING_CLIENT_CERT_PATH",),
    ),
    "PREFECT_API_URL": (("PREFECT_API_AUTH_STRING",), ("PREFECT_API_KEY",)),
}
"""Variables of which one group must be set for a server elsewhere. S3 always wants keys."""
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
DEFAULT_STORE = f"s3://{BUCKET}/store"

SERVICE_VARIABLES = (
    "EQM_HOME",
    "EQM_STORE",
    "EQM_S3_ENDPOINT",
    "EQM_CACHE_SIZE",
    "EQM_SOURCES",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL_S3",
    "MLFLOW_TRACKING_URI",
    "PREFECT_API_URL",
    "PREFECT_API_AUTH_STRING",
    "PREFECT_HOME",
    "NO_PROXY",
)
"""What a shell needs to use the services by hand."""


@dataclass(frozen=True)
class Settings:
    """Where everything is. None: not given and not running."""

    home: Path
    store: str
    cache_bytes: int | None = None
    sources: tuple[str, ...] = ()
    """Prefixes below which configs may name data; empty: everywhere."""
    s3_endpoint: str | None = None
    s3_access_key: SecretStr | None = None
    s3_secret_key: SecretStr | None = None
    s3_region: str | None = None
    mlflow_uri: str | None = None
    prefect_api_url: str | None = None
    cluster: Cluster | None = None
    """Where stage programs run; None: on this machine."""
    environ: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The environment that was read; children inherit it."""

    @property
    def prefect_ui(self) -> str | None:
        """Address of Prefect's pages."""
        return self.prefect_api_url.removesuffix("/api") if self.prefect_api_url else None

    def check_sources(self, config: Any) -> None:
        """Refuse a config (as JSON) that names data outside of EQM_SOURCES. Raises ConfigError."""
        allowed = (*self.sources, f"{self.store.rstrip('/')}/")
        for text in _addresses(config) if self.sources else ():
            # What is relative is so to the folder that this runs in.
            place = text if "://" in text else os.path.abspath(text)
            if not f"{place}/".startswith(allowed) or ".." in Path(text).parts:
                raise ConfigError(
                    f"{text} is outside of EQM_SOURCES ({', '.join(self.sources)}): whoever runs "
                    "this installation allows no other data"
                )

    def resolve(self, stack: Stack | None) -> "Settings":
        """Fill in what the running embedded services provide; what was given stays."""
        running = stack or Stack(home=self.home, embedded=frozenset())
        applied = running.replaced_by(external(self, stack))
        return replace(
            self,
            s3_endpoint=applied.s3_endpoint,
            s3_access_key=_hidden(applied.s3_access_key) or self.s3_access_key,
            s3_secret_key=_hidden(applied.s3_secret_key) or self.s3_secret_key,
            s3_region=applied.s3_region if applied.s3_access_key else self.s3_region,
            mlflow_uri=applied.mlflow_uri,
            prefect_api_url=applied.prefect_api_url,
            environ=child_environment(self.environ, applied),
        )

    def child_environment(self) -> dict[str, str]:
        """The whole environment of a stage program or a worker. Holds secrets: never log it."""
        mine = {
            "EQM_HOME": str(self.home),
            "EQM_STORE": self.store,
            "EQM_CACHE_SIZE": None if self.cache_bytes is None else f"{self.cache_bytes}B",
            "AWS_ENDPOINT_URL_S3": self.s3_endpoint,
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
            "PREFECT_API_URL": self.prefect_api_url,
        }
        return {**self.environ, **{name: value for name, value in mine.items() if value}}

    def service_environment(self) -> dict[str, str]:
        """The part of it that leads to the services. Holds secrets."""
        everything = self.child_environment()
        return {name: everything[name] for name in SERVICE_VARIABLES if name in everything}


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Read the environment. Raises ConfigError."""
    _refuse_unknown(environ)
    store = environ.get("EQM_STORE") or DEFAULT_STORE
    home = _home(environ)
    return Settings(
        home=home,
        # Children may run in another folder.
        store=store if "://" in store else str(Path(store).absolute()),
        cache_bytes=_size(environ, "EQM_CACHE_SIZE"),
        sources=_sources(environ),
        s3_endpoint=_address(environ, "EQM_S3_ENDPOINT"),
        s3_access_key=_hidden(environ.get("AWS_ACCESS_KEY_ID")),
        s3_secret_key=_hidden(environ.get("AWS_SECRET_ACCESS_KEY")),
        s3_region=environ.get("AWS_DEFAULT_REGION") or None,
        mlflow_uri=_address(environ, "MLFLOW_TRACKING_URI"),
        prefect_api_url=_address(environ, "PREFECT_API_URL"),
        cluster=read_cluster(environ, home),
        environ={**environ, **_identity(environ, home)},
    )


def _home(environ: Mapping[str, str]) -> Path:
    home = Path(environ.get("EQM_HOME") or ".eqm").absolute()
    there = next(place for place in (home, *home.parents) if os.path.exists(place))
    if not there.is_dir():
        raise ConfigError(
            f"EQM_HOME is {home}, and {there} is a file: name a folder, which is made if it is "
            "missing"
        )
    return home


def _identity(environ: Mapping[str, str], home: Path) -> dict[str, str]:
    """A home and a name for a user of whom the system knows neither, as Kubernetes may choose one.

    MLflow and Prefect cannot be imported without the first; runs of MLflow ask for the second.
    """
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        named = any(environ.get(name) for name in ("LOGNAME", "USER", "LNAME", "USERNAME"))
        told = {"HOME": str(home)} if "HOME" not in environ else {}
        return told if named else {**told, "USER": f"uid-{os.getuid()}"}
    return {}


def _refuse_unknown(environ: Mapping[str, str]) -> None:
    for name in environ:
        if name.startswith("EQM_") and name not in KNOWN and not _is_of_a_service(name, environ):
            close = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.0)[0]
            raise ConfigError(f"environment variable {name} is unknown: did you mean {close}?")


def _is_of_a_service(name: str, environ: Mapping[str, str]) -> bool:
    """Whether Kubernetes told a pod of a Service, as EQM_S3_PORT of our eqm-s3."""
    told = r"EQM_\w+_(SERVICE_HOST|SERVICE_PORT\w*|PORT|PORT_\d+_\w+)"
    return "KUBERNETES_SERVICE_HOST" in environ and re.fullmatch(told, name) is not None


def _address(environ: Mapping[str, str], name: str) -> str | None:
    value = environ.get(name) or None
    if value is None:
        return None
    try:
        split = urlsplit(value)
        host, known = split.hostname or "", "@" not in split.netloc
    except ValueError:
        raise ConfigError(f"{name} is no address: give http://host or https://host") from None
    if not known:
        # Not shown: it stands before the @.
        raise ConfigError(
            f"{name} holds a user or a password: give the bare address, which is shown and logged, "
            f"and the rest in {_ways_in(name)}"
        )
    if split.scheme not in ("http", "https") or not host:
        raise ConfigError(f"{name} is {value!r}: it must start with http:// or https://")
    _refuse_host(name, value, host)
    if not _is_loopback(host) and name in LETS_IN and not _lets_in(environ, name):
        raise ConfigError(
            f"{name} is {value}, another machine, and no credentials are given: set "
            f"{_ways_in(name)}; a server without accounts belongs on 127.0.0.1"
        )
    return value.rstrip("/")


def _ways_in(name: str) -> str:
    groups = LETS_IN.get(name, (("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),))
    return ", or ".join(" and ".join(group) for group in groups[:2])


def _lets_in(environ: Mapping[str, str], name: str) -> bool:
    return any(all(environ.get(one) for one in group) for group in LETS_IN[name])


def _refuse_host(name: str, value: str, host: str) -> None:
    """No server of ours is at the metadata service of a cloud, or at no address at all."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return
    if address.is_link_local or address.is_unspecified or address.is_multicast:
        raise ConfigError(f"{name} is {value}, which is the address of no server: name its host")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _sources(environ: Mapping[str, str]) -> tuple[str, ...]:
    found = tuple(
        part.strip() for part in environ.get("EQM_SOURCES", "").split(",") if part.strip()
    )
    for part in found:
        if not part.startswith(("/", "s3://")) or not part.endswith("/"):
            raise ConfigError(
                f"EQM_SOURCES has {part!r}: give absolute folders and s3://bucket/ prefixes that "
                "end with /, separated by commas"
            )
    return found


def _size(environ: Mapping[str, str], name: str) -> int | None:
    """Bytes of a size as 500MB or 1.5TB."""
    value = environ.get(name)
    if not value:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B)", value.upper())
    if found is None:
        raise ConfigError(f"{name} is {value!r}: give a number and a unit, as 500MB or 1.5TB")
    return round(float(found[1]) * UNITS[found[2]])


def _addresses(config: Any) -> Iterator[str]:
    """Texts of a config (as JSON) that name a place, or look as if they did; no ids of the hub."""
    if isinstance(config, str):
        if config.startswith(("/", "s3://")):
            yield config
    elif isinstance(config, list):
        for item in config:
            yield from _addresses(item)
    elif isinstance(config, Mapping):
        # An id of the hub has a revision; a folder that is so called is read in its place.
        hub = config.get("revision") is not None
        for key, value in config.items():
            named = key in ("uri", "source_uri") and isinstance(value, str)
            # No id has dots for a part, and on a worker there may be what is not here.
            dots = named and {".", ".."} & set(value.split("/"))
            if named and (dots or not hub or os.path.lexists(value)):
                yield value
            else:
                yield from _addresses(value)


def _hidden(value: str | None) -> SecretStr | None:
    return SecretStr(value) if value else None


# -- this process -------------------------------------------------------------------------------


def current_home() -> Path:
    """Folder of the services of this process's environment. Raises ConfigError."""
    return read_settings(os.environ).home


def current_settings() -> Settings:
    """Environment and running services together. Raises ConfigError."""
    settings = read_settings(os.environ)
    return settings.resolve(local.load(settings.home))


def start_services(*, report: Callable[[str], None], services: Sequence[str] = SERVICES) -> Stack:
    """Start the embedded services that nothing given replaces. Raises ServiceError."""
    settings = read_settings(os.environ)
    environ = {**settings.environ, "EQM_STORE": settings.store}
    given = given_from_outside()
    return local.up(
        settings.home, external=given, environ=environ, report=report, services=services
    )


def given_from_outside() -> External:
    """Services of somebody else in this process's environment. Raises ConfigError."""
    settings = read_settings(os.environ)
    return external(settings, local.remembered(settings.home))


def external(settings: Settings, ours: Stack | None) -> External:
    """What is given from outside.

    The addresses of our own services, as `eqm env` puts them into a shell, are not outside: taken
    for somebody else's they would never be started again.
    """
    endpoint = _unless(settings.s3_endpoint, ours.s3_endpoint if ours else None)
    remote = settings.store.startswith("s3://")
    bucket = settings.store.removeprefix("s3://").split("/")[0]
    return External(
        s3_endpoint=endpoint,
        mlflow_uri=_unless(settings.mlflow_uri, ours.mlflow_uri if ours else None),
        prefect_api_url=_unless(settings.prefect_api_url, ours.prefect_api_url if ours else None),
        s3_bucket=bucket if endpoint and remote else BUCKET,
    )


def _unless(given: str | None, ours: str | None) -> str | None:
    return None if given == ours else given


def activate() -> Settings:
    """Point this process at the services, before any of their clients is imported."""
    settings = current_settings()
    wanted = settings.child_environment()
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    os.environ.update(wanted)
    return settings


def check_prefect() -> None:
    """See that Prefect answers, before its client tries for a minute. Raises ServiceError."""
    settings = current_settings()
    if settings.prefect_api_url is None:
        raise ServiceError("Prefect is not running: start it with `eqm up`, or set PREFECT_API_URL")
    PrefectApi(settings.prefect_api_url, settings.child_environment()).check()
