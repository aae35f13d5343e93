"""What holds pods up, from objects as API servers give them."""

from typing import Any

import pytest

from flows.pods import WAITING, fates_of, phase, what_holds_up

CREATED = "2026-01-01T00:00:00Z"
PULL = 'Back-off pulling image "registry.example/eqm:1.0"'


def pod(*, waiting: dict[str, Any] | None = None, init: dict[str, Any] | None = None) -> Any:
    """A pod that was given a node, with the states of its two containers."""
    return {
        "metadata": {"name": "it-node-0-0-abcde"},
        "status": {
            "phase": "Pending",
            "conditions": [{"type": "PodScheduled", "status": "True"}],
            "initContainerStatuses": [{"name": "before", "state": {"waiting": init}}],
            "containerStatuses": [{"name": "node", "state": {"waiting": waiting}}],
        },
    }


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"reason": "ImagePullBackOff", "message": PULL}, [f"ImagePullBackOff ({PULL})"]),
        ({"reason": "CreateContainerConfigError"}, ["CreateContainerConfigError"]),
        ({"reason": "ContainerCreating"}, []),
        ({"reason": "PodInitializing"}, []),
        (None, []),
    ],
)
def test_a_container_that_does_not_start_says_why(
    state: dict[str, Any] | None, why: list[str]
) -> None:
    assert what_holds_up([pod(waiting=state)], [], since=CREATED) == why
    assert what_holds_up([pod(init=state)], [], since=CREATED) == why


def test_many_pods_with_one_reason_say_it_once() -> None:
    pods = [pod(waiting={"reason": "ErrImagePull", "message": PULL})] * 16
    assert what_holds_up(pods, [], since=CREATED) == [f"ErrImagePull ({PULL})"]


def test_events_count_from_the_creation_on_the_newest_first() -> None:
    events = [
        {"reason": "Old", "lastTimestamp": "2025-12-31T23:59:59Z"},
        {"reason": "FailedMount", "lastTimestamp": "2026-01-01T00:01:00Z"},
        # The scheduler fills in other fields than controllers do.
        {"reason": "FailedScheduling", "lastTimestamp": None, "eventTime": "2026-01-01T00:02:00Z"},
        {
            "reason": "Again",
            "eventTime": "2025-12-31T00:00:00Z",
            "series": {"lastObservedTime": "2026-01-01T00:03:00.000000Z"},
        },
        {"reason": "Timeless"},
    ]
    assert what_holds_up([], events, since=CREATED) == ["Again", "FailedScheduling", "FailedMount"]


def test_what_was_just_created_has_no_status() -> None:
    assert what_holds_up([{"metadata": {"name": "it"}}], [], since=CREATED) == []
    assert phase({"metadata": {"name": "it"}}) == WAITING


def test_the_fate_of_a_pod_without_words() -> None:
    killed = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
    [fate] = fates_of({"status": {"containerStatuses": [{"state": {}, "lastState": killed}]}})
    assert fate.startswith("OOMKilled (it needed more memory than it may have: raise EQM_PROC")
    full = "Usage of EmptyDir volume exceeds the limit 50Gi."
    evicted = {"status": {"phase": "Failed", "reason": "Evicted", "message": full}}
    assert fates_of(evicted) == [f"Evicted ({full})"]
    plain = {"terminated": {"exitCode": 1, "reason": "Error"}}
    assert fates_of({"status": {"containerStatuses": [{"state": plain}]}}) == []
