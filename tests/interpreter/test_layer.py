"""A token's way through the public functions with the Triton back end, against the specification in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moefold.kernels import moe_mlp as mlp
from moefold.kernels import permute as rows
from moefold.kernels import sort_tokens as plan
from numeric import assert_same, with_gradients

E, K, D, F = 4, 2, 24, 20


@pytest.mark.parametrize("tokens", [0, 1, 37])
@pytest.mark.parametrize("drops", [False, True], ids=["all-kept", "some-dropped"])
def test_sort_permute_experts_unpermute(tokens: int, drops: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    indices_TK = torch.rand(tokens, E, generator=generator).argsort(-1)[:, :K].contiguous()
    kept_TK = torch.rand(tokens, K, generator=generator) < 0.7 if drops else None
    inputs = {
        "x": torch.randn(tokens, D, generator=generator),
        "weights": torch.rand(tokens, K, generator=generator),
        "w13": torch.randn(E, 2, F, D, generator=generator) * 0.2,
        "w2": torch.randn(E, D, F, generator=generator) * 0.2,
    }

    def layer(backend: str, x: Tensor, weights: Tensor, w13: Tensor, w2: Tensor) -> Tensor:
        triton = backend == "triton"
        order_R, row_TK, counts_E = plan.sort_tokens(indices_TK, E, kept_TK, backend="triton" if triton else "torch")
        x_RD = rows.permute(x, order_R, row_TK, kept_TK, backend="triton" if triton else "torch")
        y_RD = mlp.moe_mlp(x_RD, w13, w2, counts_E, backend="triton" if triton else "reference")
        return rows.unpermute(y_RD, weights, order_R, row_TK, kept_TK, backend="triton" if triton else "torch")

    wide = {name: value.double() for name, value in inputs.items()}
    want = with_gradients(lambda **tensors: layer("reference", **tensors), wide)
    got = with_gradients(lambda **tensors: layer("triton", **tensors), inputs)
    assert_same({name: value.double() for name, value in got.items()}, want, rtol=1e-5)
