"""The public face: a trained model, and how to load it. eqm.sampling samples from it.

    model = eqm.load("s3://eqm/store/train/<digest>")   # or models:/name@champion, or a directory
    model = eqm.load("official.pt", energy="dot")       # a checkpoint of the official code
    model.gradient(x, labels)                           # points from data to noise

Whatever is sealed is checked against its digests first; a foreign file is read without executing
anything in it.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from eqm import checkpoint, field
from eqm.autoencoder import Autoencoder, for_latents, load_autoencoder
from eqm.config import NetworkConfig, ObjectiveConfig
from eqm.distributed import pick_device
from eqm.ema import Reconstruction, plan_reconstruction, weighted_sum
from eqm.errors import ConfigError, DataError, IntegrityError
from eqm.learner import number_name
from eqm.network import Transformer, check_gamma, uncompiled
from eqm.official import import_official, read_official
from eqm.records import Blob, LatentSpec, Record, from_json, sha256, to_json
from eqm.registry import Registry, Version, default_uri
from eqm.stage import open_ref
from eqm.storage import Store, open_store
from eqm.words import counted

if TYPE_CHECKING:
    from eqm.unet import UNet

SCHEMA = "eqm-model/1"
NO_AUTOENCODER = "none"
"""What latents of a model that was trained in memory are of."""
SD_VAE = "SD-VAE, not verified"
"""What latents of official checkpoints are of; which file it was, nobody says."""
Labels: TypeAlias = Tensor | Sequence[int]
"""(B,) int64."""
FURTHER = ("ema-", "power-")
"""How the names of averages begin that a training leaves beside the main ones."""
SD_VAE_SCALE = 0.18215
"""Of the latents that the official checkpoints were trained on."""
SD_VAE_PIXELS = 8
"""Pixels on a side of what one of those latents stands for."""


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

    def build(self) -> "Transformer | UNet":
        """The network with its initial weights (overwrite or initialise them).

        Raises ConfigError for latents that it does not fit.
        """
        channels, height, width = self.latent.shape
        shape = {"size": (height, width), "channels": channels}
        try:
            return _kind(self.network)(self.network, **shape, classes=len(self.classes) or None)
        except ValueError as error:
            raise ConfigError(f"network: {error}") from error


def _kind(config: NetworkConfig) -> "type[Transformer] | type[UNet]":
    if config.kind == "transformer":
        return Transformer
    from eqm.unet import UNet

    return UNet


class Model:
    """A gradient field on latents, with the autoencoder that its latents belong to.

    ``autoencoder`` opens it when it is first needed; None where nobody knows it. A compiled ``net``
    computes the field, and ``network`` is what it was compiled from.
    """

    def __init__(
        self,
        spec: ModelSpec,
        net: torch.nn.Module,
        *,
        autoencoder: Callable[[], Autoencoder] | None = None,
    ) -> None:
        self.spec = spec
        self.network = uncompiled(net).eval().requires_grad_(False)
        self.field = field.Field(cast("field.Network", net), energy=spec.objective.energy)
        self._open_autoencoder = autoencoder

    @staticmethod
    def of(
        network: "Transformer | UNet",
        *,
        objective: ObjectiveConfig,
        null_label: bool = True,
        autoencoder: Autoencoder | None = None,
    ) -> "Model":
        """Model of a network that was trained in memory, as :func:`eqm.learn` does.

        ``objective`` is the one it was trained with: it says how the weights are to be read.
        Without ``autoencoder`` its latents are taken for what they are: nothing can be decoded.
        """
        channels, height, _ = network.shape
        plain = LatentSpec(
            autoencoder=NO_AUTOENCODER,
            image_size_px=height,
            image_channels=channels,
            shape=network.shape,
            shift=(0.0,) * channels,
            scale=(1.0,) * channels,
        )
        spec = ModelSpec(
            schema=SCHEMA,
            network=network.config,
            objective=objective,
            latent=plain if autoencoder is None else autoencoder.spec,
            classes=tuple(map(str, range(network.classes or 0))),
            null_label=null_label,
        )
        return Model(
            spec, network, autoencoder=None if autoencoder is None else lambda: autoencoder
        )

    @functools.cached_property
    def autoencoder(self) -> Autoencoder:
        """Pixels <-> latents; opened when first needed. Raises DataError where there is none."""
        if self._open_autoencoder is None:
            raise DataError(
                f"this model came without its autoencoder ({self.spec.latent.autoencoder}), so "
                "latents cannot be decoded: give model.with_autoencoder(...) one, 'identity' for "
                "pixels, or `eqm import-official --autoencoder` the folder of SD-VAE"
            )
        return self._open_autoencoder().to(self.device)

    def with_autoencoder(self, autoencoder: "Autoencoder | str | Path") -> "Model":
        """This model, and what decodes its latents: for one that came without, or with another.

        An autoencoder, or where one lies (:func:`eqm.autoencoder.for_latents`). Raises ConfigError
        for one whose latents mean something else, and DataError.
        """
        latent = self.spec.latent
        given = for_latents(autoencoder, latent.shape)
        wrong = list(_other_latents(latent, given.spec))
        if wrong:
            raise ConfigError(
                f"the autoencoder makes other latents than those of the model: {'; '.join(wrong)}. "
                "Give the one that it was trained on"
            )
        spec = dataclasses.replace(self.spec, latent=given.spec)
        return Model(spec, cast("torch.nn.Module", self.field.network), autoencoder=lambda: given)

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

    def gradient(
        self, x: Tensor, labels: Labels | None = None, gamma: Tensor | None = None
    ) -> Tensor:
        """Gradient at latents x (B, C, H, W): points from data to noise; the same shape.

        ``labels`` (B,) int64 or a list; None takes the null label. ``gamma`` (B,) is for baselines
        that are conditioned on it. The true gradient of the energy, where that is explicit. Raises
        DataError for what does not fit or is not finite.
        """
        return self.field.gradient(*self.checked(x, labels, gamma))

    def energy(
        self, x: Tensor, labels: Labels | None = None, gamma: Tensor | None = None
    ) -> Tensor:
        """Energy at latents x, (B,): rises toward noise. Raises ValueError for implicit models."""
        with torch.no_grad():
            return self.field.energy(*self.checked(x, labels, gamma))

    def gradient_of(
        self, labels: Tensor | None, *, guidance: float = 1.0, channels: int | None = None
    ) -> field.Gradient:
        """The gradient of samples with these labels, as a function of x: what is descended.

        Raises DataError for guidance of a model without a null label.
        """
        if guidance != 1.0 and not self.spec.null_label:
            raise DataError(
                "guidance needs a null label, and this model was trained without label dropout"
            )
        return field.guided(self.field, labels, scale=guidance, channels=channels)

    def checked(
        self, x: Tensor, labels: Labels | None, gamma: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Latents, labels and levels as they were given, if they fit. Raises DataError."""
        self.check_latents(x)
        if self.field.conditioned and gamma is None:
            raise DataError("this model is conditioned on the noise level: give gamma (B,)")
        if gamma is not None:
            check_gamma(gamma, len(x))
        found = self.checked_labels(len(x), labels)
        return x.to(self.device), found, None if gamma is None else gamma.to(self.device)

    def check_latents(self, x: Tensor) -> None:
        """Refuse latents of another shape or dtype, or that are not finite. Raises DataError."""
        if x.dim() != 4 or tuple(x.shape[1:]) != self.spec.latent.shape:
            raise DataError(
                f"latents have shape {tuple(x.shape)}; this model takes (B, "
                f"{', '.join(map(str, self.spec.latent.shape))})"
            )
        if x.dtype != self.dtype:
            raise DataError(
                f"latents are {x.dtype}, and this model's weights {self.dtype}: convert one of "
                "them, as x.to(model.dtype)"
            )
        odd = (~x.flatten(1).isfinite().all(dim=1)).nonzero()
        if len(odd):
            raise DataError(f"latent {int(odd[0])} of {len(x)} has NaN or infinite entries")

    def checked_labels(self, count: int, labels: Labels | None) -> Tensor | None:
        """Labels for so many latents, the null label where none are given. Raises DataError."""
        classes = len(self.spec.classes)
        if labels is None:
            if classes and not self.spec.null_label:
                raise DataError(
                    "this model was trained without label dropout, so it has no null label: "
                    "give labels"
                )
            null = torch.full((count,), classes, dtype=torch.int64, device=self.device)
            return null if classes else None
        if not classes:
            raise DataError("this model was trained without labels: leave them out")
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"labels are no whole numbers ({error}): give (B,) int64") from error
        if labels.dtype != torch.int64 or labels.dim() != 1:
            raise DataError(
                f"labels are {labels.dtype} of shape {tuple(labels.shape)}; give (B,) int64"
            )
        wrong = labels[(labels < 0) | (labels > classes - (not self.spec.null_label))]
        if len(wrong):
            raise DataError(
                f"label {int(wrong[0])} is given, and labels of this model go from 0 to "
                f"{classes - 1}"
            )
        if len(labels) != count:
            given, latents = counted(len(labels), "label"), counted(count, "latent")
            raise DataError(f"{given} for {latents}: give one each")
        return labels.to(self.device)

    def save(self, folder: str | Path) -> None:
        """Write a directory that :func:`load` reads, with digests.

        The autoencoder goes with it, where there is one. Raises ConfigError for what exists.
        """
        from eqm.autoencoder import autoencoder_to_bytes

        folder = Path(folder)
        if folder.exists():
            raise ConfigError(f"{folder} exists: name a directory that does not")
        folder.mkdir(parents=True)
        files = {
            "model.json": spec_to_bytes(self.spec),
            "ema.safetensors": checkpoint.tensors_to_bytes(self.network.state_dict()),
            **(autoencoder_to_bytes(self.autoencoder) if self._open_autoencoder else {}),
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
    energy: field.Energy | None = None,
    num_heads: int | None = None,
    flow_matching: bool = False,
    autoencoder: Autoencoder | str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    mlflow_uri: str | None = None,
    cache: Path | None = None,
) -> Model:
    """Load a trained model; every sealed file is checked against its digest before it is parsed.

    ``uri``: a sealed training record (``<store>/train/<digest>``, local or s3://), a directory made
    by :meth:`Model.save`, ``models:/name@alias`` (``models:/name/3``) of the MLflow at
    ``mlflow_uri`` (None: MLflow's own MLFLOW_TRACKING_URI), or a ``.pt`` of the official code.
    ``weights``: "ema" or "raw", or of a sealed record one of its further averages: "ema-20000" for
    a half-life of train.ema_tracks, "power-0.05" for a sigma_rel of train.ema_power.

    An official file holds no config: ``energy`` says how its weights are to be read (None:
    "implicit"), ``num_heads`` is needed for widths that the paper has not, ``flow_matching`` reads
    a SiT, and ``autoencoder`` decodes its latents: one, or the folder of SD-VAE that diffusers
    wrote (:meth:`Model.with_autoencoder`). Raises ConfigError, DataError,
    StoreError, IntegrityError.
    """
    if weights not in ("ema", "raw") and not weights.startswith(FURTHER):
        raise ConfigError(
            f"weights is {weights!r}; it must be 'ema' or 'raw', or the name of a further average, "
            "as 'ema-20000' or 'power-0.05'"
        )
    uri = str(uri)
    if uri.lower().endswith(".pt"):
        model = from_official(
            uri,
            weights=weights,
            energy="implicit" if energy is None else energy,
            num_heads=num_heads,
            flow_matching=flow_matching,
        )
    elif energy or num_heads or flow_matching:
        raise ConfigError(
            f"{uri} says itself how it is to be read: energy, num_heads and flow_matching are for "
            ".pt files of the official code"
        )
    else:
        model = _from_sealed(uri, weights=weights, mlflow_uri=mlflow_uri, cache=cache)
    if autoencoder is not None:
        model = model.with_autoencoder(autoencoder)
    return model.to(pick_device(device), dtype)


def _from_sealed(uri: str, *, weights: str, mlflow_uri: str | None, cache: Path | None) -> Model:
    if uri.startswith("models:/"):
        return from_record(*_registered(uri, mlflow_uri, cache=cache), weights=weights)
    if any((Path(uri) / name).is_file() for name in ("digests.json", "model.json")):
        if weights != "ema":
            raise ConfigError(
                f"weights is {weights!r}, but directory {uri} holds averaged weights alone: load "
                "the training record for others"
            )
        return _from_folder(Path(uri))
    store, record = open_record(uri, cache=cache)
    return from_record(store, record, weights=weights)


def from_official(
    path: str | Path,
    *,
    weights: str = "ema",
    energy: field.Energy = "implicit",
    num_heads: int | None = None,
    flow_matching: bool = False,
) -> Model:
    """Model of a checkpoint of the official code, or of a SiT. Raises as :func:`load`."""
    tensors = read_official(path, weights=weights)
    time = "conditioned" if flow_matching else "constant"
    found = import_official(tensors, num_heads=num_heads, time=time, where=str(path))
    channels, height, _ = found.shape
    objective = (
        ObjectiveConfig(c="constant", multiplier=1.0, energy=energy)
        if flow_matching
        else ObjectiveConfig(energy=energy)
    )
    spec = ModelSpec(
        schema=SCHEMA,
        network=found.network,
        objective=objective,
        latent=LatentSpec(
            autoencoder=SD_VAE,
            image_size_px=SD_VAE_PIXELS * height,
            image_channels=3,
            shape=found.shape,
            shift=(0.0,) * channels,
            scale=(SD_VAE_SCALE,) * channels,
        ),
        classes=tuple(map(str, range(found.classes))),
        null_label=True,
    )
    return Model(spec, filled(spec.build(), found.tensors, str(path)))


def open_record(uri: str, *, cache: Path | None = None) -> tuple[Store, Record]:
    """Store and record of ``<store>/<stage>/<digest>``.

    Raises ConfigError for another address, DataError where nothing is sealed, StoreError.
    """
    parts = uri.rstrip("/").removesuffix("/record.json").rsplit("/", 2)
    if len(parts) != 3 or len(parts[2]) != 64:
        raise ConfigError(
            f"{uri!r} is no model: give <store>/train/<digest> (all 64 digits), "
            "a directory made by Model.save, or models:/<name>@champion"
        )
    store = open_store(parts[0], cache=cache)
    record = store.record(parts[1], parts[2])
    if record is None:
        raise DataError(f"{uri} is not sealed: there is no record.json")
    return store, record


def from_record(store: Store, record: Record, *, weights: str = "ema") -> Model:
    """Model of a sealed training record.

    Raises ConfigError for a record of another stage, and for weights that it does not have.
    """
    if record.stage != "train":
        raise ConfigError(f"{record.stage} {record.digest[:12]} is no trained model")
    spec = spec_from_bytes(store.get(record.outputs["model.json"]), record.digest[:12])
    name = f"{weights}.safetensors"
    if name not in record.outputs:
        whole = [n.removesuffix(".safetensors") for n in record.outputs if "/" not in n]
        known = [n for n in whole if n in ("ema", "raw") or n.startswith(FURTHER)]
        raise ConfigError(
            f"weights is {weights!r}; train {record.digest[:12]} has {', '.join(sorted(known))}"
        )
    where = f"{name} of {record.digest[:12]}"
    tensors = weights_from_bytes(store.get(record.outputs[name]), where)

    def autoencoder() -> Autoencoder:
        latents = open_ref(store, record.inputs["latents"])
        return load_autoencoder(open_ref(store, latents.inputs["autoencoder"]), store)

    return Model(spec, filled(spec.build(), tensors, where), autoencoder=autoencoder)


# -- averages of any length ---------------------------------------------------------------------


def snapshot_name(sigma_rel: float, images_seen: int) -> str:
    """What a snapshot of power-function averages is called among the outputs of a training."""
    return f"snapshots/{images_seen:012d}/{number_name(sigma_rel)}.safetensors"


def snapshots_of(record: Record) -> dict[tuple[float, int], Blob]:
    """(sigma_rel, images seen) -> averages, of the snapshots that a sealed training left."""
    found: dict[tuple[float, int], Blob] = {}
    for name, blob in record.outputs.items():
        folder, _, rest = name.partition("/")
        if folder == "snapshots":
            images, _, sigma = rest.removesuffix(".safetensors").partition("/")
            found[float(sigma), int(images)] = blob
    return found


def reconstructed(
    uri: str,
    *,
    sigma_rel: float,
    images_seen: int | None = None,
    maximum_error: float = 1.0,
    mlflow_uri: str | None = None,
    cache: Path | None = None,
) -> tuple[Model, Reconstruction]:
    """Model of a training with the power-function average of any length, on the CPU.

    ``uri`` names a sealed training or a registered model, as for :func:`load`. ``sigma_rel`` is the
    length in shares of ``images_seen`` (None: the whole run). Snapshots are read one by one.

    Raises as :func:`load`; ConfigError for a length that no power function has, and where the
    error expected is above ``maximum_error``; DataError where the snapshots do not suffice.
    """
    store, record = sealed(uri, mlflow_uri=mlflow_uri, cache=cache)
    # The last weights bring what is not trained, and is no average.
    base = from_record(store, record, weights="raw")
    kept = snapshots_of(record)
    used = [at for at in sorted(kept) if images_seen is None or at[1] <= images_seen]
    if kept and not used:
        raise DataError(
            f"{uri} has its first snapshot at image {min(seen for _, seen in kept):,}, after the "
            f"moment wanted ({images_seen:,}): want a later one"
        )
    last = max((seen for _, seen in kept), default=0)
    if images_seen is not None and kept and images_seen > last:
        raise DataError(
            f"{uri} has its last snapshot at image {last:,}, with which its training ended, before "
            f"the moment wanted ({images_seen:,}): want an earlier one"
        )
    plan = plan_reconstruction(used, sigma_rel, images_seen=images_seen)
    if plan.expected_error > maximum_error:
        lengths = ", ".join(map(number_name, sorted({sigma for sigma, _ in used})))
        raise ConfigError(
            f"sigma_rel {sigma_rel} at image {plan.images_seen:,} would come with a relative error "
            f"of about {plan.expected_error:.1e}, above {maximum_error:g}: want a length near "
            f"those tracked ({lengths}), a moment at or just after a snapshot (the last one before "
            f"it is of image {max(seen for _, seen in used):,}), or allow more"
        )
    averages = weighted_sum(
        (factor, weights_from_bytes(store.get(kept[at]), f"snapshot {at} of {record.digest[:12]}"))
        for factor, at in zip(plan.factors, used, strict=True)
        # The wanted one itself, if it was kept, is all there is to read.
        if factor
    )
    filled(base.network, {**base.network.state_dict(), **averages}, uri)
    return base, plan


def sealed(uri: str, *, mlflow_uri: str | None, cache: Path | None) -> tuple[Store, Record]:
    """Store and record of a sealed training or a registered model. Raises as :func:`load`."""
    if uri.startswith("models:/"):
        return _registered(uri, mlflow_uri, cache=cache)
    return open_record(uri, cache=cache)


def _from_folder(folder: Path) -> Model:
    from eqm.autoencoder import autoencoder_from_bytes

    files = read_folder(folder)
    spec = spec_from_bytes(files.pop("model.json"), str(folder / "model.json"))
    where = str(folder / "ema.safetensors")
    net = filled(spec.build(), weights_from_bytes(files.pop("ema.safetensors"), where), where)
    # Its files lie in the same folder, and are read when the autoencoder is asked for.
    opener = functools.partial(autoencoder_from_bytes, files, str(folder))
    return Model(spec, net, autoencoder=opener if files else None)


def read_folder(folder: Path) -> dict[str, bytes]:
    """Files of a directory made by :meth:`Model.save`, each checked against digests.json.

    Raises IntegrityError.
    """
    files: dict[str, bytes] = {}
    for name, digest in _digests(folder / "digests.json").items():
        if not (folder / name).is_file():
            raise IntegrityError(f"{folder}: {name} is missing: restore the directory from a copy")
        files[name] = (folder / name).read_bytes()
        if sha256(files[name]) != digest:
            raise IntegrityError(
                f"{folder / name} does not match digests.json: it is damaged, or was edited; "
                "restore it from a copy"
            )
    return files


def _digests(place: Path) -> dict[str, str]:
    """File names and SHA-256 digests. Raises IntegrityError."""
    remedy = "restore it from a copy, or save the model again"
    try:
        found = json.loads(place.read_bytes())
    except (FileNotFoundError, ValueError) as error:
        raise IntegrityError(f"{place} is missing or no JSON ({error}): {remedy}") from error
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise IntegrityError(f"{place} must hold file names and their SHA-256 alone: {remedy}")
    lacking = [name for name in ("model.json", "ema.safetensors") if name not in found]
    if lacking:
        raise IntegrityError(f"{place} lacks {', '.join(lacking)}: {remedy}")
    outside = [name for name in found if Path(name).name != name]
    if outside:
        raise IntegrityError(f"{place} names {outside[0]!r}, which is no file beside it: {remedy}")
    return found


def _registered(uri: str, mlflow_uri: str | None, *, cache: Path | None) -> tuple[Store, Record]:
    """Record of a registered version, which must be the one it was registered for."""
    version = version_of(uri, mlflow_uri)
    store, record = open_record(version.source, cache=cache)
    promised = version.tags.get("eqm.content")
    if record.content != promised:
        raise IntegrityError(
            f"{uri}: version {version.number} was registered for content {promised}, but "
            f"{version.source} holds {record.content}: one of them was changed; register again"
        )
    return store, record


def version_of(uri: str, mlflow_uri: str | None = None) -> Version:
    """The version of ``models:/name@alias`` or ``models:/name/3``.

    Raises ConfigError for another address, DataError where there is none, RegistryError.
    """
    mlflow_uri = mlflow_uri or default_uri()
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
    """Put weights into a network.

    Raises IntegrityError, by name, for one that is missing, one too many or misshapen.
    """
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


def weights_from_bytes(data: bytes, where: str) -> dict[str, Tensor]:
    """Weights of verified safetensors bytes.

    Raises IntegrityError for bytes that are none, DataError for weights that are not finite.
    """
    try:
        found = checkpoint.tensors_from_bytes(data)
    except SafetensorError as error:
        raise IntegrityError(
            f"{where} cannot be read as safetensors ({error}): restore it from a copy"
        ) from error
    for name, value in found.items():
        if not bool(value.isfinite().all()):
            raise DataError(
                f"{where}: weight {name} has NaN or infinite entries: its training diverged, or "
                "the file was edited; take an earlier one"
            )
    return found


def check_same(known: ModelSpec, spec: ModelSpec, where: str) -> None:
    """Refuse weights that mean something else under the same shapes: in a network of other heads,
    say, or on latents of another autoencoder.

    ``known`` is what they were trained as, ``spec`` what they are to become. What ``known`` leaves
    open is not compared. Raises ConfigError.
    """
    wrong = [
        *_differences("network", known.network, spec.network, skip=_unused(known.network)),
        *_other_latents(known.latent, spec.latent),
    ]
    if wrong:
        raise ConfigError(
            f"{where} holds weights that mean something else here: {'; '.join(wrong)}. Begin from "
            "weights of the same network and autoencoder, or make this config as theirs"
        )


def _other_latents(known: LatentSpec, here: LatentSpec) -> Iterator[str]:
    """In what latents differ, as far as it is known."""
    skipped = {NO_AUTOENCODER: set(_names(known)), SD_VAE: {"autoencoder"}}
    return _differences("latent", known, here, skip=skipped.get(known.autoencoder, set()))


def _differences(section: str, known: object, here: object, *, skip: set[str]) -> Iterator[str]:
    for name in _names(known):
        theirs, ours = getattr(known, name), getattr(here, name)
        if name not in skip and theirs != ours:
            yield f"{section}.{name} was {theirs!r}, and is {ours!r}"


def _unused(network: NetworkConfig) -> set[str]:
    """Settings that say nothing of a network of this kind."""
    if network.kind == "transformer":
        return {"unet"}
    return set(_names(network)) - {"kind", "time", "unet"}


def _names(value: object) -> list[str]:
    return [f.name for f in dataclasses.fields(value)]  # type: ignore[arg-type]


def spec_to_bytes(spec: ModelSpec) -> bytes:
    """model.json."""
    return json.dumps(to_json(spec), indent=1, sort_keys=True).encode()


def spec_from_bytes(data: bytes, where: str) -> ModelSpec:
    """Read model.json. Raises ConfigError, and IntegrityError for what is no JSON."""
    try:
        found = json.loads(data)
    except ValueError as error:
        raise IntegrityError(f"{where} is not JSON ({error}): restore it from a copy") from error
    spec = from_json(ModelSpec, found, where)
    if spec.schema != SCHEMA:
        raise ConfigError(f"{where} is of schema {spec.schema!r}; this program reads {SCHEMA!r}")
    return spec
