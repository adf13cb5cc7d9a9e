"""Order (token, choice) pairs by expert: the plan that permute and unpermute follow."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend, choose


def count_choices(choices: Tensor, num_bins: int) -> Tensor:
    """How often each value 0..num_bins-1 occurs along the last axis of `choices` [..., N] (int64): int64 [..., num_bins].

    Integer adds only, so the result does not depend on their order; no host synchronisation.
    """
    counts = choices.new_zeros(*choices.shape[:-1], num_bins)
    return counts.scatter_add_(-1, choices, torch.ones_like(choices))


def sort_tokens(
    indices_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """Stable sort of the T*K choices by expert, within an expert by (token, k).

    Args:
        indices_TK: int64, expert of each choice, in [0, num_experts).
        kept_TK: bool, choices that travel; the others are sorted behind all experts. None = all.
        backend: "torch", or "triton" for a counting sort on CUDA; "auto" as `backend.rule` says.

    Returns:
        order_R: int64 [T*K], flat (token * K + k) index of each sorted row.
        row_TK: int64 [T, K], its inverse: the row at which each choice stands.
        counts_E: int64 [E], kept rows of each expert. Rows from counts_E.sum() on are not kept.
    """
    if choose("sort_tokens", backend, indices_TK) == "triton":
        from . import triton_impl

        return triton_impl.sort_tokens(indices_TK, num_experts, kept_TK)
    flat_R = indices_TK.flatten()
    if kept_TK is not None:
        flat_R = torch.where(kept_TK.flatten(), flat_R, num_experts)
    # int16 keys sort several times faster on CPU
    keys_R = flat_R.to(torch.int16) if num_experts <= torch.iinfo(torch.int16).max else flat_R
    order_R = torch.sort(keys_R, stable=True).indices
    row_R = torch.empty_like(order_R)
    row_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    counts_E = count_choices(flat_R, num_experts + 1)[:num_experts]
    return order_R, row_R.view(indices_TK.shape), counts_E


__all__ = ["Backend", "count_choices", "sort_tokens"]
