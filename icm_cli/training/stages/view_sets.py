"""View sets of the stage "match": which images have their tokens stored, and when they are replaced by others.

A view is an augmented version of a training image. The images of each group are shuffled with the seed and divided into
rotation parts; after the last image, the first one follows again. A view set consists of
:attr:`MatchStageConfig.rotation_parts` consecutive parts. After every :attr:`MatchStageConfig.rotate_every` steps, it
moves on by one part. The parts depend only on the seed, so a resumed run has the same view sets.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from icm_cli.errors import ImageError, TrainingError
from icm_cli.events import TrainingListener
from icm_cli.files.atomic_writes import atomic_write
from icm_cli.files.digests import combined_digest
from icm_cli.model.contracts import Objects
from icm_cli.model.lite.head import TokenMatchHead
from icm_cli.training.batches import MAX_ATTEMPTS, check_skipped_fraction, iterate_loader, worker_options
from icm_cli.training.data.pool import TrainingItem, TrainingPool
from icm_cli.training.data.scenes import Scene, SceneMaker
from icm_cli.training.learner import Learner
from icm_cli.training.log import SkippedLog
from icm_cli.training.run_folder import DataRecord
from icm_cli.training.settings import MatchStageConfig, Settings
from icm_cli.training.stages.mosaics import LARGE_FACTOR, View, encode_scenes, stack_scenes

TOKENS_FOLDER = "tokens"
"""Folder of the tokens in a run's folder."""
VIEWS_PER_FILE = 64
"""Largest number of views in a file; files of large views contain fewer, as these have more tokens."""
Views: TypeAlias = list[View | None]
"""The views of a file; None for an image that cannot be read."""


@dataclass(frozen=True)
class ViewFile:
    """Views whose tokens are computed together and stored in one file."""

    rotation_part: int
    number: int
    is_large: bool
    items: tuple[TrainingItem, ...]

    @property
    def name(self) -> str:
        return f"{self.rotation_part:05d}-{'large' if self.is_large else 'small'}-{self.number:03d}.pt"

    def scene_seed(self, seed: int, index: int, attempt: int = 0) -> tuple[int, ...]:
        """Return the seed of the scene of item number ``index``."""
        further = (attempt,) if attempt else ()
        return (seed, 3, self.rotation_part, int(self.is_large), self.number, index, *further)


class ViewPlan:
    """Decides which views belong to each rotation part, and which parts each step uses."""

    def __init__(self, pool: TrainingPool, config: MatchStageConfig, seed: int) -> None:
        self._config = config
        self._small_order = _shuffle_groups(pool, seed)
        """The items of every group, in the order of its small views."""
        self._large_order = _shuffle_groups(pool, seed + 1)
        self._files: dict[int, list[ViewFile]] = {}

    def set_number(self, step: int) -> int:
        """Return the number of the view set that a step (from 0) uses."""
        return step // self._config.rotate_every if self._config.rotate_every else 0

    def files_of_set(self, number: int) -> list[ViewFile]:
        """Return the files of a view set."""
        parts = range(number, number + self._config.rotation_parts)
        return [file for part in parts for file in self.files_of_part(part)]

    def files_due(self, step: int) -> list[ViewFile]:
        """Return the files of the next part that must be computed by the end of ``step``.

        Their number grows evenly from step to step, so that no step takes much longer than others.
        """
        interval = self._config.rotate_every
        if not interval:
            return []
        files = self.files_of_part(step // interval + self._config.rotation_parts)
        return files[: math.ceil(len(files) * (step % interval + 1) / interval)]

    def files_of_part(self, part: int) -> list[ViewFile]:
        """Return the files of a rotation part."""
        if part not in self._files:
            small = self._make_files(part, self._small_order, is_large=False)
            large = self._make_files(part, self._large_order, is_large=True)
            self._files[part] = small + large
        return self._files[part]

    def _make_files(self, part: int, groups: list[list[TrainingItem]], *, is_large: bool) -> list[ViewFile]:
        """Return the files of a part with its small or its large views, given the shuffled items of every group."""
        config = self._config
        views_per_group = config.large_views_per_group if is_large else config.views_per_group
        items: list[TrainingItem] = []
        for group in groups:
            count = min(views_per_group, config.max_views_per_image * len(group))  # views of the group in a view set
            indices = range(count * part // config.rotation_parts, count * (part + 1) // config.rotation_parts)
            items += [group[index % len(group)] for index in indices]
        size = VIEWS_PER_FILE // LARGE_FACTOR**2 if is_large else VIEWS_PER_FILE
        starts = range(0, len(items), size)
        return [
            ViewFile(part, number, is_large, tuple(items[start : start + size])) for number, start in enumerate(starts)
        ]


def _shuffle_groups(pool: TrainingPool, seed: int) -> list[list[TrainingItem]]:
    rng = np.random.default_rng((seed, 2))
    return [[items[index] for index in rng.permutation(len(items))] for items in pool.groups.values()]


class SceneDataset(Dataset["tuple[Scene | None, list[str]]"]):
    """Scenes of the items of view files, with random distractors, each with the reasons of failed attempts.

    A scene is None if all attempts failed. Keys are pairs: the index of the file in ``files``, and the index of the
    item in the file.
    """

    def __init__(self, pool: TrainingPool, settings: Settings, files: Sequence[ViewFile]) -> None:
        train = settings.train
        self._small_scenes = SceneMaker(pool, train)
        self._large_scenes = SceneMaker(pool, train, LARGE_FACTOR * train.canvas_px)
        self._seed = train.seed
        self._files = files

    def __getitem__(self, key: tuple[int, int]) -> tuple[Scene | None, list[str]]:
        file_index, item_index = key
        file = self._files[file_index]
        maker = self._large_scenes if file.is_large else self._small_scenes
        reasons = []
        for attempt in range(MAX_ATTEMPTS):  # each draws other distractors and another background
            rng = np.random.default_rng(file.scene_seed(self._seed, item_index, attempt))
            try:
                scene = maker.make_view(file.items[item_index], rng)
            except ImageError as error:
                reasons.append(str(error))
            else:
                return replace(scene, trimap=None, coarse=None), reasons
        return None, reasons


class ViewEncoder:
    """Encodes images with the backbone and stores their views in a run's folder."""

    def __init__(
        self,
        pool: TrainingPool,
        settings: Settings,
        learner: Learner,
        run_folder: Path,
        listener: TrainingListener,
        *,
        needs_embeddings: bool,
    ) -> None:
        self._pool = pool
        self._settings = settings
        self._learner = learner
        self._listener = listener
        self._folder = run_folder / TOKENS_FOLDER
        self._objects = _copy_objects_for_inference(learner) if needs_embeddings else None
        data = DataRecord.from_files(pool.files, DataRecord.load(run_folder))
        self._recipe = _recipe_digest(settings, learner, data, needs_embeddings=needs_embeddings)
        self._view_count = self._skipped_count = 0
        """Number of views that were encoded so far, and of those that could not be made."""
        self._skipped_log = SkippedLog(run_folder, listener.on_notice)
        if learner.is_main:
            self._folder.mkdir(exist_ok=True)

    def load_views(
        self, files: Sequence[ViewFile], workers: int = 0, *, is_start: bool = False
    ) -> dict[ViewFile, Views]:
        """Return the views of files. Those that are not stored yet are encoded. ``is_start``: report the progress.

        Each file is stored as soon as it is encoded, so that an interrupted run can be resumed. Raises TrainingError if
        too many images cannot be read.
        """
        views: dict[ViewFile, Views] = {}
        for file in files:
            stored = self._load_file(file)
            if stored is not None:
                views[file] = stored
        missing = [file for file in files if file not in views]
        if missing:
            listener = self._listener if is_start else TrainingListener()  # which ignores the progress
            encoded = sum(map(len, views.values()))
            views_of_file: Views = []
            with listener.encoding_images(sum(len(file.items) for file in files), encoded):
                for file, batch in self._encode_files(missing, workers):
                    views_of_file += batch
                    encoded += len(batch)
                    listener.on_encoding_progress(encoded)
                    if len(views_of_file) == len(file.items):
                        views[file] = self._store_views(file, views_of_file)
                        views_of_file = []
        if is_start and not any(view is not None for file in files for view in views[file]):
            raise TrainingError("no training image could be read; repair the data, or exclude files with 'exclude'")
        return {file: views[file] for file in files}

    def remove_parts_before(self, part: int) -> None:
        """Remove the files of earlier rotation parts, which no view set needs any more."""
        if self._learner.is_main:
            for path in self._folder.glob("*.pt"):
                number = path.name.partition("-")[0]
                if number.isdigit() and int(number) < part:
                    path.unlink(missing_ok=True)

    def _encode_files(self, files: Sequence[ViewFile], workers: int) -> Iterator[tuple[ViewFile, Views]]:
        """Yield the views of files, in batches of images of the same file."""
        size = self._learner.device.auto_batch_size
        batches: list[list[tuple[int, int]]] = []
        for file_index, file in enumerate(files):
            keys = [(file_index, item_index) for item_index in range(len(file.items))]
            batches += [keys[start : start + size] for start in range(0, len(keys), size)]
        loader = DataLoader(
            SceneDataset(self._pool, self._settings, files),
            batch_sampler=batches,
            collate_fn=list,
            generator=torch.Generator(),  # leaves the default generator to the model
            **worker_options(workers),
        )
        for batch_keys, scenes in zip(batches, iterate_loader(loader), strict=True):
            readable = [scene for scene, _ in scenes if scene is not None]
            reasons = [reason for _, failures in scenes for reason in failures]
            self._report_skipped(len(scenes), len(scenes) - len(readable), reasons)
            views = _encode_scenes(self._learner, readable, self._objects) if readable else iter(())
            file_index, _ = batch_keys[0]
            yield files[file_index], [None if scene is None else next(views) for scene, _ in scenes]

    def _report_skipped(self, views: int, skipped: int, reasons: Sequence[str]) -> None:
        """Report unreadable images. ``views``: number of views, of which ``skipped`` could not be made.

        Raises TrainingError if too many were skipped so far.
        """
        self._skipped_log.report(reasons)
        self._view_count += views
        self._skipped_count += skipped
        if skipped:
            check_skipped_fraction(self._skipped_count, self._view_count, reasons[-1])

    def _load_file(self, file: ViewFile) -> Views | None:
        """Return the stored views of a file, memory-mapped; None if there are none, or if they have another digest."""
        try:
            stored: dict[str, Any] = torch.load(self._folder / file.name, weights_only=True, mmap=True)
        except (OSError, RuntimeError, EOFError):
            return None
        if stored["digest"] != self._file_digest(file):
            return None
        return [None if view is None else View(*view) for view in stored["views"]]

    def _store_views(self, file: ViewFile, views: Views) -> Views:
        """Write views to a file of the run, and return them memory-mapped, so that they need not stay in memory.

        Only the main process writes them. The others return ``views``.
        """
        if not self._learner.is_main:
            return views
        tensors = [None if view is None else tuple(view) for view in views]
        with atomic_write(self._folder / file.name) as output:
            torch.save({"digest": self._file_digest(file), "views": tensors}, output)
        return self._load_file(file) or views

    def _file_digest(self, file: ViewFile) -> str:
        """Return a digest of everything that determines the views of a file."""
        seed = file.scene_seed(self._settings.train.seed, 0)
        return combined_digest(self._recipe, str(seed), *(f"{item.group} {item.name}" for item in file.items))


def _recipe_digest(settings: Settings, learner: Learner, data: DataRecord, *, needs_embeddings: bool) -> str:
    """Return a digest of everything that determines a view, except its item and seed.

    That is the backbone, the inputs of the head's decoder, the recipe of the scenes, and the files of the data.
    """
    model, train = settings.model.as_dict(), settings.as_dict()["train"]
    decoder_levels = [len(model["head"]["skip_channels"]), len(model["head"]["decoder_channels"])]
    sources = [model["backbone"], decoder_levels, learner.weights_digest, data.digest]
    scenes = [train[name] for name in ("canvas_px", "pairs", "augment", "seed")]
    recipe = [*sources, *scenes, model["objects"] if needs_embeddings else None]
    parts: list[str | bytes] = [json.dumps(recipe, sort_keys=True)]
    if needs_embeddings and learner.model.objects is not None:
        # The encoder of the object model, which makes the embeddings, is its frozen part.
        frozen = [weight for weight in learner.model.objects.parameters() if not weight.requires_grad]
        parts += [weight.cpu().numpy().tobytes() for weight in frozen]
    return combined_digest(*parts)


def _copy_objects_for_inference(learner: Learner) -> Objects | None:
    """Return a copy of the object model that is optimised for inference, several times faster."""
    objects = copy.deepcopy(learner.model.objects)
    if objects is not None:
        objects.optimise_for_inference()
        objects.set_dtype(learner.device.dtype, learner.device.transformer_dtype)
    return objects


@torch.no_grad()
def _encode_scenes(learner: Learner, scenes: Sequence[Scene], objects: Objects | None) -> Iterator[View]:
    """Encode scenes; return an iterator of their views, in half precision on the CPU."""
    head = learner.model.head
    assert isinstance(head, TokenMatchHead)

    def halve(tensor: Tensor) -> Tensor:
        return (tensor.half() if tensor.is_floating_point() else tensor).cpu()

    layers = [layer.to(learner.device.torch_device) for layer in stack_scenes(scenes)]
    views = encode_scenes(learner.model.backbone, head, layers, objects).map_tensors(halve)

    def copy_view(index: int) -> View:
        return views.map_tensors(lambda tensor: tensor[index].clone())

    return map(copy_view, range(len(scenes)))
