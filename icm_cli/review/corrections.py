"""Accept, reject, correct and undo single images, and answer hints with alphas that are not saved.

Every change works in this order, so that nothing is lost if the process is killed at any time:

1. Copy the files that will be replaced, and save the entry that undoes the change in the state of the review.
2. Write the hint file, the trimap and the alpha.
3. Save the new status of the image.
"""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from icm_cli.environment import resource_errors
from icm_cli.errors import IcmError, UsageError
from icm_cli.files import error_for_failed_write, identify_file, write_json
from icm_cli.geometry import ImageU8
from icm_cli.matting.resume import mark_reviewed
from icm_cli.options import MatteOptions
from icm_cli.review.references import add_taught
from icm_cli.review.run import ReviewRun, with_values
from icm_cli.review.shapes import Annotation, Shapes
from icm_cli.review.state import ModelNotReadyError, ReviewState, ReviewStatus, StaleAnswerError
from icm_cli.review.undo import UndoCopies

if TYPE_CHECKING:
    from icm_cli.matting.references import Reference
    from icm_cli.review.model import RunModel

ModelState = Literal["loading", "ready", "failed"]
MAX_UNDO = 20
"""Number of changes of an image that can be undone. Older copies are removed."""
Result = TypeVar("Result")


class Corrections:
    """Answers to hints, and changes of single images. The model runs in its own thread. All methods are thread-safe."""

    def __init__(self, run: ReviewRun, state: ReviewState, device: str | None, notice: Callable[[str], None]) -> None:
        """``device``: instead of that of the run."""
        self._run, self._state, self._device, self._notice = run, state, device, notice
        self._copies = UndoCopies(run.record_folder)
        self._executor = ThreadPoolExecutor(1, "icm-model")
        self._lock = threading.Lock()
        self._image_locks: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self._pending: dict[str, Future[ImageU8]] = {}
        self._preparing: Future[None] | None = None
        self._model: RunModel | None = None
        self.model_name = run.model_name
        self._loading: Future[None] | None = None

    @property
    def model_state(self) -> ModelState:
        """Whether the model is loaded, so that hints can be answered."""
        if self._loading is None or not self._loading.done() or self._loading.cancelled():
            return "loading"
        return "failed" if self._loading.exception() else "ready"

    @property
    def model_error(self) -> str:
        """Why the model could not be loaded; "" if it was, or is not loaded yet."""
        return "" if self._loading is None or self.model_state != "failed" else _describe_failure(self._loading)

    def load_model(self) -> None:
        """Start to load the model and the references, unless that has begun. Returns at once."""
        with self._lock:
            if self._loading is None:
                self._begin_loading()

    def options(self) -> MatteOptions:
        """Return the options of the run with the device, the hints and the taught references of the review."""
        options = add_taught(self._run, self._state.read_all()[1])
        return options if self._device is None else with_values(options, device=self._device)

    def base_references(self) -> Sequence[Reference]:
        """Return the references of the run without taught images. Raises ModelNotReadyError."""
        self._check_loaded()
        return self._ready_model().references[: len(self._run.options.references.ref)]

    def reload(self) -> None:
        """Start to prepare the references again, after other images were taught. The network is not loaded again."""
        with self._lock:
            if self._loading is not None:
                self._begin_loading()

    def prepare(self, id: int) -> None:
        """Start to read an image, so that its first answer is fast. Returns at once."""
        self.load_model()
        with self._lock:
            if self._preparing is not None:
                self._preparing.cancel()
            if self.model_state != "failed":
                self._preparing = self._submit(lambda: self._prepare(id))

    def answer(self, id: int, shapes: Shapes, refined: bool, tab: str = "") -> ImageU8:
        """Return the alpha of an image for hints, uint8 [H,W] of the display window. Nothing is saved.

        If ``refined``, it equals the alpha of ``icm matte --hints``; else it is the coarse alpha, which is faster. A
        newer request of the same browser ``tab`` cancels this one if it has not begun. Raises StaleAnswerError then,
        ModelNotReadyError, or IcmError for hints or images that cannot be used.
        """
        self._check_loaded()
        key = tab or f"image {id}"
        with self._lock:
            if key in self._pending:
                self._pending[key].cancel()
            future = self._submit(lambda: self._ready_model().answer(id, shapes, refined=refined))
            self._pending[key] = future
        try:
            return future.result()
        except CancelledError as error:
            raise StaleAnswerError("newer hints replace these") from error
        finally:
            with self._lock:
                if self._pending.get(key) is future:
                    del self._pending[key]

    def accept(self, id: int, revision: int, shapes: Shapes | None) -> None:
        """Accept an alpha. ``shapes``: hints to save first, and from which the alpha is computed; None to keep it.

        An empty list removes all hints. While the model loads, ``shapes`` wait for it. ``revision``: that of the image
        when the person decided. Raises StaleRevisionError if it has changed since, ModelNotReadyError if the model
        cannot be loaded, or IcmError if the image cannot be changed.
        """
        job = self._run.jobs[id]
        if reason := self._run.source_error(id):
            raise UsageError(
                f"{job.planned.name} cannot be accepted: {reason}; restore the source, or reject the alpha"
            )
        with self._image_lock(id):
            self._check_revision(id, revision)
            if shapes is not None:
                self.load_model()
                self._submit(lambda: self._correct(id, revision, shapes)).result()
                return
            with self._changing(id, revision, job.outputs, "accepted"):
                mark_reviewed(job, _make_stamp("accepted"))

    def reject(self, id: int, revision: int) -> None:
        """Reject an alpha. Its file stays, and loses the stamp of an earlier acceptance."""
        job = self._run.jobs[id]
        with self._image_lock(id):
            is_reviewed = self._run.refresh(id).is_reviewed
            with self._changing(id, revision, job.outputs if is_reviewed else [], "rejected"):
                if is_reviewed:
                    mark_reviewed(job, None)

    def undo(self, id: int, revision: int) -> None:
        """Restore the alpha, the hints and the status that an image had before its last change."""
        name, alpha = self._run.names[id], self._run.jobs[id].output
        with self._image_lock(id):
            self._check_revision(id, revision)
            entries = self._state.read(name).undo
            if not entries:
                raise UsageError(f"{name} has no change that can be undone")
            self._copies.restore(entries[-1], alpha)
            with self._state.edit(name) as image:
                image.undo = [entry for entry in image.undo if entry["folder"] != entries[-1]["folder"]]
                image.status = entries[-1]["status"]
            self._copies.discard(entries[-1])

    def can_undo(self, id: int) -> bool:
        """Return whether an image has a change that can be undone."""
        return bool(self._state.read(self._run.names[id]).undo)

    def close(self) -> None:
        """Stop the thread of the model after its current task."""
        self._executor.shutdown(cancel_futures=True)

    def _image_lock(self, id: int) -> threading.Lock:
        """Return the lock that a thread of this process holds while it changes an image."""
        with self._lock:
            return self._image_locks[id]

    def _submit(self, task: Callable[[], Result]) -> Future[Result]:
        """Queue a task for the thread of the model."""

        def run() -> Result:
            from icm_cli.environment import limited_threads  # imports torch

            with resource_errors(), limited_threads():
                return task()

        return self._executor.submit(run)

    def _begin_loading(self) -> None:
        self._loading = self._submit(self._load)
        self._loading.add_done_callback(self._report_failure)

    def _report_failure(self, loading: Future[None]) -> None:
        if not loading.cancelled() and loading.exception():
            self._notice(f"the model cannot be loaded: {_describe_failure(loading)}")

    def _load(self) -> None:
        from icm_cli.review.model import RunModel

        self._model = RunModel(self._run, self.options(), self._notice, earlier=self._model)
        self.model_name = self._model.name

    def _prepare(self, id: int) -> None:
        if self._model is not None:
            with contextlib.suppress(IcmError, OSError):  # the next answer for this image reports it
                self._model.open_image(id)

    def _ready_model(self) -> RunModel:
        if self._model is None:
            raise ModelNotReadyError(f"the model could not be loaded: {self.model_error}")
        return self._model

    def _check_loaded(self) -> None:
        """Raise ModelNotReadyError while the model loads, which begins now, and if that has failed."""
        self.load_model()
        if self.model_state == "loading":
            raise ModelNotReadyError("the model is loading; try again in a moment")
        if self.model_state == "failed":
            raise ModelNotReadyError(f"the model could not be loaded: {self.model_error}")

    def _check_revision(self, id: int, revision: int) -> None:
        with self._state.edit(self._run.names[id], revision):
            pass

    def _correct(self, id: int, revision: int, shapes: Shapes) -> None:
        """Save hints, and compute and save their alpha. Runs in the thread of the model."""
        job, paths = self._run.jobs[id], self._run.hint_paths(id)
        target = self._run.hint_target(id) if shapes else None
        replaced = [*job.outputs, *paths, *([target] if target and target not in paths else [])]
        with contextlib.ExitStack() as stack:

            def begin_writing(annotation: Annotation | None) -> None:
                stack.enter_context(self._changing(id, revision, replaced, "accepted"))
                if target is not None and annotation is not None:
                    write_json(target, annotation)
                _remove([path for path in paths if path != target or annotation is None])

            self._ready_model().correct(id, shapes, _make_stamp("corrected"), begin_writing)

    @contextlib.contextmanager
    def _changing(self, id: int, revision: int, paths: Sequence[Path], status: ReviewStatus) -> Iterator[None]:
        """Context for a change of an image that replaces the files ``paths``. At its end, the image gets the status.

        After an exception, the files and the state are restored. Raises StaleRevisionError.
        """
        name, alpha = self._run.names[id], self._run.jobs[id].output
        with self._state.edit(name, revision) as image:
            entry = self._copies.save(paths, image.status)
            image.undo.append(entry)
        try:
            with self._copies.restored_on_error(entry, alpha):
                yield
        except BaseException:
            with self._state.edit(name) as image:
                image.undo = [each for each in image.undo if each["folder"] != entry["folder"]]
            self._copies.discard(entry)
            raise
        with self._state.edit(name) as image:
            image.status = status
            for each in image.undo:
                if each["folder"] == entry["folder"]:
                    each["alpha"] = identify_file(alpha)
            image.undo, forgotten = image.undo[-MAX_UNDO:], image.undo[:-MAX_UNDO]
        for each in forgotten:
            self._copies.discard(each)


def _describe_failure(future: Future[None]) -> str:
    """Return why a task has failed, as a sentence."""
    error = future.exception()
    return str(error) if isinstance(error, IcmError) else f"{type(error).__name__}: {error}"


def _make_stamp(kind: str) -> str:
    """Return a value of ``icm-reviewed``, such as "accepted 2026-01-31T12:00:00Z"."""
    return f"{kind} {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _remove(paths: Sequence[Path]) -> None:
    """Remove files. Raises OutputError."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise error_for_failed_write(path, error) from error
