"""A picture of the run: source, alpha, and cut-out on grey, one row per image."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from icm_cli.files import atomic_write
from icm_cli.geometry import ImageU8, round_to_u8
from icm_cli.images.colour import ColourSettings
from icm_cli.images.kinds import OWN_SHEET_MARK
from icm_cli.images.reading import read_alpha, read_image
from icm_cli.reports.report import Report
from icm_cli.reports.result import ImageResult

MOST_ROWS = 48
"""A sheet of more rows is no longer looked at; from more images this many are taken evenly."""
CELL_PX = 240
CAPTION_PX = 18
FONT_PX = 13
FONTS = (
    "usr/share/fonts/**/NotoSansCJK*-Regular.ttc",
    "usr/share/fonts/**/DejaVuSans.ttf",
    "System/Library/Fonts/Supplemental/Arial Unicode.ttf",
)
"""Fonts with many scripts, the first that is there is taken."""
NO_CHARACTER = "\uffff"
GREY = 128


def write_contact_sheet(path: Path, report: Report) -> None:
    """Write the sheet of every image that has its alpha (at most MOST_ROWS, evenly taken). Raises OutputError."""
    shown = evenly([result for result in report.results if result.has_alpha], MOST_ROWS)
    rows = [_row(result, report.album.colour) for result in shown]
    sheet = np.concatenate(rows) if rows else np.full((CELL_PX, 3 * CELL_PX, 3), GREY, np.uint8)
    with atomic_write(path) as file:
        mark = PngImagePlugin.PngInfo()
        mark.add_text(OWN_SHEET_MARK.decode(), "contact sheet")
        Image.fromarray(sheet).save(file, format="PNG", optimize=True, pnginfo=mark)


def cut_out(rgb: ImageU8, alpha: ImageU8) -> ImageU8:
    """The thing on grey: uint8 [H,W,3] from a picture [H,W,3] and its alpha [H,W]."""
    weight = alpha[..., None].astype(np.float32) / 255.0
    return round_to_u8(rgb * weight + GREY * (1 - weight))


def _row(result: ImageResult, colour: ColourSettings) -> ImageU8:
    rgb = thumbnail(read_image(Path(result.source), colour, max(0, result.page - 1)).to_display_window().rgb)
    alpha = thumbnail(read_alpha(Path(result.output)))
    caption = (result.name or Path(result.source).name) + ("   reference's thing not found" if result.not_found else "")
    return captioned_row([rgb, np.repeat(alpha[..., None], 3, -1), cut_out(rgb, alpha)], caption)


def captioned_row(cells: Sequence[ImageU8], caption: str) -> ImageU8:
    """Pictures uint8 [h,w,3] of at most CELL_PX side by side, and a line of text below them: uint8 [H,W,3]."""
    row = Image.new("RGB", (len(cells) * CELL_PX, CELL_PX + CAPTION_PX), (24, 24, 24))
    for column, cell in enumerate(cells):
        left, top = (CELL_PX - cell.shape[1]) // 2, (CELL_PX - cell.shape[0]) // 2
        row.paste(Image.fromarray(cell), (column * CELL_PX + left, top))
    ImageDraw.Draw(row).text((4, CELL_PX + 1), _legible(caption), fill=(220, 220, 220), font=_font())
    return np.asarray(row)


@functools.cache
def _font() -> Any:
    """A font of the system with many scripts, where there is one, else Pillow's own."""
    for pattern in FONTS:
        for path in sorted(Path("/").glob(pattern)):
            with contextlib.suppress(OSError):
                return ImageFont.truetype(str(path), FONT_PX)
    return ImageFont.load_default(FONT_PX)


def _legible(text: str) -> str:
    """Text whose characters the font has; others are written as their codes, not as boxes."""
    return "".join(
        each if _has_glyph(each) else each.encode("unicode_escape", "surrogatepass").decode() for each in text
    )


@functools.lru_cache(maxsize=4096)
def _has_glyph(character: str) -> bool:
    """Whether the font draws a character in another way than one that no font has."""
    if not character.isprintable():
        return False
    drawn, missing = (_font().getmask(each) for each in (character, NO_CHARACTER))
    return character.isspace() or (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))


def thumbnail(image: ImageU8) -> ImageU8:
    """A picture shrunk to fit a cell."""
    small = Image.fromarray(image)
    small.thumbnail((CELL_PX - 4, CELL_PX - 4), Image.Resampling.BOX)
    return np.asarray(small)


def evenly(results: Sequence[ImageResult], most: int) -> list[ImageResult]:
    """At most ``most`` of them, evenly taken."""
    if len(results) <= most:
        return list(results)
    return [results[index] for index in np.linspace(0, len(results) - 1, most).round().astype(int)]
