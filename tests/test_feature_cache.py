"""The cache of a frozen backbone's features; similarities stay float32."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from icm_cli.model.contracts import Features
from icm_cli.model.similarity import AttentionMatrix, SelfSimilarity, inter_similarity
from icm_cli.training.stages.matte import _read_entry, halve_features, join_features


def attention(tokens: int, seed: int) -> Tensor:
    """Return attention as sharp as Stable Diffusion's, with values far below the smallest half-precision number."""
    logits = 4 * torch.randn(1, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    return logits.softmax(-1)


def test_cached_features_equal_the_features(tmp_path: Path) -> None:
    feature = torch.randn(1, 8, 24, 24, generator=torch.Generator().manual_seed(0))
    valid = torch.rand(1, 24, 24) > 0.2
    coarse = torch.randn(1, 8, 12, 12)
    intra = {16: AttentionMatrix(attention(576, 1), (24, 24)), 32: SelfSimilarity(coarse, valid[:, ::2, ::2], 0.15)}
    features = Features(feature, valid, {16: feature, 32: coarse}, intra)  # type: ignore[arg-type]
    torch.save(halve_features(features), tmp_path / "entry.pt")
    elements = feature.numel() + coarse.numel() + 576 * 576
    assert (
        tmp_path / "entry.pt"
    ).stat().st_size < 2 * elements + 20_000  # each tensor is stored once, in half precision
    stored = _read_entry(tmp_path / "entry.pt")
    assert stored is not None
    back = join_features([stored], torch.device("cpu"))
    torch.testing.assert_close(back.correspondence_features, feature, rtol=1e-3, atol=1e-4)
    assert torch.equal(back.valid, valid)
    kept, true = back.intra_similarity[16], intra[16]
    assert isinstance(kept, AttentionMatrix)
    assert isinstance(true, AttentionMatrix)
    large = true.matrix > 1e-7
    assert true.matrix[large].min() < 6e-6
    assert (true.matrix < 6e-5).float().mean() > 0.2
    error = ((kept.matrix - true.matrix).abs() / true.matrix)[large]
    assert error.max() < 2e-3  # without scaling, small values would have errors above 10 %
    values = torch.rand(1, 144, 2)
    torch.testing.assert_close(
        back.intra_similarity[32].propagate(values), intra[32].propagate(values), rtol=1e-2, atol=1e-2
    )
    two = join_features([stored, stored], torch.device("cpu"))
    assert two.correspondence_features.shape == (2, 8, 24, 24)
    assert two.intra_similarity[32].propagate(values.expand(2, -1, -1)).shape == (2, 144, 2)


def test_similarities_stay_float32_under_mixed_precision() -> None:
    reference, target = torch.randn(5, 32), torch.randn(2, 40, 32)
    valid = torch.ones(2, 40, dtype=torch.bool)
    plain = inter_similarity(reference, target, valid)
    matrix = AttentionMatrix(attention(40, 0).expand(2, -1, -1), (5, 8))
    spread = matrix.propagate(plain[..., None])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (torch.randn(4, 4) @ torch.randn(4, 4)).dtype == torch.bfloat16
        assert torch.equal(inter_similarity(reference, target, valid), plain)
        assert torch.equal(matrix.propagate(plain[..., None]), spread)
