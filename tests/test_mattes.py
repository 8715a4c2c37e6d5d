"""``--garbage`` and ``--keep``: areas of an image whose alpha is 0 or 1, and what the model sees of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import SMALL_MODEL, Icm, alphas, read
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from test_formats import linear
from test_windows import write_cropped_exr

from icm_cli.geometry import Float
from icm_cli.images.pixels import ImageWindows
from icm_cli.images.writing import OutputFormat, write_alpha
from icm_cli.matting.mattes import Mattes, read_matte

PATCH = (slice(0, 20), slice(0, 30))


def write_matte(path: Path, size: Sequence[int], area: tuple[slice, slice] = PATCH, white: int = 255) -> Path:
    """Write a matte of this size that is white in an area."""
    matte = np.zeros(size[:2], np.uint8)
    matte[area] = white
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), matte)
    return path


def write_frames(scene: Path, count: int = 3) -> Path:
    """Write frames of a shot, and return their folder."""
    folder = scene / "frames"
    folder.mkdir()
    wall = cv2.imread(str(scene / "imgs" / "wall.jpg"))
    for number in range(count):
        cv2.imwrite(str(folder / f"sh.{1001 + number}.png"), np.roll(wall, 2 * number, axis=1))
    return folder


def done_names(report: Path) -> list[str]:
    """Names of the images that a run matted."""
    return sorted(image["name"] for image in json.loads(report.read_text())["images"] if image["status"] == "done")


class TestBinding:
    MATTE = arrays(np.float32, (3, 4), elements=st.floats(0, 1, width=32))

    @given(alpha=MATTE, garbage=MATTE, keep=MATTE)
    def test_alpha_is_bound_and_keep_wins(self, alpha: Float, garbage: Float, keep: Float) -> None:
        bound = Mattes(garbage, keep).apply_to_alpha(alpha)
        assert np.array_equal(bound, np.maximum(alpha * (1 - garbage), keep))
        assert np.array_equal(Mattes(garbage=garbage).apply_to_alpha(alpha), alpha * (1 - garbage))
        assert np.array_equal(Mattes(keep=keep).apply_to_alpha(alpha), np.maximum(alpha, keep))
        assert bound.dtype == np.float32
        assert (keep <= bound).all()

    def test_hidden_pixels_have_the_mean_colour_of_the_others(self) -> None:
        rgb = np.zeros((2, 3, 3), np.uint8)
        rgb[0], rgb[1] = (200, 100, 0), (0, 50, 250)
        garbage = np.array([[1, 1, 0.5], [0, 0, 0]], np.float32)
        hidden = Mattes(garbage=garbage).hide_garbage(rgb)
        mean = (0.5 * rgb[0, 0] + 3 * rgb[1, 0].astype(float)) / 3.5
        assert np.abs(hidden[0, 0] - mean).max() <= 0.5
        assert np.abs(hidden[0, 2] - (rgb[0, 0] + mean) / 2).max() <= 1
        assert np.array_equal(hidden[1], rgb[1])
        assert (Mattes(garbage=np.ones((2, 3), np.float32)).hide_garbage(rgb) == 127).all()


class TestReading:
    def test_alpha_channel_if_it_varies_else_the_brightest_channel(self, tmp_path: Path) -> None:
        pixels = np.zeros((4, 6, 4), np.uint8)
        pixels[:, :3, 2], pixels[..., 3] = 255, 255  # red, opaque
        cv2.imwrite(str(tmp_path / "red.png"), pixels)
        assert read_matte(tmp_path / "red.png", None)[0].tolist() == [1, 1, 1, 0, 0, 0]
        pixels[:, 2:, 3] = 51
        cv2.imwrite(str(tmp_path / "alpha.png"), pixels)
        assert np.allclose(read_matte(tmp_path / "alpha.png", None)[0], [1, 1, 0.2, 0.2, 0.2, 0.2])

    @pytest.mark.parametrize(("suffix", "depth"), [("png", "8"), ("png", "16"), ("tiff", "float"), ("exr", "half")])
    def test_every_depth(self, tmp_path: Path, suffix: str, depth: str) -> None:
        ramp = np.tile(np.linspace(0, 1, 9, dtype=np.float32), (5, 1))
        output = OutputFormat(suffix, depth)  # type: ignore[arg-type]
        write_alpha(tmp_path / f"m.{suffix}", ramp, {}, output)
        assert np.allclose(read_matte(tmp_path / f"m.{suffix}", None), ramp, atol=1 / 500 if depth == "8" else 1e-3)

    def test_display_window_of_an_exr(self, tmp_path: Path) -> None:
        whole = np.zeros((40, 60), np.float32)
        whole[10:30, 5:55] = 1
        windows = ImageWindows((20, 30), (10, 20), (40, 60))
        cv2.imwrite(str(tmp_path / "m.png"), (255 * whole).astype(np.uint8))
        assert np.array_equal(read_matte(tmp_path / "m.png", windows), whole[10:30, 20:50])


class TestGarbage:
    def test_a_look_alike_in_the_garbage_area_does_not_win(self, icm: Icm, scene: Path) -> None:
        """The same object twice, side by side: the garbage matte hides the right one."""
        once = cv2.imread(str(scene / "ref.png"))
        both = np.concatenate([once, once[:, ::-1]], axis=1)
        cv2.imwrite(str(scene / "both.png"), both)
        middle = once.shape[1]
        right = write_matte(scene / "right.png", both.shape, (slice(None), slice(middle, None)))
        model = scene / "larger.yaml"
        model.write_text(SMALL_MODEL.replace("160", "320"))
        for name, garbage in (("plain", None), ("out", right)):
            assert icm(src=scene / "both.png", out=scene / name, garbage=garbage, model=model).exit_code == 0
        plain, alpha = (read(scene / folder / "both.png") for folder in ("plain", "out"))
        assert plain[:, middle:].mean() > 20
        assert (alpha[:, middle:] == 0).all()
        assert (alpha[:, :middle] > 127).sum() > 0.9 * (plain[:, :middle] > 127).sum()

    def test_soft_edges_and_keep(self, icm: Icm, scene: Path) -> None:
        size = read(scene / "imgs" / "wall.jpg").shape
        keep, garbage = write_matte(scene / "keep.png", size, white=200), write_matte(scene / "g.png", size, white=100)
        options = {"src": scene / "imgs" / "wall.jpg", "format": "tiff", "depth": "float"}
        assert icm(out=scene / "k", keep=keep, **options).exit_code == 0
        assert icm(out=scene / "plain", **options).exit_code == 0
        kept, plain = (read(scene / folder / "wall.tif") for folder in ("k", "plain"))
        assert np.allclose(kept[PATCH], np.maximum(plain[PATCH], 200 / 255), atol=1e-6)
        kept[PATCH] = plain[PATCH] = 0
        assert np.array_equal(kept, plain)
        result = icm(out=scene / "both", keep=write_matte(scene / "keep.png", size), garbage=garbage, **options)
        assert (read(scene / "both" / "wall.tif")[PATCH] == 1).all()
        assert "overlap" not in result.stderr  # soft values below one half
        result = icm(out=scene / "all", keep=keep, garbage=write_matte(scene / "g.png", size), **options)
        assert "wall.jpg: the garbage matte and the keep matte overlap in" in result.stderr
        assert (read(scene / "all" / "wall.tif")[PATCH] == 1).all()

    def test_invert_trimap_and_foreground_follow_the_mattes(self, icm: Icm, scene: Path) -> None:
        size = read(scene / "imgs" / "wall.jpg").shape
        options = {"src": scene / "imgs" / "wall.jpg", "keep": write_matte(scene / "keep.png", size)}
        assert icm("--invert", out=scene / "inverted", **options).exit_code == 0
        assert (read(scene / "inverted" / "wall.png")[PATCH] == 0).all()
        assert icm(out=scene / "trimap", trimap="instead", trimap_band=2, **options).exit_code == 0
        assert (read(scene / "trimap" / "wall.png")[:10, :20] == 255).all()
        assert icm(out=scene / "rgba", foreground="straight", **options).exit_code == 0
        assert (read(scene / "rgba" / "wall.png")[PATCH][..., 3] == 255).all()

    def test_found_is_what_the_final_alpha_shows(self, icm: Icm, scene: Path) -> None:
        """The model finds nothing, because the whole image is negative; the keep matte shows an object."""
        size, report = read(scene / "imgs" / "wall.jpg").shape, scene / "r.json"
        options = {"src": scene / "imgs" / "wall.jpg", "not_ref": scene / "imgs" / "wall.jpg", "report": report}
        for keep, not_found in ((None, True), (write_matte(scene / "keep.png", size), False)):
            assert icm(keep=keep, **options).exit_code == 0
            (image,) = json.loads(report.read_text())["images"]
            assert image["not_found"] is not_found
            assert read(scene / "out" / "wall.png").any() != not_found

    def test_exr_by_display_window(self, icm: Icm, scene: Path) -> None:
        pixels = linear(cv2.imread(str(scene / "imgs" / "wall.jpg"))[..., ::-1])
        height, width = pixels.shape[:2]
        source = write_cropped_exr(scene / "exr" / "a.exr", pixels, (20, 10, width - 40, height - 30))
        area = slice(12, 24), slice(25, 40)
        keep = write_matte(scene / "keep.png", (height, width), area)
        assert icm(src=source.parent, keep=keep).exit_code == 0
        assert (read(scene / "out" / "a.png")[area] == 255).all()


class TestFiles:
    def test_only_the_frame_of_a_changed_matte_is_recomputed(self, icm: Icm, scene: Path) -> None:
        frames, report = write_frames(scene), scene / "r.json"
        size = read(frames / "sh.1001.png").shape
        for number in (1001, 1002, 1003):
            write_matte(scene / "k" / f"k.{number:05d}.png", size)
        options = {"src": frames, "report": report}
        assert icm(**options).exit_code == 0
        plain = alphas(scene / "out")
        pattern = scene / "k" / "k.#####.png"
        assert icm(keep=pattern, **options).exit_code == 0
        assert len(done_names(report)) == 3
        write_matte(scene / "k" / "k.01002.png", size, white=128)
        assert icm(keep=pattern, **options).exit_code == 0
        assert done_names(report) == ["sh.1002.png"]
        assert icm(keep=pattern, **options).exit_code == 0
        assert done_names(report) == []
        assert icm(**options).exit_code == 0
        assert alphas(scene / "out") == plain

    def test_a_missing_frame_fails_its_image(self, icm: Icm, scene: Path) -> None:
        frames = write_frames(scene)
        for number in (1001, 1003, 1005):
            write_matte(scene / "g" / f"g.{number}.png", read(frames / "sh.1001.png").shape)
        planned = icm("--dry-run", src=frames, garbage=scene / "g" / "g.####.png")
        assert planned.exit_code == 1
        assert f"would fail: {frames / 'sh.1002.png'}: --garbage" in planned.stderr
        assert "3 images: 2 new, 0 to be recomputed, 0 kept, 1 that would fail" in planned.stderr
        result = icm(src=frames, garbage=scene / "g" / "g.####.png")
        assert result.exit_code == 1
        assert f"--garbage {scene / 'g' / 'g.####.png'} has no frame 1002, which sh.1002.png needs" in result.stderr
        assert sorted(alphas(scene / "out")) == ["sh.1001.png", "sh.1003.png"]

    def test_frames_of_no_image(self, icm: Icm, scene: Path) -> None:
        frames = write_frames(scene)
        for folder in (scene / "g", frames):  # a matte among the images is not one of them
            write_matte(folder / "g.7.png", (10, 10))
            result = icm(src=frames, garbage=folder / "g.#.png")
            assert result.exit_code == 2
            assert "none with the frame number of an image" in result.stderr

    def test_frames_of_another_chunk(self, icm: Icm, scene: Path) -> None:
        frames = write_frames(scene)
        write_matte(scene / "g" / "g.1001.png", read(frames / "sh.1001.png").shape)
        for number in (1001, 1002):
            result = icm("--frames", str(number), src=frames, garbage=scene / "g" / "g.####.png")
            assert result.exit_code == number - 1001, result.output
        assert "has no frame 1002, which sh.1002.png needs" in result.stderr

    def test_another_size(self, icm: Icm, scene: Path) -> None:
        height, width = read(scene / "imgs" / "wall.jpg").shape[:2]
        double = write_matte(scene / "k.png", (2 * height, 2 * width), (slice(0, 40), slice(0, 60)))
        assert icm(src=scene / "imgs" / "wall.jpg", keep=double).exit_code == 0
        assert (read(scene / "out" / "wall.png")[PATCH] == 255).all()
        options = {"src": scene / "imgs" / "wall.jpg", "keep": write_matte(scene / "k.png", (50, 200))}
        for flags, counts in ((["--dry-run"], ", 1 that would fail"), ([], "")):
            result = icm(*flags, out=scene / "o", **options)
            assert result.exit_code == 1
            assert f"matte {scene / 'k.png'} is 200x50 and its image {width}x{height}" in result.stderr
            assert counts in result.stderr

    def test_size_of_the_data_window_of_an_exr(self, icm: Icm, scene: Path) -> None:
        pixels = linear(cv2.imread(str(scene / "imgs" / "wall.jpg"))[..., ::-1])
        height, width = pixels.shape[:2]
        source = write_cropped_exr(scene / "exr" / "a.exr", pixels, (20, 10, width - 40, height - 30))
        for size, code in (((height - 30, width - 40), 0), ((height - 30, width), 1)):
            keep = write_matte(scene / "keep.png", size)
            for flags in (["--dry-run"], []):
                assert icm(*flags, src=source.parent, keep=keep).exit_code == code, size

    @pytest.mark.parametrize("name", ["missing.png", "imgs", "broken.png", "imgs/wall.jpg"])
    def test_unusable_file(self, icm: Icm, scene: Path, name: str) -> None:
        (scene / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        result = icm(keep=scene / name)
        assert result.exit_code == 2
        assert str(scene / name) in result.stderr
        assert not (scene / "out").exists()

    def test_mattes_among_the_sources_are_skipped_and_never_overwritten(self, icm: Icm, scene: Path) -> None:
        matte = write_matte(scene / "imgs" / "garbage.png", read(scene / "imgs" / "wall.jpg").shape)
        result = icm(src=scene / "imgs", include=["wall.jpg", "garbage.png"], garbage=matte)
        assert result.exit_code == 0
        assert "skipped: a garbage or keep matte" in result.stderr
        assert list(alphas(scene / "out")) == ["wall.png"]
        matte = write_matte(scene / "out" / "wall.png", read(scene / "imgs" / "wall.jpg").shape)
        result = icm("--overwrite", src=scene / "imgs" / "wall.jpg", keep=matte)
        assert result.exit_code == 2
        assert "would be written over a garbage or keep matte" in result.stderr


class TestShot:
    def test_mattes_bind_after_propagation_and_reach_later_frames(self, icm: Icm, scene: Path) -> None:
        frames, report = write_frames(scene, 4), scene / "r.json"
        size = read(frames / "sh.1001.png").shape
        for number in range(1001, 1005):
            write_matte(scene / "g" / f"g.{number}.png", size, (slice(None), slice(0, 40 + 10 * (number % 2))))
        options = {"src": frames, "garbage": scene / "g" / "g.####.png", "report": report}
        assert icm("--shot", **options).exit_code == 0
        for number in range(1001, 1005):
            alpha = read(scene / "out" / f"sh.{number}.png")
            assert (alpha[:, : 40 + 10 * (number % 2)] == 0).all()
            assert alpha.any()
        write_matte(scene / "g" / "g.1003.png", size, (slice(None), slice(0, 20)))
        assert icm("--shot", **options).exit_code == 0
        assert done_names(report) == ["sh.1003.png", "sh.1004.png"]
        kept = alphas(scene / "out")
        assert icm("--shot", **{**options, "out": scene / "again"}).exit_code == 0
        assert {name: data for name, data in kept.items()} == alphas(scene / "again")

    def test_a_matte_of_one_frame_changes_no_other(self, icm: Icm, scene: Path) -> None:
        frames = write_frames(scene)
        height, width = read(frames / "sh.1001.png").shape[:2]
        area = (slice(None), slice(0, width // 2))
        for number in range(1001, 1004):
            write_matte(scene / "g" / f"g.{number}.png", (height, width), area, white=255 * (number == 1002))
        assert icm(src=frames, out=scene / "single").exit_code == 0
        assert icm("--shot", src=frames, garbage=scene / "g" / "g.####.png").exit_code == 0
        inside = (slice(None), slice(0, width // 2 - 16))  # after the motion, with soft edges
        alone = read(scene / "single" / "sh.1003.png")[inside].astype(float)
        assert alone.mean() > 30
        assert (read(scene / "out" / "sh.1002.png")[area] == 0).all()
        assert np.abs(read(scene / "out" / "sh.1003.png")[inside] - alone).mean() < 3
