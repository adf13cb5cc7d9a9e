"""The door through which tokens travel to their experts and back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels.backend import Backend
from ..kernels.sort_tokens import sort_tokens


@dataclass(frozen=True)
class Pieces:
    """How the tokens of a layer are cut: into `units`, of which rows travel in `forward` exchanges each way, and their gradients
    in `backward` ones. Experts compute on one unit after the other, both ways.

    Units are as many as the larger number says; in the other direction an exchange takes several neighbouring ones.

    Raises:
        ValueError: a number below 1, or two of which neither divides the other.
    """

    forward: int = 1
    backward: int = 1

    def __post_init__(self) -> None:
        few, many = sorted((self.forward, self.backward))
        if few < 1 or many % few:
            what = f"{self.forward} pieces forward and {self.backward} backward"
            raise ValueError(f"{what}: there must be at least 1, and one number must divide the other")

    @property
    def units(self) -> int:
        return max(self.forward, self.backward)

    @staticmethod
    def of(pieces: int | Pieces) -> Pieces:
        """One number is that of both directions."""
        return pieces if isinstance(pieces, Pieces) else Pieces(pieces, pieces)

    def __str__(self) -> str:
        return str(self.forward) if self.forward == self.backward else f"{self.forward} forward, {self.backward} backward"


@dataclass(frozen=True)
class DispatchPlan:
    """Which tokens go to which experts: a routing without its losses, and the order of its rows.

    indices_TK: int64, expert of each choice. weights_TK: combine weights; differentiable. kept_TK: bool, choices that travel;
    None = all. order_R, row_TK, counts_E: see `sort_tokens`; order_R may be `cut`. kernels: back end of the row operations.
    """

    indices_TK: Tensor
    weights_TK: Tensor
    kept_TK: Tensor | None
    order_R: Tensor
    row_TK: Tensor
    counts_E: Tensor
    kernels: Backend = "auto"

    def cut(self, rows: int) -> DispatchPlan:
        """The plan without rows for choices that are not kept. rows: those that are, which the host must know: counts_E.sum()."""
        return replace(self, order_R=self.order_R[:rows])


def make_plan(
    indices_TK: Tensor, weights_TK: Tensor, num_experts: int, kept_TK: Tensor | None = None, kernels: Backend = "auto"
) -> DispatchPlan:
    """Sort the choices by expert, within an expert by (token, k)."""
    order_R, row_TK, counts_E = sort_tokens(indices_TK, num_experts, kept_TK, kernels)
    return DispatchPlan(indices_TK, weights_TK, kept_TK, order_R, row_TK, counts_E, kernels)


class Computing(Protocol):
    """What experts do with rows: see `moe.experts.GroupedExperts.compute`."""

    def compute(
        self, x: Tensor, counts_E: Tensor, plan: DispatchPlan | None = None, shared_TD: Tensor | None = None
    ) -> Tensor: ...


class Experts(Computing, Protocol):
    """The experts of this rank: see `moe.experts.GroupedExperts`."""

    def __call__(self, x_TD: Tensor, work: Callable[[Tensor, Experts], Tensor]) -> Tensor:
        """`work(x_TD, self)`, with the weights at hand."""
        ...

    def late(self) -> Computing:
        """The same for one call of `compute`, with weights whose gradients are computed late, in the turn of this call."""
        ...


class Shared(Protocol):
    """A computation on every token, whose result is added to the experts': the shared experts."""

    def __call__(self, x_TD: Tensor) -> Tensor: ...


class Flight(ABC):
    """Tokens under way to their experts. travels: whether they leave this rank."""

    travels = True

    @abstractmethod
    def land(self, experts: Computing) -> None:
        """Wait for what came here, compute, and send it back without waiting."""

    @abstractmethod
    def finish(self, shared_TD: Tensor | None = None) -> Tensor:
        """Wait for what comes back: y_TD of the tokens that were sent, plus `shared_TD`."""


class Dispatcher(ABC):
    """Takes tokens to their experts and brings back, for each token, the weighted sum of what its experts return.

    A way of sending is `start` and the `Flight` that it returns; it holds no parameters, and nothing between calls. Tokens are
    cut as `pieces` says, so that one unit is computed on while others travel; in backward, gradients travel so.
    """

    pieces: Pieces = Pieces()

    @abstractmethod
    def start(self, xs_TD: Sequence[Tensor], plans: Sequence[DispatchPlan]) -> Sequence[Flight]:
        """Begin to send the tokens of each of the `pieces.units`. Every rank calls it. Differentiable."""

    def __call__(
        self,
        x_TD: Tensor,
        plan: DispatchPlan,
        experts: Experts,
        shared: Shared | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Tensor:
        """y_TD[t] = sum over the kept choices k of weights_TK[t, k] * expert(x_TD[t]), + shared(x_TD)[t]. Differentiable.

        meanwhile: called once, as `shared` is, when rows are on their way and none has been waited for.
        """

        def work(x_TD: Tensor, experts: Experts) -> Tensor:
            # everything is on its way before anything is waited for
            flights = self.start(*self._cut(x_TD, plan))
            shared_TD = None if shared is None else shared(x_TD)
            if meanwhile is not None:
                meanwhile()
            for flight in flights:
                # in backward the gradients of rows travel while those of the weights are computed
                flight.land(experts.late() if flight.travels else experts)
            if len(flights) == 1:
                return flights[0].finish(shared_TD)
            y_TD = Interleave.apply(*[flight.finish() for flight in flights])
            return y_TD if shared_TD is None else y_TD + shared_TD

        return experts(x_TD, work)

    def _cut(self, x_TD: Tensor, plan: DispatchPlan) -> tuple[Sequence[Tensor], Sequence[DispatchPlan]]:
        """Token i goes with unit i % units: neighbours are alike, so that no unit gets all rows of one expert."""
        units = self.pieces.units
        if units == 1:
            return [x_TD], [plan]
        num_experts, plans = plan.counts_E.numel(), []
        for unit in (slice(first, None, units) for first in range(units)):
            kept_TK = None if plan.kept_TK is None else plan.kept_TK[unit]
            plans.append(make_plan(plan.indices_TK[unit], plan.weights_TK[unit], num_experts, kept_TK, plan.kernels))
        return [x_TD[first::units] for first in range(units)], plans


class Interleave(torch.autograd.Function):
    """Undo the cut into n units: row i of the result is row i // n of unit i % n. One copy each way, and no view of it."""

    @staticmethod
    def forward(ctx: Any, *ys_TD: Tensor) -> Tensor:
        out_TD = ys_TD[0].new_empty(sum(y.shape[0] for y in ys_TD), *ys_TD[0].shape[1:])
        ctx.units = len(ys_TD)
        for first, y_TD in enumerate(ys_TD):
            out_TD[first :: len(ys_TD)] = y_TD
        return out_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, ...]:
        return tuple(grad_TD[first :: ctx.units] for first in range(ctx.units))


class LocalDispatcher(Dispatcher):
    """All experts are on this rank."""

    def start(self, xs_TD: Sequence[Tensor], plans: Sequence[DispatchPlan]) -> Sequence[Flight]:
        return [_AtHome(x_TD, plan) for x_TD, plan in zip(xs_TD, plans, strict=True)]


class _AtHome(Flight):
    travels = False

    def __init__(self, x_TD: Tensor, plan: DispatchPlan):
        self.x_TD, self.plan = x_TD, plan

    def land(self, experts: Computing) -> None:
        self.experts = experts

    def finish(self, shared_TD: Tensor | None = None) -> Tensor:
        return self.experts.compute(self.x_TD, self.plan.counts_E, self.plan, shared_TD)
