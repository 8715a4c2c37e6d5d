"""Draw README's pictures from the alphas that icm made of the demo.

python tests/demo/strip.py ALPHAS           # the folder that README's first command wrote; makes tests/demo/strip.jpg
python tests/demo/strip.py ALPHAS BEFORE    # and of the same with another model; makes tests/demo/before_after.jpg
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
PICTURES = sorted((DEMO / "imgs").iterdir())


def main(alphas: Path) -> None:
    """The reference with its mask, then every picture with its alpha and cut-out."""
    reference, mask = load(DEMO / "ref.jpg"), load(DEMO / "mask.png").convert("L")
    columns = [column([reference, mask.convert("RGB"), cut_out(reference, mask)])]
    for picture in PICTURES:
        source, alpha = load(picture), load(alphas / f"{picture.stem}.png").convert("L")
        columns.append(column([source, alpha.convert("RGB"), cut_out(source, alpha)]))
    divider = np.full((len(columns[0]), GAP_PX, 3), 90, np.uint8)
    save([columns[0], divider, *columns[1:]], "strip.jpg")


def compare(alphas: Path, before: Path) -> None:
    """Every picture: itself, alpha before, alpha after, true alpha."""
    folders = (before, alphas, DEMO / "alphas")
    save(
        [column([load(path), *(load(folder / f"{path.stem}.png") for folder in folders)]) for path in PICTURES],
        "before_after.jpg",
    )


def save(columns: list[np.ndarray], name: str) -> None:
    Image.fromarray(np.hstack(columns)).save(DEMO / name, quality=88, optimize=True)


def load(path: Path) -> Image.Image:
    return Image.open(path).convert("RGB")


def cut_out(picture: Image.Image, alpha: Image.Image) -> Image.Image:
    return Image.composite(picture, Image.new("RGB", picture.size, (GREY, GREY, GREY)), alpha)


def column(cells: list[Image.Image]) -> np.ndarray:
    width = round(cells[0].width * HEIGHT_PX / cells[0].height)
    sheet = Image.new("RGB", (width + GAP_PX, len(cells) * (HEIGHT_PX + GAP_PX)), "white")
    for row, cell in enumerate(cells):
        sheet.paste(cell.resize((width, HEIGHT_PX), Image.Resampling.LANCZOS), (0, row * (HEIGHT_PX + GAP_PX)))
    return np.asarray(sheet)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        compare(Path(sys.argv[1]), Path(sys.argv[2]))
