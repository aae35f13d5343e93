"""Checkpoints of the official code <-> weights of ours: other names, and the one sign.

The official network points from noise to data, ours (eqm.field) from data to noise, so the last
layer is negated on the way in and out. That is exact, and nothing else is changed: what was
imported is exported bit for bit. The same goes for SiT, whose velocity is data - noise under the
same names; its weights are of ``time="conditioned"``.

A ``.pt`` file is a pickle. It is parsed by torch's restricted unpickler, which knows tensors, plain
values and argparse.Namespace, and calls nothing else. Whether weights are an energy ("dot", "l2")
is not in a file, nor are heads: whoever loads it says so. Called by
first_weights, model and flows.
"""

import io
import math
import re
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from eqm.config import SIZES, NetworkConfig
from eqm.errors import ConfigError, DataError, IntegrityError
from eqm.network import TIME_FREQUENCIES, Transformer
from eqm.storage import LocalStore, hash_file

NAMES = {
    "positions": "pos_embed",
    "patches": "x_embedder.proj",
    "time": "t_embedder.mlp",
    "labels": "y_embedder.embedding_table",
    "attention.qkv": "attn.qkv",
    "attention.out": "attn.proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
    "head": "final_layer",
}
"""Parts of our names -> of official ones."""
ORDER = ("pos_embed", "x_embedder", "t_embedder", "y_embedder", "blocks", "final_layer")
TURNED = ("final_layer.linear.weight", "final_layer.linear.bias")
"""Where the two signs differ."""
HEADS = {width: heads for width, _, heads in SIZES.values()}
"""Width -> heads."""
HELD = ("width", "depth", "heads", "patch", "time", "second_head", "unet")
"""What official networks may differ in; "unet" means nothing to a transformer."""
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True, kw_only=True, eq=False)
class Official:
    """An official checkpoint as ours: what to build, and the weights to put into it."""

    network: NetworkConfig
    shape: tuple[int, int, int]
    """(C, H, W) of one latent."""
    classes: int
    """K: labels go from 0 to K - 1, and K is the null label."""
    tensors: dict[str, Tensor]
    """State dict of the Transformer: our names, our sign."""


# -- weights ------------------------------------------------------------------------------------


def import_official(
    tensors: Mapping[str, Tensor],
    *,
    num_heads: int | None = None,
    time: Literal["constant", "conditioned"] = "constant",
    where: str = "the checkpoint",
) -> Official:
    """Official weights as weights of ours; sizes are read off their shapes.

    Heads go by the width where it is an official one, and must be given for others. ``time`` is
    "conditioned" for weights of SiT. ``pos_embed`` is kept, whatever it holds. ``where`` stands for
    the weights in messages. Raises DataError for what is no official network, with the names of
    weights that are missing, too many or misshapen, and ConfigError for wrong arguments.
    """
    if time not in ("constant", "conditioned"):
        raise ConfigError(f"time is {time!r}; it must be 'constant', or 'conditioned' for SiT")
    _, positions, width = _shape(tensors, "pos_embed", 3, where)
    _, channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4, where)
    rows, _ = _shape(tensors, "y_embedder.embedding_table.weight", 2, where)
    outputs, _ = _shape(tensors, "final_layer.linear.weight", 2, where)
    settings: dict[str, Any] = {
        "width": width,
        "depth": _depth(tensors),
        "heads": _heads(width, num_heads, where),
        "patch": patch,
        "time": time,
        "second_head": outputs == patch**2 * 2 * channels,
    }
    size = patch * _side(positions, where)
    shape = (channels, size, size)
    empty = _empty(settings, shape, rows - 1, where)
    names = {_official_name(name): name for name in empty.state_dict()}
    _check_layout(tensors, {name: empty.state_dict()[names[name]] for name in names}, where)
    found = {names[name]: value for name, value in _turned(tensors).items()}
    return Official(network=empty.config, shape=shape, classes=rows - 1, tensors=found)


def to_official(network: nn.Module) -> dict[str, Tensor]:
    """Official weights of a network, in the official order: copies, on the CPU.

    The inverse of :func:`import_official`, bit for bit. What our own networks (``time="none"``)
    lack is filled with zeros: a time embedder, which adds exactly 0 to the label's embedding, and
    the half of the head that the official code never reads. So it computes the same numbers, with
    the sign turned. Heads are in no file: tell them with it where they are unusual. Raises
    ConfigError, in words, for a network that the official code cannot hold.
    """
    if not isinstance(network, Transformer):
        raise ConfigError(f"{type(network).__name__}: the official code holds transformers alone")
    obstacles = "; ".join(_obstacles(network))
    if obstacles:
        raise ConfigError(
            f"the official code cannot hold this network: {obstacles}. Keep it in our own format"
        )
    state = network.state_dict().items()
    found = _turned({_official_name(name): value.cpu().clone() for name, value in state})
    if network.config.time == "none":
        found |= _silent_time(found["pos_embed"])
        if not network.config.second_head:
            found |= {name: _with_unused_half(found[name], network.shape[0]) for name in TURNED}
    return {name: found[name] for name in sorted(found, key=_place)}


def _official_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _place(name: str) -> int:
    """Where a weight stands; within each part the order of the two codes is one."""
    return ORDER.index(name.partition(".")[0])


def _turned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same weights with the other sign."""
    return {n: -value.detach() if n in TURNED else value for n, value in tensors.items()}


def _shape(tensors: Mapping[str, Tensor], name: str, sizes: int, where: str) -> list[int]:
    if name not in tensors:
        raise DataError(f"{where} is no official network: {name} is missing")
    shape = list(tensors[name].shape)
    if len(shape) != sizes:
        raise DataError(f"{where}: {name} has shape {shape}; an official one has {sizes} sizes")
    return shape


def _heads(width: int, given: int | None, where: str) -> int:
    heads = HEADS.get(width) if given is None else given
    if heads is None:
        raise ConfigError(
            f"{where} is of width {width}, and heads, which it does not hold, are known for "
            f"{', '.join(map(str, HEADS))} alone: give num_heads as it was trained"
        )
    if heads < 1 or width % heads:
        raise ConfigError(f"num_heads is {heads}; it must divide {width}, the width of {where}")
    return heads


def _side(positions: int, where: str) -> int:
    side = math.isqrt(positions)
    if side**2 != positions:
        raise DataError(f"{where}: pos_embed has {positions} positions; they must fill a square")
    return side


def _depth(tensors: Mapping[str, Tensor]) -> int:
    """How many blocks there are, whatever their numbers."""
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})


def _empty(
    settings: Mapping[str, Any], shape: tuple[int, int, int], classes: int, where: str
) -> Transformer:
    """The network without its weights."""
    try:
        config = NetworkConfig(**settings)
        with torch.device("meta"):
            return Transformer(config, size=shape[1:], channels=shape[0], classes=classes)
    except ValueError as error:
        raise DataError(f"{where} is no official network: {error}") from error


def _check_layout(found: Mapping[str, Tensor], right: Mapping[str, Tensor], where: str) -> None:
    wrong = list(_differences(found, right))
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise DataError(
            f"{where} is no official network: {'; '.join(wrong[:3])}{more}. Give the state dict as "
            "the official code saves it"
        )


def _differences(found: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Iterator[str]:
    for name in {**right, **found}:
        if name not in found:
            yield f"{name} is missing"
        elif name not in right:
            yield f"{name} is one too many"
        elif found[name].shape != right[name].shape:
            yield f"{name} has shape {[*found[name].shape]} in place of {[*right[name].shape]}"


def _obstacles(network: Transformer) -> Iterator[str]:
    """What the official code has no place for."""
    for one in fields(network.config):
        value = getattr(network.config, one.name)
        if one.name not in HELD and value != one.default:
            yield f"network.{one.name} is {value!r}, and there it is {one.default!r}"
    if network.grid[0] != network.grid[1]:
        yield f"latents are {network.shape[1]} x {network.shape[2]}, and there they are square"
    if network.classes is None:
        yield "it has no labels"


def _silent_time(like: Tensor) -> dict[str, Tensor]:
    """A time embedder that says 0, of the width and dtype of ``like`` (..., D)."""
    width = like.shape[-1]
    return {
        "t_embedder.mlp.0.weight": like.new_zeros(width, TIME_FREQUENCIES),
        "t_embedder.mlp.0.bias": like.new_zeros(width),
        "t_embedder.mlp.2.weight": like.new_zeros(width, width),
        "t_embedder.mlp.2.bias": like.new_zeros(width),
    }


def _with_unused_half(head: Tensor, channels: int) -> Tensor:
    """Rows (P * P * C, ...) of the head -> (P * P * 2 C, ...): channels vary fastest."""
    cells = head.unflatten(0, (-1, channels))
    return torch.cat((cells, torch.zeros_like(cells)), dim=1).flatten(0, 1)


# -- files --------------------------------------------------------------------------------------


def read_official(
    path: str | Path, *, weights: str = "ema", sha256: str | None = None
) -> dict[str, Tensor]:
    """Weights of an official ``.pt`` file, on the CPU, under the names they have there.

    A checkpoint of train.py holds averaged ("ema") and "raw" weights. A file of one set, flat or
    under "model", is what was released, and taken for "ema". No code in a file is run. ``sha256``
    is checked before anything is parsed; without it, the checksums in the file are (there are none
    in the format of before torch 1.6). Raises DataError for a file that is missing or holds other
    things than finite weights, IntegrityError for one that is damaged or asks for code, ConfigError
    for other ``weights``.
    """
    path = Path(path)
    if weights not in ("ema", "raw"):
        raise ConfigError(f"weights is {weights!r}; it must be 'ema' or 'raw'")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; give the path of an official .pt file")
    found = _chosen(_parsed(path, sha256), weights, path)
    for name, value in found.items():
        complaint = _complaint(name, value)
        if complaint:
            raise DataError(f"{path}: weight {name!r} {complaint}")
    # Until here they are mapped from the file, so the others cost no memory, and it may be changed.
    return {name: value.detach().clone() for name, value in found.items()}


def write_official(
    path: str | Path,
    ema: Mapping[str, Tensor],
    *,
    raw: Mapping[str, Tensor] | None = None,
    args: Mapping[str, object] | None = None,
) -> None:
    """Write weights of :func:`to_official` as a file that the official code loads.

    With ``raw`` it is a checkpoint of train.py, of an optimiser that has seen nothing; without, the
    averaged weights alone. ``args`` adds to the arguments of train.py that weights tell (the name
    of a model, by its size), or replaces some: {"ebm": "dot"}. Raises ConfigError where there is a
    file already, StoreError where none can be written.
    """
    path, content = Path(path), dict(ema)
    if raw is not None:
        given = Namespace(**{**_arguments(ema), **(args or {})})
        untrained = {"state": {}, "param_groups": []}
        content = {"model": dict(raw), "ema": content, "opt": untrained, "args": given}
    elif args is not None:
        raise ConfigError(f"args {dict(args)} belong in a checkpoint of train.py: give raw as well")
    data = io.BytesIO()
    torch.save(content, data)
    if not LocalStore(path.parent).write_once(path.name, data.getvalue()):
        raise ConfigError(f"{path} exists: remove it, or choose another name")


def _parsed(path: Path, sha256: str | None) -> Any:
    """Content of a .pt file, mapped where its format allows. Raises IntegrityError."""
    if sha256 is not None and hash_file(path) != sha256:
        raise IntegrityError(
            f"{path} has SHA-256 {hash_file(path)}, but {sha256} is expected: fetch the file "
            "again, or correct the digest if you trust this file"
        )
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped and sha256 is None:
            _check_sums(path)
        with torch.serialization.safe_globals([Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:
        # Foreign bytes can break their parsers anywhere: a dozen kinds of error were seen.
        raise IntegrityError(_fault(path, error)) from error


def _check_sums(path: Path) -> None:
    # torch writes checksums, and never looks at them again.
    with zipfile.ZipFile(path) as file:
        damaged = file.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} does not match its checksum")


def _fault(path: Path, error: Exception) -> str:
    """What to say of an error of torch's, which itself tells how to let such a file run code."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if asked:
        return (
            f"{path} asks for {asked[1]}, and code in a file is never run: get a file of tensors "
            "alone from whoever made it"
        )
    kind = type(error).__name__
    return f"{path} is damaged, or no checkpoint that torch wrote ({kind}): fetch it again"


def _chosen(content: Any, weights: str, path: Path) -> dict[Any, Any]:
    """The set of weights that was asked for. Raises DataError."""
    sets = content if isinstance(content, dict) else {}
    if weights == "raw" and "model" not in sets:
        raise DataError(f"{path} has no raw weights beside the averaged ones: load those ('ema')")
    averaged = sets.get("ema", sets.get("model", sets))
    chosen = sets["model"] if weights == "raw" else averaged
    if not isinstance(chosen, dict) or not chosen:
        raise DataError(f"{path} holds no dict of tensors for {weights!r}: give a state dict")
    return chosen


def _complaint(name: object, value: Any) -> str | None:
    """Why this is no weight of an official network, and what to do."""
    plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided
    if not plain or not isinstance(name, str):
        return f"is a {type(value).__name__}; weights are plain tensors with a name"
    if name.startswith("module."):
        return "has the prefix of DistributedDataParallel: save model.module.state_dict()"
    if value.dtype not in FLOATS or value.is_meta:
        return f"is {value.dtype} on {value.device}: weights are floats, with values"
    if value.nbytes > value.untyped_storage().nbytes():
        return "claims more values than the file has: it was not saved by the official code"
    if not bool(value.isfinite().all()):
        return "is not finite: training diverged, or the file is damaged; take an earlier one"
    return None


def _arguments(tensors: Mapping[str, Tensor]) -> dict[str, object]:
    """Arguments of train.py, as far as weights tell, for a field that is no energy."""
    width, _, patch, _ = tensors["x_embedder.proj.weight"].shape
    size = (width, _depth(tensors))
    named = [name for name, known in SIZES.items() if known[:2] == size and patch in (2, 4, 8)]
    model = {"model": f"EqM-{named[0]}/{patch}"} if named else {}
    classes = len(tensors["y_embedder.embedding_table.weight"]) - 1
    return {**model, "num_classes": classes, "ebm": "none", "uncond": True}
