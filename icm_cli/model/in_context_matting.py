"""The core model of matte, eval and train: a backbone joined with a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from icm_cli.errors import ConfigError
from icm_cli.model.contracts import Backbone, Head, Matte, ReferenceFeatures


class InContextMatting(nn.Module):
    """One reference with its guidance shows the thing; every target gives up its alpha (paper section 3)."""

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        if head.needs_matrix and not backbone.gives_matrix:
            raise ConfigError(
                f"head {type(head).__name__} needs the intra-similarity's matrix, and backbone "
                f"{type(backbone).__name__} has none; join it with the stable-diffusion backbone or take the "
                "training-free head"
            )
        self.backbone = backbone
        self.head = head

    def reference(self, references: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Any:
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

    def forward(self, image: Tensor, valid: Tensor, reference: Any) -> Matte:
        """image [B,3,H,W] sRGB 0..1 and valid [B,H,W] on one canvas -> :class:`Matte` on that canvas."""
        matte: Matte = self.head(self.backbone.target(image, valid), reference, image, valid)
        return matte

    @torch.inference_mode()
    def infer(self, image: Tensor, valid: Tensor, reference: Any) -> Matte:
        """:meth:`forward` without gradients."""
        return self(image, valid, reference)
