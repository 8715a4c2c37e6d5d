"""Use reviewed images as references and negatives, and recompute the alphas that are not accepted.

The recompute runs the ``icm matte`` command that the page shows, in its own process:

- The command that users can repeat is exactly the one that made the alphas.
- It can be stopped like every run, and continues if the server is killed. It holds a lock and writes its events to a
  file, so that the next server follows it instead of starting a second one.
- Its memory, or a crash, does not affect the server.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from icm_cli.environment import start_module
from icm_cli.errors import IcmError, ImageError, OutputError, UsageError, format_count
from icm_cli.files.atomic_writes import identify_file, open_locked, process_space
from icm_cli.files.digests import combined_digest
from icm_cli.files.system_errors import describe_os_error, error_for_failed_write
from icm_cli.geometry import ImageU8
from icm_cli.matting.run_record import command_line
from icm_cli.options import MatteOptions
from icm_cli.review.corrections import Corrections
from icm_cli.review.images import DisplayImages
from icm_cli.review.references import (
    Area,
    Kind,
    check_teachable,
    mask_path,
    needs_base_masks,
    write_base_masks,
    write_taught_mask,
)
from icm_cli.review.run import ReviewRun
from icm_cli.review.state import ImageState, ReviewState
from icm_cli.review.undo import Entry, UndoCopies, link_or_copy, undo_cause

BEFORE_NAME, LOG_NAME = "before", "recompute.log"
EVENTS_NAME, LOCK_NAME = "recompute.jsonl", "recompute.lock"
"""Files below ``.icm`` of a recompute: its events, and its lock with the id of its process."""
LOCK_TIMEOUT_S = 0.5
FOLLOW_INTERVAL_S = 0.2
"""Interval in which the file with the events is read."""
INTERRUPTED_CODES = (130, 143, -15)
"""Exit codes of a recompute that was stopped by SIGINT or SIGTERM."""
SAVE_INTERVAL_S = 3.0
"""Interval at which the differences of recomputed alphas are saved, and then shown by the page."""
DIFFERENCE_DIGITS = 3
"""Differences of alphas (0..1) are rounded to this many decimal places, so that invisible ones become 0."""
MIN_OBJECT_PX, MIN_OBJECT_FRACTION = 64, 1 / 5000
"""Smallest area that a difference of alphas refers to, so that noise in an empty alpha counts little.

It is this fraction of the image, but at most this number of pixels.
"""
STOP_TIMEOUT_S = 60.0
"""Seconds that a recompute has to finish its files when the server stops. Then it is killed."""
READ_TIMEOUT_S = 0.3
"""Seconds that the first request for the progress waits for the events of the last recompute to be read."""
LOW_PRIORITY = 3
"""Unix niceness of a recompute, so that the server still answers fast."""
RecomputeState = Literal["idle", "running", "done", "stopped", "failed"]


@dataclass
class _Progress:
    """Progress of a recompute."""

    state: RecomputeState = "idle"
    done: int = 0
    """Number of images that have ended, without those whose alpha is kept."""
    total: int = 0
    """Number of all images, without those whose alpha is known to be kept."""
    kept: int = 0
    message: str = ""

    def add(self, event: Mapping[str, Any]) -> None:
        """Count an image that has ended. ``event``: the event of the image."""
        self.kept += event["status"] == "kept"
        self.done, self.total = event["ended"] - self.kept, event["total"] - self.kept


class Teaching:
    """References and negatives from reviewed images, and the recompute. All methods are thread-safe."""

    def __init__(
        self, run: ReviewRun, state: ReviewState, corrections: Corrections, notice: Callable[[str], None]
    ) -> None:
        self._run, self._state, self._corrections, self._notice = run, state, corrections, notice
        self._images, self._copies = DisplayImages(run), UndoCopies(run.record_folder)
        self._lock = threading.Lock()
        self._progress = _Progress()
        self._events, self._lock_path = run.record_folder / EVENTS_NAME, run.record_folder / LOCK_NAME
        self._is_closed = threading.Event()
        self._is_followed = False
        """Whether the running recompute was started by another server."""
        self._is_unread = self._events.exists()
        """Whether it is not known yet how the last recompute has ended."""
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None

    def teach(self, id: int, kind: Kind, area: Area) -> None:
        """Use an image as a reference or a negative, with a mask that is saved now.

        ``area``: what the mask covers, "alpha" (the object in the alpha) or "image" (everything). Raises UsageError,
        ImageError, OutputError, or ModelNotReadyError.
        """
        run, name = self._run, self._run.names[id]
        check_teachable(run.options, run.jobs[id], kind, area)
        with self._corrections.image_lock(id):  # no decision replaces the alpha meanwhile
            if kind == "reference" and not run.refresh(id).is_reviewed:
                raise UsageError(f"{name} is not accepted; a reference needs a correct alpha: accept it first (A)")
            if kind == "reference" and needs_base_masks(run.options):
                write_base_masks(run.record_folder, self._corrections.base_references())
            height, width = self._images.display_size(id)
            alpha = np.full((height, width), 255, np.uint8) if area == "image" else self._images.read_alpha(id)
            file_name = f"{combined_digest(name, alpha.tobytes())[:16]}.png"
            write_taught_mask(mask_path(run.record_folder, kind, file_name), alpha, kind)
            self._corrections.store_use(id, {"kind": kind, "area": area, "mask": file_name})

    def forget(self, id: int) -> None:
        """Stop using an image as a reference or negative."""
        self._corrections.store_use(id, None)

    def options(self) -> MatteOptions:
        """Return the options of the recompute: those of the run, with the hints and the taught images."""
        return self._corrections.options()

    def recompute_progress(self) -> dict[str, Any]:
        """Return the progress of the recompute as JSON, with the changed images, largest difference first."""
        self._follow_other()
        changed = sorted(self._read_changes().items(), key=lambda item: -item[1])
        with self._lock:
            progress = self._progress
            return {
                "state": progress.state,
                "done": progress.done,
                "total": progress.total,
                "message": progress.message or self._last_notice(),
                "changed": [{"id": id, "difference": value} for id, value in changed],
            }

    def _last_notice(self) -> str:
        """Return how far a recompute has learned the references; "" if it does not learn. The caller holds the lock."""
        if self._progress.state != "running" or self._progress.done > 0:
            return ""
        with contextlib.suppress(OSError):
            lines = (self._run.record_folder / LOG_NAME).read_text(errors="replace").splitlines()
            return lines[-1].removeprefix("icm: ") if lines and "learning" in lines[-1] else ""
        return ""

    def start_recompute(self) -> None:
        """Start a recompute, unless one is running. Raises OutputError if its files cannot be written."""
        with self._lock:
            if self._progress.state == "running":
                return
            lock_fd = open_locked(self._lock_path, LOCK_TIMEOUT_S)
            if lock_fd is None:
                return  # another server runs one, which recompute_progress() will follow
            try:
                os.truncate(lock_fd, 0)
                self._events.write_bytes(b"")
                (self._run.record_folder / LOG_NAME).write_bytes(b"")
            except OSError as error:
                os.close(lock_fd)
                raise error_for_failed_write(self._events, error) from error
            self._is_unread = False
            self._progress = _Progress("running", total=len(self._run.jobs))
            self._thread = threading.Thread(target=self._recompute, args=(lock_fd,), name="icm-recompute")
            self._thread.start()

    def stop_recompute(self) -> None:
        """Stop the recompute after the images that are being written. Raises UsageError if that is impossible."""
        with self._lock:
            if self._progress.state != "running":
                return
            if self._is_followed:
                self._stop_other()
            elif self._process is not None:
                self._process.terminate()
            self._progress.message = "stopping"

    def close(self) -> None:
        """Stop the recompute of this server, and wait for its end."""
        self._is_closed.set()
        if not self._is_followed:
            self.stop_recompute()
        if self._thread is not None:
            self._thread.join(STOP_TIMEOUT_S)
        if self._process is not None:
            self._process.kill()

    def _follow_other(self) -> None:
        """Begin to follow the recompute of another server, if there is one. That server may have been killed.

        The first call also reads how the last recompute has ended.
        """
        with self._lock:
            if self._progress.state == "running":
                return
            is_locked = self._is_locked()
            if not (is_locked or self._is_unread):
                return
            self._is_unread = False
            message = "started by another icm review" if is_locked else "comparing the alphas of the last recompute"
            self._progress = _Progress("running", total=len(self._run.jobs), message=message)
            self._is_followed = True
            self._thread = threading.Thread(target=self._follow, name="icm-recompute")
            self._thread.start()
        self._thread.join(READ_TIMEOUT_S)

    def _is_locked(self) -> bool:
        """Return whether a process holds the lock of the recompute. In a read-only folder, none does."""
        if not self._lock_path.exists():
            return False
        try:
            lock = open_locked(self._lock_path, 0)
        except OutputError:
            return False
        if lock is not None:
            os.close(lock)
        return lock is None

    def _stop_other(self) -> None:
        """Stop the recompute of another server on this machine. Raises UsageError."""
        if not self._is_locked():  # it has ended, and another process may have its id
            return
        space, _, pid = self._lock_path.read_text().partition(" ")
        if space != process_space() or not pid.isdigit():
            raise UsageError("the recompute runs on another machine, or is just starting; stop it where it was started")
        try:
            os.kill(int(pid), signal.SIGTERM)
        except OSError as error:
            raise UsageError(f"the recompute cannot be stopped: {describe_os_error(error)}") from error

    def _follow(self) -> None:
        """Follow, in a thread, a recompute that another server started, until it ends.

        A recompute that has ended is followed too: its events say how it ended.
        """
        before_folder = self._run.record_folder / BEFORE_NAME
        state: RecomputeState = "stopped"
        message = "it ended before all images were recomputed; start it again to continue"
        image_events, failures = list[dict[str, Any]](), 0
        try:
            for event in self._follow_events(self._is_locked):
                if event["event"] == "image":
                    image_events.append(event)
                    failures += self._has_failed(event)
                    with self._lock:
                        self._progress.add(event)
                elif event["event"] == "error" and event["exit_code"] not in INTERRUPTED_CODES:
                    state, message = "failed", event["message"]
                elif event["event"] == "finished" and event["exit_code"] is not None:  # None: interrupted
                    state, message = "done", self._describe_failures(failures)
            if before_folder.exists() and not self._is_closed.is_set():
                self._compare_remaining(image_events, before_folder)
                if state == "done":
                    shutil.rmtree(before_folder, ignore_errors=True)
        except (IcmError, OSError) as error:
            state, message = "failed", str(error)
        finally:
            with self._lock:
                self._progress.state, self._progress.message, self._is_followed = state, message, False

    def _compare_remaining(self, image_events: Sequence[dict[str, Any]], before_folder: Path) -> None:
        """Compare the alphas that another server had not compared yet when it was killed."""
        changes: dict[int, float] = {}
        for event in image_events:
            if self._saved_folder(before_folder, event["name"]).exists():
                changes |= self._compare(event, before_folder)
        self._save_changes(changes, before_folder)

    def _read_changes(self) -> dict[int, float]:
        """Return the saved differences that are not 0, by the id of the image."""
        _, states = self._state.read_all()
        changes = {self._run.find_id(name): image.change for name, image in states.items()}
        return {id: change for id, change in changes.items() if id is not None and change}

    def _follow_events(self, is_running: Callable[[], bool]) -> Iterator[dict[str, Any]]:
        """Yield the events of a recompute from their file until it ends.

        When this server stops, a recompute of its own is followed to its end, but not that of another server.
        """
        with self._events.open("rb") as file:
            incomplete_line = b""
            while not (self._is_followed and self._is_closed.is_set()):
                has_ended = not is_running()  # before the file is read, so that no event is missed
                *lines, incomplete_line = (incomplete_line + file.read()).split(b"\n")
                for line in lines:
                    if line.startswith(b"{"):  # libraries may print anything
                        yield json.loads(line)
                if has_ended:
                    return
                time.sleep(FOLLOW_INTERVAL_S)

    def _recompute(self, lock_fd: int) -> None:
        """Run the whole recompute, in its own thread. ``lock_fd``: descriptor of the locked file, which is closed."""
        before_folder = self._run.record_folder / BEFORE_NAME
        state: RecomputeState = "failed"
        message = "the recompute ended unexpectedly; the log of the server says more"
        try:
            is_continued = before_folder.exists()
            self._save_alphas(before_folder)
            if not is_continued:
                with self._state.edit_all() as images:
                    for image in images.values():
                        image.change = None
            state, message = self._run_command(before_folder, lock_fd)
        except (IcmError, OSError) as error:
            message = str(error)
        finally:
            if state == "done":
                shutil.rmtree(before_folder, ignore_errors=True)
            with self._lock:
                self._progress.state, self._progress.message = state, message
                self._process = None
                os.close(lock_fd)

    def _save_alphas(self, folder: Path) -> None:
        """Save all alphas and trimaps in a folder, as hard links."""
        self._run.scan_alphas()  # another run may have added images
        try:
            shutil.rmtree(folder, ignore_errors=True)  # left by an interrupted recompute
            for id in range(len(self._run.jobs)):
                self._saved_folder(folder, self._run.names[id]).mkdir(parents=True)
                for output, saved in self._saved_outputs(folder, id).items():
                    if output.is_file():
                        link_or_copy(output, saved)
        except OSError as error:
            raise error_for_failed_write(folder, error) from error

    def _saved_folder(self, folder: Path, name: str) -> Path:
        """Return the folder in which the outputs of an image are saved, given by its name.

        It exists until the image is compared, even if the image has no alpha. An image that was not listed when the
        recompute began has none, because its earlier alpha is not known.
        """
        return folder / combined_digest(name)[:32]

    def _saved_outputs(self, folder: Path, id: int) -> dict[Path, Path]:
        """Return the outputs of an image, each with the path at which it is saved."""
        saved_folder, outputs = self._saved_folder(folder, self._run.names[id]), self._run.jobs[id].outputs
        return {output: saved_folder / f"{number}{output.suffix}" for number, output in enumerate(outputs)}

    def _run_command(self, before_folder: Path, lock_fd: int) -> tuple[RecomputeState, str]:
        """Run ``icm matte``, which keeps the lock too. Return how it ended, and a message for the page."""
        words = [*shlex.split(command_line(self.options()))[1:], "--progress", "json"]
        with (self._run.record_folder / LOG_NAME).open("wb") as log, self._events.open("wb") as events:
            process = start_module(
                "icm_cli", *words, stdin=subprocess.DEVNULL, stdout=events, stderr=log, pass_fds=[lock_fd]
            )
        os.pwrite(lock_fd, f"{process_space()} {process.pid}".encode(), 0)
        with self._lock:
            self._process = process
            if self._progress.message:  # stop was called meanwhile
                process.terminate()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, LOW_PRIORITY)  # so that answers stay fast
        with process:
            failures, error = self._read_events(process, before_folder)
        code = process.returncode
        if code in INTERRUPTED_CODES:
            return "stopped", "the alphas that are not recomputed yet are unchanged"
        if error or code not in (0, 1):  # 1: some images failed
            return "failed", error or f"icm matte ended with exit code {code}; see {log.name}"
        return "done", self._describe_failures(failures)

    def _read_events(self, process: subprocess.Popen[bytes], before_folder: Path) -> tuple[int, str]:
        """Read the events of ``icm matte`` until it ends, and report its progress.

        Returns the number of images that failed, and the error that ended the run or "".
        """
        failures, error, saved_at = 0, "", time.monotonic()
        unsaved: dict[int, float] = {}
        for event in self._follow_events(lambda: process.poll() is None):
            if event["event"] == "error":
                error = event["message"]
            elif event["event"] == "image":
                failures += self._has_failed(event)
                unsaved |= self._compare(event, before_folder)
                with self._lock:
                    self._progress.add(event)
            if time.monotonic() - saved_at > SAVE_INTERVAL_S:
                self._save_changes(unsaved, before_folder)
                unsaved, saved_at = {}, time.monotonic()
        self._save_changes(unsaved, before_folder)
        return failures, error

    def _has_failed(self, event: Mapping[str, Any]) -> bool:
        """Return whether an image has failed. One that a person accepted during the recompute has not."""
        if event["status"] != "failed":
            return False
        id = self._run.find_id(event["name"])
        return id is None or not self._run.refresh(id).is_reviewed

    def _describe_failures(self, failures: int) -> str:
        """Return the message about images that failed in a recompute; "" without any."""
        log = self._run.record_folder / LOG_NAME
        return f"{format_count(failures, 'image')} failed; see {log}" if failures else ""

    def _compare(self, event: Mapping[str, Any], before_folder: Path) -> dict[int, float]:
        """Return the difference of a recomputed alpha to the one before, as {id: 0..1}; {} if none was written.

        ``event``: the event of the image. An alpha that had another size, or cannot be read, has the difference 1.
        """
        id = self._run.find_id(event["name"])
        if id is None or event["status"] != "done":
            return {}
        with contextlib.suppress(ImageError):
            saved = self._saved_outputs(before_folder, id)[self._run.jobs[id].output]
            after = self._images.read_alpha(id)
            earlier = self._images.read_alpha(id, saved) if saved.exists() else np.zeros_like(after)
            if earlier.shape == after.shape:
                return {id: round(measure_change(earlier, after), DIFFERENCE_DIGITS)}
        return {id: 1.0}

    def _save_changes(self, changes: Mapping[int, float], before_folder: Path) -> None:
        """Save the differences in the state, and the alphas before, so that each change can be undone."""
        if not changes:
            return
        copies = self._copy_alphas([id for id, difference in changes.items() if difference], before_folder)
        replaced = list[Entry | None]()
        with self._state.edit_all() as images:
            for id, difference in changes.items():
                image = images.setdefault(self._run.names[id], ImageState())
                replaced.append(self._record_change(id, image, difference, before_folder, copies))
        for entry in filter(None, [*replaced, *copies.values()]):
            self._copies.discard(entry)
        for id in changes:
            shutil.rmtree(self._saved_folder(before_folder, self._run.names[id]), ignore_errors=True)

    def _copy_alphas(self, ids: Sequence[int], before_folder: Path) -> dict[int, Entry]:
        """Return an undo entry for each of these images that was listed when the recompute began.

        The state is not locked meanwhile, because the copies take time on a drive without hard links.
        """
        saved = {id: self._saved_outputs(before_folder, id) for id in ids}
        listed = [id for id in ids if self._saved_folder(before_folder, self._run.names[id]).exists()]
        return {id: self._copies.save([*saved[id]], "open", saved[id]) for id in listed}

    def _record_change(
        self, id: int, image: ImageState, difference: float, before_folder: Path, copies: dict[int, Entry]
    ) -> Entry | None:
        """Record the difference of a recomputed alpha in the state of its image, with an entry that undoes it.

        A rejected image whose alpha has changed becomes open again. Returns the entry of an earlier recompute, which is
        removed, because only the last recompute can be undone. ``copies``: see :meth:`_copy_alphas`; an entry that is
        used is removed.
        """
        image.change = difference
        output, saved = self._run.jobs[id].output, self._saved_outputs(before_folder, id)
        last = image.undo[-1] if image.undo else None
        if not difference:
            if last and last["alpha"] and tuple(last["alpha"]) == identify_file(saved[output]):
                last["alpha"] = identify_file(output)  # the same pixels: that change can still be undone
            return None
        replaced = None
        is_being_accepted = last and last["files"] and last["alpha"] is None
        if not (is_being_accepted or self._run.refresh(id).is_reviewed):  # else a person has replaced the new alpha
            if undo_cause(image.undo) == "recompute":
                replaced = image.undo.pop()
            if id in copies:
                image.undo.append({**copies.pop(id), "status": image.status, "alpha": identify_file(output)})
        if image.status == "rejected":
            image.status = "open"
        return replaced


def measure_change(before: ImageU8, after: ImageU8) -> float:
    """Return the difference of two alphas, uint8 [H,W]: 1 - IoU, so 0 if they are equal, 1 if they share nothing.

    The IoU is the sum of their minima divided by that of their maxima. An area of less than about 1/5000 of the image
    counts less.
    """
    common, union = (function(before, after).sum(dtype=np.int64) / 255 for function in (np.minimum, np.maximum))
    return float((union - common) / max(union, min(MIN_OBJECT_PX, MIN_OBJECT_FRACTION * before.size)))
