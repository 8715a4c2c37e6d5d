"""Image formats, bit depths and colour spaces: the same image is read from each of them."""

from __future__ import annotations

import json
import math
import re
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import OpenImageIO as oiio
import pillow_heif
import PyOpenColorIO as ocio
import pytest
from conftest import COMPOSITES, Icm, output_files, read
from PIL import Image, ImageCms, PngImagePlugin

from icm_cli.environment import FreeMemory
from icm_cli.errors import ImageError, UsageError
from icm_cli.images.colour import ColourSettings, to_display_srgb, to_scene_linear
from icm_cli.images.decoding import frame_count, image_size
from icm_cli.images.image_file import detect_file_type
from icm_cli.images.reading import read_alpha, read_image, read_stored_pixels
from icm_cli.matting.jobs import OutputLayout
from icm_cli.matting.planning import JobPlanner
from icm_cli.matting.sources import SkippedFiles, find_sources

pillow_heif.register_heif_opener()  # to write files; icm does not register it

SIDE = 48
X, Y = np.meshgrid(np.arange(SIDE), np.arange(SIDE))
RGB = np.stack([X * 5, Y * 5, (X + Y) * 2], axis=-1).astype(np.uint8)


def linear(rgb: np.ndarray) -> np.ndarray:
    value = rgb.astype(np.float32) / 255.0
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4).astype(np.float32)


def written(path: Path, pixels: np.ndarray, kind: str, **attributes: object) -> Path:
    spec = oiio.ImageSpec(pixels.shape[1], pixels.shape[0], pixels.shape[2], kind)
    for name, value in attributes.items():
        spec.attribute(name.replace("__", ":"), value)
    file = oiio.ImageOutput.create(str(path))
    assert file.open(str(path), spec), file.geterror()
    assert file.write_image(np.ascontiguousarray(pixels)), file.geterror()
    file.close()
    return path


def difference(path: Path, colour: ColourSettings = ColourSettings(), expected: np.ndarray = RGB) -> int:  # noqa: B008
    return int(np.abs(read_image(path, colour).rgb.astype(int) - expected).max())


DEEP = RGB.astype(np.uint16) * 257


def write_psd(path: Path, rgb: np.ndarray) -> Path:
    """Write a Photoshop file that holds only the merged image. OpenImageIO and Pillow cannot write
    PSD."""
    height, width, channels = rgb.shape
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, channels, height, width, 8, 3)
    no_palette_resources_or_layers = bytes(12)
    path.write_bytes(header + no_palette_resources_or_layers + bytes(2) + rgb.transpose(2, 0, 1).tobytes())
    return path


def test_openimageio_is_imported_only_for_files_that_need_it(tmp_path: Path) -> None:
    """It takes 30 MB."""
    exr = written(tmp_path / "a.exr", RGB.astype(np.float32) / 255, "half")
    code = (
        "import sys; from pathlib import Path\nfrom icm_cli.images.reading import read_image\n"
        "from icm_cli.images.writing import write_mask\nphoto = read_image(Path(sys.argv[1]))\n"
        "write_mask(Path(sys.argv[3]), photo.rgb[..., 0] > 0)\nassert 'OpenImageIO' not in sys.modules\n"
        "read_image(Path(sys.argv[2]))\nassert 'OpenImageIO' in sys.modules\n"
    )
    paths = map(str, (COMPOSITES / "ref.jpg", exr, tmp_path / "mask.png"))
    ended = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_psd_of_8_bits_is_read(tmp_path: Path) -> None:
    path = write_psd(tmp_path / "a.psd", RGB)
    assert difference(path) == 0
    assert image_size(path) == (SIDE, SIDE)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.dpx", "a.sgi", "a.jxl", "a.bmp", "a.tga", "a.jp2"])
def test_images_of_8_bits_are_read(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name, RGB, "uint8", **({"compression": "jpegxl:100"} if name == "a.jxl" else {}))
    assert difference(path) <= (3 if name in ("a.jp2", "a.jxl") else 0)
    assert image_size(path) == (SIDE, SIDE)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.dpx"])
def test_images_of_16_bits_are_read(tmp_path: Path, name: str) -> None:
    assert difference(written(tmp_path / name, DEEP, "uint16")) == 0


@pytest.mark.parametrize("kind", ["half", "float"])
def test_float_tiff_is_display_referred(tmp_path: Path, kind: str) -> None:
    assert difference(written(tmp_path / "a.tif", RGB.astype(np.float32) / 255, kind)) <= 1


def test_planar_tiff(tmp_path: Path) -> None:
    assert difference(written(tmp_path / "a.tif", DEEP, "uint16", planarconfig="separate")) == 0


def negative(folder: Path, pixels: np.ndarray) -> Path:
    """Write a 16-bit TIFF in which 0 is white."""
    path = written(folder / "a.tif", pixels, "uint16")
    data = bytearray(path.read_bytes())
    at = data.index(b"\x06\x01\x03\x00\x01\x00\x00\x00")  # the tag of the photometric interpretation
    data[at + 8] = 0
    path.write_bytes(data)
    return path


def test_inverted_greyscale_is_corrected(tmp_path: Path) -> None:
    path = negative(tmp_path, 65535 - DEEP[..., :1])
    assert difference(path, expected=np.repeat(RGB[..., :1], 3, -1)) == 0


@pytest.mark.parametrize("kind", ["half", "float"])
def test_exr_is_linear(tmp_path: Path, kind: str) -> None:
    assert difference(written(tmp_path / "a.exr", linear(RGB), kind)) <= 1


@pytest.mark.slow
def test_image_in_five_colour_spaces_gives_one_alpha(icm: Icm, scene: Path) -> None:
    """The spaces are sRGB PNG, 16-bit TIFF, linear EXR, ACEScg EXR and LogC DPX; the tolerance is 2
    of 255."""
    import PyOpenColorIO

    image = read(next((scene / "imgs").glob("wall.*")))[..., 2::-1]
    config = PyOpenColorIO.Config.CreateFromBuiltinConfig("studio-config-latest")

    def moved(space: str) -> np.ndarray:
        values = np.ascontiguousarray(linear(image))
        config.getProcessor("lin_rec709_scene", space).getDefaultCPUProcessor().applyRGB(values)
        return values

    folders = {name: scene / name for name in ("png", "tif", "exr", "acescg", "logc")}
    for folder in folders.values():
        folder.mkdir()
    Image.fromarray(image).save(folders["png"] / "a.png")
    written(folders["tif"] / "a.tif", image.astype(np.uint16) * 257, "uint16")
    written(folders["exr"] / "a.exr", linear(image), "half")
    written(folders["acescg"] / "a.exr", moved("ACEScg"), "half")
    logc = np.clip(moved("ARRI LogC3 (EI800)"), 0, 1)
    written(folders["logc"] / "a.dpx", (logc * 65535 + 0.5).astype(np.uint16), "uint16")
    spaces = {"acescg": {"colorspace": "ACEScg"}, "logc": {"colorspace": "ARRI LogC3 (EI800)"}}
    made = {}
    for name, folder in folders.items():
        options = {**spaces.get(name, {}), **({"ref-colorspace": "sRGB"} if name in spaces else {})}
        result = icm(src=folder, out=scene / f"out-{name}", **options)
        assert result.exit_code == 0, result.output
        made[name] = read(scene / f"out-{name}" / "a.png").astype(int)
    for name, alpha in made.items():
        assert np.abs(alpha - made["png"]).max() <= 2, name


def test_view_and_exposure_affect_the_alpha(tmp_path: Path) -> None:
    path = written(tmp_path / "a.exr", 4.0 * linear(RGB), "half")
    assert difference(path, ColourSettings(exposure=-2.0)) <= 1
    tone_mapped = read_image(path, ColourSettings(view="ACES 2.0 - SDR 100 nits (Rec.709)")).rgb
    clipped = read_image(path).rgb
    assert (clipped == 255).mean() > 2 * (tone_mapped == 255).mean()  # the view gets values above 1


@pytest.mark.parametrize("space", ["lin_rec709_scene", "ACEScg", "ARRI LogC3 (EI800)"])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_view_equals_the_ocio_processor(space: str, scale: float) -> None:
    """The result equals that of OpenColorIO in float, also above 1, and the stored pixels do not
    change."""
    import PyOpenColorIO as ocio

    config = ocio.Config.CreateFromBuiltinConfig("studio-config-latest")
    group = ocio.GroupTransform()
    group.appendTransform(ocio.ColorSpaceTransform(src=space, dst="scene_linear"))
    group.appendTransform(ocio.MatrixTransform.Scale([2.0, 2.0, 2.0, 1.0]))
    view = ocio.DisplayViewTransform(src="scene_linear", display="sRGB - Display", view="Un-tone-mapped")
    group.appendTransform(view)
    values = np.random.default_rng(0).normal(0.2, 0.6, (SIDE, SIDE, 3)).astype(np.float32)
    if "Log" in space:
        values = np.clip(values, 0, 1)
    else:
        values[0] *= 1000
    expected = values.copy()
    config.getProcessor(group).getDefaultCPUProcessor().applyRGB(expected)
    wide = np.repeat(values * np.float32(scale), 2, axis=1)
    given = wide[:, ::2]  # not contiguous
    seen = to_display_srgb(given, scale, space, ColourSettings(exposure=1.0))
    assert np.abs(seen - np.clip(expected * 255, 0, 255)).max() <= 0.51
    assert (given == values * np.float32(scale)).all()


@pytest.mark.parametrize(
    ("colour", "message"),
    [
        (ColourSettings("ACEScq"), "Did you mean 'ACEScg'"),
        (ColourSettings(view="Filmic"), "is not a view of"),
        (ColourSettings(config="none.ocio"), "none.ocio does not exist"),
    ],
)
def test_unknown_colour_names_are_reported(colour: ColourSettings, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        colour.validate()


@pytest.mark.parametrize(
    "version", ["cg-config-v1.0.0_aces-v1.3_ocio-v2.1", "studio-config-v2.1.0_aces-v1.3_ocio-v2.3"]
)
def test_linear_spaces_have_other_names_in_older_configurations(tmp_path: Path, version: str) -> None:
    colour = ColourSettings(config=f"ocio://{version}")
    path = written(tmp_path / "a.exr", linear(RGB), "half")
    assert difference(path, colour) <= 1
    written(path, linear(RGB), "half", colorInteropID="lin_ap1_scene")
    assert difference(path, colour, read_image(path).rgb) <= 1
    assert difference(path, colour) > 20


WITHOUT_ROLES = """
ocio_profile_version: 1
roles: {default: raw}
displays: {monitor: [!<View> {name: Raw, colorspace: raw}]}
colorspaces: [!<ColorSpace> {name: raw, isdata: true}, !<ColorSpace> {name: plate}]
"""


def test_configurations_without_a_colour_space_or_a_role_are_reported(tmp_path: Path) -> None:
    config = tmp_path / "c.ocio"
    config.write_text(WITHOUT_ROLES)
    path = written(tmp_path / "a.exr", linear(RGB), "half")
    with pytest.raises(ImageError, match=r"cannot be read: .*c\.ocio has no colour space lin_rec709_scene; give one"):
        read_image(path, ColourSettings(config=str(config)))
    with pytest.raises(ImageError, match=r"cannot be read: .*none\.ocio does not exist"):
        read_image(path, ColourSettings(config="none.ocio"))
    config = tmp_path / "b.ocio"
    config.write_text(WITHOUT_ROLES.replace("colorspace: raw}", "colorspace: none}"))
    with pytest.raises(UsageError, match=r"b\.ocio cannot convert plate to monitor \(.*none"):
        ColourSettings("plate", str(config)).validate()


def test_only_exposure_needs_the_role_scene_linear(tmp_path: Path) -> None:
    config = tmp_path / "c.ocio"
    config.write_text(WITHOUT_ROLES)
    path = written(tmp_path / "a.exr", linear(RGB), "half")
    image = read_image(path, ColourSettings("plate", str(config)))
    assert np.abs(image.rgb.astype(int) - np.round(linear(RGB) * 255)).max() <= 1  # its view changes nothing
    assert (to_scene_linear(linear(RGB), "plate", str(config))[0] == linear(RGB)).all()
    with pytest.raises(UsageError, match=r"c\.ocio has no role scene_linear, which --exposure and HDR need; add"):
        ColourSettings("plate", str(config), exposure=1.0).validate()


def swapped_profile() -> bytes:
    """Return an ICC profile with red and blue swapped."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    return bytes(profile).replace(b"s\0R\0G\0B", b"s\0W\0A\0P").replace(b"sRGB", b"sWAP")


def linear_grey_profile() -> bytes:
    """Return a minimal linear grey ICC profile of version 2."""
    white = struct.pack(">iii", 63190, 65536, 54061)  # D50, in 1/65536
    tags = {
        b"desc": b"desc" + struct.pack(">4xI", 5) + b"grey\0" + bytes(81),
        b"wtpt": b"XYZ \0\0\0\0" + white,
        b"kTRC": b"curv" + struct.pack(">4xIH2x", 1, 256),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
    }
    at, table, data = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, content in tags.items():
        table += name + struct.pack(">II", at + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    version = struct.pack(">I", 0x02400000)
    head = struct.pack(">I4x", at + len(data)) + version + b"mntrGRAYXYZ " + struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
    return (head + b"acsp" + bytes(28) + white).ljust(128, b"\0") + table + data


def profiled(path: Path, pixels: np.ndarray, kind: str, profile: bytes, **attributes: object) -> Path:
    """Write a file with an ICC profile by OpenImageIO. A fourth channel is its alpha."""
    spec = oiio.ImageSpec(pixels.shape[1], pixels.shape[0], pixels.shape[2], kind)
    for name, value in attributes.items():
        spec.attribute(name.replace("__", ":"), value)
    spec.attribute("ICCProfile", oiio.TypeDesc(f"uint8[{len(profile)}]"), np.frombuffer(profile, np.uint8))
    file = oiio.ImageOutput.create(str(path))
    assert file.open(str(path), spec), file.geterror()
    assert file.write_image(np.ascontiguousarray(pixels)), file.geterror()
    file.close()
    return path


@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_profile_of_associated_alpha_composites_over_black(tmp_path: Path, kind: str) -> None:
    """Premultiplied colours are read like the same values without alpha, and the alpha is
    unchanged."""
    half = np.where(X < SIDE // 2, 0.5, 1.0).astype(np.float32)[..., None]
    colours = RGB / np.float32(255) * half
    plain = profiled(tmp_path / "plain.tif", colours, kind, swapped_profile())
    path = profiled(tmp_path / "a.tif", np.dstack([colours, half]), kind, swapped_profile())
    image = read_image(path)
    assert (image.rgb == read_image(plain).rgb).all()
    assert np.abs(image.rgb[..., ::-1].astype(int) - colours * 255).mean() < 3
    assert image.alpha is not None
    assert sorted(np.unique(image.alpha)) == [128, 255]


@pytest.mark.parametrize("name", ["a.tif", "a.png"])
@pytest.mark.parametrize("kind", ["uint8", "uint16"])
def test_grey_profile_is_applied_at_every_bit_depth(tmp_path: Path, name: str, kind: str) -> None:
    """In linear grey, one half is 188 in sRGB."""
    path = profiled(tmp_path / name, np.full((SIDE, SIDE, 1), 0.5, np.float32), kind, linear_grey_profile())
    image = read_image(path)
    assert np.abs(image.rgb.astype(int) - 188).max() <= 1
    assert image.notices == ()


def test_icc_profiles_are_applied(tmp_path: Path) -> None:
    """Applying the profile swaps red and blue back."""
    described = swapped_profile()
    for name, image in (("a.png", Image.fromarray(RGB)), ("a.jpg", Image.new("RGB", (SIDE, SIDE), (200, 40, 90)))):
        image.save(tmp_path / name, icc_profile=described)
        expected = np.asarray(image)[..., ::-1]
        assert np.abs(read_image(tmp_path / name).rgb.astype(int) - expected).mean() < 3
        assert np.abs(read_alpha(tmp_path / name).astype(int) - np.asarray(image).max(axis=-1)).max() <= 3


def test_broken_profile_is_reported_and_ignored(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png", icc_profile=b"no profile")
    image = read_image(tmp_path / "a.png")
    assert (image.rgb == RGB).all()
    assert "ICC profile cannot be used" in image.notices[0]


def add_png_chunks(path: Path, **chunks: bytes) -> Path:
    """Insert chunks after the header of a PNG."""
    data = path.read_bytes()
    more = b""
    for name, content in chunks.items():
        named = name.encode() + content
        more += struct.pack(">I", len(content)) + named + struct.pack(">I", zlib.crc32(named))
    path.write_bytes(data[:33] + more + data[33:])
    return path


def gamma_png(path: Path, pixels: np.ndarray, gamma: float, *, srgb: bool = False) -> Path:
    """Write a PNG with a gAMA chunk of ``1 / gamma``, and with ``srgb`` an sRGB chunk, which takes
    precedence."""
    cv2.imwrite(str(path), pixels)
    chunks = {"sRGB": b"\0"} if srgb else {}
    return add_png_chunks(path, **chunks, gAMA=struct.pack(">I", round(1e5 / gamma)))


def encode(space: str, gain: float) -> np.ndarray:
    """Return ``RGB`` in a display colour space of OpenColorIO, scaled by ``gain`` in linear light; float32."""
    config = ocio.Config.CreateFromBuiltinConfig("studio-config-latest")
    group = ocio.GroupTransform()
    group.appendTransform(ocio.ColorSpaceTransform("srgb_rec709_display", "lin_rec709_scene"))
    group.appendTransform(ocio.MatrixTransform.Scale([gain, gain, gain, 1.0]))
    group.appendTransform(ocio.ColorSpaceTransform("lin_rec709_scene", space))
    values = RGB.astype(np.float32) / 255
    config.getProcessor(group).getDefaultCPUProcessor().applyRGB(values)
    return values


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("codes", "space", "gain"),
    [
        ((9, 16), "Rec.2100-PQ - Display", 2.03),
        ((9, 18), "Rec.2100-HLG - Display", 2.03),
        ((12, 16), "ST2084-P3-D65 - Display", 2.03),
        ((12, 13), "Display P3 - Display", 1.0),
        ((1, 1), "Rec.1886 Rec.709 - Display", 1.0),
    ],
)
def test_code_points_of_a_png_are_its_colour_space(
    tmp_path: Path, depth: type, codes: tuple[int, int], space: str, gain: float
) -> None:
    largest = np.iinfo(depth).max
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), np.round(encode(space, gain) * largest).astype(depth)[..., ::-1])
    stored = read_image(path).rgb
    add_png_chunks(path, cICP=bytes([*codes, 0, 1]), gAMA=struct.pack(">I", 100000))
    image = read_image(path)
    assert image.space == space
    assert image.notices == ()
    assert np.abs(image.rgb.astype(int) - RGB).mean() < (2 if depth == np.uint8 else 0.5)
    assert read_image(path, ColourSettings(space="sRGB")).space == "sRGB"
    assert (read_alpha(path) == stored.max(axis=-1)).all()


@pytest.mark.parametrize("codes", [(9, 16), (9, 18), (12, 16), (1, 1)])
def test_code_points_with_a_configuration_of_aces_1_3(tmp_path: Path, codes: tuple[int, int]) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), RGB[..., ::-1])
    add_png_chunks(path, cICP=bytes([*codes, 0, 1]))
    image = read_image(path, ColourSettings(config="ocio://studio-config-v1.0.0_aces-v1.3_ocio-v2.1"))
    assert (image.space, image.notices) == (read_image(path).space, ())
    assert image.rgb.mean() > 10


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_code_points_have_precedence_over_the_profile_of_a_png(tmp_path: Path, depth: type) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), RGB[..., ::-1].astype(depth))
    profile = zlib.compress(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes())
    add_png_chunks(path, iCCP=b"icc\0\0" + profile, cICP=bytes([12, 13, 0, 1]))
    assert read_image(path).space == "Display P3 - Display"
    assert read_image(path).notices == ()


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
@pytest.mark.parametrize(
    ("codes", "notice"),
    [
        ((9, 14, 0, 1), "has the colour space 9/14 of ITU-T H.273, which icm does not know, and is read as sRGB"),
        ((9, 16, 0, 0), "has the colour space 9/16 of ITU-T H.273, whose narrow range of video icm does not support"),
        ((2, 2, 0, 1), ""),
        ((1, 13, 0, 1), ""),
    ],
)
def test_unknown_code_points_give_a_notice(tmp_path: Path, depth: type, codes: tuple[int, ...], notice: str) -> None:
    path = tmp_path / "a.png"
    cv2.imwrite(str(path), RGB[..., ::-1].astype(depth) * (np.iinfo(depth).max // 255))
    image = read_image(add_png_chunks(path, cICP=bytes(codes)))
    assert (image.rgb == RGB).all()
    assert image.space == "sRGB"
    assert len(image.notices) == bool(notice)
    assert notice in "".join(image.notices)


@pytest.mark.parametrize("suffix", ["avif", "heic"])
def test_code_points_of_avif_and_heic_are_their_colour_space(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.round(encode("Rec.2100-PQ - Display", 2.03) * 255).astype(np.uint8)).save(path, quality=100)
    data = path.read_bytes()
    at = data.index(b"colrnclx") + 8
    path.write_bytes(data[:at] + struct.pack(">HH", 9, 16) + data[at + 4 :])
    image = read_image(path)
    assert image.space == "Rec.2100-PQ - Display"
    assert np.abs(image.rgb.astype(int) - RGB).mean() < 6


def test_reports_state_the_colour_space_of_code_points(icm: Icm, scene: Path) -> None:
    path = scene / "imgs" / "pad.0101.png"
    add_png_chunks(path, cICP=bytes([9, 16, 0, 1]))
    assert icm("--report", str(scene / "r.json"), src=path).exit_code == 0
    assert json.loads((scene / "r.json").read_text())["images"][0]["colorspace"] == "Rec.2100-PQ - Display"


@pytest.mark.parametrize("depth", [np.uint8, np.uint16])
def test_gamma_of_a_png_is_applied(tmp_path: Path, depth: type) -> None:
    """One half is 188 in sRGB if it is linear, 146 with a gamma of 1.8, and 128 with the gamma of
    sRGB."""
    half = np.full((SIDE, SIDE, 3), np.iinfo(depth).max // 2 + 1, depth)
    for gamma, expected, space in ((1.0, 188, "Linear"), (1.8, 146, "Gamma 1.8"), (2.2, 128, "")):
        image = read_image(gamma_png(tmp_path / "a.png", half, gamma))
        assert np.abs(image.rgb.astype(int) - expected).max() <= 1
        assert space in image.space
        assert image.notices == ()
        assert image_size(tmp_path / "a.png") == (SIDE, SIDE)
    assert (read_image(gamma_png(tmp_path / "b.png", half, 1.0, srgb=True)).rgb == 128).all()
    assert (read_image(gamma_png(tmp_path / "c.png", half, 1.0), ColourSettings("sRGB")).rgb == 128).all()
    image = read_image(gamma_png(tmp_path / "d.png", half, 1.4))
    assert "a gamma of 1.4, which matches no known colour space; it is read as sRGB" in image.notices[0]
    assert (read_alpha(gamma_png(tmp_path / "e.png", half, 1.0)) == 128).all()


@pytest.mark.parametrize("chunk", ["text", "compressed", "profile"])
def test_large_metadata_is_skipped(tmp_path: Path, chunk: str) -> None:
    info = PngImagePlugin.PngInfo()
    options = {}
    if chunk == "profile":
        options = {"icc_profile": zlib.compress(b"x" * 3_000_000) + b"x" * 3_000_000}
    else:
        info.add_text("a", "x" * 3_000_000, zip=chunk == "compressed")
    Image.fromarray(RGB).save(tmp_path / "a.png", pnginfo=info, **options)
    assert difference(tmp_path / "a.png") == 0
    assert image_size(tmp_path / "a.png") == (SIDE, SIDE)
    assert frame_count(tmp_path / "a.png") == 1


def test_unusual_files_are_reported(tmp_path: Path) -> None:
    twelve = written(tmp_path / "a.tif", RGB.astype(np.uint16) * 16, "uint16")
    assert "if it has 12 bits, give" in read_image(twelve).notices[0]
    holes = linear(RGB)
    holes[3, 3] = np.nan
    image = read_image(written(tmp_path / "a.exr", holes, "float"))
    assert "NaN" in image.notices[0]
    assert (image.rgb[3, 3] == 0).all()
    with pytest.raises(
        ImageError, match=r"values up to 235; expected 0\.\.1; give the value of white, as in --white 255"
    ):
        read_image(written(tmp_path / "b.tif", RGB.astype(np.float32), "float"))


@pytest.mark.parametrize(
    ("name", "kind", "pixels", "white"),
    [
        ("a.tif", "float", RGB.astype(np.float32), 255),
        ("a.tif", "half", RGB.astype(np.float32), 255),
        ("a.exr", "float", 255 * linear(RGB), 255),
        ("a.exr", "half", 4 * linear(RGB), 4),
        ("a.tif", "uint16", RGB.astype(np.uint16) * 16, 255 * 16),
        ("a.png", "uint16", RGB.astype(np.uint16) * 16, 255 * 16),
        ("a.png", "uint8", RGB, 4095),
    ],
)
def test_white_option_sets_the_white_value(
    tmp_path: Path, name: str, kind: str, pixels: np.ndarray, white: float
) -> None:
    path = written(tmp_path / name, pixels, kind)
    assert difference(path, ColourSettings(white=white)) <= 1
    assert not read_image(path, ColourSettings(white=white)).notices


def test_white_of_32_bit_integers_is_in_stored_values(tmp_path: Path) -> None:
    Image.fromarray(RGB[..., 0].astype(np.int32) * 300).save(tmp_path / "a.tif")
    assert difference(tmp_path / "a.tif", ColourSettings(white=255 * 300), np.repeat(RGB[..., :1], 3, -1)) <= 1


def test_twelve_bit_negative_is_inverted_at_its_white_value(tmp_path: Path) -> None:
    path = negative(tmp_path, 4080 - 16 * RGB.astype(np.uint16)[..., :1])
    assert difference(path, ColourSettings(white=4080), np.repeat(RGB[..., :1], 3, -1)) == 0


def test_white_option_scales_sources_and_references(icm: Icm, scene: Path) -> None:
    (scene / "float").mkdir()
    for source, target in (
        (scene / "imgs" / "wall.jpg", scene / "float" / "a.tif"),
        (scene / "ref.png", scene / "r.tif"),
    ):
        written(target, read(source)[..., 2::-1].astype(np.float32), "float")
    options = {"src": scene / "float", "ref": scene / "r.tif"}
    assert icm(**options).exit_code == 2
    assert icm(white=255, **options).exit_code == 0
    assert icm(src=scene / "imgs" / "wall.jpg", out=scene / "expected").exit_code == 0
    assert (read(scene / "out" / "a.png") == read(scene / "expected" / "wall.png")).all()
    changed = icm("-v", white=250, **options)
    assert changed.exit_code == 0
    assert re.search(r"kept +0\b", changed.output)
    for wrong in (0, -1, "inf"):
        result = icm(white=wrong, **options)
        assert result.exit_code == 2
        assert "expected a number above 0" in result.stderr


def test_image_larger_than_memory_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("icm_cli.images.pixels.measure_free_memory", lambda: FreeMemory(1000, "on this machine"))
    Image.fromarray(RGB).save(tmp_path / "a.png")
    with pytest.raises(ImageError, match="48x48, which needs about"):
        read_image(tmp_path / "a.png")


def frames(path: Path, count: int, **options: object) -> Path:
    images = [Image.fromarray(np.roll(RGB, 7 * number, axis=1)) for number in range(count)]
    images[0].save(path, save_all=True, append_images=images[1:], **options)
    return path


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif", "a.avif", "a.heic"])
def test_every_frame_of_a_file_is_matted(tmp_path: Path, name: str) -> None:
    path = frames(tmp_path / name, 3, **({"lossless": True} if name == "a.webp" else {}))
    assert frame_count(path) == 3
    skipped_files = SkippedFiles(lambda _: None)
    jobs = (
        JobPlanner(find_sources(tmp_path, None, skipped_files), OutputLayout(tmp_path / "out"), skipped_files)
        .plan_images()
        .jobs
    )
    assert [job.output.name for job in jobs] == ["a.0001.png", "a.0002.png", "a.0003.png"]
    images = [job.read_image().rgb.astype(int) for job in jobs]
    for number, image in enumerate(images):
        expected = np.roll(RGB, 7 * number, axis=1)
        assert np.abs(image - expected).mean() < 12
    assert len({job.planned.key for job in jobs}) == 3


def test_frames_of_two_files_with_the_same_stem_are_matted(icm: Icm, scene: Path) -> None:
    image = Image.open(scene / "imgs" / "wall.jpg")
    (scene / "two").mkdir()
    for name in ("an.gif", "an.tif"):
        turned = [image.rotate(turn) for turn in (0, 5, 10)]
        turned[0].save(scene / "two" / name, save_all=True, append_images=turned[1:])
    ended = icm("--keep-suffix", src=scene / "two", report=scene / "r.json")
    assert ended.exit_code == 0, ended.output
    report = json.loads((scene / "r.json").read_text())
    assert report["summary"]["done"] == len(report["images"]) == len(output_files(scene / "out")) == 6


def test_exposure_and_view_do_not_affect_display_referred_images(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    cv2.imwrite(str(tmp_path / "deep.png"), RGB[..., ::-1].astype(np.uint16) * 257)
    written(tmp_path / "a.exr", linear(RGB), "half")
    for name in ("a.png", "deep.png"):
        assert difference(tmp_path / name, ColourSettings(exposure=4.0)) == 0
    assert difference(tmp_path / "a.exr", ColourSettings(exposure=1.0)) > 20


@pytest.mark.parametrize("stops", [math.nan, math.inf, -math.inf, 1e9])
def test_invalid_exposure_is_refused(icm: Icm, stops: float) -> None:
    result = icm("--exposure", str(stops))
    assert result.exit_code == 2
    assert "expected a number from -30 to 30" in result.stderr


def test_terminal_output_names_the_page(icm: Icm, scene: Path) -> None:
    frames = [Image.open(scene / "imgs" / "wall.jpg").rotate(turn) for turn in (0, 5)]
    frames[0].save(scene / "two.tif", save_all=True, append_images=frames[1:])
    ended = icm(src=scene / "two.tif")
    assert ended.exit_code == 0
    for number in (1, 2):
        assert f"two.tif page {number} " in ended.stderr


def test_reduced_copies_are_no_frames(tmp_path: Path) -> None:
    small = Image.fromarray(RGB[::2, ::2])
    small.encoderinfo = {"tiffinfo": {254: 1}}
    Image.fromarray(RGB).save(tmp_path / "a.tif", save_all=True, append_images=[small])
    assert frame_count(tmp_path / "a.tif") == 1


def pages(path: Path, *made: tuple[np.ndarray, str, int]) -> Path:
    """Write a TIFF with pages of (pixels 0..1, number type, subfile type)."""
    file = oiio.ImageOutput.create(str(path))
    specs = []
    for pixels, kind, subfile in made:
        specs.append(oiio.ImageSpec(pixels.shape[1], pixels.shape[0], pixels.shape[2], kind))
        specs[-1].attribute("tiff:subfiletype", subfile)
    for number, (spec, (pixels, *_)) in enumerate(zip(specs, made, strict=True)):
        assert file.open(str(path), spec, "AppendSubimage" if number else "Create"), file.geterror()
        assert file.write_image(pixels)
    file.close()
    return path


THUMB = (np.zeros((9, 9, 3), np.float32), "uint8", 1)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "half", "float"])
@pytest.mark.parametrize("thumb_is_first", [False, True])
def test_pages_have_their_own_alpha(icm: Icm, scene: Path, kind: str, thumb_is_first: bool) -> None:
    """Thumbnails are not counted as pages. Pages may differ in size."""
    source = scene / "pages"
    source.mkdir()
    names = ("imgs/wall.jpg", "imgs/pad.0101.png", "imgs/sub/deep.png")
    images = [read(scene / name)[..., 2::-1].astype(np.float32) / 255 for name in names]
    first, *others = [(image, kind, 0) for image in images]
    path = pages(source / "a.tif", *([THUMB] if thumb_is_first else []), first, THUMB, *others, THUMB)
    assert frame_count(path) == 3
    assert image_size(path) == images[0].shape[:2]
    result = icm(src=source)
    assert result.exit_code == 0, result.output
    assert icm(out=scene / "single").exit_code == 0
    for number, name in enumerate(names, 1):
        alpha, alone = (
            read(scene / "out" / f"a.{number:04d}.png"),
            read((scene / "single" / name.removeprefix("imgs/")).with_suffix(".png")),
        )
        assert alpha.shape == alone.shape
        assert np.abs(alpha.astype(int) - alone).max() <= 2


def test_file_type_is_detected_from_content_and_skipped_files_are_counted(icm: Icm, scene: Path) -> None:
    source = scene / "mixed"
    (source / "@eaDir").mkdir(parents=True)
    Image.fromarray(RGB).save(source / "a.png")
    Image.fromarray(RGB).save(source / "@eaDir" / "thumb.png")
    (source / "without-ending").write_bytes((source / "a.png").read_bytes())
    (source / "b.jpg_large").write_bytes(next((COMPOSITES / "imgs").glob("*.jpg")).read_bytes())
    (source / "notes.txt").write_text("no image")
    (source / ".hidden.png").write_bytes(b"")
    (source / ".cache").mkdir()
    (source / ".cache" / "b.png").write_bytes(b"")
    sheet = source / "sheet.png"
    assert icm(src=source, out=source / "alphas", contact_sheet=sheet).exit_code == 0
    result = icm("--report", str(scene / "r.json"), src=source, out=scene / "out2")
    assert result.exit_code == 0, result.output
    assert {path.name for path in output_files(scene / "out2")} == {"a.png", "without-ending.png", "b.png"}
    summary = json.loads((scene / "r.json").read_text())["summary"]
    assert summary["skipped_files"] == {
        "hidden": 2,
        "not an image": 1,
        "made by icm": 4,
        "in @eaDir, a folder that a storage server or archiver created": 1,
    }
    assert summary["done"] + sum(summary["skipped_files"].values()) == len(output_files(source))


MOVIE = b"\0\0\0\x20ftypisom\0\0\2\0isomiso2mp41" + bytes(64)


@pytest.mark.parametrize(
    "name", ["a.mp4", "a.mov", "a.avi", "a.mkv", "a.mpg", "a.ts", "a.flv", "a.wmv", "a.m2ts", "a.png"]
)
def test_movie_error_explains_how_to_extract_frames(icm: Icm, scene: Path, name: str) -> None:
    movie = scene / name
    written = scene / "b.mp4" if name == "a.png" else movie
    writer = cv2.VideoWriter(
        str(written), cv2.VideoWriter.fourcc(*("FLV1" if name == "a.flv" else "MJPG")), 25, (64, 48)
    )
    for _ in range(12):
        writer.write(np.zeros((48, 64, 3), np.uint8))
    writer.release()
    written.rename(movie)
    assert movie.stat().st_size
    result = icm(src=movie, out=scene / "out")
    assert result.exit_code == 2
    output = " ".join(result.output.split())
    assert f"source {movie} is a movie, and icm reads images only; extract its frames first" in output
    result = icm(ref=movie)
    assert result.exit_code == 2
    assert "is a movie" in " ".join(result.output.split())


def test_movie_in_a_folder_is_skipped_by_its_name(icm: Icm, scene: Path) -> None:
    movie = scene / "imgs" / "b.mp4"
    movie.write_bytes(MOVIE)
    result = icm("--report", str(scene / "r.json"), out=scene / "out")
    assert result.exit_code == 0, result.output
    assert f"{movie} skipped: a movie; extract its frames first" in " ".join(result.output.split())
    assert json.loads((scene / "r.json").read_text())["summary"]["skipped_files"]["a movie"] == 1


def test_dry_run_lists_images_that_would_fail(icm: Icm, scene: Path) -> None:
    movie, gone = scene / "b.jpg", scene / "gone.png"
    movie.write_bytes(MOVIE)
    image = next((scene / "imgs").iterdir())
    listed = scene / "all.txt"
    listed.write_text(f"{image}\n{movie}\n{gone}\n")
    result = icm("--dry-run", "--root", str(scene), src=listed, out=scene / "out")
    assert result.exit_code == 1
    output = " ".join(result.output.split())
    assert f"{image} ->" in output
    assert f"{movie} ->" not in output
    assert f"would fail: {gone}: does not exist" in output
    assert f"would fail: {movie}: is a movie" in output


def test_output_named_like_a_movie_is_refused(icm: Icm, scene: Path) -> None:
    result = icm(out=scene / "a.mov")
    assert result.exit_code == 2
    assert "is named like a movie" in " ".join(result.output.split())
    result = icm(gt=scene / "ref.png", out=scene / "out")
    assert result.exit_code == 2
    assert "is a file; expected a folder of alphas" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        *((b"P6\n1 1\n255\nabc", "pnm"), (b"P1 notes\n", ""), (b"BM\0\1\0\0\0\0\0\0", "bmp")),
        *((b"BMW and others", ""), (b"PDF", ""), (b"", "")),
    ],
)
def test_file_types(content: bytes, kind: str) -> None:
    assert detect_file_type(content).name == kind


def test_16_bit_image_with_a_profile_keeps_its_alpha(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    spec = oiio.ImageSpec(SIDE, SIDE, 4, "uint16")
    spec.attribute("ICCProfile", oiio.TypeDesc(f"uint8[{len(profile)}]"), np.frombuffer(profile, np.uint8))
    spec.attribute("oiio:UnassociatedAlpha", 1)
    file = oiio.ImageOutput.create("a.png")
    assert file.open(str(tmp_path / "a.png"), spec)
    assert file.write_image(np.dstack([DEEP, DEEP[..., 0]]))
    file.close()
    image = read_image(tmp_path / "a.png")
    assert image.alpha is not None
    assert np.abs(image.alpha.astype(int) - RGB[..., 0]).max() <= 1
    assert np.abs(image.rgb.astype(int) - RGB).max() <= 1


def test_16_bit_masks_of_other_formats_are_read(tmp_path: Path) -> None:
    mask = np.where(X[..., None] > SIDE // 2, 255, 0).astype(np.uint8).repeat(3, -1)
    stored = read_stored_pixels(written(tmp_path / "a.dpx", mask, "uint8"))
    assert (stored.values == mask).all()


COVERAGE = np.broadcast_to(np.linspace(0, 1, SIDE, dtype=np.float32), (SIDE, SIDE))
"""Alpha from 0 to 1. Colours are not black where it is 0, as in a glow."""


@pytest.mark.parametrize(("name", "kind"), [("a.tif", "uint8"), ("a.tif", "uint16"), ("a.tif", "float")])
@pytest.mark.parametrize("straight", [0, 1])
def test_premultiplied_colours_are_the_image_over_black(tmp_path: Path, name: str, kind: str, straight: int) -> None:
    """Colours are neither multiplied nor divided by alpha when they are read."""
    pixels = np.dstack([RGB.astype(np.float32) / 255, COVERAGE])
    image = read_image(written(tmp_path / name, pixels, kind, oiio__UnassociatedAlpha=straight))
    assert np.abs(image.rgb.astype(int) - RGB).max() <= 1
    assert image.alpha is not None
    assert np.abs(image.alpha / 255.0 - COVERAGE).max() <= 0.51 / 255


def test_alpha_of_an_exr_does_not_affect_its_colours(tmp_path: Path) -> None:
    plain = read_image(written(tmp_path / "a.exr", linear(RGB), "half")).rgb
    covered = read_image(written(tmp_path / "b.exr", np.dstack([linear(RGB), COVERAGE]), "half")).rgb
    assert (covered == plain).all()
