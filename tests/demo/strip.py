"""Draw the images of README and of the model card from alphas of the demo.

python tests/demo/strip.py ALPHAS           # alphas of README's first command; writes tests/demo/strip.jpg
python tests/demo/strip.py ALPHAS BEFORE    # and alphas of another model; writes tests/demo/before_after.jpg
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

DEMO = Path(__file__).parent
HEIGHT_PX = 190
GAP_PX = 6
GREY = 128
IMAGES = sorted((DEMO / "imgs").iterdir())


def draw_strip(alphas: Path) -> None:
    """Draw a column for the reference, then one for each image: image, alpha or mask, and cut-out."""
    reference, mask = read_image(DEMO / "ref.jpg"), read_image(DEMO / "mask.png").convert("L")
    columns = [stack_cells([reference, mask.convert("RGB"), cut_out(reference, mask)])]
    for image in IMAGES:
        source, alpha = read_image(image), read_image(alphas / f"{image.stem}.png").convert("L")
        columns.append(stack_cells([source, alpha.convert("RGB"), cut_out(source, alpha)]))
    divider = np.full((len(columns[0]), GAP_PX, 3), 90, np.uint8)
    save_columns([columns[0], divider, *columns[1:]], "strip.jpg")


def draw_comparison(alphas: Path, before: Path) -> None:
    """Draw a column for each image: image, alpha before, alpha after, true alpha."""
    folders = (before, alphas, DEMO / "alphas")
    images = ([read_image(path), *(read_image(folder / f"{path.stem}.png") for folder in folders)] for path in IMAGES)
    save_columns([stack_cells(cells) for cells in images], "before_after.jpg")


def save_columns(columns: list[np.ndarray], name: str) -> None:
    Image.fromarray(np.hstack(columns)).save(DEMO / name, quality=88, optimize=True)


def read_image(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def cut_out(image: Image.Image, alpha: Image.Image) -> Image.Image:
    return Image.composite(image, Image.new("RGB", image.size, (GREY, GREY, GREY)), alpha)


def stack_cells(cells: list[Image.Image]) -> np.ndarray:
    width = round(cells[0].width * HEIGHT_PX / cells[0].height)
    sheet = Image.new("RGB", (width + GAP_PX, len(cells) * (HEIGHT_PX + GAP_PX)), "white")
    for row, cell in enumerate(cells):
        sheet.paste(cell.resize((width, HEIGHT_PX), Image.Resampling.LANCZOS), (0, row * (HEIGHT_PX + GAP_PX)))
    return np.asarray(sheet)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        draw_strip(Path(sys.argv[1]))
    else:
        draw_comparison(Path(sys.argv[1]), Path(sys.argv[2]))
