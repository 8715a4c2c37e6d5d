"""Source files are opened at most three times per run, and once when they are kept; planning keeps
no content."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import OpenImageIO as oiio
import pytest
from conftest import Icm
from PIL import Image

from icm_cli.images.decoding import SourceFile, decode_image, frame_count
from icm_cli.images.image_file import HEAD_BYTES, ImageFile

opened_paths: list[str] | None = None
"""Names of the files that were opened, while a test counts them."""


def record_open(event: str, arguments: tuple[Any, ...]) -> None:
    if opened_paths is not None and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        opened_paths.append(Path(arguments[0]).name)


sys.addaudithook(record_open)


@pytest.fixture
def count_opens(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Counter[str]]]:
    """Count opens by file name. OpenImageIO opens a file once, and twice if it is given settings
    (see strace)."""
    global opened_paths
    opened_paths = []
    open_file = oiio.ImageInput.open

    def record_and_open(path: str, *settings: Any) -> Any:
        assert opened_paths is not None
        opened_paths.extend([Path(path).name] * (2 if settings else 1))
        return open_file(path, *settings)

    monkeypatch.setattr(oiio.ImageInput, "open", staticmethod(record_and_open))
    yield lambda: Counter(opened_paths)
    opened_paths = None


def write_images(folder: Path, rgb: np.ndarray) -> list[str]:
    """Write one image in each of the formats, and return the file names."""
    folder.mkdir()
    image = Image.fromarray(rgb)
    for suffix in ("jpg", "png", "webp", "bmp", "gif", "tif", "ppm"):
        image.save(folder / f"{suffix}_8.{suffix}")
    cv2.imwrite(str(folder / "png_16.png"), rgb[..., ::-1].astype(np.uint16) * 257)
    for name, kind in (
        ("exr_half.exr", "half"),
        ("tif_float.tif", "float"),
        ("dpx_10.dpx", "uint10"),
        ("a.hdr", "float"),
    ):
        file = oiio.ImageOutput.create(str(folder / name))
        spec = oiio.ImageSpec(rgb.shape[1], rgb.shape[0], 3, "uint16" if kind == "uint10" else kind)
        assert file.open(str(folder / name), spec), file.geterror()
        file.write_image(rgb.astype(np.float32) / np.float32(255))
        file.close()
    image.save(folder / "two.jp2")
    image.save(folder / "three.j2k")
    image.save(folder / "pages.tif", save_all=True, append_images=[image])
    (folder / "no_suffix").write_bytes((folder / "jpg_8.jpg").read_bytes())
    return sorted(path.name for path in folder.iterdir())


def test_a_source_file_is_opened_at_most_three_times(
    icm: Icm, scene: Path, count_opens: Callable[[], Counter[str]]
) -> None:
    rgb = cv2.imread(str(scene / "imgs" / "pad.0101.png"))[..., ::-1]
    names = write_images(scene / "formats", np.ascontiguousarray(rgb))
    before = count_opens()
    result = icm(src=scene / "formats", overwrite=None)
    assert result.exit_code == 0, result.output
    first = count_opens() - before
    counts = {name: first[name] for name in names}
    limits = dict.fromkeys(names, 3) | {"pages.tif": 5}  # each of its two pages is read
    assert all(0 < counts[name] <= limits[name] for name in names), counts
    assert counts["jpg_8.jpg"] == counts["png_8.png"] == 2
    before = count_opens()
    assert icm(src=scene / "formats").exit_code == 0
    second = count_opens() - before
    kept = {
        name: second[name] for name in names if not (scene / "out" / name).exists()
    }  # others have alphas of that name
    assert set(kept.values()) == {1}, kept


def test_a_decoder_gets_at_most_one_handle_and_one_reader(
    tmp_path: Path, count_opens: Callable[[], Counter[str]]
) -> None:
    names = write_images(tmp_path / "formats", np.full((12, 16, 3), 90, np.uint8))
    before = count_opens()
    for name in names:
        decode_image(tmp_path / "formats" / name)
    assert max((count_opens() - before)[name] for name in names) == 2


def test_planning_keeps_no_content_and_reads_the_state_once(
    tmp_path: Path, count_opens: Callable[[], Counter[str]]
) -> None:
    Image.effect_noise((900, 700), 80).convert("RGB").save(tmp_path / "a.jpg")
    file = SourceFile.inspect(tmp_path / "a.jpg")
    assert sum(len(str(value)) for value in vars(file).values()) < 500
    before = count_opens()
    state = file.state()
    assert (count_opens() - before)["a.jpg"] == 0
    with ImageFile.open(tmp_path / "a.jpg") as opened:
        assert opened.read_state() == state
    os.utime(tmp_path / "a.jpg", ns=(1, 1))
    assert file.state() != state


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_a_file_with_other_bytes_has_another_state_at_equal_size_and_time(tmp_path: Path, suffix: str) -> None:
    """A TIFF of Pillow has its tags, and so its orientation, at the end of the file."""
    states = []
    for orientation in (1, 6):
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        Image.new("RGB", (200, 100), "red").save(path, exif=exif, tiffinfo={274: orientation}, compression=None)
        os.utime(path, ns=(7, 7))
        states.append(SourceFile.inspect(path).state())
    assert states[0].split()[:2] == states[1].split()[:2]
    assert states[0] != states[1]


@pytest.mark.parametrize("byte_order", ["<", ">"])
@pytest.mark.parametrize("is_big", [False, True])
def test_smaller_copies_are_no_pages_of_a_tiff(tmp_path: Path, byte_order: str, is_big: bool) -> None:
    path = tmp_path / "a.tif"
    image = Image.new("RGB", (64, 48), "blue")
    if byte_order == "<":
        copy = Image.new("RGB", (32, 24), "blue")
        copy.encoderinfo = {"tiffinfo": {254: 1}}
        image.save(path, save_all=True, append_images=[copy, image], big_tiff=is_big)
        assert frame_count(path) == 2
    else:
        file = oiio.ImageOutput.create(str(path))
        specs = [oiio.ImageSpec(64, 48, 3, "uint8") for _ in range(2)]
        for spec in specs:
            spec.attribute("tiff:bigtiff", int(is_big))
            spec.attribute("oiio:Endian", "big")
        assert file.open(str(path), tuple(specs))
        file.write_image(np.asarray(image))
        assert file.open(str(path), specs[1], "AppendSubimage")
        file.write_image(np.asarray(image))
        file.close()
        assert frame_count(path) == 2


def test_a_tiff_whose_pages_refer_to_each_other_ends(tmp_path: Path) -> None:
    """The offset of the next page points back to the first one."""
    path = tmp_path / "loop.tif"
    path.write_bytes(b"II*\0\x08\0\0\0" + b"\0\0" + b"\x08\0\0\0" + bytes(HEAD_BYTES))
    assert frame_count(path) == 1
