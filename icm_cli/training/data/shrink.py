"""Small copies of all that a run would train on, to carry to another machine.

    python -m icm_cli.training.data.shrink OUT --data configs/data/lite.yaml --px 384 --piece-mb 50

writes every picture and alpha, at most so large, into tar files of at most so many megabytes each. Unpacked beside one
another they are a folder with ``data.yaml``, which ``icm train --data data.yaml`` takes from within it. Alphas are kept
exactly, pictures as WebP; ``copies_of.json`` keeps the SHA-256 of the originals, so that a checkpoint still says what
it saw.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import cv2
import numpy as np
import typer
import yaml

from icm_cli.errors import IcmError, ImageError
from icm_cli.files import atomic_write, cached_file_digest
from icm_cli.geometry import ImageU8, downscaled_size, resize
from icm_cli.images.reading import read_image
from icm_cli.training.data.layers import photograph
from icm_cli.training.data.pool import Item, Pool, read_pool
from icm_cli.training.settings import CUTOUTS, DataConfig, PairConfig, SourceConfig, read_data

PICTURE_QUALITY = 88
LOSSLESS = 101
"""Quality above which cv2 writes WebP without loss."""


def shrink(data: str | Path, out: Path, *, long_side_px: int, piece_bytes: int) -> list[Path]:
    """Write the tar files, ``out-0.tar`` and following, each whole or not at all; returns their paths.

    Raises ConfigError or UsageError where there is nothing to train on, ImageError for an image that cannot be read.
    """
    config = read_data(data)
    pool = read_pool(config, PairConfig())
    pieces: list[Path] = []
    members: list[tuple[str, bytes]] = []

    def close() -> None:
        if members:
            pieces.append(out.with_name(f"{out.name}-{len(pieces)}.tar"))
            _write(pieces[-1], members)
            members.clear()

    size = 0
    for name, content in _members(config, pool, long_side_px):
        room = len(content) + 3 * tarfile.BLOCKSIZE  # header, padding, end
        if size + room > piece_bytes:
            close()
            size = 0
        members.append((name, content))
        size += room
    close()
    return pieces


def _members(config: DataConfig, pool: Pool, long_side_px: int) -> Iterator[tuple[str, bytes]]:
    """Files of the copy, by their paths in it."""
    classes: dict[str, list[str]] = {}
    sources = []
    for number, (items, source) in enumerate(zip(pool.sources, config.sources, strict=True)):
        are_foregrounds = items[0].is_foreground
        folders = _folders(number, items)
        for item, folder in zip(items, folders, strict=True):
            classes[folder] = sorted(item.classes)
        sources.append(_source(number, source, are_foregrounds, has_classes=any(item.classes for item in items)))
    copied = {"sources": sources, "backgrounds": ["backgrounds"] if pool.backgrounds else []}
    yield "data.yaml", yaml.safe_dump({**copied, "copies_of": "copies_of.json"}, sort_keys=False).encode()
    yield "classes.json", json.dumps(classes).encode()
    yield "copies_of.json", json.dumps(sorted({cached_file_digest(path) for path in pool.images})).encode()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for number, items in enumerate(pool.sources):
            made = threads.map(lambda item: _copies(item, long_side_px), items)
            for index, (folder, files) in enumerate(zip(_folders(number, items), made, strict=True)):
                for kind, content in files.items():
                    ending = "png" if kind == "alphas" else "webp"
                    yield f"{folder.replace('images', kind, 1)}/{index:05d}.{ending}", content
        for index, content in enumerate(threads.map(lambda path: _background(path, long_side_px), pool.backgrounds)):
            yield f"backgrounds/{index:05d}.webp", content


def _folders(number: int, items: tuple[Item, ...]) -> list[str]:
    """Folder of each item of a source: one for every group."""
    groups = {group: index for index, group in enumerate(dict.fromkeys(item.group for item in items))}
    return [str(PurePosixPath("images", str(number), f"{groups[item.group]:04d}")) for item in items]


def _source(number: int, source: SourceConfig, are_foregrounds: bool, *, has_classes: bool) -> dict[str, Any]:
    """The source of the copy in ``data.yaml``; softened masks are soft already."""
    kept = {"weight": source.weight, "licence": source.licence, "binary": source.binary}
    if are_foregrounds:
        where: dict[str, Any] = {"dataset": CUTOUTS, "root": f"images/{number}"}
    else:
        where = {"images": f"images/{number}/*/*.webp", "alphas": f"alphas/{number}/*/*.png"}
    return {**where, **({"classes": "classes.json"} if has_classes else {}), **kept}


def _copies(item: Item, long_side_px: int) -> dict[str, bytes]:
    """The files of an item: picture and alpha, or one cut-out."""
    layer = photograph(item, long_side_px)
    if item.is_foreground:
        return {"images": _coded(np.dstack([layer.rgb, layer.alpha]), ".webp", LOSSLESS)}
    return {"images": _coded(layer.rgb, ".webp", PICTURE_QUALITY), "alphas": _coded(layer.alpha, ".png")}


def _background(path: Path, long_side_px: int) -> bytes:
    rgb = read_image(path).rgb
    return _coded(resize(rgb, downscaled_size(rgb.shape[:2], long_side_px)), ".webp", PICTURE_QUALITY)


def _coded(image: ImageU8, ending: str, quality: int | None = None) -> bytes:
    """An image, uint8 [H,W] or RGB(A) [H,W,C], as a file's content."""
    if image.ndim == 3:
        image = np.ascontiguousarray(image[..., [2, 1, 0, 3][: image.shape[2]]])
    options = [] if quality is None else [cv2.IMWRITE_WEBP_QUALITY, quality]
    done, content = cv2.imencode(ending, image, options)
    if not done:
        raise ImageError(f"an image of {image.shape[1]}x{image.shape[0]} px cannot be written as {ending}")
    return content.tobytes()


def _write(path: Path, members: list[tuple[str, bytes]]) -> None:
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def main(
    out: Annotated[Path, typer.Argument(help="Start of the tar files' names.")],
    data: Annotated[Path, typer.Option(help="The data, as icm train takes them.")],
    px: Annotated[int, typer.Option(min=64, help="Long side of the copies, at most.")] = 384,
    piece_mb: Annotated[int, typer.Option(min=1, help="Megabytes of a tar file, at most.")] = 50,
) -> None:
    """Copy what a run would train on, small, into tar files."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in shrink(data, out, long_side_px=px, piece_bytes=piece_mb * 1_000_000):
            typer.echo(f"{path} {path.stat().st_size / 1e6:.1f} MB")
    except IcmError as error:
        typer.echo(f"icm: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
