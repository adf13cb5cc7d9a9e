"""Load statistics of experts, from integer counts. Every figure is of valid tokens, before drops unless said otherwise."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def load_ratio(counts_E: Tensor) -> Tensor:
    """load / ideal along the last axis, float64: 1 = balanced, 0 = dead, E = everything goes to one expert."""
    counts = counts_E.double()
    return counts / counts.mean(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)


@dataclass(frozen=True)
class LoadStats:
    """Figures per layer [L], float64.

    cv: coefficient of variation of the load, standard deviation / mean.
    max_violation: largest load ratio - 1 (MaxVio of arXiv 2408.15664); of the counts given (global batch or micro-batch).
    min_ratio: smallest load ratio.
    dead_frac: share of experts that no token chose.
    entropy: entropy of the load distribution / log E; 1 = balanced.
    """

    cv: Tensor
    max_violation: Tensor
    min_ratio: Tensor
    dead_frac: Tensor
    entropy: Tensor


def load_stats(counts_LE: Tensor) -> LoadStats:
    """Statistics of loads [..., E] along the last axis. A layer without any token counts as balanced, with all experts dead."""
    ratio = load_ratio(counts_LE)
    num_experts = counts_LE.shape[-1]
    # log E - H, the distance of the load from an even one, so that nothing to spread counts as even
    distance = torch.xlogy(ratio / num_experts, ratio).sum(-1)
    return LoadStats(
        cv=ratio.std(-1, unbiased=False),
        max_violation=(ratio.amax(-1) - 1).clamp_min(0),
        min_ratio=ratio.amin(-1),
        dead_frac=(counts_LE == 0).double().mean(-1),
        entropy=1 - distance / math.log(max(num_experts, 2)),
    )


def drop_fraction(dropped: Tensor, counts_E: Tensor) -> Tensor:
    """Share of the chosen (token, expert) pairs that found no place."""
    return dropped.double() / counts_E.sum(-1).clamp_min(1).double()


def counts_by_domain(counts_LBE: Tensor, domain_B: Tensor, num_domains: int) -> Tensor:
    """Choices per layer, domain and expert [L, domains, E] from those per sequence [L, B, E]; `domain_B` is int64."""
    L, _, E = counts_LBE.shape
    return counts_LBE.new_zeros(L, num_domains, E).index_add_(1, domain_B, counts_LBE)
