"""The stages "match", "refine" and "end-to-end": samples, learning, and bit-equal resume."""

from __future__ import annotations

import collections
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import COMPOSITES, refine_alpha
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from train_data import MODEL, PLAIN, change, log, metadata, same_weights, train, write_config

from icm_cli.config import parse_model_config
from icm_cli.errors import ConfigError
from icm_cli.model.lite.head import TokenMatchHead
from icm_cli.model.lite.refiner import Refine, enlarge_and_join
from icm_cli.model.loading import load_model_for_training
from icm_cli.training.data.pool import TrainingItem, TrainingPool, read_pool
from icm_cli.training.settings import MatchStageConfig, TrainConfig, read_settings
from icm_cli.training.stages import match, refine, view_sets
from icm_cli.training.stages.mosaics import ImageSource, MosaicBatch, MosaicSampler, TokenMatcher
from icm_cli.training.stages.refine import (
    EdgeBatch,
    EdgeMaker,
    RefineStage,
    add_uncertain_regions,
    degrade_outline,
    degrade_to_object_mask,
    degrade_to_tokens,
)

COLOURS = {"red": (20, 20, 220), "green": (20, 200, 20), "white": (240, 240, 240)}
MATCH = {
    "stage": "match",
    "steps": 40,
    "batch_size": 6,
    "learning_rate": 5e-3,
    "backbone_learning_rate": 0,
    "log_every": 20,
    "clip_norm": 30.0,
    "match": {"views_per_group": 6},
}
REFINE = {
    "stage": "refine",
    "steps": 120,
    "batch_size": 4,
    "learning_rate": 1e-2,
    "backbone_learning_rate": 0,
    "log_every": 40,
    "refine": {"crop_px": 64, "uncertain_probability": 0},
}


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three groups of two photographs, each group with a disc of one colour."""
    root = tmp_path_factory.mktemp("discs")
    for group, colour in COLOURS.items():
        for number in range(2):
            photograph = np.full((96, 96, 3), 90 + 30 * number, np.uint8)
            alpha = np.zeros((96, 96), np.uint8)
            for image, value in ((photograph, colour), (alpha, 255)):
                cv2.circle(image, (40 + 10 * number, 50), 30, value, -1)
            for kind, image in (("images", photograph), ("alphas", alpha)):
                path = root / kind / group / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), image)
    return root


def changed_parts(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {key.split(".")[0] for key in after if not after[key].equal(before[key])}


def kept_digests(run: Path) -> set[str]:
    """Return the digests of the token files in a run's folder."""
    return {torch.load(path, weights_only=True)["digest"] for path in (run / view_sets.TOKENS_FOLDER).iterdir()}


def untrained() -> dict[str, torch.Tensor]:
    """Return the initial weights of a run with seed 0."""
    model = load_model_for_training(
        parse_model_config(MODEL, "test"), checkpoint=None, weights=None, offline=True, seed=0
    )
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def group_of(name: str, count: int) -> tuple[TrainingItem, ...]:
    """Return items of one group."""
    return tuple(
        TrainingItem(f"{name}{i}", Path(f"{name}{i}.png"), None, None, name, is_foreground=False, is_binary=False)
        for i in range(count)
    )


@dataclass(frozen=True)
class GroupImage:
    """An image that only says which group it shows."""

    group: str
    has_object: bool = True


@pytest.fixture(scope="module")
def matched(discs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The configuration and the folder of a run of the stage "match"."""
    folder = tmp_path_factory.mktemp("matched")
    config = write_config(folder / "small.yaml", discs, **MATCH)
    done = train(config, folder / "run")
    assert done.exit_code == 0, done.output
    return config, folder / "run"


class TestMatch:
    def test_training_reduces_the_loss_and_changes_only_the_head(self, matched: tuple[Path, Path]) -> None:
        first, last = log(matched[1])
        assert float(last["loss"]) < 0.8 * float(first["loss"])
        assert float(last["presence"]) > 0
        assert changed_parts(untrained(), load_file(matched[1] / "last.safetensors")) == {"head"}

    def test_resumed_run_is_bit_equal_and_encodes_no_image_again(
        self, matched: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config, whole = matched
        assert train(config, tmp_path / "run", "--set", "train.steps=15").exit_code == 0
        monkeypatch.setattr(view_sets, "_encode_scenes", None)
        done = train(config, tmp_path / "run", "--resume")
        assert done.exit_code == 0, done.output
        assert same_weights(tmp_path / "run" / "last.safetensors", whole / "last.safetensors")

    def test_tokens_are_recomputed_for_other_settings(self, matched: tuple[Path, Path], tmp_path: Path) -> None:
        config, _ = matched
        out = tmp_path / "run"
        assert train(config, out, "--set", "train.steps=1").exit_code == 0
        before = kept_digests(out)
        for path in out.glob("*.safetensors"):
            path.unlink()
        (out / "state.pt").unlink()
        done = train(config, out, "--set", "train.steps=1", "--set", "train.pairs.composite_probability=0.9")
        assert "encoding 18 images with the backbone\n" in done.stderr
        assert not kept_digests(out) & before

    def test_checkpoint_of_another_stage_is_the_start_and_records_its_data(
        self, matched: tuple[Path, Path], discs: Path, tmp_path: Path
    ) -> None:
        checkpoint = matched[1] / "last.safetensors"
        assert len(json.loads(metadata(checkpoint)["icm.trained_on"])) == 6
        config = write_config(tmp_path / "refine.yaml", discs, **{**REFINE, "steps": 2})
        done = train(config, tmp_path / "run", checkpoint=checkpoint)
        assert done.exit_code == 0, done.output
        after = load_file(tmp_path / "run" / "last.safetensors")
        assert changed_parts(load_file(checkpoint), after) == {"edges"}

    def test_training_with_several_references_reduces_the_loss(self, discs: Path, tmp_path: Path) -> None:
        config = write_config(
            tmp_path / "a.yaml",
            discs,
            **{**MATCH, "match": {"views_per_group": 6, "reference_count_weights": [0.0, 0.0, 1.0]}},
        )
        done = train(config, tmp_path / "run")
        assert done.exit_code == 0, done.output
        first, last = log(tmp_path / "run")
        assert float(last["loss"]) < 0.8 * float(first["loss"])

    def test_duplicate_references_do_not_change_the_prediction(self) -> None:
        head = TokenMatchHead(
            TokenMatchHead.Config(feature_channels=(6,), width=4, skip_channels=(), decoder_channels=())
        )
        rng = torch.Generator().manual_seed(0)
        feature = torch.randn(2, 6, 4, 4, generator=rng)
        shown = torch.randn(2, 1, 6, 4, 4, generator=rng)
        inside = torch.rand(2, 1, 4, 4, generator=rng) > 0.5
        everything = torch.ones(2, 4, 4, dtype=torch.bool)

        def answers(times: int) -> list[torch.Tensor]:
            references = [each.repeat(1, times, *[1] * (each.ndim - 2)) for each in (shown, inside, ~inside)]
            layers = (feature, (), everything.float(), everything, *references, feature, everything.float())
            batch = MosaicBatch(("a", "b"), (0, 1), (), 1, 1, *layers)
            return TokenMatcher(head.eval())(batch)

        for once, twice in zip(answers(1), answers(2), strict=True):
            torch.testing.assert_close(once, twice, atol=0.02, rtol=0)  # the null token is one of many

    def test_steps_of_the_command_replace_the_time_limit(self, discs: Path, tmp_path: Path) -> None:
        config = write_config(tmp_path / "a.yaml", discs, **{**MATCH, "minutes": 60})
        done = train(config, tmp_path / "run", "--set", "train.steps=2")
        assert done.exit_code == 0, done.output
        assert metadata(tmp_path / "run" / "last.safetensors")["icm.step"] == "2"

    def test_setting_that_the_stage_does_not_use_is_refused(self, discs: Path, tmp_path: Path) -> None:
        config = write_config(tmp_path / "a.yaml", discs, **MATCH)
        done = train(config, tmp_path / "run", "--set", "train.loss.dice=2")
        assert done.exit_code == 3
        assert "--set train.loss.dice has no effect: train.stage is match" in done.stderr
        assert not (tmp_path / "run").exists()

    def test_unreadable_image_does_not_remove_views_of_others(self, discs: Path, tmp_path: Path) -> None:
        data = shutil.copytree(discs, tmp_path / "data")
        bad = data / "images" / "red" / "0.png"
        bad.write_bytes(b"")
        recipe = {**MATCH, "steps": 1, "pairs": {"distractor_probability": 1.0, "composite_probability": 0.0}}
        done = train(write_config(tmp_path / "a.yaml", data, **recipe), tmp_path / "run")
        assert done.exit_code == 0, done.output
        assert done.stderr.count(f"skipped: {bad} is empty") == 1
        (reason,) = (tmp_path / "run" / "skipped.txt").read_text().splitlines()
        assert reason.startswith(f"{bad} is empty")
        files = (tmp_path / "run" / view_sets.TOKENS_FOLDER).iterdir()
        views = [view for path in files for view in torch.load(path, weights_only=True)["views"]]
        assert [view is None for view in views].count(True) == 3  # those of the image itself

    def test_many_unreadable_images_end_the_run(
        self, discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = shutil.copytree(discs, tmp_path / "data")
        (data / "images" / "red" / "0.png").write_bytes(b"")
        monkeypatch.setattr("icm_cli.training.batches.MIN_DRAWS_TO_JUDGE", 1)
        done = train(write_config(tmp_path / "a.yaml", data, **MATCH), tmp_path / "run")
        assert done.exit_code == 1
        assert "more than 1%" in done.stderr.splitlines()[-1]

    @pytest.mark.parametrize(("kind", "message"), [("photograph", "has colour"), ("labels", "the largest value of")])
    def test_images_that_are_no_alphas_are_refused(self, discs: Path, tmp_path: Path, kind: str, message: str) -> None:
        data = shutil.copytree(discs, tmp_path / "data")
        for path in (data / "alphas").rglob("*.png"):
            if kind == "photograph":
                cv2.imwrite(str(path), cv2.imread(str(path)) // (1, 2, 3))
            else:
                cv2.imwrite(str(path), cv2.imread(str(path), cv2.IMREAD_GRAYSCALE) // 255)
        config = write_config(tmp_path / "a.yaml", data, **MATCH)
        done = train(config, tmp_path / "run")
        assert done.exit_code == 1
        assert message in done.stderr
        assert str(data / "alphas" / "red" / "0.png") in done.stderr
        assert "no training image could be read" in done.stderr.splitlines()[-1]
        assert not (tmp_path / "run" / "last.safetensors").exists()

    def test_other_heads_are_refused(self, discs: Path, tmp_path: Path) -> None:
        detail = {"name": "detail", "canvas_px": 96, "feature_channels": 8}
        config = write_config(tmp_path / "a.yaml", discs, model={**MODEL, "head": detail}, **MATCH)
        done = train(config, tmp_path / "run")
        assert done.exit_code == 3
        assert len(done.stderr.splitlines()) == 1

    def test_single_large_view_per_group_is_refused(self, discs: Path, tmp_path: Path) -> None:
        config = write_config(
            tmp_path / "a.yaml", discs, **{**MATCH, "match": {"views_per_group": 2, "large_views_per_group": 1}}
        )
        done = train(config, tmp_path / "run")
        assert done.exit_code == 3
        assert "large_views_per_group is 1" in done.stderr

    def one_group(self, discs: Path, path: Path, **sources: object) -> Path:
        """Return a configuration that trains on the red discs only."""
        red = {kind: str(discs / kind / "red" / "*.png") for kind in ("images", "alphas")}
        return change(write_config(path, discs, **{**MATCH, "steps": 2}), sources=[red | sources])

    def test_single_group_trains_on_mosaics_that_show_the_object(self, discs: Path, tmp_path: Path) -> None:
        done = train(self.one_group(discs, tmp_path / "a.yaml"), tmp_path / "run")
        assert done.exit_code == 0, done.output
        notices = [line for line in done.stderr.splitlines() if "all images belong to one group or class" in line]
        assert len(notices) == 1

    @pytest.mark.parametrize(
        ("settings", "message"),
        [({"views_per_group": 1}, "no group has two views"), ({"max_views_per_image": 1}, "no group has two views")],
    )
    def test_groups_that_are_too_small_are_refused(
        self, discs: Path, tmp_path: Path, settings: dict[str, int], message: str
    ) -> None:
        config = self.one_group(discs, tmp_path / "a.yaml", group_by="image")
        done = train(config, tmp_path / "run", f"--set=train.match={json.dumps(settings)}")
        assert done.exit_code == 2
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1

    def test_group_without_negatives_is_refused(self, discs: Path, tmp_path: Path) -> None:
        classes = tmp_path / "classes.json"
        classes.write_text(json.dumps({"red": ["a", "b"], "green": "a", "white": "b"}))
        source = {kind: str(discs / kind) for kind in ("images", "alphas")} | {"classes": str(classes)}
        config = change(write_config(tmp_path / "a.yaml", discs, **MATCH), sources=[source])
        done = train(config, tmp_path / "run")
        assert done.exit_code == 2
        assert f"no image without the object of {discs / 'images' / 'red'}" in done.stderr

    @pytest.mark.parametrize("stage", ["match", "objects", "end-to-end"])
    def test_preview_shows_references_mosaic_and_truth_of_several_groups(
        self, discs: Path, tmp_path: Path, stage: str
    ) -> None:
        """The alpha is white where the mosaic shows the object of the reference."""
        config = write_config(
            tmp_path / "a.yaml",
            discs,
            **{**MATCH, **PLAIN, "stage": stage, "match": {"reference_count_weights": [1, 1]}},
        )
        done = train(config, tmp_path / "run", preview=8)
        assert done.exit_code == 0, done.output
        assert f"the preview of samples is {tmp_path / 'run' / 'preview.png'}" in done.stdout
        sheet = cv2.imread(str(tmp_path / "run" / "preview.png")).astype(int)
        assert sheet.shape == (8 * 190, 3 * 240, 3)
        found = set()
        for row in range(8):
            reference, mosaic, alpha = (
                sheet[row * 190 :][:172, column * 240 : (column + 1) * 240] for column in range(3)
            )
            bright = reference[(reference.max(axis=-1) > 180)]
            colour = {name: np.array(value) for name, value in COLOURS.items()}
            shown = min(colour, key=lambda name: np.abs(np.median(bright, axis=0) - colour[name]).sum())
            found.add(shown)
            inside = alpha.min(axis=-1) > 250
            if inside.any():
                assert np.abs(np.median(mosaic[inside], axis=0) - colour[shown]).max() < 12, row
        assert len(found) > 1

    def test_preview_shows_the_samples_of_the_training(
        self, discs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = write_config(tmp_path / "a.yaml", discs, **{**MATCH, "steps": 2, "batch_size": 3})
        names: list[str] = []
        original = match.MatchStage.make_batch

        def note_names(stage: match.MatchStage, counters: list[int]) -> MosaicBatch:
            batch = original(stage, counters)
            names.extend(batch.names)
            return batch

        monkeypatch.setattr(match.MatchStage, "make_batch", note_names)
        assert train(config, tmp_path / "run").exit_code == 0
        recipe = read_settings(config)
        stage = match.MatchStage(recipe, read_pool(recipe.data))
        assert [stage.preview_sample(counter)[0] for counter in range(6)] == names[:6]

    @pytest.mark.parametrize("share", [0.0, 1.0])
    def test_number_of_tiles_that_show_the_object(self, share: float) -> None:
        pool = TrainingPool((group_of("red", 3), group_of("green", 3)), (1.0, 1.0), ())
        config = MatchStageConfig(multiple_probability=share, negative_probability=0.25)
        rng = np.random.default_rng(0)

        source = ImageSource(pool, {item: [GroupImage(item.group)] for item in pool}, lambda image: image)
        sampler = MosaicSampler(source, source, config, 2, 2, 1, rng)
        mosaics = [sampler.sample() for _ in range(200)]
        for each in mosaics:
            group = each.references[0].group
            assert set(each.positive_tiles) == {place for place, tile in enumerate(each.tiles) if tile.group == group}
        counts = collections.Counter(len(each.positive_tiles) for each in mosaics)
        assert 30 < counts[0] < 70
        assert (set(counts) == {0, 1}) if share == 0 else (counts[3] + counts[4] > counts[1])


class TestRefine:
    @pytest.mark.slow
    def test_training_reduces_the_loss_and_changes_only_the_edges(self, discs: Path, tmp_path: Path) -> None:
        config = write_config(tmp_path / "a.yaml", discs, **REFINE)
        done = train(config, tmp_path / "run", "--set", "train.image_every=50")
        assert done.exit_code == 0, done.output
        first, _, last = log(tmp_path / "run")
        assert float(last["l1"]) < 0.9 * float(first["l1"])
        assert changed_parts(untrained(), load_file(tmp_path / "run" / "last.safetensors")) == {"edges"}

    def test_time_limit_counts_across_a_resume(self, discs: Path, tmp_path: Path) -> None:
        config = write_config(tmp_path / "a.yaml", discs, **{**REFINE, "schedule": "cosine", "minutes": 0.03})
        done = train(config, tmp_path / "run")
        assert done.exit_code == 0, done.output
        steps = int(metadata(tmp_path / "run" / "last.safetensors")["icm.step"])
        assert steps > 1
        assert train(config, tmp_path / "run", "--resume").exit_code == 0
        assert int(metadata(tmp_path / "run" / "last.safetensors")["icm.step"]) == steps

    def test_preview_shows_coarse_and_true_alphas(self, discs: Path, tmp_path: Path) -> None:
        config = write_config(tmp_path / "a.yaml", discs, **REFINE)
        assert train(config, tmp_path / "run", preview=3).exit_code == 0
        sheet = cv2.imread(str(tmp_path / "run" / "preview.png"))
        coarse, truth = sheet[:220, 224:444], sheet[:220, 448:668]
        assert truth.min() == 0
        assert truth.max() == 255
        assert (coarse != truth).any()

    def test_model_without_edges_is_refused(self, discs: Path, tmp_path: Path) -> None:
        config = write_config(
            tmp_path / "a.yaml", discs, model={key: MODEL[key] for key in ("backbone", "head")}, **REFINE
        )
        done = train(config, tmp_path / "run")
        assert done.exit_code == 3
        assert "the model has no edges to train" in done.stderr

    def test_packed_checkpoint_contains_the_backbone(self, discs: Path, tmp_path: Path) -> None:
        config = write_config(tmp_path / "a.yaml", discs, **{**REFINE, "steps": 1})
        done = train(config, tmp_path / "run", pack=tmp_path / "packed.safetensors")
        assert done.exit_code == 0, done.output
        parts = {key.split(".")[0] for key in load_file(tmp_path / "packed.safetensors")}
        assert parts == {"backbone", "head", "edges"}

    def test_predicted_coarse_alphas_are_transformed_with_their_images(self, discs: Path, tmp_path: Path) -> None:
        """If the predicted alpha equals the true one, both are still equal after the augmentation."""
        config = write_config(
            tmp_path / "a.yaml", discs, **{**REFINE, "refine": {"crop_px": 64, "predicted_probability": 1.0}}
        )
        content = yaml.safe_load(config.read_text())
        content["data"]["sources"][0]["coarse"] = str(discs / "alphas")
        config.write_text(json.dumps(content))
        recipe = read_settings(config)
        maker = EdgeMaker(read_pool(recipe.data), recipe.train)
        batch = maker.make_batch(range(20))
        same = (batch.coarse == batch.truth).flatten(1).all(dim=1).tolist()
        assert 0.2 < np.mean(same) < 0.9  # the other samples are composites
        content["data"]["sources"][0]["coarse"] = str(tmp_path / "none")
        config.write_text(json.dumps(content))
        done = train(config, tmp_path / "run")
        assert done.exit_code == 2
        assert "coarse folder" in done.stderr

    def test_sample_depends_on_its_number_only(self, discs: Path) -> None:
        items = tuple(
            TrainingItem(
                path.stem, path, discs / "alphas" / path.parent.name / path.name, None, path.parent.name, False, False
            )
            for path in sorted((discs / "images").rglob("*.png"))
        )
        config = TrainConfig(canvas_px=96, **{"refine": TrainConfig().refine.__class__(crop_px=64)})
        one, other = (EdgeMaker(TrainingPool((items,), (1.0,), ()), config).make_batch([7]) for _ in range(2))
        assert (one.coarse == other.coarse).all()
        assert (one.rgb == other.rgb).all()
        assert one.rgb.shape == (1, 4, 64, 64, 3)

    def test_unknown_pixels_have_a_larger_weight(self, discs: Path, tmp_path: Path) -> None:
        """Pixels whose coarse alpha is wrong have ``unknown_weight`` times the weight of other pixels."""
        config = write_config(tmp_path / "a.yaml", discs, **REFINE)
        truth = torch.zeros(1, 1, 64, 64)
        coarse = truth.clone()
        coarse[..., :32] = 0.8
        batch = EdgeBatch(("a",), (0,), (), torch.zeros(1, 1, 64, 64, 3), coarse, truth, torch.ones_like(truth))
        shares = {}
        for weight in (1.0, 4.0):
            recipe = read_settings(config, overrides=[f"train.refine.unknown_weight={weight}"])
            stage = RefineStage(recipe, read_pool(recipe.data))
            logit = torch.full_like(truth, -30.0)
            logit[..., :32] = 30.0  # wrong in the unknown half
            shares[weight] = float(stage.compute_losses((logit,), batch)["l1"])
        assert shares[1.0] == pytest.approx(0.5)
        assert shares[4.0] == pytest.approx(4.0 / 5.0)


@given(seed=st.integers(0, 2**31), height=st.integers(24, 90), width=st.integers(24, 90))
@settings(max_examples=60)
def test_degraded_alphas_are_valid(seed: int, height: int, width: int) -> None:
    truth = np.zeros((height, width), np.float32)
    truth[height // 4 : height // 2, width // 4 : width // 2] = 1.0
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    for degrade in (degrade_to_tokens, degrade_to_object_mask, degrade_outline):
        rng = np.random.default_rng(seed)
        coarse = degrade(truth, rng)
        for each in (coarse, add_uncertain_regions(coarse, rgb, truth, rng)):
            assert each.shape == truth.shape
            assert each.dtype == np.float32
            assert each.min() >= 0
            assert each.max() <= 1


def test_object_masks_are_confident_and_lack_hair() -> None:
    truth = np.zeros((256, 256), np.float32)
    truth[64:192, 64:192] = 1.0
    truth[100:110:8, 192:250] = 1.0  # two hairs, one pixel wide
    found = [degrade_to_object_mask(truth, np.random.default_rng(seed)) for seed in range(20)]
    assert min(float(each[110:150, 110:150].min()) for each in found) > 0.9
    assert max(float(each[:20].max()) for each in found) < 0.15
    assert np.mean([float(each[100, 210:240].mean()) for each in found]) < 0.4


@pytest.mark.parametrize("shares", [(0.9, 0.1), (0.7, 0.3), (0.0, 1.0), (0.35, 0.0)])
def test_degradations_are_drawn_by_their_probabilities(shares: tuple[float, float]) -> None:
    config, rng = TrainConfig().refine, np.random.default_rng(0)
    config = replace(config, token_probability=shares[0], object_probability=shares[1])
    made = [refine._draw_degradation(config, rng) for _ in range(1000)]
    expected = {degrade_to_tokens: shares[0], degrade_to_object_mask: shares[1], degrade_outline: 1.0 - sum(shares)}
    for degrade, share in expected.items():
        assert made.count(degrade) / 1000 == pytest.approx(share, abs=0.05)
    with pytest.raises(ConfigError, match="expected a sum of at most 1"):
        replace(config, token_probability=0.7, object_probability=0.4)


def test_uncertain_regions_fade_inside_and_appear_outside() -> None:
    truth = np.zeros((80, 80), np.float32)
    truth[20:60, 20:60] = 1.0
    rgb = np.full((80, 80, 3), 90, np.uint8)
    rgb[20:60, 20:40] = 200  # the object has two colours
    found = [add_uncertain_regions(truth, rgb, truth, np.random.default_rng(seed)) for seed in range(20)]
    assert sum(float(each[20:60, 20:60].min()) < 0.7 for each in found) > 10
    assert sum(float(each[:15].max()) > 0.2 for each in found) > 5
    np.testing.assert_array_equal(add_uncertain_regions(truth, rgb, truth, np.random.default_rng(0)), found[0])


class TestRefineNetwork:
    @pytest.mark.parametrize("order", [torch.channels_last, torch.contiguous_format])
    def test_features_are_enlarged_and_joined_as_by_torch(self, order: torch.memory_format) -> None:
        coarse = torch.rand(2, 5, 3, 4).to(memory_format=order).requires_grad_()
        fine = torch.rand(2, 7, 6, 8).to(memory_format=order).requires_grad_()
        expected = torch.cat([F.interpolate(coarse, scale_factor=2.0, mode="nearest"), fine], dim=1)
        weight = torch.rand_like(expected)
        gradients = torch.autograd.grad((expected * weight).sum(), [coarse, fine])
        joined = enlarge_and_join(coarse, fine)
        assert torch.equal(joined, expected)
        assert joined.is_contiguous(memory_format=order)
        for found, wanted in zip(torch.autograd.grad((joined * weight).sum(), [coarse, fine]), gradients, strict=True):
            torch.testing.assert_close(found, wanted)

    def test_details_start_at_zero_and_learn(self) -> None:
        plain = Refine(Refine.Config(widths=(4, 6)))
        finer = Refine(Refine.Config(widths=(4, 6), detail_blocks=2))
        torch.nn.init.normal_(plain.output.weight)
        assert not finer.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
        image, coarse = torch.rand(1, 3, 32, 32), torch.rand(1, 1, 32, 32)
        torch.testing.assert_close(finer(image, coarse), plain(image, coarse))
        finer(image, coarse).square().mean().backward()
        assert all(float(each.second.weight.grad.abs().max()) > 0 for each in finer.details)

    def test_untrained_network_returns_the_coarse_alpha(self) -> None:
        edges = Refine(Refine.Config(widths=(4, 6), frame_px=64, tile_px=64, overlap_px=8, core_distance=0)).eval()
        coarse = np.random.default_rng(0).random((50, 70), np.float32) * 0.9 + 0.05
        rgb = np.random.default_rng(1).integers(0, 256, (50, 70, 3), np.uint8)
        alpha = refine_alpha(edges, rgb, coarse)
        shrunk = refine_alpha(edges, rgb[:40, :60], coarse[:40, :60])
        assert alpha.shape == (50, 70)
        np.testing.assert_allclose(shrunk, coarse[:40, :60], atol=1e-5)

    @given(height=st.integers(1, 300), width=st.integers(1, 300))
    @settings(max_examples=30)
    def test_output_has_the_size_of_the_input(self, height: int, width: int) -> None:
        edges = Refine(Refine.Config(widths=(4, 6), frame_px=64, tile_px=64, overlap_px=8, core_distance=0)).eval()
        level = np.full((7, 5), 0.25, np.float32)
        alpha = refine_alpha(edges, np.zeros((height, width, 3), np.uint8), level)
        assert alpha.shape == (height, width)
        np.testing.assert_allclose(alpha, 0.25, atol=1e-5)

    @pytest.mark.parametrize(
        ("size", "is_tiled"),
        [((48, 60), False), ((80, 100), True), ((64, 64), False), ((60, 65), True), ((1, 9), False)],
    )
    def test_second_step_refines_larger_images_at_their_size(self, size: tuple[int, int], is_tiled: bool) -> None:
        edges = Refine(Refine.Config(widths=(4, 6), frame_px=64, tile_px=64, overlap_px=8, core_distance=0)).eval()
        tiled: list[tuple[int, ...]] = []
        second_step = edges._refine_tiles
        edges._refine_tiles = lambda rgb, alpha, weight: (
            tiled.append(tuple(alpha.shape)),
            second_step(rgb, alpha, weight),
        )[1]  # type: ignore[method-assign]
        alpha = refine_alpha(edges, np.zeros((*size, 3), np.uint8), np.full((7, 5), 0.25, np.float32))
        assert tiled == ([size] if is_tiled else [])
        assert alpha.shape == size
        np.testing.assert_allclose(alpha, 0.25, atol=1e-5)

    def test_images_of_a_batch_may_have_different_sizes(self) -> None:
        """Each gets the alpha that it gets alone."""
        edges = Refine(Refine.Config(widths=(4, 6), frame_px=64, tile_px=64, overlap_px=8)).eval()
        torch.nn.init.normal_(edges.output.weight, std=0.1)
        rng = np.random.default_rng(0)
        images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in ((60, 50), (60, 50), (150, 90), (40, 64))]
        coarse = [rng.random(size, np.float32) for size in ((7, 5), (9, 9), (8, 5))] + [np.zeros((3, 3), np.float32)]
        together = edges.refine_alphas(images, [torch.from_numpy(alpha) for alpha in coarse])
        for rgb, alpha, found in zip(images, coarse, together, strict=True):
            np.testing.assert_array_equal(found.numpy(), refine_alpha(edges, rgb, alpha))

    def test_coarse_alpha_is_not_changed(self) -> None:
        edges = Refine(Refine.Config(widths=(4, 6), frame_px=64, tile_px=64, overlap_px=8)).eval()
        assert edges.output.bias is not None
        torch.nn.init.constant_(edges.output.bias, 2.0)
        coarse = torch.linspace(0, 1, 50 * 60).reshape(50, 60)
        before = coarse.clone()
        (refined,) = edges.refine_alphas([np.zeros((50, 60, 3), np.uint8)], [coarse])
        assert torch.equal(coarse, before)
        assert float((refined - coarse).abs().max()) > 0.1

    def test_network_does_not_run_without_unknown_pixels(self) -> None:
        """A thing that is absent stays so, whatever the photograph shows."""
        edges = Refine(Refine.Config(widths=(4, 6), frame_px=64, tile_px=64, overlap_px=8, core_distance=0)).eval()
        assert edges.output.bias is not None
        with torch.no_grad():
            edges.output.bias.fill_(5.0)
        rgb = np.zeros((90, 70, 3), np.uint8)
        for level in (0.0, 0.004, 1.0):
            assert (refine_alpha(edges, rgb, np.full((9, 7), level, np.float32)) == np.float32(level)).all()
        assert (refine_alpha(edges, rgb, np.full((9, 7), 0.2, np.float32)) > 0.9).all()
        faint = np.full((9, 7), 0.03, np.float32)
        assert refine_alpha(edges, rgb[:60, :60], faint).max() < 0.031

    def test_tiles_do_not_change_pixels_far_from_unknown_ones(self) -> None:
        """A network that makes a haze of everything makes none beyond its reach, and no straight edge where it ends."""
        edges = Refine(
            Refine.Config(widths=(4, 6), frame_px=64, tile_px=64, overlap_px=16, change_radius=0.1, core_distance=0)
        ).eval()
        assert edges.output.bias is not None
        with torch.no_grad():
            edges.output.bias.fill_(2.0)
        coarse = np.full((200, 200), 0.015, np.float32)
        coarse[80:120, 80:120] = 0.5
        alpha = refine_alpha(edges, np.zeros((200, 200, 3), np.uint8), coarse)
        beyond = np.ones((200, 200), bool)
        beyond[55:145, 55:145] = False
        np.testing.assert_allclose(alpha[beyond], 0.015, atol=1e-5)
        assert alpha[100, 100] > 0.9
        haze = np.where(coarse > 0.1, 0.5, alpha)
        assert max(np.abs(np.diff(haze[:, column])).max() for column in (0, 40, 60, 70, 140, 199)) < 0.06

    @pytest.mark.parametrize("scale", [1, 5])
    def test_core_is_opaque_and_its_surroundings_are_transparent(self, scale: int) -> None:
        config = Refine.Config(widths=(4, 6), frame_px=4096, tile_px=64, overlap_px=16, core_distance=0.05)
        alpha = np.full((200, 240), 0.06, np.float32)
        alpha[60:140, 60:140] = 0.9
        alpha[90:110, 90:110] = 0.85  # grey within
        alpha[60:140, 138:200] = np.linspace(0.9, 0.06, 62)  # a soft edge
        alpha = cv2.resize(alpha, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST)
        done = refine_alpha(Refine(config).eval(), np.zeros((*alpha.shape, 3), np.uint8), alpha)
        s = scale
        assert (done[90 * s : 110 * s, 90 * s : 110 * s] == 1).all()
        assert (done[: 30 * s, : 30 * s] == 0).all()
        soft = done[100 * s, 150 * s : 190 * s]
        np.testing.assert_allclose(soft, alpha[100 * s, 150 * s : 190 * s], atol=0.15)
        assert (np.diff(soft) <= 1e-3).all()
        assert np.abs(np.diff(soft)).max() < 0.06 / s + 0.02
        plain = refine_alpha(
            Refine(replace(config, core_distance=0)).eval(), np.zeros((*alpha.shape, 3), np.uint8), alpha
        )
        np.testing.assert_allclose(plain, alpha, atol=1e-5)

    @pytest.mark.parametrize("centre", [(100, 90), (4, 195)])
    def test_first_step_omits_the_image_far_from_unknown_pixels(self, centre: tuple[int, int]) -> None:
        config = Refine.Config(widths=(4, 6), frame_px=200, tile_px=64, change_radius=0.05, core_distance=0)
        edges, whole = Refine(config).eval(), Refine(replace(config, context_px=200)).eval()
        torch.nn.init.normal_(edges.output.weight, std=0.1)
        whole.load_state_dict(edges.state_dict())
        sizes: list[tuple[int, ...]] = []
        edges.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[-2:])))
        rgb = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
        coarse = cv2.circle(np.zeros((200, 200), np.float32), centre, 12, 0.8, -1)
        np.testing.assert_allclose(refine_alpha(edges, rgb, coarse), refine_alpha(whole, rgb, coarse), atol=1e-5)
        (size,) = sizes
        assert max(size) <= 2 * (12 + 10 + config.context_px + config.multiple)

    def test_tiles_leave_no_seams(self) -> None:
        """A network that moves every alpha by a constant moves that of a tiled photograph so everywhere."""
        edges = Refine(Refine.Config(widths=(4, 6), frame_px=64, tile_px=64, overlap_px=16, core_distance=0)).eval()
        assert edges.output.bias is not None
        with torch.no_grad():
            edges.output.bias.fill_(0.7)
        alpha = refine_alpha(edges, np.zeros((200, 170, 3), np.uint8), np.full((20, 17), 0.5, np.float32))
        assert alpha.std() < 1e-6
        np.testing.assert_allclose(alpha, 1 / (1 + np.exp(-1.4)), atol=1e-5)  # once whole, once in tiles


END_TO_END = {**MATCH, "stage": "end-to-end", "steps": 20, "log_every": 10, "batch_size": 4}


class TestEndToEnd:
    @pytest.mark.slow
    def test_training_changes_backbone_and_head(self, discs: Path, tmp_path: Path) -> None:
        config = write_config(tmp_path / "a.yaml", discs, **{**END_TO_END, "backbone_learning_rate": 1e-4})
        done = train(config, tmp_path / "run", "--set", "train.image_every=10")
        assert done.exit_code == 0, done.output
        first, last = log(tmp_path / "run")
        assert float(last["loss"]) < 0.9 * float(first["loss"])
        assert changed_parts(untrained(), load_file(tmp_path / "run" / "last.safetensors")) == {"head", "backbone"}

    def test_resumed_run_is_bit_equal(self, discs: Path, tmp_path: Path) -> None:
        config = write_config(
            tmp_path / "a.yaml",
            discs,
            **{**END_TO_END, "batch_size": 2, "match": {"large_views_per_group": 1}},
        )
        assert train(config, tmp_path / "whole", "--set", "train.steps=4").exit_code == 0
        assert train(config, tmp_path / "parts", "--set", "train.steps=2").exit_code == 0
        done = train(config, tmp_path / "parts", "--resume", "--set", "train.steps=4")
        assert done.exit_code == 0, done.output
        assert same_weights(*(tmp_path / each / "last.safetensors" for each in ("parts", "whole")))
        changed = train(config, tmp_path / "parts", "--resume", "--set", "train.match.presence_weight=1")
        assert changed.exit_code == 2
        assert "train.match.presence_weight: 0.3 -> 1" in changed.stderr


@pytest.mark.parametrize(("key", "is_binary"), [("alphas", True), ("trimaps", False), ("coarse", False)])
def test_photographs_are_refused(discs: Path, tmp_path: Path, key: str, is_binary: bool) -> None:
    data = shutil.copytree(discs, tmp_path / "data")
    photograph = cv2.resize(cv2.imread(str(COMPOSITES / "ref.jpg")), (96, 96), interpolation=cv2.INTER_AREA)
    for path in (data / "alphas").rglob("*.png"):
        copy = data / key / path.relative_to(data / "alphas")
        copy.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(copy), photograph)
    source = {name: str(data / name) for name in {"images", "alphas", key}}
    config = write_config(tmp_path / "a.yaml", data, **REFINE)
    change(config, sources=[{**source, "binary": is_binary}], backgrounds=[])
    done = train(config, tmp_path / "run")
    assert done.exit_code == 1
    assert f"{data / key / 'red'}" in done.stderr
    assert f"has colour; expected an alpha with a single grey channel; check '{key}' of the data" in done.stderr


MATTE = {"steps": 12, "batch_size": 2}


@pytest.mark.parametrize(
    ("recipe", "workers"),
    [
        (MATTE, 0),
        ({**MATCH, "steps": 2}, 0),
        ({**REFINE, "steps": 8, "refine": {"crop_px": 64}}, 1),
        ({**END_TO_END, "steps": 2}, 0),
    ],
    ids=["matte", "match", "refine", "end-to-end"],
)
def test_alphas_without_an_object_are_reported_once(
    discs: Path, tmp_path: Path, recipe: dict[str, Any], workers: int
) -> None:
    data = shutil.copytree(discs, tmp_path / "data")
    black = data / "alphas" / "red" / "1.png"
    cv2.imwrite(str(black), np.zeros((96, 96), np.uint8))
    config = change(write_config(tmp_path / "a.yaml", data, **recipe), backgrounds=[str(discs / "images" / "green")])
    done = train(config, tmp_path / "run", workers=workers)
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "run" / "skipped.txt").exists()
    assert done.stderr.count("without an object") == 1
    assert f"1 alpha without an object: {black}; the model learns that" in done.stderr


@pytest.mark.parametrize("recipe", [MATTE, {**REFINE, "steps": 8, "refine": {"crop_px": 64}}], ids=["matte", "refine"])
def test_cutouts_without_an_object_are_reported_like_alphas(
    discs: Path, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    folder = tmp_path / "cutouts" / "red"
    folder.mkdir(parents=True)
    for number in range(3):
        rgb = cv2.imread(str(discs / "images" / "red" / f"{number % 2}.png"))
        alpha = cv2.imread(str(discs / "alphas" / "red" / f"{number % 2}.png"), cv2.IMREAD_GRAYSCALE)
        cv2.imwrite(str(folder / f"{number}.png"), np.dstack([rgb, alpha * (number < 2)]))
    sources = [{"dataset": "cutouts", "root": str(tmp_path / "cutouts")}]
    config = write_config(tmp_path / "a.yaml", discs, **recipe)
    config = change(config, sources=sources, backgrounds=[str(discs / "images" / "green")])
    done = train(config, tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "run" / "skipped.txt").exists()
    assert f"1 alpha without an object: {folder / '2.png'}; " in done.stderr


@pytest.mark.parametrize("group_by", ["image", "group"])
def test_target_without_a_reference_is_drawn_again_and_is_not_unreadable(
    discs: Path, tmp_path: Path, group_by: str
) -> None:
    """With ``group_by: image``, a black image is its own reference. Else, it is the only one of another image."""
    data = shutil.copytree(discs, tmp_path / "data")
    black = data / "alphas" / "red" / "1.png"
    cv2.imwrite(str(black), np.zeros((96, 96), np.uint8))
    source = {"images": str(data / "images"), "alphas": str(data / "alphas"), "group_by": group_by}
    config = change(write_config(tmp_path / "a.yaml", data, **PLAIN, steps=12), sources=[source])
    done = train(config, tmp_path / "run")
    assert done.exit_code == 0, done.output
    assert not (tmp_path / "run" / "skipped.txt").exists()
    assert f"1 alpha without an object: {black}; " in done.stderr
    for path in (data / "alphas").rglob("*.png"):
        cv2.imwrite(str(path), np.zeros((96, 96), np.uint8))
    done = train(config, tmp_path / "black")
    assert done.exit_code == 1, done.output
    assert "almost no alpha has a pixel above one half" in done.stderr.splitlines()[-1]
