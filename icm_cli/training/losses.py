"""The losses of the stage "matte", equal to those of the published code (Guo et al. 2024, section 4).

The losses on trimap regions are those of ViTMatte. A loss has one value per sample, [B] float32. The published total is
their sum over the batch.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor

from icm_cli.scoring.metrics import UNKNOWN_RANGE
from icm_cli.training.settings import BinaryRule, LossConfig

REGION_SCALE = 512.0 * 512.0
"""A region loss is its mean over the image times REGION_SCALE / (pixels of the region), at any image size."""
LAPLACIAN_LEVELS = 5
LAPLACIAN_MIN_PX = 64
"""Smallest side of an image with five pyramid levels."""
SMOOTHNESS = 0.01
"""Weight of the prediction's own gradient in the gradient penalty."""
UNKNOWN_LEVEL = 0.5
"""Value of unknown pixels in a trimap of floats."""
LOSS_NAMES = tuple(field.name for field in fields(LossConfig) if "limits" in field.metadata)
"""Names of the losses and of the settings of their weights. All settings with limits are weights."""
SOFT_LOSS_NAMES = ("unknown_l1", "known_l1", "laplacian", "gradient_penalty")
"""Published losses that do not apply to binary samples."""


def compute_losses(alpha: Tensor, truth: Tensor, trimap: Tensor, config: LossConfig) -> dict[str, Tensor]:
    """Return every loss whose weight is not 0, multiplied by its weight, [B] each, and their sum as "total".

    alpha, truth and trimap are float32 [B,1,H,W] in 0..1; a trimap's unknown pixels are exactly 0.5 (see
    :func:`quantise_trimap`). The losses of SOFT_LOSS_NAMES are 0 for binary samples, and known_smooth_l1 is 0 for all
    other samples.
    """
    unknown = (trimap == UNKNOWN_LEVEL).float()
    is_binary = _is_binary(truth, config.binary_rule)
    losses = {}
    for name in LOSS_NAMES:
        weight = getattr(config, name)
        if not weight:
            continue
        loss = weight * LOSS_FUNCTIONS[name](alpha, truth, unknown)
        if name in SOFT_LOSS_NAMES:
            loss = loss.masked_fill(is_binary, 0.0)
        elif name == "known_smooth_l1":
            loss = loss.masked_fill(~is_binary, 0.0)
        losses[name] = loss
    losses["total"] = torch.stack(list(losses.values())).sum(dim=0)
    return losses


def quantise_trimap(trimap: Tensor) -> Tensor:
    """Convert a trimap of a file, uint8, to float32 0 (below 85), 1 (from 170) and 0.5 (unknown)."""
    lowest, known = UNKNOWN_RANGE
    return torch.where(trimap < lowest, 0.0, torch.where(trimap >= known, 1.0, UNKNOWN_LEVEL))


def unknown_l1_loss(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:
    """Return the L1 over the unknown pixels, [B]; 0 for a sample without any."""
    return _mean_per_sample((alpha * unknown - truth * unknown).abs()) * _region_scale(unknown)


def known_l1_loss(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:
    """Return the L1 over the known pixels, [B]; 0 for a sample without any."""
    return unknown_l1_loss(alpha, truth, 1.0 - unknown)


def known_smooth_l1_loss(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:
    """Return the smooth L1 over the known pixels, [B]; 0 for a sample without any."""
    known = 1.0 - unknown
    return _mean_per_sample(F.smooth_l1_loss(alpha * known, truth * known, reduction="none")) * _region_scale(known)


def laplacian_loss(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:  # noqa: ARG001
    """Return the L1 between Laplacian pyramids, [B]. Raises ValueError for images below 64 px.

    Pyramids are linear, so it is computed from the pyramid of the difference.
    """
    if min(alpha.shape[-2:]) < LAPLACIAN_MIN_PX:
        raise ValueError(f"the Laplacian loss needs {LAPLACIAN_MIN_PX} px or more, not {tuple(alpha.shape[-2:])}")
    taps = alpha.new_tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16.0
    kernel = (taps[:, None] * taps)[None, None]
    difference = alpha - truth
    total = alpha.new_zeros(len(alpha))
    for level in range(LAPLACIAN_LEVELS):
        height, width = (length - length % 2 for length in difference.shape[-2:])
        difference = difference[..., :height, :width]  # even sides, which can be halved and doubled again
        smaller = _convolve(difference, kernel)[..., ::2, ::2]
        enlarged = torch.zeros_like(difference)
        enlarged[..., ::2, ::2] = 4.0 * smaller  # keeps the mean, because three of four pixels are 0
        total = total + 2.0**level * _mean_per_sample((difference - _convolve(enlarged, kernel)).abs())
        difference = smaller
    return total / LAPLACIAN_LEVELS


def gradient_penalty_loss(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:
    """Return the L1 between Sobel gradients, with a smoothness term, [B]; 0 for a sample without unknown pixels."""
    sobel = alpha.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    kernels = torch.stack([sobel, sobel.T])[:, None]
    alpha_gradient = F.conv2d(alpha, kernels, padding=1) * unknown
    true_gradient = F.conv2d(truth, kernels, padding=1) * unknown
    difference = _mean_per_sample((alpha_gradient - true_gradient).abs())
    return 2.0 * (difference + SMOOTHNESS * _mean_per_sample(alpha_gradient.abs())) * _region_scale(unknown)


def cross_entropy_loss(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:  # noqa: ARG001
    """Return the binary cross-entropy with a soft truth, [B]. Its logarithms are at least -100, so it is finite."""
    return _mean_per_sample(F.binary_cross_entropy(alpha, truth, reduction="none"))


def dice_loss(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:  # noqa: ARG001
    """Return 1 - Dice coefficient, [B] in 0..1."""
    intersection = (alpha * truth).sum(dim=(1, 2, 3))
    sum_of_areas = (alpha.square() + truth.square()).sum(dim=(1, 2, 3))
    return 1.0 - (2.0 * intersection + 1.0) / (sum_of_areas + 1.0)  # adding 1 gives an empty truth a gradient


def l1_loss(alpha: Tensor, truth: Tensor, unknown: Tensor) -> Tensor:  # noqa: ARG001
    """Return the L1, [B] in 0..1."""
    return _mean_per_sample((alpha - truth).abs())


LOSS_FUNCTIONS = {
    "unknown_l1": unknown_l1_loss,
    "known_l1": known_l1_loss,
    "known_smooth_l1": known_smooth_l1_loss,
    "laplacian": laplacian_loss,
    "gradient_penalty": gradient_penalty_loss,
    "cross_entropy": cross_entropy_loss,
    "dice": dice_loss,
    "l1": l1_loss,
}


def _is_binary(truth: Tensor, rule: BinaryRule) -> Tensor:
    """Return which samples are binary, bool [B]; see ``LossConfig.binary_rule``."""
    flat = truth.flatten(1)
    is_zero, is_one = flat == 0.0, flat == 1.0
    if rule == "binary":
        return (is_zero | is_one).all(dim=1)
    return is_zero.all(dim=1) | is_one.all(dim=1)


def _region_scale(region: Tensor) -> Tensor:
    """Return the factor, [B], from the mean over the image to the loss of a region, see REGION_SCALE; 0 if empty."""
    count = region.sum(dim=(1, 2, 3))
    return torch.where(count > 0, REGION_SCALE / count.clamp(min=1.0), 0.0)


def _mean_per_sample(values: Tensor) -> Tensor:
    """Return the mean over all axes except the batch."""
    return values.mean(dim=(1, 2, 3))


def _convolve(image: Tensor, kernel: Tensor) -> Tensor:
    """Convolve an image [B,1,H,W] with a 5 x 5 kernel [1,1,5,5]; the border is mirrored."""
    return F.conv2d(F.pad(image, (2, 2, 2, 2), mode="reflect"), kernel)
