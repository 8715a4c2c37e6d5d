"""Learning on tokens alone: which thing is meant is learned, the decoder is left, the file goes on into icm train."""

from __future__ import annotations

import collections
import contextlib
import io
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from train_data import MODEL, train, write_config

from icm_cli.config import parse_model
from icm_cli.errors import ConfigError
from icm_cli.model.loading import model_to_train
from icm_cli.training.items import Item, Pool
from icm_cli.training.tokens import MOST_VIEWS, main, to_show

COLOURS = {"red": (20, 20, 220), "green": (20, 200, 20), "white": (240, 240, 240)}


@pytest.fixture(scope="module")
def discs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three groups of two photographs, a disc of one colour each."""
    root = tmp_path_factory.mktemp("discs")
    for group, colour in COLOURS.items():
        for number in range(2):
            picture = np.full((96, 96, 3), 90 + 30 * number, np.uint8)
            alpha = np.zeros((96, 96), np.uint8)
            for image, value in ((picture, colour), (alpha, 255)):
                cv2.circle(image, (40 + 10 * number, 50), 30, value, -1)
            for kind, image in (("images", picture), ("alphas", alpha)):
                path = root / kind / group / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), image)
    return root


@pytest.fixture(scope="module")
def learned(discs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """The configuration, the checkpoint, and what was printed."""
    folder = tmp_path_factory.mktemp("learned")
    config = write_config(folder / "small.yaml", discs)
    content = yaml.safe_load(config.read_text())
    data = folder / "data.yaml"
    data.write_text(json.dumps(content["data"]))
    out = folder / "tokens.safetensors"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(out, data, str(config), steps=100, batch_size=6, rate=5e-3, canvas_px=96, workers=0)
    return config, out, printed.getvalue()


def test_it_learns_which_thing_is_meant(learned: tuple[Path, Path, str]) -> None:
    overlaps = [
        float(line.split("IoU of tokens ")[1].split(",")[0]) for line in learned[2].splitlines() if "IoU" in line
    ]
    assert len(overlaps) == 2
    assert overlaps[1] > max(0.5, overlaps[0])


def test_tokens_are_kept_in_a_file(learned: tuple[Path, Path, str], tmp_path: Path) -> None:
    """The second run reads it, and learns the same from it."""
    keep, data = tmp_path / "views.pt", learned[1].parent / "data.yaml"
    options = {"steps": 2, "batch_size": 2, "canvas_px": 96, "workers": 0, "keep": keep}
    written = []
    for number in range(2):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            main(tmp_path / f"{number}.safetensors", data, str(learned[0]), **options)
        written.append(load_file(tmp_path / f"{number}.safetensors"))
        assert (" views, " in printed.getvalue()) == (number == 0)
    assert keep.is_file()
    assert all(tensor.equal(written[1][key]) for key, tensor in written[0].items())
    with pytest.raises(ConfigError, match="or with other settings"):
        main(
            tmp_path / "2.safetensors", data, str(learned[0]), overrides=["train.pairs.composite_share=0.9"], **options
        )


def test_tokens_of_other_pictures_are_refused(learned: tuple[Path, Path, str], tmp_path: Path) -> None:
    keep = tmp_path / "views.pt"
    torch.save({"digest": "of others", "views": [None]}, keep)
    with pytest.raises(ConfigError, match="holds the tokens of other pictures"):
        main(
            tmp_path / "out.safetensors",
            learned[1].parent / "data.yaml",
            str(learned[0]),
            canvas_px=96,
            workers=0,
            keep=keep,
        )


def test_every_picture_is_shown_and_the_oftener_drawn_ones_oftener() -> None:
    def source(name: str, count: int) -> tuple[Item, ...]:
        return tuple(
            Item(f"{name}{i}", Path(f"{name}{i}.png"), None, None, name, is_foreground=False, is_binary=False)
            for i in range(count)
        )

    few, many = source("few", 2), source("many", 30)
    shown = collections.Counter(to_show(Pool((few, many), (3.0, 1.0), ()), 2))
    assert {shown[item] for item in few} == {MOST_VIEWS * 2}
    assert {shown[item] for item in many} == {1}


def test_only_the_comparing_part_learns(learned: tuple[Path, Path, str]) -> None:
    model = model_to_train(parse_model(MODEL, "test"), checkpoint=None, weights=None, offline=True, seed=0)
    before = {f"head.{key}": tensor for key, tensor in model.head.state_dict().items()}
    after = load_file(learned[1])
    assert after.keys() == before.keys()
    changed = {key.split(".")[1] for key in after if not after[key].equal(before[key])}
    numbers = ("log_sharpness", "background_null")
    assert changed == {"project", "condense", "weigh", "context", "fuse", "coarse", "present", *numbers}


def test_the_file_says_what_it_saw_and_training_goes_on_from_it(
    learned: tuple[Path, Path, str], tmp_path: Path
) -> None:
    config, checkpoint, _ = learned
    with safe_open(checkpoint, framework="pt") as file:
        assert len(json.loads(file.metadata()["icm.trained_on"])) == 6
    result = train(config, tmp_path / "run", checkpoint=checkpoint)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "run" / "last.safetensors").is_file()


def test_what_was_learned_on_tokens_can_be_left_as_it_is(learned: tuple[Path, Path, str], tmp_path: Path) -> None:
    config, checkpoint, _ = learned
    result = train(config, tmp_path / "run", "--set", "train.comparing_share=0", checkpoint=checkpoint)
    assert result.exit_code == 0, result.output
    before, after = load_file(checkpoint), load_file(tmp_path / "run" / "last.safetensors")
    changed = {key.split(".")[1] for key in before if not after[key].equal(before[key])}
    assert changed == {"steps", "output"}


def test_another_head_is_refused(discs: Path, learned: tuple[Path, Path, str], tmp_path: Path) -> None:
    config = write_config(tmp_path / "free.yaml", discs, model={**MODEL, "head": {"name": "training-free"}})
    with pytest.raises(ConfigError, match="nothing to train"):
        main(tmp_path / "out.safetensors", learned[0].parent / "data.yaml", str(config), canvas_px=96, workers=0)
