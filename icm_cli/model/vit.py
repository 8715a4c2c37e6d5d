"""A vision transformer in DINOv2's form: patches of 14 px, a class token, learned positions, LayerScale.

Oquab et al., "DINOv2: Learning Robust Visual Features without Supervision" (2023); Dosovitskiy et al. (2021).
"""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH_PX = 14
POSITIONS = 37
"""The learned positions are a square grid of so many; other grids take them interpolated."""
NORM_EPS = 1e-6


class VisionTransformer(nn.Module):
    """The first blocks of a vision transformer."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH_PX, PATCH_PX)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.class_position = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, width, POSITIONS, POSITIONS))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))

    def forward(self, image: Tensor, layers: Collection[int]) -> list[Tensor]:
        """image [B,3,14h,14w], normalised as in training -> the outputs of ``layers`` (1: the first block's) in their
        order from the first block on, each [B,C,h,w]: its patches' tokens, not normalised."""
        x = self.patches(image)
        grid = x.shape[-2:]
        x = (x + self._positions(grid).to(x.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([(self.class_token + self.class_position).expand(len(x), -1, -1), x], dim=1)
        outputs = []
        for number, block in enumerate(self.blocks[: max(layers)], start=1):
            x = block(x)
            if number in layers:
                outputs.append(x[:, 1:].transpose(1, 2).unflatten(2, grid))
        return outputs

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        return F.interpolate(self.positions.float(), size=grid, mode="bicubic", align_corners=False)


class Block(nn.Module):
    """Attention, then a perceptron, each behind a LayerNorm and scaled before it is added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.expand = nn.Linear(width, 4 * width)
        self.reduce = nn.Linear(4 * width, width)
        self.scale2 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.scale1 * self.project(attended)
        return x + self.scale2 * self.reduce(F.gelu(self.expand(self.norm2(x))))
