"""Shapes of published models, routings of their tokens, and the least work each part of a layer can do.

Symbols: T tokens of width H, R = T * K routed rows, E experts of hidden width F. Tensors' names use the suffixes of the
product, where the width is D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

Routing = Literal["balanced", "zipf", "hot", "empty"]
ROUTINGS: tuple[Routing, ...] = get_args(Routing)
Pass = Literal["fwd", "bwd", "fwd+bwd"]
PASSES: tuple[Pass, ...] = get_args(Pass)

HOT_SHARE = 0.25
"""Share of all rows that the "hot" routing sends to one expert."""


@dataclass(frozen=True)
class Shape:
    """T tokens of width H, E experts of hidden width F, K of them for each token. grouped: rows come in expert order, K is 1."""

    name: str
    T: int
    H: int
    F: int
    E: int
    K: int
    grouped: bool = False

    @property
    def R(self) -> int:
        return self.T * self.K

    def __str__(self) -> str:
        return f"{self.name}: T{self.T} H{self.H} F{self.F} E{self.E} K{self.K}"


SHAPES: tuple[Shape, ...] = (
    Shape("A", 32768, 2048, 768, 128, 8),  # Qwen3-30B-A3B
    Shape("B", 32768, 2048, 1024, 64, 8),  # OLMoE-1B-7B
    Shape("C", 16384, 4096, 14336, 8, 2),  # Mixtral-8x7B
    Shape("D", 8192, 7168, 2048, 256, 8),  # DeepSeek-V3
    Shape("E", 32768, 2880, 2880, 32, 4),  # gpt-oss-20b: a width that is no multiple of 128
    Shape("F", 32768, 2048, 512, 512, 10),  # Qwen3-Next-80B-A3B: K is no power of two
    Shape("G", 32768, 4096, 1024, 128, 8),  # the default of SonicMoE's benchmark
)
TINY = Shape("tiny", 24, 32, 16, 4, 2)
"""For smoke runs on a CPU."""
SMALL = Shape("small", 2048, 512, 256, 8, 2)
"""For smoke runs on a GPU: large enough that rounding in bf16 averages out, and the margin of the check means something."""

SWEEP_T = (1024, 2048, 4096, 8192, 16384, 32768)
"""Tokens of the sweep over shape A."""


def shape_named(name: str) -> Shape:
    """The shape of that name, "tiny" and "small" among them.

    Raises:
        ValueError: there is none; the message lists what there is.
    """
    for shape in (*SHAPES, TINY, SMALL):
        if shape.name == name:
            return shape
    raise ValueError(f"no shape '{name}'; there are {', '.join(s.name for s in (*SHAPES, TINY, SMALL))}")


def sweep(shape: Shape, tokens: Sequence[int] = SWEEP_T) -> list[Shape]:
    """The same layer with other numbers of tokens, named `A-4096`; the shape itself where its T is asked for."""
    return [shape if T == shape.T else replace(shape, name=f"{shape.name}-{T}", T=T) for T in tokens]


def expert_parallel_view(shape: Shape, ranks: int = 8) -> Shape:
    """What one of `ranks` ranks computes: E / ranks experts on R / ranks rows that arrive in expert order.

    Raises:
        ValueError: ranks do not divide the experts and rows.
    """
    if shape.E % ranks or shape.R % ranks:
        raise ValueError(f"{shape}: {ranks} ranks do not divide {shape.E} experts and {shape.R} rows")
    return Shape(f"{shape.name}-ep{ranks}", shape.R // ranks, shape.H, shape.F, shape.E // ranks, 1, grouped=True)


def route(shape: Shape, routing: Routing, seed: int = 0, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """(indices_TK int64, weights_TK fp32): K different experts for each token, and positive weights that sum to about 1.

    balanced: every set of K experts is equally likely. zipf: experts are drawn with probabilities 1, 1/2, 1/3, ... (in random
    order of the experts), without replacement. hot: one expert gets HOT_SHARE of all rows, or every token once where that is less
    (1 / K of the rows, since a token's experts differ). empty: an eighth of the experts, at least one, gets nothing.

    Drawn on the CPU, so that a seed gives the same routing on every machine. The weights are values that bf16 holds exactly, so
    that a contender that keeps them in bf16 loses nothing by that. With `shape.grouped` rows are sorted by expert and weigh 1.

    Raises:
        ValueError: an unknown routing, or one that leaves a token fewer than K experts.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"no routing '{routing}'; there are {', '.join(ROUTINGS)}")
    T, E, K = shape.T, shape.E, shape.K
    generator = torch.Generator().manual_seed(seed)
    experts_E = torch.randperm(E, generator=generator)
    # the K largest of log p + Gumbel noise are a draw of K without replacement
    noise_TE = -torch.log(-torch.log(torch.rand(T, E, generator=generator).clamp_(1e-7, 1 - 1e-7)))
    log_p_E = torch.zeros(E)
    if routing == "zipf":
        log_p_E[experts_E] = -torch.log(torch.arange(1, E + 1, dtype=torch.float32))
    elif routing == "empty":
        empty = max(1, E // 8)
        if E - empty < K:
            raise ValueError(f"{shape}: {K} different experts are left to no token when {empty} of {E} are empty")
        log_p_E[experts_E[:empty]] = -torch.inf
    scores_TE = noise_TE + log_p_E
    if routing == "hot":
        hot, rows = experts_E[0], min(T, round(HOT_SHARE * shape.R))
        scores_TE[:, hot] = -torch.inf
        scores_TE[torch.randperm(T, generator=generator)[:rows], hot] = torch.inf
    indices_TK = scores_TE.topk(K, dim=-1).indices
    weights_TK = torch.softmax(torch.randn(T, K, generator=generator), -1).bfloat16().float()
    if shape.grouped:
        indices_TK, weights_TK = indices_TK.sort(dim=0).values, torch.ones(T, K)
    return indices_TK.to(device), weights_TK.to(device)


def rows_max_over_mean(indices_TK: Tensor, num_experts: int) -> float:
    """Rows of the fullest expert, over the mean of all experts."""
    counts_E = torch.bincount(indices_TK.flatten(), minlength=num_experts)
    return float(counts_E.max()) * num_experts / max(indices_TK.numel(), 1)
