"""The command ``icm train``: learning, bit-equal resume, matting with the result, and recorded origin."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import Icm, alphas, read
from tiny_sd import write_tiny_detail_config, write_tiny_sd
from train_data import PLAIN, change, log, metadata, same_weights, train, weights, write_config

from icm_cli.files.digests import cache_folder
from icm_cli.training.data.pool import read_pool
from icm_cli.training.settings import read_settings
from icm_cli.training.stages import make_stage

ONE_STEP = ("--set", "train.steps=1")


@pytest.fixture
def config(tmp_path: Path, data: Path) -> Path:
    return write_config(tmp_path / "train.yaml", data)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ICM_CACHE", str(tmp_path / "cache"))
    cache_folder.cache_clear()
    yield tmp_path / "cache"
    cache_folder.cache_clear()


@pytest.mark.slow
def test_training_reduces_the_loss_and_the_model_can_matte(
    tmp_path: Path, data: Path, out: Path, icm: Icm, scene: Path
) -> None:
    loss = {"gradient_penalty": 0, "unknown_l1": 0, "known_l1": 0, "laplacian": 0, "cross_entropy": 1, "dice": 1}
    recipe = {"steps": 40, "warmup_steps": 5, "learning_rate": 3e-3, "batch_size": 4, "loss": loss}
    config = write_config(tmp_path / "t.yaml", data, **recipe, **PLAIN)
    done = train(config, out)
    assert done.exit_code == 0, done.output
    losses = [float(row["loss"]) for row in log(out)]
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert f"icm matte --checkpoint {out / 'last.safetensors'}" in done.stdout
    matted = icm(checkpoint=out / "last.safetensors", model=None)
    assert matted.exit_code == 0, matted.output
    assert sorted(alphas(scene / "out")) == ["pad.0101.png", "sub/deep.png", "wall.png"]
    assert read(scene / "out" / "wall.png").shape == read(scene / "imgs" / "wall.jpg").shape[:2]


@pytest.mark.parametrize("ema", [None, 0.9])
def test_resumed_run_equals_an_uninterrupted_one(config: Path, tmp_path: Path, out: Path, ema: float | None) -> None:
    options = ["--set", f"train.ema_decay={json.dumps(ema)}"]
    assert train(config, out, *options, "--set", "train.steps=2").exit_code == 0
    half = weights(out / "last.safetensors")
    assert train(config, out, *options, "--resume").exit_code == 0
    assert train(config, tmp_path / "whole", *options).exit_code == 0
    assert same_weights(out / "last.safetensors", tmp_path / "whole" / "last.safetensors")
    assert any(not np.array_equal(half[name], tensor) for name, tensor in weights(out / "last.safetensors").items())
    assert [row["step"] for row in log(out)] == ["1", "2", "3", "4"]
    figures = [[row["loss"] for row in log(each)] for each in (out, tmp_path / "whole")]
    assert figures[0] == figures[1]


def test_resume_without_a_run_starts_one(config: Path, out: Path) -> None:
    done = train(config, out, "--resume")
    assert done.exit_code == 0
    assert "no step is saved in" in done.stderr


def test_resuming_a_finished_run_changes_nothing(config: Path, out: Path) -> None:
    train(config, out)
    before = (out / "last.safetensors").read_bytes()
    again = train(config, out, "--resume")
    assert again.exit_code == 0, again.output
    assert (out / "last.safetensors").read_bytes() == before
    assert len(log(out)) == 4


def test_existing_run_is_not_overwritten(config: Path, out: Path) -> None:
    train(config, out, *ONE_STEP)
    again = train(config, out)
    assert again.exit_code == 2
    assert "already contains a run" in again.stderr


def test_resume_with_another_configuration_is_refused(config: Path, out: Path) -> None:
    train(config, out, *ONE_STEP)
    for override, shown in (
        ("train.learning_rate=0.5", "train.learning_rate: 0.001 -> 0.5"),
        ("head.width=16", "head.width: 8 -> 16"),
    ):
        again = train(config, out, *ONE_STEP, "--resume", "--set", override)
        assert again.exit_code == 2
        assert shown in again.stderr


def test_resume_ignores_settings_of_other_stages(config: Path, out: Path) -> None:
    """The stage "matte" does not read the settings of "refine", so these may change."""
    train(config, out, *ONE_STEP)
    content = yaml.safe_load(config.read_text())
    content["train"]["refine"] = {"crop_px": 64}
    config.write_text(json.dumps(content))
    assert train(config, out, *ONE_STEP, "--resume").exit_code == 0
    again = train(config, out, *ONE_STEP, "--resume", "--set", "train.loss.dice=0.5")
    assert again.exit_code == 2
    assert "train.loss.dice" in again.stderr


class TestRecordedRun:
    """A run folder of two steps, written by commit 4c0bcdb (version 0.1).

    It was trained with ``golden/recorded_run/train.yaml`` on the dataset of conftest in the working directory, with
    ``--device cpu --workers 0``. Since then, keys and tensors were renamed in the recorded files, model settings that
    did not exist were added with their defaults, and the digest of the weights was replaced by that of 0.2.0.
    """

    @pytest.fixture
    def folder(self, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.chdir(data.parent)  # the data paths are relative to it
        return Path(shutil.copytree(Path(__file__).parent / "golden" / "recorded_run", tmp_path / "recorded"))

    def test_resumed_steps_equal_those_of_the_earlier_code(self, folder: Path) -> None:
        done = train(folder / "train.yaml", folder, "--resume", "--set", "train.steps=4")
        assert done.exit_code == 0, done.output
        assert [row["step"] for row in log(folder)] == ["1", "2", "3", "4"]
        losses = [float(row["loss"]) for row in log(folder)[2:]]
        assert losses == pytest.approx([34.072792053222656, 32.96425247192383], rel=1e-3)

    def test_alphas_equal_those_of_the_earlier_code(self, folder: Path, data: Path, icm: Icm) -> None:
        matted = icm(
            checkpoint=folder / "last.safetensors",
            model=None,
            ref=data / "images" / "a" / "lawn.jpg",
            mask=data / "alphas" / "a" / "lawn.png",
            src=data / "images" / "a",
            report=folder / "r.json",
        )
        assert matted.exit_code == 0, matted.output
        images = {each["name"]: each for each in json.loads((folder / "r.json").read_text())["images"]}
        for name, confidence, foreground in (("brickwall.jpg", 0.6789, 0.160569), ("launchpad.jpg", 0.6331, 0.183469)):
            assert images[name]["signals"]["confidence"] == pytest.approx(confidence, abs=2e-3)
            assert images[name]["foreground"] == pytest.approx(foreground, abs=2e-3)


@pytest.mark.parametrize("stage", ["match", "matte", "refine"])
def test_smallest_data_file_of_the_documentation_trains(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """Two folders with two images and their alphas each, without backgrounds."""
    page = (Path(__file__).parents[1] / "docs" / "train.md").read_text()
    monkeypatch.chdir(tmp_path)
    Path("data.yaml").write_text(page.split("```yaml\n")[1].split("```")[0])
    for group in ("a", "b"):
        folder = Path("photos", group)
        folder.mkdir(parents=True)
        for number, name in enumerate(("lawn", "launchpad"), 1):
            shutil.copy(data / "images" / group / f"{name}.jpg", folder / f"{number}.jpg")
            shutil.copy(data / "alphas" / group / f"{name}.png", folder / f"{number}.png")
    recipe = {"stage": stage, "steps": 2, "backbone_learning_rate": 0, "refine": {"crop_px": 64}}
    config = write_config(tmp_path / "train.yaml", data, **recipe)
    done = train(config, Path("run"), data="data.yaml")
    assert done.exit_code == 0, done.output
    sources = json.loads(metadata(Path("run", "last.safetensors"))["icm.sources"])
    assert list(sources.values()) == [{"licence": "", "groups": 2, "images": 4}]


class TestChangedData:
    @pytest.mark.parametrize(
        ("name", "kind"),
        [("images/a/lawn.jpg", "changed"), ("alphas/a/lawn.png", "changed"), ("images/a/lawn.jpg", "removed")],
    )
    def test_resume_is_refused_and_names_the_changes(
        self, config: Path, out: Path, data: Path, name: str, kind: str
    ) -> None:
        assert train(config, out, *ONE_STEP).exit_code == 0
        before = (out / "last.safetensors").read_bytes(), (out / "data.json").read_bytes()
        if kind == "removed":
            (data / name).unlink()
        else:
            cv2.imwrite(str(data / name), 255 - read(data / name))
        for _ in range(2):  # the refused resume leaves the run as it is
            again = train(config, out, "--set", "train.steps=2", "--resume")
            assert again.exit_code == 2, again.output
            last = again.stderr.splitlines()[-1]
            assert f"the training data changed since the run in {out} started: " in last
            assert f" {kind} ({data / name}" in last
            assert f"--checkpoint {out / 'last.safetensors'}" in last
        assert ((out / "last.safetensors").read_bytes(), (out / "data.json").read_bytes()) == before

    def test_further_files_and_their_numbers_are_reported(self, config: Path, out: Path, data: Path) -> None:
        """Images, alphas, trimaps, predicted alphas and lists all decide what is learned."""
        for kind in ("trimaps", "coarse"):
            shutil.copytree(data / "alphas", data / kind)
        classes = data / "classes.json"
        classes.write_text('{"a": "animal", "b": "plant"}')
        (source,) = yaml.safe_load(config.read_text())["data"]["sources"]
        further = {"trimaps": str(data / "trimaps"), "coarse": str(data / "coarse"), "classes": str(classes)}
        change(config, sources=[source | further])
        assert train(config, out, *ONE_STEP).exit_code == 0
        for path in [*(data / "trimaps" / "a").iterdir(), data / "coarse" / "b" / "lawn.png"]:
            cv2.imwrite(str(path), 255 - read(path))
        classes.write_text('{"a": "animal", "b": "animal"}')
        shutil.copy(data / "images" / "a" / "lawn.jpg", data / "images" / "a" / "lawn2.jpg")
        shutil.copy(data / "alphas" / "a" / "lawn.png", data / "alphas" / "a" / "lawn2.png")
        again = train(config, out, *ONE_STEP, "--resume")
        assert again.exit_code == 2
        assert "5 changed (" in again.stderr
        assert " and 2 more), 2 added (" in again.stderr

    def test_files_with_the_same_content_are_no_change(self, config: Path, out: Path, data: Path) -> None:
        """Only files whose size or time differs are read again, and their content decides."""
        assert train(config, out, *ONE_STEP).exit_code == 0
        for path in data.rglob("*.*"):
            os.utime(path, (1e9, 1e9))
        assert train(config, out, "--set", "train.steps=2", "--resume").exit_code == 0

    def test_change_is_found_without_the_record(self, config: Path, out: Path, data: Path) -> None:
        assert train(config, out, *ONE_STEP).exit_code == 0
        (out / "data.json").write_text("{")
        assert train(config, out, *ONE_STEP, "--resume").exit_code == 0
        cv2.imwrite(str(data / "images" / "a" / "lawn.jpg"), 255 - read(data / "images" / "a" / "lawn.jpg"))
        (out / "data.json").unlink()
        again = train(config, out, *ONE_STEP, "--resume")
        assert again.exit_code == 2
        assert "data_digest: " in again.stderr

    def test_tokens_of_changed_images_are_computed_again(self, tmp_path: Path, out: Path, data: Path) -> None:
        """An interrupted run whose first step is not done has learned nothing, so it starts with the new data."""
        recipe = {"stage": "match", "backbone_learning_rate": 0, "steps": 1, "match": {"views_per_group": 3}}
        config = write_config(tmp_path / "match.yaml", data, **recipe)
        assert train(config, out).exit_code == 0
        tokens = {path.name: path.read_bytes() for path in (out / "tokens").iterdir()}
        for path in (out / "state.pt", out / "last.safetensors"):
            path.unlink()  # as if the run was interrupted before its first step
        unchanged = train(config, out, "--resume")
        assert "images with the backbone" not in unchanged.stderr
        for path in (out / "state.pt", out / "last.safetensors"):
            path.unlink()
        changed = data / "images" / "a" / "lawn.jpg"
        cv2.imwrite(str(changed), 255 - read(changed))
        done = train(config, out, "--resume")
        assert done.exit_code == 0, done.output
        assert f"was interrupted: 1 changed ({changed})" in done.stderr
        assert "encoding 6 images with the backbone" in done.stderr
        assert {path.name: path.read_bytes() for path in (out / "tokens").iterdir()} != tokens
        recorded = json.loads(metadata(out / "last.safetensors")["icm.trained_on"])
        assert hashlib.sha256(changed.read_bytes()).hexdigest() in recorded


def test_checkpoint_records_its_origin(config: Path, out: Path, data: Path) -> None:
    assert train(config, out, "--set", "train.seed=7").exit_code == 0
    recorded = metadata(out / "last.safetensors")
    files = sorted({hashlib.sha256(path.read_bytes()).hexdigest() for path in (data / "images").rglob("*.jpg")})
    assert json.loads(recorded["icm.trained_on"]) == files
    sources = json.loads(recorded["icm.sources"])
    assert sources[f"folder ({data / 'images'})"] == {"licence": "CC0", "groups": 2, "images": 6}
    assert sources[f"backgrounds ({data / 'images'})"] == {"images": 6}
    assert json.loads(recorded["icm.overrides"]) == ["train.seed=7"]
    assert json.loads(recorded["icm.training"])["train"]["seed"] == 7
    assert recorded["icm.command"].startswith("icm train --config ")
    assert recorded["icm.command"].endswith("--set train.seed=7")
    assert recorded["icm.step"] == "4"


def test_checkpoint_records_the_sources_of_the_initial_checkpoint(config: Path, out: Path, data: Path) -> None:
    train(config, out, *ONE_STEP)
    own = {"images": str(data / "images" / "a"), "alphas": str(data / "alphas" / "a"), "licence": "MIT"}
    change(config, sources=[own], backgrounds=[str(data / "images" / "b")])
    done = train(config, out.with_name("second"), *ONE_STEP, checkpoint=out / "last.safetensors")
    assert done.exit_code == 0, done.output
    sources = json.loads(metadata(out.with_name("second") / "last.safetensors")["icm.sources"])
    licences = {title: source["licence"] for title, source in sources.items() if title.startswith("folder")}
    assert licences == {f"folder ({data / 'images'})": "CC0", f"folder ({data / 'images' / 'a'})": "MIT"}


def test_eval_marks_images_that_were_trained_on(config: Path, out: Path, evaluate: Icm, tmp_path: Path) -> None:
    train(config, out, *ONE_STEP)
    scored = evaluate(model=None, checkpoint=out / "last.safetensors", report=tmp_path / "r.json")
    assert scored.exit_code == 0, scored.output
    images = json.loads((tmp_path / "r.json").read_text())["images"]
    assert all(image["is_seen"] for image in images)


def test_training_starts_from_a_checkpoint(config: Path, out: Path, tmp_path: Path) -> None:
    train(config, out, "--set", "train.steps=2")
    more = tmp_path / "more"
    done = train(
        config,
        more,
        "--set",
        "train.learning_rate=1e-12",
        "--set",
        "train.backbone_learning_rate=0",
        checkpoint=out / "last.safetensors",
    )
    assert done.exit_code == 0, done.output
    before, after = weights(out / "last.safetensors"), weights(more / "last.safetensors")
    name = "head.fusion.conv.weight"
    assert np.allclose(before[name], after[name], atol=1e-6)
    assert metadata(more / "last.safetensors")["icm.started_from"] == str(out / "last.safetensors")


def test_validation_is_logged_and_the_best_model_saved(config: Path, out: Path, data: Path) -> None:
    change(config, validation={"images": str(data / "images"), "alphas": str(data / "alphas")})
    done = train(config, out, "--set", "train.validate_every=2")
    assert done.exit_code == 0, done.output
    assert "6 of the 6 validation images are also trained on" in done.stderr
    rows = {row["step"]: float(row["validation_mse"]) for row in log(out) if row["validation_mse"]}
    assert sorted(rows) == ["2", "4"]
    best = min(rows, key=lambda step: rows[step])
    assert metadata(out / "best.safetensors")["icm.step"] == best
    assert f"best step {best}, validation MSE {rows[best]:.5f}" in " ".join(done.stdout.split())
    assert f"--checkpoint {out / 'best.safetensors'}" in done.stdout


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_validation_equals_an_evaluation_of_the_checkpoint(
    tmp_path: Path, data: Path, out: Path, evaluate: Icm
) -> None:
    """Equal although training has other dtypes than matting, and another seed of the backbone's noise."""
    model = yaml.safe_load(write_tiny_detail_config(tmp_path / "m.yaml", write_tiny_sd(tmp_path / "sd")).read_text())
    recipe = {"canvas_px": 128, "backbone_learning_rate": 0, "precision": "bf16", "seed": 5, "validate_every": 2}
    config = write_config(tmp_path / "t.yaml", data, model, **recipe)
    validation = {"images": str(data / "images"), "alphas": str(data / "alphas"), "rounds": 2}
    done = train(change(config, validation=validation), out, "--set", "train.steps=3")
    assert done.exit_code == 0, done.output
    step = metadata(out / "best.safetensors")["icm.step"]
    (row,) = (row for row in log(out) if row["step"] == step and row["validation_mse"])
    evaluated = evaluate(checkpoint=out / "best.safetensors", model=None, rounds=2, report=tmp_path / "r.json")
    assert evaluated.exit_code == 0, evaluated.output
    metrics = json.loads((tmp_path / "r.json").read_text())["summary"]["means"]["whole"]["metrics"]
    for name in ("mse", "sad", "grad", "conn", "mad"):
        assert float(row[f"validation_{name}"]) == pytest.approx(metrics[name]["mean"], rel=1e-6)


def test_tensorboard_shows_images_and_scalars(config: Path, out: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(config, out, "--set", "train.image_every=2")
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"run/loss", "run/learning_rate", "run/waiting_fraction"} <= scalars
    assert {"losses/cross_entropy", "losses/l1"} <= scalars
    logged = [float(row["loss"]) for row in log(out)]
    assert [event.value for event in events.Scalars("run/loss")] == pytest.approx(logged)
    images = events.Images("samples")
    assert [event.step for event in images] == [2, 4]
    image = cv2.imdecode(np.frombuffer(images[0].encoded_image_string, np.uint8), cv2.IMREAD_COLOR)
    assert image.shape == (2 * 256, 6 * 256, 3)
    assert image.std() > 10


@pytest.mark.parametrize("steps", [1, 3])
def test_tensorboard_shows_images_at_the_first_validation(config: Path, out: Path, steps: int) -> None:
    """Also in a run that ends before the first step with images (``image_every``)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = train(config, out, "--set", f"train.steps={steps}", "--set", "train.validate_every=2")
    assert done.exit_code == 0, done.output
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Images("samples")] == [min(steps, 2)]


def test_preview_writes_a_contact_sheet_only(config: Path, out: Path) -> None:
    done = train(config, out, preview=3)
    assert done.exit_code == 0, done.output
    sheet = read(out / "preview.png")
    assert sheet.shape == (3 * 118, 5 * 240, 3)
    settings = read_settings(str(config))
    stage = make_stage(settings, read_pool(settings.data))
    for row in range(3):
        for column, cell in enumerate(stage.preview_sample(row)[1]):
            shown = sheet[row * 118 :][2:98, column * 240 + 72 : column * 240 + 168]  # 96 px of a cell
            assert (shown[..., ::-1] == cell).all(), (row, column)
    assert [path.name for path in out.iterdir()] == ["preview.png"]


@pytest.mark.slow
def test_workers_do_not_change_the_result(config: Path, out: Path, tmp_path: Path) -> None:
    train(config, out, "--set", "train.steps=2")
    done = train(config, tmp_path / "two", "--set", "train.steps=2", workers=2)
    assert done.exit_code == 0, done.output
    assert same_weights(out / "last.safetensors", tmp_path / "two" / "last.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_sd(tmp_path_factory.mktemp("sd"))


def test_features_of_a_frozen_backbone_are_cached(tmp_path: Path, data: Path, out: Path, own_cache: Path) -> None:
    config = write_config(tmp_path / "t.yaml", data, backbone_learning_rate=0, **PLAIN)
    assert train(config, out).exit_code == 0
    entries = list((own_cache / "features").rglob("*.pt"))
    assert entries
    entries[0].write_bytes(entries[0].read_bytes()[:99])  # damaged entries are replaced
    assert train(config, tmp_path / "again").exit_code == 0
    assert same_weights(out / "last.safetensors", tmp_path / "again" / "last.safetensors")
    computed = tmp_path / "computed"
    assert train(config, computed, "--set", "train.feature_cache_gb=0").exit_code == 0
    losses = [[float(row["loss"]) for row in log(each)] for each in (out, computed)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert losses[0] != losses[1]  # because of half precision


class TestStableDiffusion:
    @pytest.fixture
    def sd_config(self, tmp_path: Path, data: Path, folder: Path, own_cache: Path) -> Path:  # noqa: ARG002
        model = yaml.safe_load(write_tiny_detail_config(tmp_path / "sd.yaml", folder).read_text())
        return write_config(
            tmp_path / "train.yaml",
            data,
            model,
            steps=2,
            canvas_px=128,
            backbone_learning_rate=0,
            loss={},
            ema_decay=None,
            optimiser="adam",
        )

    def test_the_decoder_trains_on_frozen_features(self, sd_config: Path, out: Path, icm: Icm) -> None:
        done = train(sd_config, out)
        assert done.exit_code == 0, done.output
        assert "cached on disk" not in done.stderr
        assert all(name.startswith("head.") for name in weights(out / "last.safetensors"))
        assert icm(checkpoint=out / "last.safetensors", model=None).exit_code == 0

    def test_features_are_cached_if_no_pixel_changes(
        self, sd_config: Path, out: Path, tmp_path: Path, own_cache: Path
    ) -> None:
        options = [f"--set=train.{name}={json.dumps(value)}" for name, value in PLAIN.items()]
        done = train(sd_config, out, *options)
        assert done.exit_code == 0, done.output
        assert "cached on disk" in done.stderr
        assert "the noise is the same in every step" in done.stderr
        entries = list((own_cache / "features").rglob("*.pt"))
        assert 2 <= len(entries) <= 12  # six images, as target and as reference
        again = train(sd_config, tmp_path / "again", *options)
        assert again.exit_code == 0
        assert set((own_cache / "features").rglob("*.pt")) == set(entries)
        assert same_weights(out / "last.safetensors", tmp_path / "again" / "last.safetensors")
        shutil.rmtree(own_cache / "features")
        bounded = train(sd_config, tmp_path / "bounded", *options, "--set", "train.feature_cache_gb=1e-9")
        assert bounded.exit_code == 0
        assert "the feature cache is full" in bounded.stderr
        assert not list((own_cache / "features").rglob("*.pt"))
        assert same_weights(out / "last.safetensors", tmp_path / "bounded" / "last.safetensors")

    def test_bfloat16_losses_are_close_to_float32(
        self, sd_config: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
        assert train(sd_config, out).exit_code == 0
        low = tmp_path / "low"
        done = train(sd_config, low, "--set", "train.precision=bf16")
        assert done.exit_code == 0, done.output
        losses = [[float(row["loss"]) for row in log(each)] for each in (out, low)]
        assert losses[0] == pytest.approx(losses[1], rel=0.1)
        assert losses[0] != losses[1]
        assert all(
            tensor.dtype == np.float32
            for name, tensor in weights(low / "last.safetensors").items()
            if not name.endswith("tracked")
        )

    def test_float32_is_used_if_bfloat16_is_slower(
        self, sd_config: Path, out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
        monkeypatch.setattr("icm_cli.environment.processor_property", lambda _: "GenuineIntel")
        low = train(sd_config, tmp_path / "low", "--set", "train.precision=bf16")
        assert low.exit_code == 0, low.output
        exact = train(sd_config, out, "--set", "train.precision=no")
        assert exact.exit_code == 0, exact.output
        assert "bfloat16" not in exact.stderr
        assert "slower in bfloat16 than in float32, so float32 is used" in low.stderr
        assert same_weights(out / "last.safetensors", tmp_path / "low" / "last.safetensors")

    def test_learning_rate_of_a_frozen_backbone_is_refused(self, sd_config: Path, out: Path) -> None:
        done = train(sd_config, out, "--set", "train.backbone_learning_rate=1e-4")
        assert done.exit_code == 3
        assert "the backbone is frozen in this run" in done.stderr
