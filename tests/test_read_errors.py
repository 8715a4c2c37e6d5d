"""Errors of the system while files are read: reported as what they are, and retried if they may pass."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import COMPOSITES, Icm, output_files, shrink

from icm_cli.errors import FileAccessError, ImageError
from icm_cli.files import system_errors
from icm_cli.images.image_file import ReopeningFile
from icm_cli.images.reading import read_alpha
from icm_cli.images.writing import OutputFormat, read_provenance, write_alpha

SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
/* FAULTS="open:116:-1:a.png read:5:2:b.png": errno of the calls for files with this name, and how many fail */
static struct {char call[8]; int number, left; char name[64];} faults[16];
static int count = -1, fd_fault[4096];
static int find(const char *call, const char *path) {
    if (count < 0) {
        const char *s = getenv("FAULTS");
        int used;
        for (count = 0; s && sscanf(s, "%7[^:]:%d:%d:%63s%n", faults[count].call, &faults[count].number,
                                    &faults[count].left, faults[count].name, &used) == 4; s += used + (s[used] == ' '))
            count++;
    }
    for (int n = 0; n < count; n++)
        if (!strcmp(faults[n].call, call) && strstr(path, faults[n].name) && faults[n].left) return n;
    return -1;
}
static int fails(int n) {
    if (n < 0 || !faults[n].left) return 0;
    if (faults[n].left > 0) faults[n].left--;
    errno = faults[n].number;
    return 1;
}
#define OPEN(function)                                                                      \
    int function(const char *path, int flags, ...) {                                        \
        va_list rest; va_start(rest, flags); int mode = va_arg(rest, int); va_end(rest);    \
        if (fails(find("open", path))) return -1;                                           \
        int fd = ((int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #function))(path, flags, mode); \
        if (fd >= 0 && fd < 4096) fd_fault[fd] = find("read", path) + 1;                    \
        return fd;                                                                          \
    }
OPEN(open)
OPEN(open64)
#define FOPEN(function)                                                                     \
    FILE *function(const char *path, const char *mode) {                                    \
        if (fails(find("open", path)) || fails(find("read", path))) return 0;               \
        return ((FILE *(*)(const char *, const char *))dlsym(RTLD_NEXT, #function))(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)
ssize_t read(int fd, void *buffer, size_t size) {
    if (fd >= 0 && fd < 4096 && fd_fault[fd] && fails(fd_fault[fd] - 1)) return -1;
    return ((ssize_t (*)(int, void *, size_t))dlsym(RTLD_NEXT, "read"))(fd, buffer, size);
}
"""


@pytest.mark.slow
def test_drives_that_fail_are_not_called_damage(scene: Path, small_model: Path, tmp_path: Path) -> None:
    """The shim lets calls of the C library fail, as those of a network drive do."""
    (tmp_path / "shim.c").write_text(SHIM)
    shim = tmp_path / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-w", "-o", shim, tmp_path / "shim.c", "-ldl"], check=True)
    folder = tmp_path / "drive"
    folder.mkdir()
    shrink(COMPOSITES / "imgs" / "brickwall.jpg", folder / "gone.jpg", 120)
    image = cv2.imread(str(folder / "gone.jpg"))
    for name in ("slow.png", "slow.tif", "whole.bmp"):
        cv2.imwrite(str(folder / name), image)
    for name in ("late.png", "late.tif", "gone.tif"):  # 16 bits, which OpenImageIO reads
        cv2.imwrite(str(folder / name), image.astype(np.uint16) * 257)
    faults = {
        "open:110:-1:gone.jpg": "gone.jpg: cannot be read: Connection timed out; the drive or the network did not",
        "read:5:-1:gone.tif": "gone.tif: cannot be read: Input/output error; the drive or the network did not answer",
        "read:116:2:slow.png": "",
        "open:116:1:slow.tif": "",
        "read:116:3:late.png": "",
        "open:11:2:late.tif": "",
    }
    line = [sys.executable, "-c", "from icm_cli.cli import app; app()", "matte", "--src", folder]
    line += ["--ref", scene / "ref.png", "--mask", scene / "mask.png", "--out", tmp_path / "out", "--keep-suffix"]
    line += ["--model", small_model, "--device", "cpu"]
    environment = {**os.environ, "LD_PRELOAD": str(shim), "FAULTS": " ".join(faults)}
    ended = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    for message in faults.values():
        assert message in ended.stderr
    assert "damaged" not in ended.stderr
    assert "failed       2" in ended.stderr + ended.stdout
    names = {"late.png.png", "late.tif.png", "slow.png.png", "slow.tif.png", "whole.bmp.png"}
    assert {path.name for path in output_files(tmp_path / "out")} == names


@contextmanager
def open_file_limit(further: int) -> Iterator[None]:
    """Allow this number of further open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/", os.O_RDONLY)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + further, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize(("suffix", "further"), [(".png", 0), (".exr", 0), (".exr", 1)])
def test_too_many_open_files_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, further: int
) -> None:
    """``further``: 1 lets Python open the file, and OpenImageIO not."""
    monkeypatch.setattr(system_errors.time, "sleep", lambda _: None)
    monkeypatch.setattr(system_errors, "_wasted_s", 0.0)
    path = tmp_path / f"a{suffix}"
    write_alpha(path, np.eye(40, dtype=np.float32), {"icm-digest": "d"}, OutputFormat(suffix[1:]))  # type: ignore[arg-type]
    read_alpha(path)
    with open_file_limit(further):
        with pytest.raises(FileAccessError, match=r"Too many open files; raise the limit, as with ulimit -n 4096"):
            read_alpha(path)
        with pytest.raises(FileAccessError):  # an alpha that cannot be read now is not one that may be replaced
            read_provenance(path)


def test_stale_handle_is_opened_again_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system_errors.time, "sleep", lambda _: None)
    path = tmp_path / "a.bin"
    content = np.random.default_rng(0).bytes(100_000)
    path.write_bytes(content)
    with ReopeningFile(path) as file:
        assert file.read(10_000) == content[:10_000]
        stale = os.open(tmp_path, os.O_RDONLY)  # reads of a folder fail, as those of a stale handle do
        os.lseek(stale, file.tell(), os.SEEK_SET)
        os.dup2(stale, file.fileno())
        monkeypatch.setattr(system_errors, "is_transient", lambda error: error.errno == errno.EISDIR)
        assert file.readall() == content[10_000:]
        os.dup2(stale, file.fileno())
        path.write_bytes(content[::-1] + b"more")
        with pytest.raises(ImageError, match="was replaced while it was read; run the same command again"):
            file.readall()
        os.close(stale)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO])
def test_sources_on_a_drive_that_fails_end_the_run_with_one_message(
    icm: Icm, scene: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(system_errors.time, "sleep", lambda _: None)
    scan = os.scandir

    def fail_to_scan(path: str) -> object:
        if str(path).endswith("/drive"):
            raise OSError(number, os.strerror(number), str(path))
        return scan(path)

    (scene / "imgs" / "drive").mkdir()
    monkeypatch.setattr(os, "scandir", fail_to_scan)
    result = icm()
    if number == errno.EACCES:
        assert result.exit_code == 0
        assert "drive skipped: a folder that cannot be read" in result.output
    else:
        assert result.exit_code == 3
        assert "drive cannot be accessed: Input/output error; the drive or the network did not" in result.output
