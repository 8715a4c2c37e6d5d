"""Outputs: formats, bit depths, foregrounds, trimaps and inverted alphas, as read by other
programs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import OpenImageIO as oiio
import pytest
from conftest import Icm, output_files, read
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin
from test_formats import linear, written

from icm_cli.errors import UsageError
from icm_cli.geometry import Float, trimap_from_alpha
from icm_cli.images.decoding import decode_image
from icm_cli.images.pixels import DecodedImage
from icm_cli.images.writing import (
    BIT_DEPTHS,
    OutputFormat,
    has_changed_pixels,
    read_provenance,
    write_alpha,
    write_foreground,
)
from icm_cli.model.training_free.closed_form import estimate_foreground

ALPHA = np.linspace(0, 1, 48 * 64, dtype=np.float32).reshape(48, 64)
PROVENANCE = {"icm-digest": "d", "icm-source": "s", "icm-result": "{}"}


def by_openimageio(path: Path) -> tuple[np.ndarray, oiio.ImageSpec]:
    file = oiio.ImageInput.open(str(path))
    spec = oiio.ImageSpec(file.spec())
    pixels = file.read_image(0, 0, 0, spec.nchannels, "float")
    file.close()
    return pixels, spec


@pytest.mark.parametrize(
    ("name", "depth", "step"),
    [
        *(("png", "8", 255), ("png", "16", 65535), ("tiff", "8", 255), ("tiff", "16", 65535), ("tiff", "float", None)),
        *(("exr", "half", 2048), ("exr", "float", None)),
    ],
)
def test_other_programs_read_every_output_format(tmp_path: Path, name: str, depth: str, step: int | None) -> None:
    output = OutputFormat(
        format=name, depth=depth, channel="A", foreground="none", invert=False, trimap="none", band_px=10
    )
    path = tmp_path / f"a{output.suffix}"
    write_alpha(path, ALPHA, PROVENANCE, output, None)
    tolerance = 0.51 / step if step else 1e-6
    if name == "exr":
        pixels, spec = by_openimageio(path)
        assert spec.channelnames == ("A",)
        assert str(spec.format) == depth
        found = pixels[..., 0]
    else:
        stored = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert stored.dtype == {"8": np.uint8, "16": np.uint16, "float": np.float32}[depth]
        found = stored / (np.iinfo(stored.dtype).max if depth != "float" else 1.0)
        with Image.open(path) as image:
            assert image.size == (64, 48)
    np.testing.assert_allclose(found, ALPHA, atol=tolerance)
    assert {key: value for key, value in (read_provenance(path) or {}).items() if key in PROVENANCE} == PROVENANCE


WRITTEN = [
    OutputFormat(form, depth, foreground=foreground)
    for form, depths in BIT_DEPTHS.items()
    for depth in depths
    for foreground in ("none", "straight", "premultiplied")
    if (form, foreground) != ("png", "premultiplied")
]


@pytest.mark.parametrize("output", WRITTEN, ids=lambda output: f"{output.format}-{output.depth}-{output.foreground}")
def test_changed_pixels_are_recognised_in_every_output_format(tmp_path: Path, output: OutputFormat) -> None:
    path, other = tmp_path / f"a{output.suffix}", tmp_path / f"b{output.suffix}"
    rng = np.random.default_rng(0)
    source = DecodedImage(rng.random((48, 64, 3), np.float32), None, 1.0, "sRGB")
    alpha = rng.random((48, 64), np.float32)
    changed = alpha.copy()
    changed[20, 30] = 1 - changed[20, 30]
    for file, values in ((path, alpha), (other, changed)):
        if output.foreground == "none":
            write_alpha(file, values, PROVENANCE, output, source)
        else:
            write_foreground(file, source.pixels, values, PROVENANCE, output, source)
    provenance = read_provenance(path)
    assert provenance is not None
    assert not has_changed_pixels(path, provenance)
    for file in (path, other):  # another program saves the file
        file.write_bytes(re.sub(rb"(?s).{4}tEXticm-file.{69}", b"", file.read_bytes()))
    assert not has_changed_pixels(path, provenance)
    assert has_changed_pixels(other, provenance)
    assert not has_changed_pixels(other, {key: value for key, value in provenance.items() if key != "icm-pixels"})


def test_png_that_another_program_saved_unchanged_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    write_alpha(path, ALPHA, PROVENANCE)
    provenance = read_provenance(path) or {}
    texts = PngImagePlugin.PngInfo()
    for key, value in provenance.items():
        texts.add_text(key, value)
    with Image.open(path) as image:
        pixels = np.array(image)
    Image.fromarray(pixels).save(path, pnginfo=texts, optimize=True)
    assert not has_changed_pixels(path, read_provenance(path) or {})
    pixels[20, 30] ^= 1
    Image.fromarray(pixels).save(path, pnginfo=texts)
    assert has_changed_pixels(path, read_provenance(path) or {})


@pytest.mark.parametrize("name", ["png", "tiff", "exr"])
@given(cut=st.integers(1, 400))
@settings(max_examples=15)
def test_truncated_file_has_no_provenance(tmp_path_factory: pytest.TempPathFactory, name: str, cut: int) -> None:
    output = OutputFormat(format=name)  # type: ignore[arg-type]
    path = tmp_path_factory.mktemp("torn") / f"a{output.suffix}"
    write_alpha(path, np.random.default_rng(0).random((48, 64), np.float32), PROVENANCE, output, None)
    path.write_bytes(path.read_bytes()[:-cut])
    assert read_provenance(path) is None


@pytest.mark.parametrize("form", ["tiff", "exr"])
def test_run_resumes_in_every_output_format(icm: Icm, scene: Path, form: str) -> None:
    assert icm(format=form).exit_code == 0
    before = {path: path.stat().st_mtime_ns for path in output_files(scene / "out")}
    assert len(before) == 3
    assert icm(format=form).exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in output_files(scene / "out")} == before


def test_exr_output_keeps_windows_and_timecode(icm: Icm, scene: Path) -> None:
    source = scene / "exr"
    source.mkdir()
    rgb = read(next((scene / "imgs").glob("wall.*")))[..., 2::-1]
    spec = oiio.ImageSpec(rgb.shape[1], rgb.shape[0], 3, "half")
    spec.x, spec.y, spec.full_x, spec.full_y, spec.full_width, spec.full_height = 8, 4, 0, 0, 400, 300
    spec.attribute("PixelAspectRatio", 2.0)
    spec.attribute("smpte:TimeCode", oiio.TypeTimeCode, (0x01020304, 0))
    file = oiio.ImageOutput.create("a.exr")
    assert file.open(str(source / "a.exr"), spec)
    assert file.write_image(linear(rgb))
    file.close()
    assert icm(src=source, format="exr", channel="matte").exit_code == 0
    pixels, found = by_openimageio(scene / "out" / "a.exr")
    assert found.channelnames == ("matte",)
    assert (found.x, found.y, found.full_width, found.full_height) == (8, 4, 400, 300)
    assert found.getattribute("PixelAspectRatio") == 2.0
    assert tuple(found.getattribute("smpte:TimeCode", oiio.TypeTimeCode)) == (0x01020304, 0)
    assert 0.05 < pixels.mean() < 0.95


@pytest.mark.parametrize(("name", "depth"), [("a.tif", "uint8"), ("a.tif", "uint16"), ("a.dpx", "uint16")])
def test_exr_output_keeps_the_pixel_aspect_ratio_but_no_offset(icm: Icm, scene: Path, name: str, depth: str) -> None:
    """Only an EXR has windows. The offset of another format, such as that of a scanned page, is none."""
    rgb = read(next((scene / "imgs").glob("wall.*")))[..., 2::-1].astype(depth)
    spec = oiio.ImageSpec(rgb.shape[1], rgb.shape[0], 3, depth)
    spec.x, spec.y, spec.full_width, spec.full_height = 8, 4, 400, 300
    for attribute, value in {"PixelAspectRatio": 2.0, "XResolution": 72.0, "YResolution": 144.0}.items():
        spec.attribute(attribute, value)
    file = oiio.ImageOutput.create(name)
    assert file.open(str(scene / name), spec)
    assert file.write_image(rgb)
    file.close()
    assert icm(src=scene / name, format="exr").exit_code == 0
    _, found = by_openimageio(scene / "out" / "a.exr")
    assert (found.x, found.y, found.full_x, found.full_y) == (0, 0, 0, 0)
    assert (found.full_width, found.full_height) == (found.width, found.height)
    assert found.getattribute("PixelAspectRatio") == 2.0


def blended(size: int = 160) -> tuple[Float, Float, Float]:
    """Return a foreground, an alpha with a wide edge, and their composite on another colour."""
    rng = np.random.default_rng(0)
    foreground = np.empty((size, size, 3), np.float32)
    foreground[:] = (0.8, 0.3, 0.2)
    foreground += cv2.GaussianBlur(rng.normal(0, 0.3, foreground.shape).astype(np.float32), (0, 0), 4)
    background = np.full_like(foreground, 0.0)
    background[:] = (0.1, 0.5, 0.9)
    alpha = np.zeros((size, size), np.float32)
    cv2.circle(alpha, (size // 2, size // 2), size // 4, 1.0, -1)
    alpha = cv2.GaussianBlur(alpha, (0, 0), 4)
    return foreground, alpha, foreground * alpha[..., None] + background * (1 - alpha[..., None])


@pytest.mark.parametrize("gain", [1.0, 8.0])
def test_foreground_has_no_halo(gain: float) -> None:
    """Where 0 < alpha < 1, the colour error is at most a third of that of the source. HDR values
    are kept."""
    foreground, alpha, composite = blended()
    found = estimate_foreground(DecodedImage(composite * np.float32(gain), None, 1.0, "lin_rec709_scene"), alpha)
    edge = (alpha > 0.02) & (alpha < 0.98)
    error, before = (np.abs(each - gain * foreground)[edge].mean() for each in (found, gain * composite))
    assert error <= before / 3
    assert found.max() > 0.9 * gain * foreground[alpha > 0.98].max()


@pytest.mark.parametrize(("form", "kind", "premultiplied"), [("png", "straight", False), ("exr", "auto", True)])
def test_foregrounds_are_written(icm: Icm, scene: Path, form: str, kind: str, premultiplied: bool) -> None:
    assert icm(foreground=kind, format=form).exit_code == 0
    assert icm(out=scene / "plain").exit_code == 0
    made = next((scene / "out").glob("wall.*"))
    alpha = read(scene / "plain" / "wall.png") / 255.0
    source = next((scene / "imgs").glob("wall.*"))
    if form == "png":
        pixels = read(made)[..., [2, 1, 0, 3]] / 255.0
    else:
        pixels, spec = by_openimageio(made)
        assert spec.channelnames == ("R", "G", "B", "A")
    np.testing.assert_allclose(pixels[..., 3], alpha, atol=1 / 255)
    inside = alpha > 0.99
    coded = decode_image(source).pixels[inside]
    np.testing.assert_allclose(pixels[inside][:, :3], coded / 255.0 if form == "png" else linear(coded), atol=0.06)
    outside = alpha < 1 / 255
    assert (pixels[outside][:, :3].max() < 0.01) == premultiplied


def test_alpha_of_the_source_is_not_multiplied_twice(icm: Icm, scene: Path) -> None:
    """A premultiplied source is an image over black and has the same foreground as without
    alpha."""
    rgb = linear(read(next((scene / "imgs").glob("wall.*")))[..., 2::-1])
    (scene / "exr").mkdir()
    written(scene / "exr" / "plain.exr", rgb, "half")
    written(scene / "exr" / "covered.exr", np.dstack([rgb, np.full(rgb.shape[:2], 0.5, np.float32)]), "half")
    assert icm(src=scene / "exr", format="exr", foreground="auto").exit_code == 0
    plain, covered = (by_openimageio(scene / "out" / f"{name}.exr")[0] for name in ("plain", "covered"))
    assert (plain == covered).all()
    inside = plain[..., 3] > 0.99
    np.testing.assert_allclose(covered[inside][:, :3], rgb[inside], atol=0.06)


@pytest.mark.parametrize(("kind", "straight"), [("premultiplied", None), ("straight", 1)])
def test_tiff_output_declares_its_alpha_association(icm: Icm, scene: Path, kind: str, straight: int | None) -> None:
    assert icm(foreground=kind, format="tiff").exit_code == 0
    settings = oiio.ImageSpec()
    settings.attribute("oiio:UnassociatedAlpha", 1)
    file = oiio.ImageInput.open(str(scene / "out" / "wall.tif"), settings)
    assert file.spec().getattribute("oiio:UnassociatedAlpha") == straight
    pixels = file.read_image(0, 0, 0, 4, "float")
    file.close()
    over_black, _ = by_openimageio(scene / "out" / "wall.tif")  # as read by a compositor that follows the label
    expected = pixels[..., :3] * (pixels[..., 3:] if straight else 1)
    np.testing.assert_allclose(over_black[..., :3], expected, atol=1.1 / 255)


def test_foregrounds_of_single_pixels_are_written(icm: Icm, scene: Path) -> None:
    for size in ((1, 1), (1, 2), (5, 1)):
        Image.new("RGB", size, (10, 20, 30)).save(scene / "imgs" / f"{size[0]}x{size[1]}.png")
    result = icm("--exclude", "*wall*", "--exclude", "*pad*", "--exclude", "*deep*", foreground="straight")
    assert result.exit_code == 0, result.output
    assert read(scene / "out" / "1x1.png")[0, 0, :3].tolist() == [30, 20, 10]


def test_foreground_has_the_bit_depth_of_its_source(icm: Icm, scene: Path) -> None:
    rgb = read(next((scene / "imgs").glob("wall.*")))[..., 2::-1]
    (scene / "deep").mkdir()
    written(scene / "deep" / "a.tif", rgb.astype(np.uint16) * 257, "uint16")
    assert icm(src=scene / "deep", foreground="straight").exit_code == 0
    assert cv2.imread(str(scene / "out" / "a.png"), cv2.IMREAD_UNCHANGED).dtype == np.uint16


@pytest.mark.parametrize("kind", ["half", "float"])
def test_exr_foreground_has_the_bit_depth_of_its_source(icm: Icm, scene: Path, kind: str) -> None:
    rgb = linear(read(next((scene / "imgs").glob("wall.*")))[..., 2::-1])
    (scene / "deep").mkdir()
    written(scene / "deep" / "a.exr", rgb, kind)
    assert icm(src=scene / "deep", foreground="straight", format="exr").exit_code == 0
    assert str(by_openimageio(scene / "out" / "a.exr")[1].format) == kind


@pytest.mark.parametrize(
    ("space", "label", "red"),
    [
        ("auto", None, None),
        ("ARRI LogC3 (EI800)", "lin_ap1_scene", 0.713),
        ("ACEScg", "lin_ap1_scene", 0.713),
        ("lin_rec2020_scene", "lin_rec2020_scene", 0.708),
        ("Linear ARRI Wide Gamut 3", "ocio:lin_awg3_scene", None),
    ],
)
def test_exr_foreground_is_scene_linear(
    icm: Icm, scene: Path, space: str, label: str | None, red: float | None
) -> None:
    source = next((scene / "imgs").glob("wall.*"))
    options = {"src": source, "foreground": "straight", "colorspace": space}
    assert icm(**options).exit_code == icm(**options, format="exr", depth="float", out=scene / "exr").exit_code == 0
    coded = read(scene / "out" / "wall.png")[..., [2, 1, 0, 3]]
    pixels, spec = by_openimageio(scene / "exr" / "wall.exr")
    assert spec.getattribute("colorInteropID") == label
    chromaticities = spec.getattribute("chromaticities")
    assert (chromaticities and round(chromaticities[0], 4)) == red
    inside = coded[..., 3] > 250
    grey = inside & (np.ptp(coded[..., :3].astype(int), axis=-1) <= 1)  # independent of the primaries
    value = coded[grey][:, :3].mean(axis=-1) / 255.0
    if space == "auto":
        np.testing.assert_allclose(pixels[inside][:, :3], linear(coded[inside][:, :3]), atol=0.006)
    elif "LogC3" in space:
        light = (10 ** ((value - 0.385537) / 0.247190) - 0.052272) / 5.555556  # formula of ARRI
        expected = np.where(value > 0.149658, light, (value - 0.092809) / 5.367655)
        np.testing.assert_allclose(pixels[grey][:, :3].mean(axis=-1), expected, rtol=0.02, atol=0.001)
    else:
        np.testing.assert_allclose(pixels[inside][:, :3], coded[inside][:, :3] / 255.0, atol=0.006)
    assert grey.sum() > 20


@pytest.mark.parametrize("form", ["tiff", "exr"])
def test_outputs_contain_no_time_of_day(icm: Icm, scene: Path, form: str) -> None:
    """Two runs of a command write the same bytes at any time."""
    assert icm(format=form, src=scene / "imgs" / "wall.jpg").exit_code == 0
    (made,) = output_files(scene / "out")
    _, spec = by_openimageio(made)
    assert not spec.getattribute("DateTime")
    assert not re.search(rb"20\d\d:\d\d:\d\d", made.read_bytes())


def test_trimaps_and_inverted_alphas_are_written(icm: Icm, scene: Path) -> None:
    assert icm().exit_code == 0
    alpha = read(scene / "out" / "wall.png")
    assert icm(out=scene / "b", trimap="also", trimap_band=6).exit_code == 0
    assert (read(scene / "b" / "wall.png") == alpha).all()
    trimap = read(scene / "b" / "wall.trimap.png")
    assert set(np.unique(trimap)) == {0, 128, 255}
    assert (alpha[trimap == 255] > 240).all()
    assert (alpha[trimap == 0] < 15).all()
    (scene / "b" / "wall.trimap.png").unlink()
    planned = icm("--dry-run", out=scene / "b", trimap="also", trimap_band=6)
    assert "wall.png (recomputed: it has no trimap)" in planned.stdout
    assert icm(out=scene / "b", trimap="also", trimap_band=6).exit_code == 0
    assert (scene / "b" / "wall.trimap.png").exists()  # recomputed with its alpha
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "wall.trimap.jpg")
    other = icm(src=scene / "wall.trimap.jpg", out=scene / "e")
    assert other.exit_code == 0
    refused = icm(src=scene / "imgs" / "wall.jpg", out=scene / "e", trimap="also")
    assert refused.exit_code == 2
    assert "wall.trimap.png is the alpha of" in refused.stderr
    assert icm(out=scene / "c", trimap="instead", trimap_band=6).exit_code == 0
    assert (read(scene / "c" / "wall.png") == trimap).all()
    assert icm("--invert", out=scene / "d").exit_code == 0
    assert np.abs(read(scene / "d" / "wall.png").astype(int) + alpha - 255).max() <= 1


@pytest.mark.parametrize("colour", [(-0.2, 0.1, 0.4), (0.5, 3.0, 40.0), (-1.0, 0.0, 9.0)])
def test_foreground_keeps_values_outside_0_and_1(colour: tuple[float, ...]) -> None:
    alpha = np.zeros((40, 50), np.float32)
    alpha[10:30, 10:40] = 1.0
    pixels = np.where(alpha[..., None] > 0, np.asarray(colour, np.float32), np.float32(0.3))
    found = estimate_foreground(DecodedImage(pixels, None, 1.0, "lin_rec709_scene"), alpha)
    np.testing.assert_allclose(found[alpha > 0], np.broadcast_to(colour, (600, 3)), atol=1e-3)


@pytest.mark.parametrize(("form", "is_reported"), [("png", True), ("tiff", False), ("exr", False)])
def test_clipped_colours_are_reported(icm: Icm, scene: Path, form: str, is_reported: bool) -> None:
    bright = 4 * linear(np.asarray(Image.open(scene / "imgs" / "wall.jpg")))
    (scene / "hdr").mkdir()
    for name in ("a.exr", "b.exr"):
        written(scene / "hdr" / name, bright, "half")
    done = icm("--foreground", "auto", "--format", form, src=scene / "hdr")
    assert done.exit_code == 0
    assert done.stderr.count("are clipped to 0..1; --format exr keeps all") == int(is_reported)


def test_wide_band_makes_everything_unknown() -> None:
    alpha = np.zeros((400, 600), np.float32)
    alpha[100:300, 200:400] = 1.0
    assert (trimap_from_alpha(alpha, 1000) == 128).all()
    assert (trimap_from_alpha(np.ones((9, 9), np.float32), 1000) == 255).all()
    assert (trimap_from_alpha(np.zeros((9, 9), np.float32), 1000) == 0).all()


@given(band=st.integers(1, 12), side=st.integers(10, 60))
@settings(max_examples=30)
def test_trimap_is_unknown_around_the_edge(band: int, side: int) -> None:
    alpha = np.zeros((64, 64), np.float32)
    alpha[:, :side] = 1.0
    trimap = trimap_from_alpha(alpha, band)
    columns = np.arange(64)
    distance = np.where(columns < side, side - columns, columns - side + 1)
    assert (trimap[32] == np.where(distance <= band, 128, np.where(columns < side, 255, 0))).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": "half"}, "does not fit --format png; expected one of 8, 16"),
        ({"channel": "matte"}, "give --format exr, or omit"),
        ({"channel": "matte", "format": "exr", "foreground": "auto"}, "--foreground writes R, G, B and A"),
        ({"band_px": 5}, "--trimap-band is 5, and no trimap is written"),
        ({"foreground": "auto", "invert": True}, "omit --invert"),
        ({"trimap": "instead", "format": "exr"}, "the format is exr; omit --format, and give --out a folder"),
    ],
)
def test_incompatible_output_options_are_refused(options: dict[str, object], message: str) -> None:
    plain = {"format": "png", "depth": None, "channel": "A", "foreground": "none", "invert": False}
    with pytest.raises(UsageError, match=message):
        OutputFormat(**{**plain, "trimap": "none", "band_px": 10, **options})
