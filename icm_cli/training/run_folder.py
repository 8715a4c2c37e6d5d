"""Keeps a run on disk and takes it up again: checkpoints that say where they come from, and the state."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors.torch import save

from icm_cli.device import is_main_process
from icm_cli.environment import __version__
from icm_cli.errors import ConfigError, UsageError
from icm_cli.files import atomic_write, cached_file_digest, combined_digest, remove_stale_temporaries
from icm_cli.model.checkpoint import TRAINED_ON_KEY, read_training_digests, save_checkpoint
from icm_cli.reports.write import ReportFiles
from icm_cli.training.batches import Batch
from icm_cli.training.data.pool import Pool
from icm_cli.training.learner import Learner
from icm_cli.training.settings import DataConfig, Settings
from icm_cli.training.state import BEST_NAME, LAST_NAME, STATE_NAME, check_same_run, load_state, save_state

LOCK_NAME = ".icm-train.lock"


@dataclass(frozen=True)
class Progress:
    """Progress of a run: steps done, unreadable draws, and seconds that the steps took."""

    step: int = 0
    skipped: int = 0
    seconds: float = 0.0


class RunFolder:
    """The folder of a run. Only the main process of several writes there."""

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        pool: Pool,
        *,
        overrides: Sequence[str],
        checkpoint: Path | None,
        command: str,
    ) -> None:
        """``command``, the overrides of ``--set`` and the ``checkpoint`` that training starts from are recorded."""
        self.folder = folder
        self._command = command
        self._settings = settings
        self._checkpoint = checkpoint
        self._overrides = list(overrides)
        self._pool = pool
        self._images: list[str] = []
        self.best: dict[str, float] | None = None
        """Step and MSE of the best model so far."""

    def check(self, *, resume: bool) -> None:
        """Raises UsageError for a folder that holds a run that cannot be resumed, OutputError for one not writable."""
        there = [name for name in (STATE_NAME, LAST_NAME, BEST_NAME) if (self.folder / name).exists()]
        if there and not resume:
            raise UsageError(
                f"{self.folder} holds a run already; go on with it by --resume, or give another folder with --out"
            )
        if there and STATE_NAME not in there:
            raise UsageError(
                f"{self.folder} holds {there[0]} but no {STATE_NAME}, so its run cannot be resumed; give another "
                f"folder with --out, perhaps with --checkpoint {self.folder / there[0]} to start from there"
            )
        ReportFiles.from_options(()).check_writable(self.folder)
        remove_stale_temporaries(self.folder)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out of the folder. Raises UsageError where another process holds it."""
        if not is_main_process():
            yield
            return
        with (self.folder / LOCK_NAME).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"another process trains into {self.folder} now; wait for it, or give another folder with --out"
                ) from None
            except OSError:  # a file system without locks
                pass
            yield

    def hash_images(self, notice: Callable[[str], None]) -> None:
        """Content of every training image, for the checkpoints; what cannot be read is named and left out."""
        digests = []
        for path in self._pool.images:
            try:
                digests.append(cached_file_digest(path))
            except OSError as error:
                notice(f"{path} cannot be read ({error.strerror})")
        earlier = read_training_digests(self._checkpoint) if self._checkpoint else None
        self._images = sorted({*digests, *(earlier or ()), *_originals(self._settings.data)})

    def resume(self, learner: Learner) -> Progress:
        """Take up the saved run; returns how far it is, nothing done where there is none.

        Raises UsageError for a run with other settings, ConfigError for a damaged state.
        """
        path = self.folder / STATE_NAME
        if not path.exists():
            return Progress()
        state = load_state(path)
        check_same_run(
            path, state["settings"], self._identity(learner), has_decay=self._settings.train.decay != "constant"
        )
        learner.load_state(state)
        self.best = state["best"]
        return Progress(state["step"], state["skipped"], state["seconds"])

    def save(self, learner: Learner, done: Progress) -> None:
        """Write the last model and the state after a step. Raises OutputError; what was there stays then."""
        self._save_model(learner, LAST_NAME, done.step)
        settings = json.dumps(self._identity(learner))
        save_state(
            self.folder / STATE_NAME,
            {**asdict(done), "best": self.best, "settings": settings, **learner.state()},
        )

    def save_best(self, learner: Learner, step: int, mse: float) -> bool:
        """Write the model if it is the best so far; returns whether it is."""
        if self.best is not None and mse >= self.best["mse"]:
            return False
        self.best = {"step": step, "mse": mse}
        self._save_model(learner, BEST_NAME, step)
        return True

    def save_batch(self, batch: Batch, step: int) -> Path:
        """Write the samples of a step that went wrong, as safetensors with their names."""
        path = self.folder / f"bad-step-{step}.safetensors"
        tensors = {name: tensor.cpu().contiguous() for name, tensor in batch.tensors().items()}
        with atomic_write(path) as file:
            file.write(save(tensors, {"names": json.dumps(batch.names), "counters": json.dumps(batch.counters)}))
        return path

    def _save_model(self, learner: Learner, name: str, step: int) -> None:
        with learner.inference_mode():
            save_checkpoint(
                self.folder / name,
                learner.model,
                self._settings.model,
                with_backbone=learner.trains_backbone,
                metadata=self._provenance(step),
            )

    def _provenance(self, step: int) -> dict[str, str]:
        licences = {source.title: source.licence for source in self._settings.data.sources}
        return {
            TRAINED_ON_KEY: json.dumps(self._images),
            "icm.version": __version__,
            "icm.step": str(step),
            "icm.command": self._command,
            "icm.training": json.dumps(self._settings.as_dict()),
            "icm.overrides": json.dumps(self._overrides),
            "icm.licences": json.dumps(licences),
            "icm.best": json.dumps(self.best),
            "icm.started_from": str(self._checkpoint or ""),
        }

    def _identity(self, learner: Learner) -> dict[str, Any]:
        """Settings and data that must be the same for a run to be resumed."""
        return {**self._settings.as_dict(), "found": self._found, "weights": learner.weights_digest}

    @cached_property
    def _found(self) -> dict[str, Any]:
        """Facts that follow from the settings on this disk."""
        names = [f"{item.group} {item.name}" for item in self._pool]
        started = cached_file_digest(self._checkpoint) if self._checkpoint else None
        return {
            "items": len(names),
            "names": combined_digest(*names),
            "backgrounds": len(self._pool.backgrounds),
            "started_from": started,
        }


def _originals(data: DataConfig) -> list[str]:
    """SHA-256 of the files that the data are copies of. Raises ConfigError."""
    if data.copies_of is None:
        return []
    try:
        found = json.loads(Path(data.copies_of).read_text(encoding="utf-8"))
        if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
            raise ValueError("it is no list of texts")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"data: copies_of {data.copies_of} cannot be read ({error}); expected a JSON list of SHA-256, as "
            "icm_cli.training.data.shrink writes it"
        ) from error
    return found
