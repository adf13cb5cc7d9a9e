"""One matrix product per expert, over rows that are sorted by expert."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ..backend import choose
from . import reference, torch_impl
from .checks import check_inputs, check_rows

Backend = Literal["auto", "reference", "torch", "triton"]


def grouped_gemm(
    x: Tensor,
    w_END: Tensor,
    counts_E: Tensor,
    order_R: Tensor | None = None,
    row_TK: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Each row times the weights of its expert: y_RN[r] = w_END[e] x[r], sums in at least fp32.

    Args:
        x: rows sorted by expert [R, D]; or, where order_R and row_TK are given, tokens [T, D] that are read in that order.
        w_END: one [N, D] matrix per expert.
        counts_E: int64, rows of each expert; may hold zeros. Rows beyond their sum give zeros and get zero gradients.
        order_R, row_TK: the plan of `sort_tokens`, R = T * K.
        backend: "triton" (CUDA; fp32, bf16, fp16; no host synchronisation), "torch" (grouped_mm, or a loop over experts for
            dtypes that it does not take), "reference"; "auto" as `backend.rule` says.

    Returns:
        y_RN, same dtype as x.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other.
    """
    check_inputs("grouped_gemm", {"rows": x}, {"weights": w_END}, counts_E, order_R, row_TK)
    if w_END.ndim != 3 or w_END.shape[2] != x.shape[1]:
        raise ValueError(f"grouped_gemm: rows {tuple(x.shape)} [R, D] and weights {tuple(w_END.shape)} [E, N, D] differ in D")
    if row_TK is not None:
        check_rows("grouped_gemm", "tokens", x, row_TK.shape[0])
    chosen = choose("grouped_gemm", backend, x, products=True, others=("reference",))
    if chosen == "triton":
        from . import triton_impl  # Triton need not be installed where it is not used

        return triton_impl.grouped_gemm(x, w_END, counts_E, order_R, row_TK)
    return (reference if chosen == "reference" else torch_impl).grouped_gemm(x, w_END, counts_E, order_R, row_TK)


__all__ = ["Backend", "grouped_gemm"]
