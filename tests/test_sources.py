"""Which images are found, where their alphas go, and what is refused before the first write."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from icm_cli.errors import UsageError
from icm_cli.matting.jobs import Job, LeftOut, plan_jobs


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def plan(src: str | Path, out: Path, **options: object) -> list[Job]:
    notice = options.pop("notice", lambda _: None)
    return plan_jobs(src, out, left_out=LeftOut(notice), **options)  # type: ignore[arg-type]


def outputs(jobs: list[Job], out: Path) -> list[str]:
    return [job.output.relative_to(out).as_posix() for job in jobs]


def test_folder_is_mirrored_with_stems_kept(tmp_path: Path) -> None:
    src = tree(tmp_path / "in", "a/0001.jpg", "b/0001.PNG", "shot.1001.tif", "notes.txt", ".hidden.png", ".git/x.png")
    jobs = plan(src, tmp_path / "out")
    assert outputs(jobs, tmp_path / "out") == ["a/0001.png", "b/0001.png", "shot.1001.png"]


def test_single_image(tmp_path: Path) -> None:
    src = tree(tmp_path, "in/a b.jpg") / "in" / "a b.jpg"
    assert outputs(plan(src, tmp_path / "out"), tmp_path / "out") == ["a b.png"]


def test_glob_and_list_mirror_below_the_deepest_common_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "x/y/a/1.jpg", "x/y/b/2.jpg", "x/z.jpg")
    out = tmp_path / "out"
    assert outputs(plan(str(tmp_path / "x/y/*/*.jpg"), out), out) == ["a/1.png", "b/2.png"]
    assert outputs(plan(str(tmp_path / "x/**/*.jpg"), out), out) == ["y/a/1.png", "y/b/2.png", "z.png"]
    monkeypatch.chdir(tmp_path / "x")
    (tmp_path / "list.txt").write_text(f"y/a/1.jpg\n\n{tmp_path}/x/y/b/2.jpg\ny/a/1.jpg\n", encoding="utf-8")
    assert outputs(plan(tmp_path / "list.txt", out), out) == ["a/1.png", "b/2.png"]
    monkeypatch.setattr("sys.stdin", io.StringIO("y/a/1.jpg\nz.jpg\n"))
    assert outputs(plan("-", out), out) == ["y/a/1.png", "z.png"]


def test_a_bracketed_name_is_a_file_before_it_is_a_glob(tmp_path: Path) -> None:
    src = tree(tmp_path, "in/[a].jpg") / "in" / "[a].jpg"
    assert outputs(plan(src, tmp_path / "out"), tmp_path / "out") == ["[a].png"]


def test_include_and_exclude(tmp_path: Path) -> None:
    src = tree(tmp_path / "in", "a/1.jpg", "a/2.jpg", "b/1.jpg")
    out = tmp_path / "out"
    assert outputs(plan(src, out, include=["a/*"]), out) == ["a/1.png", "a/2.png"]
    assert outputs(plan(src, out, include=["1.*"], exclude=["b/*"]), out) == ["a/1.png"]
    with pytest.raises(UsageError, match="no images were found"):
        plan(src, out, exclude=["*"])


def test_output_references_and_masks_are_left_out_with_a_notice(tmp_path: Path) -> None:
    src = tree(tmp_path / "in", "ref.jpg", "mask.png", "1.jpg", "out/1.png", "out/2.png")
    notices: list[str] = []
    jobs = plan(src, src / "out", references=[src / "ref.jpg", src / "mask.png"], notice=notices.append)
    assert [job.name.name for job in jobs] == ["1.jpg"]
    assert len(notices) == 2
    assert "out/1.png and 1 more" in notices[0]


def test_links_are_followed_once(tmp_path: Path) -> None:
    src = tree(tmp_path / "in", "real/1.jpg")
    (src / "real" / "loop").symlink_to(src, target_is_directory=True)
    (src / "twin").symlink_to(src / "real", target_is_directory=True)
    assert outputs(plan(src, tmp_path / "out"), tmp_path / "out") == ["real/1.png"]


@pytest.mark.parametrize(
    ("names", "src", "out", "message"),
    [
        (["in/a.jpg"], "in", "in", "also the output folder"),
        (["in/a.jpg", "in/a.png"], "in", "out", "both be written to"),
        (["in/a.png"], "in/a.png", "in", "also the output folder"),
        (["in/x/a.png"], "in/x", "in/x", "also the output folder"),
        (["in/notes.txt"], "in", "out", "no images were found"),
        ([], "in", "out", "does not exist"),
        ([], "in/*.jpg", "out", "no images were found"),
    ],
)
def test_refused(tmp_path: Path, names: list[str], src: str, out: str, message: str) -> None:
    tree(tmp_path, *names)
    with pytest.raises(UsageError, match=message):
        plan(str(tmp_path / src), tmp_path / out)


def test_empty_and_binary_lists_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UsageError, match="lists no images"):
        plan(tmp_path / "empty.txt", tmp_path / "out")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\xd8")
    with pytest.raises(UsageError, match="cannot be read"):
        plan(tmp_path / "binary.txt", tmp_path / "out")


NAMES = st.lists(st.text("ab/.", min_size=1, max_size=6), min_size=1, max_size=8)


@settings(max_examples=80, deadline=None)
@given(NAMES)
def test_no_two_images_share_an_output(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    """Whatever the tree: either every image has an output of its own below --out, or nothing is planned."""
    root = tmp_path_factory.mktemp("tree")
    for name in names:
        path = root / "in" / "x" / (name.replace("..", "b").strip("/") + ".jpg")
        if not path.parent.is_file() and not path.is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    try:
        jobs = plan(root / "in", root / "out")
    except UsageError:
        return
    assert len({job.output for job in jobs}) == len(jobs)
    assert all((root / "out") in job.output.parents and job.output.suffix == ".png" for job in jobs)
