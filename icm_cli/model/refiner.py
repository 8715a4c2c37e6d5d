"""The refining network: a picture and a coarse alpha in, the alpha with its edges out. It knows no class.

The same weights look twice, as CascadePSP does (Cheng et al., CVPR 2020): once at the whole picture, brought to
``RefinerConfig.whole_px``, where a coarse alpha of a few hundred tokens becomes an outline; then, where the source is
larger, at tiles of the source's own pixels, where that outline becomes an edge.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.errors import ConfigError

ALPHA_EPS = 1e-3
"""A coarse alpha is kept this far from 0 and 1 before its logit is taken."""
UNSHUFFLE = 2
"""Side of the square of pixels that becomes channels at the first layer."""


@dataclass(frozen=True)
class RefinerConfig:
    """Settings of the refining network."""

    widths: tuple[int, ...] = (32, 48, 64, 96, 128)
    """Channels of each scale, from half the picture's size on, each half as fine as the one before."""
    whole_px: int = 512
    """Long side, in px, at which the whole picture is refined."""
    tile_px: int = 512
    """Side, in px, of the tiles of a larger source."""
    overlap_px: int = 64
    """By how much tiles overlap; they are blended there."""
    undecided: float = 0.01
    """Tiles whose alpha is everywhere nearer to 0 or everywhere nearer to 1 than this are left as they are."""

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ConfigError(f"refiner widths is {list(self.widths)}; expected two or more numbers of 1 or more")
        multiple = self.multiple
        for name in ("whole_px", "tile_px"):
            if (value := getattr(self, name)) < multiple or value % multiple:
                raise ConfigError(f"refiner {name} is {value}; expected a multiple of {multiple}")
        if not 0 <= self.overlap_px <= self.tile_px // 2:
            raise ConfigError(f"refiner overlap_px is {self.overlap_px}; expected 0 to half of tile_px")
        if not 0 <= self.undecided < 0.5:
            raise ConfigError(f"refiner undecided is {self.undecided}; expected 0 to below 0.5")

    @property
    def multiple(self) -> int:
        """What the network's pictures are padded to a multiple of, in px."""
        return UNSHUFFLE * 2 ** (len(self.widths) - 1)


class Refiner(nn.Module):
    """A U-Net on pixel-unshuffled input that corrects the logit of a coarse alpha."""

    def __init__(self, config: RefinerConfig) -> None:
        super().__init__()
        self.config = config
        inputs = (3 + 1) * UNSHUFFLE**2
        widths = config.widths
        self.stem = _convolutions(inputs, widths[0])
        self.down = nn.ModuleList(
            nn.Sequential(_convolution(before, after, stride=2), _convolutions(after, after))
            for before, after in itertools.pairwise(widths)
        )
        self.up = nn.ModuleList(
            _convolutions(coarse + fine, fine) for fine, coarse in itertools.pairwise(widths)
        )
        self.output = nn.Conv2d(widths[0], UNSHUFFLE**2, 3, padding=1)
        nn.init.zeros_(self.output.weight)  # before training the coarse alpha passes as it is
        assert self.output.bias is not None
        nn.init.zeros_(self.output.bias)

    def forward(self, image: Tensor, coarse: Tensor) -> Tensor:
        """image [B,3,H,W] sRGB and coarse alpha [B,1,H,W], both 0..1, H and W multiples of ``config.multiple`` ->
        the logit of the alpha [B,1,H,W] float32."""
        logit = torch.logit(coarse.float(), eps=ALPHA_EPS)
        dtype = self.output.weight.dtype
        x = torch.cat([4.0 * image.float() - 2.0, logit / 2.0], dim=1).to(dtype)
        x = self.stem(F.pixel_unshuffle(x, UNSHUFFLE))
        scales = [x]
        for step in self.down:
            scales.append(step(scales[-1]))
        x = scales.pop()
        for step, fine in zip(reversed(self.up), reversed(scales), strict=True):
            x = step(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), fine], dim=1))
        return logit + F.pixel_shuffle(self.output(x), UNSHUFFLE).float()


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(_convolution(inputs, outputs), _convolution(outputs, outputs))
