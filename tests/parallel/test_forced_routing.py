"""Routing as it is wished: loads, distinct experts, weights of the router's own scores, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from moefold.moe.config import MoEConfig, RouterConfig
from moefold.moe.layer import MoELayer
from moefold.parallel.forced_routing import choices_of, draw_choices, draw_evenly, forced, inclusion, zipf_load

GENERATOR_SEED = 3


def drawn(seed: int = GENERATOR_SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_zipf_shares_fall_as_the_exponent_says() -> None:
    load_E = zipf_load(8, 1.5, seed=1)
    ordered = load_E.sort(descending=True).values
    assert load_E.sum() == pytest.approx(1.0)
    assert (ordered[0] / ordered[3]).item() == pytest.approx(4**1.5)
    assert torch.equal(load_E, zipf_load(8, 1.5, seed=1)) and not torch.equal(load_E, zipf_load(8, 1.5, seed=2))
    assert torch.allclose(zipf_load(8, 0.0, seed=1), torch.full((8,), 0.125, dtype=torch.float64))


def test_no_expert_is_chosen_twice_by_a_token() -> None:
    chance_E = inclusion(torch.tensor([100.0, 1.0, 1.0, 2.0]), 2)
    assert chance_E.tolist() == pytest.approx([1.0, 0.25, 0.25, 0.5])
    chance_E = inclusion(torch.tensor([100.0, 90.0, 1.0, 1.0, 1.0]), 3)
    assert chance_E.tolist() == pytest.approx([1.0, 1.0, 1 / 3, 1 / 3, 1 / 3])


@pytest.mark.parametrize("loads", [[1.0, -0.1, 1.0], [1.0, 0.0, 0.0]])
def test_loads_that_cannot_be_are_refused(loads: list[float]) -> None:
    with pytest.raises(ValueError, match="none may be negative, and 2 must be positive"):
        inclusion(torch.tensor(loads), 2)


def test_experts_are_drawn_as_often_as_their_share_says() -> None:
    chance_E = inclusion(zipf_load(8, 1.0, seed=0), 3)
    tokens = 4000
    choices_TK = draw_choices(chance_E, tokens, 3, drawn())
    assert all(len(set(row)) == 3 for row in choices_TK.tolist())
    share_E = torch.bincount(choices_TK.flatten(), minlength=8) / tokens
    # five standard deviations of a share
    assert (share_E - chance_E).abs().max() < 5 * 0.5 / tokens**0.5


@pytest.mark.parametrize(("experts", "top_k"), [(8, 2), (8, 3), (4, 4)])
def test_even_choices_are_even_and_distinct(experts: int, top_k: int) -> None:
    choices_TK = draw_evenly(experts, 240, top_k, drawn())
    counts_E = torch.bincount(choices_TK.flatten(), minlength=experts)
    assert choices_TK.shape == (240, top_k) and all(len(set(row)) == top_k for row in choices_TK.tolist())
    if experts % top_k == 0:
        assert set(counts_E.tolist()) == {240 * top_k // experts}
    assert counts_E.max() < 1.3 * counts_E.float().mean()


@pytest.mark.parametrize("order", ["softmax_topk", "topk_softmax"])
def test_a_router_is_overruled_with_weights_of_its_own_scores(order: str) -> None:
    config = MoEConfig(num_experts=8, top_k=2, expert_dim=16, router=RouterConfig(order=order, renormalize=True))  # type: ignore[arg-type]
    layer = MoELayer(16, config)
    x_TD = torch.randn(32, 16, generator=drawn())
    free = layer.router(x_TD)
    with forced([layer], None, seed=5), choices_of([layer]) as seen:
        first, again = layer.router(x_TD), layer.router(x_TD)
        masked = layer.router(x_TD, torch.arange(32) < 8)
    assert torch.equal(first.indices_TK, again.indices_TK) and torch.equal(seen[0][0], first.indices_TK)
    assert not torch.equal(first.indices_TK, free.indices_TK)
    assert first.counts_E.tolist() == [8] * 8 and masked.counts_E.sum() == 16
    wanted_TK = free.logits_TE.gather(1, first.indices_TK).softmax(-1)  # of softmax scores too, once renormalised
    torch.testing.assert_close(first.weights_TK, wanted_TK)
    layer.zero_grad()
    first.weights_TK[:, 0].sum().backward()
    assert layer.router.weight_ED.grad is not None and layer.router.weight_ED.grad.abs().sum() > 0
    assert torch.equal(layer.router(x_TD).indices_TK, free.indices_TK), "afterwards the router chooses again"
