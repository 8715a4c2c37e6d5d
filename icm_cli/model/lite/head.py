"""The token-match head: a small trained head that compares tokens of target and reference.

The head has no notion of classes; the references alone define the object. Every token of the target is compared with
the reference's tokens inside and outside the guidance. A few attention layers combine the results with the features of
the target into a coarse alpha, one value per token, and a decoder can refine it up to the size of the canvas. The
design follows the inter- and intra-similarity of the paper (section 3.3), but works on canvases of any size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from icm_cli.config import Section, limited
from icm_cli.errors import ConfigError
from icm_cli.guided_filter import align_to_edges
from icm_cli.model.contracts import Features, Matte, ObjectTokens, Presence, ReferenceFeatures
from icm_cli.model.decoding import ConvNormReLU, confidence_and_found, make_alpha_layers, resize_bilinear, upsample_2x
from icm_cli.model.lite.finetuning import FinetunableHead, MatchPrediction
from icm_cli.model.similarity import (
    ReferenceTokens,
    SelfSimilarity,
    flatten_tokens,
    similarity_difference,
    split_reference_tokens,
    without_autocast,
)

EVIDENCE_CHANNELS = 8
"""Evidence values per token and comparison; :meth:`TokenMatchHead.compute_evidence` lists them."""
MEAN_SIMILARITY = slice(4, 6)
"""Indices of the evidence values that are the similarity to the mean foreground and to the mean background."""
FIRST_TRANSFERRED = 6
"""Index of the evidence value that is the transferred guidance."""
PRESENCE_EVIDENCE = (0, 1, FIRST_TRANSFERRED)
"""Indices of the evidence values that predict presence: the maximum of each one over the image is an input."""
PRESENCE_CHANNELS = 2 + len(PRESENCE_EVIDENCE)
"""Presence inputs per comparison: similarity to the mean foreground, to the mean background, and these maxima."""
PRESENCE_WIDTH = 64
"""Hidden units of the presence prediction."""
MIN_TOKEN_WEIGHT = 1e-3
"""Smallest weight of a token in the mean of the object. If nothing is found, the mean is that of the whole image."""
NEGATIVE_MARGIN = 0.1
"""A token is excluded if it is more similar to negatives than to the object, by more than this.

The similarity is the cosine to the nearest token.
"""
NO_TOKEN_LOGIT = -20.0
"""Presence logit of an image whose tokens are all excluded."""
IMAGE_CHANNELS = 3
ATTENTION_HEADS = 4


@dataclass(frozen=True)
class TokenMatchConfig(Section, title="head"):
    """Settings of the token-match head. The channels of the features must be those of the backbone."""

    feature_channels: tuple[int, ...] = (384, 384, 384, 120, 208, 352)
    """Channels of each layer in the correspondence features."""
    width: int = limited(64, 1)
    """Channels in which the tokens of each layer are compared."""
    context_width: int = limited(192, 1)
    """Channels of the attention layers."""
    context_layers: int = limited(2, 0, 64)
    """Number of attention layers."""
    fused_channels: int = limited(128, 1)
    """Channels of the fused tokens, from which the coarse alpha is computed and which enter the decoder."""
    skip_channels: tuple[int, ...] = (48, 24, 16)
    """Channels of the backbone's features per scale, from coarse to fine.

    The first scale has twice the resolution of the tokens, and each further scale twice that of the one before. They
    are inputs of the first decoder steps.
    """
    decoder_channels: tuple[int, ...] = (96, 64, 32, 24, 16)
    """Channels after each decoder step; a step doubles the resolution.

    Steps without a feature scale read the image. If the tuple is empty, the coarse alpha is the result. If the last
    step is smaller than the canvas, its alpha is enlarged bilinearly.
    """
    temperature: float = limited(0.05, above=0)
    """Initial temperature of the comparisons, in cosine units; it is learned."""
    presence_sharpness: float = limited(4.0, above=0)
    """Inference only: factor of the presence logit."""
    presence_threshold: float = 0.0
    """Inference only: presence logit above which the object counts as present."""
    presence_margin: float = limited(0.0, below=20)
    """Inference only: a presence is uncertain if the absolute value of its logit is below this; 0 disables it.

    If it is uncertain, models with edges run a second pass on a crop.
    """
    edge_radius: float = limited(0.03, below=0.5)
    """Inference only: radius of the guided filter that aligns soft edges with the image; 0 disables it.

    It is a fraction of the long side of the canvas.
    """
    edge_epsilon: float = limited(1e-4, above=0)
    """Variance of a colour channel (0..1) above which the guided filter preserves an edge."""
    edge_stride: int = limited(4, above=0)
    """The guided filter computes its coefficients on an image that is this many times smaller."""
    alpha_stretch: float = limited(0.03, below=0.5)
    """Inference only: alphas below this and above 1 - this become about 0 and 1; values between are stretched."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("feature_channels", bool(self.feature_channels), "at least one value")
        if self.decoder_channels:
            is_valid = len(self.decoder_channels) >= len(self.skip_channels)
            expected = f"at least as many values as skip_channels has, {len(self.skip_channels)}, or an empty list"
            self.check("decoder_channels", is_valid, expected)
        for name in ("feature_channels", "skip_channels", "decoder_channels"):
            self.check(name, min(getattr(self, name), default=1) >= 1, "numbers of 1 or more")
        self.check("context_width", self.context_width % ATTENTION_HEADS == 0, f"a multiple of {ATTENTION_HEADS}")

    @property
    def comparisons(self) -> int:
        """Number of comparisons: one per layer, and one of all layers together."""
        return len(self.feature_channels) + 1


class TokenMatchHead(FinetunableHead):
    """Compares the tokens of a target with those of the references, and decodes an alpha from the result."""

    Config = TokenMatchConfig
    can_compare_objects = True

    def __init__(self, config: TokenMatchConfig) -> None:
        super().__init__()
        self.config = config
        self.project = nn.ModuleList(nn.Linear(channels, config.width) for channels in config.feature_channels)
        self.log_sharpness = nn.Parameter(torch.full((config.comparisons, 1, 1), -math.log(config.temperature)))
        self.background_null = nn.Parameter(torch.zeros(config.comparisons, 1, 1))
        # The evidence of each token, and its difference from the largest one in the image.
        evidence = 2 * EVIDENCE_CHANNELS * config.comparisons
        self.project_features = nn.Conv2d(sum(config.feature_channels), config.context_width, 1)
        self.project_evidence = nn.Conv2d(evidence, config.context_width, 1)
        self.context = nn.ModuleList(ContextLayer(config.context_width) for _ in range(config.context_layers))
        self.fusion = ConvNormReLU(config.context_width + evidence, config.fused_channels)
        self.coarse = nn.Conv2d(config.fused_channels, 1, 1)
        self.presence_mlp = nn.Sequential(
            nn.Linear(PRESENCE_CHANNELS * config.comparisons + config.fused_channels, PRESENCE_WIDTH),
            nn.ReLU(),
            nn.Linear(PRESENCE_WIDTH, 1),
        )

        self.decoder_steps = len(config.decoder_channels)
        image_steps = self.decoder_steps - len(config.skip_channels)
        self.decoder_uses_image = image_steps > 0
        self.steps = nn.ModuleList()
        if config.decoder_channels:
            widths = itertools.pairwise((config.fused_channels, *config.decoder_channels))
            skip_channels = (*config.skip_channels, *[IMAGE_CHANNELS] * image_steps)
            for (inputs, outputs), skipped in zip(widths, skip_channels, strict=True):
                self.steps.append(ConvNormReLU(inputs + skipped, outputs))
            self.output = make_alpha_layers(config.decoder_channels[-1], config.decoder_channels[-1])

    @torch.no_grad()
    def initialise_from_pca(self, samples: Tensor) -> None:
        """Initialise the token projections with the principal components of sample tokens [N,C].

        The mean of the tokens is subtracted: it is what they have in common. So similarity is meaningful before
        training.
        """
        layers = torch.split(samples, list(self.config.feature_channels), dim=1)
        for project, layer in zip(self.project, layers, strict=True):
            assert isinstance(project, nn.Linear)
            mean = layer.mean(dim=0)
            _, vectors = torch.linalg.eigh((layer - mean).T @ (layer - mean) / len(layer))  # in ascending order
            components = vectors[:, -project.out_features :].T
            project.weight[: len(components)] = components
            project.weight[len(components) :] = 0.0  # if the layer has fewer channels than the projection
            project.bias.copy_(-project.weight @ mean)

    def prepare_references(self, references: Sequence[ReferenceFeatures]) -> ReferenceTokens:
        """Project the tokens of the references; they have unit length in every layer."""
        return split_reference_tokens(references, self.project_tokens)

    def forward(self, target: Features, references: Sequence[ReferenceTokens], image: Tensor, valid: Tensor) -> Matte:
        config, size = self.config, image.shape[-2:]
        projected = self.project_tokens(target.correspondence_features)
        evidence = self.compute_evidence(projected, target.valid, references)
        fused = self.fuse_features(target, evidence)
        possible = self._possible_tokens(fused, projected, target.valid, references)
        presence_mask = target.valid if possible is None else possible
        presence_logit = self.presence_logit(fused, projected, evidence, presence_mask, references)
        alpha = torch.sigmoid(resize_bilinear(self.decode_logit(fused, target, image), size))
        if possible is not None:
            possible_area = resize_bilinear(possible[:, None].float(), size)
            frame_area = resize_bilinear(target.valid[:, None].float(), size)
            alpha = alpha * (possible_area / frame_area.clamp(min=1e-6))  # the padding must not darken the border
            presence_logit = presence_logit.where(possible.flatten(1).any(dim=1), NO_TOKEN_LOGIT)
        if self.training:
            alpha = alpha * torch.sigmoid(presence_logit)[:, None, None, None]
            return Matte(alpha, *confidence_and_found(alpha.detach(), valid))
        if config.edge_radius:
            alpha = align_to_edges(alpha, image.float(), config.edge_radius, config.edge_epsilon, config.edge_stride)
        similarity = self._object_similarity(alpha, evidence, target.valid)
        sharpened = self.sharpen_presence(presence_logit)
        final = self._stretch_contrast(alpha * torch.sigmoid(sharpened)[:, None, None, None])
        is_uncertain = presence_logit.abs() < config.presence_margin
        presence = Presence(sharpened, self._stretch_contrast(alpha), is_uncertain)
        objects = self._object_tokens(projected, target.valid, references, image.shape[-1] // target.valid.shape[-1])
        return Matte(final, *confidence_and_found(final, valid), presence, similarity, objects)

    def _object_tokens(
        self, projected: Tensor, valid: Tensor, references: Sequence[ReferenceTokens], cell_px: int
    ) -> list[ObjectTokens]:
        """Return ``Matte.object_tokens``. ``cell_px``: side of a token's cell on the canvas."""
        layers = len(self.config.feature_channels), self.config.width
        grids = projected.reshape(*valid.shape, *layers).permute(0, 3, 4, 1, 2)
        return [
            ObjectTokens(
                grid,
                [mean.reshape(layers) for mean in reference.object_means],
                [mean.reshape(layers) for mean in reference.negative_means],
                cell_px,
            )
            for grid, reference in zip(grids, references, strict=True)
        ]

    def _object_similarity(self, alpha: Tensor, evidence: Tensor, valid: Tensor) -> Tensor:
        """Return ``Matte.similarity`` for alphas [B,1,H,W], from the comparison of all layers together."""
        weight = F.avg_pool2d(alpha, alpha.shape[-1] // valid.shape[-1]) * valid[:, None]
        all_layers = evidence[:, -EVIDENCE_CHANNELS:]
        weighted_sum = (all_layers[:, MEAN_SIMILARITY] * weight).sum(dim=(2, 3))
        return weighted_sum / weight.sum(dim=(2, 3)).clamp(min=MIN_TOKEN_WEIGHT)

    def _possible_tokens(
        self, fused: Tensor, projected: Tensor, valid: Tensor, references: Sequence[ReferenceTokens]
    ) -> Tensor | None:
        """Return the valid tokens that may be the object, bool [B,h,w]; None without negative references.

        A token is excluded if it is nearer to a negative reference than to the object by more than NEGATIVE_MARGIN.
        The mean over the 5 x 5 tokens around it decides, weighted by the coarse alpha: single tokens of the object may
        be nearer to a negative reference by chance.
        """
        if all(tokens.negative is None for tokens in references):
            return None
        layers = len(self.config.feature_channels)
        difference = projected.new_zeros(valid.shape)
        for index, tokens in enumerate(references):
            if tokens.negative is not None:
                sum_over_layers = similarity_difference(projected[index], tokens.negative, tokens.foreground)
                difference[index] = (sum_over_layers / layers).view(valid.shape[1:])
        weight = (torch.sigmoid(self._coarse_logit(fused)) + MIN_TOKEN_WEIGHT) * valid[:, None]
        averaged = F.avg_pool2d(torch.cat([difference[:, None] * weight, weight], dim=1), 5, stride=1, padding=2)
        mean_times_weight, mean_weight = averaged[:, 0], averaged[:, 1]
        return valid & (mean_times_weight <= NEGATIVE_MARGIN * mean_weight)

    def predict_match(
        self, target: Features, references: Sequence[ReferenceTokens], image: Tensor | None
    ) -> MatchPrediction:
        projected = self.project_tokens(target.correspondence_features)
        evidence = self.compute_evidence(projected, target.valid, references)
        fused = self.fuse_features(target, evidence)
        presence = self.presence_logit(fused, projected, evidence, target.valid, references)
        fine = self.decode_logit(fused, target, image)[:, 0]
        transferred = evidence[:, FIRST_TRANSFERRED::EVIDENCE_CHANNELS]
        return MatchPrediction(self._coarse_logit(fused)[:, 0], fine, transferred, presence)

    def similarity_maps(self, target: Features, references: Sequence[ReferenceTokens]) -> tuple[Tensor, Tensor]:
        """Return the transferred guidance, and the same propagated by intra-similarity, float32 [B,1,h,w]."""
        evidence = self.compute_evidence(self.project_tokens(target.correspondence_features), target.valid, references)
        shape = (len(evidence), self.config.comparisons, EVIDENCE_CHANNELS, *evidence.shape[2:])
        mean_evidence = evidence.reshape(shape).mean(dim=1)
        return mean_evidence[:, FIRST_TRANSFERRED : FIRST_TRANSFERRED + 1], mean_evidence[:, -1:]

    def project_tokens(self, feature: Tensor) -> Tensor:
        """Project features [B,C,h,w] to tokens float32 [B,N,layers*width] of unit length in every layer."""
        if feature.shape[1] != sum(self.config.feature_channels):
            raise ConfigError(
                f"head feature_channels add up to {sum(self.config.feature_channels)}, but the "
                f"backbone's correspondence features have {feature.shape[1]} channels; set "
                "feature_channels to those of the backbone's layers"
            )
        layers = torch.split(flatten_tokens(feature), list(self.config.feature_channels), dim=-1)
        projected = [project(layer) for project, layer in zip(self.project, layers, strict=True)]
        return torch.cat([F.normalize(layer, dim=-1) for layer in projected], dim=-1)

    def compute_evidence(self, projected: Tensor, valid: Tensor, references: Sequence[ReferenceTokens]) -> Tensor:
        """Compare the result of :meth:`project_tokens` with the references of each target.

        There is one comparison per layer of features, and one of their mean similarity. Returns float32
        [B,8*comparisons,h,w], with these values for each token and comparison:

        - 0, 1: soft and hard maximum of the similarity to the foreground tokens;
        - 2, 3: the same for the background tokens;
        - 4, 5: similarity to the mean foreground token, and to the mean background token;
        - 6: guidance that softmax attention transfers from the references, -1..1;
        - 7: value 6, propagated by intra-similarity.
        """
        height, width = valid.shape[1:]
        targets = zip(projected, references, strict=True)
        compared = torch.stack([self._compare_tokens(tokens, reference) for tokens, reference in targets])
        transferred = compared[..., FIRST_TRANSFERRED]  # [B,comparisons,N]
        feature = projected.transpose(1, 2).reshape(len(projected), -1, height, width)
        intra_similarity = SelfSimilarity(feature, valid, self.config.temperature)
        propagated = intra_similarity.propagate(transferred.transpose(1, 2)).transpose(1, 2)
        evidence = torch.cat([compared, propagated[..., None]], dim=-1)  # [B,comparisons,N,8]
        return evidence.transpose(2, 3).reshape(len(evidence), -1, height, width)

    def fuse_features(self, target: Features, evidence: Tensor) -> Tensor:
        """Return the target's features fused with the evidence of :meth:`compute_evidence`, [B,fused_channels,h,w].

        In addition to the evidence of a token, its difference from the largest one in the image is used.
        """
        valid_evidence = evidence.masked_fill(~target.valid[:, None], float("-inf"))
        largest = valid_evidence.amax(dim=(2, 3), keepdim=True).expand_as(evidence)
        dtype = self.project_features.weight.dtype
        both = torch.cat([evidence, evidence - largest], dim=1).to(dtype)
        x = self.project_features(target.correspondence_features.to(dtype)) + self.project_evidence(both)
        for layer in self.context:
            x = layer(x, target.valid)
        return self.fusion(torch.cat([x, both], dim=1))

    @without_autocast
    def presence_logit(
        self, fused: Tensor, projected: Tensor, evidence: Tensor, valid: Tensor, references: Sequence[ReferenceTokens]
    ) -> Tensor:
        """Predict whether the object is in the image at all, as a logit, float32 [B].

        Inputs of the MLP are:

        - similarity of the mean token, weighted by the coarse alpha, to the mean foreground and background token;
        - maximum over the image of the evidence values PRESENCE_EVIDENCE;
        - maximum over the image of every fused channel.
        """
        weight = (torch.sigmoid(self._coarse_logit(fused)) + MIN_TOKEN_WEIGHT) * valid[:, None]
        object_mean = self._unit_per_layer((weight.flatten(1)[..., None] * projected).sum(dim=1))
        sides = [torch.stack([tokens.foreground.sum(dim=0), tokens.background.sum(dim=0)]) for tokens in references]
        similarity = (self._unit_per_layer(torch.stack(sides)) * object_mean[:, None]).sum(dim=-1)  # [B,2,layers]
        similarity = torch.cat([similarity, similarity.mean(dim=-1, keepdim=True)], dim=-1)
        valid_evidence = evidence.masked_fill(~valid[:, None], float("-inf"))
        maxima = valid_evidence.flatten(2).amax(dim=2).reshape(len(evidence), -1, EVIDENCE_CHANNELS)
        strongest = maxima[..., PRESENCE_EVIDENCE]
        fused_maxima = fused.float().masked_fill(~valid[:, None], 0.0).amax(dim=(2, 3))
        inputs = torch.cat([similarity.flatten(1), strongest.flatten(1), fused_maxima], dim=1)
        return self.presence_mlp(inputs)[:, 0]

    def sharpen_presence(self, logit: Tensor) -> Tensor:
        """Apply ``presence_threshold`` and ``presence_sharpness`` to a presence logit [B], for inference."""
        return self.config.presence_sharpness * (logit - self.config.presence_threshold)

    def decode_logit(self, fused: Tensor, target: Features, image: Tensor | None) -> Tensor:
        """Decode the logit of alpha, float32 [B,1,H',W'], at the resolution of the last decoder step.

        ``image`` [B,3,H,W] may be None if ``decoder_uses_image`` is false.
        """
        if not self.config.decoder_channels:
            return self._coarse_logit(fused)
        x = fused
        for step, skipped in zip(self.steps, self._skip_features(target, image), strict=True):
            x = step(torch.cat([upsample_2x(x), skipped.to(x.dtype)], dim=1))
        return self.output(x).float()

    def _coarse_logit(self, fused: Tensor) -> Tensor:
        """Return the logit of the coarse alpha, float32 [B,1,h,w]."""
        return self.coarse(fused.to(self.coarse.weight.dtype)).float()

    def _skip_features(self, target: Features, image: Tensor | None) -> list[Tensor]:
        """Return the inputs of the decoder steps: the backbone's feature scales, then the image at -2..2.

        Step number ``step`` has 2 ** ``step`` times the resolution of the tokens.
        """
        features = []
        height, width = target.valid.shape[-2:]
        for step, channels in enumerate(self.config.skip_channels, start=1):
            size = (height << step, width << step)
            scale = next((scale for scale in target.scale_features.values() if scale.shape[-2:] == size), None)
            if scale is None or scale.shape[1] != channels:
                actual = "no features" if scale is None else f"{scale.shape[1]} channels"
                raise ConfigError(
                    f"head skip_channels is {channels} at {1 << step} times the tokens' resolution, where the "
                    f"backbone has {actual}; set skip_channels to the channels of its scale_blocks"
                )
            features.append(scale)
        for step in range(len(features) + 1, len(self.steps) + 1):
            assert image is not None
            cell_px = image.shape[-1] / (width << step)
            if cell_px < 1 or cell_px % 1 != 0:
                raise ConfigError(
                    f"head decoder_channels has {len(self.steps)} steps, which is more than the backbone's tokens of "
                    f"{image.shape[-1] // width} px allow; expected at most one step per doubling"
                )
            reduced = image if cell_px == 1 else F.avg_pool2d(image, int(cell_px))
            features.append(4.0 * reduced - 2.0)
        return features

    def _stretch_contrast(self, alpha: Tensor) -> Tensor:
        """Apply ``alpha_stretch``: values near 0 become 0, and values near 1 become 1."""
        return (alpha * (1.0 + 2.0 * self.config.alpha_stretch) - self.config.alpha_stretch).clamp(0.0, 1.0)

    def _unit_per_layer(self, total: Tensor) -> Tensor:
        """Normalise sums of tokens [...,C] per layer: [...,layers,width]; 0 stays 0."""
        return F.normalize(total.reshape(*total.shape[:-1], -1, self.config.width), dim=-1)

    def _split_layers(self, tokens: Tensor) -> Tensor:
        """Return projected tokens [N,layers*width] per layer: [layers,N,width]."""
        return tokens.reshape(len(tokens), len(self.config.feature_channels), self.config.width).transpose(0, 1)

    @without_autocast
    def _compare_tokens(self, target: Tensor, reference: ReferenceTokens) -> Tensor:
        """Compare the tokens of one target: [comparisons,N,7], all values of :meth:`compute_evidence` but the last."""
        sharpness = self.log_sharpness.exp().clamp(max=100.0)
        inside, outside, tokens = map(self._split_layers, (reference.foreground, reference.background, target))
        foreground = _append_mean_layer(tokens @ inside.transpose(1, 2))  # similarities [comparisons,N,K]
        # A reference may have no background. So there is an additional background token, the null, whose similarity
        # to all tokens is learned. It counts as often as there are foreground tokens; otherwise it would have less
        # weight on a finer grid.
        null = (self.background_null + _log_count(foreground) / sharpness).expand(-1, len(target), 1)
        background = torch.cat([_append_mean_layer(tokens @ outside.transpose(1, 2)), null], dim=2)
        soft_foreground = (sharpness * foreground).logsumexp(dim=2, keepdim=True) / sharpness
        soft_background = (sharpness * background).logsumexp(dim=2, keepdim=True) / sharpness
        transferred = torch.tanh(0.5 * sharpness * (soft_foreground - soft_background))
        values = [
            soft_foreground - _log_count(foreground) / sharpness,
            foreground.amax(dim=2, keepdim=True),
            soft_background - _log_count(background) / sharpness,
            background.amax(dim=2, keepdim=True),
            foreground.mean(dim=2, keepdim=True),
            background.mean(dim=2, keepdim=True),
            transferred,
        ]
        return torch.cat(values, dim=2)


class ContextLayer(nn.Module):
    """Transformer layer over the valid tokens of a target: [B,C,h,w] -> [B,C,h,w]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, feature: Tensor, valid: Tensor) -> Tensor:
        x = flatten_tokens(feature)
        query, key, value = self.qkv(self.norm1(x)).unflatten(2, (3, ATTENTION_HEADS, -1)).permute(2, 0, 3, 1, 4)
        mask = None if bool(valid.all()) else valid.flatten(1)[:, None, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        return x.transpose(1, 2).unflatten(2, feature.shape[-2:]).to(feature.dtype)


def _append_mean_layer(similarity: Tensor) -> Tensor:
    """Append the mean over layers to similarities: [layers,N,K] -> [layers + 1,N,K]."""
    return torch.cat([similarity, similarity.mean(dim=0, keepdim=True)])


def _log_count(similarity: Tensor) -> Tensor:
    """Return the logarithm of the number K of compared tokens of similarities [layers,N,K]."""
    return similarity.new_tensor(float(similarity.shape[2])).log()
