"""Failures while training: each gives one message, keeps the last checkpoint, and the run can be resumed."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import cv2
import pytest
import torch
from conftest import read
from safetensors.torch import safe_open
from torch.utils.data import DataLoader
from train_data import change, command, log, metadata, same_weights, train, weights, write_config

from icm_cli.errors import ConfigError
from icm_cli.matting.predictor import Predictor
from icm_cli.training.batches import BatchMaker, iterate_loader, worker_options
from icm_cli.training.learner import Learner
from icm_cli.training.run_folder import LOCK_NAME
from icm_cli.training.stages import matte, mosaics


@pytest.fixture
def config(tmp_path: Path, data: Path) -> Path:
    return write_config(tmp_path / "train.yaml", data, save_every=1)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--config", "none.yaml"], 3, "cannot be read"),
        (["--config", "lait"], 2, "Did you mean 'lite'"),
        (["--config", "lite-training-free", "--set", "data.sources=[{images: DATA/images, alphas: DATA/alphas}]"], 3,
         "has no weights to train"),
        (["--config", "lite"], 2, "there is nothing to train on"),
        (["--data", "none.yaml"], 2, "data file none.yaml cannot be read: No such file"),
        (["--data", "DATA"], 2, "cannot be read: Is a directory"),
        (["--set", "data.sorces=[]"], 2, "unknown key 'sorces'. Did you mean 'sources'"),
        (["--set", "data.sources=[]"], 2, "no 'sources' are given"),
        (["--set", "data.sources=[{images: DATA/images}]"], 2, "give 'images' and 'alphas', or 'root'"),
        (["--set", "data.sources=[{images: DATA/images, alphas: DATA/alphas, groups: none.json}]"], 2, "none.json"),
        (["--set", "data.copies_of=none.json"], 2, "copies_of none.json cannot be read"),
        (["--set", "data.backgrounds=[none]"], 2, "backgrounds folder none does not exist"),
        (["--set", "train.precision=fp16"], 3, "train.precision is fp16, which needs a GPU"),
        (["--set", "train.micro_batch_size=3"], 3, "expected a multiple of their product"),
        (["--set", "train.canvas_px=100"], 3, "multiple of 32"),
        (["--set", "head.feature_channels=[9]"], 3,
         "feature_channels add up to 9, but the backbone's correspondence features have 208"),
        (["--set", "train.minutes=0"], 3, "minutes is 0"),
        (["--set", "train.stage=refine", "--set", "train.refine.crop_px=100"], 3, "crop_px is 100; expected at most"),
        (["--set", "train.stage=match", "--set", "train.match.layout_weights=[1]"], 3, "expected 4 numbers"),
        (["--set", "train.stage=refine", "--set", "train.refine.crop_px=64"], 3, "the backbone is frozen in this run"),
        (["--set", "data.sources=[{images: none, alphas: none}]"], 2, "is not a folder"),
        (["--set", "data.sources=[{dataset: cutouts, root: none}]"], 2, "data: source 1: cutouts folder none"),
        (["--set", "data.validation={images: none, alphas: none}"], 2, "data: validation: 'images' none"),
        (["--set", "data.validation={images: DATA/images/a/l*n.jpg, alphas: DATA/alphas/a/l*n.png}"], 2,
         "no group has two images"),
        (["--set", "head={name: detail, name: detail}"], 3, "the key 'name' twice, in line 1 and in line 1"),
        (["--out", ""], 2, "--out is ''; expected a path"),
        (["--set", "train.steps"], 2, "--set is 'train.steps'; expected KEY=VALUE, such as train.steps=500"),
        (["--set", "=1"], 2, "--set is '=1'; expected KEY=VALUE"),
        (["--device", "gpu"], 2, "--device is 'gpu'; expected auto, cpu, cuda, cuda:N or mps"),
        (["--device", "cuda:77"], 3, "this machine has no device"),
        (["--checkpoint", "none.safetensors"], 3, "cannot be read"),
        (["--out", "DATA/images/a/lawn.jpg/run"], 3, "cannot be written"),
    ],
)  # fmt: skip
def test_invalid_option_gives_one_message(
    config: Path, out: Path, data: Path, options: list[str], code: int, message: str
) -> None:
    done = train(config, out, *(option.replace("DATA", str(data)) for option in options))
    said = [line for line in done.stderr.splitlines() if not line.startswith("icm: training from")]
    assert done.exit_code == code, done.output
    assert len(said) == 1, done.stderr
    assert message in said[0]
    assert not (out / "last.safetensors").exists()


def test_head_that_a_stage_cannot_train_is_refused() -> None:
    """Only a model of a user has such a head and a backbone that it works with."""
    expected = "use the stage matte, which trains other heads, or 'head: {name: token-match}'"
    with pytest.raises(ConfigError, match=re.escape(expected)):
        mosaics.require_token_match_head(cast("Any", SimpleNamespace(head=None)), "match")


DUPLICATES = {
    "data": ("sources: [{images: none, alphas: none}]\nbackgrounds: []\nsources: []\n", "'sources'", 1, 3),
    "data entry": ("sources:\n- images: none\n  alphas: none\n  images: other\n", "'images'", 2, 4),
    "equal after parsing": ("1: a\n0x1: b\n", "1", 1, 2),
    "two merges": ("a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a\n", "'<<'", 3, 4),
}


@pytest.mark.parametrize("option", ["--data", "--config"])
@pytest.mark.parametrize(("text", "key", "first", "second"), DUPLICATES.values(), ids=DUPLICATES)
def test_duplicate_key_is_refused_with_both_lines(
    config: Path, out: Path, option: str, text: str, key: str, first: int, second: int
) -> None:
    duplicate = config.with_name("duplicate.yaml")
    duplicate.write_text(text)
    done = train(config, out, option, str(duplicate))
    assert done.exit_code == (2 if option == "--data" else 3), done.output
    assert f"{duplicate} has the key {key} twice, in line {first} and in line {second};" in done.stderr
    assert not (out / "last.safetensors").exists()


def test_merged_keys_may_be_replaced(config: Path, out: Path, data: Path) -> None:
    """A key next to ``<<`` takes precedence over the merged key; that is not a duplicate."""
    merged = config.with_name("data.yaml")
    entry = f"&first {{images: {data}/images, alphas: {data}/alphas, licence: CC0}}"
    merged.write_text(f"sources:\n- {entry}\n- &second {{<<: *first, licence: MIT}}\n- {{<<: *second, licence: CC0}}\n")
    done = train(config, out, "--data", str(merged), "--set", "train.steps=1")
    assert done.exit_code == 0, done.output


def poisoned(bad_step: int):
    """Return a loss function whose result contains NaN at a step."""
    calls = []
    real = matte.compute_losses

    def losses(*arguments: object) -> dict[str, torch.Tensor]:
        calls.append(1)
        terms = real(*arguments)  # type: ignore[arg-type]
        if len(calls) == bad_step:
            terms["total"] = terms["total"] * torch.tensor([1.0, float("nan")])
        return terms

    return losses


def test_nan_loss_ends_the_run_and_names_the_samples(config: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matte, "compute_losses", poisoned(3))
    done = train(config, out)
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]
    assert "step 3: the loss is NaN or above 10000 for" in last
    with safe_open(out / "bad-step-3.safetensors", framework="pt") as file:
        names = json.loads(file.metadata()["names"])
        assert file.get_tensor("rgb").shape == (2, 96, 96, 3)
    assert names[1] in last
    assert names[0] == names[1] or f"{names[0]} (" not in last
    assert metadata(out / "last.safetensors")["icm.step"] == "2"
    monkeypatch.undo()
    assert train(config, out, "--resume").exit_code == 0


def test_diverging_model_ends_the_run(config: Path, out: Path) -> None:
    done = train(
        config, out, "--set", "train.learning_rate=1e30", "--set", "train.warmup_steps=0", "--set", "train.steps=9"
    )
    assert done.exit_code == 1
    last = done.stderr.splitlines()[-1]
    assert "output is NaN or infinite for" in last or "loss is NaN or above 10000" in last
    assert list(out.glob("bad-step-*.safetensors"))


def test_too_large_loss_ends_the_run(config: Path, out: Path) -> None:
    done = train(config, out, "--set", "train.loss.unknown_l1=1e6")
    assert done.exit_code == 1
    assert "the loss is NaN or above 10000" in done.stderr


@pytest.mark.parametrize("norm", [float("inf"), float("nan")])
def test_infinite_gradients_end_the_run_before_the_step(
    config: Path, out: Path, monkeypatch: pytest.MonkeyPatch, norm: float
) -> None:
    monkeypatch.setattr(Learner, "clip_gradients", lambda self: norm)  # noqa: ARG005
    done = train(config, out)
    assert done.exit_code == 1
    assert "step 1: the gradients are NaN or infinite" in done.stderr
    assert (out / "bad-step-1.safetensors").exists()


def test_few_unreadable_samples_are_skipped_and_counted(config: Path, out: Path, data: Path) -> None:
    bad = data / "images" / "a" / "lawn.jpg"
    bad.write_bytes(b"")
    done = train(config, out)
    assert done.exit_code == 0, done.output
    assert f"skipped: {bad} is empty" in done.stderr
    assert "samples were skipped" in done.stdout
    train(config, out, "--resume", "--set", "train.steps=6")
    (reason,) = (out / "skipped.txt").read_text().splitlines()
    assert reason.startswith(f"{bad} is empty")


def test_many_unreadable_samples_end_the_run(
    config: Path, out: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data / "images" / "a" / "lawn.jpg").write_bytes(b"")
    monkeypatch.setattr("icm_cli.training.batches.MIN_DRAWS_TO_JUDGE", 1)
    done = train(config, out)
    assert done.exit_code == 1
    assert "more than 1%" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_data_end_the_run(config: Path, out: Path, data: Path, workers: int) -> None:
    for path in (data / "images").rglob("*.jpg"):
        path.write_bytes(b"")
    done = train(config, out, workers=workers)
    assert done.exit_code == 1
    assert "could not be made in 10 draws" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_last_checkpoint_survives_a_full_disk(config: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync
    written = []

    def full(descriptor: int) -> None:
        if os.fstat(descriptor).st_size > 100_000:
            written.append(1)  # a checkpoint or a state, alternately
        if len(written) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    done = train(config, out)
    assert done.exit_code == 3
    assert "no space left" in done.stderr.splitlines()[-1]
    assert "with --resume" in done.stderr.splitlines()[-1]
    kept = metadata(out / "last.safetensors")["icm.step"]
    assert kept == "3"
    assert weights(out / "last.safetensors")
    assert not list(out.glob("*.tmp"))
    monkeypatch.undo()
    assert train(config, out, "--resume").exit_code == 0
    whole = out.parent / "whole"
    train(config, whole)
    assert same_weights(out / "last.safetensors", whole / "last.safetensors")


@pytest.mark.slow
def test_failed_write_gives_a_message(config: Path, out: Path) -> None:
    """A file size limit of the process makes the write fail, as on a full disk."""
    line = shlex.join(command(config, out, "--set", "train.save_every=2"))
    ended = subprocess.run(["bash", "-c", f"ulimit -f 6000; {line}"], capture_output=True, text=True, check=False)
    assert ended.returncode == 3, ended.stderr
    assert "state.pt cannot be written" in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr
    assert not list(out.glob("*.tmp"))


def test_run_continues_without_a_writable_log(config: Path, out: Path) -> None:
    out.mkdir()
    (out / "log.csv").mkdir()
    done = train(config, out, "--set", "train.steps=2")
    assert done.exit_code == 0, done.output
    assert "training continues without it" in done.stderr


def test_out_of_memory_message_gives_a_remedy(config: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tight(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Learner, "backward", tight)
    done = train(config, out)
    assert done.exit_code == 3
    assert "with 2 samples at a time; reduce train.micro_batch_size" in done.stderr


@pytest.mark.parametrize("size", [0, 1000])
def test_damaged_state_is_refused(config: Path, out: Path, size: int) -> None:
    train(config, out, "--set", "train.steps=1")
    state = out / "state.pt"
    state.write_bytes(state.read_bytes()[:size])
    done = train(config, out, "--resume")
    assert done.exit_code == 3
    assert f"training state {state} is damaged" in done.stderr


def test_checkpoint_without_a_state_is_not_overwritten(config: Path, out: Path) -> None:
    train(config, out, "--set", "train.steps=1")
    (out / "state.pt").unlink()
    before = (out / "last.safetensors").read_bytes()
    for flags in ([], ["--resume"]):
        assert train(config, out, *flags).exit_code == 2
    assert "contains last.safetensors but no state.pt" in train(config, out, "--resume").stderr
    assert (out / "last.safetensors").read_bytes() == before


def test_damaged_log_is_replaced(config: Path, out: Path) -> None:
    train(config, out, "--set", "train.steps=2")
    (out / "log.csv").write_bytes(os.urandom(3000))
    assert train(config, out, "--resume").exit_code == 0
    assert [row["step"] for row in log(out)] == ["3", "4"]


def test_incomplete_log_row_is_removed(config: Path, out: Path) -> None:
    train(config, out, "--set", "train.steps=3")
    with (out / "log.csv").open("a") as file:
        file.write("4,0.1,")
    done = train(config, out, "--resume")
    assert done.exit_code == 0, done.output
    assert [row["step"] for row in log(out)] == ["1", "2", "3", "4"]


LONG = ["--set", "train.steps=200"]


def started(config: Path, out: Path, steps: int, *flags: str, workers: int = 0) -> subprocess.Popen[str]:
    """Start a run in another process and return when it has logged this number of steps."""
    line = command(config, out, *LONG, *flags, workers=workers)
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while process.poll() is None and not ((out / "log.csv").exists() and len(log(out)) >= steps):
        time.sleep(0.02)
    return process


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_the_state_and_the_run_resumes(
    config: Path, out: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    never = ["--set", "train.save_every=1000"]
    process = started(config, out, 2, *never, workers=1 if number == signal.SIGTERM else 0)
    os.killpg(process.pid, number)  # to all processes of the run, as a terminal and a farm do
    _, errors = process.communicate(timeout=100)
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    assert "interrupted" in errors
    done = int(metadata(out / "last.safetensors")["icm.step"])
    assert 2 <= done < 200
    if number == signal.SIGINT:
        return  # the state is saved in the same way
    steps = ["--set", f"train.steps={done + 2}"]
    assert train(config, out, *steps, *never, "--resume").exit_code == 0
    assert train(config, tmp_path / "whole", *steps, *never).exit_code == 0
    assert same_weights(out / "last.safetensors", tmp_path / "whole" / "last.safetensors")


class SlowMaker(BatchMaker[str]):
    """Makes the first batch at once; each other one would take 100 s."""

    def make_batch(self, counters: Sequence[int]) -> str:
        time.sleep(100 if counters[0] else 0)
        return str(counters[0])


@pytest.mark.slow
def test_the_end_of_a_run_does_not_wait_for_workers_in_the_middle_of_a_batch() -> None:
    loader = DataLoader(SlowMaker(), batch_sampler=([number] for number in range(9)), **worker_options(1))
    batches = iterate_loader(loader)
    assert next(batches)
    start = time.monotonic()
    batches.close()  # type: ignore[attr-defined]
    assert time.monotonic() - start < 5
    assert not multiprocessing.active_children()


@pytest.mark.slow
def test_killed_worker_gives_a_message(config: Path, out: Path) -> None:
    process = started(config, out, 3, workers=1)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (worker,) = [each for each in children if b"spawn_main" in Path(f"/proc/{each}/cmdline").read_bytes()]
    os.kill(int(worker), signal.SIGKILL)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 1, errors
    assert "a process that makes samples died" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert (out / "state.pt").exists()


def test_refused_run_keeps_the_skipped_log_of_the_running_one(config: Path, out: Path) -> None:
    out.mkdir()
    (out / "skipped.txt").write_text("of the running one\n")
    with (out / LOCK_NAME).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = train(config, out)
    assert (refused.exit_code, (out / "skipped.txt").exists()) == (2, True), refused.output
    assert train(config, out).exit_code == 0
    assert not (out / "skipped.txt").exists()


@pytest.mark.slow
def test_killed_run_resumes_from_its_last_state(config: Path, out: Path, tmp_path: Path) -> None:
    """It also refuses another run in its folder while it is running."""
    process = started(config, out, 4, "--set", "train.save_every=3")
    try:
        other = train(config, out, *LONG, "--resume")
    finally:
        process.kill()
        process.communicate(timeout=100)
    assert other.exit_code == 2
    assert "another process is training in" in other.stderr
    saved = int(metadata(out / "last.safetensors")["icm.step"])
    assert saved % 3 == 0
    steps = ["--set", f"train.steps={saved + 1}", "--set", "train.save_every=3"]
    assert train(config, out, *steps, "--resume").exit_code == 0
    assert train(config, tmp_path / "whole", *steps).exit_code == 0
    assert same_weights(out / "last.safetensors", tmp_path / "whole" / "last.safetensors")
    assert [row["step"] for row in log(out)] == [str(step + 1) for step in range(saved + 1)]


def test_signal_interrupts_validation(config: Path, out: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(config, validation={"images": str(data / "images"), "alphas": str(data / "alphas"), "rounds": 50})
    infer, batches = Predictor.matte_frames, 0

    def stopped_at_the_second(self: Predictor, *args: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 2:
            signal.raise_signal(signal.SIGTERM)
        return infer(self, *args)

    monkeypatch.setattr(Predictor, "matte_frames", stopped_at_the_second)
    done = train(config, out, "--set", "train.validate_every=1")
    assert done.exit_code == 143, done.output
    assert "validation was interrupted" in done.stderr
    assert batches < 10
    assert int(metadata(out / "last.safetensors")["icm.step"]) < 4


def test_preview_of_invalid_data_gives_a_message(config: Path, out: Path, data: Path) -> None:
    for path in (data / "images").rglob("*.jpg"):
        cv2.imwrite(str(path), read(path)[:40])
    done = train(config, out, preview=2)
    assert done.exit_code == 1
    assert "expected the same size" in done.stderr
