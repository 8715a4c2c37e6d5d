"""Procedural foregrounds with exact alpha: hair, fur, wire, smoke, glass and motion blur.

    python -m icm_cli.training.data.procedural OUT --groups 120 --seed 0

writes RGBA cut-outs, with a folder for each object that contains two views of it. ``icm train`` reads them with a
source ``dataset: cutouts``. Strands are opaque curves drawn at several times the final size; the mean over the area of
each pixel then gives exact colour and coverage, as in a camera.
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
"""Views of each object."""
CURVE_POINTS = 14
"""Number of points of a strand."""


@dataclass(frozen=True)
class ObjectStyle:
    """Properties that all views of an object share: kind, colour and the shape of its strands."""

    kind: str
    base: Points
    """sRGB 0..1 [3]."""
    spread: float
    """Standard deviation of the strands' brightness."""
    length: float
    """Length of the strands, as a multiple of the body's radius."""
    thickness_px: float
    curl: float
    """Strength of the strands' waves."""
    count: int
    """Number of strands."""
    roundness: float
    """Regularity of the outline; 1 is an ellipse."""

    @classmethod
    def draw_random(cls, rng: Rng) -> ObjectStyle:
        """Draw the style of an object."""
        kind = str(rng.choice(list(DRAW_FUNCTIONS), p=[0.4, 0.25, 0.12, 0.08, 0.07, 0.08]))
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


def draw_view(style: ObjectStyle, size: int, rng: Rng) -> Float:
    """Draw a view of an object: RGBA with premultiplied colours, float32 [size,size,4] in 0..1."""
    return DRAW_FUNCTIONS[style.kind](style, size, rng)


def to_straight_u8(rgba: Float) -> ImageU8:
    """Convert the result of :func:`draw_view` to RGBA with straight colours, uint8 [s,s,4]."""
    colour, alpha = rgba[..., :3], rgba[..., 3:]
    straight = np.concatenate([colour / np.maximum(alpha, 1e-3), alpha], axis=-1).clip(0.0, 1.0)
    return np.asarray(np.round(straight * 255.0), np.uint8)


def _draw_hairy_body(style: ObjectStyle, size: int, rng: Rng) -> Float:
    """Draw a body with strands: long hanging ones (hair) or short ones in all directions (fur)."""
    large = SUPERSAMPLING * size
    radius = large * rng.uniform(0.14, 0.24)
    body = _draw_outline(radius, style.roundness, rng) + large * rng.uniform(0.4, 0.6, 2)
    canvas = np.zeros((large, large, 4), np.uint8)
    centre = body.mean(axis=0)
    _fill_outline(canvas, body, style.base * 0.6)
    # The strands of hair hang down; those of fur bend in a random direction.
    down = np.array([rng.normal(0.0, 0.3), 1.0]) if style.kind == "hair" else rng.normal(0.0, 0.4, 2)
    for _ in range(style.count):
        root = centre + (body[rng.integers(len(body))] - centre) * np.sqrt(rng.uniform(0.2, 1.0))
        outward = (root - centre) / radius
        strand = _draw_strand(root, outward + rng.normal(0.0, 0.25, 2), down, radius * style.length, style.curl, rng)
        shade = 1.0 + style.spread * rng.normal()
        light = 0.75 + 0.35 * float(-outward[1])
        thickness = max(1, round(SUPERSAMPLING * style.thickness_px * rng.uniform(0.5, 1.3)))
        _draw_line(canvas, strand, style.base * shade * light, thickness)
    if style.kind == "fur":
        _draw_spots(canvas, centre, radius, rng)
    return _average_down(canvas, size)


def _draw_wire(style: ObjectStyle, size: int, rng: Rng) -> Float:
    """Draw the spokes of a wheel or a grille: straight or bent lines with much background between them."""
    large = SUPERSAMPLING * size
    canvas = np.zeros((large, large, 4), np.uint8)
    centre, reach = large * rng.uniform(0.45, 0.55, 2), large * rng.uniform(0.3, 0.42)
    rim = _draw_outline(reach, style.roundness, rng) + centre
    thickness = max(2, round(2 * SUPERSAMPLING * style.thickness_px))
    _draw_line(canvas, np.vstack([rim, rim[:1]]), style.base, 2 * thickness)
    spokes = int(rng.integers(8, 40))
    is_grille = rng.random() < 0.5  # lines from rim to rim instead of from the centre to the rim
    for number in range(spokes):
        rim_index = number * len(rim) // spokes
        end = rim[rim_index]
        start = rim[len(rim) - 1 - rim_index] if is_grille else centre
        middle = (start + end) / 2 + rng.normal(0.0, 0.05 * reach * style.curl, 2)
        light = rng.uniform(1.0 - style.spread, 1.0 + style.spread)
        _draw_line(canvas, _bezier_curve(start, middle, end), style.base * light, thickness)
    return _average_down(canvas, size)


def _draw_smoke(style: ObjectStyle, size: int, rng: Rng) -> Float:
    """Draw a cloud whose density decreases outwards."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / size - 0.5
    falloff = np.clip(1.0 - np.hypot(x * rng.uniform(1.6, 2.6), y * rng.uniform(1.6, 2.6)), 0.0, 1.0)
    density = falloff * (0.2 + 1.6 * _draw_fractal_noise(size, 5, rng)) * rng.uniform(0.9, 2.2)
    alpha = (1.0 - np.exp(-2.0 * density**1.5)).astype(np.float32)
    colour = style.base * (0.8 + 0.4 * _draw_fractal_noise(size, 4, rng))[..., None]
    return _premultiply(colour, alpha)


def _draw_glass(style: ObjectStyle, size: int, rng: Rng) -> Float:
    """Draw a transparent body with an opaque rim and highlights."""
    large = SUPERSAMPLING * size
    body = _draw_outline(large * rng.uniform(0.25, 0.38), style.roundness, rng) + large / 2
    inside = np.zeros((large, large), np.uint8)
    cv2.fillPoly(inside, [_to_pixels(body)], 255)
    small = cv2.resize(inside, (size, size), interpolation=cv2.INTER_AREA).astype(np.float32) / 255.0
    depth = cv2.distanceTransform((small > 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    rim = np.exp(-depth / (size * rng.uniform(0.005, 0.03)))
    highlight = np.clip(_draw_fractal_noise(size, 3, rng) * 3.0 - 2.0, 0.0, 1.0)
    alpha = small * np.clip(rng.uniform(0.12, 0.5) + 0.6 * rim + 0.6 * highlight, 0.0, 1.0)
    colour = style.base * (0.6 + 0.4 * rim)[..., None] + highlight[..., None]
    return _premultiply(colour, alpha.astype(np.float32))


def _draw_moving_body(style: ObjectStyle, size: int, rng: Rng) -> Float:
    """Draw a patterned body with motion blur."""
    large = SUPERSAMPLING * size
    canvas = np.zeros((large, large, 4), np.uint8)
    radius = large * rng.uniform(0.15, 0.28)
    body = _draw_outline(radius, style.roundness, rng) + large / 2
    _fill_outline(canvas, body, style.base)
    _draw_spots(canvas, body.mean(axis=0), radius, rng)
    still = _average_down(canvas, size)
    kernel = _draw_motion_kernel(size, rng)
    return np.asarray(cv2.filter2D(still, -1, kernel, borderType=cv2.BORDER_CONSTANT), np.float32)


def _draw_motion_kernel(size: int, rng: Rng) -> Float:
    """Draw the kernel of a motion blur: a line through its middle, with a sum of 1. ``size``: side of the image."""
    length = int(size * rng.uniform(0.03, 0.15)) | 1  # odd, so that the kernel has a middle
    kernel = np.zeros((length, length), np.float32)
    angle = rng.uniform(0.0, np.pi)
    middle = length // 2
    half = np.array([np.cos(angle), np.sin(angle)]) * middle
    start = np.round(middle - half).astype(int).tolist()
    end = np.round(middle + half).astype(int).tolist()
    cv2.line(kernel, start, end, 1.0)
    return kernel / kernel.sum()


DRAW_FUNCTIONS: dict[str, Callable[[ObjectStyle, int, Rng], Float]] = {
    "hair": _draw_hairy_body,
    "fur": _draw_hairy_body,
    "wire": _draw_wire,
    "smoke": _draw_smoke,
    "glass": _draw_glass,
    "moving": _draw_moving_body,
}
"""Kind of object -> the function that draws it."""


def _draw_outline(radius: float, roundness: float, rng: Rng) -> Points:
    """Draw a smooth closed outline around the origin, [96,2]."""
    angles = np.linspace(0.0, 2.0 * np.pi, 96, endpoint=False)
    reach = np.ones_like(angles)
    for wave in range(2, 5):
        reach += (1.0 - roundness) * rng.normal(0.0, 0.6 / wave) * np.cos(wave * angles + rng.uniform(0.0, 2.0 * np.pi))
    squeeze = np.array([1.0, rng.uniform(0.7, 1.3)])
    return radius * reach.clip(0.3, 1.8)[:, None] * np.column_stack([np.cos(angles), np.sin(angles)]) * squeeze


def _draw_strand(root: Points, outward: Points, down: Points, length: float, curl: float, rng: Rng) -> Points:
    """Return the points [CURVE_POINTS,2] of a random wavy curve that starts outward and bends down."""
    pull = rng.uniform(0.5, 1.5)
    along = np.linspace(0.0, 1.0, CURVE_POINTS)[:, None]
    reach = length * rng.uniform(0.4, 1.1)
    side = np.array([-outward[1], outward[0]])
    wave = np.sin(along * rng.uniform(3.0, 12.0) + rng.uniform(0.0, 6.3)) * along * curl * 0.12
    return root + reach * (along * outward + pull * along**2 * down * 0.7 + wave * side)


def _bezier_curve(start: Points, middle: Points, end: Points) -> Points:
    """Return a quadratic Bezier curve, [CURVE_POINTS,2]."""
    along = np.linspace(0.0, 1.0, CURVE_POINTS)[:, None]
    return (1 - along) ** 2 * start + 2 * along * (1 - along) * middle + along**2 * end


def _draw_spots(canvas: ImageU8, centre: Points, radius: float, rng: Rng) -> None:
    """Draw coloured spots on a body, by which its views can be matched."""
    for _ in range(int(rng.integers(1, 5))):
        spot = _draw_outline(radius * rng.uniform(0.08, 0.3), 0.9, rng) + centre + rng.normal(0.0, 0.3 * radius, 2)
        inside = np.zeros(canvas.shape[:2], np.uint8)
        cv2.fillPoly(inside, [_to_pixels(spot)], 255)
        canvas[(inside > 0) & (canvas[..., 3] > 0)] = _opaque_u8(rng.uniform(0.0, 1.0, 3))


def _fill_outline(canvas: ImageU8, outline: Points, colour: Points) -> None:
    cv2.fillPoly(canvas, [_to_pixels(outline)], _opaque_u8(colour))


def _draw_line(canvas: ImageU8, points: Points, colour: Points, thickness: int) -> None:
    cv2.polylines(canvas, [_to_pixels(points)], False, _opaque_u8(colour), thickness)


def _average_down(canvas: ImageU8, size: int) -> Float:
    """Reduce an RGBA canvas to ``size`` by the mean over each pixel's area, float32 [size,size,4] in 0..1.

    Transparent pixels of the canvas are black, so the mean colour is premultiplied.
    """
    return np.asarray(cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA), np.float32) / 255.0


def _premultiply(colour: Points, alpha: Float) -> Float:
    return np.dstack([colour.clip(0.0, 1.0) * alpha[..., None], alpha]).astype(np.float32)


def _draw_fractal_noise(size: int, octaves: int, rng: Rng) -> Float:
    """Draw smooth noise, [size,size] in 0..1."""
    total = np.zeros((size, size), np.float32)
    for octave in range(octaves):
        cells = 3 << octave
        coarse = rng.random((cells, cells)).astype(np.float32)
        total += cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC) / 2**octave
    low, high = float(total.min()), float(total.max())
    return (total - low) / (high - low)


def _to_pixels(points: Points) -> NDArray[np.int32]:
    return np.round(points).astype(np.int32)


def _opaque_u8(colour: Points) -> list[int]:
    """Convert a colour, sRGB 0..1 [3], to opaque RGBA, 0..255 [4]."""
    return np.round(np.append(colour, 1.0).clip(0.0, 1.0) * 255.0).astype(int).tolist()


def main(
    out: Annotated[Path, typer.Argument(help="Folder for the cut-outs.")],
    groups: Annotated[int, typer.Option(min=1, help="Number of objects.")] = 120,
    size: Annotated[int, typer.Option(min=64, help="Side of the images, in px.")] = 640,
    seed: Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")] = 0,
) -> None:
    """Write procedural foregrounds with exact alphas, two views of each object."""
    for group in range(groups):
        rng = np.random.default_rng((seed, group))
        style = ObjectStyle.draw_random(rng)
        folder = out / f"{group:03d}-{style.kind}"
        folder.mkdir(parents=True, exist_ok=True)
        for view in range(VIEWS):
            rgba = to_straight_u8(draw_view(style, size, rng))
            cv2.imwrite(str(folder / f"{view}.png"), cv2.cvtColor(rgba, cv2.COLOR_RGBA2BGRA))


if __name__ == "__main__":
    typer.run(main)
