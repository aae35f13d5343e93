"""What a cluster is told: read once, and refused in words where it does not fit."""

from pathlib import Path

import pytest
import yaml

from eqm.errors import ConfigError
from flows import clusters
from flows.clusters import Kubernetes, Nodes, Slurm
from flows.launch import LocalLauncher
from flows.launch_kubernetes import KubernetesLauncher
from flows.launch_slurm import SlurmLauncher
from flows.plan import make_launcher
from flows.settings import read_settings

ACCESS = Path(__file__).parents[2] / "infra" / "k8s" / "base" / "access.yaml"
KUBERNETES = {
    "EQM_LAUNCHER": "kubernetes",
    "EQM_KUBERNETES_API": "https://cluster.example:6443/",
    "EQM_KUBERNETES_NAMESPACE": "research",
    "EQM_KUBERNETES_TOKEN_FILE": "/secrets/token",
    "EQM_KUBERNETES_IMAGE": "registry.example/eqm:1.0",
}


def test_every_launcher_is_chosen_by_its_name(tmp_path: Path) -> None:
    home = {"EQM_HOME": str(tmp_path)}
    for given, kind in (
        ({}, LocalLauncher),
        ({"EQM_LAUNCHER": "local"}, LocalLauncher),
        ({"EQM_LAUNCHER": "slurm"}, SlurmLauncher),
        (KUBERNETES, KubernetesLauncher),
    ):
        assert type(make_launcher(read_settings({**home, **given}))) is kind


def test_what_is_not_said_has_defaults(tmp_path: Path) -> None:
    slurm = read_settings({"EQM_HOME": str(tmp_path), "EQM_LAUNCHER": "slurm"}).cluster
    assert slurm == Slurm(nodes=Nodes(processes=8, gpus=1), folder=tmp_path / "jobs")
    given = {**KUBERNETES, "EQM_NODE_PROCESSES": "4", "EQM_PROCESS_GPUS": "0"}
    each = {"EQM_PROCESS_CPUS": "12", "EQM_PROCESS_MEMORY": "64"}
    assert read_settings({**given, **each}).cluster == Kubernetes(
        nodes=Nodes(processes=4, gpus=0, cpus=12, memory_gib=64),
        api="https://cluster.example:6443",
        namespace="research",
        token_file=Path("/secrets/token"),
        image="registry.example/eqm:1.0",
    )


def test_a_pod_knows_its_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "POD", tmp_path)
    (tmp_path / "token").write_text("a token")
    (tmp_path / "namespace").write_text("research\n")
    found = read_settings(
        {
            "EQM_LAUNCHER": "kubernetes",
            "EQM_KUBERNETES_IMAGE": "registry.example/eqm@sha256:" + "0" * 64,
            "KUBERNETES_SERVICE_HOST": "fd00::1",
            "KUBERNETES_SERVICE_PORT": "6443",
        }
    ).cluster
    assert isinstance(found, Kubernetes)
    assert (found.api, found.namespace) == ("https://[fd00::1]:6443", "research")
    assert found.ca_file == tmp_path / "ca.crt"


def test_variables_of_services_are_no_misspelt_ones_of_ours(tmp_path: Path) -> None:
    # What Kubernetes tells every pod of a namespace of Services named eqm-s3 and eqm-prefect.
    told = {
        "EQM_S3_SERVICE_HOST": "10.96.0.9",
        "EQM_S3_SERVICE_PORT": "8333",
        "EQM_S3_SERVICE_PORT_HTTP": "8333",
        "EQM_S3_PORT": "tcp://10.96.0.9:8333",
        "EQM_S3_PORT_8333_TCP": "tcp://10.96.0.9:8333",
        "EQM_S3_PORT_8333_TCP_ADDR": "10.96.0.9",
        "EQM_PREFECT_SERVICE_PORT": "4200",
    }
    here = {"EQM_HOME": str(tmp_path)}
    read_settings({**here, **told, "KUBERNETES_SERVICE_HOST": "10.96.0.1"})
    with pytest.raises(ConfigError, match="EQM_S3_SERVICE_HOST is unknown"):
        read_settings({**here, **told})
    with pytest.raises(ConfigError, match="EQM_STROE is unknown"):
        read_settings({**here, "EQM_STROE": "x", "KUBERNETES_SERVICE_HOST": "10.96.0.1"})


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("EQM_LAUNCHER", "slrum", "must be one of local, slurm, kubernetes"),
        ("EQM_NODE_PROCESSES", "0", "must be a whole number from 1 to 9999"),
        ("EQM_PROCESS_GPUS", "2", "must be 0 or 1"),
        ("EQM_PROCESS_CPUS", "0.5", "must be a whole number from 1 to 9999"),
        ("EQM_PROCESS_MEMORY", "64Gi", "must be a whole number from 1 to 9999"),
        ("EQM_SLURM_PARTITION", "a\n#SBATCH --uid=0", "must be a name of letters"),
        ("EQM_SLURM_ACCOUNT", "a b", "must be a name of letters"),
        ("EQM_SLURM_TIME", "1 day", "must be minutes"),
        ("EQM_SLURM_FOLDER", "/shared/my jobs", "must be an absolute path"),
        ("EQM_SLURM_FOLDER", "/shared/$(id)", "must be an absolute path"),
        ("EQM_SLURM_FOLDER", "jobs", "must be an absolute path"),
    ],
)
def test_what_does_not_fit_slurm(name: str, value: str, why: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_settings({"EQM_LAUNCHER": "slurm", name: value})
    assert f"{name} is {value!r}" in str(error.value)
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("EQM_KUBERNETES_API", "http://cluster.example", "must be an https:// address"),
        ("EQM_KUBERNETES_API", "https://me:word@cluster.example", "must be an https:// address"),
        ("EQM_KUBERNETES_API", "", "is not set, and EQM_LAUNCHER=kubernetes needs it"),
        ("EQM_KUBERNETES_IMAGE", "", "is not set"),
        ("EQM_KUBERNETES_IMAGE", "registry.example/eqm", "must be name:tag"),
        ("EQM_KUBERNETES_IMAGE", "registry.example/eqm:latest", "name a version"),
        ("EQM_KUBERNETES_NAMESPACE", "../kube-system", "must be a name of small letters"),
        ("EQM_KUBERNETES_RUNTIME", "EqM", "must be a name of small letters"),
    ],
)
def test_what_does_not_fit_kubernetes(
    name: str, value: str, why: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(clusters, "POD", tmp_path)
    with pytest.raises(ConfigError, match=name) as error:
        read_settings({**KUBERNETES, name: value})
    assert why in str(error.value)
    assert "word@" not in str(error.value)


def test_the_table_has_every_variable() -> None:
    lines = str(clusters.__doc__).splitlines()
    listed = [line.split()[1] for line in lines if line.startswith("| EQM_")]
    assert tuple(listed) == clusters.VARIABLES


def test_the_flow_may_do_what_the_launcher_does_and_no_more() -> None:
    role = next(d for d in yaml.safe_load_all(ACCESS.read_text()) if d["kind"] == "Role")
    allowed = {(r["resources"][0], verb) for r in role["rules"] for verb in r["verbs"]}
    assert allowed == {
        ("trainjobs", "create"),
        ("trainjobs", "get"),
        ("trainjobs", "delete"),
        ("configmaps", "create"),
        ("pods", "list"),
    }
