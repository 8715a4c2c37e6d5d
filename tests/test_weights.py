"""Weights: what ``--weights`` accepts, the check before a model is loaded, and damaged checkpoints."""

from __future__ import annotations

import contextlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Icm, output_files
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from tiny_hf import write_tiny_dino
from torch import Tensor, nn

from icm_cli.config import load_model_config, parse_model_config
from icm_cli.errors import ConfigError
from icm_cli.model.checkpoint import (
    CONFIG_KEY,
    ROW_SCALE,
    TRAINED_ON_KEY,
    read_checkpoint,
    read_training_digests,
    save_checkpoint,
)
from icm_cli.model.hub.catalogue import packed_checkpoint
from icm_cli.model.hub.dino import Dino
from icm_cli.model.loading import (
    check_weights_exist,
    load_model,
    load_model_for_training,
    model_digest,
    resolve_model,
)

DINO = """
backbone: {name: dino, weights: facebook/dinov2-large, patch_px: 14, long_side_px: 112, layers: [2]}
head: {name: training-free, solve_long_side_px: 128}
"""


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache of the hub, which cannot be reached."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def run_with_weights(icm: Icm, tmp_path: Path, weights: str) -> str:
    """Run the command, which must fail before an alpha is made, and return its only message."""
    (tmp_path / "dino.yaml").write_text(DINO)
    ended = icm("--offline", model=tmp_path / "dino.yaml", weights=weights)
    assert ended.exit_code == 3
    assert "Traceback" not in ended.stderr
    (message,) = (line for line in ended.stderr.splitlines() if line.startswith("icm: "))
    return message


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "weights",
    [
        "no_such_folder",
        "./no",
        "/no/such",
        "no/such/folder",
        "~/no",
        "~nobody-here/no",
        "a\\b",
        "no/",
        "a b/c",
    ],
)
def test_no_such_folder(icm: Icm, tmp_path: Path, weights: str) -> None:
    message = run_with_weights(icm, tmp_path, weights)
    assert f"--weights {weights!r}: no such folder" in message
    assert "facebook/dinov2-large" in message


@pytest.mark.usefixtures("no_hub")
def test_hub_id_that_is_not_on_this_machine(icm: Icm, tmp_path: Path) -> None:
    message = run_with_weights(icm, tmp_path, "some/weights")
    assert "no such folder" in message
    assert "hf download some/weights --local-dir FOLDER" in message


def test_file_instead_of_a_folder(icm: Icm, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    assert "is a file; expected the folder" in run_with_weights(icm, tmp_path, str(file))


def test_empty_folder(icm: Icm, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    message = run_with_weights(icm, tmp_path, str(folder))
    assert f"hf download facebook/dinov2-large --local-dir {folder}" in message


class TestCheckWeightsExist:
    def test_weights_in_a_checkpoint_or_folder_exist(self, tmp_path: Path) -> None:
        lite = load_model_config("lite")
        assert check_weights_exist(lite, checkpoint=packed_checkpoint("lite"), weights=None, offline=True) == []
        dino = parse_model_config({"backbone": {"name": "dino"}, "head": {"name": "training-free"}}, "test")
        folder = str(write_tiny_dino(tmp_path))
        assert check_weights_exist(dino, checkpoint=None, weights=folder, offline=True) == []

    def test_refused_weights(self) -> None:
        with pytest.raises(ConfigError, match="already contains the weights of the backbone"):
            check_weights_exist(
                load_model_config("lite"), checkpoint=packed_checkpoint("lite"), weights="x/y", offline=False
            )
        with pytest.raises(ConfigError, match="no such folder"):
            check_weights_exist(load_model_config("dinov2-vitmatte"), checkpoint=None, weights="x", offline=False)

    @pytest.mark.usefixtures("no_hub")
    def test_missing_weights_are_downloads_or_errors(self) -> None:
        config = load_model_config("dinov2-vitmatte")
        assert check_weights_exist(config, checkpoint=None, weights=None, offline=False) == [
            "facebook/dinov2-large (1.2 GB)",
            "hustvl/vitmatte-small-composition-1k (103 MB)",
        ]
        with pytest.raises(ConfigError, match="not on this machine"):
            check_weights_exist(config, checkpoint=None, weights=None, offline=True)

    def test_interrupted_download_is_a_download(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        snapshot = tmp_path / "models--facebook--dinov2-large" / "snapshots" / "abc"
        snapshot.mkdir(parents=True)
        (snapshot.parents[1] / "refs").mkdir()
        (snapshot.parents[1] / "refs" / "main").write_text("abc")
        (snapshot / "config.json").write_text("{}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        config = parse_model_config({"backbone": {"name": "dino"}, "head": {"name": "training-free"}}, "test")
        downloads = check_weights_exist(config, checkpoint=None, weights=None, offline=False)
        assert downloads == ["facebook/dinov2-large (1.2 GB)"]
        with pytest.raises(ConfigError, match=r"does not contain model\.safetensors.*hf download facebook/dinov2"):
            check_weights_exist(config, checkpoint=None, weights=None, offline=True)


TINY = {
    "backbone": {
        "name": "efficientnet-lite",
        "long_side_px": 64,
        "correspondence_blocks": [1],
        "correspondence_reductions": [1],
        "scale_blocks": [1],
    },
    "head": {
        "name": "token-match",
        "feature_channels": [24],
        "width": 4,
        "context_width": 4,
        "context_layers": 1,
        "fused_channels": 4,
        "skip_channels": [],
        "decoder_channels": [],
    },
    "edges": {"name": "refine", "widths": [2, 2]},
}
TINY_CONFIG = parse_model_config(TINY, "test")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete checkpoint of 34 kB."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    model = load_model_for_training(TINY_CONFIG, checkpoint=None, weights=None, offline=True, seed=0)
    save_checkpoint(
        path, model, TINY_CONFIG, with_backbone=True, small=True, metadata={TRAINED_ON_KEY: json.dumps(["0" * 64])}
    )
    return path


def load_completely(path: Path) -> None:
    """Do everything that the commands do with a checkpoint."""
    config, _ = resolve_model(None, path)
    read_training_digests(path)
    model_digest(config, checkpoint=path, weights=None, offline=True)
    load_model(config, checkpoint=path, weights=None, offline=True, seed=0)


def change_tensors(tiny: Path, change: Callable[[dict[str, Tensor]], object]) -> bytes:
    tensors = load_file(tiny)
    change(tensors)
    with safe_open(tiny, framework="pt") as file:
        return save(tensors, file.metadata())


def change_header(tiny: Path, change: Callable[[dict[str, Any]], object]) -> bytes:
    content = tiny.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[end:]


def set_config(text: str) -> Callable[[dict[str, Any]], object]:
    return lambda header: header["__metadata__"].update({CONFIG_KEY: text})


KERNEL, COARSE = "backbone.stem.conv.weight", "head.coarse.weight"
NAN, INF = float("nan"), float("inf")
DAMAGES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "scale of a missing matrix": (
        lambda tiny: change_tensors(tiny, lambda t: t.update({"backbone.no" + ROW_SCALE: torch.ones(3)})),
        "'backbone.no.row_scale' with the shape [3] has no 8-bit matrix",
    ),
    "scale of a kernel": (
        lambda tiny: change_tensors(tiny, lambda t: t.update({KERNEL + ROW_SCALE: torch.ones(32)})),
        "has no 8-bit matrix 'backbone.stem.conv.weight'",
    ),
    "NaN": (
        lambda tiny: change_tensors(tiny, lambda t: t[COARSE].view(-1)[1:2].fill_(NAN)),
        "'coarse.weight' contains",
    ),
    "infinity in the backbone": (
        lambda tiny: change_tensors(tiny, lambda t: t[KERNEL].view(-1)[7:8].fill_(-INF)),
        "'stem.conv.weight' contains values that are NaN or infinite",
    ),
    "integers": (
        lambda tiny: change_tensors(tiny, lambda t: t.update({COARSE: t[COARSE].to(torch.int8)})),
        "torch.int8",
    ),
    "missing tensor": (lambda tiny: change_tensors(tiny, lambda t: t.pop(COARSE)), "'coarse.weight' is missing"),
    "unknown tensor": (lambda tiny: change_tensors(tiny, lambda t: t.update({"neck.w": t[COARSE] + 1})), "'neck.w'"),
    "other shape": (
        lambda tiny: change_tensors(tiny, lambda t: t.update({COARSE: t[COARSE].flatten()})),
        "has the shape",
    ),
    "type of safetensors that torch does not have": (
        lambda tiny: change_header(tiny, lambda h: h[COARSE].update(dtype="F4")),
        "damaged or truncated safetensors file",
    ),
    "metadata is not JSON": (lambda tiny: change_header(tiny, set_config("{")), "'icm.config' is not JSON"),
    "metadata is a list": (lambda tiny: change_header(tiny, set_config("[1]")), "'icm.config' is not JSON with a dict"),
    "metadata is nested deeply": (
        lambda tiny: change_header(tiny, set_config("[" * 99999)),
        "'icm.config' is not JSON",
    ),
    "huge model": (
        lambda tiny: change_header(tiny, set_config(json.dumps({**TINY, "head": {**TINY["head"], "width": 10**9}}))),
        "has the shape",
    ),
    "truncated": (lambda tiny: tiny.read_bytes()[:-9], "damaged or truncated safetensors file"),
    "empty": (lambda _: b"", "is an empty file"),
    "web page": (lambda _: b"<!doctype html><html><body>Sign in</body></html>", "is a web page"),
    "Git LFS pointer": (lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "pickle": (lambda tiny: pickle.dumps(load_file(tiny)), "is a bare pickle"),
    "damaged zip": (lambda _: b"PK\x03\x04" + b"a" * 50 + b"PK\x05\x06" + b"\xff" * 18, "damaged or truncated torch"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_gives_one_message(icm: Icm, scene: Path, tiny: Path, tmp_path: Path, damage: str) -> None:
    make_content, said = DAMAGES[damage]
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(make_content(tiny))
    ended = icm(model=None, checkpoint=path)
    assert ended.exit_code == 3
    assert "Traceback" not in ended.stderr
    (message,) = ended.stderr.strip().splitlines()
    assert said in message
    assert str(path) in message
    assert not output_files(scene / "out")


def test_undamaged_checkpoint_works(icm: Icm, scene: Path, tiny: Path) -> None:
    assert icm(model=None, checkpoint=tiny).exit_code == 0
    assert len(list((scene / "out").rglob("*.png"))) == 3


def test_folder_instead_of_a_checkpoint(icm: Icm, tmp_path: Path) -> None:
    ended = icm(model=None, checkpoint=tmp_path)
    assert ended.exit_code in (2, 3)
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("scale", "said"),
    [
        (torch.ones(3), r"'backbone.weight.row_scale' with the shape \[3\] has no 8-bit matrix"),
        (torch.ones(4, 1), "has no 8-bit matrix"),
        (None, None),
    ],
)
def test_scales_of_8_bit_matrices(tmp_path: Path, scale: Tensor | None, said: str | None) -> None:
    path = tmp_path / "small.safetensors"
    module = nn.ModuleDict({"backbone": nn.Linear(5, 4)})
    save_checkpoint(path, module, TINY_CONFIG, with_backbone=True, small=True)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    assert tensors["backbone.weight" + ROW_SCALE].shape == (4,)
    if scale is not None:
        save_file({**tensors, "backbone.weight" + ROW_SCALE: scale}, path, metadata)
    with pytest.raises(ConfigError, match=said) if said else contextlib.nullcontext():
        assert read_checkpoint(path).tensors["backbone.weight"].shape == (4, 5)


@pytest.mark.parametrize("text", ["", "{", '{"a": 1}', "1"])
def test_damaged_list_of_training_images(tiny: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(change_header(tiny, lambda header: header["__metadata__"].update({TRAINED_ON_KEY: text})))
    with pytest.raises(ConfigError, match=r"'icm\.trained_on' is not JSON with a list"):
        read_training_digests(path)


@given(data=st.data())
@settings(max_examples=150)
def test_mutated_checkpoint_loads_or_gives_a_message(
    tiny: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Bytes of the header or of the tensors are replaced, removed or inserted."""
    content = bytearray(tiny.read_bytes())
    end = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, end) if data.draw(st.booleans()) else st.integers(0, len(content)))
        removed = data.draw(st.sampled_from([0, 1, 1, 1, 8, 1000]))
        content[start : start + removed] = data.draw(st.binary(min_size=removed == 0, max_size=8))
    path = tmp_path_factory.mktemp("mutated") / "mutated.safetensors"
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        load_completely(path)


def test_pretrained_weights_with_nan_are_refused(tmp_path: Path) -> None:
    folder = write_tiny_dino(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "norm1.weight" in name)
    tensors[name][0] = NAN
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = parse_model_config(
        {"backbone": {"name": "dino", "layers": [2]}, "head": {"name": "training-free"}}, "test"
    )
    with pytest.raises(ConfigError, match=rf"the weights in {folder}: tensor '{name}' contains values that are NaN"):
        Dino.load(config.backbone.settings, str(folder), offline=True, seed=0)
