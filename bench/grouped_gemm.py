"""The ragged matrix products of a layer on a GPU: ours in Triton against torch's grouped_mm, a loop, and an even torch.bmm.

Three units, each a forward of its own. up: tokens gathered into expert order, times gate and up projections, with SwiGLU. down:
rows in expert order times the down projection. dw13: the gradient of the gate and up projections, a sum over each expert's rows,
with the tokens gathered. The even bmm has rows in place and the same number for each expert: a bound of time, not a contender.

Before anything is timed, results must be as exact as plain torch in the same dtype, and ours must repeat itself to the last bit
and not depend on how experts are numbered. bench/README.md says how times are taken and what the columns are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moefold.kernels.grouped_gemm import reference, torch_impl
from moefold.kernels.sort_tokens import sort_tokens

from .protocol import formulas
from .protocol.contender import Contender, Named, Problem, absent, make_problem
from .protocol.experts import exact_dtype
from .protocol.gate import Checked, admit, against, allowances, check_expert_order, free, renumbered
from .protocol.limits import even_rows
from .protocol.options import LeftOut, Plan, add_unit_options, backend_note, in_processes, our_backend, plan_of, setting_of
from .protocol.shapes import PASSES, Routing, Shape, rows_max_over_mean
from .protocol.table import Setting, Work, figure, least_ratio, measure
from .result import Cell, Result, Row

UNITS = ("up", "down", "dw13")
GOAL_SHAPE = "A: T32768 "


def options(parser: argparse.ArgumentParser) -> None:
    add_unit_options(parser, UNITS)


def run(options: argparse.Namespace) -> Result:
    plan = plan_of(options)
    if options.processes > 1:
        rows = in_processes("grouped_gemm", options)
    else:
        setting, left_out = setting_of(plan), LeftOut(options.without)
        groups = [(shape, routing) for shape in plan.shapes for routing in plan.routings]
        rows = [row for group in groups for row in _rows(*group, options.units, setting, plan, left_out)]
        left_out.warn()
    return Result(rows, figures(rows))


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Share of the even bmm's speed on shape A for each unit, and how we stand against the best of the others."""
    goal = {"shape": GOAL_SHAPE, "routing": "balanced", "contender": "ours"}
    shares = {unit: figure(rows, "of_bound_%", {**goal, "unit": unit}) for unit in UNITS}
    found = {f"{unit}_share_of_bmm": None if share is None else share / 100 for unit, share in shares.items()}
    found["least_ratio_to_best"] = least_ratio(rows, ("fwd",))
    return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Case:
    """Inputs of one unit. x: tokens [T, D], or rows in expert order [R, F] (down). weights: [E, N, K] or None (dw13). grad_RG: by
    row, for dw13. The plan is that of `sort_tokens`."""

    unit: str
    problem: Problem
    x: Tensor
    weights: Tensor | None
    grad_RG: Tensor | None
    order_R: Tensor
    row_TK: Tensor
    counts_E: Tensor


def case_of(unit: str, problem: Problem, by_choice: Tensor | None) -> Case:
    """The unit's inputs; `by_choice` [T * K, ...]: what lies in expert order, so that renumbered experts get the same rows."""
    plan = sort_tokens(problem.indices_TK, problem.shape.E, backend="torch")
    ordered = None if by_choice is None else by_choice[plan[0]]
    if unit == "down":
        assert ordered is not None
        return Case(unit, problem, ordered, problem.w2_EDF, None, *plan)
    weights = problem.w13_E2FD.flatten(1, 2) if unit == "up" else None
    return Case(unit, problem, problem.x_TD, weights, ordered if unit == "dw13" else None, *plan)


def _rows(shape: Shape, routing: Routing, units: Sequence[str], setting: Setting, plan: Plan, left_out: LeftOut) -> list[Row]:
    rows: list[Row] = []
    problem = make_problem(shape, routing, plan.dtype, plan.device)
    balance = rows_max_over_mean(problem.indices_TK, shape.E)
    for unit in units:
        place: dict[str, Cell] = {"unit": unit, "shape": str(shape), "routing": routing, "max_over_mean": balance}
        checked = checked_contenders(unit, problem, left_out)
        work = _work(unit, shape, plan.dtype)
        rows += measure(place, checked, setting, dict.fromkeys(PASSES, work).__getitem__, ("fwd",))
        del checked
        free(plan.device)
        print(f"  {unit} {shape} {routing}: done", file=sys.stderr, flush=True)
    return rows


def _work(unit: str, shape: Shape, dtype: torch.dtype) -> Work:
    flops = formulas.down_flops(shape) if unit == "down" else formulas.up_flops(shape)
    moved = {"up": formulas.up_bytes, "down": formulas.down_bytes, "dw13": formulas.up_weight_grad_bytes}[unit]
    return Work(flops, moved(shape, dtype.itemsize))


def checked_contenders(unit: str, problem: Problem, left_out: LeftOut) -> list[Checked]:
    """Ours, torch's grouped_mm, a loop and the even bmm, checked; those of `left_out` aside."""
    shape = problem.shape
    generator = torch.Generator(problem.device).manual_seed(3)
    width = {"up": 0, "down": shape.F, "dw13": 2 * shape.F}[unit]
    size = (shape.R, width)
    by_choice = torch.randn(size, dtype=problem.dtype, device=problem.device, generator=generator).mul_(0.2) if width else None
    case = case_of(unit, problem, by_choice)
    judge = against({"out": one_by_one(case, exact_dtype(problem))})
    allowed = allowances(judge({"out": one_by_one(case, problem.dtype)}))

    def numbering_is_free(contender: Contender, results: Named) -> str | None:
        shift_E = torch.roll(torch.arange(shape.E, device=problem.device), 1)
        other = case_of(unit, renumbered(problem, shift_E)[0], by_choice)

        def back(others: Named) -> Named:
            # rows by choice, and from there to the rows of the original
            out = others["out"]
            return {"out": out[shift_E] if unit == "dw13" else out[other.row_TK.flatten()][case.order_R]}

        return check_expert_order(results, ours(other), back)

    checked = admit([ours(case)], judge, allowed, problem.device, [numbering_is_free])
    others = left_out.keep([by_grouped_mm(case), by_loop(case), even_bmm(case)])
    return checked + admit(others, judge, allowed, problem.device)


def one_by_one(case: Case, dtype: torch.dtype) -> Tensor:
    """The result in `dtype`, one expert after the other, so that only one expert's weights are converted at once."""
    shape, out, start = case.problem.shape, [], 0
    for expert, count in enumerate(case.counts_E.tolist()):
        rows = slice(start, start + count)
        start += count
        x_NK = (case.x[rows] if case.unit == "down" else case.x[case.order_R[rows] // shape.K]).to(dtype)
        if case.unit == "dw13":
            assert case.grad_RG is not None
            out.append(case.grad_RG[rows].to(dtype).T @ x_NK)
            continue
        assert case.weights is not None
        y_NM = x_NK @ case.weights[expert].to(dtype).T
        out.append(F.silu(y_NM[:, : shape.F]) * y_NM[:, shape.F :] if case.unit == "up" else y_NM)
    return torch.stack(out) if case.unit == "dw13" else torch.cat(out)


def ours(case: Case) -> Contender:
    """The product's kernels; on a CPU without the interpreter its torch back ends."""
    device, plan = case.problem.device, (case.counts_E, case.order_R, case.row_TK)
    gemm: Callable[..., Tensor] = torch_impl.grouped_gemm
    swiglu: Callable[..., tuple[Tensor, Tensor]] = reference.grouped_swiglu
    weight_grad: Callable[..., Tensor] = reference.grouped_weight_grad
    if our_backend(device) == "triton":
        from moefold.kernels.grouped_gemm import triton_impl

        gemm, swiglu, weight_grad = triton_impl.grouped_gemm, triton_impl.grouped_swiglu, triton_impl.grouped_weight_grad

    @torch.no_grad()
    def forward() -> Named:
        if case.unit == "up":
            return {"out": swiglu(case.x, case.problem.w13_E2FD, *plan)[1]}
        if case.unit == "down":
            return {"out": gemm(case.x, case.weights, case.counts_E)}
        return {"out": weight_grad(case.grad_RG, case.x, *plan)}

    return Contender("ours", forward, kind="ours", note=backend_note(device))


def by_grouped_mm(case: Case) -> Contender:
    """torch.nn.functional.grouped_mm on gathered rows, with the activation as two operations."""
    if not torch_impl.has_grouped_mm(case.x):
        return absent("torch grouped_mm", f"grouped_mm takes no {case.x.dtype} on {case.x.device.type}")
    shape, ends_E = case.problem.shape, case.counts_E.cumsum(0).to(torch.int32)

    @torch.no_grad()
    def forward() -> Named:
        x_RK = case.x if case.unit == "down" else case.x.index_select(0, case.order_R // shape.K)
        if case.grad_RG is not None:
            return {"out": F.grouped_mm(case.grad_RG.T, x_RK, offs=ends_E)}
        assert case.weights is not None
        y_RN = F.grouped_mm(x_RK, case.weights.transpose(1, 2), offs=ends_E)
        return {"out": F.silu(y_RN[:, : shape.F]).mul_(y_RN[:, shape.F :]) if case.unit == "up" else y_RN}

    return Contender("torch grouped_mm", forward)


def by_loop(case: Case) -> Contender:
    """One product for each expert; the counts are read on the host."""

    @torch.no_grad()
    def forward() -> Named:
        return {"out": one_by_one(case, case.problem.dtype)}

    return Contender("loop", forward)


def even_bmm(case: Case) -> Contender:
    """One batched product of the same size: rows in place, as many for each expert."""
    shape, n = case.problem.shape, even_rows(case.problem)
    generator = torch.Generator(case.x.device).manual_seed(4)

    def rows(width: int) -> Tensor:
        return torch.randn((shape.E, n, width), dtype=case.x.dtype, device=case.x.device, generator=generator).mul_(0.2)

    x_ENK = rows(case.x.shape[1])
    grad_ENG = rows(2 * shape.F) if case.unit == "dw13" else None

    @torch.no_grad()
    def forward() -> Named:
        if grad_ENG is not None:
            return {"out": torch.bmm(grad_ENG.transpose(1, 2), x_ENK)}
        assert case.weights is not None
        y_ENM = torch.bmm(x_ENK, case.weights.transpose(1, 2))
        return {"out": F.silu(y_ENM[..., : shape.F]).mul_(y_ENM[..., shape.F :]) if case.unit == "up" else y_ENM}

    return Contender("bmm bound", forward, kind="bound", note="even load, rows in place")
