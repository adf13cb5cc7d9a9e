"""One dense FFN cut into all experts, by chance or by which neurons belong together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...checks import raise_if
from ...config import ModelConfig
from ...errors import Problem
from ...hf.matrix import Matrix
from ..choices import ByChance, Choice, Recent
from ..cluster import Clusters, InCluster
from ..experts import Ffn, expert_parts, padded, router_parts, scaled, shared_parts, sizes_of, take
from ..method import Method, Models, joined, moe_model, one_model, placement_gap, zero_router
from ..options import UpcycleOptions
from ..router_init import router
from ..sizes import Sizes, find_sizes, output_scale


class Split(Method):
    """MoEfication (Zhang et al., arXiv 2110.01786) and LLaMA-MoE (Zhu et al., arXiv 2406.16554): each neuron is in one expert.

    The experts sum to the dense FFN, so all of them with equal weights are exact, and fewer are not. Outputs are scaled so that
    they are right on average if every expert is as likely to be chosen.
    """

    name = "split"

    def plan(self, dense: Models, options: UpcycleOptions) -> ModelConfig:
        model, N, problems = one_model(dense, self.name), options.num_experts or 0, []
        if N < 2:
            problems.append(Problem("upcycle.num_experts", f"is {N}, but an FFN is split into at least 2"))
        if options.pieces != N:
            what = f"is {options.granularity}, but split makes one copy of num_experts = {N} pieces; leave it out, or use "
            problems.append(Problem("upcycle.granularity", what + "virtual_groups for several copies"))
        raise_if(problems)
        return moe_model(model, options, find_sizes(model, options), N)

    def exact(self, dense: Models, options: UpcycleOptions) -> str | None:
        model = one_model(dense, self.name)
        self.plan(model, options)
        N, K = options.num_experts or 0, options.top_k
        weights = None
        if K < N:
            weights = f"a token sees {K} of {N} pieces of the FFN, {100 * K / N:.3g} % of the split neurons; exact is top_k = {N}"
            weights += " with router_init = 'zeros'"
        elif not zero_router(options):
            weights = "pieces are weighed differently by the router; exact is router_init = 'zeros'"
        return joined(placement_gap(options, N, gated=model.ffn_gate), weights)

    def layer(self, index: int, ffn: Sequence[Ffn], options: UpcycleOptions, config: ModelConfig) -> dict[str, Matrix]:
        dense, N = ffn[0], options.num_experts or 0
        sizes, factor = sizes_of(dense, options, config), output_scale(options, N)
        parts = router_parts(index, router(index, options, config.dim, N, 1), options)
        for e, expert in enumerate(_pieces(index, dense, options, sizes)):
            expert = scaled(expert, options, factor, has_bias=not sizes.shared[1])
            parts |= expert_parts(index, e, padded(expert, sizes.expert_dim))
        return parts | shared_parts(index, dense, options, sizes)


def _pieces(layer: int, dense: Ffn, options: UpcycleOptions, sizes: Sizes) -> list[Ffn]:
    (first, last), name = sizes.routed, f"layers.{layer}.moe.split"
    if options.split_by == "random":
        recent = Recent()
        chosen: list[Choice] = [
            ByChance(last - first, first, start - first, stop - first, options.seed, name, recent) for start, stop in sizes.pieces
        ]
    else:
        recorded = options.activations_of(layer)
        path = None if recorded is None else Path(recorded)
        counts = tuple(stop - start for start, stop in sizes.pieces)
        clusters = Clusters(dense.get("gate", dense["up"]), path, first, counts, options.kmeans_steps, options.seed, name)
        chosen = [InCluster(clusters, k) for k in range(len(counts))]
    return [take(dense, choice) for choice in chosen]
