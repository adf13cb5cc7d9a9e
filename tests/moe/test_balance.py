"""Balance of one batch: values and gradients against the formula and megatron-core at every scope, and the expert bias."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from balance_formula import (
    ROUTERS,
    SCOPES,
    B,
    D,
    E,
    K,
    L,
    S,
    balancer,
    forward,
    gradients,
    literal_counts,
    literal_gradients,
    literal_term,
    make_routers,
    micro_batches,
    run_micro,
    tokens_in,
    valid_rows,
)
from moefold.moe.balance import balance_value, update_expert_bias
from moefold.moe.config import BalanceConfig, MoEConfig, RouterConfig
from moefold.moe.load import measure_load
from moefold.moe.router import TopKRouter
from numeric import assert_same


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_value_equals_the_formula(name: str, padded: bool) -> None:
    routers = make_routers(ROUTERS[name])
    [micro] = micro_batches(1, padded)
    rows = [x for sequence in valid_rows(micro) for x in sequence]
    aux = forward(routers, *micro)
    by_layer = [literal_term(r, rows, literal_counts(r, rows)) / len(rows) for r in routers]
    assert_same({"losses": aux.losses.balance}, {"losses": torch.stack(by_layer).sum()}, rtol=1e-12)
    value_L = balance_value(aux.counts_E, aux.probs_BE.sum(1), len(rows))
    assert_same({"balance_value": value_L}, {"balance_value": torch.stack(by_layer)}, rtol=1e-12)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("scope", SCOPES)
def test_perfect_balance_is_1(name: str, scope: Any) -> None:
    routers = make_routers(ROUTERS[name])
    # token t is the t-th unit vector and every row of logits a rotation of the same one: each expert is chosen K times
    tokens_BSD = torch.eye(E, dtype=torch.float64).expand(B, E, E)
    for router in routers:
        row = router.weight_ED.new_tensor(range(E)).sin()
        router.weight_ED = torch.nn.Parameter(torch.stack([row.roll(t) for t in range(E)]))
    aux = forward(routers, tokens_BSD)
    assert (aux.counts_BE == K).all()
    assert aux.losses.balance.item() == pytest.approx(L, rel=1e-12)
    assert balance_value(aux.counts_E, aux.probs_BE.sum(1), B * E).tolist() == pytest.approx([1] * L, rel=1e-12)
    # the balance terms have no value of their own; being linear in the scores, it is gradient times scores
    state = balancer(scope=scope)
    state.start_step(1)
    (grad,) = torch.autograd.grad(state.losses(aux), aux.probs_BE)
    assert (grad * aux.probs_BE).sum().item() / (B * E) == pytest.approx(L, rel=1e-12)


def test_collapse_onto_one_expert_per_token_slot_is_E_over_K() -> None:
    counts_LE = torch.tensor([[10, 10] + [0] * (E - 2)])
    probs_LE = torch.tensor([[5.0, 5.0] + [0] * (E - 2)])
    assert balance_value(counts_LE, probs_LE, 10).item() == pytest.approx(E / 2)


def test_layers_that_collapse_to_opposite_halves_are_not_balanced_together() -> None:
    routers = make_routers()
    x_BSD = torch.randn(B, 40, D, dtype=torch.float64)
    x_BSD[..., 0] = 1  # which half, by the first component; which expert of it, by the others
    for router, sign in zip(routers, (8, -8), strict=True):
        router.weight_ED.data[: E // 2, 0] = sign
        router.weight_ED.data[E // 2 :, 0] = -sign
    aux = forward(routers, x_BSD)
    assert (aux.counts_E.sum(0) > 0).all()  # added up, no expert looks dead
    assert balance_value(aux.counts_E, aux.probs_BE.sum(1), B * 40).min() > 1.9
    assert aux.losses.balance.item() > 3.8
    for scope in SCOPES:
        state = balancer(scope=scope)
        state.start_step(1)
        (grad,) = torch.autograd.grad(state.losses(aux), aux.probs_BE, retain_graph=True)
        assert (grad * aux.probs_BE).sum().item() / (B * 40) > 3.8


def test_megatron_core_agrees() -> None:
    moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    [router] = make_routers(layers=1)
    x_BSD = torch.randn(B, S, D, dtype=torch.float64)
    routing = router(x_BSD.flatten(0, 1))
    aux = measure_load(routing, None, None, B)
    theirs = moe_utils.switch_load_balancing_loss_func(routing.scores_TE, routing.counts_E, B * S, K, E, 0.01)
    assert_same({"balance": 0.01 * aux.losses.balance}, {"balance": theirs}, rtol=1e-12)
    state = balancer(aux_loss_coeff=0.01)
    state.start_step(1)
    got, want = (torch.autograd.grad(x, router.weight_ED, retain_graph=True)[0] for x in (state.losses(aux) / (B * S), theirs))
    assert_same({"gradient": got}, {"gradient": want}, rtol=1e-12)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_megatron_core_agrees_on_z(padded: bool) -> None:
    moe_utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils")
    [router] = make_routers(layers=1)
    [(x_BSD, valid_BS)] = micro_batches(1, padded)
    aux = forward([router], x_BSD, valid_BS)
    padding_T = None if valid_BS is None else ~valid_BS.flatten()
    theirs = moe_utils.z_loss_func(router(x_BSD.flatten(0, 1)).logits_TE, 0.1, padding_T)
    state = balancer(aux_loss_coeff=0.0, z_loss_coeff=0.1)
    state.start_step(1)
    ours = state.losses(aux) / tokens_in([(x_BSD, valid_BS)])
    assert_same({"value": ours, "aux": 0.1 * aux.losses.z}, {"value": theirs, "aux": theirs}, rtol=1e-12)
    got, want = (torch.autograd.grad(x, router.weight_ED)[0] for x in (ours, theirs))
    assert_same({"gradient": got}, {"gradient": want}, rtol=1e-12)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_gradient_equals_the_formula(name: str, scope: Any, padded: bool) -> None:
    routers = make_routers(ROUTERS[name])
    [micro] = micro_batches(1, padded)
    sequences = valid_rows(micro)
    groups = sequences if scope == "sequence" else [[x for sequence in sequences for x in sequence]]

    def term(router: TopKRouter) -> Tensor:
        return torch.stack([literal_term(router, rows, literal_counts(router, rows)) for rows in groups]).sum()

    state = balancer(scope=scope)
    state.start_step(1)
    assert_same(run_micro(state, routers, micro), literal_gradients(routers, term), rtol=1e-11)


def test_the_gradient_is_linear_in_the_coefficient() -> None:
    routers, [micro] = make_routers(), micro_batches(1)
    found = {}
    for coeff, scope in product((0.0, 1.0, 0.25), SCOPES):
        state = balancer(aux_loss_coeff=coeff, scope=scope, z_loss_coeff=1.0)
        state.start_step(1)
        found[coeff, scope] = run_micro(state, routers, micro)
    for scope in SCOPES:
        zero, one, quarter = (found[coeff, scope] for coeff in (0.0, 1.0, 0.25))
        assert_same(quarter, {n: zero[n] + 0.25 * (one[n] - zero[n]) for n in zero}, rtol=1e-12)
        assert not torch.allclose(one["0"], zero["0"], rtol=1e-3)


def test_straggler_term_is_a_micro_batch_loss_on_top() -> None:
    routers, [micro] = make_routers(), micro_batches(1)
    found = []
    for settings in (
        {"scope": "sequence"},
        {"aux_loss_coeff": 0.01, "scope": "micro"},
        {"scope": "sequence", "straggler_coeff": 0.01},
    ):
        state = balancer(**settings)
        state.start_step(1)
        found.append(run_micro(state, routers, micro))
    assert_same(found[2], {n: found[0][n] + found[1][n] for n in found[0]}, rtol=1e-12)


@pytest.mark.parametrize("scope", SCOPES)
def test_padding_changes_nothing(scope: Any) -> None:
    routers = make_routers()
    x_BSD = torch.randn(B, S, D, dtype=torch.float64)
    longer_BSD = torch.cat([x_BSD, 100 * torch.randn(B, 4, D, dtype=torch.float64)], 1)
    more_BSD = torch.cat([longer_BSD, torch.randn(2, S + 4, D, dtype=torch.float64)])
    valid_BS = (torch.arange(S + 4) < S) & (torch.arange(B + 2) < B)[:, None]
    results = []
    for micro in ((x_BSD, None), (more_BSD, valid_BS)):
        aux = forward(routers, *micro)
        state = balancer(scope=scope, z_loss_coeff=0.1, straggler_coeff=0.1)
        state.start_step(1)
        values = {"balance": aux.losses.balance.detach(), "z": aux.losses.z.detach(), "logit": aux.logit_max}
        results.append(values | gradients(routers, state.losses(aux)))
        assert aux.valid_B.sum() == L * B * S
    assert_same(results[1], results[0], rtol=1e-12)


def test_bias_step_is_the_sign_of_what_is_missing_centred() -> None:
    bias_E = torch.zeros(4)
    update_expert_bias(bias_E, torch.tensor([10, 0, 2, 4]), 0.1)  # mean 4
    assert bias_E.tolist() == pytest.approx([-0.125, 0.075, 0.075, -0.025])
    balanced = bias_E.clone()
    update_expert_bias(bias_E, torch.tensor([7, 7, 7, 7]), 0.1)
    assert bias_E.tolist() == pytest.approx(balanced.tolist())


def test_bias_brings_a_collapsed_router_to_balance() -> None:
    moe = MoEConfig(
        num_experts=E, top_k=K, expert_dim=1, balance=BalanceConfig(expert_bias=True), router=RouterConfig(score="sigmoid")
    )
    router = TopKRouter(D, moe)
    torch.nn.init.normal_(router.weight_ED, std=0.2)
    router.weight_ED.data[:2] += 1  # for the positive tokens below, nearly all choices go to the first two experts
    x_TD = torch.rand(512, D)
    spread = []
    for _ in range(400):
        counts_E = router(x_TD).counts_E
        update_expert_bias(router.expert_bias_E, counts_E, 0.003)
        spread.append(balance_value(counts_E[None], counts_E[None].double() / K, 512).item())
    assert spread[0] > 2.5
    assert max(spread[-20:]) < 1.05
    assert abs(router.expert_bias_E.mean().item()) < 1e-6
