"""What every back end of the ragged products refuses, in one place."""

from __future__ import annotations

import torch
from torch import Tensor


def check_inputs(
    op: str, rows: dict[str, Tensor], weights: dict[str, Tensor], counts_E: Tensor, order_R: Tensor | None, row_TK: Tensor | None
) -> None:
    """Shapes, dtypes and devices that cannot go together.

    Args:
        rows: matrices with a row per routed row, or per token where a plan is given; by name.
        weights: tensors whose first axis is the experts; by name.

    Raises:
        ValueError: names the operation and both sides of what does not fit.
    """
    tensors = rows | weights
    listed = ", ".join(f"{name} {x.dtype} {tuple(x.shape)}" for name, x in tensors.items())
    if any(x.ndim != 2 for x in rows.values()):
        raise ValueError(f"{op}: {listed}; rows are matrices")
    if len({x.dtype for x in tensors.values()}) > 1:
        raise ValueError(f"{op}: {listed}; they must have one dtype")
    if counts_E.dtype != torch.int64 or counts_E.ndim != 1 or any(x.shape[:1] != counts_E.shape for x in weights.values()):
        raise ValueError(f"{op}: {listed}, counts {counts_E.dtype} {tuple(counts_E.shape)}; need int64 [E] for the E experts")
    if (order_R is None) != (row_TK is None):
        raise ValueError(f"{op}: order_R and row_TK come together, as sort_tokens returns them, or not at all")
    if order_R is not None and row_TK is not None and not _is_plan(order_R, row_TK):
        raise ValueError(
            f"{op}: order {order_R.dtype} {tuple(order_R.shape)} and row {row_TK.dtype} {tuple(row_TK.shape)}; "
            f"need int64 [T * K] and [T, K]"
        )
    everything = tensors | {"counts": counts_E, "order": order_R, "row": row_TK}
    devices = {name: x.device for name, x in everything.items() if x is not None}
    if len(set(devices.values())) > 1:
        raise ValueError(f"{op}: {', '.join(f'{n} on {d}' for n, d in devices.items())}; all tensors must be on one device")


def _is_plan(order_R: Tensor, row_TK: Tensor) -> bool:
    integers = order_R.dtype == torch.int64 and row_TK.dtype == torch.int64
    return integers and row_TK.ndim == 2 and order_R.shape == (row_TK.numel(),)


def check_rows(op: str, name: str, x: Tensor, num_rows: int) -> None:
    """Raises ValueError where `x` [num_rows, ...] has another number of rows."""
    if x.shape[0] != num_rows:
        raise ValueError(f"{op}: {name} {tuple(x.shape)} has {x.shape[0]} rows; {num_rows} are needed")
