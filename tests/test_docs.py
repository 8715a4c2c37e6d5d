"""The documentation: its examples run, its links lead to files, its pages are short and wrapped."""

from __future__ import annotations

import contextlib
import doctest
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import read

import icm_cli
from icm_cli.images.colour import ColourSettings
from icm_cli.options import EvaluateOptions, MatteOptions, ReviewOptions, TrainOptions

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"]
PAGES += [f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md"))]
GENERATED = {"docs/options.md"}
MAX_BYTES = 12_000
MAX_COLUMNS = 100
FLAGS_OF_COMMANDS = {
    "--version",
    "--help",
    "--install-completion",
    "--list-models",
    "--quiet",
    "--verbose",
    "--progress",
}
FLAGS_OF_COMMANDS |= {"--compare", "--set"}
FLAGS_OF_OTHER_TOOLS = set(
    [
        "--local-dir",
        "--nproc-per-node",
        "--step",
        "--folder",
        "--no-deps",
        "--no-build-isolation",
        "--px",
        "--shard-mb",
        "--start",
        "--seconds",
        "--objects",
        "--job-name",
        "--array",
        "--gres",
        "--requeue",
        "--signal",
        "--every",
        "--write",
    ]
)


def prose_lines(text: str) -> list[str]:
    """Return the lines outside of code blocks, tables, images and quoted links."""
    without_code = re.sub(r"^```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for line in without_code.splitlines() if not line.startswith(("|", "!", "["))]


@pytest.mark.slow
def test_python_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        outcome = doctest.testfile(str(ROOT / "docs" / "python.md"), module_relative=False, encoding="utf-8")
    assert outcome.attempted >= 18
    assert not outcome.failed, output.getvalue()


@pytest.mark.slow
def test_docstring_examples_of_the_api_run(scene: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the examples in a folder with a reference, its mask and images."""
    monkeypatch.chdir(scene)
    rgb = read(scene / "ref.png")[..., ::-1].copy()
    names = {"icm_cli": icm_cli, "reference_rgb": rgb, "rgb": rgb, "mask": read(scene / "mask.png")}
    for function in (icm_cli.matte, icm_cli.evaluate, icm_cli.load):
        test = doctest.DocTestParser().get_doctest(function.__doc__, names, function.__name__, None, 0)
        assert test.examples
        assert not doctest.DocTestRunner().run(test).failed


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", path.read_text()):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED])
def test_pages_are_short_and_wrapped(page: str) -> None:
    text = (ROOT / page).read_text()
    assert len(text.encode()) <= MAX_BYTES
    assert not [line for line in prose_lines(text) if len(line) > MAX_COLUMNS]


def test_every_page_is_linked_from_readme() -> None:
    text = (ROOT / "README.md").read_text()
    for page in PAGES:
        assert page == "README.md" or f"]({page})" in text, page


def test_every_module_is_in_the_file_map() -> None:
    """Every module is named in docs/files.md, and every file that it names exists.

    Below a heading such as "icm_cli/images/", the first name of a row is relative to that folder, and
    the others to the folder of the first.
    """
    text = (ROOT / "docs" / "files.md").read_text()
    package = ROOT / "icm_cli"
    modules = {path for path in package.rglob("*.py") if path.name != "__init__.py"}
    named = set()
    for section in text.split("\n## ")[1:]:
        heading, *lines = section.splitlines()
        folder = ROOT / (re.findall(r"`([\w./]+)`", heading) or ["docs/"])[0]
        for line in lines:
            if line.startswith("| `"):
                first, *others = re.findall(r"`([\w./-]+)`", line.split("|")[1])
                paths = [folder / first, *((folder / first).parent / name for name in others)]
                assert all(path.exists() for path in paths), paths
                named |= {path.resolve() for path in paths}
    assert modules <= named, sorted(str(path.relative_to(package)) for path in modules - named)


def test_docs_explain_every_reason() -> None:
    from icm_cli.quality import batch, estimate

    constants = estimate.NOTHING_FOUND, estimate.MARKED_BUT_EMPTY, estimate.NOT_THE_SAME, estimate.MAYBE_ANOTHER
    reasons = {*constants, *json.loads(estimate.WEIGHTS_PATH.read_text())["reasons"], batch.JUMP}
    reasons |= {f"{measure} unlike the others" for measure in batch.MIN_STD}
    text = (ROOT / "docs" / "quality.md").read_text()
    table = "".join(line.split("|")[1] for line in text.split("## Reasons")[1].splitlines() if line.startswith("| `"))
    assert set(re.findall("`([^`]+)`", table)) == reasons


def test_help_and_docs_name_every_dataset() -> None:
    from icm_cli.datasets.registry import DATASETS

    field = next(each for each in EvaluateOptions.option_fields() if each.name == "dataset")
    text = (ROOT / "docs" / "evaluate.md").read_text()
    assert set(field.choices) == set(DATASETS)
    for name in DATASETS:
        assert f"`{name}`" in text


def test_the_docs_name_colour_spaces_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OCIO", raising=False)
    page = (ROOT / "docs" / "images.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| `--colorspace`"))
    names = re.findall("`([^`]+)`", row.split("|")[2])
    assert len(names) >= 5
    names += re.findall(r'--colorspace "?([^"\n]+?)(?:"| --)', page)
    for name in names:
        ColourSettings(space=name).validate()  # raises UsageError for an unknown name


def test_the_docs_name_every_kind_of_bad_data() -> None:
    from icm_cli.errors import PROBLEM_KINDS

    text = (ROOT / "docs" / "evaluate.md").read_text()
    for kind, meaning in PROBLEM_KINDS.items():
        assert f"| `{kind}` | {meaning} |" in text


def test_ci_runs_the_readmes_test_command() -> None:
    command = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.endswith(".venv/bin/pytest"))
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED])
def test_pages_name_only_existing_options(page: str) -> None:
    known = FLAGS_OF_COMMANDS | FLAGS_OF_OTHER_TOOLS
    for options in (MatteOptions, EvaluateOptions, ReviewOptions, TrainOptions):
        known |= {f"--{field.name.rstrip('_').replace('_', '-')}" for field in options.option_fields()}
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", (ROOT / page).read_text()))
    assert named <= known, sorted(named - known)


@pytest.mark.slow
def test_commands_of_the_guide_fix_an_alpha(tmp_path: Path) -> None:
    """The antenna of the car is missing after the first command, and there after the last one."""
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    commands = re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs" / "guide.md").read_text(), re.MULTILINE | re.DOTALL)
    top_of_antenna, found = np.s_[150:220, 270:292], []
    for command in commands:
        script = f'set -e\nicm() {{ "{sys.executable}" -m icm_cli "$@"; }}\n{command}'
        run = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        found.append([read(tmp_path / "alphas" / f"{name}.png") for name in ("street", "carpet")])
    (before, other), _, (after, same_other) = found
    assert (before[top_of_antenna] > 127).sum() < 0.3 * (after[top_of_antenna] > 127).sum()
    assert (after[top_of_antenna] > 127).any(axis=1).mean() > 0.9
    assert (other == same_other).all()
    assert "kept         1" in run.stdout + run.stderr
