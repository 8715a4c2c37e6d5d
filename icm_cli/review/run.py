"""The run under review: its images, found again from ``.icm/run.json``, and the provenance of their alphas.

Provenance is the metadata that icm writes into the file of an alpha: its digest, the name of its image and its result.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from icm_cli.environment import __version__
from icm_cli.errors import ImageError, OutputError, UsageError
from icm_cli.files.atomic_writes import FileIdentity, atomic_write, check_writable, identify_file
from icm_cli.files.digests import combined_digest
from icm_cli.files.paths import RECORD_FOLDER, SkippedPaths, walk_files
from icm_cli.files.system_errors import describe_os_error
from icm_cli.images.colour import ColourSettings
from icm_cli.images.decoding import library_settings
from icm_cli.images.writing import FORMAT_SUFFIXES, read_provenance_header
from icm_cli.matting.frames import FrameName, FramePattern
from icm_cli.matting.hint_files import SUFFIXES as HINT_SUFFIXES
from icm_cli.matting.jobs import TRIMAP_SUFFIX, Job
from icm_cli.matting.planning import choose_colour_settings, choose_output, plan_images
from icm_cli.matting.provenance import DIGEST_KEY, NAME_KEY, ROOT_KEY, escape_name, recorded_details
from icm_cli.matting.run_record import RECORD_NAME, read_run_record
from icm_cli.matting.shot import split_shots
from icm_cli.matting.sources import SkippedFiles, natural_sort_key, real_path
from icm_cli.options import MatteOptions
from icm_cli.quality.batch import add_batch_reasons
from icm_cli.reports.result import ImageResult, MattingDetails
from icm_cli.review.shapes import Shapes, read_shapes
from icm_cli.review.state import ImageState
from icm_cli.review.undo import last_decision, undo_cause

INDEX_NAME, HINTS_NAME = "index.json", "hints"
REFERENCES_NAME, NEGATIVES_NAME = "references", "negatives"
"""Folders below ``.icm`` with the masks of what a review teaches."""
BASE_PREFIX = "base-"
"""Prefix of the masks of the run's own references. The masks of taught images have no prefix."""
INDEX_VERSION = 1
OUTPUT_SUFFIXES = frozenset(suffix for suffixes in FORMAT_SUFFIXES.values() for suffix in suffixes)
NO_DETAILS = MattingDetails()
SOURCE_OPTIONS = ("src", "root", "include", "exclude")


@dataclass(frozen=True)
class AlphaFile:
    """What is known about the alpha of an image from its file, without decoding pixels."""

    identity: FileIdentity | None = None
    """Size and modification time; None if there is no file."""
    is_own: bool = False
    """Whether its provenance says that icm made it for this image."""
    details: MattingDetails = NO_DETAILS
    has_source: bool = True
    """Whether all files of the source exist."""

    @property
    def is_reviewed(self) -> bool:
        """Whether a person accepted this alpha."""
        return bool(self.details.reviewed)

    @property
    def version(self) -> str:
        """Text that changes whenever the file changes. After an undo, it is the earlier one again."""
        return "" if self.identity is None else f"{self.identity[1]:x}-{self.identity[0]:x}"


NO_ALPHA = AlphaFile()


class ReviewRun:
    """The images of a run. The id of an image, in Python and in the browser, is its index in ``jobs``."""

    def __init__(self, folder: Path, hints: Path | None, notice: Callable[[str], None]) -> None:
        """Find the images of the run whose alphas are in ``folder``.

        ``hints``: folder for hint files, instead of the folder of the run. Images whose source was removed are found by
        the provenance of their alphas. Raises UsageError and OutputError.
        """
        self.folder = Path(os.path.abspath(folder))  # noqa: PTH100  resolve() follows links
        self.record_folder = self.folder / RECORD_FOLDER
        self._record_path = self.record_folder / RECORD_NAME
        self._record = identify_file(self._record_path)
        """Identity of the record of the run when it was last compared with the options of this review."""
        recorded = _with_output_folder(read_run_record(self.folder), self.folder)
        self.options, self.hints_folder, self._pattern = self._choose_hints(_without_taught_images(recorded), hints)
        self._notice = notice
        self.save_error = self._find_save_error()
        """What cannot be saved, and why; "" if everything can."""
        self.other_run_warning = ""
        """Warning that a run with other sources has written to the folder; "" if none has since the start."""
        self.output, self.layout = choose_output(self.options.output)
        self.colour: ColourSettings = choose_colour_settings(self.options.colour)[0]
        self.errors: dict[int, str] = {}
        """Why the source of an image cannot be read, by the id of the image."""
        self.jobs: list[Job] = []
        self.names: list[str] = []
        self._ids: dict[str, int] = {}
        self._outputs: set[Path] = set()
        self._planned_sources: set[tuple[object, ...]] = set()
        """Id and files of the restored sources for which the run was planned again."""
        self._list_digests: list[str] = []
        self._stem_counts: Counter[str] = Counter()
        """Number of images by their name without the extension."""
        self._has_hints: list[bool] = []
        self._lock = threading.Lock()
        self._index = self.record_folder / INDEX_NAME
        self._alphas: list[AlphaFile] = []
        self._reasons: list[tuple[str, ...]] = []
        """Why each alpha has a low quality, including reasons from the comparison with other alphas."""
        self._scan_lock, self._is_scanned = threading.Lock(), False
        self._revision = time.time_ns() // 1_000_000
        """Revision of the alphas. It starts above those of earlier servers, and grows with every change."""
        self._revisions: list[int] = []
        """Revision at the last change of each alpha, or of the reasons for its quality."""
        self._versions: list[int] = []
        """Revision at the last change of each alpha, or of whether its source exists."""
        self._shots: dict[int, list[int]] | None = None
        """The frames of the shot of each image, by id; None until they are needed."""
        self._add_images(*self._plan(notice), _read_index(self._index))
        if not self.jobs:
            raise UsageError(f"{self.folder} has no alphas, and its sources cannot be found; check the folder")
        self._unlisted = self._find_unlisted()
        """Files that may be alphas, but belong to no listed image."""

    @property
    def is_shot(self) -> bool:
        return self.options.sequences.shot

    @property
    def model_name(self) -> str:
        """Name or checkpoint of the model of the run."""
        model = self.options.model
        return model.model or str(model.checkpoint or "lite")

    @property
    def list_digest(self) -> str:
        """Digest that identifies the list of images, to which ids refer."""
        return self._list_digests[-1]

    def is_valid_list(self, digest: str) -> bool:
        """Return whether the ids of a page are valid. ``digest``: its list, the present one or an earlier one."""
        return digest in self._list_digests

    def find_id(self, name: str) -> int | None:
        """Return the id of an image, given by its name."""
        return self._ids.get(name)

    def scan_alphas(self) -> None:
        """Read the provenance of all alphas, and compare the alphas with each other. Only changed files are opened.

        If another process has written alphas of images that are not listed, these images are added to the list.
        """
        with self._scan_lock:
            self._add_new_images()
            restored_ids = [id for id in self.errors if not self.source_error(id)]
            sources: set[tuple[object, ...]] = {(id, *map(identify_file, self.jobs[id].files)) for id in restored_ids}
            if not sources <= self._planned_sources:
                self._planned_sources = sources  # if a plan cannot use them, it is not tried at every scan
                self._plan_again()
            before = list(self._alphas)
            with library_settings():  # entered once instead of for each file
                alphas = [self._read_alpha_file(id) for id in range(len(self.jobs))]
            if self._is_scanned and alphas == before:
                return
            results = [
                replace(job.planned, status="kept" if alpha.is_own else "planned", matting=alpha.details)
                for job, alpha in zip(self.jobs, alphas, strict=True)
            ]
            compared = add_batch_reasons(results, is_shot=self.is_shot)
            with self._lock:
                for id, (alpha, result) in enumerate(zip(alphas, compared, strict=True)):
                    if self._alphas[id] is before[id]:  # another thread may have read it meanwhile
                        self._store_alpha(id, alpha, result.matting.reasons)
            self._is_scanned = True
            if alphas != before:
                _write_index(self._index, dict(zip(self.names, alphas, strict=True)))

    def changes_since(self, revision: int | None) -> tuple[int, list[int]]:
        """Return the revision of the alphas, and the ids of those changed after an earlier one; none without one.

        After a revision that is above the current one, from a server that ran before, all are changed.
        """
        with self._lock:
            if revision is None or revision == self._revision:
                return self._revision, []
            if revision > self._revision:
                revision = 0
            return self._revision, [id for id, changed in enumerate(self._revisions) if changed > revision]

    def refresh(self, id: int) -> AlphaFile:
        """Read the provenance of an alpha again if its file has changed, and return it. Also check for hint files."""
        has_hints = bool(self.hint_paths(id))
        with self._lock:
            self._has_hints[id] = has_hints
        return self.refresh_alpha(id)

    def refresh_alpha(self, id: int) -> AlphaFile:
        """Read the provenance of an alpha again if its file has changed, and return it."""
        alpha = self._read_alpha_file(id)
        with self._lock:
            if alpha != self._alphas[id]:
                self._store_alpha(id, alpha, alpha.details.reasons)
        return alpha

    def _store_alpha(self, id: int, alpha: AlphaFile, reasons: tuple[str, ...]) -> None:
        """Store what is known about the alpha of an image. A change gets a new revision. The caller holds the lock."""
        if (alpha, reasons) != (self._alphas[id], self._reasons[id]):
            self._revision += 1
            if alpha != self._alphas[id]:
                self._versions[id] = self._revision
            self._alphas[id], self._reasons[id], self._revisions[id] = alpha, reasons, self._revision

    def item(self, id: int, state: ImageState) -> dict[str, Any]:
        """Return what the overview shows of an image, as JSON. ``state``: what the review has stored about it."""
        with self._lock:
            alpha, reasons, has_hints = self._alphas[id], self._reasons[id], self._has_hints[id]
            version = self._versions[id]
        status = "accepted" if alpha.is_reviewed else "open"
        if state.status == "rejected":
            status = "rejected"
        parent = Path(self.names[id]).parent.as_posix()
        return {
            "id": id,
            "name": self.names[id],
            "folder": "" if parent == "." else parent,
            "quality": alpha.details.quality,
            "reasons": list(reasons),
            "status": status,
            "revision": state.revision,
            "decision": last_decision(state.undo),
            "undo": undo_cause(state.undo),
            "has_hints": has_hints,
            "has_alpha": alpha.is_own,
            "version": f"{version:x}",  # part of URLs, so that browsers can cache images: it never returns
            "taught": state.taught["kind"] if state.taught else None,
            "change": state.change,
            "error": self.errors.get(id),
        }

    def ids_by_quality(self) -> list[int]:
        """Return the ids of all images, lowest quality first, as the page lists them at first.

        Alphas without a quality come first, and images without an alpha last.
        """
        with self._lock:
            alphas = list(self._alphas)
        ranks = [
            2.0 if not alpha.is_own else -1.0 if alpha.details.quality is None else alpha.details.quality
            for alpha in alphas
        ]
        return sorted(range(len(ranks)), key=lambda id: (ranks[id], id))

    def alpha_file(self, id: int) -> AlphaFile:
        """Return what was last read about the alpha of an image. Does not touch the file."""
        with self._lock:
            return self._alphas[id]

    def find_restored_source(self, id: int) -> None:
        """Plan the run again if the source of an image exists again. It did not when the run was planned."""
        if id in self.errors and not self.source_error(id):
            with self._scan_lock:
                self._plan_again()

    def source_error(self, id: int) -> str:
        """Return why an image whose source does not exist cannot be accepted; "" if all its files exist."""
        for path in self.jobs[id].files:
            if not path.is_file():
                return f"its source {path} does not exist any more; restore the source, or reject the alpha"
        return ""

    def shot_of(self, id: int) -> list[int] | None:
        """Return the ids of all frames of the shot that contains an image, in order; None if the run has no shots."""
        if not self.is_shot:
            return None
        with self._lock:
            if self._shots is None:
                self._shots = {}
                jobs = sorted(self.jobs, key=lambda job: natural_sort_key(job.name))  # others may have been added
                for frames, _ in split_shots(jobs, keyframes=[]):
                    ids = [self._ids[frame.planned.name] for frame in frames]
                    self._shots |= dict.fromkeys(ids, ids)
            return self._shots[id]

    def hint_paths(self, id: int) -> list[Path]:
        """Return the hint files of an image that exist now."""
        return [path for path in self._hint_candidates(id) if path.is_file()]

    def hint_target(self, id: int) -> Path:
        """Return the JSON file to which hints of an image are saved. Raises UsageError if ``--hints`` allows none."""
        for paths in (self.hint_paths(id), self._hint_candidates(id)):  # existing files first
            for path in paths:
                if path.suffix.lower() == ".json":
                    return path
        raise UsageError(
            f"hints of {self.names[id]} cannot be saved: --hints {self.options.hints.hints} names no JSON file for "
            "it; start icm review with --hints and a folder"
        )

    def read_shapes(self, id: int, size: tuple[int, int]) -> Shapes | None:
        """Return the saved hints of an image as shapes of labelme; None without hint files.

        ``size``: height and width of the image. Raises UsageError for a file that cannot be used.
        """
        paths = self.hint_paths(id)
        return read_shapes(paths, self.jobs[id].name, size) if paths else None

    def _hint_candidates(self, id: int) -> Iterator[Path]:
        """Yield the paths at which hint files of an image may be. New hints are saved to the first one that is JSON.

        The hints of a.png are in a.json or a.png.json; only in the latter if there is another image such as a.jpg.
        """
        job = self.jobs[id]
        if self._pattern is not None:
            number = FrameName.from_path(job.name).number
            if number is not None:
                yield Path(self._pattern.folder, self._pattern.frame_name(number))
            return
        full_name, stem = job.name.as_posix(), job.name.with_suffix("").as_posix()
        names = [full_name] if self._stem_counts[stem] > 1 else [stem, full_name]
        for name in names:
            for suffix in HINT_SUFFIXES:
                yield self.hints_folder / f"{name}{suffix}"

    def _choose_hints(
        self, options: MatteOptions, hints: Path | None
    ) -> tuple[MatteOptions, Path, FramePattern | None]:
        """Choose where the hints are: ``hints``, else ``--hints`` of the run, else ``.icm/hints``.

        Returns the options with this choice, the folder of the hints, and the pattern of their files if ``--hints`` is
        one, such as hints/####.json. If ``.icm/hints`` cannot be created, the options have no hints. Raises UsageError
        for a file, and OutputError if another folder cannot be created.
        """
        recorded = options.hints.hints
        if hints is None and recorded is not None and not Path(recorded).is_dir():
            pattern = FramePattern.parse(recorded)
            if pattern is not None:
                return options, Path(pattern.folder), pattern
        default = self.record_folder / HINTS_NAME
        folder = Path(os.path.abspath(hints or recorded or default))  # noqa: PTH100
        if folder.is_file():
            raise UsageError(f"--hints {folder} is a file; expected the folder to which hint files are saved")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if real_path(folder) == real_path(default):  # save_error says why
                return with_values(options, dropped=["hints"]), folder, None
            advice = "make the folder available, or start icm review with --hints and another folder"
            raise OutputError(f"--hints {folder} cannot be created: {describe_os_error(error, advice)}") from error
        return with_values(options, hints=str(folder)), folder, None

    def _find_save_error(self) -> str:
        """Return what cannot be saved, and why; "" if everything can."""
        saved = "changes"
        try:
            for folder in (self.record_folder, self.folder):
                check_writable(folder)
            saved = "hints"
            check_writable(self.hints_folder)
        except OutputError as error:
            return f"{saved} cannot be saved: {error}"
        return ""

    def _add_new_images(self) -> None:
        """Plan the run again if there are new alphas of images that are not listed, and add these images to the list.

        A run writes its first alpha before its record, so the run is also planned again after a change of the record.
        If another run with other sources has replaced the record, no image is added, and one notice is printed: the
        list and a recompute remain those of the run under review.
        """
        before, self._unlisted = self._unlisted, self._find_unlisted()
        record_before, self._record = self._record, identify_file(self._record_path)
        if self._unlisted <= before and (not self._unlisted or self._record == record_before):
            return
        if not self._has_other_sources():
            self._plan_again()
        elif not self.other_run_warning:
            self.other_run_warning = (
                f"another run of icm matte with other sources has written to {self.folder}, and its images are not "
                "shown; to review them instead of these images, start icm review again"
            )
            self._notice(self.other_run_warning)

    def _has_other_sources(self) -> bool:
        """Return whether the record names other sources than this review has."""
        try:
            recorded = read_run_record(self.folder)
        except UsageError:  # a damaged record is reported at the next start
            return False
        return any(recorded.get_value(name) != self.options.get_value(name) for name in SOURCE_OPTIONS)

    def _add_images(self, planned: Sequence[Job], sourceless: Sequence[Job], known: Mapping[str, AlphaFile]) -> None:
        """Add the images that are not listed yet, and replace the jobs of the others. No image gets another id.

        ``sourceless``: jobs of images without a source. ``known``: what is known about the alphas, by name.
        """
        with self._lock:
            for job in (*planned, *sourceless):
                name = job.planned.name
                self._outputs.update(job.outputs)
                id = self._ids.setdefault(name, len(self.jobs))
                self.errors.pop(id, None)
                if id < len(self.jobs):
                    self.jobs[id] = job
                    continue
                self._revision += 1
                self._revisions.append(self._revision)
                self._versions.append(self._revision)
                self._alphas.append(known.get(name, NO_ALPHA))
                self._reasons.append(())
                self._has_hints.append(job.hints is not None)
                self.jobs.append(job)
                self.names.append(name)
            self.errors |= {self._ids[job.planned.name]: f"{job.source} does not exist any more" for job in sourceless}
            self._stem_counts = Counter(job.name.with_suffix("").as_posix() for job in self.jobs)
            self._list_digests.append(combined_digest(str(self.folder), *self.names)[:16])
            self._shots = None

    def _plan_again(self) -> None:
        """Add the images that are new, and those whose source exists again. The caller holds ``_scan_lock``."""
        self._add_images(*self._plan(lambda _: None), {})

    def _plan(self, notice: Callable[[str], None]) -> tuple[Sequence[Job], Sequence[Job]]:
        """Return the jobs of all images of the run, and those of alphas whose source does not exist any more."""
        skipped = SkippedFiles(lambda _: None)  # the run has printed the notices already
        jobs: Sequence[Job] = []
        try:
            with library_settings():  # entered once instead of for each file
                jobs = plan_images(self.options, self.layout, self.colour, skipped, lambda _: None).jobs
        except UsageError as error:
            notice(f"the sources of the run cannot be found, so only the alphas are shown: {error}")
        names = {job.planned.name for job in jobs}
        sourceless = self._jobs_without_source({output for job in jobs for output in job.outputs})
        return jobs, [job for job in sourceless if job.planned.name not in names]

    def _find_unlisted(self) -> set[Path]:
        """Return the files that may be alphas, but are not those of a listed image."""
        return {path for path in self._walk_alphas() if path not in self._outputs}

    def _walk_alphas(self) -> Iterator[Path]:
        """Yield the files of the output folder that may be alphas."""
        skipped: SkippedPaths = {}
        for path in walk_files(self.layout.folder, skipped):
            if path.suffix.lower() in OUTPUT_SUFFIXES and not path.name.endswith(TRIMAP_SUFFIX):
                yield path

    def _jobs_without_source(self, planned: set[Path]) -> Iterator[Job]:
        """Yield jobs for alphas whose sources do not exist any more. ``planned``: outputs of all other images."""
        for path in sorted(self._walk_alphas()):
            if path in planned:
                continue
            with contextlib.suppress(ImageError):
                provenance = read_provenance_header(path)
                name, root = Path(provenance.get(NAME_KEY, "")), provenance.get(ROOT_KEY, "")
                source = Path(root, name)
                if DIGEST_KEY in provenance and name.name and not source.exists():
                    result = ImageResult(str(source), str(path), "planned", name=name.as_posix())
                    yield Job(source, name, path, result, colour=self.colour, root=root)

    def _read_alpha_file(self, id: int) -> AlphaFile:
        """Return what is known about the alpha of an image. Its file is opened only if its size or time has changed."""
        path, known, has_source = self.jobs[id].output, self._alphas[id], not self.source_error(id)
        identity = identify_file(path)
        if identity == known.identity:
            return known if has_source == known.has_source else replace(known, has_source=has_source)
        with contextlib.suppress(ImageError):
            provenance = read_provenance_header(path)
            if DIGEST_KEY in provenance and provenance.get(NAME_KEY) == escape_name(self.names[id]):
                return AlphaFile(identity, is_own=True, details=recorded_details(provenance), has_source=has_source)
        return AlphaFile(identity, has_source=has_source)


def with_values(options: MatteOptions, *, dropped: Collection[str] = (), **values: Any) -> MatteOptions:
    """Return options with other ``values``, as if the user had given them. Those in ``dropped`` get their defaults."""
    kept = {name: options.get_value(name) for name in options.given if name not in dropped}
    return MatteOptions.from_values({**kept, **values}, kept.keys() | values.keys())


def _with_output_folder(options: MatteOptions, folder: Path) -> MatteOptions:
    """Return the options of a run with ``folder`` as its output folder, which may have been moved since the run.

    The hints and masks that a recompute recorded below ``.icm`` have moved with the folder.
    """
    _, layout = choose_output(options.output)
    before = real_path(layout.folder)
    if before == real_path(folder):
        return options

    def current_path(path: str | Path) -> str:
        recorded = real_path(Path(path))
        has_moved = recorded.is_relative_to(before / RECORD_FOLDER)
        return str(folder / recorded.relative_to(before) if has_moved else path)

    out = folder if layout.pattern is None else folder / Path(options.output.out).name
    masks = [name for name in ("mask", "not_mask") if name in options.given]
    moved = {name: [*map(current_path, options.get_value(name))] for name in masks}
    hints = options.hints.hints
    return with_values(options, out=str(out), **moved, **({"hints": current_path(hints)} if hints else {}))


def _without_taught_images(options: MatteOptions) -> MatteOptions:
    """Return options without the references and negatives that were taught in a review, as a recompute records them."""
    references = options.references
    positives = _untaught_pairs(references.ref, references.mask)
    negatives = _untaught_pairs(references.not_ref, references.not_mask)
    if len(positives) == len(references.ref) and len(negatives) == len(references.not_ref):
        return options
    return with_values(
        options,
        ref=[ref for ref, _ in positives],
        mask=[mask for _, mask in positives if mask],
        not_ref=[ref for ref, _ in negatives],
        not_mask=[mask for _, mask in negatives if mask],
    )


def _untaught_pairs(refs: Sequence[Path], masks: Sequence[Path]) -> list[tuple[Path, Path | None]]:
    """Return the references that no review has taught, each with its mask; None for those beyond the last mask."""
    return [(ref, mask) for ref, mask in zip_longest(refs, masks) if mask is None or not _is_taught_mask(mask)]


def _is_taught_mask(mask: Path) -> bool:
    """Return whether a mask is one that a review has written for a taught image."""
    folder = mask.parent
    is_of_review = folder.name in (REFERENCES_NAME, NEGATIVES_NAME) and folder.parent.name == RECORD_FOLDER
    return is_of_review and not mask.name.startswith(BASE_PREFIX)


def _read_index(path: Path) -> dict[str, AlphaFile]:
    """Return what an earlier process stored about the alphas, by the names of the images; {} if it is unusable."""
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != [INDEX_VERSION, __version__]:
            return {}
        alphas = {}
        for name, (size, time, values) in content["alphas"].items():
            details = MattingDetails(**{**values, "reasons": tuple(values["reasons"])})
            alphas[name] = AlphaFile((size, time), True, details)
        return alphas
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}  # then all files are opened


def _write_index(path: Path, alphas: Mapping[str, AlphaFile]) -> None:
    """Store what is known about the alphas for the next process. Nothing is stored in a read-only folder."""
    stored = {
        name: (*alpha.identity, vars(alpha.details))
        for name, alpha in alphas.items()
        if alpha.is_own and alpha.identity is not None
    }
    with contextlib.suppress(OutputError), atomic_write(path) as file:
        file.write(json.dumps({"version": [INDEX_VERSION, __version__], "alphas": stored}).encode())
