"""Make masks of references from points, boxes and strokes, with the object model and the edges of ``lite``."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from icm_cli.device import Device, device_errors
from icm_cli.geometry import ImageU8
from icm_cli.guidance.hints import Hints
from icm_cli.matting.hinting import apply_hints_to_alpha, clip_to_boxes, make_prompts
from icm_cli.model.contracts import Edges, Objects
from icm_cli.model.loading import load_objects_and_edges


class MaskMaker:
    """Makes masks of the objects that a person marks. It loads a part of ``lite`` at its first use.

    Its dtypes do not depend on the model that mattes, so that every model gets the same mask.
    """

    def __init__(self, select_device: Callable[[], Device]) -> None:
        """``select_device`` is called at the first use."""
        self._select_device = select_device

    @functools.cached_property
    def _device(self) -> Device:
        return self._select_device()

    @functools.cached_property
    def _parts(self) -> tuple[Objects, Edges]:
        with device_errors(self._device, "the model that makes masks was loaded"):
            return load_objects_and_edges(self._device)

    @property
    def objects(self) -> Objects:
        """The object model of ``lite``."""
        return self._parts[0]

    def make_mask(self, rgb: ImageU8, hints: Hints) -> NDArray[np.bool_]:
        """Return the mask, bool [H,W], of the object that hints mark in an image, sRGB uint8 [H,W,3].

        It contains all points and areas on the object, and none of those off it. Raises ConfigError if memory runs out.
        """
        objects, edges = self._parts
        with device_errors(self._device, "the mask of a reference was made"), torch.inference_mode():
            (coarse,) = objects.complete_embedded_alphas(objects.embed_images([rgb]), [None], [make_prompts(hints)])
            (alpha,) = edges.refine_alphas([rgb], [clip_to_boxes(coarse, hints)])
        mask: NDArray[np.bool_] = apply_hints_to_alpha(alpha.numpy(force=True), hints) > 0.5
        return mask
