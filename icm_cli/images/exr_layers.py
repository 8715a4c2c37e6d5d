"""Layers of an OpenEXR file: select the part and the channels that hold the image."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_cli.errors import ImageError

DEFAULT_LAYER = "RGB"
"""Name that selects the channels R, G and B without a prefix."""
DATA_NAMES = re.compile(
    r"z|z_?back|.*depth.*|(object|obj|material|mat|asset|instance|prim|render|user|mesh|node)?_?ids?|index(ob|ma)|.*crypto.*",
    re.IGNORECASE,
)
"""Names of layers, parts or channels that hold depth, ids or cryptomattes, which are not images."""
BEAUTY_NAMES = frozenset({"beauty", "combined", "rgb", "rgba"})
"""Names of layers, or of their last parts, that hold the whole image and not a component of it."""


@dataclass(frozen=True)
class ImageLayer:
    """The channels to read from one part: three colours or one grey, and perhaps an alpha."""

    part: int
    colours: tuple[int, ...]
    """Indices of the colour channels."""
    alpha: int | None
    """Index of the alpha channel."""
    prefix: str = ""
    """Channel name before the last dot, such as "beauty" in beauty.R."""
    part_name: str = ""

    @property
    def name(self) -> str:
        return self.prefix or self.part_name or DEFAULT_LAYER

    def has_name(self, wanted: str) -> bool:
        return wanted in (self.prefix, self.part_name) or (not self.prefix and wanted.upper() == DEFAULT_LAYER)

    @property
    def is_data(self) -> bool:
        """Whether the layer holds depth, ids or a cryptomatte, by its name."""
        return _is_data(self.prefix or self.part_name)

    @property
    def channels(self) -> tuple[int, int]:
        """The first channel to read, and the one after the last."""
        every = [*self.colours, *([] if self.alpha is None else [self.alpha])]
        return min(every), max(every) + 1


def select_layer(
    file: Any, path: Path, wanted: str, *, refuse_data: bool = False
) -> tuple[ImageLayer, tuple[str, ...]]:
    """Return the layer of an open EXR to read, and a notice if the choice was not obvious.

    ``wanted``: the name of a part or a channel prefix. "" selects the first R, G, B without a
    prefix, else a layer named beauty or similar, else the first layer. ``refuse_data``: refuse a
    file that holds only depth, ids or cryptomattes; a mask may hold ids. Raises ImageError, listing
    the layers, if there is no such layer.
    """
    found, others = _colour_layers(file)
    listed = ", ".join(dict.fromkeys(layer.name for layer in found))
    if wanted:
        named = [layer for layer in found if layer.has_name(wanted)]
        if not named:
            raise ImageError(
                f"{path} has no layer {wanted!r} with R, G and B; expected one of: "
                f"{listed or 'none'}; give one with --layer"
            )
        return named[0], ()
    found = [layer for layer in found if not layer.is_data] or found
    if refuse_data and (all(layer.is_data for layer in found) if found else _hold_only_data(others)):
        raise _data_error(others, path)
    if not found:
        return _grey_layer(others, path), ()
    plain = [layer for layer in found if not layer.prefix]
    beauties = [layer for layer in found if layer.prefix.rpartition(".")[2].lower() in BEAUTY_NAMES]
    chosen = (plain or beauties or found)[0]
    if plain or len(found) == 1:
        return chosen, ()
    return chosen, (f"{path} has the layers {listed}; {chosen.name} is used; give --layer to use another one",)


def _is_data(name: str) -> bool:
    return any(DATA_NAMES.fullmatch(each) for each in name.split("."))


def _hold_only_data(parts: list[tuple[int, tuple[str, ...]]]) -> bool:
    """Whether all channels of all parts hold depth, ids or cryptomattes."""
    channels = [channel for _, channels in parts for channel in channels]
    return bool(channels) and all(_is_data(channel) for channel in channels)


def _data_error(parts: list[tuple[int, tuple[str, ...]]], path: Path) -> ImageError:
    every = ", ".join(channel for _, channels in parts for channel in channels)
    return ImageError(
        f"{path} has only depth, ids or cryptomattes ({every}); expected colours; give an image with R, G, B"
    )


def _colour_layers(file: Any) -> tuple[list[ImageLayer], list[tuple[int, tuple[str, ...]]]]:
    """Return the colour layers in file order, and the channels of every part."""
    found, parts = [], []
    part = 0
    while file.seek_subimage(part, 0):
        spec = file.spec()
        if not spec.deep:  # a deep part has any number of values per pixel, and must be flattened first
            found += _layers_of_part(part, str(spec.getattribute("oiio:subimagename") or ""), spec.channelnames)
            parts.append((part, tuple(spec.channelnames)))
        part += 1
    file.geterror()  # clears the error of the last seek
    return found, parts


def _layers_of_part(part: int, part_name: str, channels: tuple[str, ...]) -> list[ImageLayer]:
    by_prefix: dict[str, dict[str, int]] = {}
    for number, channel in enumerate(channels):
        prefix, _, name = channel.rpartition(".")
        by_prefix.setdefault(prefix, {})[name.upper()] = number
    return [
        ImageLayer(part, (names["R"], names["G"], names["B"]), names.get("A"), prefix, part_name)
        for prefix, names in by_prefix.items()
        if names.keys() >= {"R", "G", "B"}
    ]


def _grey_layer(parts: list[tuple[int, tuple[str, ...]]], path: Path) -> ImageLayer:
    """Return the single channel, the luminance or the alpha of a file without colours.

    Raises ImageError.
    """
    for part, channels in sorted(parts, key=lambda each: _hold_only_data([each])):
        names = [channel.upper() for channel in channels]
        if len(names) == 1:
            return ImageLayer(part, (0,), None)
        if "Y" in names and "X" not in names:
            return ImageLayer(part, (names.index("Y"),), names.index("A") if "A" in names else None)
        if "A" in names:
            return ImageLayer(part, (names.index("A"),), None)
    if not parts:
        raise ImageError(f"{path} has only deep pixels; expected flat ones; flatten it")
    if _hold_only_data(parts):
        raise _data_error(parts, path)
    listed = ", ".join(channel for _, channels in parts for channel in channels)
    raise ImageError(f"{path} has no channels R, G and B; it has only {listed}; give an image with R, G and B")
