"""The guided filter: a soft alpha goes to the image's edges, one that is plain stays plain, and both forms agree."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from icm_cli import guided_filter


def along_edges(alpha: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    return guided_filter.along_edges(alpha, image, 0.03, 1e-4)


@given(level=st.floats(0, 1), height=st.sampled_from([32, 64, 96]), width=st.sampled_from([32, 128]))
@settings(max_examples=15, deadline=None)
def test_a_plain_alpha_stays(level: float, height: int, width: int) -> None:
    image = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height))
    alpha = torch.full((2, 1, height, width), level)
    torch.testing.assert_close(along_edges(alpha, image), alpha, atol=2e-3, rtol=0)


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_a_soft_edge_goes_to_the_image_edge(channel: int) -> None:
    truth = torch.zeros(1, 1, 512, 512)
    truth[..., 200:] = 1
    image = torch.full((1, 3, 512, 512), 0.4)
    image[:, channel, :, 200:] = 0.7
    soft = F.avg_pool2d(F.pad(truth, (10, 10, 10, 10), mode="replicate"), 21, 1)
    before, after = ((each - truth).square().mean() for each in (soft, along_edges(soft, image)))
    assert after < 0.7 * before


def test_pictures_of_a_batch_do_not_meet() -> None:
    generator = torch.Generator().manual_seed(0)
    image, alpha = torch.rand(2, 3, 64, 96, generator=generator), torch.rand(2, 1, 64, 96, generator=generator)
    together = along_edges(alpha, image)
    torch.testing.assert_close(together[1:], along_edges(alpha[1:], image[1:]), atol=1e-5, rtol=1e-4)
    assert together.min() >= 0
    assert together.max() <= 1


def test_both_filters_agree_where_their_windows_do() -> None:
    """Away from the border, which one reflects and the other leaves out."""
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
    alpha = rng.random((24, 32), dtype=np.float32)
    stride = guided_filter.GUIDED_STRIDE
    image = small.repeat(stride, 0).repeat(stride, 1)
    in_numpy = guided_filter.guided_upsample(alpha, image)
    in_torch = guided_filter.along_edges(
        torch.from_numpy(alpha.repeat(stride, 0).repeat(stride, 1))[None, None],
        torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255.0,
        guided_filter.GUIDED_RADIUS_PX / 32,
        guided_filter.GUIDED_EPSILON,
    )
    inner = slice(6 * stride, -6 * stride)
    expected = in_numpy[inner, inner]
    assert expected.std() > 0.05
    np.testing.assert_allclose(in_torch[0, 0, inner, inner].numpy(), expected, atol=1 / 255)
