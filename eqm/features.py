"""Images -> features, by extractors that carry a digest.

The only door to torch_fidelity. An extractor is frozen (eval mode, float32, no gradients, no TF32)
and maps uint8 images (B, C, H, W) to float32 features (B, D). What is computed of the features is
eqm.frechet's business, how a SmallCNN is trained eqm.fit's. Called by evaluate, fit, flows,
generate, measures, outliers and reference.
"""

import contextlib
import copy
import io
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol, TypeVar

import numpy as np
import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from eqm.config import INCEPTION_SHA256
from eqm.errors import DataError, IntegrityError, require
from eqm.hub_layouts import released_clip, released_dinov2
from eqm.names import further_inputs
from eqm.precision import full_precision
from eqm.records import Record, Ref, canonical_bytes, digest, from_json, sha256
from eqm.stage import open_ref
from eqm.storage import Store
from eqm.vision_transformer import dinov2_from_state

T = TypeVar("T")

SMALLEST_IMAGE_PX = 8
"""Two halvings leave a SmallCNN 2 x 2 positions to average."""

CHANNELS_A_GROUP = 8
"""Of GroupNorm: never BatchNorm, whose output depends on the rest of the batch."""


INCEPTION = "inception-v3-compat"
"""Name of the extractor with which a distance is an FID: torch-fidelity's Inception with the
weights of the field (INCEPTION_SHA256), and no others."""
SPATIAL_CHANNELS = 7
"""Of the layer whose positions are all kept, as the field's sFID has it."""
LARGEST_GRID = 16
"""Positions a side of a SmallCNN's spatial features; those of larger images are averaged."""


@dataclass(frozen=True)
class Activations:
    """What an extractor makes of images, float32, where its weights lie."""

    features: Tensor
    """(B, D): what distances are taken of."""
    logits: Tensor | None = None
    """(B, K): what its classifier says, before the softmax; None where it has none."""
    spatial: Tensor | None = None
    """(B, S): a layer before positions are averaged, row by row, channels last; None where it has
    none."""

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


class FeatureExtractor(Protocol):
    """What every extractor offers."""

    name: str
    """For people and in the name of a metric: "digits-cnn", "inception-v3-compat"."""
    digest: str
    """SHA-256 over architecture and weights; features of different digests are never compared."""
    dimension: int
    """D."""

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 (B, D), where the weights lie, of uint8 images (B, C, H, W)."""
        ...

    def activations(self, images: Tensor) -> Activations:
        """All that it makes of uint8 images (B, C, H, W) in one pass."""
        ...


def extract(extractor: FeatureExtractor, batches: Iterable[Tensor]) -> NDArray[np.float32]:
    """Features (N, D) of all images of all batches, each uint8 (B, C, H, W), in their order.

    Raises DataError for no images, other images than the extractor takes, or features that are not
    finite.
    """
    features = [extractor(images).cpu().numpy() for images in batches if len(images)]
    if not features:
        raise DataError("there are no images to extract features of: give at least one")
    rows = np.concatenate(features)
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    if len(bad):
        raise DataError(
            f"{extractor.name} gives NaN or infinity for {len(bad)} of {len(rows)} images, first "
            f"for number {bad[0]}: its weights are damaged or its training diverged; fit it again"
        )
    return rows


# -- a small network, fitted on the data --------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class SmallCNNConfig:
    """Architecture of a SmallCNN."""

    channels: int
    """Of the images: 1 or 3."""
    classes: int
    width: int = 32
    """Channels after the first convolution; each halving of the size doubles them."""
    dimension: int = 64
    """D."""

    def __post_init__(self) -> None:
        require(self.channels in (1, 3), "extractor.channels", self.channels, "1 or 3")
        for name in ("classes", "width", "dimension"):
            value = getattr(self, name)
            require(value > 0, f"extractor.{name}", value, "greater than 0")
        rule = f"a multiple of {CHANNELS_A_GROUP}"
        require(self.width % CHANNELS_A_GROUP == 0, "extractor.width", self.width, rule)


class SmallCNN(nn.Module):
    """A classifier whose last hidden layer is the feature; images of 8 x 8 px and more.

    Takes float images in [-1, 1], see ``signed``. Initialised by torch's generator.
    """

    def __init__(self, config: SmallCNNConfig) -> None:
        super().__init__()
        self.config = config
        w = config.width
        self.body = nn.Sequential(
            *_block(config.channels, w),
            *_block(w, 2 * w, stride=2),
            *_block(2 * w, 2 * w),
            *_block(2 * w, 4 * w, stride=2),
        )
        self.project = nn.Linear(4 * w, config.dimension)
        self.head = nn.Linear(config.dimension, config.classes)

    def features(self, x: Tensor) -> Tensor:
        """Features (B, D) of float images (B, C, H, W) in [-1, 1]; DataError for other shapes."""
        return self.project(self._hidden(x).mean(dim=(2, 3)))

    def activations(self, x: Tensor) -> Activations:
        """Features, logits and spatial features of float images (B, C, H, W) in [-1, 1]."""
        hidden = self._hidden(x)
        features = self.project(hidden.mean(dim=(2, 3)))
        height, width = (min(side, LARGEST_GRID) for side in hidden.shape[2:])
        grid = F.adaptive_avg_pool2d(hidden[:, :SPATIAL_CHANNELS], (height, width))
        return Activations(features, self.head(F.silu(features)), _channels_last(grid))

    def _hidden(self, x: Tensor) -> Tensor:
        _check_shape(x, (self.config.channels,), smallest_px=SMALLEST_IMAGE_PX)
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of float images (B, C, H, W) in [-1, 1]."""
        return self.head(F.silu(self.features(x)))


def _block(inside: int, outside: int, *, stride: int = 1) -> tuple[nn.Module, ...]:
    return (
        nn.Conv2d(inside, outside, 3, stride=stride, padding=1),
        nn.GroupNorm(outside // CHANNELS_A_GROUP, outside),
        nn.SiLU(),
    )


def _channels_last(grid: Tensor) -> Tensor:
    """(B, C, H, W) as rows (B, H W C)."""
    return grid.permute(0, 2, 3, 1).flatten(1)


def signed(images: Tensor) -> Tensor:
    """What a SmallCNN sees of uint8 images: float32 in [-1, 1], same shape."""
    return images.float() / 127.5 - 1


class CNNExtractor:
    """A trained SmallCNN as a FeatureExtractor: a frozen copy, where the network lies."""

    def __init__(self, network: SmallCNN, name: str) -> None:
        frozen = copy.deepcopy(network).float().eval().requires_grad_(False)
        weights, _ = extractor_to_bytes(frozen, network.config)
        architecture = {"kind": "small-cnn", "config": network.config, "pixels": "x / 127.5 - 1"}
        self.name = name
        self.digest = _digest(architecture, sha256(weights))
        self.dimension = network.config.dimension
        self._network = frozen

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 (B, D) of uint8 images (B, C, H, W)."""
        return self._run(self._network.features, images)

    def activations(self, images: Tensor) -> Activations:
        """Spatial features are the first channels of the last layer that has positions."""
        return self._run(self._network.activations, images)

    def logits(self, images: Tensor) -> Tensor:
        """What the classifier says, float32 (B, classes), of uint8 images (B, C, H, W)."""
        return self._run(self._network, images)

    def _run(self, function: Callable[[Tensor], T], images: Tensor) -> T:
        _check_uint8(images)
        with torch.no_grad(), full_precision():
            return function(signed(images.to(self._network.head.weight.device)))


def extractor_to_bytes(network: SmallCNN, config: SmallCNNConfig) -> tuple[bytes, bytes]:
    """Weights as safetensors, and config as JSON: the same bytes for the same values.

    Raises ConfigError where the config is not the network's, DataError for weights not finite.
    """
    require(config == network.config, "config", config, f"the network's own, {network.config}")
    state = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    for key, value in state.items():
        if not value.isfinite().all():
            raise DataError(f"weight {key!r} holds NaN or infinity: the training diverged")
    return safetensors.torch.save(state), canonical_bytes(config)


def extractor_from_bytes(weights: bytes, config: bytes) -> SmallCNN:
    """The network that ``extractor_to_bytes`` wrote, in eval mode.

    Raises ConfigError for a config that is none, DataError for weights that are not its own.
    """
    try:
        values = json.loads(config)
    except ValueError as error:
        raise DataError(
            f"the config of the extractor is not JSON ({error}): fit it again"
        ) from error
    with torch.random.fork_rng(devices=[]):  # initial weights cost nobody a random number
        network = SmallCNN(from_json(SmallCNNConfig, values, "extractor"))
    with _in_words("the extractor's weights"):
        network.load_state_dict(_from_safetensors(weights, "the extractor's weights"))
    return network.eval()


# -- Inception ----------------------------------------------------------------------------------


def load_extractor(record: Record, store: Store, device: torch.device) -> FeatureExtractor:
    """The extractor of a sealed "extractor" record. Raises StoreError, IntegrityError."""
    kind = record.values["kind"]
    if kind in PRETRAINED:
        (blob,) = record.outputs.values()
        # The name decides how the file is parsed; its digest has been checked twice by then.
        (name,) = record.outputs
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(store.get(blob))
            return PRETRAINED[kind](path, blob.sha256, device=device)
    files = {name: store.get(blob) for name, blob in record.outputs.items()}
    network = extractor_from_bytes(files["weights.safetensors"], files["config.json"])
    return CNNExtractor(network.to(device), record.values["name"])


def load_extractors(
    inputs: Mapping[str, Ref], store: Store, device: torch.device
) -> dict[str, FeatureExtractor]:
    """All extractors among the inputs of a stage, by what their columns begin with.

    That is nothing for the main one and "NAME/" for further ones (:func:`column`). Raises as
    ``load_extractor`` and ``open_ref``.
    """
    refs = {None: inputs["extractor"], **further_inputs(inputs, "extractor")}
    return {
        column("", name): load_extractor(open_ref(store, ref), store, device)
        for name, ref in refs.items()
    }


def column(of: str, further: str | None) -> str:
    """How activations ("features") are called where those of several extractors lie together."""
    return of if further is None else f"{further}/{of}"


def inception_extractor(
    weights_path: Path, expected_sha256: str, *, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """The Inception network of FID as torch-fidelity has it (2048 features), from a local file.

    The file is torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``, or the same tensors
    as ``.safetensors``. Only the former is named INCEPTION, for nobody knows whether the tensors of
    another file are the same. Grayscale images are repeated to 3 channels. Raises DataError for a
    file that is missing or holds other tensors or more than tensors, IntegrityError for another
    digest, which is checked before anything is parsed.
    """
    state = _state(weights_path, expected_sha256, "Inception")
    return _InceptionExtractor(state, expected_sha256, str(weights_path), device)


class _InceptionExtractor:
    def __init__(
        self, state: dict[str, Tensor], weights_sha256: str, place: str, device: torch.device | str
    ) -> None:
        import torch_fidelity

        own = weights_sha256 == INCEPTION_SHA256
        self.name = INCEPTION if own else f"inception-v3-{weights_sha256[:8]}"
        self.dimension = 2048
        architecture = {"kind": INCEPTION, "torch_fidelity": torch_fidelity.__version__}
        self.digest = _digest(architecture, weights_sha256)
        # Its constructor unpickles whatever it is given, without restriction: it is given bytes
        # made here, of tensors that are parsed already.
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        with torch.random.fork_rng(devices=[]), _in_words(place):
            network = torch_fidelity.FeatureExtractorInceptionV3(
                self.name,
                [str(self.dimension), "logits_unbiased"],
                feature_extractor_weights_path=file,
            )
        self._network = network.to(device)
        self._device = device

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 (B, 2048) of uint8 images (B, 1 or 3, H, W), resized to 299 x 299."""
        return self.activations(images).features

    def activations(self, images: Tensor) -> Activations:
        """With logits (B, 1008) that leave the bias out, as in Inception Scores of the field.

        Spatial features (B, 2023) are the first 7 channels of what TensorFlow's graph calls
        "mixed_6/conv", on 17 x 17 positions, as in ADM's sFID.
        """
        _check_uint8(images)
        _check_shape(images, (1, 3), smallest_px=1)
        colour = images.to(self._device).expand(-1, 3, -1, -1)
        seen: list[Tensor] = []
        hook = self._network.Mixed_6d.branch1x1.register_forward_hook(
            lambda *call: seen.append(call[-1][:, :SPATIAL_CHANNELS])
        )
        try:
            with torch.no_grad(), full_precision():
                features, logits = self._network(colour)
        finally:
            hook.remove()
        return Activations(features, logits, _channels_last(seen[0]))


# -- vision transformers ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pixels:
    """How a vision transformer wants its images."""

    side_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    """Of pixels in [0, 1]."""


class _TransformerExtractor:
    """Class tokens of a frozen vision transformer, its images made as torch-fidelity makes them."""

    def __init__(
        self,
        network: nn.Module,
        name: str,
        weights_sha256: str,
        pixels: _Pixels,
        device: torch.device | str,
    ) -> None:
        import torch_fidelity

        architecture = {"kind": name, "torch_fidelity": torch_fidelity.__version__}
        self.name = name
        self.digest = _digest(architecture, weights_sha256)
        self._network = network.float().eval().requires_grad_(False).to(device)
        self._pixels, self._device = pixels, device
        blank = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
        self.dimension = self(blank).shape[1]

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 (B, D) of uint8 images (B, 1 or 3, H, W)."""
        return self.activations(images).features

    def activations(self, images: Tensor) -> Activations:
        """Features alone: it has no classifier."""
        from torch_fidelity.interpolate_compat_tensorflow import (
            interpolate_bilinear_2d_like_tensorflow1x as resized,
        )
        from torchvision.transforms.functional import normalize

        _check_uint8(images)
        _check_shape(images, (1, 3), smallest_px=1)
        colour = images.to(self._device).expand(-1, 3, -1, -1).float()
        look = self._pixels
        mean, std = ([255 * value for value in values] for values in (look.mean, look.std))
        with torch.no_grad(), full_precision():
            x = resized(colour, size=(look.side_px, look.side_px), align_corners=False)
            return Activations(self._network(normalize(x, mean, std)))


def dinov2_extractor(
    weights_path: Path, expected_sha256: str, *, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """DINOv2 as torch-fidelity has it, from a released file such as dinov2_vits14_pretrain.pth.

    Or from ``model.safetensors`` of Hugging Face's transformers. Raises as ``inception_extractor``.
    """
    state = released_dinov2(_state(weights_path, expected_sha256, "DINOv2"))
    name, network = dinov2_from_state(state, str(weights_path))
    pixels = _Pixels(224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return _TransformerExtractor(network, name, expected_sha256, pixels, device)


CLIP_NAMES = {(32, 224): "clip-vit-b-32", (16, 224): "clip-vit-b-16", (14, 224): "clip-vit-l-14"}
"""Patch and image size in px -> torch-fidelity's name."""


def clip_extractor(
    weights_path: Path, expected_sha256: str, *, device: torch.device | str = "cpu"
) -> FeatureExtractor:
    """CLIP's vision transformer as torch-fidelity has it, from a state dict of plain tensors.

    Their names begin with ``visual.``, or are those of Hugging Face's transformers; those of the
    text side are not looked at. The file that OpenAI released is a program (TorchScript), which is
    never run: save its state dict. Raises as ``inception_extractor``.
    """
    from torch_fidelity.feature_extractor_clip import CLIPVisual, convert_weights

    place = str(weights_path)
    state = released_clip(_state(weights_path, expected_sha256, "CLIP"))
    seen = {key: value for key, value in state.items() if key.startswith("visual.")}
    try:
        width, _, _, patch = seen["visual.conv1.weight"].shape
        positions = len(seen["visual.positional_embedding"]) - 1
        dimension = seen["visual.proj"].shape[1]
    except (KeyError, ValueError, IndexError) as error:
        raise DataError(f"{place} holds no vision transformer of CLIP (visual.…)") from error
    side = patch * round(positions**0.5)
    if (patch, side) not in CLIP_NAMES:
        raise DataError(f"{place}: patches of {patch} px in {side} px are no CLIP that is known")
    depth = sum(key.endswith(".attn.in_proj_weight") for key in seen)
    with torch.random.fork_rng(devices=[]), _in_words(place):
        network = CLIPVisual(dimension, side, depth, width, patch)
        # To half precision and back, as released: weights of more digits lose them in both.
        convert_weights(network)
        network.load_state_dict(seen)
    pixels = _Pixels(
        side, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    )
    name = CLIP_NAMES[patch, side]
    return _TransformerExtractor(network.visual, name, expected_sha256, pixels, device)


PRETRAINED = {
    "inception": inception_extractor,
    "dinov2": dinov2_extractor,
    "clip": clip_extractor,
}
"""Kind of extractor (config.ExtractorConfig) -> what makes it of a local file and its digest."""


# -- weights ------------------------------------------------------------------------------------


def _state(path: Path, expected_sha256: str, what: str) -> dict[str, Tensor]:
    """Tensors of a file of weights, checked against its digest before it is parsed."""
    if not path.is_file():
        raise DataError(f"there are no {what} weights at {path}: give the path of a file")
    data = path.read_bytes()
    found = sha256(data)
    if found != expected_sha256:
        raise IntegrityError(
            f"{path} has SHA-256 {found}, but {expected_sha256} is expected: "
            "fetch the file again, or correct the digest if you trust this file"
        )
    parse = _from_safetensors if path.suffix == ".safetensors" else _from_restricted_pickle
    return parse(data, str(path))


def _digest(architecture: dict[str, Any], weights_sha256: str) -> str:
    return digest({"architecture": architecture, "weights": weights_sha256})


def _from_safetensors(data: bytes, place: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise DataError(
            f"{place} cannot be read as safetensors ({error}): get them again"
        ) from error


def _from_restricted_pickle(data: bytes, place: str) -> dict[str, Tensor]:
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise DataError(
            f"{place} cannot be read as plain tensors, and code in a file is never run: "
            "give a state dict written by torch.save, or .safetensors"
        ) from error
    tensors = isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values())
    if not tensors:
        raise DataError(f"{place} holds no state dict of tensors: give the weights alone")
    return dict(state)


@contextlib.contextmanager
def _in_words(place: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise DataError(f"{place}: these tensors are not the network's. {error}") from error


# -- images -------------------------------------------------------------------------------------


def _check_uint8(images: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise DataError(
            f"images are {images.dtype}: give uint8 pixels, rounded as they would be stored"
        )


def _check_shape(images: Tensor, channels: tuple[int, ...], *, smallest_px: int) -> None:
    shape = tuple(images.shape)
    if len(shape) != 4 or shape[1] not in channels:
        wanted = " or ".join(map(str, channels))
        raise DataError(f"images have shape {shape}; the extractor takes (B, {wanted}, H, W)")
    if min(shape[2:]) < smallest_px:
        raise DataError(
            f"images have shape {shape}; the least height and width is {smallest_px} px"
        )
