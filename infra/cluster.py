"""What containers run that is no plain command of MLflow or Prefect: ``python -m infra.cluster``.

``s3`` is the SeaweedFS of the embedded stack, with S3 alone open to other containers. ``setup``
makes the bucket, the work pool and the alarms and registers the deployments, then ends; doing it
again changes nothing. With EQM_WORK_POOL=eqm-jobs runs of the deployments are Jobs of Kubernetes.
``bucket`` makes the bucket alone, for a restore. Addresses and credentials come from the
environment, under the names that boto3, MLflow and Prefect know. One whose secret is missing does
not start.
"""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from eqm.errors import EqmError
from infra import alarms, deployments, local, ports
from infra.credentials import make_credentials
from infra.files import make_private_folder
from infra.services import s3_service
from infra.stack import JOBS_POOL, POOL, REGION, ServiceError, Stack

# In a container, whose network decides who comes in.
EVERYWHERE = "0.0.0.0"  # noqa: S104


def s3(environ: Mapping[str, str]) -> None:
    """Become the S3 server: data and inner secrets in EQM_HOME. Raises ServiceError."""
    root = make_private_folder(Path(_needed(environ, "EQM_HOME")))
    _close_again(root / "credentials.json")
    secrets = replace(
        make_credentials(root),
        s3_access_key=_needed(environ, "AWS_ACCESS_KEY_ID"),
        s3_secret_key=_needed(environ, "AWS_SECRET_ACCESS_KEY"),
    )
    service = s3_service(root, ports.PREFERRED["s3"], secrets, environ, bind=EVERYWHERE)
    os.chdir(service.folder)
    os.execve(service.command[0], service.command, dict(service.environment))  # noqa: S606


def _close_again(path: Path) -> None:
    """Take from the group what Kubernetes gives it (fsGroup): it opens a volume's files to it
    whenever a pod starts, and the pod is alone in that group. What others may read stays refused.
    """
    try:
        path.chmod(path.stat().st_mode & 0o7707)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ServiceError(
            f"{path} cannot be closed to its group ({error.strerror}): give it to user "
            f"{os.getuid()}"
        ) from error


def setup(environ: Mapping[str, str], project: Path = local.PROJECT) -> None:
    """Make bucket, work pool, deployments and alarms. Raises ServiceError."""
    pool = environ.get("EQM_WORK_POOL") or POOL
    if pool not in (POOL, JOBS_POOL):
        raise ServiceError(f"EQM_WORK_POOL is {pool!r}; it must be {POOL} or {JOBS_POOL}")
    stack = replace(_stack(environ), prefect_api_url=_needed(environ, "PREFECT_API_URL"))
    local.make_bucket(stack)
    target = alarms.target_of(environ)
    api = deployments.PrefectApi(str(stack.prefect_api_url), environ)
    # Of this one as well where runs are Jobs: its worker and keeper are there.
    api.make_pool()
    if pool == JOBS_POOL:
        api.make_jobs_pool(_jobs_template(project, environ))
    log = stack.home / "logs" / "deploy.log"
    deployments.deploy_all(project, log=log, environment=environ, pool=pool)
    alarms.register(api, target)
    sys.stdout.write("bucket, work pool, deployments and alarms are there\n")


def _jobs_template(project: Path, environ: Mapping[str, str]) -> dict[str, Any]:
    """What a flow run's Job looks like, with the image and the namespace of this installation."""
    path = project / "infra" / "k8s" / "components" / "jobs" / "work-pool.json"
    template = json.loads(path.read_text())
    known = template["variables"]["properties"]
    known["image"]["default"] = _needed(environ, "EQM_KUBERNETES_IMAGE")
    known["namespace"]["default"] = _needed(environ, "EQM_KUBERNETES_NAMESPACE")
    return template


def bucket(environ: Mapping[str, str]) -> None:
    """Make the bucket: a restore needs it before the servers start. Raises ServiceError."""
    stack = _stack(environ)
    local.make_bucket(stack)
    sys.stdout.write(f"bucket {stack.s3_bucket} is there\n")


def _stack(environ: Mapping[str, str]) -> Stack:
    return Stack(
        home=Path(_needed(environ, "EQM_HOME")),
        embedded=frozenset(),
        s3_endpoint=_needed(environ, "EQM_S3_ENDPOINT"),
        s3_access_key=_needed(environ, "AWS_ACCESS_KEY_ID"),
        s3_secret_key=_needed(environ, "AWS_SECRET_ACCESS_KEY"),
        s3_bucket=urlsplit(_needed(environ, "EQM_STORE")).netloc,
        s3_region=environ.get("AWS_DEFAULT_REGION", REGION),
    )


def _needed(environ: Mapping[str, str], name: str) -> str:
    value = environ.get(name)
    if not value:
        raise ServiceError(
            f"{name} is not set: `eqm secrets` makes the passwords, the rest is in config.yaml or "
            "compose.yaml, see infra/README.md"
        )
    return value


VERBS = {"s3": s3, "setup": setup, "bucket": bucket}

if __name__ == "__main__":
    try:
        VERBS[sys.argv[1] if len(sys.argv) == 2 else ""](os.environ)
    except KeyError:
        sys.exit(f"usage: python -m infra.cluster {' | '.join(VERBS)}")
    except EqmError as error:
        sys.exit(f"error: {error}")
