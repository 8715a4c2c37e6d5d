"""Parts that heads with weights share: their convolution, doubling the size, confidence of an alpha."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

VISIBLE_ALPHA = 0.05
"""Pixels below take no part in the confidence: a large empty background says nothing about the thing."""
FOUND_SHARE = 5e-4
"""Share of the frame that must be foreground (alpha over 0.5) for the thing to count as found."""


class ConvNormReLU(nn.Module):
    """3 x 3 convolution without bias, BatchNorm, ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outputs)

    def fold(self) -> None:
        """Take the norm into the convolution's weights, for inference; no training or saving after."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv.eval(), self.norm.eval())
            self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)), inplace=True)


def make_alpha_layers(inputs: int, channels: int) -> nn.Sequential:
    """The last layers before the sigmoid: [B,inputs,H,W] -> [B,1,H,W]."""
    return nn.Sequential(
        nn.Conv2d(inputs, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, 1, 1),
    )


def upsample(x: Tensor) -> Tensor:
    """Twice the size, bilinear, pixel centres kept."""
    return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)


def resize_bilinear(x: Tensor, size: Sequence[int]) -> Tensor:
    """[B,C,h,w] brought to height and width ``size``, bilinear; as it is where it has them already."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def confidence_and_found(alpha: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Confidence [B] in 0..1 and found [B] bool of an alpha [B,1,H,W]; padding ([B,H,W] not valid) counts for nothing.

    Confidence is how decided the alpha is: the mean of |2a - 1| over pixels that are not plain background, 0
    where there are none. Inter-similarity sums to K whether the thing is there or not, so an absent thing shows
    only in an alpha that stays empty.
    """
    alpha = alpha[:, 0]
    visible = (alpha > VISIBLE_ALPHA) & valid
    decided = ((2.0 * alpha - 1.0).abs() * visible).sum((1, 2)) / visible.sum((1, 2)).clamp(min=1)
    share = ((alpha > 0.5) & valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
    return decided, share >= FOUND_SHARE
