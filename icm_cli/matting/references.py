"""Read references and their masks, and refuse those that cannot show anything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from icm_cli.errors import ImageError, UsageError
from icm_cli.files import combined_digest
from icm_cli.geometry import ImageU8, has_same_aspect, resize
from icm_cli.images.colour import DEFAULT_COLOUR, ColourSettings
from icm_cli.images.pixels import ImageWindows
from icm_cli.images.reading import SourceImage, extra_frame_notices, read_image
from icm_cli.matting.masks import Mask, MaskPlacement, read_mask
from icm_cli.options import MaskOrientation

FOREGROUND_THRESHOLD = 0.5
"""A soft mask's pixels above this are foreground (published code)."""
INVERTED_SHARE, INVERTED_BORDER = 0.6, 0.95
"""Share of a picture, and of its border, above which a mask's white looks like what is about the thing."""


@dataclass(frozen=True)
class Reference:
    """A picture, sRGB uint8 [H,W,3], and the guidance bool [H,W] that marks the thing in it.

    ``unknown`` bool [H,W] marks what counts as neither the thing nor the rest, where a mask says so.
    """

    rgb: ImageU8
    guidance: NDArray[np.bool_]
    unknown: NDArray[np.bool_] | None = None
    windows: ImageWindows | None = None
    """Place of the picture in its display window; None: it is all of it."""

    @property
    def digest(self) -> str:
        """Hash of its content."""
        unknown = b"" if self.unknown is None else self.unknown.tobytes()
        return combined_digest(self.rgb.tobytes(), self.guidance.tobytes(), unknown, str(self.rgb.shape))


def read_references(
    refs: Sequence[Path],
    masks: Sequence[Path],
    notice: Callable[[str], None],
    label: str | None = None,
    colour: ColourSettings = DEFAULT_COLOUR,
    orientation: MaskOrientation = "auto",
) -> list[Reference]:
    """Read every reference with its mask; without masks each reference must be an RGBA cut-out.

    ``label``: which value, index or colour of the masks is the thing, where they have several. ``orientation``: how
    masks of references that EXIF turns lie: "upright" as these are seen, "stored" as in their files, or "auto".

    Raises UsageError, naming the file and what is wrong with it.
    """
    if not refs:
        raise UsageError("no reference was given; give --ref IMAGE and --mask MASK")
    if masks and len(masks) != len(refs):
        raise UsageError(
            f"{len(refs)} references but {len(masks)} masks were given; give one --mask for each --ref, in their order"
        )
    if label is not None and not masks:
        raise UsageError("--mask-label says which label of a mask is meant, and there is no --mask; leave it out")
    if orientation != "auto" and not masks:
        raise UsageError("--mask-orientation says how a mask lies, and there is no --mask; leave it out")
    return [
        _read_reference(ref, masks[n] if masks else None, label, colour, orientation, notice)
        for n, ref in enumerate(refs)
    ]


def _border(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The outermost pixels."""
    return np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])


def make_guidance(mask: ImageU8, windows: ImageWindows, name: str, notice: Callable[[str], None]) -> NDArray[np.bool_]:
    """A mask uint8 [h,w] -> guidance bool of the size of its reference's data window.

    The mask has that very size, or is of the display window, where ``windows`` lie. ``name`` stands for it in messages.
    Raises UsageError when it has another shape, is empty or full.
    """
    if mask.shape not in (windows.size, windows.display):
        size = windows.display
        _check_aspect(mask.shape, size, name)
        notice(f"{name} is {_size(mask.shape)} and its reference {_size(size)}; the mask was resized")
    mask = _placed(mask, windows)
    guidance: NDArray[np.bool_] = mask > FOREGROUND_THRESHOLD * 255
    if not guidance.any():
        raise UsageError(
            f"{name} is empty: no pixel is above half, so it shows nothing; give one with the thing in white"
        )
    if guidance.all():
        raise UsageError(
            f"{name} is full: every pixel is above half, so nothing tells the thing from the rest; give one with the "
            "thing alone in white"
        )
    if guidance.mean() > INVERTED_SHARE and _border(guidance).mean() > INVERTED_BORDER:
        notice(
            f"{name} is white in {100 * guidance.mean():.0f} % of the picture and nearly all along its border; if the "
            "thing is what is black, invert it"
        )
    return guidance


def _read_reference(
    ref: Path,
    mask: Path | None,
    label: str | None,
    colour: ColourSettings,
    orientation: MaskOrientation,
    notice: Callable[[str], None],
) -> Reference:
    try:
        picture = read_image(ref, colour)
        for sentence in (*picture.notices, *extra_frame_notices("reference", ref)):
            notice(sentence)
        if mask is not None:
            height, width = picture.rgb.shape[:2]
            turn = MaskPlacement((height, width), picture.stored.orientation, orientation) if picture.stored else None
            return _masked(picture, read_mask(mask, label, notice, turn, picture.windows), f"mask {mask}", notice)
        if picture.alpha is not None and picture.alpha.min() != picture.alpha.max():
            name = f"the alpha of reference {ref}"
            guidance = make_guidance(picture.alpha, picture.windows, name, notice)
            return Reference(picture.rgb, guidance, windows=picture.windows)
        raise UsageError(f"reference {ref} has no mask and is no RGBA cut-out; give --mask with the thing in white")
    except ImageError as error:
        hint = ", for references with --ref-layer" if colour.layer and "has no layer" in str(error) else ""
        raise UsageError(f"reference or mask cannot be used: {error}{hint}") from error


def _masked(picture: SourceImage, mask: Mask, name: str, notice: Callable[[str], None]) -> Reference:
    guidance = make_guidance(mask.inside.astype(np.uint8) * 255, picture.windows, name, notice)
    if not mask.unknown.any():
        return Reference(picture.rgb, guidance, windows=picture.windows)
    unknown = _placed(mask.unknown.astype(np.uint8) * 255, picture.windows) > 0
    return Reference(picture.rgb, guidance, unknown & ~guidance, picture.windows)


def _placed(mask: ImageU8, windows: ImageWindows) -> ImageU8:
    """A mask of a reference's data window as it is, else scaled to the display window and cut to the data window."""
    if mask.shape == windows.size:
        return mask
    return windows.display_window.move_pixels(resize(mask, windows.display), windows)


def _check_aspect(mask: tuple[int, ...], reference: tuple[int, int], name: str) -> None:
    if not has_same_aspect(mask, reference):
        raise UsageError(
            f"{name} is {_size(mask)} and its reference {_size(reference)}, another shape; "
            "give a mask drawn on this very picture"
        )


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
