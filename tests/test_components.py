"""The registry of model components: every entry exists, and wrong names and entries are
reported."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Icm

from icm_cli.config import COMPONENTS, component_class, parse_model_config
from icm_cli.errors import ConfigError
from icm_cli.model.contracts import Backbone, Edges, Head, Objects
from icm_cli.model.hub import catalogue

INTERFACES = {"backbone": Backbone, "head": Head, "objects": Objects, "edges": Edges}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in COMPONENTS.items() for name in names])
def test_registered_components_implement_their_interface(kind: str, name: str) -> None:
    component = component_class(kind, name)  # type: ignore[arg-type]
    assert issubclass(component, INTERFACES[kind])
    assert not component.__abstractmethods__
    assert dataclasses.is_dataclass(component.Config())


def test_unknown_name_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"head 'token-mach' is unknown\. Did you mean 'token-match'"):
        component_class("head", "token-mach")
    with pytest.raises(ConfigError, match="test: backbone has no name; expected a key 'name' with one of: dinov2-lite"):
        parse_model_config({"backbone": {}, "head": {"name": "token-match"}}, "test")


def test_missing_class_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(COMPONENTS["head"], "mine", "lite.head:Mine")
    with pytest.raises(ConfigError, match=r"'lite\.head:Mine', but icm_cli\.model\.lite\.head has no class 'Mine'"):
        component_class("head", "mine")


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("lite.mine:Mine", r"icm_cli\.model\.lite\.mine cannot be imported \(No module named"),
        ("contracts:Head", "the class does not define forward, prepare_references"),
        ("contracts:Component", "the class has no dataclass 'Config'"),
    ],
)
def test_unusable_class_is_reported(monkeypatch: pytest.MonkeyPatch, entry: str, said: str) -> None:
    monkeypatch.setitem(COMPONENTS["head"], "mine", entry)
    with pytest.raises(ConfigError, match=said):
        component_class("head", "mine")


def test_prepared_references_without_notices_are_reported(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = component_class("head", "training-free")
    monkeypatch.setattr(head, "prepare_references", lambda *_: object())
    result = icm()
    assert result.exit_code == 3
    assert f"head {head.__name__} prepares references without an attribute 'notices'" in result.stderr
    assert not list((scene / "out").rglob("*.png"))


def test_preset_without_pretrained_weights_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "colour.yaml"
    path.write_text("backbone: {name: colour}\nhead: {name: training-free}\n")
    monkeypatch.setattr(catalogue, "preset_paths", lambda: {str(path): path})
    assert catalogue.list_models()[0].state == "available"


@pytest.mark.slow
def test_new_backbone_by_the_steps_of_contributing(scene: Path, tmp_path: Path) -> None:
    """The example of CONTRIBUTING.md runs in a copy of the package; without its entry, a sentence says what to do."""
    root = Path(__file__).parents[1]
    text = (root / "CONTRIBUTING.md").read_text()
    code, entry = re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    (model,) = re.findall(r"^```yaml\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    (file,) = re.findall(r"Save it as `(icm_cli/[\w/]+\.py)`", text)
    package = tmp_path / "copy" / "icm_cli"
    shutil.copytree(root / "icm_cli", package, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    (package.parent / "configs").symlink_to(root / "configs")
    (package.parent / file).write_text(code)
    (tmp_path / "colour.yaml").write_text(model)

    def run() -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", "from icm_cli.cli import main; main()", "matte", "--device", "cpu", "--quiet"]
        line += ["--ref", "ref.png", "--mask", "mask.png", "--src", "imgs", "--out", "out"]
        line += ["--model", str(tmp_path / "colour.yaml")]
        environment = {**os.environ, "PYTHONPATH": str(package.parent)}
        return subprocess.run(line, cwd=scene, env=environment, capture_output=True, text=True, check=False)

    ended = run()
    assert ended.returncode == 3
    assert "backbone 'colour' is unknown" in ended.stderr
    config = package / "config.py"
    assert f"needs an entry in COMPONENTS in {config}" in ended.stderr
    config.write_text(config.read_text().replace('"backbone": {\n', f'"backbone": {{\n        {entry}', 1))
    ended = run()
    assert ended.returncode == 0, ended.stderr
    assert len(list((scene / "out").rglob("*.png"))) == 3
