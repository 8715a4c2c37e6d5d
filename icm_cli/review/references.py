"""The options of a run with the images that a review teaches as references or negatives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

from icm_cli.options import MatteOptions
from icm_cli.review.run import ReviewRun, with_values
from icm_cli.review.state import ImageState

Kind = Literal["reference", "negative"]
KINDS: tuple[Kind, ...] = get_args(Kind)
FOLDERS: Mapping[Kind, str] = {"reference": "references", "negative": "negatives"}
"""Folder below ``.icm`` with the masks of what is taught, by kind."""


def mask_path(run: ReviewRun, kind: Kind, file_name: str) -> Path:
    """Return the path of a mask of a taught image."""
    return run.record_folder / FOLDERS[kind] / file_name


def add_taught(run: ReviewRun, states: Mapping[str, ImageState]) -> MatteOptions:
    """Return the options of a run with all taught images, in the order of the run.

    Negatives with a mask come before those without one, because masks are assigned in order.
    """
    given = run.options.references
    pairs: dict[Kind, list[tuple[Path, Path | None]]] = {kind: [] for kind in KINDS}
    for name, job in zip(run.names, run.jobs, strict=True):
        taught = states[name].taught if name in states else None
        if taught is not None:
            mask = None if taught["mask"] is None else mask_path(run, taught["kind"], taught["mask"])
            pairs[taught["kind"]].append((job.files[0], mask))
    if not any(pairs.values()):
        return run.options
    count, masked = len(given.not_mask), [pair for pair in pairs["negative"] if pair[1]]
    unmasked = [source for source, mask in pairs["negative"] if mask is None]
    return with_values(
        run.options,
        ref=[*given.ref, *(source for source, _ in pairs["reference"])],
        mask=[*given.mask, *(mask for _, mask in pairs["reference"])],
        not_ref=[*given.not_ref[:count], *(source for source, _ in masked), *given.not_ref[count:], *unmasked],
        not_mask=[*given.not_mask, *(mask for _, mask in masked)],
    )
