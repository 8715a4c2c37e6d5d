"""The head for use without a trained decoder: evidence, trimap, closed-form matting.

The reference decides. Every token of the target is compared with the reference's tokens inside and outside the
guidance; unlike the softmax S of the paper's equation 3, which always sums to K, these similarities are not
normalised over the target and can therefore say "absent". Intra-similarity spreads them over alike tokens
(section 3.3), what lies near the decision becomes the trimap's unknown, and closed-form matting solves it.

Another rule decides by clusters of the target's tokens, as INSID3 does: see ``icm_cli.model.training_free.clusters``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from icm_cli.errors import ConfigError
from icm_cli.geometry import downscaled_size, trimap_of_coarse
from icm_cli.model.contracts import Features, Head, Matte, ReferenceFeatures
from icm_cli.model.similarity import ReferenceTokens, flatten_tokens, split_reference_tokens
from icm_cli.model.training_free.closed_form import load_solver, solve_alpha
from icm_cli.model.training_free.clusters import segment_by_clusters


@dataclass(frozen=True)
class TrainingFreeConfig:
    """Settings of the training-free head; similarities are cosines, of centred features by the rule "contrast"."""

    rule: Literal["contrast", "clusters"] = "contrast"
    """Rule that says which tokens are the thing: "contrast", each by its likeness to the reference's tokens inside and
    outside the guidance; "clusters", groups of tokens by INSID3's steps."""
    temperature: float = 0.07
    """Temperature of the soft maximum over the reference's tokens, in cosine units; more than 0."""
    likeness_temperature: float = 0.1
    """The same where it is judged whether the thing is there at all, which asks for more tokens to agree."""
    background_weight: float = 0.5
    """Weight with which likeness to the reference's background counts against a token; 0 or more."""
    threshold: float = 0.25
    """Evidence that parts foreground from background, as a share of the strongest; between 0 and 1."""
    absent_below: float = 0.24
    """The thing is absent if its likeness to the reference, as a share of the reference's likeness to itself, stays
    below this; 0 (never absent) to 1."""
    instance_share: float = 0.8
    """A connected region is foreground only if its best evidence is at least this share of the target's best; 0 (every
    region) to 1 (one region alone)."""
    unknown_share: float = 0.15
    """Share of the pixels left unknown for closed-form matting; between 0 and 1, its time grows with it."""
    solve_long_side_px: int = 640
    """Long side at which closed-form matting is solved, at most."""
    candidate_above: float = 0.0
    """Rule "clusters": least cosine of a candidate to the reference's prototype; -1 to 1."""
    group_cosine: float = 0.6
    """Rule "clusters": mean cosine down to which clusters are merged (the paper's tau); between 0 and 1."""
    join_above: float = 0.2
    """Rule "clusters": least score with which a cluster joins the seed; 0 to 1."""
    cluster_band: float = 0.01
    """Rule "clusters": width of the unknown beside the edge, as a share of the long side; between 0 and 0.5."""

    def __post_init__(self) -> None:
        for name in ("threshold", "unknown_share"):
            _require(name, getattr(self, name), 0 < getattr(self, name) < 1, "between 0 and 1")
        for name in ("temperature", "likeness_temperature"):
            _require(name, getattr(self, name), getattr(self, name) > 0, "more than 0")
        _require("background_weight", self.background_weight, self.background_weight >= 0, "0 or more")
        _require("instance_share", self.instance_share, 0 <= self.instance_share <= 1, "0 to 1")
        _require("absent_below", self.absent_below, 0 <= self.absent_below <= 1, "0 to 1")
        _require("candidate_above", self.candidate_above, -1 <= self.candidate_above <= 1, "-1 to 1")
        _require("group_cosine", self.group_cosine, 0 < self.group_cosine < 1, "between 0 and 1")
        _require("join_above", self.join_above, 0 <= self.join_above <= 1, "0 to 1")
        _require("cluster_band", self.cluster_band, 0 < self.cluster_band < 0.5, "between 0 and 0.5")
        _require("solve_long_side_px", self.solve_long_side_px, self.solve_long_side_px >= 64, "at least 64")


def _require(name: str, value: float, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigError(f"head {name} is {value}; expected {expected}")


TOKENS_AT_A_TIME = 512
"""Target tokens compared at a time: bounds the working memory with many references."""


@dataclass(frozen=True)
class Evidence:
    """Evidence of the reference about one target's valid tokens, on their grid.

    ``contrast`` [h,w]: likeness to the foreground, less that to the background, spread by intra-similarity; by the rule
    "clusters" 1 inside the thing and 0 outside.
    ``likeness``: how well the reference's foreground is met in the target, as a share of how well it meets itself.
    """

    contrast: Tensor
    likeness: float


class TrainingFree(Head):
    """Evidence by inter-similarity, trimap, closed-form matting; nothing is trained."""

    Config = TrainingFreeConfig
    needs_attention_matrix = False
    is_trained = False

    def __init__(self, config: TrainingFreeConfig) -> None:
        super().__init__()
        self.config = config
        self._solves = True

    def disable_edge_refinement(self) -> None:
        self._solves = False

    def prepare_references(self, references: Sequence[ReferenceFeatures]) -> ReferenceTokens:
        """Their tokens are not centred yet: the target has a say in the centre."""
        if self._solves:
            load_solver()  # with the model, not with the first image
        return split_reference_tokens(references, flatten_tokens)

    def forward(self, target: Features, references: Sequence[Any], image: Tensor, valid: Tensor) -> Matte:
        """Each image of the batch by itself; see :class:`~icm_cli.model.contracts.Matte`.

        ``confidence`` is the likeness of :class:`Evidence`, at most 1.
        """
        alpha = torch.zeros_like(image[:, :1])
        stride = image.shape[-1] // target.correspondence.shape[-1]
        evidences = self.evidence(target, references, stride)
        found = [self._is_found(evidence) for evidence in evidences]
        for index, evidence in enumerate(evidences):
            if found[index]:
                height, width = _content(valid[index])
                fine = _magnified(evidence.contrast, stride)[:height, :width]
                alpha[index, 0, :height, :width] = self._matte(fine.cpu(), image[index, :, :height, :width].cpu())
        confidence = alpha.new_tensor([evidence.likeness for evidence in evidences]).clamp(0, 1)
        return Matte(alpha, confidence, torch.tensor(found, device=alpha.device))

    def _is_found(self, evidence: Evidence) -> bool:
        return evidence.likeness >= self.config.absent_below and bool(evidence.contrast.max() > 0)

    def evidence(self, target: Features, references: Sequence[ReferenceTokens], stride: int) -> list[Evidence]:
        """Evidence for each target of the batch by its reference; ``stride`` is that of the correspondence feature."""
        if self.config.rule == "clusters":
            return self._by_clusters(target, references)
        height, width = target.valid.shape[1:]
        contrast = target.correspondence.new_zeros(target.valid.shape)
        all_tokens = flatten_tokens(target.correspondence)
        likeness = []
        for index, (valid, reference) in enumerate(zip(target.valid, references, strict=True)):
            found, share = self._compare(all_tokens[index, valid.flatten()], reference)
            contrast[index, valid] = found
            likeness.append(share)
        spread = target.intra[stride].propagate(contrast.flatten(1)[..., None]).view(-1, height, width)
        return [
            Evidence(grid[: _content(valid)[0], : _content(valid)[1]], share)
            for grid, valid, share in zip(spread, target.valid, likeness, strict=True)
        ]

    def _by_clusters(self, target: Features, references: Sequence[ReferenceTokens]) -> list[Evidence]:
        """Evidence by INSID3's steps, each target by itself."""
        config, matched = self.config, flatten_tokens(target.correspondence)
        grouping = matched if target.grouping is None else flatten_tokens(target.grouping)
        evidences = []
        for index, (valid, reference) in enumerate(zip(target.valid, references, strict=True)):
            found = segment_by_clusters(
                matched[index, valid.flatten()],
                grouping[index, valid.flatten()],
                reference,
                candidate_above=config.candidate_above,
                group=config.group_cosine,
                join=config.join_above,
            )
            grid = matched.new_zeros(valid.shape)
            grid[valid] = found.inside.to(grid.dtype)
            evidences.append(Evidence(grid[: _content(valid)[0], : _content(valid)[1]], found.likeness))
        return evidences

    def _compare(self, target: Tensor, reference: ReferenceTokens) -> tuple[Tensor, float]:
        """Contrast [N] and likeness of one target's valid tokens [N,C]."""
        shown = torch.cat([reference.foreground, reference.background])
        centre = (target.mean(dim=0) + shown.mean(dim=0)) / 2
        unit, foreground, background = (
            F.normalize(part - centre, dim=-1) for part in (target, reference.foreground, reference.background)
        )
        to_foreground = soft_max_similarity(foreground, unit, self.config.temperature)
        to_background = soft_max_similarity(background, unit, self.config.temperature)
        contrast = to_foreground - self.config.background_weight * to_background
        return contrast, self._likeness(foreground, unit)

    def _likeness(self, foreground: Tensor, target: Tensor) -> float:
        """Likeness of [N,C] to the reference's foreground [K,C], as a share of how well that meets itself."""
        best = soft_max_similarity(foreground, target, self.config.likeness_temperature).max()
        return float(best / soft_max_similarity(foreground, foreground, self.config.likeness_temperature).mean())

    def _matte(self, contrast: Tensor, image: Tensor) -> Tensor:
        """Alpha [H,W] of one frame without padding: contrast [H,W], sRGB [3,H,W] in 0..1, on the CPU.

        It is the trimap itself where edges come after.
        """
        size = downscaled_size(image.shape[1:], self.config.solve_long_side_px)
        small = F.interpolate(torch.cat([image, contrast[None]])[None], size=size, mode="area")[0]
        rgb, evidence = small[:3].permute(1, 2, 0), small[3]
        if self.config.rule == "clusters":
            trimap = torch.from_numpy(trimap_of_coarse(evidence.numpy(), size, self.config.cluster_band))
        else:
            trimap = self.trimap(evidence)
        alpha = trimap
        if self._solves:
            alpha = torch.from_numpy(solve_alpha(rgb.double().numpy(), trimap.double().numpy())).float()
        return F.interpolate(alpha[None, None], size=image.shape[1:], mode="bilinear", align_corners=False)[0, 0]

    def trimap(self, contrast: Tensor) -> Tensor:
        """Contrast [H,W] -> trimap [H,W] of 0, 0.5 and 1: unknown are the pixels nearest to the decision.

        The upper half of the evidence above the decision is never unknown: a small thing keeps a foreground.
        """
        strongest = contrast.max()
        decision = self.config.threshold * strongest
        doubt = (contrast - decision).abs().masked_fill(contrast > (decision + strongest) / 2, torch.inf).flatten()
        unknown = doubt.argsort(stable=True)[: math.floor(doubt.numel() * self.config.unknown_share)]
        trimap = (contrast > decision).float()
        trimap.view(-1)[unknown[doubt[unknown].isfinite()]] = 0.5
        trimap[~keep_strong_regions(contrast, trimap > 0, self.config.instance_share)] = 0.0
        return trimap


def keep_strong_regions(evidence: Tensor, inside: Tensor, share: float) -> Tensor:
    """Keep the connected regions of ``inside`` [H,W] bool whose best evidence is ``share`` of the best, [H,W].

    Another object is often a region of its own that is like the reference by a little: it is no instance of it.
    """
    count, label = cv2.connectedComponents(inside.numpy().astype(np.uint8))
    region = torch.from_numpy(label).long().flatten()
    best = evidence.new_full((count,), -torch.inf).scatter_reduce(0, region, evidence.flatten(), "amax")
    is_strong = best >= share * best.max()
    is_strong[0] = False
    return is_strong[region].view(inside.shape)


def soft_max_similarity(reference: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Likeness of each target token to the reference's tokens: temperature * log mean exp(cosine / temperature).

    reference [K,C] and target [N,C] of unit length -> [N]; 0, neither like nor unlike, if K = 0.
    """
    if not len(reference):
        return target.new_zeros(len(target))
    parts = torch.split(target, TOKENS_AT_A_TIME)
    sums = [(part @ reference.T / temperature).logsumexp(dim=1) for part in parts]
    return temperature * (torch.cat(sums) - math.log(len(reference)))


def _magnified(grid: Tensor, factor: int) -> Tensor:
    """Tokens [h,w] -> pixels [h*factor,w*factor], bicubic."""
    return F.interpolate(grid[None, None], scale_factor=factor, mode="bicubic", align_corners=False)[0, 0]


def _content(valid: Tensor) -> tuple[int, int]:
    """Height and width of the frame in valid [H,W]; it lies in the top left corner."""
    return int(valid.any(dim=1).sum()), int(valid.any(dim=0).sum())
