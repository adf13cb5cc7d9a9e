"""The experts' computation: on rows that are sorted by expert, and from tokens to tokens where all experts are at hand."""

from __future__ import annotations

import functools
import logging
from typing import Literal

import torch
from torch import Tensor

from ..backend import choose
from ..permute import permute, unpermute
from . import grouped_impl, reference
from .activation import Activation, act, check_activation
from .late import LateGradients
from .loop_impl import MoeMlpLoop

Backend = Literal["auto", "torch", "triton", "reference", "loop", "grouped"]


def choose_backend(
    x: Tensor, backend: Backend = "auto", activation: Activation = "silu", *, gated: bool = True, biased: bool = False
) -> str:
    """The implementation for rows like `x`: "auto" is Triton where `backend.rule` says so, else "torch", and "torch" is
    "grouped" (no host synchronisation) on GPU in bf16, else "loop", which takes every dtype and is fastest on CPU. The Triton
    products have SwiGLU without biases only: for other networks "auto" is "torch", which is logged once.

    Raises:
        ValueError: an unknown name, or "triton" with a network that it does not have.
    """
    check_activation("moe_mlp", activation)
    beyond = _beyond_triton(activation, gated, biased)
    if beyond and backend == "triton":
        raise ValueError(f"moe_mlp: backend 'triton' has {beyond}; use 'auto' or 'torch'")
    if beyond and backend == "auto":
        _say_torch(beyond)
        backend = "torch"
    chosen = choose("moe_mlp", backend, x, products=True, others=("reference", "loop", "grouped"))
    if chosen == "torch":
        return "grouped" if x.is_cuda and x.dtype == torch.bfloat16 else "loop"
    return chosen


def _beyond_triton(activation: str, gated: bool, biased: bool) -> str:
    """What the Triton products have instead of such a network; "" where they have it."""
    if not gated or biased:
        kind = "without a gate" if not gated else "with biases"
        return f"SwiGLU without biases only, not a network {kind}"
    return "" if activation == "silu" else f"silu only, not {activation}"


@functools.cache
def _say_torch(beyond: str) -> None:
    # cached, so that it is said once
    logging.getLogger("moefold.kernels").info("moe_mlp runs on torch (the Triton products have %s)", beyond)


def moe_mlp(
    x_RD: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    counts_E: Tensor,
    backend: Backend = "auto",
    activation: Activation = "silu",
    b13_E2F: Tensor | None = None,
    late: LateGradients | None = None,
) -> Tensor:
    """The network of each row's own expert: w2[e] (act(w13[e, 0] x + b13[e, 0]) * (w13[e, 1] x + b13[e, 1])); without a gate
    w2[e] act(w13[e, 0] x + b13[e, 0]).

    Args:
        x_RD: rows sorted by expert.
        w13_E2FD: gate (index 0 of axis 1) and up (index 1) projections; the up projection alone where axis 1 has length 1.
        w2_EDF: down projections.
        counts_E: int64, rows of each expert; may hold zeros. Rows beyond their sum give zeros and get zero gradients.
        backend: see `choose_backend`.
        activation: act, see `activation.act`.
        b13_E2F: biases of these projections; None = none.
        late: that the weights were `taken` from, to have their gradients after the rows'. Back ends without that compute them
            together.

    Returns:
        y_RD, same dtype as x_RD.

    Raises:
        ValueError: shapes that do not fit each other, an unknown back end or activation, or one that the back end does not have.
    """
    E, two, F, D = w13_E2FD.shape
    if two not in (1, 2) or x_RD.shape[-1] != D or counts_E.shape != (E,) or w2_EDF.shape != (E, D, F):
        raise ValueError(
            f"moe_mlp: rows {tuple(x_RD.shape)}, w13 {tuple(w13_E2FD.shape)} [E, 2 or 1, F, D], w2 {tuple(w2_EDF.shape)} "
            f"[E, D, F] and counts {tuple(counts_E.shape)} [E] do not fit each other"
        )
    if b13_E2F is not None and b13_E2F.shape != (E, two, F):
        raise ValueError(f"moe_mlp: biases {tuple(b13_E2F.shape)} are not those of w13, {(E, two, F)}")
    chosen = choose_backend(x_RD, backend, activation, gated=two == 2, biased=b13_E2F is not None)
    if chosen == "loop":
        return MoeMlpLoop.apply(x_RD, w13_E2FD, w2_EDF, counts_E, activation, b13_E2F, late)
    if chosen == "triton":
        from . import triton_impl

        return triton_impl.moe_mlp(x_RD, w13_E2FD, w2_EDF, counts_E, late=late)
    return (grouped_impl if chosen == "grouped" else reference).moe_mlp(x_RD, w13_E2FD, w2_EDF, counts_E, activation, b13_E2F)


def moe_layer_mlp(
    x_TD: Tensor,
    weights_TK: Tensor,
    order_R: Tensor,
    row_TK: Tensor,
    counts_E: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    kept_TK: Tensor | None = None,
    shared_TD: Tensor | None = None,
    backend: Backend = "auto",
    activation: Activation = "silu",
    b13_E2F: Tensor | None = None,
    late: LateGradients | None = None,
) -> Tensor:
    """permute, moe_mlp and unpermute in one: in Triton the rows are neither copied into expert order nor saved for backward.

    Args:
        x_TD: tokens.
        weights_TK: router weights, any float dtype; differentiable.
        order_R, row_TK, counts_E, kept_TK: the plan of `sort_tokens`.
        w13_E2FD, w2_EDF: as for `moe_mlp`.
        shared_TD: added to the result (the shared experts' output, or a residual), in x's dtype.
        backend, activation, b13_E2F, late: as for `moe_mlp`.

    Returns:
        y_TD[t] = sum over the kept k, in their order and in at least fp32, of weights_TK[t, k] * (expert's output for token t).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit each other, an unknown back end or activation, or one that the back
            end does not have.
    """
    chosen = choose_backend(x_TD, backend, activation, gated=w13_E2FD.shape[1] == 2, biased=b13_E2F is not None)
    if chosen == "triton":
        from . import triton_impl

        plan = (order_R, row_TK, counts_E)
        return triton_impl.moe_layer_mlp(x_TD, weights_TK, *plan, w13_E2FD, w2_EDF, shared_TD, late=late)
    if kept_TK is not None and x_TD.device.type == "cpu":
        # the host has the counts: no rows for what is not kept
        order_R = order_R[: int(counts_E.sum())]
    x_RD = permute(x_TD, order_R, row_TK, kept_TK, backend="torch")
    y_RD = moe_mlp(x_RD, w13_E2FD, w2_EDF, counts_E, chosen, activation, b13_E2F, late)  # type: ignore[arg-type]
    return unpermute(y_RD, weights_TK, order_R, row_TK, kept_TK, shared_TD, backend="torch")


__all__ = ["Activation", "Backend", "LateGradients", "act", "choose_backend", "moe_layer_mlp", "moe_mlp"]
