"""One MoE layer on a CPU, forward and backward, against transformers and DeepSpeed with the same weights.

All contenders take turns in one process, in fp32, with the same tokens, weights and routing (random and nearly even). Each is
timed only after its output and all its gradients have been found equal to ours. A ratio is the median over the rounds of
(their time / our time) in the same round, so that a machine that gets slower or faster in between does not matter much. With
`--threads 1` the time is the processor time of the thread, which other programs on the machine disturb least.

transformers: the sparse block of Qwen3-MoE, with its experts as a loop (`eager`) and by `grouped_mm`. DeepSpeed: its MoE layer on
one rank (`ep_size = 1`), told to drop no token, which pads all experts to the rows of the fullest one. Ours also takes the
statistics that balance losses need; backward starts from the output alone for everybody. `products`: the matrix products of the
layer and nothing else, with rows already in place: nobody who uses the same matrix library can be faster.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moefold.moe.config import MoEConfig
from moefold.moe.layer import MoELayer

from .result import Result, Row

TOLERANCE = 1e-5
WARM_UP = 2


@dataclass(frozen=True)
class Shape:
    """T tokens of width D, E experts of hidden width F, K of them for each token."""

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int

    def __str__(self) -> str:
        return f"{self.name}: T{self.T} D{self.D} F{self.F} E{self.E} K{self.K}"


SHAPES = (Shape("fine", T=4096, D=512, F=256, E=32, K=4), Shape("coarse", T=2048, D=512, F=1024, E=8, K=2))


@dataclass(frozen=True)
class Contender:
    """forward: tokens [1, T, D] -> output. weights: router [E, D], w13 [E, 2F, D], w2 [E, D, F], each as one tensor or as a list
    of one tensor per expert; None for what has no weights to compare."""

    forward: Callable[[Tensor], Tensor]
    weights: tuple[nn.Parameter | list[nn.Parameter], ...] | None

    def parameters(self) -> list[nn.Parameter]:
        return [p for w in self.weights or () for p in (w if isinstance(w, list) else [w])]

    def gradients(self) -> list[Tensor]:
        """Of the weights, experts stacked."""
        return [torch.stack([_grad(p) for p in w]) if isinstance(w, list) else _grad(w) for w in self.weights or ()]


def _grad(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu"], default="cpu")
    parser.add_argument("--rounds", type=int, default=40, help="timed turns of each contender (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch (default: %(default)s)")
    parser.add_argument("--without", nargs="*", default=[], metavar="NAME", help="contenders to leave out")


def run(options: argparse.Namespace) -> Result:
    torch.set_num_threads(options.threads)
    rows: list[Row] = []
    figures: dict[str, float] = {}
    for shape in SHAPES:
        torch.manual_seed(0)
        x_BSD = torch.randn(1, shape.T, shape.D, requires_grad=True)
        direction_BSD = torch.randn(1, shape.T, shape.D)
        contenders = build(shape, options.without)
        check_equal(contenders, x_BSD, direction_BSD)
        seconds = take_turns(contenders, x_BSD, direction_BSD, options.rounds)
        ours = seconds["ours"]
        for name, theirs in seconds.items():
            ratios = [t / o for t, o in zip(theirs, ours, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            times = {"median_ms": 1e3 * statistics.median(theirs), "least_ms": 1e3 * min(theirs)}
            quartiles = {"ratio": middle, "ratio_p25": low, "ratio_p75": high}
            rows.append({"shape": str(shape), "contender": name, **times, **quartiles})
            if name != "ours":
                figures[f"ratio_{shape.name}_{name}"] = middle
        print(f"  {shape}: done", file=sys.stderr, flush=True)
    return Result(rows, figures)


def check_equal(contenders: dict[str, Contender], x_BSD: Tensor, direction_BSD: Tensor) -> None:
    """Exit where an output or a gradient differs from ours by more than TOLERANCE of its largest value."""
    want: list[Tensor] = []
    names = ("output", "gradient of x", "gradient of the router", "gradient of w13", "gradient of w2")
    for name, contender in contenders.items():
        if contender.weights is None:
            continue
        forget_gradients(contender, x_BSD)
        y_BSD = step(contender, x_BSD, direction_BSD)
        assert x_BSD.grad is not None
        got = [y_BSD.detach(), x_BSD.grad.clone(), *(g.clone() for g in contender.gradients())]
        want = want or got
        for what, a, b in zip(names, got, want, strict=True):
            difference = float((a.reshape(-1) - b.reshape(-1)).abs().max() / b.abs().max())
            if not difference < TOLERANCE:
                sys.exit(f"{name}: {what} differs from ours by {difference:.1e}; what is not the same cannot be compared")


def take_turns(contenders: dict[str, Contender], x_BSD: Tensor, direction_BSD: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of one forward and backward, per contender and round."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for turn in range(WARM_UP + rounds):
        for name, contender in contenders.items():
            forget_gradients(contender, x_BSD)
            start_s = clock()
            step(contender, x_BSD, direction_BSD)
            if turn >= WARM_UP:
                seconds[name].append(clock() - start_s)
    return seconds


def forget_gradients(contender: Contender, x_BSD: Tensor) -> None:
    for tensor in (x_BSD, *contender.parameters()):
        tensor.grad = None


def step(contender: Contender, x_BSD: Tensor, direction_BSD: Tensor) -> Tensor:
    """Forward and backward once; gradients are left in `.grad`."""
    y_BSD = contender.forward(x_BSD)
    if y_BSD.requires_grad:
        y_BSD.backward(direction_BSD)
    return y_BSD


def build(shape: Shape, without: list[str]) -> dict[str, Contender]:
    """Everybody with the same weights; ours first."""
    layer = MoELayer(shape.D, MoEConfig(num_experts=shape.E, top_k=shape.K, expert_dim=shape.F))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.02)
    experts = layer.experts
    ours = Contender(lambda x: layer(x)[0], (layer.router.weight_ED, experts.w13_E2FD, experts.w2_EDF))
    others: dict[str, Callable[[], Contender]] = {
        "eager": lambda: transformers_block(shape, layer, "eager"),
        "grouped_mm": lambda: transformers_block(shape, layer, "grouped_mm"),
        "deepspeed": lambda: deepspeed_layer(shape, layer),
        "products": lambda: matrix_products(shape, layer),
    }
    if unknown := set(without) - set(others):
        sys.exit(f"--without: no contender {', '.join(sorted(unknown))}; there are {', '.join(others)}")
    return {"ours": ours, **{name: make() for name, make in others.items() if name not in without}}


def transformers_block(shape: Shape, layer: MoELayer, experts: str) -> Contender:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeSparseMoeBlock

    sizes: dict[str, Any] = {
        "hidden_size": shape.D,
        "moe_intermediate_size": shape.F,
        "num_experts": shape.E,
        "num_experts_per_tok": shape.K,
    }
    config = Qwen3MoeConfig(**sizes, norm_topk_prob=True)
    config._experts_implementation = experts
    block: Any = Qwen3MoeSparseMoeBlock(config)
    weights = (block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    with torch.no_grad():
        for theirs, ours in zip(weights, layer.parameters(), strict=True):
            theirs.copy_(ours.view(theirs.shape))
    return Contender(block, weights)


class Expert(nn.Module):
    """A SwiGLU as a user of DeepSpeed would write it."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.w13 = nn.Linear(shape.D, 2 * shape.F, bias=False)
        self.w2 = nn.Linear(shape.F, shape.D, bias=False)

    def forward(self, x_ND: Tensor) -> Tensor:
        gate_NF, up_NF = self.w13(x_ND).chunk(2, dim=-1)
        return self.w2(functional.silu(gate_NF) * up_NF)


def deepspeed_layer(shape: Shape, layer: MoELayer) -> Contender:
    import deepspeed
    import torch.distributed as dist
    from deepspeed.moe.layer import MoE

    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        deepspeed.init_distributed("gloo")
    # without sampling of the second expert: the deterministic choice that everybody else makes
    theirs = MoE(shape.D, Expert(shape), shape.E, ep_size=1, k=shape.K, drop_tokens=False, top2_2nd_expert_sampling=False)
    theirs.set_deepspeed_parallelism()
    moe: Any = theirs.deepspeed_moe
    experts = list(moe.experts.deepspeed_experts)
    with torch.no_grad():
        moe.gate.wg.weight.copy_(layer.router.weight_ED)
        for expert, w13_2FD, w2_DF in zip(experts, layer.experts.w13_E2FD, layer.experts.w2_EDF, strict=True):
            expert.w13.weight.copy_(w13_2FD.flatten(0, 1))
            expert.w2.weight.copy_(w2_DF)
    weights = (moe.gate.wg.weight, [e.w13.weight for e in experts], [e.w2.weight for e in experts])
    return Contender(lambda x: theirs(x)[0], weights)


def matrix_products(shape: Shape, layer: MoELayer) -> Contender:
    """The six products of every expert, written in place, for an even load."""
    N, rows = shape.T * shape.K // shape.E, shape.T * shape.K
    w13_EGD, w2_EDF = layer.experts.w13_E2FD.detach().flatten(1, 2), layer.experts.w2_EDF.detach()
    x_RD, y_RD, pre_RG = torch.randn(rows, shape.D), torch.randn(rows, shape.D), torch.randn(rows, 2 * shape.F)
    hidden_RF, grad_RF = torch.randn(rows, shape.F), torch.empty(rows, shape.F)
    grad_w13, grad_w2, grad_x_RD = torch.empty_like(w13_EGD), torch.empty_like(w2_EDF), torch.empty_like(x_RD)

    @torch.no_grad()
    def forward(x_BSD: Tensor) -> Tensor:
        for e in range(shape.E):
            own = slice(e * N, (e + 1) * N)
            torch.mm(x_RD[own], w13_EGD[e].T, out=pre_RG[own])
            torch.mm(hidden_RF[own], w2_EDF[e].T, out=y_RD[own])
        for e in range(shape.E):
            own = slice(e * N, (e + 1) * N)
            torch.mm(y_RD[own], w2_EDF[e], out=grad_RF[own])
            torch.mm(y_RD[own].T, hidden_RF[own], out=grad_w2[e])
            torch.mm(pre_RG[own].T, x_RD[own], out=grad_w13[e])
            torch.mm(pre_RG[own], w13_EGD[e], out=grad_x_RD[own])
        return grad_x_RD

    return Contender(forward, None)
