"""Definition of an evaluation: options, dataset, scoring rule and report files."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from icm_cli.datasets.groups import Sample, group_samples
from icm_cli.datasets.registry import DatasetSamples
from icm_cli.environment import DEFAULT_WORKERS, available_cores
from icm_cli.errors import UsageError
from icm_cli.evaluation.rounds import ReferenceRounds
from icm_cli.events import Listener
from icm_cli.images.reading import CompositeSource
from icm_cli.images.writing import read_provenance
from icm_cli.matting.provenance import DIGEST_KEY
from icm_cli.matting.result_collector import ResultCollector, environment_settings
from icm_cli.options import EvaluateOptions
from icm_cli.reports.report import PageImages, Report
from icm_cli.reports.result import ImageResult
from icm_cli.reports.write import ReportFiles
from icm_cli.scoring.pool import Scorer, ScoringPool
from icm_cli.scoring.task import FlickerTask, FrameFiles, ScoreTask, ScoringRule


@dataclass(frozen=True)
class Evaluation:
    """What is scored, by which rule, and which files are written."""

    options: EvaluateOptions
    data: DatasetSamples
    rule: ScoringRule
    reports: ReportFiles
    listener: Listener
    start: float
    """Value of ``time.perf_counter`` at the start of the run."""

    @property
    def location(self) -> str:
        """Data root, or the images of the dataset ``folder``."""
        return str(self.options.dataset.data_root or self.options.dataset.images)

    @property
    def title(self) -> str:
        """Title for reports: the title of the dataset; for ``folder``, its path, or its name if that is "."."""
        if self.options.dataset.dataset != "folder":
            return self.data.dataset.title
        has_name = Path(self.location).name not in ("", "..")
        return self.location if has_name else Path(self.location).resolve().name or self.location

    @property
    def is_scoring_only(self) -> bool:
        """Whether alphas that exist already (``--pred``) are scored."""
        return self.options.protocol.pred is not None

    @property
    def _allowed_problems(self) -> frozenset[str]:
        """Kinds of problems that do not affect the exit code."""
        return frozenset(self.options.protocol.allow)

    @property
    def workers(self) -> int:
        """Number of reader threads and of scoring processes. Scoring alone uses every core."""
        return self.options.resources.workers or (available_cores() if self.is_scoring_only else DEFAULT_WORKERS)

    @cached_property
    def groups(self) -> dict[str, list[Sample]]:
        """Samples by group. Samples without a group are excluded."""
        return group_samples(self.data.samples)

    @cached_property
    def by_name(self) -> dict[str, Sample]:
        """All samples by name."""
        return {sample.name: sample for sample in self.data.samples}

    @cached_property
    def _dataset_files(self) -> set[str]:
        """Real paths of all files of the dataset."""
        files = (path for sample in self.data.samples for path in (sample.file, sample.alpha, sample.trimap) if path)
        return set(map(os.path.realpath, files))

    def check_no_overwrite(self, alphas: Sequence[Path] = ()) -> None:
        """Raise UsageError if an output would overwrite an input, or a file of the dataset or of another tool.

        ``alphas``: the paths that the run writes. They may not be in a folder of the dataset. Of the alphas that exist
        in a folder, only one is read to find out which tool made it.
        """
        folders = {str(Path(path).parent) for path in self._dataset_files}
        for path in alphas:
            if os.path.realpath(path.parent) in folders:
                raise UsageError(f"{path} is in a folder of the dataset; give --save-alphas another folder")
        existing_by_folder = {path.parent: path for path in alphas if path.exists()}
        for path in existing_by_folder.values():
            provenance = read_provenance(path)
            # None: the file is not readable, for example after an interrupted run
            if provenance is not None and DIGEST_KEY not in provenance:
                raise UsageError(
                    f"{path} exists and is not an alpha of icm, or another program removed its metadata; give "
                    "--save-alphas another folder"
                )
        inputs = [path for path in (self.options.dataset.groups, self.options.protocol.references) if path]
        self.reports.check_no_overwrite([*self._dataset_files, *alphas, *inputs])

    def plan_result(self, sample: Sample, output: Path | str, round_number: int) -> ImageResult:
        """Return the result of a sample before it is matted. ``output``: "" if there is no alpha."""
        return ImageResult(
            source=str(sample.image),
            output=str(output),
            status="planned",
            name=sample.name,
            group=sample.group,
            categories=sample.categories,
            round=round_number,
            truth=str(sample.alpha),
        )

    def make_collector(
        self,
        planned: Sequence[ImageResult],
        settings: Mapping[str, Any],
        references: ReferenceRounds,
        *,
        notes: Sequence[str] = (),
        trained_on: frozenset[str] | None = None,
    ) -> ResultCollector:
        """Return a collector that scores and reports results, with the problems of the dataset.

        ``settings``: of the model, or the folder of predictions. ``trained_on``: digests of the images that the model
        was trained on, if they are known.
        """
        protocol = self._describe_protocol(planned, references, notes)
        task_for = partial(self._score_task, needs_sha256=trained_on is not None)
        collector = ResultCollector(
            self._make_report(protocol, settings, references),
            planned,
            self.listener,
            start=self.start,
            scorer=Scorer(ScoringPool(self.workers), task_for),
            trained_on=trained_on,
        )
        for problem in self.data.problems:
            collector.add_problem(problem)
        for note in protocol["notes"]:
            self.listener.on_notice(note)
        return collector

    def _make_report(
        self, protocol: Mapping[str, Any], settings: Mapping[str, Any], references: ReferenceRounds
    ) -> Report:
        """Return the report of the evaluation, still without results."""
        unused_options = self.options.matting_names() if self.is_scoring_only else []
        report_settings = {
            "title": protocol["title"],
            "note": self.options.reports.note,
            **environment_settings(),
            "protocol": protocol,
            **self.options.as_settings(unused_options),
            **settings,
        }
        return Report(
            report_settings,
            allowed=self._allowed_problems,
            references=references,
            page_images=self._page_images(references),
        )

    def _score_task(self, result: ImageResult, *, needs_sha256: bool) -> ScoreTask:
        """Return the task that scores the alpha of a result. ``needs_sha256``: compute the digest of the image."""
        sample = self.by_name[result.name]
        return ScoreTask(
            name=result.name,
            alpha_path=Path(result.output),
            truth_path=sample.alpha,
            rule=self.rule,
            trimap_path=sample.trimap,
            image_path=sample.file,
            needs_sha256=needs_sha256,
            is_external=self.is_scoring_only,
            allowed=self._allowed_problems,
        )

    def score_flicker(self, collector: ResultCollector) -> None:
        """Compute dtSSD between all consecutive frames of videos that have an alpha."""
        videos = [frames for frames in self.groups.values() if frames[0].is_video_frame]
        pairs = [pair for frames in videos for pair in consecutive_frames(frames)]
        if videos and not pairs:
            self.listener.on_notice("dtSSD is not computed: no two frame names end in consecutive numbers")
        if not pairs:
            return
        scored = {result.key: result for result in collector.wait_for_scores()}
        rounds = sorted({result.round for result in scored.values()})
        tasks = []
        for round_number, (before, frame) in itertools.product(rounds, pairs):
            result_before, result = (scored.get((round_number, name)) for name in (before.name, frame.name))
            if result and result_before:
                task = FlickerTask(FrameFiles.of_result(result), FrameFiles.of_result(result_before), self.rule)
                tasks.append((result.key, task))
        collector.add_flicker(tasks)

    def _describe_protocol(
        self, planned: Sequence[ImageResult], references: ReferenceRounds, notes: Sequence[str]
    ) -> dict[str, Any]:
        """Return what the scores depend on, apart from the alphas."""
        refs_per_group = max((len(names) for groups in references for names in groups.values()), default=0)
        return {
            "dataset": self.options.dataset.dataset,
            "title": self.title,
            "location": self.location,
            "split": self.options.dataset.split,
            "images": len({result.name for result in planned}),
            **self.rule.as_protocol(),
            "unknown_region": self._describe_unknown_region(),
            "rounds": len(references),
            "refs_per_group": refs_per_group,
            "mean": "over images, then over rounds; ± is the sample standard deviation over rounds",
            "notes": [*self.data.notes, *notes],
        }

    def _describe_unknown_region(self) -> str:
        """Return which pixels are scored as unknown."""
        if "unknown" not in self.rule.regions:
            return "not scored"
        generated = f"0 < alpha < 1 dilated by a {self.rule.trimap_kernel_px} px square at the scored size"
        if not any(sample.trimap for sample in self.data.samples):
            return f"generated from the alpha: {generated}"
        if self.rule.has_detail_maps:
            return "published detail maps above 0"
        return f"pixels of value 128 in the published trimaps; images without a trimap: {generated}"

    def _page_images(self, references: ReferenceRounds) -> PageImages:
        """Return the images that the HTML report shows in addition to sources and alphas."""
        samples = self.by_name
        return PageImages(
            references={
                (round_number, group): [(samples[name].image, samples[name].alpha) for name in names]
                for round_number, groups in enumerate(references, 1)
                for group, names in groups.items()
            },
            composites={
                name: sample.image for name, sample in samples.items() if isinstance(sample.image, CompositeSource)
            },
        )


def round_folder(folder: Path, round_number: int, rounds: int) -> Path:
    """Return the folder of the alphas of a round: a subfolder of ``folder``, or ``folder`` if there is one round."""
    return folder / f"round-{round_number}" if rounds > 1 else folder


def consecutive_frames(frames: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Return the pairs (before, frame) of frames whose names differ only in the number at the end, by one step.

    The step is the smallest difference between the numbers of a shot.
    """
    shots: dict[str, dict[int, Sample]] = {}  # name without the number -> number -> frame
    for frame in frames:
        if match := re.fullmatch(r"(.*?)(\d+)", frame.name):
            shots.setdefault(match[1], {})[int(match[2])] = frame
    pairs = []
    for frame_by_number in shots.values():
        neighbours = list(itertools.pairwise(sorted(frame_by_number)))
        step = min((number - before for before, number in neighbours), default=0)
        pairs += [
            (frame_by_number[before], frame_by_number[number])
            for before, number in neighbours
            if number - before == step
        ]
    return pairs
