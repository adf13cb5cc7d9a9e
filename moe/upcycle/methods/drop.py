"""Drop-Upcycling: copies of which a share of the neurons is drawn anew."""

from __future__ import annotations

from ...config import ModelConfig
from ..choices import ByChance, Recent, Renewed
from ..copies import Copies
from ..experts import Ffn, axis_of, width_of
from ..options import UpcycleOptions


class Drop(Copies):
    """Nakamura et al., arXiv 2502.19261. Of each expert, reinit_ratio of the neurons is drawn from N(mean, std) of what they
    replace, each matrix by its own.

    One set of neurons serves all three matrices, as in the paper. The released code draws three (`per_matrix`), which leaves
    (1 - r)^3 of the neurons whole and not 1 - r. It also shuffles each expert's neurons, which changes nothing. A neuron's bias
    is drawn with its row; the bias of the down projection, which is of no neuron, stays.
    """

    name = "drop"

    def vary(self, expert: Ffn, name: str, options: UpcycleOptions, recent: Recent) -> Ffn:
        width, seed = width_of(expert), options.seed
        count = round(options.reinit_ratio * width)
        if not count:
            return expert
        changed = dict(expert)
        for which, matrix in expert.items():
            axis = axis_of(which)
            if axis is None:
                continue
            label = f"{name}.{which.removesuffix('_bias')}" if options.per_matrix else name
            choice = ByChance(width, 0, 0, count, seed, f"{label}.drop", recent)
            changed[which] = Renewed(matrix, choice, axis, seed, f"{name}.{which}")
        return changed

    def gap(self, options: UpcycleOptions, dense: ModelConfig) -> str | None:
        r = options.reinit_ratio
        if not r:
            return None
        whole = (1 - r) ** dense.ffn_matrices if options.per_matrix else 1 - r
        seen = "KL(dense || MoE) was about 0.14 at reinit_ratio 0.5 in a small random model, 0.26 with per_matrix"
        return f"of each expert's neurons, {100 * whole:g} % stay whole" + (f"; {seen}" if dense.ffn_gate else "")
