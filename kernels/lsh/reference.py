"""Specification of the LSH operations: loops over rows and buckets, formulas that autograd differentiates."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .buckets import Buckets


def cross_polytope_codes(x_TD: Tensor, rotation_HPD: Tensor) -> Tensor:
    """Of each token and hash, the lowest of the signed axes +0, -0, +1, -1, .. along which R_h x reaches farthest."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    codes_TH = torch.zeros(x_TD.shape[0], rotation_HPD.shape[0], dtype=torch.int64, device=x_TD.device)
    for h, rotation_PD in enumerate(rotation_HPD):
        for t, x_D in enumerate(x_TD):
            along = (rotation_PD.to(x_D.dtype).to(wide) @ x_D.to(wide)).tolist()
            signed = [value for axis in along for value in (axis, -axis)]
            codes_TH[t, h] = signed.index(max(signed)) if all(value == value for value in signed) else 0
    return codes_TH


def bucket_rows(
    codes_TH: Tensor,
    indices_TK: Tensor,
    num_experts: int,
    kept_TK: Tensor | None = None,
    exact_TK: Tensor | None = None,
    max_rows: int | None = None,
    num_codes: int | None = None,
) -> Buckets:
    """As the public function, with one Python key per choice: (expert, exact, code prefix or choice)."""
    K, H = indices_TK.shape[1], codes_TH.shape[1]
    codes, experts = codes_TH.tolist(), indices_TK.flatten().tolist()
    kept = [True] * len(experts) if kept_TK is None else kept_TK.flatten().tolist()
    exact = [False] * len(experts) if exact_TK is None else exact_TK.flatten().tolist()
    travel = [i for i in range(len(experts)) if kept[i]]

    def key(i: int, level: int) -> tuple[int, ...]:
        return (experts[i], 1, i) if exact[i] else (experts[i], 0, *codes[i // K][:level])

    level = H
    if max_rows is not None:
        while level > 0 and len({key(i, level) for i in travel}) > max_rows:
            level -= 1
    keys = {i: key(i, level) for i in travel}
    if max_rows is not None and level < H:
        members: dict[tuple[int, ...], list[int]] = {}
        for i in travel:
            members.setdefault(keys[i], []).append(i)
        total = len(members)
        for bucket in sorted(members, key=lambda name: (-len(members[name]), name)):
            children = {key(i, level + 1) for i in members[bucket]}
            if total + len(children) - 1 > max_rows:
                break
            total += len(children) - 1
            keys |= {i: key(i, level + 1) for i in members[bucket]}
    names = sorted(set(keys.values()))
    number = {name: c for c, name in enumerate(names)}
    order = sorted(travel, key=lambda i: (number[keys[i]], i)) + [i for i in range(len(experts)) if not kept[i]]
    starts = [0]
    for name in names:
        starts.append(starts[-1] + sum(keys[i] == name for i in travel))

    def integers(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=indices_TK.device)

    return Buckets(
        bucket_TK=integers([number[keys[i]] if kept[i] else 0 for i in range(len(experts))]).view(indices_TK.shape),
        kept_TK=kept_TK,
        order_R=integers(order),
        starts_C1=integers(starts),
        counts_E=integers([sum(name[0] == e for name in names) for e in range(num_experts)]),
        experts_C=integers([name[0] for name in names]),
        num_rows=len(travel),
    )


def _members(buckets: Buckets) -> list[list[tuple[int, int]]]:
    """(t, k) of the rows of each bucket."""
    K, starts = buckets.bucket_TK.shape[1], buckets.starts_C1.tolist()
    choices = [divmod(i, max(K, 1)) for i in buckets.order_R.tolist()]
    return [choices[lo:hi] for lo, hi in pairwise(starts)]


def centroids(x_TD: Tensor, buckets: Buckets, weights_TK: Tensor | None = None) -> Tensor:
    """sum w x / sum w over the rows of a bucket, the plain mean where there are no weights or all of them are 0."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    rows = []
    for members in _members(buckets):
        x_ND = torch.stack([x_TD[t] for t, _ in members]).to(wide)
        w_N1 = torch.ones_like(x_ND[:, :1])
        if weights_TK is not None:
            given_N1 = torch.stack([weights_TK[t, k] for t, k in members]).to(wide)[:, None]
            w_N1 = given_N1 if given_N1.any() else w_N1
        # seen from the first row, so that autograd finds exactly no gradient for the weight of a row that is alone
        rows.append(x_ND[0] + (w_N1 * (x_ND - x_ND[0])).sum(0) / w_N1.sum())
    return (torch.stack(rows) if rows else x_TD.to(wide)[:0]).to(x_TD.dtype)


def restore(
    expert_CD: Tensor,
    centroids_CD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    buckets: Buckets,
    compensation: Tensor | None = None,
    detach_residual: bool = False,
) -> Tensor:
    """y_t = sum over kept k of w_tk (E_b + a (x_t - c_b)), b = bucket of (t, k) (LSH-MoE, arXiv 2411.08446, alg. 1, 3.3)."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    if detach_residual:
        x_TD, centroids_CD = x_TD.detach(), centroids_CD.detach()
    rows = [torch.zeros_like(x_D, dtype=wide) for x_D in x_TD]
    for b, members in enumerate(_members(buckets)):
        for t, k in members:
            value_D = expert_CD[b].to(wide)
            if compensation is not None:
                value_D = value_D + compensation.to(wide) * (x_TD[t].to(wide) - centroids_CD[b].to(wide))
            rows[t] = rows[t] + weights_TK[t, k].to(wide) * value_D
    return (torch.stack(rows) if rows else x_TD.to(wide)).to(x_TD.dtype)


def farther_than(x_TD: Tensor, centroids_CD: Tensor, buckets: Buckets, epsilon: float) -> Tensor:
    """Of the kept choices, those whose |x - c| is not within epsilon |x|."""
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    far_TK = torch.zeros_like(buckets.bucket_TK, dtype=torch.bool)
    for b, members in enumerate(_members(buckets)):
        for t, k in members:
            x_D = x_TD[t].to(wide)
            far_TK[t, k] = not ((x_D - centroids_CD[b].to(wide)).norm() <= epsilon * x_D.norm())
    return far_TK
