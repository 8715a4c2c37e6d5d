"""The Python API: checks of arrays and arguments, and what it leaves as it was in the host program."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import COMPOSITES, read
from PIL import Image

import icm_cli
from icm_cli.errors import UsageError
from icm_cli.matting.predictor import Predictor
from icm_cli.model.contracts import PreparedReferences

RGB = np.ascontiguousarray(read(COMPOSITES / "ref.jpg")[::4, ::4, ::-1])
MASK = np.ascontiguousarray(read(COMPOSITES / "mask.png")[::4, ::4])


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    from conftest import SMALL_MODEL

    path = tmp_path_factory.mktemp("model") / "small.yaml"
    path.write_text(SMALL_MODEL)
    return icm_cli.load(str(path), device="cpu")


@pytest.fixture(scope="module")
def reference(predictor: Predictor) -> PreparedReferences:
    return predictor.reference([(RGB, MASK)])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (RGB / np.float32(255), "image is float32 [H,W,3]; expected sRGB, uint8 [H,W,3]; convert sRGB values in 0..1"),
        (RGB / 255, "image is float64 [H,W,3]; expected sRGB, uint8"),
        (RGB.astype(np.uint16) * 257, "image is uint16 [H,W,3]; expected sRGB, uint8 [H,W,3]; convert 16-bit values"),
        (RGB.astype(np.int32), "image is int32"),
        (RGB > 100, "image is bool"),
        (RGB[:0], "expected sRGB, uint8"),
        (np.dstack([RGB, MASK]), "give image[..., :3] if the fourth channel is an alpha"),
        (np.ascontiguousarray(RGB.transpose(2, 0, 1)), "give image.transpose(1, 2, 0) if the channels are first"),
        (RGB[None], "expected sRGB, uint8 [H,W,3]"),
        (RGB.tolist(), "image is of type builtins.list; expected"),
        ("image.png", "image is of type builtins.str; expected"),
        (Image.fromarray(RGB), "give an array, such as numpy.asarray(PIL.Image.open(path)"),
        (np.ma.masked_equal(RGB, 0), "image is a masked array"),
        (None, "image is None; expected"),
    ],
)
def test_images_of_another_type_or_shape_are_refused(
    predictor: Predictor, reference: PreparedReferences, image: object, message: str
) -> None:
    size = f"[{RGB.shape[0]}, {RGB.shape[1]}, 3]"
    message = message.replace("[H,W,3];", f"{size};", 1) if message.startswith("image is") else message
    with pytest.raises(UsageError, match=re.escape(message)):
        predictor.matte(image, reference)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=re.escape(message.replace("image is", "the image of reference 1 is"))):
        predictor.reference([(image, MASK)])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (MASK[:-1], "the mask of reference 1 is uint8"),
        (np.ma.masked_equal(MASK, 0), "the mask of reference 1 is a masked array"),
        (np.dstack([MASK] * 3), "the mask of reference 1 is uint8"),
        (MASK.astype(np.int64), "the mask of reference 1 is int64"),
        (MASK.astype(np.float32), "has values from 0 to 255; expected bool, uint8 0..255 or float 0..1"),
        (np.where(MASK > 0, np.nan, 0.0), "has values from nan to nan"),
        (MASK // 255, "has no values but 0 and 1, and is uint8"),
        (MASK * 0, "the mask of reference 1 is empty"),
        (None, "the mask of reference 1 is None; expected bool"),
    ],
)
def test_masks_of_another_type_shape_or_range_are_refused(predictor: Predictor, mask: object, message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        predictor.reference([(RGB, mask)])  # type: ignore[list-item]


def test_arrays_with_one_meaning_are_converted(predictor: Predictor, reference: PreparedReferences) -> None:
    alpha = predictor.matte(RGB, reference)
    inside = MASK > 127
    masks = (inside, inside.astype(np.float64), inside.astype(np.float16)[..., None], np.uint8(255) * inside)
    for mask in masks:
        assert (predictor.matte(RGB, predictor.reference((RGB, mask))) == alpha).all()
    grey = RGB[..., 1]
    expected = predictor.matte(np.dstack([grey] * 3), reference)
    assert (predictor.matte(grey, reference) == expected).all()
    assert (predictor.matte(grey[..., None], reference) == expected).all()
    assert (predictor.matte(RGB[..., ::-1][..., ::-1], reference) == alpha).all()  # not contiguous


@pytest.mark.parametrize("pairs", [[], None, RGB, "ref.png", [RGB], [(RGB,)], [(RGB, MASK, MASK)], 3])
def test_references_must_be_pairs(predictor: Predictor, pairs: object) -> None:
    with pytest.raises(UsageError, match=re.escape("expected pairs of image and mask, such as [(image, mask)]")):
        predictor.reference(pairs)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["garbage", "keep"])
def test_mattes_are_arrays_of_the_image(predictor: Predictor, reference: PreparedReferences, name: str) -> None:
    area = np.zeros(MASK.shape, np.bool_)
    area[:9, :9] = True
    expected = predictor.matte(RGB, reference, **{name: area})
    assert (expected[area] == (255 if name == "keep" else 0)).all()
    for matte in (area.astype(np.float64), np.uint8(255) * area[..., None]):
        assert (predictor.matte(RGB, reference, **{name: matte}) == expected).all()
    for matte, message in (
        (area[1:], f"the {name} matte is bool"),
        (area.astype(np.uint8), f"the {name} matte has no values but 0 and 1"),
        (area * 2.0, f"the {name} matte has values from 0 to 2; expected bool"),
        ("matte.png", f"the {name} matte is of type builtins.str; expected"),
    ):
        with pytest.raises(UsageError, match=message):
            predictor.session(RGB, reference, **{name: matte})


def test_arguments_of_a_session_are_checked(predictor: Predictor, reference: PreparedReferences) -> None:
    with pytest.raises(UsageError, match="image is float64"):
        predictor.session(RGB / 255, reference)
    with pytest.raises(UsageError, match="reference is None; expected the result of"):
        predictor.session(RGB, None)  # type: ignore[arg-type]
    session = predictor.session(RGB, reference)
    height, width = MASK.shape
    for answer in (session.coarse, session.matte):
        with pytest.raises(UsageError, match=f"the hints are for an image of 9x5 and the image is {width}x{height}"):
            answer(icm_cli.Hints(size=(5, 9)))
        with pytest.raises(UsageError, match=r"hints are of type builtins\.list; expected icm_cli.Hints"):
            answer([(1.0, 2.0)])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        (
            icm_cli.Hints(size=(5, 9), points=[(1, 1)]),
            "the hints of reference 1 are for an image of 9x5 and the image is",
        ),
        (icm_cli.Hints(size=MASK.shape), "the mask from the hints of reference 1 has no mark on the object; expected"),
        (icm_cli.Hints(size=MASK.shape, not_points=[(1, 1)]), "the mask from the hints of reference 1 has no mark on"),
    ],
)
def test_hints_of_a_reference_are_checked(predictor: Predictor, hints: icm_cli.Hints, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        predictor.reference([(RGB, hints)])


@pytest.mark.parametrize("kind", [list, tuple, np.array, np.float32, np.int64])
def test_hints_take_sequences_and_arrays(kind: Any) -> None:
    hints = icm_cli.Hints(size=[20, 30], points=kind([[5, 5], [6, 6]]), boxes=kind([[1, 2, 13, 14]]))  # type: ignore[arg-type]
    assert (hints.size, hints.points, hints.boxes) == ((20, 30), ((5, 5), (6, 6)), ((1, 2, 13, 14),))
    assert hints.digest == icm_cli.Hints(size=(20, 30), points=[(5.0, 5.0), (6, 6)], boxes=[(1, 2, 13, 14)]).digest


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"points": (5, 5)}, r"points= is (5, 5); expected points as x and y, such as [(365, 500)]"),
        ({"points": "5,5"}, "points= is '5,5'; expected points as x and y"),
        ({"not_points": [("5", "5")]}, "not_points= is [('5', '5')]; expected points as x and y"),
        ({"points": [(np.nan, 5)]}, "points= is [(nan, 5)]; expected points"),
        ({"points": [(10**400, 5)]}, "points= is [(1000"),
        ({"points": [(True, False)]}, "points= is [(True, False)]; expected points"),
        ({"points": np.array([5.0, 5])}, "points= is array([5., 5.]); expected points"),
        ({"points": np.zeros((9, 3))}, "points= is an array of float64 [9, 3]; expected points"),
        ({"points": None}, "points= is None; expected points"),
        ({"boxes": [(1, 2, 3)]}, "boxes= is [(1, 2, 3)]; expected boxes as x and y of two corners"),
        ({"boxes": (10, 10, 15, 15)}, "boxes= is (10, 10, 15, 15); expected boxes"),
        ({"size": (20, 30, 3)}, "size= is (20, 30, 3); expected the height and width of the image"),
        ({"size": (20.5, 30)}, "size= is (20.5, 30); expected the height and width"),
        ({"keep": np.ones((20, 30), np.uint8)}, "keep= is an array of uint8 [20, 30]; expected a bool array [H,W]"),
        ({"drop": [[True]]}, "drop= is [[True]]; expected a bool array"),
        ({"object_area": np.ones((20, 30, 1), np.bool_)}, "object_area= is an array of bool [20, 30, 1]; expected"),
        ({"keep": np.ones((20, 29), np.bool_)}, "keep= is 29x20 and the image 30x20; give an area that was drawn on"),
    ],
)
def test_other_values_of_hints_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)) as error:
        icm_cli.Hints(**{"size": (20, 30), **values})
    assert "\n" not in str(error.value)


def test_other_arguments_are_checked(predictor: Predictor) -> None:
    with pytest.raises(UsageError, match="reference is None; expected the result of"):
        predictor.matte(RGB, None)  # type: ignore[arg-type]
    for steps in (1.5, True, "3", -1, 10**9):
        with pytest.raises(UsageError, match=f"learn_steps= is {steps!r}; expected"):
            predictor.reference([(RGB, MASK)], learn_steps=steps)  # type: ignore[arg-type]
    assert predictor.reference([(RGB, MASK)], learn_steps=None) is not None
    for run in (
        lambda: icm_cli.matte("r.png", "m.png", src="i", out="o", listener=print),  # type: ignore[arg-type]
        lambda: icm_cli.evaluate("folder", images="i", alphas="a", listener=print),  # type: ignore[arg-type]
        lambda: icm_cli.train("lite", data="d.yaml", listener=print),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match="listener= is <built-in function print>; expected an instance of"):
            run()


SNAPSHOT = """
import locale, logging, os, signal, sys, threading, warnings
import cv2, numba, numpy as np, OpenImageIO as oiio, PIL.Image, PIL.ImageFile, torch

PIL.Image.init()

def snapshot():
    umask = os.umask(0)
    os.umask(umask)
    return {
        "pillow": (PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, sorted(PIL.Image.OPEN)),
        "warnings": [str(each) for each in warnings.filters],
        "logging": (logging.root.level, logging.root.handlers[:], logging.getLogger("PIL").level),
        "environment": dict(os.environ),
        "process": (umask, os.getcwd(), locale.setlocale(locale.LC_ALL), sys.excepthook, sys.stdout, sys.stderr),
        "signals": [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
        "torch": (
            torch.get_num_threads(), torch.get_default_dtype(), torch.get_float32_matmul_precision(),
            torch.are_deterministic_algorithms_enabled(), torch.is_grad_enabled(), torch.backends.cudnn.benchmark,
            torch.random.get_rng_state().tolist(),
        ),
        "numpy": (str(np.random.get_state()), np.geterr()),
        "opencv": (cv2.getNumThreads(), cv2.ocl.useOpenCL()),
        "others": (oiio.get_int_attribute("threads"), numba.config.CACHE_DIR),
        "threads": [each.name for each in threading.enumerate()],
    }

def check(what):
    after = snapshot()
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    assert not changed, (what, changed)

before = snapshot()
import icm_cli
icm_cli.matte, icm_cli.evaluate, icm_cli.train, icm_cli.load
check("import")
demo, out = sys.argv[1:]
predictor = icm_cli.load(device="cpu", offline=True)
check("load")
files = {"images": f"{demo}/imgs", "alphas": f"{demo}/alphas"}
options = {"include": "cat*", "foreground": "auto", "format": "exr", "edges": "closed-form"}
report = icm_cli.matte(f"{demo}/ref.jpg", f"{demo}/mask.png", src=f"{demo}/imgs", out=out, **options)
assert report.exit_code == 0, report.failures
check("matte")
assert icm_cli.evaluate("folder", **files, pred=f"{demo}/alphas").exit_code == 0
check("evaluate")
"""


@pytest.mark.slow
def test_host_program_is_not_changed(tmp_path: Path) -> None:
    """Neither an import nor a run changes global settings of the process."""
    line = [sys.executable, "-c", SNAPSHOT, str(COMPOSITES), str(tmp_path / "out")]
    run = subprocess.run(line, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


FORK = """
import multiprocessing, sys
import numpy as np, icm_cli
from icm_cli.errors import UsageError

predictor = icm_cli.load(sys.argv[1], device="cpu")
rgb = np.random.default_rng(0).integers(0, 255, (160, 160, 3), np.uint8)
mask = np.zeros((160, 160), bool)
mask[40:90, 50:120] = True
reference = predictor.reference([(rgb, mask)])
predictor.matte(rgb, reference)

def work(queue):
    for action in (
        lambda: predictor.matte(rgb, reference),
        lambda: predictor.reference([(rgb, mask)]),
        lambda: icm_cli.load(sys.argv[1], device="cpu"),
        lambda: icm_cli.matte("ref.png", "mask.png", src="imgs", out="out"),
    ):
        try:
            queue.put(str(action()))
        except UsageError as error:
            queue.put(str(error))

context = multiprocessing.get_context("fork")
queue = context.Queue()
process = context.Process(target=work, args=(queue,))
process.start()
for _ in range(4):
    assert "was forked" in queue.get(timeout=60)
process.join()
"""


@pytest.mark.slow
def test_use_after_fork_is_refused(small_model: Path) -> None:
    """Threads of torch would never answer in the forked process."""
    line = [sys.executable, "-W", "ignore", "-c", FORK, str(small_model)]
    run = subprocess.run(line, capture_output=True, text=True, check=False, env={"OMP_NUM_THREADS": "2"}, timeout=100)
    assert run.returncode == 0, run.stderr
