"""Matte a dataset in context: every group by its own references, in one stream through one model."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from icm_cli.datasets.groups import Sample
from icm_cli.errors import ImageError, Problem, UsageError
from icm_cli.evaluation.protocol import Evaluation, round_folder
from icm_cli.evaluation.rounds import Rounds, choose_references, group_notes, read_rounds, targets, write_rounds
from icm_cli.files import cache_folder, combined_digest, remove_stale_temporaries, write_error
from icm_cli.images.reading import read_alpha, read_source_image
from icm_cli.matting.engine import Engine, EngineOptions, keep_finished
from icm_cli.matting.jobs import Job
from icm_cli.matting.model_choice import AnyModel
from icm_cli.matting.near import shown
from icm_cli.matting.outcome import Outcome
from icm_cli.matting.predictor import Predictor
from icm_cli.matting.references import Reference, make_guidance
from icm_cli.matting.shot import Key, Shot, described
from icm_cli.model.checkpoint import read_training_digests
from icm_cli.model.contracts import PreparedReferences
from icm_cli.model.lite.finetuning import finetuning_digest_text
from icm_cli.reports.report import Report

OLD_AFTER_S = 7 * 24 * 3600.0
"""Alphas of an evaluation that was never finished are removed after this long."""


def matte_and_score(
    evaluation: Evaluation,
    choice: AnyModel,
    rounds: int,
    refs_per_group: int,
    save_alphas: Path | None,
    *,
    is_shot: bool = False,
    learn_steps: int | None = None,
) -> Report:
    """Matte every target of every round and score it; alphas that are there already are kept. ``is_shot``: groups are
    shots, and what is found in a frame is carried into the next.

    Without ``save_alphas`` they are in the cache until the run ends well, so that a crash loses nothing.
    """
    shelf = _Shelf(evaluation)
    references, problems = shelf.references(rounds, refs_per_group)
    if not any(references):
        raise UsageError(
            f"{evaluation.found.dataset.title} here has no group of two images or more, so nothing could show the "
            "model its thing; give --groups FILE, or --pred DIR to score alphas that are there"
        )
    examples = [(number, group) for number, groups in enumerate(references, 1) for group in groups]
    digester = choice.digester()
    steps = choice.learn_steps(learn_steps, is_shot=is_shot)
    form = [*filter(None, [finetuning_digest_text(steps), described() if is_shot else ""])]
    digests = [digester([*shelf.digests(references[number - 1][group]), *form]) for number, group in examples]
    notes = group_notes(evaluation.groups, len(references), refs_per_group)
    home = contextlib.nullcontext(save_alphas) if save_alphas else _until_done(_work_folder(digests, evaluation))
    with home as folder:
        jobs = [
            _job(evaluation, sample, round_folder(folder, number, len(references)), number, example)
            for example, (number, group) in enumerate(examples)
            for sample in targets(evaluation.groups[group], references[number - 1][group])
        ]
        shot = shelf.shot(jobs, [references[number - 1][group] for number, group in examples]) if is_shot else None
        _make_ready(evaluation, jobs, references, folder)
        outcome = _outcome(
            evaluation, choice, jobs, references, notes, save_alphas, learning={"shot": is_shot, "learn_steps": steps}
        )
        for problem in problems:
            outcome.add_problem(problem)
        evaluation.listener.on_run_start(len(jobs))
        with outcome:
            remaining = keep_finished(shot.order if shot else jobs, digests, evaluation.workers, outcome.add, shot)
            predictor = _load(choice, evaluation) if remaining else None
            with outcome.reported(evaluation.report_files, choice.where.peak_memory_bytes):
                if predictor is not None:

                    @functools.lru_cache(maxsize=1)
                    def prepared(example: int) -> PreparedReferences:
                        number, group = examples[example]
                        return shelf.prepared(predictor, references[number - 1][group], steps, is_shot=is_shot)

                    engine = EngineOptions(digests, choice.batch_size, evaluation.workers, shot=shot)
                    notice = evaluation.listener.on_notice
                    Engine(predictor, prepared, engine, on_result=outcome.add, notice=notice).run(remaining)
                evaluation.add_flicker(outcome)
    return outcome.report


def _make_ready(evaluation: Evaluation, jobs: Sequence[Job], references: Rounds, folder: Path) -> None:
    """Check all that is about to be written, and write the references."""
    evaluation.check_overwrites_nothing([job.output for job in jobs])
    evaluation.report_files.check_writable(folder)
    for parent in {job.output.parent for job in jobs}:
        remove_stale_temporaries(parent)
    if evaluation.report_files.references:
        write_rounds(evaluation.report_files.references, references)


def _outcome(
    evaluation: Evaluation,
    choice: AnyModel,
    jobs: Sequence[Job],
    references: Rounds,
    notes: list[str],
    save_alphas: Path | None,
    *,
    learning: dict[str, Any],
) -> Outcome:
    trained_on = read_training_digests(choice.checkpoint) if choice.checkpoint else None
    if choice.checkpoint and trained_on is None:
        unknown = f"{choice.checkpoint} does not say which images it was trained on; some of these may be among them"
        notes = [*notes, unknown]
    settings = {**choice.as_settings(), "alphas": str(save_alphas) if save_alphas else None, **learning}
    planned = [job.planned for job in jobs]
    return evaluation.outcome(planned, settings, references, notes=notes, trained_on=trained_on)


@contextlib.contextmanager
def _until_done(folder: Path) -> Iterator[Path]:
    """A folder that is removed once the run ends well and no other run uses it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock").open("w")
    except OSError as error:
        raise write_error(folder, error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield folder
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_suffix(".lock").unlink(missing_ok=True)


def _load(choice: AnyModel, evaluation: Evaluation) -> Predictor:
    evaluation.listener.on_detail(choice.describe())
    return choice.load()


def _job(evaluation: Evaluation, sample: Sample, folder: Path, number: int, example: int) -> Job:
    output = folder / f"{sample.name}.png"
    return Job(sample.image, Path(sample.name), output, evaluation.planned(sample, output, number), example)


def _work_folder(digests: Sequence[str], evaluation: Evaluation) -> Path:
    """A folder of the cache for this very evaluation; old ones of others go."""
    home = cache_folder() / "eval"
    with contextlib.suppress(OSError):
        for old in home.glob("*.lock"):
            if time.time() - old.stat().st_mtime > OLD_AFTER_S:
                shutil.rmtree(old.with_suffix(""), ignore_errors=True)
                old.unlink()
    files = [str(sample.file.resolve()) for sample in evaluation.found.samples]
    return home / combined_digest(*digests, *(path.encode(errors="surrogateescape") for path in files))[:32]


@dataclass
class _Shelf:
    """Reads references, holds what is known of them, and never more than a group's pictures."""

    evaluation: Evaluation
    _digests: dict[str, str] = field(default_factory=dict)
    _reasons: dict[str, str] = field(default_factory=dict)

    def references(self, rounds: int, refs_per_group: int) -> tuple[Rounds, list[Problem]]:
        """For every round, each group's references: chosen by rule, or as the fixed file says."""
        fixed, groups = self.evaluation.fixed_references, self.evaluation.groups
        if fixed:
            references, problems = read_rounds(fixed, groups)
            for names in references:
                for group in list(names):
                    names[group] = [name for name in names[group] if self._is_usable(self.evaluation.by_name[name])]
                    if not names[group]:
                        del names[group]
            missing = [group for group in groups if not all(group in names for names in references)]
            problems += [
                Problem("bad-reference", group, f"{fixed} gives group {group} no usable reference in every round")
                for group in missing
            ]
        else:
            references, problems = choose_references(
                groups,
                rounds=rounds,
                refs_per_group=refs_per_group,
                is_usable=self._is_usable,
                in_order=self.evaluation.found.dataset.is_shots,
            )
        problems += [Problem("bad-reference", name, reason) for name, reason in self._reasons.items()]
        return references, problems

    def digests(self, names: Sequence[str]) -> list[str]:
        """Digests of the content of references that were found usable."""
        return [self._digests[name] for name in names]

    def prepared(
        self, predictor: Predictor, names: Sequence[str], learn_steps: int, *, is_shot: bool = False
    ) -> PreparedReferences:
        """References as the model sees them, which its head has learned in so many steps."""
        references = [self._read(self.evaluation.by_name[name]) for name in names]
        return shown(predictor, references, learn_steps, is_shot=is_shot)

    def shot(self, jobs: Sequence[Job], names: Sequence[Sequence[str]]) -> Shot:
        """The order of the frames of every example, from its references, by name."""

        def key(name: str) -> Key:
            return Key(Path(name), lambda: self._read(self.evaluation.by_name[name]))

        return Shot.of(
            ([job for job in jobs if job.example == example], [key(name) for name in shown])
            for example, shown in enumerate(names)
        )

    def _is_usable(self, sample: Sample) -> bool:
        if sample.name in self._digests:
            return True
        try:
            self._digests[sample.name] = self._read(sample).digest
        except (ImageError, UsageError) as error:
            self._reasons[sample.name] = str(error)
            return False
        return True

    def _read(self, sample: Sample) -> Reference:
        """A sample as a reference: its picture, and its alpha above one half as guidance."""
        picture = read_source_image(sample.image)
        mask = read_alpha(sample.alpha, has_objects=self.evaluation.rule.is_shots, target_windows=picture.windows)
        notice = self.evaluation.listener.on_notice
        guidance = make_guidance(mask, picture.windows, f"alpha {sample.alpha}", notice)
        return Reference(picture.rgb, guidance, windows=picture.windows)
