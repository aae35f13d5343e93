"""Vision transformers as Hugging Face's transformers writes them -> the names of their releases.

The tensors are the same; queries, keys and values are three there and one here, and the last
projection of CLIP lies the other way. Names are looked up, nothing is guessed: a tensor that is not
in the layout (registers, say) stays as it is, and is refused where the network is filled. Called by
features.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

State = Mapping[str, Tensor]

DINOV2 = {
    "embeddings.cls_token": "cls_token",
    "embeddings.mask_token": "mask_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "layernorm": "norm",
}
DINOV2_BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attention.output.dense": "attn.proj",
    "layer_scale1.lambda1": "ls1.gamma",
    "layer_scale2.lambda1": "ls2.gamma",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "mlp.weights_in": "mlp.w12",
    "mlp.weights_out": "mlp.w3",
}
DINOV2_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))

CLIP = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    # So spelt there.
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
}
CLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
CLIP_QKV = tuple(f"self_attn.{part}_proj" for part in "qkv")


def released_dinov2(state: State) -> dict[str, Tensor]:
    """DINOv2's tensors by their released names; a state of those names comes back as it is."""
    own = _below(state, "dinov2.")
    if "embeddings.cls_token" not in own:
        return dict(state)
    found = _renamed(own, DINOV2, "", "")
    for k in _numbers(own, "encoder.layer."):
        there, here = f"encoder.layer.{k}.", f"blocks.{k}."
        found |= _renamed(own, DINOV2_BLOCK, there, here)
        found |= _joined(own, DINOV2_QKV, there, f"{here}attn.qkv.{{}}")
    return {**own, **found}


def released_clip(state: State) -> dict[str, Tensor]:
    """CLIP's tensors of images by their released names; such a state comes back as it is."""
    if "vision_model.embeddings.class_embedding" not in state:
        return dict(state)
    own = _below(state, "vision_model.")
    # Numbers from 0 on, which some versions wrote down.
    own.pop("embeddings.position_ids", None)
    found = _renamed(own, CLIP, "", "visual.")
    for k in _numbers(own, "encoder.layers."):
        there, here = f"encoder.layers.{k}.", f"visual.transformer.resblocks.{k}."
        found |= _renamed(own, CLIP_BLOCK, there, here)
        found |= _joined(own, CLIP_QKV, there, f"{here}attn.in_proj_{{}}")
    if "visual_projection.weight" in state:
        found["visual.proj"] = state["visual_projection.weight"].T.contiguous()
    return {**{f"visual.{k}": v for k, v in own.items()}, **found}


def _below(state: State, prefix: str) -> dict[str, Tensor]:
    """Tensors whose names begin so, without that; all where none does."""
    found = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    return found or dict(state)


def _numbers(state: State, prefix: str) -> list[int]:
    """Of the blocks that there are."""
    heads = {k.removeprefix(prefix).split(".")[0] for k in state if k.startswith(prefix)}
    return sorted(int(head) for head in heads if head.isdigit())


def _renamed(
    state: dict[str, Tensor], names: Mapping[str, str], there: str, here: str
) -> dict[str, Tensor]:
    """Tensors of some names, with or without a weight and a bias; they are taken out of a state."""
    return {
        f"{here}{new}{end}": state.pop(f"{there}{old}{end}")
        for old, new in names.items()
        for end in ("", ".weight", ".bias")
        if f"{there}{old}{end}" in state
    }


def _joined(
    state: dict[str, Tensor], three: tuple[str, ...], there: str, here: str
) -> dict[str, Tensor]:
    """Queries, keys and values as one tensor, where all three are there; taken out of a state."""
    kinds = [k for k in ("weight", "bias") if all(f"{there}{one}.{k}" in state for one in three)]
    return {
        here.format(k): torch.cat([state.pop(f"{there}{one}.{k}") for one in three]) for k in kinds
    }
