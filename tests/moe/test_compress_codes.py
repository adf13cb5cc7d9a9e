"""Tokens are hashed as seen from their mean: a part in common costs no budget, and nobody else has a part in that mean."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moefold.moe.compress import LSHCodec
from moefold.moe.config import CompressConfig, MoEConfig
from moefold.moe.dispatch import DispatchPlan, make_plan

D, E, T, K = 16, 8, 400, 3
RATE = 0.4


def make_codec(**compress: Any) -> LSHCodec:
    config = CompressConfig(**({"method": "lsh", "rate": RATE} | compress))
    return LSHCodec(D, MoEConfig(num_experts=E, top_k=K, expert_dim=8, compress=config))


def make_tokens(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


def some_plan(kept: float = 1.0) -> DispatchPlan:
    """Random choices, of which about this part travels."""
    generator = torch.Generator().manual_seed(2)
    indices_TK = torch.rand(T, E, generator=generator).argsort(-1)[:, :K]
    weights_TK = torch.rand(T, K, dtype=torch.float64, generator=generator)
    return make_plan(indices_TK, weights_TK, E, None if kept == 1 else torch.rand(T, K, generator=generator) < kept)


@pytest.mark.parametrize("common", [0.0, 3.0, 30.0])
def test_a_part_in_common_leaves_no_budget_unused(common: float) -> None:
    x_TD, plan, codec = make_tokens(), some_plan(), make_codec()
    _, rows_CD = codec.compress(x_TD + common, plan)
    assert len(rows_CD) == pytest.approx(RATE * T * K, abs=2 * codec.config.hash_width - 2)
    # nor does it move a token to another bucket
    assert torch.equal(codec.codes(x_TD + common, plan), codec.codes(x_TD, plan))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_codes_of_narrow_types_tell_tokens_with_a_part_in_common_apart(dtype: torch.dtype) -> None:
    x_TD, plan, codec = make_tokens(dtype) + 20, some_plan(), make_codec()
    codes_TH = codec.codes(x_TD, plan)
    assert len(codes_TH.unique(dim=0)) > 0.9 * T
    agree_TH = codes_TH == codec.codes(x_TD.double(), plan)
    assert agree_TH.double().mean() > 0.9


def test_what_does_not_travel_has_no_part_in_the_mean() -> None:
    x_TD, plan, codec = make_tokens(), some_plan(kept=0.4), make_codec()
    assert plan.kept_TK is not None
    idle_T = ~plan.kept_TK.any(1)
    assert idle_T.any() and not idle_T.all()
    codes_TH = codec.codes(x_TD, plan)[~idle_T]
    for junk in (1e6, torch.nan, torch.inf):
        assert torch.equal(codec.codes(x_TD.masked_fill(idle_T[:, None], junk), plan)[~idle_T], codes_TH), junk
    everybody = some_plan()
    assert not torch.equal(codec.codes(x_TD.masked_fill(idle_T[:, None], 1e6), everybody)[~idle_T], codes_TH)


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
def test_a_broken_token_has_no_part_in_the_mean(junk: float) -> None:
    x_TD, plan, codec = make_tokens(), some_plan(), make_codec()
    # the mean of the others is 0 with and without it, up to rounding
    x_TD[1:] -= x_TD[1:].mean(0)
    want_TH = codec.codes(x_TD.index_fill(0, torch.tensor([0]), 0.0), plan)[1:]
    x_TD[0, 3] = junk
    assert torch.equal(codec.codes(x_TD, plan)[1:], want_TH)


def test_no_gradient_flows_through_the_mean_or_the_codes() -> None:
    x_TD = make_tokens().requires_grad_()
    codes_TH = make_codec().codes(x_TD, some_plan())
    assert not codes_TH.requires_grad and codes_TH.dtype == torch.int64


@pytest.mark.parametrize("rate", [0.4, 0.2, 0.1])
def test_the_usual_rates_are_reached_by_default(rate: float) -> None:
    x_TD, plan = make_tokens() * 0.2 + 3, some_plan()
    codec = make_codec(rate=rate)
    _, rows_CD = codec.compress(x_TD, plan)
    assert rate * T * K - 2 * codec.config.hash_width < len(rows_CD) <= round(rate * T * K)
