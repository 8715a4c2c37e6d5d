"""The training-free head: evidence by token comparison, a trimap, and closed-form matting.

Every token of the target is compared with the reference's tokens inside and outside the guidance. Unlike the softmax S
of the paper (equation 3), which always sums to K, these similarities can show that the object is absent.
Intra-similarity propagates them to similar tokens (section 3.3). Pixels near the decision threshold become the unknown
region of a trimap, which closed-form matting solves. A second rule segments the target by clusters of its tokens.
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
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from icm_cli.config import Section, limited
from icm_cli.geometry import downscaled_size, trimap_from_coarse
from icm_cli.model.contracts import Features, Head, Matte, ReferenceFeatures
from icm_cli.model.similarity import (
    CHUNK_TOKENS,
    ReferenceTokens,
    flatten_tokens,
    similarity_difference,
    split_reference_tokens,
)
from icm_cli.model.training_free.closed_form import load_solver, solve_alpha


@dataclass(frozen=True)
class TrainingFreeConfig(Section, title="head"):
    """Settings of the training-free head. Similarities are cosines; the rule "contrast" centres the features first."""

    rule: Literal["contrast", "clusters"] = "contrast"
    """Rule that decides which tokens belong to the object. "contrast" compares each token with the reference's tokens
    inside and outside the guidance. "clusters" decides by clusters of tokens, as INSID3 does."""
    temperature: float = limited(0.07, above=0)
    """Temperature of the soft maximum over the reference's tokens, in cosine units."""
    presence_temperature: float = limited(0.1, above=0)
    """Temperature for the decision whether the object is present. A higher one requires more tokens to agree."""
    background_weight: float = limited(0.5)
    """Weight of the similarity to the reference's background, which is subtracted."""
    threshold: float = limited(0.25, above=0, below=1)
    """Evidence above which a pixel is foreground, as a fraction of the strongest evidence."""
    absent_below: float = limited(0.24, 0, 1)
    """The object is absent if its similarity to the reference is below this fraction of the reference's to itself."""
    instance_fraction: float = limited(0.8, 0, 1)
    """Evidence that a connected region needs to be foreground, as a fraction of the strongest evidence."""
    unknown_fraction: float = limited(0.15, above=0, below=1)
    """Fraction of the pixels that are unknown for closed-form matting. A larger fraction takes longer."""
    solve_long_side_px: int = 640
    """Largest long side at which closed-form matting is solved, in px."""
    min_candidate_cosine: float = limited(0.0, -1, 1)
    """Rule "clusters": smallest cosine of a candidate to the prototype of the reference."""
    min_cluster_cosine: float = limited(0.6, above=0, below=1)
    """Rule "clusters": smallest mean cosine at which clusters are merged (tau in the paper)."""
    min_join_score: float = limited(0.2, 0, 1)
    """Rule "clusters": smallest score of a cluster that is added to the seed."""
    edge_band: float = limited(0.01, above=0, below=0.5)
    """Rule "clusters": width of the unknown region at the edge, as a fraction of the long side."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("solve_long_side_px", self.solve_long_side_px >= 64, "at least 64")


@dataclass(frozen=True)
class Evidence:
    """Evidence for the object in one target."""

    contrast: Tensor
    """Similarity to the foreground minus weighted similarity to the background, propagated by intra-similarity, [h,w].
    With the rule "clusters", 1 inside the object and 0 outside."""
    similarity: float
    """Similarity of the target to the reference's foreground, as a fraction of the foreground's similarity to itself.
    """


class TrainingFree(Head):
    """Computes evidence by comparison of tokens, and an alpha from it by closed-form matting. It has no weights."""

    Config = TrainingFreeConfig

    def __init__(self, config: TrainingFreeConfig) -> None:
        super().__init__()
        self.config = config
        self._solves_alpha = True

    def disable_edge_refinement(self) -> None:
        self._solves_alpha = False

    def prepare_references(self, references: Sequence[ReferenceFeatures]) -> ReferenceTokens:
        """Split the tokens of the references.

        They are centred in :meth:`forward`, because the centre depends on the target.
        """
        if self._solves_alpha:
            load_solver()  # loads with the model instead of with the first image
        return split_reference_tokens(references, flatten_tokens)

    def forward(self, target: Features, references: Sequence[Any], image: Tensor, valid: Tensor) -> Matte:
        """Matte each target independently. The confidence is the similarity of :class:`Evidence`, at most 1."""
        alpha = torch.zeros_like(image[:, :1])
        stride = image.shape[-1] // target.correspondence_features.shape[-1]
        evidences = self.compute_evidence(target, references, stride)
        is_found = []
        for index, evidence in enumerate(evidences):
            is_found.append(evidence.similarity >= self.config.absent_below and bool(evidence.contrast.max() > 0))
            if is_found[index]:
                height, width = _content_size(valid[index])
                contrast = F.interpolate(
                    evidence.contrast[None, None], scale_factor=stride, mode="bicubic", align_corners=False
                )[0, 0, :height, :width]
                content = image[index, :, :height, :width]
                alpha[index, 0, :height, :width] = self._alpha_or_trimap(contrast.cpu(), content.cpu())
        confidence = alpha.new_tensor([evidence.similarity for evidence in evidences]).clamp(0, 1)
        return Matte(alpha, confidence, torch.tensor(is_found, device=alpha.device))

    def compute_evidence(self, target: Features, references: Sequence[ReferenceTokens], stride: int) -> list[Evidence]:
        """Compute the evidence of each target. ``stride``: px per token."""
        compared = flatten_tokens(target.correspondence_features)
        grouping = compared if target.grouping_features is None else flatten_tokens(target.grouping_features)
        contrasts = compared.new_zeros(target.valid.shape)
        similarities = []
        for index, (valid, reference) in enumerate(zip(target.valid, references, strict=True)):
            tokens = compared[index, valid.flatten()]
            if self.config.rule == "clusters":
                grouping_tokens = grouping[index, valid.flatten()]
                contrast, similarity = segment_by_clusters(tokens, grouping_tokens, reference, self.config)
            else:
                contrast, similarity = self._compare_tokens(tokens, reference)
            contrasts[index, valid] = contrast
            similarities.append(similarity)
        if self.config.rule == "contrast":
            propagated = target.intra_similarity[stride].propagate(contrasts.flatten(1)[..., None])
            contrasts = propagated.view_as(contrasts)
        evidences = []
        for contrast, valid, similarity in zip(contrasts, target.valid, similarities, strict=True):
            height, width = _content_size(valid)
            evidences.append(Evidence(contrast[:height, :width], similarity))
        return evidences

    def _compare_tokens(self, target: Tensor, reference: ReferenceTokens) -> tuple[Tensor, float]:
        """Return contrast [N] and similarity of the valid tokens [N,C] of one target; see :class:`Evidence`."""
        reference_tokens = torch.cat([reference.foreground, reference.background])
        centre = (target.mean(dim=0) + reference_tokens.mean(dim=0)) / 2
        unit = F.normalize(target - centre, dim=-1)
        foreground = F.normalize(reference.foreground - centre, dim=-1)
        background = F.normalize(reference.background - centre, dim=-1)
        to_foreground = soft_max_similarity(foreground, unit, self.config.temperature)
        to_background = soft_max_similarity(background, unit, self.config.temperature)
        contrast = to_foreground - self.config.background_weight * to_background
        agreement = soft_max_similarity(foreground, unit, self.config.presence_temperature)
        if reference.negative is not None:
            negative = F.normalize(reference.negative - centre, dim=-1)
            is_object = similarity_difference(unit, negative, foreground) <= 0
            contrast = contrast.where(is_object, contrast.clamp(max=0.0))
            agreement = agreement.where(is_object, agreement.clamp(max=0.0))
        self_similarity = soft_max_similarity(foreground, foreground, self.config.presence_temperature).mean()
        return contrast, float(agreement.max() / self_similarity)

    def _alpha_or_trimap(self, contrast: Tensor, image: Tensor) -> Tensor:
        """Compute the alpha [H,W] of one frame from its contrast [H,W] and its sRGB image [3,H,W], on the CPU.

        If a later component refines the edges, the result is the trimap instead.
        """
        size = downscaled_size(image.shape[1:], self.config.solve_long_side_px)
        small = F.interpolate(torch.cat([image, contrast[None]])[None], size=size, mode="area")[0]
        small_rgb, small_contrast = small[:3].permute(1, 2, 0), small[3]
        if self.config.rule == "clusters":
            trimap = torch.from_numpy(trimap_from_coarse(small_contrast.numpy(), size, self.config.edge_band))
        else:
            trimap = self.make_trimap(small_contrast)
        alpha = trimap
        if self._solves_alpha:
            alpha = torch.from_numpy(solve_alpha(small_rgb.double().numpy(), trimap.double().numpy())).float()
        return F.interpolate(alpha[None, None], size=image.shape[1:], mode="bilinear", align_corners=False)[0, 0]

    def make_trimap(self, contrast: Tensor) -> Tensor:
        """Return the trimap of a contrast, [H,W] of 0, 0.5 (unknown) and 1.

        The pixels whose contrast is closest to the threshold are unknown. Pixels that are closer to the strongest
        contrast than to the threshold are never unknown, so that small objects keep some foreground.
        """
        strongest = contrast.max()
        threshold = self.config.threshold * strongest
        is_certain = contrast > (threshold + strongest) / 2
        distance = (contrast - threshold).abs().masked_fill(is_certain, torch.inf).flatten()
        unknown_count = math.floor(distance.numel() * self.config.unknown_fraction)
        closest = distance.argsort(stable=True)[:unknown_count]
        unknown = closest[distance[closest].isfinite()]
        trimap = (contrast > threshold).float()
        trimap.view(-1)[unknown] = 0.5
        trimap[~keep_strong_regions(contrast, trimap > 0, self.config.instance_fraction)] = 0.0
        return trimap


def keep_strong_regions(evidence: Tensor, inside: Tensor, fraction: float) -> Tensor:
    """Return the connected regions of ``inside``, bool [H,W], whose evidence is strong.

    The strongest evidence of such a region is at least ``fraction`` of the strongest evidence of all regions. Weak
    regions are often other objects that are slightly similar to the reference.
    """
    count, labels = cv2.connectedComponents(inside.numpy().astype(np.uint8))
    region = torch.from_numpy(labels).long().flatten()  # number of each pixel's region; 0 outside ``inside``
    strongest = evidence.new_full((count,), -torch.inf).scatter_reduce(0, region, evidence.flatten(), "amax")
    is_strong = strongest >= fraction * strongest.max()
    is_strong[0] = False
    return is_strong[region].view(inside.shape)


def soft_max_similarity(reference: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return the soft maximum of the cosines of each target token [N,C] to all reference tokens [K,C], float32 [N].

    It is temperature * log(mean(exp(cosine / temperature))). Tokens have unit length. Without reference tokens it is 0.
    """
    if not len(reference):
        return target.new_zeros(len(target))
    sums = [(chunk @ reference.T / temperature).logsumexp(dim=1) for chunk in torch.split(target, CHUNK_TOKENS)]
    return temperature * (torch.cat(sums) - math.log(len(reference)))


def _content_size(valid: Tensor) -> tuple[int, int]:
    """Return height and width of the frame, which is in the top left corner of valid [H,W]."""
    return int(valid.any(dim=1).sum()), int(valid.any(dim=0).sum())


def segment_by_clusters(
    compared: Tensor, grouping: Tensor, reference: ReferenceTokens, config: TrainingFreeConfig
) -> tuple[Tensor, float]:
    """Segment the object in one target, as INSID3 does (Cuttano et al., CVPR 2026, section 3.3).

    A token is a candidate if it is similar to the prototype of the reference, and if its nearest reference token is
    inside the mask. The seed is the cluster with candidates that is most similar to the prototype. Other clusters are
    added if the product of their similarity to the prototype, their similarity to the seed and their fraction of
    candidates is above ``min_join_score``. Clustering N tokens computes N * (N - 1) / 2 distances of 8 bytes, 67 MB for
    64 x 64 tokens.

    ``compared`` [N,C] are the tokens that are compared with the reference, and ``grouping`` [N,D] those that are
    clustered. Returns the tokens of the object, float32 [N], 0 or 1; and the similarity of the seed to the prototype,
    divided by that of the reference's foreground tokens; 0 if there is no seed.
    """
    target = F.normalize(compared.float(), dim=-1)
    foreground = F.normalize(reference.foreground.float(), dim=-1)
    prototype = F.normalize(foreground.mean(dim=0), dim=0)
    similarity = target @ prototype
    outside = [reference.background]
    if reference.negative is not None:
        outside.append(reference.negative)
    background = F.normalize(torch.cat(outside).float(), dim=-1)
    is_nearer_to_object = similarity_difference(target, background, foreground) <= 0
    is_candidate = (similarity > config.min_candidate_cosine) & is_nearer_to_object
    if not is_candidate.any():
        return is_candidate.float(), 0.0
    cluster = cluster_tokens(grouping, config.min_cluster_cosine)
    members = F.one_hot(cluster).to(target.dtype).T  # [clusters,N]: 1 if the token is in the cluster
    size = members.sum(dim=1)
    candidate_fraction = members @ is_candidate.to(target.dtype) / size
    centre_to_prototype = F.normalize(members @ target, dim=-1) @ prototype
    seed = int(centre_to_prototype.masked_fill(candidate_fraction == 0, -torch.inf).argmax())
    centres = F.normalize(members @ F.normalize(grouping.float(), dim=-1), dim=-1)
    to_prototype, to_seed = members @ similarity / size, centres @ centres[seed]
    is_joined = to_prototype * to_seed * candidate_fraction > config.min_join_score
    is_joined[seed] = True
    seed_similarity = float(similarity[cluster == seed].mean())
    reference_similarity = float((foreground @ prototype).mean())
    return is_joined[cluster].float(), seed_similarity / max(reference_similarity, 1e-6)


def cluster_tokens(tokens: Tensor, min_cluster_cosine: float) -> Tensor:
    """Cluster tokens [N,C] by average linkage, with SciPy on the CPU. Returns the cluster of each token, int64 [N]."""
    count = len(tokens)
    if count < 2:
        return torch.zeros(count, dtype=torch.long, device=tokens.device)
    unit = F.normalize(tokens.float(), dim=-1)
    cosine = (unit @ unit.T).cpu()
    upper = torch.triu_indices(count, count, offset=1)
    distance = (1.0 - cosine[upper[0], upper[1]]).clamp(min=0.0).double().numpy()
    label = fcluster(linkage(distance, "average"), 1.0 - min_cluster_cosine, criterion="distance")
    return torch.from_numpy(label.astype("int64") - 1).to(tokens.device)
