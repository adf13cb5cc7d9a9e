"""The difference between one process and a layout, figure by figure and tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .parity import Arrays, Piece, RankTrace, Trace, assemble

TOLERANCE = 1e-9
"""Relative; float64 rounding of the small cases stays below 1e-12."""


@dataclass(frozen=True)
class Difference:
    """The largest relative difference of one quantity, and where it is.

    Over all steps; or of the first step that is off, if one is, as all later steps inherit from it.
    """

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


def _worst_of_steps(quantity: str, steps: list[list[tuple[str, Any, Any]]], tolerance: float) -> Difference:
    """The worst of all steps, or of the first step beyond the tolerance."""
    per_step = [_worst(quantity, pairs) for pairs in steps if pairs]
    off = next((d for d in per_step if not d.worst <= tolerance), None)
    return off or max(per_step, key=lambda d: d.worst, default=Difference(quantity, 0.0, "nothing to compare"))


def compare(reference: Trace, ranks: list[RankTrace], tolerance: float = TOLERANCE) -> list[Difference]:
    """Compare a layout with one process: loss, norm, auxiliary terms, counts, gradients, weights, biases, and the ranks'
    agreement."""
    differences, disagreement = [], [(0.0, "all ranks agree")]
    for quantity in ("loss", "grad_norm", "balance", "z", "counts", "dropped"):
        mine = getattr(reference, quantity)
        steps: list[list[tuple[str, Any, Any]]] = [[] for _ in mine]
        for index, rank in enumerate(ranks):
            theirs = getattr(rank.figures, quantity)
            if len(mine) != len(theirs):
                raise ValueError(f"{quantity}: one process has {len(mine)} steps, rank {index} has {len(theirs)}")
            for step, (a, b) in enumerate(zip(mine, theirs, strict=True)):
                steps[step].append((f"step {step}, rank {index}", a, b))
        differences.append(_worst_of_steps(quantity, steps, tolerance))
    steps = [[] for _ in reference.gradients]
    for step, gradients in enumerate(reference.gradients):
        for name, value in gradients.items():
            whole, gap = assemble([r.gradients[step][name] for r in ranks])
            steps[step].append((f"{name}, step {step}", value, whole))
            disagreement.append((gap, f"gradient of {name}, step {step}"))
    differences.append(_worst_of_steps("gradient", steps, tolerance))
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
