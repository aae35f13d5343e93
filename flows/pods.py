"""What Kubernetes knows of a TrainJob and its pods, in words."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WAITING = "waiting for its pods"
ON_ITS_WAY = frozenset(("ContainerCreating", "PodInitializing"))
"""What every container says before it starts."""

MEMORY = "OOMKilled (it needed more memory than it may have: raise EQM_PROCESS_MEMORY)"


def _conditions(there: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = (there.get("status") or {}).get("conditions") or []
    return [condition for condition in found if condition.get("status") == "True"]


def ended(there: Mapping[str, Any]) -> dict[str, Any] | None:
    """The condition by which a TrainJob is over; None while it is not."""
    found = [c for c in _conditions(there) if c.get("type") in ("Complete", "Failed")]
    return found[0] if found else None


def is_going(there: Mapping[str, Any]) -> bool:
    """Whether an object is being deleted; it is there until what it owns has gone."""
    return bool(there["metadata"].get("deletionTimestamp"))


def said(condition: Mapping[str, Any]) -> str:
    """A condition of failure, in words."""
    return f"failed ({condition.get('reason', '')}: {condition.get('message', '')})"


def phase(there: Mapping[str, Any]) -> str:
    """What a TrainJob is doing."""
    end = ended(there)
    if end is not None:
        return "complete" if end["type"] == "Complete" else said(end)
    if any(condition.get("type") == "Suspended" for condition in _conditions(there)):
        return "suspended: waiting for its turn"
    jobs = (there.get("status") or {}).get("jobsStatus") or []
    ready = sum(job.get("ready", 0) for job in jobs)
    return "running" if ready else WAITING


def last_words(pod: Mapping[str, Any]) -> list[str]:
    """Termination messages of the containers of a pod that failed."""
    return [s["message"].strip() for s in _ends(pod) if s.get("exitCode") and s.get("message")]


def fates_of(pod: Mapping[str, Any]) -> list[str]:
    """What was done to a pod that had no last words: killed for its memory, evicted."""
    status = pod.get("status") or {}
    killed = [MEMORY for end in _ends(pod) if end.get("reason") == "OOMKilled"]
    return killed + ([_reason(status)] if status.get("reason") else [])


def _ends(pod: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        (status.get(when) or {}).get("terminated") or {}
        for status in (pod.get("status") or {}).get("containerStatuses") or []
        for when in ("state", "lastState")
    ]


def what_holds_up(
    pods: Iterable[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], *, since: str
) -> list[str]:
    """Why pods do not run: no node for them, no image, no quota, no volume. Each reason once.

    Of ``events``, which outlive what they are about, those from ``since`` on (ISO 8601, UTC).
    """
    found = [reason for pod in pods for reason in _of_pod(pod)]
    recent = [event for event in events if _time(event) >= since]
    found += [_reason(event) for event in sorted(recent, key=_time, reverse=True)]
    return list(dict.fromkeys(found))


def _of_pod(pod: Mapping[str, Any]) -> list[str]:
    status = pod.get("status") or {}
    unplaced = [
        _reason(condition)
        for condition in status.get("conditions") or []
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False"
    ]
    containers = (
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    )
    waiting = [(each.get("state") or {}).get("waiting") or {} for each in containers]
    return unplaced + [_reason(w) for w in waiting if w and w.get("reason") not in ON_ITS_WAY]


def _reason(told: Mapping[str, Any]) -> str:
    reason, message = str(told.get("reason") or ""), str(told.get("message") or "").strip()
    return f"{reason} ({message})" if message else reason


def _time(event: Mapping[str, Any]) -> str:
    """When an event was last seen: controllers and the scheduler fill in different fields."""
    series = event.get("series") or {}
    seen = event.get("lastTimestamp") or series.get("lastObservedTime") or event.get("eventTime")
    return str(seen or "")
