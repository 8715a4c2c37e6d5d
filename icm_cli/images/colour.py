"""Convert colours from the colour space of a file to the sRGB that the model sees."""

from __future__ import annotations

import functools
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PyOpenColorIO as ocio
from numpy.typing import NDArray
from PIL import Image, ImageCms

from icm_cli.errors import UsageError, did_you_mean
from icm_cli.geometry import Float, ImageU8, scale_to_u8

BUILT_IN = "ocio://studio-config-latest"
"""Built-in configuration of OpenColorIO: ACES, camera log spaces, Rec.709, P3."""
DISPLAY = "sRGB - Display"
VIEW = "Un-tone-mapped"
"""Default view of scene-referred images. It only converts to sRGB: no tone mapping, values above 1 are clipped."""
SRGB = "sRGB"
"""Name of display-referred sRGB, which needs no transform."""
LINEAR = "lin_rec709_scene"
"""Colour space of EXR and HDR files without a label."""
PRIMARIES = {
    (0.64, 0.33, 0.30, 0.60, 0.15, 0.06): "lin_rec709_scene",
    (0.713, 0.293, 0.165, 0.830, 0.128, 0.044): "lin_ap1_scene",
    (0.7347, 0.2653, 0.0, 1.0, 0.0001, -0.077): "lin_ap0_scene",
    (0.708, 0.292, 0.170, 0.797, 0.131, 0.046): "lin_rec2020_scene",
    (0.680, 0.320, 0.265, 0.690, 0.150, 0.060): "lin_p3d65_scene",
}
"""Chromaticities of an EXR (x and y of red, green and blue) -> colour space."""
CICP_SPACES = {
    **{(1, transfer): "g24_rec709_display" for transfer in (1, 6, 14, 15)},
    (1, 4): "g22_rec709_display",
    (1, 8): "lin_rec709_scene",
    (1, 13): SRGB,
    (9, 8): "lin_rec2020_scene",
    (9, 16): "pq_rec2020_display",
    (9, 18): "hlg_rec2020_display",
    (12, 8): "lin_p3d65_scene",
    (12, 13): "srgb_p3d65_display",
    (12, 16): "pq_p3d65_display",
    (12, 17): "g26_p3d65_display",
}
"""Codes of ITU-T H.273 for primaries and transfer function -> colour space."""
CICP_UNSPECIFIED = 2
HDR_SPACES = ("pq_rec2020_display", "hlg_rec2020_display", "pq_p3d65_display")
HDR_WHITE = 2.03
"""Reference white of HDR, 203 cd/m2 (ITU-R BT.2408), relative to that of sRGB."""
ACES = frozenset({"lin_ap0_scene", "lin_ap1_scene"})
_OCIO_ERRORS = (ocio.Exception, ocio.ExceptionMissingFile)
ACES_WHITE = 0.32168, 0.33767
D65 = 0.3127, 0.3290
"""White point, x and y, of the spaces in ``PRIMARIES`` that are not ACES."""


@dataclass(frozen=True)
class ColourSettings:
    """Settings for reading images: colour space, view, layer and value range."""

    space: str = "auto"
    """Colour space in the configuration; "auto": the label of the file, or the default of its format."""
    config: str = ""
    """OpenColorIO configuration file; "": $OCIO, or the built-in configuration."""
    view: str = ""
    """View of scene-referred images."""
    exposure: float = 0.0
    """Exposure in stops, applied before the view."""
    layer: str = ""
    """Layer of an EXR, by part name or channel prefix; "": selected by name."""
    white: float | None = None
    """Value of white (``--white``) in images with more than 8 bits; None for the largest value of their type."""
    is_matte: bool = False
    """Whether the file is a mask or an alpha, to which no option applies."""
    has_labels: bool = False
    """Whether the file is a mask whose values are labels, and so may have any value."""

    def validate(self) -> None:
        """Raise UsageError for an unknown configuration, colour space or view, or if the space cannot be converted."""
        if self == ColourSettings():
            return
        config, display = _load_config(self.config), _display_name(self.config)
        if self.space not in ("auto", SRGB) and config.getColorSpace(self.space) is None:
            raise UsageError(
                f"colour space {self.space!r} is not in the configuration. "
                f"{did_you_mean(self.space, list(config.getColorSpaceNames()))}"
            )
        if self.view and self.view not in config.getViews(display):
            raise UsageError(
                f"view {self.view!r} is not a view of {display!r}. "
                f"{did_you_mean(self.view, list(config.getViews(display)))}"
            )
        if self.space not in ("auto", SRGB):
            _display_processor(self.config, self.space, self.view, self.exposure)

    @property
    def config_identity(self) -> str:
        """Text that changes with the content of the OpenColorIO configuration. It is part of the digests of alphas."""
        if path := self.config or os.environ.get("OCIO", ""):
            try:
                return str(_load_config(self.config).getCacheID())
            except UsageError:  # images that need no configuration are matted without it
                return f"unreadable {path}"
        return f"{BUILT_IN} of OpenColorIO {ocio.GetVersion()}"


DEFAULT_COLOUR = ColourSettings()


def to_display_srgb(pixels: NDArray[Any], scale: float, space: str, colour: ColourSettings) -> ImageU8:
    """Convert pixels [H,W,1] or [H,W,3] to sRGB uint8 [H,W,3] as the model sees them.

    ``scale``: the value of white; floats may exceed it. ``space``: the colour space of the pixels, which counts instead
    of ``colour.space``. sRGB pixels are only scaled to 8 bits; exposure and view apply to other colour spaces.
    """
    if pixels.shape[-1] == 1:
        pixels = np.repeat(pixels, 3, axis=-1)
    if space == SRGB:
        if pixels.dtype == np.uint8:
            return np.ascontiguousarray(pixels)
        if pixels.dtype == np.uint16:
            return _rounding_table(scale)[pixels]
        return scale_to_u8(pixels, scale)
    values = np.ascontiguousarray(pixels, dtype=np.float32)
    if scale != 1.0:
        values = values / np.float32(scale)
    displayed = np.empty(values.shape, np.uint8)
    processor = _display_processor(colour.config, space, colour.view, colour.exposure)
    processor.apply(_packed_image(values), _packed_image(displayed))
    return displayed


@functools.lru_cache(maxsize=8)
def _rounding_table(scale: float) -> ImageU8:
    """Return the 8-bit value of every 16-bit value. A lookup needs far less memory than a float copy of the image."""
    return scale_to_u8(np.arange(65536), scale)


def _packed_image(pixels: NDArray[Any]) -> Any:
    """Return pixels [H,W,3], float32 or uint8, as an image of OpenColorIO that shares their memory."""
    depth = ocio.BIT_DEPTH_F32 if pixels.dtype == np.float32 else ocio.BIT_DEPTH_UINT8
    height, width, _ = pixels.shape
    row_stride, column_stride, channel_stride = pixels.strides
    return ocio.PackedImageDesc(
        pixels, width, height, ocio.CHANNEL_ORDERING_RGB, depth, channel_stride, column_stride, row_stride
    )


@functools.lru_cache(maxsize=64)
def find_colour_space(label: str | None, config: str) -> str | None:
    """Return the name that the configuration has for a colour space; None if it has no such space.

    ``label``: name or alias of the space in the built-in configuration. Older configurations may lack it. Those of ACES
    1.3 have the space under its built-in name. In those of ACES 1.2, OpenColorIO finds linear spaces by transforms.
    """
    if not label:
        return None
    loaded, built_in = _load_config(config), _load_config(BUILT_IN).getColorSpace(label)
    space = loaded.getColorSpace(label) or (built_in and loaded.getColorSpace(built_in.getName()))
    if space is not None:
        return str(space.getName())
    try:
        return str(ocio.Config.IdentifyBuiltinColorSpace(loaded, _load_config(BUILT_IN), label))
    except _OCIO_ERRORS:
        return None


@dataclass(frozen=True)
class CodePoints:
    """Colour space that a PNG (chunk cICP), AVIF or HEIC (box nclx) states by the codes of ITU-T H.273."""

    primaries: int
    transfer: int
    is_full_range: bool = True
    """Whether black is 0 and white the largest value. In the narrow range of video, black is above 0."""

    def find_space(self, config: str) -> tuple[str | None, str]:
        """Return the name that the configuration has for the space, and the end of a notice.

        The name is None if icm does not support the space. The notice is "" if it is supported or not specified.
        """
        codes = self.primaries, self.transfer
        label = CICP_SPACES.get(codes)
        space = SRGB if label == SRGB else find_colour_space(label, config)
        if space is not None and self.is_full_range:
            return space, ""
        if CICP_UNSPECIFIED in codes:
            return None, ""
        problem = "which icm does not know"
        if not self.is_full_range:
            problem = "whose narrow range of video icm does not support"
        stated = f"the colour space {self.primaries}/{self.transfer} of ITU-T H.273"
        return None, f"{stated}, {problem}, and is read as sRGB; give --colorspace if it has another one"


def space_of_primaries(chromaticities: tuple[float, ...]) -> str | None:
    """Return the linear space of an EXR's chromaticities, None if they are unknown.

    ``chromaticities``: x and y of red, green, blue and white.
    """
    for primaries, space in PRIMARIES.items():
        if np.allclose(chromaticities[:6], primaries, atol=2e-3):
            return space
    return None


def to_scene_linear(pixels: Float, space: str, config: str) -> tuple[Float, str]:
    """Convert colours [H,W,3] on the scale 0..1 to a scene-linear space; return them with its name.

    sRGB becomes linear Rec.709, which has the same primaries. Other spaces with a transfer curve are converted to the
    role ``scene_linear`` of the configuration. Linear spaces, data and spaces that the configuration lacks are not
    changed, and without this role nothing is.
    """
    if space == SRGB:
        return _convert_colours(pixels, BUILT_IN, "srgb_rec709_scene", LINEAR), LINEAR
    loaded = _load_config(config)
    source = loaded.getColorSpace(space)
    if source is None or source.isData() or loaded.isColorSpaceLinear(source.getName(), ocio.REFERENCE_SPACE_SCENE):
        return pixels, space
    if not loaded.hasRole("scene_linear"):
        return pixels, space
    scene_linear = str(loaded.getColorSpace("scene_linear").getName())
    return _convert_colours(pixels, config, space, scene_linear), scene_linear


def colour_space_attributes(space: str, config: str) -> dict[str, Any]:
    """Return the attributes that label an EXR with a linear space of the configuration: its id and chromaticities.

    Linear Rec.709 (``LINEAR``) needs none, because it is the default of EXR.
    """
    ocio_space = None if space == LINEAR else _load_config(config).getColorSpace(space)
    if ocio_space is None or ocio_space.getName() == find_colour_space(LINEAR, config):
        return {}
    interop_id = ocio_space.getInteropID() if hasattr(ocio_space, "getInteropID") else ""  # not in every OpenColorIO 2
    attributes: dict[str, Any] = {"colorInteropID": interop_id or ocio_space.getName()}
    for primaries, name in PRIMARIES.items():
        if find_colour_space(name, config) == ocio_space.getName():
            attributes["chromaticities"] = (*primaries, *(ACES_WHITE if name in ACES else D65))
            break
    return attributes


def _convert_colours(pixels: Float, config: str, source: str, target: str) -> Float:
    """Convert colours [H,W,3] from one colour space of a configuration to another."""
    values = np.array(pixels, np.float32, order="C")
    _load_config(config).getProcessor(source, target).getDefaultCPUProcessor().apply(_packed_image(values))
    return values


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """Convert a Pillow image from its ICC profile to sRGB. Return None if the profile cannot be used."""
    try:
        transform = _icc_transform(profile, image.mode)
        return image if transform is None else ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None


@functools.lru_cache(maxsize=32)
def _icc_transform(profile: bytes, mode: str) -> Any:
    """Return the transform of a profile to sRGB, None if the profile is sRGB."""
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "RGB" and "sRGB" in (ImageCms.getProfileDescription(source) or ""):
        return None
    return ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")


def _chosen_config(path: str) -> str:
    """Return the path or name of an OpenColorIO configuration; "" stands for $OCIO, or the built-in one."""
    return path or os.environ.get("OCIO", "") or BUILT_IN


@functools.lru_cache(maxsize=4)
def _load_config(path: str) -> Any:
    """Load an OpenColorIO configuration; "" stands for $OCIO, or the built-in one. Raises UsageError."""
    chosen = _chosen_config(path)
    try:
        if chosen.startswith("ocio://"):
            return ocio.Config.CreateFromBuiltinConfig(chosen.removeprefix("ocio://"))
        return ocio.Config.CreateFromFile(str(Path(chosen)))
    except (*_OCIO_ERRORS, TypeError) as error:  # TypeError: a path that is not UTF-8
        if chosen.startswith("ocio://"):
            reason = f"is not built into OpenColorIO {ocio.GetVersion()}"
        elif not Path(chosen).exists():
            reason = "does not exist"
        else:
            reason = f"is not an OpenColorIO configuration ({' '.join(str(error).split())})"
        raise UsageError(
            f"the OpenColorIO configuration {chosen} {reason}; give another one with --ocio or $OCIO"
        ) from error


def _display_name(config: str) -> str:
    """Return the name of the sRGB display of a configuration, or of its default display if it has none."""
    displays = list(_load_config(config).getDisplays())
    return DISPLAY if DISPLAY in displays else str(_load_config(config).getDefaultDisplay())


@functools.lru_cache(maxsize=64)
def _display_processor(path: str, space: str, view: str, exposure: float) -> Any:
    """Return the processor from float32 in a space to display sRGB uint8. It rounds itself, faster than NumPy does.

    ``path``: the configuration. ``view``: "" for the default view. ``exposure``: in stops. Raises UsageError if the
    configuration does not have the space, or cannot convert it.
    """
    config, display = _load_config(path), _display_name(path)
    source = find_colour_space(space, path)
    if source is None:
        raise UsageError(
            f"the OpenColorIO configuration {_chosen_config(path)} has no colour space {space}; give one of its colour "
            "spaces with --colorspace, or another configuration with --ocio or $OCIO"
        )
    if not view:
        view = VIEW if VIEW in config.getViews(display) else str(config.getDefaultView(display))
    gain = 2.0**exposure
    if source in {find_colour_space(label, path) for label in HDR_SPACES}:
        gain /= HDR_WHITE
    linear = "scene_linear"
    if not config.hasRole(linear):
        if gain != 1.0:
            raise UsageError(
                f"the OpenColorIO configuration {_chosen_config(path)} has no role {linear}, which --exposure and HDR "
                "need; add the role, or give another configuration with --ocio or $OCIO"
            )
        linear = source  # the view converts it directly
    group = ocio.GroupTransform()
    group.appendTransform(ocio.ColorSpaceTransform(src=source, dst=linear))
    if gain != 1.0:
        group.appendTransform(ocio.MatrixTransform.Scale([gain, gain, gain, 1.0]))
    group.appendTransform(ocio.DisplayViewTransform(src=linear, display=display, view=view))
    try:
        processor = config.getProcessor(group)
    except _OCIO_ERRORS as error:
        raise UsageError(
            f"the OpenColorIO configuration {_chosen_config(path)} cannot convert {space} to {display} "
            f"({' '.join(str(error).split())}); give another configuration with --ocio or $OCIO"
        ) from error
    return processor.getOptimizedCPUProcessor(ocio.BIT_DEPTH_F32, ocio.BIT_DEPTH_UINT8, ocio.OPTIMIZATION_DEFAULT)
