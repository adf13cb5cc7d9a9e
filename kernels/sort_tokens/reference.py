"""Specification of `sort_tokens`: plain Python, one row at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def sort_tokens(indices_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """As the public function, written as a loop over experts and rows."""
    flat = indices_TK.flatten().tolist()
    kept = [True] * len(flat) if kept_TK is None else kept_TK.flatten().tolist()
    order = [i for e in range(num_experts) for i, choice in enumerate(flat) if kept[i] and choice == e]
    counts = [sum(kept[i] and choice == e for i, choice in enumerate(flat)) for e in range(num_experts)]
    order += [i for i in range(len(flat)) if not kept[i]]
    rank = [0] * len(flat)
    for row, i in enumerate(order):
        rank[i] = row
    order_R, row_R, counts_E = (
        torch.tensor(values, dtype=torch.int64, device=indices_TK.device) for values in (order, rank, counts)
    )
    return order_R, row_R.view(indices_TK.shape), counts_E
