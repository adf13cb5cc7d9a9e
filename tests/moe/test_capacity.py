"""Capacity: how many rows an expert takes of a sequence, who is dropped, and what a dropped token keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moefold.kernels.permute import permute, unpermute
from moefold.moe.capacity import expert_capacity, keep_within_capacity
from moefold.moe.config import MoEConfig, RouterConfig
from moefold.moe.dispatch import Dispatcher, DispatchPlan, Experts, Flight
from moefold.moe.layer import MoELayer
from numeric import assert_same, with_gradients

Policy = Literal["position", "probability"]
D = 6


def config(
    factor: float | None, *, num_experts: int = 4, top_k: int = 1, drop_policy: Policy = "position", shared: int = 0
) -> MoEConfig:
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        expert_dim=8,
        num_shared_experts=shared,
        capacity_factor=factor,
        drop_policy=drop_policy,
        router=RouterConfig(renormalize=False),
    )


def capacity(factor: float, top_k: int, valid: int, num_experts: int) -> int:
    return int(expert_capacity(torch.tensor([valid]), config(factor, num_experts=num_experts, top_k=top_k))[0])


@pytest.mark.parametrize(
    ("factor", "top_k", "valid", "num_experts", "expected"),
    [
        (1.0, 1, 8, 4, 2),
        (1.0, 1, 9, 4, 3),
        (1.0, 2, 8, 4, 4),
        (1.25, 2, 16, 8, 5),
        (1.1, 1, 40, 4, 11),  # 1.1 * 40 / 4 is 11.000000000000002 in floating point
        (0.3, 1, 40, 4, 3),
        (1.15, 8, 1000, 64, 144),  # 143.75
        (1 / 3, 1, 3000, 1, 1000),
        (2 / 3, 2, 9, 4, 3),
        (0.001, 1, 8, 4, 1),
        (1e-9, 1, 8, 4, 1),
        (1e30, 1, 8, 4, 8),
        (1.0, 1, 0, 4, 0),
    ],
    ids=lambda value: f"{value:.4g}" if isinstance(value, float) else str(value),
)
def test_capacity_by_hand(factor: float, top_k: int, valid: int, num_experts: int, expected: int) -> None:
    assert capacity(factor, top_k, valid, num_experts) == expected


@given(
    hundredths=st.integers(1, 400),
    top_k=st.integers(1, 8),
    valid=st.integers(0, 1 << 20),
    num_experts=st.sampled_from([8, 60, 256]),
)
def test_capacity_is_the_exact_ceiling(hundredths: int, top_k: int, valid: int, num_experts: int) -> None:
    exact = math.ceil(Fraction(hundredths, 100) * top_k * valid / num_experts)
    assert capacity(hundredths / 100, top_k, valid, num_experts) == exact


def keep(indices: list[list[int]], weights: list[list[float]], valid: list[bool], moe: MoEConfig) -> list[list[bool]]:
    """One sequence: experts, weights and validity of each token -> which choices are kept."""
    kept = keep_within_capacity(torch.tensor([indices]), torch.tensor([weights]), torch.tensor([valid]), moe)
    return kept[0].tolist()


def test_position_keeps_the_first() -> None:
    # 6 tokens over 3 experts with factor 1: two places each
    experts = [[0], [0], [1], [0], [0], [2]]
    weights = [[0.1], [0.2], [0.3], [0.9], [0.8], [0.5]]
    moe = config(1.0, num_experts=3)
    assert keep(experts, weights, [True] * 6, moe) == [[True], [True], [True], [False], [False], [True]]


def test_probability_keeps_the_most_wanted() -> None:
    experts = [[0], [0], [1], [0], [0], [2]]
    weights = [[0.1], [0.2], [0.3], [0.9], [0.8], [0.5]]
    moe = config(1.0, num_experts=3, drop_policy="probability")
    assert keep(experts, weights, [True] * 6, moe) == [[False], [False], [True], [True], [True], [True]]


def test_probability_resolves_ties_by_position() -> None:
    moe = config(1.0, num_experts=3, drop_policy="probability")
    kept = keep([[0], [0], [0], [0], [1], [2]], [[0.5]] * 6, [True] * 6, moe)
    assert kept == [[True], [True], [False], [False], [True], [True]]


def test_choices_of_one_token_are_dropped_one_by_one() -> None:
    # 3 tokens, 2 choices each, 3 experts, factor 0.5: one place each
    moe = config(0.5, num_experts=3, top_k=2)
    kept = keep([[0, 1], [0, 2], [1, 2]], [[0.6, 0.4]] * 3, [True] * 3, moe)
    assert kept == [[True, True], [False, True], [False, False]]


@pytest.mark.parametrize("policy", ["position", "probability"])
def test_padding_takes_no_place_and_gives_none(policy: Policy) -> None:
    moe = config(1.0, num_experts=2, drop_policy=policy)
    # the padding would be first and most wanted; 4 valid tokens give two places each
    kept = keep(
        [[0], [0], [0], [0], [1], [0]],
        [[0.9], [0.9], [0.2], [0.3], [0.1], [0.1]],
        [False, False, True, True, True, True],
        moe,
    )
    assert kept == [[False], [False], [True], [True], [True], [False]]


def literal_keep(experts: list[int], priority: list[int], places: int) -> list[bool]:
    """One place after the other, in the order of priority."""
    taken: dict[int, int] = {}
    kept = [False] * len(experts)
    for i in priority:
        taken[experts[i]] = taken.get(experts[i], 0) + 1
        kept[i] = taken[experts[i]] <= places
    return kept


@given(data=st.data(), top_k=st.integers(1, 2), tokens=st.integers(1, 10), factor=st.sampled_from([0.3, 0.5, 1.0, 1.1, 2.0]))
@settings(max_examples=80, deadline=None)
@pytest.mark.parametrize("policy", ["position", "probability"])
def test_who_comes_first_stays(data: st.DataObject, policy: Policy, top_k: int, tokens: int, factor: float) -> None:
    moe = config(factor, num_experts=3, top_k=top_k, drop_policy=policy)
    choice = st.permutations(range(3)).map(lambda order: list(order)[:top_k])
    indices = data.draw(st.lists(choice, min_size=tokens, max_size=tokens))
    weight = st.lists(st.sampled_from([0.125, 0.25, 0.5]), min_size=top_k, max_size=top_k)
    weights = data.draw(st.lists(weight, min_size=tokens, max_size=tokens))
    flat_weights = [w for row in weights for w in row]
    priority = list(range(tokens * top_k))
    if policy == "probability":
        priority.sort(key=lambda i: -flat_weights[i])
    expected = literal_keep([e for row in indices for e in row], priority, capacity(factor, top_k, tokens, 3))
    assert [k for row in keep(indices, weights, [True] * tokens, moe) for k in row] == expected


def test_each_sequence_has_its_own_places() -> None:
    moe = config(1.0)
    torch.manual_seed(0)
    indices_BSK, weights_BSK = torch.randint(4, (5, 12, 1)), torch.rand(5, 12, 1)
    valid_BS = torch.arange(12) < torch.tensor([12, 7, 1, 0, 9])[:, None]
    together = keep_within_capacity(indices_BSK, weights_BSK, valid_BS, moe)
    for b in range(5):
        n = int(valid_BS[b].sum())
        alone = keep_within_capacity(indices_BSK[b : b + 1, :n], weights_BSK[b : b + 1, :n], valid_BS[b : b + 1, :n], moe)
        assert torch.equal(together[b, :n], alone[0])
        assert not together[b, n:].any()


def layer_like(other: MoELayer | None, moe: MoEConfig) -> MoELayer:
    layer = MoELayer(D, moe).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if other is not None:
        layer.load_state_dict(other.state_dict())
    return layer


def run(layer: MoELayer, x_BSD: Tensor, valid_BS: Tensor | None = None) -> dict[str, Tensor]:
    def forward(**inputs: Tensor) -> Tensor:
        x = inputs.pop("x_BSD")
        return torch.func.functional_call(layer, inputs, (x, valid_BS))[0]

    return with_gradients(forward, {"x_BSD": x_BSD, **dict(layer.named_parameters())})


@pytest.mark.parametrize("policy", ["position", "probability"])
@pytest.mark.parametrize("factor", [4.0, 1e9], ids=["as-many-as-experts", "huge"])
def test_capacity_for_all_is_dropless(policy: Policy, factor: float) -> None:
    dropless = layer_like(None, config(None, top_k=2, shared=1))
    roomy = layer_like(dropless, config(factor, top_k=2, shared=1, drop_policy=policy))
    x_BSD = torch.randn(3, 7, D, dtype=torch.float64)
    valid_BS = torch.arange(7) < torch.tensor([7, 4, 0])[:, None]
    for valid in (None, valid_BS):
        assert_same(run(roomy, x_BSD, valid), run(dropless, x_BSD, valid), rtol=1e-14)
        assert not roomy(x_BSD, valid)[1].dropped_B.any()


@pytest.mark.parametrize("shared", [0, 1], ids=["no-shared-expert", "shared-expert"])
@pytest.mark.parametrize("policy", ["position", "probability"])
def test_a_dropped_token_keeps_only_what_needs_no_place(policy: Policy, shared: int) -> None:
    layer = layer_like(None, config(0.5, num_experts=4, shared=shared, drop_policy=policy))
    x_BSD = torch.randn(2, 12, D, dtype=torch.float64)
    y_BSD, aux = layer(x_BSD)
    assert aux.routing is not None
    kept_BSK = keep_within_capacity(
        aux.routing.indices_TK.view(2, 12, 1),
        aux.routing.weights_TK.view(2, 12, 1),
        torch.ones(2, 12, dtype=torch.bool),
        layer.config,
    )
    dropped_BS = ~kept_BSK[..., 0]
    assert 0 < dropped_BS.sum() < 24
    assert aux.dropped_B.tolist() == dropped_BS.sum(-1).tolist()
    always_BSD = torch.zeros_like(x_BSD) if layer.shared_expert is None else layer.shared_expert(x_BSD)
    assert torch.equal(y_BSD[dropped_BS], always_BSD[dropped_BS])
    # the others get what they get without drops
    dropless = layer_like(layer, config(None, shared=shared))
    assert_same({"kept": y_BSD[~dropped_BS].detach()}, {"kept": dropless(x_BSD)[0][~dropped_BS].detach()}, rtol=1e-14)


class Poison(torch.autograd.Function):
    """NaN in all rows from `end` on, in both directions."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, end: int) -> Tensor:
        ctx.end = end
        return torch.cat([rows_RD[:end], torch.full_like(rows_RD[end:], torch.nan)])

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return torch.cat([grad_RD[: ctx.end], torch.full_like(grad_RD[ctx.end :], torch.nan)]), None


class PoisoningDispatcher(Dispatcher):
    """Rows that do not travel come back as NaN, and so do their gradients."""

    def start(self, xs_TD: Sequence[Tensor], plans: Sequence[DispatchPlan]) -> Sequence[Flight]:
        return [PoisonedFlight(x_TD, plan) for x_TD, plan in zip(xs_TD, plans, strict=True)]


class PoisonedFlight(Flight):
    def __init__(self, x_TD: Tensor, plan: DispatchPlan):
        self.plan, self.end = plan, int(plan.counts_E.sum())
        self.rows_RD = Poison.apply(permute(x_TD, plan.order_R, plan.row_TK, plan.kept_TK), self.end)

    def land(self, experts: Experts) -> None:
        self.rows_RD = Poison.apply(experts.compute(self.rows_RD, self.plan.counts_E), self.end)

    def finish(self, shared_TD: Tensor | None = None) -> Tensor:
        p = self.plan
        return unpermute(self.rows_RD, p.weights_TK, p.order_R, p.row_TK, p.kept_TK, shared_TD)


def test_rows_that_do_not_travel_leak_nowhere() -> None:
    layer = layer_like(None, config(0.5, top_k=2))
    x_BSD, valid_BS = torch.randn(2, 9, D, dtype=torch.float64), torch.arange(9) < torch.tensor([[9], [4]])
    want = run(layer, x_BSD, valid_BS)
    layer.dispatcher = PoisoningDispatcher()
    assert_same(run(layer, x_BSD, valid_BS), want)


def test_drops_are_counted_and_loads_are_not_changed_by_them() -> None:
    dropless = layer_like(None, config(None, top_k=2))
    tight = layer_like(dropless, config(0.5, top_k=2))
    x_BSD = torch.randn(3, 8, D, dtype=torch.float64)
    valid_BS = torch.arange(8) < torch.tensor([8, 5, 0])[:, None]
    aux, free = tight(x_BSD, valid_BS)[1], dropless(x_BSD, valid_BS)[1]
    assert torch.equal(aux.counts_BE, free.counts_BE)
    places_B = expert_capacity(torch.tensor([8, 5, 0]), tight.config)
    assert aux.dropped_B.tolist() == (free.counts_BE - places_B[:, None]).clamp_min(0).sum(-1).tolist()
    assert free.dropped_B.tolist() == [0, 0, 0]
    assert aux.dropped_B[2] == 0 < aux.dropped_B[0]
