"""The function of the gate: act(gate) * up."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Activation = Literal["silu", "gelu_tanh"]
NAMES = ("silu", "gelu_tanh")


def check_activation(op: str, activation: str) -> None:
    """Raise ValueError for an unknown name."""
    if activation not in NAMES:
        raise ValueError(f"{op}: activation {activation!r} is none of {', '.join(map(repr, NAMES))}")


def act(gate: Tensor, activation: Activation = "silu") -> Tensor:
    """silu: x sigmoid(x) (Shazeer, arXiv 2002.05202, SwiGLU). gelu_tanh: GELU by its tanh formula (Hendrycks & Gimpel, arXiv
    1606.08415, section 2). Any shape; a new tensor of x's dtype."""
    return F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")


def act_backward(grad: Tensor, gate: Tensor, out: Tensor, activation: Activation = "silu") -> None:
    """Write the gradient of `gate` for the gradient `grad` of `act(gate)` into `out`, without autograd."""
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(grad, gate, grad_input=out)
    else:
        torch.ops.aten.gelu_backward.grad_input(grad, gate, approximate="tanh", grad_input=out)
