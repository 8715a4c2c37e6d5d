"""Frames of one shot: what was found in a frame is carried into the next one along the optical flow.

The carried alpha is evidence beside the model's own, at the stage of the coarse alpha, so any model and head can have
it, and what gives edges comes after. The alpha with its edges is then brought nearer to that of the frame before, so
that what is decided anew in every frame does not flicker. A frame goes on from the frame before it, from the reference
beside it, or, where frames before it failed or do not show the thing, from one a little further back.
"""

from __future__ import annotations

import base64
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from icm_cli.errors import ImageError
from icm_cli.files import combined_digest
from icm_cli.geometry import Float, ImageU8, alpha_to_u8, downscaled_size, resize
from icm_cli.images.pixels import ImageWindows
from icm_cli.images.writing import read_stamp
from icm_cli.matting.crops import CUT_FROM, LEAST_SIDE, MARGIN, MOST_LOOKS, WIDER
from icm_cli.matting.frames import FrameName
from icm_cli.matting.jobs import Job
from icm_cli.matting.near import LOST_BELOW
from icm_cli.matting.predictor import CanvasMatte, Frame
from icm_cli.matting.references import Reference
from icm_cli.matting.sources import natural_sort_key

SMALL_PX = 432
"""Long side, in px, of the pictures between which the flow is found."""
LEAST_PX = 128
"""Both sides of such pictures are padded to this; the flow's own pyramid needs it."""
MOST_LOGIT = 3.0
"""The carried alpha's logit counts at most this much."""
LEAST_ALPHA = 0.02
"""The model's own alpha is kept this far from 0 and 1 where a carried one counts, so that it can be overruled."""
DIFFERENCE = 15.0
"""Difference of colours along the flow, 0..255, at which the carried alpha counts 1/e: there the flow is wrong."""
STEADY = 0.5
"""Share of the difference from the alpha of the frame before, moved along the flow, by which an alpha is brought nearer
to it where colours agree: what is decided anew in every frame would flicker."""
LEAST_FRAMES = 2
"""Files of one folder whose names differ before their numbers are shots of their own where each has so many frames."""
MOST_PASSED = 3
"""A frame goes on from at most so many frames before it."""
CARRIED_KEY = "icm-carried"


def described() -> str:
    """All numbers that decide what is carried and what is looked at, for the digest of a run."""
    carried = f"{SMALL_PX} {LEAST_PX} {MOST_LOGIT} {LEAST_ALPHA} {DIFFERENCE} {STEADY} {MOST_PASSED}"
    return f"shot displayed {carried} near {MARGIN} {LEAST_SIDE} {LOST_BELOW} {CUT_FROM} {WIDER} {MOST_LOOKS}"


@dataclass(frozen=True)
class Seen:
    """Memory of a frame: its display window, sRGB uint8 [h,w,3], and its alpha there, uint8 [h,w], of ``SMALL_PX``."""

    rgb: ImageU8
    alpha: ImageU8
    is_mask: bool = False
    """Whether the alpha is a reference's mask, which says nothing of softness."""

    @classmethod
    def of(cls, rgb: ImageU8, alpha: Float, windows: ImageWindows | None = None) -> Seen:
        """Shrink a picture [H,W,3] and its alpha 0..1, of any size. ``windows``: where the picture lies."""
        small = shrunk(displayed(rgb, windows))
        if windows is not None and not windows.is_full:
            at_size: Float = resize(alpha, windows.size)
            alpha = np.asarray(displayed(at_size, windows), np.float32)
        return cls(small, alpha_to_u8(resize(alpha, (small.shape[0], small.shape[1]))))


@dataclass(frozen=True)
class Key:
    """A reference that is a frame of the shot: its name below the sources' root, and how it is read."""

    name: Path
    read: Callable[[], Reference]


@dataclass(frozen=True)
class Shot:
    """The order in which frames are matted, and what each goes on from."""

    order: Sequence[Job]
    before: Mapping[Path, Job]
    """Frames that go on from another one, by their outputs."""
    starts: Mapping[Path, Key]
    """Frames that go on from a reference, by their outputs."""
    names: Sequence[Path]
    """Names of all frames and of the references among them, in their order."""

    @classmethod
    def of(cls, examples: Iterable[tuple[Sequence[Job], Sequence[Key]]]) -> Shot:
        """Put the frames of each example in order, with the references that are frames of it.

        From the first of these the order goes forward to the end, where every later one is gone on from anew, and then
        back to the beginning; without one it is that of the names.
        """
        order: list[Job] = []
        before: dict[Path, Job] = {}
        starts: dict[Path, Key] = {}
        names: list[Path] = []
        for jobs, keys in examples:
            line: list[Job | Key] = sorted([*jobs, *keys], key=lambda each: natural_sort_key(each.name))
            names += (each.name for each in line)
            first = next((place for place, each in enumerate(line) if isinstance(each, Key)), 0)
            for run in (line[first:], line[: first + 1][::-1] if first else []):
                for last, each in itertools.pairwise([None, *run]):
                    if not isinstance(each, Job):
                        continue
                    order.append(each)
                    if isinstance(last, Job):
                        before[each.output] = last
                    elif last is not None:
                        starts[each.output] = last
        return cls(order, before, starts, sorted(dict.fromkeys(names), key=natural_sort_key))

    def shard(self, number: int, count: int) -> Shot:
        """Frames of shard ``number``, from 1, of ``count``: a run of frames by name, which goes on from none of
        another's.

        References count as frames, so that shards which are given different ones still part the shot alike.
        """
        begin, end = (len(self.names) * each // count for each in (number - 1, number))
        names = set(self.names[begin:end])
        order = [job for job in self.order if job.name in names]
        own = {job.output for job in order}
        before = {output: job for output, job in self.before.items() if output in own and job.output in own}
        starts = {output: key for output, key in self.starts.items() if output in own}
        return Shot(order, before, starts, self.names[begin:end])

    def digest(self, job: Job, digest: str) -> str:
        """A run's digest with the frame or reference that a frame goes on from, as the order has it."""
        before, start = self.before.get(job.output), self.starts.get(job.output)
        return combined_digest(digest, before.planned.name if before else f"reference {start.name}" if start else "")

    def of_jobs(self, jobs: Sequence[Job]) -> Shot:
        """The same order of the same frames, whose jobs say more now."""
        now = {job.output: job for job in jobs}
        before = {output: now[job.output] for output, job in self.before.items()}
        return Shot([now[job.output] for job in self.order], before, self.starts, self.names)

    def unbroken(self, finished: Collection[Path]) -> set[Path]:
        """Those of the finished outputs whose frames before are all finished too: the others would come out
        otherwise where one before them is made anew."""
        kept: set[Path] = set()
        for job in self.order:
            before = self.before.get(job.output)
            if job.output in finished and (before is None or before.output in kept):
                kept.add(job.output)
        return kept


def apart(jobs: Sequence[Job], keys: Sequence[Key]) -> list[tuple[list[Job], list[Key]]]:
    """Frames and the references among them, shot by shot: each folder has its own, or several where the names of its
    files differ before their numbers and each such name has frames enough to be a shot."""
    folders: dict[Path, dict[str, list[Job | Key]]] = {}
    frames: list[Job | Key] = [*jobs, *keys]
    for each in frames:
        stem = FrameName.from_path(each.name).stem
        folders.setdefault(each.name.parent, {}).setdefault(stem, []).append(each)
    shots = []
    for stems in folders.values():
        parts = list(stems.values())
        is_each_a_shot = all(len(part) >= LEAST_FRAMES or isinstance(part[0], Key) for part in parts)
        shots += parts if is_each_a_shot else [[each for part in parts for each in part]]
    return [
        ([each for each in shot if isinstance(each, Job)], [each for each in shot if isinstance(each, Key)])
        for shot in shots
    ]


class Carrier:
    """Carries alphas through a shot, frame by frame in its order, and holds no more than a few small ones."""

    def __init__(self, shot: Shot, to_make: Collection[Job], notice: Callable[[str], None]) -> None:
        """``to_make``: frames that are matted in this run; of the others the alphas that are there are read."""
        self.shot = shot
        self._notice = notice
        self._to_make = {job.output for job in to_make}
        self._seen: dict[Path, Seen] = {}

    def matte(
        self,
        job: Job,
        frame: Frame,
        look: Callable[[ImageU8 | None], CanvasMatte],
        with_edges: Callable[[Frame, CanvasMatte], CanvasMatte],
        windows: ImageWindows | None = None,
    ) -> CanvasMatte:
        """Add what was carried to a frame's coarse alpha, give it its edges, and keep it for the next one.

        ``look`` gives the coarse alpha, and is told the alpha of the frame before, uint8 [h,w] of its display window,
        if there is one. Frames are registered by their display windows; ``windows``: where this one's pixels lie in its
        own. A frame in which the thing was not found is left as it is, and none goes on from it.
        """
        before = self._before(job, shrunk(displayed(frame.rgb, windows)).shape)
        coarse = look(None if before is None else before.alpha)
        if not coarse.found or not np.isfinite(coarse.alpha).all():
            return with_edges(frame, coarse)
        motion = None if before is None else Motion.of(before, frame.rgb, windows)
        if motion is not None:
            alpha = carried(motion, _inside(frame, coarse))
            coarse = replace(coarse, alpha=_on_canvas(alpha, coarse.alpha))
        matte = with_edges(frame, coarse)
        alpha = matte.alpha if matte.is_refined else _inside(frame, matte)
        if motion is not None and not motion.before.is_mask:
            alpha = steadied(motion, frame.rgb, alpha)
            matte = replace(matte, alpha=alpha if matte.is_refined else _on_canvas(alpha, matte.alpha))
        seen = Seen.of(frame.rgb, alpha, windows)
        self._seen[job.output] = seen
        while len(self._seen) > MOST_PASSED:
            del self._seen[next(iter(self._seen))]
        return replace(matte, carried=seen.alpha)

    def back_to(self, seen: Mapping[Path, Seen]) -> None:
        """Forget all but what :meth:`state` gave."""
        self._seen = dict(seen)

    def state(self) -> Mapping[Path, Seen]:
        """The memory of the last frames, by their outputs."""
        return dict(self._seen)

    def _before(self, job: Job, size: tuple[int, ...]) -> Seen | None:
        """The memory of the nearest frame before that has one, of pictures of this size."""
        source, others = job.source, list[str]()
        found: Seen | None
        for _ in range(MOST_PASSED):
            start, earlier = self.shot.starts.get(job.output), self.shot.before.get(job.output)
            if start is not None:
                name, found = start.name, _seen_in_reference(start.read())
            elif earlier is not None:
                job, name = earlier, earlier.name
                found = self._seen.get(job.output) if job.output in self._to_make else _seen_earlier(job)
            else:
                break
            if found is not None and found.rgb.shape == size:
                return found
            others += [name.name] if found is not None else []
            if start is not None:
                break
        if others:
            self._notice(f"{source} has another form or size than {others[0]}, so nothing of that is carried into it")
        return None


@dataclass(frozen=True)
class Motion:
    """Optical flow (DIS, Kroeger et al., ECCV 2016) from a frame to the one before, float32 [h,w,2], between their
    display windows of ``SMALL_PX``; and how far colours agree along it, float32 [h,w] 0..1."""

    before: Seen
    flow: Float
    likeness: Float
    windows: ImageWindows | None
    """Place of the frame's pixels in its display window; None: they fill it."""

    @classmethod
    def of(cls, before: Seen, rgb: ImageU8, windows: ImageWindows | None = None) -> Motion:
        """Find the flow to a frame, sRGB uint8 [H,W,3], whose display window is of the size of the frame before."""
        now = shrunk(displayed(rgb, windows))
        flow = _flow(now, before.rgb)
        difference = np.abs(_moved(before.rgb.astype(np.float32), flow) - now).mean(axis=-1)
        return cls(before, flow, np.asarray(np.exp(-((difference / DIFFERENCE) ** 2)), np.float32), windows)


def carried(motion: Motion, alpha: Float) -> Float:
    """A frame's coarse alpha [h,w] 0..1 with the evidence of the frame before.

    Logits add up. That of the frame before is moved along the flow and counts less where colours differ along it.
    """
    evidence = np.clip(_logit(motion.before.alpha), -MOST_LOGIT, MOST_LOGIT)
    weight = np.asarray(_moved(evidence, motion.flow) * motion.likeness, np.float32)
    weight = _cut(weight, motion.windows, (alpha.shape[0], alpha.shape[1]))
    least = LEAST_ALPHA * np.minimum(1.0, np.abs(weight))
    kept = np.clip(alpha, least, 1.0 - least)
    odds = kept * np.exp(weight)
    return np.asarray(np.minimum(odds / (odds + 1.0 - kept), 1.0), np.float32)


def steadied(motion: Motion, rgb: ImageU8, alpha: Float) -> Float:
    """A frame's alpha [h,w] 0..1, edges and all, brought nearer to that of the frame before; ``rgb``: its picture.

    The difference is taken at ``SMALL_PX``, so that edges stay as fine as they are.
    """
    now = Seen.of(rgb, alpha, motion.windows).alpha / np.float32(255)
    before = _moved(motion.before.alpha.astype(np.float32), motion.flow) / np.float32(255)
    nearer = np.asarray(STEADY * motion.likeness * (before - now), np.float32)
    nearer = _cut(nearer, motion.windows, (alpha.shape[0], alpha.shape[1]))
    return np.asarray(np.clip(alpha + nearer, 0.0, 1.0), np.float32)


def displayed(pixels: NDArray[Any], windows: ImageWindows | None) -> NDArray[Any]:
    """Pixels [H,W] or [H,W,3] of a data window as those of the display window, 0 outside."""
    return pixels if windows is None else windows.move_pixels(pixels, windows.display_window)


def shrunk(rgb: ImageU8) -> ImageU8:
    """A picture [H,W,3] of at most ``SMALL_PX``."""
    return resize(rgb, downscaled_size(rgb.shape[:2], SMALL_PX))


def encoded(alpha: ImageU8) -> str:
    """A small alpha as text: a PNG in base64."""
    return base64.b64encode(cv2.imencode(".png", alpha)[1].tobytes()).decode("ascii")


def _seen_in_reference(reference: Reference) -> Seen:
    alpha = reference.guidance.astype(np.float32)
    if reference.unknown is not None:
        alpha[reference.unknown] = 0.5
    return replace(Seen.of(reference.rgb, alpha, reference.windows), is_mask=True)


def _seen_earlier(job: Job) -> Seen | None:
    """The memory of a frame that an earlier run matted, by its alpha; None where that is not there or shows nothing."""
    try:
        text = (read_stamp(job.output) or {}).get(CARRIED_KEY, "")
        data = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
        alpha = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE) if len(data) else None
        return (
            None
            if alpha is None
            else Seen(shrunk(job.read_image().to_display_window().rgb), np.asarray(alpha, np.uint8))
        )
    except (ImageError, ValueError, OSError, cv2.error):
        return None


def _inside(frame: Frame, matte: CanvasMatte) -> Float:
    return frame.placement.crop_to_content(matte.alpha)


def _cut(weight: Float, windows: ImageWindows | None, size: tuple[int, int]) -> Float:
    """Values [h,w] of the display window as those of the data window, of ``size``."""
    if windows is None or windows.is_full:
        return resize(weight, size)
    rows, columns = (
        ((np.arange(size[n]) + 0.5) * windows.size[n] / size[n] + windows.at[n]) * weight.shape[n] / windows.display[n]
        - 0.5
        for n in (0, 1)
    )
    x, y = np.meshgrid(columns.astype(np.float32), rows.astype(np.float32))
    return np.asarray(cv2.remap(weight, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float32)


def _on_canvas(alpha: Float, canvas: Float) -> Float:
    """An alpha [h,w] in the first corner of one of the canvas [H,W], which stays as it is beside it."""
    out = canvas.copy()
    out[: alpha.shape[0], : alpha.shape[1]] = alpha
    return out


def _flow(now: ImageU8, before: ImageU8) -> Float:
    """For every pixel of a picture uint8 [h,w,3] where it was in another one, as a difference (x, y), [h,w,2]."""
    height, width = now.shape[:2]
    pad = max(0, LEAST_PX - height), max(0, LEAST_PX - width)
    grey = [
        cv2.copyMakeBorder(cv2.cvtColor(each, cv2.COLOR_RGB2GRAY), 0, pad[0], 0, pad[1], cv2.BORDER_REPLICATE)
        for each in (now, before)
    ]
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM).calc(*grey, None)  # type: ignore[call-overload]
    return np.asarray(flow[:height, :width], np.float32)


def _moved(values: Float, flow: Float) -> Float:
    """Values [h,w] or [h,w,C] of the picture before, where the flow [h,w,2] says that they are now."""
    height, width = flow.shape[:2]
    x, y = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    return np.asarray(
        cv2.remap(values, x + flow[..., 0], y + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    )


def _logit(alpha: ImageU8) -> Float:
    kept = np.clip(alpha / np.float32(255), LEAST_ALPHA, 1.0 - LEAST_ALPHA)
    return np.asarray(np.log(kept / (1.0 - kept)), np.float32)
