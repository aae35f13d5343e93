"""Compose file, Kubernetes manifests, image: valid by the published schemas, and closed.

The schemas are those of the Compose specification (check-jsonschema has a copy), of Kubernetes
(kubernetes-validate, strict) and the types of Kubeflow Trainer. The kustomizations use three
features of kustomize, which are applied here.
"""

import copy
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import threading
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import check_jsonschema
import jsonpatch
import jsonschema
import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api import models
from prefect.utilities.templating import apply_values
from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

from eqm.errors import ConfigError
from flows import launch, recovery
from flows.settings import read_settings
from infra import cluster, health, keeper, local, services
from infra.credentials import environment_file, make_credentials
from infra.ports import PREFERRED
from infra.stack import JOBS_POOL, ServiceError, Stack

INFRA = Path(__file__).parents[2] / "infra"
PROJECT = INFRA.parent
OVERLAYS = ("base", "overlays/standalone")
SECRETS = {line.partition("=")[0] for line in environment_file().splitlines()}
NEWEST = max(kubernetes_validate.utils.all_versions(), key=lambda v: [*map(int, v.split("."))])


def document(path: str) -> Any:
    return yaml.safe_load((INFRA / path).read_text())


def strings(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)
    elif isinstance(value, str):
        yield value


# -- compose ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return document("compose.yaml")


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_fit_the_specification(name: str) -> None:
    folder = Path(check_jsonschema.__file__).parent / "builtin_schemas" / "vendor"
    schema = json.loads((folder / "compose-spec.json").read_text())
    jsonschema.validate(document(name), schema)
    broken = document(name)
    broken["services"]["worker"]["imge"] = "x"
    with pytest.raises(jsonschema.ValidationError, match="imge"):
        jsonschema.validate(broken, schema)


def lacks(*command: str) -> bool:
    """Whether this machine does not have a program, or not that part of it."""
    if shutil.which(command[0]) is None:
        return True
    return subprocess.run(command, capture_output=True, check=False).returncode != 0


@pytest.mark.skipif(lacks("docker", "compose", "version"), reason="no Docker Compose here")
def test_docker_compose_reads_both_files_and_refuses_a_start_without_passwords() -> None:
    files = [f"--file={INFRA / name}" for name in ("compose.yaml", "compose.gpu.yaml")]
    line = ["docker", "compose", *files, "--env-file=/dev/null", "config", "--format=json"]
    bare = {name: value for name, value in os.environ.items() if name not in SECRETS}
    refused = subprocess.run(line, env=bare, capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "eqm secrets" in refused.stderr
    told = {**bare, **dict.fromkeys(SECRETS, "a:b")}
    read = json.loads(subprocess.run(line, env=told, capture_output=True, check=True).stdout)
    (gpus,) = read["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert gpus["driver"] == "nvidia"


def test_ports_are_published_on_loopback_alone(compose: dict[str, Any]) -> None:
    published = [port for one in compose["services"].values() for port in one.get("ports", ())]
    assert len(published) == 3
    assert all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in published)


def test_compose_has_no_password_and_none_is_missing(compose: dict[str, Any]) -> None:
    """Every secret is ``${NAME:?...}``: a start without it is refused, and no default stands in."""
    named = set()
    for one in compose["services"].values():
        for name, value in one.get("environment", {}).items():
            if re.search("PASSWORD|SECRET|AUTH_STRING|ACCESS_KEY", name):
                # Compose tells of one that is missing, whichever it comes to first.
                found = re.fullmatch(r"\$\{(\w+):\?[^}]+eqm secrets --to infra/.env\}", value)
                assert found, (name, value)
                named.add(found[1])
    assert named | {"MLFLOW_TRACKING_USERNAME"} == SECRETS
    addresses = [text for text in strings(compose) if "://" in text]
    assert addresses
    assert not [text for text in addresses if re.search(r"://[^/@\s]*:[^/@\s]*@", text)]


def test_containers_may_do_little(compose: dict[str, Any]) -> None:
    for name, one in compose["services"].items():
        assert one["user"].split(":")[0] not in ("0", "root"), name
        assert one["read_only"] is True, name
        assert one["cap_drop"] == ["ALL"], name
        assert one["security_opt"] == ["no-new-privileges:true"], name
        assert not one.get("privileged")
        assert set(one["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}, name
        assert one["healthcheck"].get("test") or name == "setup"
        assert "/var/run/docker.sock" not in str(one.get("volumes"))


def test_a_small_host_can_start_the_worker_and_a_large_one_can_give_it_more(
    compose: dict[str, Any],
) -> None:
    """Docker refuses a limit of more cores than there are."""
    limits = compose["services"]["worker"]["deploy"]["resources"]["limits"]
    assert limits["cpus"] == "${WORKER_CPUS:-8}"
    assert limits["memory"] == "${WORKER_MEMORY:-32g}"


def test_images_are_of_a_version(compose: dict[str, Any]) -> None:
    version = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"]
    uv = re.search(r"UV_VERSION := (\S+)", (PROJECT / "Makefile").read_text())
    assert uv
    images = {one["image"] for one in compose["services"].values()}
    assert images == {f"eqm:{version}", "postgres:17.6-bookworm"}
    lines = (INFRA / "Dockerfile").read_text().splitlines()
    bases = [line.split()[1] for line in lines if line.startswith("FROM")]
    assert all(re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base) for base in bases)
    assert f"uv=={uv[1]}" in "\n".join(lines)
    locked = re.search(r"^setuptools==(\S+)", (PROJECT / "requirements.lock").read_text(), re.M)
    assert locked
    assert f"setuptools=={locked[1]}" in "\n".join(lines)
    # The last user is not root, and all that is installed has a hash.
    assert [line for line in lines if line.startswith("USER")][-1] == "USER 10001:10001"
    assert "--require-hashes" in "\n".join(lines)


def test_the_image_is_built_once(compose: dict[str, Any]) -> None:
    """Compose labels what it builds with the service: several would take the name from each other,
    and the next `up` would start containers anew for nothing."""
    built_by = [name for name, one in compose["services"].items() if "build" in one]
    assert len(built_by) == 1
    ours = [one for one in compose["services"].values() if one["image"].startswith("eqm:")]
    assert all(one["pull_policy"] == "never" for one in ours)


def test_containers_have_no_volumes_without_a_name(compose: dict[str, Any]) -> None:
    """Of a VOLUME in the image, each `up` would leave one more, and none of them be read again."""
    assert not re.search("^VOLUME", (INFRA / "Dockerfile").read_text(), re.M)
    named = {
        v.partition(":")[0] for one in compose["services"].values() for v in one.get("volumes", ())
    }
    assert named == {*compose["volumes"], "./compose/databases.sh"}


def test_kernels_can_be_compiled_where_they_run(compose: dict[str, Any]) -> None:
    """By g++ (and gcc, which it brings), into a folder that programs may be loaded from."""
    final = (INFRA / "Dockerfile").read_text().rpartition("FROM")[2]
    assert re.search(r"apt-get install .* g\+\+", final)
    (place,) = compose["services"]["worker"]["tmpfs"]
    assert "exec" in place.partition(":")[2].split(",")


def test_files_of_newer_pythons_do_not_end_the_build_of_the_image(tmp_path: Path) -> None:
    """torch 2.13 has one, and compileall then ends with 1; of ours none may."""
    packages, ours = re.findall(r"^(?:RUN|    &&) (.*compileall.*)$", dockerfile(), re.M)
    status = {}
    for line, part in ((packages, "/opt/venv/lib"), (ours, "/app")):
        folder = tmp_path / part[1:]
        folder.mkdir(parents=True)
        (folder / "fine.py").write_text("x = 1")
        (folder / "newer.py").write_text("def f[T](a): ...\n(")
        told = line.replace("python ", f"{sys.executable} ").replace(part, str(folder))
        status[part] = subprocess.run(["/bin/sh", "-c", told], capture_output=True, check=False)
        assert len(list(folder.rglob("*.pyc"))) == 1
    assert status["/opt/venv/lib"].returncode == 0
    assert status["/app"].returncode != 0


def test_a_change_of_the_code_leaves_the_packages_as_they_are() -> None:
    """They are 6 GB of the image: made again, they would be stored and pushed again."""
    first, _, final = dockerfile().rpartition("\nFROM ")
    assert re.findall(r"^COPY (.*)", first, re.M) == ["pyproject.toml requirements.lock ./"]
    assert final.index("/opt/venv /opt/venv") < final.index("COPY eqm")


def dockerfile() -> str:
    return (INFRA / "Dockerfile").read_text()


def test_the_image_is_made_of_the_code_alone() -> None:
    lines = (PROJECT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (INFRA / "Dockerfile").read_text(), re.M)
    assert {name for line in copied for name in line.split()} == kept
    assert "infra/.env*" in lines
    assert "infra/.env" in (PROJECT / ".gitignore").read_text().splitlines()


# -- what containers run ------------------------------------------------------------------------


def test_only_s3_listens_to_other_containers(tmp_path: Path) -> None:
    made = make_credentials(tmp_path)
    service = services.s3_service(tmp_path, PREFERRED["s3"], made, {}, bind="0.0.0.0")
    options = dict(line.split("=", 1) for line in service.telling["options"].splitlines())
    assert options["s3.ip.bind"] == "0.0.0.0"
    assert (options["ip"], options["ip.bind"]) == ("127.0.0.1", "127.0.0.1")
    plain = services.s3_service(tmp_path, PREFERRED["s3"], made, {})
    assert "s3.ip.bind=127.0.0.1" in plain.telling["options"]


@pytest.mark.parametrize("verb", ["s3", "setup", "bucket"])
def test_without_its_secrets_a_container_does_not_start(verb: str, tmp_path: Path) -> None:
    given = {"EQM_HOME": str(tmp_path), "EQM_S3_ENDPOINT": "http://s3:8333"}
    with pytest.raises(ServiceError, match="AWS_ACCESS_KEY_ID is not set"):
        cluster.VERBS[verb](given)
    with pytest.raises(ServiceError, match="AWS_SECRET_ACCESS_KEY is not set"):
        cluster.VERBS[verb]({**given, "AWS_ACCESS_KEY_ID": "eqm", "AWS_SECRET_ACCESS_KEY": ""})


def test_a_restore_has_a_bucket_before_there_is_a_prefect(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made: list[Stack] = []
    monkeypatch.setattr(local, "make_bucket", made.append)
    given = {"EQM_HOME": str(tmp_path), "EQM_S3_ENDPOINT": "http://s3:8333"}
    keys = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "EQM_STORE": "s3://mine/store"}
    cluster.VERBS["bucket"]({**given, **keys})
    assert [(stack.s3_bucket, stack.prefect_api_url) for stack in made] == [("mine", None)]


def test_secrets_that_a_volume_gave_to_its_group_are_private_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes does so (fsGroup) whenever a pod starts; S3 then started once and never again."""
    started: list[str] = []
    monkeypatch.setattr(os, "execve", lambda *told: started.append(told[0]))
    monkeypatch.chdir(tmp_path)
    given = {
        "EQM_HOME": str(tmp_path),
        "AWS_ACCESS_KEY_ID": "eqm",
        "AWS_SECRET_ACCESS_KEY": "a-secret",
    }
    cluster.s3(given)
    made = tmp_path / "credentials.json"
    before = made.read_bytes()
    made.chmod(0o660)
    cluster.s3(given)
    assert len(started) == 2
    assert (made.stat().st_mode & 0o777, made.read_bytes()) == (0o600, before)
    made.chmod(0o664)
    with pytest.raises(ServiceError, match="can be read by other users"):
        cluster.s3(given)


def test_volumes_are_opened_to_their_group_once(
    objects: dict[str, list[dict[str, Any]]],
) -> None:
    """And not file by file at every start, which for 500 GiB takes minutes."""
    for one in objects["overlays/standalone"]:
        if one["kind"] not in ("Deployment", "StatefulSet"):
            continue
        pod = one["spec"]["template"]["spec"]
        claims = [v for v in pod.get("volumes", ()) if "persistentVolumeClaim" in v]
        if claims or "volumeClaimTemplates" in one["spec"]:
            assert pod["securityContext"]["fsGroupChangePolicy"] == "OnRootMismatch"


def test_s3_is_given_time_for_its_volumes_and_no_more(
    compose: dict[str, Any], objects: dict[str, list[dict[str, Any]]]
) -> None:
    """It never ends by itself while somebody listens: every `down` took all of the time."""
    (pod,) = [
        one["spec"]["template"]["spec"]
        for one in objects["overlays/standalone"]
        if (one["kind"], one["metadata"]["name"]) == ("StatefulSet", "eqm-s3")
    ]
    least = services.GRACE_SECONDS[services.S3]
    assert least < pod["terminationGracePeriodSeconds"] <= 5
    assert compose["services"]["s3"]["stop_grace_period"] == "5s"


def test_health_is_a_status() -> None:
    class Answers(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(403 if self.path == "/" else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        at = f"http://127.0.0.1:{server.server_port}"
        assert (health.status_of(f"{at}/"), health.status_of(f"{at}/health")) == (403, 200)
        server.shutdown()
    assert health.status_of(f"{at}/") is None


# -- kubernetes ---------------------------------------------------------------------------------


def built(folder: Path) -> list[dict[str, Any]]:
    """What ``kubectl kustomize`` makes of a folder: resources, components, and patches of both."""
    asked = kustomization(folder)
    assert set(asked) <= {"apiVersion", "kind", "namespace", "resources", "components", "patches"}
    found: list[dict[str, Any]] = []
    for name in asked["resources"]:
        path = folder / name
        if path.is_dir():
            found += built(path)
        else:
            found += [one for one in yaml.safe_load_all(path.read_text()) if one]
    for name in asked.get("components", ()):
        component = kustomization(folder / name)
        assert component["kind"] == "Component"
        assert set(component) <= {"apiVersion", "kind", "resources", "patches"}
        for path in component.get("resources", ()):
            found += [one for one in yaml.safe_load_all((folder / name / path).read_text()) if one]
        patched(found, component["patches"])
    return patched(found, asked.get("patches", ()))


def kustomization(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "kustomization.yaml").read_text())


def patched(found: list[dict[str, Any]], patches: Sequence[Any]) -> list[dict[str, Any]]:
    """Objects after JSON patches by target, in place."""
    for patch in patches:
        kind, name = patch["target"]["kind"], patch["target"]["name"]
        (at,) = [
            i for i, o in enumerate(found) if (o["kind"], o["metadata"]["name"]) == (kind, name)
        ]
        found[at] = jsonpatch.apply_patch(found[at], yaml.safe_load(patch["patch"]))
    return found


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the README's overlay of one's own makes, in a copy of the folder."""
    copy = tmp_path_factory.mktemp("k8s") / "k8s"
    shutil.copytree(INFRA / "k8s", copy)
    page = (INFRA / "k8s" / "README.md").read_text()
    text = page[page.index("    apiVersion: kustomize") : page.index("    kubectl apply -k")]
    folder = copy / "overlays" / "ours"
    folder.mkdir()
    asked = yaml.safe_load(textwrap.dedent(text))
    assert asked.pop("images") == [{"name": "eqm", "newName": "REGISTRY/eqm", "newTag": "0.1.0"}]
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(asked))
    return built(folder)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An overlay with runs as Jobs, in a copy of the folder."""
    copy = tmp_path_factory.mktemp("jobs") / "k8s"
    shutil.copytree(INFRA / "k8s", copy)
    folder = copy / "overlays" / "jobs"
    folder.mkdir()
    parts = {"resources": ["../standalone"], "components": ["../../components/jobs"]}
    kind = {"apiVersion": "kustomize.config.k8s.io/v1beta1", "kind": "Kustomization"}
    (folder / "kustomization.yaml").write_text(yaml.safe_dump({**kind, **parts}))
    return folder


@pytest.fixture(scope="module")
def objects(ours: list[dict[str, Any]], jobs: Path) -> dict[str, list[dict[str, Any]]]:
    found = {name: built(INFRA / "k8s" / name) for name in OVERLAYS}
    return {**found, "overlays/ours": ours, "overlays/jobs": built(jobs)}


@pytest.mark.parametrize("name", [*OVERLAYS, "overlays/ours", "overlays/jobs"])
def test_manifests_fit_the_schemas(name: str, objects: dict[str, list[dict[str, Any]]]) -> None:
    for one in objects[name]:
        if one["kind"] == "TrainingRuntime":
            assert models.TrainerV1alpha1TrainingRuntime.from_dict(one).to_dict() == one
        else:
            kubernetes_validate.validate(one, NEWEST, strict=True)


@pytest.mark.skipif(lacks("kubectl", "version", "--client"), reason="no kubectl here")
@pytest.mark.parametrize("name", [*OVERLAYS, "overlays/jobs"])
def test_kubectl_makes_of_them_what_is_tested_here(
    name: str, objects: dict[str, list[dict[str, Any]]], jobs: Path
) -> None:
    folder = jobs if name == "overlays/jobs" else INFRA / "k8s" / name
    line = ["kubectl", "kustomize", str(folder)]
    made = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    assert by_name(list(yaml.safe_load_all(made))) == by_name(objects[name])


def by_name(found: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(one["kind"], one["metadata"]["name"]): one for one in found}


def test_an_unknown_field_would_be_refused(objects: dict[str, list[dict[str, Any]]]) -> None:
    for one in objects["base"]:
        if "spec" in one and one["kind"] != "TrainingRuntime":
            broken = {**one, "spec": {**one["spec"], "replcas": 1}}
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate(broken, NEWEST, strict=True)


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_file_is_used_and_every_name_is_there(
    name: str, objects: dict[str, list[dict[str, Any]]]
) -> None:
    folder = INFRA / "k8s" / name
    files = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert files <= set(yaml.safe_load((folder / "kustomization.yaml").read_text())["resources"])
    known = {(one["kind"], one["metadata"]["name"]) for one in objects[name]}
    assert len(known) == len(objects[name])
    for pod in pods(objects[name]):
        for volume in pod.get("volumes", ()):
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in known
        if account := pod.get("serviceAccountName"):
            assert ("ServiceAccount", account) in known


def pods(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Specs of the pods of servers and workers."""
    kinds = ("Deployment", "StatefulSet", "Job")
    return [one["spec"]["template"]["spec"] for one in found if one["kind"] in kinds]


def containers(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [container for pod in pods(found) for container in pod["containers"]]


@pytest.mark.parametrize("name", OVERLAYS)
def test_secrets_are_named_and_not_written(
    name: str, objects: dict[str, list[dict[str, Any]]]
) -> None:
    assert not [one for one in objects[name] if one["kind"] == "Secret"]
    for container in containers(objects[name]):
        for variable in container["env"]:
            if re.search("PASSWORD$|SECRET_KEY$|AUTH_STRING$|ACCESS_KEY", variable["name"]):
                if variable["name"].endswith("_STRING_SECRET_KEY"):
                    continue
                reference = variable["valueFrom"]["secretKeyRef"]
                assert reference["name"] == "eqm"
                assert reference["key"] in SECRETS
    for text in strings(objects[name]):
        assert not re.search(r"://[^/@\s]*:[^/@\s]*@", text), text


@pytest.mark.parametrize("name", OVERLAYS)
def test_pods_may_do_little(name: str, objects: dict[str, list[dict[str, Any]]]) -> None:
    assert pods(objects[name])
    for pod in pods(objects[name]):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        # Services are named eqm-...: their variables would be taken for misspelt ones of ours.
        assert pod["enableServiceLinks"] is False
        # A token of the API server only where it is used.
        assert pod.get("automountServiceAccountToken") is False or "serviceAccountName" in pod
    for container in containers(objects[name]):
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert set(container["resources"]) == {"requests", "limits"}
        assert re.fullmatch(r"[\w./-]+:\d[\w.-]*", container["image"])
    services_ = [one for one in objects[name] if one["kind"] == "Service"]
    assert all(one["spec"].get("type", "ClusterIP") == "ClusterIP" for one in services_)
    for one in objects[name]:
        if one["kind"] == "Role":
            named = [part for rule in one["rules"] for part in rule["resources"] + rule["verbs"]]
            assert not {"*", "secrets", "pods/exec"} & set(named)


def test_stages_are_let_into_restricted_namespaces_and_have_time_for_a_checkpoint(
    compose: dict[str, Any], objects: dict[str, list[dict[str, Any]]]
) -> None:
    (runtime,) = [one for one in objects["base"] if one["kind"] == "TrainingRuntime"]
    (node,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    asked = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    assert pod["securityContext"] == asked
    assert pod["enableServiceLinks"] is False
    # Whoever is nearer to the program is the first to lose patience.
    assert launch.SHUTDOWN_SECONDS < launch.GRACE_SECONDS <= keeper.PROGRAMS_SECONDS
    page = (PROJECT / "docs" / "training.md").read_text()
    told = f"has {launch.SHUTDOWN_SECONDS} s for its checkpoint before it is killed"
    assert told in " ".join(page.split())
    ends = pod["terminationGracePeriodSeconds"], services.GRACE_SECONDS[services.WORKER]
    assert min(ends) > keeper.PROGRAMS_SECONDS
    assert compose["services"]["worker"]["stop_grace_period"] == "2m"
    assert "--signal=B:TERM@120" in (INFRA / "slurm" / "job.sh").read_text()


def test_stages_go_to_nodes_with_gpus(objects: dict[str, list[dict[str, Any]]]) -> None:
    (runtime,) = [one for one in objects["overlays/ours"] if one["kind"] == "TrainingRuntime"]
    node = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    # Not by labels, which some clusters give to such nodes and others do not.
    assert "nodeSelector" not in node["template"]["spec"]
    assert node["template"]["spec"]["tolerations"][0]["key"] == "nvidia.com/gpu"
    (config,) = [
        one
        for one in objects["overlays/ours"]
        if (one["kind"], one["metadata"]["name"]) == ("ConfigMap", "eqm")
    ]
    assert config["data"]["EQM_PROCESS_GPUS"] == "1"
    assert config["data"]["EQM_KUBERNETES_IMAGE"] == "REGISTRY/eqm:0.1.0"
    assert {"eqm-postgres", "eqm-s3"} <= {
        one["metadata"]["name"] for one in objects["overlays/ours"]
    }


def test_both_installations_make_their_databases_alike(
    compose: dict[str, Any], objects: dict[str, list[dict[str, Any]]]
) -> None:
    (script,) = [
        one["data"]["10-databases.sh"]
        for one in objects["overlays/standalone"]
        if one["metadata"]["name"] == "eqm-databases"
    ]
    assert script == (INFRA / "compose" / "databases.sh").read_text()


def test_settings_of_the_cluster_are_understood(
    objects: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    """The worker's environment is one that the settings accept."""
    token = tmp_path / "token"
    token.write_text("t")
    (config,) = [
        one["data"]
        for one in objects["base"]
        if (one["kind"], one["metadata"]["name"]) == ("ConfigMap", "eqm")
    ]
    pod = {
        "EQM_KUBERNETES_API": "https://10.0.0.1",
        "EQM_KUBERNETES_NAMESPACE": "research",
        "EQM_KUBERNETES_TOKEN_FILE": str(token),
        **dict.fromkeys(SECRETS, "secret"),
    }
    settings = read_settings({**config, **pod})
    assert settings.cluster is not None
    assert settings.s3_endpoint == config["AWS_ENDPOINT_URL_S3"]


# -- what survives what -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What the embedded server and worker are told, by whose names Prefect survives a restart."""
    root = tmp_path_factory.mktemp("embedded")
    stack = Stack(home=root, embedded=frozenset(), prefect_api_url="http://127.0.0.1:4200/api")
    server = services.prefect_service(root, PREFERRED["prefect"], make_credentials(root), {})
    worker = services.worker_service(root, stack, {})
    names = {
        "prefect": (
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE",
            "PREFECT_SERVER_SERVICES_LATE_RUNS_AFTER_SECONDS",
        ),
        "worker": ("PREFECT_CLIENT_MAX_RETRIES", "PREFECT_WORKER_QUERY_SECONDS"),
    }
    described = {"prefect": server, "worker": worker}
    return {one: {n: described[one].telling[n] for n in wanted} for one, wanted in names.items()}


def keeps(command: list[str], name: str) -> None:
    """The command is a keeper of a worker, and both have the name."""
    assert command[:4] == ["python", "-m", "infra.keeper", name]
    assert command[4:7] == ["prefect", "worker", "start"]
    assert f"--name={name}" in command
    assert "--with-healthcheck" in command


def test_the_worker_of_compose_has_a_keeper(
    compose: dict[str, Any], told: dict[str, dict[str, str]]
) -> None:
    worker, server = compose["services"]["worker"], compose["services"]["prefect"]
    # With a name of its own, compose starts one container at most.
    keeps(worker["command"], worker["container_name"])
    assert told["worker"].items() <= worker["environment"].items()
    assert told["prefect"].items() <= server["environment"].items()
    assert server["environment"]["PREFECT_HOME"].startswith("/data/")
    assert server["volumes"] == ["prefect:/data"]
    assert {"prefect", "worker"} <= set(compose["volumes"])
    for name, one in compose["services"].items():
        assert one["restart"] == ("no" if name == "setup" else "unless-stopped")


def test_the_worker_of_the_cluster_has_a_keeper(
    objects: dict[str, list[dict[str, Any]]], told: dict[str, dict[str, str]]
) -> None:
    base = {(one["kind"], one["metadata"]["name"]): one for one in objects["base"]}
    worker = base["Deployment", "eqm-worker"]["spec"]
    keeps(worker["template"]["spec"]["containers"][0]["command"], "eqm-worker")
    assert (worker["replicas"], worker["strategy"]) == (1, {"type": "Recreate"})
    assert told["worker"].items() <= base["ConfigMap", "eqm"]["data"].items()
    pod = base["Deployment", "eqm-prefect"]["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    given = {one["name"]: one.get("value") for one in server["env"]}
    assert told["prefect"].items() <= given.items()
    assert str(given["PREFECT_HOME"]).startswith("/data/")
    assert {"name": "data", "mountPath": "/data"} in server["volumeMounts"]
    (claim,) = [one["persistentVolumeClaim"] for one in pod["volumes"] if one["name"] == "data"]
    assert ("PersistentVolumeClaim", claim["claimName"]) in base


@pytest.mark.parametrize("name", [*OVERLAYS, "overlays/jobs"])
def test_what_hangs_is_started_again(name: str, objects: dict[str, list[dict[str, Any]]]) -> None:
    for one in objects[name]:
        if one["kind"] in ("Deployment", "StatefulSet"):
            for container in one["spec"]["template"]["spec"]["containers"]:
                assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container)


# -- work pool ----------------------------------------------------------------------------------


def test_alarms_know_the_pool_whose_runs_are_jobs(objects: dict[str, list[dict[str, Any]]]) -> None:
    commands = [one["command"] for one in containers(objects["overlays/jobs"]) if "command" in one]
    asked = {word for command in commands for word in command if word.startswith("--pool=")}
    assert f"--pool={JOBS_POOL}" in asked


def test_the_work_pool_makes_a_valid_job() -> None:
    template = json.loads((INFRA / "k8s/components/jobs/work-pool.json").read_text())
    variables = template["variables"]
    jsonschema.Draft7Validator.check_schema(variables)
    defaults = {name: one["default"] for name, one in variables["properties"].items()}
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert used == set(defaults)
    jsonschema.validate(defaults, variables)
    given = {**defaults, "command": "prefect flow-run execute", "namespace": "research"}
    made: Any = apply_values(template["job_configuration"], given)
    # As the worker reads it.
    job = copy.deepcopy(KubernetesWorkerJobConfiguration(**made).job_manifest)
    pod = job["spec"]["template"]["spec"]
    # Prefect asks for them in this place, where Kubernetes knows none and drops them.
    assert (pod.pop("parallelism"), pod.pop("completions")) == (1, 1)
    # The worker turns the command into a list.
    pod["containers"][0]["args"] = given["command"].split()
    kubernetes_validate.validate(job, NEWEST, strict=True)
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    secret = [one for one in container["env"] if "valueFrom" in one]
    assert {one["valueFrom"]["secretKeyRef"]["key"] for one in secret} <= SECRETS
    assert container["image"] == document("compose.yaml")["x-eqm"]["image"]


# -- passwords ----------------------------------------------------------------------------------


def test_passwords_are_made_anew_and_need_no_quoting() -> None:
    first, second = (
        dict(line.split("=", 1) for line in environment_file().splitlines()) for _ in "ab"
    )
    assert set(first) == set(second) == SECRETS
    same = {name for name in first if first[name] == second[name]}
    assert same == {"MLFLOW_TRACKING_USERNAME"}
    for name in set(first) - same - {"AWS_ACCESS_KEY_ID"}:
        assert len(first[name]) >= 48
    assert all(re.fullmatch(r"[A-Za-z0-9:]+", value) for value in first.values())


def test_passwords_that_are_in_use_are_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / ".env"
    recovery.secrets(file)
    made = file.read_text()
    assert file.stat().st_mode & 0o777 == 0o600
    assert not [line for line in made.splitlines() if line.split("=")[1] in capsys.readouterr().out]
    with pytest.raises(ConfigError, match="exists"):
        recovery.secrets(file)
    assert file.read_text() == made
