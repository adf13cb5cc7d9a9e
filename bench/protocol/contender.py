"""What is measured: one problem, and everybody who solves it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .shapes import Routing, Shape, route

Named = Mapping[str, Tensor]
Raw = tuple[Tensor | None, ...]
Kind = Literal["ours", "peer", "bound"]


@dataclass(frozen=True)
class Problem:
    """Inputs of one layer, the same memory for every contender; nobody may write to it.

    x_TD, direction_TD: tokens, and the gradient of the output; w13_E2FD, w2_EDF: weights; all in `dtype` on `device`.
    indices_TK, weights_TK: the routing (int64, fp32), see `shapes.route`.
    """

    shape: Shape
    x_TD: Tensor
    indices_TK: Tensor
    weights_TK: Tensor
    w13_E2FD: Tensor
    w2_EDF: Tensor
    dtype: torch.dtype
    device: torch.device
    direction_TD: Tensor

    def leaves(self) -> dict[str, Tensor]:
        """Inputs that get gradients, by the name of the gradient: new leaves on the same memory, so that nothing is copied.

        dX, dW13, dW2 and dS, in this order; no dS where rows come in expert order (`grouped`), since nothing is weighted then.
        """
        inputs = {"dX": self.x_TD, "dW13": self.w13_E2FD, "dW2": self.w2_EDF}
        if not self.shape.grouped:
            inputs["dS"] = self.weights_TK
        return {name: x.detach().requires_grad_() for name, x in inputs.items()}


def make_problem(shape: Shape, routing: Routing, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Problem:
    """Tokens and directions from N(0, 0.2^2), weights from N(0, 0.02^2): with zeros or constants tensor cores run faster."""
    device = torch.device(device)
    generator = torch.Generator(device).manual_seed(seed)

    def normal(std: float, *size: int) -> Tensor:
        return torch.randn(size, dtype=dtype, device=device, generator=generator).mul_(std)

    T, H, F, E = shape.T, shape.H, shape.F, shape.E
    indices_TK, weights_TK = route(shape, routing, seed, device)
    x_TD, direction_TD = normal(0.2, T, H), normal(0.2, T, H)
    w13_E2FD, w2_EDF = normal(0.02, E, 2, F, H), normal(0.02, E, H, F)
    return Problem(shape, x_TD, indices_TK, weights_TK, w13_E2FD, w2_EDF, dtype, device, direction_TD)


@dataclass(frozen=True)
class Contender:
    """One way to compute something. All inputs exist before the first call, and no call changes them.

    forward: computes the outputs by name; records a graph for `backward` where there is one.
    backward: (outputs of forward, keep the graph) -> gradients in the contender's own layout; None = forward only.
    gradients: from what backward returned to gradients by name in our layout (dX [T, D], dW13 [E, 2, F, D], dW2 [E, D, F],
        dS [T, K], ...), for comparison; never timed. None = the order of `leaves`.
    leaves: what gets gradients, by the name of the gradient (any number of tensors, in the contender's own layout).
    kind: "ours" must pass its checks or the benchmark ends with an error; a "peer" that fails them is shown as refused; a
        "bound" computes something else of the same size, is not checked, and is never the best contender.
    note: shown in the table. why_absent: the reason why it cannot run here; nothing is called then.
    """

    name: str
    forward: Callable[[], Named] | None = None
    backward: Callable[[Named, bool], Raw] | None = None
    gradients: Callable[[Raw], Named] | None = None
    leaves: Mapping[str, Tensor] | None = None
    kind: Kind = "peer"
    note: str = ""
    why_absent: str | None = None

    def __post_init__(self) -> None:
        if (self.forward is None) == (self.why_absent is None):
            raise ValueError(f"contender '{self.name}' needs either a forward or the reason why it is absent")

    def named_gradients(self, raw: Raw) -> dict[str, Tensor]:
        """What backward returned, by name in our layout."""
        named = self.gradients(raw) if self.gradients is not None else dict(zip(self.leaves or {}, raw, strict=True))
        return {name: grad for name, grad in named.items() if grad is not None}


def absent(name: str, why: str) -> Contender:
    """A contender that cannot run here: a package is missing, there is no GPU, a dtype is not taken."""
    return Contender(name, why_absent=why)


def by_autograd(
    name: str,
    forward: Callable[[], Tensor | Named],
    leaves: Mapping[str, Tensor],
    direction: Tensor,
    *,
    gradients: Callable[[Raw], Named] | None = None,
    kind: Kind = "peer",
    note: str = "",
) -> Contender:
    """The usual contender: `forward` computes "out" from `leaves` (and perhaps more, by name), and autograd differentiates it.

    direction: the gradient of "out", of its shape and dtype.
    """
    inputs = tuple(leaves.values())

    def run() -> Named:
        outputs = forward()
        return {"out": outputs} if isinstance(outputs, Tensor) else outputs

    def backward(outputs: Named, keep_graph: bool) -> Raw:
        return torch.autograd.grad(outputs["out"], inputs, direction, retain_graph=keep_graph, allow_unused=True)

    return Contender(name, run, backward, gradients, leaves, kind, note)
