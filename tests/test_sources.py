"""Source images, output paths, and what is refused before anything is written."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import Icm
from fileseq.frameset import FrameSet
from hypothesis import given, settings
from hypothesis import strategies as st

import icm_cli
from icm_cli.errors import ImageError, UsageError
from icm_cli.files.paths import LINK_INTO_TREE, LINK_LOOP
from icm_cli.matting.frames import FramePattern, missing_frames, parse_frame_range
from icm_cli.matting.jobs import Job, OutputLayout
from icm_cli.matting.planning import InputFiles, JobPlanner, SourceFilter, parse_shard
from icm_cli.matting.sources import SkippedFiles, find_sources, natural_sort_key


def tree(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def plan(
    src: str | Path,
    out: str | Path,
    *,
    root: Path | None = None,
    references: Sequence[Path] = (),
    notice: Callable[[str], None] = lambda _: None,
    template: str = "{stem}{frame}",
    **source_filter: Any,
) -> list[Job]:
    skipped_files = SkippedFiles(notice)
    pattern = FramePattern.parse(str(out))
    layout = OutputLayout(Path(out if pattern is None else pattern.folder), template, pattern=pattern)
    sources = find_sources(src, root, skipped_files)
    planner = JobPlanner(sources, layout, skipped_files, SourceFilter(**source_filter), InputFiles(references))
    return planner.plan_images().jobs


def outputs(jobs: list[Job], out: Path) -> list[str]:
    return [job.output.relative_to(out).as_posix() for job in jobs]


def test_output_mirrors_the_source_folder(tmp_path: Path) -> None:
    src = tree(tmp_path / "in", "a/0001.jpg", "b/0001.PNG", "shot.1001.tif", "notes.txt", ".hidden.png", ".git/x.png")
    jobs = plan(src, tmp_path / "out")
    assert outputs(jobs, tmp_path / "out") == ["a/0001.png", "b/0001.png", "shot.1001.png"]


def test_single_image_is_a_source(tmp_path: Path) -> None:
    src = tree(tmp_path, "in/a b.jpg") / "in" / "a b.jpg"
    assert outputs(plan(src, tmp_path / "out"), tmp_path / "out") == ["a b.png"]


def test_output_path_depends_only_on_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs mirror the fixed part of a glob, and the working directory for a list, for any other
    sources."""
    tree(tmp_path, "x/y/a/1.jpg", "x/y/b/2.jpg", "x/z.jpg")
    out = tmp_path / "out"
    assert outputs(plan(str(tmp_path / "x/y/*/*.jpg"), out), out) == ["a/1.png", "b/2.png"]
    assert outputs(plan(str(tmp_path / "x/y/a*/*.jpg"), out), out) == ["a/1.png"]
    assert outputs(plan(str(tmp_path / "x/**/*.jpg"), out), out) == ["y/a/1.png", "y/b/2.png", "z.png"]
    monkeypatch.chdir(tmp_path / "x")
    (tmp_path / "list.txt").write_text(f"y/a/1.jpg\n\n{tmp_path}/x/y/b/2.jpg\ny/a/1.jpg\n", encoding="utf-8")
    assert outputs(plan(tmp_path / "list.txt", out), out) == ["y/a/1.png", "y/b/2.png"]
    monkeypatch.setattr("sys.stdin", io.StringIO("y/a/1.jpg\n"))
    assert outputs(plan("-", out), out) == ["y/a/1.png"]
    assert outputs(plan("y/a/1.jpg", out, root=tmp_path), out) == ["x/y/a/1.png"]


def test_sources_outside_the_root_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "in/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "elsewhere/2.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    monkeypatch.chdir(tmp_path / "in")
    monkeypatch.setattr("sys.stdin", io.StringIO("1.jpg\n../elsewhere/2.jpg\n../elsewhere/3.jpg\n"))
    with pytest.raises(UsageError, match=r"1 of the images are outside .*elsewhere/2.jpg; give --root"):
        plan("-", tmp_path / "out")
    with pytest.raises(UsageError, match="is not a folder"):
        plan(tmp_path / "in", tmp_path / "out", root=tmp_path / "nowhere")


def test_folders_in_a_list_are_skipped_with_a_notice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree(tmp_path, "a/1.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("a\na/1.jpg\n"))
    notices: list[str] = []
    assert len(plan("-", tmp_path / "out", notice=notices.append)) == 1
    assert "a folder in a list" in notices[0]


def test_brackets_of_an_existing_folder_are_literal(tmp_path: Path) -> None:
    out = tmp_path / "out"
    tree(tmp_path, "shot[1-3]/a.0001.jpg", "shot2/a.0001.jpg")
    assert outputs(plan(str(tmp_path / "shot[1-3]/*.jpg"), out), out) == ["a.0001.png"]
    assert outputs(plan(str(tmp_path / "shot[1-3]/a.%04d.jpg"), out), out) == ["a.0001.png"]
    assert outputs(plan(str(tmp_path / "shot[2-3]/*.jpg"), out), out) == ["shot2/a.0001.png"]
    with pytest.raises(UsageError, match="read as wildcards"):
        plan(str(tmp_path / "shot[7]/*.jpg"), out)


@pytest.mark.parametrize("pattern", ["s.####.jpg", "s.%04d.jpg", "s.@@@@.jpg", "s.#.jpg"])
def test_frame_patterns_keep_numbers_and_order(tmp_path: Path, pattern: str) -> None:
    names = ["s.0998.jpg", "s.1000.jpg", "s.10000.jpg", "t.0999.jpg", "s.0999.png"]
    src, out = tree(tmp_path / "in", *names), tmp_path / "out"
    assert outputs(plan(str(src / pattern), out), out) == ["s.0998.png", "s.1000.png", "s.10000.png"]
    assert outputs(plan(str(src / pattern), out / "m_####.png"), out) == ["m_0998.png", "m_1000.png", "m_10000.png"]


def test_frames_are_selected_and_gaps_are_reported(tmp_path: Path) -> None:
    src, out = tree(tmp_path / "in", *(f"s.{n}.jpg" for n in (1001, 1002, 1004, 1005, 1009))), tmp_path / "out"
    pattern = str(src / "s.####.jpg")
    notices: list[str] = []
    assert len(plan(pattern, out, notice=notices.append)) == 5
    assert "has no frame 1003,1006-1008" in notices[0]
    chosen = {"frames": parse_frame_range("1001,1003,1005")}
    assert outputs(plan(pattern, out, **chosen), out) == ["s.1001.png", "s.1005.png"]
    assert outputs(plan(src, out, **chosen), out) == ["s.1001.png", "s.1005.png"]
    reported = plan(pattern, out, missing="report", **chosen)
    assert outputs(reported, out) == ["s.1001.png", "s.1003.png", "s.1005.png"]
    with pytest.raises(ImageError, match="does not exist"):
        reported[1].read_image()
    with pytest.raises(UsageError, match=r"has no frame 1003; nothing was written"):
        plan(pattern, out, missing="error", **chosen)


_PARTS = st.tuples(st.integers(0, 60), st.integers(0, 60), st.sampled_from(["", "x", "y", ":"]), st.integers(1, 9))


@settings(max_examples=300)
@given(st.lists(_PARTS, min_size=1, max_size=4), st.sets(st.integers(0, 60)))
def test_frame_ranges_equal_the_sets_of_fileseq(parts: list[tuple[int, int, str, int]], present: set[int]) -> None:
    text = ",".join(f"{first}-{last}" + (f"{mode}{step}" if mode else "") for first, last, mode, step in parts)
    expected = {int(number) for each in text.split(",") for number in FrameSet(each)}
    ranges = parse_frame_range(text)
    assert sorted(ranges) == sorted(expected)
    assert ranges.count == len(expected)
    assert sorted(ranges.without(present)) == sorted(expected - present)


@pytest.mark.parametrize("text", ["1-10x0", "a", "1-", "1.5", "1-2-3", "\uff11"])
def test_text_that_is_no_frame_range_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a frame range"):
        parse_frame_range(text)


def test_output_names_follow_the_template(tmp_path: Path) -> None:
    src, out = tree(tmp_path / "in", "shot.1001.jpg", "cat.jpg", "cat.png"), tmp_path / "out"
    with pytest.raises(UsageError, match=r"cat.jpg and .*cat.png to .*--keep-suffix"):
        plan(src, out)
    kept = plan(src, out, template="{stem}{frame}{suffix}")
    assert outputs(kept, out) == ["cat.jpg.png", "cat.png.png", "shot.1001.jpg.png"]
    named = plan(src, out, template="{stem}_matte{frame}", exclude=["*.png"])
    assert outputs(named, out) == ["cat_matte.png", "shot_matte.1001.png"]
    for template in ("{nope}", "a/{stem}", "", "{stem"):
        with pytest.raises(UsageError, match="--name"):
            plan(src, out, template=template)


@settings(max_examples=30)
@given(st.integers(1, 7), st.sets(st.integers(0, 99), min_size=1, max_size=30))
def test_shards_are_a_stable_partition(tmp_path_factory: pytest.TempPathFactory, count: int, numbers: set[int]) -> None:
    """Every image is in one shard, which does not depend on other images."""
    root = tmp_path_factory.mktemp("tree")
    tree(root / "in", "always.jpg", *(f"{number}.jpg" for number in numbers))
    parts = [plan(root / "in", root / "out", shard=(i, count)) for i in range(1, count + 1)]
    names = [job.name.name for part in parts for job in part]
    assert sorted(names) == sorted(["always.jpg", *(f"{number}.jpg" for number in numbers)])
    alone = next(i for i, part in enumerate(parts) if any(job.name.name == "always.jpg" for job in part))
    for number in numbers:
        (root / "in" / f"{number}.jpg").unlink()
    assert [job.name.name for job in plan(root / "in", root / "out", shard=(alone + 1, count))] == ["always.jpg"]


@pytest.mark.parametrize("text", ["", "1", "0/3", "4/3", "a/b", "1/0", "-1/3", "1/" + "9" * 5000, "\u0661/3"])
def test_invalid_shard_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--shard is"):
        parse_shard(text)


def test_name_with_brackets_is_a_file_if_it_exists(tmp_path: Path) -> None:
    src = tree(tmp_path, "in/[a].jpg") / "in" / "[a].jpg"
    assert outputs(plan(src, tmp_path / "out"), tmp_path / "out") == ["[a].png"]


def test_include_and_exclude(tmp_path: Path) -> None:
    src = tree(tmp_path / "in", "a/1.jpg", "a/2.jpg", "b/1.jpg")
    out = tmp_path / "out"
    assert outputs(plan(src, out, include=["a/*"]), out) == ["a/1.png", "a/2.png"]
    assert outputs(plan(src, out, include=["1.*"], exclude=["b/*"]), out) == ["a/1.png"]
    assert outputs(plan(src, out, include=["*.jpg"], exclude=["*"]), out) == []
    with pytest.raises(
        UsageError, match=r"--include 'x\*' matches no image in .*, which has 3 images, such as a/1.jpg"
    ):
        plan(src, out, include=["x*"], exclude=["*"])
    with pytest.raises(UsageError, match=r"no image in .* has one, such as cat.jpg"):
        plan(tree(tmp_path / "cats", "cat.jpg"), out, frames=frozenset({1}))


def test_outputs_references_and_masks_are_skipped_with_a_notice(tmp_path: Path) -> None:
    src = tree(tmp_path / "in", "ref.jpg", "mask.png", "1.jpg", "out/1.png", "out/2.png")
    notices: list[str] = []
    jobs = plan(src, src / "out", references=[src / "ref.jpg", src / "mask.png"], notice=notices.append)
    assert [job.name.name for job in jobs] == ["1.jpg"]
    assert len(notices) == 2
    assert "out/1.png and 1 more" in notices[0]


def link(path: Path, target: Path) -> None:
    path.symlink_to(target, target_is_directory=True)


@pytest.mark.parametrize("src", ["in", "in/**/*.jpg", "in/**/a.####.jpg"])
def test_real_folders_take_precedence_over_links(tmp_path: Path, src: str) -> None:
    """Links into the tree and loops are skipped with a notice. Other links are followed each
    time."""
    tree(tmp_path, "in/sh020/a.0001.jpg", "in/sh020/deep/a.0002.jpg", "other/a.0003.jpg", "in/.versions/a.0004.jpg")
    link(tmp_path / "in/latest", tmp_path / "in/sh020")
    link(tmp_path / "in/zz", tmp_path / "in/sh020/deep")
    link(tmp_path / "in/sh020/loop", tmp_path / "in")
    for name in ("first", "second"):
        link(tmp_path / "in" / name, tmp_path / "other")
    link(tmp_path / "other/up", tmp_path)
    link(tmp_path / "other/across", tmp_path / "in/sh020")
    link(tmp_path / "in/version", tmp_path / "in/.versions")
    messages: list[str] = []
    skipped_files = SkippedFiles(messages.append)
    sources = find_sources(str(tmp_path / src), None, skipped_files)
    assert [path.relative_to(tmp_path / "in").as_posix() for path in sources.files] == [
        "first/a.0003.jpg",
        "second/a.0003.jpg",
        "sh020/a.0001.jpg",
        "sh020/deep/a.0002.jpg",
        "version/a.0004.jpg",
    ]
    assert skipped_files[LINK_INTO_TREE] == 4
    assert skipped_files[LINK_LOOP] == 3
    assert f"{tmp_path}/in/first/across and 3 more skipped: {LINK_INTO_TREE}" in messages
    assert len(messages) == len(+skipped_files)


@pytest.mark.parametrize(
    ("names", "src", "out", "message"),
    [
        ([], "in/a.####.jpg", "out", "no file matches .*in does not exist"),
        (["in/a.jpg"], "in", "in", "also the output folder"),
        (["in/a.jpg", "in/a.png"], "in", "out", "be written by several images"),
        (["in/a.png"], "in/a.png", "in", "also the output folder"),
        (["in/x/a.png"], "in/x", "in/x", "also the output folder"),
        (["in/notes.txt"], "in", "out", "no images were found"),
        ([], "in", "out", "does not exist"),
        ([], "in/*.jpg", "out", "no file matches"),
    ],
)
def test_invalid_sources_are_refused(tmp_path: Path, names: list[str], src: str, out: str, message: str) -> None:
    tree(tmp_path, *names)
    with pytest.raises(UsageError, match=message):
        plan(str(tmp_path / src), tmp_path / out)


def test_empty_and_binary_lists_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    with pytest.raises(UsageError, match="lists no images"):
        plan(tmp_path / "empty.txt", tmp_path / "out")
    (tmp_path / "utf16.txt").write_text("a.png\n", encoding="utf-16")
    with pytest.raises(UsageError, match="is UTF-16 text; expected UTF-8"):
        plan(tmp_path / "utf16.txt", tmp_path / "out")
    (tmp_path / "nul.txt").write_bytes(b"a.png\0b.png\0")
    with pytest.raises(UsageError, match="NUL characters in every line"):
        plan(tmp_path / "nul.txt", tmp_path / "out")


NAMES = st.lists(st.text("ab/.", min_size=1, max_size=6), min_size=1, max_size=8)


@settings(max_examples=80)
@given(NAMES)
def test_images_never_share_an_output(tmp_path_factory: pytest.TempPathFactory, names: list[str]) -> None:
    """For any tree, either every image has its own output in --out, or nothing is planned."""
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


@pytest.mark.parametrize("stem", ["icon@2x", "take#1", "C#", "a##b", "100%done", "$Final"])
def test_signs_in_names_are_ordinary_characters(icm: Icm, scene: Path, stem: str) -> None:
    """Frames, a glob and an output folder with ``@``, ``#``, ``%d`` or ``$F`` in their names."""
    (scene / "at").mkdir()
    for number in ("0001", "0003"):
        shutil.copy(scene / "ref.png", scene / "at" / f"{stem}.{number}.png")
    for src in (f"{stem}.%04d.png", f"{stem}.####.png", f"{stem}.*.png"):
        result = icm("--dry-run", src=scene / "at" / src)
        assert result.exit_code == 0, result.stderr
        assert result.stdout.count(f"{stem}.000") >= 2
    result = icm("--dry-run", src=scene / "at", frames="1-3")
    assert result.exit_code == 0, result.stderr
    assert f"{stem}.####.png has no frame 2" in result.stderr


@pytest.mark.parametrize(
    "folder", ["mattes@v1.2", "issue#42.v1", "a##v1.2", "100%done.v2", "v1.0#", "mattes#.v2", "m@.3"]
)
def test_output_folder_may_have_signs_in_its_name(icm: Icm, scene: Path, folder: str) -> None:
    result = icm("--dry-run", out=scene / folder)
    assert result.exit_code == 0, result.stderr
    assert f"{folder}/wall.png" in result.stdout
    with_extension = icm("--dry-run", out=scene / "m.####.txt")
    assert with_extension.exit_code == 2
    assert "frame pattern with extension .txt" in with_extension.stderr


def test_equally_plausible_placeholders_are_refused(icm: Icm, scene: Path) -> None:
    result = icm("--dry-run", src=scene / "a.####.b.####.png")
    assert result.exit_code == 2
    assert "2 placeholders for a frame number" in result.stderr


LONG_PATHS = {
    "src": "x" * 300,
    "out": "folder/" + "é" * 200,
    "ref": "y/" * 2100,
    "mask": "x" * 256,
    "root": "x" * 300,
    "gt": "x" * 300,
    "report": "x" * 300 + ".csv",
    "contact_sheet": "x" * 300 + ".png",
    "ocio": "x" * 300,
    "checkpoint": "x" * 300,
    "model": "x" * 300,
}


@pytest.mark.parametrize("option", LONG_PATHS)
def test_long_paths_are_refused_with_one_message(icm: Icm, scene: Path, option: str) -> None:
    result = icm(**{option: LONG_PATHS[option]})
    assert result.exit_code == 2
    flag = f"--{option.replace('_', '-')}"
    assert result.stderr.startswith(f"icm: {flag} ")
    assert "is too long for a path" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert len(result.stderr) < 500
    assert not (scene / "out").exists()


@pytest.mark.parametrize("option", LONG_PATHS)
def test_paths_with_nul_are_refused(scene: Path, option: str) -> None:
    given = {"ref": scene / "ref.png", "mask": scene / "mask.png", "src": scene / "imgs", "out": scene / "out"}
    with pytest.raises(UsageError, match="NUL character"):
        icm_cli.matte(**{**given, option: "a\0b"})  # type: ignore[arg-type]


def test_list_in_one_text_is_explained(icm: Icm, scene: Path) -> None:
    result = icm(src="\n".join(f"{scene}/imgs/{number}.png" for number in range(200)))
    assert result.exit_code == 2
    assert "give several files as a text list, or as lines on standard input" in result.stderr


def test_lines_outside_the_root_that_are_no_images_fail_alone(
    icm: Icm, scene: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    outside = tmp_path_factory.mktemp("outside")
    (outside / "notes").write_text("no image")
    (outside / "empty.png").touch()
    os.mkfifo(outside / "pipe.png")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as server:
        monkeypatch.chdir(outside)
        server.bind("socket.png")
    bad = ["/nope/x.0001.png", "/dev/zero", f"/{'z' * 5000}", *map(str, sorted(outside.iterdir()))]
    monkeypatch.chdir(scene)
    (scene / "list.txt").write_text("\n".join(["imgs/wall.jpg", *bad]))
    dry = icm("--dry-run", src="list.txt")
    assert dry.exit_code == 1
    for reason in (
        "/nope/x.0001.png: does not exist",
        "/dev/zero: is a device",
        "zzz...: does not exist",
        "pipe.png: is a pipe",
        "socket.png: is a socket",
        "empty.png: is empty (0 bytes)",
    ):
        assert reason in dry.stderr
    assert "2 new, 0 to be recomputed, 0 kept, 6 that would fail" in dry.stderr  # notes are found out by decoding
    run = icm(src="list.txt", report=scene / "r.json")
    assert run.exit_code == 1
    assert sum(line.startswith("icm: failed: ") for line in run.stderr.splitlines()) == len(bad)
    assert "z" * 200 not in dry.output + run.output
    assert [path.name for path in (scene / "out").rglob("*.png")] == ["wall.png"]


def test_special_files_are_no_source(icm: Icm, scene: Path) -> None:
    os.mkfifo(scene / "pipe.png")
    for src, kind in (("/dev/zero", "a device"), (scene / "pipe.png", "a pipe")):
        result = icm(src=src)
        assert result.exit_code == 2
        assert f"source {src} is {kind}; expected a folder, an image" in " ".join(result.stderr.split())


BAD_LINES = [
    b"x" * 300,
    b"9" * 5000,
    b"y/" * 3000,
    b"nul\0.png",
    b"latin-\xe9.png",
    b"gone.png",
    "\udc80".encode(errors="surrogatepass"),
]


@pytest.mark.parametrize("line", BAD_LINES)
@pytest.mark.parametrize("is_piped", [False, True])
def test_bad_line_of_a_list_fails_alone(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, line: bytes, is_piped: bool
) -> None:
    monkeypatch.chdir(scene)
    data = b"imgs/wall.jpg\r\n" + line + b"\n\nimgs/pad.0101.png"
    (scene / "list.txt").write_bytes(data)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    dry = icm("--dry-run", src="list.txt")
    assert dry.exit_code == 1
    assert "would fail: " in dry.stderr
    if is_piped:
        line_ = [sys.executable, "-m", "icm_cli.cli", "matte", "--ref", "ref.png", "--mask", "mask.png", "--src", "-"]
        line_ += ["--out", "out", "--model", str(scene.parent / "small.yaml"), "--device", "cpu"]
        result = subprocess.run(line_, input=data, capture_output=True, check=False)
        code, text = result.returncode, result.stderr.decode()
    else:
        run = icm(src="list.txt", report=scene / "r.csv")
        code, text = run.exit_code, run.stderr
    assert code == 1, text
    assert "Traceback" not in text
    assert sum(part.startswith("icm: failed: ") for part in text.splitlines()) == 1
    assert sorted(path.name for path in (scene / "out").rglob("*.png")) == ["pad.0101.png", "wall.png"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{stem", "has an unpaired { or }"),
        ("stem}", "has an unpaired { or }"),
        ("{}", "has the unknown field {}"),
        ("{0}", "has the unknown field {0}"),
        ("{stem.upper}", "has the unknown field {stem.upper}"),
        ("{stem[0]}", "has the unknown field {stem[0]}"),
        ("{stem!r}", "has a format for {stem}"),
        ("{frame:04d}", "has a format for {frame}"),
        ("{stem:{frame}}", "has a format for {stem}"),
        ("a/b", "is not a file name"),
        ("x" * 300, "is longer than a file name"),
    ],
)
def test_bad_templates_are_refused_with_the_fields(icm: Icm, template: str, message: str) -> None:
    result = icm("--dry-run", "--name", template)
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr) < 500
    assert "expected a file name with {stem}, {frame} and {suffix}" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_template_that_makes_no_name_is_refused(icm: Icm, scene: Path) -> None:
    empty = icm("--name", "")
    assert empty.exit_code == 2
    assert empty.stderr == "icm: --name is ''; expected text of 1 to 4096 printable characters\n"
    result = icm("--name", "{frame}")
    assert result.exit_code == 2
    assert "--name '{frame}' makes no name for " in result.stderr
    assert icm("--name", "{frame}", src=scene / "imgs" / "pad.0101.png").exit_code == 0


def test_names_that_become_too_long_fail_alone(icm: Icm, scene: Path) -> None:
    shutil.copy(scene / "imgs" / "wall.jpg", scene / "imgs" / f"{'w' * 240}.jpg")
    result = icm("--name", "{stem}" + "_matte" * 5 + "{frame}")
    assert result.exit_code == 1
    assert "the file system does not accept this name; choose other names with --name" in result.stderr
    assert len(list((scene / "out").rglob("*.png"))) == 3


@pytest.mark.parametrize("frames", ["", ",", "1" * 5000, "1-", "x", "1-3x0", "\u0661"])
def test_bad_frame_ranges_are_refused(icm: Icm, frames: str) -> None:
    result = icm(frames=frames)
    assert result.exit_code == 2
    assert "--frames" in result.stderr
    assert len(result.stderr) < 500


@pytest.mark.parametrize("token", ["%0999999999d", "$F99999", "%300d"])
def test_placeholders_with_many_digits_are_refused(icm: Icm, scene: Path, token: str) -> None:
    for options in ({"src": f"{scene}/a.{token}.png"}, {"out": f"{scene}/a.{token}.png"}):
        result = icm(**options)
        assert result.exit_code == 2
        assert "digits; expected at most 255" in result.stderr


@pytest.mark.parametrize(
    ("names", "wanted", "expected"),
    [
        (["s.9", "s.11"], None, {"s.#.png": "10"}),
        (["s.8", "s.9", "s.10", "s.12"], None, {"s.#.png": "11"}),
        (["s.98", "s.101"], None, {"s.##.png": "99-100"}),
        (["s.0998", "s.1000", "s.10001"], "998-1001", {"s.####.png": "999,1001"}),
        (["s.01", "s.03", "s.0001", "s.0003"], None, {"s.##.png": "2", "s.####.png": "2"}),
        (["s.001", "s.003", "s.9", "s.11"], None, {"s.###.png": "2", "s.#.png": "10"}),
    ],
)
def test_leading_zeros_tell_sequences_apart(
    tmp_path: Path, names: list[str], wanted: str | None, expected: dict[str, str]
) -> None:
    paths = [tmp_path / f"{name}.png" for name in names]
    missing = missing_frames(paths, (wanted and parse_frame_range(wanted)) or None)
    assert {Path(str(pattern)).name: str(frames) for pattern, frames in missing.items()} == expected


def test_excluded_frames_of_an_unpadded_sequence_are_not_missing(icm: Icm, scene: Path) -> None:
    for number in (8, 9, 10, 11):
        shutil.copy(scene / "imgs" / "wall.jpg", scene / f"s.{number}.jpg")
    result = icm("--exclude", "s.10.jpg", src=scene / "s.#.jpg", missing="error")
    assert result.exit_code == 0, result.stderr


def test_numbers_sort_by_value(tmp_path: Path) -> None:
    names = ["a9", "a10", "a010", "a99999999999999999999", f"a{'9' * 200}", "b"]
    paths = [tmp_path / name for name in names]
    assert sorted(paths[::-1], key=natural_sort_key) == [
        tmp_path / name for name in (names[0], "a010", "a10", *names[3:])
    ]


def test_names_that_are_not_utf_8_have_a_shard(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Path(os.fsdecode(os.fsencode(tmp_path / "in") + b"/odd\xff.jpg")).touch()
    parts = [plan(tmp_path / "in", tmp_path / "out", shard=(number, 2)) for number in (1, 2)]
    assert sorted(map(len, parts)) == [0, 1]
