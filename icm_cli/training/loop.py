"""``icm_cli.train``: the training loop, read top to bottom. The body of the ``icm train`` command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from icm_cli.errors import UsageError
from icm_cli.runs import DEFAULT_WORKERS
from icm_cli.training.guards import check_alpha, check_gradients, check_losses
from icm_cli.training.items import read_pool
from icm_cli.training.keeper import Keeper
from icm_cli.training.learner import Learner
from icm_cli.training.listening import Summary, TrainingListener
from icm_cli.training.losses import losses
from icm_cli.training.meter import Meter
from icm_cli.training.preview import write_preview
from icm_cli.training.reporting import Reporter
from icm_cli.training.samples import Batch, SampleMaker, load_batches
from icm_cli.training.settings import TrainConfig, read_settings
from icm_cli.training.stopping import StopSignals


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
    offline: bool = False,
    listener: TrainingListener | None = None,
) -> Summary:
    """Train a model by the recipe of a configuration (Guo et al. 2024, section 4), saving as it goes.

    The arguments are the options of ``icm train`` (see its help); ``overrides`` are those of ``--set``. ``preview``
    above 0 writes a contact sheet of so many samples, and nothing is trained. A signal (Ctrl-C, SIGTERM) takes effect
    once the step in hand is saved; ``resume`` goes on with the very next one.

    Raises UsageError, ConfigError, OutputError, or TrainingError where training cannot go on.
    """
    hear = listener or TrainingListener()
    if workers < 0:
        raise UsageError(f"workers is {workers}; expected 0 or more")
    settings = read_settings(config, data, overrides)
    if out is not None and not str(out):
        raise UsageError("the output folder is empty; give --out a folder for checkpoints and logs")
    recipe, folder = settings.train, Path(out or f"runs/{Path(config).stem}")
    pool = read_pool(settings.data, recipe.pairs)
    maker = SampleMaker(pool, recipe)
    start = Path(checkpoint) if checkpoint else None
    if preview:
        sheet = folder / "preview.png"
        write_preview(sheet, [maker.sample(counter) for counter in range(preview)])
        summary = Summary(folder, preview=sheet)
        hear.training_finished(summary)
        return summary
    options = {"config": config, "data": data, "out": folder, "checkpoint": checkpoint, "weights": weights}
    command = _command(options, overrides)
    keeper = Keeper(folder, settings, pool, overrides=overrides, checkpoint=start, command=command)
    keeper.check(resume=resume)
    with keeper.held():
        learner = Learner(
            settings, checkpoint=start, weights=weights, device=device, offline=offline, notice=hear.notice
        )
        report = Reporter(learner, keeper, settings, pool, hear, resume=resume)
        share, is_gpu = learner.share(report.first_step), learner.device.place.type == "cuda"
        batches = load_batches(maker, share, workers=workers, pin=is_gpu)
        meter = Meter()
        with StopSignals() as stop, report, learner.explained():
            _take_steps(recipe, learner, batches, meter, report, keeper, stop)
        return report.summary(meter)


def _take_steps(
    recipe: TrainConfig,
    learner: Learner,
    batches: Iterator[Batch],
    meter: Meter,
    report: Reporter,
    keeper: Keeper,
    stop: StopSignals,
) -> None:
    """Every step from the first that is not done yet, to the last or a signal."""
    for step in range(report.first_step, recipe.steps):
        torch.manual_seed(recipe.seed + step)  # of a head's own randomness, if it has any
        rate = learner.set_rates(step)
        norm = 0.0
        for _ in range(learner.accumulation):
            batch = meter.next_batch(batches).to(learner.device.place)
            report.skipped(batch)
            with learner.accumulate():
                alpha = learner.alpha(batch)
                check_alpha(alpha, batch, step + 1, keeper)
                terms = losses(alpha, batch.truth(), batch.trimap_levels(), recipe.loss)
                check_losses(terms, batch, step + 1, keeper)
                learner.backward(terms["total"].sum())
                norm += learner.clip()  # 0 until the gradients are complete
                check_gradients(norm, batch, step + 1, keeper, has_scaler=learner.has_scaler)
                learner.step()
            meter.add(terms)
        learner.ema.update(step)
        meter.stepped(norm)
        is_stopped = learner.agree(stop.received is not None)
        report.after(step + 1, batch, meter, rate, stop, is_last=is_stopped or step + 1 == recipe.steps)
        if is_stopped:
            break


def _command(options: Mapping[str, object], overrides: Sequence[str]) -> str:
    """The command line that all this is."""
    given = [part for name, value in options.items() if value is not None for part in (f"--{name}", str(value))]
    return shlex.join(["icm", "train", *given, *(part for each in overrides for part in ("--set", each))])
