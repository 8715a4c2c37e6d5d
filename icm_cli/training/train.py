"""``icm_cli.train``: the training loop, to be read from top to bottom. The body of the ``icm train`` command."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from icm_cli.device import is_main_process
from icm_cli.environment import DEFAULT_WORKERS, limited_threads
from icm_cli.errors import TrainingError
from icm_cli.events import (
    BestStep,
    SecondaryProcessListener,
    TrainingListener,
    TrainingStatistics,
    TrainingSummary,
    check_argument,
)
from icm_cli.files import atomic_write
from icm_cli.model.packing import pack_checkpoint
from icm_cli.options import TrainOptions, keyword_arguments
from icm_cli.reports.contact_sheet import make_captioned_row, make_thumbnail
from icm_cli.signals import StopSignals
from icm_cli.training.batches import Batch
from icm_cli.training.data.pool import TrainingPool, read_pool
from icm_cli.training.learner import Learner
from icm_cli.training.log import RunLog, StepStats
from icm_cli.training.run_folder import BEST_NAME, LAST_NAME, RunFolder, RunProgress
from icm_cli.training.settings import Settings, TrainConfig, read_settings
from icm_cli.training.stages import AnyStage, make_stage
from icm_cli.training.validation import check_validation, validate

MAX_REPORTED_SKIPS = 20
"""Number of unreadable draws that are reported one by one."""
MAX_LOSS = 1e4
"""A sample whose loss is above this ends the run (released code)."""
MAX_SKIPPED_FRACTION = 0.01
"""Largest fraction of draws that may be unreadable."""
MIN_DRAWS_TO_JUDGE = 100
"""Number of draws from which that fraction is checked."""


@keyword_arguments(TrainOptions)
@limited_threads()
def train(options: TrainOptions, *, listener: TrainingListener | None = None) -> TrainingSummary:
    """Train a model by the recipe of a configuration (Guo et al. 2024, section 4), saving regularly.

    ``overrides`` are settings such as ``train.steps=500``. With ``preview`` above 0 a contact sheet of
    that many samples is written and nothing is trained. A signal (Ctrl-C, SIGTERM) ends the run after
    the current step is saved; ``resume`` continues with the next step.

    Raises UsageError, ConfigError or OutputError, and TrainingError if training cannot continue.
    """
    listener = check_argument(listener, TrainingListener, "listener")
    training = options.training
    settings = read_settings(training.config, training.data, training.overrides)
    folder = Path(training.out or f"runs/{Path(training.config).stem}")
    pool = read_pool(settings.data)
    stage = make_stage(settings, pool)
    if is_main_process():
        for problem in pool.problems:
            listener.on_problem(problem)
    if training.preview:
        _write_preview(folder / "preview.png", stage, training.preview)
        summary = TrainingSummary(folder, preview=folder / "preview.png")
        listener.on_training_end(summary)
        return summary
    run = RunFolder(
        folder,
        settings,
        pool,
        overrides=training.overrides,
        checkpoint=training.checkpoint,
        command=_command_line(options, folder),
    )
    run.check_folder(resume=training.resume)
    with run.lock():
        if is_main_process():
            _check_data(settings, pool, run, listener)
        learner = Learner(
            settings,
            stage.trainable_parts,
            stage.select_module,
            checkpoint=training.checkpoint,
            weights=options.device.weights,
            device=options.device.device,
            offline=options.device.offline,
            workers=DEFAULT_WORKERS if options.device.workers is None else options.device.workers,
        )
        process_listener = listener if learner.is_main else SecondaryProcessListener(listener)
        summary = _run_steps(settings, stage, learner, run, process_listener, resume=training.resume)
        if training.pack is not None and summary.checkpoint is not None and learner.is_main:
            pack_checkpoint(summary.checkpoint, training.pack)
            summary = replace(summary, pack=training.pack)
    if learner.is_main:
        listener.on_training_end(summary)
    return summary


def _run_steps(
    settings: Settings,
    stage: AnyStage,
    learner: Learner,
    run: RunFolder,
    listener: TrainingListener,
    *,
    resume: bool,
) -> TrainingSummary:
    """Train from the first step not done yet until the run is finished or a signal arrives."""
    recipe = settings.train
    if learner.accelerator.mixed_precision != recipe.precision:
        listener.on_notice("this CPU is slower in bfloat16 than in float32, so float32 is used")
    done = begun = run.resume_run(learner) if resume else RunProgress()
    if resume and not done.step:
        listener.on_notice(f"no step is saved in {run.folder} yet; training starts at step 1")
    stage.prepare(learner, run.folder, done.step, listener)

    listener.on_training_start(done.step, None if recipe.minutes else recipe.steps, recipe.batch_size)
    batches = stage.make_batches(
        learner.make_sampler(done.step), workers=learner.workers, pin=learner.device.torch_device.type == "cuda"
    )
    stats, loss = StepStats(), None
    log = RunLog(run.folder, stage.loss_names, done.step, listener.on_notice, is_main=learner.is_main)
    with StopSignals() as stop, log, learner.explain_errors(), listener.training_steps():
        is_last = learner.is_true_anywhere(_is_finished(recipe, done))
        while not is_last:
            learning_rate = learner.set_learning_rates(done.step, _elapsed_fraction(recipe, done))
            skipped, batch = _train_step(stage, learner, batches, stats, run, done, listener)
            done = RunProgress(done.step + 1, skipped, begun.seconds + stats.seconds)
            is_stopped = learner.is_true_anywhere(stop.received is not None)
            is_last = is_stopped or learner.is_true_anywhere(_is_finished(recipe, done))
            listener.on_step_end(done.step)
            if done.step % recipe.log_every == 0 or is_last:
                metrics = learner.average_over_processes(stats.take_metrics(learning_rate))
                loss = metrics["loss"]
                log.write_metrics(done.step, metrics)
                listener.on_log(done.step, metrics)
            with stats.pause():
                is_due = done.step % recipe.validate_every == 0 or (is_last and not is_stopped)
                if learner.is_main and (done.step % recipe.image_every == 0 or (is_due and not log.has_image)):
                    with learner.inference_mode():
                        log.write_image(done.step, stage.render_panel(learner, batch))
                if learner.is_main and (done.step % recipe.save_every == 0 or is_due or is_last):
                    run.save_progress(learner, done)
                if learner.is_main and is_due and stop.received is None:
                    _validate(settings, learner, run, done, log, stop, listener)
    return _summarise(run, learner, stats, done, loss)


def _train_step(
    stage: AnyStage,
    learner: Learner,
    batches: Iterator[Batch],
    stats: StepStats,
    run: RunFolder,
    done: RunProgress,
    listener: TrainingListener,
) -> tuple[int, Batch]:
    """Take one step over all of its micro-batches; return the draws skipped so far and the last micro-batch."""
    step, skipped, norm = done.step + 1, done.skipped, 0.0
    torch.manual_seed(learner.config.seed + done.step)  # for models that draw random numbers themselves
    for _ in range(learner.accumulation):
        batch = stats.take_next_batch(batches).to(learner.device.torch_device)
        skipped = _report_skipped(batch, skipped, learner, listener)
        with learner.accumulate_gradients():
            prediction = stage.predict(learner.forward, batch)
            _check_predictions(prediction, batch, step, run)
            losses = stage.compute_losses(prediction, batch)
            _check_losses(losses, batch, step, run)
            learner.backward(losses["total"].sum())
            norm += learner.clip_gradients()  # 0 until the gradients are complete
            _check_gradients(norm, batch, step, run, has_scaler=learner.has_scaler)
            learner.step_optimiser()
        stats.add_losses(losses)
    learner.ema.update(done.step)
    stats.finish_step(norm)
    return skipped, batch


def _check_predictions(predictions: Sequence[Tensor], batch: Batch, step: int, run: RunFolder) -> None:
    """Check that the model's outputs, [B,...] each, are finite.

    Otherwise saves the batch and raises TrainingError that names the step and the samples.
    """
    rows = (each.detach()[:, None] if each.ndim == 1 else each.detach() for each in predictions)
    is_bad = torch.stack([~each.isfinite().flatten(1).all(dim=1) for each in rows]).any(dim=0)
    if bool(is_bad.any()):
        bad_names = [batch.names[i] for i in torch.nonzero(is_bad).flatten().tolist()]
        raise TrainingError(
            f"step {step}: the model's output is NaN or infinite for {'; '.join(bad_names)}, so training diverged. The "
            f"batch is in {run.save_batch(batch, step)}, and the last saved state is kept; reduce train.learning_rate "
            "or set train.clip_norm"
        )


def _check_losses(losses: Mapping[str, Tensor], batch: Batch, step: int, run: RunFolder) -> None:
    """Check that the total loss of every sample is at most MAX_LOSS and not NaN.

    Otherwise saves the batch and raises TrainingError that names the step and the samples.
    """
    total = losses["total"].detach()
    is_bad = ~(total <= MAX_LOSS)  # also true for NaN
    if not bool(is_bad.any()):
        return
    bad_names = [f"{batch.names[i]} ({float(total[i]):g})" for i in torch.nonzero(is_bad).flatten().tolist()]
    raise TrainingError(
        f"step {step}: the loss is NaN or above {MAX_LOSS:g} for {'; '.join(bad_names)}. The batch is in "
        f"{run.save_batch(batch, step)}, and the last saved state is kept; inspect these samples, or reduce "
        "train.learning_rate"
    )


def _check_gradients(norm: float, batch: Batch, step: int, run: RunFolder, *, has_scaler: bool) -> None:
    """Check that the gradients are finite. Raises TrainingError; with a scaler (fp16) such steps are skipped."""
    if math.isfinite(norm) or has_scaler:
        return
    raise TrainingError(
        f"step {step}: the gradients are NaN or infinite for {'; '.join(batch.names)}. The batch is in "
        f"{run.save_batch(batch, step)}, and the last saved state is kept; reduce train.learning_rate or set "
        "train.precision to no"
    )


def _validate(
    settings: Settings,
    learner: Learner,
    run: RunFolder,
    done: RunProgress,
    log: RunLog,
    stop: StopSignals,
    listener: TrainingListener,
) -> None:
    """Score the model on the validation data, if there are any, and save it if it is the best so far."""
    if settings.data.validation is None:
        return
    checkpoint = run.folder / LAST_NAME
    scores = validate(settings.data.validation, checkpoint, learner, is_stopped=lambda: stop.received is not None)
    if scores is None:
        listener.on_notice(f"step {done.step}: validation was interrupted or scored no image")
        return
    metrics = {f"validation_{name}": value for name, value in scores.items()}
    log.write_metrics(done.step, metrics)
    is_best = run.save_best(learner, done.step, scores["mse"])
    run.save_progress(learner, done)
    listener.on_validation_end(done.step, metrics, is_best=is_best)


def _check_data(settings: Settings, pool: TrainingPool, run: RunFolder, listener: TrainingListener) -> None:
    """Check the validation data, and record the training data. Raises UsageError."""
    if settings.data.validation is not None:
        check_validation(settings.data.validation, pool.image_paths, listener.on_notice)
    listener.on_detail("computing the digests of the training images and alphas")
    run.record_data(listener.on_notice)


def _report_skipped(batch: Batch, skipped: int, learner: Learner, listener: TrainingListener) -> int:
    """Report unreadable draws and return their number so far. Raises TrainingError if there are too many."""
    for reason in batch.skipped:
        skipped += 1
        if skipped <= MAX_REPORTED_SKIPS:
            listener.on_notice(f"skipped: {reason}")
    if batch.skipped:
        drawn = (max(batch.counters) + 1) // learner.accelerator.num_processes + skipped
        if drawn >= MIN_DRAWS_TO_JUDGE and skipped > MAX_SKIPPED_FRACTION * drawn:
            raise TrainingError(
                f"{skipped} of {drawn} draws could not be read, more than {MAX_SKIPPED_FRACTION:.0%}; the last: "
                f"{batch.skipped[-1]}. Repair the data, or exclude files with 'exclude'"
            )
    return skipped


def _elapsed_fraction(recipe: TrainConfig, done: RunProgress) -> float | None:
    """Fraction (0..1) of the run's time limit that has passed, None without a time limit."""
    return None if recipe.minutes is None else min(1.0, done.seconds / (60.0 * recipe.minutes))


def _is_finished(recipe: TrainConfig, done: RunProgress) -> bool:
    elapsed = _elapsed_fraction(recipe, done)
    return done.step >= recipe.steps if elapsed is None else elapsed >= 1.0


def _summarise(
    run: RunFolder, learner: Learner, stats: StepStats, done: RunProgress, loss: float | None
) -> TrainingSummary:
    """Return the summary of a run that ended."""
    path = run.folder / (BEST_NAME if run.best else LAST_NAME)
    return TrainingSummary(
        folder=run.folder,
        steps=done.step,
        loss=loss,
        best=BestStep(int(run.best["step"]), run.best["mse"]) if run.best else None,
        statistics=TrainingStatistics(
            seconds=stats.total_seconds,
            samples_per_second=stats.total_samples * learner.accelerator.num_processes / max(1e-9, stats.total_seconds),
            waiting_fraction=stats.total_waiting / max(1e-9, stats.total_seconds),
            skipped=done.skipped,
            peak_memory_bytes=learner.device.peak_memory_bytes(),
        ),
        checkpoint=path if path.exists() else None,
    )


def _command_line(options: TrainOptions, folder: Path) -> str:
    """Return the command line that starts the same run, for the checkpoint."""
    training = options.training
    values = {"config": training.config, "data": training.data, "out": folder, "checkpoint": training.checkpoint}
    values["weights"] = options.device.weights
    given = [part for name, value in values.items() if value is not None for part in (f"--{name}", str(value))]
    return shlex.join(["icm", "train", *given, *(part for each in training.overrides for part in ("--set", each))])


def _write_preview(path: Path, stage: AnyStage, count: int) -> None:
    """Write a contact sheet of the first samples, one row each. Raises OutputError, TrainingError or ImageError."""
    rows = []
    for counter in range(count):
        name, cells = stage.preview_sample(counter)
        rows.append(make_captioned_row([make_thumbnail(cell) for cell in cells], f"{counter}: {name}"))
    with atomic_write(path) as file:
        Image.fromarray(np.concatenate(rows)).save(file, format="PNG")
