"""Contact sheet of a run.

It shows the references with their masks, and one row per image with source, alpha, and the object on magenta.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from icm_cli.errors import ImageError
from icm_cli.files.atomic_writes import atomic_write
from icm_cli.geometry import ImageU8, resize, round_to_u8
from icm_cli.images.image_file import ICM_SHEET_MARK
from icm_cli.images.reading import read_alpha
from icm_cli.reports.report import Report, shrink_image
from icm_cli.reports.result import ImageResult

MAX_SHEET_ROWS = 48
"""Maximum number of rows."""
SHEET_CELL_PX = 240
MARGIN_PX = 2
"""Smallest distance of an image from the border of its cell."""
CAPTION_PX = 18
FONT_PX = 13
FONTS = (
    "usr/share/fonts/**/NotoSansCJK*-Regular.ttc",
    "usr/share/fonts/**/DejaVuSans.ttf",
    "System/Library/Fonts/Supplemental/Arial Unicode.ttf",
)
"""Fonts that cover many scripts. The first one that exists is used."""
NO_CHARACTER = "\uffff"
BACKDROP = (220, 0, 220)
"""Magenta: rare in images, so that holes, half-transparent parts and remains of the background are visible."""
BACKGROUND = 24


def write_contact_sheet(path: Path, report: Report) -> None:
    """Write the contact sheet of the references, and of the images that have an alpha, each at most MAX_SHEET_ROWS.

    The images with the lowest quality come first. If no quality is known, images are selected at even intervals. Raises
    OutputError.
    """
    results = report.by_quality
    has_quality = any(result.matting.quality is not None for result in results)
    results = results[:MAX_SHEET_ROWS] if has_quality else select_evenly(results, MAX_SHEET_ROWS)
    rows = []
    for rgb, mask, caption in report.page_images.references_with_masks[:MAX_SHEET_ROWS]:
        rows.append(_make_row(rgb, np.where(mask, np.uint8(255), np.uint8(0)), caption))
    for result in results:
        source, alpha = report.page_images.read_source(result), read_alpha_or_none(result.output)
        rows.append(_make_row(source, alpha, _make_caption(result)))
    sheet = np.concatenate(rows) if rows else np.full((SHEET_CELL_PX, 3 * SHEET_CELL_PX, 3), BACKGROUND, np.uint8)
    with atomic_write(path) as file:
        mark = PngImagePlugin.PngInfo()
        mark.add_text(ICM_SHEET_MARK.decode(), "contact sheet")
        Image.fromarray(sheet).save(file, format="PNG", optimize=True, pnginfo=mark)


def _make_caption(result: ImageResult) -> str:
    """Return the name of an image, and what is known about its alpha."""
    details = result.matting
    parts = [
        result.name or Path(result.source).name,
        "" if details.quality is None else f"quality {details.quality:.2f}",
        "object not found" if details.not_found else "",
        ", ".join(details.reasons),
    ]
    return "   ".join(filter(None, parts))


def composite_on_backdrop(rgb: ImageU8, alpha: ImageU8) -> ImageU8:
    """Composite an image [H,W,3] with its alpha [H,W] on magenta, uint8 [H,W,3]."""
    weight = alpha[..., None].astype(np.float32) / np.float32(255.0)
    return round_to_u8(rgb * weight + np.array(BACKDROP, np.float32) * (1 - weight))


def _make_row(source: ImageU8 | None, alpha: ImageU8 | None, caption: str) -> ImageU8:
    """Return the row of an image and its alpha. Files that can no longer be read are left blank."""
    blank = np.full((1, 1, 3), BACKGROUND, np.uint8)
    cells = [blank if source is None else make_thumbnail(source), blank, blank]
    if alpha is not None:
        cells[1] = np.repeat(make_thumbnail(alpha)[..., None], 3, -1)
    if source is not None and alpha is not None:
        cells[2] = composite_on_backdrop(cells[0], resize(alpha, cells[0].shape[:2]))
    return make_captioned_row(cells, caption)


def read_alpha_or_none(path: str) -> ImageU8 | None:
    """Read an alpha, uint8 [H,W]; None if there is none or it cannot be read."""
    try:
        return read_alpha(Path(path)) if path else None
    except ImageError:
        return None


def make_captioned_row(cells: Sequence[ImageU8], caption: str) -> ImageU8:
    """Return a row of images of at most SHEET_CELL_PX, all uint8 [H,W,3], with a caption below.

    The row is as high as its tallest image.
    """
    height = max(cell.shape[0] for cell in cells) + 2 * MARGIN_PX
    row = Image.new("RGB", (len(cells) * SHEET_CELL_PX, height + CAPTION_PX), (BACKGROUND,) * 3)
    for column, cell in enumerate(cells):
        left, top = (SHEET_CELL_PX - cell.shape[1]) // 2, (height - cell.shape[0]) // 2
        row.paste(Image.fromarray(cell), (column * SHEET_CELL_PX + left, top))
    ImageDraw.Draw(row).text((4, height + 1), _escape_missing_glyphs(caption), fill=(220, 220, 220), font=_font())
    return np.asarray(row)


@functools.cache
def _font() -> Any:
    """Return a system font that covers many scripts, or the default font of Pillow."""
    for pattern in FONTS:
        for path in sorted(Path("/").glob(pattern)):
            with contextlib.suppress(OSError):
                return ImageFont.truetype(str(path), FONT_PX)
    return ImageFont.load_default(FONT_PX)


def _escape_missing_glyphs(text: str) -> str:
    """Replace characters that the font does not have by their escape sequences."""
    return "".join(
        character if _has_glyph(character) else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )


@functools.lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    """Return whether the font draws a character differently from one that no font has."""
    if not character.isprintable():
        return False
    if character.isspace():
        return True
    glyph, missing = _font().getmask(character), _font().getmask(NO_CHARACTER)
    return (glyph.size, bytes(glyph)) != (missing.size, bytes(missing))


def make_thumbnail(image: ImageU8) -> ImageU8:
    """Shrink an image to fit a cell."""
    return shrink_image(image, SHEET_CELL_PX - 2 * MARGIN_PX)


def select_evenly(results: Sequence[ImageResult], count: int) -> list[ImageResult]:
    """Select at most ``count`` results at even intervals."""
    if len(results) <= count:
        return list(results)
    return [results[index] for index in np.linspace(0, len(results) - 1, count).round().astype(int)]
