"""The core model of matte, eval and train: a backbone joined with a head, and perhaps with what makes things whole
and what refines edges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from icm_cli.errors import ConfigError
from icm_cli.geometry import CanvasRule
from icm_cli.model.contracts import (
    Backbone,
    Edges,
    Features,
    Head,
    Matte,
    Objects,
    PreparedReferences,
    ReferenceFeatures,
)
from icm_cli.model.lite.finetuning import Learned, learned
from icm_cli.model.lite.head import TokenMatchHead

TARGET_NOISE = "target"
"""Name of the noise of every target that is matted: an alpha must not depend on its neighbours."""


def reference_noise(index: int) -> str:
    """Name of the noise of reference number ``index`` of a run."""
    return f"reference {index}"


@dataclass(frozen=True)
class Pairs:
    """Targets with a reference each, what training shows the model; all on canvases of one size.

    image, reference_image [B,3,H,W] sRGB 0..1; valid, reference_valid [B,H,W] bool; guidance [B,1,H,W] float32 in
    {0,1}; target_noise, reference_noise: names of each image's noise.
    """

    image: Tensor
    valid: Tensor
    reference_image: Tensor
    guidance: Tensor
    reference_valid: Tensor
    target_noise: Sequence[str]
    reference_noise: Sequence[str]


@dataclass(frozen=True)
class PairFeatures:
    """Features of both sides of :class:`Pairs`."""

    target: Features
    reference: Features


@runtime_checkable
class FixedCanvas(Protocol):
    """A head whose weights are absolute positions on one canvas."""

    canvas: CanvasRule


class InContextMatting(nn.Module):
    """One reference with its guidance shows the thing; every target gives up its alpha (paper section 3)."""

    def __init__(
        self, backbone: Backbone, head: Head, edges: Edges | None = None, objects: Objects | None = None
    ) -> None:
        super().__init__()
        _check_compatibility(backbone, head)
        self.backbone = backbone
        self.head = head
        self.objects = objects
        self.edges = edges
        if edges is not None:
            head.disable_edge_refinement()

    def to_device(self, device: torch.device, dtype: torch.dtype, transformer_dtype: torch.dtype | None = None) -> Self:
        """Move to ``device`` for inference; convolutions and projections in ``dtype``, a backbone's transformer in
        ``transformer_dtype`` (the same without it).

        The head's own LayerNorms stay float32, as do the similarities between them, which both cast for themselves.
        """
        self.eval()
        self.backbone.optimise_for_inference()
        self.to(device)
        self.backbone.set_dtype(dtype, transformer_dtype or dtype)
        for part in (self.objects, self.edges):
            if part is not None:
                part.optimise_for_inference()
                part.set_dtype(dtype, transformer_dtype or dtype)
        for module in self.head.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.to(dtype)
        if device.type != "mps":
            self.use_channels_last()
        return self

    def use_channels_last(self) -> None:
        """Weights of convolutions with their channels innermost: no reordering beside attention, which wants tokens."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)

    def prepare_references(
        self, references: Sequence[tuple[Tensor, Tensor, Tensor]], *, learn_steps: int = 0
    ) -> PreparedReferences:
        """Features of the references, once per run; with ``learn_steps`` a copy of the head learns them.

        ``references``: (image [1,3,H,W] sRGB 0..1, guidance [1,1,H,W] in {0,1}, valid [1,H,W] bool), each on a
        canvas of its own. Returns what the head makes of them, for :meth:`infer`.
        """
        seen = [
            ReferenceFeatures(self.backbone.reference_features(image, valid, [reference_noise(index)]), guidance, valid)
            for index, (image, guidance, valid) in enumerate(references)
        ]
        if not all(bool(each.features.correspondence.isfinite().all()) for each in seen):
            raise ConfigError(
                "the backbone gave numbers that are not finite for a reference: its weights are damaged, or the dtype "
                "is too narrow for them; run with --dtype float32, or get the weights again"
            )
        if learn_steps:
            assert isinstance(self.head, TokenMatchHead)  # see Head.can_learn_references
            return learned(self.backbone, self.head, references, learn_steps)
        return self.head.prepare_references(seen)

    def forward(self, pairs: Pairs, features: PairFeatures | None = None) -> Matte:
        """Matte targets by a reference each, with gradients; ``features`` where they are there already."""
        features = features or self.extract_features(pairs)
        matte: Matte = self.head(features.target, self.prepare_pairs(pairs, features), pairs.image, pairs.valid)
        return matte

    def extract_features(self, pairs: Pairs) -> PairFeatures:
        """Run the backbone on targets and references."""
        return PairFeatures(
            self.backbone.target_features(pairs.image, pairs.valid, pairs.target_noise),
            self.backbone.reference_features(pairs.reference_image, pairs.reference_valid, pairs.reference_noise),
        )

    def prepare_pairs(self, pairs: Pairs, features: PairFeatures) -> list[PreparedReferences]:
        """Prepare each pair's reference for the head."""
        return [
            self.head.prepare_references(
                [
                    ReferenceFeatures(
                        features.reference.correspondence_only(i),
                        pairs.guidance[i : i + 1],
                        pairs.reference_valid[i : i + 1],
                    )
                ]
            )
            for i in range(len(pairs.image))
        ]

    @torch.inference_mode()
    def infer(self, image: Tensor, valid: Tensor, reference: PreparedReferences) -> Matte:
        """image [B,3,H,W] sRGB 0..1 and valid [B,H,W] on one canvas -> :class:`Matte` on that canvas.

        ``reference`` is what :meth:`reference` gave: the same for every image. The alpha of an image whose features
        are not finite is NaN.
        """
        count = len(image)
        features = self.backbone.target_features(image, valid, [TARGET_NOISE] * count)
        head = self.head
        if isinstance(reference, Learned):
            head, reference = reference.head, reference.prepared
        matte: Matte = head(features, [reference] * count, image, valid)
        is_finite = features.correspondence.isfinite().flatten(1).all(dim=1)
        if bool(is_finite.all()):
            return matte
        return replace(matte, alpha=matte.alpha.masked_fill(~is_finite[:, None, None, None], float("nan")))


def _check_compatibility(backbone: Backbone, head: Head) -> None:
    if head.needs_attention_matrix and not backbone.has_attention_matrix:
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
