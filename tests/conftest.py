"""Fixtures and helpers of many tests: a small scene, a small model, and commands."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import cv2
import forking
import numpy as np
import pytest
import typer.testing
from click.testing import Result
from hypothesis import settings
from typer.testing import CliRunner

from icm_cli.files.paths import RECORD_FOLDER

if TYPE_CHECKING:
    from torch import nn

    from icm_cli.matting.model_choice import ModelChoice
    from icm_cli.model.contracts import Edges

os.environ["OMP_NUM_THREADS"] = "1"  # waiting OpenMP threads use CPU time
settings.register_profile("icm", settings.default, deadline=None)  # tests do not check durations
settings.load_profile("icm")
if forking.IS_POSSIBLE:
    subprocess.Popen = forking.Popen  # type: ignore[misc]


_skipped_tests: list[str] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        _skipped_tests.append(report.nodeid)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run in CI (environment variable ``CI``) if a test was skipped."""
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if os.environ.get("CI") and _skipped_tests and not is_worker:
        names = "".join(f"\n  {name}" for name in _skipped_tests)
        sys.stderr.write(f"\nskipped tests, which CI does not allow; install what they need:{names}\n")
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True, scope="session")
def _load_once() -> Iterator[None]:
    """Read the pretrained weights of each configuration once per process, and build Typer's
    commands once.

    Every test still gets a model of its own. Making this copy draws the same random numbers as a
    real load, because the initial weights of further components depend on the random state.
    """
    import torch

    from icm_cli.model.lite import efficientnet

    load = efficientnet.EfficientNetLite.load
    build_command = functools.cache(typer.testing._get_command)

    @functools.cache
    def load_from(digest: str, config: Any) -> nn.Module:
        del digest  # only a part of the cache key
        return load(config, None, offline=True, seed=0)

    def load_copy(config: Any, weights: str | None, *, offline: bool, seed: int) -> nn.Module:
        if weights is not None:
            return load(config, weights, offline=offline, seed=seed)
        model = efficientnet.EfficientNetLite(config)  # draws the random numbers that a load draws
        with torch.random.fork_rng(devices=[]):
            digest = efficientnet.EfficientNetLite.weights_digest(config, weights, offline=offline)
            loaded = load_from(digest, config)
        model.load_state_dict(loaded.state_dict())
        return model.eval()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(efficientnet.EfficientNetLite, "load", load_copy)
        patch.setattr(typer.testing, "_get_command", build_command)
        yield


EVAL_NAMES = [f"{group}/{name}" for group in ("a", "b") for name in ("brickwall", "launchpad", "lawn")]
"""Names of the images in the folder dataset of the tests of ``icm eval``, in groups a and b."""
COMPOSITES = Path(__file__).parent / "composites"
"""Folder of a reference, its mask, and composites of its object with exact alphas."""
TINY_HEAD: dict[str, Any] = {
    "feature_channels": (6,),
    "width": 8,
    "context_width": 16,
    "context_layers": 1,
    "fused_channels": 16,
    "skip_channels": (6,),
    "decoder_channels": (8,),
}
"""Settings of a tiny token-match head."""

SMALL_MODEL = """
backbone: {name: efficientnet-lite, long_side_px: 160}
head: {name: training-free, solve_long_side_px: 128}
"""


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    """Configuration of a small model that needs no files."""
    path = tmp_path / "small.yaml"
    path.write_text(SMALL_MODEL)
    return path


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    """A folder with ref.png, mask.png and three composites in imgs/, one of them in a subfolder."""
    folder = tmp_path / "scene"
    (folder / "imgs" / "sub").mkdir(parents=True)
    shrink(COMPOSITES / "ref.jpg", folder / "ref.png", 200)
    shrink(COMPOSITES / "mask.png", folder / "mask.png", 200)
    shrink(COMPOSITES / "imgs" / "brickwall.jpg", folder / "imgs" / "wall.jpg", 160)
    shrink(COMPOSITES / "imgs" / "launchpad.jpg", folder / "imgs" / "pad.0101.png", 200)
    shrink(COMPOSITES / "imgs" / "deepfield.jpg", folder / "imgs" / "sub" / "deep.png", 160)
    return folder


def shrink(source: Path, target: Path, long_side: int) -> None:
    """Write a copy of an image with this long side."""
    image = cv2.imread(str(source), cv2.IMREAD_UNCHANGED)
    scale = long_side / max(image.shape[:2])
    cv2.imwrite(str(target), cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA))


def model_choice(model: str | None = None, batch_size: int | Literal["auto"] = 1, **options: Any) -> ModelChoice:
    """Return the model choice that these command-line options make, on the CPU and offline."""
    from icm_cli.matting.model_choice import ModelChoice
    from icm_cli.options import LoadOptions

    values = {"model": model, "device": "cpu", "offline": True, **options}
    return ModelChoice.from_options(LoadOptions.from_values(values).model, batch_size)


Icm = Callable[..., Result]


@pytest.fixture
def icm(scene: Path, small_model: Path) -> Icm:
    """A function that runs the command ``icm matte`` on the scene.

    Keyword arguments replace or add options.
    """

    def run(*flags: str, **options: str | Path | Sequence[str | Path] | None) -> Result:
        from icm_cli.cli import app

        given: dict[str, object] = {
            "ref": scene / "ref.png",
            "mask": scene / "mask.png",
            "src": scene / "imgs",
            "out": scene / "out",
            "model": small_model,
            "device": "cpu",
            **options,
        }
        return CliRunner().invoke(app, ["matte", *arguments(given), *flags], catch_exceptions=False)

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder dataset with groups a and b, each of three composites with exact alphas."""
    for name in EVAL_NAMES:
        for kind, source, suffix in (("images", "imgs", ".jpg"), ("alphas", "alphas", ".png")):
            target = tmp_path / "data" / kind / f"{name}{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shrink(COMPOSITES / source / f"{Path(name).name}{suffix}", target, 160 if name < "b" else 120)
    return tmp_path / "data"


@pytest.fixture
def evaluate(data: Path, small_model: Path) -> Icm:
    """A function that runs the command ``icm eval`` on the folder dataset.

    Keyword arguments replace or add options; None removes an option.
    """

    def run(*flags: str, **options: str | int | Path | Sequence[str | Path] | None) -> Result:
        from icm_cli.cli import app

        given: dict[str, object] = {"dataset": "folder", "data_root": data, **options}
        if "pred" not in options and "compare" not in options:
            given = {"model": small_model, "device": "cpu", **given}
        return CliRunner().invoke(app, ["eval", *arguments(given), *flags], catch_exceptions=False)

    return run


def arguments(options: dict[str, object]) -> list[str]:
    """Return the command-line arguments for these options. Lists give an option several times."""
    line: list[str] = []
    for name, value in options.items():
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is not None:
                line += [f"--{name.replace('_', '-')}", str(one)]
    return line


def alphas(folder: Path) -> dict[str, bytes]:
    """Return the contents of all files in an output folder by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in output_files(folder)}


def output_files(folder: Path) -> list[Path]:
    """Return the files in an output folder without the record of the run."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and RECORD_FOLDER not in path.parts]


def read(path: Path) -> np.ndarray:
    """Read an image file with its stored values."""
    return cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)


def copy_many(source: Path, folder: Path, count: int) -> None:
    """Write ``count`` numbered copies of a file."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        shutil.copy(source, folder / f"{number:04d}{source.suffix}")


def refine_alpha(edges: Edges, rgb: np.ndarray, coarse: np.ndarray) -> np.ndarray:
    """Return the alpha of one image, refined by ``edges``, which takes batches of tensors."""
    import torch

    (alpha,) = edges.refine_alphas([rgb], [torch.from_numpy(coarse)])
    assert alpha.dtype == torch.float32
    return alpha.numpy()
