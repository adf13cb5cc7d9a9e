"""Larger models from trained ones: deeper by repeating layers, wider by repeating neurons."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..config import ModelConfig
from ..errors import ConfigError, Problem
from ..hf.matrix import Joined, Matrix, Scaled, Stacked

_LAYER = re.compile(r"layers\.(\d+)\.(.*)")
_FFN = re.compile(r"layers\.\d+\.(ffn|moe\.shared|moe\.experts\.\d+)\.(gate|up|down|gate_bias|up_bias)")


def stack_depth(config: ModelConfig, parts: Mapping[str, Matrix], times: int) -> tuple[ModelConfig, dict[str, Matrix]]:
    """The whole sequence of layers `times` times over: layer i becomes layers i, i + L, i + 2 L, ...

    G_stack of Du et al., arXiv 2405.15319 (best with 4, they found). It changes what the model computes; train on.
    Raises ConfigError for times < 1 and where a repeated layer would have to be dense, but the config makes it MoE, or the
    other way round.
    """
    _check_times("stack_depth", times)
    L = config.num_layers
    deeper = replace(config, num_layers=L * times)
    for i in range(L * times):
        if deeper.is_moe_layer(i) != config.is_moe_layer(i % L):
            kinds = ("dense", "MoE") if deeper.is_moe_layer(i) else ("MoE", "dense")
            what = (
                f"is {times}, but layer {i} would repeat the {kinds[0]} layer {i % L}, and dense_prefix_layers = "
                f"{config.dense_prefix_layers} with moe_every = {config.moe_every} makes it {kinds[1]}; stack before upcycling"
            )
            raise ConfigError([Problem("stack_depth.times", what)])
    out: dict[str, Matrix] = {name: m for name, m in parts.items() if not _LAYER.fullmatch(name) and not name.startswith("head.")}
    for copy in range(times):
        for name, matrix in parts.items():
            if found := _LAYER.fullmatch(name):
                out[f"layers.{int(found[1]) + copy * L}.{found[2]}"] = matrix
    return deeper, out | {name: matrix for name, matrix in parts.items() if name.startswith("head.")}


def widen_ffn(
    config: ModelConfig, parts: Mapping[str, Matrix], times: int, shares: Sequence[float] | None = None
) -> tuple[ModelConfig, dict[str, Matrix]]:
    """Every FFN, dense or of an expert, `times` as wide: neurons are repeated, with their biases, and outputs shared out. Exact.

    Net2WiderNet (Chen et al., arXiv 1511.05641); a gated FFN takes it as it is, since a neuron's row of gate and of up are
    repeated together.
    shares: of a neuron's output for each copy, summing to 1; None = all equal. Copies with equal shares get equal
    gradients and stay copies for ever, so train with unequal ones, or add noise.
    Raises ConfigError for times < 1 and shares that do not fit.
    """
    _check_times("widen_ffn", times)
    parts_of_1 = [1 / times] * times if shares is None else list(shares)
    if len(parts_of_1) != times or not abs(sum(parts_of_1) - 1) < 1e-9:
        what = f"is {parts_of_1}, but must be {times} numbers that sum to 1"
        raise ConfigError([Problem("widen_ffn.shares", what)])
    moe = config.moe
    if moe is not None:
        shared_dim = None if moe.shared_dim is None else moe.shared_dim * times
        moe = replace(moe, expert_dim=moe.expert_dim * times, shared_dim=shared_dim)
    width = None if config.dense_ffn_dim is None else config.dense_ffn_dim * times
    out: dict[str, Matrix] = {}
    for name, matrix in parts.items():
        if not (found := _FFN.fullmatch(name)):
            out[name] = matrix
        elif found[2] == "down":
            out[name] = Joined(tuple(Scaled(matrix, share) for share in parts_of_1))
        else:
            out[name] = Stacked((matrix,) * times)
    return replace(config, moe=moe, dense_ffn_dim=width), out


def _check_times(function: str, times: int) -> None:
    if times < 1:
        raise ConfigError([Problem(f"{function}.times", f"is {times}, but must be at least 1")])
