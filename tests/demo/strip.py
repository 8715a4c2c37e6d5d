"""Draw README's picture: the reference with its mask, the pictures, the alphas that icm made, and cut-outs.

python tests/demo/strip.py ALPHAS    # the folder that README's first command wrote; makes tests/demo/strip.jpg
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


def main(alphas: Path) -> None:
    reference, mask = load(DEMO / "ref.jpg"), load(DEMO / "mask.png").convert("L")
    columns = [column([reference, mask.convert("RGB"), cut_out(reference, mask)])]
    for picture in sorted((DEMO / "imgs").iterdir()):
        source, alpha = load(picture), load(alphas / f"{picture.stem}.png").convert("L")
        columns.append(column([source, alpha.convert("RGB"), cut_out(source, alpha)]))
    divider = np.full((len(columns[0]), GAP_PX, 3), 90, np.uint8)
    Image.fromarray(np.hstack([columns[0], divider, *columns[1:]])).save(DEMO / "strip.jpg", quality=88, optimize=True)


def load(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def cut_out(picture: Image.Image, alpha: Image.Image) -> Image.Image:
    return Image.composite(picture, Image.new("RGB", picture.size, (GREY, GREY, GREY)), alpha)


def column(cells: list[Image.Image]) -> np.ndarray:
    width = round(cells[0].width * HEIGHT_PX / cells[0].height)
    sheet = Image.new("RGB", (width + GAP_PX, 3 * (HEIGHT_PX + GAP_PX)), "white")
    for row, cell in enumerate(cells):
        sheet.paste(cell.resize((width, HEIGHT_PX), Image.Resampling.LANCZOS), (0, row * (HEIGHT_PX + GAP_PX)))
    return np.asarray(sheet)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
