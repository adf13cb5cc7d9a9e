"""From router logits to experts and weights, on a GPU: one kernel each way against torch's softmax and topk.

Two units. gate: chosen experts and their renormalised weights; backward from the weights. gate+losses: also the scores, the
squared logsumexp and the counts of experts that balance and z losses need; backward from weights, scores and squares.

Logits are fp32 whatever --dtype says, and such that the chosen experts follow the routing. Choices are judged by the exact scores
of the chosen experts, so that two scores which fp32 cannot tell apart may change places; gradients by those of the same choices.
bench/README.md says how times are taken and what the columns are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from moefold.kernels.topk_gate import Backend, GateRule, topk_gate

from .permute import problems
from .protocol.contender import Contender, Kind, Named, Problem, Raw
from .protocol.gate import admit, allowances, check_names, relative_error, results_of
from .protocol.options import LeftOut, Plan, add_unit_options, backend_note, our_backend, run_units
from .protocol.shapes import PASSES, Pass, Shape
from .protocol.table import Setting, Work, least_ratio, measure
from .result import Result, Row

UNITS = ("gate", "gate+losses")
EXPONENTIAL = 2.0**-21
"""Beside the rounding of fp32: a GPU's exponential is an approximation, with an error of 2 units in the last place."""


def options(parser: argparse.ArgumentParser) -> None:
    add_unit_options(parser, UNITS)


def run(options: argparse.Namespace) -> Result:
    return run_units("topk_gate", options, _unit_rows, figures)


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Of each unit and pass, the least of anybody else's time by ours, over shapes and routings."""
    found: dict[str, float] = {}
    for unit, short in zip(UNITS, ("gate", "losses"), strict=True):
        for part in PASSES:
            least = least_ratio([row for row in rows if row["unit"] == unit], (part,))
            found |= {} if least is None else {f"{short}_{part.replace('+', '_')}_peer_ratio": least}
    return found


@dataclass(frozen=True)
class Task:
    """logits_TE, a leaf; directions: gradients of the outputs that backward starts from, by name."""

    shape: Shape
    logits_TE: Tensor
    directions: Mapping[str, Tensor]

    def judge(self, got: Named) -> dict[str, float]:
        """Relative errors in fp64, given the choices that were made."""
        T, E, K = self.shape.T, self.shape.E, self.shape.K
        wanted = {"scores": (T, E), "z": (T,), "counts": (E,)} if "scores" in self.directions else {}
        check_names(got, {"indices": (T, K), "weights": (T, K), "dLogits": (T, E), **wanted})
        logits_TE, indices_TK = self.logits_TE.detach().double().requires_grad_(), got["indices"].long()
        scores_TE = torch.softmax(logits_TE, -1)
        chosen_TK = scores_TE.gather(1, indices_TK)
        exact = {
            "weights": chosen_TK / chosen_TK.sum(-1, keepdim=True),
            "scores": scores_TE,
            "z": torch.logsumexp(logits_TE, -1).square(),
            "counts": torch.bincount(indices_TK.flatten(), minlength=E),
        }
        outputs = [exact[name] for name in self.directions]
        (grad_TE,) = torch.autograd.grad(outputs, logits_TE, [x.double() for x in self.directions.values()])
        errors = {"indices": relative_error(chosen_TK.detach(), scores_TE.detach().topk(K, dim=-1).values)}
        return errors | {n: relative_error(got[n], (exact | {"dLogits": grad_TE})[n].detach()) for n in got if n != "indices"}

    def contender(self, name: str, forward: Callable[[Tensor], Named], kind: Kind = "peer", note: str = "") -> Contender:
        names = list(self.directions)

        def backward(outputs: Named, keep_graph: bool) -> Raw:
            starts = [outputs[n] for n in names]
            return torch.autograd.grad(starts, self.logits_TE, list(self.directions.values()), retain_graph=keep_graph)

        leaves = {"dLogits": self.logits_TE}
        return Contender(name, lambda: forward(self.logits_TE), backward, leaves=leaves, kind=kind, note=note)


def logits_for(problem: Problem) -> Tensor:
    """Logits [T, E] whose K largest are those of the routing: small noise, and more for the chosen ones."""
    generator = torch.Generator(problem.device).manual_seed(7)
    size = (problem.shape.T, problem.shape.E)
    logits_TE = torch.randn(size, device=problem.device, generator=generator).mul_(0.5).clamp_(-2, 2)
    lift_TK = torch.rand(problem.indices_TK.shape, device=problem.device, generator=generator).add_(4)
    return logits_TE.scatter_add_(1, problem.indices_TK, lift_TK).requires_grad_()


def make_task(problem: Problem, losses: bool) -> Task:
    generator = torch.Generator(problem.device).manual_seed(8)
    (T, K), E = problem.indices_TK.shape, problem.shape.E
    sizes = {"weights": (T, K), **({"scores": (T, E), "z": (T,)} if losses else {})}
    directions = {n: torch.randn(size, device=problem.device, generator=generator).mul_(0.2) for n, size in sizes.items()}
    return Task(problem.shape, logits_for(problem), directions)


def _unit_rows(unit: str, plan: Plan, setting: Setting, left_out: LeftOut) -> list[Row]:
    rows: list[Row] = []
    losses = unit == "gate+losses"
    for place, problem in problems(unit, plan):
        task = make_task(problem, losses)
        plain = plain_gate(task, losses)
        allowed = {n: e + EXPONENTIAL for n, e in allowances(task.judge(results_of(plain))).items()}
        checked = admit(left_out.keep([*contenders(task, losses), plain]), task.judge, allowed, plan.device)
        rows += measure(place, checked, setting, lambda part, task=task: Work(bytes=gate_bytes(task.shape, part, losses)))  # type: ignore[misc]
    return rows


def plain_gate(task: Task, losses: bool) -> Contender:
    """Torch's softmax over all experts, and its topk, which leaves the order of ties open."""

    def forward(logits_TE: Tensor) -> Named:
        scores_TE = torch.softmax(logits_TE, -1)
        best_TK, indices_TK = scores_TE.topk(task.shape.K, dim=-1)
        out = {"indices": indices_TK, "weights": best_TK / best_TK.sum(-1, keepdim=True)}
        return out | (_for_losses(logits_TE, scores_TE, indices_TK) if losses else {})

    return task.contender("softmax, topk", forward)


def contenders(task: Task, losses: bool) -> list[Contender]:
    rule = GateRule(top_k=task.shape.K)
    device = task.logits_TE.device
    always = "always makes what losses need"

    def by(backend: Backend, logits_TE: Tensor) -> Named:
        gate = topk_gate(logits_TE, rule, backend=backend)
        out = {"indices": gate.indices_TK, "weights": gate.weights_TK}
        return out | ({"scores": gate.scores_TE, "z": gate.z_T, "counts": gate.counts_E} if losses else {})

    def late(logits_TE: Tensor) -> Named:
        best_TK, indices_TK = logits_TE.topk(task.shape.K, dim=-1)
        return {"indices": indices_TK, "weights": torch.softmax(best_TK, -1)}

    return [
        task.contender("ours", partial(by, our_backend(device)), "ours", f"{backend_note(device)}; {always}"),
        task.contender("torch back end", partial(by, "torch"), note=always),
        # the same weights by less work; it has no scores of all experts
        *([] if losses else [task.contender("topk, softmax", late)]),
    ]


def _for_losses(logits_TE: Tensor, scores_TE: Tensor, indices_TK: Tensor) -> dict[str, Tensor]:
    counts_E = torch.zeros(logits_TE.shape[1], dtype=torch.int64, device=logits_TE.device)
    flat_R = indices_TK.flatten()
    counts_E.scatter_add_(0, flat_R, torch.ones_like(flat_R))
    return {"scores": scores_TE, "z": torch.logsumexp(logits_TE, -1).square(), "counts": counts_E}


def gate_bytes(shape: Shape, part: Pass, losses: bool) -> float:
    """Logits read, 8 bytes written for each choice; for losses scores and squares too. Backward: what had a gradient, and logits,
    read, their gradient written."""
    table, row = 4.0 * shape.T * shape.E, 4.0 * shape.T
    fwd = table + 8.0 * shape.R + (table + row if losses else 0.0)
    bwd = 2 * table + 8.0 * shape.R + (table + row if losses else 0.0)
    return {"fwd": fwd, "bwd": bwd, "fwd+bwd": fwd + bwd}[part]
