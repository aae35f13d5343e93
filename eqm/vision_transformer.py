"""The vision transformer of DINOv2, in the layout of its released weights (Oquab et al. 2023).

torch-fidelity takes it from a hub that runs code; here it is written out, and its weights are
tensors that are loaded by name. Sizes are read off their shapes. Called by features.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eqm.errors import DataError

PATCH_PX = 14
HEAD_WIDTH = 64
SIDE_PATCHES = 37
"""Of the images that it was trained on last, 518 px: those of the position embedding."""
NORM_EPS = 1e-6
OFFSET = 0.1
"""Added to the number of patches when positions are interpolated, as in the released code."""
NAMES = {
    384: "dinov2-vit-s-14",
    768: "dinov2-vit-b-14",
    1024: "dinov2-vit-l-14",
    1536: "dinov2-vit-g-14",
}
"""Width -> torch-fidelity's name for it."""


class DINOv2(nn.Module):
    """Normalised images (B, 3, H, W), sides multiples of 14, -> class tokens (B, width)."""

    def __init__(self, width: int, depth: int, *, gated: bool) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + SIDE_PATCHES**2, width))
        # Of its training alone; it is in the files.
        self.mask_token = nn.Parameter(torch.zeros(1, width))
        self.patch_embed = _Patches(width)
        self.blocks = nn.ModuleList(_Block(width, gated=gated) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Class tokens after the last norm."""
        patches = self.patch_embed(x)
        rows, columns = patches.shape[2:]
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], dim=1)
        tokens = tokens + self._positions(rows, columns)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)[:, 0]

    def _positions(self, rows: int, columns: int) -> Tensor:
        of_class, of_patches = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        if (rows, columns) == (SIDE_PATCHES, SIDE_PATCHES):
            return self.pos_embed
        grid = of_patches.unflatten(1, (SIDE_PATCHES, SIDE_PATCHES)).permute(0, 3, 1, 2)
        scale = ((rows + OFFSET) / SIDE_PATCHES, (columns + OFFSET) / SIDE_PATCHES)
        found = F.interpolate(grid, mode="bicubic", scale_factor=scale)
        return torch.cat([of_class, found.flatten(2).transpose(1, 2)], dim=1)


class _Patches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH_PX, stride=PATCH_PX)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class _Block(nn.Module):
    def __init__(self, width: int, *, gated: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=NORM_EPS) for _ in range(2))
        self.attn = _Attention(width)
        self.ls1, self.ls2 = _Scale(width), _Scale(width)
        self.mlp = _GatedMLP(width) if gated else _MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        # (B, N, 3 W) -> three of (B, heads, N, 64)
        query, key, value = self.qkv(x).unflatten(2, (3, -1, HEAD_WIDTH)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value)
        return self.proj(found.transpose(1, 2).flatten(2))


class _Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _GatedMLP(nn.Module):
    """SwiGLU with as many weights, of the largest size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = (4 * width * 2 // 3 + 7) // 8 * 8
        self.w12, self.w3 = nn.Linear(width, 2 * hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


def dinov2_from_state(state: dict[str, Tensor], place: str) -> tuple[str, DINOv2]:
    """Name and network of released weights. Raises DataError for other tensors."""
    token = state.get("cls_token")
    width = token.shape[-1] if token is not None and token.ndim == 3 else 0
    if width not in NAMES:
        raise DataError(
            f"{place} holds no weights of DINOv2: give dinov2_vits14_pretrain.pth, or those of b, "
            "l or g (without registers)"
        )
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    with torch.random.fork_rng(devices=[]):  # initial weights cost nobody a random number
        network = DINOv2(width, depth, gated="blocks.0.mlp.w12.weight" in state)
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise DataError(f"{place}: these tensors are not DINOv2's. {error}") from error
    return NAMES[width], network
