"""Export reduced copies of the training data as tar files, to train on another machine.

    python -m icm_cli.training.data.export OUT --data configs/data/lite.yaml --px 384 --shard-mb 50

writes every image and alpha, reduced to at most 384 px, to tar files of at most 50 MB each. Unpacked into one folder
they contain ``data.yaml``; run ``icm train --data data.yaml`` in that folder. Images are compressed as WebP, alphas
without loss. ``copies_of.json`` contains the SHA-256 digests of the original files, so that checkpoints record them.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import cv2
import numpy as np
import typer
import yaml

from icm_cli.errors import IcmError, ImageError
from icm_cli.files.atomic_writes import atomic_write
from icm_cli.files.digests import cached_file_digest
from icm_cli.geometry import ImageU8, downscaled_size, format_size, resize
from icm_cli.images.reading import read_image
from icm_cli.training.data.pool import TrainingItem, TrainingPool, read_pool
from icm_cli.training.data.scenes import read_photograph
from icm_cli.training.settings import CUTOUTS, DataConfig, SourceConfig, read_data

IMAGE_QUALITY = 88
LOSSLESS = 101
"""Quality for which cv2 writes lossless WebP."""


def export_shards(data: str | Path, out: Path, *, long_side_px: int, shard_bytes: int) -> list[Path]:
    """Write the tar files ``out-0.tar``, ``out-1.tar`` ..., each atomically, and return their paths.

    Raises UsageError if the data cannot be trained on, ImageError if an image cannot be read.
    """
    config = read_data(data)
    paths: list[Path] = []
    for shard in _split_into_shards(_make_files(config, read_pool(config), long_side_px), shard_bytes):
        paths.append(out.with_name(f"{out.name}-{len(paths)}.tar"))
        _write_tar(paths[-1], shard)
    return paths


def _split_into_shards(files: Iterator[tuple[str, bytes]], shard_bytes: int) -> Iterator[list[tuple[str, bytes]]]:
    """Split the files of an export into lists of at most ``shard_bytes``, each for one tar file."""
    shard: list[tuple[str, bytes]] = []
    size = 0
    for name, content in files:
        member_size = len(content) + 3 * tarfile.BLOCKSIZE  # header, padding, end
        if shard and size + member_size > shard_bytes:
            yield shard
            shard, size = [], 0
        shard.append((name, content))
        size += member_size
    yield shard


def _make_files(config: DataConfig, pool: TrainingPool, long_side_px: int) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of every file of the export."""
    sources = []
    classes: dict[str, list[str]] = {}
    for number, (source, items) in enumerate(zip(config.sources, pool.sources, strict=True)):
        sources.append(_describe_source(number, source, items))
        for item, folder in zip(items, _item_folders(number, items), strict=True):
            classes[f"images/{folder}"] = sorted(item.classes)
    data = {"sources": sources, "backgrounds": ["backgrounds"] if pool.backgrounds else []}
    yield "data.yaml", yaml.safe_dump({**data, "copies_of": "copies_of.json"}, sort_keys=False).encode()
    yield "classes.json", json.dumps(classes).encode()
    yield "copies_of.json", json.dumps(sorted({cached_file_digest(path) for path in pool.image_paths})).encode()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for number, items in enumerate(pool.sources):
            encoded = threads.map(lambda item: _encode_item(item, long_side_px), items)
            for index, (folder, files) in enumerate(zip(_item_folders(number, items), encoded, strict=True)):
                yield f"images/{folder}/{index:05d}.webp", files.image
                if files.alpha is not None:
                    yield f"alphas/{folder}/{index:05d}.png", files.alpha
        backgrounds = threads.map(lambda path: _encode_background(path, long_side_px), pool.backgrounds)
        for index, content in enumerate(backgrounds):
            yield f"backgrounds/{index:05d}.webp", content


def _item_folders(number: int, items: Sequence[TrainingItem]) -> list[str]:
    """Return the folder of each item of source ``number``, below "images" or "alphas"; every group has one folder."""
    group_numbers: dict[str, int] = {}
    for item in items:
        group_numbers.setdefault(item.group, len(group_numbers))
    return [f"{number}/{group_numbers[item.group]:04d}" for item in items]


def _describe_source(number: int, source: SourceConfig, items: Sequence[TrainingItem]) -> dict[str, Any]:
    """Return the entry of a source in the exported ``data.yaml``, without ``soften_px``, which is already applied."""
    where: dict[str, Any] = {"images": f"images/{number}/*/*.webp", "alphas": f"alphas/{number}/*/*.png"}
    if items[0].is_foreground:
        where = {"dataset": CUTOUTS, "root": f"images/{number}"}
    if any(item.classes for item in items):
        where["classes"] = "classes.json"
    return {**where, "weight": source.weight, "licence": source.licence, "binary": source.binary}


class _EncodedItem(NamedTuple):
    """Files of an item: the image as WebP and the alpha as PNG; the alpha of a foreground is in its image."""

    image: bytes
    alpha: bytes | None


def _encode_item(item: TrainingItem, long_side_px: int) -> _EncodedItem:
    """Read an item, and encode its reduced copy. Raises ImageError."""
    scene = read_photograph(item, long_side_px)
    if item.is_foreground:
        return _EncodedItem(_encode_image(np.dstack([scene.rgb, scene.alpha]), ".webp", LOSSLESS), None)
    return _EncodedItem(_encode_image(scene.rgb, ".webp", IMAGE_QUALITY), _encode_image(scene.alpha, ".png"))


def _encode_background(path: Path, long_side_px: int) -> bytes:
    rgb = read_image(path).rgb
    return _encode_image(resize(rgb, downscaled_size(rgb.shape[:2], long_side_px)), ".webp", IMAGE_QUALITY)


def _encode_image(image: ImageU8, suffix: str, quality: int | None = None) -> bytes:
    """Encode an image, uint8 [H,W] or RGB(A) [H,W,C], in the format of a file name suffix. Raises ImageError."""
    if image.ndim == 3:
        bgra = [2, 1, 0, 3][: image.shape[2]]  # cv2 expects blue first
        image = np.ascontiguousarray(image[..., bgra])
    options = [] if quality is None else [cv2.IMWRITE_WEBP_QUALITY, quality]
    is_encoded, content = cv2.imencode(suffix, image, options)
    if not is_encoded:
        raise ImageError(f"an image of {format_size(image.shape)} px cannot be written as {suffix}")
    return content.tobytes()


def _write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with atomic_write(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def main(
    out: Annotated[Path, typer.Argument(help="Prefix of the tar files' names.")],
    data: Annotated[Path, typer.Option(help="Data file, as for icm train --data.")],
    px: Annotated[int, typer.Option(min=64, help="Largest long side of the copies, in px.")] = 384,
    shard_mb: Annotated[int, typer.Option(min=1, help="Largest size of a tar file, in MB.")] = 50,
) -> None:
    """Export reduced copies of the training data as tar files."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for path in export_shards(data, out, long_side_px=px, shard_bytes=shard_mb * 1_000_000):
            typer.echo(f"{path} {path.stat().st_size / 1e6:.1f} MB")
    except IcmError as error:
        typer.echo(f"icm: {error}", err=True)
        raise typer.Exit(error.exit_code) from None


if __name__ == "__main__":
    typer.run(main)
