"""Rows that hash alike travel as one, on a GPU: codes, buckets, centroids and restoring, against torch, at a fifth of the rows.

Four units. codes: 16 hashes of 8 directions for each token. buckets: which rows share one; torch's sorts on every back end, with
the one wait for the number of buckets. centroids: the mean of each bucket's rows; backward spreads its gradient. restore: what
the experts made of the centroids, and the tokens' own difference from them times a compensation by column, summed by token and
weight; backward to experts' rows, centroids, tokens, weights and compensation.

Tokens are random and independent, so that codes hardly ever agree by themselves: the limit of rows decides how large buckets are,
and the work is that of this rate whatever the data. Bytes assume that every tensor crosses the memory bus once (many tokens read
the same centroid), with 4 bytes for each row number and weight.

Before anything is timed, results must be as exact as plain torch in the same dtype, and ours must repeat itself to the last bit.
bench/README.md says how times are taken and what the columns are.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from moefold.kernels.lsh import Backend, Buckets, bucket_rows, centroids, cross_polytope_codes, make_rotation, restore

from .permute import Case, moved, problems, random_rows
from .protocol.contender import Contender, Named, Problem, by_autograd
from .protocol.gate import admit, against, allowances, check_names, relative_error
from .protocol.options import LeftOut, Plan, add_unit_options, backend_note, our_backend, run_units
from .protocol.table import Setting, Work, least_ratio, measure
from .result import Result, Row

UNITS = ("codes", "buckets", "centroids", "restore")
HASHES, WIDTH = 16, 8
RATE = 0.2
"""Rows that travel, of all R: the rate of LSH-MoE (arXiv 2411.08446)."""


def options(parser: argparse.ArgumentParser) -> None:
    add_unit_options(parser, UNITS)


def run(options: argparse.Namespace) -> Result:
    return run_units("lsh", options, _unit_rows, figures)


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """By unit and pass, the least over shapes and routings: ours by the speed of a copy, and anybody else's time by ours."""
    found: dict[str, float] = {}
    for unit in UNITS:
        for part in ("fwd", "bwd"):
            own = [row for row in rows if row["unit"] == unit and row["pass"] == part]
            shares = [row["of_copy_%"] / 100 for row in own if row["contender"] == "ours" and isinstance(row["of_copy_%"], float)]
            least = least_ratio(own, (part,))
            found |= {f"{unit}_{part}_of_copy": min(shares)} if shares else {}
            found |= {} if least is None else {f"{unit}_{part}_peer_ratio": least}
    return found


def _unit_rows(unit: str, plan: Plan, setting: Setting, left_out: LeftOut) -> list[Row]:
    rows: list[Row] = []
    for place, problem in problems(unit, plan):
        if unit == "codes":
            rows += _code_rows(place, problem, setting, left_out)
        elif unit == "buckets":
            rows += _bucket_rows(place, problem, setting, left_out)
        else:
            case = centroid_case(problem) if unit == "centroids" else restore_case(problem)
            rows += case.rows(place, setting, left_out)
    return rows


def rotation_for(problem: Problem) -> Tensor:
    return make_rotation(problem.shape.H, HASHES, WIDTH, seed=0, dtype=problem.dtype, device=problem.device)


def buckets_for(problem: Problem) -> Buckets:
    """Of the problem's tokens and routing, RATE of the rows at most."""
    codes_TH = cross_polytope_codes(problem.x_TD, rotation_for(problem), backend="torch")
    return bucket_rows(codes_TH, problem.indices_TK, problem.shape.E, max_rows=int(RATE * problem.shape.R), num_codes=2 * WIDTH)


def _code_rows(place: Mapping[str, str | float], problem: Problem, setting: Setting, left_out: LeftOut) -> list[Row]:
    rotation_HPD, shape, device = rotation_for(problem), problem.shape, problem.device

    def plain() -> Named:
        along_THP = torch.einsum("td,hpd->thp", problem.x_TD, rotation_HPD)
        axis_TH = along_THP.abs().argmax(-1)
        return {"codes": 2 * axis_TH + (along_THP.gather(-1, axis_TH[..., None]).squeeze(-1) < 0)}

    def by(backend: Backend) -> Named:
        return {"codes": cross_polytope_codes(problem.x_TD, rotation_HPD, backend)}

    contenders = [
        Contender("ours", partial(by, our_backend(device)), kind="ours", note=backend_note(device)),
        Contender("torch back end", partial(by, "torch")),
        Contender("einsum, argmax", plain),
    ]
    judge = partial(judge_codes, problem.x_TD, rotation_HPD)
    checked = admit(left_out.keep(contenders), judge, allowances(judge(plain())), device)
    work = Work(2.0 * shape.T * shape.H * HASHES * WIDTH, float(shape.T * (shape.H * problem.dtype.itemsize + 4 * HASHES)))
    return measure(place, checked, setting, lambda _: work, ("fwd",))


def judge_codes(x_TD: Tensor, rotation_HPD: Tensor, got: Named) -> dict[str, float]:
    """How far tokens reach along the axes of their codes, against the farthest, in fp64: two axes that are equally far in the
    problem's dtype may change places."""
    check_names(got, {"codes": (x_TD.shape[0], rotation_HPD.shape[0])})
    reached, farthest = [], []
    for h, rotation_PD in enumerate(rotation_HPD):
        along_TP = x_TD.double() @ rotation_PD.double().T
        code_T1 = got["codes"][:, h, None]
        signed_T1 = along_TP.gather(1, code_T1 // 2) * (1 - 2 * (code_T1 % 2))
        reached.append(signed_T1[:, 0])
        farthest.append(along_TP.abs().amax(1))
    return {"codes": relative_error(torch.stack(reached), torch.stack(farthest))}


def _bucket_rows(place: Mapping[str, str | float], problem: Problem, setting: Setting, left_out: LeftOut) -> list[Row]:
    """Held to the same function on a CPU, number by number."""
    codes_TH, device = cross_polytope_codes(problem.x_TD, rotation_for(problem), backend="torch"), problem.device

    def bucketed(codes_TH: Tensor, indices_TK: Tensor) -> Named:
        made = bucket_rows(codes_TH, indices_TK, problem.shape.E, max_rows=int(RATE * problem.shape.R), num_codes=2 * WIDTH)
        return {"bucket": made.bucket_TK, "order": made.order_R, "starts": made.starts_C1, "counts": made.counts_E}

    exact = {name: x.to(device) for name, x in bucketed(codes_TH.cpu(), problem.indices_TK.cpu()).items()}
    ours = Contender("ours", lambda: bucketed(codes_TH, problem.indices_TK), kind="ours", note="torch on every back end")
    checked = admit(left_out.keep([ours]), against(exact), dict.fromkeys(exact, 0.0), device)
    return measure(place, checked, setting, lambda _: Work(), ("fwd",))


def centroid_case(problem: Problem) -> Case:
    shape, buckets, device = problem.shape, buckets_for(problem), problem.device
    C, flat_R = buckets.experts_C.numel(), buckets.bucket_TK.flatten()
    direction_CD = random_rows(problem, C, seed=9)
    leaves = {"dX": problem.leaves()["dX"]}
    sizes_C1 = buckets.starts_C1.diff()[:, None]

    def by(backend: Backend) -> Tensor:
        return centroids(leaves["dX"], buckets, backend=backend)

    def indexed() -> Tensor:
        rows_RD = leaves["dX"].repeat_interleave(shape.K, 0)
        return rows_RD.new_zeros(C, shape.H).index_add(0, flat_R, rows_RD) / sizes_C1

    made = partial(by_autograd, leaves=leaves, direction=direction_CD)
    contenders = [
        made("ours", partial(by, our_backend(device)), kind="ours", note=backend_note(device)),
        made("torch back end", partial(by, "torch")),
    ]
    sums_CD = torch.zeros(C, shape.H, dtype=torch.float64, device=device)
    grad_TD = torch.zeros(problem.x_TD.shape, dtype=torch.float64, device=device)
    for bucket_T in buckets.bucket_TK.unbind(1):
        sums_CD.index_add_(0, bucket_T, problem.x_TD.double())
        grad_TD += (direction_CD.double() / sizes_C1)[bucket_T]
    size = problem.dtype.itemsize
    bytes_ = float(size * (shape.T + C) * shape.H + 8 * shape.R)
    return Case(contenders, made("index_add", indexed), {"out": sums_CD / sizes_C1, "dX": grad_TD}, moved(bytes_))


def restore_case(problem: Problem) -> Case:
    shape, buckets, device = problem.shape, buckets_for(problem), problem.device
    C = buckets.experts_C.numel()
    inputs = {
        "dE": random_rows(problem, C, seed=10),
        "dC": centroids(problem.x_TD, buckets, backend="torch"),
        "dX": problem.x_TD,
        "dS": problem.weights_TK,
        # near one, where a compensation starts, and different from it
        "dA": random_rows(problem, 1, seed=11)[0] + 1,
    }
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    expert_CD, centroids_CD, x_TD, weights_TK, compensation_D = leaves.values()

    def by(backend: Backend) -> Tensor:
        return restore(expert_CD, centroids_CD, x_TD, weights_TK, buckets, compensation_D, backend=backend)

    def indexed() -> Tensor:
        own_TKD, mean_TKD = (
            x.index_select(0, buckets.bucket_TK.flatten()).view(*buckets.bucket_TK.shape, -1) for x in (expert_CD, centroids_CD)
        )
        return ((own_TKD + compensation_D * (x_TD[:, None] - mean_TKD)) * weights_TK.to(x_TD.dtype)[..., None]).sum(1)

    made = partial(by_autograd, leaves=leaves, direction=problem.direction_TD)
    contenders = [
        made("ours", partial(by, our_backend(device)), kind="ours", note=backend_note(device)),
        made("torch back end", partial(by, "torch")),
    ]
    exact = exact_restore({name: x.double() for name, x in inputs.items()}, buckets, problem.direction_TD.double())
    size = problem.dtype.itemsize
    # forward reads experts' rows, centroids and tokens, and writes tokens; backward reads these and writes as many gradients
    fwd = size * (2 * C + 2 * shape.T) * shape.H + 8 * shape.R
    bwd = size * (4 * C + 3 * shape.T) * shape.H + 12 * shape.R
    return Case(contenders, made("indexed, sum", indexed), exact, moved(float(fwd), float(bwd)))


def exact_restore(inputs: Mapping[str, Tensor], buckets: Buckets, direction_TD: Tensor) -> dict[str, Tensor]:
    """out and all gradients in the inputs' dtype, by the formula w (E + a (x - c)) and one k after the other."""
    expert_CD, centroids_CD, x_TD, weights_TK, a_D = inputs.values()
    found = {"out": torch.zeros_like(x_TD)} | {name: torch.zeros_like(x) for name, x in inputs.items()}
    for k, bucket_T in enumerate(buckets.bucket_TK.unbind(1)):
        weight_T1 = weights_TK[:, k, None]
        residual_TD = x_TD - centroids_CD[bucket_T]
        value_TD, upstream_TD = expert_CD[bucket_T] + a_D * residual_TD, weight_T1 * direction_TD
        found["out"] += weight_T1 * value_TD
        found["dE"].index_add_(0, bucket_T, upstream_TD)
        found["dC"].index_add_(0, bucket_T, -a_D * upstream_TD)
        found["dX"] += a_D * upstream_TD
        found["dS"][:, k] = (direction_TD * value_TD).sum(-1)
        found["dA"] += (upstream_TD * residual_TD).sum(0)
    return found
