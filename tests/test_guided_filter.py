"""Guided filters: soft edges are aligned with the image, constant alphas stay constant, and both forms agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from icm_cli.config import GuidedFilterConfig
from icm_cli.guided_filter import align_to_edges, guided_upsample

STRIDE = 4


def align(alpha: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return align_to_edges(alpha, image, 0.03, 1e-4, STRIDE)


@given(level=st.floats(0, 1), height=st.sampled_from([32, 64, 96]), width=st.sampled_from([32, 128]))
@settings(max_examples=15)
def test_a_constant_alpha_stays_constant(level: float, height: int, width: int) -> None:
    image = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height))
    alpha = torch.full((2, 1, height, width), level)
    torch.testing.assert_close(align(alpha, image), alpha, atol=2e-3, rtol=0)


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_a_soft_edge_is_aligned_with_the_edge_of_the_image(channel: int) -> None:
    truth = torch.zeros(1, 1, 512, 512)
    truth[..., 200:] = 1
    image = torch.full((1, 3, 512, 512), 0.4)
    image[:, channel, :, 200:] = 0.7
    soft = F.avg_pool2d(F.pad(truth, (10, 10, 10, 10), mode="replicate"), 21, 1)
    before, after = ((each - truth).square().mean() for each in (soft, align(soft, image)))
    assert after < 0.7 * before


def test_images_of_a_batch_are_independent() -> None:
    generator = torch.Generator().manual_seed(0)
    image, alpha = torch.rand(2, 3, 64, 96, generator=generator), torch.rand(2, 1, 64, 96, generator=generator)
    together = align(alpha, image)
    torch.testing.assert_close(together[1:], align(alpha[1:], image[1:]), atol=1e-5, rtol=1e-4)
    assert together.min() >= 0
    assert together.max() <= 1


def test_both_filters_agree_with_equal_windows() -> None:
    """Compared away from the border, which the NumPy filter reflects and the torch filter excludes."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    alpha = rng.random((24, 32), dtype=np.float32)
    image = small.repeat(STRIDE, 0).repeat(STRIDE, 1)
    config = GuidedFilterConfig()
    in_numpy = guided_upsample(alpha, image, config)
    in_torch = align_to_edges(
        torch.from_numpy(alpha.repeat(STRIDE, 0).repeat(STRIDE, 1))[None, None],
        torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255.0,
        config.radius_px / 32,
        config.epsilon,
        STRIDE,
    )
    inner = slice(6 * STRIDE, -6 * STRIDE)
    expected = in_numpy[inner, inner]
    assert expected.std() > 0.05
    np.testing.assert_allclose(in_torch[0, 0, inner, inner].numpy(), expected, atol=1 / 255)
