"""The detail head of the paper: inter-similarity, intra-similarity, fusion and detail decoder (sections 3.3 and 3.4).

Shapes are given for the published widths and a canvas of 768 px. Scales are in the order of :data:`FUSION_STRIDES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.config import Section, limited
from icm_cli.model.contracts import Features, Matte, ReferenceFeatures, TrainedHead
from icm_cli.model.decoding import ConvNormReLU, confidence_and_found, make_alpha_layers, upsample_2x
from icm_cli.model.similarity import (
    AttentionMatrix,
    flatten_tokens,
    inter_similarity,
    is_negative,
    selected_token_mask,
    without_autocast,
)

FUSION_STRIDES = (32, 16)
"""Strides of the fused scales, 24 x 24 and 48 x 48 tokens on a canvas of 768 px."""
IMAGE_STREAM_CHANNELS = (48, 96, 192)
OUTPUT_CHANNELS = 16


@dataclass(frozen=True)
class DetailConfig(Section, title="head"):
    """Settings of the detail head. The defaults are those of the published checkpoint."""

    canvas_px: int = limited(768, multiple=FUSION_STRIDES[0])
    """Side of the square canvas, in px. The channels of the intra-similarity are absolute positions on it."""
    feature_channels: int = limited(1280, 1)
    """Channels of the backbone's features at both strides."""
    intra_channels: int = limited(256, 1)
    """Channels of the encoded intra-similarity of each scale."""
    fusion_channels: int = limited(320, 1)
    """Channels of the fused scales."""
    decoder_channels: tuple[int, ...] = (256, 128, 64, 32)
    """Channels after each of the four steps of the detail decoder, from stride 8 to stride 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        is_valid = len(self.decoder_channels) == len(IMAGE_STREAM_CHANNELS) + 1 and min(self.decoder_channels) >= 1
        self.check("decoder_channels", is_valid, "four values of 1 or more")


@dataclass(frozen=True)
class DetailReferences:
    """References as the detail head prepares them."""

    tokens: list[Tensor]
    """For each reference the normalised tokens inside its guidance, float32 [K,C]."""
    negatives: list[Tensor] = field(default_factory=list)
    """For each negative reference its normalised tokens, float32 [K,C]."""
    notices: list[str] = field(default_factory=list)
    """Notices about references whose guidance covers no whole token."""


class DetailHead(TrainedHead):
    """Locates the object by inter-similarity, extends it by intra-similarity, and decodes it at full resolution."""

    Config = DetailConfig
    needs_attention_matrix = True

    def __init__(self, config: DetailConfig) -> None:
        super().__init__()
        self.config = config
        self.canvas_px = config.canvas_px
        self.inter_similarity = InterSimilarity(config.feature_channels)
        self.intra_similarity = nn.ModuleList(
            IntraSimilarityEncoder((config.canvas_px // stride) ** 2, config.intra_channels)
            for stride in FUSION_STRIDES
        )
        self.fusion = Fusion(config.feature_channels, config.intra_channels, config.fusion_channels)
        self.detail_decoder = DetailDecoder(config.fusion_channels, config.decoder_channels)

    def prepare_references(self, references: Sequence[ReferenceFeatures]) -> DetailReferences:
        prepared = DetailReferences([])
        for reference in references:
            inside, notice = selected_token_mask(reference)
            tokens = self.inter_similarity.normalised_tokens(reference.features.correspondence_features)
            selected = tokens[inside.flatten(1)]
            if is_negative(reference.guidance):
                prepared.negatives.append(selected)
            else:
                prepared.tokens.append(selected)
            if notice:
                prepared.notices.append(notice)
        return prepared

    def forward(self, target: Features, references: Sequence[DetailReferences], image: Tensor, valid: Tensor) -> Matte:
        _, encoded = self._compute_similarities(target, references)
        fused = self.fusion([target.scale_features[stride] for stride in FUSION_STRIDES], encoded)
        alpha = self.detail_decoder(fused, 2.0 * image - 1.0)
        return Matte(alpha, *confidence_and_found(alpha.detach(), valid))

    def similarity_maps(self, target: Features, references: Sequence[DetailReferences]) -> tuple[Tensor, Tensor]:
        """Return S, and the encoded intra-similarity averaged over channels and scales, as in the published code."""
        similarity, encoded = self._compute_similarities(target, references)
        size = (self.config.canvas_px, self.config.canvas_px)
        images = [F.interpolate(maps.float().mean(1, keepdim=True), size, mode="bilinear") for maps in encoded]
        return similarity, torch.stack(images).mean(dim=0)

    def _compute_similarities(
        self, target: Features, references: Sequence[DetailReferences]
    ) -> tuple[Tensor, list[Tensor]]:
        """Compute S [B,1,h,w], and the encoded intra-similarity of each scale, [B,256,s,s]."""
        similarity = self.inter_similarity(references, target.correspondence_features, target.valid)
        encoded = [
            layer(similarity, cast(AttentionMatrix, target.intra_similarity[stride]).matrix)
            for layer, stride in zip(self.intra_similarity, FUSION_STRIDES, strict=True)
        ]
        return similarity, encoded


class InterSimilarity(nn.Module):
    """Inter-similarity S of the target and the foreground of the references, with one LayerNorm for both."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def normalised_tokens(self, feature: Tensor) -> Tensor:
        """Normalise the tokens of features [B,C,h,w], float32 [B,N,C]."""
        return self.norm(flatten_tokens(feature))

    def forward(self, references: Sequence[DetailReferences], feature: Tensor, valid: Tensor) -> Tensor:
        """Compute S, float32 [B,1,h,w], of features [B,C,h,w] and the references of each target.

        S is averaged over the references of a target; with one reference, it is that of the published code. With
        negative references, S is 0 at tokens whose fraction of the negative similarity is larger than their fraction of
        S. The other tokens are scaled so that the sum of S stays the same. If no token is left, S is 0.
        """
        targets, are_valid = self.normalised_tokens(feature), valid.flatten(1)
        means = []
        for i, prepared in enumerate(references):
            target, is_valid = targets[i : i + 1], are_valid[i : i + 1]
            similarities = [inter_similarity(tokens, target, is_valid) for tokens in prepared.tokens]
            mean = torch.cat(similarities).mean(dim=0)
            if prepared.negatives:
                negative = inter_similarity(torch.cat(prepared.negatives), target, is_valid)[0]
                kept = mean * (mean / mean.sum() >= negative / negative.sum())
                mean = kept * (mean.sum() / kept.sum().clamp(min=1e-6))
            means.append(mean)
        return torch.stack(means).view(-1, 1, *feature.shape[2:])


class IntraSimilarityEncoder(nn.Module):
    """Encodes the products S[k] * A[q,k] of one scale: the similarity of each token q to the tokens k that S selects.

    The keys k are the input channels of a convolution over the queries q.
    """

    def __init__(self, token_count: int, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(token_count)
        self.conv = nn.Conv2d(token_count, channels, 3, padding=1, bias=False)

    def forward(self, similarity: Tensor, matrix: Tensor) -> Tensor:
        """Encode S [B,1,h,w] and A [B,N,N], both float32, to [B,channels,s,s] with N = s*s."""
        weighted = self._weight_attention(similarity, matrix)
        return self.conv(weighted.to(self.conv.weight.dtype))

    @without_autocast
    def _weight_attention(self, similarity: Tensor, matrix: Tensor) -> Tensor:
        """Compute ReLU(LayerNorm(S * A)), float32 [B,N,s,s]; the channel is the key."""
        side = round(matrix.shape[1] ** 0.5)
        resized = F.interpolate(similarity, (side, side), mode="bilinear", align_corners=True)
        weighted = F.relu(self.norm(resized.flatten(2) * matrix))
        return weighted.view(-1, side, side, side * side).permute(0, 3, 1, 2)


class Fusion(nn.Module):
    """Fuses the features of each scale with its encoded intra-similarity, then both scales."""

    def __init__(self, feature_channels: int, intra_channels: int, channels: int) -> None:
        super().__init__()
        # project and join have one layer per scale; merge fuses the results.
        self.project = nn.ModuleList(ConvNormReLU(feature_channels, channels) for _ in FUSION_STRIDES)
        self.join = nn.ModuleList(ConvNormReLU(channels + intra_channels, channels) for _ in FUSION_STRIDES)
        self.merge = ConvNormReLU(2 * channels, channels)

    def forward(self, features: Sequence[Tensor], intra_similarities: Sequence[Tensor]) -> Tensor:
        """Fuse two scales into one map [B,320,48,48].

        Each argument has two tensors, the coarse scale (s = 24) first, then the fine one (s = 48): features
        [B,1280,s,s], and encoded intra-similarities [B,256,s,s].
        """
        scales = []
        layers = zip(self.project, self.join, features, intra_similarities, strict=True)
        for project, join, feature, similarity in layers:
            scales.append(join(torch.cat([project(feature), similarity], dim=1)))
        coarse, fine = scales
        return self.merge(torch.cat([fine, upsample_2x(coarse)], dim=1))


class DetailDecoder(nn.Module):
    """The detail capture module of ViTMatte (Yao et al. 2024): image features are added at every doubling.

    The image stream computes features of the image at strides 2, 4 and 8. The four steps double the resolution of the
    fused features, and each adds the features of its stride: 8, 4, 2, and at last the image itself.
    """

    def __init__(self, fused_channels: int, step_channels: Sequence[int]) -> None:
        """``step_channels``: number of channels after each of the steps."""
        super().__init__()
        detail_channels = (3, *IMAGE_STREAM_CHANNELS)  # at strides 1, 2, 4 and 8
        self.image_stream = nn.ModuleList(
            ConvNormReLU(before, after, stride=2) for before, after in itertools.pairwise(detail_channels)
        )
        self.steps = nn.ModuleList()
        channels = fused_channels
        for added_channels, channels_after in zip(reversed(detail_channels), step_channels, strict=True):
            self.steps.append(ConvNormReLU(channels + added_channels, channels_after))
            channels = channels_after
        self.output = make_alpha_layers(channels, OUTPUT_CHANNELS)

    def forward(self, fused: Tensor, image: Tensor) -> Tensor:
        """Decode fused features [B,320,48,48] and an image [B,3,768,768] in -1..1 to alpha, float32 [B,1,768,768]."""
        details = [image.to(fused.dtype)]
        for layer in self.image_stream:
            details.append(layer(details[-1]))
        for step in self.steps:
            fused = step(torch.cat([details.pop(), upsample_2x(fused)], dim=1))
        return torch.sigmoid(self.output(fused).float())
