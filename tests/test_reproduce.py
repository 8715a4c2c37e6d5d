"""The commands of docs/reproduce.md run, with a small random model and made-up images in the published layouts."""

from __future__ import annotations

import json
import re
import shlex
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from conftest import COMPOSITES, shrink
from tiny_sd import write_tiny_detail_config, write_tiny_sd
from typer.testing import CliRunner

from icm_cli.cli import app
from icm_cli.datasets.groups import GroupMetadata, Sample, group_samples

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "reproduce.md").read_text()
IMAGES = ("brickwall", "launchpad", "lawn")
LAYOUTS = {
    "ICM-57": ("image/{}.jpg", "alpha/{}.png"),
    "AIM-500": ("original/{}.jpg", "mask/{}.png"),
    "AM-2k": ("train/original/{}.jpg", "train/mask/{}.png"),
    "P3M-10k": ("validation/P3M-500-NP/original_image/{}.jpg", "validation/P3M-500-NP/mask/{}.png"),
    "PPM-100": ("image/{}.jpg", "matte/{}.jpg"),
    "RealWorldPortrait-636": ("image/{}_input.jpg", "alpha/{}_input.png"),
    "RM-1K": ("Image/{}.jpg", "GT/{}.png"),
    "open-images": ("images/{}.jpg", "masks/{}_dog_box.png"),
    "backgrounds": ("{}.jpg",),
}


def names_of(folder: str) -> list[str]:
    """Return three names; for datasets with published groups, of images of one group."""
    metadata = {"ICM-57": "icm57.json", "AIM-500": "aim500.json"}.get(folder)
    if metadata is None:
        return ["00001", "00002", "00003"]
    text = files("icm_cli.datasets").joinpath("metadata", metadata).read_text(encoding="utf-8")
    samples, _ = GroupMetadata.load_bundled(metadata).assign_groups(
        Sample(name, Path(f"{name}.jpg"), Path(f"{name}.png")) for name in json.loads(text)
    )
    return [each.name for each in max(group_samples(samples).values(), key=len)[:3]]


@pytest.mark.slow
def test_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder, patterns in LAYOUTS.items():
        for name, image in zip(names_of(folder), IMAGES, strict=True):
            for pattern, kind in zip(patterns, (f"imgs/{image}.jpg", f"alphas/{image}.png"), strict=False):
                path = tmp_path / folder / pattern.format(name)
                path.parent.mkdir(parents=True, exist_ok=True)
                shrink(COMPOSITES / kind, path, 140)
    write_tiny_sd(tmp_path / "sd21")
    write_tiny_detail_config(tmp_path / "tiny.yaml", tmp_path / "sd21")
    config = yaml.safe_load((ROOT / "configs" / "icm-sd21.yaml").read_text())
    config |= yaml.safe_load((tmp_path / "tiny.yaml").read_text())
    config["train"] |= {"steps": 1, "batch_size": 2, "canvas_px": 128}
    (tmp_path / "tiny.yaml").write_text(json.dumps(config))
    (source,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "data.yaml").write_text(source)
    commands = re.findall(r"^icm (?:eval|train) .*|(?<=`)icm eval [^`]*", PAGE, re.MULTILINE)
    assert len(commands) == 6
    for command in sorted(commands, key=lambda text: not text.startswith("icm train")):
        line = shlex.split(command.replace("configs/icm-sd21.yaml", "tiny.yaml"))[1:]
        line = ["runs/paper/last.safetensors" if word == "icm.ckpt" else word for word in line]
        line += ["--allow", "absent-file"] if line[0] == "eval" else ["--workers", "0"]
        done = CliRunner().invoke(app, [*line, "--device", "cpu"], catch_exceptions=False)
        assert done.exit_code == 0, f"{command}\n{done.output}"
    assert (tmp_path / "runs" / "paper" / "preview.png").exists()
    for report in ("icm57.html", "aim500.html"):
        assert "published" in (tmp_path / report).read_text()
