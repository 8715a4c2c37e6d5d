"""Guards that end a run that goes wrong with one sentence: a NaN or infinite loss, such gradients, bad data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from icm_cli.errors import TrainingError
from icm_cli.training.batches import Batch
from icm_cli.training.run_folder import RunFolder

LARGEST_LOSS = 1e4
"""A sample's loss above this ends the run (released code)."""
MOST_SKIPPED = 0.01
"""Share of draws that may be unreadable."""
JUDGED_FROM = 100
"""Samples before that share is judged."""


def check_answer(answer: Sequence[Tensor], batch: Batch, step: int, run: RunFolder) -> None:
    """Raises TrainingError, naming step and samples, for an answer [B,...] that is NaN or infinite; saves the batch."""
    is_bad = torch.stack([~each.detach().isfinite().flatten(1).all(dim=1) for each in map(_rows, answer)]).any(dim=0)
    if bool(is_bad.any()):
        guilty = [batch.names[i] for i in torch.nonzero(is_bad).flatten().tolist()]
        raise TrainingError(
            f"step {step}: the model's answer is NaN or infinite for {'; '.join(guilty)}, so it diverged. The batch is "
            f"in {run.save_batch(batch, step)}, the last saved state is kept; lower train.rate or set "
            "train.clip_norm"
        )


def _rows(tensor: Tensor) -> Tensor:
    return tensor[:, None] if tensor.ndim == 1 else tensor


def check_losses(terms: Mapping[str, Tensor], batch: Batch, step: int, run: RunFolder) -> None:
    """Raises TrainingError, naming step and samples, for a loss that is NaN or above 1e4; saves the batch."""
    total = terms["total"].detach()
    is_bad = ~(total <= LARGEST_LOSS)  # NaN is not at most anything
    if not bool(is_bad.any()):
        return
    guilty = [f"{batch.names[i]} ({float(total[i]):g})" for i in torch.nonzero(is_bad).flatten().tolist()]
    raise TrainingError(
        f"step {step}: the loss is NaN or above {LARGEST_LOSS:g} for {'; '.join(guilty)}. The batch is in "
        f"{run.save_batch(batch, step)}, the last saved state is kept; look at these samples, or lower train.rate"
    )


def check_gradients(norm: float, batch: Batch, step: int, run: RunFolder, *, has_scaler: bool) -> None:
    """Raises TrainingError for NaN or infinite gradients; a scaler (fp16) skips such steps by itself."""
    if math.isfinite(norm) or has_scaler:
        return
    raise TrainingError(
        f"step {step}: the gradients are NaN or infinite, for {'; '.join(batch.names)}. The batch is in "
        f"{run.save_batch(batch, step)}, the last saved state is kept; lower train.rate or set train.precision to no"
    )


def check_skipped(skipped: int, drawn: int, last: str) -> None:
    """Raises TrainingError where more than 1 % of what was drawn could not be read."""
    if drawn >= JUDGED_FROM and skipped > MOST_SKIPPED * drawn:
        raise TrainingError(
            f"{skipped} of {drawn} draws could not be read, more than {MOST_SKIPPED:.0%}; the last: {last}. Mend the "
            "data, or leave files out with 'exclude'"
        )
