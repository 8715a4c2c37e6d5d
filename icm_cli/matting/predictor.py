"""A loaded model that mattes arrays: the object behind ``icm_cli.load`` and the ``icm matte`` command."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from icm_cli.device import Device, is_device_lost, is_out_of_memory
from icm_cli.errors import ConfigError, DeviceError, UsageError
from icm_cli.geometry import Float, ImageU8, Placement, alpha_to_u8, resize
from icm_cli.guided_filter import alpha_at_source
from icm_cli.images.pixels import ImageWindows
from icm_cli.matting.crops import Place, area_of, looked, place_of, put
from icm_cli.matting.references import Reference, make_guidance
from icm_cli.model.contracts import Head, PreparedReferences
from icm_cli.model.core import InContextMatting
from icm_cli.model.decoding import confidence_and_found
from icm_cli.model.loading import load_model, override_edges, resolve_model, select_device
from icm_cli.options import LoadOptions, keyword_arguments

DOUBT_MARGIN = 0.25
"""Margin of a crop about what is in doubt, as a share of its longer side."""
DOUBT_LEAST_SIDE = 0.1
"""Least height and width of such a crop, as shares of the picture's."""
DOUBT_LOOKS = 3
"""Most such crops, each wider than the one before where that cuts the thing."""
DOUBT_LARGEST = 0.9
"""Largest area of such a crop, as a share of the picture's: a larger one shows no more than the picture."""


@dataclass(frozen=True)
class Frame:
    """A target made ready for the model: its pixels at the source's size and on the canvas."""

    rgb: ImageU8
    canvas: ImageU8
    placement: Placement


@dataclass(frozen=True)
class CanvasMatte:
    """Answer of the model for one frame: alpha float32 [H,W] 0..1 on the canvas, confidence 0..1, found.

    Where the model refines edges the alpha is at the source's size already, ``is_refined``.
    """

    alpha: Float
    confidence: float
    found: bool
    is_refined: bool = False
    carried: ImageU8 | None = None
    """Small alpha that the next frame of a shot goes on from, uint8 [h,w]."""
    presence: float = float("inf")
    """Logit of the thing's being in the picture, where the model says so."""
    if_there: Float | None = None
    """Alpha as if the thing were there, float32 [H,W] on the canvas, where that is in doubt."""

    def at_source(self, frame: Frame) -> Float:
        """The alpha float32 [H,W] 0..1 at the size of the frame's source. Touches no model: safe in threads."""
        return self.alpha if self.is_refined else alpha_at_source(self.alpha, frame.placement, frame.rgb)


class Predictor:
    """A model on its device. ``icm_cli.load`` makes one; ``reference`` shows it the thing, ``matte`` pulls it."""

    def __init__(self, model: InContextMatting, device: Device, *, is_in_training: bool = False) -> None:
        """``is_in_training``: the model is on its device and goes on learning, so its weights are left as they are."""
        self.device = device
        with _told(device, "the model was brought to it"):
            self.model = (
                model
                if is_in_training
                else model.to_device(device.torch_device, device.dtype, device.transformer_dtype)
            )

    def reference(
        self, pairs: Sequence[Reference | tuple[ImageU8, NDArray[Any]]], *, learn_steps: int = 0
    ) -> PreparedReferences:
        """Show the model the thing: pairs of a picture, sRGB uint8 [H,W,3], and its mask.

        A mask is bool, uint8 0..255 or float 0..1, [h,w], of its picture's shape. Returns what :meth:`matte`
        takes; its features are computed once, here. ``learn_steps``: steps in which a copy of the head learns the
        thing, for pictures of one shot or place. Raises UsageError for an unusable mask or a head that cannot learn.
        """
        check_learn_steps(learn_steps, type(self.model.head))
        doing = f"the references were learned in {learn_steps} steps" if learn_steps else "the references were shown"
        with _told(self.device, doing), torch.no_grad():
            tensors = [self._reference_tensors(_as_reference(pair)) for pair in pairs]
            return self.model.prepare_references(tensors, learn_steps=learn_steps)

    def prepare(self, rgb: ImageU8) -> Frame:
        """Bring a picture, sRGB uint8 [H,W,3] of any size, to the canvas. Touches no model: safe in threads."""
        placement = self.model.backbone.canvas.placement(*rgb.shape[:2])
        return Frame(rgb, placement.to_canvas(rgb), placement)

    def infer(self, frames: Sequence[Frame], reference: PreparedReferences) -> list[CanvasMatte]:
        """Run the model on frames of one canvas size."""
        coarse = self.coarse(frames, reference)
        return [self._decided(frame, matte, reference) for frame, matte in zip(frames, coarse, strict=True)]

    def coarse(self, frames: Sequence[Frame], reference: PreparedReferences) -> list[CanvasMatte]:
        """Run backbone and head on frames of one canvas size, and leave the edges to :meth:`with_edges`."""
        valid = self._on_device(np.stack([frame.placement.content_mask() for frame in frames]))
        matte = self.model.infer(self._images([frame.canvas for frame in frames]), valid, reference)
        alphas = matte.alpha[:, 0].float().cpu().numpy()
        told = zip(alphas, matte.confidence, matte.found, strict=True)
        found = [CanvasMatte(alpha, float(confidence), bool(is_there)) for alpha, confidence, is_there in told]
        if matte.presence is None:
            return found
        for index, logit in enumerate(matte.presence.logit.tolist()):
            if_there = (
                matte.presence.alpha_if_present[index, 0].cpu().numpy() if matte.presence.is_uncertain[index] else None
            )
            found[index] = replace(found[index], presence=logit, if_there=if_there)
        return found

    def with_edges(self, frame: Frame, matte: CanvasMatte) -> CanvasMatte:
        """Make the things of a coarse alpha whole and give them the edges of their frame, where the model does so."""
        edges = self.model.edges
        if edges is None or not np.isfinite(matte.alpha).all():  # the latter is told when it is to be written
            return matte
        return replace(matte, alpha=edges.refined(frame.rgb, self._whole(frame, matte.alpha)), is_refined=True)

    def _decided(self, frame: Frame, matte: CanvasMatte, reference: PreparedReferences) -> CanvasMatte:
        """A matte with its edges; where it is in doubt whether the thing is there, a look from near by has a vote."""
        edges = self.model.edges
        if edges is None or matte.if_there is None or not np.isfinite(matte.if_there).all():
            return self.with_edges(frame, matte)
        first = self._whole(frame, matte.if_there)
        second = self._from_near_by(frame, first, reference)
        if second is None:
            return self.with_edges(frame, matte)
        near, presence = second
        surer = near if presence > matte.presence and (near > 0.5).any() else first
        alpha = torch.from_numpy(surer) * torch.sigmoid(torch.tensor((matte.presence + presence) / 2))
        confidence, found = confidence_and_found(alpha[None, None], torch.ones_like(alpha, dtype=torch.bool)[None])
        refined = edges.refined(frame.rgb, alpha.numpy())
        return replace(matte, alpha=refined, confidence=float(confidence), found=bool(found), is_refined=True)

    def _from_near_by(self, frame: Frame, whole: Float, reference: PreparedReferences) -> tuple[Float, float] | None:
        """Ask a crop about a coarse alpha [h,w]. Returns its own coarse alpha as if the thing were there, float32 [H,W]
        of the frame and 0 beside the crop, and the logit of its presence; None where no crop shows more."""
        size = (frame.rgb.shape[0], frame.rgb.shape[1])
        place = place_of(whole > 0.5, size, margin=DOUBT_MARGIN, least_side=DOUBT_LEAST_SIDE)

        def look(place: Place) -> tuple[CanvasMatte, Float] | None:
            if area_of(place) > DOUBT_LARGEST * size[0] * size[1]:
                return None
            crop = self.prepare(np.ascontiguousarray(frame.rgb[place]))
            (near,) = self.coarse([crop], reference)
            part = self._whole(crop, near.alpha if near.if_there is None else near.if_there).astype(np.float32)
            return (near, resize(part, (crop.rgb.shape[0], crop.rgb.shape[1]))) if np.isfinite(part).all() else None

        if place is None or (seen := looked(place, size, look, DOUBT_LOOKS)) is None:
            return None
        near, part, place = seen
        return put(part, place, size), near.presence

    def _whole(self, frame: Frame, alpha: Float) -> Float:
        """The part of an alpha [H,W] on the canvas that is the frame's, [h,w], with its things made whole where the
        model has objects."""
        coarse = frame.placement.crop_to_content(alpha)
        return coarse if self.model.objects is None else self.model.objects.completed(frame.rgb, coarse)

    def matte(self, rgb: ImageU8, reference: PreparedReferences) -> ImageU8:
        """Alpha, uint8 [H,W], of a picture, sRGB uint8 [H,W,3], at exactly its size."""
        frame = self.prepare(rgb)
        return alpha_to_u8(self.infer([frame], reference)[0].at_source(frame))

    def _reference_tensors(self, reference: Reference) -> tuple[Tensor, Tensor, Tensor]:
        frame = self.prepare(reference.rgb)
        share = frame.placement.to_canvas(reference.guidance.astype(np.uint8) * 255)
        guidance = share > min(127, int(share.max()) - 1)  # a thing of a few pixels must not vanish on the canvas
        levels = guidance.astype(np.float32)
        if reference.unknown is not None:
            unknown = frame.placement.to_canvas(reference.unknown.astype(np.uint8) * 255) > 0
            levels[unknown & ~guidance] = 0.5
        return (
            self._images([frame.canvas]),
            self._on_device(levels[None, None]),
            self._on_device(frame.placement.content_mask()[None]),
        )

    def _images(self, canvases: Sequence[ImageU8]) -> Tensor:
        return self._on_device(np.stack(canvases)).permute(0, 3, 1, 2).float() / 255.0

    def _on_device(self, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).to(self.device.torch_device)


@contextlib.contextmanager
def _told(device: Device, doing: str) -> Iterator[None]:
    """Say in a sentence that memory ran out, or the device was lost. Raises ConfigError or DeviceError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):
            raise ConfigError(
                f"memory ran out on {device.description} while {doing}; end what else is on it, or take another "
                "--device, a --dtype of half the size or a smaller model"
            ) from error
        if is_device_lost(error):
            raise DeviceError(f"device {device.torch_device} was lost: {str(error).splitlines()[0]}") from error
        raise


def check_learn_steps(steps: int, head: type[Head]) -> None:
    """Raises UsageError for a number below 0, and for a head that cannot learn references."""
    if steps < 0:
        raise UsageError(f"--learn-steps is {steps}; expected 0 (do not learn) or more")
    if steps and not head.can_learn_references:
        raise UsageError(
            f"--learn-steps is {steps}, and the head of this model cannot learn the references; leave it out, or take "
            "a model with the token-match head, such as lite"
        )


@keyword_arguments(LoadOptions)
def load(options: LoadOptions) -> Predictor:
    """Load a model to matte arrays with; the arguments are options of ``icm matte``.

    >>> predictor = icm_cli.load()
    >>> cup = predictor.reference([(reference_rgb, mask)])
    >>> alpha = predictor.matte(rgb, cup)

    Raises ConfigError when the model, its weights or the device cannot be used, UsageError for an invalid argument.
    """
    choice = options.model
    config, checkpoint = resolve_model(choice.model, choice.checkpoint)
    config = override_edges(config, choice.edges, choice.edges_weights)
    device = select_device(config, choice.device, choice.dtype)
    model = load_model(config, checkpoint=checkpoint, weights=choice.weights, offline=choice.offline, seed=choice.seed)
    return Predictor(model, device)


def _as_reference(pair: Reference | tuple[ImageU8, NDArray[Any]]) -> Reference:
    if isinstance(pair, Reference):
        return pair
    rgb, mask = pair
    u8 = mask if mask.dtype == np.uint8 else alpha_to_u8(mask.astype(np.float32))
    return Reference(
        rgb, make_guidance(u8, ImageWindows.full((rgb.shape[0], rgb.shape[1])), "the mask", notice=lambda _: None)
    )
