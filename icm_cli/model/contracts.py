"""Interfaces of the model's components and the data that they exchange. CONTRIBUTING.md shows how to add a component.

Letters as in the paper (Guo et al., "In-Context Matting", CVPR 2024): B batch, C channels, (h, w) feature grid, N = h*w
its tokens in row-major order, R references, K reference tokens inside the guidance.

- An *image* is float32 sRGB [B,3,H,W] in 0..1 on the backbone's canvas.
- *valid* is bool [B,H,W], True at the pixels of the frame and False in the padding. The padding is right of and below
  the frame and replicates its edge.
- Backbones normalise images, and heads normalise features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self, TypeAlias, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.errors import ConfigError, UsageError
from icm_cli.files.digests import cached_file_digest, combined_digest
from icm_cli.geometry import CanvasRule, ImageU8
from icm_cli.model.alphas import resize_alpha

IMAGENET_MEAN = (0.485, 0.456, 0.406)
"""Mean of red, green and blue in ImageNet, on the scale 0..1. Many backbones normalise images by it."""
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Standard deviation of red, green and blue in ImageNet."""
MAX_ENLARGEMENT = 2.0
"""Largest factor by which backbones enlarge a small image to the canvas."""
ReferenceImage: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""A reference on a canvas of its own: image [1,3,H,W], guidance [1,1,H,W], valid [1,H,W].

The guidance is 1 inside the object, 0 outside, and 0.5 where that is unknown. In a negative reference, it is 0 in the
area that is an example of what is not the object, and 0.5 elsewhere.
"""


@runtime_checkable
class IntraSimilarity(Protocol):
    """Similarity between the tokens of each target, as a matrix A [B,N,N] (paper, section 3.3).

    Each row is a softmax over the valid tokens: it sums to 1, and is 0 in the padding. A need not exist in memory.
    """

    grid: tuple[int, int]
    """Grid (h, w) of the tokens; N = h*w."""

    def propagate(self, values: Tensor) -> Tensor:
        """Propagate ``values`` [B,N,c] to similar tokens: A @ values, float32 [B,N,c]."""
        ...


@dataclass(frozen=True)
class Features:
    """Features that a backbone extracts from a batch of images."""

    correspondence_features: Tensor
    """Features that are compared between reference and target, float32 [B,C,h,w], not normalised."""
    valid: Tensor
    """True for tokens whose cell contains at least one pixel of the frame, bool [B,h,w]."""
    scale_features: Mapping[int, Tensor]
    """Features for decoders: stride in canvas pixels -> [B,C_s,H/s,W/s], in the backbone's dtype. Empty for references.
    """
    intra_similarity: Mapping[int, IntraSimilarity]
    """Stride -> similarity between the tokens of the grid of that stride. Empty for references."""
    grouping_features: Tensor | None = None
    """Features that distinguish the tokens of one image, float32 [B,C,h,w]; None: the correspondence features."""

    def select_correspondence(self, index: int) -> Features:
        """Return the correspondence features of one image as a batch of one."""
        image = slice(index, index + 1)
        return Features(self.correspondence_features[image], self.valid[image], {}, {})


@dataclass(frozen=True)
class ReferenceFeatures:
    """One reference as a head receives it."""

    features: Features
    """A batch of one."""
    guidance: Tensor
    """Mask of the object, float32 [1,1,H,W]: 1 inside, 0 outside, 0.5 unknown."""
    valid: Tensor
    """bool [1,H,W]."""


@dataclass(frozen=True)
class Matte:
    """Result of a head for a batch of B targets."""

    alpha: Tensor
    """Coarse alpha on the canvas, float32 [B,1,H,W] in 0..1; undefined in the padding."""
    confidence: Tensor
    """Confidence of the head in its foreground, float32 [B] in 0..1."""
    found: Tensor
    """Whether the target object appears to be in the image, bool [B]."""
    presence: Presence | None = None
    """Prediction whether the object is in the image; None if the head does not predict it."""
    similarity: Tensor | None = None
    """Similarity of the object to the references, float32 [B,2] in -1..1; None if the head does not compute it.

    The values are the means, over the tokens of the object, of the similarity to the tokens inside and outside the
    guidance. The object is assumed to be present.
    """
    object_tokens: Sequence[ObjectTokens] | None = None
    """Tokens of each target, by which its objects can be compared; None without ``can_compare_objects``."""


@dataclass(frozen=True)
class ObjectTokens:
    """Tokens of one target, and the mean tokens of the references, with which its objects are compared.

    The similarity of two objects is the cosine of their mean tokens, averaged over the layers of the features: -1..1.
    """

    tokens: Tensor
    """float32 [layers,C,h,w]: one token per cell of the canvas."""
    references: Sequence[Tensor]
    """Mean tokens of the references, each float32 [layers,C]."""
    negatives: Sequence[Tensor]
    """Mean tokens of the negative references, if any."""
    cell_px: int
    """Side of a cell, in px of the canvas."""

    def compare_object(self, alpha: Tensor, content: tuple[int, int]) -> tuple[float, float]:
        """Return the largest similarity of an object to a reference, and to a negative reference (-1 without one).

        ``alpha``: of this object only, float32 [h',w'] in 0..1; it covers exactly the frame, whose height and width on
        the canvas, in px, are ``content``.
        """
        canvas = [side * self.cell_px for side in self.tokens.shape[-2:]]
        on_canvas = F.pad(resize_alpha(alpha, content), (0, canvas[1] - content[1], 0, canvas[0] - content[0]))
        weight = F.avg_pool2d(on_canvas[None], self.cell_px)[0]
        mean = (self.tokens * weight).sum(dim=(2, 3))
        to_references, to_negatives = (
            [float(F.cosine_similarity(mean, other, dim=-1).mean()) for other in others]
            for others in (self.references, self.negatives)
        )
        return max(to_references), max(to_negatives, default=-1.0)


@dataclass(frozen=True)
class Presence:
    """Prediction whether the target object is in the image at all, for a batch of B targets."""

    logit: Tensor
    """Logit of the probability of presence, float32 [B]. ``Matte.alpha`` is already multiplied by this probability."""
    alpha_if_present: Tensor
    """``Matte.alpha`` without this factor, float32 [B,1,H,W] in 0..1."""
    is_uncertain: Tensor
    """Whether a second pass over a crop should decide, bool [B]."""


class PreparedReferences(Protocol):
    """References as a head prepares them, for the ``forward`` of the same head."""

    @property
    def notices(self) -> Sequence[str]:
        """Notices for the user about unsuitable references."""
        ...


def ignore_progress(fraction: float) -> None:
    """Ignore the progress of fine-tuning: the default of ``on_progress``."""


@dataclass(frozen=True)
class LearnedReferences:
    """A copy of the head that was fine-tuned on the references, and the references for this copy."""

    head: Head
    prepared: Any
    """The references, as this copy prepared them."""

    @property
    def notices(self) -> Sequence[str]:
        return self.prepared.notices


class Component(nn.Module, ABC):
    """A part of a model: built from settings, and from weights if it has any."""

    Config: ClassVar[type[Any]]
    """Frozen dataclass of the settings."""

    @classmethod
    def weight_files(cls, config: Any, weights: str | None = None, *, offline: bool) -> list[Path]:  # noqa: ARG003
        """Return the files of the pretrained weights that ``load`` reads; an empty list if there are none.

        ``config``: the settings. ``weights``: local folder or hub id, instead of that in the settings. With
        ``offline``, the network is not accessed. Raises ConfigError if weights are not available; its message says what
        to fetch and where to put it.
        """
        if weights is not None:
            raise ConfigError(f"--weights {weights!r} has no effect: {cls.__name__} has no pretrained weights; omit it")
        return []

    @classmethod
    def weights_digest(cls, config: Any, weights: str | None = None, *, offline: bool) -> str:
        """Return a hash of the content of :meth:`weight_files`; empty if there are none."""
        files = cls.weight_files(config, weights, offline=offline)
        return combined_digest(*map(cached_file_digest, files)) if files else ""

    def optimise_for_inference(self) -> None:
        """Rearrange the weights for speed, once, before inference.

        After that, the component can no longer be trained or saved.
        """

    def set_dtype(self, dtype: torch.dtype, fast_dtype: torch.dtype) -> None:
        """Convert the weights for inference to ``dtype``.

        Parts that stay accurate in it, such as transformers, are converted to ``fast_dtype``; see ``Device``.
        """
        del fast_dtype
        self.to(dtype)


class Backbone(Component):
    """Extracts :class:`Features` from images on the canvas."""

    has_attention_matrix: ClassVar[bool] = False
    """Whether ``Features.intra_similarity`` holds matrices, see :class:`~icm_cli.model.similarity.AttentionMatrix`."""
    is_self_contained: ClassVar[bool] = False
    """Whether it can be built from a checkpoint that contains its weights, without any other file."""
    is_trainable: ClassVar[bool] = False
    """Whether training may change its weights. A backbone that is not trainable runs without gradients."""
    has_transformer: ClassVar[bool] = False
    """Whether it contains a transformer with a dtype of its own, see :meth:`set_dtype`."""

    @classmethod
    def preferred_transformer_dtype(cls, config: Any) -> str:  # noqa: ARG003
        """Return the name of the transformer's default dtype, or "auto" for the default of the device."""
        return "auto"

    @classmethod
    @abstractmethod
    def load(cls, config: Any, weights: str | None, *, offline: bool, seed: int) -> Self:
        """Build the backbone with its pretrained weights, on the CPU in float32.

        ``seed``: seed of the noise, for backbones that draw noise. Other arguments: see :meth:`weight_files`.
        """

    @property
    @abstractmethod
    def canvas(self) -> CanvasRule:
        """Rule for the sizes of the canvas."""

    @abstractmethod
    def reference_features(self, image: Tensor, valid: Tensor, noise_keys: Sequence[str]) -> Features:
        """Extract the correspondence features of a batch of references: image float32 [B,3,H,W], valid bool [B,H,W].

        Equal ``noise_keys`` give equal noise, in backbones that draw noise.
        """

    @abstractmethod
    def target_features(self, image: Tensor, valid: Tensor, noise_keys: Sequence[str]) -> Features:
        """Extract all features of targets, each independently of the others; see :meth:`reference_features`."""


class Head(Component):
    """Computes a coarse alpha from the features of a target and the prepared references."""

    needs_attention_matrix: ClassVar[bool] = False
    """Whether it needs a backbone with ``has_attention_matrix``."""
    is_trained: ClassVar[bool] = False
    """Whether it has weights that must come from a checkpoint."""
    canvas_px: int | None = None
    """Long side of the only canvas for which its weights are trained, in px; None if it works on any canvas."""
    can_learn_references: ClassVar[bool] = False
    """Whether :meth:`learn_references` is implemented."""
    can_compare_objects: ClassVar[bool] = False
    """Whether its results have ``Matte.object_tokens``."""

    def disable_edge_refinement(self) -> None:
        """Compute only coarse alphas from now on, because a later component refines their edges."""

    @abstractmethod
    def prepare_references(self, references: Sequence[ReferenceFeatures]) -> PreparedReferences:
        """Reduce the references to what :meth:`forward` needs. Called once per run."""

    def learn_references(
        self,
        backbone: Backbone,
        references: Sequence[ReferenceImage],
        steps: int,
        on_progress: Callable[[float], None] = ignore_progress,
    ) -> LearnedReferences:
        """Fine-tune a copy of this head on the references, for heads with ``can_learn_references``.

        ``backbone``, of the same model, is not changed. ``steps``: training steps, 1 or more. ``on_progress`` is called
        with the finished fraction of the work.
        """
        raise NotImplementedError

    @abstractmethod
    def forward(self, target: Features, references: Sequence[Any], image: Tensor, valid: Tensor) -> Matte:
        """Matte a batch of targets.

        ``target``: their features. ``references``: the result of :meth:`prepare_references` for each of them.
        ``image``: float32 [B,3,H,W]. ``valid``: bool [B,H,W].
        """


class TrainedHead(Head, ABC):
    """A head with weights, which come from a checkpoint or from ``icm train``."""

    is_trained = True

    @abstractmethod
    def similarity_maps(self, target: Features, references: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Return inter- and intra-similarity as images to show during training, float32 [B,1,h,w] of any range."""


@dataclass(frozen=True)
class EmbeddedImage:
    """Embedding of one image by :class:`Objects`. It can be kept and used for several coarse alphas."""

    embedding: Tensor
    """Input of the mask decoder, [1,C,h,w]."""
    mask_size: tuple[int, int]
    """Height and width of the completed alpha, which covers exactly the image."""


@dataclass(frozen=True)
class PointPrompts:
    """Points and boxes that say which object of an image is meant."""

    coordinates: Tensor
    """x and y as fractions of the frame's width and height, float32 [N,2] in 0..1.

    The centre of the first pixel of a row of ``w`` pixels is at 0.5 / w.
    """
    labels: Tensor
    """int64 [N]: 0: point off the object; 1: point on it; 2 and 3: top left and bottom right corner of a box."""


class Objects(Component):
    """The object model: completes the objects of coarse alphas before their edges are refined.

    It does not use the references. ``icm train`` trains it; a checkpoint contains all of its weights.
    """

    @classmethod
    @abstractmethod
    def load(cls, config: Any) -> Self:
        """Build it with its pretrained weights, on the CPU in float32. Raises ConfigError if they are not available."""

    @abstractmethod
    def embedding(self, image: Tensor) -> Tensor:
        """Embed images float32 [B,3,H,W] in 0..1 for :meth:`forward`: [B,C,h,w]."""

    @abstractmethod
    def forward(self, embedding: Tensor, coarse: Tensor) -> Tensor:
        """Return the logits of completed alphas, float32 [B,1,nh,nw].

        ``embedding``: [B,C,h,w]. ``coarse``: coarse alphas, float32 [B,1,h',w'] in 0..1.
        """

    @abstractmethod
    def decode_prompts(
        self, embedding: Tensor, alpha: Tensor | None, coordinates: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Correct alphas by points and boxes, or select objects by them if ``alpha`` is None.

        ``alpha``, float32 [B,1,h',w'] in 0..1, is the result of :meth:`forward`. ``coordinates`` [B,N,2] and ``labels``
        [B,N] are those of :class:`PointPrompts`, but the coordinates are fractions of the embedded canvas. Returns the
        logits, float32 [B,1,nh,nw], and the predicted IoU of the result with the object, float32 [B].
        """

    @abstractmethod
    def has_object(self, coarse: Tensor) -> bool:
        """Return whether a coarse alpha [h,w] shows anything that could be completed."""

    @abstractmethod
    def embed_images(self, images: Sequence[ImageU8]) -> list[EmbeddedImage]:
        """Embed images of any sizes, sRGB uint8 [H,W,3]; images of equal size in one batch."""

    @abstractmethod
    def complete_embedded_alphas(
        self,
        images: Sequence[EmbeddedImage],
        coarse: Sequence[Tensor | None],
        prompts: Sequence[PointPrompts | None] | None = None,
        *,
        are_completed: bool = False,
    ) -> list[Tensor]:
        """Return alphas of complete objects from coarse alphas, prompts or both.

        ``coarse`` has one alpha for each image: float32 [h,w] in 0..1 of any size, whose borders are those of the
        image. Each result is float32 in 0..1 with the ``mask_size`` of its image.

        ``prompts`` are the points and boxes of each image; their order does not matter. If an image has prompts, its
        coarse alpha may be None or empty; then only the prompts select the object. ``are_completed``: whether the
        coarse alphas are already results of this method, so that only the prompts are applied.
        """

    @torch.inference_mode()
    def complete_alphas(self, images: Sequence[ImageU8 | EmbeddedImage], coarse: Sequence[Tensor]) -> list[Tensor]:
        """Complete coarse alphas as :meth:`complete_embedded_alphas` does; those without an object stay as they are.

        An image may be embedded already. Otherwise it is sRGB uint8 [H,W,3] and is embedded first.
        """
        indices = [index for index, alpha in enumerate(coarse) if self.has_object(alpha)]
        selected = [images[index] for index in indices]
        new_embeddings = iter(self.embed_images([image for image in selected if not isinstance(image, EmbeddedImage)]))
        embedded = [image if isinstance(image, EmbeddedImage) else next(new_embeddings) for image in selected]
        alphas = self.complete_embedded_alphas(embedded, [coarse[index] for index in indices])
        completed = dict(zip(indices, alphas, strict=True))
        return [completed.get(index, alpha) for index, alpha in enumerate(coarse)]


class Edges(Component):
    """Refines the edges of coarse alphas at the size of their sources. It does not use the references."""

    is_trained: ClassVar[bool] = False
    """Whether it has weights that ``icm train`` trains and a checkpoint contains."""

    @classmethod
    def settings_with_weights(cls, config: Any, weights: str) -> Any:  # noqa: ARG003
        """Return settings that take the pretrained weights from ``weights``, a folder or hub id. Raises UsageError."""
        raise UsageError(
            f"the edges have no pretrained weights, so --edges-weights {weights!r} has "
            "no effect; omit it, or give --edges vitmatte"
        )

    @classmethod
    def load(cls, config: Any, *, offline: bool) -> Self:  # noqa: ARG003
        """Build it, on the CPU in float32, with its pretrained weights if it has any. Raises ConfigError."""
        return cls(config)

    @abstractmethod
    def refine_alphas(self, images: Sequence[ImageU8], coarse: Sequence[Tensor]) -> list[Tensor]:
        """Refine the edges of a batch of coarse alphas.

        Each is float32 [h,w] in 0..1 of any size and covers exactly its image, sRGB uint8 [H,W,3]. The results are
        float32 [H,W] in 0..1, on the device of the coarse alpha.
        """
