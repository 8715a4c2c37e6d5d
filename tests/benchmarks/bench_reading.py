"""Time to read 4K images, by step: ``python tests/benchmarks/bench_reading.py``, about two minutes.

For comparison, this file contains the former implementation: copying the channels of the decoded
image, and the default processor of OpenColorIO in float with rounding by NumPy.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import OpenImageIO as oiio
import PyOpenColorIO as ocio
from PIL import Image

from icm_cli.geometry import round_to_u8
from icm_cli.images import colour
from icm_cli.images.decoding import decode_image
from icm_cli.images.pixels import DecodedImage
from icm_cli.images.reading import read_image

HEIGHT, WIDTH = 2160, 3840
REPEATS = 5
ACES = "ACES 2.0 - SDR 100 nits (Rec.709)"


def median_seconds(*works: Callable[[], Any]) -> list[float]:
    """Return the median seconds of each function.

    They run in turns, so that other load affects all of them equally.
    """
    times: list[list[float]] = [[] for _ in works]
    for _ in range(REPEATS):
        for work, taken in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def make_image() -> np.ndarray:
    """Return a smooth image with grain, float32 [H,W,3], mostly in 0..1."""
    rng = np.random.default_rng(0)
    coarse = cv2.resize(rng.random((135, 240, 3), np.float32), (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    return np.maximum(1.2 * coarse + rng.normal(0, 0.01, coarse.shape), 0).astype(np.float32)


def write(path: Path, pixels: np.ndarray, kind: str) -> Path:
    spec = oiio.ImageSpec(WIDTH, HEIGHT, pixels.shape[2], kind)
    spec.attribute("compression", "zip")
    file = oiio.ImageOutput.create(str(path))
    assert file.open(str(path), spec), file.geterror()
    assert file.write_image(pixels), file.geterror()
    file.close()
    return path


def decode_only(path: Path) -> Any:
    """Return the pixels as decoded by the library, in the type that icm requests."""
    if path.suffix == ".jpg":
        with Image.open(path) as image:
            return np.asarray(image)
    file = oiio.ImageInput.open(str(path))
    spec = file.spec()
    pixels = file.read_image(0, 0, 0, spec.nchannels, "uint16" if str(spec.format) == "uint16" else "float")
    file.close()
    return pixels


def former_processor(space: str, view: str) -> Any:
    config = ocio.Config.CreateFromBuiltinConfig(colour.BUILT_IN.removeprefix("ocio://"))
    group = ocio.GroupTransform()
    group.appendTransform(ocio.ColorSpaceTransform(src=space, dst="scene_linear"))
    group.appendTransform(ocio.DisplayViewTransform(src="scene_linear", display=colour.DISPLAY, view=view))
    return config.getProcessor(group).getDefaultCPUProcessor()


def former_view(decoded: DecodedImage, processor: Any) -> np.ndarray:
    values = np.ascontiguousarray(decoded.pixels, dtype=np.float32) / np.float32(decoded.scale)
    processor.applyRGB(values)
    return round_to_u8(values * np.float32(255.0))


def print_steps(path: Path, settings: colour.ColourSettings = colour.DEFAULT_COLOUR) -> None:
    """Print the time to read a file, and the fraction of each step."""
    decoded = decode_image(path, settings=settings)
    total, decoder, to_pixels, to_view = median_seconds(
        lambda: read_image(path, settings),
        lambda: decode_only(path),
        lambda: decode_image(path, settings=settings),
        lambda: colour.to_display_srgb(decoded.pixels, decoded.scale, decoded.space, settings),
    )
    parts = {"decoder": decoder, "checks and channels": max(0.0, to_pixels - decoder), "view": to_view}
    shares = ", ".join(f"{name} {part / sum(parts.values()):.0%}" for name, part in parts.items())
    print(f"{path.name} ({path.stat().st_size / 1e6:.1f} MB): {total:.3f} s; {shares}")


def print_views(path: Path, space: str, view: str) -> None:
    """Print the time of the display transform of an EXR with the former and the current code, and
    their difference."""
    settings = colour.ColourSettings(space, view=view)
    decoded, processor = decode_image(path, settings=settings), former_processor(space, view)
    before, after = median_seconds(
        lambda: former_view(decoded, processor),
        lambda: colour.to_display_srgb(decoded.pixels, decoded.scale, decoded.space, settings),
    )
    seen = colour.to_display_srgb(decoded.pixels, decoded.scale, decoded.space, settings).astype(int)
    difference = np.abs(seen - former_view(decoded, processor)).max()
    print(
        f"{space} by {view}: {before:.3f} s before, {after:.3f} s now ({before / after:.1f} x), differ by {difference}"
    )


def print_channels(path: Path) -> None:
    """Print the time to select channels with the former and the current code."""
    values = decode_only(path)
    before, after = median_seconds(
        lambda: np.ascontiguousarray(values[..., [0, 1, 2]]), lambda: np.ascontiguousarray(values[..., 0:3])
    )
    print(f"channels of {path.name}: {before:.3f} s before, {after:.3f} s now")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        folder, light = Path(home), make_image()
        Image.fromarray(round_to_u8(light * np.float32(200))).save(folder / "a.jpg", quality=95)
        files = [folder / "a.jpg", write(folder / "a.png", light * np.float32(0.75), "uint16")]
        files += [write(folder / "a.exr", light, "half")]
        for file in files:
            print_steps(file)
        print_channels(files[-1])
        for one_space in (colour.LINEAR, "ACEScg", "ARRI LogC3 (EI800)"):
            print_views(files[-1], one_space, colour.VIEW)
        print_views(files[-1], "ACEScg", ACES)
