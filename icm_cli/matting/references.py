"""Read references and their masks, and refuse masks that mark nothing or everything."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from icm_cli.errors import ImageError, ImageMemoryError, ResourceError, UsageError, format_count
from icm_cli.files.digests import combined_digest
from icm_cli.geometry import ImageU8, format_size, has_same_aspect, resize
from icm_cli.guidance.annotations import OTHER_IMAGE, find_other_image, is_annotation, read_hints
from icm_cli.guidance.hints import Hints, Point
from icm_cli.guidance.scribbles import read_scribble
from icm_cli.images.colour import DEFAULT_COLOUR, ColourSettings
from icm_cli.images.pixels import ImageWindows
from icm_cli.images.reading import SourceImage, extra_frame_notices, read_image
from icm_cli.matting.hinting import move_hints
from icm_cli.matting.masks import AmbiguousMaskError, Mask, ReferenceOrientation, read_mask
from icm_cli.options import GuidanceRule, ReferenceOptions

FOREGROUND_THRESHOLD = 0.5
"""Pixels of a soft mask above this value are foreground, as in the published code."""
MAX_CONTRADICTION = 0.5
"""Largest fraction of the object of a reference that a negative reference of the same image may mark."""
INVERTED_FRACTION, INVERTED_BORDER = 0.6, 0.95
"""Above the first fraction of the image and the second of its border, a white area is probably the background."""

MakeMask: TypeAlias = Callable[[ImageU8, Hints], NDArray[np.bool_]]
"""Function that returns the mask, bool [H,W], of the object that hints mark in an image, sRGB uint8 [H,W,3]."""


@dataclass(frozen=True)
class Reference:
    """A reference: an image and the mask of its object. Or a negative reference, which shows what is not the object."""

    rgb: ImageU8
    """sRGB uint8 [H,W,3]."""
    guidance: NDArray[np.bool_]
    """Pixels of the object, bool [H,W]."""
    unknown: NDArray[np.bool_] | None = None
    """Pixels that are neither object nor background, bool [H,W], if the mask has some."""
    windows: ImageWindows | None = None
    """Data and display window of the image; None if they are equal."""
    attended_points: Sequence[Point] = ()
    """For ``--guidance paper``: points (x, y) on the object.

    The model extends ``guidance`` from them by its self-attention (section 3.6 of the paper).
    """

    @classmethod
    def negative(cls, rgb: ImageU8, area: NDArray[np.bool_], windows: ImageWindows | None = None) -> Reference:
        """Return a negative reference: an image whose pixels in ``area``, bool [H,W], are not the object."""
        return cls(rgb, np.zeros_like(area), None if area.all() else ~area, windows)

    @property
    def is_negative(self) -> bool:
        """Whether this is a negative reference: no pixel is marked as the object."""
        return not self.guidance.any()

    @property
    def selected(self) -> NDArray[np.bool_]:
        """Pixels that the mask selects, bool [H,W]: the object, or in a negative reference what is not the object."""
        if not self.is_negative:
            return self.guidance
        return np.ones_like(self.guidance) if self.unknown is None else ~self.unknown

    @property
    def display_mask(self) -> NDArray[np.bool_]:
        """Pixels of the object in the display window, bool [H,W]."""
        windows = self.windows or ImageWindows.full((self.rgb.shape[0], self.rgb.shape[1]))
        return windows.move_pixels(self.guidance, windows.display_window)

    @property
    def digest(self) -> str:
        """Hash of image and mask."""
        unknown = b"" if self.unknown is None else self.unknown.tobytes()
        points = [f"attended points {list(self.attended_points)}"] if self.attended_points else []
        return combined_digest(self.rgb.tobytes(), self.guidance.tobytes(), unknown, str(self.rgb.shape), *points)


@dataclass(frozen=True)
class ReferenceReader:
    """Reads references and negative references with their masks."""

    notice: Callable[[str], None]
    colour: ColourSettings = DEFAULT_COLOUR
    make_mask: MakeMask | None = None
    """Makes masks from prompts."""

    def read_references(self, options: ReferenceOptions) -> list[Reference]:
        """Read every reference with its mask. Without masks and prompts, each must be an RGBA cut-out.

        Raises UsageError.
        """
        refs, masks, orientation = options.ref, options.mask, options.mask_orientation
        if not refs:
            raise UsageError("no reference was given; give --ref IMAGE and --mask MASK")
        if masks and len(masks) != len(refs):
            raise UsageError(
                f"{format_count(len(refs), 'reference')} but {format_count(len(masks), 'mask')} were given; give one "
                "--mask for each --ref, in order"
            )
        if options.mask_label is not None and not masks:
            label = options.mask_label
            raise UsageError(
                f"--mask-label {label} selects a label of a mask, and there is no --mask; omit --mask-label"
            )
        if orientation != "auto" and not masks:
            raise UsageError(
                f"--mask-orientation {orientation} describes a mask, and there is no --mask; omit --mask-orientation"
            )
        if orientation != "auto" and all(map(is_annotation, masks)):
            raise UsageError(
                f"--mask-orientation {orientation} applies to mask images only, and {masks[0]} is a JSON annotation, "
                "which always has the orientation in which the reference is displayed; omit --mask-orientation"
            )
        return [self._read_reference(ref, mask, options) for ref, mask in itertools.zip_longest(refs, masks)]

    def read_negatives(self, options: ReferenceOptions) -> list[Reference]:
        """Read negative references. The masks belong to the first images, in order. Raises UsageError.

        In an RGBA cut-out without a mask, the opaque pixels are negative. Other images without a mask are negative
        everywhere.
        """
        refs, masks = options.not_ref, options.not_mask
        if len(masks) > len(refs):
            raise UsageError(
                f"{len(masks)} --not-mask but {len(refs)} --not-ref were given; give at most one --not-mask for each "
                "--not-ref, in order"
            )
        defaults = ReferenceOptions(ref=refs)  # the other options are about the references, not about negatives
        negatives = []
        for ref, mask in itertools.zip_longest(refs, masks):
            try:
                image = self._read_reference(ref, mask, defaults, needs_mask=False)
            except AmbiguousMaskError as error:
                raise UsageError(
                    f"{error.problem}; expected white on what is not the object, and black elsewhere; give such a mask"
                ) from error
            if masks and mask is None and image.guidance.all():
                self.notice(f"{ref} has no --not-mask, so all of it is negative")
            negatives.append(Reference.negative(image.rgb, image.guidance, image.windows))
        return negatives

    def _read_reference(
        self, ref: Path, mask: Path | None, options: ReferenceOptions, *, needs_mask: bool = True
    ) -> Reference:
        """Read a reference with its mask, from a file or from prompts. Raises UsageError or ResourceError."""
        with self._usage_errors():
            image = read_image(ref, self.colour)
            for sentence in (*image.notices, *extra_frame_notices("reference", ref)):
                self.notice(sentence)
            hints = self._read_hints(ref, mask, image.windows.display, options)
            if hints is not None:
                name = f"mask {mask}" if mask else f"the mask from the prompts of reference {ref}"
                return self._make_prompted_reference(image, hints, name, options.guidance)
            if mask is not None:
                stored, size, rule = image.stored, (image.rgb.shape[0], image.rgb.shape[1]), options.mask_orientation
                orientation = ReferenceOrientation(size, stored.orientation, rule) if stored else None
                file_mask = read_mask(mask, options.mask_label, self.notice, orientation, image.windows)
                return self._make_reference(image, file_mask, f"mask {mask}", may_be_full=not needs_mask)
            if image.alpha is not None and image.alpha.min() != image.alpha.max():
                guidance = make_guidance(image.alpha, image.windows, f"the alpha of reference {ref}", self.notice)
                return Reference(image.rgb, guidance, windows=image.windows)
            if needs_mask:
                raise UsageError(
                    f"reference {ref} has no mask and is not an RGBA cut-out; give --mask with the object in white, or "
                    "mark the object with --point, --box or --scribble"
                )
            return _reference_without_background(image)

    @contextlib.contextmanager
    def _usage_errors(self) -> Iterator[None]:
        """Context in which an ImageError becomes a UsageError, or a ResourceError if memory is too small."""
        try:
            yield
        except ImageMemoryError as error:
            raise ResourceError(f"reference or mask cannot be read: {error}") from error
        except ImageError as error:
            hint = ", for references with --ref-layer" if self.colour.layer and "has no layer" in str(error) else ""
            raise UsageError(f"reference or mask cannot be used: {error}{hint}") from error

    def _read_hints(
        self, ref: Path, mask: Path | None, size: tuple[int, int], options: ReferenceOptions
    ) -> Hints | None:
        """Return what a JSON annotation or the prompts mark in a reference; None without them. Raises UsageError.

        ``size``: height and width of the reference as it is displayed.
        """
        if mask is None or not is_annotation(mask):
            return _read_prompts(options, ref, size) if options.has_prompts else None
        hints = read_hints(mask, size, image=ref, label=options.mask_label, can_select=True)
        if name := find_other_image(mask, ref):
            self.notice(OTHER_IMAGE.format(path=mask, name=name, image=ref))
        return hints

    def _make_prompted_reference(self, image: SourceImage, hints: Hints, name: str, rule: GuidanceRule) -> Reference:
        """Return a reference with a mask made from hints; or for ``--guidance paper``, with their points and strokes.

        ``name``: what messages call the mask. Raises UsageError.
        """
        if rule == "mask":
            inside = mask_from_hints(hints, image.to_display_window().rgb, name, self.notice, self.make_mask)
            inside = image.windows.display_window.move_pixels(inside, image.windows)
            return self._make_reference(image, Mask(inside, np.zeros(inside.shape, np.bool_)), name)
        hints = move_hints(hints, image.windows)
        guidance = np.zeros(hints.size, np.bool_) if hints.object_area is None else hints.object_area.copy()
        for x, y in hints.points:
            guidance[int(y), int(x)] = True
        if not guidance.any():
            raise UsageError(f"{name} has no stroke on the object in the data window: {image.windows}; paint one there")
        return Reference(image.rgb, guidance, windows=image.windows, attended_points=hints.binding_points()[0])

    def _make_reference(self, image: SourceImage, mask: Mask, name: str, *, may_be_full: bool = False) -> Reference:
        """Return a reference with a mask that was read or made. ``name``: what messages call it. Raises UsageError."""
        if may_be_full and mask.inside.all():
            return _reference_without_background(image)
        guidance = make_guidance(mask.inside.astype(np.uint8) * 255, image.windows, name, self.notice)
        if not mask.unknown.any():
            return Reference(image.rgb, guidance, windows=image.windows)
        unknown = _fit_to_data_window(mask.unknown.astype(np.uint8) * 255, image.windows) > 0
        return Reference(image.rgb, guidance, unknown & ~guidance, image.windows)


def _reference_without_background(image: SourceImage) -> Reference:
    return Reference(image.rgb, np.ones(image.rgb.shape[:2], np.bool_), windows=image.windows)


def _read_prompts(options: ReferenceOptions, ref: Path, size: tuple[int, int]) -> Hints:
    """Return the points, the box and the strokes of the options as hints about a reference. Raises UsageError."""
    boxes = [options.box] if options.box else []
    coordinates = [value for position in (*options.point, *options.not_point, *boxes) for value in position]
    if all(0 <= value <= 1 for value in coordinates) and any(value % 1 for value in coordinates):
        raise UsageError(
            f"reference {ref}: --point, --not-point and --box have only values from 0 to 1; expected pixels of the "
            "image as it is displayed, not fractions; multiply x by its width and y by its height"
        )
    strokes = Hints(size=size) if options.scribble is None else read_scribble(options.scribble, size)
    if strokes.is_outlined:
        raise UsageError(
            f"scribble {options.scribble} marks nearly every pixel; expected strokes; give it as --mask if it is a mask"
        )
    if strokes.object_area is not None and not (strokes.object_area.any() or options.point or boxes):
        raise UsageError(
            f"--scribble {options.scribble} has no stroke on the object; expected strokes in white or green; paint one"
        )
    try:
        return replace(strokes, points=options.point, not_points=options.not_point, boxes=boxes)
    except UsageError as error:
        raise UsageError(f"reference {ref}: {error}") from error


def check_negatives(references: Sequence[Reference]) -> None:
    """Raise UsageError if a negative reference marks the object of a reference as not the object.

    That is so if both have the same image, and the negative covers more than ``MAX_CONTRADICTION`` of the object.
    """
    positives = [reference for reference in references if not reference.is_negative]
    negatives = [reference for reference in references if reference.is_negative]
    for (number, negative), positive in itertools.product(enumerate(negatives, 1), positives):
        if not np.array_equal(negative.rgb, positive.rgb):
            continue
        marked = float(negative.selected[positive.guidance].mean())
        if marked > MAX_CONTRADICTION:
            raise UsageError(
                f"negative reference {number} is also the image of a reference, and marks {marked:.0%} of its object "
                "as not the object; give this negative reference a mask without the object"
            )


def make_guidance(mask: ImageU8, windows: ImageWindows, name: str, notice: Callable[[str], None]) -> NDArray[np.bool_]:
    """Return a mask, uint8 [h,w], as guidance, bool [H,W] of the size of its reference's data window.

    The mask must have the size of the data window, or the aspect ratio of the display window. ``name``: what messages
    call it, such as "mask m.png". Raises UsageError if it has another aspect ratio, or is empty or full.
    """
    if mask.shape not in (windows.size, windows.display):
        size = windows.display
        if not has_same_aspect(mask.shape, size):
            raise UsageError(
                f"{name} is {format_size(mask.shape)} and its reference {format_size(size)}; expected the same aspect "
                "ratio; give a mask that was drawn on this image"
            )
        notice(f"{name} is {format_size(mask.shape)} and its reference {format_size(size)}; the mask is resized")
    mask = _fit_to_data_window(mask, windows)
    guidance: NDArray[np.bool_] = mask > FOREGROUND_THRESHOLD * 255
    if not guidance.any():
        raise UsageError(
            f"{name} is empty: no pixel is above one half; expected the object in white; give another mask"
        )
    if guidance.all():
        raise UsageError(
            f"{name} is full: every pixel is above one half; expected only the object in white; give another mask"
        )
    border = np.concatenate([guidance[0], guidance[-1], guidance[:, 0], guidance[:, -1]])
    if guidance.mean() > INVERTED_FRACTION and border.mean() > INVERTED_BORDER:
        notice(
            f"{name} is white in {100 * guidance.mean():.0f} % of the image and along nearly all "
            "of its border; if the object is black, invert the mask"
        )
    return guidance


def mask_from_hints(
    hints: Hints, rgb: ImageU8, name: str, notice: Callable[[str], None], make_mask: MakeMask | None
) -> NDArray[np.bool_]:
    """Return the mask of the object that hints mark in an image, bool [H,W].

    If the hints outline the object, the outlined area is the mask. Otherwise ``make_mask`` makes it from points, boxes
    and strokes. ``name``: what messages call the mask. Raises UsageError if the hints do not mark the object.
    """
    if hints.is_outlined:
        assert hints.object_area is not None
        if hints.points or hints.not_points or hints.boxes:
            notice(f"{name} has outlines, which are used; its points and boxes are ignored")
        inside = hints.object_area if hints.keep is None else hints.object_area | hints.keep
        return inside if hints.drop is None else inside & ~hints.drop
    if not (hints.points or hints.boxes or (hints.object_area is not None and hints.object_area.any())):
        raise UsageError(f"{name} has no mark on the object; expected a point, a box or a stroke; give one of them")
    assert make_mask is not None, "prompts need a model that makes masks"
    return make_mask(rgb, hints)


def _fit_to_data_window(mask: ImageU8, windows: ImageWindows) -> ImageU8:
    """Return a mask of the size of the data window. Any other is resized to the display window and cropped."""
    if mask.shape == windows.size:
        return mask
    return windows.display_window.move_pixels(resize(mask, windows.display), windows)
