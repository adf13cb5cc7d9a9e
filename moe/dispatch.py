"""The door through which rows travel to their experts and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Dispatched:
    """What a dispatcher delivers.

    rows_XD: rows for this rank's experts, sorted by expert, within an expert by (source rank, token, k).
    counts_L: int64, rows of each local expert.
    state: what `combine` needs; meaningful to the dispatcher that made it.
    """

    rows_XD: Tensor
    counts_L: Tensor
    state: object = None


class Dispatcher(Protocol):
    """Carries rows to the ranks of their experts and back. Holds no parameters and nothing between the two calls."""

    def dispatch(self, rows_RD: Tensor, counts_E: Tensor) -> Dispatched:
        """Send rows [R, D] sorted by expert, counts_E [E] of them for each (rows beyond the sum stay). Differentiable."""
        ...

    def combine(self, rows_XD: Tensor, dispatched: Dispatched) -> Tensor:
        """Bring the experts' rows back: [R, D] in the order they were given to `dispatch`. Differentiable."""
        ...


class LocalDispatcher:
    """All experts are on this rank."""

    def dispatch(self, rows_RD: Tensor, counts_E: Tensor) -> Dispatched:
        return Dispatched(rows_RD, counts_E)

    def combine(self, rows_XD: Tensor, dispatched: Dispatched) -> Tensor:
        return rows_XD
