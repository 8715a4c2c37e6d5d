"""Inter- and intra-similarity between tokens, in float32 whatever the backbone's dtype (paper section 3.3).

S*A lives near the smallest float16 numbers, so nothing here runs in a lower precision.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

P = ParamSpec("P")


def in_float32(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Keep mixed precision (autocast) out of a function of float32 tensors."""

    @functools.wraps(function)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        tensor = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        with torch.autocast(tensor.device.type, enabled=False):
            return function(*args, **kwargs)

    return guarded


def tokens(feature: Tensor) -> Tensor:
    """[B,C,h,w] -> [B,N,C] float32, row-major."""
    return feature.flatten(2).transpose(1, 2).float()


def token_valid(valid: Tensor, stride: int) -> Tensor:
    """Pixels that are not padding [B,H,W] bool -> tokens whose cell holds at least one such pixel [B,h,w]."""
    return F.max_pool2d(valid[:, None].float(), stride)[:, 0] > 0


@in_float32
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

    @in_float32
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

    @in_float32
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
        mean = (tokens(self.feature) * is_valid).sum(dim=1, keepdim=True) / is_valid.sum(dim=1, keepdim=True)
        return F.normalize(tokens(self.feature) - mean, dim=-1).contiguous()
