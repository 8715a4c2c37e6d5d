"""Intra-similarity as an operator: the same as its matrix, padding left out, N x N never built."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import profile

from icm_cli.model.contracts import IntraSimilarity, MatrixIntraSimilarity
from icm_cli.model.similarity import (
    AttentionMatrix,
    SelfSimilarity,
    background_token_mask,
    foreground_token_mask,
    inter_similarity,
)

TEMPERATURE = 0.2


def scene() -> tuple[Tensor, Tensor]:
    """A feature [2,8,5,6] and its valid tokens; the second image has a padded column and row."""
    feature = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 5, 6, dtype=torch.bool)
    valid[1, 4:] = False
    valid[1, :, 5:] = False
    return feature, valid


def matrix(feature: Tensor, valid: Tensor) -> Tensor:
    """A by its definition, one image at a time."""
    rows = []
    for tokens, inside in zip(feature.flatten(2).transpose(1, 2), valid.flatten(1), strict=True):
        unit = F.normalize(tokens - tokens[inside].mean(dim=0), dim=-1)
        rows.append((unit @ unit.T / TEMPERATURE).masked_fill(~inside, -torch.inf).softmax(dim=-1))
    return torch.stack(rows)


def test_the_operator_is_its_matrix() -> None:
    feature, valid = scene()
    for columns in (1, 3, 8, 19):  # narrower than the feature, as wide, and wider than twice it
        values = torch.randn(2, 30, columns, generator=torch.Generator().manual_seed(columns))
        spread = SelfSimilarity(feature, valid, TEMPERATURE).propagate(values)
        torch.testing.assert_close(spread, matrix(feature, valid) @ values, atol=1e-5, rtol=1e-5)
        learning = SelfSimilarity(feature, valid, TEMPERATURE).propagate(values.requires_grad_())
        torch.testing.assert_close(learning, spread, atol=1e-5, rtol=1e-5)
        assert learning.requires_grad


def test_padding_takes_no_part() -> None:
    feature, valid = scene()
    values = torch.randn(2, 30, 2, generator=torch.Generator().manual_seed(1))
    before = SelfSimilarity(feature, valid, TEMPERATURE).propagate(values)
    padding = ~valid[:, None]
    after = SelfSimilarity(feature.masked_fill(padding, 9.0), valid, TEMPERATURE).propagate(
        values.masked_fill(padding.flatten(2).transpose(1, 2), 9.0)
    )
    inside = valid.flatten(1)
    torch.testing.assert_close(before[inside], after[inside])


def test_n_by_n_is_never_built() -> None:
    feature = torch.randn(1, 64, 60, 60, generator=torch.Generator().manual_seed(2))
    similarity = SelfSimilarity(feature, torch.ones(1, 60, 60, dtype=torch.bool), TEMPERATURE)
    with profile(profile_memory=True) as watched:
        similarity.propagate(torch.ones(1, 3600, 1))
    largest = max(event.self_cpu_memory_usage for event in watched.events())
    assert largest < 3600 * 3600  # bytes: a quarter of the matrix in float32


def test_both_kinds_keep_their_contract() -> None:
    feature, valid = scene()
    similarity = SelfSimilarity(feature, valid, TEMPERATURE)
    held = AttentionMatrix(matrix(feature, valid), (5, 6))
    assert isinstance(similarity, IntraSimilarity)
    assert not isinstance(similarity, MatrixIntraSimilarity)
    assert isinstance(held, MatrixIntraSimilarity)
    values = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(held.propagate(values), similarity.propagate(values), atol=1e-5, rtol=1e-5)


def test_inter_similarity_sums_to_the_number_of_reference_tokens() -> None:
    """So it cannot say "absent": with or without the thing, S spreads K over the valid tokens."""
    feature, valid = scene()
    tokens = feature.flatten(2).transpose(1, 2)
    similarity = inter_similarity(torch.randn(7, 8), tokens, valid.flatten(1))
    torch.testing.assert_close(similarity.sum(dim=1), torch.full((2,), 7.0))
    assert not similarity[~valid.flatten(1)].any()


def test_a_narrow_band_that_is_neither_loses_no_cell() -> None:
    """Cells of 8 px: one in the thing, with a grey column at its border, counts; one that is mostly grey does not, on
    either side. Without grey the rule is the published one: a cell that is foreground as a whole."""
    guidance = torch.zeros(1, 1, 8, 40)
    guidance[..., :16] = 1.0
    guidance[..., 15:18] = 0.5  # a narrow band about the border of the second cell
    valid = torch.ones(1, 8, 40, dtype=torch.bool)
    assert foreground_token_mask(guidance, valid, 8)[0].flatten().tolist() == [True, True, False, False, False]
    assert background_token_mask(guidance, valid, 8).flatten().tolist() == [False, False, True, True, True]
    guidance[..., 10:21] = 0.5
    assert foreground_token_mask(guidance, valid, 8)[0].flatten().tolist() == [True, False, False, False, False]
    assert background_token_mask(guidance, valid, 8).flatten().tolist() == [False, False, False, True, True]
    guidance = (torch.arange(40) < 12).float().expand(1, 1, 8, 40)
    assert foreground_token_mask(guidance, valid, 8)[0].flatten().tolist() == [True, False, False, False, False]
    assert background_token_mask(guidance, valid, 8).flatten().tolist() == [False, False, True, True, True]
