"""Layers and functions that several trained heads use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VISIBLE_ALPHA = 0.05
"""Pixels with a lower alpha do not count for the confidence: a large background says nothing about the object."""
FOUND_FRACTION = 5e-4
"""Fraction of the frame that must be foreground (alpha over 0.5) for the object to count as found."""


class ConvNormReLU(nn.Module):
    """3 x 3 convolution without bias, BatchNorm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)


def gelu(x: Tensor) -> Tensor:
    """Return GELU of a tensor that is not used afterwards; computed in place if no gradient is needed."""
    if x.requires_grad:
        return F.gelu(x)
    y: Tensor = torch.ops.aten.gelu_(x)
    return y


def make_alpha_layers(inputs: int, channels: int) -> nn.Sequential:
    """Return the last layers of a decoder, which compute the logit of alpha: [B,inputs,H,W] -> [B,1,H,W]."""
    return nn.Sequential(
        nn.Conv2d(inputs, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, 1, 1),
    )


def upsample_2x(x: Tensor) -> Tensor:
    """Double height and width of [B,C,h,w] bilinearly; pixel centres are aligned as in ``align_corners=False``."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def resize_bilinear(x: Tensor, size: Sequence[int]) -> Tensor:
    """Resize [B,C,h,w] bilinearly to (height, width) ``size``; return ``x`` itself if it has this size."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def confidence_and_found(alpha: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Return the confidence of alphas [B,1,H,W], float32 [B] in 0..1, and whether they contain an object, bool [B].

    The confidence is the mean of |2a - 1| over the pixels that are not background, and 0 if there are none. The
    padding, where ``valid`` [B,H,W] is False, does not count. Only an empty alpha shows that the object is absent,
    because the sum of the inter-similarity does not depend on its presence.
    """
    alpha = alpha[:, 0]
    visible = (alpha > VISIBLE_ALPHA) & valid
    confidence = ((2.0 * alpha - 1.0).abs() * visible).sum((1, 2)) / visible.sum((1, 2)).clamp(min=1)
    foreground_fraction = ((alpha > 0.5) & valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
    return confidence, foreground_fraction >= FOUND_FRACTION
