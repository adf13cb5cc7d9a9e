"""The experts of a layer on a GPU, forward and backward: ours in Triton against grouped_mm, transformers, Liger and Megatron.

Three units. experts: from tokens, given each token's experts and weights; sorting them is part of it. grouped: rows that come in
expert order, as on one of 8 expert-parallel ranks of shape D. layer: the router and its choice too.

Before anything is timed, every output and gradient must be as exact as plain torch in the same dtype, and ours must repeat itself
to the last bit, not depend on how experts are numbered, and give experts without rows gradients of exactly zero.
bench/README.md says how times are taken and what the columns are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moefold.kernels.moe_mlp import Backend, moe_layer_mlp, moe_mlp
from moefold.kernels.sort_tokens import sort_tokens
from moefold.kernels.topk_gate import Gate, GateRule, topk_gate

from .peers import layer_peers
from .protocol.contender import Contender, Kind, Named, Problem, absent, by_autograd, make_problem
from .protocol.experts import ExactJudge, plain_results
from .protocol.formulas import layer_flops, saved_scatter_bytes
from .protocol.gate import Checked, admit, allowances, check_expert_order, free, renumbered
from .protocol.limits import cublas_bound
from .protocol.options import LeftOut, Plan, add_unit_options, backend_note, our_backend, run_units
from .protocol.shapes import Pass, expert_parallel_view, rows_max_over_mean
from .protocol.table import Setting, Work, figure, least_ratio, measure
from .result import Cell, Result, Row

UNITS = ("experts", "grouped", "layer")
GROUPED_OF = ("D", "tiny", "small")
"""Shapes that are also looked at from one expert-parallel rank."""
GOAL_SHAPE = "A: T32768 "


def options(parser: argparse.ArgumentParser) -> None:
    add_unit_options(parser, UNITS)


def run(options: argparse.Namespace) -> Result:
    return run_units("moe_mlp", options, _unit_rows, figures)


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """What goals are stated for; those whose rows were not measured are left out."""
    goal = {"unit": "experts", "shape": GOAL_SHAPE, "routing": "balanced"}
    ours = {**goal, "contender": "ours"}
    saved = figure(rows, "saved_%", {**ours, "pass": "fwd+bwd"})
    found = {
        "forward_tflops": figure(rows, "tflops", {**ours, "pass": "fwd"}),
        "forward_backward_tflops": figure(rows, "tflops", {**ours, "pass": "fwd+bwd"}),
        "ratio_grouped_mm": figure(rows, "ratio", {**goal, "contender": "torch grouped_mm", "pass": "fwd+bwd"}),
        "saved_share": None if saved is None else saved / 100,
        "least_ratio_to_best": least_ratio(rows, ("fwd", "fwd+bwd")),
    }
    return {name: value for name, value in found.items() if value is not None}


def _unit_rows(unit: str, plan: Plan, setting: Setting, left_out: LeftOut) -> list[Row]:
    rows: list[Row] = []
    for shape in plan.shapes:
        if unit == "grouped" and shape.name not in GROUPED_OF:
            continue
        seen = expert_parallel_view(shape, 2 if plan.smoke else 8) if unit == "grouped" else shape
        # a layer with a router chooses for itself, whatever the routing
        for routing in plan.routings[:1] if unit == "layer" else plan.routings:
            problem = make_problem(seen, routing, plan.dtype, plan.device)
            rows += _measured(unit, problem, "by router" if unit == "layer" else routing, setting, left_out)
            del problem
            free(plan.device)
            print(f"  {unit} {seen} {rows[-1]['routing']}: done", file=sys.stderr, flush=True)
    return rows


def _measured(unit: str, problem: Problem, routing: str, setting: Setting, left_out: LeftOut) -> list[Row]:
    shape = problem.shape

    def work(part: Pass) -> Work:
        return Work(layer_flops(shape, part), None, saved_scatter_bytes(shape, problem.dtype.itemsize))

    router_EH = None
    if unit == "layer":
        generator = torch.Generator(problem.device).manual_seed(2)
        router_EH = torch.randn(shape.E, shape.H, device=problem.device, generator=generator).mul_(0.02)
        problem = replace(problem, indices_TK=choose(problem.x_TD, router_EH, shape.K, "torch").indices_TK)
    balance = rows_max_over_mean(problem.indices_TK, shape.E)
    checked = checked_experts(problem, left_out) if router_EH is None else checked_layers(problem, router_EH, left_out)
    place: dict[str, Cell] = {"unit": unit, "shape": str(shape), "routing": routing, "max_over_mean": balance}
    return measure(place, checked, setting, work)


def checked_experts(problem: Problem, left_out: LeftOut) -> list[Checked]:
    """Everybody on given choices: ours (checked before the others are made, which may copy weights), torch, peers, the bound."""
    judge = ExactJudge(problem)
    plain = plain_results(problem)
    allowed = allowances(judge(plain))
    del plain

    def numbering_is_free(contender: Contender, results: Named) -> str | None:
        shift_E = torch.roll(torch.arange(problem.shape.E, device=problem.device), 1)
        other, back = renumbered(problem, shift_E)
        return check_expert_order(results, our_experts(other), back)

    ours = admit([our_experts(problem)], judge, allowed, problem.device, [numbering_is_free])
    peers = [] if problem.shape.grouped else layer_peers(problem)
    others = left_out.keep([torch_experts(problem), *peers, cublas_bound(problem)])
    return ours + admit(others, judge, allowed, problem.device)


def our_experts(problem: Problem) -> Contender:
    """The product's kernels."""
    backend = our_backend(problem.device)
    return _experts("ours", problem, backend, backend, "ours", backend_note(problem.device))


def torch_experts(problem: Problem) -> Contender:
    """torch's sort, gathers, grouped_mm and sum, as the product runs them without Triton."""
    if problem.device.type == "cuda" and problem.dtype != torch.bfloat16:
        return absent("torch grouped_mm", f"grouped_mm takes bfloat16 on CUDA, not {problem.dtype}")
    return _experts("torch grouped_mm", problem, "torch", "grouped", "peer", "")


def _experts(
    name: str, problem: Problem, plan_backend: Literal["torch", "triton"], backend: Backend, kind: Kind, note: str
) -> Contender:
    shape, leaves = problem.shape, problem.leaves()
    if shape.grouped:
        x_RD, w13, w2 = leaves.values()
        counts_E = torch.bincount(problem.indices_TK[:, 0], minlength=shape.E)
        rows: Callable[[], Tensor] = lambda: moe_mlp(x_RD, w13, w2, counts_E, backend=backend)  # noqa: E731
        return by_autograd(name, rows, leaves, problem.direction_TD, kind=kind, note=note)
    x_TD, w13, w2, weights_TK = leaves.values()

    def forward() -> Tensor:
        plan = sort_tokens(problem.indices_TK, shape.E, backend=plan_backend)
        return moe_layer_mlp(x_TD, weights_TK, *plan, w13, w2, backend=backend)

    return by_autograd(name, forward, leaves, problem.direction_TD, kind=kind, note=note)


def choose(x_TD: Tensor, router_EH: Tensor, top_k: int, backend: Literal["torch", "triton"]) -> Gate:
    """What a router makes of tokens; logits in fp32 whatever the tokens' dtype, as the product's router has them."""
    return topk_gate(F.linear(x_TD.float(), router_EH), GateRule(top_k=top_k), backend=backend)


def checked_layers(problem: Problem, router_EH: Tensor, left_out: LeftOut) -> list[Checked]:
    """Ours and torch with a router. `problem` has the choices that torch makes by it; its weights are not used."""
    judge = ExactJudge(problem, router_EH)
    plain = plain_results(problem, router_EH)
    allowed = allowances(judge({**plain, "indices": problem.indices_TK}))
    del plain
    backend = our_backend(problem.device)
    ours = [_layer("ours", problem, router_EH, backend, backend, "ours", backend_note(problem.device))]
    checked = admit(ours, judge, allowed, problem.device)
    if problem.device.type == "cuda" and problem.dtype != torch.bfloat16:
        torch_layer = absent("torch grouped_mm", f"grouped_mm takes bfloat16 on CUDA, not {problem.dtype}")
    else:
        torch_layer = _layer("torch grouped_mm", problem, router_EH, "torch", "grouped", "peer", "")
    return checked + admit(left_out.keep([torch_layer, cublas_bound(problem)]), judge, allowed, problem.device)


def _layer(
    name: str,
    problem: Problem,
    router_EH: Tensor,
    plan_backend: Literal["torch", "triton"],
    backend: Backend,
    kind: Kind,
    note: str,
) -> Contender:
    shape = problem.shape
    leaves = {key: x for key, x in problem.leaves().items() if key != "dS"} | {"dR": router_EH.detach().requires_grad_()}
    x_TD, w13, w2, router = leaves.values()

    def forward() -> Named:
        gate = choose(x_TD, router, shape.K, plan_backend)
        plan = sort_tokens(gate.indices_TK, shape.E, backend=plan_backend)
        y_TD = moe_layer_mlp(x_TD, gate.weights_TK, *plan, w13, w2, backend=backend)
        return {"out": y_TD, "indices": gate.indices_TK}

    return by_autograd(name, forward, leaves, problem.direction_TD, kind=kind, note=note)
