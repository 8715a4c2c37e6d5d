"""References and masks: which are accepted, and the messages about others."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from conftest import Icm, alphas, read
from PIL import Image, ImageOps

import icm_cli
from icm_cli.errors import UsageError
from icm_cli.matting.references import Reference, ReferenceReader
from icm_cli.options import ReferenceOptions


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rgb = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:40] = 255
    cv2.imwrite(str(tmp_path / "ref.png"), rgb)
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    cv2.imwrite(str(tmp_path / "cutout.png"), np.dstack([rgb, mask]))
    cv2.imwrite(str(tmp_path / "soft.png"), np.where(mask > 0, 140, 110).astype(np.uint8))
    cv2.imwrite(str(tmp_path / "half.png"), mask[::2, ::2])
    cv2.imwrite(str(tmp_path / "square.png"), mask[:, :40])
    cv2.imwrite(str(tmp_path / "empty.png"), np.zeros_like(mask))
    cv2.imwrite(str(tmp_path / "labels.png"), mask // 255)
    cv2.imwrite(str(tmp_path / "full.png"), np.full_like(mask, 255))
    (tmp_path / "torn.png").write_bytes((tmp_path / "ref.png").read_bytes()[:300])
    return tmp_path


def read_references(
    refs: Sequence[Path], masks: Sequence[Path], notices: list[str] | None = None, orientation: Any = "auto"
) -> list[Reference]:
    options = ReferenceOptions(ref=tuple(refs), mask=tuple(masks), mask_orientation=orientation)
    return ReferenceReader((notices if notices is not None else []).append).read_references(options)


def load(folder: Path, ref: str, mask: str | None, notices: list[str] | None = None) -> Reference:
    masks = [folder / mask] if mask else []
    return read_references([folder / ref], masks, notices)[0]


@pytest.mark.parametrize(("ref", "mask"), [("ref.png", "mask.png"), ("ref.png", "soft.png"), ("cutout.png", None)])
def test_guidance_follows_the_mask(folder: Path, ref: str, mask: str | None) -> None:
    guidance = load(folder, ref, mask).guidance
    assert guidance.dtype == bool
    assert guidance.sum() == 400
    assert guidance[10:30, 20:40].all()


def test_mask_of_another_size_is_resized_with_a_notice(folder: Path) -> None:
    notices: list[str] = []
    assert load(folder, "ref.png", "half.png", notices).guidance.sum() == pytest.approx(400, rel=0.1)
    assert notices == [f"mask {folder / 'half.png'} is 30x20 and its reference 60x40; the mask is resized"]


@pytest.mark.parametrize(
    ("ref", "mask", "message"),
    [
        ("ref.png", "square.png", "expected the same aspect ratio"),
        ("ref.png", "empty.png", "is empty: no pixel is above one half"),
        ("ref.png", "full.png", "is full"),
        ("ref.png", "torn.png", "cut short"),
        ("torn.png", "mask.png", "cut short"),
        ("none.png", "mask.png", "does not exist"),
        ("ref.png", None, "not an RGBA cut-out; give --mask .* or mark the object with --point, --box or --scribble"),
    ],
)
def test_invalid_references_are_refused(folder: Path, ref: str, mask: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(folder, ref, mask)


@pytest.mark.parametrize(("inverted", "is_reported"), [(True, True), (False, False)])
def test_mask_that_looks_inverted_gives_a_notice(folder: Path, inverted: bool, is_reported: bool) -> None:
    mask = cv2.imread(str(folder / "mask.png"), 0)
    cv2.imwrite(str(folder / "maybe.png"), 255 - mask if inverted else mask)
    notices: list[str] = []
    load(folder, "ref.png", "maybe.png", notices)
    assert [f"mask {folder / 'maybe.png'} is white in 83 % of the image" in each for each in notices] == [
        True
    ] * is_reported


def test_numbers_of_references_and_masks_must_agree(folder: Path) -> None:
    with pytest.raises(UsageError, match="2 references but 1 mask"):
        read_references([folder / "ref.png"] * 2, [folder / "mask.png"])
    with pytest.raises(UsageError, match="no reference"):
        read_references([], [])


TURNED = np.random.default_rng(1).integers(0, 256, (40, 60, 3), np.uint8)
THING = np.zeros((40, 60), np.uint8)
THING[4:20, 8:20] = 255  # in a corner of the stored image


def turned_reference(
    folder: Path, orientation: int, *, mask: str, square: bool = False, mask_orientation: int = 1, half: bool = False
) -> tuple[Path, Path]:
    """Write a reference with EXIF orientation, and its mask in stored or upright orientation."""
    rgb, thing = (TURNED[:, :40], THING[:, :40]) if square else (TURNED, THING)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(folder / "turned.png", exif=exif)
    drawn = Image.fromarray(thing)
    if mask == "upright":
        drawn.getexif()[0x0112] = orientation
        drawn = ImageOps.exif_transpose(drawn)
    own = Image.Exif()
    own[0x0112] = mask_orientation
    if half:
        drawn = drawn.resize((drawn.width // 2, drawn.height // 2), Image.Resampling.BOX)
    drawn.save(folder / "drawn.png", exif=own)
    return folder / "turned.png", folder / "drawn.png"


def seen(orientation: int, *, square: bool = False) -> np.ndarray:
    """Return the object in upright orientation."""
    image = Image.fromarray(THING[:, :40] if square else THING)
    image.getexif()[0x0112] = orientation
    return np.asarray(ImageOps.exif_transpose(image)) > 127


def guidance_of(ref: Path, mask: Path, notices: list[str], mask_orientation: str = "auto") -> np.ndarray:
    return read_references([ref], [mask], notices, mask_orientation)[0].guidance


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
@pytest.mark.parametrize("mask", ["stored", "upright"])
@pytest.mark.parametrize("half", [False, True])
def test_mask_in_stored_orientation_is_detected_by_its_size(
    tmp_path: Path, orientation: int, mask: str, half: bool
) -> None:
    notices: list[str] = []
    guidance = guidance_of(*turned_reference(tmp_path, orientation, mask=mask, half=half), notices)
    assert (guidance == seen(orientation)).all()
    assert any("is applied to the mask too" in each for each in notices) == (mask == "stored")


@pytest.mark.parametrize(("orientation", "square"), [(2, False), (3, False), (4, False), (6, True), (8, True)])
@pytest.mark.parametrize("mask", ["stored", "upright"])
def test_mask_orientation_option_decides_ambiguous_cases(
    tmp_path: Path, orientation: int, square: bool, mask: str
) -> None:
    files = turned_reference(tmp_path, orientation, mask=mask, square=square)
    expected, notices = seen(orientation, square=square), list[str]()
    assert (guidance_of(*files, notices) == expected).all() == (mask == "upright")
    (notice,) = notices
    assert "it is used as upright; give --mask-orientation stored" in notice
    assert (guidance_of(*files, notices, mask) == expected).all()
    assert len(notices) == 1


@pytest.mark.parametrize("mask_orientation", ["auto", "stored"])
def test_mask_with_equal_orientation_gives_no_notice(tmp_path: Path, mask_orientation: str) -> None:
    notices: list[str] = []
    files = turned_reference(tmp_path, 3, mask="stored", mask_orientation=3)
    assert (guidance_of(*files, notices, mask_orientation) == seen(3)).all()
    assert not notices


def test_unknown_and_unused_mask_orientations_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="is 'stord'; expected auto, upright or stored"):
        icm_cli.matte(folder / "ref.png", folder / "mask.png", src=folder, out=folder, mask_orientation="stord")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is no --mask"):
        read_references([folder / "cutout.png"], [], orientation="stored")


def test_command_accepts_mask_orientation(icm: Icm, scene: Path) -> None:
    with Image.open(scene / "ref.png") as image:
        exif = Image.Exif()
        exif[0x0112] = 3
        image.rotate(180).save(scene / "ref.png", exif=exif)
    assert icm().exit_code == 0
    upright = alphas(scene / "out")
    with Image.open(scene / "mask.png") as image:
        image.rotate(180).save(scene / "mask.png")
    assert icm(mask_orientation="stored", out=scene / "stored").exit_code == 0
    assert len(upright) == 3
    for name in upright:
        assert (read(scene / "stored" / name) == read(scene / "out" / name)).all()


def test_page_shows_the_oriented_reference(icm: Icm, scene: Path) -> None:
    """The mask is rotated with the reference, so that the tint covers the object."""
    with Image.open(scene / "mask.png") as image:
        image.rotate(180).save(scene / "mask.png")
    with Image.open(scene / "ref.png") as image:
        exif = Image.Exif()
        exif[0x0112] = 3
        image.rotate(180).save(scene / "ref.png", exif=exif)
    assert icm(mask_orientation="stored", report=scene / "r.html").exit_code == 0
    (reference,) = read_references([scene / "ref.png"], [scene / "mask.png"], orientation="stored")
    pages = re.findall("data:image/webp;base64,([^\"']+)", (scene / "r.html").read_text())
    images = [np.asarray(Image.open(io.BytesIO(base64.b64decode(each)))).astype(int) for each in pages]
    size = reference.guidance.shape
    tint = np.array([255, 64, 96])
    expected = np.where(reference.guidance[..., None], 0.6 * reference.rgb + 0.4 * tint, 0.45 * reference.rgb)
    assert any(each.shape[:2] == size and np.abs(each - expected).mean() < 6 for each in images)
