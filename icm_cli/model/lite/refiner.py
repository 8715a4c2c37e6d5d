"""The refining network: a picture and a coarse alpha in, the alpha with its edges out. It knows no class.

The same weights look twice, as CascadePSP does (Cheng et al., CVPR 2020): once at the whole picture, brought to
``RefineConfig.whole_px``, where a coarse alpha of a few hundred tokens becomes an outline; then at tiles of a larger
one, of the source's own pixels or at least ``RefineConfig.again`` times the first, where that outline becomes an edge.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.errors import ConfigError
from icm_cli.geometry import Float, ImageU8, downscaled_size, resize
from icm_cli.model.contracts import Edges
from icm_cli.model.lite.tiles import Box, blended

OPEN = 0.05
"""A coarse alpha further than this from 0 and 1 is open."""
CORE_PX = 640
"""Longest side at which it is judged where no edge is near."""
CORE_FULL, CORE_EMPTY = 0.8, 0.15
"""Alphas that are solid in the core of a thing, and clear far beside it."""
UNSHUFFLE = 2
"""Side of the square of pixels that becomes channels at the first layer."""


@dataclass(frozen=True)
class RefineConfig:
    """Settings of the refining network."""

    widths: tuple[int, ...] = (32, 48, 64, 96, 128)
    """Channels of each scale, from half the picture's size on, each half as fine as the one before."""
    details: int = 0
    """Residual pairs of convolutions before the answer, at half the picture's size."""
    whole_px: int = 1024
    """Long side, in px, at which the whole picture is refined."""
    tile_px: int = 256
    """Side, in px, of the tiles of a larger source."""
    overlap_px: int = 32
    """Overlap of tiles, in px; they are blended there."""
    again: float = 1.0
    """Size of the second look beside that of the first, at least; with 1 only sources larger than ``whole_px`` get a
    second look. Strands of a pixel's width are told better when enlarged."""
    least_alpha: float = 0.02
    """A coarse alpha is kept this far from 0 and 1 before its logit is taken, so that the network can overrule it."""
    reach: float = 0.06
    """Distance, as a share of the long side, from what is open in the coarse alpha beyond which it stays as it is, in
    either look; what looks like an edge there belongs to something else."""
    core: float = 0.015
    """Distance, as a share of the long side, from every edge beyond which the thing is made solid and what is beside it
    clear; 0: as the network has it."""
    undecided: float = 0.01
    """Tiles whose alpha is everywhere nearer to 0 or everywhere nearer to 1 than this are left as they are."""

    def __post_init__(self) -> None:
        if len(self.widths) < 2 or min(self.widths) < 1:
            raise ConfigError(f"edges widths is {list(self.widths)}; expected two or more numbers of 1 or more")
        multiple = self.multiple
        for name in ("whole_px", "tile_px"):
            if (value := getattr(self, name)) < multiple or value % multiple:
                raise ConfigError(f"edges {name} is {value}; expected a multiple of {multiple}")
        if not 0 <= self.overlap_px <= self.tile_px // 2:
            raise ConfigError(f"edges overlap_px is {self.overlap_px}; expected 0 to half of tile_px")
        for name, least, most in (("details", 0, 64), ("again", 1, 4), ("core", 0, 0.25)):
            if not least <= getattr(self, name) <= most:
                raise ConfigError(f"edges {name} is {getattr(self, name)}; expected {least} to {most}")
        if not 0 <= self.undecided < 0.5:
            raise ConfigError(f"edges undecided is {self.undecided}; expected 0 to below 0.5")
        if not 0 < self.reach <= 2:
            raise ConfigError(f"edges reach is {self.reach}; expected more than 0 and at most 2")
        if not 0 < self.least_alpha < 0.5:
            raise ConfigError(f"edges least_alpha is {self.least_alpha}; expected more than 0 and less than 0.5")

    @property
    def multiple(self) -> int:
        """Side in px of which pictures are padded to a multiple."""
        return UNSHUFFLE * 2 ** (len(self.widths) - 1)


class ConvReLU(nn.Module):
    """3 x 3 convolution and ReLU. Without a norm: crops of a small batch are too unlike for BatchNorm's statistics."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        nn.init.kaiming_normal_(self.conv.weight, nonlinearity="relu")
        assert self.conv.bias is not None
        nn.init.zeros_(self.conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x), inplace=True)


class Residual(nn.Module):
    """Two 3 x 3 convolutions with a ReLU between them, whose answer is added to what they are given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = ConvReLU(width, width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        _make_zero(self.second)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = x + self.second(self.first(x))
        return found


class Refine(Edges):
    """A U-Net on pixel-unshuffled input that corrects the logit of a coarse alpha."""

    Config = RefineConfig
    is_trained = True

    def __init__(self, config: RefineConfig) -> None:
        super().__init__()
        self.config = config
        inputs = (3 + 1) * UNSHUFFLE**2
        widths = config.widths
        self.stem = _convolutions(inputs, widths[0])
        self.down = nn.ModuleList(
            nn.Sequential(ConvReLU(before, after, stride=2), _convolutions(after, after))
            for before, after in itertools.pairwise(widths)
        )
        self.up = nn.ModuleList(_convolutions(coarse + fine, fine) for fine, coarse in itertools.pairwise(widths))
        self.details = nn.Sequential(*(Residual(widths[0]) for _ in range(config.details)))
        self.output = nn.Conv2d(widths[0], UNSHUFFLE**2, 3, padding=1)
        _make_zero(self.output)  # before training the coarse alpha passes as it is

    def set_dtype(self, dtype: torch.dtype, fast_dtype: torch.dtype) -> None:  # noqa: ARG002
        self.to(fast_dtype)

    def forward(self, image: Tensor, coarse: Tensor) -> Tensor:
        """image [B,3,H,W] sRGB and coarse alpha [B,1,H,W], both 0..1, H and W multiples of ``config.multiple`` ->
        the logit of the alpha [B,1,H,W] float32."""
        logit = torch.logit(coarse.float(), eps=self.config.least_alpha)
        dtype = self.output.weight.dtype
        x = torch.cat([4.0 * image.float() - 2.0, logit / 2.0], dim=1).to(dtype)
        x = self.stem(F.pixel_unshuffle(x, UNSHUFFLE))
        scales = [x]
        for step in self.down:
            scales.append(step(scales[-1]))
        x = scales.pop()
        for step, fine in zip(reversed(self.up), reversed(scales), strict=True):
            x = step(torch.cat([F.interpolate(x, scale_factor=2.0, mode="nearest"), fine], dim=1))
        return logit + F.pixel_shuffle(self.output(self.details(x)), UNSHUFFLE).float()

    @torch.inference_mode()
    def refined(self, rgb: ImageU8, coarse: Float) -> Float:
        """A coarse alpha [h,w] 0..1 of any size and its picture, sRGB uint8 [H,W,3] -> the alpha float32 [H,W] 0..1."""
        config = self.config
        height, width = rgb.shape[:2]
        if not self._is_open(coarse):
            return resize(coarse.astype(np.float32), (height, width))
        scale = min(1.0, config.whole_px / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        small = resize(coarse, size).astype(np.float32)
        near = self._near_what_is_open(small)
        alpha = small + near * (self._run(resize(rgb, size), small) - small)
        grown = max(height, config.again * size[0]), max(width, config.again * size[1])
        second = round(grown[0]), round(grown[1])
        if second != size:
            alpha = self._tiled(resize(rgb, second), resize(alpha, second), resize(near, second))
        return self._with_core(resize(alpha, (height, width)))

    def _tiled(self, rgb: ImageU8, alpha: Float, near: Float) -> Float:
        """The alpha [H,W] refined at its own size where it is undecided, by the weights ``near`` [H,W]; tiles that
        overlap are blended."""
        config = self.config

        def answer(box: Box) -> Float:
            coarse, weight = alpha[box], near[box]
            if not weight.any() or not self._is_open(coarse):
                return coarse
            found: Float = coarse + weight * (self._run(rgb[box], coarse) - coarse)
            return found

        return blended((alpha.shape[0], alpha.shape[1]), config.tile_px, config.overlap_px, answer)

    def _with_core(self, alpha: Float) -> Float:
        """An alpha [H,W] whose thing is solid where no edge is near, and clear beside it."""
        if not self.config.core:
            return alpha
        size = (alpha.shape[0], alpha.shape[1])
        small = resize(alpha, downscaled_size(size, CORE_PX))
        reach = max(1, round(self.config.core * max(small.shape)))
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
        least, most = (cv2.blur(each(small, disc), (reach, reach)) for each in (cv2.erode, cv2.dilate))
        inside, beside = (np.clip((each - 0.5) / 0.3, 0.0, 1.0) for each in (least, 1.0 - most))
        full = resize((1.0 - (1.0 - CORE_FULL) * inside).astype(np.float32), size)
        empty = resize((CORE_EMPTY * beside).astype(np.float32), size)
        return np.clip((alpha - empty) / (full - empty), 0.0, 1.0)

    def _is_open(self, coarse: Float) -> bool:
        """Whether there is anything to decide: an alpha that is neither 0 nor 1, or both of them."""
        far = float(np.minimum(coarse, 1.0 - coarse).max()) > self.config.undecided
        return far or bool(coarse.min() < 0.5 < coarse.max())

    def _near_what_is_open(self, coarse: Float) -> Float:
        """Weights [h,w]: 1 near to what is open in a coarse alpha [h,w], falling to 0 at ``config.reach``."""
        inside = (coarse > 0.5).astype(np.uint8)
        edge = cv2.morphologyEx(inside, cv2.MORPH_GRADIENT, np.ones((3, 3), np.uint8)) > 0
        is_open = edge | (np.minimum(coarse, 1.0 - coarse) > OPEN)
        distance = cv2.distanceTransform((~is_open).astype(np.uint8), cv2.DIST_L2, 5)
        reach = self.config.reach * max(coarse.shape)
        return np.clip(2.0 - 2.0 * np.minimum(distance, reach) / reach, 0.0, 1.0).astype(np.float32)

    def _run(self, rgb: ImageU8, coarse: Float) -> Float:
        """Refine one picture [H,W,3] with its coarse alpha [H,W], padded to what the network takes."""
        height, width = coarse.shape
        below, right = (-length % self.config.multiple for length in (height, width))
        place = self.output.weight.device
        pad = ((0, below), (0, right))
        image = torch.from_numpy(np.pad(rgb, (*pad, (0, 0)), mode="edge")).to(place).permute(2, 0, 1)[None]
        alpha = torch.from_numpy(np.pad(coarse.astype(np.float32), pad, mode="edge")).to(place)[None, None]
        logit = self(image.float() / 255.0, alpha)
        found: Float = torch.sigmoid(logit)[0, 0, :height, :width].cpu().numpy()
        return found


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ConvReLU(inputs, outputs), ConvReLU(outputs, outputs))


def _make_zero(conv: nn.Conv2d) -> None:
    nn.init.zeros_(conv.weight)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
