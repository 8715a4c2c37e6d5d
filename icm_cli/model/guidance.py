"""From a reference's guidance (its mask) to tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from icm_cli.model.contracts import ReferenceFeatures


@dataclass(frozen=True)
class ReferenceTokens:
    """Tokens of all references together: inside the guidance [K,C], outside [M,C] (M may be 0)."""

    foreground: Tensor
    background: Tensor
    notices: list[str] = field(default_factory=list)


def reference_tokens(references: Sequence[ReferenceFeatures], tokens_of: Callable[[Tensor], Tensor]) -> ReferenceTokens:
    """Part references' tokens by their guidance; ``tokens_of`` makes them from a feature, [1,C,h,w] -> [1,N,C]."""
    foregrounds, backgrounds, notices = [], [], []
    for reference in references:
        feature = reference.features.correspondence
        stride = reference.guidance.shape[-1] // feature.shape[-1]
        inside, notice = foreground_tokens(reference.guidance, reference.valid, stride)
        outside = background_tokens(reference.guidance, reference.valid, stride)
        found = tokens_of(feature)
        foregrounds.append(found[inside.flatten(1)])
        backgrounds.append(found[outside.flatten(1)])
        notices += [notice] if notice else []
    return ReferenceTokens(torch.cat(foregrounds), torch.cat(backgrounds), notices)


def foreground_tokens(guidance: Tensor, valid: Tensor, stride: int) -> tuple[Tensor, str | None]:
    """Mark the tokens that lie in the guidance (published code's rule: a token counts if its whole cell is foreground).

    Where the guidance is neither, a cell counts that is foreground by more than half and has no background.
    guidance [1,1,H,W] float32 (0 outside, 0.5 neither, 1 inside), valid [1,H,W] bool -> [1,h,w] bool and, where no
    cell is foreground as a whole, a sentence that says what was taken instead: cells that are foreground by more than
    half, else the single cell that holds most of it. At least one token is always True (guidance must not be empty).
    """
    inside = ((guidance > 0.75) & valid[:, None]).float()
    share = F.avg_pool2d(inside, stride)[:, 0]
    allowed = ((guidance > 0.25) & valid[:, None]).float()
    whole = (-F.max_pool2d(-allowed, stride)[:, 0] > 0.5) & (share > 0.5)
    if whole.any():
        return whole, None
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
    """Mark the tokens wholly outside the guidance that hold a pixel of the frame, [1,h,w] bool; may be none.

    Where the guidance is neither, a cell counts that is background by more than half and has no foreground.
    """
    inside = F.max_pool2d((guidance * valid[:, None]).float(), stride)[:, 0] > 0.75
    neither = F.avg_pool2d((((guidance - 0.5).abs() < 0.25) & valid[:, None]).float(), stride)[:, 0]
    real = F.avg_pool2d(valid[:, None].float(), stride)[:, 0]
    return (real > 0) & ~inside & (neither < 0.5 * real)
