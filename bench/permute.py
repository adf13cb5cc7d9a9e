"""Copying tokens into expert order and summing rows back, on a GPU: bytes per second against a plain copy, and against peers.

Four units. permute: tokens into expert order; backward sums a token's rows. combine: the weighted sum of a token's rows; backward
spreads the gradient and forms that of the weights. combine+: the same with the shared experts' output and the residual stream
added in the pass. regroup: rows that come from several ranks, each sorted by expert, into expert order.

Bytes are what must cross the memory bus once: tokens, rows, and 4 bytes for each row number and weight. "with its plan" marks
contenders that find the order in the same call; ours does it apart, once a layer, and is also shown with it.

Before anything is timed, results must be as exact as plain torch in the same dtype, and ours must repeat itself to the last bit.
bench/README.md says how times are taken and what the columns are.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moefold.kernels.permute import Backend, permute, unpermute
from moefold.kernels.sort_tokens import sort_tokens

from .peers import permute_peers, regroup_peers, unpermute_peers
from .protocol.contender import Contender, Kind, Problem, by_autograd, make_problem
from .protocol.formulas import combine_bytes, permute_bytes
from .protocol.gate import admit, against, allowances, free, results_of
from .protocol.options import LeftOut, Plan, add_unit_options, backend_note, our_backend, run_units
from .protocol.shapes import Pass, Shape, rows_max_over_mean
from .protocol.table import Setting, Work, measure
from .result import Result, Row

UNITS = ("permute", "combine", "combine+", "regroup")
SOURCE_RANKS = 8


def options(parser: argparse.ArgumentParser) -> None:
    add_unit_options(parser, UNITS)


def run(options: argparse.Namespace) -> Result:
    return run_units("permute", options, _unit_rows, figures)


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Of ours forward, the least over shapes and routings: bytes per second by those of a copy, and anybody else's time by ours.

    Without the shapes of a sweep, whose small ones are all overhead.
    """
    found: dict[str, float] = {}
    whole = [row for row in rows if "-" not in str(row["shape"]).partition(":")[0]]
    for unit in UNITS:
        own = [row for row in whole if row["unit"] == unit and row["pass"] == "fwd"]
        shares = [row["of_copy_%"] / 100 for row in own if row["contender"] == "ours" and isinstance(row["of_copy_%"], float)]
        ratios = [row["ratio"] for row in own if not str(row["contender"]).startswith("ours") and isinstance(row["ratio"], float)]
        name = unit.replace("+", "_with_adds")
        found |= {f"{name}_of_copy": min(shares)} if shares else {}
        found |= {f"{name}_peer_ratio": min(ratios)} if ratios else {}
    return found


@dataclass(frozen=True)
class Case:
    """One unit on one problem: who takes part, the plain computation in the same dtype, exact results, and bytes by pass."""

    contenders: Sequence[Contender]
    plain: Contender
    exact: Mapping[str, Tensor]
    bytes: Callable[[Pass], float]

    def rows(self, place: Mapping[str, str | float], setting: Setting, left_out: LeftOut) -> list[Row]:
        """Everybody who is not left out is checked, then measured.

        Raises:
            SystemExit: ours fails its checks.
        """
        judge = against(self.exact)
        allowed = allowances(judge(results_of(self.plain)))
        checked = admit(left_out.keep([*self.contenders, self.plain]), judge, allowed, setting.clock.device)
        return measure(place, checked, setting, lambda part: Work(bytes=self.bytes(part)))


def _unit_rows(unit: str, plan: Plan, setting: Setting, left_out: LeftOut) -> list[Row]:
    make = {"permute": permute_case, "combine": combine_case, "combine+": combine_with_adds_case, "regroup": regroup_case}[unit]
    return [row for place, problem in problems(unit, plan) for row in make(problem).rows(place, setting, left_out)]


def problems(unit: str, plan: Plan) -> Iterator[tuple[dict[str, str | float], Problem]]:
    """Every shape with every routing, and what a row says about it; without the experts' weights (F is 1 in the problem)."""
    for shape in plan.shapes:
        for routing in plan.routings:
            problem = make_problem(replace(shape, F=1), routing, plan.dtype, plan.device)
            balance = rows_max_over_mean(problem.indices_TK, shape.E)
            yield {"unit": unit, "shape": str(shape), "routing": routing, "max_over_mean": balance}, problem
            free(plan.device)
            print(f"  {unit} {shape} {routing}: done", file=sys.stderr, flush=True)


def in_order(problem: Problem) -> tuple[Tensor, Tensor]:
    """order_R and row_TK of the problem's routing."""
    order_R, row_TK, _ = sort_tokens(problem.indices_TK, problem.shape.E, backend="torch")
    return order_R, row_TK


def random_rows(problem: Problem, rows: int, seed: int) -> Tensor:
    """[rows, D] from N(0, 0.2^2), as the problem's tokens."""
    generator = torch.Generator(problem.device).manual_seed(seed)
    size = (rows, problem.shape.H)
    return torch.randn(size, dtype=problem.dtype, device=problem.device, generator=generator).mul_(0.2)


def summed(rows_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """The (weighted) sum of each token's rows in fp64, one k after the other for the sake of memory."""
    out_TD = rows_RD.new_zeros(row_TK.shape[0], rows_RD.shape[1], dtype=torch.float64)
    for k, row_T in enumerate(row_TK.unbind(1)):
        part_TD = rows_RD[row_T].double()
        out_TD += part_TD if weights_TK is None else part_TD * weights_TK[:, k, None].double()
    return out_TD


def permute_case(problem: Problem) -> Case:
    """Who finds the order in the same call says so in its note."""
    shape, (order_R, row_TK) = problem.shape, in_order(problem)
    tokens_R, direction_RD = order_R // shape.K, random_rows(problem, shape.R, seed=1)
    leaves = {"dX": problem.leaves()["dX"]}
    backend, note = our_backend(problem.device), backend_note(problem.device)

    def planned(x_TD: Tensor) -> Tensor:
        order_R, row_TK, _ = sort_tokens(problem.indices_TK, shape.E, backend=backend)
        return permute(x_TD, order_R, row_TK, backend=backend)

    def made(name: str, fn: Callable[[Tensor], Tensor], kind: Kind, note: str = "") -> Contender:
        return by_autograd(name, lambda: fn(leaves["dX"]), leaves, direction_RD, kind=kind, note=note)

    contenders = [
        made("ours", lambda x: permute(x, order_R, row_TK, backend=backend), "ours", note),
        made("ours + plan", planned, "peer", "with its plan"),
        made("torch back end", lambda x: permute(x, order_R, row_TK, backend="torch"), "peer"),
        *permute_peers(problem, direction_RD),
    ]
    plain = made("index_select", lambda x: x.index_select(0, tokens_R), "peer")
    exact = {"out": problem.x_TD.index_select(0, tokens_R), "dX": summed(direction_RD, row_TK)}
    return Case(contenders, plain, exact, moved(permute_bytes(shape, problem.dtype.itemsize)))


def moved(fwd: float, bwd: float | None = None) -> Callable[[Pass], float]:
    """Bytes by pass; backward moves as many as forward where it is None."""
    back = fwd if bwd is None else bwd
    return lambda part: {"fwd": fwd, "bwd": back, "fwd+bwd": fwd + back}[part]


def combine_case(problem: Problem) -> Case:
    return _combine(problem, {})


def combine_with_adds_case(problem: Problem) -> Case:
    """Ours adds the shared experts' output and the residual stream before it rounds once; the others add afterwards."""
    T = problem.shape.T
    return _combine(problem, {"dShared": random_rows(problem, T, seed=3), "dResidual": random_rows(problem, T, seed=4)})


def _combine(problem: Problem, adds: Mapping[str, Tensor]) -> Case:
    shape, (order_R, row_TK), direction_TD = problem.shape, in_order(problem), problem.direction_TD
    y_RD = random_rows(problem, shape.R, seed=2)
    inputs = {"dY": y_RD, "dS": problem.weights_TK, **adds}
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y, weights_TK, *added = leaves.values()

    def ours() -> Tensor:
        if backend != "triton":
            return by_torch()
        from moefold.kernels.permute import triton_impl

        extra = {"shared_TD": added[0], "residual_TD": added[1]} if added else {}
        return triton_impl.unpermute(y, weights_TK, order_R, row_TK, **extra)

    def by_torch() -> Tensor:
        return sum(added, unpermute(y, weights_TK, order_R, row_TK, backend="torch"))

    def indexed() -> Tensor:
        rows_TKD = y.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1)
        return sum(added, (rows_TKD * weights_TK.to(y.dtype)[..., None]).sum(1))

    backend, note = our_backend(problem.device), backend_note(problem.device)
    contenders = [
        by_autograd("ours", ours, leaves, direction_TD, kind="ours", note=note),
        by_autograd("torch back end", by_torch, leaves, direction_TD),
        *([] if adds else unpermute_peers(problem, y_RD)),
    ]
    plain = by_autograd("index_select, sum", indexed, leaves, direction_TD)
    exact = _exact_combine(problem, y_RD, order_R, row_TK) | dict.fromkeys(adds, direction_TD)
    exact["out"] = sum((x.double() for x in adds.values()), exact["out"])
    size, token = problem.dtype.itemsize, problem.dtype.itemsize * shape.T * shape.H
    # backward: gradients of tokens and rows read, rows' gradients written, and per row its number, weight and weight's gradient
    bwd = float(token + 2 * size * shape.R * shape.H + 12 * shape.R)
    return Case(contenders, plain, exact, moved(combine_bytes(shape, size) + len(adds) * token, bwd))


def _exact_combine(problem: Problem, y_RD: Tensor, order_R: Tensor, row_TK: Tensor) -> dict[str, Tensor]:
    """out in fp64; gradients of rows and weights from fp64 products, kept in fp32 and fp64."""
    weights_TK, direction_TD = problem.weights_TK, problem.direction_TD.double()
    grad_y_RD = torch.empty(y_RD.shape, dtype=torch.float32, device=y_RD.device)
    grad_weights_TK = torch.empty_like(weights_TK, dtype=torch.float64)
    for k, row_T in enumerate(row_TK.unbind(1)):
        grad_y_RD[row_T] = (direction_TD * weights_TK[:, k, None].double()).float()
        grad_weights_TK[:, k] = (direction_TD * y_RD[row_T].double()).sum(-1)
    return {"out": summed(y_RD, row_TK, weights_TK), "dY": grad_y_RD, "dS": grad_weights_TK}


def source_counts(problem: Problem, ranks: int) -> Tensor:
    """counts_WL: rows from each of `ranks` ranks, which hold equal parts of the tokens, for the experts of the first rank."""
    T, K = problem.indices_TK.shape
    local = problem.shape.E // ranks
    rank_TK = (torch.arange(T, device=problem.device) * ranks // T)[:, None].expand(T, K)
    here = problem.indices_TK < local
    return torch.bincount(rank_TK[here] * local + problem.indices_TK[here], minlength=ranks * local).view(ranks, local)


def regroup_case(problem: Problem) -> Case:
    """As on rank 0 of expert parallelism: rows arrive by source rank, and by expert within it."""
    ranks = min(SOURCE_RANKS, problem.shape.E // 2)
    counts_WL = source_counts(problem, ranks)
    local, rows = counts_WL.shape[1], int(counts_WL.sum())
    experts_WL = torch.arange(local, device=problem.device).repeat(ranks)
    x_RD, direction_RD = random_rows(problem, rows, seed=5), random_rows(problem, rows, seed=6)
    backend, note = our_backend(problem.device), backend_note(problem.device)

    def plan(backend: Backend) -> tuple[Tensor, Tensor]:
        experts_R = experts_WL.repeat_interleave(counts_WL.flatten(), output_size=rows)
        return sort_tokens(experts_R[:, None], local, backend=backend)[:2]

    order_R, row_R1 = plan("torch")
    leaves = {"dX": x_RD.detach().requires_grad_()}

    def made(name: str, fn: Callable[[Tensor], Tensor], kind: Kind, note: str = "") -> Contender:
        return by_autograd(name, lambda: fn(leaves["dX"]), leaves, direction_RD, kind=kind, note=note)

    contenders = [
        made("ours", lambda x: permute(x, order_R, row_R1, backend=backend), "ours", note),
        made("ours + plan", lambda x: permute(x, *plan(backend), backend=backend), "peer", "with its plan"),
        *regroup_peers(x_RD, counts_WL, direction_RD),
    ]
    plain = made("index_select", lambda x: x.index_select(0, order_R), "peer")
    exact = {"out": x_RD.index_select(0, order_R), "dX": direction_RD[row_R1[:, 0]]}
    return Case(contenders, plain, exact, moved(permute_bytes(_shape_of(problem.shape, rows), problem.dtype.itemsize)))


def _shape_of(shape: Shape, rows: int) -> Shape:
    return replace(shape, T=rows, K=1)
