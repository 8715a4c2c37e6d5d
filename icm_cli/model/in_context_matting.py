"""The core model of matte, eval and train: a backbone joined with a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from icm_cli.errors import ConfigError
from icm_cli.geometry import CanvasRule
from icm_cli.model.contracts import Backbone, Head, Matte, Prepared, ReferenceFeatures


@runtime_checkable
class FixedCanvas(Protocol):
    """A head whose weights are absolute positions on one canvas."""

    canvas: CanvasRule


class InContextMatting(nn.Module):
    """One reference with its guidance shows the thing; every target gives up its alpha (paper section 3)."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        _check_join(backbone, head)
        self.backbone = backbone
        self.head = head

    def place(self, device: torch.device, dtype: torch.dtype) -> Self:
        """Move to ``device`` for inference; convolutions and projections in ``dtype``.

        The head's own LayerNorms stay float32, as do the similarities between them, which both cast for themselves.
        """
        self.eval()
        self.backbone.optimise_for_inference()
        self.to(device)
        self.backbone.to(dtype)
        for module in self.head.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.to(dtype)
        if device.type != "mps":
            self._convolve_channels_last()
        return self

    def _convolve_channels_last(self) -> None:
        """Weights of convolutions with their channels innermost: no reordering beside attention, which wants tokens."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)

    def reference(self, references: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Prepared:
        """Features of the references, once per run.

        ``references``: (image [1,3,H,W] sRGB 0..1, guidance [1,1,H,W] in {0,1}, valid [1,H,W] bool), each on a
        canvas of its own. Returns what the head makes of them, for :meth:`forward`.
        """
        return self.head.prepare(
            [
                ReferenceFeatures(self.backbone.reference(image, valid, index), guidance, valid)
                for index, (image, guidance, valid) in enumerate(references)
            ]
        )

    def forward(self, image: Tensor, valid: Tensor, reference: Prepared) -> Matte:
        """image [B,3,H,W] sRGB 0..1 and valid [B,H,W] on one canvas -> :class:`Matte` on that canvas."""
        matte: Matte = self.head(self.backbone.target(image, valid), reference, image, valid)
        return matte

    @torch.inference_mode()
    def infer(self, image: Tensor, valid: Tensor, reference: Prepared) -> Matte:
        """:meth:`forward` without gradients."""
        matte: Matte = self(image, valid, reference)
        return matte


def _check_join(backbone: Backbone, head: Head) -> None:
    if head.needs_matrix and not backbone.gives_matrix:
        raise ConfigError(
            f"head {type(head).__name__} needs the intra-similarity's matrix, and backbone "
            f"{type(backbone).__name__} has none; join it with the stable-diffusion backbone or take the "
            "training-free head"
        )
    if isinstance(head, FixedCanvas) and head.canvas.long_side_px != backbone.canvas.long_side_px:
        raise ConfigError(
            f"head canvas_px is {head.canvas.long_side_px} and the backbone's canvas has "
            f"{backbone.canvas.long_side_px} px; expected the same, as the head's weights are positions on it"
        )
