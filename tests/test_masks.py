"""Masks in common formats: unambiguous ones are used, and ambiguous ones are refused with a
hint."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import Icm
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_formats import written

from icm_cli.errors import ImageError, UsageError
from icm_cli.matting.masks import Mask, read_mask
from icm_cli.matting.references import Reference, ReferenceReader
from icm_cli.options import ReferenceOptions

TARGET = np.zeros((60, 80), np.bool_)
TARGET[10:40, 20:50] = True
OTHER = np.zeros_like(TARGET)
OTHER[45:58, 60:75] = True
BORDER = cv2.dilate(TARGET.astype(np.uint8), np.ones((5, 5), np.uint8)).astype(bool) & ~TARGET


def layers(dtype: type = np.uint8, background: int = 0, **values: int) -> np.ndarray:
    image = np.full(TARGET.shape, background, dtype)
    for name, value in values.items():
        image[{"target": TARGET, "other": OTHER, "border": BORDER}[name]] = value
    return image


def saved(folder: Path, pixels: np.ndarray, *, palette: bool = False) -> Path:
    path = folder / "mask.png"
    image = Image.fromarray(pixels)
    if palette:
        image = Image.frombytes("P", pixels.shape[::-1], pixels.tobytes())
        image.putpalette([(37 * n + c * 91) % 256 for n in range(256) for c in range(3)])
    image.save(path)
    return path


def read(path: Path, label: str | None = None) -> tuple[Mask, list[str]]:
    notices: list[str] = []
    return read_mask(path, label, notices.append), notices


def read_reference(ref: Path, mask: Path, notices: list[str] | None = None) -> Reference:
    reader = ReferenceReader((notices if notices is not None else []).append)
    return reader.read_references(ReferenceOptions(ref=(ref,), mask=(mask,)))[0]


@pytest.mark.parametrize(
    "image",
    [
        layers(target=255),
        layers(np.uint16, target=65535),
        np.dstack([layers(target=255)] * 3),
        np.dstack([np.full((60, 80, 3), 90, np.uint8), layers(target=255)]),
        layers(target=140, background=110),
    ],
    ids=["grey", "16 bit", "rgb", "rgba", "no black"],
)
def test_plain_mask_is_used_without_notice(tmp_path: Path, image: np.ndarray) -> None:
    mask, notices = read(saved(tmp_path, image))
    assert (mask.inside == TARGET).all()
    assert not mask.unknown.any()
    assert not notices


@pytest.mark.parametrize("value", [1, 75, 128, 254])
def test_single_label_on_black_is_the_object(tmp_path: Path, value: int) -> None:
    mask, notices = read(saved(tmp_path, layers(target=value)))
    assert (mask.inside == TARGET).all()
    assert bool(notices) == (value < 243)


def test_16_bit_mask_of_0_and_255_is_scaled_correctly(tmp_path: Path) -> None:
    mask, notices = read(saved(tmp_path, layers(np.uint16, target=255)))
    assert (mask.inside == TARGET).all()
    assert "one label, 255 of 65535" in notices[0]


def test_palette_masks_are_indices_and_255_is_void(tmp_path: Path) -> None:
    mask, _ = read(saved(tmp_path, layers(border=255, target=8), palette=True))
    assert (mask.inside == TARGET).all()
    assert (mask.unknown == BORDER).all()
    with pytest.raises(UsageError, match=r"several labels: 8 \(.*\), 15 \(.*as in --mask-label 8"):
        read(saved(tmp_path, layers(target=8, other=15), palette=True))
    mask, _ = read(saved(tmp_path, layers(target=8, other=15), palette=True), "15")
    assert (mask.inside == OTHER).all()


@pytest.mark.parametrize("name", ["mask.gif", "mask.png"])
@pytest.mark.parametrize("greys", [(0, 255), (255, 0), tuple(range(256)), tuple(range(255, -1, -1))])
@pytest.mark.parametrize("is_soft", [False, True])
def test_grey_palettes_are_read_by_colour(
    tmp_path: Path, icm: Icm, scene: Path, name: str, greys: tuple[int, ...], is_soft: bool
) -> None:
    with Image.open(scene / "mask.png") as image:
        plain = np.asarray(image.convert("L"))
    if not is_soft or len(greys) == 2:
        plain = np.where(plain > 127, 255, 0).astype(np.uint8)
    indices = np.zeros_like(plain)
    for index, grey in enumerate(greys):
        indices[plain == grey] = index
    image = Image.frombytes("P", plain.shape[::-1], indices.tobytes())
    image.putpalette([grey for grey in greys for _ in range(3)])
    image.save(tmp_path / name, optimize=False)
    mask, _ = read(tmp_path / name)
    assert (mask.inside == (plain > 127)).all()
    assert not mask.unknown.any()
    Image.fromarray(plain).save(tmp_path / "plain.png")
    for folder, path in (("a", tmp_path / "plain.png"), ("b", tmp_path / name)):
        if greys == (255, 0):
            assert icm(mask=path, src=scene / "imgs" / "wall.jpg", out=scene / folder).exit_code == 0
    if greys == (255, 0):
        one, other = (Image.open(scene / folder / "wall.png") for folder in "ab")
        assert (np.asarray(one) == np.asarray(other)).all()


def test_black_palette_is_read_by_index(tmp_path: Path) -> None:
    image = Image.frombytes("P", TARGET.shape[::-1], layers(target=1).tobytes())
    image.putpalette([0, 0, 0] * 2)
    image.save(tmp_path / "mask.png")
    assert (read(tmp_path / "mask.png")[0].inside == TARGET).all()


def test_several_labels_are_listed_unless_one_is_chosen(tmp_path: Path) -> None:
    path = saved(tmp_path, layers(target=75, other=150))
    with pytest.raises(UsageError, match=r"several labels: 75 \(18.8% of the image\), 150 .*--mask-label 75"):
        read(path)
    assert (read(path, "150")[0].inside == OTHER).all()
    with pytest.raises(UsageError, match=r"no pixel with the label 7; expected one of 0 \(.*\), 75 .*150"):
        read(path, "7")
    with pytest.raises(UsageError, match="has no colours"):
        read(path, "#ff0000")
    with pytest.raises(UsageError, match="neither a number nor a colour"):
        read(path, "cat")


def test_colours_are_labels(tmp_path: Path) -> None:
    colours = np.zeros((*TARGET.shape, 3), np.uint8)
    colours[TARGET] = (250, 50, 83)
    assert (read(saved(tmp_path, colours))[0].inside == TARGET).all()
    colours[OTHER] = (51, 221, 255)
    path = saved(tmp_path, colours)
    with pytest.raises(UsageError, match=r"several labels: #fa3253 .*, #33ddff .*--mask-label '#fa3253'"):
        read(path)
    assert (read(path, "#33ddff")[0].inside == OTHER).all()
    for label, message in (
        ("51", "expected #rrggbb"),
        ("#33ddf", "is not a colour"),
        ("#000001", "no pixel with the label"),
    ):
        with pytest.raises(UsageError, match=message):
            read(path, label)


def test_unknown_pixels_of_a_trimap_are_excluded(tmp_path: Path) -> None:
    mask, notices = read(saved(tmp_path, layers(border=128, target=255)))
    assert (mask.inside == TARGET).all()
    assert (mask.unknown == BORDER).all()
    assert "is a trimap" in notices[0]
    rgb = np.random.default_rng(0).integers(0, 256, (*TARGET.shape, 3), np.uint8)
    Image.fromarray(rgb).save(tmp_path / "ref.png")
    reference = read_reference(tmp_path / "ref.png", tmp_path / "mask.png")
    assert reference.unknown is not None
    assert (reference.unknown == BORDER).all()
    plain = saved(tmp_path, layers(target=255))
    other = read_reference(tmp_path / "ref.png", plain)
    assert reference.digest != other.digest


@given(sigma=st.floats(0.3, 6.0))
@settings(max_examples=40)
def test_soft_masks_are_thresholded_at_one_half(tmp_path_factory: pytest.TempPathFactory, sigma: float) -> None:
    """Antialiased and blurred edges of any width are not labels."""
    soft = cv2.GaussianBlur(layers(target=255).astype(np.float32), (0, 0), sigma)
    image = np.round(soft).astype(np.uint8)
    mask, notices = read(saved(tmp_path_factory.mktemp("soft"), image))
    assert (mask.inside == (image > 127)).mean() > 0.99
    assert not notices


def test_unusual_mask_files_are_reported(tmp_path: Path) -> None:
    """Notices report a second page, NaN, a missing end marker, and which of alpha and colours is
    used."""
    pages = [Image.fromarray(layers(target=255)), Image.fromarray(layers(other=255))]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    mask, (notice,) = read(tmp_path / "a.tif")
    assert notice == f"mask {tmp_path / 'a.tif'} has 2 frames or pages; the first one is used"
    assert (mask.inside == TARGET).all()
    broken = (layers(target=255) / 255).astype(np.float32)
    broken[0, 0] = np.nan
    Image.fromarray(broken).save(tmp_path / "b.tif")
    mask, (notice,) = read(tmp_path / "b.tif")
    assert "NaN" in notice
    assert (mask.inside == TARGET).all()
    Image.fromarray(layers(target=255)).save(tmp_path / "c.jpg", quality=100)
    (tmp_path / "c.jpg").write_bytes((tmp_path / "c.jpg").read_bytes()[:-2])
    assert "without its end marker" in read(tmp_path / "c.jpg")[1][0]
    photograph = np.random.default_rng(0).integers(0, 256, (*TARGET.shape, 3), np.uint8)
    mask, (notice,) = read(saved(tmp_path, np.dstack([photograph, layers(target=255)])))
    assert "its alpha is used and its colours are ignored" in notice
    assert (mask.inside == TARGET).all()


@pytest.mark.parametrize(
    ("dtype", "target", "other"),
    [
        *[(np.uint8, *pair) for pair in ((2, 1), (11, 10), (200, 5), (20, 1))],
        *[(np.uint16, *pair) for pair in ((2, 1), (200, 100), (7001, 3000))],
    ],
)
def test_small_ids_are_labels(tmp_path: Path, dtype: type, target: int, other: int) -> None:
    path = saved(tmp_path, layers(dtype, target=target, other=other))
    with pytest.raises(UsageError, match=rf"several labels: {target} \(.*\), {other} "):
        read(path)
    assert (read(path, str(other))[0].inside == OTHER).all()


@pytest.mark.parametrize("low", [1, 12])
def test_nearly_black_areas_next_to_white_are_black_with_a_notice(tmp_path: Path, low: int) -> None:
    mask, notices = read(saved(tmp_path, layers(target=255, other=low)))
    assert (mask.inside == TARGET).all()
    assert [f"has areas of {low} of 255 besides black and white" in each for each in notices] == [True]


@pytest.mark.parametrize("kind", ["uint", "float"])
@pytest.mark.parametrize("name", ["ids.exr", "ids.tif"])
def test_ids_of_32_bits_are_listed_unchanged(tmp_path: Path, name: str, kind: str) -> None:
    ids = layers(np.uint32, target=70001, other=5)
    path = written(tmp_path / name, ids[..., None].astype({"uint": np.uint32, "float": np.float32}[kind]), kind)
    assert (read(path, "70001")[0].inside == TARGET).all()
    assert (read(path, "5")[0].inside == OTHER).all()
    with pytest.raises(UsageError, match=r"no pixel with the label 7; expected one of 0 .*70001 .*, 5 "):
        read(path, "7")
    if kind == "uint":
        with pytest.raises(UsageError, match=r"several labels: 70001 .*--mask-label 70001"):
            read(path)
    else:
        with pytest.raises(ImageError, match=r"values up to 70001; .*, or give the object's value with --mask-label"):
            read(path)


def test_float_mask_with_values_to_255_has_its_own_message(tmp_path: Path) -> None:
    Image.fromarray(layers(target=255).astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ImageError, match=r"values up to 255; expected 0\.\.1; save it with 1 for the object"):
        read(tmp_path / "a.tif")


def test_reference_with_several_frames_gives_a_notice(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (80, 60), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "ref.gif", save_all=True, append_images=frames[1:])
    notices: list[str] = []
    read_reference(tmp_path / "ref.gif", saved(tmp_path, layers(target=255)), notices)
    assert notices == [f"reference {tmp_path / 'ref.gif'} has 2 frames or pages; the first one is used"]


def test_mask_label_without_mask_is_refused(tmp_path: Path) -> None:
    cutout = np.dstack([np.full((60, 80, 3), 90, np.uint8), layers(target=255)])
    with pytest.raises(UsageError, match="there is no --mask"):
        ReferenceReader(print).read_references(ReferenceOptions(ref=(saved(tmp_path, cutout),), mask_label="75"))


LABELS: dict[str, int] = {"uint8": 100, "uint16": 300, "uint": 70001, "int8": 60, "int16": 300, "int": 70001}


@pytest.mark.parametrize(("kind", "label"), LABELS.items())
@pytest.mark.parametrize("suffix", ["tif", "exr", "png"])
def test_every_integer_type_holds_labels_as_written(tmp_path: Path, suffix: str, kind: str, label: int) -> None:
    if kind not in {"exr": ("uint",), "png": ("uint8", "uint16")}.get(suffix, LABELS):
        return
    dtype = np.dtype({"uint": "uint32", "int": "int32"}.get(kind, kind)).type
    path = written(tmp_path / f"mask.{suffix}", layers(dtype, target=label, other=label + 1)[..., None], kind)
    with pytest.raises(UsageError, match=rf"several labels: {label} \(18.8% of the image\), {label + 1} \("):
        read(path)
    assert (read(path, str(label + 1))[0].inside == OTHER).all()


@pytest.mark.parametrize("kind", ["int8", "int16", "int"])
def test_negative_labels(tmp_path: Path, kind: str) -> None:
    dtype = np.dtype({"int": "int32"}.get(kind, kind)).type
    path = written(tmp_path / "mask.tif", layers(dtype, target=-1, other=5)[..., None], kind)
    with pytest.raises(UsageError, match=r"several labels: -1 \(18.8% of the image\), 5 \(.*--mask-label -1"):
        read(path)
    assert (read(path, "-1")[0].inside == TARGET).all()
    path = written(tmp_path / "one.tif", layers(dtype, background=-1, target=0)[..., None], kind)
    with pytest.raises(UsageError, match=r"several labels: -1 \(81.2% .*\), 0 \(18.8% .*as in --mask-label 0"):
        read(path)
    assert (read(path, "0")[0].inside == TARGET).all()
    assert (read(path, "-1")[0].inside == ~TARGET).all()


def test_negative_label_is_an_option_value(icm: Icm, scene: Path) -> None:
    path = written(scene / "mask.tif", layers(np.int16, target=-1, other=5)[..., None], "int16")
    with Image.open(scene / "ref.png") as image:
        image.resize((80, 60)).save(scene / "small.png")
    assert icm("--mask-label", "-1", mask=path, ref=scene / "small.png", src=scene / "imgs" / "wall.jpg").exit_code == 0


def test_64_bit_integers_are_refused_with_advice(tmp_path: Path) -> None:
    image = layers(np.int64, target=1)
    tags = {256: 80, 257: 60, 258: 64, 259: 1, 262: 1, 273: 134, 277: 1, 278: 60, 279: image.nbytes, 339: 2}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    assert len(header) == tags[273]
    (tmp_path / "mask.tif").write_bytes(header + image.tobytes())
    with pytest.raises(ImageError, match="has integers of 64 bits; expected at most 32 bits; save it with 32-bit"):
        read(tmp_path / "mask.tif")


@pytest.mark.parametrize("white", [3, 15, 255, 300, 4095, 65535])
def test_pgm_labels_are_those_of_the_file(tmp_path: Path, white: int) -> None:
    path = tmp_path / "mask.pgm"
    image = layers(np.dtype("u1" if white < 256 else ">u2").type, target=1, other=2)
    path.write_bytes(b"P5\n# a comment\n80 60\n%d\n" % white + (image.byteswap() if white > 255 else image).tobytes())
    with pytest.raises(UsageError, match=r"several labels: 1 \(18.8% of the image\), 2 \("):
        read(path)
    assert (read(path, "2")[0].inside == OTHER).all()


@pytest.mark.parametrize("bits", [2, 4])
def test_grey_png_of_few_bits_has_the_labels_of_the_file(tmp_path: Path, bits: int) -> None:
    image = layers(target=1, other=2)
    per_byte = 8 // bits
    rows = sum(image[:, n::per_byte].astype(int) << (8 - bits * (n + 1)) for n in range(per_byte)).astype(np.uint8)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", 80, 60, bits, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    (tmp_path / "mask.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(UsageError, match=r"several labels: 1 \(18.8% of the image\), 2 \("):
        read(tmp_path / "mask.png")
    assert (read(tmp_path / "mask.png", "2")[0].inside == OTHER).all()


def test_soft_mask_of_8_bits_in_a_wider_type_is_soft(tmp_path: Path) -> None:
    soft = cv2.GaussianBlur(layers(target=255), (0, 0), 3)
    for kind, dtype in (("uint16", np.uint16), ("int", np.int32)):
        mask, notices = read(written(tmp_path / f"{kind}.tif", soft.astype(dtype)[..., None], kind))
        assert (mask.inside == (soft > 127)).all()
        assert "255 is used as white" in notices[0]


@pytest.mark.parametrize(("top", "white"), [(1022, 1023), (1023, 1023), (900, 1023), (4095, 4095), (16383, 16383)])
def test_soft_mask_of_few_bits_in_16_bits_is_soft(tmp_path: Path, top: int, white: int) -> None:
    soft = cv2.GaussianBlur(layers(np.uint16, target=top), (0, 0), 3)
    mask, (notice,) = read(saved(tmp_path, soft))
    assert (mask.inside == (soft > white / 2)).all()
    assert f"{white} is used as white" in notice


def test_soft_mask_that_is_too_dark_states_its_largest_value(tmp_path: Path) -> None:
    soft = cv2.GaussianBlur(layers(np.uint16, target=400), (0, 0), 3)
    with pytest.raises(UsageError, match=r"is empty: its largest value is 400, and 1023 is used as white; .*rescale"):
        read(saved(tmp_path, soft))


def test_photograph_is_no_mask(icm: Icm, scene: Path) -> None:
    """As if --ref and --mask were exchanged."""
    result = icm("--dry-run", ref=scene / "mask.png", mask=scene / "ref.png")
    assert result.exit_code == 2
    assert f"mask {scene}/ref.png is a photograph: it has many colours" in result.stderr
    assert "check the order of --ref and --mask" in result.stderr


def draw_lines(folder: Path, line_type: int, *colours: tuple[int, int, int]) -> Path:
    """Write a mask of thin lines over the whole image, so that no area has one colour."""
    mask = np.zeros((120, 160, 3), np.uint8)
    for number, start in enumerate(range(-120, 160, 3)):
        cv2.line(mask, (start, 0), (start + 100, 120), colours[number % len(colours)], 1, line_type)
    return saved(folder, mask)


@pytest.mark.parametrize("line_type", [cv2.LINE_8, cv2.LINE_AA], ids=["hard", "antialiased"])
@pytest.mark.parametrize("colour", [(255, 0, 0), (40, 180, 90), (0, 0, 90)])
def test_thin_lines_of_one_colour_are_a_mask(tmp_path: Path, line_type: int, colour: tuple[int, int, int]) -> None:
    path = draw_lines(tmp_path, line_type, colour)
    mask, notices = read(path)
    assert not notices
    assert np.array_equal(mask.inside, np.asarray(Image.open(path)).max(axis=-1) > max(colour) / 2)
    assert mask.inside.any()


def test_thin_lines_of_several_colours_are_labels(icm: Icm, tmp_path: Path) -> None:
    result = icm("--dry-run", mask=draw_lines(tmp_path, cv2.LINE_8, (255, 0, 0), (0, 0, 255)))
    assert result.exit_code == 2
    assert "has several labels: #" in result.stderr
    mask, _ = read(tmp_path / "mask.png", "#0000ff")
    assert np.array_equal(mask.inside, (np.asarray(Image.open(tmp_path / "mask.png")) == (0, 0, 255)).all(axis=-1))


@pytest.mark.parametrize("suffix", ["jpg", "webp"])
@pytest.mark.parametrize("quality", [60, 85])
def test_noise_of_lossy_files_is_not_a_label(tmp_path: Path, suffix: str, quality: int) -> None:
    size = (640, 480)
    target, other = (cv2.resize(each.astype(np.uint8), size, interpolation=0) > 0 for each in (TARGET, OTHER))
    colours = np.zeros((480, 640, 3), np.uint8)
    colours[target] = 255, 0, 0
    path = tmp_path / f"mask.{suffix}"
    Image.fromarray(colours).save(path, quality=quality)
    mask, notices = read(path)
    assert (mask.inside == target).mean() > 0.99
    assert not notices
    assert (read(path, "#ff0000")[0].inside == target).mean() > 0.98
    colours[other] = 0, 255, 0
    Image.fromarray(colours).save(path, quality=quality)
    with pytest.raises(UsageError, match=r"several labels: #f\w+ \(\S+ of the image\), #\w+ \([^,]*\); expected one"):
        read(path)


def test_fractional_labels_of_floats_are_selected(tmp_path: Path) -> None:
    image = np.where(TARGET, 0.3, np.where(OTHER, 0.7, 0.0)).astype(np.float32)
    path = written(tmp_path / "mask.tif", image[..., None], "float")
    assert (read(path, "0.3")[0].inside == TARGET).all()
    assert (read(path, "0.7")[0].inside == OTHER).all()


def test_similar_colours_of_lossless_files_are_labels(tmp_path: Path) -> None:
    image = np.zeros((60, 80, 3), np.uint8)
    image[TARGET], image[OTHER] = (200, 0, 0), (201, 0, 0)
    with pytest.raises(UsageError, match=r"several labels: #c80000 .*, #c90000 "):
        read(saved(tmp_path, image))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_many_labels_are_not_a_soft_mask(tmp_path: Path, dtype: type) -> None:
    """Instance segmentation numbers its objects, which may be more than 64."""
    ids = np.random.default_rng(0).permutation(250)[:100].reshape(10, 10) + 1
    image = np.kron(ids, np.ones((12, 16))).astype(dtype)
    image[::12] = image[:, ::16] = 0
    with pytest.raises(UsageError, match=r"several labels: .* and 88 more; expected one object"):
        read(saved(tmp_path, image))


def with_palette(path: Path, indices: np.ndarray, colours: list[tuple[int, int, int]], transparent: int | None) -> Path:
    image = Image.frombytes("P", indices.shape[::-1], indices.astype(np.uint8).tobytes())
    image.putpalette([value for colour in colours for value in colour])
    image.save(path, optimize=False, **({} if transparent is None else {"transparency": transparent}))
    return path


BLACK, WHITE, RED, GREEN = (0, 0, 0), (255, 255, 255), (200, 0, 0), (0, 150, 0)


@pytest.mark.parametrize("name", ["mask.gif", "mask.png", "mask.bmp", "mask.tif", "mask.tga"])
@pytest.mark.parametrize(
    ("colours", "background", "target", "transparent"),
    [
        ([BLACK, WHITE], 0, 1, 0),
        ([WHITE, BLACK], 1, 0, 1),
        ([WHITE, BLACK, RED], 1, 0, 2),  # the transparent colour is not used
        ([WHITE, BLACK, RED], 1, 0, None),  # nor is red, as in palettes that are filled up
        ([BLACK, RED], 0, 1, 0),
        ([RED, BLACK], 1, 0, 1),
        ([RED, BLACK], 1, 0, None),
        ([GREEN, RED], 0, 1, 0),
    ],
)
def test_palettes_in_any_order_and_with_transparency(
    tmp_path: Path,
    name: str,
    colours: list[tuple[int, int, int]],
    background: int,
    target: int,
    transparent: int | None,
) -> None:
    if transparent is not None and name not in ("mask.gif", "mask.png"):
        return  # only these formats have a transparent colour
    path = with_palette(tmp_path / name, np.where(TARGET, target, background), colours, transparent)
    assert (read(path)[0].inside == TARGET).all()


@pytest.mark.parametrize("name", ["mask.gif", "mask.png"])
def test_transparent_palettes_that_are_ambiguous_are_refused(tmp_path: Path, name: str) -> None:
    path = with_palette(tmp_path / name, TARGET, [BLACK, WHITE], 1)
    with pytest.raises(UsageError, match=r"transparent white and opaque black.*save the mask without transparency"):
        read(path)
    path = with_palette(tmp_path / name, layers(target=1, other=2), [BLACK, RED, GREEN], 0)
    with pytest.raises(UsageError, match=r"several labels: 1 \(18.8% of the image\), 2"):
        read(path)
    assert (read(path, "2")[0].inside == OTHER).all()
    assert (read(path, "#009600")[0].inside == OTHER).all()


def test_areas_of_dark_colours_are_reported_or_labels(tmp_path: Path) -> None:
    """Panoptic masks store ids as colours, which are nearly black for small ids."""
    image = np.zeros((60, 80, 3), np.uint8)
    image[TARGET] = 5, 0, 0
    assert (read(saved(tmp_path, image))[0].inside == TARGET).all()
    image[OTHER] = 200, 0, 0
    mask, notices = read(saved(tmp_path, image))
    assert (mask.inside == OTHER).all()
    assert "has areas of #050000 besides brighter ones; they are used as black" in notices[0]


def test_transparent_white_and_opaque_black_are_refused_in_all_kinds_of_masks(icm: Icm, scene: Path) -> None:
    with Image.open(scene / "mask.png") as image:
        grey = np.where(np.asarray(image.convert("L")) > 127, 255, 0).astype(np.uint8)
    Image.fromarray(np.dstack([grey, 255 - grey])).save(scene / "la.png")
    Image.fromarray(np.dstack([grey, grey, grey, 255 - grey])).save(scene / "rgba.png")
    Image.fromarray(grey).save(scene / "grey.png", transparency=255)
    for name in ("la.png", "rgba.png", "grey.png"):
        result = icm(mask=scene / name)
        assert result.exit_code == 2
        assert "has transparent white and opaque black" in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("visible", "hidden", "has_notice"),
    [(0, 0, False), (255, 0, False), (255, 255, False), (90, 0, False), (90, 255, True), (0, 90, True)],
)
def test_alpha_of_one_colour_is_the_mask(tmp_path: Path, visible: int, hidden: int, has_notice: bool) -> None:
    colour = np.where(TARGET, visible, hidden).astype(np.uint8)
    for image in (np.dstack([colour, layers(target=255)]), np.dstack([colour] * 3 + [layers(target=255)])):
        mask, notices = read(saved(tmp_path, image))
        assert (mask.inside == TARGET).all()
        assert bool(notices) == has_notice
