"""The digest of an alpha: everything that decides pixels changes it, and nothing else does."""

from __future__ import annotations

import dataclasses
import shutil
import types
import typing
import zipfile
from collections.abc import Iterator
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import pytest
from conftest import arguments, model_choice, read
from PIL import Image
from tiny_hf import write_tiny_dino, write_tiny_vitmatte

from icm_cli.config import ComponentConfig, component_class, load_model_config, preset_paths
from icm_cli.errors import ConfigError
from icm_cli.events import Listener
from icm_cli.guidance.hints import Hints
from icm_cli.matting import digest as digest_module
from icm_cli.matting import model_choice as model_choice_module
from icm_cli.matting.digest import EXCLUDED, alpha_digest, fingerprint_package
from icm_cli.matting.matte import make_plan, run_digest
from icm_cli.matting.model_choice import ModelChoice, sequence_digest_parts
from icm_cli.matting.prompting import MaskMaker
from icm_cli.model import loading
from icm_cli.options import MatteOptions
from icm_cli.options.definition import DigestPart

PACKAGE = Path(digest_module.__file__).parents[1]
COMPONENTS = ("backbone", "head", "objects", "edges")
PASSES = ("second_pass", "match", "guided_filter")


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most weights are not installed; the digest of weights has tests of its own."""
    for kind in ("stable-diffusion", "dinov2-lite", "efficientnet-lite", "dino"):
        monkeypatch.setattr(component_class("backbone", kind), "weights_digest", lambda *_, **__: "weights")
    monkeypatch.setattr(component_class("edges", "vitmatte"), "weights_digest", lambda *_, **__: "weights")
    monkeypatch.setattr(component_class("objects", "mobile-sam"), "weights_digest", lambda *_, **__: "weights")


def model_digest(config: Any) -> str:
    return loading.model_digest(config, checkpoint=None, weights=None, offline=True)


def other_values(value: Any, hint: Any) -> list[Any]:
    """Values of a setting's type other than its own."""
    hints = typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)
    if typing.get_origin(hints[0]) is Literal:
        return [each for each in typing.get_args(hints[0]) if each != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, value * 2, value // 2, value + 32, value + 64]
    if isinstance(value, float):
        return [value + 0.01, value * 0.9, value * 1.1, value + 1e-4]
    if isinstance(value, str):
        return [f"{value}x"]
    if isinstance(value, tuple):
        return [(*value, *value[-1:]), value[:-1], tuple(each + 1 for each in value)]
    return [3, 0.3] if value is None else []


def variations(settings: Any) -> Iterator[tuple[str, list[Any]]]:
    """Every setting of a nested configuration with settings that differ in it alone."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            for name, others in variations(value):
                yield f"{field.name}.{name}", list(replaced(settings, field.name, others))
        else:
            yield field.name, list(replaced(settings, field.name, other_values(value, hints[field.name])))


def replaced(settings: Any, name: str, values: list[Any]) -> Iterator[Any]:
    for value in values:
        try:
            yield dataclasses.replace(settings, **{name: value})
        except (ConfigError, TypeError):  # not every value is allowed
            continue


@pytest.mark.usefixtures("without_weights")
@pytest.mark.parametrize("preset", sorted(preset_paths()))
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_setting_of_every_component_decides(preset: str, component: str) -> None:
    config = load_model_config(preset)
    part: ComponentConfig | None = getattr(config, component)
    if part is None:
        return
    before = model_digest(config)
    for name, others in variations(part.settings):
        assert others, f"no other value is allowed for {component}.{name}"
        other = dataclasses.replace(config, **{component: dataclasses.replace(part, settings=others[0])})
        assert model_digest(other) != before, name


@pytest.mark.usefixtures("without_weights")
@pytest.mark.parametrize("name", PASSES)
def test_every_setting_of_the_passes_decides(name: str) -> None:
    config = load_model_config("lite")
    before = model_digest(config)
    settings = getattr(config, name)
    assert settings is not None
    for setting, others in variations(settings):
        assert others, setting
        assert model_digest(dataclasses.replace(config, **{name: others[0]})) != before, setting


@pytest.mark.parametrize(("name", "part"), [("PropagationConfig", "propagation"), ("FINETUNING", "learn_steps")])
def test_every_setting_of_propagation_and_finetuning_decides(
    monkeypatch: pytest.MonkeyPatch, name: str, part: DigestPart
) -> None:
    settings = getattr(model_choice_module, name)
    settings = settings() if isinstance(settings, type) else settings
    before = sequence_digest_parts(3, is_shot=True)[part]
    for setting, others in variations(settings):
        assert others, setting
        other = others[0] if name == "FINETUNING" else lambda other=others[0]: other
        monkeypatch.setattr(model_choice_module, name, other)
        assert sequence_digest_parts(3, is_shot=True)[part] != before, setting


@pytest.mark.parametrize("component", COMPONENTS[1:])
def test_the_name_of_a_component_decides(component: str) -> None:
    config = load_model_config("lite")
    part = getattr(config, component)
    other = dataclasses.replace(config, **{component: dataclasses.replace(part, name="closed-form")})
    assert model_digest(config) != combined(other)


def combined(config: Any) -> str:
    """Digest of a configuration whose components need no weights."""
    try:
        return model_digest(config)
    except ConfigError:
        return ""


class TestWeights:
    def test_a_checkpoint_decides_by_its_content(self, tmp_path: Path) -> None:
        packed = PACKAGE / "weights" / "lite.safetensors"
        config = load_model_config("lite")
        first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
        shutil.copy(packed, first)
        shutil.copy(packed, second)

        def digest(path: Path) -> str:
            return loading.model_digest(config, checkpoint=path, weights=None, offline=True)

        assert digest(first) == digest(second) == digest(packed)
        with second.open("r+b") as file:
            file.seek(-1, 2)
            last = file.read(1)
            file.seek(-1, 2)
            file.write(bytes([last[0] ^ 1]))
        assert digest(first) != digest(second)

    @pytest.mark.parametrize("component", ["backbone", "objects", "edges"])
    def test_pretrained_weights_of_every_component_decide(
        self, component: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = load_model_config("lite")
        for name in ("backbone", "objects", "edges"):
            monkeypatch.setattr(
                component_class(name, getattr(config, name).name), "weights_digest", lambda *_, **__: "weights"
            )
        before = model_digest(config)
        cls = component_class(component, getattr(config, component).name)
        monkeypatch.setattr(cls, "weights_digest", lambda *_, **__: "other weights")
        assert model_digest(config) != before

    def test_objects_that_a_checkpoint_lacks_are_pretrained_ones(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = load_model_config("lite")
        monkeypatch.setattr(loading, "has_component", lambda _, name: name != "objects")
        cls = component_class("objects", config.objects.name)  # type: ignore[union-attr]
        digests = set()
        (tmp_path / "c.safetensors").write_bytes(b"checkpoint")
        for text in ("weights", "other weights"):
            monkeypatch.setattr(cls, "weights_digest", lambda *_, text=text, **__: text)
            path = tmp_path / "c.safetensors"
            digests.add(loading.model_digest(config, checkpoint=path, weights=None, offline=True))
        assert len(digests) == 2


class TestCode:
    @pytest.fixture
    def copy(self, tmp_path: Path) -> Path:
        folder = tmp_path / "code" / "icm_cli"
        shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
        return folder

    def test_the_code_of_every_module_that_decides_pixels_decides(self, copy: Path) -> None:
        before = fingerprint_package(copy)
        assert before == fingerprint_package(PACKAGE)
        changed = set()
        for path in sorted(copy.rglob("*.py")):
            text = path.read_text()
            path.write_text(f"{text}# changed\n")
            if fingerprint_package(copy) != before:
                changed.add(path.relative_to(copy).as_posix())
            path.write_text(text)
        modules = {path.relative_to(copy).as_posix() for path in copy.rglob("*.py")}
        expected = {each for each in modules if each.split("/")[0] in digest_module.FINGERPRINTED} - EXCLUDED
        assert changed == expected
        assert {"model/core.py", "matting/engine.py", "matting/predictor.py", "images/colour.py"} <= changed
        assert {"model/lite/refiner.py", "model/lite/head.py", "guided_filter.py", "geometry.py"} <= changed

    def test_every_excluded_module_exists(self) -> None:
        assert all((PACKAGE / name).is_file() for name in EXCLUDED)

    def test_line_ends_and_zipped_packages_make_no_difference(self, copy: Path, tmp_path: Path) -> None:
        before = fingerprint_package(copy)
        windows = tmp_path / "windows"
        shutil.copytree(copy, windows)
        for path in windows.rglob("*.py"):
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        assert fingerprint_package(windows) == before
        archive = shutil.make_archive(str(tmp_path / "packed"), "zip", copy.parent, copy.name)
        packed: Traversable = zipfile.Path(archive, "icm_cli/")
        assert fingerprint_package(packed) == before

    def test_without_sources_the_version_stands_for_them(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = fingerprint_package(tmp_path)
        monkeypatch.setattr(digest_module, "__version__", "9.9.9")
        assert fingerprint_package(tmp_path) != before

    def test_version_and_code_decide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = alpha_digest({"seed": "0"})
        monkeypatch.setattr(digest_module, "__version__", "9.9.9")
        assert (other := alpha_digest({"seed": "0"})) != before
        monkeypatch.setattr(digest_module, "code_fingerprint", lambda: "other")
        assert alpha_digest({"seed": "0"}) not in (before, other)


class TestOptions:
    """Digests of runs that differ in one option."""

    @pytest.fixture
    def run(self, scene: Path, small_model: Path, tmp_path: Path) -> Any:
        def digest(**options: Any) -> str:
            given = {
                "ref": scene / "ref.png",
                "mask": scene / "mask.png",
                "src": scene / "imgs",
                "out": scene / "out",
                "model": small_model,
                "device": "cpu",
                **options,
            }
            parsed = MatteOptions.from_values(given)
            choice = ModelChoice.from_options(parsed.model, parsed.resources.batch_size)
            plan = make_plan(parsed, Listener())
            return run_digest(parsed, plan.references, plan.output, choice)

        make_files(scene, tmp_path)
        return digest

    def test_every_option_that_decides_pixels_changes_it(
        self, run: Any, scene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(MaskMaker, "make_mask", lambda _, __, hints: mask_of_digest(hints))
        cases = pixel_options(scene, tmp_path)
        marked = {each.name: each.properties.digest for each in MatteOptions.option_fields() if each.properties.digest}
        of_images = {name for name, part in marked.items() if part is DigestPart.IMAGE}
        tested = {"hints", "garbage", "keep"}
        assert of_images == tested, "test_hints.py and test_mattes.py check the digests of single images"
        assert set(cases) == set(marked) - of_images - {"guidance"}  # it changes the mask, see test_stable_diffusion.py
        for name, (base, value) in cases.items():
            before = run(**base)
            assert run(**base) == before, name
            after = run(**{**base, name: value})
            assert after != before, name
            changed = {part.partition("=")[0] for part in {*before.parts.split()} ^ {*after.parts.split()}}
            part = marked[name]
            expected = {name} if part is DigestPart.VALUE else {str(part)}
            if part not in (DigestPart.VALUE, DigestPart.REFERENCES):
                expected.add(f"{part}--{name.replace('_', '-')}")
            assert changed in (expected, {*expected, "references"}), name  # these are read with the same colours

    def test_other_options_do_not_change_it(self, run: Any, scene: Path) -> None:
        before = run()
        others: dict[str, Any] = {
            "include": "*.png",
            "exclude": "*.jpg",
            "name": "{stem}_matte{frame}",
            "keep_suffix": True,
            "overwrite": True,
            "keep_existing": True,
            "batch_size": 3,
            "workers": 1,
            "offline": True,
            "frames": "101",
            "missing": "report",
            "shard": "1/2",
            "fail_fast": True,
            "report": scene / "r.json",
            "contact_sheet": scene / "sheet.png",
            "review_list": scene / "review.txt",
            "review_below": 0.5,
            "save_mask": scene / "made.png",
            "dry_run": True,
            "quiet": True,
            "verbose": True,
            "progress": "json",
            "out": scene / "elsewhere",
            "root": scene,
            "src": scene / "imgs" / "sub",
        }
        for name, value in others.items():
            assert run(**{name: value}) == before, name
        untested = {"device", "ray", "ray_cpus", "gt", "list_models"}
        unmarked = {each.name for each in MatteOptions.option_fields() if not each.properties.digest}
        assert unmarked == set(others) | untested

    def test_every_part_changes_it(self) -> None:
        options = MatteOptions.from_values({"ref": "a", "src": "b", "out": "c"})
        parts = dict.fromkeys(DigestPart, "x")
        before = alpha_digest(options.digest_values(parts))
        for part in set(DigestPart) - {DigestPart.VALUE}:
            assert alpha_digest(options.digest_values({**parts, part: "y"})) != before, part


def mask_of_digest(hints: Hints) -> np.ndarray:
    """Return a mask that differs for different hints, and takes no time."""
    mask = np.zeros(hints.size, np.bool_)
    mask[int(hints.digest[:8], 16) % mask.shape[0], int(hints.digest[8:16], 16) % mask.shape[1]] = True
    return mask


def make_files(scene: Path, folder: Path) -> None:
    """Write references, masks, models and weights for the options."""
    rgb, mask = read(scene / "ref.png")[..., :3], read(scene / "mask.png")
    mask = mask if mask.ndim == 2 else mask[..., 0]
    cv2.imwrite(str(scene / "other.png"), 255 - rgb)
    half = mask.copy()
    half[: half.shape[0] // 2] = 0
    cv2.imwrite(str(scene / "half.png"), half)
    strokes = np.full_like(mask, 128)
    strokes[60:64, 60:90] = 255
    cv2.imwrite(str(scene / "strokes.png"), strokes)
    labels = np.where(mask > 127, np.where(half > 127, 2, 1), 0).astype(np.uint8)
    cv2.imwrite(str(scene / "labels.png"), labels)
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(rgb[..., ::-1]).save(scene / "turned.jpg", exif=exif)
    from test_exr_layers import multipart

    small = cv2.resize(rgb, (64, 48)).astype(np.float32)[..., ::-1] / 255
    channels = {name: np.ascontiguousarray(small[..., index]) for index, name in enumerate("RGB")}
    darker = {f"beauty.{name}": values / 2 for name, values in channels.items()}
    multipart(scene / "layers.exr", ("", {**channels, **darker}))
    cv2.imwrite(str(scene / "small_mask.png"), cv2.resize(mask, (64, 48)))
    for seed in (1, 2):
        write_tiny_vitmatte(folder / f"vitmatte{seed}", seed=seed)
        write_tiny_dino(folder / f"dino{seed}", seed=seed)
    (folder / "dino.yaml").write_text(
        "backbone: {name: dino, weights: none, patch_px: 14, long_side_px: 112, layers: [3]}\n"
        "head: {name: training-free, solve_long_side_px: 64}\n"
    )
    packed = PACKAGE / "weights" / "lite.safetensors"
    shutil.copy(packed, folder / "other.safetensors")
    with (folder / "other.safetensors").open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\1")


def pixel_options(scene: Path, folder: Path) -> dict[str, tuple[dict[str, Any], Any]]:
    """For every option that decides pixels: other options of both runs, and another value."""
    exr = {"ref": scene / "layers.exr", "mask": scene / "small_mask.png"}
    turned = {"ref": scene / "turned.jpg", "mask_orientation": "upright"}
    return {
        "ref": ({}, scene / "other.png"),
        "mask": ({}, scene / "half.png"),
        "point": ({"mask": None, "point": (100, 150)}, (100, 60)),
        "not_point": ({"mask": None, "point": (100, 150)}, (10, 10)),
        "box": ({"mask": None, "box": (10, 10, 90, 90)}, (10, 10, 90, 91)),
        "scribble": ({"mask": None, "point": (100, 150)}, scene / "strokes.png"),
        "not_ref": ({}, scene / "other.png"),
        "not_mask": ({"not_ref": scene / "other.png"}, scene / "half.png"),
        "mask_label": ({"mask": scene / "labels.png", "mask_label": "1"}, "2"),
        "mask_orientation": (turned, "stored"),
        "ref_colorspace": (exr, "ACEScg"),
        "ref_layer": (exr, "beauty"),
        "model": ({}, "lite-training-free"),
        "checkpoint": ({"model": "lite"}, folder / "other.safetensors"),
        "weights": ({"model": folder / "dino.yaml", "weights": folder / "dino1"}, folder / "dino2"),
        "match": ({"model": "lite"}, "same"),
        "min_similarity": ({"model": "lite", "match": "same"}, 0.5),
        "edges": ({}, "closed-form"),
        "edges_weights": ({"edges": "vitmatte", "edges_weights": folder / "vitmatte1"}, folder / "vitmatte2"),
        "dtype": ({}, "bfloat16"),
        "seed": ({}, 1),
        "colorspace": ({}, "ACEScg"),
        "layer": ({}, "beauty"),
        "ocio": ({}, "ocio://cg-config-latest"),
        "view": ({}, "Raw"),
        "exposure": ({}, 1.0),
        "white": ({}, 255.0),
        "format": ({}, "exr"),
        "depth": ({}, "16"),
        "channel": ({"format": "exr"}, "matte"),
        "foreground": ({}, "straight"),
        "invert": ({}, True),
        "trimap": ({}, "also"),
        "trimap_band": ({"trimap": "also"}, 5),
        "shot": ({}, True),
        "learn_steps": ({"model": "lite"}, 3),
    }


def test_the_device_does_not_decide_but_its_dtype(scene: Path) -> None:
    del scene
    one, other = model_choice("lite-training-free"), model_choice("lite-training-free", dtype="bfloat16")
    assert one.digest_parts() == model_choice("lite-training-free", "auto").digest_parts()
    assert one.digest_parts()[DigestPart.DTYPE] != other.digest_parts()[DigestPart.DTYPE]
    assert arguments({"device": "cpu"}) == ["--device", "cpu"]
