"""Matte a dataset, each group with its own references, and score the alphas."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from icm_cli.datasets.groups import Sample
from icm_cli.errors import ImageError, Problem, UsageError
from icm_cli.evaluation.protocol import Evaluation, round_folder
from icm_cli.evaluation.rounds import (
    ReferenceRounds,
    choose_references,
    describe_small_groups,
    read_references_file,
    select_targets,
    write_references_file,
)
from icm_cli.files import cache_folder, combined_digest, error_for_failed_write, remove_stale_temporaries
from icm_cli.images.reading import read_alpha, read_source_image
from icm_cli.matting.digest import alpha_digest
from icm_cli.matting.engine import Engine, EngineOptions
from icm_cli.matting.jobs import Job
from icm_cli.matting.model_choice import AnyModelChoice, sequence_digest_parts
from icm_cli.matting.outcome import Outcome
from icm_cli.matting.predictor import Predictor
from icm_cli.matting.propagation import create_matting
from icm_cli.matting.references import Reference, make_guidance
from icm_cli.matting.resume import keep_existing_alphas
from icm_cli.matting.shot import Keyframe, Shot
from icm_cli.matting.tracking import prepare_references
from icm_cli.model.checkpoint import read_training_digests
from icm_cli.model.contracts import PreparedReferences
from icm_cli.reports.report import Report

MAX_CACHE_AGE_S = 7 * 24 * 3600.0
"""Cached alphas of unfinished evaluations are removed after this time."""


@dataclass(frozen=True)
class InContextOptions:
    """Options of matting in an evaluation."""

    rounds: int = 1
    refs_per_group: int = 1
    save_alphas: Path | None = None
    """Folder for the alphas. By default, they are in the cache until the run succeeds."""
    is_shot: bool = False
    """Whether groups are shots, in which objects are propagated from frame to frame."""
    learn_steps: int | None = None


@dataclass(frozen=True)
class Example:
    """The references of a group in a round. Jobs refer to it by its index."""

    round: int
    """Number of the round, from 1."""
    group: str
    references: list[str]


def matte_and_score(evaluation: Evaluation, choice: AnyModelChoice, options: InContextOptions) -> Report:
    """Matte every target of every round and score it.

    Existing alphas of the same evaluation are kept.

    Alphas of an interrupted run stay in the cache, so that the next run continues from them.
    """
    store = ReferenceStore(evaluation)
    references, problems = store.select_references(options.rounds, options.refs_per_group)
    examples = [
        Example(number, group, names) for number, groups in enumerate(references, 1) for group, names in groups.items()
    ]
    if not examples:
        raise UsageError(
            f"{evaluation.dataset.title} has no group with two usable images, so there are no "
            "references; give --groups FILE to define groups, or --pred DIR to score existing "
            "alphas"
        )
    steps = choice.resolve_learn_steps(options.learn_steps, is_shot=options.is_shot)
    digests = _example_digests(store, choice, examples, steps, is_shot=options.is_shot)
    with _alpha_folder(evaluation, options, digests) as folder:
        jobs = _plan_jobs(evaluation, examples, folder, len(references))
        shot = store.plan_shot(jobs, examples) if options.is_shot else None
        _check_outputs(evaluation, jobs, folder)
        if evaluation.files.reports.references:
            write_references_file(evaluation.files.reports.references, references)
        outcome = _make_outcome(evaluation, choice, options, jobs, references, steps)
        for problem in problems:
            outcome.add_problem(problem)
        evaluation.run.listener.on_run_start(len(jobs))
        workers = evaluation.run.workers
        with outcome:
            settings = EngineOptions(digests, choice.batch_size, workers, shot=shot)
            remaining = keep_existing_alphas(
                shot.order if shot else jobs,
                settings.job_digest,
                workers=workers,
                on_result=outcome.add,
                notice=evaluation.run.listener.on_notice,
                reusable_outputs=shot.reusable_outputs if shot else None,
            )
            predictor = _load_model(choice, evaluation) if remaining else None
            with outcome.writing_reports(evaluation.files.reports, choice.device.peak_memory_bytes):
                if predictor is not None:

                    @functools.lru_cache(maxsize=1)
                    def prepare_example(index: int) -> PreparedReferences:
                        return store.prepare(predictor, examples[index].references, steps, is_shot=options.is_shot)

                    notice = evaluation.run.listener.on_notice
                    matting = create_matting(predictor, prepare_example, shot, notice)
                    Engine(predictor, matting, settings, on_result=outcome.add, notice=notice).run(remaining)
                evaluation.score_flicker(outcome)
    return outcome.report


def _example_digests(
    store: ReferenceStore, choice: AnyModelChoice, examples: Sequence[Example], learn_steps: int, *, is_shot: bool
) -> list[str]:
    """Return the digest of every example: everything that determines its alphas but the source."""
    common: dict[str, str] = {str(name): value for name, value in choice.digest_parts().items()}
    common |= {str(name): value for name, value in sequence_digest_parts(learn_steps, is_shot=is_shot).items()}
    common["seed"] = str(choice.seed)
    return [
        alpha_digest({**common, "references": combined_digest(*store.content_digests(example.references))})
        for example in examples
    ]


def _plan_jobs(evaluation: Evaluation, examples: Sequence[Example], folder: Path, rounds: int) -> list[Job]:
    """Return a job for every target of every example."""
    jobs = []
    for index, example in enumerate(examples):
        round_path = round_folder(folder, example.round, rounds)
        for sample in select_targets(evaluation.dataset.groups[example.group], example.references):
            output = round_path / f"{sample.name}.png"
            planned = evaluation.plan_result(sample, output, example.round)
            jobs.append(Job(sample.image, Path(sample.name), output, planned, index))
    return jobs


def _check_outputs(evaluation: Evaluation, jobs: Sequence[Job], folder: Path) -> None:
    """Check that all outputs can be written, and remove temporary files of earlier runs."""
    evaluation.check_no_overwrite([job.output for job in jobs])
    evaluation.files.reports.check_writable(folder)
    for parent in {job.output.parent for job in jobs}:
        remove_stale_temporaries(parent)


def _make_outcome(
    evaluation: Evaluation,
    choice: AnyModelChoice,
    options: InContextOptions,
    jobs: Sequence[Job],
    references: ReferenceRounds,
    learn_steps: int,
) -> Outcome:
    notes = describe_small_groups(evaluation.dataset.groups, len(references), options.refs_per_group)
    trained_on = read_training_digests(choice.checkpoint) if choice.checkpoint else None
    if choice.checkpoint and trained_on is None:
        notes.append(f"{choice.checkpoint} does not list its training images; they may include images of this dataset")
    settings = {
        **choice.as_settings(),
        "alphas": str(options.save_alphas) if options.save_alphas else None,
        "shot": options.is_shot,
        "learn_steps": learn_steps,
    }
    return evaluation.make_outcome(
        [job.planned for job in jobs], settings, references, notes=notes, trained_on=trained_on
    )


def _load_model(choice: AnyModelChoice, evaluation: Evaluation) -> Predictor:
    evaluation.run.listener.on_detail(choice.description)
    return choice.load_predictor()


def _alpha_folder(
    evaluation: Evaluation, options: InContextOptions, digests: Sequence[str]
) -> contextlib.AbstractContextManager[Path]:
    """Return a context with the folder for the alphas."""
    if options.save_alphas:
        return contextlib.nullcontext(options.save_alphas)
    return _temporary_folder(_cache_folder(evaluation, digests))


@contextlib.contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """Remove the folder at the end if the run succeeds and no other run uses it."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock").open("w")
    except OSError as error:
        raise error_for_failed_write(folder, error) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        yield folder
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_suffix(".lock").unlink(missing_ok=True)


def _cache_folder(evaluation: Evaluation, digests: Sequence[str]) -> Path:
    """Return the cache folder of this evaluation, and remove old folders of other evaluations."""
    root = cache_folder() / "eval"
    with contextlib.suppress(OSError):
        for lock in root.glob("*.lock"):
            if time.time() - lock.stat().st_mtime > MAX_CACHE_AGE_S:
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink()
    files = [str(sample.file.resolve()) for sample in evaluation.dataset.samples]
    return root / combined_digest(*digests, *(path.encode(errors="surrogateescape") for path in files))[:32]


@dataclass
class ReferenceStore:
    """Reads references and remembers their digests, and the errors of those that cannot be used.

    Images are not kept, so that memory use does not depend on the number of references.
    """

    evaluation: Evaluation
    _digests: dict[str, str] = field(default_factory=dict)
    _errors: dict[str, str] = field(default_factory=dict)

    def select_references(self, rounds: int, refs_per_group: int) -> tuple[ReferenceRounds, list[Problem]]:
        """Return the references of every round: those of the references file, or chosen by name.

        References that cannot be used become problems.
        """
        path, dataset = self.evaluation.files.references, self.evaluation.dataset
        if path:
            references, problems = read_references_file(path, dataset.groups)
            for names_by_group in references:
                for group, names in list(names_by_group.items()):
                    names_by_group[group] = [name for name in names if self._is_usable(dataset.by_name[name])]
                    if not names_by_group[group]:
                        del names_by_group[group]
            problems += [
                Problem("bad-reference", group, f"{path} has no usable reference of group {group} in some round")
                for group in dataset.groups
                if not all(group in names_by_group for names_by_group in references)
            ]
        else:
            references, problems = choose_references(
                dataset.groups,
                rounds=rounds,
                refs_per_group=refs_per_group,
                is_usable=self._is_usable,
                in_order=self.evaluation.rule.has_shots,
            )
        problems += [Problem("bad-reference", name, error) for name, error in self._errors.items()]
        return references, problems

    def content_digests(self, names: Sequence[str]) -> list[str]:
        """Return the digests of the contents of usable references."""
        return [self._digests[name] for name in names]

    def prepare(
        self, predictor: Predictor, names: Sequence[str], learn_steps: int, *, is_shot: bool
    ) -> PreparedReferences:
        """Read and prepare references, and fine-tune the head on them for ``learn_steps`` steps."""
        references = [self._read_reference(self.evaluation.dataset.by_name[name]) for name in names]
        return prepare_references(predictor, references, learn_steps, is_shot=is_shot)

    def plan_shot(self, jobs: Sequence[Job], examples: Sequence[Example]) -> Shot:
        """Return the order in which frames are matted, starting from their references."""

        def key(name: str) -> Keyframe:
            return Keyframe(Path(name), lambda: self._read_reference(self.evaluation.dataset.by_name[name]))

        return Shot.from_examples(
            ([job for job in jobs if job.example == index], [key(name) for name in example.references])
            for index, example in enumerate(examples)
        )

    def _is_usable(self, sample: Sample) -> bool:
        if sample.name in self._digests:
            return True
        try:
            self._digests[sample.name] = self._read_reference(sample).digest
        except (ImageError, UsageError) as error:
            self._errors[sample.name] = str(error)
            return False
        return True

    def _read_reference(self, sample: Sample) -> Reference:
        """Read a sample as a reference: its image, and its alpha above one half as guidance."""
        image = read_source_image(sample.image)
        mask = read_alpha(sample.alpha, is_label_map=self.evaluation.rule.has_shots, target_windows=image.windows)
        notice = self.evaluation.run.listener.on_notice
        guidance = make_guidance(mask, image.windows, f"alpha {sample.alpha}", notice)
        return Reference(image.rgb, guidance, windows=image.windows)
