"""The model of ``icm matte``, ``eval`` and ``train``: a backbone and a head, optionally with objects and edges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn

from icm_cli.config import GuidedFilterConfig, MatchConfig, SecondPassConfig
from icm_cli.errors import ConfigError
from icm_cli.model.contracts import (
    Backbone,
    Edges,
    Features,
    Head,
    LearnedReferences,
    Matte,
    Objects,
    PreparedReferences,
    ReferenceFeatures,
    ReferenceImage,
    ignore_progress,
)
from icm_cli.model.similarity import AttentionMatrix, attended_token_mask

ATTENDED_TOKENS = 32
"""Number of tokens that are added to the guidance for each point (m in the paper, which does not state it)."""
TARGET_NOISE_KEY = "target"
"""Noise key of all targets in inference.

Equal keys give equal noise, so that an alpha does not depend on the other images of a run.
"""


def reference_noise_key(index: int) -> str:
    """Return the noise key of the reference with this index, in inference."""
    return f"reference {index}"


@dataclass(frozen=True)
class Pairs:
    """A training batch: B targets with one reference each, all on canvases of one size."""

    image: Tensor
    """Targets, float32 sRGB [B,3,H,W] in 0..1."""
    valid: Tensor
    """bool [B,H,W], False in the padding of the targets."""
    reference_image: Tensor
    """References, float32 sRGB [B,3,H,W] in 0..1."""
    guidance: Tensor
    """Masks of the references, float32 [B,1,H,W], 0 or 1."""
    reference_valid: Tensor
    """bool [B,H,W], False in the padding of the references."""
    target_noise_keys: Sequence[str]
    """Noise key of each target."""
    reference_noise_keys: Sequence[str]
    """Noise key of each reference."""


@dataclass(frozen=True)
class PairFeatures:
    """Features of the targets and references of :class:`Pairs`."""

    target: Features
    reference: Features


class InContextMatting(nn.Module):
    """In-context matting: references with masks define the object that is matted in every target (paper, section 3).

    Without ``edges``, a guided filter brings alphas to the size of the source. Without ``objects``, no objects are
    completed. Raises ConfigError if backbone and head do not fit together.
    """

    def __init__(
        self,
        backbone: Backbone,
        head: Head,
        edges: Edges | None = None,
        objects: Objects | None = None,
        *,
        second_pass: SecondPassConfig | None = None,
        match: MatchConfig | None = None,
        guided_filter: GuidedFilterConfig | None = None,
    ) -> None:
        super().__init__()
        _check_compatibility(backbone, head)
        self.backbone = backbone
        self.head = head
        self.objects = objects
        self.edges = edges
        self.second_pass = second_pass or SecondPassConfig()
        self.match = match or MatchConfig()
        self.guided_filter = guided_filter or GuidedFilterConfig()
        if edges is not None:
            head.disable_edge_refinement()

    def to_device(self, device: torch.device, dtype: torch.dtype, transformer_dtype: torch.dtype | None = None) -> Self:
        """Move the model to a device for inference.

        Convolutions and BatchNorms of the head get ``dtype``; its other layers and all similarities stay in float32.
        The other components get ``dtype`` and ``transformer_dtype``, by default ``dtype``; see ``Component.set_dtype``.
        """
        self.eval()
        self.backbone.optimise_for_inference()
        self.to(device)
        self.backbone.set_dtype(dtype, transformer_dtype or dtype)
        for component in (self.objects, self.edges):
            if component is not None:
                component.optimise_for_inference()
                component.set_dtype(dtype, transformer_dtype or dtype)
        for module in self.head.modules():
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
                module.to(dtype)
        if device.type != "mps":
            self.use_channels_last()
        return self

    def use_channels_last(self) -> None:
        """Store the weights of convolutions in channels-last order.

        Attention uses this order too, so features need not be reordered between the layers.
        """
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)

    def prepare_references(
        self,
        references: Sequence[ReferenceImage],
        *,
        learn_steps: int = 0,
        on_progress: Callable[[float], None] = ignore_progress,
    ) -> PreparedReferences | LearnedReferences:
        """Extract the features of the references and prepare them for :meth:`infer`, once per run.

        With ``learn_steps`` above 0, a copy of the head is fine-tuned on the references in this number of steps. The
        head must have ``can_learn_references``; ``on_progress`` is called with the finished fraction. Raises
        ConfigError.
        """
        extracted = []
        for index, (image, guidance, valid) in enumerate(references):
            features = self.backbone.reference_features(image, valid, [reference_noise_key(index)])
            if not bool(features.correspondence_features.isfinite().all()):
                raise ConfigError(
                    "the backbone computed features of a reference that are not finite: its weights are damaged, or "
                    "the range of the dtype is too small; use --dtype float32, or get the weights again"
                )
            extracted.append(ReferenceFeatures(features, guidance, valid))
        prepared: PreparedReferences | LearnedReferences
        if learn_steps:
            prepared = self.head.learn_references(self.backbone, references, learn_steps, on_progress)
        else:
            prepared = self.head.prepare_references(extracted)
        if not hasattr(prepared, "notices"):
            raise ConfigError(
                f"head {type(self.head).__name__} prepares references without an attribute 'notices'; expected "
                "PreparedReferences of icm_cli/model/contracts.py; add 'notices', an empty list if there are none"
            )
        return prepared

    def extend_guidance(
        self, reference: ReferenceImage, points: Sequence[tuple[float, float]], index: int
    ) -> ReferenceImage:
        """Extend the guidance of points and strokes by the self-attention of the reference (paper, section 3.6).

        ``points``: x and y on the canvas, in px. ``index``: position of the reference in the run. The backbone must
        have an attention matrix.
        """
        image, guidance, valid = reference
        features = self.backbone.target_features(image, valid, [reference_noise_key(index)])
        stride = min(features.intra_similarity)  # the finest grid
        attention = features.intra_similarity[stride]
        assert isinstance(attention, AttentionMatrix)
        columns = attention.grid[1]
        tokens_of_points = [int(y // stride) * columns + int(x // stride) for x, y in points]
        mask = attended_token_mask(attention.matrix[0], tokens_of_points, ATTENDED_TOKENS)
        selected = mask.view(1, 1, *attention.grid)
        area = selected.repeat_interleave(stride, 2).repeat_interleave(stride, 3) & valid[:, None]
        return image, guidance.masked_fill(area, 1.0), valid

    def forward(self, pairs: Pairs, features: PairFeatures | None = None) -> Matte:
        """Matte each target with its reference; gradients are kept. Without ``features``, they are extracted."""
        features = features or self.extract_features(pairs)
        references = self.prepare_pair_references(pairs, features)
        return self.head(features.target, references, pairs.image, pairs.valid)

    def extract_features(self, pairs: Pairs) -> PairFeatures:
        """Run the backbone on targets and references."""
        return PairFeatures(
            self.backbone.target_features(pairs.image, pairs.valid, pairs.target_noise_keys),
            self.backbone.reference_features(pairs.reference_image, pairs.reference_valid, pairs.reference_noise_keys),
        )

    def prepare_pair_references(self, pairs: Pairs, features: PairFeatures) -> list[PreparedReferences]:
        """Prepare the reference of each pair for the head."""
        prepared = []
        for index, (guidance, valid) in enumerate(zip(pairs.guidance, pairs.reference_valid, strict=True)):
            reference = features.reference.select_correspondence(index)
            prepared.append(self.head.prepare_references([ReferenceFeatures(reference, guidance[None], valid[None])]))
        return prepared

    @torch.inference_mode()
    def infer(self, image: Tensor, valid: Tensor, reference: PreparedReferences | LearnedReferences) -> Matte:
        """Compute the coarse mattes of a batch of targets, whose canvases have the same size.

        ``image``: sRGB float32 [B,3,H,W] in 0..1. ``valid``: bool [B,H,W], False in the padding. ``reference``: result
        of :meth:`prepare_references`. The alpha of a target whose features are not finite is NaN.
        """
        count = len(image)
        features = self.backbone.target_features(image, valid, [TARGET_NOISE_KEY] * count)
        head, prepared = self.head, reference
        if isinstance(reference, LearnedReferences):
            head, prepared = reference.head, reference.prepared
        matte: Matte = head(features, [prepared] * count, image, valid)
        is_finite = features.correspondence_features.isfinite().flatten(1).all(dim=1)
        if bool(is_finite.all()):
            return matte
        return replace(matte, alpha=matte.alpha.masked_fill(~is_finite[:, None, None, None], float("nan")))


def _check_compatibility(backbone: Backbone, head: Head) -> None:
    """Raise ConfigError if the head cannot use the features of the backbone."""
    if head.needs_attention_matrix and not backbone.has_attention_matrix:
        raise ConfigError(
            f"head {type(head).__name__} needs an attention matrix, which backbone {type(backbone).__name__} does not "
            "provide; use the stable-diffusion backbone or the training-free head"
        )
    if head.canvas_px not in (None, backbone.canvas.long_side_px):
        raise ConfigError(
            f"head canvas_px is {head.canvas_px}, but the canvas of the backbone is "
            f"{backbone.canvas.long_side_px} px; set both to the same value, because the head has "
            "weights for positions on the canvas"
        )
