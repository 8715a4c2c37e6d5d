"""Checkpoints: round trips, strict loading, the published file, other files, and no execution of
pickled code."""

from __future__ import annotations

import json
import pickle
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from icm_cli.config import ComponentConfig, ModelConfig, load_model_config
from icm_cli.errors import ConfigError
from icm_cli.model.checkpoint import CONFIG_KEY, load_strict, read_checkpoint, read_config, save_checkpoint
from icm_cli.model.loading import resolve_model
from icm_cli.model.stable_diffusion.backbone import StableDiffusionConfig
from icm_cli.model.stable_diffusion.detail_head import DetailConfig, DetailHead

GOLDEN = Path(__file__).parent / "golden" / "decoder.npz"
DETAIL = DetailConfig(
    canvas_px=192, feature_channels=16, intra_channels=8, fusion_channels=8, decoder_channels=(8, 6, 4, 4)
)
CONFIG = ModelConfig(
    ComponentConfig("stable-diffusion", StableDiffusionConfig(canvas_px=192)), ComponentConfig("detail", DETAIL)
)


class HeadOnly(torch.nn.Module):
    """A model with a head and a placeholder for the large backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = torch.nn.Linear(2, 2)
        self.head = DetailHead(DETAIL)


@pytest.fixture(scope="module")
def published_state() -> dict[str, Tensor]:
    golden = np.load(GOLDEN)
    return {
        f"in_context_decoder.{key.removeprefix('state.')}": torch.from_numpy(golden[key])
        for key in golden
        if key.startswith("state.")
    }


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, HeadOnly]:
    model = HeadOnly()
    path = tmp_path / "ours.safetensors"
    save_checkpoint(path, model, CONFIG, with_backbone=False, metadata={"step": "7"})
    return path, model


@pytest.mark.parametrize("with_backbone", [False, True])
def test_round_trip(tmp_path: Path, with_backbone: bool) -> None:
    model, path = HeadOnly(), tmp_path / "ours.safetensors"
    save_checkpoint(path, model, CONFIG, with_backbone=with_backbone, metadata={"step": "7"})
    loaded = read_checkpoint(path)
    assert loaded.config == CONFIG == read_config(path)
    assert loaded.metadata["step"] == "7"
    expected = {k: v for k, v in model.state_dict().items() if with_backbone or k.startswith("head.")}
    assert loaded.tensors.keys() == expected.keys()
    assert all(torch.equal(loaded.tensors[key], expected[key]) for key in expected)


def test_loading_makes_no_second_copy_and_does_not_use_the_file(saved: tuple[Path, HeadOnly]) -> None:
    path, model = saved
    tensors = head_tensors(path)
    with path.open("r+b") as file:  # as a copy over the file of a model that is in use
        file.write(bytes(path.stat().st_size))
    head = DetailHead(DETAIL)
    load_strict(head, tensors, "file")
    loaded, expected = head.state_dict(), model.head.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert all(loaded[name].data_ptr() == tensor.data_ptr() for name, tensor in tensors.items())


def test_default_head_has_the_published_size() -> None:
    with torch.device("meta"):
        head = DetailHead(DetailConfig())
    assert sum(p.numel() for p in head.parameters()) / 1e6 == pytest.approx(21.1, abs=0.05)


def resave(path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, metadata)
    return path


def head_tensors(path: Path) -> dict[str, Tensor]:
    return {key.removeprefix("head."): value for key, value in read_checkpoint(path).tensors.items()}


def test_missing_tensor_is_reported(saved: tuple[Path, HeadOnly]) -> None:
    path = resave(saved[0], lambda tensors: tensors.pop("head.fusion.merge.conv.weight"))
    with pytest.raises(ConfigError, match=r"'fusion.merge.conv.weight' is missing"):
        load_strict(DetailHead(DETAIL), head_tensors(path), "file")


def test_unknown_tensor_is_reported(saved: tuple[Path, HeadOnly]) -> None:
    path = resave(saved[0], lambda tensors: tensors.update({"head.fusion.merge.conv.bias": torch.zeros(8)}))
    with pytest.raises(ConfigError, match=r"unknown tensor 'fusion.merge.conv.bias'"):
        load_strict(DetailHead(DETAIL), head_tensors(path), "file")


def test_wrong_shape_is_reported(saved: tuple[Path, HeadOnly]) -> None:
    other = DetailConfig(192, 16, 8, 8, (8, 6, 4, 2))
    with pytest.raises(ConfigError, match="made for another configuration"):
        load_strict(DetailHead(other), head_tensors(saved[0]), "file")


def test_published_round_trip(tmp_path: Path, published_state: dict[str, Tensor]) -> None:
    torch.save({"state_dict": published_state, "epoch": 3}, tmp_path / "icm.ckpt")
    tensors = head_tensors(tmp_path / "icm.ckpt")
    head = DetailHead(DETAIL)
    load_strict(head, tensors, "file")
    assert len(tensors) == len(published_state)
    assert torch.equal(
        head.detail_decoder.output[3].weight,
        published_state["in_context_decoder.detail_decoder.matting_head.matting_convs.3.weight"],
    )


@pytest.fixture
def foreign_class() -> Iterator[Callable[[str, str], type]]:
    """Return a function that creates classes of modules that are not installed, for pickling."""
    made: list[str] = []

    def make(module: str, name: str) -> type:
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            made.append(".".join(parts[:end]))
            sys.modules[made[-1]] = types.ModuleType(made[-1])
        cls = type(name, (), {"__module__": module})
        setattr(sys.modules[module], name, cls)
        return cls

    yield make
    for module in made:
        sys.modules.pop(module, None)


def test_old_lightning_callbacks(
    tmp_path: Path, published_state: dict[str, Tensor], foreign_class: Callable[[str, str], type]
) -> None:
    callback = foreign_class("pytorch_lightning.callbacks.model_checkpoint", "ModelCheckpoint")
    own = foreign_class("icm.util", "Logger")
    path = tmp_path / "icm.ckpt"
    torch.save({"state_dict": published_state, "callbacks": {callback: {"best": 1.0}, own: {}}}, path)
    with pytest.raises(pickle.UnpicklingError):
        torch.load(path, weights_only=True)
    load_strict(DetailHead(DETAIL), head_tensors(path), "file")


def test_unknown_class_is_an_error(
    tmp_path: Path, published_state: dict[str, Tensor], foreign_class: Callable[[str, str], type]
) -> None:
    evil = foreign_class("evil.payload", "Run")
    torch.save({"state_dict": published_state, "extra": evil}, tmp_path / "icm.ckpt")
    with pytest.raises(ConfigError, match=r"'evil\.payload\.Run'"):
        read_checkpoint(tmp_path / "icm.ckpt")


class Payload:
    """An object that writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "extra": Payload(tmp_path / "was-run")}, tmp_path / "icm.ckpt")
    with pytest.raises(ConfigError):
        read_checkpoint(tmp_path / "icm.ckpt")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model": {}}, "without a 'state_dict'"),
        ({"state_dict": {"encoder.weight": torch.zeros(1)}}, "'encoder.weight'.*of another project"),
        ({"state_dict": {"in_context_decoder.neck.weight": torch.zeros(1)}}, "unknown key 'in_context_decoder.neck"),
    ],
)
def test_torch_files_of_other_projects_are_reported(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ConfigError, match=said):
        read_checkpoint(tmp_path / "other.ckpt")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        (b"\n <html lang='en'>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "a PNG image"),
        (b"please download the checkpoint by hand\n", "a text file"),
        (pickle.dumps({"state_dict": {}}), "a bare pickle"),
        (bytes(range(256)), "of unknown type"),
        (b"PK\x03\x04" + bytes(64), "truncated"),
        (b"\x80\x00\x00\x00\x00\x00\x00\x00{" + b" " * 8, "damaged or truncated safetensors file"),
    ],
)
def test_other_file_types_are_reported(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "checkpoint"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        read_checkpoint(path)
    assert str(path) in str(caught.value)


def test_zip_and_other_safetensors_files_are_reported(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(ConfigError, match="is a zip archive"):
        read_checkpoint(tmp_path / "a.zip")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="another project; it has no configuration of icm"):
        read_checkpoint(tmp_path / "a.safetensors")


def test_missing_and_truncated_files_are_reported(tmp_path: Path, saved: tuple[Path, HeadOnly]) -> None:
    with pytest.raises(ConfigError, match="give an existing file"):
        read_checkpoint(tmp_path / "none.ckpt")
    saved[0].write_bytes(saved[0].read_bytes()[:-100])
    with pytest.raises(ConfigError, match="truncated"):
        read_checkpoint(saved[0])
    torch.save({"state_dict": {}}, tmp_path / "short.ckpt")
    whole = (tmp_path / "short.ckpt").read_bytes()
    (tmp_path / "short.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="truncated"):
        read_checkpoint(tmp_path / "short.ckpt")


def test_invalid_configuration_is_reported(tmp_path: Path) -> None:
    for text, said in (("{", "not JSON"), (json.dumps({"backbone": {"name": "vgg"}}), "'vgg'")):
        save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors", {CONFIG_KEY: text})
        with pytest.raises(ConfigError, match=said):
            read_checkpoint(tmp_path / "a.safetensors")


class TestResolveModel:
    def test_checkpoint_contains_its_configuration(self, saved: tuple[Path, HeadOnly]) -> None:
        assert resolve_model(None, saved[0])[0] == CONFIG

    def test_published_checkpoint_uses_its_preset(self, tmp_path: Path, published_state: dict[str, Tensor]) -> None:
        torch.save({"state_dict": published_state}, tmp_path / "icm.ckpt")
        assert resolve_model(None, tmp_path / "icm.ckpt")[0] == load_model_config("icm-sd21")

    def test_other_model_than_that_of_the_checkpoint_is_an_error(self, saved: tuple[Path, HeadOnly]) -> None:
        with pytest.raises(ConfigError, match="canvas_px 192, not 768"):
            resolve_model("icm-sd21", saved[0])

    def test_trained_head_needs_a_checkpoint(self) -> None:
        with pytest.raises(ConfigError, match=r"--checkpoint FILE.*sd21-training-free"):
            resolve_model("icm-sd21", None)
