"""The folder of a run: checkpoints that record their origin, and the state from which a run resumes.

``last.safetensors`` and ``best.safetensors`` are checkpoints for ``icm matte``; they hold the moving average of the
weights, if the run has one. ``state.pt`` alone contains everything that the next step depends on, so that a run resumes
correctly after being killed between two writes. ``data.json`` records the files of the training data, by which a
resumed run detects that data changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import pickle
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from icm_cli.device import is_main_process
from icm_cli.environment import __version__
from icm_cli.errors import ConfigError, UsageError, list_first
from icm_cli.files.atomic_writes import atomic_write, check_writable, remove_stale_temporaries
from icm_cli.files.digests import cached_file_digest, combined_digest
from icm_cli.files.json_files import write_json
from icm_cli.model.checkpoint import (
    SOURCES_KEY,
    TRAINED_ON_KEY,
    read_training_digests,
    read_training_sources,
    save_checkpoint,
)
from icm_cli.options import TrainOptions
from icm_cli.training.batches import Batch
from icm_cli.training.data.pool import TrainingPool
from icm_cli.training.learner import Learner
from icm_cli.training.log import SKIPPED_NAME
from icm_cli.training.settings import Settings, list_differences

RECORD_NAME = "data.json"
MAX_LISTED_FILES = 3
"""Number of files of each kind of change that a message names."""
LAST_NAME = "last.safetensors"
BEST_NAME = "best.safetensors"
STATE_NAME = "state.pt"
LOCK_NAME = ".icm-train.lock"
CHANGEABLE_SETTINGS = frozenset(
    {
        "train.log_every",
        "train.image_every",
        "train.save_every",
        "train.feature_cache_gb",
        "train.match.max_image_px",  # of earlier versions
    }
)
"""Settings that may differ when a run resumes, because no step depends on them.

``train.steps`` may differ, too, if the learning rate is constant.
"""


@dataclass(frozen=True)
class FileState:
    """Size in bytes, modification time in ns and SHA-256 of a file; the SHA-256 is "" if it cannot be read."""

    size: int
    mtime_ns: int
    sha256: str


class DataRecord:
    """The state of every file of the training data, by path."""

    def __init__(self, states: Mapping[str, FileState]) -> None:
        self.states = dict(states)

    @classmethod
    def load(cls, folder: Path) -> DataRecord | None:
        """Read the record of a run's folder; None if there is none, or if it is damaged."""
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            stored = json.loads((folder / RECORD_NAME).read_text(encoding="utf-8"))
            return cls({path: FileState(**state) for path, state in stored.items()})
        return None

    @classmethod
    def from_files(
        cls, paths: Iterable[Path], earlier: DataRecord | None, notice: Callable[[str], None] = lambda _: None
    ) -> DataRecord:
        """Record files. Only those whose size or time differs from the ``earlier`` record are read.

        Files that cannot be read are reported with ``notice``.
        """
        earlier_states = {} if earlier is None else earlier.states
        states = {}
        for path in paths:
            try:
                states[str(path)] = _read_file_state(path, earlier_states.get(str(path)))
            except OSError as error:
                notice(f"{path} cannot be read ({error.strerror}), so its content is not recorded")
                states[str(path)] = FileState(0, 0, "")
        return cls(states)

    def save(self, folder: Path) -> None:
        """Write the record to a run's folder, atomically. Raises OutputError."""
        write_json(folder / RECORD_NAME, {path: asdict(state) for path, state in self.states.items()})

    @property
    def digest(self) -> str:
        """Digest of the paths and contents of all files."""
        parts: list[str] = []
        for path, state in sorted(self.states.items()):
            parts += [path, state.sha256]
        return combined_digest(*parts)

    def list_changes(self, now: DataRecord) -> str:
        """Describe which files changed, were added or were removed until ``now``; "" if none did."""
        before, after = self.states, now.states
        changes = {
            "changed": [path for path in before if path in after and before[path].sha256 != after[path].sha256],
            "added": [path for path in after if path not in before],
            "removed": [path for path in before if path not in after],
        }
        return ", ".join(
            f"{len(paths)} {kind} ({list_first(paths, MAX_LISTED_FILES)})" for kind, paths in changes.items() if paths
        )


def _read_file_state(path: Path, earlier: FileState | None) -> FileState:
    """Return the state of a file. If size and time are those of the ``earlier`` state, the content is not read."""
    stat = path.stat()
    if earlier is not None and (earlier.size, earlier.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
        return earlier
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileState(stat.st_size, stat.st_mtime_ns, digest)


@dataclass(frozen=True)
class RunProgress:
    """Steps done, draws skipped because they could not be read, and seconds spent in the steps."""

    step: int = 0
    skipped: int = 0
    seconds: float = 0.0


class RunFolder:
    """The folder of a run. Of several processes only the main one writes to it."""

    def __init__(self, folder: Path, settings: Settings, pool: TrainingPool, options: TrainOptions) -> None:
        self.folder = folder
        self._settings = settings
        self._pool = pool
        self._options = options
        self._checkpoint = options.training.checkpoint
        self._provenance: dict[str, str] = {}
        """Metadata of the checkpoints: what they are trained on, and how."""
        self.best: dict[str, float] | None = None
        """Step and MSE of the best model so far."""

    def prepare_folder(self, *, resume: bool) -> None:
        """Check that the run can start or resume in the folder, and remove temporary files of killed runs from it.

        Raises UsageError if the folder contains a run, and it cannot be resumed or ``resume`` is False; OutputError if
        the folder is not writable.
        """
        existing = [name for name in (STATE_NAME, LAST_NAME, BEST_NAME) if (self.folder / name).exists()]
        if existing and not resume:
            raise UsageError(
                f"{self.folder} already contains a run; continue it with --resume, or give another folder with --out"
            )
        if existing and STATE_NAME not in existing:
            raise UsageError(
                f"{self.folder} contains {existing[0]} but no {STATE_NAME}, so its run cannot be resumed; give another "
                f"folder with --out, and --checkpoint {self.folder / existing[0]} to start from that model"
            )
        check_writable(self.folder)
        remove_stale_temporaries(self.folder)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other runs out of the folder inside the context, and remove the skipped log of a run without a state.

        Raises UsageError if another process uses the folder.
        """
        if not is_main_process():
            yield
            return
        with (self.folder / LOCK_NAME).open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"another process is training in {self.folder}; wait for it, or give another folder with --out"
                ) from None
            except OSError:  # a file system without locks
                pass
            if not (self.folder / STATE_NAME).exists():
                (self.folder / SKIPPED_NAME).unlink(missing_ok=True)  # of a run that ended before its first step
            yield

    def record_data(self, notice: Callable[[str], None]) -> None:
        """Record the files of the training data, for the checkpoints and for a later resume.

        If they changed since the first step of the run in the folder, raises UsageError. If they changed before its
        first step, this is reported with ``notice``.
        """
        before = DataRecord.load(self.folder)
        now = DataRecord.from_files(self._pool.files, before, notice)
        changes = "" if before is None else before.list_changes(now)
        if changes:
            if (self.folder / STATE_NAME).exists():
                raise UsageError(
                    f"the training data changed since the run in {self.folder} started: {changes}. Restore the files "
                    f"to resume, or train a new run into another --out, which can start from the weights of this one "
                    f"with --checkpoint {self.folder / LAST_NAME}"
                )
            notice(f"the training data changed since the run in {self.folder} was interrupted: {changes}")
        if before is None or before.states != now.states:
            now.save(self.folder)
        self._provenance = self._describe_provenance(now)

    def _describe_provenance(self, data: DataRecord) -> dict[str, str]:
        """Return the metadata of the checkpoints of a run on the recorded data."""
        trained_on = {data.states[str(path)].sha256 for path in self._pool.image_paths}
        trained_on.discard("")  # of files that cannot be read
        trained_on.update(self._pool.original_digests)
        if self._checkpoint:
            trained_on.update(read_training_digests(self._checkpoint) or ())
        return {
            TRAINED_ON_KEY: json.dumps(sorted(trained_on)),
            SOURCES_KEY: json.dumps(self._describe_sources()),
            "icm.version": __version__,
            "icm.command": _command_line(self._options, self.folder),
            "icm.training": json.dumps(self._settings.as_dict()),
            "icm.overrides": json.dumps(list(self._options.training.overrides)),
            "icm.started_from": str(self._checkpoint or ""),
        }

    def resume_run(self, learner: Learner) -> RunProgress:
        """Load the saved state into ``learner`` and return its progress; zero progress if there is no state.

        Raises UsageError for a run with other settings, ConfigError for a damaged state.
        """
        path = self.folder / STATE_NAME
        if not path.exists():
            return RunProgress()
        state = _load_state(path)
        self._check_same_run(path, json.loads(state["settings"]), self._run_identity(learner))
        learner.load_state(state)
        self.best = state["best"]
        return RunProgress(state["step"], state["skipped"], state["seconds"])

    def _check_same_run(self, path: Path, before: dict[str, Any], now: Mapping[str, Any]) -> None:
        """Raise UsageError that lists every difference of the settings that may not differ."""
        if "data_digest" not in before:  # a state of an earlier version, which has no record of the data
            before["data_digest"] = now["data_digest"]
            before["started_from"] = before.pop("found")["started_from"]
        train = self._settings.train
        changeable = set(CHANGEABLE_SETTINGS)
        if train.schedule == "constant":
            changeable.add("train.steps")
        unused_sections = tuple(train.unused_sections)
        changed = []
        for difference in list_differences(before, now):
            setting = difference.partition(":")[0]
            if setting not in changeable and not setting.startswith(unused_sections):
                changed.append(difference)
        if changed:
            raise UsageError(
                f"{path} belongs to a run with other settings, so it cannot be resumed: {'; '.join(changed)}. Give the "
                "same configuration, data and --set options again. To continue with these settings, give another --out "
                f"and --checkpoint {self.folder / LAST_NAME} to start from the weights of this run"
            )

    def save_progress(self, learner: Learner, done: RunProgress) -> None:
        """Write the last checkpoint and the state after a step. Raises OutputError; earlier files are kept then."""
        self._save_checkpoint(learner, LAST_NAME, done.step)
        settings = json.dumps(self._run_identity(learner))
        content = io.BytesIO()  # in memory first, because torch.save hides errors of the file system
        torch.save({**asdict(done), "best": self.best, "settings": settings, **learner.export_state()}, content)
        with atomic_write(self.folder / STATE_NAME) as file:
            file.write(content.getbuffer())

    def save_best(self, learner: Learner, step: int, mse: float) -> bool:
        """Write the best checkpoint if the model is the best so far; return whether it is."""
        if self.best is not None and mse >= self.best["mse"]:
            return False
        self.best = {"step": step, "mse": mse}
        self._save_checkpoint(learner, BEST_NAME, step)
        return True

    def save_batch(self, batch: Batch, step: int) -> Path:
        """Write the samples of a failed step, as safetensors with their names; return the path."""
        path = self.folder / f"bad-step-{step}.safetensors"
        tensors = {name: tensor.cpu().contiguous() for name, tensor in batch.named_tensors().items()}
        with atomic_write(path) as file:
            file.write(save(tensors, {"names": json.dumps(batch.names), "counters": json.dumps(batch.sample_numbers)}))
        return path

    def _save_checkpoint(self, learner: Learner, name: str, step: int) -> None:
        with learner.inference_mode():
            save_checkpoint(
                self.folder / name,
                learner.model,
                self._settings.model,
                with_backbone=learner.trains_backbone,
                metadata={**self._provenance, "icm.step": str(step), "icm.best": json.dumps(self.best)},
            )

    def _describe_sources(self) -> dict[str, dict[str, Any]]:
        """Return licence and numbers of groups and images of every source of this run and of its initial checkpoint.

        Of backgrounds, only the number of images is known.
        """
        described = read_training_sources(self._checkpoint) if self._checkpoint else {}
        for items, source in zip(self._pool.sources, self._settings.data.sources, strict=True):
            groups, images = {item.group for item in items}, {item.image for item in items}
            described[source.title] = {"licence": source.licence, "groups": len(groups), "images": len(images)}
        if self._pool.backgrounds:
            title = f"backgrounds ({', '.join(self._settings.data.backgrounds)})"
            described[title] = {"images": len(self._pool.backgrounds)}
        return described

    def _run_identity(self, learner: Learner) -> dict[str, Any]:
        """Return the settings and digests that must be unchanged when a run resumes."""
        record = DataRecord.load(self.folder)
        return {
            **self._settings.as_dict(),
            "data_digest": record.digest if record is not None else "",
            "weights": learner.weights_digest,
            "started_from": cached_file_digest(self._checkpoint) if self._checkpoint else None,
        }


def _command_line(options: TrainOptions, folder: Path) -> str:
    """Return the command line that starts the same run, for the checkpoint."""
    training = options.training
    flags = ("--config", "--data", "--out", "--checkpoint", "--weights")
    values = (training.config, training.data, folder, training.checkpoint, options.device.weights)
    arguments = ["icm", "train"]
    for flag, value in zip(flags, values, strict=True):
        if value is not None:
            arguments += [flag, str(value)]
    for override in training.overrides:
        arguments += ["--set", override]
    return shlex.join(arguments)


def _load_state(path: Path) -> dict[str, Any]:
    """Read a state. Raises ConfigError."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ConfigError(f"training state {path} cannot be read: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ConfigError(
            f"training state {path} is damaged or incomplete, so the run cannot be resumed; train into another "
            f"--out, if you like with --checkpoint {path.parent / LAST_NAME}"
        ) from error
    return state
