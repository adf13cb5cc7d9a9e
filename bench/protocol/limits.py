"""What this machine can do at best, measured in the same process as everything else; and the layer's work as plain products."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moefold.kernels.sort_tokens import sort_tokens

from .contender import Contender, Named, Problem, Raw
from .timing import Budget, Clock, quantiles, take_turns

MM_SIZE = 8192
COPY_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Limits:
    """mm_tflops: of one large square product on random data. copy_gb_s: bytes read plus bytes written per second."""

    mm_tflops: float
    copy_gb_s: float


def measure_limits(
    clock: Clock, dtype: torch.dtype, budget: Budget, mm_size: int = MM_SIZE, copy_bytes: int = COPY_BYTES
) -> Limits:
    """Medians of an mm_size^3 product and of a copy of copy_bytes, in turns."""
    generator = torch.Generator(clock.device).manual_seed(0)
    a, b = (torch.randn(mm_size, mm_size, dtype=dtype, device=clock.device, generator=generator) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.ones(copy_bytes // 4, dtype=torch.int32, device=clock.device)
    target = torch.empty_like(source)
    calls = {"mm": lambda: torch.mm(a, b, out=product), "copy": lambda: target.copy_(source)}
    taken = take_turns(calls, clock, budget)
    mm_ms, copy_ms = (quantiles(taken[name].ms)[1] for name in calls)
    return Limits(2 * mm_size**3 / mm_ms / 1e9, 2 * source.nbytes / copy_ms / 1e6)


def even_rows(problem: Problem) -> int:
    """Rows of each expert if all had as many (rounded up)."""
    return -(-problem.shape.R // problem.shape.E)


def cublas_bound(problem: Problem) -> Contender:
    """The products of the layer by torch.bmm on rows in place and evenly spread, with the activation and the sum over k.

    Forward: product, silu * up, product, weighted gather-sum. Backward: the four products, the gradient of the activation, and
    the gather-sum. Computes with other rows than the problem's: a bound of time, not a result. With rows in expert order
    (`grouped`) there is no gather-sum.
    """
    shape, n = problem.shape, even_rows(problem)
    generator = torch.Generator(problem.device).manual_seed(1)

    def rows(width: int) -> Tensor:
        size = (shape.E, n, width)
        return torch.randn(size, dtype=problem.dtype, device=problem.device, generator=generator).mul_(0.2)

    x_ENH, grad_y_ENH = rows(shape.H), rows(shape.H)
    w13_EGH, w2_EHF = problem.w13_E2FD.flatten(1, 2), problem.w2_EDF
    _, row_TK, _ = sort_tokens(problem.indices_TK, shape.E, backend="torch")

    def combine(y_ENH: Tensor, weights_TK: Tensor | None) -> Tensor:
        y_RH = y_ENH.flatten(0, 1)
        return y_RH if shape.grouped else _gather_sum(y_RH, row_TK, weights_TK)

    @torch.no_grad()
    def forward() -> Named:
        pre_ENG = torch.bmm(x_ENH, w13_EGH.transpose(1, 2))
        hidden_ENF = F.silu(pre_ENG[..., : shape.F]).mul_(pre_ENG[..., shape.F :])
        return {"out": combine(torch.bmm(hidden_ENF, w2_EHF.transpose(1, 2)), problem.weights_TK), "pre": pre_ENG}

    @torch.no_grad()
    def backward(outputs: Named, keep_graph: bool) -> Raw:
        gate_ENF, up_ENF = outputs["pre"].split(shape.F, dim=-1)
        grad_hidden_ENF = torch.bmm(grad_y_ENH, w2_EHF)
        silu_ENF = F.silu(gate_ENF)
        grad_pre_ENG = torch.empty_like(outputs["pre"])
        torch.mul(grad_hidden_ENF, silu_ENF, out=grad_pre_ENG[..., shape.F :])
        grad_gate = grad_pre_ENG[..., : shape.F]
        torch.ops.aten.silu_backward.grad_input(grad_hidden_ENF.mul_(up_ENF), gate_ENF, grad_input=grad_gate)
        grad_w2 = torch.bmm(grad_y_ENH.transpose(1, 2), silu_ENF.mul_(up_ENF))
        grad_w13 = torch.bmm(grad_pre_ENG.transpose(1, 2), x_ENH)
        return combine(torch.bmm(grad_pre_ENG, w13_EGH), None), grad_w13, grad_w2

    return Contender("bmm bound", forward, backward, kind="bound", note="even load, rows in place")


def _gather_sum(y_RH: Tensor, row_TK: Tensor, weights_TK: Tensor | None) -> Tensor:
    if y_RH.is_cuda:
        from moefold.kernels.permute.triton_impl import gather_sum

        return gather_sum(y_RH, row_TK, weights_TK)
    from moefold.kernels.permute.torch_impl import gather_sum as torch_gather_sum

    return torch_gather_sum(y_RH, row_TK, weights_TK, None)
