"""Comparing named tensors, and an operation with all of its gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def assert_same(got: Mapping[str, Tensor], want: Mapping[str, Tensor], rtol: float = 0.0) -> None:
    """Every tensor is within `rtol` of the expected one's largest magnitude; 0 means bitwise equal. Failures give names."""
    assert set(got) == set(want), f"{sorted(got)} instead of {sorted(want)}"
    wrong = []
    for name, expected in want.items():
        actual = got[name]
        if actual.shape != expected.shape or actual.dtype != expected.dtype:
            wrong.append(f"{name}: {actual.dtype} {tuple(actual.shape)} instead of {expected.dtype} {tuple(expected.shape)}")
            continue
        if not expected.numel():
            continue
        error = (actual.double() - expected.double()).abs().max().item()
        scale = expected.double().abs().max().item()
        if not error <= rtol * scale:  # false for NaN as well
            wrong.append(f"{name}: differs by {error:.3g} at a magnitude of {scale:.3g}, allowed is {rtol:g} of it")
    assert not wrong, "\n".join(wrong)


def with_gradients(fn: Callable[..., Tensor], inputs: Mapping[str, Tensor], seed: int = 7) -> dict[str, Tensor]:
    """The output of `fn(**inputs)` and the gradient of every input, for one random direction of the output."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    output = fn(**leaves)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    grads = torch.autograd.grad(output, list(leaves.values()), direction.to(output.dtype))
    return {"output": output.detach(), **{f"gradient of {n}": g for n, g in zip(leaves, grads, strict=True)}}
