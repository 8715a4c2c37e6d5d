"""The losses of training, exact to the published code (Guo et al. 2024, section 4; its trimap losses are ViTMatte's).

A loss is one number a sample, [B]; the published total sums them over the batch. Everything is float32.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from icm_cli.errors import ConfigError
from icm_cli.scoring.metrics import UNKNOWN_RANGE

BinaryRule = Literal["binary", "constant"]

REGION_SCALE = 512.0 * 512.0
"""Region losses are means over the region, times this over its number of pixels, whatever the image's size."""
LAPLACIAN_LEVELS = 5
LAPLACIAN_LEAST_PX = 64
"""The smallest side that five levels can halve."""
SMOOTHNESS = 0.01
"""Weight of the prediction's own gradient in the gradient penalty."""
UNKNOWN = 0.5
"""Value of a trimap's unknown pixels."""


@dataclass(frozen=True)
class LossConfig:
    """Weights of the losses; a loss of weight 0 is not computed. The defaults are the published recipe."""

    unknown_l1: float = 1.0
    """L1 over the trimap's unknown pixels."""
    known_l1: float = 1.0
    """L1 over all other pixels."""
    known_smooth_l1: float = 1.0
    """Smooth L1 over the known pixels of a binary sample: a mask has no edge worth learning."""
    laplacian: float = 1.0
    """L1 between Laplacian pyramids of five levels; needs images of 64 px or more."""
    gradient_penalty: float = 1.0
    """L1 between Sobel gradients over the unknown pixels, and smoothness there."""
    cross_entropy: float = 0.0
    """Binary cross-entropy, mean over the image; for binary samples too."""
    dice: float = 0.0
    """1 - Dice coefficient of the soft masks; for binary samples too. 0 where nothing is foreground."""
    l1: float = 0.0
    """L1, mean over the image; for binary samples too."""
    binary_rule: BinaryRule = "binary"
    """Choice of the binary samples, which take known_smooth_l1 alone of the published losses: "binary", each pixel 0 or
    1 (what the paper means), or "constant", all pixels are 0 or all are 1 (what the released code tests)."""

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in TERMS}
        for name, weight in weights.items():
            if weight < 0:
                raise ConfigError(f"loss {name} is {weight}; expected 0 or more")
        if not any(weights.values()):
            raise ConfigError("every loss has weight 0, so nothing would be learned; give one of them a weight")


TERMS = tuple(field.name for field in fields(LossConfig) if field.name != "binary_rule")
"""The losses, by name."""
OF_MATTES = ("unknown_l1", "known_l1", "laplacian", "gradient_penalty")
"""Published losses that binary samples do not take."""


def losses(alpha: Tensor, truth: Tensor, trimap: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """Every loss that has a weight, weighted, [B] each, and their sum under "total".

    alpha, truth and trimap are float32 [B,1,H,W] in 0..1; a trimap's unknown pixels are 0.5 exactly
    (see :func:`quantised`). A sample takes either known_smooth_l1 or the losses of OF_MATTES.
    """
    unknown = (trimap == UNKNOWN).float()
    is_binary = _is_binary(truth, config.binary_rule).float()
    takes = dict.fromkeys(OF_MATTES, 1.0 - is_binary) | {"known_smooth_l1": is_binary}
    terms = {}
    for name in TERMS:
        if weight := getattr(config, name):
            takers = takes.get(name)
            value = weight * _TERMS[name](alpha, truth, unknown)
            terms[name] = value if takers is None else torch.where(takers > 0, value, torch.zeros_like(value))
    terms["total"] = torch.stack(list(terms.values())).sum(dim=0)
    return terms


def quantised(trimap: Tensor) -> Tensor:
    """A trimap as it lies in a file, uint8 -> float32 0, 0.5 (unknown) and 1; below 85 is 0, from 170 on 1."""
    lowest, known = UNKNOWN_RANGE
    return torch.where(trimap < lowest, 0.0, torch.where(trimap >= known, 1.0, UNKNOWN))


def unknown_l1(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:
    """[B]; 0 where a sample has no unknown pixel."""
    return _mean((alpha * unknown - truth * unknown).abs()) * _region_scale(unknown)


def known_l1(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:
    """[B]; 0 where a sample has no known pixel."""
    return unknown_l1(alpha, truth, 1.0 - unknown)


def known_smooth_l1(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:
    """[B]; 0 where a sample has no known pixel."""
    known = 1.0 - unknown
    return _mean(F.smooth_l1_loss(alpha * known, truth * known, reduction="none")) * _region_scale(known)


def laplacian(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:  # noqa: ARG001
    """[B]. Pyramids are linear, so the pyramid of the difference is taken. Raises ValueError below 64 px."""
    if min(alpha.shape[-2:]) < LAPLACIAN_LEAST_PX:
        raise ValueError(f"the Laplacian loss needs {LAPLACIAN_LEAST_PX} px or more, not {tuple(alpha.shape[-2:])}")
    taps = alpha.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0
    kernel = (taps[:, None] * taps)[None, None]
    difference = alpha - truth
    total = alpha.new_zeros(len(alpha))
    for level in range(LAPLACIAN_LEVELS):
        height, width = (length - length % 2 for length in difference.shape[-2:])
        difference = difference[..., :height, :width]
        smaller = _blur(difference, kernel)[..., ::2, ::2]
        spread = torch.zeros_like(difference)
        spread[..., ::2, ::2] = 4.0 * smaller
        total = total + 2.0**level * _mean((difference - _blur(spread, kernel)).abs())
        difference = smaller
    return total / LAPLACIAN_LEVELS


def gradient_penalty(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:
    """[B]; 0 where a sample has no unknown pixel."""
    sobel = alpha.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    kernels = torch.stack([sobel, sobel.T])[:, None]
    of_alpha, of_truth = (F.conv2d(each, kernels, padding=1) * unknown for each in (alpha, truth))
    both = 2.0 * (_mean((of_alpha - of_truth).abs()) + SMOOTHNESS * _mean(of_alpha.abs()))
    return both * _region_scale(unknown)


def cross_entropy(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:  # noqa: ARG001
    """[B], from a soft truth; its logarithms end at -100, so it is finite."""
    return _mean(F.binary_cross_entropy(alpha, truth, reduction="none"))


def dice(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:  # noqa: ARG001
    """[B] in 0..1."""
    common, sizes = (alpha * truth).sum(dim=(1, 2, 3)), (alpha.square() + truth.square()).sum(dim=(1, 2, 3))
    return 1.0 - (2.0 * common + 1.0) / (sizes + 1.0)  # a pixel of each, so that an empty truth has a gradient


def l1(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:  # noqa: ARG001
    """[B] in 0..1."""
    return _mean((alpha - truth).abs())


_TERMS = {
    "unknown_l1": unknown_l1,
    "known_l1": known_l1,
    "known_smooth_l1": known_smooth_l1,
    "laplacian": laplacian,
    "gradient_penalty": gradient_penalty,
    "cross_entropy": cross_entropy,
    "dice": dice,
    "l1": l1,
}


def _is_binary(truth: Tensor, rule: BinaryRule) -> Tensor:
    flat = truth.flatten(1)
    zeros, ones = flat == 0.0, flat == 1.0
    return (zeros | ones).all(dim=1) if rule == "binary" else zeros.all(dim=1) | ones.all(dim=1)


def _region_scale(region: Tensor) -> Tensor:
    count = region.sum(dim=(1, 2, 3))
    return torch.where(count > 0, REGION_SCALE / count.clamp(min=1.0), 0.0)


def _mean(values: Tensor) -> Tensor:
    """Over all but the batch."""
    return values.mean(dim=(1, 2, 3))


def _blur(image: Tensor, kernel: Tensor) -> Tensor:
    return F.conv2d(F.pad(image, (2, 2, 2, 2), mode="reflect"), kernel)
