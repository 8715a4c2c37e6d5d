"""Data and display windows of EXR files: pixels are registered by their position, not by the stored size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import OpenImageIO as oiio
import pytest
from conftest import COMPOSITES, Icm, read, shrink
from hypothesis import given
from hypothesis import strategies as st
from test_formats import linear

from icm_cli.errors import UsageError
from icm_cli.images.pixels import ImageWindows
from icm_cli.images.reading import read_alpha, read_ground_truth
from icm_cli.matting.references import Reference, ReferenceReader
from icm_cli.options import ReferenceOptions

Box = tuple[int, int, int, int]
"""Data window: x, y, width, height, in the pixels of the display window."""


def crop_to(pixels: np.ndarray, box: Box) -> np.ndarray:
    """Crop an image to a box; pixels outside the image are 0."""
    x, y, width, height = box
    padded = np.pad(pixels, [(height, height), (width, width), (0, 0)][: pixels.ndim])
    return padded[y + height : y + 2 * height, x + width : x + 2 * width]


def write_cropped_exr(path: Path, pixels: np.ndarray, box: Box | None = None, origin: tuple[int, int] = (0, 0)) -> Path:
    """Write the part in a box of an image that fills its display window."""
    box = box or (0, 0, pixels.shape[1], pixels.shape[0])
    return write_exr(path, crop_to(pixels, box), box[:2], pixels.shape[1::-1], origin)


def write_exr(
    path: Path,
    pixels: np.ndarray,
    at: tuple[int, int],
    display: tuple[int, ...],
    origin: tuple[int, int] = (0, 0),
    turn: int = 1,
) -> Path:
    """Write a data window whose top left corner is at x, y of a display window of width, height."""
    stored = np.atleast_3d(pixels).astype(np.float32)
    spec = oiio.ImageSpec(stored.shape[1], stored.shape[0], stored.shape[2], "half")
    spec.channelnames = ("R", "G", "B") if stored.shape[2] == 3 else ("A",)
    spec.x, spec.y = at[0] + origin[0], at[1] + origin[1]
    spec.full_x, spec.full_y, spec.full_width, spec.full_height = *origin, *display
    spec.attribute("Orientation", turn)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = oiio.ImageOutput.create(str(path))
    assert file.open(str(path), spec), file.geterror()
    assert file.write_image(np.ascontiguousarray(stored)), file.geterror()
    file.close()
    return path


def load_reference(ref: Path, mask: Path) -> tuple[Reference, list[str]]:
    notices: list[str] = []
    options = ReferenceOptions(ref=(ref,), mask=(mask,))
    return ReferenceReader(notices.append).read_references(options)[0], notices


def bounding_box(mask: np.ndarray) -> Box:
    """Box around the pixels that are not black."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]


@pytest.mark.parametrize("origin", [(0, 0), (16, -8)])
def test_mask_is_placed_by_its_data_window(icm: Icm, scene: Path, origin: tuple[int, int]) -> None:
    mask = read(scene / "mask.png")
    roto = write_cropped_exr(scene / "roto.exr", (mask > 127).astype(np.float32), bounding_box(mask > 127), origin)
    found, notices = load_reference(scene / "ref.png", roto)
    assert (found.guidance == (mask > 127)).all()
    assert not notices
    assert icm().exit_code == icm(mask=roto, out=scene / "other").exit_code == 0
    assert (scene / "out" / "wall.png").read_bytes() == (scene / "other" / "wall.png").read_bytes()


@pytest.mark.parametrize("box", [(-20, -10, 260, 180), (12, 30, 100, 70), (150, 0, 90, 40)])
def test_mask_of_the_display_window_is_aligned_with_the_reference(scene: Path, box: Box) -> None:
    """The data window of the reference is larger than its display window, smaller, or overlaps it."""
    rgb, mask = linear(read(scene / "ref.png")[..., 2::-1]), np.zeros(read(scene / "mask.png").shape, np.uint8)
    mask[20:60, 40:170] = 255
    ref = write_cropped_exr(scene / "ref.exr", rgb, box)
    roto = write_cropped_exr(scene / "roto.exr", mask / 255.0)
    overscan = write_cropped_exr(scene / "overscan.exr", mask / 255.0, (-30, -30, 280, 220))
    for each in (roto, overscan):
        found, notices = load_reference(ref, each)
        assert found.rgb.shape[:2] == found.guidance.shape == (box[3], box[2])
        assert (found.guidance == (crop_to(mask, box) > 0)).all()
        assert not notices


def test_mask_keeps_pixels_outside_the_display_window(scene: Path) -> None:
    rgb = linear(read(scene / "ref.png")[..., 2::-1])
    box = (-20, -10, rgb.shape[1] + 40, rgb.shape[0] + 20)
    ref = write_cropped_exr(scene / "ref.exr", rgb, box)
    mask = np.zeros((box[3], box[2]), np.float32)
    mask[:40, :40] = 1
    roto = write_exr(scene / "roto.exr", mask, box[:2], rgb.shape[1::-1])
    assert (load_reference(ref, roto)[0].guidance == (mask > 0)).all()


def test_masks_of_another_size_are_scaled_by_the_display_window(scene: Path) -> None:
    rgb, mask = linear(read(scene / "ref.png")[..., 2::-1]), read(scene / "mask.png")
    height, width = mask.shape
    box = (-20, -10, width + 40, height + 20)
    ref = write_cropped_exr(scene / "ref.exr", rgb, box)
    twice = np.kron(mask > 127, np.ones((2, 2))).astype(np.float32)
    found, notices = load_reference(ref, write_cropped_exr(scene / "twice.exr", twice, bounding_box(twice > 0)))
    assert (found.guidance == (crop_to(mask, box) > 127)).mean() > 0.999
    assert f"is {2 * width}x{2 * height} and its reference {width}x{height}; the mask is resized" in notices[0]
    with pytest.raises(
        UsageError, match=f"is {width}x{height + 90} and its reference {width}x{height}; expected the same"
    ):
        load_reference(ref, write_cropped_exr(scene / "other.exr", np.pad(mask, [(0, 90), (0, 0)]) / 255.0))
    every = crop_to(mask, box)
    found, notices = load_reference(ref, write_cropped_exr(scene / "every.exr", every / 255.0))
    assert (found.guidance == (every > 127)).all()
    assert not notices


@given(st.data())
def test_pixels_are_moved_by_their_coordinates(data: st.DataObject) -> None:
    numbers = st.integers(-9, 9)
    sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))
    first, second = (ImageWindows(data.draw(sizes), data.draw(st.tuples(numbers, numbers)), (5, 6)) for _ in range(2))
    pixels = np.arange(1, 1 + first.size[0] * first.size[1]).reshape(first.size)
    found = first.move_pixels(pixels, second)
    for row, column in np.ndindex(*second.size):
        there = row + second.offset[0] - first.offset[0], column + second.offset[1] - first.offset[1]
        inside = 0 <= there[0] < first.size[0] and 0 <= there[1] < first.size[1]
        assert found[row, column] == (pixels[there] if inside else 0)


def test_alphas_and_ground_truth_cover_their_display_windows(tmp_path: Path) -> None:
    alpha = np.linspace(0, 1, 40 * 60, dtype=np.float32).reshape(40, 60)
    for box in ((10, 5, 30, 20), (-7, -5, 80, 60)):
        path = write_cropped_exr(tmp_path / "a.exr", alpha, box)
        expected = crop_to(crop_to(alpha, box), (-box[0], -box[1], 60, 40))
        for found in (read_alpha(path), read_ground_truth(path).alpha):
            np.testing.assert_allclose(found / 255.0, expected, atol=0.6 / 255)


@pytest.mark.parametrize("box", [(-20, -10, 200, 130), (20, 10, 120, 80)])
def test_files_without_windows_cover_the_display_window(icm: Icm, scene: Path, small_model: Path, box: Box) -> None:
    small_model.write_text(small_model.read_text().replace("160", "224"))  # the object is not found at 160 px
    rgb = linear(read(next((scene / "imgs").glob("wall.*")))[..., 2::-1])
    height, width = rgb.shape[:2]
    for name in ("a", "b"):
        write_cropped_exr(scene / "exr" / f"{name}.exr", rgb, box)
    assert icm(src=scene / "exr", out=scene / "windows", format="exr", depth="float").exit_code == 0
    result = icm("--quiet", src=scene / "exr", contact_sheet=scene / "sheet.png", trimap="also")
    assert result.exit_code == 0
    alpha = read(scene / "out" / "a.png")
    assert alpha.shape == read(scene / "out" / "a.trimap.png").shape == (height, width)
    assert np.abs(alpha.astype(int) - read_alpha(scene / "windows" / "a.exr")).max() <= 1
    assert alpha.max() > 200
    before = (scene / "out" / "a.png").stat().st_mtime_ns
    messages = " ".join(icm(src=scene / "exr", out=scene / "messages", foreground="straight").stderr.split())
    assert messages.count("every PNG covers the display window") == 1
    description = f"a data window of {box[2]}x{box[3]} at ({box[0]},{box[1]}) in a display window of {width}x{height}"
    assert description in messages
    assert read(scene / "messages" / "a.png").shape == (height, width, 4)
    assert icm(src=scene / "exr", trimap="also").exit_code == 0
    assert (scene / "out" / "a.png").stat().st_mtime_ns == before
    assert icm("--invert", src=scene / "exr", out=scene / "inverted").exit_code == 0
    assert np.abs(read(scene / "inverted" / "a.png").astype(int) + alpha - 255).max() <= 1


@pytest.mark.parametrize("form", ["png", "exr"])
def test_ground_truth_is_aligned_by_its_windows(icm: Icm, scene: Path, form: str) -> None:
    (scene / "gt").mkdir()
    shrink(COMPOSITES / "alphas" / "brickwall.png", scene / "gt" / "a.png", 160)
    truth = read(scene / "gt" / "a.png")
    rgb = linear(read(next((scene / "imgs").glob("wall.*")))[..., 2::-1])
    write_cropped_exr(scene / "exr" / "a.exr", rgb, (-20, -10, rgb.shape[1] + 40, rgb.shape[0] + 20))
    write_cropped_exr(scene / "roto" / "a.exr", truth / 255.0, bounding_box(truth))
    errors = []
    for gt in ("gt", "roto"):
        report = scene / f"{gt}.json"
        assert icm("--overwrite", src=scene / "exr", gt=scene / gt, format=form, report=report).exit_code == 0
        (row,) = json.loads(report.read_text())["images"]
        errors.append(row["scores"]["whole"]["mse"])
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


@pytest.mark.parametrize("turn", [3, 6])
def test_windows_of_a_rotated_source_are_ignored(icm: Icm, scene: Path, turn: int) -> None:
    rgb = linear(read(next((scene / "imgs").glob("wall.*")))[:96, :96, 2::-1])
    source = write_exr(scene / "a.exr", rgb, (9, 5), (200, 200), turn=turn)
    result = icm(src=source, format="exr")
    assert result.exit_code == 0
    file = oiio.ImageInput.open(str(scene / "out" / "a.exr"))
    spec = file.spec()
    file.close()
    assert (spec.x, spec.y, spec.full_width, spec.full_height) == (0, 0, 96, 96)


def test_trimap_of_an_exr_covers_the_display_window(icm: Icm, scene: Path) -> None:
    rgb = linear(read(next((scene / "imgs").glob("wall.*")))[..., 2::-1])
    write_cropped_exr(scene / "a.exr", rgb, (20, 10, 100, 70))
    result = icm(src=scene / "a.exr", format="exr", trimap="also")
    assert "every trimap covers the display window" in " ".join(result.stderr.split())
    assert read(scene / "out" / "a.trimap.png").shape == rgb.shape[:2]
    assert read_alpha(scene / "out" / "a.exr").shape == rgb.shape[:2]
