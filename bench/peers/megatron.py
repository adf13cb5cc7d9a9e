"""megatron-core: its experts one after the other, its permute and unpermute, and the vLLM-style kernels of its inference."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..protocol.contender import Contender, Named, Problem, Raw, absent, by_autograd
from . import NEEDS_CUDA, dense_routing, modules_replaced

VLLM = "megatron.core.inference.moe.vllm_fused_moe"


def permute(name: str, problem: Problem, direction_RD: Tensor) -> Contender:
    """Its order is found by the same call, from a dense map of choices."""
    utils = _imported("megatron.core.transformer.moe.moe_utils")
    chosen_TE, _ = dense_routing(problem)
    leaves = {"dX": problem.leaves()["dX"]}

    def forward() -> Tensor:
        return utils.permute(leaves["dX"], chosen_TE, num_out_tokens=problem.shape.R)[0]

    return by_autograd(name, forward, leaves, direction_RD, note="with its plan")


def unpermute(name: str, problem: Problem, y_RD: Tensor) -> Contender:
    """A product with the weights and a scattered addition, which uses float atomics on a GPU."""
    utils = _imported("megatron.core.transformer.moe.moe_utils")
    chosen_TE, weights_TE = dense_routing(problem)
    order_R = utils.permute(problem.x_TD, chosen_TE, num_out_tokens=problem.shape.R)[2]
    leaves = {"dY": y_RD.detach().requires_grad_(), "dS": weights_TE.requires_grad_()}

    def forward() -> Tensor:
        return utils.unpermute(leaves["dY"], order_R, problem.x_TD.shape, probs=leaves["dS"], routing_map=chosen_TE)

    def gradients(raw: Raw) -> Named:
        return _from_dense(dict(zip(leaves, raw, strict=True)), problem)

    return by_autograd(name, forward, leaves, problem.direction_TD, gradients=gradients)


def sequential_experts(name: str, problem: Problem) -> Contender:
    """permute, `SequentialMLP` with the weights on its hidden rows, unpermute; its grouped experts need Transformer Engine."""
    utils, experts = _imported("megatron.core.transformer.moe.moe_utils"), _sequential_mlp(problem)
    chosen_TE, weights_TE = dense_routing(problem)
    counts_E = chosen_TE.sum(0)
    leaves = {"dX": problem.leaves()["dX"], "dS": weights_TE.requires_grad_()}
    layers = [expert for expert in experts.local_experts]
    weights = {"dW13": [e.linear_fc1.weight for e in layers], "dW2": [e.linear_fc2.weight for e in layers]}
    inputs = [*leaves.values(), *weights["dW13"], *weights["dW2"]]

    def forward() -> Named:
        rows_RD, weights_R, order_R, *_ = utils.permute(
            leaves["dX"], chosen_TE, probs=leaves["dS"], num_out_tokens=problem.shape.R
        )
        return {"out": utils.unpermute(experts(rows_RD, counts_E, weights_R)[0], order_R, problem.x_TD.shape)}

    def backward(outputs: Named, keep_graph: bool) -> Raw:
        return torch.autograd.grad(outputs["out"], inputs, problem.direction_TD, retain_graph=keep_graph, allow_unused=True)

    def gradients(raw: Raw) -> Named:
        named = _from_dense(dict(zip(leaves, raw, strict=False)), problem)
        for key, ours in (("dW13", problem.w13_E2FD), ("dW2", problem.w2_EDF)):
            first = len(leaves) + (0 if key == "dW13" else problem.shape.E)
            own = zip(raw[first : first + problem.shape.E], weights[key], strict=True)
            stacked = torch.stack([torch.zeros_like(w) if grad is None else grad for grad, w in own])
            named[key] = stacked.view(ours.shape)
        return named

    listed = {**leaves, **{f"{key}[{e}]": w for key, ws in weights.items() for e, w in enumerate(ws)}}
    return Contender(name, forward, backward, gradients, listed, note="experts in a loop")


def vllm_forward(name: str, problem: Problem) -> Contender:
    """Forward only: its two vLLM-style products and weighted sum. Its own layer knows squared ReLU only, so SwiGLU is torch's."""
    kernels = _vllm(problem)
    if isinstance(kernels, str):
        return absent(name, kernels)
    if problem.dtype != torch.bfloat16:
        return absent(name, "takes bf16 only")
    shape = problem.shape
    weights = (problem.w13_E2FD.flatten(1, 2), problem.w2_EDF)
    valid = torch.tensor(shape.T, dtype=torch.int32, device=problem.device)
    config = kernels._get_default_config(M=shape.T, E=shape.E, top_k=shape.K)
    blocks = -(-(shape.R + config["BLOCK_SIZE_M"] * shape.E) // config["BLOCK_SIZE_M"])
    flat_weights = problem.weights_TK.flatten()

    def product(rows: Tensor, weight: Tensor, top_k: int, plan: tuple[Tensor, ...]) -> Tensor:
        out_RN = rows.new_empty(shape.R, weight.shape[1])
        grid = blocks * -(-weight.shape[1] // config["BLOCK_SIZE_N"])
        kernels._invoke_fused_moe_kernel(
            rows, weight, out_RN, flat_weights, *plan, mul_routed_weight=False, top_k=top_k, config=config, grid_size=grid
        )
        return out_RN

    def forward() -> Named:
        plan = kernels._moe_align_block_size_cuda_graphable(problem.indices_TK, config["BLOCK_SIZE_M"], shape.E, 0, valid)
        gate_RF, up_RF = product(problem.x_TD, weights[0], shape.K, plan).chunk(2, dim=-1)
        y_RD = product(functional.silu(gate_RF).mul_(up_RF), weights[1], 1, plan)
        sizes = (shape.T, shape.K, shape.H)
        out = torch.empty_like(problem.x_TD)
        return {"out": kernels._moe_sum(y_RD, problem.weights_TK, *sizes, valid, problem.indices_TK, 0, shape.E, out=out)}

    return Contender(name, forward, note="forward only, SwiGLU by torch")


def vllm_align(name: str, problem: Problem) -> Contender:
    """The vLLM-style plan: rows by expert, padded to whole blocks, in an order that atomics decide; so it is not compared."""
    kernels = _vllm(problem)
    if isinstance(kernels, str):
        return absent(name, kernels)
    shape = problem.shape
    valid = torch.tensor(shape.T, dtype=torch.int32, device=problem.device)
    block = kernels._get_default_config(M=shape.T, E=shape.E, top_k=shape.K)["BLOCK_SIZE_M"]

    def forward() -> Named:
        return {"order": kernels._moe_align_block_size_cuda_graphable(problem.indices_TK, block, shape.E, 0, valid)[0]}

    return Contender(name, forward, kind="bound", note=f"padded to blocks of {block}, order by atomics")


def _imported(module: str) -> ModuleType:
    """A module of megatron-core; Transformer Engine is hidden from it where its compiled part is not there.

    Megatron-core expects an ImportError then, Transformer Engine without its libraries raises something else.
    """
    if importlib.util.find_spec("transformer_engine_torch") is not None:
        return importlib.import_module(module)
    # its warnings are about what is hidden here, and about parts of it that nobody uses here
    with modules_replaced("transformer_engine", {"transformer_engine": None}), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


def _from_dense(named: dict[str, Tensor | None], problem: Problem) -> dict[str, Tensor]:
    """The gradient of the dense weights [T, E] becomes that of the chosen ones [T, K]."""
    grads = {key: grad for key, grad in named.items() if grad is not None}
    return {**grads, "dS": grads["dS"].gather(1, problem.indices_TK)}


def _vllm(problem: Problem) -> Any:
    """The module of the kernels, or the reason why they cannot be used."""
    if problem.device.type != "cuda":
        return NEEDS_CUDA
    if importlib.util.find_spec("megatron") is None:
        return "No module named 'megatron'"
    try:
        return _imported(VLLM)
    except ModuleNotFoundError as error:
        return f"this megatron-core has no {error.name}"


def _sequential_mlp(problem: Problem) -> Any:
    """Its experts with views of the problem's weights; on a GPU with the activation that it compiles."""
    import torch.distributed as dist

    layer, layers = _imported("megatron.core.transformer.moe.experts"), _imported("megatron.core.tensor_parallel.layers")
    mlp, settings = _imported("megatron.core.transformer.mlp"), _imported("megatron.core.transformer.transformer_config")
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group, shape = dist.group.WORLD, problem.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about defaults of its own
        config = settings.TransformerConfig(
            num_layers=1,
            num_attention_heads=1,
            hidden_size=shape.H,
            ffn_hidden_size=shape.F,
            moe_ffn_hidden_size=shape.F,
            num_moe_experts=shape.E,
            moe_router_topk=shape.K,
            gated_linear_unit=True,
            activation_func=functional.silu,
            add_bias_linear=False,
            bias_activation_fusion=problem.device.type == "cuda",
            gradient_accumulation_fusion=False,
            perform_initialization=False,
            use_cpu_initialization=True,
            params_dtype=problem.dtype,
        )
    parts = mlp.MLPSubmodules(linear_fc1=layers.ColumnParallelLinear, linear_fc2=layers.RowParallelLinear)
    with torch.device("meta"):  # the weights are replaced by views of ours
        experts = layer.SequentialMLP(shape.E, config, parts, SimpleNamespace(ep=group, expt_tp=group, expt_dp=group))
    for expert, w13_2FD, w2_DF in zip(experts.local_experts, problem.w13_E2FD, problem.w2_EDF, strict=True):
        expert.linear_fc1.weight = nn.Parameter(w13_2FD.detach().flatten(0, 1))
        expert.linear_fc2.weight = nn.Parameter(w2_DF.detach())
    return experts
