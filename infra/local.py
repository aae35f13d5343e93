"""The embedded services of one machine: start, look, stop.

SeaweedFS (S3), MLflow and Prefect on loopback, and a Prefect worker, with all data, logs and
secrets under one folder (``.eqm``). Starting what runs already changes nothing, what died is
started again, stopping leaves all data and no process. Called by ``eqm up | status | down`` and by
tests.
"""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infra import alarms, deployments, ports
from infra.credentials import Credentials, make_credentials, read_credentials
from infra.files import make_private_folder
from infra.processes import MARK, Process, last_lines, members, spawn, terminate
from infra.services import (
    GRACE_SECONDS,
    LEAST_FREE_MB,
    TITLES,
    Service,
    address,
    answers,
    mlflow_service,
    prefect_service,
    s3_service,
    worker_name,
    worker_service,
)
from infra.stack import (
    MLFLOW,
    PREFECT,
    S3,
    SERVICES,
    WORKER,
    External,
    ServiceError,
    ServiceStatus,
    Stack,
    digest_of,
)
from infra.state import (
    RESTORING,
    Report,
    Running,
    State,
    locked,
    log_of,
    mark_of,
    read_state,
    stack_of,
    write_state,
)

START_SECONDS = 120.0
PATIENCE_SECONDS = 20.0
"""A service that runs may be slow to answer on a busy machine; it is not restarted for that."""
LOOK_SECONDS = 0.05

PROJECT = Path(__file__).resolve().parent.parent
"""The checkout: where prefect.yaml and the flows are."""


@dataclass(frozen=True)
class Start:
    """One call of `up`: what everybody in it needs."""

    root: Path
    state: State
    secrets: Credentials
    environ: Mapping[str, str] = field(repr=False)
    report: Report
    project: Path


# -- the four verbs -----------------------------------------------------------------------------


def up(
    root: Path,
    *,
    external: External,
    environ: Mapping[str, str],
    report: Report,
    services: Sequence[str] = SERVICES,
    project: Path = PROJECT,
) -> Stack:
    """Start the services that do not run; wait until all answer. Raises ServiceError.

    ``services`` may name fewer than all. ``project`` is the folder of ``prefect.yaml``.
    """
    root = make_private_folder(root).resolve()
    _refuse_unfinished(root, services)
    with locked(root, report), ports.claims() as claims:
        state = read_state(root)
        state.external = external
        wanted = [s for s in SERVICES if s in services and not external.replaces(s)]
        secrets = make_credentials(root)
        start = Start(root, state, secrets, environ, report, project.resolve())
        # Twice: a worker may end later for want of the Prefect that we found dead and started.
        if not (_bring_up(start, wanted, claims) or _bring_up(start, wanted, claims)):
            gone = [TITLES[name] for name in wanted if not state.lives(name)]
            raise ServiceError(f"{gone} ended after starting: see {root / 'logs'}")
        write_state(root, state)
        return stack_of(root, state, secrets)


def _refuse_unfinished(root: Path, services: Sequence[str]) -> None:
    """A restore needs S3; all else would begin with empty databases where it was interrupted."""
    marker = root / RESTORING
    if marker.is_file() and set(services) != {S3}:
        raise ServiceError(
            f"the restore of {root} did not end: run `eqm restore {marker.read_text()}` again"
        )


def load(root: Path) -> Stack | None:
    """The services of this folder that run now; None if there are none."""
    root = root.resolve()
    stack = stack_of(root, read_state(root), read_credentials(root))
    given = (stack.s3_endpoint, stack.mlflow_uri, stack.prefect_api_url)
    return stack if stack.embedded or any(given) else None


def remembered(root: Path) -> Stack | None:
    """The services of this folder where they ran last, whether they run now or not."""
    root = root.resolve()
    state = read_state(root)
    known = [
        name for name in (S3, MLFLOW, PREFECT) if set(ports.PREFERRED[name]) <= set(state.ports)
    ]
    return stack_of(root, state, read_credentials(root), planned=known) if known else None


def status(root: Path, given: External | None = None) -> list[ServiceStatus]:
    """One line for each service, in the order of SERVICES.

    ``given``: services of somebody else that this shell names, also where `eqm up` never ran.
    """
    root = root.resolve()
    state = read_state(root)
    return [_status(name, root, state, given or External()) for name in SERVICES]


def shortage(root: Path) -> str | None:
    """What to tell people where the disk under a folder has no room for S3 to write; else None."""
    free_mb = shutil.disk_usage(root).free >> 20
    if free_mb >= LEAST_FREE_MB:
        return None
    return (
        f"{TITLES[S3]}: the disk of {root} has {free_mb} MiB left, and below {LEAST_FREE_MB} MiB "
        "nothing is written: make room, and it goes on within a minute"
    )


def down(root: Path, *, report: Report) -> None:
    """Stop all services of this folder, and every process that they started. Data is kept."""
    root = root.resolve()
    if not root.is_dir():
        report(f"nothing to stop: {root} is not there")
        return
    with locked(root, report):
        try:
            state = read_state(root)
        except ServiceError as error:
            # The processes are found by their marks all the same.
            report(str(error))
            state = State()
        # What uses a service goes before it; a training gets time for a checkpoint in S3.
        for together in ((WORKER,), (PREFECT, MLFLOW), (S3,)):
            _stop(together, root, state, report)
        try:
            write_state(root, state)
        except OSError as error:
            # As on a full disk. Processes that are gone are known by their start as such.
            report(f"{root} cannot be written ({error.strerror}); all is stopped all the same")


# -- starting -----------------------------------------------------------------------------------


def _bring_up(start: Start, wanted: Sequence[str], claims: ports.Claims) -> bool:
    """Start what does not run; whether all of it still runs when all of it has answered."""
    for name in wanted:
        if not start.state.lives(name):
            # What a dead service left behind goes first: it may hold the port.
            _stop((name,), start.root, start.state, start.report)
            _choose_ports(name, start.state, claims)
    _start_servers(start, [name for name in wanted if name != WORKER])
    if WORKER in wanted:
        _start_worker(start)
    return all(start.state.lives(name) for name in wanted)


def _choose_ports(name: str, state: State, claims: ports.Claims) -> None:
    for port, preferred in ports.PREFERRED[name].items():
        others = {p for other, p in state.ports.items() if other != port}
        if port in state.ports:
            ports.wait_until_free(state.ports[port])
        state.ports[port] = claims.choose(state.ports.get(port, preferred), avoid=others)


def _start_servers(start: Start, wanted: Sequence[str]) -> None:
    stack = stack_of(start.root, start.state, start.secrets, planned=wanted)
    if MLFLOW in wanted and stack.s3_endpoint is None:
        raise ServiceError("MLflow keeps artifacts in S3: start it too, or set EQM_S3_ENDPOINT")
    described = [_describe(name, start, stack) for name in wanted]
    begun = [(service, _begin(service, start)) for service in described]
    for service, since in begun:
        _wait(service, start, since)
        if service.name == S3 and (since is not None or start.state.bucket != stack.s3_bucket):
            make_bucket(stack)
            start.state.bucket = stack.s3_bucket
        if service.name == S3 and (short := shortage(start.root)):
            start.report(short)
        if service.name == PREFECT and since is not None:
            secrets = start.root / "credentials.json"
            start.report(f"Prefect: its pages ask for a password, `prefect_auth` in {secrets}")


def _start_worker(start: Start) -> None:
    stack = stack_of(start.root, start.state, start.secrets, planned=(WORKER,))
    if stack.prefect_api_url is None:
        raise ServiceError("a worker needs Prefect: start it too, or set PREFECT_API_URL")
    target = alarms.target_of(start.environ)
    service = worker_service(start.root, stack, start.environ)
    api = deployments.PrefectApi(stack.prefect_api_url, service.environment)
    deploying = _outdated(start, stack, api)
    api.make_pool()
    log = start.root / "logs" / "deploy.log"
    name = worker_name(start.root)
    heard_before = api.heard_of_worker(name)
    since = _begin(service, start)
    if deploying is not None:
        start.report("deployments: registering those of prefect.yaml")
        environment = {**service.environment, MARK: mark_of(WORKER, start.root)}
        deployments.deploy_all(start.project, log=log, environment=environment)
        alarms.register(api, target)
        start.state.deployed = deploying
        start.report("deployments: ready")
    _wait(service, start, since, until=lambda: api.heard_of_worker(name) != heard_before)


def _outdated(start: Start, stack: Stack, api: deployments.PrefectApi) -> str | None:
    """The digest to remember after a new deployment; None where there is nothing to do."""
    if not deployments.has_deployments(start.project):
        start.report(f"deployments: none, {start.project} has no prefect.yaml")
        return None
    digest = digest_of(
        [
            deployments.deployments_digest(start.project, stack),
            alarms.alarms_digest(start.environ),
        ]
    )
    known = digest == start.state.deployed
    if known and deployments.declared_names(start.project) <= api.deployment_names():
        return None
    return digest


def _describe(name: str, start: Start, stack: Stack) -> Service:
    chosen = start.state.ports
    if name == S3:
        return s3_service(start.root, chosen, start.secrets, start.environ)
    if name == MLFLOW:
        return mlflow_service(start.root, chosen, stack, start.environ)
    return prefect_service(start.root, chosen, start.secrets, start.environ)


def _current(service: Service, state: State) -> bool:
    """Whether it runs, and was started as it would be started now."""
    return state.lives(service.name) and state.running[service.name].digest == service.digest()


def _begin(service: Service, start: Start) -> float | None:
    """Start a service unless it is well; the time of the start, None if there was none."""
    where = f"{TITLES[service.name]}: {{}}, {address(service.port)}"
    if _current(service, start.state) and _answers_soon(service):
        start.report(where.format("running"))
        return None
    _stop((service.name,), start.root, start.state, start.report)
    start.report(where.format("starting"))
    leader = spawn(
        service.command,
        environment={**service.environment, MARK: mark_of(service.name, start.root)},
        folder=service.folder,
        log=log_of(start.root, service.name),
    )
    start.state.running[service.name] = Running(leader.pid, leader.started_ticks, service.digest())
    # At once: if we are killed now, the next command knows of it.
    write_state(start.root, start.state)
    return time.monotonic()


def _answers_soon(service: Service) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not answers(service.name, service.port):
        if time.monotonic() > deadline:
            return False
        time.sleep(LOOK_SECONDS)
    return True


def _wait(
    service: Service,
    start: Start,
    since: float | None,
    *,
    until: Callable[[], bool] | None = None,
) -> None:
    if since is None:
        return
    title, log = TITLES[service.name], log_of(start.root, service.name)
    while not (until() if until else answers(service.name, service.port)):
        if not start.state.lives(service.name):
            raise ServiceError(f"{title} ended while starting; {log} ends:\n{last_lines(log)}")
        if time.monotonic() - since > START_SECONDS:
            raise ServiceError(
                f"{title} does not answer at {address(service.port)} after {START_SECONDS:.0f} s; "
                f"{log} ends:\n{last_lines(log)}"
            )
        time.sleep(LOOK_SECONDS)
    start.report(f"{title}: ready after {time.monotonic() - since:.1f} s")


def make_bucket(stack: Stack) -> None:
    """Make the bucket, if it is missing; the signed request also proves that this S3 is ours.

    Raises ServiceError.
    """
    import boto3
    from botocore.config import Config
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client(
        "s3",
        endpoint_url=stack.s3_endpoint,
        aws_access_key_id=stack.s3_access_key,
        aws_secret_access_key=stack.s3_secret_key,
        region_name=stack.s3_region,
        config=Config(proxies={}, retries={"mode": "standard", "max_attempts": 8}),
    )
    try:
        names = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
        if stack.s3_bucket not in names:
            client.create_bucket(Bucket=stack.s3_bucket)
    except (BotoCoreError, ClientError) as error:
        raise ServiceError(
            f"S3 at {stack.s3_endpoint} does not let us make bucket {stack.s3_bucket} ({error}): "
            f"see {log_of(stack.home, S3)}"
        ) from error


# -- stopping and looking -----------------------------------------------------------------------


def _stop(together: Sequence[str], root: Path, state: State, report: Report) -> None:
    leaders = {n: state.running[n].leader if n in state.running else None for n in together}

    def find() -> set[Process]:
        return set().union(*(members(mark_of(name, root), leaders[name]) for name in together))

    if find():
        report(f"{' and '.join(TITLES[name] for name in together)}: stopping")
        terminate(find, grace_seconds=max(GRACE_SECONDS[n] for n in together))
    for name in together:
        state.running.pop(name, None)


def _status(name: str, root: Path, state: State, given: External) -> ServiceStatus:
    title = TITLES[name]
    if state.external.replaces(name):
        given = state.external
    if given.replaces(name):
        where = {S3: given.s3_endpoint, MLFLOW: given.mlflow_uri, PREFECT: given.prefect_api_url}
        return ServiceStatus(title, "external", where.get(name) or "-")
    if not state.lives(name):
        return ServiceStatus(title, "stopped", "-")
    port = state.ports.get(name)
    seen = "running" if answers(name, port) else "silent"
    if name == S3 and seen == "running" and shortage(root):
        seen = "full"
    return ServiceStatus(title, seen, address(port), state.running[name].pid)
