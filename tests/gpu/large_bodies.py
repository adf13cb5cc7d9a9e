"""The checks of tensors with more elements than 32 bits number: a sample of rows, computed apart. See bodies.py.

The functions work at any size; tests on a GPU give sizes beyond 2^31, the interpreter tiny ones.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu.measures import error_of
from gpu.operations import Draw, Plan, Size, expert_weights, make_plan
from moefold.kernels.grouped_gemm import grouped_gemm
from moefold.kernels.moe_mlp import moe_layer_mlp
from moefold.kernels.permute import permute, unpermute

SAMPLE = 500


def sample(count: int, draw: Draw) -> Tensor:
    """Indices below `count`: the first and the last ones, where offsets are smallest and largest, and some between."""
    between = (draw.uniform(min(SAMPLE, count)) * count).long()
    ends = torch.arange(min(count, 8), device=draw.device)
    return torch.cat([ends, between, count - 1 - ends])


def assert_close(name: str, got: Tensor, want: Tensor) -> None:
    """Relative distance within a few roundings of the dtype: a wrong offset gives other numbers altogether."""
    bound = max(4 * torch.finfo(got.dtype).eps, 1e-5)
    assert (error := error_of(got, want)).whole <= bound, f"{name}: {error} over {bound:.2g}"


def check_permute_offsets(size: Size, draw: Draw) -> None:
    plan = make_plan(size, draw)
    x_TD = draw.normal(size.T, size.D).requires_grad_()
    rows_RD = permute(x_TD, plan.order_R, plan.row_TK, backend="triton")
    r = sample(len(plan.order_R), draw)
    assert torch.equal(rows_RD[r], x_TD[plan.source_R()[r]]), "rows differ from their tokens"
    (grad_TD,) = torch.autograd.grad(rows_RD, x_TD, rows_RD.detach())
    t = sample(size.T, draw)
    assert_close("gradient of x", grad_TD[t], rows_RD.detach()[plan.row_TK[t]].double().sum(1))


def check_unpermute_offsets(size: Size, draw: Draw) -> None:
    plan = make_plan(size, draw)
    y_RD = draw.normal(size.T * size.K, size.D).requires_grad_()
    weights_TK = draw.uniform(size.T, size.K).requires_grad_()
    y_TD = unpermute(y_RD, weights_TK, plan.order_R, plan.row_TK, backend="triton")
    t = sample(size.T, draw)
    rows_SKD, weights_SK1 = y_RD.detach()[plan.row_TK[t]].double(), weights_TK.detach()[t, :, None].double()
    assert_close("sums", y_TD[t], (rows_SKD * weights_SK1).sum(1))
    direction_TD = draw.normal(size.T, size.D)
    grad_RD, grad_TK = torch.autograd.grad(y_TD, [y_RD, weights_TK], direction_TD)
    upstream_S1D = direction_TD[t, None].double()
    assert_close("gradient of the rows", grad_RD[plan.row_TK[t]], upstream_S1D * weights_SK1)
    assert_close("gradient of the weights", grad_TK[t], (upstream_S1D * rows_SKD).sum(-1))


def expert_of(rows: Tensor, plan: Plan) -> Tensor:
    return torch.searchsorted(plan.counts_E.cumsum(0), rows, right=True)


def check_product_offsets(size: Size, draw: Draw, gather: bool) -> None:
    """Products of `size.D` columns with [F, D] matrices, from tokens or from rows in expert order."""
    plan = make_plan(size, draw)
    rows = size.T * size.K
    x = draw.normal(size.T if gather else rows, size.D).requires_grad_()
    w_END = draw.normal(size.E, size.F, size.D, scale=size.D**-0.5).requires_grad_()
    order = (plan.order_R, plan.row_TK) if gather else (None, None)
    y_RN = grouped_gemm(x, w_END, plan.counts_E, *order, backend="triton")
    upstream_RN = y_RN.detach()
    r = sample(rows, draw)
    source_R = plan.source_R() if gather else torch.arange(rows, device=draw.device)
    # one row after the other: the experts' matrices may be as large as the sample has rows
    products = [w_END[e].float() @ x[s].float() for e, s in zip(expert_of(r, plan), source_R[r], strict=True)]
    assert_close("products", y_RN[r], torch.stack(products))
    grad_x, grad_w = torch.autograd.grad(y_RN, [x, w_END], upstream_RN)
    picked = sample(len(x), draw)[:64]
    for i in picked.tolist():
        places = plan.row_TK[i] if gather else torch.tensor([i], device=draw.device)
        back = sum(upstream_RN[p].float() @ w_END[e].float() for p, e in zip(places, expert_of(places, plan), strict=True))
        assert_close(f"gradient of x[{i}]", grad_x[i], back)
    ends = plan.counts_E.cumsum(0).tolist()
    for e in (0, size.E - 1):
        rows_e = torch.arange(ends[e] - int(plan.counts_E[e]), ends[e], device=draw.device)
        assert_close(f"gradient of w[{e}]", grad_w[e], upstream_RN[rows_e].float().T @ x[source_R[rows_e]].float())


def swiglu(x: Tensor, w13_2FD: Tensor, w2_DF: Tensor) -> Tensor:
    return (F.silu(x @ w13_2FD[0].T) * (x @ w13_2FD[1].T)) @ w2_DF.T


def check_layer_offsets(size: Size, draw: Draw) -> None:
    """moe_layer_mlp for a sample of tokens; weight gradients of the first and the last expert, from all of their rows."""
    plan, experts = make_plan(size, draw), {name: x.requires_grad_() for name, x in expert_weights(size, draw).items()}
    x_TD, weights_TK = draw.normal(size.T, size.D).requires_grad_(), draw.uniform(size.T, size.K).requires_grad_()
    y_TD = moe_layer_mlp(x_TD, weights_TK, *plan[:3], *experts.values(), backend="triton")
    direction_TD = draw.normal(size.T, size.D)
    grad_TD, grad_TK, grad_w13, grad_w2 = torch.autograd.grad(y_TD, [x_TD, weights_TK, *experts.values()], direction_TD)
    w13_E2FD, w2_EDF = (x.detach() for x in experts.values())
    for t in sample(size.T, draw)[:32].tolist():
        x_D, weights_K = (x[t].detach().float().requires_grad_() for x in (x_TD, weights_TK))
        chosen = expert_of(plan.row_TK[t], plan).tolist()
        outputs_KD = torch.stack([swiglu(x_D, w13_E2FD[e].float(), w2_EDF[e].float()) for e in chosen])
        want_D = weights_K @ outputs_KD
        want_x, want_weights = torch.autograd.grad(want_D, [x_D, weights_K], direction_TD[t].float())
        assert_close(f"output of token {t}", y_TD[t], want_D)
        assert_close(f"gradient of token {t}", grad_TD[t], want_x)
        # in fp32, but of values in the tokens' dtype
        assert_close(f"gradient of the weights of token {t}", grad_TK[t].to(draw.dtype), want_weights)
    ends = plan.counts_E.cumsum(0).tolist()
    for e in (0, size.E - 1):
        choices_N = plan.order_R[ends[e] - int(plan.counts_E[e]) : ends[e]]
        t, k = choices_N // size.K, choices_N % size.K
        w13_2FD, w2_DF = (x[e].float().requires_grad_() for x in (w13_E2FD, w2_EDF))
        y_ND = swiglu(x_TD[t].detach().float(), w13_2FD, w2_DF)
        upstream_ND = direction_TD[t].float() * weights_TK[t, k, None].detach()
        want_w13, want_w2 = torch.autograd.grad(y_ND, [w13_2FD, w2_DF], upstream_ND)
        assert_close(f"gradient of w13[{e}]", grad_w13[e], want_w13)
        assert_close(f"gradient of w2[{e}]", grad_w2[e], want_w2)
