"""The small trained head: it compares tokens and knows no class, so the reference alone says what is wanted.

Every token of the target meets the reference's tokens inside and outside the guidance. What comes of it, with the
target's own features, goes through an up-sampling decoder. After the paper's inter- and intra-similarity (section
3.3), but without its fixed grid: any canvas will do.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.errors import ConfigError
from icm_cli.guidance import ReferenceTokens, reference_tokens
from icm_cli.model.contracts import Features, Matte, ReferenceFeatures, TrainedHead
from icm_cli.model.decoding import ConvNormReLU, alpha_output, judge, upsample
from icm_cli.model.similarity import SelfSimilarity, in_float32, tokens

SKIP_STRIDES = (8, 4, 2)
"""Scales of the backbone that join the decoder on its way up from the correspondence grid, before the image itself."""
EVIDENCE_NUMBERS = 8


@dataclass(frozen=True)
class TokenMatchConfig:
    """Settings of the token-match head; the channels of the backbone's features must be the backbone's own."""

    feature_channels: int = 472
    """Channels of the correspondence feature."""
    skip_channels: tuple[int, ...] = (48, 24, 16)
    """Channels of the backbone's features at strides 8, 4 and 2."""
    width: int = 128
    """Channels of the tokens that are compared, and of the fused feature."""
    decoder_channels: tuple[int, ...] = (64, 48, 32, 16)
    """Channels after each of the four steps of the decoder, from stride 8 to the image's own size."""
    temperature: float = 0.1
    """Of the comparisons before training, in cosine units; it is learned."""

    def __post_init__(self) -> None:
        if len(self.skip_channels) != len(SKIP_STRIDES):
            raise ConfigError(f"head skip_channels is {list(self.skip_channels)}; expected three numbers")
        if len(self.decoder_channels) != len(SKIP_STRIDES) + 1:
            raise ConfigError(f"head decoder_channels is {list(self.decoder_channels)}; expected four numbers")
        for width in (self.feature_channels, self.width, *self.skip_channels, *self.decoder_channels):
            if width < 1:
                raise ConfigError(f"head has a width of {width} channels; expected 1 or more")
        if self.temperature <= 0:
            raise ConfigError(f"head temperature is {self.temperature}; expected more than 0")


class TokenMatchHead(TrainedHead):
    """Evidence of every token by comparison, then a decoder that takes the image's detail in at every doubling."""

    Config = TokenMatchConfig
    needs_matrix = False

    def __init__(self, config: TokenMatchConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Conv2d(config.feature_channels, config.width, 1, bias=False)
        self.inverse_temperature = nn.Parameter(torch.tensor(1.0 / config.temperature))
        self.background_null = nn.Parameter(torch.zeros(1))
        self.condense = nn.Conv2d(config.feature_channels, config.width, 1)
        self.fuse = nn.Sequential(
            ConvNormReLU(config.width + EVIDENCE_NUMBERS, config.width), ConvNormReLU(config.width, config.width)
        )
        details = (*config.skip_channels, 3)
        self.steps = nn.ModuleList(
            ConvNormReLU(before + detail, after)
            for (before, after), detail in zip(
                itertools.pairwise((config.width, *config.decoder_channels)), details, strict=True
            )
        )
        self.output = alpha_output(config.decoder_channels[-1], config.decoder_channels[-1])

    def prepare(self, references: Sequence[ReferenceFeatures]) -> ReferenceTokens:
        """Their tokens are of unit length."""
        return reference_tokens(references, self._projected)

    def forward(self, target: Features, references: Sequence[ReferenceTokens], image: Tensor, valid: Tensor) -> Matte:
        feature = target.correspondence.to(self.condense.weight.dtype)
        evidence = self.evidence(target, references)
        x = self.fuse(torch.cat([self.condense(feature), evidence.to(feature.dtype)], dim=1))
        skips = zip(SKIP_STRIDES, self.config.skip_channels, strict=True)
        details = [_checked(target.scales.get(stride), "skip_channels", wide, stride) for stride, wide in skips]
        details.append(4.0 * image - 2.0)
        for step, detail in zip(self.steps, details, strict=True):
            x = step(torch.cat([upsample(x), detail.to(x.dtype)], dim=1))
        alpha = torch.sigmoid(self.output(x).float())
        return Matte(alpha, *judge(alpha.detach(), valid))

    def similarity_maps(self, target: Features, references: Sequence[ReferenceTokens]) -> tuple[Tensor, Tensor]:
        """The share of softmax attention that goes to the reference's foreground, and that spread over alike tokens."""
        evidence = self.evidence(target, references)
        return evidence[:, -2:-1], evidence[:, -1:]

    def evidence(self, target: Features, references: Sequence[ReferenceTokens]) -> Tensor:
        """Eight numbers a token, [B,8,h,w] float32.

        Soft and hard maximum of its likeness to the foreground and to the background; likeness to the mean of either;
        the guidance carried over by softmax attention, in -1..1; and that spread by intra-similarity.
        """
        height, width = target.valid.shape[1:]
        projected = self._projected(target.correspondence)
        compared = torch.stack(
            [self._compare(of_image, reference) for of_image, reference in zip(projected, references, strict=True)]
        )
        grid = projected.transpose(1, 2).reshape(len(projected), -1, height, width)
        alike = SelfSimilarity(grid, target.valid, self.config.temperature)
        spread = alike.propagate(compared[..., -1:])
        numbers = torch.cat([compared, spread], dim=-1).transpose(1, 2)
        return numbers.reshape(len(projected), EVIDENCE_NUMBERS, height, width)

    def _projected(self, feature: Tensor) -> Tensor:
        """[B,C,h,w] -> tokens of unit length [B,N,width] float32."""
        _checked(feature, "feature_channels", self.config.feature_channels, None)
        return F.normalize(tokens(self.project(feature.to(self.project.weight.dtype))), dim=-1)

    @in_float32
    def _compare(self, target: Tensor, reference: ReferenceTokens) -> Tensor:
        """Tokens of one target [N,C] -> seven numbers each [N,7] (all of :meth:`evidence` but the last)."""
        sharpness = self.inverse_temperature.clamp(min=1.0, max=100.0)
        foreground = target @ reference.foreground.T
        # The null is a background token that is alike to all by a learned amount: there may be no other.
        null = self.background_null.expand(len(target), 1)
        background = torch.cat([target @ reference.background.T, null], dim=1)
        soft_foreground, soft_background = (
            (sharpness * each).logsumexp(dim=1) / sharpness for each in (foreground, background)
        )
        carried = torch.tanh(0.5 * sharpness * (soft_foreground - soft_background))
        numbers = [
            soft_foreground - _log_count(foreground) / sharpness,
            foreground.amax(dim=1),
            soft_background - _log_count(background) / sharpness,
            background.amax(dim=1),
            foreground.mean(dim=1),
            background.mean(dim=1),
            carried,
        ]
        return torch.stack(numbers, dim=1)


def _checked(feature: Tensor | None, setting: str, channels: int, stride: int | None) -> Tensor:
    """A backbone's feature. Raises ConfigError where it is another one than the configuration says."""
    if feature is not None and feature.shape[1] == channels:
        return feature
    where = "" if stride is None else f" at stride {stride}"
    gives = "nothing there" if feature is None else f"{feature.shape[1]} channels"
    raise ConfigError(
        f"head {setting} is {channels}{where}, and the backbone gives {gives}; expected the channels of its "
        "correspondence_blocks together, and of its scale_blocks at strides 8, 4 and 2"
    )


def _log_count(likeness: Tensor) -> Tensor:
    return likeness.new_tensor(float(likeness.shape[1])).log()


PART = TokenMatchHead
