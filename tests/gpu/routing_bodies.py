"""The checks of what has no gradient of rows: gate, sort, codes, buckets, distances, quantised rows. See bodies.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gpu.bodies import check_exact, check_never_waits, check_repeats
from gpu.measures import Relay, as_it_is, host_waits, poison_free_memory
from gpu.operations import Draw, Operation, Size, make_buckets
from moefold.kernels.lsh import bucket_rows, cross_polytope_codes, farther_than, make_rotation
from moefold.kernels.lsh import reference as lsh_reference
from moefold.kernels.quant_rows import FORMATS, dequantize_rows, quantize_rows
from moefold.kernels.quant_rows import reference as quant_reference
from moefold.kernels.sort_tokens import sort_tokens
from moefold.kernels.topk_gate import GateRule, reference, topk_gate

DIFFERENTIABLE = ("weights_TK", "scores_TE", "z_T")
CLEAR = 1e-5
"""Ranks that lie closer may change places by rounding. Those of the checked tokens do not."""


class RuleCase(NamedTuple):
    """A rule for E experts, with or without a bias."""

    E: int
    biased: bool
    rule: GateRule


RULES: Mapping[str, RuleCase] = MappingProxyType(
    {
        "softmax": RuleCase(128, False, GateRule(top_k=8)),
        "softmax-bias": RuleCase(64, True, GateRule(top_k=8, renormalize=False)),
        "plain-scaled": RuleCase(60, False, GateRule(top_k=4, renormalize=False, scaling_factor=2.5)),
        "late-softmax": RuleCase(32, False, GateRule(top_k=4, order="topk_softmax")),
        "late-softmax-bias": RuleCase(9, True, GateRule(top_k=2, order="topk_softmax", scaling_factor=0.5)),
        "sigmoid-bias": RuleCase(256, True, GateRule(top_k=8, score="sigmoid", scaling_factor=2.5)),
        "top2-groups": RuleCase(256, True, GateRule(top_k=8, score="sigmoid", num_groups=8, top_groups=4, scaling_factor=2.5)),
        "max-groups": RuleCase(
            160, False, GateRule(top_k=6, renormalize=False, num_groups=8, top_groups=3, group_score="max", scaling_factor=16.0)
        ),
        "odd-groups": RuleCase(45, True, GateRule(top_k=3, num_groups=5, top_groups=2)),
        "groups-of-one": RuleCase(6, False, GateRule(top_k=2, num_groups=6, top_groups=3, group_score="max")),
        "many-experts": RuleCase(512, False, GateRule(top_k=10)),
        "every-expert": RuleCase(7, False, GateRule(top_k=7)),
        "one-expert": RuleCase(1, False, GateRule(top_k=1, renormalize=False)),
    }
)


def clear_tokens(logits_TE: Tensor, rule: GateRule, bias_E: Tensor | None) -> Tensor:
    """bool [T]: no two ranks that decide a token's choice, or its order, are close. Found in fp64."""
    logits_TE = logits_TE.double()
    scores_TE = logits_TE.sigmoid() if rule.score == "sigmoid" else logits_TE.softmax(-1)
    ranking_TE = logits_TE if rule.order == "topk_softmax" else scores_TE
    ranking_TE = ranking_TE if bias_E is None else ranking_TE + bias_E.double()
    clear_T = torch.ones(len(logits_TE), dtype=torch.bool, device=logits_TE.device)
    if rule.top_groups < rule.num_groups:
        ranking_TGN = ranking_TE.unflatten(-1, (rule.num_groups, -1))
        best = 1 if rule.group_score == "max" else 2
        groups_TG = ranking_TGN.topk(best, dim=-1).values.sum(-1).sort(-1, descending=True).values
        clear_T &= groups_TG[:, rule.top_groups - 1] - groups_TG[:, rule.top_groups] > CLEAR
    # one more than are chosen: the best that is left out
    best_TN = reference.within_groups(ranking_TE, rule).sort(-1, descending=True).values[:, : rule.top_k + 1]
    return clear_T & (best_TN[:, :-1] - best_TN[:, 1:] > CLEAR).all(-1)


def gating(case: RuleCase, T: int, draw: Draw) -> Operation:
    """Routing of T tokens; logits in fp32, some tokens not counted."""
    bias_E = draw.normal(case.E, scale=0.3, dtype=torch.float32) if case.biased else None
    # far more than are left out
    candidates_NE = draw.normal(T + T // 2 + 64, case.E, scale=2.0, dtype=torch.float32)
    logits_TE = candidates_NE[clear_tokens(candidates_NE, case.rule, bias_E)][:T]
    assert len(logits_TE) == T, f"only {len(logits_TE)} of {len(candidates_NE)} tokens have a clear choice"
    valid_T = draw.uniform(T) < 0.7

    def on(backend: Literal["torch", "triton"]) -> Callable[..., Mapping[str, Tensor]]:
        return lambda logits_TE: topk_gate(logits_TE, case.rule, bias_E, valid_T, backend)._asdict()

    return Operation({"logits_TE": logits_TE}, on("triton"), on("torch"), on("torch"), torch.float32, case.E)


def check_gate(case: RuleCase, T: int, draw: Draw, relay: Relay = as_it_is) -> None:
    """Choices, weights, scores, z, counts, and the logits' gradient through each differentiable output alone and through all."""
    operation = gating(case, T, draw)
    for through in (DIFFERENTIABLE, *((name,) for name in DIFFERENTIABLE)):
        check_exact(replace(operation, through=through), relay)
    check_repeats(operation)
    check_never_waits(operation)


def check_ties(draw: Draw, T: int, E: int, K: int) -> None:
    """Equal logits resolve to the lowest expert, with each score, order and group limit."""
    logits_TE = (draw.uniform(T, E) * 3).floor()
    want_TK = torch.sort(logits_TE.cpu(), dim=-1, descending=True, stable=True).indices[:, :K]
    for rule in (GateRule(top_k=K), GateRule(top_k=K, score="sigmoid"), GateRule(top_k=K, order="topk_softmax")):
        got_TK = topk_gate(logits_TE, rule, backend="triton").indices_TK.cpu()
        assert torch.equal(got_TK, want_TK), f"{rule}: {int((got_TK != want_TK).any(-1).sum())} of {T} tokens differ"
    # all equal: the lowest groups, and in them the lowest experts
    grouped = GateRule(top_k=K, score="sigmoid", num_groups=4, top_groups=2)
    got_TK = topk_gate(torch.zeros_like(logits_TE), grouped, backend="triton").indices_TK
    assert got_TK.tolist() == [list(range(K))] * T


def check_broken_logits(draw: Draw, T: int, E: int, K: int) -> None:
    """NaN and infinite logits choose K different experts, and touch no other token."""
    logits_TE = draw.normal(T, E, dtype=torch.float32)
    logits_TE[T // 3, E // 2], logits_TE[T // 2], logits_TE[-1] = torch.nan, torch.nan, -torch.inf
    rules = (GateRule(top_k=K), GateRule(top_k=K, order="topk_softmax"), GateRule(top_k=K, num_groups=2, top_groups=1))
    for rule in rules:
        gate = topk_gate(logits_TE, rule, backend="triton")
        assert all(min(row) >= 0 and max(row) < E and len(set(row)) == K for row in gate.indices_TK.tolist()), rule
        assert int(gate.counts_E.sum()) == T * K
        whole_T = torch.ones(T, dtype=torch.bool)
        whole_T[[T // 3, T // 2, T - 1]] = False
        assert gate.scores_TE.cpu()[whole_T].isfinite().all(), rule
        assert gate.scores_TE[T // 3].isnan().all(), "a broken token stays visible"


def check_sort(size: Size, draw: Draw) -> None:
    """Order, rows and counts are those of torch's stable sort, in every run, without a wait."""
    kept_TK = draw.uniform(size.T, size.K) < 0.7 if size.drops else None
    indices_TK = draw.choices(size)
    want = sort_tokens(indices_TK, size.E, kept_TK, "torch")
    for _ in range(2):
        poison_free_memory(draw.device)
        got = sort_tokens(indices_TK, size.E, kept_TK, "triton")
        for name, a, b in zip(("order_R", "row_TK", "counts_E"), got, want, strict=True):
            assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {b.numel()} differ"
    with host_waits(draw.device):
        sort_tokens(indices_TK, size.E, kept_TK, "triton")


def check_codes(draw: Draw, T: int, D: int, hashes: int, width: int) -> None:
    """Codes are the exact ones wherever the two farthest axes are not equally far but for rounding; nearly everywhere."""
    x_TD = draw.normal(T, D)
    rotation_HPD = make_rotation(D, hashes, width, seed=1, device=draw.device)
    got_TH = cross_polytope_codes(x_TD, rotation_HPD, backend="triton")
    # the rotation is rounded to the tokens' dtype
    along_THP = torch.einsum("td,hpd->thp", x_TD.double(), rotation_HPD.to(x_TD.dtype).double())
    best_TH2 = along_THP.abs().topk(2, dim=-1).values
    clear_TH = best_TH2[..., 0] - best_TH2[..., 1] > 1e-4 * best_TH2[..., 0]
    want_TH = cross_polytope_codes(x_TD.double(), rotation_HPD.to(x_TD.dtype).double(), backend="torch")
    assert clear_TH.double().mean() > 0.98
    assert torch.equal(got_TH[clear_TH], want_TH[clear_TH]), f"{int((got_TH != want_TH)[clear_TH].sum())} codes differ"
    with host_waits(draw.device):
        broken_TH = cross_polytope_codes(x_TD.fill_(torch.nan), rotation_HPD, backend="triton")
    assert int(broken_TH.min()) >= 0 and int(broken_TH.max()) < 2 * width, "codes of NaN are out of range"


def check_buckets(size: Size, draw: Draw) -> None:
    """Buckets on the device are the specification's, within every budget; the host waits once, for their number.

    Whether or not it is said that codes are below 3, which takes fewer sorts.
    """
    codes_TH = (draw.uniform(size.T, 3) * 3).long()
    indices_TK = draw.choices(size)
    kept_TK = draw.uniform(size.T, size.K) < 0.7 if size.drops else None
    exact_TK = draw.uniform(size.T, size.K) < 0.2
    on_cpu = [None if x is None else x.cpu() for x in (kept_TK, exact_TK)]
    for max_rows, num_codes in ((None, None), (None, 3), (0, None), (size.T * size.K // 3, 3), (size.T * size.K // 2, None)):
        want = lsh_reference.bucket_rows(codes_TH.cpu(), indices_TK.cpu(), size.E, *on_cpu, max_rows)
        with host_waits(draw.device, expected=1):
            got = bucket_rows(codes_TH, indices_TK, size.E, kept_TK, exact_TK, max_rows, num_codes)
        for name in ("bucket_TK", "order_R", "starts_C1", "counts_E", "experts_C"):
            assert torch.equal(getattr(got, name).cpu(), getattr(want, name)), f"{name}, {max_rows = }, {num_codes = }"
        assert got.num_rows == want.num_rows


def check_distances(size: Size, draw: Draw) -> None:
    """The choices that travel exactly are those outside of the radius, wherever that is not a matter of rounding."""
    buckets = make_buckets(size, draw)
    x_TD, centroids_CD, epsilon = draw.normal(size.T, size.D), draw.normal(len(buckets.experts_C), size.D), 1.4
    farther_than(x_TD, centroids_CD, buckets, epsilon, backend="triton")
    with host_waits(draw.device):
        got_TK = farther_than(x_TD, centroids_CD, buckets, epsilon, backend="triton")
    lengths_T1 = x_TD.double().norm(dim=-1, keepdim=True)
    distances_TK = torch.stack([(x_TD.double() - centroids_CD.double()[b]).norm(dim=-1) for b in buckets.bucket_TK.T], 1)
    ratio_TK = distances_TK / lengths_T1
    kept_TK = torch.ones_like(got_TK) if buckets.kept_TK is None else buckets.kept_TK
    clear_TK = (ratio_TK - epsilon).abs() > 1e-5
    assert torch.equal(got_TK[clear_TK], ((ratio_TK > epsilon) & kept_TK)[clear_TK])
    assert clear_TK.double().mean() > 0.98
    assert 0.05 < got_TK[kept_TK].double().mean() < 0.95, "the radius decides nothing"


def check_quantised(draw: Draw, R: int, D: int, block: int | None, relay: Relay = as_it_is) -> None:
    """Codes, scales and restored rows are bitwise the specification's on a CPU, broken rows included.

    On a CPU, because torch divides by a constant on a GPU by multiplying with its reciprocal, which rounds twice.
    """
    x_RD = draw.normal(R, D) * (10.0 * (draw.uniform(R, 1) - 0.5)).exp().to(draw.dtype)
    x_RD[R // 2], x_RD[R // 3, 0], x_RD[-1, -1] = 0, torch.nan, torch.inf
    for format in ("e4m3", "int8"):
        codes_RD, scales_RB = quantize_rows(relay(x_RD), format, block, "triton")
        with host_waits(draw.device):
            again_RD, _ = quantize_rows(relay(x_RD), format, block, "triton")
            rows_RD = dequantize_rows(codes_RD, scales_RB, draw.dtype, block, "triton")
        want_RD, want_RB = quant_reference.quantize_rows(x_RD.cpu(), FORMATS[format], block or D)
        back_RD = quant_reference.dequantize_rows(want_RD, want_RB, block or D, draw.dtype)
        assert torch.equal(codes_RD.cpu().view(torch.uint8), want_RD.view(torch.uint8)), f"{format}: codes"
        assert torch.equal(codes_RD.view(torch.uint8), again_RD.view(torch.uint8)), f"{format}: a rerun differs"
        for name, got, want in (("scales", scales_RB, want_RB), ("rows", rows_RD, back_RD)):
            same = torch.where(want.isnan(), got.cpu().isnan(), got.cpu() == want)
            assert same.all(), f"{format}: {int((~same).sum())} of {same.numel()} {name} differ"
