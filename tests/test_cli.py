"""The command's surface: help, version, and what it may not import."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from typer.testing import CliRunner

from icm_cli.cli import app
from icm_cli.config import preset_paths

ROOT = Path(__file__).parent.parent


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from icm_cli.cli import app\n"
        "try: app(['matte', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'diffusers', 'cv2', 'numpy', 'PIL', 'transformers', 'pymatting'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_version_names_the_devices() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert result.exit_code == 0
    assert re.match(r"icm \d+\.\d+\.\d+ \(torch .*\); devices: .*cpu", result.output)


def test_every_option_of_the_command_is_a_parameter_of_the_api() -> None:
    import inspect

    from icm_cli.cli import matte as command
    from icm_cli.matting import matte as api

    only_of_the_terminal = {"quiet", "verbose"}
    assert set(inspect.signature(command).parameters) - only_of_the_terminal == set(
        inspect.signature(api).parameters
    ) - {"listener"}


def test_readme_has_every_option() -> None:
    import inspect

    from icm_cli.cli import matte as command

    readme = (ROOT / "README.md").read_text()
    for name in inspect.signature(command).parameters:
        assert f"`--{name.replace('_', '-')}" in readme, name


def test_presets_are_found() -> None:
    assert set(preset_paths()) == {"lite", "icm-sd21", "sd21-training-free"}


def test_ci_runs_the_readmes_test_command() -> None:
    command = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.endswith(".venv/bin/pytest"))
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()
