"""``--not-ref``: images of what is not the object, in every head that compares tokens."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY_HEAD, Icm, model_choice, read
from test_learning import Colours
from test_learning import scene as draw_scene
from torch import Tensor

from icm_cli.errors import UsageError
from icm_cli.matting.references import Reference, ReferenceReader
from icm_cli.model.core import InContextMatting
from icm_cli.model.lite.head import TokenMatchConfig, TokenMatchHead
from icm_cli.model.similarity import ReferenceTokens
from icm_cli.model.stable_diffusion.detail_head import DetailReferences, InterSimilarity
from icm_cli.model.training_free.head import TrainingFree, TrainingFreeConfig
from icm_cli.options import ReferenceOptions

RED, BLUE = (slice(48, 80), slice(16, 48)), (slice(8, 40), slice(80, 112))
"""Where the object of the scene is, and what looks unlike it."""


def negative(area: tuple[slice, slice] | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scene as a negative reference: an area of it, or all of it."""
    image, guidance, valid = draw_scene()
    guidance = torch.zeros_like(guidance) if area is None else torch.full_like(guidance, 0.5)
    if area is not None:
        guidance[0, 0][area] = 0.0
    return image, guidance, valid


def positive() -> tuple[Tensor, Tensor, Tensor]:
    """Return the scene as a reference whose object is the red square alone."""
    image, guidance, valid = draw_scene()
    guidance = torch.zeros_like(guidance)
    guidance[0, 0][RED] = 1.0
    return image, guidance, valid


def read_negatives(refs: tuple[Path, ...], masks: tuple[Path, ...], notices: list[str]) -> list[Reference]:
    options = ReferenceOptions(ref=(), not_ref=refs, not_mask=masks)
    return ReferenceReader(notices.append).read_negatives(options)


@pytest.fixture
def model() -> InContextMatting:
    torch.manual_seed(0)
    config = TokenMatchConfig(**TINY_HEAD, edge_radius=0.0)
    head = TokenMatchHead(config)
    head.initialise_from_pca(
        Colours().target_features(*draw_scene()[::2], [""]).correspondence_features[0].flatten(1).T
    )
    return InContextMatting(Colours(), head).eval()  # type: ignore[arg-type]


def if_present(model: InContextMatting, *references: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, float]:
    """Return the alpha of the scene if the object is present, and the logit of its presence."""
    image, _, valid = draw_scene()
    matte = model.infer(image, valid, model.prepare_references(references))
    assert matte.presence is not None
    return matte.presence.alpha_if_present[0, 0, :96], float(matte.presence.logit)


class TestTokenMatch:
    def test_negative_area_has_no_alpha_and_the_rest_keeps_its_own(self, model: InContextMatting) -> None:
        plain, _ = if_present(model, positive())
        alpha, logit = if_present(model, positive(), negative(BLUE))
        assert plain[BLUE].min() > 0
        inner = slice(20, 28), slice(92, 100)
        assert alpha[inner].max() == 0
        assert torch.equal(alpha[RED], plain[RED])
        assert np.isfinite(logit)

    def test_an_image_that_is_wholly_negative_does_not_contain_the_object(self, model: InContextMatting) -> None:
        image, guidance, valid = positive()
        image[0][:, *RED] = torch.tensor([0.7, 0.1, 0.9])[:, None, None]
        plain, plain_logit = if_present(model, (image, guidance, valid))
        alpha, logit = if_present(model, (image, guidance, valid), negative(None))
        assert plain.max() > 0
        assert alpha.max() == 0
        assert logit < min(plain_logit, -5)

    def test_negatives_are_learned_as_targets_without_the_object(self, model: InContextMatting) -> None:
        tuned = [
            model.prepare_references(references, learn_steps=20)
            for references in ([positive()], [negative(BLUE), positive()])
        ]
        assert tuned[0].prepared.negative is None  # type: ignore[union-attr]
        assert len(tuned[1].prepared.negative) == 2  # type: ignore[union-attr]
        first, second = (list(each.head.parameters()) for each in tuned)  # type: ignore[union-attr]
        assert any(not torch.equal(one, other) for one, other in zip(first, second, strict=True))


class TestOtherHeads:
    @pytest.mark.parametrize("rule", ["contrast", "clusters"])
    def test_training_free(self, rule: str) -> None:
        head = TrainingFree(TrainingFreeConfig(rule=rule))  # type: ignore[arg-type]
        axes = torch.eye(4)
        twin = F.normalize(axes[0] + 0.6 * axes[1], dim=0)
        target = torch.stack([axes[0], twin, -axes[0], axes[3]])
        own = ReferenceTokens(axes[:1], torch.stack([-axes[0], axes[3]]))

        def compare(reference: ReferenceTokens) -> tuple[Tensor, float]:
            if rule == "contrast":
                return head._compare_tokens(target, reference)
            from icm_cli.model.training_free.head import segment_by_clusters

            return segment_by_clusters(target, target, reference, TrainingFreeConfig(min_cluster_cosine=0.99))

        (plain, _), (contrast, similarity) = compare(own), compare(ReferenceTokens(*_pair(own), twin[None]))
        assert plain[1] > 0
        assert contrast[1] <= 0 < contrast[0]
        assert similarity > 0.5

    def test_inter_similarity_keeps_its_sum(self) -> None:
        torch.manual_seed(0)
        layer, feature = InterSimilarity(16), torch.randn(1, 16, 4, 5)
        valid = torch.ones(1, 4, 5, dtype=torch.bool)
        tokens = layer.normalised_tokens(feature)[0].detach()
        plain = layer([DetailReferences([tokens[:3]])], feature, valid)
        bound = layer([DetailReferences([tokens[:3]], [tokens[7:9]])], feature, valid)
        assert torch.isclose(plain.sum(), bound.sum())
        assert (bound.flatten()[7:9] == 0).all()
        assert (plain.flatten()[7:9] > 0).all()
        assert (bound.flatten()[:3] > plain.flatten()[:3]).all()


def _pair(tokens: ReferenceTokens) -> tuple[Tensor, Tensor]:
    return tokens.foreground, tokens.background


class TestCommand:
    def test_what_was_found_by_mistake_is_not_found_again(self, icm: Icm, scene: Path) -> None:
        report, page = scene / "r.json", scene / "r.html"
        assert icm(report=[report, page]).exit_code == 0
        before = read(scene / "out" / "wall.png")
        assert before.max() == 255
        assert "negative reference" not in page.read_text()
        result = icm(not_ref=scene / "imgs" / "wall.jpg", report=[report, page])
        assert result.exit_code == 0, result.output
        images = {image["name"]: image for image in json.loads(report.read_text())["images"]}
        assert {image["status"] for image in images.values()} == {"done"}  # --not-ref is part of the digest
        assert images["wall.jpg"]["not_found"]
        assert read(scene / "out" / "wall.png").max() == 0
        assert "negative reference" in page.read_text()

    def test_masks_belong_to_images_in_order(self, scene: Path) -> None:
        ref, mask = scene / "ref.png", scene / "mask.png"
        notices = list[str]()
        masked, whole = read_negatives((ref, scene / "imgs" / "wall.jpg"), (mask,), notices)
        assert np.array_equal(masked.selected, read(mask) > 127)
        assert masked.is_negative
        assert whole.is_negative
        assert whole.selected.all()
        assert notices == [f"{scene / 'imgs' / 'wall.jpg'} has no --not-mask, so all of it is negative"]
        cv2.imwrite(str(scene / "white.png"), np.full(read(mask).shape[:2], 255, np.uint8))
        (white,) = read_negatives((ref,), (scene / "white.png",), notices)
        assert white.selected.all()  # as without a mask
        assert len(notices) == 1
        with pytest.raises(UsageError, match="2 --not-mask but 1 --not-ref were given"):
            read_negatives((ref,), (mask, mask), notices)
        labels = np.zeros(read(mask).shape[:2], np.uint8)
        labels[:50], labels[60:120] = 1, 2
        cv2.imwrite(str(scene / "labels.png"), labels)
        with pytest.raises(UsageError, match=r"has several labels.*expected white on what is not the object"):
            read_negatives((ref,), (scene / "labels.png",), notices)

    def test_digest_of_a_negative(self) -> None:
        rgb, area = np.zeros((4, 5, 3), np.uint8), np.eye(4, 5) > 0
        references = [Reference.negative(rgb, each) for each in (area, ~area, area | True)] + [Reference(rgb, area)]
        assert len({each.digest for each in references}) == 4

    @pytest.mark.parametrize("options", [{"not_ref": "missing.png"}, {"not_mask": "mask.png"}])
    def test_wrong_options(self, icm: Icm, scene: Path, options: dict[str, str]) -> None:
        result = icm(**{name: scene / value for name, value in options.items()})
        assert result.exit_code == 2
        assert not (scene / "out").exists()

    def test_a_negative_must_not_be_the_object_itself(self, icm: Icm, scene: Path) -> None:
        for not_mask in (None, scene / "mask.png"):
            result = icm(not_ref=scene / "ref.png", not_mask=not_mask)
            assert result.exit_code == 2
            assert "negative reference 1 is also the image of a reference, and marks 100%" in result.stderr
        assert not (scene / "out").exists()
        cv2.imwrite(str(scene / "rest.png"), 255 - read(scene / "mask.png"))
        assert icm(not_ref=scene / "ref.png", not_mask=scene / "rest.png").exit_code == 0

    def test_a_negative_is_never_overwritten(self, icm: Icm, scene: Path) -> None:
        (scene / "out").mkdir()
        cv2.imwrite(str(scene / "out" / "wall.png"), np.zeros((20, 20, 3), np.uint8))
        result = icm("--overwrite", not_ref=scene / "out" / "wall.png")
        assert result.exit_code == 2
        assert "would be written over a negative reference" in result.stderr


class TestPredictor:
    def test_negatives(self, scene: Path, small_model: Path) -> None:
        predictor = model_choice(str(small_model)).load_predictor()
        rgb, mask = read(scene / "ref.png")[..., ::-1].copy(), read(scene / "mask.png")
        wall = read(scene / "imgs" / "wall.jpg")[..., ::-1].copy()
        assert predictor.matte(wall, predictor.reference([(rgb, mask)])).max() == 255
        assert predictor.matte(wall, predictor.reference([(rgb, mask)], negatives=[wall])).max() == 0
        half = np.zeros(wall.shape[:2], bool)
        half[:, :10] = True
        assert predictor.matte(wall, predictor.reference([(rgb, mask)], negatives=[(wall, half)])).max() == 255
        for wrong in (wall, [wall.astype(np.float32)], [(wall, half[:5])]):
            with pytest.raises(UsageError):
                predictor.reference([(rgb, mask)], negatives=wrong)
        with pytest.raises(UsageError, match="negative reference 2 is also the image of a reference"):
            predictor.reference([(rgb, mask)], negatives=[wall, (rgb, mask)])
        with pytest.raises(UsageError, match="no reference"):
            predictor.reference([Reference.negative(wall, half)])
