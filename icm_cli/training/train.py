"""``icm_cli.train``: the training loop, read top to bottom. The body of the ``icm train`` command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from icm_cli.environment import DEFAULT_WORKERS
from icm_cli.errors import UsageError
from icm_cli.events import BestStep, SecondaryProcessListener, TrainingListener, TrainingStatistics, TrainingSummary
from icm_cli.model.packing import pack_checkpoint
from icm_cli.signals import StopSignals
from icm_cli.training.batches import Batch
from icm_cli.training.data.pool import Pool, read_pool
from icm_cli.training.guards import check_answer, check_gradients, check_losses, check_skipped
from icm_cli.training.learner import Learner
from icm_cli.training.log import RunLog
from icm_cli.training.preview import write_preview
from icm_cli.training.run_folder import Progress, RunFolder
from icm_cli.training.settings import Settings, TrainConfig, read_settings
from icm_cli.training.stages import make_stage
from icm_cli.training.stages.contract import AnyStage
from icm_cli.training.state import BEST_NAME, LAST_NAME
from icm_cli.training.step_stats import StepStats
from icm_cli.training.validation import check_validation, validate

MOST_SKIPS_NAMED = 20
"""Unreadable draws named one by one."""


def train(
    config: str | Path,
    *,
    data: str | Path | None = None,
    out: str | Path | None = None,
    checkpoint: str | Path | None = None,
    weights: str | None = None,
    device: str = "auto",
    workers: int = DEFAULT_WORKERS,
    overrides: Sequence[str] = (),
    resume: bool = False,
    preview: int = 0,
    pack: str | Path | None = None,
    offline: bool = False,
    listener: TrainingListener | None = None,
) -> TrainingSummary:
    """Train a model by the recipe of a configuration (Guo et al. 2024, section 4), saving as it goes.

    The arguments are the options of ``icm train`` (see its help); ``overrides`` are those of ``--set``. ``preview``
    above 0 writes a contact sheet of so many samples, and nothing is trained. A signal (Ctrl-C, SIGTERM) takes effect
    once the step in hand is saved; ``resume`` goes on with the very next one.

    Raises UsageError, ConfigError, OutputError, or TrainingError where training cannot go on.
    """
    listener = listener or TrainingListener()
    if workers < 0:
        raise UsageError(f"workers is {workers}; expected 0 or more")
    settings = read_settings(config, data, overrides)
    if out is not None and not str(out):
        raise UsageError("the output folder is empty; give --out a folder for checkpoints and logs")
    folder = Path(out or f"runs/{Path(config).stem}")
    pool = read_pool(settings.data, settings.train.pairs)
    stage = make_stage(settings, pool)
    if preview:
        write_preview(folder / "preview.png", stage, preview)
        summary = TrainingSummary(folder, preview=folder / "preview.png")
        listener.on_training_end(summary)
        return summary
    start = Path(checkpoint) if checkpoint else None
    options = {"config": config, "data": data, "out": folder, "checkpoint": checkpoint, "weights": weights}
    command = _command(options, overrides)
    run = RunFolder(folder, settings, pool, overrides=overrides, checkpoint=start, command=command)
    run.check(resume=resume)
    with run.locked():
        learner = Learner(
            settings, stage, checkpoint=start, weights=weights, device=device, offline=offline, workers=workers
        )
        told = listener if learner.is_main else SecondaryProcessListener(listener)
        summary = _take_steps(settings, stage, pool, learner, run, told, resume=resume)
        if pack is not None and summary.checkpoint is not None and learner.is_main:
            pack_checkpoint(summary.checkpoint, Path(pack))
            summary = replace(summary, pack=Path(pack))
    if learner.is_main:
        listener.on_training_end(summary)
    return summary


def _take_steps(
    settings: Settings,
    stage: AnyStage,
    pool: Pool,
    learner: Learner,
    run: RunFolder,
    listener: TrainingListener,
    *,
    resume: bool,
) -> TrainingSummary:
    """Every step from the first that is not done yet, to the last or a signal."""
    recipe = settings.train
    _check_data(settings, pool, learner, run, listener)
    if learner.accelerator.mixed_precision != recipe.precision:
        listener.on_notice("this CPU is slower in bfloat16 than in float32, which is used")
    done = begun = run.resume(learner) if resume else Progress()
    if resume and not done.step:
        listener.on_notice(f"{run.folder} holds no run yet; this one begins there")
    stage.prepare(learner, run.folder, done.step, listener)
    listener.on_training_start(done.step, None if recipe.minutes else recipe.steps, recipe.batch_size)
    batches = stage.batches(
        learner.sampler(done.step), workers=learner.workers, pin=learner.device.torch_device.type == "cuda"
    )
    stats, loss = StepStats(), None
    log = RunLog(run.folder, stage.terms, done.step, listener.on_notice, is_main=learner.is_main)
    with StopSignals() as stop, log, learner.explain_errors(), listener.training_steps():
        is_last = learner.any_process(_is_over(recipe, done))
        while not is_last:
            rate = learner.set_rates(done.step, _elapsed(recipe, done))
            skipped, batch = _take_step(stage, learner, batches, stats, run, done, listener)
            done = Progress(done.step + 1, skipped, begun.seconds + stats.seconds)
            is_stopped = learner.any_process(stop.received is not None)
            is_last = is_stopped or learner.any_process(_is_over(recipe, done))
            listener.on_step_end(done.step)
            if done.step % recipe.log_every == 0 or is_last:
                figures = learner.mean(stats.figures(rate))
                loss = figures["loss"]
                log.row(done.step, figures)
                listener.on_log(done.step, figures)
            with stats.paused():
                if learner.is_main and done.step % recipe.image_every == 0:
                    with learner.inference_mode():
                        log.picture(done.step, stage.panel(learner, batch))
                is_due = done.step % recipe.validate_every == 0 or (is_last and not is_stopped)
                if learner.is_main and (done.step % recipe.save_every == 0 or is_due or is_last):
                    run.save(learner, done)
                if learner.is_main and is_due and stop.received is None:
                    _validate(settings, learner, run, done, log, stop, listener)
    return _summary(run, learner, stats, done, loss)


def _take_step(
    stage: AnyStage,
    learner: Learner,
    batches: Iterator[Batch],
    stats: StepStats,
    run: RunFolder,
    done: Progress,
    listener: TrainingListener,
) -> tuple[int, Batch]:
    """One step, over as many micro-batches as make a batch; returns draws skipped so far, and the last micro-batch."""
    step, skipped, norm = done.step + 1, done.skipped, 0.0
    torch.manual_seed(learner.config.seed + done.step)  # of a model's own randomness, if it has any
    for _ in range(learner.accumulation):
        batch = stats.next_batch(batches).to(learner.device.torch_device)
        skipped = _count_skipped(batch, skipped, learner, listener)
        with learner.accumulate():
            answer = stage.answer(learner.forward, batch)
            check_answer(answer, batch, step, run)
            terms = stage.losses(answer, batch)
            check_losses(terms, batch, step, run)
            learner.backward(terms["total"].sum())
            norm += learner.clip()  # 0 until the gradients are complete
            check_gradients(norm, batch, step, run, has_scaler=learner.has_scaler)
            learner.step()
        stats.add(terms)
    learner.ema.update(done.step)
    stats.stepped(norm)
    return skipped, batch


def _validate(
    settings: Settings,
    learner: Learner,
    run: RunFolder,
    done: Progress,
    log: RunLog,
    stop: StopSignals,
    listener: TrainingListener,
) -> None:
    """Score the model where there is something to validate on, and keep it if it is the best so far."""
    if settings.data.validation is None:
        return
    scores = validate(settings.data.validation, learner, is_stopped=lambda: stop.received is not None)
    if scores is None:
        listener.on_notice(f"step {done.step}: validation was cut short or scored nothing")
        return
    figures = {f"validation_{name}": value for name, value in scores.items()}
    log.row(done.step, figures)
    is_best = run.save_best(learner, done.step, scores["mse"])
    run.save(learner, done)
    listener.on_validation_end(done.step, figures, is_best=is_best)


def _check_data(settings: Settings, pool: Pool, learner: Learner, run: RunFolder, listener: TrainingListener) -> None:
    """Say what is wrong with the data, and learn what the main process alone must know. Raises UsageError."""
    if not learner.is_main:
        return
    for problem in pool.problems:
        listener.on_problem(problem)
    if settings.data.validation is not None:
        check_validation(settings.data.validation, pool.images, listener.on_notice)
    listener.on_detail(f"hashing {len(pool.images)} training images")
    run.hash_images(listener.on_notice)


def _count_skipped(batch: Batch, skipped: int, learner: Learner, listener: TrainingListener) -> int:
    """Name unreadable draws; returns their number so far. Raises TrainingError where there are too many."""
    for reason in batch.skipped:
        skipped += 1
        if skipped <= MOST_SKIPS_NAMED:
            listener.on_notice(f"skipped: {reason}")
    if batch.skipped:
        drawn = (max(batch.counters) + 1) // learner.accelerator.num_processes + skipped
        check_skipped(skipped, drawn, batch.skipped[-1])
    return skipped


def _elapsed(recipe: TrainConfig, done: Progress) -> float | None:
    """The share of the run's minutes that has passed, None where steps decide."""
    return None if recipe.minutes is None else min(1.0, done.seconds / (60.0 * recipe.minutes))


def _is_over(recipe: TrainConfig, done: Progress) -> bool:
    elapsed = _elapsed(recipe, done)
    return done.step >= recipe.steps if elapsed is None else elapsed >= 1.0


def _summary(run: RunFolder, learner: Learner, stats: StepStats, done: Progress, loss: float | None) -> TrainingSummary:
    """Sum up how the run ended."""
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


def _command(options: Mapping[str, object], overrides: Sequence[str]) -> str:
    """The command line that all this is."""
    given = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    return shlex.join(["icm", "train", *given, *(part for each in overrides for part in ("--set", each))])
