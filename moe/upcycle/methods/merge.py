"""One expert from each of several dense models, everything else averaged."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...checks import raise_if
from ...config import ModelConfig
from ...errors import Problem
from ...hf.matrix import Matrix, Mean, WeightedSum
from ..experts import Ffn, expert_parts, padded, router_parts, scaled, sizes_of
from ..method import Method, Models, moe_model, same_models
from ..options import UpcycleOptions
from ..router_init import router
from ..sizes import find_sizes, output_scale


class Merge(Method):
    """Branch-Train-MiX: Sukhbaatar et al., arXiv 2403.07816. Models trained apart from one seed; all is trained on."""

    name = "merge"
    several = True

    def plan(self, dense: Models, options: UpcycleOptions) -> ModelConfig:
        models, problems, weights = same_models(dense, options), [], options.merge_weights
        if weights and len(weights) != len(models):
            what = f"has {len(weights)} numbers, but {len(models)} models are given; one for each, or leave it out"
            problems.append(Problem("upcycle.merge_weights", what))
        if weights and not (all(map(math.isfinite, weights)) and min(weights) >= 0 and sum(weights) > 0):
            what = f"is {list(weights)}, but weights must be finite, not negative, and not all 0"
            problems.append(Problem("upcycle.merge_weights", what))
        raise_if(problems)
        return moe_model(models[0], options, find_sizes(models[0], options), len(models))

    def exact(self, dense: Models, options: UpcycleOptions) -> str | None:
        self.plan(dense, options)
        return "experts come from different models and the rest is averaged, so there is no one dense model to equal; train on"

    def layer(self, index: int, ffn: Sequence[Ffn], options: UpcycleOptions, config: ModelConfig) -> dict[str, Matrix]:
        sizes, factor = sizes_of(ffn[0], options, config), output_scale(options, len(ffn))
        parts = router_parts(index, router(index, options, config.dim, len(ffn), 1), options)
        for e, expert in enumerate(ffn):
            parts |= expert_parts(index, e, padded(scaled(expert, options, factor), sizes.expert_dim))
        return parts

    def rest(self, name: str, matrices: Sequence[Matrix], options: UpcycleOptions) -> Matrix:
        weights = options.merge_weights
        return WeightedSum(tuple(matrices), weights, float(sum(weights))) if weights else Mean(matrices)
