"""Segmentation by clusters of tokens, the method of INSID3 (Cuttano et al., CVPR 2026, section 3.3).

1. A token is a candidate if it is similar to the prototype of the reference, and if its nearest reference token is
   inside the mask.
2. The tokens of the target are clustered by average linkage.
3. The seed is the cluster with candidates that is most similar to the prototype.
4. Other clusters are added if they are similar to the prototype and to the seed, and consist mostly
of candidates.

The published code uses 0 for ``min_candidate_cosine``, 0.6 for ``min_cluster_cosine`` and 0.2 for ``min_join_score``.

Letters: N tokens of the target, K reference tokens inside the guidance, M outside, C channels.
    Clustering computes
N * (N - 1) / 2 distances of 8 bytes, 67 MB for 64 x 64 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from icm_cli.model.similarity import ReferenceTokens

CHUNK_TOKENS = 512
"""Number of target tokens that are compared at a time, which limits the memory."""


@dataclass(frozen=True)
class ClusterSegments:
    """Result of :func:`segment_by_clusters`."""

    inside: Tensor
    """Tokens of the object, bool [N]; all False if it is absent."""
    similarity: float
    """Similarity of the seed to the prototype, as a fraction of the similarity of the reference's own tokens; 0 if
    there is no seed."""


def segment_by_clusters(
    compared: Tensor,
    grouping: Tensor,
    reference: ReferenceTokens,
    *,
    min_candidate_cosine: float,
    min_cluster_cosine: float,
    min_join_score: float,
) -> ClusterSegments:
    """Segment the object in one target.

    ``compared`` [N,C] are the tokens that are compared with the reference, and ``grouping`` [N,D] those that are
    clustered. ``min_candidate_cosine`` is the smallest cosine of a candidate to the prototype, ``min_cluster_cosine``
    the smallest mean cosine at which clusters are merged (tau in the paper), and ``min_join_score`` the smallest score
    of a cluster that is added to the seed. The published values are 0, 0.6 and 0.2.
    """
    target, foreground = F.normalize(compared.float(), dim=-1), F.normalize(reference.foreground.float(), dim=-1)
    prototype = F.normalize(foreground.mean(dim=0), dim=0)
    similarity = target @ prototype
    background = F.normalize(reference.background.float(), dim=-1)
    candidate = (similarity > min_candidate_cosine) & is_nearest_foreground(target, foreground, background)
    if not candidate.any():
        return ClusterSegments(candidate, 0.0)
    label = cluster_tokens(grouping, min_cluster_cosine)
    one_hot = F.one_hot(label).to(target.dtype).T  # [clusters,N]
    size = one_hot.sum(dim=1)
    candidate_fraction = one_hot @ candidate.to(target.dtype) / size
    to_prototype = F.normalize(one_hot @ target, dim=-1) @ prototype
    seed = int(to_prototype.masked_fill(candidate_fraction == 0, -torch.inf).argmax())
    centres = F.normalize(one_hot @ F.normalize(grouping.float(), dim=-1), dim=-1)
    candidate_fraction[seed] = 1.0
    score = (one_hot @ similarity / size) * (centres @ centres[seed]) * candidate_fraction
    joined = score > min_join_score
    joined[seed] = True
    own = float((foreground @ prototype).mean())
    return ClusterSegments(joined[label], float(similarity[label == seed].mean()) / max(own, 1e-6))


def is_nearest_foreground(target: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """Return for each target token [N,C] whether its nearest reference token is inside the mask, bool [N]; True
    without background. All tokens have unit length."""
    if not len(background):
        return torch.ones(len(target), dtype=torch.bool, device=target.device)
    parts = [
        (part @ foreground.T).amax(dim=1) >= (part @ background.T).amax(dim=1)
        for part in torch.split(target, CHUNK_TOKENS)
    ]
    return torch.cat(parts)


def cluster_tokens(tokens: Tensor, min_cluster_cosine: float) -> Tensor:
    """Cluster tokens [N,C] by average linkage, on the CPU by SciPy; return the index of each token's cluster, int64
    [N]."""
    count = len(tokens)
    if count < 2:
        return torch.zeros(count, dtype=torch.long, device=tokens.device)
    unit = F.normalize(tokens.float(), dim=-1)
    cosine = (unit @ unit.T).cpu()
    upper = torch.triu_indices(count, count, offset=1)
    distance = (1.0 - cosine[upper[0], upper[1]]).clamp(min=0.0).double().numpy()
    label = fcluster(linkage(distance, "average"), 1.0 - min_cluster_cosine, criterion="distance")
    return torch.from_numpy(label.astype("int64") - 1).to(tokens.device)
