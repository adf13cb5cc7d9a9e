"""Attention experts: mixed as a loop over tokens and experts says, trained routers, sizes, and names in our own format."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor

from moefold.moe.attention import Attention
from moefold.moe.attention_experts import AttentionExperts
from moefold.moe.config import ModelConfig, MoEConfig, with_defaults
from moefold.moe.errors import ConfigError
from moefold.moe.hf.families import FAMILIES, NATIVE, NotHeldError, read_parts, write_tensors
from moefold.moe.hf.files import Checkpoint
from moefold.moe.hf.matrix import Given
from moefold.moe.hf.writer import write_checkpoint
from moefold.moe.model import Model
from tiny_models import as_tensors

B, S, N = 2, 7, 3
KINDS: list[dict[str, Any]] = [
    {},
    {"qk_norm": "head", "attention_bias": "qkv", "num_kv_heads": 2},
    {"qk_norm": "full", "attention_bias": "all", "sliding_window": 3, "num_kv_heads": 1, "head_dim": 6},
]
LABELS = ("plain", "head norms, biases", "full norms, all biases, window")
SHARING = pytest.mark.parametrize("kv", ["own", "shared"])


def config(**changes: Any) -> ModelConfig:
    base: dict[str, Any] = {"dim": 16, "num_layers": 2, "num_heads": 4, "vocab_size": 11, "max_seq_len": 8, "dense_ffn_dim": 8}
    return ModelConfig(**(base | {"attention_experts": N} | changes))


def attention(made: ModelConfig, seed: int = 0) -> AttentionExperts:
    torch.manual_seed(seed)
    built = AttentionExperts(made).double()
    for parameter in built.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return built


def alone(built: AttentionExperts, made: ModelConfig, expert: int) -> Attention:
    """One expert as the attention of a model that has no others."""
    plain = Attention(ModelConfig(**(vars(made) | {"attention_experts": 1, "attention_expert_kv": "own"}))).double()
    held = built.state_dict()
    of = f"members.{expert}."
    state = {name: held[of + name] if of + name in held else held[name] for name in plain.state_dict()}
    plain.load_state_dict(state)
    return plain


@SHARING
@pytest.mark.parametrize("kind", KINDS, ids=LABELS)
def test_outputs_are_mixed_token_by_token(kind: dict[str, Any], kv: str) -> None:
    made = config(attention_expert_kv=kv, **kind)
    built = attention(made).requires_grad_(False)
    x_BSD, document_BS = torch.randn(B, S, 16).double(), torch.tensor([[0] * S, [0, 0, 0, 1, 1, 1, 1]])
    got = built(x_BSD, document_BS)
    bias_BSD = built.output_bias(x_BSD)
    got = got if bias_BSD is None else got + bias_BSD
    each = []
    for e in range(N):
        plain = alone(built, made, e)
        y_BSD = plain(x_BSD, document_BS)
        each.append(y_BSD if plain.bo_D is None else y_BSD + plain.bo_D)
    want = torch.zeros_like(got)
    for b in range(B):
        for s in range(S):
            logits = [float(x_BSD[b, s] @ row) for row in built.router.weight_ND]
            total = sum(map(math.exp, logits))
            for e in range(N):
                want[b, s] += math.exp(logits[e]) / total * each[e][b, s]
    assert (bias_BSD is None) == (made.attention_bias != "all")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert (each[0] - each[1]).abs().max() > 0.1, "experts that do the same would show nothing"


@SHARING
def test_the_routers_gradient_is_that_of_finite_differences(kv: str) -> None:
    built = attention(config(dim=4, num_heads=2, attention_bias="all", attention_expert_kv=kv))
    x_BSD, weight_ND, step = torch.randn(1, 3, 4).double(), built.router.weight_ND, 1e-5
    direction_BSD = torch.randn(1, 3, 4).double()

    def value() -> Tensor:
        bias_BSD = built.output_bias(x_BSD)
        assert bias_BSD is not None
        return ((built(x_BSD) + bias_BSD) * direction_BSD).sum()

    (gradient_ND,) = torch.autograd.grad(value(), weight_ND)
    found_ND = torch.zeros_like(gradient_ND)
    with torch.no_grad():
        for place in range(weight_ND.numel()):
            for sign in (1, -1):
                weight_ND.view(-1)[place] += sign * step
                found_ND.view(-1)[place] += sign * value() / (2 * step)
                weight_ND.view(-1)[place] -= sign * step
    torch.testing.assert_close(gradient_ND, found_ND, rtol=1e-6, atol=1e-8)
    assert gradient_ND.abs().max() > 1e-3


@SHARING
def test_every_parameter_learns(kv: str) -> None:
    made = config(attention_expert_kv=kv, qk_norm="head", attention_bias="all")
    model = Model(made, seed=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    loss, _ = model(torch.arange(S)[None], labels_BS=torch.arange(1, S + 1)[None])
    loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_weights_are_computed_wide_and_sum_to_one() -> None:
    built = attention(config()).bfloat16()
    built.router.float()
    x_BSD = torch.randn(B, S, 16).bfloat16()
    weights_BSN = built.router(x_BSD)
    assert weights_BSN.dtype == torch.float32 and built(x_BSD).dtype == torch.bfloat16
    torch.testing.assert_close(weights_BSN.sum(-1), torch.ones(B, S))
    wanted = (x_BSD.double() @ built.router.weight_ND.double().T).softmax(-1)
    torch.testing.assert_close(weights_BSN.double(), wanted, rtol=1e-5, atol=1e-6)


def test_one_expert_is_the_model_without() -> None:
    with_one, plain = (Model(config(attention_experts=1), seed=3).state_dict() for _ in range(2))
    assert "layers.0.attention.wq_QD" in with_one and not any("members" in name or "router" in name for name in with_one)
    assert all(torch.equal(with_one[name], plain[name]) for name in plain)
    older = asdict(config(attention_experts=1))
    del older["attention_experts"], older["attention_expert_kv"]
    assert ModelConfig(**with_defaults(older)) == config(attention_experts=1)


def test_experts_start_apart() -> None:
    model = Model(config(attention_bias="all"), seed=2)
    first, second = (dict(model.blocks[0].attention.experts[e].named_parameters()) for e in (0, 1))  # type: ignore[attr-defined]
    assert all(torch.equal(first[name], second[name]) == (first[name].dim() == 1) for name in first)
    assert not first["bo_D"].any()


@SHARING
@pytest.mark.parametrize("kind", KINDS, ids=LABELS)
def test_sizes_are_the_real_ones(kind: dict[str, Any], kv: str) -> None:
    moe = MoEConfig(num_experts=4, top_k=2, expert_dim=8)
    made = config(attention_expert_kv=kv, moe=moe, dense_prefix_layers=1, **kind)
    assert sum(p.numel() for p in Model(made).parameters()) == made.num_params
    assert made.num_params - made.num_active_params == 2 * 3 * 16 * 8, "every token passes through all attention experts"


def test_flops_by_hand() -> None:
    plain, own, shared = (
        config(num_kv_heads=2, **changes) for changes in ({"attention_experts": 1}, {}, {"attention_expert_kv": "shared"})
    )
    L, D, seq_len = 2, 16, 32
    pairs, kv, q = 2 * seq_len * D, 2 * D * 8, 2 * D * D
    extra = 3 * L * (2 * (N - 1) * q + 2 * N * D + (N - 1) * pairs)
    assert shared.flops_per_token(seq_len) - plain.flops_per_token(seq_len) == extra
    assert own.flops_per_token(seq_len) - shared.flops_per_token(seq_len) == 3 * L * 2 * (N - 1) * kv
    assert (plain.kv_sets, own.kv_sets, shared.kv_sets) == (1, N, 1)


@pytest.mark.parametrize(
    ("changes", "where", "what"),
    [
        ({"attention_experts": 0}, "model.attention_experts", "is 0, but must be positive"),
        ({"attention_experts": 1.5}, "model.attention_experts", "is 1.5, but must be a whole number"),
        ({"attention_expert_kv": "none"}, "model.attention_expert_kv", "must be one of 'own', 'shared'"),
        ({"attention_experts": 1, "attention_expert_kv": "shared"}, "model.attention_expert_kv", "has none to share them with"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], where: str, what: str) -> None:
    with pytest.raises(ConfigError) as told:
        config(**changes)
    [problem] = told.value.problems
    assert problem.where == where and what in problem.what


@SHARING
@pytest.mark.parametrize("kind", KINDS, ids=LABELS)
def test_our_own_format_holds_it_bit_for_bit(kind: dict[str, Any], kv: str, tmp_path: Any) -> None:
    made = config(attention_expert_kv=kv, moe=MoEConfig(num_experts=2, top_k=2, expert_dim=4), **kind)
    state = Model(made, seed=5).state_dict()
    family = FAMILIES[NATIVE]
    tensors = {name: (Given(value.numpy()), "F32") for name, value in state.items()}
    write_checkpoint(tmp_path / "model", family.write(made) | {"dtype": "float32"}, tensors, manifest={})
    read, parts = read_parts(Checkpoint.open(tmp_path / "model"))
    assert read == made
    again = as_tensors(write_tensors(family, read, parts))
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)
    leaf = "wk_CD" if kv == "shared" else "members.0.wk_CD"
    of = "k" if kv == "shared" else "experts.0.k"
    assert torch.equal(as_tensors({"k": parts[f"layers.1.attention.{of}"]})["k"], state[f"layers.1.attention.{leaf}"])


def test_no_other_format_holds_it() -> None:
    dense, moe = config(), config(moe=MoEConfig(num_experts=2, top_k=2, expert_dim=4))
    for name, family in FAMILIES.items():
        if name != NATIVE:
            with pytest.raises(NotHeldError, match="attention_experts is 3, but attention experts are native only; legal: 1"):
                family.write(moe if family.moe else dense)
