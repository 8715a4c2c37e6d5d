"""The small trained head: it compares tokens and knows no class, so the reference alone says what is wanted.

Every token of the target meets the reference's tokens inside and outside the guidance. What comes of it, with the
target's own features, is seen together by a few layers of attention and becomes a coarse alpha, one number a token,
which a decoder may bring up to the canvas. After the paper's inter- and intra-similarity (section 3.3), but without its
fixed grid: any canvas will do.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.errors import ConfigError
from icm_cli.guided_filter import along_edges
from icm_cli.model.contracts import Features, Matte, Presence, ReferenceFeatures, TrainedHead
from icm_cli.model.decoding import ConvNormReLU, confidence_and_found, make_alpha_layers, resize_bilinear, upsample
from icm_cli.model.similarity import (
    ReferenceTokens,
    SelfSimilarity,
    flatten_tokens,
    split_reference_tokens,
    without_autocast,
)

EVIDENCE_NUMBERS = 8
"""Evidence values per token and comparison."""
CARRIED = 6
"""Index of the evidence value that is the guidance carried over."""
STRONGEST = (0, 1, CARRIED)
"""Indices of the evidence values whose maximum over the picture tells whether the thing is there."""
PRESENCE_NUMBERS = 2 + len(STRONGEST)
"""Values per comparison about the whole picture: the strongest, and likeness to the means of both sides."""
PRESENCE_WIDTH = 64
LEAST_ALPHA = 1e-3
"""Weight of every token in the mean of the thing: where nothing is found the whole picture is compared."""
IMAGE_CHANNELS = 3
CONTEXT_HEADS = 4


@dataclass(frozen=True)
class TokenMatchConfig:
    """Settings of the token-match head; the channels of the backbone's features must be the backbone's own."""

    feature_channels: tuple[int, ...] = (384, 384, 384, 120, 208, 352)
    """Channels of each layer in the correspondence feature."""
    width: int = 64
    """Channels in which each layer's tokens are compared."""
    context_width: int = 192
    """Channels of the tokens that attend to one another."""
    context_layers: int = 2
    fused_channels: int = 128
    """Channels of the tokens that the coarse alpha is read from, and that enter the decoder."""
    skip_channels: tuple[int, ...] = (48, 24, 16)
    """Channels of the backbone's features per scale, each twice as fine as the one before; the first is twice as fine
    as the tokens. They join the first steps of the decoder."""
    decoder_channels: tuple[int, ...] = (96, 64, 32, 24, 16)
    """Channels after each step of the decoder, a doubling each; steps after those with skips take the image in. Without
    any the alpha is the coarse one, one number per token; where they end before the canvas' size it is enlarged."""
    temperature: float = 0.05
    """Temperature of the comparisons before training, in cosine units; it is learned."""
    presence_sharpness: float = 4.0
    """At inference the presence counts so many times its logit: a thing is there or it is not."""
    presence_from: float = 0.0
    """Logit of the presence from which on the thing is there at inference."""
    doubt: float = 0.0
    """At inference a presence whose logit is nearer to 0 than this is in doubt: where edges are refined the picture is
    looked at again from near by. With 0 none is."""
    edge_radius: float = 0.03
    """At inference a guided filter takes soft edges to the picture's: radius of its window, as a share of the canvas'
    long side; 0: none."""
    edge_epsilon: float = 1e-4
    """The variance of a colour channel (0..1) that counts as an edge to that filter."""
    clear: float = 0.03
    """At inference alpha is stretched by so much at either end: plain background is 0 and plain foreground 1."""

    def __post_init__(self) -> None:
        if not self.feature_channels:
            raise ConfigError("head feature_channels is empty; expected at least one number")
        if self.decoder_channels and len(self.decoder_channels) < len(self.skip_channels):
            raise ConfigError(
                f"head decoder_channels is {list(self.decoder_channels)}; expected as many numbers as skip_channels' "
                f"{len(self.skip_channels)} or more, or none"
            )
        widths = (*self.feature_channels, self.width, self.context_width, self.fused_channels)
        if bad := [width for width in (*widths, *self.skip_channels, *self.decoder_channels) if width < 1]:
            raise ConfigError(f"head has a width of {bad[0]} channels; expected 1 or more")
        if self.context_width % CONTEXT_HEADS:
            raise ConfigError(f"head context_width is {self.context_width}; expected a multiple of {CONTEXT_HEADS}")
        if self.context_layers < 0:
            raise ConfigError(f"head context_layers is {self.context_layers}; expected 0 or more")
        for name in ("temperature", "presence_sharpness", "edge_epsilon"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"head {name} is {getattr(self, name)}; expected more than 0")
        for name, below in (("doubt", 20), ("edge_radius", 0.5), ("clear", 0.5)):
            if not 0 <= getattr(self, name) < below:
                raise ConfigError(f"head {name} is {getattr(self, name)}; expected 0 to below {below}")

    @property
    def comparisons(self) -> int:
        """One of each layer, and one of all of them together."""
        return len(self.feature_channels) + 1


class TokenMatchHead(TrainedHead):
    """Evidence of every token by comparison, and what the tokens together make of it."""

    Config = TokenMatchConfig
    needs_attention_matrix = False
    can_learn_references = True

    def __init__(self, config: TokenMatchConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.ModuleList(nn.Linear(channels, config.width) for channels in config.feature_channels)
        self.log_sharpness = nn.Parameter(torch.full((config.comparisons, 1, 1), -math.log(config.temperature)))
        self.background_null = nn.Parameter(torch.zeros(config.comparisons, 1, 1))
        evidence = 2 * EVIDENCE_NUMBERS * config.comparisons  # of the token and of the picture's best token
        self.condense = nn.Conv2d(sum(config.feature_channels), config.context_width, 1)
        self.weigh = nn.Conv2d(evidence, config.context_width, 1)
        self.context = nn.ModuleList(Context(config.context_width) for _ in range(config.context_layers))
        self.fuse = ConvNormReLU(config.context_width + evidence, config.fused_channels)
        self.coarse = nn.Conv2d(config.fused_channels, 1, 1)
        self.present = nn.Sequential(
            nn.Linear(PRESENCE_NUMBERS * config.comparisons + config.fused_channels, PRESENCE_WIDTH),
            nn.ReLU(),
            nn.Linear(PRESENCE_WIDTH, 1),
        )

        images = len(config.decoder_channels) - len(config.skip_channels)
        details = (*config.skip_channels, *[IMAGE_CHANNELS] * images) if config.decoder_channels else ()
        self.steps = nn.ModuleList(
            ConvNormReLU(before + detail, after)
            for (before, after), detail in zip(
                itertools.pairwise((config.fused_channels, *config.decoder_channels)), details, strict=True
            )
        )
        if config.decoder_channels:
            self.output = make_alpha_layers(config.decoder_channels[-1], config.decoder_channels[-1])

    @torch.no_grad()
    def initialise_from_pca(self, seen: Tensor) -> None:
        """Compare in the principal components of tokens [N,C] that the backbone gave: what tokens differ in most, with
        what all of them share taken off, is a measure of likeness before anything is learned."""
        for project, layer in zip(
            self.project, torch.split(seen, list(self.config.feature_channels), dim=1), strict=True
        ):
            assert isinstance(project, nn.Linear)
            mean = layer.mean(dim=0)
            _, vectors = torch.linalg.eigh((layer - mean).T @ (layer - mean) / len(layer))  # the largest come last
            kept = vectors[:, -project.out_features :].T
            project.weight[: len(kept)] = kept
            project.weight[len(kept) :] = 0.0
            project.bias.copy_(-project.weight @ mean)

    def prepare_references(self, references: Sequence[ReferenceFeatures]) -> ReferenceTokens:
        """Their tokens are of unit length in every comparison."""
        return split_reference_tokens(references, self.projected)

    def forward(self, target: Features, references: Sequence[ReferenceTokens], image: Tensor, valid: Tensor) -> Matte:
        projected = self.projected(target.correspondence)
        evidence = self.evidence(projected, target.valid, references)
        fused = self.fused(target, evidence)
        logit = self.presence(fused, projected, evidence, target.valid, references)
        alpha = torch.sigmoid(resize_bilinear(self.decoded(fused, target, image), image.shape[-2:]))
        if self.training:
            alpha = alpha * torch.sigmoid(logit)[:, None, None, None]
            return Matte(alpha, *confidence_and_found(alpha.detach(), valid))
        if self.config.edge_radius:
            alpha = along_edges(alpha, image.float(), self.config.edge_radius, self.config.edge_epsilon)
        presence = self.sharp(logit)
        shown = self._cleared(alpha * torch.sigmoid(presence)[:, None, None, None])
        uncertain = logit.abs() < self.config.doubt
        return Matte(shown, *confidence_and_found(shown, valid), Presence(presence, self._cleared(alpha), uncertain))

    def similarity_maps(self, target: Features, references: Sequence[ReferenceTokens]) -> tuple[Tensor, Tensor]:
        """The share of softmax attention that goes to the reference's foreground, and that spread over alike tokens."""
        evidence = self.evidence(self.projected(target.correspondence), target.valid, references)
        grid = evidence.shape[2:]
        evidence = evidence.reshape(len(evidence), self.config.comparisons, EVIDENCE_NUMBERS, *grid).mean(dim=1)
        return evidence[:, CARRIED : CARRIED + 1], evidence[:, -1:]

    def evidence(self, projected: Tensor, valid: Tensor, references: Sequence[ReferenceTokens]) -> Tensor:
        """Eight numbers a token and comparison, [B,8*comparisons,h,w] float32; ``projected`` as :meth:`projected`
        gives it, ``valid`` [B,h,w].

        Soft and hard maximum of its likeness to the foreground and to the background; likeness to the mean of either;
        the guidance carried over by softmax attention, in -1..1; and that spread by intra-similarity.
        """
        height, width = valid.shape[1:]
        compared = torch.stack(
            [self._compare(of_image, reference) for of_image, reference in zip(projected, references, strict=True)]
        )
        grid = projected.transpose(1, 2).reshape(len(projected), -1, height, width)
        alike = SelfSimilarity(grid, valid, self.config.temperature)
        spread = alike.propagate(compared[..., CARRIED].transpose(1, 2))
        numbers = torch.cat([compared, spread.transpose(1, 2)[..., None]], dim=-1)  # [B,comparisons,N,8]
        return numbers.transpose(2, 3).reshape(len(numbers), -1, height, width)

    def fused(self, target: Features, evidence: Tensor) -> Tensor:
        """Features [B,fused_channels,h,w] of the coarse alpha; ``evidence`` as :meth:`evidence` gives it."""
        hidden = evidence.masked_fill(~target.valid[:, None], float("-inf"))
        best = hidden.amax(dim=(2, 3), keepdim=True).expand_as(evidence)
        dtype = self.condense.weight.dtype
        evidence = torch.cat([evidence, evidence - best], dim=1).to(dtype)
        x = self.condense(target.correspondence.to(dtype)) + self.weigh(evidence)
        for layer in self.context:
            x = layer(x, target.valid)
        fused: Tensor = self.fuse(torch.cat([x, evidence], dim=1))
        return fused

    def _cleared(self, alpha: Tensor) -> Tensor:
        return (alpha * (1.0 + 2.0 * self.config.clear) - self.config.clear).clamp(0.0, 1.0)

    def sharp(self, presence: Tensor) -> Tensor:
        """Make of the presence that was learned, a logit [B], the one that counts at inference."""
        return self.config.presence_sharpness * (presence - self.config.presence_from)

    @without_autocast
    def presence(
        self,
        fused: Tensor,
        projected: Tensor,
        evidence: Tensor,
        valid: Tensor,
        references: Sequence[ReferenceTokens],
    ) -> Tensor:
        """Whether the reference's thing is in the picture at all, as a logit [B]: one answer for all of its pixels.

        What the coarse alpha takes for the thing is compared as a whole with the reference's foreground and background,
        beside the picture's strongest evidence and its strongest tokens.
        """
        alpha = (torch.sigmoid(self.coarse(fused.to(self.coarse.weight.dtype)).float()) + LEAST_ALPHA) * valid[:, None]
        whole = self._unit((alpha.flatten(1)[..., None] * projected).sum(dim=1))
        sides = [torch.stack([each.foreground.sum(dim=0), each.background.sum(dim=0)]) for each in references]
        alike = (self._unit(torch.stack(sides)) * whole[:, None]).sum(dim=-1)  # [B,2,layers]
        alike = torch.cat([alike, alike.mean(dim=-1, keepdim=True)], dim=-1)
        hidden = evidence.masked_fill(~valid[:, None], float("-inf"))
        strongest = hidden.flatten(2).amax(dim=2).reshape(len(hidden), -1, EVIDENCE_NUMBERS)[..., STRONGEST]
        best = fused.float().masked_fill(~valid[:, None], 0.0).amax(dim=(2, 3))
        numbers = torch.cat([alike.flatten(1), strongest.flatten(1), best], dim=1)
        logit: Tensor = self.present(numbers)[:, 0]
        return logit

    def _unit(self, summed: Tensor) -> Tensor:
        """The direction of a sum of tokens [...,C] in every layer, [...,layers,width]; 0 where there were none."""
        return F.normalize(summed.reshape(*summed.shape[:-1], -1, self.config.width), dim=-1)

    def decoded(self, fused: Tensor, target: Features, image: Tensor | None) -> Tensor:
        """The logit of the alpha, [B,1,H',W'] float32, as fine as the decoder goes; ``fused`` as :meth:`fused` gives
        it. ``image`` [B,3,H,W] may be left out where every step has features of the backbone."""
        if not self.config.decoder_channels:
            coarse: Tensor = self.coarse(fused).float()
            return coarse
        x = fused
        for step, detail in zip(self.steps, self._details(target, image), strict=True):
            x = step(torch.cat([upsample(x), detail.to(x.dtype)], dim=1))
        logit: Tensor = self.output(x).float()
        return logit

    def _details(self, target: Features, image: Tensor | None) -> list[Tensor]:
        """Features that join each step of the decoder: the backbone's scales from coarse to fine, then the image."""
        details = []
        height, width = target.valid.shape[-2:]
        for level, channels in enumerate(self.config.skip_channels, start=1):
            size = (height << level, width << level)
            scale = next((each for each in target.scales.values() if each.shape[-2:] == size), None)
            if scale is None or scale.shape[1] != channels:
                gives = "nothing" if scale is None else f"{scale.shape[1]} channels"
                raise ConfigError(
                    f"head skip_channels is {channels} at {1 << level} times the tokens' grid, and the backbone gives "
                    f"{gives} there; expected the channels of its scale_blocks"
                )
            details.append(scale)
        for level in range(len(details) + 1, len(self.steps) + 1):
            assert image is not None
            fine = image.shape[-1] / (width << level)
            if fine < 1 or fine % 1:
                raise ConfigError(
                    f"head decoder_channels has {len(self.steps)} steps, and the backbone's tokens are "
                    f"{image.shape[-1] // width} px; expected no more steps than doublings"
                )
            details.append(4.0 * (image if fine == 1 else F.avg_pool2d(image, int(fine))) - 2.0)
        return details

    def projected(self, feature: Tensor) -> Tensor:
        """[B,C,h,w] -> tokens [B,N,layers*width] float32, of unit length in every layer."""
        if feature.shape[1] != sum(self.config.feature_channels):
            raise ConfigError(
                f"head feature_channels is {sum(self.config.feature_channels)} together, and the backbone gives "
                f"{feature.shape[1]} channels; expected the channels of its correspondence layers"
            )
        layers = torch.split(flatten_tokens(feature), list(self.config.feature_channels), dim=-1)
        return torch.cat(
            [F.normalize(project(layer), dim=-1) for project, layer in zip(self.project, layers, strict=True)], dim=-1
        )

    @without_autocast
    def _compare(self, target: Tensor, reference: ReferenceTokens) -> Tensor:
        """Tokens of one target -> [comparisons,N,7] (all of :meth:`evidence` but the last number)."""
        sharpness = self.log_sharpness.exp().clamp(max=100.0)
        inside, outside, each = (
            found.reshape(len(found), len(self.config.feature_channels), self.config.width).transpose(0, 1)
            for found in (reference.foreground, reference.background, target)
        )
        foreground = _with_joint(each @ inside.transpose(1, 2))
        # The null is a background token that is alike to all by a learned amount: there may be no other.
        # It counts for as many as there are foreground tokens, or a finer grid would outvote it.
        null = (self.background_null + _log_count(foreground) / sharpness).expand(-1, len(target), 1)
        background = torch.cat([_with_joint(each @ outside.transpose(1, 2)), null], dim=2)
        soft_foreground, soft_background = (
            (sharpness * likeness).logsumexp(dim=2, keepdim=True) / sharpness for likeness in (foreground, background)
        )
        carried = torch.tanh(0.5 * sharpness * (soft_foreground - soft_background))
        numbers = [
            soft_foreground - _log_count(foreground) / sharpness,
            foreground.amax(dim=2, keepdim=True),
            soft_background - _log_count(background) / sharpness,
            background.amax(dim=2, keepdim=True),
            foreground.mean(dim=2, keepdim=True),
            background.mean(dim=2, keepdim=True),
            carried,
        ]
        return torch.cat(numbers, dim=2)


class Context(nn.Module):
    """A transformer layer over a target's valid tokens, [B,C,h,w] -> the same: the parts of a thing see one another."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, feature: Tensor, valid: Tensor) -> Tensor:
        x = flatten_tokens(feature)
        query, key, value = self.qkv(self.norm1(x)).unflatten(2, (3, CONTEXT_HEADS, -1)).permute(2, 0, 3, 1, 4)
        mask = None if bool(valid.all()) else valid.flatten(1)[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        x = x + self.perceptron(self.norm2(x))
        return x.transpose(1, 2).unflatten(2, feature.shape[-2:]).to(feature.dtype)


def _with_joint(likeness: Tensor) -> Tensor:
    """Likeness [layers,N,K] -> [layers + 1,N,K]: the last is that of all layers together."""
    return torch.cat([likeness, likeness.mean(dim=0, keepdim=True)])


def _log_count(likeness: Tensor) -> Tensor:
    return likeness.new_tensor(float(likeness.shape[2])).log()
