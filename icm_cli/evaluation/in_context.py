"""Matte a dataset, each group with its own references, and score the alphas."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from icm_cli.errors import ImageError, Problem, UsageError
from icm_cli.evaluation.protocol import Evaluation, round_folder
from icm_cli.evaluation.rounds import (
    ReferenceRounds,
    choose_references,
    describe_group_problems,
    read_references_file,
    select_targets,
)
from icm_cli.files.atomic_writes import remove_stale_temporaries
from icm_cli.files.digests import cache_folder, combined_digest
from icm_cli.files.json_files import write_json
from icm_cli.files.system_errors import error_for_failed_write
from icm_cli.images.reading import HAS_COLOUR, is_coloured_file, read_ground_truth, read_source_image
from icm_cli.matting.digest import AlphaDigest, alpha_digest
from icm_cli.matting.engine import Engine, EngineOptions
from icm_cli.matting.jobs import Job
from icm_cli.matting.model_choice import AnyModelChoice, sequence_digest_parts
from icm_cli.matting.predictor import Predictor
from icm_cli.matting.propagation import create_matting
from icm_cli.matting.references import Reference, make_guidance
from icm_cli.matting.result_collector import ResultCollector
from icm_cli.matting.resume import find_existing_alphas
from icm_cli.matting.shot import Keyframe, Shot
from icm_cli.matting.tracking import prepare_references
from icm_cli.model.checkpoint import read_training_digests
from icm_cli.model.contracts import PreparedReferences
from icm_cli.reports.report import Report

MAX_CACHE_AGE_S = 7 * 24 * 3600.0
"""Cached alphas of unfinished evaluations are removed after this time."""


@dataclass(frozen=True)
class Example:
    """The references of a group in a round. Jobs refer to it by its index."""

    round: int
    """Number of the round, from 1."""
    group: str
    references: list[str]


def matte_and_score(evaluation: Evaluation, choice: AnyModelChoice) -> Report:
    """Matte every target of every round and score it. Existing alphas of the same evaluation are kept.

    Alphas of an interrupted run stay in the cache, so that the next run continues from them.
    """
    options, listener = evaluation.options.matting, evaluation.listener
    store = ReferenceStore(evaluation)
    references, problems = store.select_references()
    examples = _list_examples(evaluation, references)
    if options.shot:
        choice.check_shot()
    learn_steps = choice.resolve_learn_steps(options.learn_steps, is_shot=options.shot)
    digests = _example_digests(store, choice, examples, learn_steps)
    with _alphas_folder(evaluation, digests) as folder:
        jobs = _plan_jobs(evaluation, examples, folder, len(references))
        shot = store.plan_shot(jobs, examples) if options.shot else None
        _prepare_outputs(evaluation, folder, jobs, references)
        collector = _make_collector(evaluation, choice, jobs, references, learn_steps)
        for problem in problems:
            collector.add_problem(problem)
        listener.on_run_start(len(jobs))
        with collector:
            settings = EngineOptions(digests, choice.batch_size, evaluation.workers, shot=shot)
            remaining = _find_remaining_jobs(evaluation, jobs, settings, collector)
            predictor = None
            if remaining:
                listener.on_detail(choice.description)
                predictor = choice.load_predictor()
            with collector.writing_reports(evaluation.reports, choice.device.peak_memory_bytes):
                if predictor is not None:

                    @functools.lru_cache(maxsize=1)  # the jobs of an example are consecutive
                    def prepare_example(index: int) -> PreparedReferences:
                        return store.prepare_references(predictor, examples[index], learn_steps)

                    matting = create_matting(predictor, prepare_example, shot, listener.on_notice)
                    engine = Engine(predictor, matting, settings, on_result=collector.add, notice=listener.on_notice)
                    engine.run(remaining)
                evaluation.score_flicker(collector)
    return collector.report


def _list_examples(evaluation: Evaluation, references: ReferenceRounds) -> list[Example]:
    """Return the examples of all rounds. Raises UsageError if there are none."""
    examples = [
        Example(round_number, group, names)
        for round_number, names_by_group in enumerate(references, 1)
        for group, names in names_by_group.items()
    ]
    if not examples:
        raise UsageError(
            f"{evaluation.title} has no group with two usable images, so there are no references; give --groups FILE "
            "to define groups, or --pred DIR to score existing alphas"
        )
    return examples


def _example_digests(
    store: ReferenceStore, choice: AnyModelChoice, examples: Sequence[Example], learn_steps: int
) -> list[AlphaDigest]:
    """Return, for every example, a digest of everything that determines its alphas, except the source images."""
    common: dict[str, str] = {str(name): value for name, value in choice.digest_parts().items()}
    is_shot = store.evaluation.options.matting.shot
    common |= {str(name): value for name, value in sequence_digest_parts(learn_steps, is_shot=is_shot).items()}
    common["seed"] = str(choice.seed)
    given = store.evaluation.options.given_by_part()
    digests = []
    for example in examples:
        references = combined_digest(*(store.digests[name] for name in example.references))
        digests.append(alpha_digest({**common, "references": references}, given))
    return digests


def _plan_jobs(evaluation: Evaluation, examples: Sequence[Example], folder: Path, rounds: int) -> list[Job]:
    """Return a job for every target of every example, with its alpha below ``folder``."""
    jobs = []
    for index, example in enumerate(examples):
        alphas = round_folder(folder, example.round, rounds)
        for sample in select_targets(evaluation.groups[example.group], example.references):
            output = alphas / f"{sample.name}.png"
            planned = evaluation.plan_result(sample, output, example.round)
            jobs.append(Job(sample.image, Path(sample.name), output, planned, index))
    return jobs


def _prepare_outputs(evaluation: Evaluation, folder: Path, jobs: Sequence[Job], references: ReferenceRounds) -> None:
    """Check that alphas and reports can be written, and write the file of ``--write-references``.

    Raises UsageError or OutputError.
    """
    evaluation.check_no_overwrite([job.output for job in jobs])
    evaluation.reports.check_writable(folder)
    for parent in {job.output.parent for job in jobs}:
        remove_stale_temporaries(parent)
    if evaluation.reports.references:
        write_json(evaluation.reports.references, {"references": references})


def _find_remaining_jobs(
    evaluation: Evaluation, jobs: Sequence[Job], settings: EngineOptions, collector: ResultCollector
) -> list[Job]:
    """Return the jobs that must be matted, and report the others: those that cannot be scored or have an alpha."""
    shot = settings.shot
    if shot is None:  # a shot keeps all frames, because later frames need the alphas of all earlier ones
        jobs = _exclude_colour_truths(evaluation, jobs, collector)
    existing = find_existing_alphas(
        shot.order if shot else jobs,
        settings.job_digest,
        workers=evaluation.workers,
        reusable_outputs=shot.reusable_outputs if shot else None,
    )
    existing.report(collector.add, evaluation.listener.on_notice)
    return existing.remaining


def _exclude_colour_truths(evaluation: Evaluation, jobs: Sequence[Job], collector: ResultCollector) -> list[Job]:
    """Return the jobs whose ground truth has no colour, and report the others, because they cannot be scored."""

    def is_coloured(truth: str) -> bool:
        with contextlib.suppress(ImageError):  # scoring reports files that cannot be read
            return is_coloured_file(Path(truth), is_label_map=evaluation.rule.has_shots)
        return False

    truths = list(dict.fromkeys(job.planned.truth for job in jobs))
    with ThreadPoolExecutor(evaluation.workers) as threads:
        has_colour = dict(zip(truths, threads.map(is_coloured, truths), strict=True))
    scorable = []
    for job in jobs:
        planned = job.planned
        if not has_colour[planned.truth]:
            scorable.append(job)
            continue
        problem = Problem("colour-alpha", planned.name, f"{planned.truth} {HAS_COLOUR}")
        collector.add_problem(problem)
        collector.add(replace(planned, status="unscored", reason=problem.reason))
    return scorable


def _make_collector(
    evaluation: Evaluation, choice: AnyModelChoice, jobs: Sequence[Job], references: ReferenceRounds, learn_steps: int
) -> ResultCollector:
    """Return the collector of the results. It gets all settings, and notes about groups and training images."""
    options = evaluation.options.matting
    notes = describe_group_problems(evaluation.groups, len(references), options.refs_per_group or 1)
    trained_on = read_training_digests(choice.checkpoint) if choice.checkpoint else None
    if choice.checkpoint and trained_on is None:
        notes.append(f"{choice.checkpoint} does not list its training images; they may include images of this dataset")
    settings = {**choice.as_settings(), "learn_steps": learn_steps}
    return evaluation.make_collector(
        [job.planned for job in jobs], settings, references, notes=notes, trained_on=trained_on
    )


@contextlib.contextmanager
def _alphas_folder(evaluation: Evaluation, digests: Sequence[AlphaDigest]) -> Iterator[Path]:
    """Context of the folder of the alphas: ``--save-alphas``, or a folder in the cache.

    The folder in the cache is removed if the run succeeds and no other run uses it.
    """
    if evaluation.options.matting.save_alphas:
        yield evaluation.options.matting.save_alphas
        return
    folder = _cache_folder(evaluation, digests)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.with_suffix(".lock").open("w")
    except OSError as error:
        raise error_for_failed_write(folder, error) from error
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_SH)
        yield folder
        with contextlib.suppress(OSError):  # another run holds the lock, and so uses the folder
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
            folder.with_suffix(".lock").unlink(missing_ok=True)


def _cache_folder(evaluation: Evaluation, digests: Sequence[AlphaDigest]) -> Path:
    """Return the cache folder of this evaluation, and remove folders of other evaluations that ended long ago."""
    root = cache_folder() / "eval"
    with contextlib.suppress(OSError):
        for lock in root.glob("*.lock"):
            if time.time() - lock.stat().st_mtime > MAX_CACHE_AGE_S:
                shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
                lock.unlink()
    files = [str(sample.file.resolve()) for sample in evaluation.data.samples]
    return root / combined_digest(*(digest.value for digest in digests), *files)[:32]


@dataclass
class ReferenceStore:
    """Reads references and remembers their digests, and the errors of those that cannot be used; keeps no images."""

    evaluation: Evaluation
    digests: dict[str, str] = field(default_factory=dict)
    """Digests of the usable references that were read, by name."""
    _errors: dict[str, str] = field(default_factory=dict)
    """Errors of the references that cannot be used, by name."""

    def select_references(self) -> tuple[ReferenceRounds, list[Problem]]:
        """Return the usable references of every round, and the problems.

        They are read from the references file, or else chosen automatically.
        """
        protocol = self.evaluation.options.protocol
        if protocol.references:
            references, problems = self._read_references(protocol.references)
        else:
            references, problems = choose_references(
                self.evaluation.groups,
                rounds=protocol.rounds or 1,
                refs_per_group=self.evaluation.options.matting.refs_per_group or 1,
                is_usable=self._is_usable,
                in_order=self.evaluation.rule.has_shots,
            )
        # _is_usable records an error for each image that it refuses.
        problems += [Problem("bad-reference", name, error) for name, error in self._errors.items()]
        return references, problems

    def _read_references(self, path: Path) -> tuple[ReferenceRounds, list[Problem]]:
        """Return the usable references of a references file, and the problems with it."""
        listed, problems = read_references_file(path, self.evaluation.groups)
        rounds: ReferenceRounds = []
        for names_by_group in listed:
            usable = {group: list(filter(self._is_usable, names)) for group, names in names_by_group.items()}
            rounds.append({group: names for group, names in usable.items() if names})
        for group in self.evaluation.groups:
            if any(group not in names_by_group for names_by_group in rounds):
                reason = f"{path} has no usable reference of group {group} in some round"
                problems.append(Problem("bad-reference", group, reason))
        return rounds, problems

    def prepare_references(self, predictor: Predictor, example: Example, learn_steps: int) -> PreparedReferences:
        """Read the references of an example, and prepare them for the model."""
        references = [self.read_reference(name) for name in example.references]
        notice, is_shot = self.evaluation.listener.on_notice, self.evaluation.options.matting.shot
        return prepare_references(predictor, references, learn_steps, notice, is_shot=is_shot)

    def plan_shot(self, jobs: Sequence[Job], examples: Sequence[Example]) -> Shot:
        """Return the shot of the jobs. The references of an example become keyframes, from which its frames start."""
        jobs_and_keyframes = []
        for index, example in enumerate(examples):
            example_jobs = [job for job in jobs if job.example_index == index]
            keyframes = [Keyframe(Path(name), partial(self.read_reference, name)) for name in example.references]
            jobs_and_keyframes.append((example_jobs, keyframes))
        return Shot.from_examples(jobs_and_keyframes)

    def _is_usable(self, name: str) -> bool:
        """Return whether a sample can be used as a reference. It is read once."""
        if name not in self.digests and name not in self._errors:
            try:
                self.digests[name] = self.read_reference(name).digest
            except (ImageError, UsageError) as error:
                self._errors[name] = str(error)
        return name in self.digests

    def read_reference(self, name: str) -> Reference:
        """Read a sample as a reference: its image, and its alpha above one half as guidance.

        Raises ImageError, also for an alpha with colour, or UsageError.
        """
        sample = self.evaluation.by_name[name]
        image = read_source_image(sample.image)
        is_label_map = self.evaluation.rule.has_shots
        truth = read_ground_truth(sample.alpha, is_label_map=is_label_map, target_windows=image.windows)
        if truth.has_colour:
            raise ImageError(f"alpha {sample.alpha} {HAS_COLOUR}")
        notice = self.evaluation.listener.on_notice
        guidance = make_guidance(truth.alpha, image.windows, f"alpha {sample.alpha}", notice)
        return Reference(image.rgb, guidance, windows=image.windows)
