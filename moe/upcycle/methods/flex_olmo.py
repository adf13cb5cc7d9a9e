"""A public model and models trained beside it on closed data, joined so that each owner can take theirs out again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ...checks import raise_if
from ...config import ModelConfig
from ...errors import CheckpointError, ConfigError, Problem
from ...hf.matrix import Cols, Matrix, Normal, Rows, Stacked
from ..experts import Ffn, expert_parts, padded, router_parts, scaled, sizes_of
from ..method import Method, Models, moe_model, same_models
from ..options import UpcycleOptions
from ..router_init import router
from ..sizes import find_sizes


class FlexOlmo(Method):
    """FlexOlmo: Shi et al., arXiv 2507.07024. Expert 0 is the public model's FFN, frozen while owners trained the others.

    All that is not an FFN is the public model's; `check` sees to it that the others' is the same, as freezing leaves it. Router
    rows are domain embeddings (`centroids`) or normal. An owner opts out by having the expert and its row deleted: nothing
    else depends on their data.
    """

    name = "flex_olmo"
    several = True

    def plan(self, dense: Models, options: UpcycleOptions) -> ModelConfig:
        models, problems = same_models(dense, options), _without_problems(options.without, _count(dense))
        if not options.normalized and models[0].norm_order == "pre":
            what = (
                "is false, which leaves the size of the FFN's output to the number of experts; this needs a norm after it "
                "(norm_order = 'post', OLMo 2), and the model has none"
            )
            problems.append(Problem("upcycle.renormalize", what))
        kinds = {"ffn_gate": not models[0].ffn_gate, "ffn_bias": models[0].ffn_bias}
        for kind in [name for name, other in kinds.items() if other]:
            what = f"is {getattr(models[0], kind)}, but experts of this method are gated FFNs without biases; use method 'merge'"
            problems.append(Problem(f"model 0, {kind}", what))
        raise_if(problems)
        kept = len(models) - len(options.without)
        if options.top_k > kept:
            raise ConfigError([Problem("upcycle.top_k", f"is {options.top_k}, more than the {kept} experts that are left")])
        return moe_model(models[0], options, find_sizes(models[0], options), kept)

    def exact(self, dense: Models, options: UpcycleOptions) -> str | None:
        self.plan(dense, options)
        return "experts come from different models, so there is no one dense model to equal"

    def layer(self, index: int, ffn: Sequence[Ffn], options: UpcycleOptions, config: ModelConfig) -> dict[str, Matrix]:
        sizes = sizes_of(ffn[0], options, config)
        kept = [model for model in range(len(ffn)) if model not in options.without]
        parts = router_parts(index, _rows(index, options, config.dim, len(ffn), kept), options)
        for e, model in enumerate(kept):
            expert = scaled(ffn[model], options, 1 / options.scaling_factor)
            parts |= expert_parts(index, e, padded(expert, sizes.expert_dim))
        return parts

    def check(self, dense: Sequence[tuple[ModelConfig, Mapping[str, Matrix]]], options: UpcycleOptions) -> None:
        if options.trust_frozen:
            return
        config = self.plan([model for model, _ in dense], options)
        taken = {f"layers.{i}.ffn." for i in config.moe_layers}
        for model, (_, parts) in enumerate(dense[1:], start=1):
            names = [n for n in dense[0][1] if not any(n.startswith(start) for start in taken)]
            moved = [] if model in options.without else [n for n in names if not same_values(dense[0][1][n], parts[n])]
            if moved:
                listed = f"{', '.join(moved[:3])}{f' and {len(moved) - 3} more' if len(moved) > 3 else ''}"
                raise CheckpointError(
                    f"model {model} is not the public one outside of its FFNs, though these were to stay frozen: {listed}; "
                    "set trust_frozen = true to take the public model's, or use method 'merge', which averages them"
                )


def _rows(layer: int, options: UpcycleOptions, dim: int, models: int, kept: list[int]) -> Matrix:
    """Router rows of the models that are kept; each is drawn on its own, so that it does not depend on how many there are."""
    if options.router_init in ("centroids", "zeros"):
        return Rows(router(layer, options, dim, models, 1), kept)
    name = f"layers.{layer}.moe.router"
    return Stacked(tuple(Normal((1, dim), options.router_std, options.seed, f"{name}.{model}") for model in kept))


def same_values(one: Matrix, other: Matrix) -> bool:
    """Whether two matrices hold the same, compared block by block; 0 and -0 are the same, a NaN is like no other."""
    if one == other:
        return True
    return one.shape == other.shape and all(
        np.array_equal(one.rows(start, stop), other.rows(start, stop)) for start, stop in one.steps()
    )


def opt_out(config: ModelConfig, parts: Mapping[str, Matrix], without: Sequence[int]) -> tuple[ModelConfig, dict[str, Matrix]]:
    """A Mixture-of-Experts model without some of its experts: they and their router rows are deleted, the others count up anew.

    Raises ConfigError for a dense model, indices that are not there, expert 0, a router with groups, and fewer experts than
    top_k.
    """
    moe = config.moe
    if moe is None:
        raise ConfigError([Problem("model", "is dense: it has no experts that could opt out")])
    problems = _without_problems(tuple(without), moe.num_experts)
    if moe.router.num_groups > 1:
        problems.append(Problem("model.moe.router.num_groups", f"is {moe.router.num_groups}: groups would differ in size"))
    raise_if(problems)
    kept = [e for e in range(moe.num_experts) if e not in without]
    smaller = replace(config, moe=replace(moe, num_experts=len(kept)))
    out: dict[str, Matrix] = {}
    for name, matrix in parts.items():
        before, found, after = name.partition(".moe.experts.")
        expert, _, which = after.partition(".")
        if found and int(expert) in kept:
            out[f"{before}{found}{kept.index(int(expert))}.{which}"] = matrix
        elif name.endswith(".moe.router"):
            out[name] = Rows(matrix, kept)
        elif name.endswith(".moe.router_bias"):
            out[name] = Cols(matrix, kept)
        elif not found:
            out[name] = matrix
    return smaller, out


def _count(dense: Models) -> int:
    return 1 if isinstance(dense, ModelConfig) else len(dense)


def _without_problems(without: tuple[int, ...], count: int) -> list[Problem]:
    wrong = [i for i in without if not 0 < i < count]
    if wrong:
        what = f"names {wrong}, but legal are 1 to {count - 1} (0 is the public model, on which the others rest)"
        return [Problem("upcycle.without", what)]
    if len(set(without)) < len(without):
        return [Problem("upcycle.without", f"is {list(without)}, with an index twice")]
    return []
