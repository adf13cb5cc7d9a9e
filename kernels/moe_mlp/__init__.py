"""The experts' computation on rows that are sorted by expert."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from . import grouped_impl, reference
from .loop_impl import MoeMlpLoop

Backend = Literal["auto", "reference", "loop", "grouped", "triton"]


def choose_backend(x: Tensor) -> Backend:
    """grouped (no host synchronisation) on GPU in bf16, else loop, which takes every dtype and is fastest on CPU.

    The Triton kernels have to be asked for: they pass in the interpreter and compile for sm_90, but were not run on a GPU yet.
    """
    return "grouped" if x.is_cuda and x.dtype == torch.bfloat16 else "loop"


def moe_mlp(x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, counts_E: Tensor, backend: Backend = "auto") -> Tensor:
    """SwiGLU of each row by its own expert: w2[e] (silu(w13[e, 0] x) * (w13[e, 1] x)).

    Args:
        x_RD: rows sorted by expert.
        w13_E2FD: gate (index 0 of axis 1) and up (index 1) projections.
        w2_EDF: down projections.
        counts_E: int64, rows of each expert; may hold zeros. Rows beyond their sum give zeros and get zero gradients.

    Returns:
        y_RD, same dtype as x_RD.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    E, two, _, D = w13_E2FD.shape
    if two != 2 or x_RD.shape[-1] != D or counts_E.shape != (E,) or w2_EDF.shape != (E, D, w13_E2FD.shape[2]):
        raise ValueError(
            f"moe_mlp: rows {tuple(x_RD.shape)}, w13 {tuple(w13_E2FD.shape)} [E, 2, F, D], w2 {tuple(w2_EDF.shape)} "
            f"[E, D, F] and counts {tuple(counts_E.shape)} [E] do not fit each other"
        )
    backend = choose_backend(x_RD) if backend == "auto" else backend
    if backend == "loop":
        return MoeMlpLoop.apply(x_RD, w13_E2FD, w2_EDF, counts_E)
    if backend == "triton":
        from . import triton_impl

        return triton_impl.moe_mlp(x_RD, w13_E2FD, w2_EDF, counts_E)
    return (grouped_impl if backend == "grouped" else reference).moe_mlp(x_RD, w13_E2FD, w2_EDF, counts_E)


__all__ = ["Backend", "choose_backend", "moe_mlp"]
