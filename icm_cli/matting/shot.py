"""Order of the frames of shots: which frame is matted when, and from which earlier frame its alpha is propagated."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icm_cli.files.digests import combined_digest
from icm_cli.matting.frames import FrameName
from icm_cli.matting.jobs import Job
from icm_cli.matting.provenance import ENTRY_DIGITS, MEMORY_KEY, NO_FRAME, NO_MEMORY
from icm_cli.matting.resume import ExistingAlpha
from icm_cli.matting.sources import natural_sort_key

if TYPE_CHECKING:
    from icm_cli.matting.references import Reference

MIN_FRAMES = 2
"""Files of one folder with different names before the frame number are separate shots if one has this many frames."""


@dataclass(frozen=True)
class Keyframe:
    """A reference that is a frame of the shot."""

    name: Path
    """Its path below the root of the sources."""
    read: Callable[[], Reference]


@dataclass(frozen=True)
class Shot:
    """Order of the frames of one or more shots.

    Attributes:
        order: All frames, in the order in which they are matted.
        previous: Output path of a frame -> the frame from which an alpha is propagated to it, if there is one.
        keyframes: Output path of a frame -> the reference from which its mask is propagated to it, if there is one.
        names: Names of all frames and keyframes, sorted.
    """

    order: Sequence[Job]
    previous: Mapping[Path, Job]
    keyframes: Mapping[Path, Keyframe]
    names: Sequence[Path]

    @classmethod
    def from_examples(cls, examples: Iterable[tuple[Sequence[Job], Sequence[Keyframe]]]) -> Shot:
        """Order the frames of shots. ``examples``: the frames of each shot, and the references that are frames of it.

        A keyframe or a frame with hints is a start. Each frame belongs to the nearest start; if two are equally near,
        to the earlier one. The alpha of a start is propagated forward to its later frames, and then backward to its
        earlier ones. Without a start, propagation begins at the first frame. Missing frames are at the end of the
        order; nothing is propagated to or from them, so alphas do not depend on whether they are reported.
        """
        order: list[Job] = []
        previous: dict[Path, Job] = {}
        keyframes: dict[Path, Keyframe] = {}
        names: list[Path] = []
        for jobs, keys in examples:
            present = [job for job in jobs if not job.is_missing]
            frames: list[Job | Keyframe] = sorted([*present, *keys], key=lambda frame: natural_sort_key(frame.name))
            names += [frame.name for frame in frames]
            for start, first, last in _divide_at_starts(frames):
                order += (frame for frame in frames[start : start + 1] if isinstance(frame, Job))
                forward, backward = frames[start : last + 1], frames[first : start + 1][::-1]
                for before, frame in itertools.chain(itertools.pairwise(forward), itertools.pairwise(backward)):
                    assert isinstance(frame, Job)  # every keyframe is a start
                    order.append(frame)
                    if isinstance(before, Job):
                        previous[frame.output] = before
                    else:
                        keyframes[frame.output] = before
            order += (job for job in jobs if job.is_missing)
        return cls(order, previous, keyframes, sorted(dict.fromkeys(names), key=natural_sort_key))

    def shard(self, number: int, count: int) -> Shot:
        """Return shard ``number`` (from 1) of ``count``: consecutive frames. Nothing is propagated between shards.

        Keyframes count as frames, so that machines with different references split the shot at the same frames. Missing
        frames do not count. They are in the last shard.
        """
        begin, end = len(self.names) * (number - 1) // count, len(self.names) * number // count
        names = set(self.names[begin:end])
        order = [job for job in self.order if (number == count if job.is_missing else job.name in names)]
        outputs = {job.output for job in order}
        previous = {output: job for output, job in self.previous.items() if {output, job.output} <= outputs}
        keyframes = {output: keyframe for output, keyframe in self.keyframes.items() if output in outputs}
        return Shot(order, previous, keyframes, self.names[begin:end])

    def frames_before(self, job: Job) -> Iterator[Job | Keyframe | None]:
        """Yield the frames before a frame, the nearest first. The last value is a keyframe; None if there is none."""
        frame: Job | None = job
        while frame is not None:
            if keyframe := self.keyframes.get(frame.output):
                yield keyframe
                return
            frame = self.previous.get(frame.output)
            yield frame

    def with_jobs(self, jobs: Sequence[Job]) -> Shot:
        """Return the same order with newer jobs for the same outputs."""
        by_output = {job.output: job for job in jobs}
        previous = {output: by_output[job.output] for output, job in self.previous.items()}
        return Shot([by_output[job.output] for job in self.order], previous, self.keyframes, self.names)

    def reusable_outputs(self, candidates: Collection[Path], existing: Mapping[Path, ExistingAlpha]) -> set[Path]:
        """Return the outputs that can be kept: reviewed ones, and candidates that have the same predecessors.

        ``candidates``: outputs whose source and digest are the same. ``existing``: all existing alphas, by output.
        """
        reusable: dict[Path, ExistingAlpha] = {}
        for job in self.order:
            alpha = existing.get(job.output)
            is_candidate = job.output in candidates
            if alpha and (alpha.is_reviewed or (is_candidate and self.has_same_predecessors(alpha, reusable))):
                reusable[job.output] = alpha
        return set(reusable)

    def has_same_predecessors(self, alpha: ExistingAlpha, reusable: Mapping[Path, ExistingAlpha]) -> bool:
        """Return whether a run would propagate the same to a frame as the run that made its alpha.

        ``reusable``: the alphas of earlier frames that the run keeps, by output.
        """

        def is_same(entry: str, frame: Job | Keyframe | None) -> bool:
            if not isinstance(frame, Job):
                return entry == start_entry(frame)
            earlier = reusable.get(frame.output)
            if earlier is not None and entry == earlier.provenance.get(MEMORY_KEY, NO_MEMORY):
                return True
            # A reusable alpha shows that its frame can be read now. A reviewed one does not: it is kept in any case.
            is_readable = earlier is not None and not earlier.is_reviewed
            return entry == unreadable_entry(frame) and not is_readable

        entries = alpha.predecessors
        return bool(entries) and all(map(is_same, entries, self.frames_before(alpha.job)))


def start_entry(keyframe: Keyframe | None) -> str:
    """Return the last entry of PREDECESSORS_KEY: for the keyframe at which propagation starts, or for none."""
    return NO_FRAME if keyframe is None else combined_digest("reference", str(keyframe.name))[:ENTRY_DIGITS]


def unreadable_entry(job: Job) -> str:
    """Return the entry of PREDECESSORS_KEY for a frame that cannot be read, until its files change."""
    return f"{NO_MEMORY}{job.input_digest()[:ENTRY_DIGITS]}"


def _shot_prefix(name: Path) -> tuple[Path, str]:
    """Return the folder of a frame, and its name before the frame number."""
    return name.parent, FrameName.from_path(name).stem


def _divide_at_starts(frames: Sequence[Job | Keyframe]) -> list[tuple[int, int, int]]:
    """Return the index of each start in the frames of a shot, and of the first and the last frame that belong to it.

    Starts are keyframes and frames with hints, or else the first frame. The border between two starts is in the middle.
    """
    starts = [index for index, frame in enumerate(frames) if isinstance(frame, Keyframe) or frame.hints] or [0]
    lasts = [*((start + next_start) // 2 for start, next_start in itertools.pairwise(starts)), len(frames) - 1]
    firsts = [0, *(last + 1 for last in lasts[:-1])]
    return list(zip(starts, firsts, lasts, strict=True))


def split_shots(
    jobs: Sequence[Job], keyframes: Sequence[Keyframe], other_names: Iterable[Path] = ()
) -> list[tuple[list[Job], list[Keyframe]]]:
    """Split frames and keyframes into shots.

    A folder is one shot. But if its files have several prefixes before the frame number, as a.0001.png and b.0001.png
    have, each prefix is a shot. This requires that a prefix has at least MIN_FRAMES files. Missing frames do not count.

    ``other_names``: names of frames of the same shots that are not in ``jobs``, so that a part of the frames is split
    as all frames are.
    """
    names = {*other_names, *(job.name for job in jobs if not job.is_missing), *(each.name for each in keyframes)}
    counts = Counter(map(_shot_prefix, names))
    divided = {folder for (folder, _), count in counts.items() if count >= MIN_FRAMES}
    frames_by_shot: dict[tuple[Path, str], list[Job | Keyframe]] = {}
    frames: list[Job | Keyframe] = [*jobs, *keyframes]
    for frame in frames:
        folder, prefix = _shot_prefix(frame.name)
        frames_by_shot.setdefault((folder, prefix if folder in divided else ""), []).append(frame)
    shots = frames_by_shot.values()
    return [
        ([frame for frame in shot if isinstance(frame, Job)], [frame for frame in shot if isinstance(frame, Keyframe)])
        for shot in shots
    ]
