"""The training-free head with synthetic tokens, and with EfficientNet on synthetic images."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from icm_cli.errors import ConfigError
from icm_cli.model.contracts import Features, ReferenceFeatures
from icm_cli.model.core import InContextMatting
from icm_cli.model.lite.efficientnet import EfficientNetLite, EfficientNetLiteConfig
from icm_cli.model.similarity import (
    AttentionMatrix,
    ReferenceTokens,
    SelfSimilarity,
    similarity_difference,
    valid_token_mask,
)
from icm_cli.model.training_free.closed_form import solve_alpha
from icm_cli.model.training_free.head import (
    TrainingFree,
    TrainingFreeConfig,
    cluster_tokens,
    keep_strong_regions,
    segment_by_clusters,
    soft_max_similarity,
)

STRIDE = 16
BACKDROP, BALL, CUBE, MEADOW = range(4)
COLOURS = torch.tensor([[0.2, 0.3, 0.8], [0.9, 0.2, 0.1], [0.9, 0.8, 0.1], [0.2, 0.6, 0.2]])


def features(kinds: Tensor, valid: Tensor, seed: int = 0) -> Features:
    """Return tokens of an image whose cells [h,w] have the given classes: one direction per class,
    and noise.

    Ball and cube are opposite, backdrop and meadow too: as unlike as centred features of unlike
    things are.
    """
    noise = torch.randn(16, *kinds.shape, generator=torch.Generator().manual_seed(seed))
    axes = torch.eye(16)
    prototypes = torch.stack([axes[0], axes[1], -axes[1], -axes[0]])
    correspondence = (prototypes[kinds].permute(2, 0, 1) + 0.05 * noise)[None]
    on_tokens = valid_token_mask(valid, STRIDE)
    intra = {STRIDE: SelfSimilarity(correspondence, on_tokens, temperature=0.15)}
    return Features(correspondence, on_tokens, {}, intra)


def picture(kinds: Tensor) -> Tensor:
    pixels = COLOURS[kinds].permute(2, 0, 1)[None]
    return pixels.repeat_interleave(STRIDE, -1).repeat_interleave(STRIDE, -2)


def scene(*things: tuple[int, int], size: tuple[int, int] = (10, 14), ground: int = BACKDROP) -> Tensor:
    """Return a grid of background with objects of 4 x 4 tokens, given as (class, left column)."""
    kinds = torch.full(size, ground)
    for kind, left in things:
        kinds[3:7, left : left + 4] = kind
    return kinds


def whole(kinds: Tensor) -> Tensor:
    return torch.ones(1, kinds.shape[0] * STRIDE, kinds.shape[1] * STRIDE, dtype=torch.bool)


def reference(kinds: Tensor, kind: int, seed: int = 1) -> ReferenceFeatures:
    guidance = (kinds == kind).float()[None, None]
    guidance = guidance.repeat_interleave(STRIDE, -1).repeat_interleave(STRIDE, -2)
    return ReferenceFeatures(features(kinds, whole(kinds), seed), guidance, whole(kinds))


def matte(head: TrainingFree, kinds: Tensor, *references: ReferenceFeatures):
    valid = whole(kinds)
    return head(features(kinds, valid), [head.prepare_references(references)], picture(kinds), valid)


def mean_alpha_inside(alpha: Tensor, kinds: Tensor, kind: int) -> float:
    """Return the mean alpha of the cells of a class."""
    inside = (kinds == kind).repeat_interleave(STRIDE, -1).repeat_interleave(STRIDE, -2)
    return float(alpha[0, 0][inside].mean())


@pytest.fixture
def head() -> TrainingFree:
    return TrainingFree(TrainingFreeConfig())


@pytest.mark.parametrize(("wanted", "other"), [(BALL, CUBE), (CUBE, BALL)])
def test_reference_selects_one_of_two_objects(head, wanted, other):
    target = scene((BALL, 1), (CUBE, 8))
    result = matte(head, target, reference(scene((wanted, 5)), wanted))
    assert result.found.tolist() == [True]
    assert mean_alpha_inside(result.alpha, target, wanted) > 0.9
    assert mean_alpha_inside(result.alpha, target, other) < 0.05
    assert mean_alpha_inside(result.alpha, target, BACKDROP) < 0.05


def test_alpha_and_confidence_have_their_shapes_and_ranges(head):
    kinds = scene((BALL, 1))
    valid = whole(kinds).expand(2, -1, -1)
    one = features(kinds, whole(kinds))
    two = Features(
        one.correspondence_features.expand(2, -1, -1, -1),
        one.valid.expand(2, -1, -1),
        {},
        {STRIDE: SelfSimilarity(one.correspondence_features.expand(2, -1, -1, -1), one.valid.expand(2, -1, -1), 0.15)},
    )
    image = picture(kinds).expand(2, -1, -1, -1)
    result = head(two, [head.prepare_references([reference(scene((BALL, 5)), BALL)])] * 2, image, valid)
    assert result.alpha.shape == (2, 1, 160, 224)
    assert result.alpha.dtype == torch.float32
    assert 0 <= result.alpha.min() < 0.01
    assert 0.99 < result.alpha.max() <= 1
    assert result.confidence.shape == result.found.shape == (2,)
    assert ((result.confidence > 0.5) & (result.confidence <= 1)).all()
    assert torch.equal(result.alpha[0], result.alpha[1])


def test_absent_object_gives_an_empty_alpha_and_is_not_found(head):
    result = matte(head, scene((CUBE, 4), ground=MEADOW), reference(scene((BALL, 5)), BALL))
    assert result.found.tolist() == [False]
    assert result.alpha.count_nonzero() == 0
    assert result.confidence.item() < head.config.absent_below


def test_padded_tokens_are_excluded(head):
    kinds = scene((BALL, 1))
    valid = whole(kinds)
    valid[:, :, 160:] = False
    valid[:, 130:] = False  # a column of tokens that is partly padding counts
    prepared = head.prepare_references([reference(scene((BALL, 5)), BALL)])
    results = []
    for padding in (BACKDROP, BALL):
        padded = kinds.clone()
        padded[:, 10:] = padding
        padded[9:] = padding
        results.append(head(features(padded, valid), [prepared], picture(padded), valid))
    assert torch.equal(results[0].alpha[..., :130, :160], results[1].alpha[..., :130, :160])
    assert torch.equal(results[0].confidence, results[1].confidence)


def test_padding_of_a_reference_is_excluded(head):
    kinds = scene((BALL, 1))
    padded = reference(kinds, BALL)
    padded.valid[:, :, 160:] = False
    prepared = head.prepare_references([padded])
    assert len(prepared.foreground) == 16
    assert len(prepared.background) == 10 * 10 - 16


def test_several_references_on_different_canvases(head):
    ball = reference(scene((BALL, 5)), BALL)
    cube = reference(scene((CUBE, 2), size=(12, 8), ground=MEADOW), CUBE, seed=3)
    target = scene((BALL, 1), (CUBE, 8))
    result = matte(head, target, ball, cube)
    assert mean_alpha_inside(result.alpha, target, BALL) > 0.9
    assert mean_alpha_inside(result.alpha, target, CUBE) > 0.9
    assert mean_alpha_inside(result.alpha, target, BACKDROP) < 0.1


def test_reference_without_background(head):
    target = scene((BALL, 1), (CUBE, 8))
    result = matte(head, target, reference(torch.full((6, 6), BALL), BALL))
    assert mean_alpha_inside(result.alpha, target, BALL) > 0.9
    assert mean_alpha_inside(result.alpha, target, CUBE) < 0.1


def test_guidance_smaller_than_a_token_gives_a_notice(head):
    small = reference(scene((BALL, 5)), BALL)
    guidance = torch.zeros_like(small.guidance)
    guidance[..., 52:56, 84:88] = 1
    prepared = head.prepare_references([dataclasses.replace(small, guidance=guidance)])
    assert len(prepared.foreground) == 1
    assert "smaller than half a token" in prepared.notices[0]
    assert head.prepare_references([small]).notices == []


def test_intra_similarity_propagates_the_evidence(head):
    kinds = scene((BALL, 1), (CUBE, 8))
    flat = AttentionMatrix(torch.full((1, kinds.numel(), kinds.numel()), 1 / kinds.numel()), tuple(kinds.shape))
    target = dataclasses.replace(features(kinds, whole(kinds)), intra_similarity={STRIDE: flat})
    prepared = head.prepare_references([reference(scene((BALL, 5)), BALL)])
    contrast = head.compute_evidence(target, [prepared], STRIDE)[0].contrast
    assert contrast.std() < 1e-6  # all tokens are equal, so the result is the mean


@pytest.mark.parametrize("share", [0.05, 0.15])
def test_unknown_fraction_is_limited(share):
    head = TrainingFree(TrainingFreeConfig(unknown_fraction=share))
    contrast = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    trimap = head.make_trimap(contrast)
    assert set(trimap.unique().tolist()) == {0.0, 0.5, 1.0}
    assert 0 < (trimap == 0.5).float().mean() <= share


def test_regions_without_strong_evidence_are_dropped():
    evidence = torch.tensor([[0.9, 0.5, 0.0, 0.5, 0.6, 0.0, 0.8]])
    kept = keep_strong_regions(evidence, evidence > 0, fraction=0.8)
    assert kept.tolist() == [[True, True, False, False, False, False, True]]


def test_small_object_keeps_foreground(head):
    contrast = torch.full((100, 100), -1.0)
    contrast[40:46, 40:46] = 1.0  # much smaller than the unknown fraction
    assert (head.make_trimap(contrast) == 1).sum() == 36


def test_soft_maximum_is_between_mean_and_maximum():
    cosines = torch.tensor([0.9, 0.1, -0.4])
    reference = torch.stack([cosines, (1 - cosines**2).sqrt()], dim=1)
    target = torch.tensor([[1.0, 0.0]])
    assert 0.2 < soft_max_similarity(reference, target, 0.1).item() < 0.9
    assert soft_max_similarity(reference, target, 100.0).item() == pytest.approx(0.2, abs=0.01)
    assert soft_max_similarity(reference[:0], target, 0.1).tolist() == [0.0]


@pytest.mark.parametrize("side", [0.0, 1.0])
def test_a_trimap_without_both_sides_is_not_solved(side, monkeypatch):
    monkeypatch.setattr("pymatting.estimate_alpha_cf", lambda *_, **__: pytest.fail("solved"))
    trimap = np.full((8, 8), side)
    trimap[2:4] = 0.5
    assert np.array_equal(solve_alpha(np.zeros((8, 8, 3)), trimap), np.full((8, 8), side))


def test_closed_form_follows_the_image_and_prints_nothing(capfd):
    rgb = np.zeros((24, 40, 3))
    rgb[:, 20:] = (0.9, 0.5, 0.1)
    trimap = np.full((24, 40), 0.5)
    trimap[:, :6], trimap[:, -6:] = 0.0, 1.0
    alpha = solve_alpha(rgb, trimap)
    assert alpha[:, :18].max() < 0.05
    assert alpha[:, 22:].min() > 0.95
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"temperature": 0.0}, "temperature is 0.0; expected more than 0"),
        ({"unknown_fraction": 1.0}, "unknown_fraction is 1.0; expected between 0 and 1"),
        ({"instance_fraction": 1.5}, "instance_fraction is 1.5; expected 0 to 1"),
        ({"solve_long_side_px": 8}, "solve_long_side_px is 8; expected at least 64"),
        ({"min_cluster_cosine": 1.0}, "min_cluster_cosine is 1.0; expected between 0 and 1"),
        ({"min_join_score": -0.1}, "min_join_score is -0.1; expected 0 to 1"),
        ({"edge_band": 0.0}, "edge_band is 0.0; expected between 0 and 0.5"),
    ],
)
def test_settings_out_of_range_are_reported(settings, words):
    with pytest.raises(ConfigError, match=words):
        TrainingFreeConfig(**settings)


def test_reference_selects_an_object_with_efficientnet(head):
    """A chequered and a striped disc on gravel, with the pretrained weights; the reference shows
    one of them."""
    backbone = EfficientNetLite.load(EfficientNetLiteConfig(long_side_px=448), None, offline=True, seed=0)
    model = InContextMatting(backbone, head).eval()
    rows, columns = torch.meshgrid(torch.arange(320), torch.arange(448), indexing="ij")
    gravel = 0.45 + 0.1 * torch.rand(3, 320, 448, generator=torch.Generator().manual_seed(0))
    chequered = torch.stack([((rows // 12 + columns // 12) % 2).float(), torch.zeros(320, 448), torch.ones(320, 448)])
    striped = torch.stack([torch.ones(320, 448), (rows // 8 % 2).float(), torch.zeros(320, 448)])
    left, right = ((rows - 160) ** 2 + (columns - centre) ** 2 < 80**2 for centre in (110, 338))
    image = torch.where(left, chequered, torch.where(right, striped, gravel))[None]
    valid = torch.ones(1, 320, 448, dtype=torch.bool)
    for inside, other in ((left, right), (right, left)):
        prepared = model.prepare_references([(image.flip(-1), inside.flip(-1)[None, None].float(), valid)])
        alpha = model.infer(image, valid, prepared).alpha[0, 0]
        assert alpha[inside].mean() > 0.8
        assert alpha[other].mean() < 0.2


def test_importing_the_solver_does_not_change_the_number_of_threads():
    """The import of pymatting sets the number of OpenMP threads, which farms limit and results
    depend on."""
    code = (
        "import torch; torch.set_num_threads(1); from icm_cli.model.training_free.closed_form "
        "import load_solver;load_solver(); import sys; sys.exit(torch.get_num_threads() != 1)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestClusters:
    """The rule "clusters", and its steps with synthetic tokens."""

    @pytest.fixture
    def by_clusters(self) -> TrainingFree:
        return TrainingFree(TrainingFreeConfig(rule="clusters"))

    @pytest.mark.parametrize(("wanted", "other"), [(BALL, CUBE), (CUBE, BALL)])
    def test_reference_selects_one_of_two_objects(self, by_clusters, wanted, other):
        target = scene((BALL, 1), (CUBE, 8))
        result = matte(by_clusters, target, reference(scene((wanted, 5)), wanted))
        assert result.found.tolist() == [True]
        assert mean_alpha_inside(result.alpha, target, wanted) > 0.9
        assert mean_alpha_inside(result.alpha, target, other) < 0.05
        assert mean_alpha_inside(result.alpha, target, BACKDROP) < 0.05

    def test_object_without_candidates_is_absent(self, by_clusters):
        result = matte(by_clusters, scene((CUBE, 4)), reference(scene((BALL, 5)), BALL))
        assert result.found.tolist() == [False]
        assert result.alpha.count_nonzero() == 0
        assert result.confidence.item() == 0

    def test_padded_tokens_are_excluded(self, by_clusters):
        kinds = scene((BALL, 1))
        valid = whole(kinds)
        valid[:, :, 160:] = False
        prepared = by_clusters.prepare_references([reference(scene((BALL, 5)), BALL)])
        results = []
        for padding in (BACKDROP, BALL):
            padded = kinds.clone()
            padded[:, 10:] = padding
            results.append(by_clusters(features(padded, valid), [prepared], picture(padded), valid))
        assert torch.equal(results[0].alpha[..., :160], results[1].alpha[..., :160])

    def test_tokens_are_clustered_by_the_grouping_features(self, by_clusters):
        """Half of the ball matches the reference; the grouping features make both halves one
        cluster."""
        kinds = scene((BALL, 1))
        target = features(kinds, whole(kinds))
        spoiled = target.correspondence_features.clone()
        spoiled[:, :, 3:7, 3:5] = spoiled[:, :, 3:7, 3:5] * 0.3 + 0.2 * torch.eye(16)[5][None, :, None, None]
        alone = dataclasses.replace(target, correspondence_features=spoiled)
        together = dataclasses.replace(alone, grouping_features=target.correspondence_features)
        prepared = [by_clusters.prepare_references([reference(scene((BALL, 5)), BALL)])]
        found = [
            int(by_clusters.compute_evidence(each, prepared, STRIDE)[0].contrast.sum()) for each in (alone, together)
        ]
        assert found[1] == 16
        assert found[0] <= 16

    def test_cluster_is_added_by_its_similarity_to_prototype_and_seed(self):
        axes = torch.eye(6)
        like = 0.8 * axes[0] + 0.6 * axes[1]  # another cluster with similarity 0.8 to the seed
        target = torch.cat([axes[:1].expand(5, -1), like[None].expand(4, -1), axes[2:3].expand(8, -1)])
        tokens = ReferenceTokens(axes[:1].expand(3, -1), axes[2:3].expand(3, -1))
        counts = [
            int(
                segment_by_clusters(
                    target, target, tokens, TrainingFreeConfig(min_cluster_cosine=0.95, min_join_score=join)
                )[0].sum()
            )
            for join in (0.5, 0.7)
        ]
        assert counts == [9, 5]  # its score is 0.8 * 0.8

    def test_nearest_reference_tokens_must_be_inside_the_mask(self):
        target = F.normalize(torch.tensor([[1.0, 0.2], [0.6, 1.0]]), dim=-1)
        outside = similarity_difference(target, torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])) > 0
        assert outside.tolist() == [False, True]
        assert similarity_difference(target, target[:0], target).tolist() == [-torch.inf, -torch.inf]

    def test_clusters_by_average_linkage(self):
        angles = torch.tensor([0.0, 0.1, 0.9, 1.0, 3.0])
        points = torch.stack([angles.cos(), angles.sin()], dim=1)
        assert len(set(cluster_tokens(points, 0.99).tolist())) == 3
        labels = cluster_tokens(points, 0.5).tolist()
        assert labels[0] == labels[1] == labels[2] == labels[3] != labels[4]
        assert cluster_tokens(points[:1], 0.5).tolist() == [0]
