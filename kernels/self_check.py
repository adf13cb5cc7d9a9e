"""Do the kernels that "auto" chooses compute what torch computes, on this machine? A small problem through every one of them.

A kernel can pass in the interpreter, compile, and still be wrong on a GPU: another compiler version, another architecture. The
check costs a few launches at the start of a run; wrong numbers would cost the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import Backend
from .moe_mlp import moe_layer_mlp, moe_mlp
from .permute import permute, unpermute
from .sort_tokens import sort_tokens
from .topk_gate import GateRule, topk_gate

T, E, K, D, F = 67, 4, 2, 80, 48
"""No size is a multiple of a tile; an expert has more rows than one tile on average."""


@dataclass(frozen=True)
class Finding:
    """How far one result of an op is from torch's: error / bound, relative to the largest value. Integers must be equal."""

    op: str
    result: str
    error: float
    bound: float

    @property
    def good(self) -> bool:
        return self.error <= self.bound


def check_kernels(device: torch.device, dtype: torch.dtype, backend: Backend = "triton") -> list[Finding]:
    """Compare every op of the layer on `backend` with the same op on torch, outputs and gradients.

    dtype: of rows and weights; the routing is in fp32. The bound is 8 units in the last place of the dtype's mantissa, and for
    fp32 sums 1e-5.
    """
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    findings: list[Finding] = []
    logits_TE = normal(T, E, dtype=torch.float32)
    rule = GateRule(top_k=K)
    gate = {"weights": lambda logits: topk_gate(logits, rule, backend=backend).weights_TK}
    findings += _compare(
        "topk_gate", gate["weights"], lambda x: topk_gate(x, rule, backend="torch").weights_TK, {"logits": logits_TE}
    )
    indices_TK = topk_gate(logits_TE, rule, backend="torch").indices_TK
    kept_TK = normal(T, K, dtype=torch.float32) < 1
    want = sort_tokens(indices_TK, E, kept_TK, "torch")
    got = sort_tokens(indices_TK, E, kept_TK, backend)
    names = ("order", "row", "counts")
    findings += [Finding("sort_tokens", n, float((a != b).sum()), 0.0) for n, a, b in zip(names, got, want, strict=True)]
    order_R, row_TK, counts_E = want
    x, weights = {"x": normal(T, D)}, {"weights": normal(T, K, dtype=torch.float32).sigmoid()}
    rows = {"rows": normal(T * K, D)}
    mlp = {"w13": normal(E, 2, F, D) * D**-0.5, "w2": normal(E, D, F) * F**-0.5}
    runs: list[tuple[str, Callable[[Backend], Callable[..., Tensor]], Mapping[str, Tensor]]] = [
        ("permute", lambda b: lambda x: permute(x, order_R, row_TK, kept_TK, b), x),
        (
            "unpermute",
            lambda b: lambda rows, weights: unpermute(rows, weights, order_R, row_TK, kept_TK, None, b),
            rows | weights,
        ),
        ("moe_mlp", lambda b: lambda rows, w13, w2: moe_mlp(rows, w13, w2, counts_E, b), rows | mlp),
        (
            "moe_layer_mlp",
            lambda b: lambda x, weights, w13, w2: moe_layer_mlp(x, weights, *want, w13, w2, kept_TK, None, b),
            x | weights | mlp,
        ),
    ]
    for op, on, inputs in runs:
        findings += _compare(op, on(backend), on("torch"), inputs)
    return findings


def _compare(op: str, ours: Callable[..., Tensor], torchs: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> list[Finding]:
    """The output and the gradient of every input, for one direction."""
    results: list[list[Tensor]] = []
    for fn in (ours, torchs):
        leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
        out = fn(**leaves) if len(leaves) > 1 else fn(*leaves.values())
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        results.append([out.detach(), *torch.autograd.grad(out, list(leaves.values()), direction)])
    names = ["output", *(f"gradient of {name}" for name in inputs)]
    return [_finding(op, name, a, b) for name, a, b in zip(names, *results, strict=True)]


def _finding(op: str, name: str, got: Tensor, want: Tensor) -> Finding:
    bound = max(8 * torch.finfo(want.dtype).eps, 1e-5)
    error = (got.double() - want.double()).abs().max() / want.double().abs().max()
    return Finding(op, name, float(error.nan_to_num(nan=torch.inf)), bound)
