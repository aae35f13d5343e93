"""How a person names what is sealed: by its address, or by the first digits of its digest."""

from typing import Any


def sealed_digests(store: Any, stage: str, digits: str = "") -> list[str]:
    """Digests of all records of a stage in a store, or of those that begin so."""
    return [
        place.removeprefix(f"{stage}/")
        for place in store.folders(f"{stage}/{digits}")
        if store.exists(f"{place}/record.json")
    ]


def sealed_by_digits(store: Any, stage: str, digits: str) -> Any:
    """The record whose digest begins so; None where none does. Raises ConfigError for several."""
    from eqm.errors import ConfigError

    found = sealed_digests(store, stage, digits)
    if len(found) > 1:
        raise ConfigError(f"{digits} begins {len(found)} digests of {store.uri}: give more digits")
    return store.record(stage, found[0]) if found else None


def store_at(address: str) -> Any:
    """The store that an address of something in it begins with."""
    from eqm.storage import open_store
    from flows.settings import activate

    settings = activate()
    cache = settings.home / "cache"
    return open_store(address, cache=cache, cache_bytes=settings.cache_bytes)


def open_sealed(name: str, stage: str) -> tuple[Any, Any]:
    """Store and record of ``<store>/<stage>/<digest>``, or of first digits in EQM_STORE.

    Raises ConfigError for an address of something else, DataError for what is not there.
    """
    from eqm.errors import ConfigError, DataError
    from flows.plan import store_of
    from flows.settings import activate

    if "/" not in name:
        store = store_of(activate())
        record = sealed_by_digits(store, stage, name)
    else:
        place, kind, digest = f"//{name.rstrip('/').removesuffix('/record.json')}".rsplit("/", 2)
        if kind != stage or not place.strip("/"):
            raise ConfigError(f"{name} is no address of {stage}: give <store>/{stage}/<digest>")
        store = store_at(place[2:])
        record = store.record(stage, digest)
    if record is None:
        raise DataError(f"{name} is not sealed in {store.uri}: there is no such {stage} there")
    return store, record
