"""Foregrounds put on backgrounds when they are read, as the test sets of the composition lineage are made."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from icm_cli.errors import ImageError
from icm_cli.geometry import ImageU8, rounded_u8
from icm_cli.images.colour import AS_LABELLED, Colour
from icm_cli.images.reading import Picture, read_matte, read_picture


@dataclass(frozen=True)
class Composite:
    """A foreground with its alpha on a background; nothing is written to disk."""

    foreground: Path
    alpha: Path
    background: Path

    @property
    def files(self) -> tuple[Path, Path, Path]:
        return self.foreground, self.alpha, self.background

    def __str__(self) -> str:
        return f"{self.foreground} on {self.background.name}"

    def read(self) -> Picture:
        """alpha * foreground + (1 - alpha) * background, at the foreground's size.

        As the composition code published with Deep Image Matting: a background that is smaller is enlarged until
        it covers the foreground, then its upper left part is taken. Raises ImageError.
        """
        foreground, alpha = read_picture(self.foreground).displayed().rgb, read_matte(self.alpha)
        if foreground.shape[:2] != alpha.shape:
            raise ImageError(
                f"{self.foreground} is {foreground.shape[1]}x{foreground.shape[0]} and its alpha {self.alpha} "
                f"{alpha.shape[1]}x{alpha.shape[0]}; expected one size"
            )
        background = _covering(read_picture(self.background).displayed().rgb, *alpha.shape)
        weight = alpha[..., None] / np.float32(255)
        return Picture(rounded_u8(np.asarray(foreground * weight + background * (1 - weight), np.float32)), None)


def read_source(source: Path | Composite, colour: Colour = AS_LABELLED, frame: int = 0) -> Picture:
    """The picture of a file or a composite. Raises ImageError."""
    return source.read() if isinstance(source, Composite) else read_picture(source, colour, frame)


def _covering(background: ImageU8, height: int, width: int) -> ImageU8:
    ratio = max(height / background.shape[0], width / background.shape[1])
    if ratio > 1:
        size = math.ceil(background.shape[1] * ratio), math.ceil(background.shape[0] * ratio)
        background = np.asarray(cv2.resize(background, size, interpolation=cv2.INTER_CUBIC), np.uint8)
    return background[:height, :width]
