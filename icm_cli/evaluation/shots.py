"""Shots, evaluated as DAVIS does: the first frame and its mask are given, and neither it nor the last is scored."""

from __future__ import annotations

from dataclasses import replace

from icm_cli.datasets.groups import group_samples
from icm_cli.datasets.registry import DatasetSamples
from icm_cli.errors import Problem, UsageError

LEAST_FRAMES = 3
"""Frames of a shot of which one is scored."""
NOTE = "the first frame of every shot is its reference, and the last one is excluded, as in the tool of DAVIS"


def refuse_other_references(title: str, **options: object) -> None:
    """Raises UsageError for an option that says what else is a reference or a shot, as the dataset does."""
    for name, value in options.items():
        if value:
            raise UsageError(
                f"{title} has shots, and the first frame of each is its one reference, so "
                f"--{name.replace('_', '-')} has no effect; leave it out"
            )


def as_shots(found: DatasetSamples) -> DatasetSamples:
    """The dataset without the last frame of every shot, and its frames marked as those of videos.

    A shot of fewer than three frames becomes a problem. Raises UsageError where there are no others.
    """
    shots = group_samples(found.samples)
    short = [
        Problem("lone-image", shot, f"shot {shot} has {len(frames)} frame(s), and the first and last are not scored")
        for shot, frames in shots.items()
        if len(frames) < LEAST_FRAMES
    ]
    if len(short) == len(shots):
        raise UsageError(
            f"{found.dataset.title} here has no shot of three frames; the first and the last are not scored, so give "
            "the whole shots"
        )
    whole = [frames for frames in shots.values() if len(frames) >= LEAST_FRAMES]
    frames = [replace(frame, categories={"type": "video"}) for shot in whole for frame in shot[:-1]]
    return replace(found, samples=frames, notes=[*found.notes, NOTE], problems=[*found.problems, *short])
