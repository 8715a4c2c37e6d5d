"""Procedural foregrounds with exact alpha: hair, fur, wire, smoke, glass and motion blur.

    python -m icm_cli.training.data.procedural OUT --groups 120 --seed 0

writes RGBA cut-outs, two views of each thing in a folder of its own: what a source ``dataset: cutouts`` of ``icm
train`` reads. Strands are opaque curves drawn several times as large as they end up; the mean over each pixel's cell
then gives colour and coverage exactly, as a camera would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import cv2
import numpy as np
import typer
from numpy.typing import NDArray

from icm_cli.geometry import Float, ImageU8

Rng: TypeAlias = np.random.Generator
Points: TypeAlias = NDArray[np.float64]

SUPERSAMPLING = 4
VIEWS = 2
JOINTS = 14
"""Points of a strand."""


@dataclass(frozen=True)
class Rgba:
    """Colour float32 [s,s,3] 0..1 premultiplied, alpha float32 [s,s] 0..1."""

    colour: Float
    alpha: Float

    def unpremultiplied(self) -> ImageU8:
        """As an RGBA file holds it, uint8 [s,s,4]."""
        colour = self.colour / np.maximum(self.alpha, 1e-3)[..., None]
        stacked = np.dstack([colour, self.alpha]).clip(0.0, 1.0)
        return np.asarray(np.round(stacked * 255.0), np.uint8)


@dataclass(frozen=True)
class Look:
    """Properties that views of one thing share: the kind, its colours and the manner of its strands."""

    kind: str
    base: Points
    """sRGB 0..1 [3]."""
    spread: float
    """Spread of the strands' brightness."""
    length: float
    """Length of strands, in radii of the body."""
    thickness_px: float
    curl: float
    count: int
    roundness: float

    @classmethod
    def drawn(cls, rng: Rng) -> Look:
        kind = str(rng.choice(list(KINDS), p=[0.4, 0.25, 0.12, 0.08, 0.07, 0.08]))
        natural = rng.random() < 0.6
        tone = rng.uniform(0.03, 0.95)
        warm = np.array([1.0, rng.uniform(0.6, 1.0), rng.uniform(0.3, 1.0)])
        return cls(
            kind=kind,
            base=tone * warm if natural else rng.uniform(0.0, 1.0, 3),
            spread=rng.uniform(0.05, 0.4),
            length=rng.uniform(0.5, 1.6) if kind == "hair" else rng.uniform(0.12, 0.5),
            thickness_px=float(np.exp(rng.uniform(np.log(0.5), np.log(2.2)))),
            curl=rng.uniform(0.0, 1.2),
            count=int(rng.uniform(600, 3000)),
            roundness=rng.uniform(0.6, 1.0),
        )


def draw(look: Look, size: int, rng: Rng) -> Rgba:
    """One view of a thing on a square of ``size`` pixels."""
    return KINDS[look.kind](look, size, rng)


def _hairy(look: Look, size: int, rng: Rng) -> Rgba:
    """A body with strands: long ones that hang (hair) or short ones that stand off (fur)."""
    large = SUPERSAMPLING * size
    radius = large * rng.uniform(0.14, 0.24)
    body = _blob(radius, look.roundness, rng) + large * rng.uniform(0.4, 0.6, 2)
    canvas = np.zeros((large, large, 3), np.uint8)
    mask = np.zeros((large, large), np.uint8)
    centre = body.mean(axis=0)
    _fill(canvas, mask, body, look.base * 0.6)
    down = np.array([rng.normal(0.0, 0.3), 1.0]) if look.kind == "hair" else rng.normal(0.0, 0.4, 2)
    for _ in range(look.count):
        root = centre + (body[rng.integers(len(body))] - centre) * np.sqrt(rng.uniform(0.2, 1.0))
        outward = (root - centre) / radius
        strand = _strand(root, outward + rng.normal(0.0, 0.25, 2), down, radius * look.length, look.curl, rng)
        shade = 1.0 + look.spread * rng.normal()
        light = 0.75 + 0.35 * float(-outward[1])
        thickness = max(1, round(SUPERSAMPLING * look.thickness_px * rng.uniform(0.5, 1.3)))
        _line(canvas, mask, strand, look.base * shade * light, thickness)
    if look.kind == "fur":
        _features(canvas, mask, centre, radius, rng)
    return _coverage(canvas, mask, size)


def _wire(look: Look, size: int, rng: Rng) -> Rgba:
    """Spokes, meshes and twigs: straight or bent lines with much background between them."""
    large = SUPERSAMPLING * size
    canvas, mask = np.zeros((large, large, 3), np.uint8), np.zeros((large, large), np.uint8)
    centre, reach = large * rng.uniform(0.45, 0.55, 2), large * rng.uniform(0.3, 0.42)
    rim = _blob(reach, look.roundness, rng) + centre
    thickness = max(2, round(2 * SUPERSAMPLING * look.thickness_px))
    _line(canvas, mask, np.vstack([rim, rim[:1]]), look.base, 2 * thickness)
    spokes = int(rng.integers(8, 40))
    is_mesh = rng.random() < 0.5
    for number in range(spokes):
        end = rim[number * len(rim) // spokes]
        start = rim[(len(rim) - 1 - number * len(rim) // spokes)] if is_mesh else centre
        middle = (start + end) / 2 + rng.normal(0.0, 0.05 * reach * look.curl, 2)
        light = rng.uniform(1.0 - look.spread, 1.0 + look.spread)
        _line(canvas, mask, _bent(start, middle, end), look.base * light, thickness)
    return _coverage(canvas, mask, size)


def _smoke(look: Look, size: int, rng: Rng) -> Rgba:
    """A cloud that thins out."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    falloff = np.clip(1.0 - np.hypot(x * rng.uniform(1.6, 2.6), y * rng.uniform(1.6, 2.6)), 0.0, 1.0)
    density = falloff * (0.2 + 1.6 * _noise(size, 5, rng)) * rng.uniform(0.9, 2.2)
    alpha = (1.0 - np.exp(-2.0 * density**1.5)).astype(np.float32)
    colour = look.base * (0.8 + 0.4 * _noise(size, 4, rng))[..., None]
    return _premultiplied(colour, alpha)


def _glass(look: Look, size: int, rng: Rng) -> Rgba:
    """A clear body with a firm rim and highlights."""
    large = SUPERSAMPLING * size
    body = _blob(large * rng.uniform(0.25, 0.38), look.roundness, rng) + large / 2
    inside = np.zeros((large, large), np.uint8)
    cv2.fillPoly(inside, [_fixed(body)], 255)
    small = cv2.resize(inside, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255.0
    depth = cv2.distanceTransform((small > 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    rim = np.exp(-depth / (size * rng.uniform(0.005, 0.03)))
    highlight = np.clip(_noise(size, 3, rng) * 3.0 - 2.0, 0.0, 1.0)
    alpha = small * np.clip(rng.uniform(0.12, 0.5) + 0.6 * rim + 0.6 * highlight, 0.0, 1.0)
    colour = look.base * (0.6 + 0.4 * rim)[..., None] + highlight[..., None]
    return _premultiplied(colour, alpha.astype(np.float32))


def _moving(look: Look, size: int, rng: Rng) -> Rgba:
    """A patterned body, blurred by its motion while the shutter was open."""
    large = SUPERSAMPLING * size
    canvas, mask = np.zeros((large, large, 3), np.uint8), np.zeros((large, large), np.uint8)
    radius = large * rng.uniform(0.15, 0.28)
    body = _blob(radius, look.roundness, rng) + large / 2
    _fill(canvas, mask, body, look.base)
    _features(canvas, mask, body.mean(axis=0), radius, rng)
    still = _coverage(canvas, mask, size)
    length = int(size * rng.uniform(0.03, 0.15)) | 1
    kernel = np.zeros((length, length), np.float32)
    turn = rng.uniform(0.0, np.pi)
    half = np.array([np.cos(turn), np.sin(turn)]) * (length // 2)
    ends = [tuple(np.round(length // 2 + sign * half).astype(int).tolist()) for sign in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0)
    kernel /= kernel.sum()
    colour, alpha = (
        cv2.filter2D(part, -1, kernel, borderType=cv2.BORDER_CONSTANT) for part in (still.colour, still.alpha)
    )
    return Rgba(np.asarray(colour, np.float32), np.asarray(alpha, np.float32))


KINDS: dict[str, Callable[[Look, int, Rng], Rgba]] = {
    "hair": _hairy,
    "fur": _hairy,
    "wire": _wire,
    "smoke": _smoke,
    "glass": _glass,
    "moving": _moving,
}


def _blob(radius: float, roundness: float, rng: Rng) -> Points:
    """A smooth closed outline around the origin [96,2]."""
    angles = np.linspace(0.0, 2.0 * np.pi, 96, endpoint=False)
    reach = np.ones_like(angles)
    for wave in range(2, 5):
        reach += (1.0 - roundness) * rng.normal(0.0, 0.6 / wave) * np.cos(wave * angles + rng.uniform(0.0, 2.0 * np.pi))
    squeeze = np.array([1.0, rng.uniform(0.7, 1.3)])
    return radius * reach.clip(0.3, 1.8)[:, None] * np.column_stack([np.cos(angles), np.sin(angles)]) * squeeze


def _strand(root: Points, outward: Points, down: Points, length: float, curl: float, rng: Rng) -> Points:
    """A curve [JOINTS,2] that leaves outward and is drawn down, with a wave of its own."""
    pull = rng.uniform(0.5, 1.5)
    along = np.linspace(0.0, 1.0, JOINTS)[:, None]
    step = length * rng.uniform(0.4, 1.1)
    side = np.array([-outward[1], outward[0]])
    wave = np.sin(along * rng.uniform(3.0, 12.0) + rng.uniform(0.0, 6.3)) * along * curl * 0.12
    return root + step * (along * outward + pull * along**2 * down * 0.7 + wave * side)


def _bent(start: Points, middle: Points, end: Points) -> Points:
    along = np.linspace(0.0, 1.0, JOINTS)[:, None]
    return (1 - along) ** 2 * start + 2 * along * (1 - along) * middle + along**2 * end


def _features(canvas: ImageU8, mask: ImageU8, centre: Points, radius: float, rng: Rng) -> None:
    """Spots by which a body may be known again."""
    for _ in range(int(rng.integers(1, 5))):
        spot = _blob(radius * rng.uniform(0.08, 0.3), 0.9, rng) + centre + rng.normal(0.0, 0.3 * radius, 2)
        inside = np.zeros_like(mask)
        cv2.fillPoly(inside, [_fixed(spot)], 255)
        canvas[(inside > 0) & (mask > 0)] = _u8(rng.uniform(0.0, 1.0, 3))


def _fill(canvas: ImageU8, mask: ImageU8, outline: Points, colour: Points) -> None:
    cv2.fillPoly(canvas, [_fixed(outline)], _u8(colour).tolist())
    cv2.fillPoly(mask, [_fixed(outline)], 255)


def _line(canvas: ImageU8, mask: ImageU8, points: Points, colour: Points, thickness: int) -> None:
    cv2.polylines(canvas, [_fixed(points)], False, _u8(colour).tolist(), thickness)
    cv2.polylines(mask, [_fixed(points)], False, 255, thickness)


def _coverage(canvas: ImageU8, mask: ImageU8, size: int) -> Rgba:
    """Means over each pixel's cell; outside the mask the canvas is black, so its mean is premultiplied."""
    colour, alpha = (cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA) for part in (canvas, mask))
    return Rgba(np.asarray(colour, np.float32) / 255.0, np.asarray(alpha, np.float32) / 255.0)


def _premultiplied(colour: Points, alpha: Float) -> Rgba:
    return Rgba((colour.clip(0.0, 1.0) * alpha[..., None]).astype(np.float32), alpha)


def _noise(size: int, octaves: int, rng: Rng) -> Float:
    """Smooth noise [size,size] in 0..1."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        cells = 3 << octave
        coarse = rng.random((cells, cells)).astype(np.float32)
        total += cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC) / 2**octave
    low, high = float(total.min()), float(total.max())
    return (total - low) / (high - low)


def _fixed(points: Points) -> NDArray[np.int32]:
    return np.round(points).astype(np.int32)


def _u8(colour: Points) -> NDArray[np.int64]:
    return np.round(colour.clip(0.0, 1.0) * 255.0).astype(np.int64)


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the cut-outs.")],
    groups: Annotated[int, typer.Option(min=1, help="How many things.")] = 120,
    size: Annotated[int, typer.Option(min=64, help="Side of the pictures, in px.")] = 640,
    seed: Annotated[int, typer.Option(min=0, help="Of everything drawn.")] = 0,
) -> None:
    """Write procedural foregrounds with exact alpha, two views of each thing."""
    for group in range(groups):
        rng = np.random.default_rng((seed, group))
        look = Look.drawn(rng)
        folder = out / f"{group:03d}-{look.kind}"
        folder.mkdir(parents=True, exist_ok=True)
        for view in range(VIEWS):
            rgba = draw(look, size, rng).unpremultiplied()
            cv2.imwrite(str(folder / f"{view}.png"), cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA))


if __name__ == "__main__":
    typer.run(main)
