"""Models like GPT-2: LayerNorm, learned positions, feed-forward networks without a gate and with biases, dense and of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moefold.moe.attention import LayerNorm
from moefold.moe.config import ModelConfig, MoEConfig, RouterConfig, with_defaults
from moefold.moe.errors import ConfigError, DataError
from moefold.moe.experts import FeedForward, FfnKind
from moefold.moe.init import initial_value
from moefold.moe.layer import MoELayer
from moefold.moe.model import Model
from numeric import assert_same
from upcycle_oracle import GPT2

KIND = FfnKind("gelu_tanh", gated=False, biased=True)


def model_config(**changes: Any) -> ModelConfig:
    base: dict[str, Any] = {"dim": 15, "num_layers": 3, "num_heads": 3, "vocab_size": 19, "max_seq_len": 8, "dense_ffn_dim": 20}
    moe = MoEConfig(num_experts=4, top_k=2, expert_dim=10, shared_dim=7, shared_gate=True)
    return ModelConfig(**(base | GPT2 | {"moe": moe, "dense_prefix_layers": 1} | changes))


@pytest.fixture(scope="module")
def model() -> Model:
    """With random biases and norms."""
    model = Model(model_config()).double()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.dim() == 1 else 0, 0.4, generator=draw)
    return model


@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gpt2", [False, True])
def test_what_is_counted_is_what_there_is(gate: bool, bias: bool, gpt2: bool) -> None:
    """A bias is a parameter and no product; positions are looked up, as embeddings are."""
    changes = {"ffn_gate": gate, "ffn_bias": bias}
    changes |= {} if gpt2 else {"norm": "rms", "positions": "rotary", "head_dim": 6}
    config = model_config(**changes)
    model = Model(config)
    assert config.num_params == sum(p.numel() for p in model.parameters())
    moe = config.moe
    assert moe is not None
    idle = sum(p[moe.top_k :].numel() for n, p in model.named_parameters() if ".experts." in n or n.endswith("b2_ED"))
    assert config.num_active_params == config.num_params - idle
    products = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n and ".b" not in n)
    products += 2 * config.dim - sum(p[moe.top_k :].numel() for n, p in model.named_parameters() if ".experts.w" in n)
    attention = 3 * 3 * 2 * 4 * config.num_heads * config.resolved_head_dim
    assert config.flops_per_token(4) == 3 * 2 * products + attention


def test_layer_norm_is_torchs() -> None:
    norm = LayerNorm(6, 1e-5)
    with torch.no_grad():
        norm.weight_D.copy_(torch.randn(6))
        norm.bias_D.copy_(torch.randn(6))
    x = torch.randn(4, 6) + 3
    assert_same({"y": norm(x)}, {"y": F.layer_norm(x, (6,), norm.weight_D, norm.bias_D, 1e-5)}, 1e-6)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


def test_positions_are_those_in_the_sequence(model: Model) -> None:
    """Also of a second document, and none beyond the table."""
    tokens_BS = torch.arange(8)[None] * 5 % 19
    document_BS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        whole = model(tokens_BS, document_BS=document_BS)[0]
        moved = model(tokens_BS[:, 3:])[0]
        table = model.embed.positions_SD
        assert table is not None
        before = table.clone()
        table[:5] = before[3:]
        at_3 = model(tokens_BS[:, 3:])[0]
        table.copy_(before)
    assert_same({"logits": at_3}, {"logits": whole[:, 3:]}, 1e-12)
    assert (moved - whole[:, 3:]).abs().max() > 1e-3
    with pytest.raises(DataError, match=r"sequences have 9 tokens, but the model has learned 8 positions \(model.max_seq_len\)"):
        model(torch.zeros(1, 9, dtype=torch.int64))


def test_initial_values() -> None:
    model = Model(model_config(dim=30, max_seq_len=200, init_std=0.1))
    biases = {n: p for n, p in model.named_parameters() if n.rsplit(".", 1)[-1].startswith("b")}
    assert len(biases) == 3 * (4 + 2) + 2 + 2 * 4 + 1 and not any(p.any() for p in biases.values())
    assert model.embed.positions_SD is not None and float(model.embed.positions_SD.detach().std()) == pytest.approx(0.1, rel=0.05)
    how: dict[str, Any] = {"seed": 0, "std": 0.1, "num_layers": 2}
    assert initial_value("layers.1.moe.experts.b13_E2F", (4, 1, 6), **how, experts=[1, 3]).shape == (2, 1, 6)
    assert initial_value("layers.1.moe.b2_ED", (4, 6), **how).shape == (4, 6)


def plain(x: Tensor, w13_2FD: Tensor, b13_2F: Tensor, w2_DF: Tensor, b2_D: Tensor) -> Tensor:
    """A network with two matrices, as its definition says."""
    return F.linear(F.gelu(F.linear(x, w13_2FD[0], b13_2F[0]), approximate="tanh"), w2_DF, b2_D)


@pytest.mark.parametrize("capacity", [None, 0.5])
def test_a_layer_is_the_weighted_sum_of_networks(capacity: float | None) -> None:
    """A choice that is dropped adds no bias either; padding gets that of the shared experts alone."""
    config = MoEConfig(
        num_experts=5, top_k=3, expert_dim=6, shared_dim=4, capacity_factor=capacity, router=RouterConfig(scaling_factor=1.5)
    )
    layer = MoELayer(8, config, kind=KIND).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(0, 0.7)
    x_BSD = torch.randn(2, 6, 8, dtype=torch.float64)
    valid_BS = torch.rand(2, 6) < 0.7
    y_BSD, aux = layer(x_BSD, valid_BS)
    kept_TK = layer.keep(aux.routing, valid_BS, 2)
    experts, shared, want_TD = layer.experts, layer.shared_expert, []
    assert kept_TK is not None and layer.b2_ED is not None and experts.b13_E2F is not None and shared is not None
    assert (kept_TK.sum() < 3 * valid_BS.sum()) == (capacity is not None)
    for t, x_D in enumerate(x_BSD.flatten(0, 1)):
        y_D = plain(x_D, shared.w13_2FD, shared.b13_2F, shared.w2_DF, shared.b2_D)
        for e, weight, kept in zip(aux.routing.indices_TK[t], aux.routing.weights_TK[t], kept_TK[t], strict=True):
            if kept:
                y_D = y_D + weight * plain(x_D, experts.w13_E2FD[e], experts.b13_E2F[e], experts.w2_EDF[e], layer.b2_ED[e])
        want_TD.append(y_D)
    want = {"y": torch.stack(want_TD).view_as(y_BSD)}
    assert_same({"y": y_BSD}, want, 1e-12)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = []
    for y in (y_BSD, want["y"]):
        found = torch.autograd.grad(y.square().sum(), parameters, retain_graph=True)
        grads.append(dict(zip(names, found, strict=True)))
    assert_same(grads[0], grads[1], 1e-10)


def test_the_second_bias_of_a_dense_network_is_the_blocks(model: Model) -> None:
    """Under tensor parallelism its output is a part of a sum."""
    ffn = model.blocks[0].ffn
    assert isinstance(ffn, FeedForward) and ffn.b2_D is not None and ffn.b13_2F is not None
    x = torch.randn(3, 15, dtype=torch.float64)
    assert_same({"y": ffn(x) + ffn.b2_D}, {"y": plain(x, ffn.w13_2FD, ffn.b13_2F, ffn.w2_DF, ffn.b2_D)}, 1e-12)
    x_BSD = torch.randn(1, 4, 15, dtype=torch.float64)
    before, _ = model.blocks[0](x_BSD, None, None)
    with torch.no_grad():
        ffn.b2_D += 1
    after, _ = model.blocks[0](x_BSD, None, None)
    with torch.no_grad():
        ffn.b2_D -= 1
    assert_same({"added": after - before}, {"added": torch.ones_like(before)}, 1e-12)


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"rope_theta": 5e5}, "model.rope_theta", "is 500000.0, but positions = 'learned' turns no heads; leave it out"),
    ({"rope_fraction": 0.5}, "model.rope_fraction", "is 0.5, but positions = 'learned' turns no heads"),
    ({"positions": "sinus"}, "model.positions", "is 'sinus', but must be one of 'rotary', 'learned'"),
    ({"norm": "group"}, "model.norm", "is 'group', but must be one of 'rms', 'layer'"),
    ({"positions": "rotary"}, "model.head_dim", "is 5, but rotary embedding needs an even number"),
    (
        {"moe": MoEConfig(num_experts=4, top_k=2, expert_dim=10, kernels="triton")},
        "model.moe.kernels",
        "products are SwiGLU without biases only, but activation = 'gelu_tanh', ffn_gate = False, ffn_bias = True; use 'auto'",
    ),
]


@pytest.mark.parametrize(("changes", "where", "what"), WRONG, ids=[next(iter(changes)) for changes, _, _ in WRONG])
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], where: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        model_config(**changes)
    [problem] = caught.value.problems
    assert problem.where == where and what in problem.what


def test_older_models_are_what_they_were() -> None:
    filled = with_defaults({"dim": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 9, "max_seq_len": 4, "dense_ffn_dim": 8})
    model = Model(ModelConfig(**filled))
    assert sorted(n for n, _ in model.named_parameters() if "attention." not in n) == [
        *("embed.weight_VD", "head.norm.weight_D", "head.weight_VD"),
        *(f"layers.0.{name}" for name in ("attention_norm.weight_D", "ffn.w13_2FD", "ffn.w2_DF", "ffn_norm.weight_D")),
    ]
    assert model.blocks[0].ffn is not None and model.blocks[0].ffn.w13_2FD.shape == (2, 8, 16)
