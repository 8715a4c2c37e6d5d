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
        first_tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(first_tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return wrapper


def flatten_tokens(feature: Tensor) -> Tensor:
    """Rearrange features [B,C,h,w] to tokens in row-major order, float32 [B,N,C]."""
    return feature.flatten(2).transpose(1, 2).float()


def valid_token_mask(valid: Tensor, stride: int) -> Tensor:
    """Return which tokens contain at least one pixel of the frame: bool [B,H,W] -> bool [B,h,w]."""
    return F.max_pool2d(valid[:, None].float(), stride)[:, 0] > 0


@without_autocast
def inter_similarity(reference_tokens: Tensor, target_tokens: Tensor, target_valid: Tensor) -> Tensor:
    """Return the inter-similarity S (paper, equation 3), float32 [B,N], of reference and target tokens.

    ``reference_tokens``: [K,C]. ``target_tokens``: [B,N,C]. ``target_valid``: those that are not padding, bool [B,N].

    S is the sum over the reference tokens of a softmax over the target tokens. So it always sums to K: it says where
    the object is, but not whether it is present. The paper averages over the reference tokens; the published code and
    checkpoint use the sum.
    """
    scale = reference_tokens.shape[-1] ** -0.5
    logits = torch.einsum("kc,bnc->bkn", reference_tokens.float(), target_tokens.float()) * scale
    logits = logits.masked_fill(~target_valid[:, None], float("-inf"))
    return logits.softmax(dim=-1).sum(dim=1)


def attended_token_mask(matrix: Tensor, queries: Sequence[int], count: int) -> Tensor:
    """Return which tokens belong to the RoI mask of points (paper, section 3.6), bool [N].

    They are the tokens of the points, whose indices are ``queries``, and for each of them the ``count`` tokens with the
    largest attention in its row of ``matrix`` [N,N].
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
    A. ``feature``: [B,C,h,w]. ``valid``: bool [B,h,w]. ``temperature``: in cosine units, more than 0.
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
        tokens = self._unit_tokens()[:, None]  # queries and keys of one attention head
        mask = None if bool(self.valid.all()) else self.valid.flatten(1)[:, None, None, :]
        width = tokens.shape[-1]
        # The kernels that do not build N x N need values as wide as the queries, with the channels innermost. So the
        # values are padded to a multiple of this width, and propagated in parts.
        padded = F.pad(values.float()[:, None], (0, -values.shape[-1] % width))
        propagated = [
            F.scaled_dot_product_attention(tokens, tokens, part, attn_mask=mask, scale=1.0 / self.temperature)
            for part in torch.split(padded, width, dim=-1)
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
        tokens, is_valid = flatten_tokens(self.feature), self.valid.flatten(1)[..., None]
        mean = (tokens * is_valid).sum(dim=1, keepdim=True) / is_valid.sum(dim=1, keepdim=True)
        return F.normalize(tokens - mean, dim=-1).contiguous()


@dataclass(frozen=True)
class ReferenceTokens:
    """Tokens of all references together."""

    foreground: Tensor
    """Tokens inside the guidance, [K,C]."""
    background: Tensor
    """Tokens outside the guidance, [M,C]; M may be 0."""
    negative: Tensor | None = None
    """Tokens of negative references, [L,C]; None if there are none."""
    object_means: tuple[Tensor, ...] = ()
    """Mean foreground token of each reference, [C]."""
    negative_means: tuple[Tensor, ...] = ()
    """Mean token of each negative reference, [C]."""
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
        selected, notice = selected_token_mask(reference)
        if notice is not None:
            notices.append(notice)
        tokens = make_tokens(feature)
        if is_negative(reference.guidance):
            negatives.append(tokens[selected.flatten(1)])
        else:
            stride = reference.guidance.shape[-1] // feature.shape[-1]
            outside = background_token_mask(reference.guidance, reference.valid, stride)
            foregrounds.append(tokens[selected.flatten(1)])
            backgrounds.append(tokens[outside.flatten(1)])
    negative = torch.cat(negatives) if negatives else None
    object_means = tuple(tokens.mean(dim=0) for tokens in foregrounds)
    negative_means = tuple(tokens.mean(dim=0) for tokens in negatives)
    return ReferenceTokens(
        torch.cat(foregrounds), torch.cat(backgrounds), negative, object_means, negative_means, notices
    )


def is_negative(guidance: Tensor) -> bool:
    """Return whether a guidance belongs to a negative reference: it contains no foreground."""
    return not bool((guidance > 0.75).any())


def selected_token_mask(reference: ReferenceFeatures) -> tuple[Tensor, str | None]:
    """Return the tokens that a reference selects, and a notice or None; see :func:`foreground_token_mask`.

    They are the tokens of the object; in a negative reference, the tokens where its guidance is 0.
    """
    stride = reference.guidance.shape[-1] // reference.features.correspondence_features.shape[-1]
    if not is_negative(reference.guidance):
        return foreground_token_mask(reference.guidance, reference.valid, stride)
    selected, notice = foreground_token_mask(1.0 - reference.guidance, reference.valid, stride)
    return selected, None if notice is None else notice.replace("the reference", "a negative reference")


def similarity_difference(target: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """Return how much more similar target tokens [N,C] are to ``first`` [K,C] than to ``second`` [M,C], float32 [N].

    It is the largest dot product with ``first`` minus the largest one with ``second``; minus infinity if K is 0.
    """
    if not len(first):
        return target.new_full((len(target),), -torch.inf)
    chunks = torch.split(target, CHUNK_TOKENS)
    return torch.cat([(tokens @ first.T).amax(dim=1) - (tokens @ second.T).amax(dim=1) for tokens in chunks])


def foreground_token_mask(guidance: Tensor, valid: Tensor, stride: int) -> tuple[Tensor, str | None]:
    """Return which tokens are foreground, bool [1,h,w], at least one; and a notice if no whole cell is foreground.

    ``guidance`` [1,1,H,W] is 1 inside the object, 0 outside and 0.5 where that is unknown; it is not empty. The cell of
    a token has sides of ``stride`` px. The tokens are the first of these that exist:

    - cells without background that are mostly foreground; the rest of the cell is unknown. In the published code, the
      whole cell must be foreground;
    - cells that are mostly foreground;
    - the cell with most foreground.
    """
    inside = ((guidance > 0.75) & valid[:, None]).float()
    inside_fraction = F.avg_pool2d(inside, stride)[:, 0]
    not_outside = ((guidance > 0.25) & valid[:, None]).float()
    has_no_background = -F.max_pool2d(-not_outside, stride)[:, 0] > 0.5  # the minimum over the cell is 1
    is_mostly_inside = inside_fraction > 0.5
    is_full = has_no_background & is_mostly_inside
    if is_full.any():
        return is_full, None
    if is_mostly_inside.any():
        return is_mostly_inside, (
            "the mask of the reference covers no token of the model completely; tokens that it covers by more than "
            "half are used. A reference in which the object is larger works better"
        )
    best = torch.zeros_like(is_full)
    best.view(-1)[inside_fraction.view(-1).argmax()] = True
    return best, (
        "the mask of the reference is smaller than half a token of the model; the token with the "
        "largest part of it is used. A reference in which the object is larger works better"
    )


def background_token_mask(guidance: Tensor, valid: Tensor, stride: int) -> Tensor:
    """Return which tokens are background, bool [1,h,w]; possibly none. Arguments as in :func:`foreground_token_mask`.

    The cell of such a token has pixels in the frame; none of them is foreground, and fewer than half of them are
    unknown.
    """
    has_foreground = F.max_pool2d((guidance * valid[:, None]).float(), stride)[:, 0] > 0.75
    is_unknown = ((guidance - 0.5).abs() < 0.25) & valid[:, None]
    unknown_fraction = F.avg_pool2d(is_unknown.float(), stride)[:, 0]
    frame_fraction = F.avg_pool2d(valid[:, None].float(), stride)[:, 0]
    return (frame_fraction > 0) & ~has_foreground & (unknown_fraction < 0.5 * frame_fraction)
