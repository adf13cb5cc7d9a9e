"""The gate's kernels against the specification: choices, weights, scores, z, counts, and the gradient of each alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moefold.kernels.topk_gate import Gate, GateRule, reference, topk_gate, triton_impl
from numeric import assert_same

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DIFFERENTIABLE = ("weights_TK", "scores_TE", "z_T")
RULES = {
    "softmax": (16, False, GateRule(top_k=3)),
    "plain-scaled": (60, False, GateRule(top_k=4, renormalize=False, scaling_factor=2.5)),
    "sigmoid-bias": (20, True, GateRule(top_k=3, score="sigmoid", scaling_factor=2.5)),
    "softmax-bias": (12, True, GateRule(top_k=3, renormalize=False)),
    "late-softmax": (24, False, GateRule(top_k=4, order="topk_softmax", scaling_factor=0.5)),
    "late-softmax-bias": (9, True, GateRule(top_k=2, order="topk_softmax")),
    "top2-groups": (20, True, GateRule(top_k=3, score="sigmoid", num_groups=5, top_groups=2)),
    "max-groups": (24, False, GateRule(top_k=3, num_groups=3, top_groups=2, group_score="max")),
    "groups-of-one": (6, False, GateRule(top_k=2, num_groups=6, top_groups=3, group_score="max")),
    "every-expert": (7, False, GateRule(top_k=7)),
    "one-expert": (1, False, GateRule(top_k=1, renormalize=False)),
}


def with_every_gradient(gate: Callable[[Tensor], Gate], logits_TE: Tensor) -> dict[str, Tensor]:
    """The outputs, and the gradient of the logits through each differentiable output alone and through all of them."""
    leaf_TE = logits_TE.detach().requires_grad_()
    outputs = gate(leaf_TE)._asdict()
    generator = torch.Generator().manual_seed(7)
    directions = {n: torch.randn(outputs[n].shape, generator=generator, dtype=torch.float64) for n in DIFFERENTIABLE}
    found = {name: output.detach() for name, output in outputs.items()}
    for names in ((name,) for name in DIFFERENTIABLE), (DIFFERENTIABLE,):
        for chosen in names:
            along = [directions[name].to(logits_TE.dtype) for name in chosen]
            (grad_TE,) = torch.autograd.grad([outputs[name] for name in chosen], leaf_TE, along, retain_graph=True)
            found[f"gradient through {' + '.join(chosen)}"] = grad_TE
    return found


def assert_like_the_specification(
    logits_TE: Tensor, rule: GateRule, bias_E: Tensor | None = None, valid_T: Tensor | None = None, tokens: int | None = 8
) -> None:
    got = with_every_gradient(lambda x: triton_impl.topk_gate(x, rule, bias_E, valid_T, tokens), logits_TE)
    want = with_every_gradient(lambda x: reference.topk_gate(x, rule, bias_E, valid_T), logits_TE)
    for name in ("indices_TK", "counts_E"):
        assert_same({name: got[name]}, {name: want[name]})
    assert_same(got, want, 1e-12 if logits_TE.dtype == torch.float64 else 3e-6)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_equals_the_specification(name: str, dtype: torch.dtype) -> None:
    experts, biased, rule = RULES[name]
    bias_E = torch.randn(experts) * 0.3 if biased else None
    assert_like_the_specification(torch.randn(19, experts, dtype=dtype) * 2, rule, bias_E, torch.rand(19) < 0.7)


@pytest.mark.parametrize("tokens", [0, 1, 8, 17], ids=["none", "one", "whole-tile", "ragged-tile"])
def test_numbers_of_tokens(tokens: int) -> None:
    assert_like_the_specification(torch.randn(tokens, 10), GateRule(top_k=2))


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_equal_scores_resolve_to_the_lowest_expert(score: str) -> None:
    rule = GateRule(top_k=4, score=score, num_groups=3, top_groups=2)
    logits_TE = torch.randint(0, 2, (40, 12)).float()
    assert_like_the_specification(logits_TE, rule, tokens=16)
    assert triton_impl.topk_gate(torch.zeros(3, 12), rule).indices_TK.tolist() == [[0, 1, 2, 3]] * 3


def test_scores_that_underflow_stay_finite() -> None:
    logits_TE = torch.full((5, 6), -200.0, dtype=torch.float32)
    logits_TE[0] = torch.tensor([-95.0, -200.0, -300.0, -88.0, -87.0, -200.0])
    rule = GateRule(top_k=2, score="sigmoid")
    got = with_every_gradient(lambda x: triton_impl.topk_gate(x, rule, tokens=8), logits_TE)
    assert all(value.isfinite().all() for value in got.values())
    assert_like_the_specification(logits_TE.double() * 4, rule)
    # two of these add up to less than the smallest normal number, by which they are then divided: a constant
    assert_like_the_specification(torch.full((5, 6), -88.3), rule)


def test_chosen_logits_far_below_the_largest() -> None:
    # the bias chooses experts whose scores are 0 in fp32; their late softmax is none the less exact
    logits_TE = torch.tensor([[300.0, 1.0, 2.0, 3.0]])
    bias_E = torch.tensor([-1000.0, 0.0, 0.0, 0.0])
    assert_like_the_specification(logits_TE, GateRule(top_k=2, order="topk_softmax"), bias_E)


def test_nan_logits_choose_different_experts_of_range() -> None:
    logits_TE = torch.randn(9, 6)
    logits_TE[2, 4] = torch.nan
    logits_TE[5] = torch.nan
    logits_TE[7] = -torch.inf
    for rule in (GateRule(top_k=3), GateRule(top_k=3, order="topk_softmax"), GateRule(top_k=3, num_groups=3, top_groups=2)):
        gate = triton_impl.topk_gate(logits_TE, rule, tokens=4)
        assert gate.indices_TK.min() >= 0 and gate.indices_TK.max() < 6
        assert all(len(set(row)) == 3 for row in gate.indices_TK.tolist())
        assert gate.counts_E.sum() == 27
        assert gate.scores_TE[2].isnan().all(), "the broken token stays visible"
        assert gate.scores_TE[[0, 1, 3, 4, 6, 8]].isfinite().all(), "and touches no other"


def test_strided_inputs() -> None:
    logits_ET, bias_E2, valid_T2 = torch.randn(10, 13), torch.randn(10, 2), torch.rand(13, 2) < 0.5
    assert_like_the_specification(logits_ET.T, GateRule(top_k=2), bias_E2[:, 0], valid_T2[:, 0])
    assert_like_the_specification(torch.randn(13, 20)[:, :10], GateRule(top_k=2))


def test_expanded_gradients() -> None:
    # a rule under which the scores' sum is free: their gradient along ones would else be 0
    logits_TE, rule = torch.randn(11, 6), GateRule(top_k=2, score="sigmoid", renormalize=False)
    for name in DIFFERENTIABLE:
        leaves = [logits_TE.clone().requires_grad_() for _ in range(2)]
        for leaf, gate in zip(leaves, (triton_impl, reference), strict=True):
            output = getattr(gate.topk_gate(leaf, rule), name)
            output.backward(torch.full((), 0.5).expand(output.shape))
        got, want = (leaf.grad for leaf in leaves)
        assert_same({name: got}, {name: want}, 3e-6)


def test_reruns_and_other_tiles_are_bitwise_equal() -> None:
    logits_TE, rule = torch.randn(33, 12), GateRule(top_k=3, num_groups=3, top_groups=2)
    first, again, other = (
        with_every_gradient(lambda x, n=tokens: triton_impl.topk_gate(x, rule, tokens=n), logits_TE) for tokens in (8, 8, 32)
    )
    assert_same(again, first)
    assert_same(other, first)


def test_tiles_of_production_size_through_the_public_function() -> None:
    logits_TE, rule = torch.randn(40, 128), GateRule(top_k=8)
    got, want = (topk_gate(logits_TE, rule, backend=backend) for backend in ("triton", "torch"))
    assert_same(got._asdict(), want._asdict(), 3e-6)


def test_choices_and_counts_have_no_gradient() -> None:
    gate = triton_impl.topk_gate(torch.randn(4, 6, requires_grad=True), GateRule(top_k=2))
    assert [name for name, output in gate._asdict().items() if output.requires_grad] == list(DIFFERENTIABLE)


def test_what_the_kernel_does_not_take_is_named() -> None:
    with pytest.raises(ValueError, match="5000 experts in 1 groups need 8192 lanes"):
        triton_impl.topk_gate(torch.zeros(2, 5000), GateRule(top_k=2))
    with pytest.raises(ValueError, match="logits_TE on cpu, bias_E on meta"):
        topk_gate(torch.zeros(2, 6), GateRule(top_k=2), torch.zeros(6, device="meta"), backend="triton")
