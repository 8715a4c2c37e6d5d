"""From a reference's guidance (its mask) to tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def foreground_tokens(guidance: Tensor, valid: Tensor, stride: int) -> tuple[Tensor, str | None]:
    """Which tokens lie in the guidance (published code's rule: a token counts if its whole cell is foreground).

    guidance [1,1,H,W] float32 in {0,1}, valid [1,H,W] bool -> [1,h,w] bool and, where no cell is foreground as a
    whole, a sentence that says what was taken instead: cells that are foreground by more than half, else the
    single cell that holds most of it. At least one token is always True (guidance must not be empty).
    """
    inside = (guidance * valid[:, None]).float()
    whole = -F.max_pool2d(-inside, stride)[:, 0] > 0.5
    if whole.any():
        return whole, None
    share = F.avg_pool2d(inside, stride)[:, 0]
    most = share > 0.5
    if most.any():
        return most, (
            "the reference's mask covers no whole token of the model; tokens it covers by more than half were taken. "
            "A reference that shows the thing larger works better"
        )
    best = torch.zeros_like(whole)
    best.view(-1)[share.view(-1).argmax()] = True
    return best, (
        "the reference's mask is smaller than half a token of the model; the one token that holds most of it was "
        "taken. A reference that shows the thing larger works better"
    )


def background_tokens(guidance: Tensor, valid: Tensor, stride: int) -> Tensor:
    """Which tokens lie wholly outside the guidance and hold a pixel of the frame, [1,h,w] bool; may be none."""
    touched = F.max_pool2d((guidance * valid[:, None]).float(), stride)[:, 0] > 0.5
    real = F.max_pool2d(valid[:, None].float(), stride)[:, 0] > 0
    return real & ~touched
