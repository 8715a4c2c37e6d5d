"""The image encoder of MobileSAM: TinyViT-5M, distilled from the encoder of Segment Anything.

Sources: Zhang et al., "Faster Segment Anything: Towards Lightweight SAM for Mobile Applications"
    (2023), section 3; Wu
et al., "TinyViT: Fast Pretraining Distillation for Small Vision Transformers" (ECCV 2022). The last stage does not
reduce the resolution, so a cell is 16 px.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.model.contracts import IMAGENET_MEAN, IMAGENET_STD

CELL_PX = 16
"""Side of a cell of the embedding, in px."""
EMBED_DIM = 256
"""Channels of the embedding."""
STAGE_WIDTHS = (64, 128, 160, 320)
"""Channels of each stage."""
STAGE_DEPTHS = (2, 2, 6, 2)
"""Blocks of each stage."""
STAGE_HEADS = (2, 4, 5, 10)
"""Attention heads of each stage; the first stage has no attention."""
STAGE_WINDOWS = (7, 7, 14, 7)
"""Side of the attention windows of each stage, in cells."""
STAGE_STRIDES = (2, 2, 1)
"""Strides between the stages. A cell of the first stage is 4 px."""
EXPANSION_RATIO = 4
"""Ratio of the hidden channels of a block to its channels."""


class TinyViT(nn.Module):
    """Computes the embedding [B,256,H/16,W/16] of images, sRGB [B,3,H,W] in 0..1; H and W are multiples of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Sequential(
            ConvNorm(3, STAGE_WIDTHS[0] // 2, 3, stride=2),
            nn.GELU(),
            ConvNorm(STAGE_WIDTHS[0] // 2, STAGE_WIDTHS[0], 3, stride=2),
        )
        blocks: list[nn.Module] = [nn.Sequential(*(ConvBlock(STAGE_WIDTHS[0]) for _ in range(STAGE_DEPTHS[0])))]
        for width, depth, heads, window in zip(
            STAGE_WIDTHS[1:], STAGE_DEPTHS[1:], STAGE_HEADS[1:], STAGE_WINDOWS[1:], strict=True
        ):
            blocks.append(nn.Sequential(*(WindowBlock(width, heads, window) for _ in range(depth))))
        self.stages = nn.ModuleList(blocks)
        self.steps = nn.ModuleList(
            StageTransition(before, after, stride)
            for (before, after), stride in zip(itertools.pairwise(STAGE_WIDTHS), STAGE_STRIDES, strict=True)
        )
        self.neck = nn.Sequential(
            nn.Conv2d(STAGE_WIDTHS[-1], EMBED_DIM, 1, bias=False),
            ChannelNorm(EMBED_DIM),
            nn.Conv2d(EMBED_DIM, EMBED_DIM, 3, padding=1, bias=False),
            ChannelNorm(EMBED_DIM),
        )

    def forward(self, image: Tensor) -> Tensor:
        first = self.patches[0]
        assert isinstance(first, ConvNorm)
        mean, std = (torch.tensor(each, device=image.device)[:, None, None] for each in (IMAGENET_MEAN, IMAGENET_STD))
        x = self.patches(((image.float() - mean) / std).to(first.conv.weight.dtype))
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index < len(self.steps):
                x = self.steps[index](x)
        embedding: Tensor = self.neck(x)
        return embedding

    def fold_batch_norms(self) -> None:
        """Fold all BatchNorms into their convolutions, for inference."""
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold_norm()


class ConvNorm(nn.Module):
    """Convolution without bias, and BatchNorm."""

    def __init__(self, inputs: int, outputs: int, side: int, *, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        return y

    @torch.no_grad()
    def fold_norm(self) -> None:
        """Fold the BatchNorm into the convolution. The module can then not be trained or saved."""
        norm = self.norm
        if not isinstance(norm, nn.BatchNorm2d):
            return
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        self.conv.weight.mul_(scale[:, None, None, None])
        self.conv.bias = nn.Parameter(norm.bias - norm.running_mean * scale, requires_grad=False)
        self.norm = nn.Identity()


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each cell of [B,C,h,w]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], self.weight, self.bias, 1e-6)
        return y.permute(0, 3, 1, 2)


class ConvBlock(nn.Module):
    """Inverted residual block: expansion, depthwise convolution and reduction, added to the input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        inner = EXPANSION_RATIO * width
        self.expand = ConvNorm(width, inner, 1)
        self.depthwise = ConvNorm(inner, inner, 3, groups=inner)
        self.reduce = ConvNorm(inner, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x + self.reduce(F.gelu(self.depthwise(F.gelu(self.expand(x))))))


class StageTransition(nn.Module):
    """Changes the channels and resolution of one stage to those of the next."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.expand = ConvNorm(before, after, 1)
        self.depthwise = ConvNorm(after, after, 3, stride=stride, groups=after)
        self.reduce = ConvNorm(after, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.reduce(F.gelu(self.depthwise(F.gelu(self.expand(x)))))
        return y


class WindowBlock(nn.Module):
    """Attention within windows, a depthwise convolution across their borders, and an MLP."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.attention = WindowAttention(width, heads, window)
        self.local = ConvNorm(width, width, 3, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, EXPANSION_RATIO * width)
        self.reduce = nn.Linear(EXPANSION_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self._attend_in_windows(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.local(x)
        cells = x.permute(0, 2, 3, 1)
        cells = cells + self.reduce(F.gelu(self.expand(self.norm(cells))))
        return cells.permute(0, 3, 1, 2)

    def _attend_in_windows(self, x: Tensor) -> Tensor:
        """Compute the attention of [B,h,w,C] in windows, padded with zeros."""
        count, height, width, channels = x.shape
        side = self.window
        x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.reshape(count, rows, side, columns, side, channels).transpose(2, 3)
        x = self.attention(x.reshape(-1, side * side, channels))
        x = x.reshape(count, rows, columns, side, side, channels).transpose(2, 3)
        return x.reshape(count, rows * side, columns * side, channels)[:, :height, :width]


class WindowAttention(nn.Module):
    """Attention between the cells of a window, with a learned bias for each distance."""

    offsets: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.biases = nn.Parameter(torch.zeros(heads, window * window))
        side = torch.arange(window)
        rows, columns = (each.flatten() for each in torch.meshgrid(side, side, indexing="ij"))
        distances = (rows[:, None] - rows).abs() * window + (columns[:, None] - columns).abs()
        self.register_buffer("offsets", distances, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        # In the pretrained weights, query, key and value of a head are adjacent.
        query, key, value = self.qkv(self.norm(x)).unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        bias = self.biases[None, :, self.offsets].to(query.dtype)  # 4 axes: with 3 the kernel is twice as slow
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        y: Tensor = self.project(attended.transpose(1, 2).flatten(2))
        return y


def convert_encoder_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of MobileSAM's encoder by their names in this module, without the unused classifier."""
    start, classifier = "image_encoder.", ("head.", "norm_head.")
    names = [name.removeprefix(start) for name in tensors if name.startswith(start)]
    return {_convert_encoder_name(name): tensors[start + name] for name in names if not name.startswith(classifier)}


def _convert_encoder_name(published: str) -> str:
    name = published.replace(".c.", ".conv.").replace(".bn.", ".norm.")
    if name.startswith("patch_embed.seq."):
        return name.replace("patch_embed.seq.", "patches.")
    if name.startswith("neck."):
        return name
    _, stage, rest = name.split(".", 2)
    for theirs, ours in (("conv1", "expand"), ("conv2", "depthwise"), ("conv3", "reduce"), ("local_conv", "local")):
        rest = rest.replace(theirs, ours)
    for theirs, ours in (
        ("attn.attention_biases", "attention.biases"),
        ("attn.proj", "attention.project"),
        ("attn.", "attention."),
        ("mlp.norm", "norm"),
        ("mlp.fc1", "expand"),
        ("mlp.fc2", "reduce"),
    ):
        rest = rest.replace(theirs, ours)
    if rest.startswith("downsample."):
        return f"steps.{stage}.{rest.removeprefix('downsample.')}"
    return f"stages.{stage}.{rest.removeprefix('blocks.')}"
