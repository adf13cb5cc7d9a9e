"""Compression at its edges: choices that do not travel, broken rows, no rows; and the error that is measured on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moefold.moe.compress import LSHCodec, Sent
from moefold.moe.config import CompressConfig, MoEConfig
from moefold.moe.dispatch import DispatchPlan, LocalDispatcher, make_plan
from moefold.moe.layer import MoELayer
from moefold.moe.load import Aux
from numeric import assert_same

D, E = 16, 8
pytestmark = pytest.mark.usefixtures("poisoned_memory")
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"gate_weighted": True, "compensation": "diagonal"},
    {"radius": 0.5, "compensation": "none", "exact_choices": 1},
    {"radius": 0.5, "gate_weighted": True, "compensation": "scalar", "detach_residual": True},
)


def make_layer(moe: dict[str, Any] | None = None, **compress: Any) -> MoELayer:
    config = CompressConfig(**({"method": "lsh", "rate": 0.2} | compress))
    layer = MoELayer(D, MoEConfig(**{"num_experts": E, "top_k": 2, "expert_dim": 12} | (moe or {}), compress=config)).double()
    for parameter in layer.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return layer


def codec_of(layer: MoELayer) -> LSHCodec:
    assert layer.codec is not None
    return layer.codec


def clusters(tokens: int) -> Tensor:
    return torch.randn(5, D, dtype=torch.float64)[torch.randint(5, (tokens,))] + 0.2 * torch.randn(tokens, D, dtype=torch.float64)


def figures(layer: MoELayer, x_TD: Tensor, plan: DispatchPlan) -> tuple[dict[str, Tensor], Sent]:
    """Output and gradients of a codec's pass over given choices."""
    x_TD = x_TD.clone().requires_grad_()
    y_TD, sent = codec_of(layer)(layer.dispatcher, x_TD, plan, layer.experts)
    direction_TD = torch.randn(y_TD.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    named = {"x": x_TD, "weights": plan.weights_TK, **dict(layer.experts.named_parameters())}
    named |= dict(codec_of(layer).named_parameters())
    grads = torch.autograd.grad(y_TD, list(named.values()), direction_TD)
    return {"output": y_TD.detach(), **dict(zip(named, grads, strict=True))}, sent


# choices that do not travel


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_what_does_not_travel_may_hold_anything(settings: dict[str, Any]) -> None:
    layer, x_TD = make_layer(**settings), clusters(40)
    indices_TK, weights_TK = torch.rand(40, E).argsort(-1)[:, :3], torch.rand(40, 3, dtype=torch.float64)
    kept_TK = torch.rand(40, 3) < 0.4
    idle_T = ~kept_TK.any(1)
    assert idle_T.any() and not idle_T.all()
    found = []
    for junk in (0.0, torch.nan, torch.inf):
        plan = make_plan(indices_TK, weights_TK.masked_fill(~kept_TK, junk).requires_grad_(), E, kept_TK)
        found.append(figures(layer, x_TD.masked_fill(idle_T[:, None], junk), plan))
    for other, sent in found[1:]:
        assert_same(other, found[0][0])
        assert sent.rows == found[0][1].rows <= kept_TK.sum()
    clean = found[0][0]
    assert not clean["output"][idle_T].any() and not clean["x"][idle_T].any() and not clean["weights"][~kept_TK].any()
    assert clean["output"][~idle_T].ne(0).all()


def test_padding_may_hold_anything_and_the_dropped_get_their_shared_expert_alone() -> None:
    layer = make_layer({"num_shared_experts": 1, "capacity_factor": 0.5})
    codec_of(layer).sampled = 100
    x_BSD, valid_BS = clusters(48).view(2, 24, D), torch.rand(2, 24) < 0.6
    x_BSD[~valid_BS] = torch.nan
    y_BSD, aux = layer(x_BSD, valid_BS)
    assert layer.shared_expert is not None and y_BSD[valid_BS].isfinite().all()
    assert 0 < aux.error < torch.inf and 0 < aux.norm < torch.inf
    assert aux.rows_sent <= (2 * aux.valid_B - aux.dropped_B).sum() and aux.dropped_B.all()
    kept_TK = layer.keep(aux.routing, valid_BS, 2)  # type: ignore[arg-type]
    assert kept_TK is not None
    dropped_BS = ~kept_TK.any(1).view(2, 24) & valid_BS
    assert dropped_BS.any()
    assert_same({"dropped": y_BSD[dropped_BS]}, {"dropped": layer.shared_expert(x_BSD[dropped_BS])}, 1e-13)


# broken rows


@pytest.mark.parametrize("junk", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("gate_weighted", [False, True])
def test_with_a_radius_a_broken_token_breaks_no_other(junk: float, gate_weighted: bool) -> None:
    layer, x_TD = make_layer(radius=10.0, gate_weighted=gate_weighted, rate=0.05), clusters(30)
    x_TD[7, 3] = junk
    plan = make_plan(torch.rand(30, E).argsort(-1)[:, :2], torch.rand(30, 2, dtype=torch.float64).requires_grad_(), E)
    got, sent = figures(layer, x_TD, plan)
    others_T = torch.arange(30) != 7
    assert got["output"][others_T].isfinite().all() and not got["output"][7].isfinite().any()
    assert got["x"][others_T].isfinite().all()
    assert sent.rows < plan.counts_E.sum(), "everything travelled exactly"


def test_one_hot_tokens_are_compressed_like_others() -> None:
    layer = make_layer()
    x_TD = torch.eye(D, dtype=torch.float64)[torch.randint(D, (64,))] * torch.tensor(
        [[1e-150], [1.0]], dtype=torch.float64
    ).repeat(32, 1)
    plan = make_plan(torch.rand(64, E).argsort(-1)[:, :2], torch.rand(64, 2, dtype=torch.float64).requires_grad_(), E)
    got, sent = figures(layer, x_TD, plan)
    assert all(x.isfinite().all() for x in got.values())
    assert sent.rows <= 26


# no rows


@pytest.mark.parametrize("settings", [*SETTINGS, {"rate": None}, {"rate": 1.0}], ids=str)
@pytest.mark.parametrize("sampled", [0, 5])
def test_no_token_and_no_valid_token(settings: dict[str, Any], sampled: int) -> None:
    layer = make_layer({"num_shared_experts": 1}, **settings)
    codec_of(layer).sampled = sampled
    for positions, valid in ((0, None), (6, False)):
        x_BSD = torch.randn(1, positions, D, dtype=torch.float64, requires_grad=True)
        valid_BS = None if valid is None else torch.full((1, positions), valid)
        y_BSD, aux = layer(x_BSD, valid_BS)
        assert layer.shared_expert is not None
        assert torch.equal(y_BSD, layer.shared_expert(x_BSD)), positions
        assert aux.rows_sent == aux.error == aux.norm == 0
        y_BSD.sum().backward()
        for name, parameter in layer.named_parameters():
            if "shared" not in name and parameter.grad is not None:
                assert not parameter.grad.any(), name


def test_every_choice_without_a_place() -> None:
    layer, x_TD = make_layer(), clusters(9)
    weights_TK = torch.rand(9, 2, dtype=torch.float64).requires_grad_()
    plan = make_plan(torch.rand(9, E).argsort(-1)[:, :2], weights_TK, E, torch.zeros(9, 2, dtype=torch.bool))
    got, sent = figures(layer, x_TD, plan)
    assert sent.rows == 0 and not any(x.any() for x in got.values())


# the measured error


def exact_output(layer: MoELayer, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
    return LocalDispatcher()(x_TD, plan, layer.experts)


@pytest.mark.parametrize("kept", [False, True], ids=["all-kept", "some-kept"])
@pytest.mark.parametrize(
    ("sampled", "picked"), [(1, [0]), (3, [0, 3, 6]), (4, [0, 2, 5, 7]), (10, list(range(10))), (99, list(range(10)))]
)
def test_the_error_is_that_of_evenly_spaced_tokens(sampled: int, picked: list[int], kept: bool) -> None:
    layer, x_TD = make_layer({"num_shared_experts": 1}, rate=0.05, compensation="none"), clusters(10)
    codec = codec_of(layer)
    codec.sampled = sampled
    kept_TK = torch.rand(10, 2) < 0.7 if kept else None
    plan = make_plan(torch.rand(10, E).argsort(-1)[:, :2], torch.rand(10, 2, dtype=torch.float64), E, kept_TK)
    with torch.no_grad():
        shared = layer.shared_expert
        assert shared is not None
        y_TD, sent = codec(layer.dispatcher, x_TD, plan, layer.experts, shared)
        exact_TD = exact_output(layer, x_TD, plan)
        error = (y_TD - shared(x_TD) - exact_TD)[picked].square().sum()
    assert sent.error.dtype == sent.norm.dtype == torch.float64
    assert_same({"error": sent.error, "norm": sent.norm}, {"error": error, "norm": exact_TD[picked].square().sum()}, 1e-12)
    assert sent.norm > 0 and (sent.error > 0 or sampled == 1)


def test_nothing_is_measured_unless_asked_for_or_where_all_rows_travel() -> None:
    layer, x_BSD = make_layer(error_tokens=8), clusters(20)[None]
    aux: Aux = layer(x_BSD)[1]
    assert aux.error == aux.norm == 0 and aux.rows_sent < 40
    codec_of(layer).sampled, codec_of(layer).rate = 8, 1.0
    aux = layer(x_BSD)[1]
    assert aux.error == aux.norm == 0 and aux.rows_sent == 40


def test_where_nothing_is_lost_the_error_is_0() -> None:
    layer = make_layer(radius=0.0)
    codec_of(layer).sampled = 20
    aux: Aux = layer(clusters(20)[None])[1]
    assert aux.error <= 1e-28 * aux.norm and aux.norm > 0


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_measuring_changes_neither_output_nor_gradients(settings: dict[str, Any]) -> None:
    layer, x_TD = make_layer(**settings), clusters(30)
    plan = make_plan(torch.rand(30, E).argsort(-1)[:, :2], torch.rand(30, 2, dtype=torch.float64).requires_grad_(), E)
    found = []
    for sampled in (0, 12):
        codec_of(layer).sampled = sampled
        found.append(figures(layer, x_TD, plan))
    assert_same(found[0][0], found[1][0])
    assert found[0][1].rows == found[1][1].rows, "the sample counts as sent"
    assert found[1][1].error > 0 and not found[1][1].error.requires_grad


def test_sums_of_a_stack_are_those_of_its_layers() -> None:
    layer = make_layer()
    codec_of(layer).sampled = 4
    auxes = [layer(clusters(n)[None])[1] for n in (12, 12)]
    stacked = Aux.stack(auxes)
    for name in ("rows_sent", "error", "norm"):
        assert torch.equal(getattr(stacked, name), torch.stack([getattr(a, name) for a in auxes]))


# the rotation


def test_the_rotation_is_the_same_for_every_layer_and_follows_the_tokens_type() -> None:
    one, other = codec_of(make_layer()), codec_of(make_layer({"num_experts": 2 * E}))
    x_TD = clusters(3)
    assert torch.equal(one.rotation(x_TD), other.rotation(x_TD))
    assert one.rotation(x_TD) is one.rotation(x_TD), "made once"
    assert one.rotation(x_TD.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(one.rotation(x_TD.bfloat16()), other.rotation(x_TD).bfloat16())
    assert not [name for name in one.state_dict() if "rotation" in name], "a checkpoint would hold it"
