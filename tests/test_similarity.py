"""Intra-similarity as an operator, inter-similarity, and token masks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import profile

from icm_cli.model.contracts import IntraSimilarity
from icm_cli.model.similarity import (
    AttentionMatrix,
    SelfSimilarity,
    background_token_mask,
    foreground_token_mask,
    inter_similarity,
)

TEMPERATURE = 0.2


def scene() -> tuple[Tensor, Tensor]:
    """Return features [2,8,5,6] and their valid tokens; the second image has a padded column and
    row."""
    feature = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(0))
    valid = torch.ones(2, 5, 6, dtype=torch.bool)
    valid[1, 4:] = False
    valid[1, :, 5:] = False
    return feature, valid


def reference_matrix(feature: Tensor, valid: Tensor) -> Tensor:
    """Compute A by its definition."""
    rows = []
    for tokens, inside in zip(feature.flatten(2).transpose(1, 2), valid.flatten(1), strict=True):
        unit = F.normalize(tokens - tokens[inside].mean(dim=0), dim=-1)
        rows.append((unit @ unit.T / TEMPERATURE).masked_fill(~inside, -torch.inf).softmax(dim=-1))
    return torch.stack(rows)


def test_operator_equals_its_matrix() -> None:
    feature, valid = scene()
    for columns in (1, 3, 8, 19):  # fewer columns than channels, as many, and more than twice as many
        values = torch.randn(2, 30, columns, generator=torch.Generator().manual_seed(columns))
        spread = SelfSimilarity(feature, valid, TEMPERATURE).propagate(values)
        torch.testing.assert_close(spread, reference_matrix(feature, valid) @ values, atol=1e-5, rtol=1e-5)
        learning = SelfSimilarity(feature, valid, TEMPERATURE).propagate(values.requires_grad_())
        torch.testing.assert_close(learning, spread, atol=1e-5, rtol=1e-5)
        assert learning.requires_grad


def test_padding_is_excluded() -> None:
    feature, valid = scene()
    values = torch.randn(2, 30, 2, generator=torch.Generator().manual_seed(1))
    before = SelfSimilarity(feature, valid, TEMPERATURE).propagate(values)
    padding = ~valid[:, None]
    after = SelfSimilarity(feature.masked_fill(padding, 9.0), valid, TEMPERATURE).propagate(
        values.masked_fill(padding.flatten(2).transpose(1, 2), 9.0)
    )
    inside = valid.flatten(1)
    torch.testing.assert_close(before[inside], after[inside])


def test_no_matrix_of_all_token_pairs_is_built() -> None:
    feature = torch.randn(1, 64, 60, 60, generator=torch.Generator().manual_seed(2))
    similarity = SelfSimilarity(feature, torch.ones(1, 60, 60, dtype=torch.bool), TEMPERATURE)
    with profile(profile_memory=True) as watched:
        similarity.propagate(torch.ones(1, 3600, 1))
    largest = max(event.self_cpu_memory_usage for event in watched.events())
    assert largest < 3600 * 3600  # bytes: a quarter of the matrix in float32


def test_both_classes_implement_the_interface() -> None:
    feature, valid = scene()
    similarity = SelfSimilarity(feature, valid, TEMPERATURE)
    held = AttentionMatrix(reference_matrix(feature, valid), (5, 6))
    assert isinstance(similarity, IntraSimilarity)
    assert not isinstance(similarity, AttentionMatrix)
    assert isinstance(held, AttentionMatrix)
    values = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(held.propagate(values), similarity.propagate(values), atol=1e-5, rtol=1e-5)


def test_inter_similarity_sums_to_the_number_of_reference_tokens() -> None:
    """S sums to K over the valid tokens whether the object is present or not."""
    feature, valid = scene()
    tokens = feature.flatten(2).transpose(1, 2)
    similarity = inter_similarity(torch.randn(7, 8), tokens, valid.flatten(1))
    torch.testing.assert_close(similarity.sum(dim=1), torch.full((2,), 7.0))
    assert not similarity[~valid.flatten(1)].any()


def test_a_narrow_unknown_band_does_not_exclude_a_cell() -> None:
    """Cells have 8 px. A foreground cell with one unknown column counts, and a cell that is mostly
    unknown does not.

    Without unknown pixels the rule is the published one: all pixels of a cell must be foreground.
    """
    guidance = torch.zeros(1, 1, 8, 40)
    guidance[..., :16] = 1.0
    guidance[..., 15:18] = 0.5  # a narrow band at the border of the second cell
    valid = torch.ones(1, 8, 40, dtype=torch.bool)
    assert foreground_token_mask(guidance, valid, 8)[0].flatten().tolist() == [True, True, False, False, False]
    assert background_token_mask(guidance, valid, 8).flatten().tolist() == [False, False, True, True, True]
    guidance[..., 10:21] = 0.5
    assert foreground_token_mask(guidance, valid, 8)[0].flatten().tolist() == [True, False, False, False, False]
    assert background_token_mask(guidance, valid, 8).flatten().tolist() == [False, False, False, True, True]
    guidance = (torch.arange(40) < 12).float().expand(1, 1, 8, 40)
    assert foreground_token_mask(guidance, valid, 8)[0].flatten().tolist() == [True, False, False, False, False]
    assert background_token_mask(guidance, valid, 8).flatten().tolist() == [False, False, True, True, True]
