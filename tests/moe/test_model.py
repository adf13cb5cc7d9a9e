"""The model: its size, its initial weights, documents and padding, tied embeddings, and what it hands to the training step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefold.moe.attention import causal_mask
from moefold.moe.config import BalanceConfig, ModelConfig, MoEConfig, RopeScaling, RouterConfig
from moefold.moe.init import init_weights, initial_value
from moefold.moe.layer import MoELayer
from moefold.moe.load import Aux
from moefold.moe.model import Model
from moefold.moe.presets import PRESETS, build
from numeric import assert_same

B, S, V = 2, 9, 50


def moe(**changes: Any) -> MoEConfig:
    return MoEConfig(**({"num_experts": 4, "top_k": 2, "expert_dim": 8, "num_shared_experts": 1} | changes))


def config(**changes: Any) -> ModelConfig:
    base = {"dim": 16, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "vocab_size": V, "max_seq_len": 32}
    mixed = {"dense_prefix_layers": 1, "dense_ffn_dim": 24, "moe": moe()}
    return ModelConfig(**(base | mixed | changes))


def model(**changes: Any) -> Model:
    """In float64, with weights large enough that every part matters."""
    built = Model(config(**changes)).double()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return built


def tokens() -> Tensor:
    return torch.randint(V, (B, S))


def gradients(built: Model, loss: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*built.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


@pytest.mark.parametrize("name", PRESETS)
def test_num_params_of_presets_is_the_real_count(name: str) -> None:
    with torch.device("meta"):
        built = Model(build(name), init=False)
    assert sum(p.numel() for p in built.parameters()) == build(name).num_params


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True},
        {"qk_norm": "head", "head_dim": 6},
        {"qk_norm": "full"},
        {"moe_every": 2, "num_layers": 5},
        {"moe": None},
        {"moe": moe(num_shared_experts=2, balance=BalanceConfig(expert_bias=True))},
        {"attention_bias": "qkv", "head_dim": 6},
        {"attention_bias": "all", "norm_order": "post", "moe": moe(shared_dim=5, shared_gate=True)},
        {"moe": moe(num_shared_experts=0, shared_dim=7)},
    ],
    ids=[
        *(
            "tied",
            "qk-norm-head",
            "qk-norm-full",
            "every-2nd",
            "dense",
            "shared-and-bias",
            "qkv-bias",
            "all-biases",
            "shared-dim",
        ),
    ],
)
def test_num_params_is_the_real_count(changes: dict[str, Any]) -> None:
    assert sum(p.numel() for p in Model(config(**changes)).parameters()) == config(**changes).num_params


def test_initial_weights_depend_on_seed_and_name_only() -> None:
    first, again, other = (dict(Model(config(), seed=seed).named_parameters()) for seed in (3, 3, 4))
    deeper = dict(Model(config(num_layers=5), seed=3).named_parameters())
    for name, weight in first.items():
        assert torch.equal(weight, again[name]), name
        assert weight.dim() == 1 or not torch.equal(weight, other[name]), name
        if not name.endswith(("wo_DQ", "w2_DF", "w2_EDF")):  # these are scaled with depth
            assert torch.equal(weight, deeper[name]), name
    # no two matrices, and no two experts of one, start alike
    starts = [row.flatten()[:32] for name, w in first.items() if w.dim() > 1 for row in (w if ".experts." in name else w[None])]
    assert len({tuple(start.tolist()) for start in starts}) == len(starts)


def test_an_expert_starts_alike_however_many_there_are() -> None:
    few, many = Model(config()), Model(config(moe=moe(num_experts=16)))
    for name, weight in few.named_parameters():
        if ".experts." in name:
            assert torch.equal(weight, many.get_parameter(name)[:4]), name


@pytest.mark.parametrize("experts", [[2], [3, 1], range(2, 4), []], ids=["one", "any-order", "slice", "none"])
def test_slices_of_experts_are_made_alone(experts: Any) -> None:
    built = Model(config(), seed=5)
    for name, weight in built.named_parameters():
        if ".experts." in name:
            shape = tuple(weight.shape)
            value = initial_value(name, shape, seed=5, std=0.02, num_layers=3, experts=experts)
            assert torch.equal(value, weight[list(experts)]), name


def test_scale_of_initial_weights() -> None:
    wide = Model(ModelConfig(dim=128, num_layers=8, num_heads=4, vocab_size=64, max_seq_len=8, moe=moe(expert_dim=256)))
    for name, weight in wide.named_parameters():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
        elif name.endswith(("wo_DQ", "w2_DF", "w2_EDF")):
            assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.1), name
        else:
            assert weight.std().item() == pytest.approx(0.02, rel=0.15), name


def test_biases_start_at_zero_and_a_layer_alone_is_ready() -> None:
    layer = MoELayer(16, moe(balance=BalanceConfig(expert_bias=True)), init=False)
    layer.router.expert_bias_E.fill_(3)
    init_weights(layer, seed=1)
    assert not layer.router.expert_bias_E.any()
    y_BSD, aux = MoELayer(16, moe())(torch.randn(B, S, 16))
    assert y_BSD.isfinite().all() and aux.counts_E.sum() == B * S * 2


def test_biases_of_attention_start_at_zero_and_the_gate_of_shared_experts_does_not() -> None:
    built = Model(config(dim=256, attention_bias="all", moe=moe(shared_gate=True)), seed=1)
    for block in built.blocks:
        for bias in ("bq_Q", "bk_C", "bv_C", "bo_D"):
            assert not block.attention.get_parameter(bias).any(), bias
    gates = [w for name, w in built.named_parameters() if name.endswith("shared_expert.gate_D")]
    assert len(gates) == 2 and not torch.equal(*gates)
    for gate_D in gates:
        assert gate_D.std().item() == pytest.approx(0.02, rel=0.2)


def test_parameters_of_a_plain_model_are_named_as_ever() -> None:
    layer = [f"attention.{w}" for w in ("wq_QD", "wk_CD", "wv_CD", "wo_DQ")] + ["attention_norm.weight_D", "ffn_norm.weight_D"]
    dense = [f"layers.0.{name}" for name in [*layer, "ffn.w13_2FD", "ffn.w2_DF"]]
    weights = ["router.weight_ED", "experts.w13_E2FD", "experts.w2_EDF", "shared_expert.w13_2FD", "shared_expert.w2_DF"]
    experts = [f"layers.1.{name}" for name in [*layer, *(f"moe.{w}" for w in weights)]]
    names = {name for name, _ in Model(config(num_layers=2)).named_parameters()}
    assert names == {"embed.weight_VD", *dense, *experts, "head.norm.weight_D", "head.weight_VD"}


NEUTRAL = {
    "sliding_window": S,
    "rope_scaling": RopeScaling(kind="llama3", factor=1.0, original_max_seq_len=16),
    "attention_scale": 0.5,  # what head_dim 4 gives
    "moe": moe(shared_dim=8),
}


@pytest.mark.parametrize("name", NEUTRAL)
def test_a_setting_that_says_the_default_in_other_words_changes_nothing(name: str) -> None:
    built, batch = model(), tokens()
    other = Model(config(**{name: NEUTRAL[name]}), init=False).double()
    other.load_state_dict(built.state_dict())
    rtol = 1e-14 if name == "rope_scaling" else 0.0
    assert_same({"logits": other(batch)[0]}, {"logits": built(batch)[0]}, rtol)


@pytest.mark.parametrize("window", [None, 1, 3, S - 1, S, 100])
@pytest.mark.parametrize("documents", [False, True], ids=["one-document", "documents"])
def test_what_a_position_sees(window: int | None, documents: bool) -> None:
    document_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [7, 7, 7, 7, 7, 7, 7, 7, 8]])
    mask = causal_mask(torch.empty(B, S, 1), document_BS if documents else None, window)
    if mask is None:
        assert not documents and (window is None or window >= S)
        return
    for b in range(B):
        for i in range(S):
            same = [j for j in range(i + 1) if not documents or document_BS[b, j] == document_BS[b, i]]
            seen = [j for j in same if window is None or i - window < j]
            assert mask.expand(B, 1, S, S)[b, 0, i].nonzero().flatten().tolist() == seen


def test_a_window_of_each_layer_adds_up() -> None:
    built, batch = model(sliding_window=3), tokens()
    changed = batch.clone()
    changed[:, 0] = (batch[:, 0] + 1) % V
    logits, again = built(batch)[0], built(changed)[0]
    # three layers, each of which reaches two positions back
    assert_same({"out of reach": again[:, 7:]}, {"out of reach": logits[:, 7:]}, rtol=1e-12)
    assert not torch.allclose(again[:, 6], logits[:, 6], rtol=1e-3)


def test_tied_embeddings_are_one_weight() -> None:
    tied = model(tie_embeddings=True)
    assert tied.head.weight_VD is tied.embed.weight_VD
    assert sum(name.endswith("weight_VD") for name, _ in tied.named_parameters()) == 1
    # the gradient is that of both uses
    untied = model()
    untied.load_state_dict(tied.state_dict() | {"head.weight_VD": tied.embed.weight_VD})
    batch, labels = tokens(), tokens()
    one, two = (gradients(m, m(batch, labels_BS=labels)[0]) for m in (tied, untied))
    both = two["embed.weight_VD"] + two["head.weight_VD"]
    assert_same({"embedding": one["embed.weight_VD"]}, {"embedding": both}, rtol=1e-12)


@pytest.mark.parametrize("qk_norm", ["none", "head", "full"])
def test_a_document_is_blind_to_the_others(qk_norm: str) -> None:
    built = model(qk_norm=qk_norm)
    batch = tokens()
    document_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [7, 7, 7, 7, 7, 7, 7, 7, 8]])
    logits = built(batch, document_BS=document_BS)[0]
    changed = batch.clone()
    changed[0, :3], changed[0, 7:], changed[1, 8] = torch.randint(V, (3,)), torch.randint(V, (2,)), 0
    again = built(changed, document_BS=document_BS)[0]
    assert_same({"middle": again[0, 3:7], "first": again[1, :8]}, {"middle": logits[0, 3:7], "first": logits[1, :8]}, rtol=1e-12)
    # as if it came alone; only differences of positions count
    alone = built(batch[:1, 3:7])[0]
    assert_same({"alone": logits[:1, 3:7]}, {"alone": alone}, rtol=1e-10)
    assert not torch.allclose(built(batch)[0][0, 3:7], alone[0], rtol=1e-3)


def test_one_document_is_plain_causal_attention() -> None:
    built, batch = model(), tokens()
    assert_same(
        {"logits": built(batch, document_BS=torch.zeros(B, S, dtype=torch.int64))[0]}, {"logits": built(batch)[0]}, rtol=1e-12
    )


def test_no_position_sees_a_later_one() -> None:
    built, batch = model(), tokens()
    changed = batch.clone()
    changed[:, 5:] = torch.randint(V, (B, S - 5))
    logits, again = built(batch)[0], built(changed)[0]
    assert_same({"earlier": again[:, :5]}, {"earlier": logits[:, :5]}, rtol=1e-12)
    assert not torch.allclose(again[:, 5:], logits[:, 5:], rtol=1e-3)


@pytest.mark.parametrize("capacity_factor", [None, 1.0], ids=["dropless", "capacity"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_padding_may_hold_anything(capacity_factor: float | None, score: Any) -> None:
    built = model(moe=moe(capacity_factor=capacity_factor, router=RouterConfig(score=score)))
    valid_BS = torch.arange(S) < torch.tensor([[6], [4]])
    batch, labels = tokens(), tokens()
    results = []
    for fill in range(3):
        batch, labels = (torch.where(valid_BS, x, torch.randint(V, (B, S)) if fill else 0) for x in (batch, labels))
        logits = built(batch, valid_BS)[0][valid_BS].detach()
        loss_sum, aux = built(batch, valid_BS, labels_BS=labels)
        assert aux is not None
        everything = loss_sum + aux.losses.balance + aux.losses.z
        sums = {name: getattr(aux, name) for name in ("counts_BE", "valid_B", "dropped_B", "logit_max")}
        results.append({"logits": logits, "loss": loss_sum.detach()} | sums | gradients(built, everything))
        assert aux.counts_BE.sum((-2, -1)).tolist() == [20, 20]
        assert aux.valid_B.tolist() == [[6, 4], [6, 4]]
    assert_same(results[1], results[0], rtol=1e-12)
    assert_same(results[2], results[0], rtol=1e-12)


def test_padding_is_not_dispatched() -> None:
    layer = MoELayer(16, moe(num_shared_experts=0))
    received: list[int] = []
    compute = layer.experts.compute

    def watched(x: Tensor, counts_E: Tensor, *others: Any) -> Tensor:
        received.append(int(counts_E.sum()))
        return compute(x, counts_E, *others)

    layer.experts.compute = watched  # type: ignore[method-assign]
    valid_BS = torch.arange(S) < torch.tensor([[6], [4]])
    y_BSD, aux = layer(torch.randn(B, S, 16), valid_BS)
    assert received == [20]
    assert not y_BSD[~valid_BS].any() and y_BSD[valid_BS].abs().sum(-1).all()
    assert not aux.dropped_B.any()


def test_the_loss_of_a_mask_is_that_of_its_subset() -> None:
    built, batch, labels = model(), tokens(), tokens()
    valid_BS = torch.arange(S) < torch.tensor([[6], [4]])
    logits, aux = built(batch, valid_BS)
    assert aux is not None
    want = F.cross_entropy(logits[valid_BS], labels[valid_BS], reduction="sum")
    got = built(batch, valid_BS, labels_BS=labels)[0]
    short = built(batch[:1, :6], labels_BS=labels[:1, :6])[0] + built(batch[1:, :4], labels_BS=labels[1:, :4])[0]
    assert_same({"masked": got, "short": short}, {"masked": want, "short": want}, rtol=1e-12)
    assert_same(gradients(built, got), gradients(built, want), rtol=1e-11)


def test_a_mask_of_all_is_no_mask() -> None:
    built, batch, labels = model(moe=moe(capacity_factor=1.0)), tokens(), tokens()
    plain, masked = (built(batch, valid, labels_BS=labels)[0] for valid in (None, torch.ones(B, S, dtype=torch.bool)))
    assert_same(gradients(built, masked), gradients(built, plain), rtol=1e-12)


def test_aux_is_stacked_over_moe_layers_and_seen_before_the_head() -> None:
    built = model(num_layers=5, moe_every=2)
    events: list[Any] = []
    built.head.register_forward_pre_hook(lambda *_: events.append("head"))
    _, aux = built(tokens(), on_aux=events.append)
    assert isinstance(events[0], Aux) and events[0] is aux and events[1:] == ["head"]
    assert aux is not None and aux.routing is None
    assert aux.counts_BE.shape == (2, B, 4) and aux.z_B.shape == (2, B) and aux.logit_max.shape == (2,)
    layer, aux_alone = MoELayer(16, moe()), None
    _, aux_alone = layer(torch.randn(B, S, 16))
    assert aux_alone.routing is not None
    twice = Aux.stack([aux_alone, replace(aux_alone, routing=None)])
    assert twice.losses.balance.item() == pytest.approx(2 * aux_alone.losses.balance.item())


def test_a_dense_model_has_no_aux() -> None:
    called: list[Aux] = []
    assert model(moe=None)(tokens(), on_aux=called.append)[1] is None
    assert called == []


def test_reruns_are_bitwise_equal() -> None:
    built, batch, labels = model(moe=moe(capacity_factor=1.0)).float(), tokens(), tokens()
    runs = [gradients(built, built(batch, labels_BS=labels)[0]) for _ in range(2)]
    assert_same(runs[1], runs[0])
