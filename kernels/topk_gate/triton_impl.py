"""topk_gate as one Triton kernel each way. Saves the logits and the chosen indices; backward forms the scores again.

A tile holds whole rows of logits, laid out as [tokens, groups, experts of a group], each padded to a power of two, so that
group limits are reductions over an axis. Lanes stand in the order of experts: the lowest lane is the lowest expert.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..triton_support import cdiv, check_devices, next_power_of_2, row_major
from .rule import Gate, GateRule

MAX_LANES = 4096
"""Experts with padding in one row of a tile: more would spill registers."""


def choose_tokens(lanes: int, backward: bool = False) -> int:
    """Tokens per program of 128 threads: 2048 logits leave room for scores, ranking and choices in registers.

    Half of that in backward, whose gradients of scores and logits live at the same time, and which has K loads in flight.
    """
    return max(1, (1024 if backward else 2048) // lanes)


@triton.jit
def _best_lane(values, free, lane, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of each row of `values` [N, LANES], the lowest lane among the largest free ones; some lane even without a free one."""
    best = tl.max(tl.where(free, values, float("-inf")), 1)
    at = tl.min(tl.where(free & (values == best[:, None]), lane[None, :], LANES), 1)
    return tl.minimum(at, LANES - 1)


@triton.jit
def _within_groups(  # type: ignore[no-untyped-def]
    ranking, TOKENS: tl.constexpr, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr,
    GROUP_LANES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Whether each lane's group is among its token's best ones. Padding in `ranking` is -inf."""
    GROUPS: tl.constexpr = LANES // GROUP_LANES
    member = tl.arange(0, GROUP_LANES)[None, None, :]
    grouped = tl.reshape(ranking, (TOKENS, GROUPS, GROUP_LANES))
    score = tl.max(grouped, 2)
    if TOP2:
        first = tl.min(tl.where(grouped == score[:, :, None], member, GROUP_LANES), 2)
        score += tl.max(tl.where(member == first[:, :, None], float("-inf"), grouped), 2)
    group = tl.arange(0, GROUPS)
    free = (group < NUM_GROUPS)[None, :] & (tl.zeros((TOKENS, GROUPS), tl.int32) == 0)
    chosen = tl.zeros((TOKENS, GROUPS), tl.int32)
    for _ in range(TOP_GROUPS):
        taken = group[None, :] == _best_lane(score, free, group, GROUPS)[:, None]
        chosen = tl.where(taken, 1, chosen)
        free = free & (chosen == 0)
    spread = tl.broadcast_to(chosen[:, :, None], (TOKENS, GROUPS, GROUP_LANES))
    return tl.reshape(spread, (TOKENS, LANES)) != 0


@triton.jit
def _score(logits, real, SIGMOID: tl.constexpr):  # type: ignore[no-untyped-def]
    """(scores, logsumexp) of rows of logits, which are -inf where `real` is false; scores are 0 there."""
    highest = tl.max(logits, 1)
    powers = tl.where(real, tl.exp(logits - highest[:, None]), 0.0)
    total = tl.sum(powers, 1)
    if SIGMOID:
        scores = tl.where(real, 1.0 / (1.0 + tl.exp(-logits)), 0.0)
    else:
        scores = powers / total[:, None]
    return scores, highest + tl.log(total)


@triton.jit
def _gate_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, bias, valid, indices, weights_ptr, scores_ptr, z, counts, T, stride,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, LATE: tl.constexpr, RENORMALIZE: tl.constexpr,
    SCALE: tl.constexpr, TINY: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr,
    NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr,
    TOKENS: tl.constexpr, CHOICES: tl.constexpr, GROUP_LANES: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    lane = tl.arange(0, LANES)
    expert = lane // GROUP_LANES * (E // NUM_GROUPS) + lane % GROUP_LANES
    # whether a lane is an expert, not padding
    real = (lane % GROUP_LANES < E // NUM_GROUPS) & (lane // GROUP_LANES < NUM_GROUPS)
    inside = (t < T)[:, None] & real[None, :]
    logits = tl.load(logits_ptr + t[:, None] * stride + expert[None, :], mask=inside, other=0.0)
    logits = tl.where(real[None, :], logits, float("-inf"))
    scores, lse = _score(logits, real[None, :], SIGMOID)
    tl.store(scores_ptr + t[:, None] * E + expert[None, :], scores, mask=inside)
    tl.store(z + t, lse * lse, mask=t < T)
    source = logits if LATE else scores
    ranking = source
    if HAS_BIAS:
        ranking += tl.load(bias + expert, mask=real, other=0.0).to(ranking.dtype)[None, :]
    # NaN ranks first, as in a sort by torch: no comparison would ever find it, and k choices must differ
    ranking = tl.where(ranking != ranking, float("inf"), ranking)
    ranking = tl.where(real[None, :], ranking, float("-inf"))
    free = real[None, :] & (tl.zeros((TOKENS, LANES), tl.int32) == 0)
    if NUM_GROUPS > 1:
        free = free & _within_groups(ranking, TOKENS, NUM_GROUPS, TOP_GROUPS, TOP2, GROUP_LANES, LANES)
    choice = tl.arange(0, CHOICES)
    values = tl.full((TOKENS, CHOICES), float("-inf"), logits.dtype) if LATE else tl.zeros((TOKENS, CHOICES), logits.dtype)
    picked = tl.zeros((TOKENS, LANES), tl.int32)
    for k in range(K):
        at = _best_lane(ranking, free, lane, LANES)
        hit = lane[None, :] == at[:, None]
        picked = tl.where(hit, 1, picked)
        free = free & (picked == 0)
        value = tl.sum(tl.where(hit, source, 0.0), 1)
        values = tl.where((choice == k)[None, :], value[:, None], values)
        chosen = at // GROUP_LANES * (E // NUM_GROUPS) + at % GROUP_LANES
        tl.store(indices + t * K + k, chosen.to(tl.int64), mask=t < T)
    weights = _weigh(values, LATE, RENORMALIZE, TINY) * SCALE
    tl.store(weights_ptr + t[:, None] * K + choice[None, :], weights, mask=(t < T)[:, None] & (choice < K)[None, :])
    counted = t < T
    if HAS_VALID:
        counted = counted & (tl.load(valid + t, mask=counted, other=0) != 0)
    # integers: the order of these additions does not matter
    tile_counts = tl.sum(tl.where(counted[:, None], picked, 0), 0)
    tl.atomic_add(counts + expert, tile_counts.to(tl.int64), mask=real & (tile_counts > 0), sem="relaxed")


@triton.jit
def _weigh(values, LATE: tl.constexpr, RENORMALIZE: tl.constexpr, TINY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights of the chosen values, before scaling; padding is -inf for a late softmax, else 0."""
    weights = values
    if LATE:
        powers = tl.exp(values - tl.max(values, 1)[:, None])
        weights = powers / tl.sum(powers, 1)[:, None]
    elif RENORMALIZE:
        weights = values / tl.maximum(tl.sum(values, 1), TINY)[:, None]
    return weights


@triton.jit
def _weight_gradient(  # type: ignore[no-untyped-def]
    logits_row, lse, indices_row, grad_row, here, expert,
    K: tl.constexpr, SIGMOID: tl.constexpr, LATE: tl.constexpr, RENORMALIZE: tl.constexpr, SCALE: tl.constexpr,
    TINY: tl.constexpr, TOKENS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Gradient that the weights send to the chosen scores (to the chosen logits if LATE), spread over the experts' lanes.

    `logits_row`, `indices_row`, `grad_row` point at the rows of the tile's tokens. Values that the first loop has loaded are
    loaded again from cache by the others: a register tile with an axis of K could only be indexed by reductions.
    """
    # softmax of the chosen: relative to the largest of them, which may lie far below the largest of all
    base = tl.full((TOKENS,), float("-inf"), lse.dtype)
    if LATE:
        for k in tl.static_range(K):
            e = tl.load(indices_row + k, mask=here, other=0)
            base = tl.maximum(base, tl.load(logits_row + e, mask=here, other=0.0))
    total = tl.zeros((TOKENS,), lse.dtype)
    mean = tl.zeros((TOKENS,), lse.dtype)
    for k in tl.static_range(K):
        value = _chosen_value(logits_row, indices_row + k, base, lse, here, SIGMOID, LATE)
        total += value
        mean += value * tl.load(grad_row + k, mask=here, other=0.0) * SCALE
    spread = tl.zeros((TOKENS, LANES), lse.dtype)
    if LATE:
        mean = mean / total
    elif RENORMALIZE:
        divisor = tl.maximum(total, TINY)
        # a sum below the bound is a constant: nothing flows through it
        mean = tl.where(total >= TINY, mean / divisor, 0.0)
    for k in tl.static_range(K):
        e = tl.load(indices_row + k, mask=here, other=0)
        grad = tl.load(grad_row + k, mask=here, other=0.0) * SCALE
        if LATE:
            grad = _chosen_value(logits_row, indices_row + k, base, lse, here, SIGMOID, LATE) / total * (grad - mean)
        elif RENORMALIZE:
            grad = (grad - mean) / divisor
        spread += tl.where(expert[None, :] == e[:, None], grad[:, None], 0.0)
    return spread


@triton.jit
def _chosen_value(  # type: ignore[no-untyped-def]
    logits_row, index, base, lse, here, SIGMOID: tl.constexpr, LATE: tl.constexpr
):
    """The score of one chosen expert per token; if LATE, exp(logit - base)."""
    logit = tl.load(logits_row + tl.load(index, mask=here, other=0), mask=here, other=0.0)
    if LATE:
        value = tl.exp(logit - base)
    elif SIGMOID:
        value = 1.0 / (1.0 + tl.exp(-logit))
    else:
        value = tl.exp(logit - lse)
    return value


@triton.jit
def _gate_backward_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, indices, grad_weights, grad_scores, grad_z, grad_logits, T, stride, stride_weights, stride_scores, stride_z,
    E: tl.constexpr, K: tl.constexpr, SIGMOID: tl.constexpr, LATE: tl.constexpr, RENORMALIZE: tl.constexpr,
    SCALE: tl.constexpr, TINY: tl.constexpr, HAS_WEIGHTS: tl.constexpr, HAS_SCORES: tl.constexpr, HAS_Z: tl.constexpr,
    TOKENS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    expert = tl.arange(0, LANES)
    real = (expert < E)[None, :]
    inside = (t < T)[:, None] & real
    logits = tl.load(logits_ptr + t[:, None] * stride + expert[None, :], mask=inside, other=0.0)
    logits = tl.where(real, logits, float("-inf"))
    scores, lse = _score(logits, real, SIGMOID)
    to_scores = tl.zeros((TOKENS, LANES), logits.dtype)
    to_logits = tl.zeros((TOKENS, LANES), logits.dtype)
    if HAS_SCORES:
        to_scores += tl.load(grad_scores + t[:, None] * stride_scores + expert[None, :], mask=inside, other=0.0)
    if HAS_WEIGHTS:
        spread = _weight_gradient(
            logits_ptr + t * stride, lse, indices + t * K, grad_weights + t * stride_weights, t < T, expert,
            K, SIGMOID, LATE, RENORMALIZE, SCALE, TINY, TOKENS, LANES,
        )  # fmt: skip
        if LATE:
            to_logits += spread
        else:
            to_scores += spread
    if HAS_Z:
        share = tl.exp(logits - lse[:, None]) if SIGMOID else scores
        to_logits += share * (2.0 * lse * tl.load(grad_z + t * stride_z, mask=t < T, other=0.0))[:, None]
    if SIGMOID:
        to_logits += to_scores * scores * (1.0 - scores)
    else:
        to_logits += scores * (to_scores - tl.sum(to_scores * scores, 1)[:, None])
    tl.store(grad_logits + t[:, None] * E + expert[None, :], to_logits, mask=inside)


def _flags(rule: GateRule, logits_TE: Tensor) -> dict[str, Any]:
    """The compile-time constants that both kernels share."""
    return {
        "E": logits_TE.shape[1],
        "K": rule.top_k,
        "SIGMOID": rule.score == "sigmoid",
        "LATE": rule.order == "topk_softmax",
        "RENORMALIZE": rule.renormalize,
        "SCALE": rule.scaling_factor,
        "TINY": torch.finfo(logits_TE.dtype).tiny,
    }


class _TopKGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_TE: Tensor, rule: GateRule, bias_E: Tensor | None, valid_T: Tensor | None, tokens: int | None
    ) -> tuple[Tensor, ...]:
        (T, E), logits_TE = logits_TE.shape, row_major(logits_TE)
        indices_TK = torch.empty(T, rule.top_k, dtype=torch.int64, device=logits_TE.device)
        weights_TK, scores_TE, z_T = logits_TE.new_empty(T, rule.top_k), logits_TE.new_empty(T, E), logits_TE.new_empty(T)
        counts_E = torch.zeros(E, dtype=torch.int64, device=logits_TE.device)
        group_lanes = next_power_of_2(E // rule.num_groups)
        lanes = next_power_of_2(rule.num_groups) * group_lanes
        rows = tokens or choose_tokens(lanes)
        bias = logits_TE if bias_E is None else bias_E.contiguous()
        valid = logits_TE if valid_T is None else valid_T.contiguous()
        outputs = (indices_TK, weights_TK, scores_TE, z_T, counts_E)
        if T:
            _gate_kernel[(cdiv(T, rows),)](
                logits_TE, bias, valid, *outputs, T, logits_TE.stride(0), **_flags(rule, logits_TE),
                HAS_BIAS=bias_E is not None, HAS_VALID=valid_T is not None,
                NUM_GROUPS=rule.num_groups, TOP_GROUPS=rule.top_groups, TOP2=rule.group_score == "top2_sum",
                TOKENS=rows, CHOICES=next_power_of_2(rule.top_k), GROUP_LANES=group_lanes, LANES=lanes,
            )  # fmt: skip
        ctx.save_for_backward(logits_TE, indices_TK)
        ctx.rule, ctx.tokens = rule, tokens
        ctx.mark_non_differentiable(indices_TK, counts_E)
        # an output that no loss uses has no gradient: the kernel then leaves its part out
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_TE, indices_TK = ctx.saved_tensors
        _, to_weights, to_scores, to_z, _ = grads
        grad_TE = logits_TE.new_empty(logits_TE.shape)
        T, E = logits_TE.shape
        lanes = next_power_of_2(E)
        rows = ctx.tokens or choose_tokens(lanes, backward=True)
        weights, scores = (logits_TE if g is None else row_major(g) for g in (to_weights, to_scores))
        z = logits_TE if to_z is None else to_z
        if T:
            _gate_backward_kernel[(cdiv(T, rows),)](
                logits_TE, indices_TK, weights, scores, z, grad_TE, T,
                logits_TE.stride(0), weights.stride(0), scores.stride(0), z.stride(0), **_flags(ctx.rule, logits_TE),
                HAS_WEIGHTS=to_weights is not None, HAS_SCORES=to_scores is not None, HAS_Z=to_z is not None,
                TOKENS=rows, LANES=lanes,
            )  # fmt: skip
        return grad_TE, None, None, None, None


def topk_gate(
    logits_TE: Tensor, rule: GateRule, bias_E: Tensor | None = None, valid_T: Tensor | None = None, tokens: int | None = None
) -> Gate:
    """As the public function, which checks shapes; `tokens` per program is a power of two, None = `choose_tokens`.

    Raises:
        ValueError: tensors on different devices, or more experts than a tile holds.
    """
    lanes = next_power_of_2(rule.num_groups) * next_power_of_2(logits_TE.shape[1] // rule.num_groups)
    if lanes > MAX_LANES:
        raise ValueError(
            f"topk_gate: {logits_TE.shape[1]} experts in {rule.num_groups} groups need {lanes} lanes, "
            f"the Triton kernel has {MAX_LANES}; use backend 'torch'"
        )
    check_devices("topk_gate", logits_TE=logits_TE, bias_E=bias_E, valid_T=valid_T)
    return Gate(*_TopKGate.apply(logits_TE, rule, bias_E, valid_T, tokens))
