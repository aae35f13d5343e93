"""Who is told when nobody looks: automations of Prefect for runs that fail and models that drift.

`eqm up` makes them. Where ``EQM_ALARM_WEBHOOK`` is set they post a line of JSON there (``text`` is
what Slack and its like show); else they only leave an event, which the pages of Prefect list. An
address on this machine or in a private network is refused unless ``EQM_ALARM_PRIVATE`` is
"allow": a webhook is asked by the server, which may reach what the one who named it may not.
"""

import ipaddress
import json
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from infra.deployments import PrefectApi
from infra.stack import JOBS_POOL, POOL, ServiceError, digest_of

WEBHOOK, PRIVATE = "EQM_ALARM_WEBHOOK", "EQM_ALARM_PRIVATE"
BLOCK = "eqm-alarms"
POOLS = [POOL, JOBS_POOL]
ENDED_BADLY = ("prefect.flow-run.Failed", "prefect.flow-run.Crashed", "prefect.flow-run.TimedOut")
FIELDS = {
    # What Slack and its like show.
    "text": "automation.name ~ ': ' ~ (event.resource.name or event.resource.id)",
    "event": "event.event",
    "resource": "event.resource.id",
    "occurred": "event.occurred | string",
    "payload": "event.payload",
}
PAYLOAD = "{" + ", ".join(f'"{k}": {{{{ ({v}) | tojson }}}}' for k, v in FIELDS.items()) + "}"
"""Every value is encoded where it is put in: a run may have any name."""


@dataclass(frozen=True)
class Alarm:
    """One automation."""

    name: str
    description: str
    events: tuple[str, ...]
    resource: str
    """Id of what the events are about; ``*`` at its end stands for anything."""
    of_pool: bool = False
    """Only events about runs of our work pools."""


ALARMS = (
    Alarm(
        name="a run ended badly",
        description="A flow run failed, crashed or took too long.",
        events=ENDED_BADLY,
        resource="prefect.flow-run.*",
        of_pool=True,
    ),
    Alarm(
        name="a run is late",
        description="A flow run was due and nobody began with it: no worker, or a long queue.",
        events=("prefect.flow-run.Late",),
        resource="prefect.flow-run.*",
        of_pool=True,
    ),
    Alarm(
        name="a champion drifted",
        description="Its nightly samples differ from those of its promotion by more than chance.",
        events=("eqm.champion.drifted",),
        resource="eqm.model.*",
    ),
)


@dataclass(frozen=True)
class Target:
    """Where alarms go."""

    url: str
    private: bool
    """Whether it may be in a private network."""

    def __repr__(self) -> str:
        # The address is a secret: whoever knows it may post there.
        return f"Target({urlsplit(self.url).hostname})"


def target_of(environ: Mapping[str, str]) -> Target | None:
    """Where the environment sends alarms; None for nowhere. Raises ServiceError."""
    url, private = environ.get(WEBHOOK) or None, environ.get(PRIVATE) or None
    if private not in (None, "allow"):
        raise ServiceError(f"{PRIVATE} is {private!r}; it must be allow, or not set")
    if url is None:
        return None
    target = Target(url, private == "allow")
    _check(target)
    return target


def _check(target: Target) -> None:
    split = urlsplit(target.url)
    if split.scheme != "https" and not (split.scheme == "http" and target.private):
        raise ServiceError(f"{WEBHOOK} is no https:// address: alarms may tell names and numbers")
    if not split.hostname:
        raise ServiceError(f"{WEBHOOK} names no host")
    if target.private:
        return
    try:
        found = socket.getaddrinfo(split.hostname, split.port or 443, proto=socket.IPPROTO_TCP)
    except OSError as error:
        raise ServiceError(
            f"{WEBHOOK} names {split.hostname}, which is not found ({error}): whether it is a "
            "public host cannot be told"
        ) from error
    for *_, address in found:
        if not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global:
            raise ServiceError(
                f"{WEBHOOK} names {split.hostname}, which is {address[0]}: an address of this "
                f"machine or of a private network is asked only where {PRIVATE} is allow"
            )


def alarms_digest(environ: Mapping[str, str]) -> str:
    """Changes when the automations would have to be made again."""
    shape = json.dumps([POOLS, *[vars(alarm) for alarm in ALARMS]]) + PAYLOAD
    return digest_of([shape, environ.get(WEBHOOK) or "", environ.get(PRIVATE) or ""])


def register(api: PrefectApi, target: Target | None) -> None:
    """Make the automations, or make them as they should be now. Raises ServiceError."""
    action: dict[str, Any] = {"type": "do-nothing"}
    if target is not None:
        block = api.make_block(
            BLOCK,
            kind="webhook",
            data={
                "method": "POST",
                "url": target.url,
                "headers": {"Content-Type": "application/json"},
                # Asked again at every call, whatever the name leads to then.
                "allow_private_urls": target.private,
                "verify": True,
            },
        )
        action = {"type": "call-webhook", "block_document_id": block, "payload": PAYLOAD}
    for alarm in ALARMS:
        api.make_automation(_automation(alarm, action))


def _automation(alarm: Alarm, action: Mapping[str, Any]) -> dict[str, Any]:
    pool = {"prefect.resource.role": "work-pool", "prefect.resource.name": POOLS}
    return {
        "name": f"eqm: {alarm.name}",
        "description": alarm.description,
        "enabled": True,
        "trigger": {
            "type": "event",
            "posture": "Reactive",
            "expect": list(alarm.events),
            "match": {"prefect.resource.id": alarm.resource},
            "match_related": pool if alarm.of_pool else {},
            "for_each": ["prefect.resource.id"],
            "threshold": 1,
            "within": 0,
        },
        "actions": [action],
    }
