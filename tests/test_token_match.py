"""The token-match head with synthetic features."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from icm_cli.errors import ConfigError
from icm_cli.model.contracts import Features, ReferenceFeatures
from icm_cli.model.lite.head import TokenMatchConfig, TokenMatchHead

SIDE = 64


CONFIG = TokenMatchConfig(
    feature_channels=(5, 7),
    skip_channels=(6, 5, 4),
    width=8,
    context_width=8,
    context_layers=1,
    fused_channels=8,
    decoder_channels=(8, 8, 4, 4),
)


def features(seed: int, count: int = 1, valid: Tensor | None = None) -> Features:
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randn(count, 12, 4, 4, generator=generator)
    scales = {
        stride: torch.randn(count, channels, SIDE // stride, SIDE // stride, generator=generator)
        for stride, channels in ((8, 6), (4, 5), (2, 4))
    }
    return Features(feature, torch.ones(count, 4, 4, dtype=torch.bool) if valid is None else valid, scales, {})


def reference(seed: int, *, everything: bool = False) -> ReferenceFeatures:
    guidance = torch.zeros(1, 1, SIDE, SIDE)
    guidance[..., : SIDE if everything else 32, : SIDE if everything else 32] = 1
    return ReferenceFeatures(features(seed), guidance, torch.ones(1, SIDE, SIDE, dtype=torch.bool))


@pytest.fixture(scope="module")
def head() -> TokenMatchHead:
    torch.manual_seed(0)
    return TokenMatchHead(CONFIG).eval()


class TestTokenMatch:
    def test_every_target_is_compared_with_its_own_reference(self, head: TokenMatchHead) -> None:
        image, valid = torch.rand(2, 3, SIDE, SIDE), torch.ones(2, SIDE, SIDE, dtype=torch.bool)
        prepared = [head.prepare_references([reference(seed)]) for seed in (1, 2)]
        target = features(9, 2)
        together = head(target, prepared, image, valid)
        assert together.alpha.shape == (2, 1, SIDE, SIDE)
        assert together.alpha.dtype == torch.float32
        turned = head(target, prepared[::-1], image, valid)
        assert not torch.allclose(together.alpha, turned.alpha)
        for i in range(2):
            scales = {stride: scale[i : i + 1] for stride, scale in target.scale_features.items()}
            alone = replace(target.select_correspondence(i), scale_features=scales)
            single = head(alone, prepared[i : i + 1], image[i : i + 1], valid[i : i + 1])
            torch.testing.assert_close(single.alpha[0], together.alpha[i], atol=1e-5, rtol=1e-4)

    def test_reference_without_background(self, head: TokenMatchHead) -> None:
        prepared = head.prepare_references([reference(1, everything=True)])
        assert prepared.background.shape[0] == 0
        target = features(3)
        numbers = head.compute_evidence(head.project_tokens(target.correspondence_features), target.valid, [prepared])
        assert numbers.shape == (1, 24, 4, 4)
        assert numbers.isfinite().all()
        image, valid = torch.rand(1, 3, SIDE, SIDE), torch.ones(1, SIDE, SIDE, dtype=torch.bool)
        assert head(target, [prepared], image, valid).alpha.isfinite().all()

    def test_initialisation_from_principal_components(self) -> None:
        """The mean of the tokens is removed; in a layer with one varying direction, this direction
        decides."""
        head = TokenMatchHead(CONFIG)
        generator = torch.Generator().manual_seed(3)
        direction = F.normalize(torch.randn(5, generator=generator), dim=0)
        along = torch.randn(200, 1, generator=generator)
        first = 7.0 + along * direction + 1e-3 * torch.randn(200, 5, generator=generator)
        head.initialise_from_pca(torch.cat([first, torch.randn(200, 7, generator=generator)], dim=1))
        found = head.project[0](first)
        torch.testing.assert_close(found.mean(dim=0), torch.zeros(8), atol=1e-4, rtol=0)
        torch.testing.assert_close(found.norm(dim=1), (along - along.mean()).abs()[:, 0], atol=2e-2, rtol=0)

    @given(seed=st.integers(0, 999))
    @settings(max_examples=10)
    def test_the_order_of_reference_tokens_does_not_matter(self, head: TokenMatchHead, seed: int) -> None:
        prepared = head.prepare_references([reference(seed), reference(seed + 1)])
        turned = head.prepare_references([reference(seed + 1), reference(seed)])
        target = features(5)
        projected = head.project_tokens(target.correspondence_features)
        ours, theirs = (head.compute_evidence(projected, target.valid, [each]) for each in (prepared, turned))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)

    def test_reference_is_recognised_in_itself(self, head: TokenMatchHead) -> None:
        """If the target is the reference, more guidance is transferred to the tokens inside it than
        to those outside."""
        shown = reference(4)
        target = Features(shown.features.correspondence_features, shown.features.valid, features(4).scale_features, {})
        inter, intra = head.similarity_maps(target, [head.prepare_references([shown])])
        inside = torch.zeros(4, 4, dtype=torch.bool)
        inside[:2, :2] = True
        assert inter.shape == intra.shape == (1, 1, 4, 4)
        assert inter[0, 0][inside].min() > inter[0, 0][~inside].max()

    def test_initial_alpha_is_undecided_and_every_weight_has_a_gradient(self) -> None:
        torch.manual_seed(1)
        head = TokenMatchHead(CONFIG).train()
        image, valid = torch.rand(2, 3, SIDE, SIDE), torch.ones(2, SIDE, SIDE, dtype=torch.bool)
        alpha = head(
            features(9, 2), [head.prepare_references([reference(seed)]) for seed in (1, 2)], image, valid
        ).alpha
        assert 0.1 < alpha.mean() < 0.9
        (alpha - torch.rand(2, 1, SIDE, SIDE)).square().sum().backward()
        still = [name for name, each in head.named_parameters() if each.grad is None or not each.grad.any()]
        assert not [name for name in still if not name.endswith("output.0.bias")]  # BatchNorm makes this bias redundant

    @pytest.mark.parametrize("doubt", [0.0, 19.0])
    def test_alpha_if_present(self, doubt: float) -> None:
        torch.manual_seed(1)
        head = TokenMatchHead(replace(CONFIG, presence_margin=doubt, alpha_stretch=0.0)).eval()
        image, valid = torch.rand(2, 3, SIDE, SIDE), torch.ones(2, SIDE, SIDE, dtype=torch.bool)
        with torch.no_grad():
            matte = head(features(9, 2), [head.prepare_references([reference(seed)]) for seed in (1, 2)], image, valid)
        assert matte.presence is not None
        assert matte.presence.is_uncertain.tolist() == [doubt > 0] * 2
        torch.testing.assert_close(
            matte.alpha, matte.presence.alpha_if_present * torch.sigmoid(matte.presence.logit)[:, None, None, None]
        )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"feature_channels": ()}, "at least one value"),
            ({"presence_sharpness": 0.0}, "more than 0"),
            ({"edge_epsilon": 0.0}, "more than 0"),
            ({"presence_margin": -1.0}, "0 to below 20"),
            ({"edge_radius": 0.5}, "0 to below 0.5"),
            ({"alpha_stretch": -0.1}, "0 to below 0.5"),
            ({"decoder_channels": (6, 5)}, "as many values as skip_channels has, 3"),
            ({"context_width": 6}, "multiple of 4"),
            ({"context_layers": -1}, "expected 0 to 64"),
            ({"width": 0}, "expected 1 or more"),
            ({"temperature": 0.0}, "more than 0"),
        ],
    )
    def test_invalid_settings_are_reported(self, change: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            TokenMatchConfig(**change)  # type: ignore[arg-type]

    def test_features_of_another_backbone_are_reported(self, head: TokenMatchHead) -> None:
        lacking = Features(torch.randn(1, 9, 4, 4), torch.ones(1, 4, 4, dtype=torch.bool), {}, {})
        image, valid = torch.rand(1, 3, SIDE, SIDE), torch.ones(1, SIDE, SIDE, dtype=torch.bool)
        with pytest.raises(
            ConfigError,
            match="feature_channels add up to 12, but the backbone's correspondence features have 9 channels",
        ):
            head(lacking, [head.prepare_references([reference(1)])], image, valid)

    def test_missing_feature_scale_is_reported(self, head: TokenMatchHead) -> None:
        target = features(1)
        lacking = Features(target.correspondence_features, target.valid, {8: target.scale_features[8]}, {})
        image, valid = torch.rand(1, 3, SIDE, SIDE), torch.ones(1, SIDE, SIDE, dtype=torch.bool)
        with pytest.raises(
            ConfigError, match="skip_channels is 5 at 4 times the tokens' resolution, where the backbone has"
        ):
            head(lacking, [head.prepare_references([reference(1)])], image, valid)

    def test_decoder_may_end_below_the_resolution_of_the_canvas(self) -> None:
        head = TokenMatchHead(replace(CONFIG, skip_channels=(6,), decoder_channels=(8,))).eval()
        image, valid = torch.rand(1, 3, SIDE, SIDE), torch.ones(1, SIDE, SIDE, dtype=torch.bool)
        with torch.no_grad():
            matte = head(features(1), [head.prepare_references([reference(1)])], image, valid)
        assert matte.alpha.shape == (1, 1, SIDE, SIDE)
