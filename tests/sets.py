"""Sealed sets of latents for tests."""

from collections.abc import Sequence
from typing import Any

from eqm.records import LatentSpec, Manifest, Record, Ref, Shard, canonical_bytes
from eqm.shards import Sample, read_index, seal_set, write_shard
from eqm.storage import LocalStore, Store


def a_spec(shape: tuple[int, int, int], **changes: Any) -> LatentSpec:
    """Spec of latents (C, H, W) that nothing whitens."""
    channels = shape[0]
    values = {
        "autoencoder": "test",
        "image_size_px": shape[1],
        "image_channels": 1,
        "shape": shape,
        "shift": (0.0,) * channels,
        "scale": (1.0,) * channels,
    }
    return LatentSpec(**{**values, **changes})


def stored_set(
    store: Store, samples: Sequence[Sample], shard_images: int, *, classes: tuple[str, ...]
) -> dict[str, bytes]:
    """Store samples as shards, and what is sealed beside them; returns its files."""
    shards, indices = [], []
    for first in range(0, len(samples), shard_images):
        made = write_shard(samples[first : first + shard_images], first_number=first)
        shard = Shard(tar=store.put(made.tar), index=store.put(made.index), count=made.count)
        shards.append(shard)
        indices.append(read_index(made.index, shard, "a shard"))
    channels, *size = samples[0].moments.shape
    sealed = seal_set(
        shards,
        indices,
        spec=a_spec((channels // 2, *size)),  # type: ignore[arg-type]
        source="s",
        classes=classes,
        mirrored=samples[0].mirror is not None,
        lineage={"autoencoder": Ref(stage="autoencoder", digest="a", content="b")},
    )
    for data in sealed.files.values():
        store.put(data)
    return sealed.files


def seal(store: LocalStore, manifest: Manifest) -> Record:
    """A "latents" record with this manifest."""
    blob = store.put(canonical_bytes(manifest))
    outputs = {"manifest.json": blob, "index.safetensors": manifest.index}
    record = Record(stage="latents", algorithm=1, config={}, inputs={}, outputs=outputs, values={})
    return store.seal(record)
