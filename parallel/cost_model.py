"""What exchanges between ranks and the experts' products cost on this cluster: small models, fitted to measurements. Links are
measured here, products in `expert_costs`.

A link is T(m) = alpha + max(0, m - bucket) beta for m bytes that leave one rank. Without the bucket, the part of a message that
costs nothing beyond the first byte, a straight line is far off for small messages. Products are T(n) = alpha + s n for n
floating-point operations (FSMoE, ASPLOS 2025, section 4.1, whose alpha is the overhead of starting a product; here it includes
reading and, backward, adding up the weights, which a layer pays once for each piece that it is cut into).
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist

from .collectives import all_reduce, reduce_scatter_dim
from .mesh import Mesh
from .transfer import exchange_rows

Times = Sequence[tuple[float, Sequence[float]]]
"""(size, seconds of each repetition) of every size that was measured."""
Statistic = Literal["median", "minimum"]

SIZES = (*(1024 * 4**power for power in range(7)), 8 * 1024**2)
"""Bytes that leave a rank in the measurement of a link: 1 KiB to 8 MiB. Few, so that each has enough repetitions."""
ROW = 16
"""fp32 numbers in one row of the measurement: small, so that sizes come out even for any number of ranks."""
MIN_SIZES, MIN_REPEATS, MAX_REPEATS = 4, 3, 25


@dataclass(frozen=True)
class LinkModel:
    """Seconds of one exchange by the bytes that leave a rank: alpha up to `bucket_bytes`, then beta for each byte more."""

    alpha_s: float
    beta_s_per_byte: float
    bucket_bytes: float = 0.0

    def seconds(self, size: float) -> float:
        return self.alpha_s + max(0.0, size - self.bucket_bytes) * self.beta_s_per_byte

    def fits(self, seconds: float) -> float:
        """Bytes of the largest exchange that takes no longer than this; 0 where not even an empty one does."""
        if seconds < self.alpha_s:
            return 0.0
        if self.beta_s_per_byte == 0:
            return math.inf
        return self.bucket_bytes + (seconds - self.alpha_s) / self.beta_s_per_byte

    @property
    def bytes_per_s(self) -> float:
        """Of large exchanges."""
        return math.inf if self.beta_s_per_byte == 0 else 1 / self.beta_s_per_byte

    @property
    def half_bandwidth_bytes(self) -> float:
        """Size from which on an exchange reaches half of `bytes_per_s`."""
        if self.beta_s_per_byte == 0:
            return math.inf
        reach = self.alpha_s / self.beta_s_per_byte
        return reach / 2 if reach / 2 <= self.bucket_bytes else reach - self.bucket_bytes


@dataclass(frozen=True)
class ComputeModel:
    """Seconds of the experts of one rank by floating-point operations."""

    alpha_s: float
    s_per_flop: float

    def seconds(self, flops: float) -> float:
        return self.alpha_s + flops * self.s_per_flop


@dataclass(frozen=True)
class LinkFit:
    """A model and what it was fitted to.

    what: operation. ranks: of one group. samples: (bytes, seconds). mean_error, max_error: |model - sample| / sample.
    """

    what: str
    ranks: int
    model: LinkModel
    samples: tuple[tuple[float, float], ...]
    mean_error: float
    max_error: float


@dataclass(frozen=True)
class ComputeFit:
    """A model and what it was fitted to: samples (operations, seconds), errors as in `LinkFit`."""

    model: ComputeModel
    samples: tuple[tuple[float, float], ...]
    mean_error: float
    max_error: float


def fit_link(times: Times, *, what: str = "all_to_all", ranks: int = 2, of: Statistic = "median") -> LinkFit:
    """The link model that is nearest to the measurements.

    Every size counts by its median (or minimum) over repetitions. For each candidate of the bucket, alpha and beta are a least
    squares fit of relative errors in which outlying sizes count less (Huber weights); the bucket with the smallest mean error is
    taken. Neither alpha nor beta is negative.

    Raises:
        ValueError: fewer than 3 different sizes, or a time that is not positive.
    """
    samples = _samples(times, of)
    sizes = [size for size, _ in samples]
    if len(sizes) < 3:
        raise ValueError(f"a link model has three numbers, but there are measurements of {len(sizes)} sizes: {sizes}")
    # from any higher one, fewer than two sizes would be left to tell the slope from
    last = sizes[-3]
    steps = 4 * max(1, math.ceil(math.log2(last / sizes[0]))) if sizes[0] > 0 else 0
    between = (sizes[0] * (last / sizes[0]) ** (step / steps) for step in range(1, steps)) if last > sizes[0] else ()
    candidates = sorted({0.0, *sizes[:-2], *between})
    fits = [LinkModel(*_line([(max(0.0, m - bucket), t) for m, t in samples]), bucket) for bucket in candidates]
    # the smallest of equally good buckets
    best = min(fits, key=lambda model: _errors(model.seconds, samples)[0])
    return LinkFit(what, ranks, best, samples, *_errors(best.seconds, samples))


def fit_compute(times: Times, *, of: Statistic = "median") -> ComputeFit:
    """As `fit_link`, for operations instead of bytes and without a bucket.

    Raises:
        ValueError: fewer than 2 different sizes, or a time that is not positive.
    """
    samples = _samples(times, of)
    if len(samples) < 2:
        raise ValueError(f"a compute model has two numbers, but there are measurements of {len(samples)} sizes")
    model = ComputeModel(*_line(samples))
    return ComputeFit(model, samples, *_errors(model.seconds, samples))


def _samples(times: Times, of: Statistic) -> tuple[tuple[float, float], ...]:
    pick = statistics.median if of == "median" else min
    found = {float(size): pick(seconds) for size, seconds in times}
    if wrong := [(size, t) for size, t in found.items() if not 0 < t < math.inf]:
        raise ValueError(f"{wrong[0][1]} s for a size of {wrong[0][0]:g} cannot have been measured")
    return tuple(sorted(found.items()))


def _line(samples: Sequence[tuple[float, float]], rounds: int = 8) -> tuple[float, float]:
    """(offset, slope), not negative, with the least Huber loss of relative errors, by reweighted least squares."""
    weights = [1 / t**2 for _, t in samples]
    offset = slope = 0.0
    for _ in range(rounds):
        total = sum(weights)
        mean_x = sum(w * x for w, (x, _) in zip(weights, samples, strict=True)) / total
        mean_t = sum(w * t for w, (_, t) in zip(weights, samples, strict=True)) / total
        spread = sum(w * (x - mean_x) ** 2 for w, (x, _) in zip(weights, samples, strict=True))
        joint = sum(w * (x - mean_x) * (t - mean_t) for w, (x, t) in zip(weights, samples, strict=True))
        slope = max(0.0, joint / spread) if spread else 0.0
        offset = mean_t - slope * mean_x
        if offset < 0:
            squares = sum(w * x * x for w, (x, _) in zip(weights, samples, strict=True))
            offset, slope = 0.0, sum(w * x * t for w, (x, t) in zip(weights, samples, strict=True)) / squares
        errors = [abs(offset + slope * x - t) / t for x, t in samples]
        # 1.345 standard deviations, which the median of absolute errors estimates
        limit = max(1.345 * 1.4826 * statistics.median(errors), 1e-12)
        weights = [min(1.0, limit / error if error else 1.0) / t**2 for error, (_, t) in zip(errors, samples, strict=True)]
    return offset, slope


def _errors(model: Callable[[float], float], samples: Sequence[tuple[float, float]]) -> tuple[float, float]:
    errors = [abs(model(x) - t) / t for x, t in samples]
    return statistics.fmean(errors), max(errors)


def measure_links(mesh: Mesh, budget_s: float = 3.0, sizes: Sequence[int] = SIZES) -> dict[str, LinkFit]:
    """Time the exchanges that a MoE layer makes, on all groups of the mesh at once as in training. Collective.

    Every repetition starts together and counts as the slowest rank saw it; the first of each size is discarded, as it makes
    connections. Small sizes come first; when the time is up the larger ones are left out, but at least four are measured.

    Args:
        budget_s: seconds for everything.

    Returns:
        The same on every rank: "flat" over (ep, etp) groups; "across" and "inside" nodes, where the mesh has them and they are
        parts of the flat group; "gradients", the reduction over data ranks, or over replicas if there are any. A group of one
        rank has no link.
    """
    jobs = _jobs(mesh)
    fits = {}
    for index, (name, (what, group)) in enumerate(jobs.items()):
        start_s = time.perf_counter()
        watch = Watch(mesh.world_group, mesh.device)
        ranks = dist.get_world_size(group)
        make = functools.partial(_exchange, what, group, mesh.device)
        times = _sweep(make, sizes, budget_s / (len(jobs) - index), watch)
        fits[name] = fit_link(times, what=what, ranks=ranks)
        budget_s -= watch.slowest(time.perf_counter() - start_s)
    return fits


def _jobs(mesh: Mesh) -> dict[str, tuple[str, dist.ProcessGroup]]:
    jobs = {"flat": ("all_to_all", mesh.ep_etp_group)}
    if mesh.by_node is not None and len(mesh.by_node.levels.inside) > 1:
        jobs |= {"across": ("all_to_all", mesh.by_node.across), "inside": ("all_to_all", mesh.by_node.inside)}
    kind = "dp_shard" if mesh.topology.dp_replicate == 1 else "dp_replicate"
    jobs["gradients"] = ("reduce_scatter" if kind == "dp_shard" else "all_reduce", mesh.dense.get_group(kind))
    return {name: job for name, job in jobs.items() if dist.get_world_size(job[1]) > 1}


def _exchange(what: str, group: dist.ProcessGroup, device: torch.device, size: int) -> tuple[float, Callable[[], object]]:
    """(bytes, the operation on that many): those that leave a rank of an all-to-all, those of the tensor for a reduction."""
    ranks = dist.get_world_size(group)
    if what != "all_to_all":
        x = torch.zeros(max(1, size // 4 // ranks) * ranks, device=device)
        run = (lambda: reduce_scatter_dim(x, 0, group)) if what == "reduce_scatter" else (lambda: all_reduce(x, group))
        return x.numel() * 4, run
    rows = to_peers(group, size)
    x_RD = torch.ones(sum(rows), ROW, device=device)
    return x_RD.numel() * 4, lambda: exchange_rows(x_RD, rows, rows, group)


def to_peers(group: dist.ProcessGroup, size: int) -> list[int]:
    """Rows of the measurement to each rank of the group, alike and none to this one, about `size` bytes together."""
    ranks = dist.get_world_size(group)
    rows = [max(1, round(size / (4 * ROW) / (ranks - 1)))] * ranks
    rows[dist.get_rank(group)] = 0
    return rows


class Watch:
    """Times that all ranks of a group agree on: started together, and as the slowest of them saw them. Without a group, alone."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device):
        self.group, self.device = group, device

    def times(self, run: Callable[[], object], repeats: int) -> list[float]:
        """Seconds of each repetition."""
        mine = []
        for _ in range(repeats):
            if self.group is not None:
                dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)
            self._settle()
            start_s = time.perf_counter()
            run()
            self._settle()
            mine.append(time.perf_counter() - start_s)
        return self._agreed(mine)

    def slowest(self, seconds: float) -> float:
        return self._agreed([seconds])[0]

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _agreed(self, mine: list[float]) -> list[float]:
        if self.group is None:
            return mine
        times = torch.tensor(mine, dtype=torch.float64, device=self.device)
        dist.all_reduce(times, op=dist.ReduceOp.MAX, group=self.group)
        slowest: list[float] = times.tolist()
        return slowest


def repeats(share_s: float, once_s: float) -> int:
    """How often to repeat what took so long once, for a share of the time."""
    return max(MIN_REPEATS, min(MAX_REPEATS, int(share_s / max(once_s, 1e-9))))


def _sweep(
    make: Callable[[int], tuple[float, Callable[[], object]]], sizes: Sequence[int], budget_s: float, watch: Watch
) -> list[tuple[float, list[float]]]:
    """Measurements of ascending sizes; every rank stops at the same one, as only agreed times decide."""
    found: list[tuple[float, list[float]]] = []
    left_s = budget_s
    for index, size in enumerate(sizes):
        begin_s = time.perf_counter()
        if len(found) >= MIN_SIZES:
            last_size, last_times = found[-1]
            if statistics.median(last_times) * max(1.0, size / last_size) * (MIN_REPEATS + 2) > left_s:
                break
        actual, run = make(size)
        if found and actual <= found[-1][0]:
            continue  # many ranks: each gets at least one row
        watch.times(run, 1)
        once_s = watch.times(run, 1)[0]
        found.append((actual, watch.times(run, repeats(left_s / (len(sizes) - index), once_s))))
        left_s -= watch.slowest(time.perf_counter() - begin_s)
    return found
