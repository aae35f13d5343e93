"""Errors that a person can act upon.

Every error a user can cause is an :class:`EqmError` whose message names the value, the place and
the remedy; programs print it as one paragraph and exit with 2. Anything else is a defect of ours
and keeps its traceback.
"""

EXIT_REFUSED = 2
"""Exit status when the reason is one that a person can mend; its message is on stderr."""


class EqmError(Exception):
    """Base of all errors that are told to a person without a traceback."""


class ConfigError(EqmError, ValueError):
    """A configuration value is unknown, of the wrong type or out of range."""


def require(ok: bool, name: str, value: object, rule: str) -> None:
    """Refuse a value in words: its name, itself, and the rule it breaks. Raises ConfigError."""
    if not ok:
        raise ConfigError(f"{name} is {value!r}; it must be {rule}")


class DataError(EqmError, ValueError):
    """The user's images, shards or manifests cannot be used as they are."""


class OtherImagesError(DataError):
    """An image is not there, or not the one that was listed: which, and then what it may mean."""

    def __str__(self) -> str:
        return ": ".join(map(str, self.args))


class DivergedError(DataError):
    """A training or its samples ran off to infinity, and would again: it is what was asked for.

    ``facts`` are kept beside the message, as JSON.
    """

    def __init__(self, message: str, **facts: object) -> None:
        super().__init__(message)
        self.facts = facts


class IntegrityError(EqmError):
    """Bytes do not match the digest under which they were sealed."""


class StoreError(EqmError):
    """The store cannot be reached, refuses us, or is full."""


class MissingError(StoreError):
    """The store works, but the object is not there."""


class TrackingError(EqmError):
    """MLflow cannot be reached or refuses a call."""


class PeerError(EqmError):
    """Another rank does not come, or is gone."""


class ReplicaError(EqmError):
    """Ranks that must hold the same bits do not."""


class StageError(EqmError):
    """A stage program failed; the message is the stage's own."""


class AwayError(StoreError):
    """The store does not answer, or fails: it may be there again in a while."""


class TransferError(StoreError):
    """A transfer broke off on the way; it may be tried again."""
