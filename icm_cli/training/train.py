"""``icm_cli.train``: train a model. The command ``icm train`` calls it. The loop is :meth:`_TrainingLoop.run_steps`."""

from __future__ import annotations

import atexit
import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from icm_cli.datasets.groups import Sample, group_samples
from icm_cli.datasets.registry import find_dataset
from icm_cli.device import is_main_process, process_count
from icm_cli.environment import limited_threads
from icm_cli.errors import ImageError, TrainingError, UsageError, format_count, list_first
from icm_cli.evaluation.evaluate import evaluate
from icm_cli.events import (
    BestStep,
    Listener,
    SecondaryProcessListener,
    TrainingListener,
    TrainingStatistics,
    TrainingSummary,
    check_argument,
)
from icm_cli.files.atomic_writes import atomic_write
from icm_cli.geometry import HALF_U8
from icm_cli.images.reading import read_alpha
from icm_cli.model.packing import pack_checkpoint
from icm_cli.options import TrainOptions, keyword_arguments
from icm_cli.reports.contact_sheet import make_captioned_row, make_thumbnail
from icm_cli.reports.result import ImageResult
from icm_cli.signals import StopSignals
from icm_cli.training.batches import Batch, check_skipped_fraction
from icm_cli.training.data.pool import explain_data_error, read_pool
from icm_cli.training.learner import Learner
from icm_cli.training.log import RunLog, SkippedLog, StepStats
from icm_cli.training.run_folder import BEST_NAME, LAST_NAME, RunFolder, RunProgress
from icm_cli.training.settings import Settings, ValidationConfig, read_settings
from icm_cli.training.stages import AnyStage, make_stage

MIN_DRAWS_PER_IMAGE = 3
"""Alphas without an object are reported after this many draws per image, when nearly all images were drawn."""
MAX_LISTED_ALPHAS = 5
"""Number of alphas without an object that the notice names."""
MAX_LOSS = 1e4
"""A sample whose loss is above this ends the run, as in the code released with the paper."""


@keyword_arguments(TrainOptions)
@limited_threads()
def train(options: TrainOptions, *, listener: TrainingListener | None = None) -> TrainingSummary:
    """Train a model by the recipe of a configuration (Guo et al. 2024, section 4), saving regularly.

    The option ``overrides`` contains settings such as ``train.steps=500``. With the option ``preview`` above 0, a
    contact sheet of that many samples is written and nothing is trained. A signal (Ctrl-C, SIGTERM) ends the run after
    the current step is saved; the option ``resume`` continues with the next step.

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
        preview = folder / "preview.png"
        _write_preview(preview, stage, training.preview)
        summary = TrainingSummary(folder, preview=preview)
        listener.on_training_end(summary)
        return summary
    run = RunFolder(folder, settings, pool, options)
    run.prepare_folder(resume=training.resume)
    with run.lock():
        if is_main_process():
            if settings.data.validation is not None:
                check_validation(settings.data.validation, pool.image_paths, listener.on_notice)
            listener.on_detail("computing the digests of the training images and alphas")
            run.record_data(listener.on_notice)
        learner = Learner(settings, stage.trainable_parts, stage.select_module, training.checkpoint, options.device)
        process_listener = listener if learner.is_main else SecondaryProcessListener(listener)
        summary = _TrainingLoop(settings, stage, learner, run, process_listener).run_steps(resume=training.resume)
        if training.pack is not None and summary.checkpoint is not None and learner.is_main:
            pack_checkpoint(summary.checkpoint, training.pack)
            summary = replace(summary, pack=training.pack)
    if process_count() > 1:  # otherwise threads of the process group can abort a process at its exit
        atexit.register(learner.accelerator.state.destroy_process_group)
    if learner.is_main:
        listener.on_training_end(summary)
    return summary


class _TrainingLoop:
    """Trains from the first step not done yet until the run is finished or a signal arrives."""

    def __init__(
        self, settings: Settings, stage: AnyStage, learner: Learner, run: RunFolder, listener: TrainingListener
    ) -> None:
        self._settings = settings
        self._recipe = settings.train
        self._stage = stage
        self._learner = learner
        self._run = run
        self._listener = listener
        self._progress = RunProgress()
        self._skipped_log = SkippedLog(run.folder, listener.on_notice)
        self._loss: float | None = None
        """Mean loss of the last logged steps."""
        self._empty_alphas: set[Path] | None = set()
        """Alphas without an object that were drawn; None after they were reported."""

    def run_steps(self, *, resume: bool) -> TrainingSummary:
        """Take all steps. Log, validate and save when this is due."""
        recipe, learner, run, listener = self._recipe, self._learner, self._run, self._listener
        if learner.accelerator.mixed_precision != recipe.precision:
            listener.on_notice("this CPU is slower in bfloat16 than in float32, so float32 is used")
        start = self._progress = run.resume_run(learner) if resume else RunProgress()
        if resume and not start.step:
            listener.on_notice(f"no step is saved in {run.folder} yet; training starts at step 1")
        is_done = learner.is_true_anywhere(self._is_finished)
        if is_done:
            listener.on_notice(f"all {start.step} steps of the run in {run.folder} are done; nothing is left to train")
        else:
            self._stage.prepare(learner, run.folder, start.step, listener)
            listener.on_training_start(start.step, None if recipe.minutes else recipe.steps, recipe.batch_size)
        batches = self._stage.make_batches(learner, start.step)
        self._stats = stats = StepStats()
        self._log = log = RunLog(
            run.folder, self._stage.loss_names, start.step, listener.on_notice, is_main=learner.is_main
        )
        with StopSignals() as stop, log, learner.explain_errors(), listener.training_steps():
            while not is_done:
                learning_rate = learner.set_learning_rates(self._progress.step, self._elapsed_fraction)
                batch, skipped = self._take_step(batches)
                self._progress = RunProgress(self._progress.step + 1, skipped, start.seconds + stats.seconds)
                is_stopped = learner.is_true_anywhere(stop.received is not None)
                is_done = is_stopped or learner.is_true_anywhere(self._is_finished)
                listener.on_step_end(self._progress.step)
                if is_done or stats.samples >= MIN_DRAWS_PER_IMAGE * len(self._stage.pool):
                    self._report_empty_alphas()
                if is_done or self._is_due_every(recipe.log_every):
                    self._log_metrics(learning_rate)
                if learner.is_main:
                    with stats.pause():
                        self._save_and_validate(batch, stop, is_done=is_done, is_stopped=is_stopped)
        return self._summarise()

    def _is_due_every(self, steps: int) -> bool:
        """Return whether the number of the last step is a multiple of ``steps``."""
        return self._progress.step % steps == 0

    def _log_metrics(self, learning_rate: float) -> None:
        """Log the mean metrics of the steps since the last call."""
        step = self._progress.step
        metrics = self._learner.average_over_processes(self._stats.take_metrics(learning_rate))
        self._loss = metrics["loss"]
        self._log.write_metrics(step, metrics)
        self._listener.on_log(step, metrics)

    def _save_and_validate(self, batch: Batch, stop: StopSignals, *, is_done: bool, is_stopped: bool) -> None:
        """Do what is due after a step: log an image of its batch, save the run, and validate.

        All of it is due at a regular end. A run that was stopped is saved, but not validated.
        """
        recipe = self._recipe
        must_validate = self._is_due_every(recipe.validate_every) or (is_done and not is_stopped)
        needs_first_image = must_validate and not self._log.has_image
        if needs_first_image or self._is_due_every(recipe.image_every):
            with self._learner.inference_mode():
                self._log.write_image(self._progress.step, self._stage.render_panel(self._learner, batch))
        if must_validate or is_done or self._is_due_every(recipe.save_every):
            self._run.save_progress(self._learner, self._progress)
        if must_validate and stop.received is None:
            self._validate(stop)

    def _take_step(self, batches: Iterator[Batch]) -> tuple[Batch, int]:
        """Take one optimiser step over all of its micro-batches.

        Returns the last micro-batch, and the number of draws skipped since the run began.
        """
        learner, stage = self._learner, self._stage
        skipped, norm = self._progress.skipped, 0.0
        torch.manual_seed(self._recipe.seed + self._progress.step)  # for models that draw random numbers themselves
        for _ in range(learner.accumulation):
            batch = self._stats.take_next_batch(batches).to(learner.device.torch_device)
            skipped = self._report_skipped(batch, skipped)
            if self._empty_alphas is not None:
                self._empty_alphas.update(batch.empty_alphas)
            with learner.accumulate_gradients():
                prediction = stage.predict(learner.forward, batch)
                self._check_predictions(prediction, batch)
                losses = stage.compute_losses(prediction, batch)
                self._check_losses(losses["total"].detach(), batch)
                learner.backward(losses["total"].sum())
                norm += learner.clip_gradients()  # 0 except after the last micro-batch
                # With fp16, gradients may overflow: the loss scaler then skips the step.
                if not math.isfinite(norm) and learner.accelerator.scaler is None:
                    advice = "reduce train.learning_rate or set train.precision to no"
                    raise self._divergence("the gradients are NaN or infinite", batch.names, batch, advice)
                learner.step_optimiser()
            self._stats.add_losses(losses)
        learner.ema.update(self._progress.step)
        self._stats.finish_step(norm)
        return batch, skipped

    def _check_predictions(self, predictions: Sequence[Tensor], batch: Batch) -> None:
        """Check that the model's outputs, [B,...] each, are finite. Raises TrainingError."""
        rows = [output.detach().reshape(len(output), -1) for output in predictions]
        is_bad = torch.stack([~row.isfinite().all(dim=1) for row in rows]).any(dim=0)
        if bool(is_bad.any()):
            names = [batch.names[i] for i in torch.nonzero(is_bad).flatten().tolist()]
            advice = "reduce train.learning_rate or set train.clip_norm"
            raise self._divergence("the model's output is NaN or infinite", names, batch, advice)

    def _check_losses(self, total: Tensor, batch: Batch) -> None:
        """Check that the total loss of every sample, [B], is at most MAX_LOSS and not NaN. Raises TrainingError."""
        is_bad = ~(total <= MAX_LOSS)  # also true for NaN
        if bool(is_bad.any()):
            names = [f"{batch.names[i]} ({float(total[i]):g})" for i in torch.nonzero(is_bad).flatten().tolist()]
            advice = "inspect these samples, or reduce train.learning_rate"
            raise self._divergence(f"the loss is NaN or above {MAX_LOSS:g}", names, batch, advice)

    def _divergence(self, problem: str, names: Sequence[str], batch: Batch, advice: str) -> TrainingError:
        """Save the batch for inspection, and return the error that names the step and the samples."""
        step = self._progress.step + 1
        return TrainingError(
            f"step {step}: {problem} for {'; '.join(names)}. The batch is in {self._run.save_batch(batch, step)}, and "
            f"the last saved state is kept; {advice}"
        )

    def _report_skipped(self, batch: Batch, skipped: int) -> int:
        """Report unreadable draws and return their number so far. Raises TrainingError if there are too many."""
        self._skipped_log.report(batch.skipped)
        skipped += len(batch.skipped)
        # Samples are numbered over all processes, and this process makes an equal part of them.
        samples = (max(batch.sample_numbers) + 1) // self._learner.accelerator.num_processes
        if batch.skipped:
            check_skipped_fraction(skipped, samples + skipped, batch.skipped[-1])
        return skipped

    def _report_empty_alphas(self) -> None:
        """Report once the alphas without an object. Such an image may be meant as one that does not show the object."""
        alphas, self._empty_alphas = sorted(self._empty_alphas or ()), None
        if alphas:
            self._listener.on_notice(
                f"{format_count(len(alphas), 'alpha')} without an object: {list_first(alphas, MAX_LISTED_ALPHAS)}; the "
                "model learns that these images do not show the object of their group; if they show it, correct the "
                "alphas, or exclude the images with 'exclude'"
            )

    def _validate(self, stop: StopSignals) -> None:
        """Score the last checkpoint on the validation data, if there are any; keep it if it is the best so far."""
        config, run, step = self._settings.data.validation, self._run, self._progress.step
        if config is None:
            return
        scores = validate(config, run.folder / LAST_NAME, self._learner, is_stopped=lambda: stop.received is not None)
        if scores is None:
            self._listener.on_notice(f"step {step}: validation was interrupted or scored no image")
            return
        metrics = {f"validation_{name}": value for name, value in scores.items()}
        self._log.write_metrics(step, metrics)
        is_best = run.save_best(self._learner, step, scores["mse"])
        run.save_progress(self._learner, self._progress)
        self._listener.on_validation_end(step, metrics, is_best=is_best)

    @property
    def _elapsed_fraction(self) -> float | None:
        """Fraction (0..1) of the run's time limit that has passed, None without a time limit."""
        minutes = self._recipe.minutes
        return None if minutes is None else min(1.0, self._progress.seconds / (60.0 * minutes))

    @property
    def _is_finished(self) -> bool:
        """Whether all steps are done, or the time limit has passed."""
        elapsed = self._elapsed_fraction
        if elapsed is not None:
            return elapsed >= 1.0
        return self._progress.step >= self._recipe.steps

    def _summarise(self) -> TrainingSummary:
        """Return the result of the run."""
        run, stats, learner = self._run, self._stats, self._learner
        checkpoint = run.folder / (BEST_NAME if run.best else LAST_NAME)
        samples = stats.samples * learner.accelerator.num_processes
        seconds = max(1e-9, stats.seconds)
        return TrainingSummary(
            folder=run.folder,
            steps=self._progress.step,
            loss=self._loss,
            best=BestStep(int(run.best["step"]), run.best["mse"]) if run.best else None,
            statistics=TrainingStatistics(
                seconds=stats.seconds,
                samples_per_second=samples / seconds,
                waiting_fraction=stats.waiting / seconds,
                skipped=self._progress.skipped,
                peak_memory_bytes=learner.device.peak_memory_bytes(),
            ),
            checkpoint=checkpoint if checkpoint.exists() else None,
        )


def _write_preview(path: Path, stage: AnyStage, count: int) -> None:
    """Write a contact sheet of the first samples, one row each. Raises OutputError, TrainingError or ImageError."""
    rows = []
    for number in range(count):
        name, cells = stage.preview_sample(number)
        rows.append(make_captioned_row([make_thumbnail(cell) for cell in cells], f"{number}: {name}"))
    with atomic_write(path) as file:
        Image.fromarray(np.concatenate(rows)).save(file, format="PNG")


def check_validation(config: ValidationConfig, images: Sequence[Path], notice: Callable[[str], None]) -> None:
    """Check that images can be scored, and report those that are also trained on. Raises UsageError."""
    try:
        dataset = find_dataset(config.dataset, config.root, split=config.split, composite=False, **config.path_options)
    except UsageError as error:
        raise explain_data_error("validation", error) from error
    if not any(_can_be_scored(samples) for samples in group_samples(dataset.samples).values()):
        raise UsageError(
            "data: validation: no group has two images, one of which could be a reference (its alpha is not empty); "
            "expected a subfolder with several images for each object, or 'groups' that list the images of each object"
        )
    trained_on = {path.resolve() for path in images}
    shared = sum(sample.file.resolve() in trained_on for sample in dataset.samples)
    if shared:
        notice(
            f"{shared} of the {len(dataset.samples)} validation images are also trained on, so their scores are too "
            "good"
        )


def _can_be_scored(samples: Sequence[Sample]) -> bool:
    """Return whether a group has two images, and a readable alpha that is not empty."""
    if len({sample.image for sample in samples}) < 2:
        return False
    for sample in samples:
        with contextlib.suppress(ImageError):
            if (read_alpha(sample.alpha) > HALF_U8).any():
                return True
    return False


def validate(
    config: ValidationConfig, checkpoint: Path, learner: Learner, *, is_stopped: Callable[[], bool]
) -> dict[str, float] | None:
    """Score a checkpoint as ``icm eval --checkpoint`` does; return the mean metrics of an image ("mse", "sad", ...).

    The model in training is not used, because its dtypes and its random numbers may differ from those of ``icm eval``.
    The metrics are those of the first region. Returns None if no image was scored or validation was interrupted.
    """
    try:
        report = evaluate(
            config.dataset,
            config.root,
            **config.path_options,
            split=config.split,
            size=config.size,
            rounds=config.rounds,
            checkpoint=checkpoint,
            weights=learner.separate_weights,
            device=str(learner.device.torch_device),
            offline=learner.offline,
            listener=_InterruptingListener(is_stopped),
        )
    except _Stopped:
        return None
    if not report.means:
        return None
    means_of_first_region = next(iter(report.means.values()))
    return {name: mean.mean for name, mean in means_of_first_region.metrics.items() if name != "dt_ssd"}


class _Stopped(KeyboardInterrupt):
    """Interrupts validation after a signal. As with KeyboardInterrupt, writes in progress are completed."""


class _InterruptingListener(Listener):
    """Interrupts an evaluation after an image if ``is_stopped`` returns True.

    It does so only once, because the images in progress are completed and reported afterwards.
    """

    def __init__(self, is_stopped: Callable[[], bool]) -> None:
        self._is_stopped = is_stopped
        self._has_raised = False

    def on_image_end(self, result: ImageResult) -> None:  # noqa: ARG002
        if self._is_stopped() and not self._has_raised:
            self._has_raised = True
            raise _Stopped
