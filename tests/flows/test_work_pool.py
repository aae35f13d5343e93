"""The setup of an installation whose flow runs are Jobs of Kubernetes, on a Prefect of its own."""

import json
import os
from pathlib import Path

import pytest
from own_home import own_home

from infra import cluster, local
from infra.deployments import PrefectApi, declared_names
from infra.stack import JOBS_POOL, POOL, ServiceError

GIVEN = {
    "EQM_STORE": "s3://eqm/store",
    "EQM_WORK_POOL": JOBS_POOL,
    "EQM_KUBERNETES_IMAGE": "registry.example/eqm:2",
    "EQM_KUBERNETES_NAMESPACE": "vision",
}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_all_deployments_are_of_the_pool_whose_runs_are_jobs(tmp_path: Path) -> None:
    with own_home(tmp_path, "jobs") as home:
        told = {**os.environ, **GIVEN, "EQM_HOME": str(tmp_path / "setup")}
        told["EQM_S3_ENDPOINT"] = home.stack.s3_endpoint
        assert pools(home.api) == {POOL}
        # The first deployment of a pool that is there has its template replaced.
        cluster.setup({**told, "EQM_KUBERNETES_IMAGE": "registry.example/eqm:1"})
        cluster.setup(told)
        assert pools(home.api) == {JOBS_POOL}
        assert home.api.deployment_names() == declared_names(local.PROJECT)
        pool = home.api._send("GET", f"/work_pools/{JOBS_POOL}", None)
        assert pool["type"] == "kubernetes"
        known = pool["base_job_template"]["variables"]["properties"]
        assert known["image"]["default"] == "registry.example/eqm:2"
        assert known["namespace"]["default"] == "vision"
        # And back.
        cluster.setup({**told, "EQM_WORK_POOL": ""})
        assert pools(home.api) == {POOL}


def pools(api: PrefectApi) -> set[str]:
    """Names of the pools of all deployments."""
    return {one["work_pool_name"] for one in api._post("/deployments/filter", {"limit": 200})}


def test_a_pool_that_there_is_not_is_refused() -> None:
    with pytest.raises(ServiceError, match="EQM_WORK_POOL is 'jobs'; it must be eqm or eqm-jobs"):
        cluster.setup({"EQM_WORK_POOL": "jobs"})


@pytest.mark.parametrize("name", ["EQM_KUBERNETES_IMAGE", "EQM_KUBERNETES_NAMESPACE"])
def test_what_jobs_need_is_asked_for(name: str) -> None:
    without = {key: value for key, value in GIVEN.items() if key != name}
    with pytest.raises(ServiceError, match=name):
        cluster._jobs_template(local.PROJECT, without)
    assert json.dumps(cluster._jobs_template(local.PROJECT, GIVEN)).count("vision") == 1
