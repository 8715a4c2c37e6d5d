"""``Predictor``: a loaded model that mattes arrays. ``icm_cli.load`` returns it, and ``icm matte`` uses it."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icm_cli.device import Device, device_errors, resolve_device
from icm_cli.environment import check_not_forked, trim_heap
from icm_cli.errors import UsageError
from icm_cli.geometry import Float, ImageU8, Placement, alpha_to_u8, resize
from icm_cli.guidance.hints import Hints
from icm_cli.guided_filter import alpha_at_source
from icm_cli.images.pixels import ImageWindows
from icm_cli.matting.array_arguments import as_mattes, as_negatives, as_references, as_rgb, check_hints, describe_value
from icm_cli.matting.crops import CropBox, crop_box, matte_in_crops, paste_crop
from icm_cli.matting.hinting import apply_hints_to_alpha, edit_coarse_alpha, make_prompts, says_present
from icm_cli.matting.mattes import Mattes
from icm_cli.matting.object_match import keep_same_objects
from icm_cli.matting.prompting import ImageEmbedder, MaskMaker, complete_by_prompts
from icm_cli.matting.quality_signals import measure_signals
from icm_cli.matting.references import Reference, check_negatives
from icm_cli.model.alphas import apply_in_batches, max_batch_size, resize_alpha
from icm_cli.model.contracts import Head, Matte, Objects, ObjectTokens, PreparedReferences, ignore_progress
from icm_cli.model.core import InContextMatting
from icm_cli.model.decoding import FOUND_FRACTION, confidence_and_found
from icm_cli.options import MAX_LEARN_STEPS, MatteOptions
from icm_cli.options.definition import name_arguments_in_errors
from icm_cli.values import is_number


@dataclass(frozen=True)
class Frame:
    """An image to matte, prepared for the model.

    Attributes:
        rgb: Pixels of the source, sRGB uint8 [H,W,3].
        canvas: The pixels that the model sees, resized to the canvas of the backbone, uint8.
        placement: Position of the frame on the canvas.
        windows: Position of the pixels in the display window; None if they fill it.
        hints: Hints, in pixels of ``rgb``.
        embedder: Embeddings for the object model, if they are kept for further hints.
        mattes: Garbage and keep mattes, of the size of ``rgb``.
        visible: ``rgb`` with the garbage area hidden, which the model sees instead; None without a garbage matte.
    """

    rgb: ImageU8
    canvas: ImageU8
    placement: Placement
    windows: ImageWindows | None = None
    hints: Hints | None = None
    embedder: ImageEmbedder | None = None
    mattes: Mattes | None = None
    visible: ImageU8 | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the source."""
        return self.rgb.shape[0], self.rgb.shape[1]

    @property
    def visible_rgb(self) -> ImageU8:
        """Pixels that the model sees."""
        return self.rgb if self.visible is None else self.visible

    @property
    def shows_object(self) -> bool:
        """Whether a hint marks the object, so that it is present whatever the model predicts."""
        return self.hints is not None and says_present(self.hints)


@dataclass(frozen=True)
class CoarseAlpha:
    """Coarse alpha of one frame, before its edges are refined.

    Attributes:
        alpha: float32 [h,w] in 0..1 on the model's device, at any resolution. It covers exactly the frame.
        found: Whether the object appears to be in the frame.
        signals: Signals of the head, see :mod:`icm_cli.matting.quality_signals`.
        presence_logit: Logit of the probability that the object is in the frame; infinite if the head has no such
            output.
        alpha_if_present: Alpha under the assumption that the object is in the frame; None if that is certain or if the
            head has no such output.
        is_completed: Whether the object model has already completed ``alpha``.
        object_tokens: Tokens by which ``--match same`` compares objects; None if the head cannot compare them.
    """

    alpha: Tensor
    found: bool
    signals: Mapping[str, float] = field(default_factory=dict)
    presence_logit: float = float("inf")
    alpha_if_present: Tensor | None = None
    is_completed: bool = False
    object_tokens: ObjectTokens | None = None

    @property
    def area(self) -> float:
        """Fraction of the frame that is foreground."""
        return float((self.alpha > 0.5).float().mean())


@dataclass(frozen=True)
class FrameAlpha:
    """Alpha of one frame, after all passes of the model.

    Attributes:
        alpha: float32 [h,w] in 0..1, covers exactly the frame. It has the size of the source if the model has edges or
            the frame has hints or mattes, else that of the coarse alpha. :meth:`Predictor.alpha_at_source` resizes it
            to the source.
        found: Whether the object appears to be in the frame.
        signals: Signals from which the quality is estimated, see :mod:`icm_cli.matting.quality_signals`. Empty if the
            alpha is not finite.
        provenance: Further entries for the provenance of the file, see :mod:`icm_cli.matting.provenance`.
    """

    alpha: Float
    found: bool
    signals: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)


class Session:
    """Mattes one image again and again with different hints; see :meth:`Predictor.session`. Not thread-safe.

    What does not depend on the hints is computed only once. Hints are in pixels of the frame, its data window.
    """

    def __init__(self, predictor: Predictor, frame: Frame, decide_alpha: Callable[[Frame], CoarseAlpha]) -> None:
        """``decide_alpha`` returns the coarse alpha of a frame, as :meth:`Predictor.decide_presence` does.

        It may use the hints only for :attr:`Frame.shows_object`, so it is called at most twice.
        """
        self._predictor, self._decide_alpha = predictor, decide_alpha
        self._frame = replace(frame, embedder=ImageEmbedder(predictor.prompted_objects, frame.visible_rgb))
        self._decided: dict[bool, CoarseAlpha] = {}

    def coarse(self, hints: Hints | None = None) -> ImageU8:
        """Return the alpha with these hints, but without refined edges, uint8 [H,W]; faster than :meth:`matte`."""
        predictor, frame = self._predictor, self._frame_with_hints(hints)
        with device_errors(predictor.device, "an image was matted"):
            coarse = predictor.select_objects(frame, self._coarse_alpha(frame))
            (completed,) = predictor.complete_alphas([frame], [coarse], embeds_crops=False)
            alpha = resize_alpha(completed, frame.size).numpy(force=True)
            return alpha_to_u8(_follow_corrections(alpha, frame))

    def matte(self, hints: Hints | None = None) -> ImageU8:
        """Return the alpha, uint8 [H,W]: the same as :meth:`Predictor.matte` for this image and these hints."""
        return alpha_to_u8(self._predictor.alpha_at_source(self._frame, self.matte_frame(hints)))

    def matte_frame(self, hints: Hints | None = None) -> FrameAlpha:
        """Return the alpha of the frame with these hints, as :meth:`Predictor.matte_frames` does."""
        frame = self._frame_with_hints(hints)
        with device_errors(self._predictor.device, "an image was matted"):
            (result,) = self._predictor.refine_alphas([frame], [self._coarse_alpha(frame)])
            return result

    def _frame_with_hints(self, hints: Hints | None) -> Frame:
        check_not_forked()
        return replace(self._frame, hints=None if hints is None else check_hints(hints, self._frame.rgb))

    def _coarse_alpha(self, frame: Frame) -> CoarseAlpha:
        """Return the cached coarse alpha. It depends only on whether a hint marks the object."""
        if frame.shows_object not in self._decided:
            self._decided[frame.shows_object] = self._decide_alpha(frame)
        return self._decided[frame.shows_object]


class Predictor:
    """A model on its device. ``reference`` prepares the references, ``matte`` mattes an image."""

    def __init__(self, model: InContextMatting, device: Device) -> None:
        """Move the model to its device."""
        check_not_forked(loads_model=True)
        self.device = device
        self._mask_maker = MaskMaker(lambda: resolve_device(str(device.torch_device)))
        with device_errors(device, "the model was loaded"):
            self.model = model.to_device(device.torch_device, device.dtype, device.transformer_dtype)

    def reference(
        self,
        pairs: Sequence[Reference | tuple[ImageU8, NDArray[Any] | Hints]],
        *,
        negatives: Sequence[ImageU8 | tuple[ImageU8, NDArray[Any] | Hints]] = (),
        learn_steps: int | None = None,
        on_progress: Callable[[float], None] = ignore_progress,
    ) -> PreparedReferences:
        """Prepare references for :meth:`matte`. Their features are computed here, once.

        Args:
            pairs: One pair or several: an image, sRGB uint8 [H,W,3] or grey [H,W], and the mask of the object, [H,W]:
                bool, uint8 0..255 or float 0..1. With ``Hints`` in place of the mask, ``lite`` makes it from their
                points, boxes and strokes.
            negatives: Images that do not show the object. Or pairs: an image, and a mask or Hints that select what is
                not the object.
            learn_steps: Number of steps in which a copy of the head is fine-tuned on the references. Useful if all
                images show one shot or location. None means 0: no fine-tuning.
            on_progress: Called with the finished fraction of the fine-tuning, 0..1.

        Raises:
            UsageError: An array has another type, shape or range, a mask is empty or full, or the head cannot learn
                references.
        """
        check_not_forked()
        with name_arguments_in_errors(MatteOptions):
            check_learn_steps(learn_steps or 0, type(self.model.head))
        make_mask = self._mask_maker.make_mask
        references = [*as_references(pairs, make_mask), *as_negatives(negatives, make_mask)]
        check_negatives(references)
        check_guidance(references, type(self.model.head))
        action = f"the references were learned in {learn_steps} steps" if learn_steps else "references were prepared"
        with device_errors(self.device, action), torch.no_grad():
            tensors = [self._reference_tensors(reference, index) for index, reference in enumerate(references)]
            return self.model.prepare_references(tensors, learn_steps=learn_steps or 0, on_progress=on_progress)

    def matte(
        self,
        rgb: ImageU8,
        reference: PreparedReferences,
        hints: Hints | None = None,
        *,
        garbage: NDArray[Any] | None = None,
        keep: NDArray[Any] | None = None,
    ) -> ImageU8:
        """Return the alpha of an image, uint8 [H,W].

        Args:
            rgb: The image, sRGB uint8 [H,W,3] or grey [H,W].
            reference: Result of :meth:`reference`.
            hints: Hints about this image, which the alpha follows.
            garbage: Matte [H,W]: bool, uint8 0..255 or float 0..1. The alpha is 0 where it is white.
            keep: Matte like ``garbage``. The alpha is 1 where it is white.

        Raises:
            UsageError: An array has another type or shape, or the hints are for another size.
            ConfigError: Memory ran out.
        """
        frame = self._frame_from_arguments(rgb, reference, garbage, keep)
        frame = replace(frame, hints=None if hints is None else check_hints(hints, frame.rgb))
        with device_errors(self.device, "an image was matted"):
            (result,) = self.matte_frames([frame], reference)
            return alpha_to_u8(self.alpha_at_source(frame, result))

    def session(
        self,
        rgb: ImageU8,
        reference: PreparedReferences,
        *,
        garbage: NDArray[Any] | None = None,
        keep: NDArray[Any] | None = None,
    ) -> Session:
        """Return a session to matte one image again and again with different hints, as an editor does.

        What does not depend on the hints is computed here, once. Arguments and errors are those of :meth:`matte`.
        """
        return self.open_session(self._frame_from_arguments(rgb, reference, garbage, keep), reference)

    def open_session(self, frame: Frame, reference: PreparedReferences) -> Session:
        """Return a session for a frame. Its alphas equal those of :meth:`matte_frames` with the same hints."""
        with device_errors(self.device, "an image was matted"):
            matte = self.infer([frame], reference)

            def decide_alpha(frame: Frame) -> CoarseAlpha:
                return self.decide_presence(frame, _coarse_alpha_from_batch(matte, 0, frame), reference)

            return Session(self, frame, decide_alpha)

    def _frame_from_arguments(self, rgb: Any, reference: Any, garbage: Any, keep: Any) -> Frame:
        """Check the arguments of :meth:`matte`, and return their prepared frame, without hints. Raises UsageError."""
        check_not_forked()
        if not hasattr(reference, "notices"):
            raise UsageError(f"reference is {describe_value(reference)}; expected the result of Predictor.reference")
        rgb = as_rgb(rgb, "image")
        return self.prepare_frame(rgb, mattes=as_mattes(garbage, keep, rgb))

    def prepare_frame(
        self,
        rgb: ImageU8,
        windows: ImageWindows | None = None,
        hints: Hints | None = None,
        mattes: Mattes | None = None,
    ) -> Frame:
        """Prepare an image, sRGB uint8 [H,W,3] of any size, for the model. Thread-safe: does not run the model."""
        placement = self.model.backbone.canvas.placement(*rgb.shape[:2])
        visible = None if mattes is None else mattes.hide_garbage(rgb)
        canvas = placement.fit_to_canvas(rgb if visible is None else visible)
        return Frame(rgb, canvas, placement, windows, hints, mattes=mattes, visible=visible)

    def prepare_crop(self, frame: Frame, box: CropBox) -> Frame:
        """Prepare a crop of a frame, without its hints."""
        return self.prepare_frame(box.crop(frame.rgb), mattes=frame.mattes and frame.mattes.crop(box))

    def matte_frames(self, frames: Sequence[Frame], reference: PreparedReferences) -> list[FrameAlpha]:
        """Matte a batch of frames independently of each other."""
        coarse = self.coarse_alphas(frames, reference)
        decided = [self.decide_presence(frame, each, reference) for frame, each in zip(frames, coarse, strict=True)]
        return self.refine_alphas(frames, decided)

    @torch.inference_mode()
    def coarse_alphas(self, frames: Sequence[Frame], reference: PreparedReferences) -> list[CoarseAlpha]:
        """Run backbone and head on frames, in the batches of :func:`~icm_cli.model.alphas.max_batch_size`.

        If a hint marks the object, it is present, whatever the head predicts.
        """

        def infer(batch: Sequence[Frame]) -> list[CoarseAlpha]:
            matte = self.infer(batch, reference)
            return [_coarse_alpha_from_batch(matte, index, frame) for index, frame in enumerate(batch)]

        largest = max_batch_size(self.device.torch_device)
        coarse = apply_in_batches(infer, frames, lambda frame: frame.canvas.shape, largest)
        if self.device.torch_device.type == "cpu":
            trim_heap()  # backbone and head leave gaps in it that the tensors of the next networks do not fit into
        return coarse

    def infer(self, frames: Sequence[Frame], reference: PreparedReferences) -> Matte:
        """Run backbone and head on a batch of frames, without their hints. Their canvases must have the same size."""
        valid = self._to_device(np.stack([frame.placement.content_mask() for frame in frames]))
        return self.model.infer(self._image_batch([frame.canvas for frame in frames]), valid, reference)

    @torch.inference_mode()
    def refine_alphas(
        self,
        frames: Sequence[Frame],
        coarse: Sequence[CoarseAlpha],
        stabilise: Callable[[Float], Float] | None = None,
    ) -> list[FrameAlpha]:
        """Return the final alphas of frames from their coarse alphas, in these steps:

        1. Select the objects (:meth:`select_objects`), complete them, and refine the edges, if the model has these
           components. Alphas with values that are not finite are left as they are.
        2. Apply ``stabilise`` to every alpha.
        3. Apply the mattes and hints of the frames.
        """
        coarse = [self.select_objects(frame, each) for frame, each in zip(frames, coarse, strict=True)]
        completed = self.complete_alphas(frames, coarse)
        final = [alpha.numpy(force=True) for alpha in self._refine_edges(frames, completed)]
        if stabilise is not None:
            final = list(map(stabilise, final))
        return [self._make_result(*each) for each in zip(frames, coarse, completed, final, strict=True)]

    def _refine_edges(self, frames: Sequence[Frame], alphas: Sequence[Tensor]) -> list[Tensor]:
        """Refine the edges of alphas [h,w], if the model has edges. Those that are not finite stay as they are."""
        refined = list(alphas)
        if self.model.edges is not None:
            finite = [index for index, alpha in enumerate(alphas) if bool(alpha.isfinite().all())]
            images = [frames[index].rgb for index in finite]
            results = self.model.edges.refine_alphas(images, [alphas[index] for index in finite])
            for index, alpha in zip(finite, results, strict=True):
                refined[index] = alpha
        return refined

    @torch.inference_mode()
    def select_objects(self, frame: Frame, coarse: CoarseAlpha) -> CoarseAlpha:
        """Keep only objects that are the same instance as that of the references, with ``--match same``.

        The result is completed. With the rule ``kind``, nothing changes. See :func:`keep_same_objects`.
        """
        tokens, alpha = coarse.object_tokens, coarse.alpha
        if self.model.match.rule == "kind" or tokens is None or not alpha.isfinite().all():
            return coarse
        if not coarse.is_completed:
            (alpha,) = self._complete_objects([frame], [alpha])
        alpha, similarity = keep_same_objects(alpha, tokens, frame.placement.content, self.model.match, frame.hints)
        signals = coarse.signals
        if similarity is not None and not frame.shows_object:
            signals = {**signals, "object_similarity": similarity}
        return replace(coarse, alpha=alpha, signals=signals, is_completed=True)

    @torch.inference_mode()
    def complete_alphas(
        self, frames: Sequence[Frame], coarse: Sequence[CoarseAlpha], *, embeds_crops: bool = True
    ) -> list[Tensor]:
        """Complete the objects of coarse alphas, with the hints of their frames. Returns float32 [h,w] of any size.

        ``embeds_crops``: see :func:`~icm_cli.matting.prompting.complete_by_prompts`.
        """
        alphas = [each.alpha for each in coarse]
        unfinished = []
        for index, (frame, each) in enumerate(zip(frames, coarse, strict=True)):
            if not each.alpha.isfinite().all():
                continue
            is_completed = each.is_completed
            if frame.hints is not None:
                alphas[index], is_prompted = self._complete_by_hints(frame, frame.hints, each.alpha, embeds_crops)
                is_completed |= is_prompted  # without its prompts, it must not be completed again
            if not is_completed:
                unfinished.append(index)
        if self.model.edges is not None:
            completed = self._complete_objects([frames[n] for n in unfinished], [alphas[n] for n in unfinished])
            for index, alpha in zip(unfinished, completed, strict=True):
                alphas[index] = alpha
        return alphas

    def _complete_by_hints(self, frame: Frame, hints: Hints, alpha: Tensor, embeds_crops: bool) -> tuple[Tensor, bool]:
        """Return a coarse alpha that follows hints, and whether the object model has completed it.

        Areas are painted into it; points and boxes prompt the object model.
        """
        alpha = edit_coarse_alpha(alpha, hints)
        prompts = make_prompts(hints)
        if prompts is None:
            return alpha, False
        objects = self.prompted_objects
        if not (frame.shows_object or objects.has_object(alpha)):
            return alpha, False
        embedder = frame.embedder or ImageEmbedder(objects, frame.visible_rgb)
        return complete_by_prompts(embedder, alpha, hints, prompts, embeds_crops=embeds_crops), True

    def _make_result(self, frame: Frame, coarse: CoarseAlpha, completed: Tensor, alpha: Float) -> FrameAlpha:
        """Return the result of a frame: apply its mattes and hints to ``alpha``, and measure the signals.

        An alpha with mattes or hints gets the size of the source first.
        """
        is_finite = bool(np.isfinite(alpha).all())
        if is_finite and (frame.hints is not None or frame.mattes is not None):
            alpha = _follow_corrections(alpha_at_source(alpha, frame.rgb, self.model.guided_filter), frame)
        found = frame.shows_object or bool((alpha > 0.5).mean() >= FOUND_FRACTION)
        if not is_finite:
            return FrameAlpha(alpha, found)
        before = completed.numpy(force=True)
        earlier = {} if self.model.edges is None else {"completed_agreement": before}
        if earlier and frame.hints is None:
            earlier["coarse_agreement"] = coarse.alpha.numpy(force=True)
        signals = measure_signals(frame.rgb, alpha, before, earlier, coarse.signals, shows_object=frame.shows_object)
        return FrameAlpha(alpha, found, signals)

    @property
    def prompted_objects(self) -> Objects:
        """The object model that follows points and boxes: that of the model, or else that of ``lite``.

        The latter is loaded from the package at its first use. Raises ConfigError if it is not installed.
        """
        return self.model.objects or self._mask_maker.objects

    def alpha_at_source(self, frame: Frame, result: FrameAlpha) -> Float:
        """Return the alpha at the size of the source, float32 [H,W] in 0..1. Thread-safe.

        Alphas of models without edges are enlarged by the guided filter.
        """
        return alpha_at_source(result.alpha, frame.rgb, self.model.guided_filter)

    def _complete_objects(self, frames: Sequence[Frame], coarse: Sequence[Tensor]) -> list[Tensor]:
        """Complete the objects of coarse alphas [h,w] without prompts, if the model has an object model."""
        objects = self.model.objects
        if objects is None:
            return list(coarse)
        images = [frame.visible_rgb if frame.embedder is None else frame.embedder.image for frame in frames]
        return objects.complete_alphas(images, coarse)

    @torch.inference_mode()
    def decide_presence(self, frame: Frame, coarse: CoarseAlpha, reference: PreparedReferences) -> CoarseAlpha:
        """Decide by a second pass, on a crop, whether an object whose presence is uncertain is in the frame.

        The presence logits of the two passes are averaged. The alpha of the more confident pass is used, multiplied by
        the probability that the object is present.
        """
        candidate = coarse.alpha_if_present
        if self.model.edges is None or candidate is None or not candidate.isfinite().all():
            return coarse
        (first,) = self._complete_objects([frame], [candidate])
        second = self._coarse_alpha_from_crop(frame, first, reference)
        if second is None:
            return coarse
        from_crop, crop_logit = second
        is_crop_better = crop_logit > coarse.presence_logit and bool((from_crop > 0.5).any())
        logit = (coarse.presence_logit + crop_logit) / 2
        alpha = (from_crop if is_crop_better else first) * torch.sigmoid(torch.tensor(logit)).to(first.device)
        everywhere = torch.ones_like(alpha, dtype=torch.bool)
        confidence, found = confidence_and_found(alpha[None, None], everywhere[None])
        signals = {**coarse.signals, "confidence": float(confidence), "presence": logit}
        return replace(coarse, alpha=alpha, found=bool(found), signals=signals, is_completed=True)

    def _coarse_alpha_from_crop(
        self, frame: Frame, alpha: Tensor, reference: PreparedReferences
    ) -> tuple[Tensor, float] | None:
        """Matte a crop around the foreground of ``alpha`` [h,w], under the assumption that the object is present.

        Returns the completed alpha, float32 [H,W], which is 0 outside the crop, and the presence logit of the crop.
        Returns None if there is no foreground, if the crop would be nearly as large as the frame, or if the completed
        alpha of a crop is not finite. Then only the first pass counts.
        """
        config = self.model.second_pass
        box = crop_box((alpha > 0.5).numpy(force=True), frame.size, config.crop)

        def matte_crop(box: CropBox) -> tuple[CoarseAlpha, Tensor] | None:
            """Return the coarse and the completed alpha of a crop; None if it is too large, or its alpha not finite."""
            if box.area > config.max_area * frame.size[0] * frame.size[1]:
                return None
            crop = self.prepare_crop(frame, box)
            (coarse,) = self.coarse_alphas([crop], reference)
            present = coarse.alpha if coarse.alpha_if_present is None else coarse.alpha_if_present
            (completed,) = self._complete_objects([crop], [present])
            return (coarse, resize_alpha(completed, crop.size)) if completed.isfinite().all() else None

        if box is None or (found := matte_in_crops(box, frame.size, matte_crop, config.crop)) is None:
            return None
        coarse, in_crop, final_box = found
        return paste_crop(in_crop, final_box, frame.size, config.fade), coarse.presence_logit

    def _reference_tensors(self, reference: Reference, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a reference on its canvas: image, guidance and valid; see ``ReferenceImage`` in the contracts."""
        frame = self.prepare_frame(reference.rgb)
        coverage = frame.placement.fit_to_canvas(reference.guidance.astype(np.uint8) * 255)
        guidance = coverage > max(0, min(127, int(coverage.max()) - 1))  # an object of a few pixels must not vanish
        levels = guidance.astype(np.float32)
        if reference.unknown is not None:
            unknown = frame.placement.fit_to_canvas(reference.unknown.astype(np.uint8) * 255) > 0
            levels[unknown & ~guidance] = 0.5
        tensors = (
            self._image_batch([frame.canvas]),
            self._to_device(levels[None, None]),
            self._to_device(frame.placement.content_mask()[None]),
        )
        if not reference.attended_points:
            return tensors
        (height, width), (rows, columns) = frame.placement.content, frame.size
        points = [(x * width / columns, y * height / rows) for x, y in reference.attended_points]
        return self.model.extend_guidance(tensors, points, index)

    def _image_batch(self, canvases: Sequence[ImageU8]) -> Tensor:
        return self._to_device(np.stack(canvases)).permute(0, 3, 1, 2).float().div_(255.0)

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device.torch_device)


def check_learn_steps(steps: int, head: type[Head]) -> None:
    """Raise UsageError for a number that the option refuses, and for a head that cannot learn references."""
    if not is_number(steps, numbers.Integral) or not 0 <= steps <= MAX_LEARN_STEPS:
        raise UsageError(f"--learn-steps is {steps!r}; expected a whole number from 0 to {MAX_LEARN_STEPS}")
    if steps and not head.can_learn_references:
        raise UsageError(
            f"--learn-steps is {steps}, but the head of this model cannot learn references; omit --learn-steps, or "
            "choose a model with the token-match head, such as lite"
        )


def _coarse_alpha_from_batch(matte: Matte, index: int, frame: Frame) -> CoarseAlpha:
    """Return the coarse alpha of one frame of a batch; see :meth:`Predictor.coarse_alphas`."""
    height, width = frame.placement.content
    presence = matte.presence
    alphas = presence.alpha_if_present if presence is not None and frame.shows_object else matte.alpha
    alpha = alphas[index, 0, :height, :width].float().contiguous()
    signals = {"confidence": float(matte.confidence[index])}
    if frame.shows_object:
        everywhere = torch.ones_like(alpha[None]).bool()
        signals["confidence"] = float(confidence_and_found(alpha[None, None], everywhere)[0])
    if matte.similarity is not None:
        signals |= dict(zip(("similarity", "background_similarity"), matte.similarity[index].tolist(), strict=True))
    object_tokens = None if matte.object_tokens is None else matte.object_tokens[index]
    found = frame.shows_object or bool(matte.found[index])
    coarse = CoarseAlpha(alpha, found, signals, object_tokens=object_tokens)
    if presence is not None and not frame.shows_object:
        logit = float(presence.logit[index])
        coarse = replace(coarse, presence_logit=logit, signals={**signals, "presence": logit})
        if presence.is_uncertain[index]:
            coarse = replace(coarse, alpha_if_present=presence.alpha_if_present[index, 0, :height, :width])
    return _hide_garbage(coarse, frame)


def _follow_corrections(alpha: Float, frame: Frame) -> Float:
    """Return an alpha of the size of its frame after its garbage matte, its keep matte and its hints, in this order."""
    if frame.mattes is not None:
        alpha = frame.mattes.apply_to_alpha(alpha)
    return alpha if frame.hints is None else apply_hints_to_alpha(alpha, frame.hints)


def _hide_garbage(coarse: CoarseAlpha, frame: Frame) -> CoarseAlpha:
    """Return a coarse alpha set to 0 in the garbage area of its frame."""
    if frame.mattes is None or frame.mattes.garbage is None:
        return coarse
    hidden: Float = resize(frame.mattes.garbage, (coarse.alpha.shape[0], coarse.alpha.shape[1]))
    visible = 1.0 - torch.from_numpy(hidden).to(coarse.alpha.device)
    alpha, if_present = coarse.alpha * visible, coarse.alpha_if_present
    if_present = None if if_present is None else if_present * visible
    found = frame.shows_object or (coarse.found and bool((alpha > 0.5).any()))
    return replace(coarse, alpha=alpha, alpha_if_present=if_present, found=found)


def check_guidance(references: Sequence[Reference], head: type[Head]) -> None:
    """Raise UsageError for references made with ``--guidance paper``, if the head has no attention maps."""
    if any(reference.attended_points for reference in references) and not head.needs_attention_matrix:
        raise UsageError(
            "--guidance paper extends points by attention maps, which this model does not use; omit it, or choose a "
            "model with attention maps, such as icm-sd21"
        )
