"""Which rows share a bucket: sorting by expert and code, and fitting the number of buckets to a budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..sort_tokens import count_choices
from .checks import check_choices


@dataclass(frozen=True)
class Buckets:
    """Which choices (t, k) travel as one row. C buckets, none of them empty; R = T * K choices.

    bucket_TK: int64, bucket of each choice; 0 where it is not kept.
    kept_TK: bool, choices that travel; None = all.
    order_R: int64, flat (t * K + k) choices in bucket order, within a bucket by (t, k); those not kept come last.
    starts_C1: int64, first place of each bucket in order_R, and the end of the last one.
    counts_E: int64, buckets of each expert.
    experts_C: int64, expert of each bucket, ascending.
    num_rows: choices that travel, on the host.
    """

    bucket_TK: Tensor
    kept_TK: Tensor | None
    order_R: Tensor
    starts_C1: Tensor
    counts_E: Tensor
    experts_C: Tensor
    num_rows: int


def _lexicographic_rank(codes_TH: Tensor, num_codes: int | None) -> Tensor:
    """Place of each token when tokens are sorted by their codes, first hash first; equal ones by token.

    A chain of stable sorts, last hashes first, each by as many hashes as fit into one int64; one by one where codes may be
    anything.
    """
    T, H = codes_TH.shape
    bits = 63 if num_codes is None else max(1, (num_codes - 1).bit_length())
    order_T = torch.arange(T, device=codes_TH.device)
    for stop in range(H, 0, -(63 // bits)):
        first, *others = codes_TH[:, max(0, stop - 63 // bits) : stop].unbind(1)
        key_T = first
        for code_T in others:
            key_T = (key_T << bits) | code_T
        order_T = order_T[torch.sort(key_T[order_T], stable=True).indices]
    return _inverse(order_T)


def _inverse(order_N: Tensor) -> Tensor:
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return inverse_N


def _changes(values_N: Tensor) -> Tensor:
    """Whether each value differs from the one before; true for the first."""
    changes_N = torch.ones_like(values_N, dtype=torch.bool)
    torch.ne(values_N[1:], values_N[:-1], out=changes_N[1:])
    return changes_N


def _first_of_buckets(group_R: Tensor, codes_RH: Tensor, alone_R: Tensor, kept_R: Tensor) -> Tensor:
    """bool [R, H + 1]: whether a row, in sorted order, opens a bucket at level h = 0 (the expert) .. H (all hashes)."""
    opens_R = _changes(group_R) | alone_R
    levels = [opens_R & kept_R]
    for h in range(codes_RH.shape[1]):
        opens_R = opens_R | _changes(codes_RH[:, h])
        levels.append(opens_R & kept_R)
    return torch.stack(levels, 1)


def _within_budget(first_RL: Tensor, kept_R: Tensor, max_rows: int | Tensor) -> Tensor:
    """bool [R]: which rows open a bucket, at the finest level that fits and with what is left spent on splits.

    On the device throughout: the level is a tensor, and bucket numbers are bounded by R instead of C.
    """
    totals_L = first_RL.sum(0)
    # the totals rise with the level, so that counting those that fit finds the last of them; level 0 where none does
    level = ((totals_L <= max_rows).sum() - 1).clamp(min=0)
    finer = (level + 1).clamp(max=first_RL.shape[1] - 1)
    coarse_R, fine_R = (first_RL.index_select(1, x.view(1)).squeeze(1) for x in (level, finer))
    bucket_R = coarse_R.cumsum(0) - 1
    num_rows = bucket_R.numel()
    sizes_R, children_R = (count_choices(torch.where(x, bucket_R, num_rows), num_rows + 1)[:-1] for x in (kept_R, fine_R))
    largest_R = torch.sort(sizes_R, descending=True, stable=True).indices
    # places behind the last bucket have no children; they come last and must not free rows
    spent_R = (children_R - 1).clamp(min=0)[largest_R].cumsum(0)
    split_R = torch.empty_like(coarse_R)
    split_R[largest_R] = spent_R <= max_rows - totals_L.index_select(0, level.view(1))
    return coarse_R | (fine_R & split_R[bucket_R.clamp(min=0)])


def bucket_rows(
    codes_TH: Tensor,
    indices_TK: Tensor,
    num_experts: int,
    kept_TK: Tensor | None = None,
    exact_TK: Tensor | None = None,
    max_rows: int | Tensor | None = None,
    num_codes: int | None = None,
) -> Buckets:
    """Put the kept choices of one expert whose tokens have equal codes into one bucket (LSH-MoE, arXiv 2411.08446, alg. 1).

    Codes are nested: equality in the first h hashes gives coarser buckets, down to h = 0, one bucket per expert. Buckets are
    ordered by expert, then by code (lexicographic, first hash first), then come the expert's exact choices by (t, k). The
    result is a function of the arguments alone. Torch operations on any device; one host synchronisation, for the number of
    buckets.

    Args:
        codes_TH: int64, from `cross_polytope_codes`.
        indices_TK: int64, expert of each choice, in [0, num_experts).
        kept_TK: bool, choices that travel; None = all.
        exact_TK: bool, choices that have a bucket of their own; None = none.
        max_rows: most buckets, also as an int64 scalar on the device; or None for all hashes. Taken is the finest level h whose
            number of buckets, exact choices included, is <= max_rows. Its buckets are then split to level h + 1, those with most
            rows first (ties: the lower bucket), up to the first that does not fit. Where experts hit plus exact choices pass
            max_rows already, the others have one bucket per expert, and there are more than max_rows buckets.
        num_codes: codes lie in [0, num_codes), so that they take fewer sorts (not checked); None = they may be anything.

    Raises:
        ValueError: shapes, dtypes, devices or numbers that do not fit each other.
    """
    check_choices(codes_TH, indices_TK, num_experts, kept_TK, exact_TK, max_rows, num_codes)
    T, K = indices_TK.shape
    token_R = torch.arange(T * K, device=indices_TK.device) // max(K, 1)
    kept_R = torch.ones_like(token_R, dtype=torch.bool) if kept_TK is None else kept_TK.flatten()
    exact_R = torch.zeros_like(kept_R) if exact_TK is None else exact_TK.flatten()
    # an expert's exact choices are a group behind its other ones; what is not kept is the last group
    group_R = torch.where(kept_R, 2 * indices_TK.flatten() + exact_R, 2 * num_experts)
    place_R = torch.where(exact_R | ~kept_R, token_R, _lexicographic_rank(codes_TH, num_codes)[token_R])
    order_R = torch.sort(group_R * T + place_R, stable=True).indices
    sorted_kept_R = kept_R[order_R]
    first_RL = _first_of_buckets(group_R[order_R], codes_TH[token_R[order_R]], exact_R[order_R], sorted_kept_R)
    first_R = first_RL[:, -1] if max_rows is None else _within_budget(first_RL, sorted_kept_R, max_rows)
    num_buckets, num_rows = torch.stack([first_R.sum(), kept_R.sum()]).tolist()
    bucket_R = torch.empty_like(order_R)
    bucket_R[order_R] = torch.where(sorted_kept_R, first_R.cumsum(0) - 1, num_buckets)
    if max_rows is not None:
        # a coarser bucket holds several codes: its rows stand by code so far
        order_R = torch.sort(bucket_R, stable=True).indices
    sizes_C = count_choices(bucket_R, num_buckets + 1)[:num_buckets]
    starts_C1 = torch.cat([sizes_C.new_zeros(1), sizes_C.cumsum(0)])
    experts_C = indices_TK.flatten()[order_R[starts_C1[:-1]]]
    return Buckets(
        bucket_TK=(bucket_R if kept_TK is None else bucket_R.masked_fill(~kept_R, 0)).view(T, K),
        kept_TK=kept_TK,
        order_R=order_R,
        starts_C1=starts_C1,
        counts_E=count_choices(experts_C, num_experts),
        experts_C=experts_C,
        num_rows=num_rows,
    )
