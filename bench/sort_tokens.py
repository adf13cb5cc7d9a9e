"""The plan that brings tokens into expert order, on a GPU: a counting sort against argsort and against peers; and with the gate.

Two units. sort: from each token's experts to the order of rows, its inverse and the counts. gate+sort: from router logits to all
of these, which is everything between the router's product and the experts.

Bytes are 16 for each row: a choice read, three numbers written. A part so small may be mostly waiting for launches: graph_ms,
replays of a CUDA graph with what they read in the cache, is without these; p50_ms is launched from Python.
Plans must be equal, to the last number. bench/README.md says how times are taken and what the columns are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor

from moefold.kernels.sort_tokens import Backend, sort_tokens
from moefold.kernels.topk_gate import GateRule, topk_gate

from .peers import sort_peers
from .permute import problems
from .protocol.contender import Contender, Kind, Named, Problem
from .protocol.gate import admit, allowances, relative_error, results_of
from .protocol.options import LeftOut, Plan, add_unit_options, backend_note, our_backend, run_units
from .protocol.shapes import PASSES
from .protocol.table import Setting, Work, least_ratio, measure
from .result import Result, Row
from .topk_gate import EXPONENTIAL, logits_for

UNITS = ("sort", "gate+sort")


def options(parser: argparse.ArgumentParser) -> None:
    add_unit_options(parser, UNITS)


def run(options: argparse.Namespace) -> Result:
    return run_units("sort_tokens", options, _unit_rows, figures)


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """gate_and_sort_us, sort_us: of ours on shape A, replayed, the largest over routings; sort_peer_ratio: the least of anybody
    else's time by ours."""
    found: dict[str, float] = {}
    for row in rows:
        replayed = row["graph_ms"]
        if row["contender"] == "ours" and str(row["shape"]).startswith("A:") and isinstance(replayed, float):
            name = f"{str(row['unit']).replace('+', '_and_')}_us"
            found[name] = max(1e3 * replayed, found.get(name, 0.0))
    least = least_ratio([row for row in rows if row["unit"] == "sort"], PASSES)
    return found if least is None else found | {"sort_peer_ratio": least}


def _unit_rows(unit: str, plan: Plan, setting: Setting, left_out: LeftOut) -> list[Row]:
    rows: list[Row] = []
    for place, problem in problems(unit, plan):
        made = sort_contenders(problem) if unit == "sort" else gate_and_sort_contenders(problem)
        judge = PlanJudge(problem, with_gate=unit == "gate+sort")
        allowed = {n: e + EXPONENTIAL for n, e in allowances(judge(results_of(made[-1]))).items()}
        # a plan is a permutation: one wrong number in it is far more than what is allowed for weights
        allowed |= dict.fromkeys(("order", "row", "rows", "counts"), 0.0)
        checked = admit(left_out.keep(made), judge, allowed, plan.device)
        measured = measure(place, checked, setting, lambda part, n=problem.shape.R: Work(bytes=16.0 * n), ("fwd",))  # type: ignore[misc]
        # contenders that are not comparable are no bound of the time either
        rows += [{**row, "of_bound_%": None} for row in measured]
    return rows


class PlanJudge:
    """Relative errors of the parts of a plan that a contender makes, one at least. With the gate, of the plan of its own choices,
    and of choices and weights by exact scores."""

    def __init__(self, problem: Problem, with_gate: bool):
        self.problem, self.with_gate = problem, with_gate

    def __call__(self, got: Named) -> dict[str, float]:
        problem, errors = self.problem, {}
        indices_TK = problem.indices_TK
        if self.with_gate:
            indices_TK = got["indices"]
            scores_TE = torch.softmax(logits_for(problem).detach().double(), -1)
            chosen_TK = scores_TE.gather(1, indices_TK)
            errors["indices"] = relative_error(chosen_TK, scores_TE.topk(problem.shape.K, dim=-1).values)
            errors["weights"] = relative_error(got["weights"], chosen_TK / chosen_TK.sum(-1, keepdim=True))
        exact = sorted_by_argsort(indices_TK, problem.shape.E)
        exact["rows"] = exact["row"].sort(-1).values
        parts = [name for name in got if name in exact]
        if not parts:
            raise ValueError(f"none of {', '.join(exact)} among its results ({', '.join(got)})")
        for name in parts:
            part = got[name].sort(-1).values if name == "rows" else got[name]
            errors[name] = relative_error(part, exact[name])
        return errors


def sorted_by_argsort(indices_TK: Tensor, num_experts: int) -> dict[str, Tensor]:
    """order, row and counts by torch's stable sort of int64, a scatter for the inverse, and a scattered sum."""
    flat_R = indices_TK.flatten()
    order_R = torch.argsort(flat_R, stable=True)
    row_R = torch.empty_like(order_R)
    row_R[order_R] = torch.arange(order_R.numel(), device=order_R.device)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=flat_R.device).scatter_add_(0, flat_R, torch.ones_like(flat_R))
    return {"order": order_R, "row": row_R.view(indices_TK.shape), "counts": counts_E}


def sort_contenders(problem: Problem) -> list[Contender]:
    """Ours first; the plain one last."""
    E, device = problem.shape.E, problem.device

    def made(name: str, backend: Backend, kind: Kind, note: str = "") -> Contender:
        def forward() -> Named:
            order_R, row_TK, counts_E = sort_tokens(problem.indices_TK, E, backend=backend)
            return {"order": order_R, "row": row_TK, "counts": counts_E}

        return Contender(name, forward, kind=kind, note=note)

    return [
        made("ours", our_backend(device), "ours", backend_note(device)),
        made("torch back end", "torch", "peer", "sorts int16"),
        *sort_peers(problem),
        Contender("argsort", lambda: sorted_by_argsort(problem.indices_TK, E)),
    ]


def gate_and_sort_contenders(problem: Problem) -> list[Contender]:
    """Ours first; the plain one last."""
    shape, device = problem.shape, problem.device
    logits_TE, rule = logits_for(problem).detach(), GateRule(top_k=shape.K)

    def by(backend: Backend) -> Named:
        gate = topk_gate(logits_TE, rule, backend=backend)
        order_R, row_TK, counts_E = sort_tokens(gate.indices_TK, shape.E, backend=backend)
        return {"indices": gate.indices_TK, "weights": gate.weights_TK, "order": order_R, "row": row_TK, "counts": counts_E}

    def plain() -> Named:
        best_TK, indices_TK = torch.softmax(logits_TE, -1).topk(shape.K, dim=-1)
        weights_TK = best_TK / best_TK.sum(-1, keepdim=True)
        return {"indices": indices_TK, "weights": weights_TK, **sorted_by_argsort(indices_TK, shape.E)}

    return [
        Contender("ours", lambda: by(our_backend(device)), kind="ours", note=backend_note(device)),
        Contender("torch back end", lambda: by("torch")),
        Contender("softmax, topk, argsort", plain),
    ]
