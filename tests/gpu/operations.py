"""A problem for every operation of the kernels: on any device, in any dtype, of any size; in Triton, in torch, and exactly.

Used by the tests on a GPU, and with tiny sizes in Triton's interpreter, which proves the tests themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moefold.kernels.grouped_gemm import grouped_gemm
from moefold.kernels.lsh import Buckets, bucket_rows, centroids, restore
from moefold.kernels.moe_mlp import moe_layer_mlp, moe_mlp
from moefold.kernels.permute import permute, unpermute
from moefold.kernels.sort_tokens import sort_tokens

Outputs = Mapping[str, Tensor]
Function = Callable[..., Outputs]


@dataclass(frozen=True)
class Size:
    """T tokens with K of E experts each; D columns in rows, F in hidden rows.

    routing: "random", "one" (one expert takes every choice) or "few" (three quarters of the experts are empty).
    drops: some choices do not travel; rows that did not travel then hold NaN wherever an operation takes rows.
    """

    T: int
    K: int
    E: int
    D: int
    F: int
    routing: Literal["random", "one", "few"] = "random"
    drops: bool = False


@dataclass(frozen=True)
class Operation:
    """Three ways to compute the same outputs from the same leaves.

    leaves: differentiable inputs by name. ours: in Triton; plain: by the torch back end in the same dtype; exact: plain torch
    that autograd differentiates, called with the leaves in fp64.
    dtype: under test; that of rows and weights, while router weights and logits are in fp32 always.
    terms: of the longest sum. through: outputs that gradients come back through, None = all.
    """

    leaves: Mapping[str, Tensor]
    ours: Function
    plain: Function
    exact: Function
    dtype: torch.dtype
    terms: int
    through: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Draw:
    """Random tensors on a device, from one seed."""

    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator(self.device).manual_seed(self.seed))

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).mul_(scale).to(dtype or self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        """fp32 in [0, 1)."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def choices(self, size: Size) -> Tensor:
        """indices_TK, those of a token different from each other except where one expert takes all."""
        if size.routing == "one":
            return torch.full((size.T, size.K), size.E // 2, device=self.device)
        used = size.E if size.routing == "random" else max(size.K, size.E // 4)
        # from the last expert down, so that with empty experts the first ones are empty
        return size.E - 1 - self.uniform(size.T, used).argsort(-1)[:, : size.K]


class Plan(NamedTuple):
    """What `sort_tokens` on torch makes of random choices."""

    order_R: Tensor
    row_TK: Tensor
    counts_E: Tensor
    kept_TK: Tensor | None

    def source_R(self) -> Tensor:
        """The token of each row."""
        return self.order_R // self.row_TK.shape[1]

    def clear(self, rows_RD: Tensor) -> Tensor:
        """The rows, with NaN in those that did not travel."""
        beyond_R1 = (torch.arange(len(rows_RD), device=rows_RD.device) >= self.counts_E.sum())[:, None]
        return rows_RD.masked_fill(beyond_R1, torch.nan)


def make_plan(size: Size, draw: Draw) -> Plan:
    kept_TK = draw.uniform(size.T, size.K) < 0.7 if size.drops else None
    return Plan(*sort_tokens(draw.choices(size), size.E, kept_TK, "torch"), kept_TK)


def exact_product(x_RD: Tensor, w_END: Tensor, counts_E: Tensor) -> Tensor:
    """Each row times its expert's matrix; zeros for rows beyond the counts. By `unbind`, whose gradient is one tensor."""
    counts = counts_E.tolist()
    *pieces, rest_ND = x_RD.split([*counts, len(x_RD) - sum(counts)])
    outputs = [x_ND @ w_ND.T for x_ND, w_ND in zip(pieces, w_END.unbind(), strict=True)]
    return torch.cat([*outputs, rest_ND.new_zeros(len(rest_ND), w_END.shape[1])])


def exact_mlp(x_RD: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, counts_E: Tensor) -> Tensor:
    gate_EFD, up_EFD = w13_E2FD.unbind(1)
    hidden_RF = F.silu(exact_product(x_RD, gate_EFD, counts_E)) * exact_product(x_RD, up_EFD, counts_E)
    return exact_product(hidden_RF, w2_EDF, counts_E)


def exact_sum(y_RD: Tensor, weights_TK: Tensor, plan: Plan) -> Tensor:
    """Weighted sum of a token's rows; those that did not travel are replaced, since a product with 0 would keep their NaN."""
    y_TKD = y_RD[plan.row_TK]
    if plan.kept_TK is not None:
        y_TKD = torch.where(plan.kept_TK[..., None], y_TKD, 0.0)
        weights_TK = torch.where(plan.kept_TK, weights_TK, 0.0)
    return (y_TKD * weights_TK[..., None]).sum(1)


def permuting(size: Size, draw: Draw) -> Operation:
    plan = make_plan(size, draw)
    travels_R1 = (torch.arange(size.T * size.K, device=draw.device) < plan.counts_E.sum())[:, None]

    def on(backend: Literal["torch", "triton"]) -> Function:
        return lambda x_TD: {"rows": permute(x_TD, plan.order_R, plan.row_TK, plan.kept_TK, backend)}

    def exact(x_TD: Tensor) -> Outputs:
        rows_RD = x_TD[plan.source_R()]
        return {"rows": torch.where(travels_R1, rows_RD, rows_RD.detach())}

    return Operation({"x_TD": draw.normal(size.T, size.D)}, on("triton"), on("torch"), exact, draw.dtype, size.K)


def unpermuting(size: Size, draw: Draw, shared: bool = False) -> Operation:
    plan, rows = make_plan(size, draw), size.T * size.K
    weights_TK = draw.uniform(size.T, size.K)
    leaves = {"y_RD": plan.clear(draw.normal(rows, size.D))}
    leaves["weights_TK"] = weights_TK if plan.kept_TK is None else weights_TK.masked_fill(~plan.kept_TK, torch.nan)
    if shared:
        leaves["shared_TD"] = draw.normal(size.T, size.D)

    def on(backend: Literal["torch", "triton"]) -> Function:
        def sums(y_RD: Tensor, weights_TK: Tensor, shared_TD: Tensor | None = None) -> Outputs:
            given = (plan.order_R, plan.row_TK, plan.kept_TK, shared_TD)
            return {"sums": unpermute(y_RD, weights_TK, *given, backend)}

        return sums

    def exact(y_RD: Tensor, weights_TK: Tensor, shared_TD: Tensor | None = None) -> Outputs:
        y_TD = exact_sum(y_RD, weights_TK, plan)
        return {"sums": y_TD if shared_TD is None else y_TD + shared_TD}

    return Operation(leaves, on("triton"), on("torch"), exact, draw.dtype, max(size.K, size.D))


def _longest_sum(size: Size, plan: Plan) -> int:
    return max(size.D, 2 * size.F, int(plan.counts_E.max()))


def multiplying(size: Size, draw: Draw, gather: bool) -> Operation:
    plan = make_plan(size, draw)
    x = draw.normal(size.T, size.D) if gather else plan.clear(draw.normal(size.T * size.K, size.D))
    leaves = {"x": x, "w_END": draw.normal(size.E, size.F, size.D, scale=size.D**-0.5)}
    rows = (plan.order_R, plan.row_TK) if gather else (None, None)

    def on(backend: Literal["reference", "triton"]) -> Function:
        return lambda x, w_END: {"products": grouped_gemm(x, w_END, plan.counts_E, *rows, backend)}

    def exact(x: Tensor, w_END: Tensor) -> Outputs:
        return {"products": exact_product(x[plan.source_R()] if gather else x, w_END, plan.counts_E)}

    return Operation(leaves, on("triton"), on("reference"), exact, draw.dtype, _longest_sum(size, plan))


def expert_weights(size: Size, draw: Draw) -> dict[str, Tensor]:
    """w13 and w2, scaled so that outputs are about as large as inputs."""
    w13_E2FD = draw.normal(size.E, 2, size.F, size.D, scale=size.D**-0.5)
    return {"w13_E2FD": w13_E2FD, "w2_EDF": draw.normal(size.E, size.D, size.F, scale=size.F**-0.5)}


def expert_rows(size: Size, draw: Draw) -> Operation:
    plan = make_plan(size, draw)
    leaves = {"x_RD": plan.clear(draw.normal(size.T * size.K, size.D)), **expert_weights(size, draw)}

    def on(backend: Literal["loop", "triton"]) -> Function:
        return lambda **leaves: {"rows": moe_mlp(**leaves, counts_E=plan.counts_E, backend=backend)}

    def exact(**leaves: Tensor) -> Outputs:
        return {"rows": exact_mlp(**leaves, counts_E=plan.counts_E)}

    return Operation(leaves, on("triton"), on("loop"), exact, draw.dtype, _longest_sum(size, plan))


def expert_layer(size: Size, draw: Draw, shared: bool = False) -> Operation:
    plan = make_plan(size, draw)
    leaves = {"x_TD": draw.normal(size.T, size.D), "weights_TK": draw.uniform(size.T, size.K), **expert_weights(size, draw)}
    if shared:
        leaves["shared_TD"] = draw.normal(size.T, size.D)

    def on(backend: Literal["loop", "triton"]) -> Function:
        return lambda **leaves: {"tokens": moe_layer_mlp(**leaves, **plan._asdict(), backend=backend)}

    def exact(x_TD: Tensor, weights_TK: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, shared_TD: Tensor | None = None) -> Outputs:
        y_RD = exact_mlp(x_TD[plan.source_R()], w13_E2FD, w2_EDF, plan.counts_E)
        y_TD = exact_sum(y_RD, weights_TK, plan)
        return {"tokens": y_TD if shared_TD is None else y_TD + shared_TD}

    return Operation(leaves, on("triton"), on("loop"), exact, draw.dtype, _longest_sum(size, plan))


def make_buckets(size: Size, draw: Draw) -> Buckets:
    """Of skewed codes: the most frequent one has a quarter of the tokens."""
    codes_T1 = (draw.uniform(size.T, 1) ** 3 * 64).long()
    kept_TK = draw.uniform(size.T, size.K) < 0.7 if size.drops else None
    return bucket_rows(codes_T1, draw.choices(size), size.E, kept_TK, draw.uniform(size.T, size.K) < 0.1)


def members(buckets: Buckets) -> tuple[Tensor, Tensor, Tensor]:
    """(choice, token, bucket) of each row that travels, in bucket order."""
    choice_N = buckets.order_R[: buckets.num_rows]
    return choice_N, choice_N // buckets.bucket_TK.shape[1], buckets.bucket_TK.flatten()[choice_N]


def averaging(size: Size, draw: Draw, weighted: bool) -> Operation:
    buckets = make_buckets(size, draw)
    choice_N, token_N, bucket_N = members(buckets)
    leaves = {"x_TD": draw.normal(size.T, size.D)}
    if weighted:
        leaves["weights_TK"] = draw.uniform(size.T, size.K) + 0.1

    def on(backend: Literal["torch", "triton"]) -> Function:
        return lambda **leaves: {"means": centroids(**leaves, buckets=buckets, backend=backend)}

    def exact(x_TD: Tensor, weights_TK: Tensor | None = None) -> Outputs:
        w_N = x_TD.new_ones(len(choice_N)) if weights_TK is None else weights_TK.flatten()[choice_N]
        first_CD = x_TD[token_N[buckets.starts_C1[:-1]]]
        # seen from a bucket's first row: the weight of a row that is alone then has no gradient, not even a rounded one
        parts_ND = w_N[:, None] * (x_TD[token_N] - first_CD[bucket_N])
        total_C = x_TD.new_zeros(len(first_CD)).index_add(0, bucket_N, w_N)
        return {"means": first_CD + torch.zeros_like(first_CD).index_add(0, bucket_N, parts_ND) / total_C[:, None]}

    return Operation(leaves, on("triton"), on("torch"), exact, draw.dtype, max(size.T * size.K, size.D))


def restoring(
    size: Size, draw: Draw, compensation: Literal["none", "number", "columns"], detach_residual: bool = False
) -> Operation:
    buckets = make_buckets(size, draw)
    choice_N, token_N, bucket_N = members(buckets)
    C = len(buckets.experts_C)
    leaves = {name: draw.normal(rows, size.D) for name, rows in (("expert_CD", C), ("centroids_CD", C), ("x_TD", size.T))}
    leaves["weights_TK"] = draw.uniform(size.T, size.K)
    if compensation != "none":
        leaves["compensation"] = draw.normal(*([size.D] if compensation == "columns" else []), dtype=torch.float32)

    def on(backend: Literal["torch", "triton"]) -> Function:
        given = partial(restore, buckets=buckets, detach_residual=detach_residual, backend=backend)
        return lambda **leaves: {"restored": given(**leaves)}

    def exact(
        expert_CD: Tensor, centroids_CD: Tensor, x_TD: Tensor, weights_TK: Tensor, compensation: Tensor | None = None
    ) -> Outputs:
        value_ND = expert_CD[bucket_N]
        if compensation is not None:
            residual_ND = x_TD[token_N] - centroids_CD[bucket_N]
            value_ND = value_ND + compensation * (residual_ND.detach() if detach_residual else residual_ND)
        weighted_ND = weights_TK.flatten()[choice_N, None] * value_ND
        return {"restored": torch.zeros_like(x_TD).index_add(0, token_N, weighted_ND)}

    # the gradient of one number sums over everything
    terms = size.T * size.K * (size.D if compensation == "number" else 1)
    return Operation(leaves, on("triton"), on("torch"), exact, draw.dtype, max(terms, size.D))


OPERATIONS: Mapping[str, Callable[[Size, Draw], Operation]] = MappingProxyType(
    {
        "permute": permuting,
        "unpermute": unpermuting,
        "unpermute-shared": partial(unpermuting, shared=True),
        "grouped_gemm-rows": partial(multiplying, gather=False),
        "grouped_gemm-tokens": partial(multiplying, gather=True),
        "moe_mlp": expert_rows,
        "moe_layer_mlp": expert_layer,
        "moe_layer_mlp-shared": partial(expert_layer, shared=True),
        "centroids": partial(averaging, weighted=False),
        "centroids-weighted": partial(averaging, weighted=True),
        "restore": partial(restoring, compensation="columns"),
        "restore-number": partial(restoring, compensation="number"),
        "restore-plain": partial(restoring, compensation="none"),
        "restore-detached": partial(restoring, compensation="columns", detach_residual=True),
    }
)
"""Every differentiable operation on rows; routing and what has no gradient: see routing.py."""
