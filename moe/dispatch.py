"""The door through which tokens travel to their experts and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..kernels.backend import Backend
from ..kernels.permute import permute, unpermute
from ..kernels.sort_tokens import sort_tokens


@dataclass(frozen=True)
class DispatchPlan:
    """Which tokens go to which experts: a routing without its losses, and the order of its rows.

    indices_TK: int64, expert of each choice. weights_TK: combine weights; differentiable. kept_TK: bool, choices that travel;
    None = all. order_R, row_TK, counts_E: see `sort_tokens`. kernels: back end of the row operations.
    """

    indices_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor | None
    order_R: Tensor
    row_TK: Tensor
    counts_E: Tensor
    kernels: Backend = "auto"


def make_plan(
    indices_TK: Tensor, weights_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None, kernels: Backend = "auto"
) -> DispatchPlan:
    """Sort the choices by expert, within an expert by (token, k)."""
    order_R, row_TK, counts_E = sort_tokens(indices_TK, num_experts, kept_TK, kernels)
    return DispatchPlan(indices_TK, weights_TK, kept_TK, order_R, row_TK, counts_E, kernels)


class Experts(Protocol):
    """What computes on rows: see `moe.experts.GroupedExperts`."""

    def __call__(
        self, x: Tensor, counts_E: Tensor, plan: DispatchPlan | None = None, shared_TD: Tensor | None = None
    ) -> Tensor: ...


class Shared(Protocol):
    """A computation on every token, whose result is added to the experts': the shared experts."""

    def __call__(self, x_TD: Tensor) -> Tensor: ...


class Dispatcher(Protocol):
    """Takes tokens to their experts and brings back, for each token, the weighted sum of what its experts return.

    Calls `experts` itself, so that it may cut the work into pieces and overlap them with the wire. Holds no parameters, and
    nothing between calls.
    """

    def __call__(self, x_TD: Tensor, plan: DispatchPlan, experts: Experts, shared: Shared | None = None) -> Tensor:
        """y_TD[t] = sum over the kept choices k of weights_TK[t, k] * expert(x_TD[t]), + shared(x_TD)[t]. Differentiable."""
        ...


class LocalDispatcher:
    """All experts are on this rank."""

    def __call__(self, x_TD: Tensor, plan: DispatchPlan, experts: Experts, shared: Shared | None = None) -> Tensor:
        return experts(x_TD, plan.counts_E, plan, None if shared is None else shared(x_TD))


@dataclass(frozen=True)
class Dispatched:
    """What reached this rank's experts.

    rows_XD: rows for this rank's experts, sorted by expert, within an expert by (source rank, token, k).
    counts_L: int64, rows of each local expert.
    state: what `combine` needs; meaningful to the dispatcher that made it.
    """

    rows_XD: Tensor
    counts_L: Tensor
    state: object = None


class RowDispatcher:
    """A dispatcher that sends one row for each kept choice. A way of sending is `dispatch` and `combine`."""

    def __call__(self, x_TD: Tensor, plan: DispatchPlan, experts: Experts, shared: Shared | None = None) -> Tensor:
        rows_RD = permute(x_TD, plan.order_R, plan.row_TK, plan.kept_TK, plan.kernels)
        sent = self.dispatch(rows_RD, plan.counts_E)
        rows_XD = experts(sent.rows_XD, sent.counts_L)
        rows_RD = self.combine(rows_XD, sent)
        shared_TD = None if shared is None else shared(x_TD)
        return unpermute(rows_RD, plan.weights_TK, plan.order_R, plan.row_TK, plan.kept_TK, shared_TD, plan.kernels)

    def dispatch(self, rows_RD: Tensor, counts_E: Tensor) -> Dispatched:
        """Send rows [R, D] sorted by expert, counts_E [E] of them for each (rows beyond the sum stay). Differentiable."""
        raise NotImplementedError

    def combine(self, rows_XD: Tensor, dispatched: Dispatched) -> Tensor:
        """Bring the experts' rows back: [R, D] in the order they were given to `dispatch`. Differentiable."""
        raise NotImplementedError
