"""Experts that are copies of one dense FFN, whole or cut into pieces: what several methods share."""

from __future__ import annotations

from collections.abc import Sequence

from ..checks import raise_if
from ..config import ModelConfig
from ..errors import Problem
from ..hf.matrix import Matrix
from .choices import ByChance, Recent
from .experts import Ffn, Neurons, expert_parts, padded, router_parts, scaled, shared_parts, sizes_of, take
from .method import Method, Models, joined, moe_model, one_model, placement_gap, weight_gap
from .options import UpcycleOptions
from .router_init import router
from .sizes import Sizes, find_sizes, output_scale


class Copies(Method):
    """E experts are E / G copies of the dense FFN, each cut into G pieces that are neighbours: expert c * G + g is piece g of c.

    With router rows repeated G times, a token chooses whole copies, K / G of them, with equal weights for the pieces of each;
    they sum to the dense FFN (virtual groups, He et al., arXiv 2410.07524). Scale and limits: `output_scale`.
    """

    def vary(self, expert: Ffn, name: str, options: UpcycleOptions, recent: Recent) -> Ffn:
        """What makes the expert `name` differ from the dense FFN; `recent` is for choices of neurons."""
        return expert

    def gap(self, options: UpcycleOptions, dense: ModelConfig) -> str | None:
        """Why `vary` changes the output; None where it does not."""
        return None

    def plan(self, dense: Models, options: UpcycleOptions) -> ModelConfig:
        model = one_model(dense, self.name)
        N, G, K, problems = options.num_experts or 0, options.pieces, options.top_k, []
        if N % G:
            what = f"is {N}, but copies of the FFN are cut into granularity = {G} pieces each; legal: multiples of {G}"
            problems.append(Problem("upcycle.num_experts", what))
        if K % G:
            legal = list(range(G, N + 1, G))
            what = f"is {K}, but only whole copies of granularity = {G} pieces give the dense FFN's output; legal: {legal}"
            problems.append(Problem("upcycle.top_k", what))
        if options.group_limited and not 1 < G <= K < N:
            what = f"is true, but there are no copies to choose among (granularity = {G}, top_k = {K}, num_experts = {N})"
            problems.append(Problem("upcycle.group_limited", what))
        raise_if(problems)
        limited = options.group_limited is not False and G > 1 and K < N
        return moe_model(model, options, find_sizes(model, options), N, num_groups=N // G if limited else 1)

    def exact(self, dense: Models, options: UpcycleOptions) -> str | None:
        model = one_model(dense, self.name)
        self.plan(model, options)
        N = options.num_experts or 0
        independent = None
        if options.pieces > 1 and options.router_init == "normal" and options.router_std:
            independent = (
                "router rows differ within a copy, so that its pieces weigh differently (KL(dense || MoE) was about 3e-3 in a "
                "small random model), and are chosen apart unless group_limited (about 4e-2); exact is router_init = 'repeated'"
            )
        shared = bool(find_sizes(model, options).shared[1])
        weights = None if independent else weight_gap(model, options, N, shared=shared)
        return joined(self.gap(options, model), placement_gap(options, N, gated=model.ffn_gate), independent, weights)

    def layer(self, index: int, ffn: Sequence[Ffn], options: UpcycleOptions, config: ModelConfig) -> dict[str, Matrix]:
        dense, N, G = ffn[0], options.num_experts or 0, options.pieces
        sizes, factor = sizes_of(dense, options, config), output_scale(options, N)
        parts = router_parts(index, router(index, options, config.dim, N // G, G), options)
        recent = Recent()
        for e in range(N):
            name = f"layers.{index}.moe.experts.{e}"
            expert = self.vary(take(dense, _neurons(index, e, options, sizes, recent)), name, options, recent)
            expert = scaled(expert, options, factor, has_bias=not sizes.shared[1])
            parts |= expert_parts(index, e, padded(expert, sizes.expert_dim))
        return parts | shared_parts(index, dense, options, sizes)


def _neurons(layer: int, expert: int, options: UpcycleOptions, sizes: Sizes, recent: Recent) -> Neurons:
    copy, piece = divmod(expert, options.pieces)
    start, stop = sizes.pieces[piece]
    if not options.shuffle:
        return start, stop
    first, last = sizes.routed
    name = f"layers.{layer}.moe.copies.{copy}.order"
    return ByChance(last - first, first, start - first, stop - first, options.seed, name, recent)
