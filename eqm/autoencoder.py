"""Pixels -> moments, latents -> pixels: diffusers' AutoencoderKL, or the identity.

An autoencoder is frozen and comes with the LatentSpec that says what its latents mean. It is kept
as three files (config.json, weights.safetensors, spec.json), whatever it came from, so everybody
loads it from a sealed record. How one is fitted is eqm.fit's business. The only door to the hub
and, beside eqm.unet, to diffusers.
"""

import copy
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from eqm.config import AutoencoderFit, PretrainedFile, SourceConfig
from eqm.disk import hash_file
from eqm.errors import ConfigError, DataError, IntegrityError
from eqm.latents import unwhiten
from eqm.precision import full_precision
from eqm.records import LatentSpec, Record, canonical_bytes, digest, from_json, sha256, to_json
from eqm.storage import Store, open_store

CONFIG, WEIGHTS, SPEC = "config.json", "weights.safetensors", "spec.json"
"""The three files of an autoencoder."""

HUB_WEIGHTS = "diffusion_pytorch_model.safetensors"
FILES = (".safetensors", ".pth", ".pt", ".npz")
"""How the names of files end that are given themselves, not with a folder."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(/[\w-][\w.-]*)*")

IDENTITY: dict[str, Any] = {"kind": "identity"}

OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers called the parts of an attention before 0.14: SD-VAE files still do."""


class Autoencoder:
    """Frozen maps between uint8 images and whitened latents, float32 without TF32."""

    def __init__(
        self, spec: LatentSpec, config: Mapping[str, Any], network: nn.Module | None
    ) -> None:
        self.spec = spec
        """What its moments and latents mean."""
        self.config = dict(config)
        """Its architecture: {"kind": "identity"}, or {"kind": "kl", "network": {...}}."""
        self.network = network
        """The AutoencoderKL; None for the identity."""
        self.device = torch.device("cpu")
        self.dtype = torch.float32
        """What the network computes in."""
        if network is not None:
            self.network = copy.deepcopy(network).float().eval().requires_grad_(False)
            self.device = next(network.parameters()).device

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return sum(p.numel() for p in self.network.parameters()) if self.network else 0

    def to(self, device: torch.device | str) -> "Autoencoder":
        """Move the weights; returns this autoencoder."""
        self.device = torch.device(device)
        if self.network is not None:
            self.network.to(self.device)
        return self

    def in_precision(self, name: str) -> "Autoencoder":
        """This autoencoder, or a copy whose network computes in "bfloat16".

        In bfloat16 the means are off by 0.4 % of their standard deviation (RMS; the worst 3 %) with
        an autoencoder fitted to digits, and by 1.3 % (6 %) with SD-VAE's architecture and random
        weights, at 32 px. In standard deviations of the posterior that is 4 % and 0.3 %; these
        themselves are off by 0.3 % and 0.2 %. Storing as float16 costs 0.02 %. CPUs without
        bfloat16 are many times slower. Raises ConfigError for another precision.
        """
        if name == "float32":
            return self
        if name != "bfloat16":
            raise ConfigError(f"precision is {name!r}; it must be float32 or bfloat16")
        made = Autoencoder(self.spec, self.config, self.network)
        made.device = self.device
        if made.network is not None:
            made.dtype = torch.bfloat16
            # Of torch, not of diffusers, which warns of what needs to be kept in float32: nothing.
            nn.Module.to(made.network, made.dtype)
        return made

    def encode(self, images: Tensor) -> Tensor:
        """Posterior mean and standard deviation, float32 (B, 2C, h, w), not whitened.

        ``images`` uint8 (B, C, H, W) of the size and channels of the spec, on any device. Raises
        DataError for others.
        """
        self._check_images(images)
        pixels = signed(images.to(self.device))
        if self.network is None:
            return torch.cat([pixels, torch.zeros_like(pixels)], dim=1)
        with torch.no_grad(), full_precision():
            posterior = self.network.encode(pixels.to(self.dtype)).latent_dist  # type: ignore[operator]
            # Its own mean and std are of the network's dtype; an exponential loses in bfloat16.
            mean, log_variance = posterior.parameters.float().chunk(2, dim=1)
        return torch.cat([mean, torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """Images uint8 (B, C, H, W) of whitened latents (B, C, h, w), on the weights' device.

        Raises DataError for latents of another shape.
        """
        if tuple(latents.shape[1:]) != self.spec.shape:
            raise DataError(
                f"latents have shape {tuple(latents.shape)}; this autoencoder takes (B, "
                f"{', '.join(map(str, self.spec.shape))})"
            )
        raw = unwhiten(latents.to(self.device).float(), self.spec)
        if self.network is None:
            return to_uint8(raw)
        with torch.no_grad(), full_precision():
            return to_uint8(self.network.decode(raw.to(self.dtype)).sample.float())  # type: ignore[operator]

    def _check_images(self, images: Tensor) -> None:
        size = self.spec.image_size_px
        wanted = (self.spec.image_channels, size, size)
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != wanted:
            raise DataError(
                f"images are {images.dtype} of shape {tuple(images.shape)}; this autoencoder takes "
                f"uint8 of shape (B, {', '.join(map(str, wanted))})"
            )


def signed(images: Tensor) -> Tensor:
    """What an autoencoder sees of uint8 images: float32 in [-1, 1], same shape."""
    return images.float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """The field's rule for pixels in [-1, 1]: clamp(127.5 x + 128, 0, 255), truncated."""
    return (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8)


# -- making one ---------------------------------------------------------------------------------


def identity(source: SourceConfig) -> Autoencoder:
    """Pixels as latents: mean x / 127.5 - 1, standard deviation 0."""
    size, channels = source.image_size_px, source.channels
    spec = LatentSpec(
        autoencoder="identity",
        image_size_px=size,
        image_channels=channels,
        shape=(channels, size, size),
        shift=(0.0,) * channels,
        scale=(1.0,) * channels,
    )
    return Autoencoder(spec, IDENTITY, None)


def fresh_network(fit: AutoencoderFit, source: SourceConfig) -> nn.Module:
    """An AutoencoderKL with random weights, drawn from torch's generator. Raises ConfigError."""
    levels = len(fit.widths)
    _check_size(source.image_size_px, levels, "autoencoder.fit.widths")
    return _network(
        {
            "in_channels": source.channels,
            "out_channels": source.channels,
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "block_out_channels": list(fit.widths),
            "layers_per_block": 1,
            "latent_channels": fit.latent_channels,
            "norm_num_groups": 8,
            "sample_size": source.image_size_px,
        },
        "autoencoder.fit",
    )


def _check_size(size_px: int, levels: int, cause: str) -> None:
    factor = 2 ** (levels - 1)
    if size_px % factor:
        raise ConfigError(
            f"source.image_size_px is {size_px}; it must be a multiple of {factor}, because "
            f"{cause} halves it {levels - 1} times"
        )


def sealed_autoencoder(
    network: nn.Module,
    source: SourceConfig,
    *,
    name: str,
    shift: tuple[float, ...],
    scale: tuple[float, ...],
) -> Autoencoder:
    """An Autoencoder of an AutoencoderKL: its spec names it by the digest of all that it is."""
    config = {"kind": "kl", "network": _network_config(network)}
    channels, size = config["network"]["latent_channels"], source.image_size_px
    side = size // 2 ** (len(config["network"]["block_out_channels"]) - 1)
    spec = LatentSpec(
        autoencoder=f"{name}-{_identity_of(config, _weights_to_bytes(network))}",
        image_size_px=size,
        image_channels=source.channels,
        shape=(channels, side, side),
        shift=shift,
        scale=scale,
    )
    return Autoencoder(spec, config, network)


def _network_config(network: nn.Module) -> dict[str, Any]:
    config: Mapping[str, Any] = network.config  # type: ignore[assignment]
    return to_json({key: value for key, value in config.items() if not key.startswith("_")})


def _identity_of(config: Mapping[str, Any], weights: bytes) -> str:
    return digest({"config": config, "weights": sha256(weights)})


def _network(config: Mapping[str, Any], where: str) -> nn.Module:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    try:
        return AutoencoderKL(**config)
    except (TypeError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
        raise DataError(f"{where} is not the config of an AutoencoderKL: {error}") from error


# -- three files and back -----------------------------------------------------------------------


def autoencoder_to_bytes(autoencoder: Autoencoder) -> dict[str, bytes]:
    """Its files by name: config.json, weights.safetensors, spec.json; no bit depends on when."""
    network = autoencoder.network
    return {
        CONFIG: canonical_bytes(autoencoder.config),
        WEIGHTS: safetensors.torch.save({}) if network is None else _weights_to_bytes(network),
        SPEC: canonical_bytes(autoencoder.spec),
    }


def autoencoder_from_bytes(files: Mapping[str, bytes], where: str = "autoencoder") -> Autoencoder:
    """The autoencoder of three files.

    Raises DataError for files that are missing or hold something else, IntegrityError where the
    spec is that of other weights.
    """
    missing = [name for name in (CONFIG, WEIGHTS, SPEC) if name not in files]
    if missing:
        raise DataError(f"{where} lacks {', '.join(missing)}: restore it, or fit it again")
    config = _json(files[CONFIG], f"{where}/{CONFIG}")
    spec = _spec(files[SPEC], f"{where}/{SPEC}")
    if config == IDENTITY and spec.autoencoder == "identity":
        return Autoencoder(spec, IDENTITY, None)
    if not spec.autoencoder.endswith(f"-{_identity_of(config, files[WEIGHTS])}"):
        raise IntegrityError(
            f"{where}: {SPEC} belongs to autoencoder {spec.autoencoder!r}, not to the {CONFIG} and "
            f"{WEIGHTS} beside it: restore all three"
        )
    network = _filled(config.get("network"), _tensors(files[WEIGHTS], where), where)
    return Autoencoder(spec, config, network)


def load_autoencoder(
    record: Record, store: Store, device: torch.device | str = "cpu"
) -> Autoencoder:
    """The autoencoder of a sealed record. Raises DataError, IntegrityError, StoreError."""
    if record.stage != "autoencoder":
        raise DataError(f"{record.stage} {record.digest[:12]} is no autoencoder")
    names = [name for name in (CONFIG, WEIGHTS, SPEC) if name in record.outputs]
    files = {name: store.get(record.outputs[name]) for name in names}
    return autoencoder_from_bytes(files, f"autoencoder {record.digest[:12]}").to(device)


def latent_spec(record: Record, store: Store) -> LatentSpec:
    """What latents of a sealed autoencoder mean, without its weights. As load_autoencoder."""
    if record.stage != "autoencoder" or SPEC not in record.outputs:
        raise DataError(f"{record.stage} {record.digest[:12]} is no autoencoder")
    return _spec(store.get(record.outputs[SPEC]), f"autoencoder {record.digest[:12]}/{SPEC}")


def _spec(data: bytes, where: str) -> LatentSpec:
    return from_json(LatentSpec, _json(data, where), where)


def _weights_to_bytes(network: nn.Module) -> bytes:
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    for key, value in state.items():
        if not value.isfinite().all():
            raise DataError(
                f"weight {key!r} of the autoencoder holds NaN or infinity: its training diverged, "
                "or its file is damaged; lower autoencoder.fit.learning_rate, or get the file again"
            )
    return safetensors.torch.save(state)


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise DataError(f"{where} is not JSON ({error}): get it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{where} holds no table of settings: get it again")
    return value


def _tensors(data: bytes, where: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise DataError(f"{where} cannot be read as safetensors ({error}): get it again") from error


def _filled(config: Any, tensors: dict[str, Tensor], where: str) -> nn.Module:
    """Network of a config with these weights; other names and shapes are refused."""
    if not isinstance(config, Mapping):
        raise DataError(f"{where}/{CONFIG} names no network: restore it, or fit it again")
    with torch.device("meta"):  # costs no memory and no random number until the shapes agree
        network = _network(config, f"{where}/{CONFIG}")
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise DataError(
                f"{where}: weight {name} has shape {found.get(name, 'none')}, the network of "
                f"{CONFIG} has {expected.get(name, 'none')}: give the config of these weights"
            )
    floats = {name: value.float() for name, value in tensors.items()}
    network.load_state_dict(floats, assign=True)
    return network


# -- weights that somebody else made ------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """A folder of weights: where it is, and how its files are read."""

    name: str
    store: Store | None
    """Reads the files; None for the hub."""
    weights: str


def pretrained(file: PretrainedFile, source: SourceConfig) -> Autoencoder:
    """An AutoencoderKL that diffusers wrote, as safetensors with config.json beside it.

    ``file.uri``: a folder or a .safetensors file on this machine or under s3://, or a hub id
    (owner/name, owner/name/subfolder) with a revision. The digest of the weights is checked before
    they are parsed. Raises ConfigError, DataError, IntegrityError, StoreError.
    """
    place = _place(file)
    tensors = _tensors(_checked(file, _read(file, place, place.weights)), place.name)
    written = _json(_read(file, place, CONFIG), f"{place.name}/{CONFIG}")
    config = {key: value for key, value in written.items() if not key.startswith("_")}
    network = _filled(config, {_new_name(k): v for k, v in tensors.items()}, place.name)
    full = _network_config(network)
    _check_fits(full, source, place.name)
    shift, scale = _whitening(full, place.name)
    return sealed_autoencoder(network, source, name="pretrained", shift=shift, scale=scale)


def for_latents(given: "Autoencoder | str | Path", shape: tuple[int, int, int]) -> Autoencoder:
    """The autoencoder of latents of a shape (C, H, W): an open one, or one of this machine.

    "identity" for pixels, x / 127.5 - 1; else the folder or .safetensors file that diffusers wrote,
    which is taken as it lies there. Raises ConfigError for what does not make such latents,
    DataError for what is not there.
    """
    made = given if isinstance(given, Autoencoder) else _of_this_machine(given, shape)
    if made.spec.shape != shape:
        name = made.spec.autoencoder if made is given else str(given)
        raise ConfigError(
            f"the autoencoder {name!r} makes latents of shape {made.spec.shape}, and those of the "
            f"model have {shape}: give the one that it was trained on"
        )
    return made


def _of_this_machine(place: str | Path, shape: tuple[int, int, int]) -> Autoencoder:
    if shape[1] != shape[2]:
        raise DataError(
            f"latents of shape {shape} are not square, and autoencoders here are of square images: "
            "take the samples' latents as they are (those of pixels, x / 127.5 - 1, are levels of "
            "gray by 127.5 x + 128)"
        )
    if str(place) == IDENTITY["kind"]:
        return identity(SourceConfig(image_size_px=shape[1], channels=shape[0]))
    weights = weights_file(Path(place))
    if not weights.is_file():
        raise DataError(
            f"autoencoder {str(place)!r}: there is no {weights}; give 'identity' for pixels, or "
            "the folder that diffusers wrote"
        )
    file = PretrainedFile(uri=str(weights), sha256=hash_file(weights))
    found = open_store(str(weights.parent)).read(CONFIG)
    written = _json(found, str(weights.with_name(CONFIG)))
    halvings = len(written.get("block_out_channels", [0])) - 1
    size, channels = shape[1] * 2**halvings, written.get("in_channels", 3)
    return pretrained(file, SourceConfig(image_size_px=size, channels=channels))


def read_pretrained(file: PretrainedFile) -> bytes:
    """Bytes of a single file of weights, checked against its digest. Raises as ``pretrained``."""
    return read_snapshot(file)[1]


def check_pretrained(file: PretrainedFile) -> None:
    """Refuse a file that is not there, or another one. Raises as ``pretrained``.

    What lies in a bucket is not downloaded for that: only looked for.
    """
    place = _place(file)
    here = Path(place.name) / place.weights
    if place.store is None:
        read_pretrained(file)
    elif "://" not in place.name and here.is_file():
        _check_digest(file, hash_file(here))
    elif not place.store.exists(place.weights):
        raise DataError(f"uri {file.uri!r}: there is no such object")


def read_snapshot(file: PretrainedFile, weights: str = HUB_WEIGHTS) -> tuple[str, bytes]:
    """Name and bytes of a file of weights: a file itself, or what lies so named in a folder.

    A folder is one as the hub hands it out (``weights`` is what the library that wrote it calls its
    file). Either lies here, under s3:// or on the hub. Raises as ``pretrained``, and DataError for
    a folder that has weights only as a pickle.
    """
    place = _place(file, weights)
    folder = Path(place.name) if place.store is not None else None
    if folder is not None and folder.is_dir() and not (folder / place.weights).exists():
        there = sorted(one.name for one in folder.iterdir())[:8]
        raise DataError(
            f"{folder} has no {place.weights} (it has {', '.join(there) or 'nothing'}): pickled "
            "weights (.bin) of a folder are not read; take a revision that has safetensors, or "
            "give the path of the file"
        )
    return place.weights, _checked(file, _read(file, place, place.weights))


def weights_file(path: Path) -> Path:
    """The file of weights that a local path names: itself, or what diffusers put in a folder."""
    return path / HUB_WEIGHTS if path.is_dir() else path


def _place(file: PretrainedFile, weights: str = HUB_WEIGHTS) -> _Place:
    uri = file.uri.rstrip("/")
    folder, _, name = uri.rpartition("/")
    # Blobs of a store have no suffix: their name is their digest.
    is_file = Path(name).suffix.lower() in FILES or name == file.sha256
    if uri.startswith("s3://"):
        root, found = (folder, name) if is_file else (uri, weights)
        return _Place(root, open_store(root), found)
    if "://" in uri:
        raise ConfigError(f"uri is {uri!r}; it must be a path, s3://… or a hub id")
    path = Path(uri)
    if path.exists():
        root, found = (path, weights) if path.is_dir() else (path.parent, path.name)
        return _Place(str(root), open_store(str(root)), found)
    if file.revision is None or not HUB_ID.fullmatch(uri):
        hub = HUB_ID.fullmatch(uri) is not None
        hint = "; to take it from the hub, give its revision" if hub else ""
        raise DataError(f"uri {uri!r}: there is no such file or folder{hint}")
    if is_file and HUB_ID.fullmatch(folder):
        return _Place(folder, None, name)
    return _Place(uri, None, weights)


def _read(file: PretrainedFile, place: _Place, name: str) -> bytes:
    if place.store is not None:
        return place.store.read(name)
    return _from_hub(place.name, str(file.revision), name)


def _from_hub(repository: str, revision: str, name: str) -> bytes:
    import httpx
    from huggingface_hub import errors, hf_hub_download

    owner, short, *below = repository.split("/")
    try:
        path = hf_hub_download(
            f"{owner}/{short}", "/".join([*below, name]), revision=revision, repo_type="model"
        )
    except (errors.HfHubHTTPError, errors.HFValidationError, httpx.HTTPError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(
            f"{name} of {repository}@{revision} cannot be had from the hub ({reason}): check id "
            "and revision, or fetch the folder elsewhere and give its path"
        ) from error
    return Path(path).read_bytes()


def _checked(file: PretrainedFile, data: bytes) -> bytes:
    _check_digest(file, sha256(data))
    return data


def _check_digest(file: PretrainedFile, found: str) -> None:
    if found != file.sha256:
        raise IntegrityError(
            f"the file at {file.uri} has SHA-256 {found}, but the sha256 given with it is "
            f"{file.sha256}: fetch it again, or correct the digest if you trust this file"
        )


def _new_name(name: str) -> str:
    """Name of a weight in this diffusers, for the names that attentions had before."""
    head, _, kind = name.rpartition(".")
    above, _, part = head.rpartition(".")
    old = ".attentions." in name and part in OLD_NAMES
    return f"{above}.{OLD_NAMES[part]}.{kind}" if old else name


def _check_fits(config: Mapping[str, Any], source: SourceConfig, where: str) -> None:
    for name in ("in_channels", "out_channels"):
        if config[name] != source.channels:
            raise ConfigError(
                f"source.channels is {source.channels}, but the autoencoder at {where} has "
                f"{name} {config[name]}: set source.channels to {config[name]}"
            )
    _check_size(source.image_size_px, len(config["block_out_channels"]), f"the one at {where}")


def _whitening(
    config: Mapping[str, Any], where: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Shift and scale of a diffusers config: latents = (raw - mean) / std * scaling_factor."""
    channels = config["latent_channels"]
    factor, shift = config["scaling_factor"], config["shift_factor"] or 0.0
    means = config["latents_mean"] or [shift] * channels
    stds = config["latents_std"] or [1.0] * channels
    if len(means) != channels or len(stds) != channels or not all(stds) or not factor:
        raise DataError(
            f"{where}/{CONFIG} does not say how {channels} channels of latents are scaled: "
            "give scaling_factor, and latents_mean and latents_std for each channel or for none"
        )
    return tuple(map(float, means)), tuple(float(factor / std) for std in stds)
