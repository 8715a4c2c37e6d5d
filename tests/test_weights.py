"""Pretrained weights: what ``--weights`` accepts, and the check before a model is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Icm
from tiny_hf import write_tiny_dino

from icm_cli.config import load_model_config, parse_model_config
from icm_cli.errors import ConfigError
from icm_cli.model.hub.catalogue import packed_checkpoint
from icm_cli.model.loading import check_weights_exist

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
        "x" * 300,
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
