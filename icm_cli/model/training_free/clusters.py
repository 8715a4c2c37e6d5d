"""INSID3's rule: which clusters of a target's tokens are the thing (Cuttano et al., CVPR 2026, section 3.3).

A token is a candidate if it is like the reference's prototype, and if the reference's token that is nearest to it lies
inside the mask. The target's tokens are grouped by average linkage. Of the groups that hold candidates the one most
like the prototype is the seed; others join it as far as they are like the prototype, like the seed, and full of
candidates. The numbers that the authors' code has: 0 for ``candidate_above``, 0.6 for ``group``, 0.2 for ``join``.

Letters: N tokens of the target, K reference tokens inside the guidance, M outside, C channels. Grouping asks for all
N * (N - 1) / 2 distances, 8 bytes each: 67 MB for 64 x 64 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from scipy.cluster.hierarchy import fcluster, linkage
from torch import Tensor

from icm_cli.model.similarity import ReferenceTokens

TOKENS_AT_A_TIME = 512
"""Target tokens compared with the reference's at a time: bounds the working memory."""


@dataclass(frozen=True)
class Found:
    """Answer of :func:`segment_by_clusters`.

    ``inside`` [N] bool: tokens of the thing; none where it is absent. ``likeness``: of the seed to the prototype, as a
    share of the likeness of the reference's own tokens to it; 0 without a seed.
    """

    inside: Tensor
    likeness: float


def segment_by_clusters(
    matched: Tensor, grouping: Tensor, reference: ReferenceTokens, *, candidate_above: float, group: float, join: float
) -> Found:
    """Tokens of the thing in one target.

    matched [N,C]: compared with the reference's tokens, which are of the same kind; grouping [N,D]: tells tokens of the
    target apart; cosines of both count. ``candidate_above``: least cosine to the prototype of a candidate. ``group``:
    cosine down to which groups are merged (the paper's tau). ``join``: least score with which a group joins the seed.
    """
    target, foreground = F.normalize(matched.float(), dim=-1), F.normalize(reference.foreground.float(), dim=-1)
    prototype = F.normalize(foreground.mean(dim=0), dim=0)
    likeness = target @ prototype
    background = F.normalize(reference.background.float(), dim=-1)
    candidate = (likeness > candidate_above) & nearest_is_foreground(target, foreground, background)
    if not candidate.any():
        return Found(candidate, 0.0)
    label = clusters(grouping, group)
    one_hot = F.one_hot(label).to(target.dtype).T  # [groups,N]
    size = one_hot.sum(dim=1)
    share = one_hot @ candidate.to(target.dtype) / size
    to_prototype = F.normalize(one_hot @ target, dim=-1) @ prototype
    seed = int(to_prototype.masked_fill(share == 0, -torch.inf).argmax())
    centres = F.normalize(one_hot @ F.normalize(grouping.float(), dim=-1), dim=-1)
    share[seed] = 1.0
    score = (one_hot @ likeness / size) * (centres @ centres[seed]) * share
    joined = score > join
    joined[seed] = True
    own = float((foreground @ prototype).mean())
    return Found(joined[label], float(likeness[label == seed].mean()) / max(own, 1e-6))


def nearest_is_foreground(target: Tensor, foreground: Tensor, background: Tensor) -> Tensor:
    """Whether each target token's nearest reference token is inside the mask: [N,C], [K,C], [M,C] unit -> [N] bool.

    Several references count as one; without any background every token's is.
    """
    if not len(background):
        return torch.ones(len(target), dtype=torch.bool, device=target.device)
    parts = [
        (part @ foreground.T).amax(dim=1) >= (part @ background.T).amax(dim=1)
        for part in torch.split(target, TOKENS_AT_A_TIME)
    ]
    return torch.cat(parts)


def clusters(tokens: Tensor, least_cosine: float) -> Tensor:
    """Groups of tokens [N,C] by average linkage, merged down to a mean cosine of ``least_cosine``: numbers [N] from 0.

    On the CPU, by SciPy.
    """
    count = len(tokens)
    if count < 2:
        return torch.zeros(count, dtype=torch.long, device=tokens.device)
    unit = F.normalize(tokens.float(), dim=-1)
    cosine = (unit @ unit.T).cpu()
    upper = torch.triu_indices(count, count, offset=1)
    distance = (1.0 - cosine[upper[0], upper[1]]).clamp(min=0.0).double().numpy()
    label = fcluster(linkage(distance, "average"), 1.0 - least_cosine, criterion="distance")
    return torch.from_numpy(label.astype("int64") - 1).to(tokens.device)
