"""A layer that compresses what it sends: nothing is lost where nothing should be, and gradients are those of what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefold.kernels.lsh import Buckets, farther_than
from moefold.moe.compress import LSHCodec, split_off
from moefold.moe.config import CompressConfig, MoEConfig
from moefold.moe.dispatch import DispatchPlan, LocalDispatcher, make_plan
from moefold.moe.layer import MoELayer
from moefold.moe.load import Aux
from numeric import assert_same

D, E, K = 16, 8, 2
COMPENSATIONS = ("none", "identity", "scalar", "diagonal")
PER_SEQUENCE = ("counts_BE", "probs_BE", "z_B", "valid_B", "dropped_B", "logit_max")
Figures = dict[str, Tensor]


def make_layer(dim: int = D, moe: dict[str, Any] | None = None, **compress: Any) -> MoELayer:
    """A float64 layer whose weights depend on nothing but `dim` and `moe`; with compression if it is given any setting."""
    config = CompressConfig(method="lsh", **compress) if compress else CompressConfig()
    layer = MoELayer(dim, MoEConfig(**{"num_experts": E, "top_k": K, "expert_dim": 12} | (moe or {}), compress=config)).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name != "codec.scale_D":
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1]))
    return layer


def codec_of(layer: MoELayer) -> LSHCodec:
    assert layer.codec is not None
    return layer.codec


def clusters(tokens: int, groups: int = 6, spread: float = 0.2, dim: int = D, seed: int = 0) -> Tensor:
    """[1, tokens, dim] around a few centres."""
    generator = torch.Generator().manual_seed(seed)
    centres_GD = torch.randn(groups, dim, dtype=torch.float64, generator=generator)
    noise_TD = torch.randn(tokens, dim, dtype=torch.float64, generator=generator)
    return (centres_GD[torch.randint(groups, (tokens,), generator=generator)] + spread * noise_TD)[None]


def run(layer: MoELayer, x_BSD: Tensor, valid_BS: Tensor | None = None, *, losses: bool = False) -> tuple[Figures, Aux]:
    """Output and every gradient for a random direction, without codec.scale_D, and what the layer says of its routing."""
    layer.zero_grad(set_to_none=True)
    x_BSD = x_BSD.clone().requires_grad_()
    y_BSD, aux = layer(x_BSD, valid_BS)
    direction_BSD = torch.randn(y_BSD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    target = (y_BSD * direction_BSD).sum()
    (target + aux.losses.balance + aux.losses.z if losses else target).backward()
    named = {n: p for n, p in layer.named_parameters() if n != "codec.scale_D"} | {"x": x_BSD}
    gradients = {f"gradient of {n}": torch.zeros_like(p) if p.grad is None else p.grad for n, p in named.items()}
    return {"output": y_BSD.detach(), **gradients}, aux


SHAPES: dict[str, tuple[dict[str, Any], bool]] = {
    "plain": ({}, False),
    "shared": ({"num_shared_experts": 1}, False),
    "padded": ({"num_shared_experts": 1}, True),
    "capacity": ({"capacity_factor": 0.6}, False),
    "capacity-padded": ({"capacity_factor": 0.6, "drop_policy": "probability", "num_shared_experts": 1}, True),
}
"""Name: (settings of the layer, whether some positions are padding)."""


def batch(padded: bool) -> tuple[Tensor, Tensor | None]:
    """Two sequences, and which positions are valid."""
    x_BSD = clusters(48).view(2, 24, D)
    return x_BSD, torch.rand(2, 24, generator=torch.Generator().manual_seed(5)) < 0.7 if padded else None


# nothing is lost


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_all_rows_give_bitwise_the_layer_without_compression(shape: str, compensation: str) -> None:
    moe, padded = SHAPES[shape]
    layer = make_layer(moe=moe, rate=1.0, compensation=compensation, radius=0.5, gate_weighted=True)
    (got, sent), (want, aux) = (run(x, *batch(padded), losses=True) for x in (layer, make_layer(moe=moe)))
    assert_same(got, want)
    assert sent.rows_sent == aux.rows_sent == aux.counts_BE.sum() - aux.dropped_B.sum()
    assert sent.error == sent.norm == 0


@pytest.mark.parametrize("compensation", COMPENSATIONS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rate", [None, 0.05])
def test_radius_0_gives_the_layer_without_compression(shape: str, compensation: str, rate: float | None) -> None:
    moe, padded = SHAPES[shape]
    layer = make_layer(moe=moe, rate=rate, radius=0.0, compensation=compensation, gate_weighted=compensation == "scalar")
    (got, sent), (want, aux) = (run(x, *batch(padded), losses=True) for x in (layer, make_layer(moe=moe)))
    assert_same(got, want, 1e-12)
    assert sent.rows_sent == aux.rows_sent
    scale_D = codec_of(layer).scale_D
    if scale_D is not None:
        assert scale_D.grad is not None and not scale_D.grad.any(), "nothing was lost that a scale could make up for"


@pytest.mark.parametrize("settings", [{"exact_choices": K}, {"radius": 0.0}], ids=["exact-choices", "radius"])
def test_rows_that_travel_alone_come_back_exactly_in_bf16(settings: dict[str, Any]) -> None:
    layer, plain = (make_layer(**s).bfloat16() for s in ({"rate": 0.1, **settings}, {}))
    x_BSD = clusters(64).bfloat16()
    assert_same({"output": layer(x_BSD)[0]}, {"output": plain(x_BSD)[0]}, 2e-2)


@pytest.mark.parametrize("gate_weighted", [False, True])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_equal_tokens_travel_as_one_row_per_expert_and_lose_nothing(compensation: str, gate_weighted: bool) -> None:
    x_BSD = torch.randn(1, 1, D, dtype=torch.float64).expand(1, 32, D)
    layer = make_layer(rate=None, compensation=compensation, gate_weighted=gate_weighted)
    (got, sent), (want, aux) = (run(x, x_BSD) for x in (layer, make_layer()))
    assert sent.rows_sent == K < aux.rows_sent == 32 * K
    # the tokens share the gradient of the row that travelled, and without a residual keep none of their own
    mine, all_of = got.pop("gradient of x"), want.pop("gradient of x")
    assert_same(got, want, 1e-12)
    assert_same({"sum of gradients of x": mine.sum(1)}, {"sum of gradients of x": all_of.sum(1)}, 1e-12)


def test_a_rerun_changes_no_bit() -> None:
    layer = make_layer(rate=0.3, radius=0.4, compensation="diagonal", gate_weighted=True, exact_choices=1)
    (first, _), (second, _) = (run(layer, *batch(True)) for _ in range(2))
    assert_same(first, second)


# statistics


@pytest.mark.parametrize("shape", SHAPES)
def test_statistics_and_losses_are_those_of_the_original_tokens(shape: str) -> None:
    moe, padded = SHAPES[shape]
    layers = make_layer(moe=moe, rate=0.2), make_layer(moe=moe)
    figures = []
    for layer in layers:
        _, aux = layer(*batch(padded))
        loss = aux.losses.balance + 0.1 * aux.losses.z
        [gradient_ED] = torch.autograd.grad(loss, [layer.router.weight_ED])
        figures.append({**{n: getattr(aux, n).detach() for n in PER_SEQUENCE}, "loss": loss.detach(), "gradient": gradient_ED})
        assert aux.routing is not None
    assert_same(*figures)
    assert ("capacity" in shape) == bool(figures[0]["dropped_B"].any())


# the formula and its gradients


def by_the_formula(layer: MoELayer, x_TD: Tensor, plan: DispatchPlan, buckets: Buckets) -> Tensor:
    """y = sum of w (E(c) + a (x - c)) with plain autograd, from the bucket of every choice alone."""
    codec, (T, K) = codec_of(layer), plan.indices_TK.shape
    kept_TK = torch.ones(T, K, dtype=torch.bool) if plan.kept_TK is None else plan.kept_TK
    weights_TK = plan.weights_TK.masked_fill(~kept_TK, 0)
    member_CTK = F.one_hot(buckets.bucket_TK, len(buckets.experts_C)).movedim(-1, 0) * kept_TK
    member_CTK = member_CTK * weights_TK if codec.config.gate_weighted else member_CTK.double()
    c_CD = torch.einsum("ctk,td->cd", member_CTK, x_TD) / member_CTK.sum((1, 2))[:, None]
    w13_C2FD, w2_CDF = layer.experts.w13_E2FD[buckets.experts_C], layer.experts.w2_EDF[buckets.experts_C]
    gate_CF, up_CF = torch.einsum("cgfd,cd->gcf", w13_C2FD, c_CD)
    expert_CD = torch.einsum("cdf,cf->cd", w2_CDF, F.silu(gate_CF) * up_CF)
    residual_TKD = x_TD[:, None] - c_CD[buckets.bucket_TK]
    residual_TKD = residual_TKD.detach() if codec.config.detach_residual else residual_TKD
    scale_D = {"none": 0.0, "identity": 1.0}.get(codec.config.compensation, codec.scale_D)
    assert scale_D is not None
    return (weights_TK[..., None] * (expert_CD[buckets.bucket_TK] + scale_D * residual_TKD)).sum(1)


def some_plan(tokens: int, kept: bool, seed: int = 0) -> DispatchPlan:
    """Random choices with weights of any sum; with `kept` about half of them travel."""
    generator = torch.Generator().manual_seed(seed)
    indices_TK = torch.rand(tokens, E, generator=generator).argsort(-1)[:, :3]
    weights_TK = torch.rand(tokens, 3, dtype=torch.float64, generator=generator).requires_grad_()
    kept_TK = torch.rand(tokens, 3, generator=generator) < 0.5 if kept else None
    return make_plan(indices_TK, weights_TK, E, kept_TK)


def gradients_of(y_TD: Tensor, named: dict[str, Tensor]) -> Figures:
    direction_TD = torch.randn(y_TD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    grads = torch.autograd.grad(y_TD, list(named.values()), direction_TD, allow_unused=True)
    pairs = zip(named.items(), grads, strict=True)
    return {"output": y_TD.detach(), **{n: torch.zeros_like(p) if g is None else g for (n, p), g in pairs}}


@pytest.mark.parametrize("kept", [False, True], ids=["all-kept", "some-kept"])
@pytest.mark.parametrize("detach", [False, True], ids=["true-gradient", "detached"])
@pytest.mark.parametrize("gate_weighted", [False, True], ids=["plain-means", "gate-weighted"])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_output_and_gradients_are_those_of_the_formula(compensation: str, gate_weighted: bool, detach: bool, kept: bool) -> None:
    settings = {"gate_weighted": gate_weighted, "detach_residual": detach, "compensation": compensation}
    layer, plan = make_layer(rate=0.25, moe={"top_k": 3}, **settings), some_plan(40, kept)
    x_TD, codec = clusters(40)[0].requires_grad_(), codec_of(layer)
    if codec.scale_D is not None:
        torch.nn.init.uniform_(codec.scale_D, 0.2, 2)
    named = {"x": x_TD, "weights": plan.weights_TK, **dict(layer.experts.named_parameters()), **dict(codec.named_parameters())}
    y_TD, sent = codec(layer.dispatcher, x_TD, plan, layer.experts)
    buckets, rows_CD = codec.compress(x_TD, plan)
    assert sent.rows == len(rows_CD) == len(buckets.experts_C) < plan.counts_E.sum() / 2
    got, want = gradients_of(y_TD, named), gradients_of(by_the_formula(layer, x_TD, plan, buckets), named)
    assert_same(got, want, 1e-12)


@pytest.mark.parametrize("gate_weighted", [False, True], ids=["plain-means", "gate-weighted"])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_gradients_of_a_layer_equal_finite_differences(compensation: str, gate_weighted: bool) -> None:
    settings: dict[str, Any] = {"hashes": 2, "hash_width": 4, "compensation": compensation, "gate_weighted": gate_weighted}
    layer = make_layer(4, {"num_experts": 3, "expert_dim": 3, "num_shared_experts": 1}, rate=0.4, **settings)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x_BSD, rows = clusters(12, groups=3, dim=4).requires_grad_(), set()
    assert ("codec.scale_D" in names) == (compensation in ("scalar", "diagonal"))

    def output(x_BSD: Tensor, *values: Tensor) -> Tensor:
        y_BSD, aux = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x_BSD,))
        rows.add(int(aux.rows_sent))
        return y_BSD

    assert torch.autograd.gradcheck(output, (x_BSD, *parameters), fast_mode=True, eps=1e-7)
    [sent] = rows
    assert sent < 12 * K / 2


def test_the_scale_starts_at_0_as_no_compensation_and_moves() -> None:
    for compensation, size in (("scalar", 1), ("diagonal", D)):
        layer = make_layer(rate=0.2, compensation=compensation)
        scale_D = codec_of(layer).scale_D
        assert scale_D is not None and torch.equal(scale_D.detach(), torch.zeros(size, dtype=torch.float64))
        got, want = (run(x, clusters(40))[0] for x in (layer, make_layer(rate=0.2, compensation="none")))
        assert_same(got, want, 1e-13)
        assert scale_D.grad is not None and scale_D.grad.ne(0).all()
    assert codec_of(make_layer(rate=0.2)).scale_D is codec_of(make_layer(rate=0.2, compensation="identity")).scale_D is None


# with linear experts the sum over a bucket is exact, whatever is added for the residuals (1.7)


class Linear:
    """Experts x -> x A_e; counts the rows they see."""

    def __init__(self) -> None:
        self.a_EDD = torch.randn(E, D, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        self.rows = 0

    def __call__(self, x_TD: Tensor, work: Callable[..., Tensor]) -> Tensor:
        return work(x_TD, self)

    def compute(self, x: Tensor, counts_E: Tensor, plan: DispatchPlan | None = None, shared_TD: Tensor | None = None) -> Tensor:
        assert plan is not None and shared_TD is None
        self.rows += int(counts_E.sum())
        kept_TK = torch.ones_like(plan.indices_TK, dtype=torch.bool) if plan.kept_TK is None else plan.kept_TK
        return torch.einsum("tk,tkde,td->te", plan.weights_TK.masked_fill(~kept_TK, 0), self.a_EDD[plan.indices_TK], x)


@pytest.mark.parametrize("kept", [False, True], ids=["all-kept", "some-kept"])
@pytest.mark.parametrize("compensation", COMPENSATIONS)
def test_linear_experts_keep_the_weighted_sum_of_all_tokens(compensation: str, kept: bool) -> None:
    layer, plan, experts = make_layer(rate=0.2, compensation=compensation, gate_weighted=True), some_plan(50, kept), Linear()
    x_TD, dispatcher = clusters(50)[0], LocalDispatcher()
    y_TD, sent = codec_of(layer)(dispatcher, x_TD, plan, experts)
    assert experts.rows == sent.rows < plan.counts_E.sum() / 2
    exact_TD = dispatcher(x_TD, plan, experts)
    assert_same({"sum": y_TD.sum(0).detach()}, {"sum": exact_TD.sum(0).detach()}, 1e-12)
    assert not torch.allclose(y_TD, exact_TD), "nothing was merged"


# how many rows


@pytest.mark.parametrize("exact_choices", [0, 1])
@pytest.mark.parametrize("rate", [0.01, 0.07, 0.2, 0.35, 0.5, 0.9])
@pytest.mark.parametrize("kept", [False, True], ids=["all-kept", "some-kept"])
def test_the_budget_is_kept_and_used(rate: float, kept: bool, exact_choices: int) -> None:
    plan, x_TD = some_plan(400, kept), torch.randn(400, D, dtype=torch.float64)
    codec = codec_of(make_layer(moe={"top_k": 3}, rate=rate, exact_choices=exact_choices))
    _, rows_CD = codec.compress(x_TD, plan)
    travel_TK = torch.ones(400, 3, dtype=torch.bool) if plan.kept_TK is None else plan.kept_TK
    exact = int(travel_TK[:, :exact_choices].sum())
    merged = travel_TK.clone()
    merged[:, :exact_choices] = False
    least = exact + len(plan.indices_TK[merged].unique())
    budget = -(-round(100 * rate) * int(travel_TK.sum()) // 100)
    assert len(rows_CD) <= max(budget, least)
    # these tokens are all different; what is left over is less than the children of one bucket, one for each signed direction
    assert len(rows_CD) >= max(budget - (2 * codec.config.hash_width - 2), least)


@pytest.mark.parametrize(("rate", "tokens"), [(0.07, 100), (0.14, 50), (0.28, 25), (0.55, 100)])
def test_the_budget_is_of_the_fraction_that_was_meant(rate: float, tokens: int) -> None:
    assert rate * tokens > round(rate * tokens), "the product of floats rounds up"
    plan = make_plan(torch.randint(2, (tokens, 1)), torch.ones(tokens, 1, dtype=torch.float64), E)
    codec = codec_of(make_layer(rate=rate, hashes=12, hash_width=1))
    assert len(codec.compress(torch.randn(tokens, D, dtype=torch.float64), plan)[1]) == round(rate * tokens)


def test_without_a_rate_there_is_a_row_for_each_expert_and_code() -> None:
    plan, x_TD = some_plan(200, True), clusters(200)[0]
    codec = codec_of(make_layer(moe={"top_k": 3}, rate=None, hashes=1))
    assert plan.kept_TK is not None
    codes_TH = codec.codes(x_TD, plan)
    wanted = {
        (e, *codes)
        for chosen, kept, codes in zip(plan.indices_TK.tolist(), plan.kept_TK.tolist(), codes_TH.tolist(), strict=True)
        for e, k in zip(chosen, kept, strict=True)
        if k
    }
    assert len(codec.compress(x_TD, plan)[1]) == len(wanted) < plan.counts_E.sum() / 2


def sizes_of(buckets: Buckets) -> Tensor:
    """Rows of each choice's bucket [T, K]."""
    return buckets.starts_C1.diff()[buckets.bucket_TK]


@pytest.mark.parametrize("exact_choices", [1, 2, 3])
def test_the_best_choices_travel_alone(exact_choices: int) -> None:
    plan, x_TD = some_plan(100, True), clusters(100)[0]
    codec = codec_of(make_layer(moe={"top_k": 3}, rate=0.1, exact_choices=exact_choices))
    buckets, rows_CD = codec.compress(x_TD, plan)
    assert plan.kept_TK is not None
    alone_TK = sizes_of(buckets) == 1
    first_TK = plan.kept_TK & (torch.arange(3) < exact_choices)
    assert alone_TK[first_TK].all()
    assert torch.equal(rows_CD[buckets.bucket_TK][first_TK], x_TD[:, None].expand(-1, 3, -1)[first_TK])
    others_TK = plan.kept_TK & ~first_TK
    assert not others_TK.any() or not alone_TK[others_TK].all()


# the radius


@pytest.mark.parametrize("gate_weighted", [False, True], ids=["plain-means", "gate-weighted"])
@pytest.mark.parametrize("radius", [0.1, 0.3, 0.6])
@pytest.mark.parametrize("seed", range(4))
def test_every_row_that_is_merged_lies_within_the_radius(seed: int, radius: float, gate_weighted: bool) -> None:
    plan, x_TD = some_plan(300, seed % 2 == 1, seed), clusters(300, groups=20, spread=0.15 + 0.1 * seed, seed=seed)[0]
    settings = {"rate": 0.1, "hashes": 2, "hash_width": 4, "gate_weighted": gate_weighted}
    before, after = (codec_of(make_layer(moe={"top_k": 3}, **settings, radius=r)) for r in (None, radius))

    def farthest(buckets: Buckets) -> float:
        """Largest |x - c| / |x| over the rows, with means taken here."""
        kept_TK = torch.ones_like(buckets.bucket_TK, dtype=torch.bool) if plan.kept_TK is None else plan.kept_TK
        share_TK = (plan.weights_TK.detach() if gate_weighted else torch.ones_like(plan.weights_TK)).masked_fill(~kept_TK, 0)
        member_CTK = F.one_hot(buckets.bucket_TK).movedim(-1, 0) * share_TK
        c_CD = torch.einsum("ctk,td->cd", member_CTK, x_TD) / member_CTK.sum((1, 2))[:, None]
        distance_TK = (x_TD[:, None] - c_CD[buckets.bucket_TK]).norm(dim=-1) / x_TD.norm(dim=-1, keepdim=True)
        return float(distance_TK[kept_TK].max())

    unbounded, bounded = (codec.compress(x_TD, plan)[0] for codec in (before, after))
    assert farthest(unbounded) > radius
    assert farthest(bounded) <= radius * (1 + 1e-12)
    assert len(unbounded.experts_C) < len(bounded.experts_C)
    if seed < 2 and radius > 0.1:
        assert len(bounded.experts_C) < plan.counts_E.sum(), "no row was left to merge"


def test_rows_that_are_far_only_without_the_farthest_travel_alone_too() -> None:
    # one direction, so that codes are equal; the first row draws the mean away from the last
    x_TD = torch.tensor([[10.0], [3.0], [2.0]], dtype=torch.float64) * torch.eye(1, D, dtype=torch.float64)
    plan = make_plan(torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1, dtype=torch.float64), E)
    codec, without = (codec_of(make_layer(rate=0.1, radius=r)) for r in (0.7, None))
    # mean 5: the rows are 0.5, 0.67 and 1.5 of their lengths away; without the last it would be 6.5, and 3 is 1.17 away
    buckets, rows_CD = without.compress(x_TD, plan)
    far_TK = farther_than(x_TD, rows_CD, buckets, 0.7)
    assert far_TK.flatten().tolist() == [False, False, True]
    once = split_off(buckets, plan.indices_TK, far_TK, E)
    assert sizes_of(once).flatten().tolist() == [2, 2, 1]
    assert sizes_of(codec.compress(x_TD, plan)[0]).flatten().tolist() == [1, 1, 1]


def test_a_row_outside_leaves_the_others_together() -> None:
    # mean 6.5: the last row is 0.675 of its length away, the others 0.3; without it they are where their mean is
    x_TD = torch.tensor([[5.0]] * 9 + [[20.0]], dtype=torch.float64) * torch.eye(1, D, dtype=torch.float64)
    plan = make_plan(torch.zeros(10, 1, dtype=torch.int64), torch.ones(10, 1, dtype=torch.float64), E)
    buckets, rows_CD = codec_of(make_layer(rate=0.1, radius=0.5)).compress(x_TD, plan)
    assert sizes_of(buckets).flatten().tolist() == [9] * 9 + [1]
    assert rows_CD[:, 0].tolist() == [5.0, 20.0]
