"""Damaged files of all formats give an image or an error message, and nothing else.

``python tests/test_fuzz.py 5000`` tests this many damaged files per format and prints the results.
"""

from __future__ import annotations

import collections
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import OpenImageIO as oiio
import pytest
from PIL import Image

from icm_cli.errors import ImageError
from icm_cli.images.decoding import frame_count, image_size
from icm_cli.images.reading import read_alpha, read_image, read_stored_pixels

LONGEST_S = 10.0
MOST_BYTES = 2_000_000_000
"""Maximum increase in memory over all files of a format."""
RGB = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
BY_PILLOW: dict[str, tuple[str, dict[str, object]]] = {
    **{kind: (kind, {}) for kind in ("jpeg", "png", "gif", "webp", "bmp", "tiff", "avif", "heif", "ppm", "tga")},
    "progressive.jpg": ("jpeg", {"progressive": True}),
    **{f"{name}.tif": ("tiff", {"compression": name}) for name in ("tiff_lzw", "tiff_deflate", "jpeg", "packbits")},
    "group4.tif": ("tiff", {"compression": "group4"}),
}
"""Format and options of Pillow by kind."""
BY_OPENIMAGEIO = (
    ("deep.png", "uint16", "zip"),
    ("deep.tif", "uint16", "lzw"),
    ("half.tif", "half", "zip"),
    ("a.exr", "half", "zip"),
    ("b.exr", "half", "piz"),
    ("a.dpx", "uint16", ""),
    ("a.hdr", "float", ""),
    ("a.sgi", "uint8", ""),
    ("a.jxl", "uint8", ""),
    ("a.jp2", "uint8", ""),
)
KINDS = (*BY_PILLOW, *(name for name, *_ in BY_OPENIMAGEIO))


def complete_file(kind: str, folder: Path) -> bytes:
    """Write a valid file of this kind."""
    if kind in BY_PILLOW:
        memory = io.BytesIO()
        form, options = BY_PILLOW[kind]
        image = Image.fromarray(RGB)
        (image.convert("1") if kind == "group4.tif" else image).save(memory, format=form.upper(), **options)
        return memory.getvalue()
    depth, compression = next(rest for name, *rest in BY_OPENIMAGEIO if name == kind)
    writer = oiio.ImageOutput.create(kind)
    assert writer is not None, f"OpenImageIO has no writer of {kind}"
    spec = oiio.ImageSpec(RGB.shape[1], RGB.shape[0], 3, depth)
    if compression:
        spec.attribute("compression", compression)
    path = folder / f"complete-{kind}"
    assert writer.open(str(path), spec), writer.geterror()
    assert writer.write_image(RGB.astype(np.float32) / 255)
    writer.close()
    return path.read_bytes()


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    """Return the data truncated, or with bytes changed, removed or repeated."""
    torn = bytearray(data)
    way = rng.integers(4)
    if way == 0:
        return bytes(torn[: rng.integers(len(torn))])
    at = int(rng.integers(len(torn)) if rng.random() < 0.5 else rng.integers(min(200, len(torn))))
    if way == 1:
        for _ in range(int(rng.integers(1, 9))):
            torn[int(rng.integers(at, len(torn)))] = int(rng.integers(256))
    elif way == 2:
        del torn[at : at + int(rng.integers(1, 64))]
    else:
        torn[at:at] = torn[at : at + int(rng.integers(1, 64))]
    return bytes(torn)


def outcomes(kind: str, count: int, folder: Path) -> collections.Counter[str]:
    """Read ``count`` damaged files in every way and return the numbers of images and errors."""
    data, rng = complete_file(kind, folder), np.random.default_rng(1)
    found: collections.Counter[str] = collections.Counter()
    for number in range(count):
        path = folder / f"{number % 8}-{kind if '.' in kind else f'a.{kind}'}"
        path.write_bytes(damaged(data, rng))
        began = time.process_time()  # other load of the machine is not a hang
        for read in (read_image, read_alpha, read_stored_pixels, image_size, frame_count):
            sentence = failure_of(read, path)
            assert len(sentence.splitlines()) <= 1
            found["failed" if sentence else "read"] += 1
        assert time.process_time() - began < LONGEST_S, (kind, number)
    return found


def failure_of(read: Callable[[Path], object], path: Path) -> str:
    """Return the error message for a file, or "" if it can be read."""
    try:
        read(path)
    except ImageError as error:
        return str(error)
    return ""


def resident(field: str) -> int:
    """Return the memory of this process: current ("VmRSS") or peak since :func:`forget_peak`
    ("VmHWM")."""
    line = next(each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith(field))
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_files_are_read_or_reported(tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str) -> None:
    """No library prints a line of its own. Memory is checked too if /proc exists."""
    has_peak = Path("/proc/self/clear_refs").exists()
    if has_peak:
        forget_peak()
        before = resident("VmRSS")
    assert outcomes(kind, 200, tmp_path)["failed"] > 0
    assert capfd.readouterr() == ("", "")
    assert not has_peak or resident("VmHWM") - before < MOST_BYTES


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        for each in KINDS:
            start, before = time.monotonic(), resident("VmRSS")
            forget_peak()
            result = outcomes(each, int(sys.argv[1]), Path(home))
            grown = (resident("VmHWM") - before) / 1e6
            print(f"{each}: {dict(result)}, {time.monotonic() - start:.0f} s, {grown:.0f} MB more at most", flush=True)
