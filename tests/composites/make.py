"""Make the composites of this folder from photographs that scikit-image ships (see SOURCES.md).

    python tests/composites/make.py            # needs scikit-image 0.26 and the package's own requirements

The astronaut is cut out once (hand-made outline, closed-form matting, foreground estimation) and composited onto other
photographs. Each alpha file contains the alpha that its composite was made with, so it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import skimage
from PIL import Image
from pymatting import estimate_alpha_cf, estimate_foreground_ml

HERE = Path(__file__).resolve().parent
PHOTOS = Path(skimage.__file__).resolve().parent / "data"
Array = npt.NDArray[Any]
Colour = tuple[float, float, float]

# Outline of the astronaut in astronaut.png (x, y), clockwise from the lower left. It extends below the photograph, so
# that the unknown band does not follow the lower edge.
OUTLINE = [
    (36, 530), (36, 512), (28, 492), (24, 470), (23, 440), (22, 420), (19, 398), (22, 382), (25, 368), (26, 344),
    (30, 333), (33, 318), (38, 304), (40, 295), (45, 280), (52, 268), (61, 252), (70, 241), (78, 234), (88, 228),
    (98, 218), (109, 209), (112, 205), (113, 196), (113, 187), (119, 185), (123, 178), (126, 171), (130, 165),
    (136, 159), (145, 153), (155, 150), (168, 148), (184, 148), (183, 140), (182, 131), (176, 129), (172, 124),
    (170, 118), (166, 115), (160, 108), (156, 100), (154, 92), (153, 80), (153, 70), (155, 62), (159, 55),
    (166, 48), (175, 41), (184, 36), (191, 31), (198, 26), (208, 21), (220, 18), (230, 15), (240, 16), (250, 19),
    (262, 23), (275, 30), (285, 38), (292, 47), (297, 60), (300, 75), (302, 87), (300, 96), (298, 103),
    (293, 112), (285, 121), (276, 129), (275, 132), (271, 136), (267, 137), (265, 144), (262, 153), (258, 161),
    (255, 173), (264, 179), (274, 186), (284, 196), (292, 206), (298, 215), (301, 223), (304, 233), (312, 238),
    (322, 244), (331, 253), (339, 260), (344, 270), (348, 280), (351, 285), (354, 298), (357, 310), (359, 322),
    (363, 331), (361, 334), (361, 340), (364, 347), (372, 346), (384, 344), (396, 343), (412, 345), (426, 348),
    (440, 354), (452, 362), (462, 369), (472, 379), (480, 389), (486, 400), (491, 412), (494, 425), (496, 438),
    (497, 449), (503, 455), (503, 460), (505, 466), (507, 480), (514, 484), (530, 530),
]  # fmt: skip
HAIR_ROWS = 118  # first rows, which show hair: they need a wide unknown band. The others, cloth and metal, a narrow one
HAIR_BAND, CLOTH_BAND = 9, 3
LAST_ROW = 482  # rows below this one are not shown, because the right edge of the photograph cuts the helmet there


@dataclass(frozen=True)
class Backdrop:
    """A photograph, cropped to the aspect ratio of the shot and resized to it."""

    photo: str
    window: tuple[float, float, float] = (0.5, 0.5, 1.0)  # centre x, centre y, size, as fractions of the largest crop
    duotone: tuple[Colour, Colour] | None = None  # the colours of black and white, for a grey photograph
    quarter: bool = False  # turn by 90 degrees
    blur: float = 0.0  # sigma in pixels of the shot: out of focus
    gain: Colour = (1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Shot:
    """One composite: position, rotation and light of the astronaut."""

    name: str
    size: tuple[int, int]
    backdrop: Backdrop
    scale: float  # pixels of the shot per pixel of the photograph
    x: float  # centre of the cut-out, as a fraction of the width
    drop: float = 0.0  # pixels of the photograph below the lower edge, in addition to those below LAST_ROW
    turn: float = 0.0  # degrees, counter-clockwise
    flip: bool = False
    gain: Colour = (1.0, 1.0, 1.0)  # exposure and colour temperature
    gamma: float = 1.0
    sides: tuple[float, float] = (1.0, 1.0)  # light at the left and the right of the astronaut
    shadow: tuple[float, float, float] = (0.0, 0.0, 0.0)  # cast on a wall: x and y in pixels, darkness


# Blacks below 0 add contrast.
WARM_BRICK = ((-0.08, -0.32, -0.34), (1.32, 1.12, 0.96))
LEAVES = ((-0.12, -0.08, -0.10), (0.72, 0.92, 0.40))
SHOTS = (
    Shot("launchpad", (880, 586), Backdrop("rocket.jpg", (0.5, 0.5, 1.0), blur=0.7), 0.86, 0.255,
         gain=(0.78, 0.76, 0.86), gamma=1.12, sides=(0.72, 1.08)),
    Shot("deepfield", (640, 640), Backdrop("hubble_deep_field.jpg", (0.3, 0.5, 0.8), blur=0.6), 1.12, 0.52,
         drop=10, turn=7, flip=True, gain=(0.82, 0.92, 1.12), gamma=1.1),
    Shot("brickwall", (540, 720), Backdrop("brick.png", duotone=WARM_BRICK, quarter=True, blur=0.8), 0.98, 0.5,
         gain=(1.08, 1.0, 0.84), gamma=0.95, sides=(1.12, 0.8), shadow=(34, 22, 0.5)),
    Shot("lawn", (720, 480), Backdrop("grass.png", (0.5, 0.7, 1.0), LEAVES, blur=1.2), 1.25, 0.56,
         drop=150, turn=-8, flip=True, gain=(1.08, 1.08, 1.0), gamma=0.9, sides=(0.9, 1.1), shadow=(-22, 16, 0.55)),
    Shot("cat", (840, 558), Backdrop("chelsea.png"), 0.64, 0.80,
         turn=-3, gain=(0.98, 0.9, 0.86), gamma=1.05, sides=(0.86, 1.0)),
)  # fmt: skip


def read_photograph(name: str) -> Array:
    """Read a photograph of scikit-image, RGB in 0..1."""
    return np.asarray(Image.open(PHOTOS / name).convert("RGB"), np.float64) / 255


def make_trimap(height: int, width: int) -> Array:
    """Return a trimap of the astronaut in 0..1, unknown (0.5) in a band along the outline, wide at the hair."""
    inside = np.zeros((height, width), np.uint8)
    cv2.fillPoly(inside, [np.array(OUTLINE, np.int32)], 1)
    padded = cv2.copyMakeBorder(inside, 16, 16, 16, 16, cv2.BORDER_REPLICATE)
    to_edge = np.where(padded, cv2.distanceTransform(padded, cv2.DIST_L2, 5),
                       cv2.distanceTransform(1 - padded, cv2.DIST_L2, 5))[16:-16, 16:-16]  # fmt: skip
    band = np.where(np.arange(height) < HAIR_ROWS, HAIR_BAND, CLOTH_BAND)[:, None]
    return np.where(to_edge <= band, 0.5, inside.astype(np.float64))


def cut_out(image: Array) -> tuple[Array, Array]:
    """Return the alpha of the astronaut, and its colours without those of the background."""
    alpha = estimate_alpha_cf(image, make_trimap(*image.shape[:2]))
    # Closed-form matting leaves small values in the band, which would show as a halo on a dark backdrop.
    alpha = np.clip((alpha - 0.04) / 0.92, 0, 1)
    return alpha, estimate_foreground_ml(image, alpha)


def make_backdrop(backdrop: Backdrop, size: tuple[int, int]) -> Array:
    """Return the backdrop at the size of the shot."""
    image = read_photograph(backdrop.photo)
    if backdrop.quarter:
        image = np.rot90(image)
    height, width = image.shape[:2]
    x, y, part = backdrop.window
    fit = min(width / size[0], height / size[1]) * part
    w, h = int(size[0] * fit), int(size[1] * fit)
    left, top = int((width - w) * x), int((height - h) * y)
    way = cv2.INTER_AREA if fit > 1 else cv2.INTER_CUBIC
    image = cv2.resize(np.ascontiguousarray(image[top : top + h, left : left + w]), size, interpolation=way)
    if backdrop.blur:
        image = cv2.GaussianBlur(image, (0, 0), backdrop.blur)
    if backdrop.duotone:
        dark, light = (np.array(colour) for colour in backdrop.duotone)
        image = dark + (light - dark) * image
    lit: Array = np.clip(image * backdrop.gain, 0, 1)
    return lit


def placement_matrix(shot: Shot, width: int) -> Array:
    """Return the 2x3 affine map from photograph to shot. The centre of the lower edge moves to (x, bottom)."""
    angle = np.deg2rad(shot.turn)
    mirror = -1.0 if shot.flip else 1.0
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    linear = shot.scale * turn @ np.diag([mirror, 1.0])
    # A rotated astronaut is moved down, so that no corner of the cut edge is visible.
    sink = width / 2 * shot.scale * abs(np.sin(angle))
    foot = np.array([width / 2, LAST_ROW - shot.drop])
    goal = np.array([shot.x * shot.size[0], shot.size[1] + sink])
    return np.column_stack([linear, goal - linear @ foot])


def warp_image(image: Array, matrix: Array, size: tuple[int, int], border: int) -> Array:
    """Warp an image with four samples per pixel, so that a reduced image has no aliasing."""
    fine = np.diag([2.0, 2.0]) @ matrix
    fine[:, 2] += 0.5  # pixel centres
    big = cv2.warpAffine(image, fine, (size[0] * 2, size[1] * 2), flags=cv2.INTER_CUBIC, borderMode=border)
    return np.clip(cv2.resize(big, size, interpolation=cv2.INTER_AREA), 0, 1)


def apply_light(shot: Shot, colours: Array) -> Array:
    """Return the colours of the astronaut in the light of the shot."""
    half = shot.scale * 250 / shot.size[0]
    place = (np.linspace(0, 1, shot.size[0]) - shot.x + half) / (2 * half)
    ramp = np.interp(place, [0, 1], shot.sides)[None, :, None]
    return np.clip(colours**shot.gamma * shot.gain * ramp, 0, 1)


def compose(shot: Shot, alpha: Array, colours: Array) -> tuple[Array, Array]:
    """Return the composite and its alpha, both uint8. The composite is made with the rounded alpha."""
    matrix = placement_matrix(shot, alpha.shape[1])
    stored = np.rint(warp_image(alpha, matrix, shot.size, cv2.BORDER_CONSTANT) * 255).astype(np.uint8)
    part = (stored / 255)[:, :, None]
    figure = apply_light(shot, warp_image(colours, matrix, shot.size, cv2.BORDER_REPLICATE))
    x, y, dark = shot.shadow
    moved = matrix + np.array([[0, 0, x], [0, 0, y]])
    shade = cv2.GaussianBlur(warp_image(alpha, moved, shot.size, cv2.BORDER_CONSTANT), (0, 0), 14)[:, :, None]
    mixed = part * figure + (1 - part) * make_backdrop(shot.backdrop, shot.size) * (1 - dark * shade)
    return np.rint(mixed * 255).astype(np.uint8), stored


def main() -> None:
    for folder in ("imgs", "alphas"):
        (HERE / folder).mkdir(exist_ok=True)
    reference = read_photograph("astronaut.png")
    alpha, colours = cut_out(reference)
    Image.fromarray(np.rint(reference * 255).astype(np.uint8)).save(HERE / "ref.jpg", quality=92, optimize=True)
    Image.fromarray(np.where(alpha >= 0.5, 255, 0).astype(np.uint8)).save(HERE / "mask.png", optimize=True)
    for shot in SHOTS:
        image, stored = compose(shot, alpha, colours)
        Image.fromarray(image).save(HERE / "imgs" / f"{shot.name}.jpg", quality=90, optimize=True)
        Image.fromarray(stored).save(HERE / "alphas" / f"{shot.name}.png", optimize=True)


if __name__ == "__main__":
    main()
