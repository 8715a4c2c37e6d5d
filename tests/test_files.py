"""Atomic writes, and a cache folder that is always writable."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import pytest

from icm_cli.errors import FileWriteError
from icm_cli.files import atomic_writes, digests, system_errors


@pytest.fixture(autouse=True)
def _forget_the_cache_folder() -> Iterator[None]:
    digests.cache_folder.cache_clear()
    yield
    digests.cache_folder.cache_clear()


def test_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with contextlib.suppress(ZeroDivisionError), atomic_writes.atomic_write(path) as file:
        file.write(b"half of the new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["a.txt"]


def temporary_of(pid: int, space: str = "") -> str:
    """Return the name of a temporary file of a process; ``space``: that of another machine or container."""
    ours, _, rest = atomic_writes.temporary_name().removeprefix(atomic_writes.TEMPORARY_PREFIX).partition("-")
    return f"{atomic_writes.TEMPORARY_PREFIX}{space or ours}-{pid}-{rest.partition('-')[2]}"


def test_only_temporaries_of_dead_processes_are_removed(tmp_path: Path) -> None:
    mine, dead = tmp_path / temporary_of(os.getpid()), tmp_path / temporary_of(999999999)
    fresh, stale = tmp_path / temporary_of(999999999, "other"), tmp_path / temporary_of(1, "other")
    earlier = tmp_path / ".icm-some-host-1-dd.tmp"  # of icm 0.1
    reused = tmp_path / temporary_of(os.getpid())  # of an earlier process with our id, as in containers
    for path in (mine, dead, fresh, stale, earlier, reused, tmp_path / ".other.tmp"):
        path.touch()
    long_ago = time.time() - 2 * atomic_writes.STALE_AFTER_S
    for path in (stale, earlier, reused):
        os.utime(path, (long_ago, long_ago))
    assert atomic_writes.remove_stale_temporaries(tmp_path) == 4
    assert {path.name for path in tmp_path.iterdir()} == {mine.name, fresh.name, ".other.tmp"}


WRITER = """
import sys
from pathlib import Path
from icm_cli.files.atomic_writes import atomic_write
with atomic_write(Path(sys.argv[1])) as file:
    file.write(b"all")
    print("writing", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("is_killed", [False, True])
def test_temporary_file_of_a_running_process_is_kept(tmp_path: Path, is_killed: bool) -> None:
    """The file is old and its process appears dead, as for another container on a slow drive."""
    line = [sys.executable, "-c", WRITER, str(tmp_path / "a")]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "writing\n"
        (path,) = tmp_path.iterdir()
        path = path.rename(tmp_path / temporary_of(999999999)) if is_killed else path
        os.utime(path, (1, 1))
        assert atomic_writes.remove_stale_temporaries(tmp_path) == 0
        if is_killed:
            process.kill()
            process.wait()
            assert atomic_writes.remove_stale_temporaries(tmp_path) == 1
            return
        process.communicate("\n")
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_temporary_file_is_kept_by_the_clock_of_its_drive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / temporary_of(1, "other")
    path.touch()
    monkeypatch.setattr(time, "time", lambda: path.stat().st_mtime + 9 * atomic_writes.STALE_AFTER_S)
    assert atomic_writes.remove_stale_temporaries(tmp_path) == 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_drives_without_fsync_locks_or_links_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    unsupported = Mock(side_effect=OSError(number, os.strerror(number)))
    for module, name in ((os, "fsync"), (os, "link"), (fcntl, "flock")):
        monkeypatch.setattr(module, name, unsupported)
    for check in (None, lambda: None):
        with atomic_writes.atomic_write(tmp_path / "a", check) as file:
            file.write(b"all")
        assert (tmp_path / "a").read_bytes() == b"all"
        (tmp_path / "a").unlink()
    assert unsupported.call_count >= 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("has_locks", [True, False])
def test_check_and_rename_are_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_locks: bool) -> None:
    """Many threads write one file, which must not be replaced: exactly one of them succeeds."""
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, "no locks")))
    path, start = tmp_path / "a", threading.Barrier(8)

    def check() -> None:
        if path.exists():
            raise FileExistsError(errno.EEXIST, "exists")
        time.sleep(0.01)

    def write(number: int) -> bool:
        start.wait()
        try:
            with atomic_writes.atomic_write(path, check) as file:
                file.write(str(number).encode())
        except FileWriteError:
            return False
        return True

    with ThreadPoolExecutor(8) as executor:
        wins = list(executor.map(write, range(8)))
    assert wins.count(True) == 1
    assert path.read_text() == str(wins.index(True))
    assert [each.name for each in tmp_path.iterdir()] == ["a"]


def test_cache_falls_back_to_a_writable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ICM_CACHE", str(tmp_path / "file" / "no"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert digests.cache_folder() == tmp_path / "xdg" / "icm"


def test_cache_works_without_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("ICM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert digests.cache_folder().parent == tmp_path


def test_digest_depends_on_the_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ICM_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = digests.cached_file_digest(path)
    assert digests.cached_file_digest(path) == first
    path.write_bytes(b"two!")
    assert digests.cached_file_digest(path) != first
    assert digests.combined_digest("ab", "c") != digests.combined_digest("a", "bc")


def test_a_transient_error_is_retried_and_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(system_errors.time, "sleep", waits.append)
    failures = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EMFILE, "Too many open files")]

    def read() -> str:
        if failures:
            raise failures.pop()
        return "content"

    assert system_errors.retry_transient(read) == "content"
    assert waits == list(system_errors.RETRY_DELAYS_S[:2])
    failures[:] = [PermissionError(errno.EACCES, "Permission denied")]
    with pytest.raises(PermissionError):
        system_errors.retry_transient(read)
    assert len(waits) == 2


def test_a_drive_that_is_gone_is_not_waited_for_at_each_file(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(system_errors, "_wasted_s", 0.0)
    monkeypatch.setattr(system_errors.time, "sleep", waits.append)

    def read() -> None:
        raise OSError(errno.EIO, "Input/output error")

    for _ in range(100):
        with pytest.raises(OSError, match="Input/output"):
            system_errors.retry_transient(read)
    assert system_errors.MAX_WASTED_S <= sum(waits) < system_errors.MAX_WASTED_S + sum(system_errors.RETRY_DELAYS_S)


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
        f"{re.escape(os.strerror(number))}; .*{advice}",
        system_errors.describe_os_error(OSError(number, os.strerror(number))),
    )


@pytest.mark.parametrize(("flags", "reason"), [(os.ST_RDONLY, "Read-only file system"), (0, "Permission denied")])
def test_a_folder_that_cannot_be_written_is_found_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: int, reason: str
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "statvfs", lambda _: Mock(f_flag=flags))
    with pytest.raises(FileWriteError, match=reason):
        atomic_writes.check_would_be_writable(tmp_path / "out")
