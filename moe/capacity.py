"""Capacity: which choices of a token keep their place at an expert. Decided per sequence, so that no layout changes it."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from .config import MoEConfig


def expert_capacity(valid_B: Tensor, config: MoEConfig) -> Tensor:
    """Rows one expert takes of each sequence with `valid_B` tokens: ceil(factor * K * valid / E), int64 [B].

    The group over which capacity holds is the sequence (a GShard group, arXiv 2006.16668, 3.2): unlike a rank's batch it is the
    same whatever the layout.
    """
    assert config.capacity_factor is not None
    # As the fraction that was meant (1.1 is 11/10, not a little more): integers cannot round differently between devices.
    # A factor above E changes nothing, because an expert takes a token once; without the bound it could overflow.
    factor = Fraction(min(config.capacity_factor, config.num_experts)).limit_denominator(10**6) or Fraction(1, 10**6)
    return -((-factor.numerator * config.top_k * valid_B) // (factor.denominator * config.num_experts))


def keep_within_capacity(indices_BSK: Tensor, weights_BSK: Tensor, valid_BS: Tensor, config: MoEConfig) -> Tensor:
    """Which choices keep their place: bool [B, S, K].

    position: at each expert the first choices in (position, k) order; probability: those with the highest weight, ties in that
    order. Invalid tokens take no place and are never kept.
    """
    B, S, K = indices_BSK.shape
    experts_BC = torch.where(valid_BS[..., None], indices_BSK, config.num_experts).view(B, S * K)
    if config.drop_policy == "probability":
        order_BC = torch.sort(weights_BSK.detach().reshape(B, S * K), dim=-1, descending=True, stable=True).indices
    else:
        order_BC = torch.arange(S * K, device=indices_BSK.device).expand(B, -1)
    # sort by expert, stable in priority order; a choice's place is its distance from the first one of its expert
    by_expert_BC = torch.sort(experts_BC.gather(-1, order_BC), dim=-1, stable=True)
    first_BC = torch.searchsorted(by_expert_BC.values, by_expert_BC.values)
    place_BC = torch.arange(S * K, device=indices_BSK.device) - first_BC
    kept_sorted_BC = place_BC < expert_capacity(valid_BS.sum(-1), config)[:, None]
    kept_sorted_BC &= by_expert_BC.values < config.num_experts
    kept_BC = torch.zeros_like(kept_sorted_BC).scatter_(-1, order_BC.gather(-1, by_expert_BC.indices), kept_sorted_BC)
    return kept_BC.view(B, S, K)
