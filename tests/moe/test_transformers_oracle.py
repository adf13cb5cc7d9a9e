"""The same weights in transformers' models give the same outputs and gradients: layers one by one, then whole models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moefold.moe.config import BalanceConfig, ModelConfig, MoEConfig, RouterConfig
from moefold.moe.layer import MoELayer
from moefold.moe.model import Model
from numeric import assert_same

D, F, E, K = 16, 12, 8, 3
RTOL = 1e-5


def mixtral_block() -> tuple[nn.Module, MoEConfig]:
    from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
    return MixtralSparseMoeBlock(eager(config)), MoEConfig(num_experts=E, top_k=K, expert_dim=F)


def qwen3_block(renormalize: bool) -> tuple[nn.Module, MoEConfig]:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    sizes = {"hidden_size": D, "moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": K}
    block = Qwen3MoeSparseMoeBlock(eager(Qwen3MoeConfig(**sizes, norm_topk_prob=renormalize)))
    return block, MoEConfig(num_experts=E, top_k=K, expert_dim=F, router=RouterConfig(renormalize=renormalize))


def olmoe_block() -> tuple[nn.Module, MoEConfig]:
    from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeSparseMoeBlock

    sizes = {"hidden_size": D, "intermediate_size": F, "num_experts": E, "num_experts_per_tok": K}
    block = OlmoeSparseMoeBlock(eager(OlmoeConfig(**sizes, norm_topk_prob=False)))
    return block, MoEConfig(num_experts=E, top_k=K, expert_dim=F, router=RouterConfig(renormalize=False))


def deepseek_v3_block(num_shared: int) -> tuple[nn.Module, MoEConfig]:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE

    sizes = {"hidden_size": D, "moe_intermediate_size": F, "n_routed_experts": E, "num_experts_per_tok": K}
    routing = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
    block = DeepseekV3MoE(eager(DeepseekV3Config(**sizes, **routing, n_shared_experts=num_shared)))
    router = RouterConfig(score="sigmoid", scaling_factor=2.5, num_groups=4, top_groups=2, group_score="top2_sum")
    balance = BalanceConfig(expert_bias=True)
    return block, MoEConfig(num_experts=E, top_k=K, expert_dim=F, num_shared_experts=num_shared, router=router, balance=balance)


def eager(config: Any) -> Any:
    """The plain loop over experts, and attention as matrix products: the most literal code there is."""
    config._experts_implementation = config._attn_implementation = "eager"
    return config


BLOCKS: dict[str, Callable[[], tuple[nn.Module, MoEConfig]]] = {
    "mixtral": mixtral_block,
    "qwen3-renormalized": lambda: qwen3_block(True),
    "qwen3-plain": lambda: qwen3_block(False),
    "olmoe": olmoe_block,
    "deepseek-v3": lambda: deepseek_v3_block(1),
    "deepseek-v3-two-shared": lambda: deepseek_v3_block(2),
}


def layer_weights(block: nn.Module) -> dict[str, Tensor]:
    """The weights of a transformers block under our names; works on gradients alike."""
    theirs: Any = block
    named = {
        "router.weight_ED": theirs.gate.weight,
        "experts.w13_E2FD": theirs.experts.gate_up_proj,
        "experts.w2_EDF": theirs.experts.down_proj,
    }
    if hasattr(theirs, "shared_experts"):
        shared = theirs.shared_experts
        named["shared_expert.w2_DF"] = shared.down_proj.weight
    return named


def copy_layer(block: nn.Module, layer: MoELayer) -> None:
    theirs: Any = block
    with torch.no_grad():
        for name, weight in layer_weights(block).items():
            ours = layer.get_parameter(name)
            ours.copy_(weight.view(ours.shape))
        if layer.shared_expert is not None:
            shared = theirs.shared_experts
            layer.shared_expert.w13_2FD.copy_(torch.stack([shared.gate_proj.weight, shared.up_proj.weight]))
        if layer.router.biased:
            layer.router.expert_bias_E.copy_(theirs.gate.e_score_correction_bias)


def randomize(module: nn.Module, std: float = 0.3) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)


@pytest.mark.parametrize("name", BLOCKS)
def test_layer_equals_transformers(name: str) -> None:
    block, config = BLOCKS[name]()
    randomize(block)
    theirs: Any = block
    if config.balance.expert_bias:
        theirs.gate.e_score_correction_bias.normal_(std=0.3)
    layer = MoELayer(D, config)
    copy_layer(block, layer)
    x_BSD = torch.randn(2, 9, D)
    direction_BSD = torch.randn(2, 9, D)
    x_theirs, x_ours = x_BSD.clone().requires_grad_(), x_BSD.clone().requires_grad_()
    y_theirs, y_ours = block(x_theirs), layer(x_ours)[0]
    y_theirs.backward(direction_BSD)
    y_ours.backward(direction_BSD)

    assert x_theirs.grad is not None and x_ours.grad is not None
    want = {"output": y_theirs.detach(), "x": x_theirs.grad}
    got = {"output": y_ours.detach(), "x": x_ours.grad}
    for parameter_name, weight in layer_weights(block).items():
        ours = layer.get_parameter(parameter_name).grad
        assert weight.grad is not None and ours is not None
        want[parameter_name], got[parameter_name] = weight.grad, ours.view(weight.shape)
    if layer.shared_expert is not None:
        shared = theirs.shared_experts
        want["shared w13"] = torch.stack([shared.gate_proj.weight.grad, shared.up_proj.weight.grad])
        assert layer.shared_expert.w13_2FD.grad is not None
        got["shared w13"] = layer.shared_expert.w13_2FD.grad
    assert_same(got, want, RTOL)


V, SEQ = 37, 11
SIZES = {
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": V,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "pad_token_id": None,
}
OURS = {"dim": D, "num_layers": 2, "num_heads": 4, "vocab_size": V, "max_seq_len": 32, "norm_eps": 1e-5}


def rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


def mixtral_model(tied: bool) -> tuple[Any, ModelConfig]:
    from transformers import MixtralConfig, MixtralForCausalLM

    experts = {"intermediate_size": F, "num_local_experts": E, "num_experts_per_tok": 2}
    config = MixtralConfig(**SIZES, **experts, **rope(1e6), num_key_value_heads=2, sliding_window=None, tie_word_embeddings=tied)
    moe = MoEConfig(num_experts=E, top_k=2, expert_dim=F)
    ours = ModelConfig(**OURS, num_kv_heads=2, rope_theta=1e6, tie_embeddings=tied, moe=moe)
    return MixtralForCausalLM(eager(config)), ours


def qwen3_model(tied: bool) -> tuple[Any, ModelConfig]:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"moe_intermediate_size": F, "num_experts": E, "num_experts_per_tok": K, "norm_topk_prob": True}
    mixed = {"mlp_only_layers": [0], "intermediate_size": 20, "head_dim": 6, "num_key_value_heads": 1}
    config = Qwen3MoeConfig(**SIZES, **experts, **mixed, **rope(5e3), tie_word_embeddings=tied)
    moe = MoEConfig(num_experts=E, top_k=K, expert_dim=F)
    dense_first = {"dense_prefix_layers": 1, "dense_ffn_dim": 20}
    heads = {"head_dim": 6, "num_kv_heads": 1, "qk_norm": "head"}
    ours = ModelConfig(**OURS, **dense_first, **heads, rope_theta=5e3, tie_embeddings=tied, moe=moe)
    return Qwen3MoeForCausalLM(eager(config)), ours


def olmoe_model(tied: bool) -> tuple[Any, ModelConfig]:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    experts = {"intermediate_size": F, "num_experts": E, "num_experts_per_tok": K, "norm_topk_prob": False}
    config = OlmoeConfig(**SIZES, **experts, **rope(1e4), num_key_value_heads=2, tie_word_embeddings=tied)
    moe = MoEConfig(num_experts=E, top_k=K, expert_dim=F, router=RouterConfig(renormalize=False))
    return OlmoeForCausalLM(eager(config)), ModelConfig(**OURS, num_kv_heads=2, qk_norm="full", tie_embeddings=tied, moe=moe)


def copy_model(theirs: Any, model: Model) -> None:
    """Weights of a transformers causal model into ours, every one of them."""
    for block, layer in zip(model.blocks, theirs.model.layers, strict=True):
        attention, norms = layer.self_attn, (layer.input_layernorm, layer.post_attention_layernorm)
        pairs = [(block.attention.wq_QD, attention.q_proj), (block.attention.wk_CD, attention.k_proj)]
        pairs += [(block.attention.wv_CD, attention.v_proj), (block.attention.wo_DQ, attention.o_proj)]
        pairs += [(block.attention_norm.weight_D, norms[0]), (block.ffn_norm.weight_D, norms[1])]
        if block.attention.qk_norm != "none":
            pairs += [(block.attention.q_norm.weight_D, attention.q_norm), (block.attention.k_norm.weight_D, attention.k_norm)]
        for ours, module in pairs:
            ours.copy_(module.weight)
        if block.moe is not None:
            copy_layer(layer.mlp, block.moe)
        else:
            assert block.ffn is not None
            block.ffn.w13_2FD.copy_(torch.stack([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]))
            block.ffn.w2_DF.copy_(layer.mlp.down_proj.weight)
    model.embed.weight_VD.copy_(theirs.model.embed_tokens.weight)
    model.head.norm.weight_D.copy_(theirs.model.norm.weight)
    model.head.weight_VD.copy_(theirs.lm_head.weight)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("build", [mixtral_model, qwen3_model, olmoe_model], ids=["mixtral", "qwen3", "olmoe"])
def test_model_equals_transformers(build: Callable[[bool], tuple[Any, ModelConfig]], tied: bool) -> None:
    theirs, config = build(tied)
    randomize(theirs)
    model = Model(config, init=False)
    for parameter in model.parameters():  # a weight that is not copied shows
        nn.init.constant_(parameter, torch.nan)
    with torch.no_grad():
        copy_model(theirs, model)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters()) == config.num_params

    tokens_BS, labels_BS = torch.randint(V, (2, SEQ)), torch.randint(V, (2, SEQ))
    logits = theirs(tokens_BS).logits
    got, want = {"logits": model(tokens_BS)[0].detach()}, {"logits": logits.detach()}
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels_BS.flatten(), reduction="sum")
    loss_sum = model(tokens_BS, labels_BS=labels_BS)[0]
    loss.backward()
    loss_sum.backward()
    got |= {"loss": loss_sum.detach(), "embedding": grad(model.embed.weight_VD), "norm": grad(model.head.norm.weight_D)}
    want |= {"loss": loss.detach(), "embedding": grad(theirs.model.embed_tokens.weight), "norm": grad(theirs.model.norm.weight)}
    for i, (block, layer) in enumerate(zip(model.blocks, theirs.model.layers, strict=True)):
        got |= {f"{i}.wq": grad(block.attention.wq_QD), f"{i}.wk": grad(block.attention.wk_CD)}
        want |= {f"{i}.wq": grad(layer.self_attn.q_proj.weight), f"{i}.wk": grad(layer.self_attn.k_proj.weight)}
    assert_same(got, want, RTOL)


def grad(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
