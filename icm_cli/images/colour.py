"""Colour: from a file's own colour space to the display-referred sRGB that the model sees."""

from __future__ import annotations

import functools
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PyOpenColorIO as ocio
from numpy.typing import NDArray
from PIL import Image, ImageCms

from icm_cli.errors import UsageError, did_you_mean
from icm_cli.geometry import Float, ImageU8, round_to_u8

BUILT_IN = "ocio://studio-config-latest"
"""OpenColorIO's own configuration: ACES, camera logs, Rec.709, P3."""
DISPLAY = "sRGB - Display"
VIEW = "Un-tone-mapped"
"""View of scene-referred pictures: what was 0..1 looks as the same picture saved as sRGB does."""
SRGB = "sRGB"
"""Display-referred sRGB, which needs no transform."""
LINEAR = "lin_rec709_scene"
"""Space of EXR and HDR that do not say theirs."""
PRIMARIES = {
    (0.64, 0.33, 0.30, 0.60, 0.15, 0.06): "lin_rec709_scene",
    (0.713, 0.293, 0.165, 0.830, 0.128, 0.044): "lin_ap1_scene",
    (0.7347, 0.2653, 0.0, 1.0, 0.0001, -0.077): "lin_ap0_scene",
    (0.708, 0.292, 0.170, 0.797, 0.131, 0.046): "lin_rec2020_scene",
    (0.680, 0.320, 0.265, 0.690, 0.150, 0.060): "lin_p3d65_scene",
}
"""Chromaticities (red, green, blue; x and y each) of an EXR, and the space they stand for."""
MOST_STOPS = 30
ACES = frozenset({"lin_ap0_scene", "lin_ap1_scene"})
ACES_WHITE = 0.32168, 0.33767
D65 = 0.3127, 0.3290
"""White of the other spaces of ``PRIMARIES``."""


@dataclass(frozen=True)
class ColourSettings:
    """Colour space of pictures, and the way they are shown to the model; their layer and scale.

    ``space``: "auto", or a name of the configuration. ``config``: an OpenColorIO file, "" for $OCIO or the built-in
    one. ``view``: of scene-referred pictures. ``exposure``: stops, before the view. ``layer``: of an EXR, by its part's
    name or its channels' prefix; "" for its picture. ``white``: the value of white in pictures of more than 8 bits,
    where it is not that of their type. ``is_matte``: a mask or an alpha, whose numbers no option explains.
    ``has_labels``: a mask whose numbers are labels, of any size.
    """

    space: str = "auto"
    config: str = ""
    view: str = ""
    exposure: float = 0.0
    layer: str = ""
    white: float | None = None
    is_matte: bool = False
    has_labels: bool = False

    def validate(self) -> None:
        """Raises UsageError for a configuration, space or view that is not there, naming those nearest to it; and for a
        white that is none."""
        if self == ColourSettings():
            return
        if self.white is not None and not (0.0 < self.white < math.inf):
            raise UsageError(f"--white is {self.white:g}; expected a value above 0, such as 255")
        if not abs(self.exposure) <= MOST_STOPS:
            raise UsageError(f"--exposure is {self.exposure:g}; expected -{MOST_STOPS} to {MOST_STOPS} stops")
        config, display = _config(self.config), _display(self.config)
        if self.space not in ("auto", SRGB) and config.getColorSpace(self.space) is None:
            raise UsageError(
                f"colour space {self.space!r} is not in the configuration. "
                f"{did_you_mean(self.space, list(config.getColorSpaceNames()))}"
            )
        if self.view and self.view not in config.getViews(display):
            raise UsageError(
                f"view {self.view!r} is none of {display!r}. {did_you_mean(self.view, list(config.getViews(display)))}"
            )

    def digest_text(self) -> str:
        """All of it in one line, for the digest of a run; "" where it is as ever."""
        if self == ColourSettings():
            return ""
        return (
            f"{self.space} {_config(self.config).getCacheID()} {self.view} {self.exposure} {self.layer!r} {self.white}"
        )


DEFAULT_COLOUR = ColourSettings()


def to_display_srgb(pixels: NDArray[Any], scale: float, space: str, colour: ColourSettings) -> ImageU8:
    """Pixels [H,W,1|3] in 0..scale (floats may exceed it) in a space -> sRGB uint8 [H,W,3], as the model sees them.

    What is sRGB is shown as it is; exposure and view are of other spaces.
    """
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
    if space == SRGB:
        if pixels.dtype == np.uint8:
            return np.ascontiguousarray(pixels)
        if pixels.dtype == np.uint16:
            return _rounded_sixteen(scale)[pixels]
        return round_to_u8(pixels.astype(np.float32) * np.float32(255.0 / scale))
    values = np.ascontiguousarray(pixels, dtype=np.float32)
    if scale != 1.0:
        values = values / np.float32(scale)
    seen = np.empty(values.shape, np.uint8)
    _processor(colour.config, space, colour.view, colour.exposure).apply(_described(values), _described(seen))
    return seen


@functools.lru_cache(maxsize=8)
def _rounded_sixteen(scale: float) -> ImageU8:
    """The 8-bit value of each of 16 bits: looking up takes no copies in float, which are eight times as large."""
    return round_to_u8(np.arange(65536, dtype=np.float32) * np.float32(255.0 / scale))


def _described(pixels: NDArray[Any]) -> Any:
    """Pixels [H,W,3], float32 or uint8, as OpenColorIO takes them; they must outlive it."""
    depth = ocio.BIT_DEPTH_F32 if pixels.dtype == np.float32 else ocio.BIT_DEPTH_UINT8
    height, width, _ = pixels.shape
    rows, columns, channels = pixels.strides
    return ocio.PackedImageDesc(pixels, width, height, ocio.CHANNEL_ORDERING_RGB, depth, channels, columns, rows)


def find_colour_space(label: str | None, config: str) -> str | None:
    """The configuration's own name of the space that a file's label means, None for one that is not there."""
    if not label:
        return None
    found = _config(config).getColorSpace(label)
    return None if found is None else str(found.getName())


def space_of_primaries(chromaticities: tuple[float, ...]) -> str | None:
    """The linear space of an EXR's chromaticities (eight numbers, white last), None for unknown ones."""
    for primaries, space in PRIMARIES.items():
        if np.allclose(chromaticities[:6], primaries, atol=2e-3):
            return space
    return None


def to_scene_linear(pixels: Float, space: str, config: str) -> tuple[Float, str]:
    """Colours [H,W,3] on the scale 0..1 as an EXR holds them, scene-linear, and the name of their space.

    sRGB keeps its primaries, those of Rec.709; other curves come to the configuration's ``scene_linear``. What is
    linear, or no colour, is left as it is.
    """
    if space == SRGB:
        return _converted(pixels, BUILT_IN, "srgb_rec709_scene", LINEAR), LINEAR
    found = _config(config).getColorSpace(space)
    if (
        found is None
        or found.isData()
        or _config(config).isColorSpaceLinear(found.getName(), ocio.REFERENCE_SPACE_SCENE)
    ):
        return pixels, space
    return _converted(pixels, config, space, "scene_linear"), str(
        _config(config).getColorSpace("scene_linear").getName()
    )


def colour_space_attributes(space: str, config: str) -> dict[str, Any]:
    """Attributes that say in which linear space an EXR's colours are; none for Rec.709's, which an EXR has without."""
    found = None if space == LINEAR else _config(config).getColorSpace(space)
    if found is None or found.getName() == find_colour_space(LINEAR, config):
        return {}
    interop = getattr(found, "getInteropID", str)() or found.getName()
    chromaticities = [
        (*primaries, *(ACES_WHITE if each in ACES else D65))
        for primaries, each in PRIMARIES.items()
        if find_colour_space(each, config) == found.getName()
    ]
    return {"colorInteropID": interop, **({"chromaticities": chromaticities[0]} if chromaticities else {})}


def _converted(pixels: Float, config: str, space: str, wanted: str) -> Float:
    values = np.array(pixels, np.float32, order="C")
    _config(config).getProcessor(space, wanted).getDefaultCPUProcessor().apply(_described(values))
    return values


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """A Pillow image brought from its ICC profile to sRGB; None where the profile cannot be used."""
    try:
        transform = _icc_transform(profile, image.mode)
        return image if transform is None else ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


@functools.lru_cache(maxsize=32)
def _icc_transform(profile: bytes, mode: str) -> Any:
    """None where the profile is sRGB already."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "RGB" and "sRGB" in (ImageCms.getProfileDescription(source) or ""):
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


@functools.lru_cache(maxsize=4)
def _config(path: str) -> Any:
    chosen = path or os.environ.get("OCIO", "") or BUILT_IN
    try:
        if chosen.startswith("ocio://"):
            return ocio.Config.CreateFromBuiltinConfig(chosen.removeprefix("ocio://"))
        return ocio.Config.CreateFromFile(str(Path(chosen)))
    except (ocio.Exception, ocio.ExceptionMissingFile) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"the OpenColorIO configuration {chosen} cannot be used: {reason}") from error


def _display(config: str) -> str:
    displays = list(_config(config).getDisplays())
    return DISPLAY if DISPLAY in displays else str(_config(config).getDefaultDisplay())


@functools.lru_cache(maxsize=64)
def _processor(path: str, space: str, view: str, exposure: float) -> Any:
    """From float32 in a space to uint8 as the model sees it: rounding there is three times as fast as NumPy's after."""
    config, display = _config(path), _display(path)
    views = list(config.getViews(display))
    chosen = view or (VIEW if VIEW in views else str(config.getDefaultView(display)))
    linear = "scene_linear"
    group = ocio.GroupTransform()
    group.appendTransform(ocio.ColorSpaceTransform(src=space, dst=linear))
    if exposure:
        gain = 2.0**exposure
        group.appendTransform(ocio.MatrixTransform.Scale([gain, gain, gain, 1.0]))
    group.appendTransform(ocio.DisplayViewTransform(src=linear, display=display, view=chosen))
    return config.getProcessor(group).getOptimizedCPUProcessor(
        ocio.BIT_DEPTH_F32, ocio.BIT_DEPTH_UINT8, ocio.OPTIMIZATION_DEFAULT
    )
