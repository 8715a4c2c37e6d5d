"""Masks of taught images, and the options of a run with these images as references and negatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from icm_cli.errors import UsageError
from icm_cli.geometry import ImageU8
from icm_cli.images.image_file import ICM_MASK_MARK
from icm_cli.images.writing import write_mask, write_trimap
from icm_cli.matting.jobs import Job
from icm_cli.matting.planning import choose_colour_settings
from icm_cli.options import MatteOptions
from icm_cli.review.run import BASE_PREFIX, NEGATIVES_NAME, REFERENCES_NAME, ReviewRun, with_values
from icm_cli.review.state import ImageState

if TYPE_CHECKING:
    from icm_cli.matting.references import Reference

Kind = Literal["reference", "negative"]
Area = Literal["alpha", "image"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MASK_OPTIONS = ("mask_label", "mask_orientation", "point", "not_point", "box", "scribble", "guidance")
"""Options that say how masks of references are read or made. They would wrongly apply to taught masks too."""


def mask_path(record_folder: Path, kind: Kind, name: str) -> Path:
    """Return the path of the mask of a taught image. ``name``: its file name."""
    return record_folder / (REFERENCES_NAME if kind == "reference" else NEGATIVES_NAME) / name


def check_teachable(options: MatteOptions, job: Job, kind: Kind, area: Area) -> None:
    """Raise UsageError if an image cannot be used as ``kind`` together with the options of the run.

    ``area``: whether the alpha or the whole image shows what is taught.
    """
    if kind == "reference" and area == "image":
        raise UsageError("a reference needs the alpha of its object; choose the alpha, or use the image as a negative")
    if job.planned.page:
        raise UsageError(
            f"{job.source} has several images, and references are read from the first one; save page "
            f"{job.planned.page} as a file of its own, and give it with --ref"
        )
    sources, references = choose_colour_settings(options.colour)
    if sources != references:
        raise UsageError(
            "this run reads its references with --ref-colorspace or --ref-layer, unlike its images, so an image cannot "
            "become a reference; run icm matte with references of the colour space of the images"
        )
    if kind == "reference" and options.references.guidance == "paper":
        raise UsageError("this run uses --guidance paper, which takes a single reference; run icm matte with a mask")


def needs_base_masks(options: MatteOptions) -> bool:
    """Return whether the masks of a run's own references must be saved as files before a reference is taught.

    That is so if they were made from prompts, or read with options that must not apply to taught masks.
    """
    return not options.references.mask or any(name in options.given for name in MASK_OPTIONS)


def write_base_masks(record_folder: Path, references: Sequence[Reference]) -> None:
    """Write the masks of a run's own references as PNG, unless they exist. Raises OutputError."""
    for path, reference in zip(_base_masks(record_folder, len(references)), references, strict=True):
        if path.exists():
            continue
        if reference.unknown is None:
            write_mask(path, reference.display_mask)
            continue
        trimap = np.where(reference.guidance, np.uint8(255), np.where(reference.unknown, np.uint8(128), np.uint8(0)))
        if reference.windows is not None:
            trimap = reference.windows.move_pixels(trimap, reference.windows.display_window)
        write_trimap(path, trimap, {ICM_MASK_MARK.decode(): "mask"})


def write_taught_mask(path: Path, alpha: ImageU8, kind: Kind) -> None:
    """Write an alpha, uint8 [H,W], as a mask that is white where the alpha is above one half.

    Raises UsageError for an empty alpha, or one that covers the whole image; and OutputError.
    """
    inside = alpha > 128  # the unknown pixels of a trimap are 128
    if not inside.any():
        raise UsageError("the alpha is empty, so the image cannot be used; correct the alpha first")
    if kind == "reference" and inside.all():
        raise UsageError("the alpha covers the whole image, so it cannot be a reference; correct the alpha first")
    write_mask(path, inside)


def add_taught_images(run: ReviewRun, states: Mapping[str, ImageState]) -> MatteOptions:
    """Return the options of a run with the taught images as further references and negatives.

    They are in the order of the run's images, and follow the references of the run. Taught negatives come before the
    run's negatives without a mask. The options that made the masks of the run's own references, such as a box, are
    dropped: its record has these masks as files.
    """
    sources: dict[Kind, list[Path]] = {kind: [] for kind in KINDS}
    masks: dict[Kind, list[Path]] = {kind: [] for kind in KINDS}
    for job in run.jobs:
        name = job.planned.name
        use = states[name].taught if name in states else None
        if use is not None:
            sources[use["kind"]].append(job.files[0])
            masks[use["kind"]].append(mask_path(run.record_folder, use["kind"], use["mask"]))
    own = run.options.references
    values: dict[str, Any] = {}
    dropped: Sequence[str] = ()
    if sources["reference"]:
        dropped = MASK_OPTIONS
        own_masks: Sequence[Path] = own.mask
        if needs_base_masks(run.options):
            own_masks = _base_masks(run.record_folder, len(own.ref))
        values["ref"] = [*own.ref, *sources["reference"]]
        values["mask"] = [*own_masks, *masks["reference"]]
    if sources["negative"]:  # the first --not-mask belongs to the first --not-ref, so those without a mask must be last
        count = len(own.not_mask)
        values["not_ref"] = [*own.not_ref[:count], *sources["negative"], *own.not_ref[count:]]
        values["not_mask"] = [*own.not_mask, *masks["negative"]]
    return with_values(run.options, dropped=dropped, **values)


def _base_masks(record_folder: Path, count: int) -> list[Path]:
    """Return the paths of the masks of a run's own references."""
    folder = record_folder / REFERENCES_NAME
    return [folder / f"{BASE_PREFIX}{number}.png" for number in range(1, count + 1)]
