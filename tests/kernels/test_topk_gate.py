"""topk_gate is the router's mathematics: equal to TopKRouter for every rule, with clear errors for what does not fit."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor

from moefold import MoEConfig, RouterConfig
from moefold.kernels.topk_gate import GateRule, topk_gate
from moefold.moe.config import BalanceConfig
from moefold.moe.router import TopKRouter
from numeric import assert_same


@pytest.mark.parametrize(
    ("experts", "rule", "biased"),
    [
        (16, GateRule(top_k=3), False),
        (16, GateRule(top_k=3, renormalize=False, scaling_factor=2.5), True),
        (16, GateRule(top_k=3, score="sigmoid"), True),
        (16, GateRule(top_k=3, order="topk_softmax"), True),
        (20, GateRule(top_k=3, score="sigmoid", num_groups=5, top_groups=2), True),
        (20, GateRule(top_k=3, num_groups=4, top_groups=2, group_score="max"), False),
        (6, GateRule(top_k=6), False),
        (1, GateRule(top_k=1, renormalize=False), False),
    ],
    ids=["softmax", "plain-scaled", "sigmoid", "late-softmax", "top2-groups", "max-groups", "every-expert", "one-expert"],
)
@pytest.mark.parametrize("masked", [False, True], ids=["all-valid", "padding"])
def test_equals_the_router(experts: int, rule: GateRule, biased: bool, masked: bool) -> None:
    settings = {f.name: getattr(rule, f.name) for f in fields(GateRule) if f.name != "top_k"}
    balance, router_config = BalanceConfig(expert_bias=biased), RouterConfig(**settings)
    router = TopKRouter(
        12, MoEConfig(num_experts=experts, top_k=rule.top_k, expert_dim=8, router=router_config, balance=balance)
    ).double()
    torch.nn.init.normal_(router.weight_ED)
    bias_E = router.expert_bias_E.normal_() if biased else None
    valid_T = torch.rand(30) < 0.6 if masked else None
    routing = router(torch.randn(30, 12, dtype=torch.float64), valid_T)
    gate = topk_gate(routing.logits_TE, rule, bias_E, valid_T)
    names = ("indices_TK", "weights_TK", "scores_TE", "counts_E")
    outputs, routed = ({name: getattr(record, name) for name in names} for record in (gate, routing))
    assert_same(outputs, routed)
    for name in ("weights_TK", "scores_TE"):
        direction = torch.randn_like(outputs[name])
        got, want = (torch.autograd.grad(o[name], router.weight_ED, direction, retain_graph=True)[0] for o in (outputs, routed))
        assert_same({f"gradient through {name}": got}, {f"gradient through {name}": want}, 1e-14)


def test_z_is_the_squared_logsumexp() -> None:
    logits_TE = torch.tensor([[0.0, 0.0], [1000.0, 0.0]], dtype=torch.float64)
    assert topk_gate(logits_TE, GateRule(top_k=1, renormalize=False)).z_T.tolist() == pytest.approx([0.4804530139182, 1e6])


def test_no_tokens() -> None:
    gate = topk_gate(torch.zeros(0, 4), GateRule(top_k=2))
    assert gate.indices_TK.shape == gate.weights_TK.shape == (0, 2)
    assert gate.counts_E.tolist() == [0] * 4


@pytest.mark.parametrize(
    ("logits_TE", "others", "said"),
    [
        (torch.zeros(3, 4).bfloat16(), {}, r"bfloat16 \(3, 4\); need float32 or float64"),
        (torch.zeros(12), {}, r"\(12,\); .*\[T, E\]"),
        (torch.zeros(3, 4), {"bias_E": torch.zeros(5)}, r"bias \(5,\) and logits \(3, 4\)"),
        (torch.zeros(3, 4), {"valid_T": torch.ones(4, dtype=torch.bool)}, r"bool \(4,\); logits \(3, 4\) need bool \(3,\)"),
        (torch.zeros(3, 4), {"valid_T": torch.ones(3)}, "float32"),
        (torch.zeros(3, 4), {"backend": "cuda"}, "backend 'cuda' is none of"),
    ],
    ids=["dtype", "shape", "bias", "valid-shape", "valid-dtype", "backend"],
)
def test_what_does_not_fit_is_named(logits_TE: Tensor, others: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        topk_gate(logits_TE, GateRule(top_k=2), **others)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_groups": 3}, ["3 groups do not divide 8 experts"]),
        ({"num_groups": 4, "top_groups": 5}, ["5 of 4 groups"]),
        ({"num_groups": 4, "top_groups": 1, "top_k": 3}, ["top_k = 3 of 2 experts in reach"]),
        ({"top_k": 9}, ["top_k = 9 of 8 experts"]),
        ({"top_k": 0}, ["top_k = 0"]),
        ({"num_groups": 8, "top_groups": 4}, ["groups of one expert"]),
        ({"num_groups": 3, "score": "sigmoid", "order": "topk_softmax"}, ["do not divide", "needs score 'softmax'"]),
        ({"score": "tanh", "group_score": "min", "order": "none"}, ["'tanh'", "'min'", "'none'"]),
    ],
    ids=["groups", "too-many-groups", "reach", "top-k", "no-choice", "groups-of-one", "two-problems", "unknown-names"],
)
def test_every_problem_of_a_rule_is_named(settings: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        topk_gate(torch.zeros(2, 8), GateRule(**{"top_k": 2, **settings}))
    assert all(part in str(error.value) for part in said)
