"""Every kind of model that ours can hold: logits and gradients are those of transformers' models with the same weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moefold.moe.config import BalanceConfig, ModelConfig, MoEConfig, RopeScaling, RouterConfig
from moefold.moe.model import Model
from numeric import assert_same

D, F, E, K, V, SEQ = 16, 12, 8, 3, 37, 11
RTOL = 2e-5
SIZES = {
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": V,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
OURS = {"dim": D, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "vocab_size": V, "max_seq_len": 64, "norm_eps": 1e-5}
DENSE = {"dense_ffn_dim": 20}
PLAIN = RouterConfig(renormalize=False)
EXPERTS = {"num_experts": E, "top_k": K, "expert_dim": F}


def rope(kind: str, theta: float, **others: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **others}}


def made(name: str, **settings: Any) -> Any:
    """A transformers model of the plainest code, by the name that its classes begin with."""
    import transformers as hf

    config = getattr(hf, f"{name}Config")(**(SIZES | settings))
    config._experts_implementation = config._attn_implementation = "eager"
    return getattr(hf, f"{name}ForCausalLM")(config)


def ours(**settings: Any) -> ModelConfig:
    return ModelConfig(**(OURS | settings))


def llama() -> tuple[Any, ModelConfig]:
    # wavelengths of all three kinds: kept, between, divided
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs = rope("llama3", 100.0, **scaling, original_max_position_embeddings=64)
    heads = {"head_dim": 8, "attention_bias": True}
    model = made("Llama", intermediate_size=20, **heads, **theirs)
    rotary = RopeScaling(kind="llama3", **scaling, original_max_seq_len=64)
    return model, ours(**DENSE, head_dim=8, attention_bias="all", rope_theta=100.0, rope_scaling=rotary)


def llama_linear() -> tuple[Any, ModelConfig]:
    model = made("Llama", intermediate_size=20, **rope("linear", 50.0, factor=3.0), tie_word_embeddings=True)
    rotary = RopeScaling(kind="linear", factor=3.0)
    return model, ours(**DENSE, rope_theta=50.0, rope_scaling=rotary, tie_embeddings=True)


def mistral() -> tuple[Any, ModelConfig]:
    model = made("Mistral", intermediate_size=20, head_dim=6, sliding_window=4, **rope("default", 1e4))
    return model, ours(**DENSE, head_dim=6, sliding_window=4)


def qwen2() -> tuple[Any, ModelConfig]:
    model = made("Qwen2", intermediate_size=20, **rope("default", 1e4))
    return model, ours(**DENSE, attention_bias="qkv")


def qwen3() -> tuple[Any, ModelConfig]:
    model = made("Qwen3", intermediate_size=20, head_dim=6, attention_bias=True, **rope("default", 1e4))
    return model, ours(**DENSE, head_dim=6, qk_norm="head", attention_bias="all")


def olmo2() -> tuple[Any, ModelConfig]:
    model = made("Olmo2", intermediate_size=20, **rope("default", 1e4))
    return model, ours(**DENSE, qk_norm="full", norm_order="post")


def gemma() -> tuple[Any, ModelConfig]:
    model = made("Gemma", intermediate_size=20, head_dim=8, tie_word_embeddings=True, **rope("default", 1e4))
    return model, ours(**DENSE, head_dim=8, activation="gelu_tanh", embed_scale=D**0.5, tie_embeddings=True)


def mixtral() -> tuple[Any, ModelConfig]:
    experts = {"intermediate_size": F, "num_local_experts": E, "num_experts_per_tok": K, "sliding_window": 3}
    return made("Mixtral", **experts, **rope("default", 1e4)), ours(sliding_window=3, moe=MoEConfig(**EXPERTS))


def qwen2_moe() -> tuple[Any, ModelConfig]:
    experts = {"moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": K, "norm_topk_prob": False}
    mixed = {"shared_expert_intermediate_size": 10, "mlp_only_layers": [0], "intermediate_size": 20}
    model = made("Qwen2Moe", **experts, **mixed, **rope("default", 1e4))
    moe = MoEConfig(**EXPERTS, num_shared_experts=1, shared_dim=10, shared_gate=True, router=PLAIN)
    return model, ours(**DENSE, dense_prefix_layers=1, attention_bias="qkv", moe=moe)


def flex_olmo() -> tuple[Any, ModelConfig]:
    experts = {"intermediate_size": F, "num_experts": E, "num_experts_per_tok": K, "norm_topk_prob": False}
    model = made("FlexOlmo", **experts, **rope("default", 1e4))
    return model, ours(qk_norm="full", norm_order="post", moe=MoEConfig(**EXPERTS, router=PLAIN))


def glm4_moe() -> tuple[Any, ModelConfig]:
    experts = {"moe_intermediate_size": F, "n_routed_experts": E, "num_experts_per_tok": K, "n_shared_experts": 2}
    routing = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "norm_topk_prob": True}
    heads = {"head_dim": 8, "attention_bias": True, "use_qk_norm": True, "intermediate_size": 20, "first_k_dense_replace": 1}
    model = made("Glm4Moe", **experts, **routing, **heads, **rope("default", 1e4, partial_rotary_factor=0.5))
    router = RouterConfig(score="sigmoid", scaling_factor=1.5, num_groups=4, top_groups=2)
    moe = MoEConfig(**EXPERTS, num_shared_experts=2, router=router, balance=BalanceConfig(expert_bias=True))
    own = {"head_dim": 8, "attention_bias": "qkv", "qk_norm": "head", "rope_fraction": 0.5}
    return model, ours(**DENSE, **own, dense_prefix_layers=1, moe=moe)


def granite_moe() -> tuple[Any, ModelConfig]:
    experts = {"intermediate_size": F, "num_local_experts": E, "num_experts_per_tok": K, "attention_bias": True}
    scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.3, "logits_scaling": 5.0}
    model = made("GraniteMoe", **experts, **scales, **rope("default", 1e4))
    own = {"embed_scale": 3.0, "residual_scale": 0.4, "attention_scale": 0.3, "logits_scale": 5.0, "attention_bias": "all"}
    return model, ours(**own, moe=MoEConfig(**EXPERTS, router=RouterConfig(order="topk_softmax")))


FAMILIES: tuple[Callable[[], tuple[Any, ModelConfig]], ...] = (
    llama,
    llama_linear,
    mistral,
    qwen2,
    qwen3,
    olmo2,
    gemma,
    mixtral,
    qwen2_moe,
    flex_olmo,
    glm4_moe,
    granite_moe,
)


class Theirs:
    """Tensors of a transformers model under our names, each read once."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        self.left = dict(tensors)

    def take(self, name: str) -> Tensor:
        return self.left.pop(name)

    def network(self, prefix: str) -> dict[str, Tensor]:
        gate, up, down = (self.take(f"{prefix}.{part}_proj.weight") for part in ("gate", "up", "down"))
        return {"w13_2FD": torch.stack([gate, up]), "w2_DF": down}

    def named(self, config: ModelConfig) -> dict[str, Tensor]:
        """Everything but lm_head's second name of a tied embedding. Raises where something is left over."""
        found = {"embed.weight_VD": self.take("model.embed_tokens.weight"), "head.norm.weight_D": self.take("model.norm.weight")}
        if not config.tie_embeddings:
            found["head.weight_VD"] = self.take("lm_head.weight")
        for index in range(config.num_layers):
            found |= {f"layers.{index}.{name}": x for name, x in self.layer(f"model.layers.{index}", config, index).items()}
        assert not self.left, f"not used: {sorted(self.left)}"
        return found

    def layer(self, prefix: str, config: ModelConfig, index: int) -> dict[str, Tensor]:
        norms = ("input_layernorm", "post_attention_layernorm")
        if config.norm_order == "post":
            norms = ("post_attention_layernorm", "post_feedforward_layernorm")
        pairs = {"attention_norm.weight_D": norms[0], "ffn_norm.weight_D": norms[1]}
        found = {mine: self.take(f"{prefix}.{name}.weight") for mine, name in pairs.items()}
        for letter, rows in (("q", "QD"), ("k", "CD"), ("v", "CD"), ("o", "DQ")):
            found[f"attention.w{letter}_{rows}"] = self.take(f"{prefix}.self_attn.{letter}_proj.weight")
            if config.attention_bias == "all" or (config.attention_bias == "qkv" and letter != "o"):
                found[f"attention.b{letter}_{rows[0]}"] = self.take(f"{prefix}.self_attn.{letter}_proj.bias")
        for norm in () if config.qk_norm == "none" else ("q_norm", "k_norm"):
            found[f"attention.{norm}.weight_D"] = self.take(f"{prefix}.self_attn.{norm}.weight")
        if not config.is_moe_layer(index):
            return found | {f"ffn.{name}": x for name, x in self.network(f"{prefix}.mlp").items()}
        return found | {f"moe.{name}": x for name, x in self.experts(prefix, config).items()}

    def experts(self, prefix: str, config: ModelConfig) -> dict[str, Tensor]:
        assert config.moe is not None
        folder = next(name.split(".")[3] for name in self.left if name.startswith(f"{prefix}.") and "experts.down" in name)
        where = f"{prefix}.{folder}"
        router = f"{where}.router" if f"{where}.router.weight" in self.left else f"{where}.gate"
        w13 = self.take(f"{where}.experts.gate_up_proj").view(E, 2, F, D)
        found = {"router.weight_ED": self.take(f"{router}.weight"), "experts.w13_E2FD": w13}
        found["experts.w2_EDF"] = self.take(f"{where}.experts.down_proj")
        if f"{router}.e_score_correction_bias" in self.left:
            found["router.expert_bias_E"] = self.take(f"{router}.e_score_correction_bias")
        if config.moe.shared_width:
            shared = "shared_expert" if config.moe.shared_gate else "shared_experts"
            found |= {f"shared_expert.{name}": x for name, x in self.network(f"{where}.{shared}").items()}
        if config.moe.shared_gate:
            found["shared_expert.gate_D"] = self.take(f"{where}.shared_expert_gate.weight").squeeze(0)
        return found


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.__name__)
def test_model_equals_transformers(family: Callable[[], tuple[Any, ModelConfig]]) -> None:
    theirs, config = family()
    for tensor in [*theirs.parameters(), *(b for n, b in theirs.named_buffers() if "correction" in n)]:
        nn.init.normal_(tensor, std=0.3)
    weights = {n: x.detach() for n, x in theirs.state_dict().items() if not (config.tie_embeddings and n == "lm_head.weight")}
    weights = Theirs(weights).named(config)
    if family is gemma:
        weights = {name: x + 1 if "norm" in name else x for name, x in weights.items()}
    model = Model(config, init=False)
    if config.tie_embeddings:
        weights["head.weight_VD"] = weights["embed.weight_VD"]
    model.load_state_dict(weights)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters()) == config.num_params

    tokens_BS, labels_BS = torch.randint(V, (2, SEQ)), torch.randint(V, (2, SEQ))
    logits = theirs(tokens_BS, use_cache=False).logits
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels_BS.flatten(), reduction="sum")
    loss_sum = model(tokens_BS, labels_BS=labels_BS)[0]
    loss.backward()
    loss_sum.backward()
    want = {"logits": logits.detach(), "loss": loss.detach()}
    got = {"logits": model(tokens_BS)[0].detach(), "loss": loss_sum.detach()}
    want |= Theirs({n: p.grad for n, p in theirs.named_parameters()}).named(config)
    got |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_same(got, want, RTOL)
