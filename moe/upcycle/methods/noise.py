"""Copies with noise on a share of their weights."""

from __future__ import annotations

from ...config import ModelConfig
from ...hf.matrix import Normal, WeightedSum
from ..choices import Recent
from ..copies import Copies
from ..experts import Ffn
from ..options import UpcycleOptions


class Noise(Copies):
    """As OLMoE's upcycling experiment does (arXiv 2409.02060): N(0, noise_std) on noise_share of the single weights;
    biases stay."""

    name = "noise"

    def vary(self, expert: Ffn, name: str, options: UpcycleOptions, recent: Recent) -> Ffn:
        std, share = options.noise_std, options.noise_share
        if not (std and share):
            return expert
        return dict(expert) | {
            which: WeightedSum(
                (
                    matrix,
                    Normal(matrix.shape, std, options.seed, f"{name}.{which}.noise", share=share, of_dtype=matrix.dtype),
                ),
                (1.0, 1.0),
            )
            for which, matrix in expert.items()
            if not which.endswith("_bias")
        }

    def gap(self, options: UpcycleOptions, dense: ModelConfig) -> str | None:
        std, share = options.noise_std, options.noise_share
        if not (std and share):
            return None
        return f"{100 * share:g} % of the experts' weights have noise of std {std:g} added"
