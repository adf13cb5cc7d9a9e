"""LSH compression of what travels to the experts (LSH-MoE, arXiv 2411.08446): a layer around any dispatcher.

Rows of one expert whose tokens hash alike travel as their mean c. What the expert makes of it, E(c), comes back, and each token
is restored as E(c) + a (x - c). Fewer rows cross the wire, and the experts compute on fewer. Rows are merged on the rank they
come from, so results depend on how tokens are split over ranks.

Tokens are hashed as seen from their mean. Hidden states have a large part in common, above all early in training, and from the
origin they lie within so small an angle that nearly all codes would be equal and most of the rows that may travel left unused.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn

from ..kernels.lsh import Buckets, bucket_rows, centroids, cross_polytope_codes, farther_than, make_rotation, restore
from .config import CompressConfig, MoEConfig
from .dispatch import Dispatcher, DispatchPlan, Experts, Shared, make_plan

ROTATION_SEED = 0
"""The rotation is part of the method, not of a run: the same on every rank and in every layer."""


@dataclass(frozen=True)
class Sent:
    """What travelled for one call of a layer: sums, so that they may be added over ranks.

    rows: int64, rows sent to experts. error, norm: float64, of the sampled tokens: sum of |compressed - exact|^2 and of
    |exact|^2, both of the routed experts' weighted sum; 0 where nothing was sampled.
    """

    rows: Tensor
    error: Tensor
    norm: Tensor

    @staticmethod
    def exactly(rows: Tensor) -> Sent:
        """This many choices travelled, each as itself."""
        zero = torch.zeros((), dtype=torch.float64, device=rows.device)
        return Sent(rows, zero, zero)


def rate_at(config: CompressConfig, step: int, total_steps: int) -> float | None:
    """Part of the rows that travels in a step (counted from 0); 1.0 = all, None = as many as the codes tell apart.

    All in the first `warmup` of the steps; rising in a straight line over the last `anneal` of them, to all in the last one.
    """
    if config.method == "none" or step < _part(config.warmup, total_steps):
        return 1.0
    left = max(0, total_steps - 1 - step) / max(Fraction(1), _part(config.anneal, total_steps))
    if config.anneal == 0 or left >= 1:
        return config.rate
    start = 1.0 if config.rate is None else config.rate
    return 1.0 - (1.0 - start) * float(left)


def _part(part: float, whole: int) -> Fraction:
    """part * whole, of the fraction that was meant: 0.07 of 100 are 7, not a little more."""
    return Fraction(part).limit_denominator(10**6) * whole


def split_off(buckets: Buckets, indices_TK: Tensor, exact_TK: Tensor, num_experts: int) -> Buckets:
    """The same buckets without the choices in `exact_TK`, each of which gets a bucket of its own."""
    T, K = indices_TK.shape

    def column(x_TK: Tensor | None) -> Tensor | None:
        return None if x_TK is None else x_TK.reshape(T * K, 1)

    bucket_R1 = buckets.bucket_TK.reshape(T * K, 1)
    split = bucket_rows(bucket_R1, indices_TK.reshape(T * K, 1), num_experts, column(buckets.kept_TK), column(exact_TK))
    return Buckets(
        bucket_TK=split.bucket_TK.view(T, K),
        kept_TK=buckets.kept_TK,
        order_R=split.order_R,
        starts_C1=split.starts_C1,
        counts_E=split.counts_E,
        experts_C=split.experts_C,
        num_rows=split.num_rows,
    )


class LSHCodec(nn.Module):
    """Compresses what one layer sends. `rate` (see `rate_at`) and `sampled`, the tokens to measure the error on, are set from
    outside before a step."""

    scale_D: nn.Parameter | None

    def __init__(self, dim: int, config: MoEConfig):
        super().__init__()
        c = config.compress
        self.dim, self.num_experts, self.config = dim, config.num_experts, c
        self.rate: float | None = c.rate
        self.sampled = 0
        trained = {"scalar": 1, "diagonal": dim}.get(c.compensation)
        self.scale_D = None if trained is None else nn.Parameter(torch.empty(trained))
        self._rotation_HPD: Tensor | None = None

    def forward(
        self, dispatcher: Dispatcher, x_TD: Tensor, plan: DispatchPlan, experts: Experts, shared: Shared | None = None
    ) -> tuple[Tensor, Sent]:
        """As a dispatcher does, and what travelled."""
        if self.rate == 1.0:
            return dispatcher(x_TD, plan, experts, shared), Sent.exactly(plan.counts_E.sum())
        buckets, rows_CD = self.compress(x_TD, plan)
        ones_C1 = torch.ones(len(rows_CD), 1, dtype=plan.weights_TK.dtype, device=x_TD.device)
        to_experts = make_plan(buckets.experts_C[:, None], ones_C1, self.num_experts, None, plan.kernels)
        beside: list[Tensor] = []

        def meanwhile() -> None:
            # every token passes the shared experts, not the rows that travel
            if shared is not None:
                beside.append(shared(x_TD))

        expert_CD = dispatcher(rows_CD, to_experts, experts, meanwhile=meanwhile)
        y_TD = self.restore(expert_CD, rows_CD, x_TD, plan, buckets)
        rows = torch.full((), len(rows_CD), dtype=torch.int64, device=x_TD.device)
        error, norm = self._measure(dispatcher, x_TD, y_TD, plan, experts)
        return y_TD + beside[0] if beside else y_TD, Sent(rows, error, norm)

    def compress(self, x_TD: Tensor, plan: DispatchPlan) -> tuple[Buckets, Tensor]:
        """Buckets of the kept choices, and the row that travels for each of them."""
        c, (_, K) = self.config, plan.indices_TK.shape
        codes_TH = self.codes(x_TD, plan)
        exact_TK = None
        if c.exact_choices:
            exact_TK = (torch.arange(K, device=x_TD.device) < c.exact_choices).expand_as(plan.indices_TK)
        budget = self._budget(plan)
        buckets = bucket_rows(codes_TH, plan.indices_TK, self.num_experts, plan.kept_TK, exact_TK, budget, 2 * c.hash_width)
        weights_TK = plan.weights_TK if c.gate_weighted else None
        if c.radius is not None:
            buckets = self._within_radius(x_TD, plan, buckets, weights_TK, c.radius)
        return buckets, centroids(x_TD, buckets, weights_TK, plan.kernels)

    def _budget(self, plan: DispatchPlan) -> int | Tensor | None:
        """Rows that may travel, rounded up; on the device where the number of kept choices is known only there."""
        if self.rate is None:
            return None
        if plan.kept_TK is None:
            return math.ceil(_part(self.rate, plan.indices_TK.numel()))
        part = _part(self.rate, 1)
        return (plan.kept_TK.sum() * part.numerator + part.denominator - 1) // part.denominator

    @torch.no_grad()
    def codes(self, x_TD: Tensor, plan: DispatchPlan) -> Tensor:
        """codes_TH of the tokens as seen from the mean of those that travel. What does not travel has no part in the mean, and
        neither has a token with a value that is not finite, or one broken row would give all others the same code."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        counted_T = x_TD.sum(-1, dtype=wide).isfinite()
        if plan.kept_TK is not None:
            counted_T &= plan.kept_TK.any(-1)
        sum_D = x_TD.masked_fill(~counted_T[:, None], 0).sum(0, dtype=wide)
        mean_D = (sum_D / counted_T.sum().clamp(min=1)).to(x_TD.dtype)
        return cross_polytope_codes(x_TD - mean_D, self.rotation(x_TD), plan.kernels)

    def rotation(self, x_TD: Tensor) -> Tensor:
        """[H, P, D] in the type and on the device of the tokens, made when they change."""
        kept = self._rotation_HPD
        if kept is None or kept.dtype != x_TD.dtype or kept.device != x_TD.device:
            kept = make_rotation(self.dim, self.config.hashes, self.config.hash_width, ROTATION_SEED, x_TD.dtype, x_TD.device)
            self._rotation_HPD = kept
        return kept

    def restore(self, expert_CD: Tensor, rows_CD: Tensor, x_TD: Tensor, plan: DispatchPlan, buckets: Buckets) -> Tensor:
        """The tokens' weighted sums from the experts' results for the rows that travelled."""
        scale: Tensor | None = self.scale_D
        if self.config.compensation == "identity":
            scale = torch.ones((), dtype=rows_CD.dtype, device=rows_CD.device)
        elif self.config.compensation == "scalar":
            assert scale is not None
            scale = scale.squeeze(0)
        detach = self.config.detach_residual
        return restore(expert_CD, rows_CD, x_TD, plan.weights_TK, buckets, scale, detach, plan.kernels)

    @torch.no_grad()
    def _within_radius(
        self, x_TD: Tensor, plan: DispatchPlan, buckets: Buckets, weights_TK: Tensor | None, radius: float
    ) -> Buckets:
        """Let rows outside of the radius travel exactly. Without them the means move, and others may come to lie outside: in a
        bucket where one does, then, every row travels exactly, which leaves all other buckets as they are."""
        for last in (False, True):
            means_CD = centroids(x_TD, buckets, weights_TK, plan.kernels)
            far_TK = farther_than(x_TD, means_CD, buckets, radius, plan.kernels)
            if last:
                # counted with integers, so that no order matters; one more place, where nothing travels and there are no buckets
                far_C = torch.zeros(len(means_CD) + 1, dtype=torch.int64, device=x_TD.device)
                far_C.index_add_(0, buckets.bucket_TK.flatten(), far_TK.flatten().long())
                far_TK = far_C[buckets.bucket_TK] > 0
            buckets = split_off(buckets, plan.indices_TK, far_TK, self.num_experts)
        return buckets

    @torch.no_grad()
    def _measure(
        self, dispatcher: Dispatcher, x_TD: Tensor, y_TD: Tensor, plan: DispatchPlan, experts: Experts
    ) -> tuple[Tensor, Tensor]:
        """Squared error and norm over `sampled` evenly spaced tokens, whose rows travel once more and exactly."""
        zero = torch.zeros((), dtype=torch.float64, device=x_TD.device)
        if not self.sampled:
            return zero, zero
        T = x_TD.shape[0]
        picked_S = torch.arange(min(self.sampled, T), device=x_TD.device) * T // max(1, min(self.sampled, T))
        kept_SK = None if plan.kept_TK is None else plan.kept_TK[picked_S]
        choices = (plan.indices_TK[picked_S], plan.weights_TK[picked_S])
        sample = make_plan(*choices, self.num_experts, kept_SK, plan.kernels)
        exact_SD = dispatcher(x_TD[picked_S], sample, experts).double()
        return (y_TD[picked_S].double() - exact_SD).square().sum(), exact_SD.square().sum()
