"""Layers and parts of EXR files: which of them is used as the image."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import OpenImageIO as oiio
import pytest
from conftest import Icm, alphas, read
from test_formats import RGB, SIDE, linear

from icm_cli.errors import ImageError
from icm_cli.images.colour import ColourSettings
from icm_cli.images.decoding import image_size
from icm_cli.images.pixels import ImageWindows
from icm_cli.images.reading import read_alpha, read_image, read_stored_pixels

Channels = Mapping[str, np.ndarray]
"""Return pixels [H,W] by channel name."""
NOISE = np.random.default_rng(0).random((SIDE, SIDE)).astype(np.float32)
DEPTH = {"Z": 50 * NOISE, "id": np.round(9 * NOISE)}


def colours(pixels: np.ndarray, prefix: str = "", names: str = "RGB") -> Channels:
    return {f"{prefix}{name}": pixels[..., number] for number, name in enumerate(names)}


PICTURE = linear(RGB)
OTHER = linear(RGB[::-1])


def multipart(path: Path, *parts: tuple[str, Channels]) -> Path:
    """Write parts of (name, channels) with the display window of the first part."""
    specs: list[oiio.ImageSpec] = []
    for name, channels in parts:
        height, width = next(iter(channels.values())).shape
        spec = oiio.ImageSpec(width, height, len(channels), "float")
        spec.channelnames = tuple(channels)
        if specs:
            spec.full_width, spec.full_height = specs[0].full_width, specs[0].full_height
        if name:
            spec.attribute("oiio:subimagename", name)
        specs.append(spec)
    file = oiio.ImageOutput.create(str(path))
    assert file.open(str(path), tuple(specs)), file.geterror()
    for number, (spec, (_, channels)) in enumerate(zip(specs, parts, strict=True)):
        assert not number or file.open(str(path), spec, "AppendSubimage"), file.geterror()
        assert file.write_image(np.dstack(list(channels.values())).astype(np.float32)), file.geterror()
    file.close()
    return path


@pytest.mark.parametrize(
    ("parts", "layer"),
    [
        ([("depth", DEPTH), ("rgba", colours(PICTURE))], ""),
        ([("", {**colours(PICTURE), **colours(OTHER, "beauty."), **DEPTH})], ""),
        ([("left", colours(PICTURE)), ("right", colours(OTHER))], ""),
        ([("left", colours(OTHER)), ("right", colours(PICTURE))], "right"),
        ([("", {**DEPTH, **colours(PICTURE, "beauty.")})], ""),
        ([("", {**colours(OTHER, "AO."), **colours(PICTURE, "View.Combined.")})], ""),
        ([("", {**colours(OTHER), **colours(PICTURE, "diffuse.")})], "diffuse"),
        ([("", {**colours(PICTURE), **colours(OTHER, "diffuse.")})], "RGB"),
        ([("depth", DEPTH), ("diff", colours(PICTURE, "diffuse."))], "diff"),
        ([("", {**colours(OTHER), **colours(PICTURE, "crypto.", "rgb")})], "crypto"),
    ],
    ids=lambda value: value if isinstance(value, str) else "+".join(name or "one" for name, _ in value),
)
def test_image_layer_is_selected(tmp_path: Path, parts: list[tuple[str, Channels]], layer: str) -> None:
    path = multipart(tmp_path / "a.exr", *parts)
    image = read_image(path, ColourSettings(layer=layer))
    assert np.abs(image.rgb.astype(int) - RGB).max() <= 1
    assert image.alpha is None


def test_choice_among_several_layers_is_reported(tmp_path: Path) -> None:
    both = {**colours(OTHER, "a."), **colours(PICTURE, "b.")}
    (notice,) = read_image(multipart(tmp_path / "a.exr", ("", both))).notices
    assert "has the layers a, b; a is used; give --layer to use another one" in notice
    assert not read_image(multipart(tmp_path / "b.exr", ("", colours(PICTURE, "a.")))).notices


def test_missing_layer_error_lists_available_layers(tmp_path: Path) -> None:
    one = {**colours(PICTURE), **colours(OTHER, "diffuse."), **DEPTH}
    path = multipart(tmp_path / "a.exr", ("", one))
    with pytest.raises(
        ImageError, match="has no layer 'Z' with R, G and B; expected one of: RGB, diffuse; give one with --layer"
    ):
        read_image(path, ColourSettings(layer="Z"))


@pytest.mark.parametrize(
    "channels",
    [
        DEPTH,
        {"Z": NOISE},
        {"depth.Z": NOISE},
        {"id": NOISE},
        {"objectId": NOISE},
        {f"uCryptoAsset00.{name}": NOISE for name in ("red", "green", "blue", "alpha")},
        {f"ViewLayer.CryptoObject00.{name}": NOISE for name in "rgba"},
        {f"zDepth.{name}": NOISE for name in "RGB"},
    ],
    ids="+".join,
)
def test_file_with_depth_and_ids_only_is_refused(icm: Icm, scene: Path, channels: Channels) -> None:
    (scene / "exr").mkdir()
    multipart(scene / "exr" / "a.exr", ("", channels))
    result = icm("--quiet", src=scene / "exr")
    assert result.exit_code == 1
    message = " ".join(result.stderr.split())
    assert message.endswith(
        f"a.exr: has only depth, ids or cryptomattes ({', '.join(channels)}); expected colours; "
        "give an image with R, G, B"
    )
    assert not (scene / "out" / "a.png").exists()


@pytest.mark.parametrize("name", ["Y", "grid", "solid", "matte", "R"])
def test_single_grey_channel_is_an_image(tmp_path: Path, name: str) -> None:
    path = multipart(tmp_path / "a.exr", ("depth", {"depth.Z": 50 * NOISE}), ("grey", {name: PICTURE[..., 0]}))
    assert np.abs(read_image(path).rgb[..., 0].astype(int) - RGB[..., 0]).max() <= 1


def test_mask_may_consist_of_ids(tmp_path: Path) -> None:
    stored = read_stored_pixels(multipart(tmp_path / "a.exr", ("", {"id": np.round(NOISE)})))
    assert (stored.values == np.round(NOISE)).all()


def test_cryptomatte_layers_are_ignored(tmp_path: Path) -> None:
    crypto = {f"CryptoObject00.{name}": NOISE for name in "RGBA"}
    image = read_image(multipart(tmp_path / "a.exr", ("", {**crypto, **colours(PICTURE, "out.")})))
    assert np.abs(image.rgb.astype(int) - RGB).max() <= 1
    assert not image.notices


@pytest.mark.parametrize("channels", [{"matte": NOISE}, {"A": NOISE, "Z": DEPTH["Z"]}, {"Y": NOISE, "RY": 0 * NOISE}])
def test_single_grey_channel_is_read(tmp_path: Path, channels: Channels) -> None:
    matte = read_alpha(multipart(tmp_path / "a.exr", ("", channels)))
    assert np.abs(matte / 255.0 - NOISE).max() <= 0.51 / 255


def test_layer_has_its_own_alpha_and_windows(tmp_path: Path) -> None:
    small = {**colours(PICTURE[:20, :30]), "A": NOISE[:20, :30]}
    path = multipart(tmp_path / "a.exr", ("depth", DEPTH), ("rgba", small))
    image = read_image(path)
    assert image.alpha is not None
    assert np.abs(image.alpha / 255.0 - NOISE[:20, :30]).max() <= 0.51 / 255
    assert image.windows == ImageWindows((20, 30), (0, 0), (SIDE, SIDE))
    assert image_size(path) == (SIDE, SIDE)


def test_layer_option_affects_alpha_and_digest(icm: Icm, scene: Path) -> None:
    rgb = linear(read(next((scene / "imgs").glob("wall.*")))[..., 2::-1])
    (scene / "exr").mkdir()
    multipart(scene / "exr" / "a.exr", ("", {**colours(np.full_like(rgb, 0.2)), **colours(rgb, "beauty.")}))
    assert icm(src=scene / "exr").exit_code == 0
    before = alphas(scene / "out")
    assert icm(src=scene / "exr", layer="beauty").exit_code == 0
    assert alphas(scene / "out") != before
    (scene / "plain").mkdir()
    multipart(scene / "plain" / "a.exr", ("", colours(rgb)))
    assert icm(src=scene / "plain", out=scene / "expected").exit_code == 0
    assert (read(scene / "out" / "a.png") == read(scene / "expected" / "a.png")).all()
    result = icm(src=scene / "exr", layer="beuaty")
    assert result.exit_code == 1
    assert "has no layer 'beuaty' with R, G and B; expected one of: RGB, beauty" in " ".join(result.stderr.split())


def test_references_have_a_separate_layer_option(icm: Icm, scene: Path) -> None:
    rgb = linear(read(scene / "ref.png")[..., 2::-1])
    ref = multipart(scene / "ref.exr", ("", colours(rgb)))
    multipart(scene / "a.exr", ("", colours(rgb, "beauty.")))
    failed = icm(src=scene / "a.exr", ref=ref, layer="beauty")
    assert failed.exit_code == 2
    assert "reference or mask cannot be used" in failed.stderr
    assert "expected one of: RGB; give one with --layer, for references with --ref-layer" in failed.stderr
    assert icm(src=scene / "a.exr", ref=ref, layer="beauty", ref_layer="RGB").exit_code == 0
