"""How far from the dense model a result starts, for each setting that does not keep the function.

The dense model is random and the same on every machine. Its matrices have a variance of 1 / columns, so that values keep their
size from layer to layer, and logits a variance of about 1. Trained models differ from it, which is why texts quote these figures
rounded: they are for orders of magnitude, and for comparing settings with one another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from moefold.moe.config import ModelConfig
from moefold.moe.hf.matrix import Constant, Matrix, Normal
from moefold.moe.hf.parts import part_shapes
from moefold.moe.upcycle import METHODS, UpcycleOptions, upcycle_parts

from .models import arrays_of, distance, model_of

SEED = 0
SEQUENCES, LENGTH = 8, 64
DENSE = ModelConfig(dim=64, num_layers=2, num_heads=4, vocab_size=256, max_seq_len=LENGTH, dense_ffn_dim=256)

STDS = (0.002, 0.02, 0.1)
"""Of routers whose weights are not normalised."""
_COPY = MappingProxyType({"method": "copy", "num_experts": 8, "top_k": 2})
_DROP = MappingProxyType({"method": "drop", "num_experts": 8, "top_k": 2, "reinit_ratio": 0.5})
_PIECES = MappingProxyType({"method": "virtual_groups", "num_experts": 16, "granularity": 2, "top_k": 4})


def _cut(pieces: int) -> dict[str, Any]:
    """One of two copies, cut into so many pieces, with all matrices scaled."""
    sizes = {"granularity": pieces, "num_experts": 2 * pieces, "top_k": pieces}
    return {"method": "virtual_groups", **sizes, "scale_placement": "both"}


CASES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        **{f"softmax_{std:g}": {**_COPY, "renormalize": False, "router_std": std} for std in STDS},
        **{f"sigmoid_{std:g}": {**_COPY, "renormalize": False, "router_std": std, "score": "sigmoid"} for std in STDS},
        "post_norm": {**_COPY, "renormalize": False, "router_std": 0.1},
        **{f"all_scaled_{pieces}": _cut(pieces) for pieces in (2, 4, 8)},
        "independent_rows": {**_PIECES, "router_init": "normal", "group_limited": False},
        "independent_rows_limited": {**_PIECES, "router_init": "normal"},
        "drop": _DROP,
        "drop_per_matrix": {**_DROP, "per_matrix": True},
        "noise": {"method": "noise", "num_experts": 8, "top_k": 2},
        "split_2_of_4": {"method": "split", "num_experts": 4, "top_k": 2},
        "split_weighed": {"method": "split", "num_experts": 4, "top_k": 4},
    }
)
"""Options by name. softmax, sigmoid: weights that are not normalised. post_norm: so too, where the norm comes after the FFN."""


@dataclass(frozen=True)
class Gap:
    """told: what `exact` says. kl: KL(dense || result) in nats. error: length of the logits' error by that of the logits."""

    name: str
    told: str
    kl: float
    error: float


def inexact_gaps(names: tuple[str, ...] = tuple(CASES)) -> list[Gap]:
    """Measure them; a few seconds, the same on every machine up to the rounding of sums."""
    return [gap(name, UpcycleOptions(**CASES[name], seed=SEED)) for name in names]


def gap(name: str, options: UpcycleOptions) -> Gap:
    """That of one setting; `told` is empty for one that is exact."""
    config = replace(DENSE, norm_order="post") if name == "post_norm" else DENSE
    parts = random_parts(config)
    made = upcycle_parts([(config, parts)], options)
    ids = np.random.default_rng(SEED).integers(0, config.vocab_size, (SEQUENCES, LENGTH))
    models = model_of(config, arrays_of(config, parts)), model_of(made[0], arrays_of(*made))
    kl, error = distance(*models, torch.from_numpy(ids))
    return Gap(name, METHODS[options.method].exact(config, options) or "", kl, error)


def random_parts(config: ModelConfig) -> dict[str, Matrix]:
    """Normal matrices; embeddings with a variance of 1; norms of 1."""
    parts: dict[str, Matrix] = {}
    for name, shape in part_shapes(config).items():
        std = 1.0 if name == "embed" else shape[-1] ** -0.5
        parts[name] = Constant(shape, 1.0) if len(shape) == 1 else Normal(shape, std, SEED, name)
    return parts
