"""Edge refinement: trimaps, tiles, closed-form matting, and ViTMatte with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Icm, alphas, model_choice, read, refine_alpha
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_hf import copy_with_split_weights, write_tiny_dino, write_tiny_vitmatte
from torch import Tensor, nn

from icm_cli.errors import ConfigError, UsageError
from icm_cli.geometry import Float, resize, trimap_from_coarse
from icm_cli.matting.model_choice import ModelChoice, load
from icm_cli.model.alphas import blend_tiles, split_into_tiles
from icm_cli.model.hub.vitmatte import VitMatteEdges, VitMatteEdgesConfig
from icm_cli.model.training_free.closed_form import ClosedForm, ClosedFormConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_vitmatte(tmp_path_factory.mktemp("vitmatte"))


def network(folder: Path, **changes: Any) -> VitMatteEdges:
    return VitMatteEdges.load(VitMatteEdgesConfig(weights=str(folder), **changes), offline=True)


def disc(side: int, radius: float) -> Float:
    at = np.arange(side) + 0.5 - side / 2
    return (np.hypot(at[:, None], at) < radius).astype(np.float32)


class TestTrimap:
    def test_unknown_region_is_on_both_sides_of_the_edge(self) -> None:
        coarse = disc(50, 12)
        trimap = trimap_from_coarse(coarse, (200, 200), 0.05)
        assert set(np.unique(trimap)) == {0.0, 0.5, 1.0}
        fine = disc(200, 48)
        unknown = trimap == 0.5
        at = np.hypot(*(np.indices((200, 200)) + 0.5 - 100))
        assert unknown[(at > 42) & (at < 54)].all()
        assert not unknown[(at < 32) | (at > 64)].any()
        assert (trimap[~unknown] == fine[~unknown]).all()

    def test_object_thinner_than_the_band_keeps_a_foreground(self) -> None:
        coarse = np.zeros((100, 100), np.float32)
        coarse[40:44, 10:90] = 1.0
        coarse[60:95, 10:60] = 1.0
        trimap = trimap_from_coarse(coarse, (100, 100), 0.1)
        assert (trimap[40:44] == 1.0).sum() > 50
        assert (trimap[60:95] == 1.0).sum() < 35 * 50 / 2  # a thick one has the whole band

    @pytest.mark.parametrize("level", [0.0, 1.0])
    def test_alpha_without_edge_has_no_unknown_region(self, level: float) -> None:
        assert (trimap_from_coarse(np.full((9, 7), level, np.float32), (90, 70), 0.02) == level).all()

    @given(seed=st.integers(0, 2**31), height=st.integers(1, 60), width=st.integers(1, 60))
    @settings(max_examples=50)
    def test_known_region_agrees_with_the_coarse_alpha(self, seed: int, height: int, width: int) -> None:
        coarse = np.random.default_rng(seed).choice(np.float32([0.0, 0.05, 0.5, 0.95, 1.0]), size=(7, 9))
        trimap = trimap_from_coarse(coarse, (height, width), 0.01)
        alpha = resize(coarse, (height, width))
        assert trimap.shape == (height, width)
        assert (alpha[trimap == 1.0] > 0.9).all()
        assert (alpha[trimap == 0.0] < 0.1).all()


class TestTiles:
    @given(
        seed=st.integers(0, 2**31),
        height=st.integers(1, 900),
        width=st.integers(1, 900),
        tile=st.sampled_from([96, 128, 320]),
    )
    @settings(max_examples=40)
    def test_tiles_that_disagree_completely_leave_no_seam(self, seed: int, height: int, width: int, tile: int) -> None:
        overlap = tile // 3
        rng = np.random.default_rng(seed)

        tiles = split_into_tiles((height, width), tile, overlap)
        constants = [torch.full(each.weight.shape, float(rng.integers(0, 2))) for each in tiles]
        out = blend_tiles((height, width), tiles, constants, torch.device("cpu"))
        for axis in (0, 1):
            assert out.diff(dim=axis).abs().numpy().max(initial=0.0) <= 1.0 / overlap + 1e-6

    def test_tiles_that_agree_give_the_image(self) -> None:
        image = torch.rand(333, 210, generator=torch.Generator().manual_seed(0))
        tiles = split_into_tiles((333, 210), 96, 32)
        blended = blend_tiles((333, 210), tiles, (image[tile.slices] for tile in tiles), image.device)
        torch.testing.assert_close(blended, image, atol=1e-6, rtol=0)


class AlternatingNetwork(nn.Module):
    """Returns 0 and 1 for alternate images: the largest possible disagreement of tiles."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, pixel_values: Tensor) -> SimpleNamespace:
        self.shapes.append(tuple(pixel_values.shape))
        level = float(len(self.shapes) % 2)
        return SimpleNamespace(alphas=torch.full((1, 1, *pixel_values.shape[-2:]), level))


class TestVitMatte:
    def test_seams_are_below_one_level_of_8_bits(self) -> None:
        """Default tiles, a network that returns 0 and 1 alternately, and unknown pixels except in
        the corners."""
        edges = VitMatteEdges(VitMatteEdgesConfig(), AlternatingNetwork())
        coarse = np.full((30, 40), 0.5, np.float32)
        alpha = refine_alpha(edges, np.zeros((1500, 2000, 3), np.uint8), coarse)
        assert len(edges.network.shapes) == 2 * 3
        assert alpha.max() - alpha.min() > 0.9
        for axis in (0, 1):
            assert np.abs(np.diff(alpha, axis=axis)).max() < 1 / 255

    def test_network_runs_only_on_the_unknown_region(self) -> None:
        edges = VitMatteEdges(VitMatteEdgesConfig(tile_px=128, overlap_px=32), AlternatingNetwork())
        coarse = np.zeros((400, 400), np.float32)
        coarse[30:60, 30:60] = 1.0
        alpha = refine_alpha(edges, np.zeros((400, 400, 3), np.uint8), coarse)
        assert len(edges.network.shapes) == 1
        assert alpha[45, 45] == 1.0
        assert alpha[200:].max() == 0.0

    def test_preprocessing_equals_the_published_processor(self, folder: Path) -> None:
        """Statistics, trimap channel and padding equal the NumPy processor of transformers."""
        try:
            from transformers.models.vitmatte.image_processing_pil_vitmatte import VitMatteImageProcessorPil
        except ImportError:  # transformers 4 has only this class
            from transformers import VitMatteImageProcessor as VitMatteImageProcessorPil
        processor = VitMatteImageProcessorPil()
        rng = np.random.default_rng(0)
        rgb = rng.integers(0, 256, (45, 70, 3), np.uint8)
        trimap = rng.choice(np.float32([0.0, 0.5, 1.0]), size=(45, 70))
        theirs = processor(images=rgb, trimaps=np.round(trimap * 255).astype(np.uint8), return_tensors="pt")
        ours = network(folder)._network_input(rgb, torch.from_numpy(trimap))
        assert ours.shape == (1, 4, 64, 96)
        torch.testing.assert_close(ours, theirs["pixel_values"].float(), atol=3e-3, rtol=0)  # 128 of 255 is unknown

    @pytest.mark.parametrize("size", [(50, 70), (129, 40), (96, 96), (1, 1)])
    def test_unknown_region_has_the_output_of_the_network(self, folder: Path, size: tuple[int, int]) -> None:
        edges = network(folder)
        rgb = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
        coarse = disc(20, 6)
        alpha = refine_alpha(edges, rgb, coarse)
        trimap = trimap_from_coarse(coarse, size, edges.config.band)
        assert alpha.shape == size
        assert alpha.dtype == np.float32
        assert (alpha[trimap != 0.5] == trimap[trimap != 0.5]).all()
        if (trimap == 0.5).any():
            solved = edges.solve(rgb, torch.from_numpy(trimap)).numpy()
            np.testing.assert_allclose(alpha[trimap == 0.5], solved[trimap == 0.5], atol=1e-6)

    def test_absent_object_stays_absent(self, folder: Path) -> None:
        assert refine_alpha(network(folder), np.zeros((40, 60, 3), np.uint8), np.zeros((4, 6), np.float32)).max() == 0

    def test_tiled_inference_covers_every_pixel(self, folder: Path) -> None:
        edges = network(folder, tile_px=96, overlap_px=32)
        rgb = np.random.default_rng(0).integers(0, 256, (200, 250, 3), np.uint8)
        alpha = refine_alpha(edges, rgb, disc(50, 15))
        assert alpha.shape == (200, 250)
        assert 0 <= alpha.min() <= alpha.max() <= 1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_low_precision_is_close_to_float32(self, folder: Path, dtype: torch.dtype) -> None:
        rgb = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
        exact, low = network(folder), network(folder)
        low.set_dtype(dtype, dtype)
        assert {each.dtype for each in low.network.parameters()} == {dtype}
        pair = [refine_alpha(each, rgb, disc(30, 9)) for each in (exact, low)]
        assert np.abs(pair[0] - pair[1]).max() < 0.02

    def test_missing_weights_error_says_what_to_download(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        said = r"hustvl/vitmatte-small-composition-1k.*103 MB.*hf download.*--edges-weights FOLDER"
        with pytest.raises(ConfigError, match=said):
            VitMatteEdges.load(VitMatteEdgesConfig(), offline=True)

    def test_other_model_type_is_refused(self, folder: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        (copy / "config.json").write_text(json.dumps({"model_type": "vitdet"}))
        with pytest.raises(ConfigError, match="'vitdet'; expected vitmatte"):
            network(copy)

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"band": 0.5}, "below 0.5"),
            ({"tile_px": 100}, "multiple of 32"),
            ({"tile_px": 96, "overlap_px": 33}, "a third of tile_px"),
        ],
    )
    def test_settings_out_of_range_are_reported(self, changes: dict[str, Any], said: str) -> None:
        with pytest.raises(ConfigError, match=said):
            VitMatteEdgesConfig(**changes)


class TestClosedForm:
    @pytest.mark.parametrize("solve", [64, 256])
    def test_alpha_follows_the_edge_in_the_image(self, solve: int) -> None:
        """A disc on another colour, with a coarse alpha that is a few pixels too large."""
        truth = disc(240, 80)
        rgb = np.where(truth[..., None] > 0, np.uint8([220, 120, 30]), np.uint8([20, 60, 90])).astype(np.uint8)
        coarse = np.roll(disc(40, 13), (1, 0), (0, 1))
        alpha = refine_alpha(ClosedForm(ClosedFormConfig(band=0.06, solve_long_side_px=solve)), rgb, coarse)
        assert alpha.shape == (240, 240)
        assert np.abs(alpha - truth).mean() < 0.01 < np.abs(resize(coarse, (240, 240)) - truth).mean()

    def test_absent_object_stays_absent(self) -> None:
        edges = ClosedForm(ClosedFormConfig())
        assert refine_alpha(edges, np.zeros((40, 60, 3), np.uint8), np.zeros((4, 6), np.float32)).max() == 0

    def test_settings_out_of_range_are_reported(self) -> None:
        with pytest.raises(ConfigError, match="at least 64"):
            ClosedFormConfig(solve_long_side_px=8)
        with pytest.raises(ConfigError, match=r"below 0\.5"):
            ClosedFormConfig(band=0.0)


class TestOption:
    """``icm matte --edges``, with the training-free head on the small model."""

    @staticmethod
    def choice(**options: Any) -> ModelChoice:
        return model_choice("lite-training-free", **{"dtype": "float32", **options})

    def test_each_choice_of_edges_gives_different_alphas(self, icm: Icm, scene: Path, folder: Path) -> None:
        assert icm(out=scene / "model").exit_code == 0
        assert icm(out=scene / "closed", edges="closed-form").exit_code == 0
        ended = icm("--verbose", out=scene / "vitmatte", edges="vitmatte", edges_weights=folder)
        assert ended.exit_code == 0
        assert "efficientnet-lite + training-free + vitmatte" in ended.stderr
        made = [alphas(scene / name) for name in ("model", "closed", "vitmatte")]
        assert made[0].keys() == made[1].keys() == made[2].keys()
        name = "wall.png"
        assert len({each[name] for each in made}) == 3
        for each in ("closed", "vitmatte"):
            assert read(scene / each / name).shape == read(scene / "imgs" / "wall.jpg").shape[:2]

    def test_sharded_weights_give_the_same_alphas(self, icm: Icm, scene: Path, folder: Path) -> None:
        """Transformer and ViTMatte are stored in two files each with an index."""
        dino = write_tiny_dino(scene / "dino")
        model = scene / "dino.yaml"
        model.write_text(
            "backbone: {name: dino, patch_px: 14, long_side_px: 112, layers: [3], dtype: float32}\n"
            "head: {name: training-free, solve_long_side_px: 64, absent_below: 0.0}\n"
        )
        parts = {
            "weights": copy_with_split_weights(dino, scene / "d2"),
            "edges_weights": copy_with_split_weights(folder, scene / "v2"),
        }
        for out, weights in (("whole", {"weights": dino, "edges_weights": folder}), ("parts", parts)):
            ended = icm(out=scene / out, model=model, edges="vitmatte", src=scene / "imgs" / "wall.jpg", **weights)
            assert ended.exit_code == 0, ended.stderr
        made, again = (read(scene / out / "wall.png") for out in ("whole", "parts"))
        assert np.array_equal(made, again)
        assert made.std() > 0

    def test_eval_accepts_the_edges_options(self, evaluate: Icm, folder: Path, tmp_path: Path) -> None:
        """Other edges give other scores, and reports name the edges."""
        given: dict[str, dict[str, Any]] = {"model": {}, "closed": {"edges": "closed-form"}}
        given["vitmatte"] = {"edges": "vitmatte", "edges_weights": folder}
        errors = []
        for name, options in given.items():
            pages = [tmp_path / f"{name}.json", tmp_path / f"{name}.html"]
            ended = evaluate(report=pages, save_alphas=tmp_path / name, **options)
            assert ended.exit_code == 0, ended.stderr
            errors.append(json.loads(pages[0].read_text())["summary"]["means"]["whole"]["metrics"]["mse"]["mean"])
        assert len(set(errors)) == 3
        assert "training-free + vitmatte" in (tmp_path / "vitmatte.html").read_text()
        assert json.loads((tmp_path / "closed.json").read_text())["settings"]["model"]["edges"]["name"] == "closed-form"

    def test_eval_refuses_unused_edges_weights(self, evaluate: Icm, folder: Path) -> None:
        ended = evaluate(edges="closed-form", edges_weights=folder)
        assert ended.exit_code == 2
        assert "has no effect" in ended.stderr

    def test_other_edges_recompute_alphas(self, icm: Icm, scene: Path, folder: Path) -> None:
        def statuses(**options: Any) -> set[str]:
            report = scene / "report.json"
            assert icm(report=report, **options).exit_code == 0
            return {row["status"] for row in json.loads(report.read_text())["images"]}

        assert statuses(edges="closed-form") == {"done"}
        assert statuses(edges="closed-form") == {"kept"}
        assert statuses(edges="vitmatte", edges_weights=folder) == {"done"}

    def test_digest_depends_on_edges_and_their_weights(self, folder: Path, tmp_path: Path) -> None:
        other = write_tiny_vitmatte(tmp_path / "other", seed=1)
        options: list[dict[str, Any]] = [
            {},
            {"edges": "closed-form"},
            {"edges": "vitmatte", "edges_weights": str(folder)},
            {"edges": "vitmatte", "edges_weights": str(other)},
        ]
        digests = [self.choice(**each).digest_parts() for each in options]
        assert len({str(each) for each in digests}) == 4
        assert self.choice(edges="model").digest_parts() == digests[0]

    def test_digest_depends_on_the_content_of_the_weights_only(self, folder: Path, tmp_path: Path) -> None:
        copy = Path(shutil.copytree(folder, tmp_path / "copy"))
        before = self.choice(edges="vitmatte", edges_weights=str(copy)).digest_parts()
        path = copy / "preprocessor_config.json"
        path.write_text(path.read_text() + " ")
        assert self.choice(edges="vitmatte", edges_weights=str(copy)).digest_parts() != before

    def test_head_with_solver_leaves_refinement_to_the_edges(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path
    ) -> None:
        monkeypatch.setattr(
            "icm_cli.model.training_free.head.solve_alpha", lambda *_: pytest.fail("solved, and solved again")
        )
        predictor = load("lite-training-free", device="cpu", edges="vitmatte", edges_weights=str(folder))
        rgb = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
        rgb[20:60, 20:60] = (200, 30, 30)
        mask = np.zeros((96, 96), bool)
        mask[20:60, 20:60] = True
        assert predictor.matte(rgb, predictor.reference([(rgb, mask)])).max() == 255

    def test_option_replaces_the_edges_of_a_checkpoint(self, folder: Path) -> None:
        assert load("lite", device="cpu", edges="vitmatte", edges_weights=str(folder)).model.edges is not None

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"edges": "vitmate"}, "--edges is 'vitmate'; expected model, closed-form or vitmatte"),
            ({"edges_weights": "x"}, "the model has no edges, so --edges-weights 'x' has no effect"),
            ({"edges": "closed-form", "edges_weights": "x"}, "so --edges-weights 'x' has no effect"),
        ],
    )
    def test_invalid_options_are_refused(self, options: dict[str, str], said: str) -> None:
        with pytest.raises(UsageError, match=said):
            self.choice(**options)
