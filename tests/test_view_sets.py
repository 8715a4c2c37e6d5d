"""View sets of the stage "match": groups are drawn evenly, and rotation uses all images of large groups."""

from __future__ import annotations

import collections
import itertools
import signal
import subprocess
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from train_data import change, command, log, same_weights, train, write_config

from icm_cli import terminal
from icm_cli.training.data.pool import TrainingItem, TrainingPool
from icm_cli.training.settings import MatchStageConfig
from icm_cli.training.stages import match, view_sets
from icm_cli.training.stages.mosaics import ImageSource, MosaicSampler, View
from icm_cli.training.stages.view_sets import ViewPlan

SIZES = {"two": 2, "eight": 8, "forty": 40, "many": 300}
TINY = {
    "stage": "match",
    "steps": 12,
    "batch_size": 2,
    "learning_rate": 5e-3,
    "backbone_learning_rate": 0,
    "log_every": 6,
    "save_every": 5,
}
ROTATING = {**TINY, "match": {"views_per_group": 4, "large_views_per_group": 2, "rotate_every": 4, "rotation_parts": 2}}


def group_of(name: str, count: int) -> tuple[TrainingItem, ...]:
    """Return items of one group."""
    return tuple(
        TrainingItem(f"{name} {i}", Path(f"{name}{i}.png"), None, None, name, is_foreground=False, is_binary=False)
        for i in range(count)
    )


def view_set(pool: TrainingPool, plan: ViewPlan, number: int, *, is_large: bool) -> ImageSource:
    """Return a view set of a plan, in which a view is a number in a tensor."""
    files = [file for file in plan.files_of_set(number) if file.is_large == is_large]
    counter = itertools.count()
    none = torch.zeros(0)

    def view() -> View:
        return View(torch.tensor(float(next(counter))), (), torch.ones(1), none, none, none, none)

    views: dict[TrainingItem, list[View]] = {}
    for file in files:
        for item in file.items:
            views.setdefault(item, []).append(view())
    return ImageSource(pool, views, lambda view: view)


@pytest.fixture(scope="module")
def large_groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of two groups of 310 photographs of 24 px, each group with a disc of one colour."""
    root = tmp_path_factory.mktemp("large_groups")
    for group, colour in {"red": (20, 20, 220), "green": (20, 200, 20)}.items():
        for number in range(310):
            image, alpha = np.full((24, 24, 3), 60 + number % 100, np.uint8), np.zeros((24, 24), np.uint8)
            for canvas, value in ((image, colour), (alpha, 255)):
                cv2.circle(canvas, (8 + number % 8, 12), 7, value, -1)
            for kind, canvas in (("images", image), ("alphas", alpha)):
                path = root / kind / group / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(path), canvas)
    return root


class TestPlan:
    def test_views_per_group_and_per_image(self) -> None:
        few, many = group_of("few", 2), group_of("many", 30)
        plan = ViewPlan(
            TrainingPool((few, many), (3.0, 1.0), ()),
            MatchStageConfig(views_per_group=9, max_views_per_image=3),
            seed=0,
        )
        shown = collections.Counter(item for file in plan.files_of_set(0) for item in file.items)
        assert {shown[item] for item in few} == {3}
        assert sum(shown[item] for item in many) == 9
        assert max(shown[item] for item in many) == 1

    def test_rotations_use_all_images_of_a_large_group(self) -> None:
        pool = TrainingPool(tuple(group_of(name, count) for name, count in SIZES.items()), (1.0,) * 4, ())
        plan = ViewPlan(
            pool,
            MatchStageConfig(views_per_group=8, large_views_per_group=3, rotate_every=10, rotation_parts=4),
            seed=0,
        )
        shown: dict[bool, set[TrainingItem]] = {False: set(), True: set()}
        for step in range(0, 150 * 10, 10):
            files = plan.files_of_set(plan.set_number(step))
            for is_large in (False, True):
                items = [item for file in files if file.is_large == is_large for item in file.items]
                counts = collections.Counter(item.group for item in items)
                assert counts == {name: min(3 if is_large else 8, 3 * size) for name, size in SIZES.items()}
                shown[is_large] |= set(items)
        assert shown[False] == set(pool)
        assert len([item for item in shown[True] if item.group == "many"]) > 100

    def test_next_part_is_encoded_evenly_over_the_steps(self) -> None:
        pool = TrainingPool((tuple(item for name in range(300) for item in group_of(str(name), 5)),), (1.0,), ())
        plan = ViewPlan(
            pool,
            MatchStageConfig(views_per_group=8, large_views_per_group=4, rotate_every=20, rotation_parts=4),
            seed=0,
        )
        due = [len(plan.files_due(step)) for step in range(20)]
        assert due == sorted(due)
        assert 0 < due[0] < 5
        assert plan.files_due(19) == plan.files_of_part(4)
        assert plan.files_due(20)[0].rotation_part == 5
        assert set(plan.files_of_set(1)) == set(plan.files_of_set(0)) - set(plan.files_of_part(0)) | set(
            plan.files_of_part(4)
        )


class TestDraws:
    @pytest.mark.parametrize("references", [1, 3])
    @pytest.mark.parametrize("is_large", [False, True])
    def test_groups_of_any_size_are_drawn_evenly(self, references: int, is_large: bool) -> None:
        pool = TrainingPool((tuple(item for name, size in SIZES.items() for item in group_of(name, size)),), (1.0,), ())
        config = MatchStageConfig(views_per_group=8, large_views_per_group=3, same_image_probability=0.1)
        plan = ViewPlan(pool, config, seed=0)
        targets = view_set(pool, plan, 0, is_large=is_large)
        guides = view_set(pool, plan, 0, is_large=False)
        rng = np.random.default_rng(0)

        sampler = MosaicSampler(targets, guides, config, 1, 2, references, rng)
        counts = collections.Counter(sampler.sample().name.split()[0] for _ in range(2000))
        assert counts.keys() == SIZES.keys()
        assert min(counts.values()) > 430
        assert max(counts.values()) < 570

    def test_partner_is_another_image_with_views(self) -> None:
        pool = TrainingPool((group_of("many", 300), group_of("few", 3)), (1.0, 1.0), ())
        kept = pool.restrict_to(pool.sources[0][:4])
        rng = np.random.default_rng(0)
        assert kept.weights == (1.0,)
        partners = {kept.draw_partner(pool.sources[0][0], rng, 0.0) for _ in range(100)}
        assert partners == set(pool.sources[0][1:4])
        lone = pool.sources[1][0]
        assert kept.draw_partner(lone, rng, 0.0) == lone


class TestRuns:
    def test_training_on_large_groups_only(self, large_groups: Path, tmp_path: Path) -> None:
        done = train(write_config(tmp_path / "a.yaml", large_groups, **TINY), tmp_path / "run")
        assert done.exit_code == 0, done.output
        assert len(log(tmp_path / "run")) == 2

    def test_training_on_one_group_without_negatives(self, large_groups: Path, tmp_path: Path) -> None:
        settings = {"views_per_group": 4, "layout_weights": [1.0, 0.0, 0.0, 0.0], "negative_probability": 0.0}
        config = write_config(tmp_path / "a.yaml", large_groups, **{**TINY, "steps": 2, "match": settings})
        red = {kind: str(large_groups / kind / "red" / "*.png") for kind in ("images", "alphas")}
        change(config, sources=[red])
        done = train(config, tmp_path / "run")
        assert done.exit_code == 0, done.output

    @pytest.mark.slow
    def test_resumed_run_is_bit_equal_across_rotations(
        self, large_groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = write_config(tmp_path / "a.yaml", large_groups, **ROTATING)
        unbroken = train(config, tmp_path / "unbroken")
        assert unbroken.exit_code == 0, unbroken.output
        parts = {path.name.partition("-")[0] for path in (tmp_path / "unbroken" / view_sets.TOKENS_FOLDER).iterdir()}
        assert parts == {"00001", "00002", "00003", "00004"}  # the current set, the part before it, and the next part
        assert train(config, tmp_path / "run", "--set", "train.steps=6").exit_code == 0
        done = train(config, tmp_path / "run", "--resume")
        assert done.exit_code == 0, done.output
        assert same_weights(tmp_path / "run" / "last.safetensors", tmp_path / "unbroken" / "last.safetensors")

        # A run that was interrupted during a rotation encodes only what is missing.
        seen: list[int] = []
        read = view_sets._encode_scenes
        monkeypatch.setattr(view_sets, "_encode_scenes", lambda *args: seen.append(len(args[1])) or read(*args))
        assert train(config, tmp_path / "third", "--set", "train.steps=5").exit_code == 0
        before = sum(seen)
        for path in (tmp_path / "third" / view_sets.TOKENS_FOLDER).glob("00002-large-*.pt"):
            path.unlink()
        assert train(config, tmp_path / "third", "--resume").exit_code == 0
        assert sum(seen) - before == 2 + 2 + 6  # the removed file, the rest of part 3, and part 4
        assert same_weights(tmp_path / "third" / "last.safetensors", tmp_path / "unbroken" / "last.safetensors")

    def test_samples_depend_on_their_number_only(self, large_groups: Path, tmp_path: Path) -> None:
        """A resumed run has the same samples as an uninterrupted one, from all view sets."""
        config = write_config(tmp_path / "a.yaml", large_groups, **ROTATING)
        names: list[tuple[str, ...]] = []
        original = match.MatchStage.make_batch

        def noting(stage: match.MatchStage, counters: list[int]) -> object:
            batch = original(stage, counters)
            names.append(batch.names)
            return batch

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(match.MatchStage, "make_batch", noting)
            assert train(config, tmp_path / "one").exit_code == 0
            one = list(names)
            names.clear()
            assert train(config, tmp_path / "two", "--set", "train.steps=3").exit_code == 0
            assert train(config, tmp_path / "two", "--resume").exit_code == 0
        assert names == one

    @pytest.mark.slow
    def test_an_interrupted_run_continues_to_encode(
        self, large_groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Ctrl-C while images are encoded keeps the encoded ones. --resume encodes only the others."""
        config = write_config(
            tmp_path / "a.yaml", large_groups, **{**TINY, "steps": 1, "match": {"views_per_group": 60}}
        )
        out = tmp_path / "run"
        process = subprocess.Popen(command(config, out), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        while process.poll() is None and not list((out / view_sets.TOKENS_FOLDER).glob("*.pt")):
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=100)
        assert process.returncode == 130, errors
        assert "run the same command with --resume" in errors.splitlines()[-1]
        stored = sum(
            len(torch.load(path, weights_only=True)["views"]) for path in (out / view_sets.TOKENS_FOLDER).iterdir()
        )
        assert 0 < stored < 120

        encoded: list[int] = []
        encode = view_sets._encode_scenes
        monkeypatch.setattr(view_sets, "_encode_scenes", lambda *args: encoded.append(len(args[1])) or encode(*args))
        monkeypatch.setattr(terminal, "ENCODING_LINE_INTERVAL_S", 0.0)
        done = train(config, out, "--resume")
        assert done.exit_code == 0, done.output
        assert sum(encoded) == 120 - stored
        lines = done.stderr.splitlines()
        assert f"icm: no step is saved in {out} yet; training starts at step 1" in lines
        assert (
            f"icm: encoding {120 - stored} images with the backbone; an earlier run has encoded {stored} of 120"
            in lines
        )
        progress = [line for line in lines if "images encoded" in line]
        assert progress[-1] == "[120/120] images encoded, 0 s left"
        assert len(progress) == 120 - stored
