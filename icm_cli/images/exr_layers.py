"""Layers of an OpenEXR file: which of its parts and channels are the picture."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from icm_cli.errors import ImageError

DEFAULT_LAYER = "RGB"
"""Name by which channels called R, G, B and no more can be asked for."""
DATA = re.compile(
    r"z|z_?back|.*depth.*|(object|obj|material|mat|asset|instance|prim|render|user|mesh|node)?_?ids?|index(ob|ma)|.*crypto.*",
    re.IGNORECASE,
)
"""Names, of layers, parts or channels, of depth, ids and cryptomattes, which are no pictures."""
BEAUTY_NAMES = frozenset({"beauty", "combined", "rgb", "rgba"})
"""Names, of layers or their last parts, of what is the picture and no component of it."""


@dataclass(frozen=True)
class ImageLayer:
    """Channels of one part that are read: three of colour or one of grey, and the alpha's, by their numbers."""

    part: int
    colours: tuple[int, ...]
    alpha: int | None
    prefix: str = ""
    """Name before the channels' own, as "beauty" of beauty.R."""
    part_name: str = ""

    @property
    def name(self) -> str:
        return self.prefix or self.part_name or DEFAULT_LAYER

    def is_called(self, wanted: str) -> bool:
        return wanted in (self.prefix, self.part_name) or (not self.prefix and wanted.upper() == DEFAULT_LAYER)

    @property
    def is_data(self) -> bool:
        """Whether its name is that of depth, ids or a cryptomatte."""
        return _is_data(self.prefix or self.part_name)

    @property
    def channels(self) -> tuple[int, int]:
        """First channel, and the one after the last, of those that are read."""
        every = [*self.colours, *([] if self.alpha is None else [self.alpha])]
        return min(every), max(every) + 1


def select_layer(file: Any, path: Path, wanted: str, *, is_picture: bool = False) -> tuple[ImageLayer, tuple[str, ...]]:
    """The layer of an open EXR to be read, and notices where it was not beyond doubt.

    ``wanted``: a part's name or a channel prefix; "": the first plain R, G, B, else a layer that is called beauty or
    the like, else the first. Raises ImageError, listing the layers, for one that is not there, and for a file that
    holds no picture; with ``is_picture``, depth, ids and cryptomattes alone are none (a mask may be of ids).
    """
    found, others = _layers(file)
    listed = ", ".join(dict.fromkeys(layer.name for layer in found))
    if wanted:
        named = [layer for layer in found if layer.is_called(wanted)]
        if not named:
            raise ImageError(
                f"{path} has no layer {wanted!r} with R, G and B; it has {listed or 'none'}: name one of these"
            )
        return named[0], ()
    found = [layer for layer in found if not layer.is_data] or found
    if is_picture and (all(layer.is_data for layer in found) if found else _are_data(others)):
        raise _only_data(others, path)
    if not found:
        return _grey(others, path), ()
    plain = [layer for layer in found if not layer.prefix]
    pictures = [layer for layer in found if layer.prefix.rpartition(".")[2].lower() in BEAUTY_NAMES]
    chosen = (plain or pictures or found)[0]
    if plain or len(found) == 1:
        return chosen, ()
    return chosen, (f"{path} has the layers {listed}; {chosen.name} was taken, --layer says another",)


def _is_data(name: str) -> bool:
    return any(DATA.fullmatch(each) for each in name.split("."))


def _are_data(parts: list[tuple[int, tuple[str, ...]]]) -> bool:
    """Whether all channels of all parts are depth, ids or cryptomattes."""
    channels = [channel for _, channels in parts for channel in channels]
    return bool(channels) and all(_is_data(channel) for channel in channels)


def _only_data(parts: list[tuple[int, tuple[str, ...]]], path: Path) -> ImageError:
    every = ", ".join(channel for _, channels in parts for channel in channels)
    return ImageError(f"{path} has depth, ids or cryptomattes alone ({every}), which are no picture; give a picture")


def _layers(file: Any) -> tuple[list[ImageLayer], list[tuple[int, tuple[str, ...]]]]:
    """Layers of colour in the file's order; and the channels of every part."""
    found, parts = [], []
    part = 0
    while file.seek_subimage(part, 0):
        spec = file.spec()
        if not spec.deep:  # a deep part has any number of values a pixel, and no picture before it is flattened
            found += _layers_of_part(part, str(spec.getattribute("oiio:subimagename") or ""), spec.channelnames)
            parts.append((part, tuple(spec.channelnames)))
        part += 1
    file.geterror()  # of the seek that went too far
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


def _grey(parts: list[tuple[int, tuple[str, ...]]], path: Path) -> ImageLayer:
    """A file of one channel, or of luminance or an alpha among others. Raises ImageError for any other."""
    for part, channels in sorted(parts, key=lambda each: _are_data([each])):
        names = [channel.upper() for channel in channels]
        if len(names) == 1:
            return ImageLayer(part, (0,), None)
        if "Y" in names and "X" not in names:
            return ImageLayer(part, (names.index("Y"),), names.index("A") if "A" in names else None)
        if "A" in names:
            return ImageLayer(part, (names.index("A"),), None)
    if not parts:
        raise ImageError(f"{path} has deep pixels alone; flatten it")
    if _are_data(parts):
        raise _only_data(parts, path)
    listed = ", ".join(channel for _, channels in parts for channel in channels)
    raise ImageError(f"{path} has no channels R, G and B; it has {listed}: give a picture")
