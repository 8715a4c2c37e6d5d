"""Atomic writes, and a cache folder that is always writable."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from icm_cli import files


@pytest.fixture(autouse=True)
def _forget_the_cache_folder() -> Iterator[None]:
    files.cache_folder.cache_clear()
    yield
    files.cache_folder.cache_clear()


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with contextlib.suppress(ZeroDivisionError), files.atomic_write(path) as file:
        file.write(b"half of the new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]


def test_only_temporaries_of_dead_processes_are_removed(tmp_path: Path) -> None:
    host = os.uname().nodename
    mine, dead = tmp_path / f".icm-{host}-{os.getpid()}-aa.tmp", tmp_path / f".icm-{host}-999999999-bb.tmp"
    fresh, stale = tmp_path / ".icm-other-host-1-cc.tmp", tmp_path / ".icm-other-host-1-dd.tmp"
    for path in (mine, dead, fresh, stale, tmp_path / ".other.tmp"):
        path.touch()
    long_ago = time.time() - 2 * files.STALE_AFTER_S
    os.utime(stale, (long_ago, long_ago))
    assert files.remove_stale_temporaries(tmp_path) == 2
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, fresh.name, ".other.tmp"}


def test_cache_falls_back_to_a_writable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ICM_CACHE", str(tmp_path / "file" / "no"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg" / "icm"


def test_cache_works_without_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ICM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert files.cache_folder().parent == tmp_path


def test_digest_depends_on_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = files.cached_file_digest(path)
    assert files.cached_file_digest(path) == first
    path.write_bytes(b"two!")
    assert files.cached_file_digest(path) != first
    assert files.combined_digest("ab", "c") != files.combined_digest("a", "bc")


def test_a_transient_error_is_retried_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(files.time, "sleep", waits.append)
    failures = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EMFILE, "Too many open files")]

    def read() -> str:
        if failures:
            raise failures.pop()
        return "content"

    assert files.retry_transient(read) == "content"
    assert waits == list(files.RETRY_DELAYS_S[:2])
    failures[:] = [PermissionError(errno.EACCES, "Permission denied")]
    with pytest.raises(PermissionError):
        files.retry_transient(read)
    assert len(waits) == 2


def test_a_drive_that_is_gone_is_not_waited_for_at_each_file(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(files, "_wasted_s", 0.0)
    monkeypatch.setattr(files.time, "sleep", waits.append)

    def read() -> None:
        raise OSError(errno.EIO, "Input/output error")

    for _ in range(100):
        with pytest.raises(OSError, match="Input/output"):
            files.retry_transient(read)
    assert files.MAX_WASTED_S <= sum(waits) < files.MAX_WASTED_S + sum(files.RETRY_DELAYS_S)


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ESTALE, "the drive or the network did not answer"),
        (errno.EMFILE, "ulimit -n"),
        (errno.EACCES, "give this user permission"),
    ],
)
def test_system_errors_are_described_with_advice(number: int, advice: str) -> None:
    assert re.match(
        f"{re.escape(os.strerror(number))}; .*{advice}", files.describe_os_error(OSError(number, os.strerror(number)))
    )
