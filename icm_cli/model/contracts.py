"""The contracts of the core model: features of a backbone, mattes of a head, edges.

Letters as in the paper (Guo et al., "In-Context Matting", CVPR 2024): B batch, C channels, (h, w) a feature
grid, N = h*w tokens in row-major order, R references, K reference tokens inside the guidance.

An *image* at this level is float32 sRGB in 0..1, [B,3,H,W], already on the backbone's canvas; *valid* is a
bool mask [B,H,W] of its pixels that are not padding (padding is always right of and below the frame, by edge
replication). Backbones normalise images themselves; heads normalise features themselves.

To add a backbone or a head, write a subclass of :class:`Backbone` or :class:`Head` in a module of this package and
register it in ``icm_cli.config.COMPONENTS`` under the ``name`` that configurations use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from torch import Tensor, nn

from icm_cli.errors import UsageError
from icm_cli.geometry import CanvasRule, Float, ImageU8


@runtime_checkable
class IntraSimilarity(Protocol):
    """Likeness among the tokens of one target, as an operator (paper section 3.3).

    Rows of the underlying matrix are a softmax over the valid tokens: non-negative, summing to 1, zero at
    padding.
    """

    grid: tuple[int, int]
    """(h, w); N = h*w."""

    def propagate(self, values: Tensor) -> Tensor:
        """Spread ``values`` [B,N,c] over alike tokens: the product A @ values, [B,N,c] float32."""
        ...


@runtime_checkable
class MatrixIntraSimilarity(IntraSimilarity, Protocol):
    """An intra-similarity that also holds its matrix (Stable Diffusion's mean self-attention)."""

    def matrix(self) -> Tensor:
        """A, [B,N,N] float32; axis 1 is the query, axis 2 the key."""
        ...


@dataclass(frozen=True)
class Features:
    """Features of a batch of images, made by a backbone.

    ``correspondence``: [B,C,h,w] float32, not normalised, compared between reference and target.
    ``valid``: [B,h,w] bool on the correspondence grid, True where a token's cell holds at least one pixel of
    the frame.
    ``scales``: stride in canvas pixels -> [B,C_s,H/s,W/s], in the backbone's dtype (float32 or lower).
    ``intra``: stride -> intra-similarity on that stride's grid. A reference pass leaves ``scales`` and
    ``intra`` empty.
    ``grouping``: [B,C,h,w] float32 on the correspondence grid, which tells tokens of one picture apart; None where the
    correspondence feature does both.
    """

    correspondence: Tensor
    valid: Tensor
    scales: Mapping[int, Tensor]
    intra: Mapping[int, IntraSimilarity]
    grouping: Tensor | None = None

    def correspondence_only(self, index: int) -> Features:
        """The correspondence feature of one image, as a batch of one; nothing else of it is kept."""
        return Features(self.correspondence[index : index + 1], self.valid[index : index + 1], {}, {})


@dataclass(frozen=True)
class ReferenceFeatures:
    """One reference: features (batch of one), the guidance [1,1,H,W] float32 and valid [1,H,W].

    Guidance is 1 inside the thing, 0 outside, 0.5 where it is neither."""

    features: Features
    guidance: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Matte:
    """Result of a head for a batch of B targets.

    Attributes:
        alpha: Coarse alpha on the canvas, float32 [B,1,H,W] in 0..1; undefined in the padding.
        confidence: Confidence of the head in its foreground, float32 [B] in 0..1.
        found: Whether the target object appears to be in the image, bool [B].
        presence: Presence of the target object, from heads that predict it; None from the others.
    """

    alpha: Tensor
    confidence: Tensor
    found: Tensor
    presence: Presence | None = None


@dataclass(frozen=True)
class Presence:
    """Prediction whether the target object is in the image at all, for a batch of B targets.

    Attributes:
        logit: Logit of the presence, float32 [B]. ``Matte.alpha`` is already multiplied by its sigmoid.
        alpha_if_present: Alpha under the assumption that the object is present, float32 [B,1,H,W] in 0..1.
        is_uncertain: Whether the presence is too uncertain to decide from the whole image, bool [B]. A second pass
            over a crop may decide.
    """

    logit: Tensor
    alpha_if_present: Tensor
    is_uncertain: Tensor


class PreparedReferences(Protocol):
    """References condensed by a head, for that same head's ``forward``."""

    @property
    def notices(self) -> Sequence[str]:
        """Sentences about the references that the user should read."""
        ...


class Backbone(nn.Module, ABC):
    """Turns images on the canvas into :class:`Features`."""

    Config: ClassVar[type[Any]]
    """Frozen dataclass of this backbone's settings."""

    has_attention_matrix: ClassVar[bool]
    """Whether ``Features.intra`` holds :class:`MatrixIntraSimilarity` objects."""

    is_self_contained: ClassVar[bool]
    """Whether it is built without any file but a checkpoint that holds its weights."""

    is_trainable: ClassVar[bool]
    """Whether training may change its weights; a frozen backbone runs without gradients."""

    has_transformer: ClassVar[bool] = False
    """Whether a transformer in it may have a dtype of its own, see :meth:`cast`."""

    @classmethod
    def preferred_transformer_dtype(cls, config: Any) -> str:  # noqa: ARG003
        """Name of the dtype its transformer wants where the user asks for none, or "auto" for the device's."""
        return "auto"

    @classmethod
    @abstractmethod
    def weights_digest(cls, config: Any, weights: str | None, *, offline: bool) -> str:
        """Hash of the content of the pretrained weights that :meth:`load` would read; loads none of them."""

    @classmethod
    @abstractmethod
    def load(cls, config: Any, weights: str | None, *, offline: bool, seed: int) -> Self:
        """Build with pretrained weights, on the CPU in float32.

        ``weights``: a local folder or a hub id, for backbones whose weights are chosen by the user. ``offline``:
        never reach for the network. ``seed``: of whatever noise the backbone draws.
        Raises ConfigError when the weights cannot be had, saying what to get and where to put it.
        """

    def optimise_for_inference(self) -> None:
        """Rearrange the weights for speed, once, before inference; no training or saving after. Does nothing here."""

    def set_dtype(self, dtype: torch.dtype, transformer_dtype: torch.dtype) -> None:
        """Bring the weights to ``dtype``, for inference; those of a transformer, where there is one apart, to
        ``transformer_dtype``."""
        del transformer_dtype
        self.to(dtype)

    @property
    @abstractmethod
    def canvas(self) -> CanvasRule:
        """The canvas sizes this backbone takes."""

    @abstractmethod
    def reference_features(self, image: Tensor, valid: Tensor, noise: Sequence[str]) -> Features:
        """Features of a batch of references: the correspondence feature alone.

        ``noise`` names each image's noise, for backbones that draw any: equal names, equal noise.
        """

    @abstractmethod
    def target_features(self, image: Tensor, valid: Tensor, noise: Sequence[str]) -> Features:
        """Features of a batch of targets, each image's independent of its neighbours'; ``noise`` as above."""


class Head(nn.Module, ABC):
    """Turns a target's features and the references into an alpha."""

    Config: ClassVar[type[Any]]
    """Frozen dataclass of this head's settings."""

    needs_attention_matrix: ClassVar[bool]
    """Whether it reads ``MatrixIntraSimilarity.matrix()``."""

    is_trained: ClassVar[bool]
    """Whether it has weights that must come from a checkpoint."""

    can_learn_references: ClassVar[bool] = False
    """Whether a copy of it can learn the references of a run before it mattes."""

    def disable_edge_refinement(self) -> None:
        """Answer coarsely from now on: what refines edges comes after. Does nothing where there is nothing to spare."""

    @abstractmethod
    def prepare_references(self, references: Sequence[ReferenceFeatures]) -> PreparedReferences:
        """Condense the references into what :meth:`forward` needs; called once per run."""

    @abstractmethod
    def forward(self, target: Features, references: Sequence[Any], image: Tensor, valid: Tensor) -> Matte:
        """Matte a batch; image and valid are the targets'.

        ``references``: for each image of the batch what :meth:`prepare` gave.
        """


class TrainedHead(Head, ABC):
    """A head with weights, which come from a checkpoint or are learned by ``icm train``."""

    is_trained = True

    @abstractmethod
    def similarity_maps(self, target: Features, references: Sequence[Any]) -> tuple[Tensor, Tensor]:
        """Inter- and intra-similarity of a batch as pictures, [B,1,h,w] float32 each on a grid of its own, any scale.

        For people to look at while a model is trained; nothing is computed from them.
        """


class Objects(nn.Module, ABC):
    """Makes the things that a coarse alpha means whole, before their edges. It knows no reference and no class.

    ``icm train`` teaches it; a checkpoint holds all of its weights.
    """

    Config: ClassVar[type[Any]]
    """Frozen dataclass of its settings."""

    @classmethod
    @abstractmethod
    def weights_digest(cls, config: Any) -> str:
        """Hash of the content of the pretrained weights that :meth:`load` would read. Raises ConfigError."""

    @classmethod
    @abstractmethod
    def load(cls, config: Any) -> Self:
        """Build it with its pretrained weights, on the CPU in float32. Raises ConfigError where they are not here."""

    def optimise_for_inference(self) -> None:
        """Rearrange the weights for speed, once, before inference; no training or saving after. Does nothing here."""

    def set_dtype(self, dtype: torch.dtype, fast_dtype: torch.dtype) -> None:
        """Bring the weights to ``dtype``, or to ``fast_dtype`` where that is as good: see ``Device``."""
        del fast_dtype
        self.to(dtype)

    @abstractmethod
    def embedding(self, image: Tensor) -> Tensor:
        """image [B,3,H,W] sRGB 0..1 -> what :meth:`forward` needs to know of it, [B,C,h,w]."""

    @abstractmethod
    def forward(self, embedding: Tensor, coarse: Tensor) -> Tensor:
        """Embedding [B,C,h,w] and coarse alpha [B,1,h',w'] 0..1 of pictures -> the logit of the alpha in which things
        are whole, [B,1,nh,nw] float32, several cells for one of the embedding."""

    @abstractmethod
    def completed(self, rgb: ImageU8, coarse: Float) -> Float:
        """A coarse alpha [h,w] 0..1 of any size and its picture, sRGB uint8 [H,W,3] -> one in which things are whole,
        float32 [h',w'] 0..1."""


class Edges(nn.Module, ABC):
    """Brings a head's alpha to the edges of its source, at the source's size. It knows no reference and no class."""

    Config: ClassVar[type[Any]]
    """Frozen dataclass of its settings."""

    is_trained: ClassVar[bool]
    """Whether it has weights that ``icm train`` learns and a checkpoint holds."""

    @classmethod
    def with_weights(cls, config: Any, weights: str) -> Any:  # noqa: ARG003
        """Settings that take their pretrained weights from ``weights``, a folder or hub id. Raises UsageError."""
        raise UsageError(
            f"the edges have no weights that could be chosen, so --edges-weights {weights!r} has nothing to do; "
            "leave it out, or give --edges vitmatte"
        )

    @classmethod
    def weights_digest(cls, config: Any, *, offline: bool) -> str:  # noqa: ARG003
        """Hash of the content of the pretrained weights that :meth:`load` would read; empty where there are none."""
        return ""

    @classmethod
    def load(cls, config: Any, *, offline: bool) -> Self:  # noqa: ARG003
        """Build it, on the CPU in float32, with its pretrained weights where it has any. Raises ConfigError."""
        return cls(config)

    def optimise_for_inference(self) -> None:
        """Rearrange the weights for speed, once, before inference; no training or saving after. Does nothing here."""

    def set_dtype(self, dtype: torch.dtype, fast_dtype: torch.dtype) -> None:
        """Bring the weights to ``dtype``, or to ``fast_dtype`` where that is as good: see ``Device``."""
        del fast_dtype
        self.to(dtype)

    @abstractmethod
    def refined(self, rgb: ImageU8, coarse: Float) -> Float:
        """A coarse alpha [h,w] 0..1 of any size and its picture, sRGB uint8 [H,W,3] -> the alpha float32 [H,W] 0..1."""
