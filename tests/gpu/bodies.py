"""The checks of operations on rows. Each takes a problem on any device: a GPU, or a CPU under Triton's interpreter.

They raise AssertionError. Tests give the sizes: those of production on a GPU, tiny ones in the interpreter.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Literal
from unittest import mock

import torch
from torch import Tensor

from gpu.measures import (
    Error,
    Relay,
    allowed,
    as_it_is,
    captured,
    error_of,
    host_waits,
    poison_free_memory,
    relaid,
    results,
    saved_bytes,
)
from gpu.operations import Draw, Operation, Size, expert_layer, expert_weights
from moefold.kernels import topk_gate as gate
from moefold.kernels.moe_mlp import MoeMlpLoop, grouped_impl, moe_layer_mlp
from moefold.kernels.permute.torch_impl import Permute, SumRows, Unpermute
from moefold.kernels.self_check import check_kernels
from moefold.kernels.sort_tokens import sort_tokens
from moefold.moe.config import MoEConfig
from moefold.moe.layer import MoELayer


def check_all_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """The check that a run makes at its start passes."""
    assert [finding for finding in check_kernels(device, dtype) if not finding.good] == []


def check_exact(operation: Operation, relay: Relay = as_it_is) -> None:
    """Outputs and every gradient, by name, are at most MARGIN times as far from the exact ones as torch's in the same dtype.

    Integers are equal. relay: where in memory our inputs and upstream gradients lie.
    """
    dtype, through = operation.dtype, operation.through
    wide = {name: x.double() for name, x in operation.leaves.items()}
    exact = results(operation.exact, wide, dtype, through)
    plain = results(operation.plain, operation.leaves, dtype, through)
    assert set(plain) == set(exact), f"torch has {sorted(plain)}, not {sorted(exact)}"
    kinds = {name: (x.shape, x.dtype) for name, x in plain.items()}
    errors = {name: error_of(x, exact[name]) for name, x in plain.items()}
    # freed before the next set of large tensors is made
    del plain, wide
    got = results(operation.ours, relaid(operation, relay).leaves, dtype, through, relay)
    assert {name: (x.shape, x.dtype) for name, x in got.items()} == kinds
    wrong = [problem for name in exact if (problem := _too_far(name, got, exact, errors[name], operation))]
    assert not wrong, "\n".join(wrong)


def _too_far(name: str, got: Mapping[str, Tensor], exact: Mapping[str, Tensor], plain: Error, operation: Operation) -> str | None:
    """What is wrong with one result; None where nothing is."""
    if not got[name].is_floating_point():
        different = int((got[name] != exact[name]).sum())
        return f"{name}: {different} of {exact[name].numel()} differ" if different else None
    error, limit = error_of(got[name], exact[name]), allowed(plain, got[name], operation.dtype, operation.terms)
    if error.whole <= limit.whole and error.worst <= limit.worst:
        return None
    return f"{name}: error {error} over {limit}; torch's is {plain}"


def check_repeats(operation: Operation) -> None:
    """Reruns are bitwise equal, whatever the memory holds that they are given: no result holds what it did not write."""
    first = results(operation.ours, operation.leaves, operation.dtype, operation.through)
    for _ in range(2):
        poison_free_memory(operation.leaves[next(iter(operation.leaves))].device)
        again = results(operation.ours, operation.leaves, operation.dtype, operation.through)
        different = [name for name, x in first.items() if not torch.equal(x, again[name])]
        assert not different, f"two runs differ, or hold NaN, in {', '.join(different)}"
        del again


def check_never_waits(operation: Operation) -> None:
    """Neither forward nor backward makes the host wait for the device."""
    device = operation.leaves[next(iter(operation.leaves))].device
    results(operation.ours, operation.leaves, operation.dtype, operation.through)
    with host_waits(device):
        results(operation.ours, operation.leaves, operation.dtype, operation.through)


def check_captured(size: Size, draw: Draw, backward: bool) -> None:
    """Gate, sort and experts as one CUDA graph: replays with other tokens and another routing are bitwise the eager results."""
    rule = gate.GateRule(top_k=size.K)
    inputs = {"x_TD": draw.normal(size.T, size.D), "logits_TE": draw.normal(size.T, size.E, dtype=torch.float32)}
    leaves = {name: x.requires_grad_() for name, x in (inputs | expert_weights(size, draw)).items()}
    direction_TD = draw.normal(size.T, size.D)

    def layer() -> list[Tensor]:
        routed = gate.topk_gate(leaves["logits_TE"], rule, backend="triton")
        plan = sort_tokens(routed.indices_TK, size.E, backend="triton")
        experts = (leaves["w13_E2FD"], leaves["w2_EDF"])
        y_TD = moe_layer_mlp(leaves["x_TD"], routed.weights_TK, *plan, *experts, backend="triton")
        grads = torch.autograd.grad(y_TD, list(leaves.values()), direction_TD) if backward else ()
        return [y_TD.detach(), *grads]

    static = [torch.empty_like(x) for x in layer()]

    def step() -> None:
        for into, x in zip(static, layer(), strict=True):
            into.copy_(x)

    replay = captured(step, draw.device)
    for _ in range(2):
        with torch.no_grad():
            leaves["x_TD"].copy_(draw.normal(size.T, size.D))
            leaves["logits_TE"].copy_(draw.normal(size.T, size.E, dtype=torch.float32))
        want = layer()
        for into in static:
            into.fill_(torch.nan)
        replay()
        names = ["output", *(f"gradient of {name}" for name in leaves)]
        different = [name for name, x, y in zip(names, static, want, strict=False) if not torch.equal(x, y)]
        assert not different, f"a replay differs in {', '.join(different)}"


def formula_bytes(size: Size, dtype: torch.dtype) -> int:
    """What moe_layer_mlp has to keep for backward: the tokens [T, D] and the pre-activation [R, 2 F]."""
    return dtype.itemsize * (size.T * size.D + 2 * size.T * size.K * size.F)


def check_saved(size: Size, draw: Draw) -> None:
    """The tensors that autograd keeps of moe_layer_mlp beside the weights are the formula's, within 5 %."""
    operation = expert_layer(size, draw)
    kept = saved_bytes(operation.ours, operation.leaves, without=("w13_E2FD", "w2_EDF"))
    expected = formula_bytes(size, draw.dtype)
    assert expected <= kept <= 1.05 * expected, f"{kept} bytes are kept, {kept / expected:.3f} of {expected}"


def without_torch() -> ExitStack:
    """Inside it, the torch back end of every kernel of the layer raises."""
    stack = ExitStack()
    for owner, name in (
        (MoeMlpLoop, "forward"),
        (grouped_impl, "moe_mlp"),
        (Permute, "forward"),
        (SumRows, "forward"),
        (Unpermute, "forward"),
        (gate.reference, "topk_gate"),
    ):
        stack.enter_context(mock.patch.object(owner, name, side_effect=AssertionError(f"{name} ran on torch")))
    return stack


def check_layer(size: Size, draw: Draw, kernels: Literal["auto", "triton"]) -> None:
    """A MoELayer with `kernels` runs on Triton throughout, and gives torch's output and gradients to the dtype's rounding."""
    x_BSD = draw.normal(2, size.T // 2, size.D)

    def made(kernels: Literal["auto", "torch", "triton"]) -> MoELayer:
        config = MoEConfig(num_experts=size.E, top_k=size.K, expert_dim=size.F, num_shared_experts=1, kernels=kernels)
        return MoELayer(size.D, config).to(draw.device, draw.dtype)

    def run(layer: MoELayer) -> dict[str, Tensor]:
        def forward(x_BSD: Tensor, **weights: Tensor) -> dict[str, Tensor]:
            y_BSD, aux = torch.func.functional_call(layer, weights, (x_BSD,))
            return {"y": y_BSD, "counts": aux.counts_E}

        return results(forward, {"x_BSD": x_BSD, **dict(layer.named_parameters())}, draw.dtype)

    want, ours = run(made("torch")), made(kernels)
    with without_torch():
        got = run(ours)
        with host_waits(draw.device):
            run(ours)
    assert torch.equal(got.pop("counts"), want.pop("counts"))
    bound = max(4 * torch.finfo(draw.dtype).eps, 1e-5)
    far = {name: error.whole for name, x in want.items() if (error := error_of(got[name], x)).whole > bound}
    assert got.keys() == want.keys() and not far, f"relative distances above {bound:.2g}: {far}"
