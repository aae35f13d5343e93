"""The public face: a trained model, how to load it, how to sample from it.

    model = eqm.load("s3://eqm/store/train/<digest>")   # or models:/name@champion, or a directory
    out = eqm.sample(model, labels=labels, seeds=range(64), updates=249)
    out.images()

Whatever is loaded has been checked against its digests first.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from eqm import checkpoint, field, sampler
from eqm.autoencoder import Autoencoder, load_autoencoder
from eqm.config import NetworkConfig, ObjectiveConfig, SamplerConfig
from eqm.distributed import pick_device
from eqm.errors import ConfigError, DataError, IntegrityError
from eqm.network import Transformer
from eqm.records import LatentSpec, Record, from_json, sha256, to_json
from eqm.registry import Registry, Version, default_uri
from eqm.stage import open_ref
from eqm.storage import Store, open_store

SCHEMA = "eqm-model/1"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """All but the weights: model.json."""

    schema: str
    network: NetworkConfig
    objective: ObjectiveConfig
    latent: LatentSpec
    classes: tuple[str, ...]
    null_label: bool
    """Whether it was trained with label dropout, so that guidance and unlabelled scores work."""

    def build(self) -> Transformer:
        """The network with its initial weights (overwrite or initialise them)."""
        channels, height, width = self.latent.shape
        if height != width:
            raise ConfigError(f"latents are {height} x {width}; the network takes square ones")
        try:
            return Transformer(
                self.network, size=height, channels=channels, classes=len(self.classes)
            )
        except ValueError as error:
            raise ConfigError(f"network: {error}") from error


class Model:
    """A gradient field on latents, with the autoencoder that its latents belong to."""

    def __init__(
        self, spec: ModelSpec, net: torch.nn.Module, *, autoencoder: Callable[[], Autoencoder]
    ) -> None:
        self.spec = spec
        self.network = net.eval().requires_grad_(False)
        self.field = field.Field(cast("field.Network", net), energy=spec.objective.energy)
        self._open_autoencoder = autoencoder

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """Pixels <-> latents; opened when first needed."""
        return self._open_autoencoder().to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and latents."""
        return next(self.network.parameters()).dtype

    def to(self, *args: object, **kwargs: object) -> "Model":
        """Move or convert the weights, as in torch; returns this model."""
        self.network.to(*args, **kwargs)  # type: ignore[arg-type]
        return self

    def gradient(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Gradient at latents x (B, C, H, W): points from data to noise; the same shape.

        ``labels`` (B,) int64; None takes the null label. Raises DataError for what does not fit.
        """
        return self.field.gradient(x, self.checked_labels(x, labels))

    def energy(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Energy at latents x, (B,): rises toward noise. Raises ValueError for implicit models."""
        return self.field.energy(x, self.checked_labels(x, labels))

    def checked_labels(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """Labels that fit x, the null label where none are given. Raises DataError."""
        if tuple(x.shape[1:]) != self.spec.latent.shape:
            raise DataError(
                f"latents have shape {tuple(x.shape)}; this model takes (B, "
                f"{', '.join(map(str, self.spec.latent.shape))})"
            )
        classes = len(self.spec.classes)
        if labels is None:
            if not self.spec.null_label:
                raise DataError(
                    "this model was trained without label dropout, so it has no null label: "
                    "give labels"
                )
            return torch.full((len(x),), classes, dtype=torch.int64, device=x.device)
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise DataError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}; give (B,) int64"
            )
        wrong = labels[(labels < 0) | (labels > classes - (not self.spec.null_label))]
        if len(labels) != len(x) or len(wrong):
            odd = f"label {int(wrong[0])}" if len(wrong) else f"{len(labels)} labels"
            raise DataError(f"{odd} for {len(x)} latents; labels go from 0 to {classes - 1}")
        return labels.to(x.device)

    def save(self, folder: str | Path) -> None:
        """Write a directory that :func:`load` reads, with digests; refuses one that exists."""
        from eqm.autoencoder import autoencoder_to_bytes

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=False)
        files = {
            "model.json": spec_to_bytes(self.spec),
            "ema.safetensors": checkpoint.tensors_to_bytes(self.network.state_dict()),
            **autoencoder_to_bytes(self.autoencoder),
        }
        for name, data in files.items():
            (folder / name).write_bytes(data)
        digests = {name: sha256(data) for name, data in files.items()}
        (folder / "digests.json").write_text(json.dumps(digests, indent=1, sort_keys=True) + "\n")


# -- loading ------------------------------------------------------------------------------------


def load(
    uri: str | Path,
    *,
    weights: str = "ema",
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    mlflow_uri: str | None = None,
    cache: Path | None = None,
) -> Model:
    """Load a trained model; every file is checked against its digest before it is parsed.

    ``uri``: a sealed training record (``<store>/train/<digest>``, local or s3://), a directory made
    by :meth:`Model.save`, or ``models:/name@alias`` (``models:/name/3``) of the MLflow at
    ``mlflow_uri`` (None: MLflow's own MLFLOW_TRACKING_URI). ``weights``: "ema" or "raw". Raises
    ConfigError, StoreError, IntegrityError.
    """
    if weights not in ("ema", "raw"):
        raise ConfigError(f"weights is {weights!r}; it must be 'ema' or 'raw'")
    uri = str(uri)
    if uri.startswith("models:/"):
        model = _from_registry(uri, mlflow_uri, weights=weights, cache=cache)
    elif (Path(uri) / "digests.json").is_file():
        if weights != "ema":
            raise ConfigError(
                f"weights is {weights!r}, but directory {uri} holds averaged weights alone: load "
                "the training record for others"
            )
        model = _from_folder(Path(uri))
    else:
        store, record = open_record(uri, cache=cache)
        model = from_record(store, record, weights=weights)
    return model.to(pick_device(device), dtype)


def open_record(uri: str, *, cache: Path | None = None) -> tuple[Store, Record]:
    """Store and record of ``<store>/<stage>/<digest>``. Raises ConfigError, StoreError."""
    parts = uri.rstrip("/").removesuffix("/record.json").rsplit("/", 2)
    if len(parts) != 3 or len(parts[2]) != 64:
        raise ConfigError(
            f"{uri!r} is no model: give <store>/train/<digest>, a directory made by Model.save, "
            "or models:/<name>@champion"
        )
    store = open_store(parts[0], cache=cache)
    record = store.record(parts[1], parts[2])
    if record is None:
        raise DataError(f"{uri} is not sealed: there is no record.json")
    return store, record


def from_record(store: Store, record: Record, *, weights: str = "ema") -> Model:
    """Model of a sealed training record."""
    if record.stage != "train":
        raise ConfigError(f"{record.stage} {record.digest[:12]} is no trained model")
    spec = spec_from_bytes(store.get(record.outputs["model.json"]), record.digest[:12])
    name = {"ema": "ema.safetensors", "raw": "raw.safetensors"}[weights]
    tensors = checkpoint.tensors_from_bytes(store.get(record.outputs[name]))

    def autoencoder() -> Autoencoder:
        latents = open_ref(store, record.inputs["latents"])
        return load_autoencoder(open_ref(store, latents.inputs["autoencoder"]), store)

    return Model(spec, filled(spec.build(), tensors, name), autoencoder=autoencoder)


def _from_folder(folder: Path) -> Model:
    from eqm.autoencoder import autoencoder_from_bytes

    try:
        digests = json.loads((folder / "digests.json").read_text())
    except ValueError as error:
        raise IntegrityError(f"{folder / 'digests.json'} is damaged: restore it") from error
    missing = [name for name in digests if not (folder / name).is_file()]
    if missing:
        raise IntegrityError(f"{folder}: {', '.join(missing)} is missing: restore the directory")
    files = {name: (folder / name).read_bytes() for name in digests}
    for name, data in files.items():
        if sha256(data) != digests[name]:
            raise IntegrityError(f"{folder / name} does not match digests.json: it is damaged")
    spec = spec_from_bytes(files.pop("model.json"), str(folder))
    tensors = checkpoint.tensors_from_bytes(files.pop("ema.safetensors"))
    net = filled(spec.build(), tensors, str(folder / "ema.safetensors"))
    return Model(spec, net, autoencoder=lambda: autoencoder_from_bytes(files))


def _from_registry(uri: str, mlflow_uri: str | None, *, weights: str, cache: Path | None) -> Model:
    """Model of a registered version; the record it points to must be the one it was made for."""
    version = _version(uri, mlflow_uri or default_uri())
    store, record = open_record(version.source, cache=cache)
    promised = version.tags.get("eqm.content")
    if record.content != promised:
        raise IntegrityError(
            f"{uri}: version {version.number} was registered for content {promised}, but "
            f"{version.source} holds {record.content}: one of them was changed; register again"
        )
    return from_record(store, record, weights=weights)


def _version(uri: str, mlflow_uri: str) -> Version:
    registry = Registry(mlflow_uri)
    name, at, alias = uri.removeprefix("models:/").partition("@")
    if at:
        version = registry.by_alias(name, alias)
        if version is None:
            raise DataError(f"{uri}: model {name!r} has no alias {alias!r} in {mlflow_uri}")
        return version
    name, _, number = name.partition("/")
    if not number.isdigit():
        raise ConfigError(f"{uri!r} names no version: models:/name@alias or models:/name/3")
    return registry.by_number(name, int(number))


def filled(net: torch.nn.Module, tensors: dict[str, Tensor], where: str) -> torch.nn.Module:
    """Put weights into a network; missing, extra and misshapen ones are refused by name."""
    expected = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise IntegrityError(
                f"{where}: weight {name} has shape {found.get(name, 'none')}, "
                f"this network has {expected.get(name, 'none')}"
            )
    net.load_state_dict(tensors)
    return net


def spec_to_bytes(spec: ModelSpec) -> bytes:
    """model.json."""
    return json.dumps(to_json(spec), indent=1, sort_keys=True).encode()


def spec_from_bytes(data: bytes, where: str) -> ModelSpec:
    """Read model.json. Raises ConfigError."""
    spec = from_json(ModelSpec, json.loads(data), where)
    if spec.schema != SCHEMA:
        raise ConfigError(f"{where} is of schema {spec.schema!r}; this program reads {SCHEMA!r}")
    return spec


# -- sampling -----------------------------------------------------------------------------------


def rule_of(config: SamplerConfig) -> sampler.Rule:
    """The descent rule that a config names."""
    if config.rule == "gd":
        return sampler.GradientDescent(step_size=config.step_size)
    return sampler.NAG(step_size=config.step_size, momentum=config.momentum)


@dataclass(frozen=True)
class Samples:
    """What a descent found."""

    latents: Tensor
    """(B, C, H, W), in the dtype of the model."""
    evaluations: Tensor
    """(B,) field evaluations of each sample."""
    gradient_norms: Tensor
    """(B,) norm of the last gradient of each."""
    diverged: Tensor
    """(B,) samples that blew up; their latents are not samples."""
    model: Model

    def images(self) -> Tensor:
        """Decode to uint8 (B, C, H, W)."""
        return self.model.autoencoder.decode(self.latents.float())


def sample(
    model: Model,
    *,
    labels: Tensor | Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    start: Tensor | None = None,
    rule: sampler.Rule | None = None,
    updates: int = 249,
    guidance: float = 1.0,
    guidance_channels: int | None = None,
    stop: sampler.GradientNormBelow | None = None,
    on_update: Callable[[int, Tensor], None] | None = None,
) -> Samples:
    """Find samples by descent (section 3.3) from noise, or from ``start`` (B, C, H, W).

    Sample s of ``seeds`` begins at noise that is a function of s alone; ``labels`` (B,) int64,
    None for the null label. ``rule`` is NAG(0.003, 0.3) unless given. Raises DataError.
    """
    if (seeds is None) == (start is None):
        raise DataError("give either seeds or start")
    if start is None:
        numbers = torch.tensor(list(seeds or ()), dtype=torch.int64, device=model.device)
        start = sampler.start_noise(
            numbers, model.spec.latent.shape, dtype=model.dtype, device=model.device
        )
    given = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    checked = model.checked_labels(start, given)
    if guidance != 1.0 and not model.spec.null_label:
        raise DataError("guidance needs a null label, and this model was trained without dropout")
    found = sampler.descend(
        field.guided(model.field, checked, scale=guidance, channels=guidance_channels),
        start,
        rule=rule or sampler.NAG(step_size=0.003, momentum=0.3),
        updates=updates,
        stop=stop,
        on_update=on_update,
    )
    return Samples(found.latents, found.evaluations, found.gradient_norms, found.diverged, model)
