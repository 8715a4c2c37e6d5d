"""Tokens of features, the masks that select them, and inter- and intra-similarity (paper, section 3.3).

All similarities are computed in float32, whatever the dtype of the backbone: the products S * A are close to the
smallest float16 numbers.
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

CHUNK_TOKENS = 512
"""Number of target tokens that are compared at a time, which limits the memory."""


def without_autocast(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Decorate a function of float32 tensors so that it runs without mixed precision."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def flatten_tokens(feature: Tensor) -> Tensor:
    """Rearrange features [B,C,h,w] to tokens in row-major order, float32 [B,N,C]."""
    return feature.flatten(2).transpose(1, 2).float()


def valid_tokens(valid: Tensor, stride: int) -> Tensor:
    """Return which tokens contain at least one pixel of the frame: bool [B,H,W] -> bool [B,h,w]."""
    return F.max_pool2d(valid[:, None].float(), stride)[:, 0] > 0


@without_autocast
def inter_similarity(reference_tokens: Tensor, target_tokens: Tensor, target_valid: Tensor) -> Tensor:
    """Return the inter-similarity S (paper, equation 3), float32 [B,N], of reference and target tokens.

    ``reference_tokens``: [K,C]. ``target_tokens``: [B,N,C]. ``target_valid``: those that are not padding, bool [B,N].

    Each reference token distributes a softmax over the target tokens, so S sums to K. It says where the object is, but
    not whether it is present. The paper averages over the reference tokens; the published code and checkpoint use the
    sum.
    """
    scale = reference_tokens.shape[-1] ** -0.5
    logits = torch.einsum("kc,bnc->bkn", reference_tokens.float(), target_tokens.float()) * scale
    logits = logits.masked_fill(~target_valid[:, None], float("-inf"))
    return logits.softmax(dim=-1).sum(dim=1)


def attended_tokens(matrix: Tensor, queries: Sequence[int], count: int) -> Tensor:
    """Return the tokens of the RoI mask of points (paper, section 3.6), bool [N].

    They are the tokens of the points, ``queries``, and for each of them the ``count`` tokens that it attends to most,
    by its row of ``matrix`` [N,N].
    """
    attended = torch.zeros(len(matrix), dtype=torch.bool, device=matrix.device)
    rows = torch.tensor(queries, device=matrix.device)
    attended[matrix[rows].topk(min(count, len(matrix)), dim=1).indices.flatten()] = True
    attended[rows] = True
    return attended


@dataclass
class AttentionMatrix:
    """Intra-similarity with its matrix A."""

    matrix: Tensor
    """float32 [B,N,N]; axis 1 is the query, axis 2 the key. Each row is a softmax over the valid tokens."""
    grid: tuple[int, int]

    @without_autocast
    def propagate(self, values: Tensor) -> Tensor:
        return self.matrix @ values.float()


class SelfSimilarity:
    """Intra-similarity that is computed from features by memory-efficient attention, without an N x N matrix.

    A[q,k] is the softmax over the valid k of cosine(f_q - m, f_k - m) / temperature. m is the mean of the valid tokens:
    what all tokens have in common does not distinguish them. Gradients flow through the propagated values, not through
    A. Feature [B,C,h,w]; valid bool [B,h,w]; temperature in cosine units, more than 0.
    """

    def __init__(self, feature: Tensor, valid: Tensor, temperature: float) -> None:
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
        # The kernels that do not build N x N need values as wide as the queries, with the channels
        # innermost.
        padded = F.pad(values.float()[:, None], (0, -values.shape[-1] % width))
        propagated = [
            F.scaled_dot_product_attention(query, query, channels, attn_mask=mask, scale=1.0 / self.temperature)
            for channels in torch.split(padded, width, dim=-1)
        ]
        return torch.cat(propagated, dim=-1)[:, 0, :, : values.shape[-1]]

    @torch.no_grad()
    def _matrix(self) -> Tensor:
        """Compute A [B,N,N], for training: its canvases are small, and gradients of the kernels are much slower."""
        unit = self._unit_tokens()
        logits = unit @ unit.transpose(1, 2) / self.temperature
        return logits.masked_fill(~self.valid.flatten(1)[:, None], float("-inf")).softmax(dim=-1)

    def _unit_tokens(self) -> Tensor:
        """Subtract the mean of the valid tokens from all tokens, and scale them to unit length, float32 [B,N,C]."""
        is_valid = self.valid.flatten(1)[..., None]
        mean = (flatten_tokens(self.feature) * is_valid).sum(dim=1, keepdim=True) / is_valid.sum(dim=1, keepdim=True)
        return F.normalize(flatten_tokens(self.feature) - mean, dim=-1).contiguous()


@dataclass(frozen=True)
class ReferenceTokens:
    """Tokens of all references together."""

    foreground: Tensor
    """Tokens inside the guidance, [K,C]."""
    background: Tensor
    """Tokens outside the guidance, [M,C]; M may be 0."""
    negative: Tensor | None = None
    """Tokens of negative references, [L,C]; None if there are none."""
    notices: list[str] = field(default_factory=list)
    """Notices for the user about unsuitable references."""


def split_reference_tokens(
    references: Sequence[ReferenceFeatures], make_tokens: Callable[[Tensor], Tensor]
) -> ReferenceTokens:
    """Split the tokens of references by their guidance.

    ``make_tokens`` converts correspondence features [1,C,h,w] to tokens [1,N,D].
    """
    foregrounds, backgrounds, negatives, notices = [], [], [], []
    for reference in references:
        feature = reference.features.correspondence_features
        inside, notice = selected_token_mask(reference)
        tokens = make_tokens(feature)
        if is_negative(reference.guidance):
            negatives.append(tokens[inside.flatten(1)])
        else:
            stride = reference.guidance.shape[-1] // feature.shape[-1]
            outside = background_token_mask(reference.guidance, reference.valid, stride)
            foregrounds.append(tokens[inside.flatten(1)])
            backgrounds.append(tokens[outside.flatten(1)])
        notices += [notice] if notice else []
    negative = torch.cat(negatives) if negatives else None
    return ReferenceTokens(torch.cat(foregrounds), torch.cat(backgrounds), negative, notices)


def is_negative(guidance: Tensor) -> bool:
    """Return whether a guidance is that of a negative reference: it contains no foreground."""
    return not bool((guidance > 0.75).any())


def selected_token_mask(reference: ReferenceFeatures) -> tuple[Tensor, str | None]:
    """Return the tokens that a reference selects: those of the object, or those of the area of a negative reference.

    The result is that of :func:`foreground_token_mask`.
    """
    stride = reference.guidance.shape[-1] // reference.features.correspondence_features.shape[-1]
    if not is_negative(reference.guidance):
        return foreground_token_mask(reference.guidance, reference.valid, stride)
    inside, notice = foreground_token_mask(1.0 - reference.guidance, reference.valid, stride)
    return inside, notice and notice.replace("the reference", "a negative reference")


def similarity_difference(target: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return how much more similar target tokens [N,C] are to ``first`` [K,C] than to ``second`` [M,C], float32 [N].

    It is the difference of the largest dot products. Without ``first`` tokens, it is minus infinity.
    """
    if not len(first):
        return target.new_full((len(target),), -torch.inf)
    chunks = torch.split(target, CHUNK_TOKENS)
    return torch.cat([(tokens @ first.T).amax(dim=1) - (tokens @ second.T).amax(dim=1) for tokens in chunks])


def foreground_token_mask(guidance: Tensor, valid: Tensor, stride: int) -> tuple[Tensor, str | None]:
    """Return which tokens are foreground, bool [1,h,w], at least one; and a notice if no whole cell is foreground.

    ``guidance`` [1,1,H,W] is 1 inside the object, 0 outside and 0.5 where that is unknown; it is not empty. The cell of
    a token has sides of ``stride`` px. As in the published code, a token is foreground if its whole cell is. Unknown
    pixels are allowed in a cell that is mostly foreground and contains no background. If there is no such cell, those
    that are mostly foreground are used, or else the one with most foreground.
    """
    inside = ((guidance > 0.75) & valid[:, None]).float()
    fraction = F.avg_pool2d(inside, stride)[:, 0]
    allowed = ((guidance > 0.25) & valid[:, None]).float()
    full = (-F.max_pool2d(-allowed, stride)[:, 0] > 0.5) & (fraction > 0.5)
    if full.any():
        return full, None
    most = fraction > 0.5
    if most.any():
        return most, (
            "the mask of the reference covers no token of the model completely; tokens that it covers by more than "
            "half are used. A reference in which the object is larger works better"
        )
    best = torch.zeros_like(full)
    best.view(-1)[fraction.view(-1).argmax()] = True
    return best, (
        "the mask of the reference is smaller than half a token of the model; the token with the "
        "largest part of it is used. A reference in which the object is larger works better"
    )


def background_token_mask(guidance: Tensor, valid: Tensor, stride: int) -> Tensor:
    """Return which tokens are background, bool [1,h,w]; possibly none. See :func:`foreground_token_mask`.

    The cell of such a token contains a pixel of the frame and no foreground, and less than half of it is unknown.
    """
    has_foreground = F.max_pool2d((guidance * valid[:, None]).float(), stride)[:, 0] > 0.75
    unknown = F.avg_pool2d((((guidance - 0.5).abs() < 0.25) & valid[:, None]).float(), stride)[:, 0]
    in_frame = F.avg_pool2d(valid[:, None].float(), stride)[:, 0]
    return (in_frame > 0) & ~has_foreground & (unknown < 0.5 * in_frame)
