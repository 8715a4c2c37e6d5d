"""Every option of every command refuses values that it cannot use, with one message and exit code 2."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
from conftest import Icm
from typer.testing import CliRunner

from icm_cli.cli import app
from icm_cli.options import EvaluateOptions, MatteOptions, TrainOptions
from icm_cli.options.definition import CommandOptions, OptionField

NOT_NUMBERS = ["", " ", "{}", "%s", "[/red]", "²", "٣", "nan", "-inf", "1e400", "1_0", "0x10", "9" * 5000, "\udcff"]
HOSTILE = ["", " ", "a" * 300, "x" * 100_000, "{}", "{0.__class__:04d}%s%(x)d", "[/red][bold]", "²", "a\nb", "\udcff"]
LIBRARY_WORDING = r"Errno|codec|Traceback|Invalid value|could not|invalid literal|Input should|argument type"
BASE: dict[str, tuple[type[CommandOptions], str]] = {
    "matte": (MatteOptions, "--ref ref.png --mask mask.png --src imgs --out out --device cpu --dry-run --quiet"),
    "eval": (EvaluateOptions, "--dataset folder --images none --alphas none --device cpu"),
    "train": (TrainOptions, "--config lite --set data.sources=[{'images':none,'alphas':none}] --device cpu"),
}
FIELDS = [(command, field) for command, (options, _) in BASE.items() for field in options.option_fields()]


NUMBERS_AND_CHOICES = [
    (command, field)
    for command, field in FIELDS
    if field.choices or {int, float} & {field.value_type, *get_args(field.value_type)}
]


def run(command: str, field: OptionField, values: Sequence[str]) -> tuple[int, str]:
    """Run a command with these values of an option. Return the exit code and stderr."""
    line = BASE[command][1].split()
    if field.flag in line and not field.is_repeatable:
        start = line.index(field.flag)
        del line[start : start + 2]
    result = CliRunner().invoke(app, [command, *line, field.flag, *values])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    ("command", "field"), NUMBERS_AND_CHOICES, ids=[f"{command}{field.flag}" for command, field in NUMBERS_AND_CHOICES]
)
def test_only_numbers_and_choices_are_accepted(command: str, field: OptionField) -> None:
    for value in [*NOT_NUMBERS, "-31", "99999999999999999999"]:
        code, message = run(command, field, [value])
        assert code == 2, message
        assert message.startswith(f"icm: {field.flag} is "), message
        assert "; expected " in message
        assert len(message) < 1000
        assert message.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("command", "field"), FIELDS, ids=[f"{command}{field.flag}" for command, field in FIELDS])
def test_hostile_texts_and_paths_give_one_message(
    scene: Path, monkeypatch: pytest.MonkeyPatch, command: str, field: OptionField
) -> None:
    monkeypatch.chdir(scene)
    is_flag, is_pair = field.value_type is bool, field.name == "compare"
    allowed = {0, 2, 3} if field.name in ("checkpoint", "weights", "edges_weights") else {0, 2}
    for value in HOSTILE:
        code, message = run(command, field, [value, value] if is_pair else [value])
        assert code in allowed, message
        assert message.count("\n") == (code != 0), message
        assert not re.search(LIBRARY_WORDING, message)
        assert code == 2 or not is_flag


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("matte", "missing options: --ref, --src, --out; see icm matte --help"),
        ("matte --ref a --src b", "missing option: --out; see icm matte --help"),
        ("matte --ref", "option '--ref' requires an argument; see icm matte --help"),
        ("matte --bogus", "no such option: --bogus"),
        ("matte --shot=yes", "option '--shot' does not take a value; see icm matte --help"),
        ("matte --ref a --src b --out c -q -v", "--quiet prints errors only and --verbose prints details"),
        ("matte --ref a --src b c d --out e", "unexpected words: c d; quote globs"),
        (
            "matte --ref a --point 640 360",
            "unexpected words: 360; write coordinates as one word, such as --point 640,360",
        ),
        ("matte --ref a --src b --src c --out d", "--src is given 2 times, but takes one value; give one folder"),
        ("matte --list-models all", "unexpected words: all; quote globs"),
        ("bogus", "no such command 'bogus'; see icm --help"),
        ("--install-completion fish", "--install-completion exits at once, so 'fish' has no effect; remove it"),
        ("--version matte", "--version exits at once, so 'matte' has no effect; remove it"),
    ],
)
def test_wrong_command_line_gives_one_message(line: str, message: str) -> None:
    result = CliRunner().invoke(app, line.split(), prog_name="icm")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"icm: {message}")
    assert result.stderr.count("\n") == 1
    assert not result.stdout


def test_reports_state_every_option_that_decides_outputs(icm: Icm, evaluate: Icm, tmp_path: Path) -> None:
    assert icm("--invert", depth="16", exclude=["a", "b"], report=tmp_path / "matte.json").exit_code == 0
    assert evaluate(report=tmp_path / "eval.json").exit_code == 0
    for options, path in ((MatteOptions, "matte.json"), (EvaluateOptions, "eval.json")):
        settings = json.loads((tmp_path / path).read_text())["settings"]
        stated = {field.name for field in options.api_fields() if field.group != "reports" or field.properties.digest}
        assert stated <= set(settings)
    settings = json.loads((tmp_path / "matte.json").read_text())["settings"]
    assert (settings["invert"], settings["depth"], settings["format"]) == (True, "16", "png")
    assert (settings["exclude"], settings["mask_label"], settings["trimap_band"]) == (["a", "b"], None, 10)
