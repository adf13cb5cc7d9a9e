"""Drop-Upcycling: copies of which a share of the neurons is drawn anew."""

from __future__ import annotations

from ..choices import ByChance, Recent, Renewed
from ..copies import Copies
from ..experts import Ffn, axis_of
from ..options import UpcycleOptions


class Drop(Copies):
    """Nakamura et al., arXiv 2502.19261. Of each expert, reinit_ratio of the neurons is drawn from N(mean, std) of what they
    replace, each matrix by its own.

    One set of neurons serves all three matrices, as in the paper. The released code draws three (`per_matrix`), which leaves
    (1 - r)^3 of the neurons whole and not 1 - r. It also shuffles each expert's neurons, which changes nothing.
    """

    name = "drop"

    def vary(self, expert: Ffn, name: str, options: UpcycleOptions, recent: Recent) -> Ffn:
        width, seed = expert["gate"].num_rows, options.seed
        count = round(options.reinit_ratio * width)
        if not count:
            return expert
        changed = {}
        for which, matrix in expert.items():
            label = f"{name}.{which}" if options.per_matrix else name
            choice = ByChance(width, 0, 0, count, seed, f"{label}.drop", recent)
            changed[which] = Renewed(matrix, choice, axis_of(which), seed, f"{name}.{which}")
        return changed

    def gap(self, options: UpcycleOptions) -> str | None:
        r = options.reinit_ratio
        if not r:
            return None
        whole = (1 - r) ** 3 if options.per_matrix else 1 - r
        return (
            f"of each expert's neurons, {100 * whole:g} % stay whole; KL(dense || MoE) was about 0.14 at reinit_ratio 0.5 in a "
            "small random model, 0.26 with per_matrix"
        )
