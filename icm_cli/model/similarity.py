"""Inter- and intra-similarity between tokens, in float32 whatever the backbone's dtype (paper section 3.3).

S*A lives near the smallest float16 numbers, so nothing here runs in a lower precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

from icm_cli.model.contracts import ReferenceFeatures

P = ParamSpec("P")


def without_autocast(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Keep mixed precision (autocast) out of a function of float32 tensors."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return guarded


def flatten_tokens(feature: Tensor) -> Tensor:
    """[B,C,h,w] -> [B,N,C] float32, row-major."""
    return feature.flatten(2).transpose(1, 2).float()


def valid_tokens(valid: Tensor, stride: int) -> Tensor:
    """Pixels that are not padding [B,H,W] bool -> tokens whose cell holds at least one such pixel [B,h,w]."""
    return F.max_pool2d(valid[:, None].float(), stride)[:, 0] > 0


@without_autocast
def inter_similarity(reference_tokens: Tensor, target_tokens: Tensor, target_valid: Tensor) -> Tensor:
    """Inter-similarity S of the paper's equation 3, as a sum over tokens.

    reference_tokens [K,C], target_tokens [B,N,C], target_valid [B,N] bool -> [B,N] float32 >= 0. Each of the K
    reference tokens spreads a softmax over the target's valid tokens, so S sums to K over the target: it says
    where, and cannot say "absent". The released code sums where the paper averages; its checkpoint needs the
    sum.
    """
    scale = reference_tokens.shape[-1] ** -0.5
    logits = torch.einsum("kc,bnc->bkn", reference_tokens.float(), target_tokens.float()) * scale
    logits = logits.masked_fill(~target_valid[:, None], float("-inf"))
    return logits.softmax(dim=-1).sum(dim=1)


class AttentionMatrix:
    """Intra-similarity that holds its matrix A [B,N,N] float32 (rows: softmax over valid tokens)."""

    def __init__(self, attention: Tensor, grid: tuple[int, int]) -> None:
        self.grid = grid
        self._attention = attention

    def matrix(self) -> Tensor:
        return self._attention

    @without_autocast
    def propagate(self, values: Tensor) -> Tensor:
        return self._attention @ values.float()


class SelfSimilarity:
    """Softmax self-similarity of a feature by memory-efficient attention; N x N is not built to matte.

    A[q,k] = softmax over valid k of cosine(f_q - m, f_k - m) / temperature, m the mean of the valid tokens: what all
    tokens share says nothing about which are alike. Gradients go through what is spread, not through A.
    """

    def __init__(self, feature: Tensor, valid: Tensor, temperature: float) -> None:
        """feature [B,C,h,w], valid [B,h,w] bool, temperature > 0 (in cosine units)."""
        self.grid = (feature.shape[2], feature.shape[3])
        self.feature = feature
        self.valid = valid
        self.temperature = temperature

    @without_autocast
    def propagate(self, values: Tensor) -> Tensor:
        if values.requires_grad:
            return self._matrix() @ values.float()
        query = self._unit_tokens()[:, None]
        mask = None if bool(self.valid.all()) else self.valid.flatten(1)[:, None, None, :]
        width = query.shape[-1]
        # The kernels that never build N x N want values as wide as the queries, and the channels innermost.
        padded = F.pad(values.float()[:, None], (0, -values.shape[-1] % width))
        spread = [
            F.scaled_dot_product_attention(query, query, part, attn_mask=mask, scale=1.0 / self.temperature)
            for part in torch.split(padded, width, dim=-1)
        ]
        return torch.cat(spread, dim=-1)[:, 0, :, : values.shape[-1]]

    @torch.no_grad()
    def _matrix(self) -> Tensor:
        """A [B,N,N], for training: its canvases are small, and the gradients of the kernels above take far longer."""
        unit = self._unit_tokens()
        logits = unit @ unit.transpose(1, 2) / self.temperature
        return logits.masked_fill(~self.valid.flatten(1)[:, None], float("-inf")).softmax(dim=-1)

    def _unit_tokens(self) -> Tensor:
        """[B,N,C] float32 of unit length, the mean of the valid ones taken off."""
        is_valid = self.valid.flatten(1)[..., None]
        mean = (flatten_tokens(self.feature) * is_valid).sum(dim=1, keepdim=True) / is_valid.sum(dim=1, keepdim=True)
        return F.normalize(flatten_tokens(self.feature) - mean, dim=-1).contiguous()


@dataclass(frozen=True)
class ReferenceTokens:
    """Tokens of all references together: inside the guidance [K,C], outside [M,C] (M may be 0)."""

    foreground: Tensor
    background: Tensor
    notices: list[str] = field(default_factory=list)


def split_reference_tokens(
    references: Sequence[ReferenceFeatures], tokens_of: Callable[[Tensor], Tensor]
) -> ReferenceTokens:
    """Part references' tokens by their guidance; ``tokens_of`` makes them from a feature, [1,C,h,w] -> [1,N,C]."""
    foregrounds, backgrounds, notices = [], [], []
    for reference in references:
        feature = reference.features.correspondence
        stride = reference.guidance.shape[-1] // feature.shape[-1]
        inside, notice = foreground_token_mask(reference.guidance, reference.valid, stride)
        outside = background_token_mask(reference.guidance, reference.valid, stride)
        found = tokens_of(feature)
        foregrounds.append(found[inside.flatten(1)])
        backgrounds.append(found[outside.flatten(1)])
        notices += [notice] if notice else []
    return ReferenceTokens(torch.cat(foregrounds), torch.cat(backgrounds), notices)


def foreground_token_mask(guidance: Tensor, valid: Tensor, stride: int) -> tuple[Tensor, str | None]:
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


def background_token_mask(guidance: Tensor, valid: Tensor, stride: int) -> Tensor:
    """Mark the tokens wholly outside the guidance that hold a pixel of the frame, [1,h,w] bool; may be none.

    Where the guidance is neither, a cell counts that is background by more than half and has no foreground.
    """
    inside = F.max_pool2d((guidance * valid[:, None]).float(), stride)[:, 0] > 0.75
    neither = F.avg_pool2d((((guidance - 0.5).abs() < 0.25) & valid[:, None]).float(), stride)[:, 0]
    real = F.avg_pool2d(valid[:, None].float(), stride)[:, 0]
    return (real > 0) & ~inside & (neither < 0.5 * real)
