"""Images and masks in all common formats, and damaged files."""

from __future__ import annotations

import re
import struct
import sys
from pathlib import Path

import cv2
import numpy as np
import pillow_heif
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from icm_cli.errors import ImageError, OutputError
from icm_cli.images.decoding import frame_count, image_size
from icm_cli.images.reading import read_alpha, read_image
from icm_cli.images.writing import has_changed_pixels, read_provenance, write_alpha

pillow_heif.register_heif_opener()  # to write files; icm does not register it

RGB = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
GREY = RGB[..., 0].astype(np.float32) / np.float32(255.0)


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)
    return path


def test_rgb(tmp_path: Path) -> None:
    image = read_image(saved(tmp_path / "名 前 é.png", Image.fromarray(RGB)))
    assert (image.rgb == RGB).all()
    assert image.alpha is None


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    corner = np.zeros((40, 60, 3), np.uint8)
    corner[:10, :10] = 255  # the stored top left corner
    image = read_image(saved(tmp_path / "a.png", Image.fromarray(corner), exif=exif))
    assert image.rgb.shape == ((60, 40, 3) if orientation >= 5 else (40, 60, 3))
    rows, columns = np.nonzero(image.rgb[..., 0])
    top, left = rows.min() == 0, columns.min() == 0
    expected = {1: (1, 1), 2: (1, 0), 3: (0, 0), 4: (0, 1), 5: (1, 1), 6: (1, 0), 7: (0, 0), 8: (0, 1)}
    assert (top, left) == expected[orientation]


def exif_block(*entries: tuple[int, int, int, bytes]) -> bytes:
    """Return EXIF with one directory of (tag, type, count, four bytes of value), which may be
    invalid."""
    body = b"".join(struct.pack("<HHI", tag, kind, count) + value for tag, kind, count, value in entries)
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + b"\0\0\0\0"


LYING = (0x0112, 3, 1, struct.pack("<HH", 6, 0))


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns about invalid EXIF
@pytest.mark.parametrize(
    "entry",
    [
        (0x011A, 3, 1, struct.pack("<f", 72.5)),  # a resolution in the wrong type
        (0x011A, 10, 1, b"\xff\xff\xff\xff"),  # a rational outside the block
        (0x8769, 2, 4, b"abc\0"),  # text instead of the offset of a directory
        (0x8769, 5, 1, b"\x08\0\0\0"),
        (0x9286, 99, 1, b"\0\0\0\0"),  # unknown type
    ],
)
def test_unusual_exif_only_affects_the_orientation(tmp_path: Path, entry: tuple[int, int, int, bytes]) -> None:
    path = saved(tmp_path / "a.jpg", Image.fromarray(RGB), exif=exif_block(LYING, entry))
    assert read_image(path).rgb.shape == (60, 40, 3)
    assert image_size(path) == (60, 40)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns about invalid EXIF
@given(block=st.binary(max_size=200))
@settings(max_examples=50)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_invalid_exif_does_not_fail_an_image(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, block: bytes
) -> None:
    path = tmp_path_factory.mktemp("exif") / f"a.{suffix}"
    saved(path, Image.fromarray(RGB), exif=b"Exif\0\0II*\0\x08\0\0\0" + block)
    assert read_image(path).rgb.shape in {(40, 60, 3), (60, 40, 3)}


@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    flat = Image.new("RGB", (32, 32), (200, 30, 60)).convert("CMYK")
    rgb = read_image(saved(tmp_path / f"a.{suffix}", flat)).rgb
    assert np.abs(rgb[16, 16].astype(int) - (200, 30, 60)).max() <= 4


def test_greyscale_and_palette(tmp_path: Path) -> None:
    grey = read_image(saved(tmp_path / "g.jpg", Image.fromarray(RGB).convert("L"))).rgb
    assert grey.shape == RGB.shape
    assert (grey[..., 0] == grey[..., 2]).all()
    assert read_image(saved(tmp_path / "p.gif", Image.fromarray(RGB))).rgb.shape == RGB.shape


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bit(tmp_path: Path, channels: int, suffix: str) -> None:
    deep = np.random.default_rng(1).integers(0, 65536, (20, 30, channels)).astype(np.uint16)
    cv2.imwrite(str(tmp_path / f"a.{suffix}"), deep)
    image = read_image(tmp_path / f"a.{suffix}")
    expected = deep[..., 2::-1] if channels > 1 else np.repeat(deep, 3, -1)
    assert np.abs(image.rgb.astype(float) - expected / 257).max() <= 1
    assert (image.alpha is not None) == (channels == 4)


def test_alpha_channel_of_an_image_is_separate(tmp_path: Path) -> None:
    rgba = np.dstack([RGB, RGB[..., 0]])
    image = read_image(saved(tmp_path / "a.png", Image.fromarray(rgba)))
    assert (image.rgb == RGB).all()
    assert image.alpha is not None
    assert (image.alpha == rgba[..., 3]).all()


def test_masks_of_all_formats_are_equal(tmp_path: Path) -> None:
    mask = np.zeros((20, 30), np.uint8)
    mask[5:15, 5:20] = 255
    black, white = np.zeros((20, 30, 3), np.uint8), np.full((20, 30), 255, np.uint8)
    cv2.imwrite(str(tmp_path / "deep.png"), mask.astype(np.uint16) * 257)
    files = [
        saved(tmp_path / "grey.png", Image.fromarray(mask)),
        saved(tmp_path / "rgb.png", Image.fromarray(np.repeat(mask[..., None], 3, -1))),
        saved(tmp_path / "red.png", Image.fromarray(np.dstack([mask, mask * 0, mask * 0]))),
        saved(tmp_path / "bit.png", Image.fromarray(mask).convert("1")),
        saved(tmp_path / "alpha.png", Image.fromarray(np.dstack([black, mask]))),
        saved(tmp_path / "opaque.png", Image.fromarray(np.dstack([mask, mask, mask, white]))),
        tmp_path / "deep.png",
    ]
    for path in files:
        assert (read_alpha(path) == mask).all(), path.name


@settings(max_examples=60)
@given(st.sampled_from(["JPEG", "PNG", "TIFF", "WEBP"]), st.floats(0, 0.98))
def test_truncated_file_is_reported(tmp_path_factory: pytest.TempPathFactory, kind: str, kept: float) -> None:
    path = tmp_path_factory.mktemp("torn") / "a.img"
    Image.fromarray(RGB).save(path, format=kind)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ImageError, match=r"a\.img (is|begins|cannot)"):
        read_image(path)


JPEG_FORMS = (
    {},
    {"progressive": True},
    {"optimize": True},
    {"restart_marker_blocks": 5},
    {"subsampling": 0},
)


def jpeg_bytes(path: Path, **options: object) -> bytes:
    smooth = cv2.resize(RGB, (300, 200), interpolation=cv2.INTER_CUBIC)
    return saved(path, Image.fromarray(smooth), **options).read_bytes()


@pytest.mark.parametrize("options", JPEG_FORMS, ids=str)
@pytest.mark.parametrize("kept", [0, 1])
def test_jpeg_without_end_marker_is_read(tmp_path: Path, options: dict[str, object], kept: int) -> None:
    data = jpeg_bytes(tmp_path / "a.jpg", **options)
    complete = read_image(tmp_path / "a.jpg")
    assert complete.notices == ()
    (tmp_path / "a.jpg").write_bytes(data[: len(data) - 2 + kept])
    repaired = read_image(tmp_path / "a.jpg")
    assert (repaired.rgb == complete.rgb).all()
    assert repaired.notices == (
        (f"{tmp_path / 'a.jpg'} is a JPEG without its end marker; all rows are present, so the image is used"),
    )


@pytest.mark.parametrize("options", JPEG_FORMS, ids=str)
@pytest.mark.parametrize("cut", [6, 20, 400, "half", "restart"])
def test_jpeg_with_missing_rows_is_damaged(tmp_path: Path, options: dict[str, object], cut: int | str) -> None:
    data = jpeg_bytes(tmp_path / "a.jpg", **options)
    end = {"half": len(data) // 2, "restart": max(data.rfind(b"\xff\xd0"), len(data) // 3)}.get(cut) or len(data) - int(
        cut
    )
    (tmp_path / "a.jpg").write_bytes(data[:end])
    with pytest.raises(ImageError, match="is damaged or cut short"):
        read_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_progressive_jpeg_with_missing_scans_is_damaged(tmp_path: Path, mode: str) -> None:
    """After the first scan, all rows exist without detail."""
    path = tmp_path / "a.jpg"
    Image.fromarray(cv2.resize(RGB, (300, 200))).convert(mode).save(path, progressive=True)
    data = path.read_bytes()
    scans = [match.start() for match in re.finditer(b"\xff\xda", data)]
    assert len(scans) > 4
    for end in scans[1:]:
        path.write_bytes(data[:end])
        with pytest.raises(ImageError, match="is damaged or cut short"):
            read_image(path)
    path.write_bytes(data[:-2])
    assert "without its end marker" in read_image(path).notices[0]


def deep_png(path: Path) -> bytes:
    cv2.imwrite(str(path), RGB.astype(np.uint16) * 257)
    return path.read_bytes()


@pytest.mark.parametrize("kept", [12, 8, 3, 1])
def test_16_bit_png_without_end_chunk_is_read(tmp_path: Path, kept: int) -> None:
    data = deep_png(tmp_path / "a.png")
    complete = read_image(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes(data[:-kept])
    assert (read_image(tmp_path / "a.png").rgb == complete.rgb).all()


def test_damaged_16_bit_png_prints_one_message(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.png"
    data = deep_png(path)
    pixels = data.index(b"IDAT")
    changed = data[: pixels + 40] + bytes([data[pixels + 40] ^ 1]) + data[pixels + 41 :]
    for content, reason in (
        (changed, "the checksum of its chunk IDAT is wrong"),
        (data[: len(data) // 2], "it ends before its pixels do"),
        (data.replace(b"IDAT", b"ID\0T"), "it has a chunk named 49440054"),
        (data[:33] + data[8:], "its header is not the first chunk, or occurs twice"),
    ):
        path.write_bytes(content)
        for read in (read_image, image_size):
            with pytest.raises(
                ImageError, match=re.escape(f"{path} is damaged or cut short ({reason}); get a complete")
            ):
                read(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(("form", "kind"), [("AVIF", "avif"), ("TIFF", "tiff")])
def test_truncated_file_of_a_known_type_is_reported_as_damaged(tmp_path: Path, form: str, kind: str) -> None:
    options = {"compression": "tiff_lzw"} if form == "TIFF" else {}
    path = saved(tmp_path / "a.img", Image.fromarray(RGB), format=form, **options)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 5])
    with pytest.raises(ImageError, match=f"a.img begins as {kind} and cannot be decoded; it is damaged"):
        read_image(path)


@pytest.mark.parametrize(("orientation", "turn"), [(1, 0), (3, 2), (6, 3), (8, 1)])
def test_heic_orientation_is_applied(tmp_path: Path, orientation: int, turn: int) -> None:
    """The orientation in the container and in EXIF are the same, and are applied once."""
    flat = np.zeros((32, 64, 3), np.uint8)
    flat[:, :32], flat[:16, 32:] = (200, 40, 30), (20, 160, 60)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.heic", Image.fromarray(flat), quality=100, exif=exif.tobytes())
    upright = np.rot90(flat, turn).astype(int)
    assert image_size(path) == upright.shape[:2]
    assert np.abs(read_image(path).rgb - upright).max() < 12


def test_heic_error_says_which_package_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.heic", Image.fromarray(RGB))
    monkeypatch.setattr(Image, "ID", [kind for kind in Image.ID if kind != "HEIF"])
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    for read in (read_image, image_size, frame_count):
        with pytest.raises(ImageError, match=re.escape("a.heic is HEIC; to read it run: pip install 'icm-cli[heif]'")):
            read(path)


def test_heic_with_10_bits_and_alpha_is_read(tmp_path: Path) -> None:
    own = np.linspace(0, 255, RGB.shape[1]).astype(np.uint8)[None].repeat(len(RGB), axis=0)
    flat = np.full_like(RGB, (200, 40, 30))
    path = saved(tmp_path / "a.heic", Image.fromarray(np.dstack([flat, own])), quality=100)
    assert np.abs(read_image(path).rgb.astype(int) - flat).max() < 4
    assert np.abs(read_alpha(path).astype(int) - own).max() < 8
    deep = (flat.astype(np.uint16) * 257).tobytes()
    complete = pillow_heif.from_bytes(mode="RGB;16", size=flat.shape[1::-1], data=deep)
    complete.save(tmp_path / "deep.heic", quality=100)
    assert np.abs(read_image(tmp_path / "deep.heic").rgb.astype(int) - flat).max() < 4


def test_messages_of_a_decoder_become_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    cv2.imwrite(str(path), np.random.default_rng(0).integers(0, 65536, (400, 300, 3)).astype(np.uint16))
    data = path.read_bytes()
    tags_at = int.from_bytes(data[4:8], "little")
    path.write_bytes(data[:9_000] + bytes(tags_at - 9_000) + data[tags_at:])
    with pytest.raises(ImageError, match="is damaged or cut short") as error:
        read_image(path)
    assert len(str(error.value)) < len(str(path)) + 200


def test_other_file_types_are_reported(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(ImageError, match="not an image"):
        read_image(tmp_path / "text.png")
    with pytest.raises(ImageError, match="does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="folder"):
        read_image(tmp_path)


def test_alpha_has_one_channel_and_its_provenance(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.png"
    write_alpha(path, GREY, {"icm-digest": "abc"})
    with Image.open(path) as image:
        assert image.mode == "L"
    assert (read_alpha(path) == RGB[..., 0]).all()
    assert (read_provenance(path) or {})["icm-digest"] == "abc"
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]


@settings(max_examples=60)
@given(st.data())
def test_damaged_alpha_has_no_provenance(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """An alpha that is truncated or has a flipped bit is never accepted as complete."""
    path = tmp_path_factory.mktemp("alpha") / "a.png"
    write_alpha(path, GREY, {"icm-digest": "abc"})
    complete = path.read_bytes()
    at = data.draw(st.integers(0, len(complete) - 1))
    if data.draw(st.booleans()):
        path.write_bytes(complete[:at])
    else:
        path.write_bytes(
            complete[:at] + bytes([complete[at] ^ (1 << data.draw(st.integers(0, 7)))]) + complete[at + 1 :]
        )
    provenance = read_provenance(path)
    assert provenance is None or has_changed_pixels(path, provenance)


def test_unwritable_output_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        write_alpha(tmp_path / "file" / "a.png", GREY, {})
