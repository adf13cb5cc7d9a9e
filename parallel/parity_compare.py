"""The difference between one process and a layout, figure by figure and tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .parity import Arrays, Piece, RankTrace, Trace, assemble


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of one quantity over all steps, and where it is."""

    quantity: str
    worst: float
    where: str

    def to_dict(self) -> dict[str, Any]:
        return {"quantity": self.quantity, "worst_relative_difference": self.worst, "where": self.where}


def relative(reference: np.ndarray | float, got: np.ndarray | float) -> float:
    """Largest |difference| divided by the largest |reference| (by 1 where the reference is all zero)."""
    ref, other = np.asarray(reference, dtype=float), np.asarray(got, dtype=float)
    scale = float(np.abs(ref).max(initial=0.0)) or 1.0
    difference = float(np.abs(ref - other).max(initial=0.0)) / scale
    return difference if np.isfinite(difference) else float("inf")


def _worst(quantity: str, pairs: list[tuple[str, Any, Any]]) -> Difference:
    scored = [(relative(a, b), where) for where, a, b in pairs]
    worst, where = max(scored, default=(0.0, "nothing to compare"))
    return Difference(quantity, worst, where)


def compare(reference: Trace, ranks: list[RankTrace]) -> list[Difference]:
    """Compare a layout with one process: loss, norm, auxiliary terms, counts, gradients, weights, biases, and the ranks'
    agreement."""
    differences, disagreement = [], [(0.0, "all ranks agree")]
    for quantity in ("loss", "grad_norm", "balance", "z", "counts", "dropped"):
        pairs = []
        for index, rank in enumerate(ranks):
            mine, theirs = getattr(reference, quantity), getattr(rank.figures, quantity)
            if len(mine) != len(theirs):
                raise ValueError(f"{quantity}: one process has {len(mine)} steps, rank {index} has {len(theirs)}")
            pairs += [(f"step {s}, rank {index}", a, b) for s, (a, b) in enumerate(zip(mine, theirs, strict=True))]
        differences.append(_worst(quantity, pairs))
    pairs = []
    for step, gradients in enumerate(reference.gradients):
        for name, value in gradients.items():
            whole, gap = assemble([r.gradients[step][name] for r in ranks])
            pairs.append((f"{name}, step {step}", value, whole))
            disagreement.append((gap, f"gradient of {name}, step {step}"))
    differences.append(_worst("gradient", pairs))
    pairs = []
    for name, value in reference.weights.items():
        whole, gap = assemble([r.weights[name] for r in ranks])
        pairs.append((name, value, whole))
        disagreement.append((gap, f"weight {name}"))
    differences.append(_worst("update", pairs))
    biases = [(f"{n}, rank {i}", v, r.figures.biases[n]) for n, v in reference.biases.items() for i, r in enumerate(ranks)]
    differences.append(_worst("expert_bias", biases))
    differences.append(Difference("between_ranks", *max(disagreement)))
    return differences


def compare_tensors(quantity: str, reference: Arrays, ranks: Sequence[Mapping[str, Piece]]) -> Difference:
    """Compare logical tensors with what the pieces of all ranks make up."""
    return _worst(quantity, [(name, value, assemble([r[name] for r in ranks])[0]) for name, value in reference.items()])
