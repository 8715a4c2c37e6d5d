"""What ends a run that goes wrong, in a sentence: a loss that is no number, gradients that are none, bad data."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from icm_cli.errors import TrainingError
from icm_cli.training.keeper import Keeper
from icm_cli.training.samples import Batch

LARGEST_LOSS = 1e4
"""A sample's loss above this ends the run (released code)."""
MOST_SKIPPED = 0.01
"""Share of draws that may be unreadable."""
JUDGED_FROM = 100
"""Samples before that share is judged."""


def check_alpha(alpha: Tensor, batch: Batch, step: int, keeper: Keeper) -> None:
    """Raises TrainingError, naming step and samples, for a prediction [B,1,S,S] that is no number; saves the batch."""
    is_bad = ~alpha.detach().isfinite().flatten(1).all(dim=1)
    if bool(is_bad.any()):
        guilty = [batch.names[i] for i in torch.nonzero(is_bad).flatten().tolist()]
        raise TrainingError(
            f"step {step}: the model's alpha is no number for {'; '.join(guilty)}, so it has diverged. The batch is in "
            f"{keeper.save_batch(batch, step)}, the last saved state is kept; lower train.rate or set train.clip_norm"
        )


def check_losses(terms: Mapping[str, Tensor], batch: Batch, step: int, keeper: Keeper) -> None:
    """Raises TrainingError, naming step and samples, for a loss that is no number or above 1e4; saves the batch."""
    total = terms["total"].detach()
    is_bad = ~(total <= LARGEST_LOSS)  # not a number is not at most anything
    if not bool(is_bad.any()):
        return
    guilty = [f"{batch.names[i]} ({float(total[i]):g})" for i in torch.nonzero(is_bad).flatten().tolist()]
    raise TrainingError(
        f"step {step}: the loss is above {LARGEST_LOSS:g} or no number for {'; '.join(guilty)}. The batch is in "
        f"{keeper.save_batch(batch, step)}, the last saved state is kept; look at these samples, or lower train.rate"
    )


def check_gradients(norm: float, batch: Batch, step: int, keeper: Keeper, *, has_scaler: bool) -> None:
    """Raises TrainingError for gradients that are no numbers; a scaler (fp16) skips such steps by itself."""
    if math.isfinite(norm) or has_scaler:
        return
    raise TrainingError(
        f"step {step}: the gradients are no numbers, for {'; '.join(batch.names)}. The batch is in "
        f"{keeper.save_batch(batch, step)}, the last saved state is kept; lower train.rate or set train.precision to no"
    )


def check_skipped(skipped: int, drawn: int, last: str) -> None:
    """Raises TrainingError where more than 1 % of what was drawn could not be read."""
    if drawn >= JUDGED_FROM and skipped > MOST_SKIPPED * drawn:
        raise TrainingError(
            f"{skipped} of {drawn} draws could not be read, more than {MOST_SKIPPED:.0%}; the last: {last}. Mend the "
            "data, or leave files out with 'exclude'"
        )
