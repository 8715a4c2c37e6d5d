"""The command line: help, version, options and imports."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.text import Text
from typer.testing import CliRunner

import icm_cli
from icm_cli.cli import app
from icm_cli.config import preset_paths
from icm_cli.errors import UsageError
from icm_cli.options import EvaluateOptions, LoadOptions, MatteOptions, TrainOptions
from icm_cli.options.__main__ import generated_files
from icm_cli.options.definition import CommandOptions

ROOT = Path(__file__).parent.parent


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys; from icm_cli.cli import app\nfor command in ('matte', 'eval', 'train'):\n    "
        "try: app([command, '--help'])\n    except SystemExit: pass\nheavy = {'torch', "
        "'diffusers', 'cv2', 'numpy', 'PIL', 'transformers', 'pymatting'} & "
        "set(sys.modules)\nsys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("arguments", [[], ["matte"], ["--progress"], ["matte", "--progress"]])
def test_incomplete_command_line_is_wrong_usage(arguments: list[str]) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "icm_cli.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert "Usage:" in ended.stdout or ended.stderr.startswith("icm: ")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("missing", ["accelerate", "tensorboard"])
def test_missing_training_packages_are_reported(missing: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\nfrom icm_cli.cli import app\napp(['train', '--config', 'lite'])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 3
    assert ended.stderr == (
        f"icm: icm train needs {missing}, which is not installed; run: pip install 'icm-cli[train]'\n"
    )


def test_version_names_the_devices() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert re.match(r"icm \d+\.\d+\.\d+ \(torch .*\); devices: .*cpu", result.output)


COMMANDS: dict[str, type[CommandOptions]] = {"matte": MatteOptions, "eval": EvaluateOptions, "train": TrainOptions}
FUNCTIONS = {
    "matte": (MatteOptions, {"listener"}),
    "evaluate": (EvaluateOptions, {"listener", "predictor"}),
    "train": (TrainOptions, {"listener"}),
    "load": (LoadOptions, set()),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_has_every_option_of_its_definition(name: str) -> None:
    parameters = typer.main.get_command(app).commands[name].params
    defined = {each.name: each.properties for each in COMMANDS[name].option_fields()}
    assert {each.name for each in parameters} - {"help"} == set(defined)
    for parameter in parameters:
        if parameter.name in defined:
            assert parameter.help == defined[parameter.name].help


@pytest.mark.parametrize("name", FUNCTIONS)
def test_api_function_has_every_option_as_an_argument(name: str) -> None:
    options, others = FUNCTIONS[name]
    parameters = inspect.signature(getattr(icm_cli, name)).parameters
    fields = {each.name: each for each in options.option_fields() if each.properties.is_in_api}
    assert set(parameters) == set(fields) | others
    for argument, field in fields.items():
        assert parameters[argument].default == (inspect.Parameter.empty if field.is_required else field.default)


def test_generated_files_are_up_to_date() -> None:
    for path, text in generated_files().items():
        assert path.read_text() == text, f"{path}: run python -m icm_cli.options --write"


def test_no_option_is_defined_twice() -> None:
    """Options of several commands have one definition, unless their meaning differs."""
    others = {"device", "checkpoint", "out", "workers", "references", "shot"}
    found: dict[str, set[str]] = {}
    for options in COMMANDS.values():
        for each in options.option_fields():
            found.setdefault(each.name, set()).add(each.properties.help)
    assert {name for name, texts in found.items() if len(texts) > 1} <= others


def test_panels_are_ordered_and_begin_with_the_everyday_options() -> None:
    shown = CliRunner().invoke(app, ["matte", "--help"], env={"COLUMNS": "200"}).output
    titles = ["Options", "References", "Sources", "Output", "Model and device", "Colour", "Sequences and farms"]
    places = [shown.index(f"─ {title} ─") for title in [*titles, "Reports", "Display"]]
    assert places == sorted(places)
    everyday = [each.name for each in MatteOptions.option_fields() if each.panel == "Options"]
    assert everyday == ["ref", "mask", "src", "out", "model"]
    flags = re.findall(r"--[a-z-]+", shown[: places[1]])
    assert [flag for flag in dict.fromkeys(flags) if flag[2:] in everyday] == [f"--{name}" for name in everyday]


@pytest.mark.parametrize(
    ("words", "expected"), [("--missing ", "report"), ("--model li", "lite"), ("--for", "--format")]
)
def test_shells_complete_options_and_their_choices(words: str, expected: str) -> None:
    line = f"icm matte {words}"
    environment = {"_ICM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(line.split(" ")) - 1)}
    result = CliRunner().invoke(app, [], env=environment, prog_name="icm")
    assert expected in result.output.split()


def test_completion_can_be_installed() -> None:
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size= is 0; expected auto, or a whole number from 1 to 1024"),
        ({"batch_size": "many"}, "batch_size= is 'many'; expected auto, or a whole number from 1 to 1024"),
        ({"workers": True}, "workers= is True; expected a whole number from 1 to 256"),
        ({"exposure": float("nan")}, "exposure= is nan; expected a number from -30 to 30"),
        ({"trimap_band": 0}, "trimap_band= is 0; expected a whole number from 1 to 10000"),
        ({"trimap_band": "3"}, "trimap_band= is '3'; expected a whole number from 1 to 10000"),
        ({"depth": 12}, "depth= is 12; expected 8, 16, half or float"),
        ({"depth": 8.0}, "depth= is 8.0; expected 8, 16, half or float"),
        ({"format": "jpg"}, "format= is 'jpg'; expected png, tiff or exr"),
        ({"dtype": "flaot16"}, "dtype= is 'flaot16'; expected auto, float32, float16 or bfloat16"),
        ({"device": "gpu"}, "device= is 'gpu'; expected auto, cpu, cuda, cuda:N, cuda:all or mps, or several"),
        ({"shot": "yes"}, "shot= is 'yes'; expected True or False"),
        ({"name": 3}, "name= is 3; expected text of 1 to 4096"),
        ({"point": "100,200"}, "point= is '100,200'; expected the tuple (100.0, 200.0) instead of text"),
        ({"point": "100"}, "point= is '100'; expected x and y in pixels, such as 640,360"),
        ({"ref": None}, "ref= is None; expected a path"),
        ({"overwrite": True, "keep_existing": True}, "give only one of the two"),
        ({"out": ""}, "out= is ''; expected a path"),
        ({"channel": ""}, "channel= is ''; expected text of 1 to 4096 printable characters"),
    ],
)
def test_values_are_checked_before_anything_else(options: dict[str, object], message: str) -> None:
    given = {"ref": "ref.png", "src": "imgs", "out": "out", **options}
    with pytest.raises(UsageError, match=re.escape(message)):
        icm_cli.matte(**given)


def test_single_values_are_lists_and_none_is_the_default() -> None:
    options = MatteOptions.from_values(
        {"ref": "a.png", "src": Path("imgs"), "out": "out", "include": "*.jpg", "exclude": None, "missing": None}
    )
    assert options.references.ref == (Path("a.png"),)
    assert options.sources.src == "imgs"
    assert (options.sources.include, options.sources.exclude) == (("*.jpg",), ())
    assert options.sequences.missing == "skip"
    assert options.given == {"ref", "src", "out", "include"}


def test_unknown_argument_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="mask_lable"):
        icm_cli.matte("ref.png", "m.png", src="imgs", out="out", mask_lable="1")


def test_help_text_is_not_interpreted_as_markup() -> None:
    for command in typer.main.get_command(app).commands.values():
        for text in (command.help, *(getattr(option, "help", None) for option in command.params)):
            assert Text.from_markup(text or "").plain == (text or "")


def listed(**environment: str) -> dict[str, tuple[str, str]]:
    """Models are listed with state and requirements, without torch, --ref and --src."""
    code = (
        "import sys; from icm_cli.cli import app\n"
        "try: app(['matte', '--list-models'])\n"
        "except SystemExit as ended: assert not ended.code\n"
        "sys.exit('imported torch' if 'torch' in sys.modules else 0)"
    )
    everything = {**os.environ, **environment}
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=everything)
    assert ended.returncode == 0, ended.stderr
    lines = ended.stdout.splitlines()
    states = [line.split(": ", 1) for line in lines[::2]]
    return {name: (state, needs.strip()) for (name, state), needs in zip(states, lines[1::2], strict=True)}


def test_models_are_listed_with_their_state(tmp_path: Path) -> None:
    """A repository in the cache of the hub is available."""
    models = listed(HF_HOME=str(tmp_path))
    assert set(models) == {*preset_paths(), "any, with --edges vitmatte"}
    assert models["lite"] == ("available", "needs nothing; 55 MB, in the package; MIT and Apache-2.0")
    assert models["lite-training-free"][0] == "available"
    vitmatte = "hustvl/vitmatte-small-composition-1k"
    assert models["dinov2-vitmatte"] == (
        f"missing: facebook/dinov2-large, {vitmatte}",
        f"needs facebook/dinov2-large + {vitmatte}; 1.3 GB; Apache-2.0",
    )
    assert "-lvd1689m (gated: accept the licence first) + hustvl" in models["dinov3-vitmatte"][1]
    assert models["dinov3-vitmatte"][1].endswith("; 1.3 GB; DINOv3 License, Apache-2.0")
    assert models["icm-sd21"][0].endswith(", --checkpoint FILE")
    assert models["sd21-training-free"][1].endswith("; 5.2 GB; CreativeML Open RAIL++-M")
    snapshot = tmp_path / "hub" / "models--facebook--dinov2-large" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("abc")
    for name in ("config.json", "model.safetensors"):
        (snapshot / name).write_text("{}")
    assert listed(HF_HOME=str(tmp_path))["dinov2-vitmatte"][0] == f"missing: {vitmatte}"


@pytest.mark.parametrize("preset", ["dinov2-vitmatte", "dinov3-vitmatte"])
def test_missing_weights_of_a_preset_say_what_to_download(
    scene: Path, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    options = [
        "--ref",
        scene / "ref.png",
        "--mask",
        scene / "mask.png",
        "--src",
        scene / "imgs",
        "--out",
        tmp_path / "o",
    ]
    line = ["matte", *map(str, options), "--model", preset, "--offline", "--device", "cpu"]
    ended = CliRunner().invoke(app, line)
    assert ended.exit_code == 3
    assert ended.stderr.count("\n") == 1
    assert f"hf download facebook/{preset[:6]}" in ended.stderr
    assert ("accept their licence (DINOv3 License)" in ended.stderr) == (preset == "dinov3-vitmatte")


def test_presets_are_found() -> None:
    matched = {"lite", "lite-training-free", "icm-sd21", "sd21-training-free", "dinov2-vitmatte", "dinov3-vitmatte"}
    assert set(preset_paths()) == matched


@pytest.mark.slow
@pytest.mark.parametrize("silenced", [">&- 2>&-", ">/dev/full", "2>&1 | head -1"], ids=lambda text: text)
def test_unwritable_log_does_not_affect_images(scene: Path, small_model: Path, silenced: str) -> None:
    options = f"--ref ref.png --mask mask.png --src imgs --out out --model {small_model} --device cpu"
    line = f"{sys.executable} -m icm_cli.cli matte {options} {silenced}"
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", line], cwd=scene, capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert len(list((scene / "out").rglob("*.png"))) == 3


def test_characters_that_a_stream_cannot_encode_are_escaped(tmp_path: Path) -> None:
    from icm_cli.terminal import write_line

    for encoding, shown in (("ascii", "\\xe9 \\x1b[2J \\udcff"), ("utf-8", "é \\x1b[2J \\udcff")):
        with (tmp_path / encoding).open("w", encoding=encoding) as stream:
            write_line(stream, "é \x1b[2J \udcff")
        assert (tmp_path / encoding).read_text(encoding=encoding) == f"{shown}\n"


VALUES = {
    **dict.fromkeys(
        ("--rounds", "--refs-per-group", "--trimap-kernel", "--batch-size", "--seed", "--workers", "--learn-steps"), "2"
    ),
    **{"--region": "whole", "--size": "original", "--metric-variant": "aim", "--split": "test", "--dtype": "auto"},
    **{"--edges": "vitmatte", "--match": "kind", "--min-similarity": "0.5"},
    **{"--device": "auto", "--allow": "empty-alpha", "--dataset": "folder"},
}
FLAGS = {"--video", "--offline", "--quiet", "--shot"}


EVALUATE_OPTIONS = {each.name: each.flag for each in EvaluateOptions.option_fields()}


def refused(line: list[str], option: str) -> bool:
    given = [option] if option in FLAGS else [option, VALUES.get(option, "x.json")]
    result = CliRunner().invoke(app, [*line, *given])
    return result.exit_code == 2 and result.stderr.strip().endswith(f"so {option} has no effect; remove it")


@pytest.mark.parametrize("option", sorted(set(EVALUATE_OPTIONS.values()) - {"--compare", "--verbose"}))
def test_compare_refuses_other_options(option: str) -> None:
    assert refused(["eval", "--compare", "a.json", "b.json"], option)


@pytest.mark.parametrize("name", EvaluateOptions.matting_names())
def test_predictions_refuse_model_options(name: str) -> None:
    assert refused(["eval", "--dataset", "folder", "--pred", "alphas"], EVALUATE_OPTIONS[name])


def test_eval_options_declare_whether_a_model_uses_them() -> None:
    """Every option declares whether a model uses it. The options listed here also apply to
    --pred."""
    read = {"dataset", "data_root", "images", "alphas", "trimaps", "groups", "backgrounds", "split", "video", "pred"}
    read |= {"references", "rounds", "region", "size", "metric_variant", "trimap_kernel"}
    read |= {"workers", "note", "report", "allow", "quiet", "verbose", "compare"}
    assert set(EVALUATE_OPTIONS) - read == set(EvaluateOptions.matting_names())


@pytest.mark.parametrize("option", ["--resume", "--pack"])
def test_preview_refuses_options_of_a_run(option: str) -> None:
    line = ["train", "--config", "lite", "--preview", "2", *([option] if option == "--resume" else [option, "x"])]
    result = CliRunner().invoke(app, line)
    assert result.exit_code == 2
    assert f"so {option} has no effect" in result.stderr
