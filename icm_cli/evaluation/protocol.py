"""One evaluation: what is scored and how, whoever makes the alphas."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from icm_cli.datasets.groups import Sample, group_samples
from icm_cli.datasets.registry import DatasetSamples
from icm_cli.errors import UsageError
from icm_cli.evaluation.rounds import Rounds
from icm_cli.events import Listener
from icm_cli.images.reading import CompositeSource
from icm_cli.images.writing import read_stamp
from icm_cli.matting.outcome import Outcome, environment_settings
from icm_cli.matting.resume import DIGEST_KEY
from icm_cli.reports.report import PageImages, Report
from icm_cli.reports.result import ImageResult
from icm_cli.reports.write import ReportFiles
from icm_cli.scoring.pool import Scorer, ScoringPool
from icm_cli.scoring.rule import ScoringRule
from icm_cli.scoring.task import FlickerTask, ScoreTask


@dataclass(frozen=True)
class Evaluation:
    """The dataset as it was found, the rule it is scored by, and where the reports go."""

    name: str
    found: DatasetSamples
    rule: ScoringRule
    split: str
    where: str
    """The dataset's root, or the images of one's own folders."""
    note: str | None
    fixed_references: Path | None
    inputs: tuple[Path, ...]
    """Files that say what to do, and must not be written over."""
    report_files: ReportFiles
    allowed: frozenset[str]
    workers: int
    listener: Listener
    start: float

    @cached_property
    def groups(self) -> dict[str, list[Sample]]:
        """Samples by group, those without one left out."""
        return group_samples(self.found.samples)

    @cached_property
    def by_name(self) -> dict[str, Sample]:
        """Every sample."""
        return {sample.name: sample for sample in self.found.samples}

    @cached_property
    def _files(self) -> set[str]:
        """Every file of the dataset, links followed."""
        return {
            os.path.realpath(path)
            for sample in self.found.samples
            for path in (sample.file, sample.alpha, sample.trimap)
            if path is not None
        }

    def check_overwrites_nothing(self, alphas: Sequence[Path] = ()) -> None:
        """Raises UsageError for an alpha in the place of one of the dataset's files, or a report in that of any."""
        files = self._files
        folders = {str(Path(path).parent) for path in files}
        for path in alphas:
            if os.path.realpath(path.parent) in folders:
                raise UsageError(
                    f"{path} would lie among the files of the dataset; give --save-alphas a folder of its own"
                )
        for path in {path.parent: path for path in alphas if path.exists()}.values():  # one a folder tells
            if (stamp := read_stamp(path)) is not None and DIGEST_KEY not in stamp:
                raise UsageError(f"{path} is not of icm and would be written over; give --save-alphas another folder")
        self.report_files.check_no_overwrite([*files, *alphas, *self.inputs])

    def planned(self, sample: Sample, output: Path, number: int) -> ImageResult:
        """Result of a sample in a round before its alpha is there."""
        return ImageResult(
            source=str(sample.image),
            output=str(output),
            status="planned",
            name=sample.name,
            group=sample.group,
            categories=sample.categories,
            round=number,
            truth=str(sample.alpha),
        )

    def outcome(
        self,
        planned: Sequence[ImageResult],
        settings: Mapping[str, Any],
        references: Rounds,
        *,
        notes: Sequence[str] = (),
        trained_on: frozenset[str] | None = None,
    ) -> Outcome:
        """Make the outcome that gathers, scores and reports results; the dataset's own problems are in it already."""
        protocol = self._protocol(references, notes)
        report = Report(
            {"title": protocol["title"], "note": self.note, **environment_settings(), "protocol": protocol, **settings},
            allowed=self.allowed,
            references=references,
            page_images=self._album(references),
        )

        def task_for(result: ImageResult) -> ScoreTask:
            sample = self.by_name[result.name]
            return ScoreTask(
                name=result.name,
                alpha=Path(result.output),
                truth=sample.alpha,
                rule=self.rule,
                trimap=sample.trimap,
                image=sample.file,
                needs_sha256=trained_on is not None,
                is_external="predictions" in settings,
                allowed=self.allowed,
            )

        outcome = Outcome(
            report,
            planned,
            self.listener,
            start=self.start,
            scoring=Scorer(ScoringPool(self.workers), task_for),
            trained_on=trained_on,
        )
        for problem in self.found.problems:
            outcome.add_problem(problem)
        for note in protocol["notes"]:
            self.listener.on_notice(note)
        return outcome

    def add_flicker(self, outcome: Outcome) -> None:
        """dtSSD of every two frames that follow one another in a video and both have an alpha."""
        videos = [frames for frames in self.groups.values() if frames[0].is_video_frame]
        following = [pair for frames in videos for pair in consecutive_frames(frames)]
        if videos and not following:
            self.listener.on_notice(
                "no two frames follow one another by the numbers at the end of their names; no dtSSD"
            )
        if following:
            outcome.add_flicker(list(self._flicker_tasks(following, outcome)))

    def _flicker_tasks(
        self, following: Sequence[tuple[Sample, Sample]], outcome: Outcome
    ) -> Iterator[tuple[tuple[int, str], FlickerTask]]:
        scored = {result.key: result for result in outcome.scored()}
        for number in sorted({key[0] for key in scored}):
            for before, frame in following:
                pair = [scored.get((number, each.name)) for each in (frame, before)]
                files = [(Path(result.output), Path(result.truth)) for result in pair if result]
                if len(files) == 2:
                    yield (number, frame.name), FlickerTask(files[0], files[1], self.rule)

    def _protocol(self, references: Rounds, notes: Sequence[str]) -> dict[str, Any]:
        """All that numbers depend on beside the alphas; two reports that differ here cannot be compared."""
        made = f"0 < alpha < 1 dilated by a {self.rule.trimap_kernel_px} px square at the scored size"
        if not any(sample.trimap for sample in self.found.samples):
            unknown = f"made from the alpha: {made}"
        elif self.rule.has_detail_maps:
            unknown = "published detail maps above 0"
        else:
            unknown = f"published trimaps at 128; where one is missing, {made}"
        each = max((len(names) for groups in references for names in groups.values()), default=0)
        return {
            "dataset": self.name,
            "title": self.where if self.name == "folder" else self.found.dataset.title,
            "where": self.where,
            "split": self.split,
            "images": len(self.found.samples),
            **self.rule.as_protocol(),
            "unknown_region": unknown if "unknown" in self.rule.regions else "not scored",
            "rounds": len(references),
            "refs_per_group": each,
            "mean": "over images, then over rounds; ± is the sample standard deviation of the rounds' means",
            "notes": [*self.found.notes, *notes],
        }

    def _album(self, references: Rounds) -> PageImages:
        return PageImages(
            references={
                (number, group): [(self.by_name[name].image, self.by_name[name].alpha) for name in names]
                for number, groups in enumerate(references, 1)
                for group, names in groups.items()
            },
            composites={
                sample.name: sample.image for sample in self.found.samples if isinstance(sample.image, CompositeSource)
            },
        )


def round_folder(folder: Path, number: int, rounds: int) -> Path:
    """Folder of the alphas of a round: the folder itself where there is but one."""
    return folder / f"round-{number}" if rounds > 1 else folder


def consecutive_frames(frames: Sequence[Sample]) -> list[tuple[Sample, Sample]]:
    """Pairs of frames that follow one another: alike in name but for the number at its end, one step apart.

    A shot's step is the smallest difference between its numbers, so every second frame may be missing throughout.
    """
    shots: dict[str, dict[int, Sample]] = {}
    for frame in frames:
        if found := re.fullmatch(r"(.*?)(\d+)", frame.name):
            shots.setdefault(found[1], {})[int(found[2])] = frame
    pairs = []
    for shot in shots.values():
        numbers = sorted(shot)
        step = min((after - before for before, after in pairwise(numbers)), default=0)
        pairs += [(shot[a], shot[b]) for a, b in pairwise(numbers) if b - a == step]
    return pairs
