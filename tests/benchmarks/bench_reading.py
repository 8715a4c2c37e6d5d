"""Time to read 4K pictures, and where it goes: ``python tests/benchmarks/bench_reading.py``, about two minutes.

The former ways are written plainly here, so that before and after come from one run: every picture's channels copied
out of what was decoded, and OpenColorIO's default processor in float, rounded by NumPy.
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


def medians(*works: Callable[[], Any]) -> list[float]:
    """Median seconds of each, taken in turns so that what else the machine does falls on all of them."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(REPEATS):
        for work, taken in zip(works, times, strict=True):
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def picture() -> np.ndarray:
    """Smooth light with grain, float32 [H,W,3], most of it in 0..1 and some beyond."""
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


def decoded_alone(path: Path) -> Any:
    """Pixels by the decoder alone, in the type that icm asks it for."""
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


def steps(path: Path, wanted: colour.ColourSettings = colour.DEFAULT_COLOUR) -> None:
    """Print the time of a file and the share of each step."""
    decoded = decode_image(path, wanted=wanted)
    whole, alone, to_pixels, to_view = medians(
        lambda: read_image(path, wanted),
        lambda: decoded_alone(path),
        lambda: decode_image(path, wanted=wanted),
        lambda: colour.to_display_srgb(decoded.pixels, decoded.scale, decoded.space, wanted),
    )
    parts = {"decoder": alone, "checks and channels": max(0.0, to_pixels - alone), "view": to_view}
    shares = ", ".join(f"{name} {part / sum(parts.values()):.0%}" for name, part in parts.items())
    print(f"{path.name} ({path.stat().st_size / 1e6:.1f} MB): {whole:.3f} s; {shares}")


def views(path: Path, space: str, view: str) -> None:
    """Print the time of the model's view of an EXR, the former way and now, and how far the two are apart."""
    wanted = colour.ColourSettings(space, view=view)
    decoded, processor = decode_image(path, wanted=wanted), former_processor(space, view)
    before, after = medians(
        lambda: former_view(decoded, processor),
        lambda: colour.to_display_srgb(decoded.pixels, decoded.scale, decoded.space, wanted),
    )
    seen = colour.to_display_srgb(decoded.pixels, decoded.scale, decoded.space, wanted).astype(int)
    apart = np.abs(seen - former_view(decoded, processor)).max()
    print(f"{space} by {view}: {before:.3f} s before, {after:.3f} s now ({before / after:.1f} x), {apart} of 255 apart")


def channels(path: Path) -> None:
    """Print the time of taking the picture's channels from what was decoded, the former way and now."""
    values = decoded_alone(path)
    before, after = medians(
        lambda: np.ascontiguousarray(values[..., [0, 1, 2]]), lambda: np.ascontiguousarray(values[..., 0:3])
    )
    print(f"channels of {path.name}: {before:.3f} s before, {after:.3f} s now")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        folder, light = Path(home), picture()
        Image.fromarray(round_to_u8(light * np.float32(200))).save(folder / "a.jpg", quality=95)
        files = [folder / "a.jpg", write(folder / "a.png", light * np.float32(0.75), "uint16")]
        files += [write(folder / "a.exr", light, "half")]
        for file in files:
            steps(file)
        channels(files[-1])
        for one_space in (colour.LINEAR, "ACEScg", "ARRI LogC3 (EI800)"):
            views(files[-1], one_space, colour.VIEW)
        views(files[-1], "ACEScg", ACES)
