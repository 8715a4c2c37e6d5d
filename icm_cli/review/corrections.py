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
from icm_cli.files.atomic_writes import identify_file
from icm_cli.files.json_files import write_json
from icm_cli.files.system_errors import error_for_failed_write
from icm_cli.geometry import ImageU8
from icm_cli.matting.provenance import mark_reviewed
from icm_cli.options import MatteOptions
from icm_cli.review.references import add_taught_images, mask_path
from icm_cli.review.run import ReviewRun, with_values
from icm_cli.review.shapes import Annotation, Shapes
from icm_cli.review.state import (
    ImageState,
    ModelNotReadyError,
    ReviewState,
    ReviewStatus,
    StaleAnswerError,
    TeachingUse,
)
from icm_cli.review.undo import Entry, UndoCopies, undo_cause

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
        """``device``: replaces the device of the run, unless it is None."""
        self._run, self._state, self._device, self._notice = run, state, device, notice
        self._copies = UndoCopies(run.record_folder)
        self._executor = ThreadPoolExecutor(1, "icm-model")
        self._lock = threading.RLock()
        self._image_locks: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)
        self._pending: dict[str, Future[ImageU8]] = {}
        """The last answer that each browser tab asked for, until it is computed."""
        self._preparing: Future[None] | None = None
        """The last task of :meth:`prepare`."""
        self._model: RunModel | None = None
        self.model_name = run.model_name
        self._loading: Future[None] | None = None
        self._taught: dict[str, TeachingUse] = {}
        """The taught images when ``_loading`` began, by name."""

    @property
    def model_state(self) -> ModelState:
        """State of the model. Before it begins to load, it counts as "loading" too."""
        if self._loading is None or not self._loading.done() or self._loading.cancelled():
            return "loading"
        return "failed" if self._loading.exception() else "ready"

    @property
    def model_error(self) -> str:
        """Why the model could not be loaded; "" if it was, or is not loaded yet."""
        if self._loading is None or self.model_state != "failed":
            return ""
        return _describe_failure(self._loading)

    def load_model(self) -> None:
        """Start to load the model and the references, unless that has begun. Returns at once."""
        with self._lock:
            if self._loading is None:
                self._begin_loading()

    def reload_model(self) -> None:
        """Start to load the model again if that has failed: the reason may be gone, such as a missing reference."""
        with self._lock:
            if self.model_state == "failed":
                self._begin_loading()

    def options(self) -> MatteOptions:
        """Return the options of the run with the device, the hints and the taught references of the review."""
        _, states = self._state.read_all()
        options = add_taught_images(self._run, states)
        return options if self._device is None else with_values(options, device=self._device)

    def base_references(self) -> Sequence[Reference]:
        """Return the references of the run without taught images. Raises ModelNotReadyError."""
        with self._lock:
            loading = self._newest_loading()
        if not loading.done():
            raise ModelNotReadyError("the model is loading; try again in a moment")
        return self._loaded_model(loading).references[: len(self._run.options.references.ref)]

    def store_use(self, id: int, use: TeachingUse | None) -> None:
        """Store how an image is used to teach, and prepare the references again if that changes them."""
        with self._edit_use(self._run.names[id]) as image:
            image.taught = use

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
        newer request of the same browser ``tab`` cancels this one if it has not begun. If the model is still loading,
        the call waits for it. Raises StaleAnswerError, ModelNotReadyError if the model cannot be loaded, or IcmError
        for hints or images that cannot be used.
        """
        client = tab or f"image {id}"
        with self._lock:
            if client in self._pending:
                self._pending[client].cancel()
            future = self._submit_to_model(lambda model: model.answer(id, shapes, refined=refined))
            self._pending[client] = future
        try:
            return future.result()
        except CancelledError as error:
            raise StaleAnswerError("newer hints replace these") from error
        finally:
            with self._lock:
                if self._pending.get(client) is future:  # not if a newer request has replaced it
                    del self._pending[client]

    def outdated_reason(self, id: int) -> str:
        """Return why new hints may also change parts of the saved alpha that they do not concern; "" if they do not.

        Such a reason is that the references have changed since the alpha was made. Raises ModelNotReadyError.
        """
        return self._submit_to_model(lambda model: model.outdated_reason(id)).result()

    def accept(self, id: int, revision: int, shapes: Shapes | None) -> None:
        """Accept an alpha as it is, or save hints and accept the alpha that is computed from them.

        ``shapes``: the hints to save; an empty list removes all hints, and None keeps alpha and hints as they are. If
        the model is still loading, the call waits for it. ``revision``: revision of the image that the person saw.
        Raises StaleRevisionError if it has changed since, ModelNotReadyError if the model cannot be loaded, or IcmError
        if the image cannot be changed.
        """
        job = self._run.jobs[id]
        if reason := self._run.source_error(id):
            raise UsageError(f"{job.planned.name} cannot be accepted: {reason}")
        with self.image_lock(id):
            self._check_revision(id, revision)
            if shapes is not None:
                self._submit_to_model(lambda model: self._correct(model, id, revision, shapes)).result()
                return
            with self._recorded_change(id, revision, job.outputs, "accepted", keeps_alpha=True):
                mark_reviewed(job, _make_stamp("accepted"))

    def reject(self, id: int, revision: int) -> None:
        """Reject an alpha. Its file stays, but the stamp of an earlier acceptance is removed from it."""
        job = self._run.jobs[id]
        with self.image_lock(id):
            has_stamp = self._run.refresh(id).is_reviewed
            with self._recorded_change(id, revision, job.outputs if has_stamp else [], "rejected"):
                if has_stamp:
                    mark_reviewed(job, None)

    def undo(self, id: int, revision: int) -> None:
        """Restore the alpha, the hints and the status that an image had before its last decision or recompute.

        The image is no longer used as a reference, because its mask was made from the replaced alpha.
        """
        name, alpha = self._run.names[id], self._run.jobs[id].output
        with self.image_lock(id):
            self._check_revision(id, revision)
            entries = self._state.read(name).undo
            if not entries:
                raise UsageError(f"{name} has no change that can be undone")
            last = entries[-1]
            self._copies.restore(last, alpha)
            with self._edit_use(name) as image:
                image.undo = _without_entry(image.undo, last)
                image.status = last["status"]
                if undo_cause([last]) == "recompute":
                    image.change = None
                _stop_use_as_reference(image)
            self._copies.discard(last)

    def close(self) -> None:
        """Stop the thread of the model after its current task."""
        self._executor.shutdown(cancel_futures=True)

    def image_lock(self, id: int) -> threading.Lock:
        """Return the lock that a thread of this process holds while it changes an image."""
        with self._lock:
            return self._image_locks[id]

    @contextlib.contextmanager
    def _edit_use(self, name: str) -> Iterator[ImageState]:
        """Context that yields the state of an image for editing.

        If its use has changed at the end, its old mask is removed, and the references are prepared again. The
        network is not loaded again.
        """
        with self._state.edit(name) as image:
            before = image.taught
            yield image
        if image.taught == before:
            return
        old_mask, new_mask = (
            None if use is None else mask_path(self._run.record_folder, use["kind"], use["mask"])
            for use in (before, image.taught)
        )
        with self._lock:
            if self._loading is not None:
                self._newest_loading()
        if old_mask is not None and old_mask != new_mask:  # afterwards: an earlier loading may still read it
            old_mask.unlink(missing_ok=True)

    def _submit(self, task: Callable[[], Result]) -> Future[Result]:
        """Queue a task for the thread of the model, and return its future."""

        def run() -> Result:
            from icm_cli.environment import limited_threads  # imports torch

            with resource_errors(), limited_threads():
                return task()

        return self._executor.submit(run)

    def _submit_to_model(self, task: Callable[[RunModel], Result]) -> Future[Result]:
        """Queue a task that uses the model, and return its future. Starts to load the model if nobody has.

        The task depends on the load that is current when it is queued. If that load fails, the task fails with
        ModelNotReadyError, even if another tab has started a new load by then.
        """
        with self._lock:
            loading = self._newest_loading()
            return self._submit(lambda: task(self._loaded_model(loading)))

    def _newest_loading(self) -> Future[None]:
        """Return the future of the load of the model with the current taught images. The caller holds the lock.

        A load begins if there is none, or if the taught images differ: another server of this run may change them.
        """
        if self._loading is None or self._read_taught() != self._taught:
            return self._begin_loading()
        return self._loading

    def _read_taught(self) -> dict[str, TeachingUse]:
        """Return the taught images, by name."""
        return {name: image.taught for name, image in self._state.read_all()[1].items() if image.taught is not None}

    def _begin_loading(self) -> Future[None]:
        """Queue the loading of the model, and return its future. The caller holds the lock."""
        self._taught = self._read_taught()
        self._loading = loading = self._submit(self._load)
        loading.add_done_callback(self._report_failure)
        return loading

    def _report_failure(self, loading: Future[None]) -> None:
        """Print a notice if the loading has failed, unless another one has begun. Called when it has ended."""
        if loading is self._loading and not loading.cancelled() and loading.exception():
            self._notice(f"the model cannot be loaded: {_describe_failure(loading)}")

    def _load(self) -> None:
        """Load the model, or only its references if it is loaded already. Runs in the thread of the model."""
        from icm_cli.review.model import RunModel

        taught = self._read_taught()
        try:
            self._model = RunModel(self._run, self.options(), self._notice, earlier=self._model)
        except UsageError:
            self._taught = self._read_taught()
            if self._taught == taught:
                raise
            self._load()  # a mask was removed after the options were read
        else:
            self.model_name = self._model.name

    def _prepare(self, id: int) -> None:
        """Read an image, unless the model could not be loaded. Runs in the thread of the model."""
        if self._model is not None:
            with contextlib.suppress(IcmError, OSError):  # the next answer for this image reports it
                self._model.open_image(id)

    def _loaded_model(self, loading: Future[None]) -> RunModel:
        """Return the model. Raises ModelNotReadyError if ``loading``, which has ended, has failed."""
        if loading.exception() or self._model is None:
            raise ModelNotReadyError(f"the model cannot be loaded: {_describe_failure(loading)}")
        return self._model

    def _check_revision(self, id: int, revision: int) -> None:
        """Raise StaleRevisionError if the revision of an image is not ``revision``."""
        with self._state.edit(self._run.names[id], revision):
            pass  # nothing is edited, so nothing is saved

    def _correct(self, model: RunModel, id: int, revision: int, shapes: Shapes) -> None:
        """Save hints, and compute and save their alpha. Runs in the thread of the model."""
        old_paths = self._run.hint_paths(id)
        new_path = self._run.hint_target(id) if shapes else None
        replaced = [*self._run.jobs[id].outputs, *old_paths]
        if new_path is not None and new_path not in old_paths:
            replaced.append(new_path)
        with contextlib.ExitStack() as change:

            def begin_writing(annotation: Annotation | None) -> None:  # when the alpha is computed
                change.enter_context(self._recorded_change(id, revision, replaced, "accepted"))
                unused_paths = old_paths
                if new_path is not None and annotation is not None:
                    write_json(new_path, annotation)
                    unused_paths = [path for path in old_paths if path != new_path]
                _remove_files(unused_paths)

            model.correct(id, shapes, _make_stamp("corrected"), begin_writing)

    @contextlib.contextmanager
    def _recorded_change(
        self, id: int, revision: int, paths: Sequence[Path], status: ReviewStatus, *, keeps_alpha: bool = False
    ) -> Iterator[None]:
        """Context in which the files ``paths`` of an image are replaced, so that this can be undone.

        At its end, the image gets the status, and is no longer used as a reference unless the change ``keeps_alpha``:
        an accepted alpha with the same pixels. After an exception, the files and the state are restored. Raises
        StaleRevisionError if the image has another revision.
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
                image.undo = _without_entry(image.undo, entry)
            self._copies.discard(entry)
            raise
        with self._edit_use(name) as image:
            image.status = status
            if not keeps_alpha:
                _stop_use_as_reference(image)
            for recorded in image.undo:
                if recorded["folder"] == entry["folder"]:
                    recorded["alpha"] = identify_file(alpha)
            image.undo, forgotten = image.undo[-MAX_UNDO:], image.undo[:-MAX_UNDO]
        for old_entry in forgotten:
            self._copies.discard(old_entry)


def _without_entry(entries: Sequence[Entry], removed: Entry) -> list[Entry]:
    """Return the entries of the undo list except one. An entry is identified by its folder."""
    return [entry for entry in entries if entry["folder"] != removed["folder"]]


def _stop_use_as_reference(image: ImageState) -> None:
    """Edit the state of an image so that it is not used as a reference. A negative stays one."""
    if image.taught is not None and image.taught["kind"] == "reference":
        image.taught = None


def _describe_failure(future: Future[None]) -> str:
    """Return why a task has failed, as a sentence."""
    error = future.exception()
    return str(error) if isinstance(error, IcmError) else f"{type(error).__name__}: {error}"


def _make_stamp(kind: str) -> str:
    """Return a value of ``icm-reviewed``, such as "accepted 2026-01-31T12:00:00Z"."""
    return f"{kind} {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _remove_files(paths: Sequence[Path]) -> None:
    """Remove files, unless they do not exist. Raises OutputError."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise error_for_failed_write(path, error) from error
