"""Scenes made on the training device, compared with those made on the CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from icm_cli.files import cached_file_digest
from icm_cli.training.data.augment import degrade_image
from icm_cli.training.data.device_scenes import DeviceScenes, _quantise_jpeg, composite_over
from icm_cli.training.data.export import export_shards
from icm_cli.training.data.pool import TrainingItem, TrainingPool, read_pool
from icm_cli.training.data.scenes import SceneMaker, read_photograph
from icm_cli.training.settings import AugmentConfig, PairConfig, TrainConfig, read_data

CANVAS_PX = 96
STILL = AugmentConfig(colour=0.0, jpeg=0.0, blur=0.0, noise=0.0)
"""Transforms images without changing their colours."""
PLAIN = PairConfig(composite_probability=0.0, distractor_probability=0.0)


def disc(height: int, width: int, colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return a soft disc on a gradient, and its alpha."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    alpha = np.clip((0.3 * min(height, width) - np.hypot(x - 0.55 * width, y - 0.5 * height)) / 6 + 0.5, 0, 1)
    ramp = np.stack([60 + 100 * x / width, 90 + 60 * y / height, np.full_like(x, 70)], axis=-1)
    rgb = ramp * (1 - alpha[..., None]) + np.array(colour, np.float32) * alpha[..., None]
    return rgb.round().astype(np.uint8), (alpha * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> TrainingPool:
    """Photographs of three sizes, larger and smaller than the canvas, and a background."""
    root = tmp_path_factory.mktemp("card")
    items = []
    for number, (size, colour) in enumerate(
        (((150, 200), (220, 40, 30)), ((96, 64), (30, 200, 60)), ((400, 380), (250, 250, 90)))
    ):
        rgb, alpha = disc(*size, colour)
        cv2.imwrite(str(root / f"{number}.png"), rgb[..., ::-1])
        cv2.imwrite(str(root / f"{number}-alpha.png"), alpha)
        paths = root / f"{number}.png", root / f"{number}-alpha.png"
        items.append(TrainingItem(str(number), *paths, None, str(number), is_foreground=False, is_binary=False))
    cv2.imwrite(str(root / "behind.png"), np.full((120, 160, 3), (10, 120, 240), np.uint8))
    return TrainingPool((tuple(items),), (1.0,), (root / "behind.png",))


def scenes(pool: TrainingPool, pairs: PairConfig, augment: AugmentConfig, side_px: int = 400) -> DeviceScenes:
    config = TrainConfig(canvas_px=CANVAS_PX, pairs=pairs, augment=augment)
    return DeviceScenes(pool, config, torch.device("cpu"), side_px=side_px, notice=pytest.fail)


@pytest.mark.parametrize("number", range(3))
def test_photographs_equal_those_made_on_the_cpu(pool: TrainingPool, number: int) -> None:
    (item,) = (item for item in pool if item.name == str(number))
    # The CPU reduces an image to its largest size on the canvas before it warps it; the same is done here.
    alone = replace(pool, backgrounds=())
    on_device = scenes(alone, PLAIN, STILL, side_px=round(CANVAS_PX * STILL.zoom / 4) * 4)
    on_cpu = SceneMaker(CANVAS_PX, STILL)
    for seed in range(8):
        plan = on_device.plan_scene(item, CANVAS_PX, np.random.default_rng(seed))
        image, alpha, valid = on_device.render_scenes([plan], CANVAS_PX)
        scene = on_cpu.make_photograph(item, np.random.default_rng(seed))
        both = valid[0].numpy() & scene.valid
        assert (valid[0].numpy() == scene.valid).mean() > 0.95
        assert np.abs(image[0].permute(1, 2, 0).numpy()[both].astype(int) - scene.rgb[both]).mean() < 3
        assert np.abs(alpha[0].numpy()[both].astype(int) - scene.alpha[both]).mean() < 3


@pytest.fixture(scope="module")
def busy_scenes(pool: TrainingPool) -> DeviceScenes:
    """Scenes with all kinds of augmentation."""
    return scenes(pool, PairConfig(distractor_probability=0.7), AugmentConfig(jpeg=0.5, noise=0.5, blur=0.5))


@given(seed=st.integers(0, 2**31), count=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_scenes_do_not_depend_on_their_batch(busy_scenes: DeviceScenes, seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    items = list(busy_scenes.pool)
    plans = [busy_scenes.plan_scene(items[rng.integers(len(items))], CANVAS_PX, rng) for _ in range(count)]
    together = busy_scenes.render_scenes(plans, CANVAS_PX)
    for i, plan in enumerate(plans):
        for layer, alone in zip(together, busy_scenes.render_scenes([plan], CANVAS_PX), strict=True):
            assert (layer[i].int() - alone[0].int()).abs().max() <= 1  # float sums in another order
    image, alpha, valid = together
    assert image.shape == (count, 3, CANVAS_PX, CANVAS_PX)
    assert not alpha[~valid].any()


def test_composites_have_foreground_colours() -> None:
    height, width = 96, 128
    rgb, alpha = disc(height, width, (220, 40, 30))
    colour = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
    weight = torch.from_numpy(alpha)[None, None].float() / 255.0
    behind = torch.full_like(colour, 250.0)
    truth = torch.tensor([220.0, 40.0, 30.0])[:, None, None] * weight + behind * (1 - weight)
    pasted = colour * weight + behind * (1 - weight)
    soft = ((weight > 0.1) & (weight < 0.9)).expand_as(truth)
    error = (composite_over(colour, weight, behind) - truth)[soft].abs().mean()
    assert error < 4
    assert error < 0.5 * (pasted - truth)[soft].abs().mean()  # in which the gradient is visible


def test_simulated_jpeg_errors_are_as_large_as_those_of_an_encoder() -> None:
    rng = np.random.default_rng(0)
    rgb = cv2.GaussianBlur(rng.integers(0, 256, (96, 96, 1), np.uint8).repeat(3, -1), (0, 0), 1.0)  # grey: no chroma
    image = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
    for quality in (40, 60, 90):
        _, coded = cv2.imencode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, quality])
        theirs = np.abs(cv2.imdecode(coded, cv2.IMREAD_COLOR).astype(int) - rgb).mean()
        ours = float((_quantise_jpeg(image, torch.tensor([quality])) - image).abs().mean())
        assert ours == pytest.approx(theirs, rel=0.1)
    assert degrade_image(rgb, AugmentConfig(blur=0, noise=0, jpeg=0), rng) is rgb


def test_unreadable_image_is_reported_and_skipped(pool: TrainingPool, tmp_path: Path) -> None:
    (tmp_path / "torn.png").write_bytes(b"\x89PNG")
    torn = TrainingItem(
        "torn", tmp_path / "torn.png", tmp_path / "torn.png", None, "torn", is_foreground=False, is_binary=False
    )
    notices: list[str] = []
    with_torn = TrainingPool(((*pool.sources[0], torn),), pool.weights, pool.backgrounds)
    made = DeviceScenes(
        with_torn, TrainConfig(canvas_px=CANVAS_PX), torch.device("cpu"), side_px=64, notice=notices.append
    )
    assert set(made.items) == set(pool)
    assert len(notices) == 1
    assert "torn.png" in notices[0]


def test_exported_copies_equal_their_originals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images with classes and softened masks, and cut-outs, are exported as shards and unpacked elsewhere."""
    for number in range(6):
        rgb, alpha = disc(90 + 10 * number, 100, (220, 40, 30 * number))
        folder = tmp_path / "photographs" / f"group{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f"{number}.jpg"), rgb[..., ::-1])
        cv2.imwrite(str(folder / f"{number}.png"), alpha)
        (tmp_path / "things").mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / "things" / f"{number}.png"), np.dstack([rgb[..., ::-1], alpha]))
    (tmp_path / "classes.json").write_text(json.dumps({"group0": "cup", "group1": ["dog", "pug"]}))
    photographs = {
        "images": str(tmp_path / "photographs" / "*" / "*.jpg"),
        "alphas": str(tmp_path / "photographs" / "*" / "*.png"),
        "classes": str(tmp_path / "classes.json"),
        "soften_px": 0.8,
        "weight": 2.0,
    }
    cutouts = {"dataset": "cutouts", "root": str(tmp_path / "things"), "licence": "CC0"}
    backgrounds = [str(tmp_path / "photographs" / "group0")]
    data = tmp_path / "data.yaml"
    data.write_text(json.dumps({"sources": [photographs, cutouts], "backgrounds": backgrounds}))
    done = subprocess.run(
        [sys.executable, "-m", "icm_cli.training.data.export", tmp_path / "pack", "--data", data, "--px", "64"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    whole = [Path(line.split()[0]) for line in done.stdout.splitlines()]
    pieces = export_shards(data, tmp_path / "small", long_side_px=64, shard_bytes=20_000)
    assert len(whole) == 1
    assert len(pieces) > 1
    assert all(path.stat().st_size < 20_000 + 2 * 10_240 for path in pieces)
    for path in pieces:
        with tarfile.open(path) as archive:
            archive.extractall(tmp_path / "there", filter="data")
    monkeypatch.chdir(tmp_path / "there")
    config = read_data("data.yaml")
    copies, originals = read_pool(config), read_pool(read_data(data))
    assert len(copies) == len(originals) == 12
    assert copies.weights == originals.weights
    assert [len(each) for each in copies.groups.values()] == [len(each) for each in originals.groups.values()]
    for copy, original in zip(copies, originals, strict=True):
        assert (copy.classes, copy.is_foreground) == (original.classes, original.is_foreground)
        layers = read_photograph(copy), read_photograph(original, 64)
        np.testing.assert_array_equal(layers[0].alpha, layers[1].alpha)
        shown = (layers[1].alpha > 0) | (not original.is_foreground)  # outside cut-outs there is no colour
        assert np.abs(layers[0].rgb[shown].astype(int) - layers[1].rgb[shown]).mean() < 6
    assert json.loads(Path(config.copies_of or "").read_text()) == sorted(
        {cached_file_digest(path) for path in originals.image_paths}
    )
