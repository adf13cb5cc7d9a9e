"""The router: every variant against a loop over tokens in plain Python, ties, group limits, bias, precision and gradients."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefold.kernels.topk_gate.reference import first_top_k, within_groups
from moefold.moe.config import BalanceConfig, MoEConfig, RouterConfig
from moefold.moe.router import TopKRouter

D, E = 5, 8
ONE_PER_GROUP = {"num_groups": 8, "top_groups": 4, "group_score": "max"}
GROUPS: list[dict[str, Any]] = [
    {},
    {"num_groups": 4, "top_groups": 2},
    {"num_groups": 2, "top_groups": 1, "group_score": "max"},
    ONE_PER_GROUP,
]
VARIANTS = [
    RouterConfig(score=score, order=order, renormalize=renormalize, scaling_factor=scaling, **groups)
    for score, order, renormalize, scaling, groups in product(
        ("softmax", "sigmoid"), ("softmax_topk", "topk_softmax"), (True, False), (1.0, 2.5), GROUPS
    )
    if not (score == "sigmoid" and order == "topk_softmax")
]


def router_id(config: RouterConfig) -> str:
    weights = "renormalized" if config.renormalize else "plain"
    return f"{config.score}-{config.order}-{weights}-x{config.scaling_factor:g}-best-{config.top_groups}-of-{config.num_groups}"


def make(config: RouterConfig, top_k: int = 3, *, biased: bool = False, dtype: torch.dtype = torch.float64) -> TopKRouter:
    balance = BalanceConfig(expert_bias=biased)
    router = TopKRouter(D, MoEConfig(num_experts=E, top_k=top_k, expert_dim=1, router=config, balance=balance))
    torch.nn.init.normal_(router.weight_ED)
    if biased:
        router.expert_bias_E.normal_()
    return router.to(dtype)


def largest(values: dict[int, float], k: int) -> list[int]:
    """Keys of the k largest values, the lowest key first among equals."""
    return sorted(values, key=lambda key: (-values[key], key))[:k]


def route_one(logits: list[float], bias: list[float], config: RouterConfig, top_k: int) -> tuple[list[int], list[float]]:
    """One token, written from the definitions."""
    if config.score == "sigmoid":
        scores = [1 / (1 + math.exp(-x)) for x in logits]
    else:
        scores = [math.exp(x) / sum(math.exp(y) for y in logits) for x in logits]
    ranking = [x + b for x, b in zip(logits if config.order == "topk_softmax" else scores, bias, strict=True)]
    size = E // config.num_groups
    groups = {}
    for g in range(config.num_groups):
        members = sorted(ranking[g * size : (g + 1) * size], reverse=True)
        groups[g] = members[0] if config.group_score == "max" else sum(members[:2])
    # without a limit the group score has no meaning (a group of all experts is always the best)
    best = largest(groups, config.top_groups)
    chosen = largest({e: ranking[e] for e in range(E) if e // size in best}, top_k)
    if config.order == "topk_softmax":
        weights = [math.exp(logits[e]) / sum(math.exp(logits[f]) for f in chosen) for e in chosen]
    else:
        weights = [scores[e] / (sum(scores[f] for f in chosen) if config.renormalize else 1) for e in chosen]
    return chosen, [w * config.scaling_factor for w in weights]


@pytest.mark.parametrize("biased", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("config", VARIANTS, ids=router_id)
def test_equals_a_loop_over_tokens(config: RouterConfig, biased: bool) -> None:
    router = make(config, biased=biased)
    bias = router.expert_bias_E.tolist() if biased else [0.0] * E
    x_TD = torch.randn(25, D, dtype=torch.float64)
    routing = router(x_TD)
    logits_TE = x_TD @ router.weight_ED.T
    expected = [route_one(row, bias, config, 3) for row in logits_TE.tolist()]
    assert routing.indices_TK.tolist() == [indices for indices, _ in expected]
    torch.testing.assert_close(
        routing.weights_TK, torch.tensor([w for _, w in expected], dtype=torch.float64), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(routing.logits_TE, logits_TE, rtol=1e-12, atol=1e-14)
    choices = [e for indices, _ in expected for e in indices]
    assert routing.counts_E.tolist() == [choices.count(e) for e in range(E)]


@pytest.mark.parametrize("config", VARIANTS, ids=router_id)
def test_the_loss_reaches_the_router(config: RouterConfig) -> None:
    router = make(config)
    routing = router(torch.randn(12, D, dtype=torch.float64))
    (routing.weights_TK * torch.randn(12, 3, dtype=torch.float64)).sum().backward()
    assert router.weight_ED.grad is not None
    touched = routing.counts_E > 0
    assert (router.weight_ED.grad[touched].abs().sum(-1) > 1e-6).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_loss_reaches_the_router_of_one_expert_per_token(score: Any) -> None:
    router = make(RouterConfig(score=score, renormalize=False), top_k=1)
    router(torch.randn(12, D, dtype=torch.float64)).weights_TK.sum().backward()
    assert router.weight_ED.grad is not None
    assert router.weight_ED.grad.abs().max() > 1e-3


@pytest.mark.parametrize("config", VARIANTS, ids=router_id)
def test_ties_go_to_the_lowest_experts(config: RouterConfig) -> None:
    router = make(config)
    torch.nn.init.zeros_(router.weight_ED)
    # all scores are equal: the first groups, then the first experts in them
    assert router(torch.randn(4, D, dtype=torch.float64)).indices_TK.tolist() == [[0, 1, 2]] * 4


def test_ties_among_the_best_and_at_the_edge() -> None:
    scores_TE = torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0, 2.0]])
    assert [first_top_k(scores_TE, k).tolist() for k in (1, 2, 3, 4)] == [[[1]], [[1, 3]], [[1, 3, 2]], [[1, 3, 2, 4]]]
    # wide rows as well, where an unstable sort would mix equal values
    assert first_top_k(torch.zeros(3, 4096), 5).tolist() == [[0, 1, 2, 3, 4]] * 3


@given(
    scores=st.lists(st.lists(st.integers(-2, 2), min_size=E, max_size=E), min_size=1, max_size=4),
    groups=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 3), (8, 4)]),
    k=st.integers(1, 4),
)
@settings(max_examples=80, deadline=None)
def test_k_distinct_experts_of_the_best_groups(scores: list[list[int]], groups: tuple[int, int], k: int) -> None:
    config = RouterConfig(num_groups=groups[0], top_groups=groups[1], group_score="max", renormalize=False)
    chosen_TK = first_top_k(within_groups(torch.tensor(scores).double(), config), k)
    for chosen, row in zip(chosen_TK.tolist(), scores, strict=True):
        assert len(set(chosen)) == k
        size = E // groups[0]
        best = largest({g: max(row[g * size : (g + 1) * size]) for g in range(groups[0])}, groups[1])
        assert {e // size for e in chosen} <= set(best)


def test_excluded_groups_stay_excluded_where_all_scores_are_negative() -> None:
    # with zeros instead of -inf the excluded experts would be the best
    config = RouterConfig(score="sigmoid", num_groups=4, top_groups=2)
    router = make(config, top_k=4, biased=True)
    router.expert_bias_E.fill_(-3)
    router.expert_bias_E[4:] = -2
    indices_TK = router(torch.randn(30, D, dtype=torch.float64)).indices_TK
    assert sorted(set(indices_TK.flatten().tolist())) == [4, 5, 6, 7]


def test_the_bias_moves_choices_but_not_weights() -> None:
    config = RouterConfig(score="sigmoid", renormalize=False)
    router = make(config, biased=True)
    x_TD = torch.randn(40, D, dtype=torch.float64)
    router.expert_bias_E.zero_()
    router.expert_bias_E[6] = 5
    routing = router(x_TD)
    assert (routing.indices_TK[:, 0] == 6).all()
    torch.testing.assert_close(routing.weights_TK, routing.scores_TE.gather(-1, routing.indices_TK), rtol=0, atol=0)
    torch.testing.assert_close(routing.scores_TE, torch.sigmoid(x_TD @ router.weight_ED.T), rtol=1e-12, atol=0)


def test_equal_biases_change_nothing() -> None:
    router = make(RouterConfig(score="sigmoid"), biased=True)
    x_TD = torch.randn(40, D, dtype=torch.float64)
    router.expert_bias_E.zero_()
    before = router(x_TD).indices_TK
    router.expert_bias_E.fill_(0.25)
    assert torch.equal(router(x_TD).indices_TK, before)


def test_the_bias_is_state_but_no_parameter() -> None:
    router = make(RouterConfig(), biased=True)
    assert dict(router.named_parameters()).keys() == {"weight_ED"}
    assert router.state_dict().keys() == {"weight_ED", "expert_bias_E"}
    assert "expert_bias_E" not in make(RouterConfig()).state_dict()


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_bf16_tokens_are_scored_in_fp32(autocast: bool) -> None:
    router = make(RouterConfig(), dtype=torch.bfloat16)
    x_TD = torch.randn(64, D).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        routing = router(x_TD)
    assert {t.dtype for t in (routing.logits_TE, routing.scores_TE, routing.weights_TK)} == {torch.float32}
    exact_TE = x_TD.double() @ router.weight_ED.double().T
    # far closer than a product in bf16, which would be off by parts in a hundred
    torch.testing.assert_close(routing.logits_TE.double(), exact_TE, rtol=1e-5, atol=1e-5)


def test_counts_leave_padding_out() -> None:
    router = make(RouterConfig())
    x_TD = torch.randn(10, D, dtype=torch.float64)
    valid_T = torch.arange(10) < 6
    routing, alone = router(x_TD, valid_T), router(x_TD[:6])
    assert torch.equal(routing.counts_E, alone.counts_E)
    assert torch.equal(routing.indices_TK[:6], alone.indices_TK)
    assert routing.counts_E.sum() == 6 * 3
    assert not router(x_TD, torch.zeros(10, dtype=torch.bool)).counts_E.any()


def test_sigmoid_scores_that_all_underflow_stay_finite() -> None:
    router = make(RouterConfig(score="sigmoid"), dtype=torch.float32)
    torch.nn.init.constant_(router.weight_ED, -1e4)
    routing = router(torch.ones(2, D))
    routing.weights_TK.sum().backward()
    assert router.weight_ED.grad is not None
    assert routing.weights_TK.isfinite().all() and router.weight_ED.grad.isfinite().all()
