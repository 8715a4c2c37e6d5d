"""Layouts of all datasets on small folder trees, their variations, and errors about wrong trees."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest

from icm_cli.datasets.groups import GroupMetadata
from icm_cli.datasets.registry import DATASETS, find_dataset
from icm_cli.errors import UsageError
from icm_cli.images.reading import CompositeSource, compose_image
from icm_cli.options import DatasetName


def write_images(root: Path, *names: str, size: tuple[int, int] = (6, 8)) -> None:
    """Write small images. Their content does not matter for these tests."""
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        grey = name.rpartition("/")[0].endswith(("mask", "matte", "alpha", "alphas"))
        image = np.full((*size, 1 if grey else 3), 40 + number, np.uint8)
        assert cv2.imwrite(str(path), image)


P3M = "validation/P3M-500-NP"
TREES: dict[str, tuple[str, list[str], dict[str, tuple[str, str, str | None]]]] = {
    "aim500": (
        "aim500",
        ["original/o_004cddc9.jpg", "mask/o_004cddc9.png", "trimap/o_004cddc9.png", "usr/o_004cddc9.jpg"],
        {"o_004cddc9": ("original/o_004cddc9.jpg", "mask/o_004cddc9.png", "trimap/o_004cddc9.png")},
    ),
    "icm57": (
        "icm57",
        ["image/dog3_02.jpg", "alpha/dog3_02.png", "image/can_05.jpg", "alpha/can_05.png"],
        {
            "dog3_02": ("image/dog3_02.jpg", "alpha/dog3_02.png", None),
            "can_05": ("image/can_05.jpg", "alpha/can_05.png", None),
        },
    ),
    "icm57 later zip": (
        "icm57",
        ["image/dog3_02.jpg", "alpha/dog3_02.png", "trimap/dog3_02.png"],
        {"dog3_02": ("image/dog3_02.jpg", "alpha/dog3_02.png", "trimap/dog3_02.png")},
    ),
    "am2k": (
        "am2k",
        [
            "train/original/t.jpg",
            "train/mask/t.png",
            "validation/original/m_1.jpg",
            "validation/mask/m_1.png",
            "validation/trimap/m_1.png",
        ],
        {"m_1": ("validation/original/m_1.jpg", "validation/mask/m_1.png", "validation/trimap/m_1.png")},
    ),
    "p3m500np": (
        "p3m500np",
        [
            f"{P3M}/original_image/p_1.jpg",
            f"{P3M}/mask/p_1.png",
            f"{P3M}/trimap/p_1.png",
            "validation/P3M-500-P/blurred_image/p_9.jpg",
            "validation/P3M-500-P/mask/p_9.png",
        ],
        {"p_1": (f"{P3M}/original_image/p_1.jpg", f"{P3M}/mask/p_1.png", f"{P3M}/trimap/p_1.png")},
    ),
    "p3m500p": (
        "p3m500p",
        ["validation/P3M-500-P/blurred_image/p_9.jpg", "validation/P3M-500-P/mask/p_9.png"],
        {"p_9": ("validation/P3M-500-P/blurred_image/p_9.jpg", "validation/P3M-500-P/mask/p_9.png", None)},
    ),
    "ppm100": (
        "ppm100",
        ["image/a.jpg", "matte/a.jpg"],
        {"a": ("image/a.jpg", "matte/a.jpg", None)},
    ),
    "ppm100 copy": (
        "ppm100",
        ["image_train/a.jpg", "matte_train/a.jpg"],
        {"a": ("image_train/a.jpg", "matte_train/a.jpg", None)},
    ),
    "ppm100 other copy": (
        "ppm100",
        ["train/fg/a.jpg", "train/alpha/a.jpg"],
        {"a": ("train/fg/a.jpg", "train/alpha/a.jpg", None)},
    ),
    "rwp636": (
        "rwp636",
        [
            "image/00001_input.jpg",
            "alpha/00001_input.png",
            "detailmap/00001_input_cloud_trimap.jpg",
            "image/00002_input.jpg",
            "alpha/00002.png",
            "detailmap/00002_cloud_trimap.jpg",
        ],
        {
            "00001": (
                "image/00001_input.jpg",
                "alpha/00001_input.png",
                "detailmap/00001_input_cloud_trimap.jpg",
            ),
            "00002": ("image/00002_input.jpg", "alpha/00002.png", "detailmap/00002_cloud_trimap.jpg"),
        },
    ),
    "rw100": (
        "rw100",
        ["image/street.jpg", "mask/street_0.png", "mask/street_1.png", "image/p_7.jpg", "mask/p_7_0.png"],
        {
            "street_0": ("image/street.jpg", "mask/street_0.png", None),
            "street_1": ("image/street.jpg", "mask/street_1.png", None),
            "p_7_0": ("image/p_7.jpg", "mask/p_7_0.png", None),
        },
    ),
    "composition1k": (
        "composition1k",
        ["Test_set/merged/boy_0.png", "Test_set/alpha_copy/boy_0.png", "Test_set/trimaps/boy_0.png"],
        {"boy_0": ("Test_set/merged/boy_0.png", "Test_set/alpha_copy/boy_0.png", "Test_set/trimaps/boy_0.png")},
    ),
}


def test_every_dataset_can_be_selected() -> None:
    assert set(get_args(DatasetName)) == set(DATASETS)


@pytest.mark.parametrize("tree", TREES)
def test_files_of_a_layout_are_found(tmp_path: Path, tree: str) -> None:
    name, files, expected = TREES[tree]
    write_images(tmp_path, *files)
    found = find_dataset(name, tmp_path)
    assert {
        sample.name: tuple(
            path and Path(path).relative_to(tmp_path).as_posix() for path in (sample.file, sample.alpha, sample.trimap)
        )
        for sample in found.samples
    } == expected


@pytest.mark.parametrize("name", ["composition1k", "d646", "transparent460"])
def test_foregrounds_are_composited_onto_backgrounds(tmp_path: Path, name: str) -> None:
    layout = next(layout for layout in DATASETS[name].test if layout.backgrounds_per_foreground)
    for folder in (layout.images, layout.alphas):
        write_images(
            tmp_path / name, f"{layout.parent_folder}/{folder}/cat.png", f"{layout.parent_folder}/{folder}/dog.png"
        )
    if layout.trimaps:
        write_images(
            tmp_path / name, *(f"{layout.parent_folder}/{layout.trimaps}/{stem}.png" for stem in ("cat_3", "dog"))
        )
    with pytest.raises(UsageError, match="--backgrounds"):
        find_dataset(name, tmp_path / name)
    write_images(tmp_path / "bg", *(f"{number:02d}.jpg" for number in range(30)))
    found = find_dataset(name, tmp_path / name, backgrounds=tmp_path / "bg")
    assert len(found.samples) == 40
    assert {sample.group for sample in found.samples} == {"cat", "dog"}
    composites = [sample.image for sample in found.samples if isinstance(sample.image, CompositeSource)]
    assert [composite.background.stem for composite in composites] == [f"{n % 30:02d}" for n in range(40)]
    if layout.trimaps:
        trimaps = {sample.name: sample.trimap for sample in found.samples}
        assert trimaps["cat_3"]
        assert trimaps["cat_4"] is None
        assert trimaps["dog_19"]


def test_composite_is_the_alpha_weighted_sum_with_enlarged_background(tmp_path: Path) -> None:
    cv2.imwrite(str(tmp_path / "fg.png"), np.full((40, 60, 3), 200, np.uint8))
    cv2.imwrite(str(tmp_path / "bg.png"), np.full((10, 10, 3), 100, np.uint8))
    alpha = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (40, 1))
    cv2.imwrite(str(tmp_path / "alpha.png"), alpha)
    made = compose_image(tmp_path / "fg.png", tmp_path / "alpha.png", tmp_path / "bg.png").rgb
    expected = 100 + 100.0 * alpha[..., None] / 255
    assert made.shape == (40, 60, 3)
    assert np.abs(made - expected).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("where", ["above", "itself", "inside", "other case"])
def test_root_may_be_above_or_inside_the_published_folder(tmp_path: Path, where: str) -> None:
    home = tmp_path / "AM-2k"
    write_images(
        home, "validation/original/m_1.jpg", "validation/mask/m_1.png", "train/original/t.jpg", "train/mask/t.png"
    )
    root = {"above": tmp_path, "itself": home, "inside": home / "validation", "other case": home}[where]
    if where == "other case":
        (home / "validation").rename(home / "Validation")
        (home / "Validation" / "mask").rename(home / "Validation" / "Mask")
    assert [sample.name for sample in find_dataset("am2k", root).samples] == ["m_1"]
    if where != "inside":
        assert [sample.name for sample in find_dataset("am2k", root, split="train").samples] == ["t"]


def test_wrong_root_lists_found_and_expected_folders(tmp_path: Path) -> None:
    write_images(tmp_path, "photos/a.jpg", "readme.png")
    with pytest.raises(UsageError) as error:
        find_dataset("aim500", tmp_path)
    for part in ("original/", "mask/", "photos/", "readme.png", str(tmp_path)):
        assert part in str(error.value)


def test_empty_or_missing_root_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="found nothing"):
        find_dataset("ppm100", tmp_path)
    with pytest.raises(UsageError, match="not a folder"):
        find_dataset("ppm100", tmp_path / "nowhere")


def test_unknown_dataset_suggests_a_similar_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Did you mean 'aim500'"):
        find_dataset("aim-500", tmp_path)


@pytest.mark.parametrize("name", DATASETS)
def test_missing_root_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--data-root"):
        find_dataset(name)


def test_files_without_counterpart_are_reported(tmp_path: Path) -> None:
    write_images(tmp_path, "image/a.jpg", "image/b.jpg", "matte/b.jpg", "matte/c.jpg")
    found = find_dataset("ppm100", tmp_path)
    assert [sample.name for sample in found.samples] == ["b"]
    assert {(problem.kind, problem.name) for problem in found.problems} == {
        ("missing-alpha", "a"),
        ("missing-image", "c"),
    }


def test_dataset_without_pairs_shows_example_names(tmp_path: Path) -> None:
    write_images(tmp_path, "image/a.jpg", "matte/z_matte.jpg")
    with pytest.raises(UsageError, match="images are like a and alphas like z_matte"):
        find_dataset("ppm100", tmp_path)


def test_missing_trimap_is_reported(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{kind}/o_{n}.png" for kind in ("original", "mask") for n in (1, 2)), "trimap/o_1.png")
    found = find_dataset("aim500", tmp_path)
    assert [problem.name for problem in found.problems if problem.kind == "missing-trimap"] == ["o_2"]


def test_bundled_groups_are_complete() -> None:
    icm57, aim500 = GroupMetadata.load_bundled("icm57.json"), GroupMetadata.load_bundled("aim500.json")
    assert (len(icm57.entries), len(aim500.entries)) == (232, 500)


def test_metadata_assigns_groups_and_reports_unmatched_names(tmp_path: Path) -> None:
    write_images(
        tmp_path, *(f"{kind}/{name}.png" for kind in ("image", "alpha") for name in ("dog3_02", "dog3_00", "mine"))
    )
    found = find_dataset("icm57", tmp_path)
    samples = {sample.name: sample for sample in found.samples}
    assert samples["dog3_02"].group == samples["dog3_00"].group == "dog3"
    assert samples["dog3_02"].categories == {"class": "dog3", "type": "instance", "source": "dreambooth"}
    assert samples["mine"].group == ""
    kinds = [problem.kind for problem in found.problems]
    assert kinds.count("no-group") == 1
    assert kinds.count("absent-file") == 230


def test_groups_file_in_the_published_format(tmp_path: Path) -> None:
    write_images(tmp_path, "image/a.jpg", "matte/a.jpg", "image/b.jpg", "matte/b.jpg")
    groups = {name: {"class": "animal", "sub_class": "cat", "HalfOrFull": "full"} for name in ("a", "b")}
    (tmp_path / "groups.json").write_text(json.dumps(groups))
    assert {sample.group for sample in find_dataset("ppm100", tmp_path, groups=tmp_path / "groups.json").samples} == {
        "animal-cat-full"
    }


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"class": ["x"]}}',
        '{"a": {"class": "x", "type": 3}}',
        "",
        "[]",
        "{}",
        '{"a": 3}',
        '{"a": {"sub_class": "x"}}',
        "\x00",
    ],
)
def test_invalid_groups_file_is_refused(tmp_path: Path, text: str) -> None:
    write_images(tmp_path, "image/a.jpg", "matte/a.jpg")
    (tmp_path / "groups.json").write_text(text)
    with pytest.raises(UsageError, match=r"groups\.json.*expected"):
        find_dataset("ppm100", tmp_path, groups=tmp_path / "groups.json")


def test_folder_dataset(tmp_path: Path) -> None:
    write_images(
        tmp_path, "images/cat/1.jpg", "images/dog/1.jpg", "alphas/cat/1.png", "alphas/dog/1.png", "trimaps/dog/1.png"
    )
    by_root = find_dataset("folder", tmp_path)
    by_options = find_dataset(
        "folder", images=str(tmp_path / "images"), alphas=str(tmp_path / "alphas"), trimaps=str(tmp_path / "trimaps")
    )
    assert by_root.samples == by_options.samples
    assert [(sample.name, sample.group) for sample in by_root.samples] == [("cat/1", "cat"), ("dog/1", "dog")]


def test_symbolic_links_to_folders_are_followed(tmp_path: Path) -> None:
    write_images(tmp_path, "store/1.jpg", "store_alphas/1.png", "data/images/cat/1.jpg", "data/alphas/cat/1.png")
    for kind, where in (("images", "store"), ("alphas", "store_alphas")):
        (tmp_path / "data" / kind / "dog").symlink_to(tmp_path / where, target_is_directory=True)
        (tmp_path / "data" / kind / "again").symlink_to(tmp_path / "data" / kind, target_is_directory=True)
    assert [sample.name for sample in find_dataset("folder", tmp_path / "data").samples] == ["cat/1", "dog/1"]


def test_unreadable_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, "images/cat/1.jpg", "images/dog/1.jpg", "alphas/cat/1.png", "alphas/dog/1.png")
    real = os.scandir

    def scandir(path: str) -> object:  # root, who runs tests in containers, may read every folder
        if os.fspath(path).endswith("images/dog"):
            raise PermissionError(13, "Permission denied", path)
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UsageError, match="dog is a folder that cannot be read"):
        find_dataset("folder", tmp_path)


def test_folder_dataset_with_images_and_alphas_in_the_same_folders(tmp_path: Path) -> None:
    write_images(tmp_path, "cat/00.jpg", "cat/00.png", "dog/00.jpg", "dog/00.png")
    found = find_dataset("folder", images=str(tmp_path / "*/*.jpg"), alphas=str(tmp_path / "*/*.png"))
    assert [(sample.name, sample.file.suffix, sample.alpha.suffix) for sample in found.samples] == [
        ("cat/00", ".jpg", ".png"),
        ("dog/00", ".jpg", ".png"),
    ]


def test_options_of_other_datasets_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path, "image/a.jpg", "matte/a.jpg")
    with pytest.raises(UsageError, match="are for --dataset folder"):
        find_dataset("ppm100", tmp_path, images=str(tmp_path))
    with pytest.raises(UsageError, match="remove it"):
        find_dataset("ppm100", tmp_path, backgrounds=tmp_path)
    with pytest.raises(UsageError, match="no train split"):
        find_dataset("ppm100", tmp_path, split="train")
    with pytest.raises(UsageError, match="--images and --alphas"):
        find_dataset("folder", images=str(tmp_path))


def test_inaccessible_folder_next_to_the_dataset_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path / "ppm", "image/a.jpg", "matte/a.jpg")
    (tmp_path / "lost+found").mkdir()
    real = Path.is_dir

    def is_dir(path: Path) -> bool:
        if path.parent.name == "lost+found":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    assert [sample.name for sample in find_dataset("ppm100", tmp_path).samples] == ["a"]


def test_duplicate_names_are_reported(tmp_path: Path) -> None:
    write_images(tmp_path, "image/a.jpg", "image/a.png", "matte/a.jpg")
    found = find_dataset("ppm100", tmp_path)
    assert [(problem.kind, problem.name) for problem in found.problems] == [("same-name", "a")]
    assert found.samples[0].file.name == "a.jpg"


def test_empty_folder_is_reported(tmp_path: Path) -> None:
    write_images(tmp_path, "image/a.jpg")
    (tmp_path / "matte").mkdir()
    with pytest.raises(UsageError, match="matte contains no images"):
        find_dataset("ppm100", tmp_path)


def test_hidden_and_temporary_files_are_ignored(tmp_path: Path) -> None:
    write_images(tmp_path, "image/a.jpg", "matte/a.jpg")
    shutil.copy(tmp_path / "image" / "a.jpg", tmp_path / "image" / "._a.jpg")
    shutil.copy(tmp_path / "image" / "a.jpg", tmp_path / "image" / ".icm-x.jpg")
    assert find_dataset("ppm100", tmp_path).problems == []


def test_root_with_two_matching_folders_is_refused(tmp_path: Path) -> None:
    for home in ("one", "two"):
        write_images(tmp_path / home, "image/a.jpg", "matte/a.jpg")
    with pytest.raises(UsageError, match=r"one.* and in .*two"):
        find_dataset("ppm100", tmp_path)


def test_data_root_that_cannot_be_read_gives_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path == tmp_path:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return real(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    with pytest.raises(UsageError, match=r"cannot be read: Stale file handle; expected the folder of PPM-100"):
        find_dataset("ppm100", tmp_path)


def test_names_may_contain_line_breaks(tmp_path: Path) -> None:
    write_images(tmp_path, "images/a\nb.jpg", "alphas/a\nb.jpg", "images/a\nc.jpg", "alphas/a\nc.jpg")
    dataset = find_dataset("folder", tmp_path)
    assert [sample.name for sample in dataset.samples] == ["a\nb", "a\nc"]
    assert dataset.problems == []
