"""The embedded services, for real: started here, on loopback, in a temporary folder."""

import contextlib
import http.client
import json
import os
import pwd
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import boto3
import pytest
from botocore.exceptions import ClientError

from eqm.errors import ConfigError
from flows.settings import external, read_settings
from infra import local, ports, processes
from infra.credentials import make_credentials
from infra.deployments import PrefectApi, deployments_digest
from infra.processes import Leader, alive, read_process, spawn
from infra.services import mlflow_service, prefect_service, s3_service, worker_service
from infra.stack import SERVICES, External, ServiceError, Stack, child_environment
from infra.state import State

pytestmark = [pytest.mark.services, pytest.mark.timeout(300)]

FLOWS = {
    "pipeline": ("pipeline",),
    "weekly": ("weekly",),
    "clean": ("clean_store",),
    "study": ("study",),
    "evaluate": ("reevaluate_champion",),
    "encode": ("encode", "encode_range"),
    "promote": ("promote",),
}
FLOW = """
import os
from pathlib import Path

from prefect import flow

import eqm
import flows


@flow
def {name}(config: str = "demo", older_than: str = "30d", delete: bool = False) -> None:
    lines = [os.getcwd(), eqm.__file__, flows.__file__, os.environ["AWS_ENDPOINT_URL_S3"]]
    Path("{name}.ran").write_text("\\n".join(lines))
"""


@dataclass
class Home:
    """A project with flows, and the services that belong to it."""

    project: Path
    lines: list[str] = field(default_factory=list)

    @property
    def root(self) -> Path:
        return self.project / ".eqm"

    def up(self, **more) -> Stack:
        self.lines.clear()
        return local.up(
            self.root,
            external=External(),
            environ=os.environ,
            report=self.lines.append,
            project=self.project,
            **more,
        )

    def down(self) -> None:
        local.down(self.root, report=self.lines.append)

    def processes(self) -> list[str]:
        """Every process that mentions the folder in its environment or its command line."""
        return [pid for pid in all_pids() if str(self.root) in environ_and_command(pid)]

    def leader(self, service: str) -> int:
        return json.loads((self.root / "stack.json").read_text())["running"][service]["pid"]


def all_pids() -> list[str]:
    return [
        e.name for e in Path("/proc").iterdir() if e.name.isdigit() and int(e.name) != os.getpid()
    ]


def environ_and_command(pid: str) -> str:
    with contextlib.suppress(OSError):
        where = Path("/proc") / pid
        if read_process(int(pid)) is not None:
            texts = [(where / name).read_bytes() for name in ("environ", "cmdline")]
            return b"\0".join(texts).decode(errors="replace")
    return ""


@pytest.fixture(scope="module", autouse=True)
def _ports_apart() -> Iterator[None]:
    """Ports away from the usual ones, which somebody may take while a test has a service down."""
    apart = 1000 + os.getpid() % 1000
    moved = {
        service: {name: port + apart for name, port in wanted.items()}
        for service, wanted in ports.PREFERRED.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ports, "PREFERRED", moved)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    project = tmp_path_factory.mktemp("project").resolve()
    (project / "flows").mkdir()
    (project / "flows" / "__init__.py").touch()
    for module, names in FLOWS.items():
        text = "".join(FLOW.format(name=name) for name in names)
        (project / "flows" / f"{module}.py").write_text(text)
    (project / "prefect.yaml").write_text((local.PROJECT / "prefect.yaml").read_text())
    home = Home(project)
    try:
        yield home
    finally:
        home.down()


@pytest.fixture(scope="module")
def started(home: Home) -> tuple[Home, Stack]:
    return home, home.up()


@pytest.fixture
def stack(started: tuple[Home, Stack]) -> Stack:
    """All services, mended if the test before broke one."""
    home, _ = started
    return home.up()


def s3(stack: Stack):
    return boto3.client(
        "s3",
        endpoint_url=stack.s3_endpoint,
        aws_access_key_id=stack.s3_access_key,
        aws_secret_access_key=stack.s3_secret_key,
        region_name=stack.s3_region,
    )


def api(stack: Stack) -> PrefectApi:
    return PrefectApi(stack.prefect_api_url, stack.environment())


def listening(pids: set[int]) -> set[tuple[str, int]]:
    """Addresses (hexadecimal, as the kernel writes them) and ports on which processes listen."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in (Path("/proc") / str(pid) / "fd").iterdir():
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(entry))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (Path("/proc/net") / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                address, port = fields[1].split(":")
                found.add((address, int(port, 16)))
    return found


def status_of(stack: Stack, method: str, port: int, path: str, body: bytes = b"") -> int | None:
    """Status of an unsigned request; None where HTTP is not spoken."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


# -- starting -----------------------------------------------------------------------------------


def test_everything_answers(started: tuple[Home, Stack]) -> None:
    home, stack = started
    assert [s.state for s in local.status(home.root)] == ["running"] * 4
    assert s3(stack).list_buckets()["Buckets"][0]["Name"] == stack.s3_bucket
    scheduled = {"weekly", "reevaluate-champion", "clean"}
    names = {*scheduled, "pipeline", "study", "encode", "encode-range", "promote"}
    assert api(stack).deployment_names() == names
    assert local.load(home.root) == stack


def test_up_again_changes_nothing(stack: Stack, home: Home) -> None:
    before = (home.root / "stack.json").read_text()
    assert home.up() == stack
    assert (home.root / "stack.json").read_text() == before
    assert all("running" in line for line in home.lines)


def test_schedules_make_runs(stack: Stack) -> None:
    deadline = time.monotonic() + 30
    wanted = {"flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}}}
    while not api(stack)._post("/flow_runs/filter", wanted):
        assert time.monotonic() < deadline, "the scheduler makes no runs"
        time.sleep(0.5)


def test_worker_runs_a_deployment(stack: Stack, home: Home) -> None:
    found = api(stack)._post("/deployments/filter", {"limit": 200})
    which = next(one["id"] for one in found if one["name"] == "encode")
    run = api(stack)._post(f"/deployments/{which}/create_flow_run", {"parameters": {}})
    assert run["id"]
    file = home.project / "encode.ran"
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, (home.root / "logs" / "worker.log").read_text()
        time.sleep(0.2)
    folder, eqm, flows, endpoint = file.read_text().splitlines()
    assert (folder, endpoint) == (str(home.project), stack.s3_endpoint)
    assert Path(eqm).is_file()
    assert Path(flows).is_file()


def test_mlflow_keeps_artifacts_in_s3(stack: Stack) -> None:
    program = "import mlflow\nwith mlflow.start_run():\n    mlflow.log_text('hello', 'a.txt')\n"
    environment = child_environment(os.environ, stack)
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, timeout=120)
    found = s3(stack).list_objects_v2(Bucket=stack.s3_bucket, Prefix="mlflow/")["Contents"]
    assert any(one["Key"].endswith("/artifacts/a.txt") for one in found)


# -- security -----------------------------------------------------------------------------------


def test_everything_listens_on_loopback_only(stack: Stack, home: Home) -> None:
    found = listening({int(pid) for pid in home.processes()})
    ours = set(json.loads((home.root / "stack.json").read_text())["ports"].values())
    assert ours <= {port for _, port in found}
    assert {address for address, _ in found} == {"0100007F"}


def test_unsigned_writes_change_nothing(stack: Stack, home: Home) -> None:
    client = s3(stack)
    client.put_object(Bucket=stack.s3_bucket, Key="kept/object", Body=b"original")
    tried, accepted = 0, []
    for _, port in sorted(listening({int(pid) for pid in home.processes()})):
        for method, path in unsigned_writes(stack.s3_bucket):
            status = status_of(stack, method, port, path, b'{"name": "intruder"}')
            tried += 1
            if status is not None and status < 400:
                accepted.append((port, method, path, status))
    assert tried > 100
    # MLflow has no accounts: whoever is on this machine may log runs. All others refuse.
    mlflow = int(stack.mlflow_uri.rpartition(":")[2])
    assert [one for one in accepted if one[0] != mlflow] == []
    assert (
        client.get_object(Bucket=stack.s3_bucket, Key="kept/object")["Body"].read() == b"original"
    )
    assert [b["Name"] for b in client.list_buckets()["Buckets"]] == [stack.s3_bucket]
    keys = {one["Key"] for one in client.list_objects_v2(Bucket=stack.s3_bucket)["Contents"]}
    assert not {key for key in keys if "intruder" in key}


def unsigned_writes(bucket: str) -> list[tuple[str, str]]:
    paths = [
        f"/buckets/{bucket}/kept/object",
        f"/{bucket}/kept/object",
        f"/{bucket}/intruder",
        f"/{bucket}",
        "/intruder",
        "/1,01637037d6",
        "/submit",
        f"/col/delete?collection={bucket}",
        "/vol/grow?count=1",
        "/dir/assign",
        "/dir/lookup?fileId=1,01637037d6",
        "/api/work_pools/",
    ]
    return [(method, path) for path in paths for method in ("PUT", "POST", "DELETE")]


def test_grpc_lets_nobody_in_without_the_key(stack: Stack, home: Home) -> None:
    told = json.loads((home.root / "stack.json").read_text())["ports"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    grpc = [port for name, port in told.items() if name.endswith("-grpc")]
    assert len(grpc) == 4
    for port in grpc:
        plain = socket.create_connection(("127.0.0.1", port), timeout=3)
        with plain, context.wrap_socket(plain) as secure:
            secure.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
            # In TLS 1.3 the refusal of a client without certificate comes with the first read.
            with pytest.raises((ssl.SSLError, ConnectionError)):
                read_all(secure)


def read_all(connection: ssl.SSLSocket) -> None:
    while connection.recv(1024):
        pass


def test_prefect_wants_a_password(stack: Stack) -> None:
    with pytest.raises(ServiceError, match="401"):
        PrefectApi(stack.prefect_api_url, {}).check()


def test_mlflow_refuses_other_host_names(stack: Stack) -> None:
    request = urllib.request.Request(
        f"{stack.mlflow_uri}/api/2.0/mlflow/experiments/get?experiment_id=0",
        headers={"Host": "evil.example"},
    )
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request, timeout=5)


def test_secrets_are_private_and_nowhere_else(stack: Stack, home: Home) -> None:
    file = home.root / "credentials.json"
    assert file.stat().st_mode & 0o777 == 0o600
    assert home.root.stat().st_mode & 0o777 == 0o700
    told = json.loads(file.read_text())
    secrets = [value for name, value in told.items() if name != "s3_access_key"]
    secrets += [stack.prefect_auth.partition(":")[2], told["grpc_key"].splitlines()[1]]
    shown = [repr(stack), str(home.lines), (home.root / "stack.json").read_text()]
    shown += [path.read_text(errors="replace") for path in (home.root / "logs").iterdir()]
    shown += [
        (Path("/proc") / pid / "cmdline").read_bytes().decode(errors="replace")
        for pid in home.processes()
    ]
    assert [secret for secret in secrets if any(secret in text for text in shown)] == []


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_file_of_secrets_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    local.make_credentials(tmp_path)
    (tmp_path / "credentials.json").chmod(mode)
    with pytest.raises(ServiceError, match="chmod 600"):
        local.read_credentials(tmp_path)


# -- S3 as we rely on it ------------------------------------------------------------------------


def test_conditional_writes(stack: Stack) -> None:
    client = s3(stack)
    once = {"Bucket": stack.s3_bucket, "Key": "once", "IfNoneMatch": "*"}
    client.put_object(Body=b"first", **once)
    with pytest.raises(ClientError) as refused:
        client.put_object(Body=b"second", **once)
    assert refused.value.response["ResponseMetadata"]["HTTPStatusCode"] == 412
    assert client.get_object(Bucket=stack.s3_bucket, Key="once")["Body"].read() == b"first"


# -- repair, ports, stopping --------------------------------------------------------------------


@pytest.mark.parametrize("service", SERVICES)
def test_a_killed_service_is_started_again(stack: Stack, home: Home, service: str) -> None:
    others = {name: home.leader(name) for name in SERVICES if name != service}
    dead = home.leader(service)
    os.kill(dead, signal.SIGKILL)
    while alive(Leader(dead, (read_process(dead) or Leader(0, 0)).started_ticks)):
        time.sleep(0.02)
    again = home.up()
    assert again == stack, home.lines
    assert home.leader(service) != dead
    assert {name: home.leader(name) for name in others} == others, home.lines


@pytest.mark.slow
def test_down_leaves_no_process_and_all_data(stack: Stack, home: Home) -> None:
    s3(stack).put_object(Bucket=stack.s3_bucket, Key="kept/over", Body=b"restart")
    # A launcher that is shot leaves services, and these leave children: all have to go.
    os.kill(home.leader("mlflow"), signal.SIGKILL)
    home.down()
    assert home.processes() == []
    assert local.load(home.root) is None
    assert [s.state for s in local.status(home.root)] == ["stopped"] * 4

    holder = socket.create_server(("127.0.0.1", int(stack.s3_endpoint.rpartition(":")[2])))
    with holder:
        again = home.up()
        # Somebody took the port meanwhile: another is chosen, remembered, and told to all.
        assert again.s3_endpoint != stack.s3_endpoint
        assert local.load(home.root) == again
    body = s3(again).get_object(Bucket=again.s3_bucket, Key="kept/over")["Body"].read()
    assert body == b"restart"
    assert "deployments: registering those of prefect.yaml" not in home.lines
    assert "pipeline" in api(again).deployment_names()
    assert home.up() == again


def test_two_at_once_do_not_fight(home: Home, stack: Stack) -> None:
    os.kill(home.leader("s3"), signal.SIGKILL)
    found: list[Stack] = []
    program = [threading.Thread(target=lambda: found.append(home.up())) for _ in range(2)]
    for thread in program:
        thread.start()
    for thread in program:
        thread.join()
    assert found[0] == found[1]


# -- small parts --------------------------------------------------------------------------------


def test_only_s3_is_quick(tmp_path: Path) -> None:
    home = Home(tmp_path.resolve())
    began = time.monotonic()
    try:
        stack = home.up(services=("s3",))
        assert time.monotonic() - began < 10
        assert stack.embedded == {"s3"}
        assert stack.mlflow_uri is None
        assert s3(stack).list_buckets()["Buckets"]
    finally:
        home.down()
    assert home.processes() == []


def test_a_start_that_is_killed_leaves_nothing_that_is_not_found(tmp_path: Path) -> None:
    # Deep, too: sockets of S3 have paths of their own, which the kernel limits to 107 bytes.
    home = Home(tmp_path.resolve() / ("deep" * 30))
    home.root.mkdir(parents=True)
    program = (
        "import os, sys; from pathlib import Path; from infra import local; "
        "from infra.stack import External; "
        "local.up(Path(sys.argv[1]), external=External(), environ=os.environ, report=print)"
    )
    starting = subprocess.Popen(
        [sys.executable, "-c", program, str(home.root)],
        cwd=local.PROJECT,
        stdout=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 30
    while not any("mlflow" in environ_and_command(pid) for pid in home.processes()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    starting.kill()
    starting.wait()
    try:
        stack = home.up(services=("s3",))
        assert s3(stack).list_buckets()["Buckets"]
    finally:
        home.down()
    assert home.processes() == []


def test_a_service_that_dies_says_why(tmp_path: Path) -> None:
    home = Home(tmp_path.resolve())
    (home.root / "s3" / "data").mkdir(parents=True)
    # A folder where a file must be.
    (home.root / "s3" / "data" / "filerldb2").write_text("in the way")
    try:
        with pytest.raises(
            ServiceError, match=r"(?s)S3 ended while starting; .*s3\.log ends:\n.*filerldb2"
        ):
            home.up(services=("s3",))
    finally:
        home.down()


def test_a_number_used_again_is_not_ours(tmp_path: Path) -> None:
    leader = spawn(
        ["sleep", "30"],
        environment=os.environ,
        folder=tmp_path,
        log=tmp_path / "logs" / "sleep.log",
    )
    assert alive(leader)
    assert not alive(Leader(leader.pid, leader.started_ticks + 1))
    os.kill(leader.pid, signal.SIGKILL)
    while alive(leader):
        time.sleep(0.01)


def test_what_a_service_writes_is_private_and_its_log_is_put_aside_when_it_is_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "LOG_BYTES", 10)
    log = tmp_path / "logs" / "one.log"
    for words in ("the first line", "the second", "the third"):
        program = f"echo {words}; touch made"
        leader = spawn(["sh", "-c", program], environment={}, folder=tmp_path / "in", log=log)
        while alive(leader):
            time.sleep(0.01)
        assert log.read_text() == f"{words}\n"
    assert log.with_suffix(".log.1").read_text() == "the second\n"
    made = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o077 for path in made} == {0}
    assert {path.name for path in made} == {"made", "one.log", "one.log.1"}


def test_a_port_is_claimed_once() -> None:
    with ports.claims() as mine, ports.claims() as theirs:
        first = mine.choose(20000)
        assert theirs.choose(20000) != first


def test_a_port_whose_socket_another_user_left_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "SOCKETS", tmp_path)
    with ports.claims() as claims:
        first = claims.choose(20000)
    left = tmp_path / f"seaweedfs-master-grpc-{first}.sock"
    left.touch()
    with ports.claims() as claims:
        assert claims.choose(first) == first
    monkeypatch.setattr(os, "geteuid", lambda: left.stat().st_uid + 1)
    with ports.claims() as claims:
        assert claims.choose(first) > first


def test_a_worker_does_not_share_temporary_files_with_other_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    stack = Stack(home=tmp_path, embedded=frozenset())
    place = Path(worker_service(tmp_path, stack, {}).environment["TMPDIR"])
    assert place.parent == tmp_path
    assert place.stat().st_mode & 0o777 == 0o700
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    place.rename(tmp_path / f"eqm-{owner + 1}")
    with pytest.raises(ServiceError, match="another user's"):
        worker_service(tmp_path, stack, {})


def test_pages_of_prefect_are_not_written_among_its_modules(tmp_path: Path) -> None:
    service = prefect_service(tmp_path, {"prefect": 4200}, make_credentials(tmp_path), {})
    assert Path(service.environment["PREFECT_UI_STATIC_DIRECTORY"]).is_relative_to(tmp_path)


def test_databases_are_in_their_home_whatever_its_path_holds(tmp_path: Path) -> None:
    """SQLAlchemy ends a path at a question mark, and SeaweedFS at a comma."""
    home = tmp_path / "a,b?c"
    secrets = make_credentials(home)
    mlflow = mlflow_service(home, {"mlflow": 5000}, Stack(home=home, embedded=frozenset()), {})
    assert "--backend-store-uri=sqlite:///mlflow.db" in mlflow.command
    assert mlflow.folder == home / "mlflow"
    prefect = prefect_service(home, {"prefect": 4200}, secrets, {})
    connection = prefect.environment["PREFECT_SERVER_DATABASE_CONNECTION_URL"]
    assert (connection, prefect.folder) == ("sqlite+aiosqlite:///prefect.db", home / "prefect")
    s3_service(home, ports.PREFERRED["s3"], secrets, {})
    assert "\ndir=data\n" in (home / "s3" / "config" / "weed.options").read_text()


def test_what_is_given_is_not_started(tmp_path: Path) -> None:
    home = Home(tmp_path.resolve())
    given = External(
        s3_endpoint="https://s3.example",
        mlflow_uri="https://mlflow.example",
        worker=False,
        prefect_api_url="https://prefect.example/api",
    )
    stack = local.up(home.root, external=given, environ={}, report=home.lines.append)
    assert stack.embedded == frozenset()
    assert stack.s3_access_key is None
    assert stack.mlflow_uri == "https://mlflow.example"
    assert [s.state for s in local.status(home.root)] == ["external"] * 4
    assert home.processes() == []


def test_a_child_is_not_misled() -> None:
    stack = Stack(
        home=Path("/home"),
        embedded=frozenset({"s3", "prefect"}),
        s3_endpoint="http://127.0.0.1:1",
        s3_access_key="key",
        s3_secret_key="hidden",
        prefect_auth="a:b",
    )
    given = {
        "PATH": "/bin",
        "AWS_SESSION_TOKEN": "cloud",
        "AWS_PROFILE": "work",
        "NO_PROXY": "inner",
        "PREFECT_PROFILE": "cloud",
        "MLFLOW_TRACKING_TOKEN": "token",
        "PYTHONDONTWRITEBYTECODE": "1",
        "https_proxy": "http://proxy.example",
        "ALL_PROXY": "socks5h://proxy.example",
    }
    child = child_environment(given, stack)
    assert child["NO_PROXY"] == "inner,127.0.0.1,localhost"
    assert child["AWS_SECRET_ACCESS_KEY"] == "hidden"
    assert child["MLFLOW_TRACKING_TOKEN"] == "token"
    gone = {"AWS_SESSION_TOKEN", "AWS_PROFILE", "PREFECT_PROFILE", "PYTHONDONTWRITEBYTECODE"}
    assert not gone & set(child)
    # Of SOCKS httpx makes an ImportError, also on its way to this machine.
    assert child["https_proxy"] == "http://proxy.example"
    assert "ALL_PROXY" not in child
    assert "hidden" not in repr(stack)


# -- settings: how flows see the services -------------------------------------------------------


def running(home: Path) -> Stack:
    return Stack(
        home=home,
        embedded=frozenset(SERVICES),
        s3_endpoint="http://127.0.0.1:8333",
        s3_access_key="key",
        s3_secret_key="hidden",
        mlflow_uri="http://127.0.0.1:5000",
        prefect_api_url="http://127.0.0.1:4200/api",
        prefect_auth="eqm:password",
    )


def test_settings_come_from_the_running_services(tmp_path: Path) -> None:
    cloud = {"AWS_ACCESS_KEY_ID": "cloud", "AWS_SESSION_TOKEN": "token"}
    settings = read_settings({"EQM_HOME": str(tmp_path), **cloud}).resolve(running(tmp_path))
    child = settings.child_environment()
    assert child["AWS_ACCESS_KEY_ID"] == "key"
    assert child["AWS_SECRET_ACCESS_KEY"] == "hidden"
    assert child["PREFECT_API_AUTH_STRING"] == "eqm:password"
    assert child["EQM_STORE"] == "s3://eqm/store"
    assert "AWS_SESSION_TOKEN" not in child
    assert settings.prefect_ui == "http://127.0.0.1:4200"
    assert "hidden" not in repr(settings)
    # Read again in a child, it is the same.
    again = read_settings(child).resolve(running(tmp_path))
    assert again.child_environment() == child
    assert external(again, running(tmp_path)) == External()


def test_what_is_given_stays(tmp_path: Path) -> None:
    given = {
        "EQM_HOME": str(tmp_path),
        "EQM_S3_ENDPOINT": "https://s3.example",
        "EQM_STORE": "s3://team/eqm",
        "AWS_ACCESS_KEY_ID": "cloud",
        "AWS_SECRET_ACCESS_KEY": "cloudy",
        "AWS_SESSION_TOKEN": "token",
        "MLFLOW_TRACKING_URI": "https://mlflow.example",
        "MLFLOW_TRACKING_TOKEN": "token",
    }
    settings = read_settings(given).resolve(running(tmp_path))
    child = settings.child_environment()
    assert {name: child[name] for name in given} == given
    assert child["AWS_ENDPOINT_URL_S3"] == "https://s3.example"
    assert child["PREFECT_API_URL"] == "http://127.0.0.1:4200/api"
    assert external(settings, running(tmp_path)).s3_bucket == "team"


def test_a_user_whom_the_system_does_not_know_has_a_home_and_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {"EQM_HOME": str(tmp_path)}
    assert not {"HOME", "USER"} & set(read_settings(here).environ)
    nobody = max(entry.pw_uid for entry in pwd.getpwall()) - 1
    while any(entry.pw_uid == nobody for entry in pwd.getpwall()):
        nobody -= 1
    monkeypatch.setattr(os, "getuid", lambda: nobody)
    told = read_settings(here).environ
    assert (told["HOME"], told["USER"]) == (str(tmp_path), f"uid-{nobody}")
    given = {"HOME": "/", "LOGNAME": "pod"}
    told = read_settings({**here, **given}).environ
    assert told == {**here, **given}


def test_ports_that_were_chosen_are_kept(tmp_path: Path) -> None:
    """Links that people have, and clients that run, lead to where a service was before."""
    state = State(ports={"mlflow": 23456})
    with ports.claims() as claims:
        local._choose_ports("mlflow", state, claims)
    assert state.ports == {"mlflow": 23456}


def test_what_deployed_runs_would_do_is_in_the_digest_of_deployments(tmp_path: Path) -> None:
    (tmp_path / "flows").mkdir()
    (tmp_path / "prefect.yaml").write_text("deployments: []")
    flow = tmp_path / "flows" / "one.py"
    flow.write_text("def one(): ...")
    stack = Stack(home=tmp_path, embedded=frozenset(), prefect_api_url="http://127.0.0.1:4200/api")
    before = deployments_digest(tmp_path, stack)
    assert deployments_digest(tmp_path, stack) == before
    flow.write_text("def one(more=None): ...")
    assert deployments_digest(tmp_path, stack) != before


def test_a_store_in_a_folder_is_the_same_one_for_children(tmp_path: Path) -> None:
    """Stage programs and deployed runs may be started in another folder."""
    with contextlib.chdir(tmp_path):
        found = read_settings({"EQM_STORE": "here/store", "EQM_HOME": "home"})
    assert (found.store, found.home) == (str(tmp_path / "here/store"), tmp_path / "home")
    assert found.child_environment()["EQM_STORE"] == found.store


def test_a_misspelt_variable_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="EQM_S3_ENDPIONT is unknown: did you mean EQM_S3_ENDPOINT"
    ):
        read_settings({"EQM_S3_ENDPIONT": "http://127.0.0.1:1"})
    with pytest.raises(ConfigError, match="must start with http"):
        read_settings({"PREFECT_API_URL": "127.0.0.1:4200"})
