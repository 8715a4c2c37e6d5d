"""References and masks: what is taken, what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from icm_cli.errors import UsageError
from icm_cli.matting.references import Reference, read_references


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rgb = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:30, 20:40] = 255
    cv2.imwrite(str(tmp_path / "ref.png"), rgb)
    cv2.imwrite(str(tmp_path / "mask.png"), mask)
    cv2.imwrite(str(tmp_path / "cutout.png"), np.dstack([rgb, mask]))
    cv2.imwrite(str(tmp_path / "soft.png"), np.where(mask > 0, 140, 110).astype(np.uint8))
    cv2.imwrite(str(tmp_path / "half.png"), mask[::2, ::2])
    cv2.imwrite(str(tmp_path / "square.png"), mask[:, :40])
    cv2.imwrite(str(tmp_path / "empty.png"), np.zeros_like(mask))
    cv2.imwrite(str(tmp_path / "labels.png"), mask // 255)
    cv2.imwrite(str(tmp_path / "full.png"), np.full_like(mask, 255))
    (tmp_path / "torn.png").write_bytes((tmp_path / "ref.png").read_bytes()[:300])
    return tmp_path


def load(folder: Path, ref: str, mask: str | None, notices: list[str] | None = None) -> Reference:
    masks = [folder / mask] if mask else []
    return read_references([folder / ref], masks, (notices if notices is not None else []).append)[0]


@pytest.mark.parametrize(("ref", "mask"), [("ref.png", "mask.png"), ("ref.png", "soft.png"), ("cutout.png", None)])
def test_the_thing_is_where_the_mask_is(folder: Path, ref: str, mask: str | None) -> None:
    guidance = load(folder, ref, mask).guidance
    assert guidance.dtype == bool
    assert guidance.sum() == 400
    assert guidance[10:30, 20:40].all()


def test_a_mask_of_another_size_is_resized_with_a_notice(folder: Path) -> None:
    notices: list[str] = []
    assert load(folder, "ref.png", "half.png", notices).guidance.sum() == pytest.approx(400, rel=0.1)
    assert notices == [f"mask {folder / 'half.png'} is 30x20 and its reference 60x40; the mask was resized"]


@pytest.mark.parametrize(
    ("ref", "mask", "message"),
    [
        ("ref.png", "square.png", "another shape"),
        ("ref.png", "empty.png", "is empty: no pixel is above half"),
        ("ref.png", "full.png", "is full"),
        ("ref.png", "torn.png", "cut short"),
        ("torn.png", "mask.png", "cut short"),
        ("none.png", "mask.png", "does not exist"),
        ("ref.png", None, "no RGBA cut-out"),
    ],
)
def test_refused(folder: Path, ref: str, mask: str | None, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        load(folder, ref, mask)


def test_counts_must_agree(folder: Path) -> None:
    with pytest.raises(UsageError, match="2 references but 1 masks"):
        read_references([folder / "ref.png"] * 2, [folder / "mask.png"], lambda _: None)
    with pytest.raises(UsageError, match="no reference"):
        read_references([], [], lambda _: None)
