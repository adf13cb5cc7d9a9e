"""Latency and bandwidth between every two ranks, in rounds of disjoint pairs: O(ranks) rounds, each as long as one pair.

Hosts meet in a round-robin tournament (the circle method: one stands still, the others move on by one place each round), and
within a meeting of two hosts each rank of one meets each rank of the other, as many pairs at once as a host has ranks. Those
share whatever the hosts share, as they do in an all-to-all; what a link carries is their sum. Ranks of one host meet afterwards,
on all hosts at once.

A pair is measured from one side, on one clock: the answer to a few bytes tells the latency, and the answer to many, less that of
the few, the time of the many bytes in this direction.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from .comm_ops import ping, pong
from .comm_sweep import Stopwatch
from .cost_model import LinkModel
from .nodes import NodeMap

PINGS, SHOTS = 12, 3
"""Repetitions for latency, and for bandwidth in each direction."""
FEW = 2
"""fp32 numbers of a ping."""
LEAST_BYTES, SHOT_S, HALVES = 64 * 1024, 0.01, 32
"""Of a shot: at least so many bytes, as long as this, and this multiple of the size that reaches half of the bandwidth."""

Pair = tuple[int, int]


@dataclass(frozen=True)
class Way:
    """From one rank to another. latency_s: half of the median answer; least_latency_s: of the fastest.

    seconds: of each shot, without the latency of its answer. at_once: pairs of the same two hosts that were measured with it.
    """

    latency_s: float
    least_latency_s: float
    seconds: tuple[float, ...]
    nbytes: int
    at_once: int = 1

    @property
    def bytes_per_s(self) -> float:
        """Of the median shot: a share, where several pairs of the same hosts were measured at once."""
        return self.nbytes / statistics.median(self.seconds)

    @property
    def best_bytes_per_s(self) -> float:
        """Of the fastest shot: what else runs here only makes it slower."""
        return self.nbytes / min(self.seconds)


@dataclass(frozen=True)
class PairTimes:
    """ways: (from, to) -> what was measured, alike on all ranks. rounds, done: planned, and those that there was time for."""

    ways: Mapping[Pair, Way]
    rounds: int
    done: int
    nbytes: int
    seconds: float

    def host_rates(self, nodes: NodeMap, best: bool = False) -> dict[Pair, float]:
        """(node, node) -> bytes/s from the ranks of one to those of the other at once.

        Of the median (best: the fastest) meeting. A meeting is as slow as its slowest pair.
        """
        meetings: dict[Pair, list[tuple[Pair, Way]]] = {}
        for (a, b), way in self.ways.items():
            ends = (nodes.node_of_rank[a], nodes.node_of_rank[b])
            if ends[0] != ends[1]:
                meetings.setdefault(ends, []).append(((a, b), way))
        pick = max if best else statistics.median
        return {ends: pick([_together(way, best) for _, way in found]) for ends, found in meetings.items()}

    def again(self, other: PairTimes) -> PairTimes:
        """With what measuring some of the pairs once more has found: of each way, the better of both."""
        ways = {pair: _better(way, other.ways.get(pair)) for pair, way in self.ways.items()}
        return replace(self, ways=ways, seconds=self.seconds + other.seconds)


def _better(way: Way, other: Way | None) -> Way:
    if other is None:
        return way
    faster = min(way, other, key=lambda w: statistics.fmean(w.seconds))
    latency_s, least_s = (min(getattr(w, name) for w in (way, other)) for name in ("latency_s", "least_latency_s"))
    return replace(faster, latency_s=latency_s, least_latency_s=least_s)


def _together(way: Way, best: bool) -> float:
    """What all pairs of its meeting carry if each is as fast as this one. Shots that share a link count by their mean: one
    alone may have had the link for itself while the other pair rested."""
    if way.at_once == 1:
        return way.best_bytes_per_s if best else way.bytes_per_s
    return way.at_once * way.nbytes / statistics.fmean(way.seconds)


def tournament(players: int) -> list[list[Pair]]:
    """Rounds of disjoint pairs in which each meets each other once: players - 1 of them, or players where these are odd."""
    ring: list[int | None] = [*range(players), *([None] if players % 2 else [])]
    rounds = []
    for _ in range(len(ring) - 1):
        half = len(ring) // 2
        meetings = zip(ring[:half], reversed(ring[half:]), strict=True)
        rounds.append([(min(a, b), max(a, b)) for a, b in meetings if a is not None and b is not None])
        ring = [ring[0], ring[-1], *ring[1:-1]]
    return [meetings for meetings in rounds if meetings]


def rank_rounds(nodes: NodeMap) -> list[list[Pair]]:
    """Rounds in which each rank meets each other once: those of different nodes first. No rank is in two pairs of a round."""
    by_node = nodes.split(range(len(nodes.node_of_rank)))
    rounds: list[list[Pair]] = []
    for meetings in tournament(len(by_node)):
        hosts = [sorted((by_node[a], by_node[b]), key=len) for a, b in meetings]
        for shift in range(max(len(more) for _, more in hosts)):
            rounds.append(
                [
                    (min(rank, peer), max(rank, peer))
                    for fewer, more in hosts
                    if shift < len(more)
                    for rank, peer in ((r, more[(i + shift) % len(more)]) for i, r in enumerate(fewer))
                ]
            )
    inside = [tournament(len(ranks)) for ranks in by_node]
    for index in range(max(map(len, inside), default=0)):
        each = ((ranks, its[index]) for ranks, its in zip(by_node, inside, strict=True) if index < len(its))
        rounds.append([(ranks[a], ranks[b]) for ranks, pairs in each for a, b in pairs])
    return rounds


def shot_bytes(model: LinkModel | None, most: int) -> int:
    """Bytes of a shot over links that this model fits: far more than latency matters for, and long enough to be timed."""
    wanted = float(LEAST_BYTES)
    if model is not None and model.beta_s_per_byte > 0:
        wanted = max(wanted, HALVES * model.half_bandwidth_bytes, SHOT_S * model.bytes_per_s)
    return int(min(max(wanted, 4), max(most, LEAST_BYTES)))


def measure_pairs(
    nodes: NodeMap, device: torch.device, nbytes: int, budget_s: float = math.inf, only: frozenset[Pair] | None = None
) -> PairTimes:
    """Time every two ranks of the default group, or pairs in `only`. Collective.

    nbytes: of a shot. budget_s: rounds that there is no time for are left out, on all ranks the same ones.
    """
    start_s = time.perf_counter()
    rounds = [[p for p in pairs if only is None or p in only] for pairs in rank_rounds(nodes)]
    rounds = [pairs for pairs in rounds if pairs]
    watch, rank = Stopwatch(device), dist.get_rank()
    assert dist.group.WORLD is not None
    found: dict[Pair, Way] = {}
    done, longest_s = 0, 0.0
    for pairs in rounds:
        begin_s = time.perf_counter()
        if done and begin_s - start_s + longest_s > budget_s:
            over = 1.0
        else:
            over = 0.0
        if watch.largest([over])[0]:
            break
        mine = next((pair for pair in pairs if rank in pair), None)
        found.update(_meet(mine, rank, watch, nbytes, _company(pairs, nodes)))
        done += 1
        longest_s = max(longest_s, time.perf_counter() - begin_s)
    parts: list[dict[Pair, Way]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, found)
    ways = {pair: way for part in parts for pair, way in part.items()}
    return PairTimes(dict(sorted(ways.items())), len(rounds), done, nbytes, time.perf_counter() - start_s)


def _company(pairs: Sequence[Pair], nodes: NodeMap) -> dict[Pair, int]:
    """How many pairs of a round are of the same two nodes."""
    ends = {pair: frozenset(nodes.node_of_rank[rank] for rank in pair) for pair in pairs}
    return {pair: sum(other == its for other in ends.values()) for pair, its in ends.items()}


def _meet(mine: Pair | None, rank: int, watch: Stopwatch, nbytes: int, company: Mapping[Pair, int]) -> dict[Pair, Way]:
    """What this rank finds out in a round: about its way to the other one of its pair."""
    few, much = torch.zeros(FEW, device=watch.device), torch.zeros(max(1, nbytes // 4), device=watch.device)
    found: dict[Pair, Way] = {}
    for turn in range(2):
        watch.align()  # the two directions are not mixed among pairs that share a link
        if mine is None:
            continue
        first, second = mine if turn == 0 else mine[::-1]
        asks = rank == first
        peer = second if asks else first
        answers_s = _shots(few, asks, peer, PINGS + 1, watch)[1:]
        shots_s = _shots(much, asks, peer, SHOTS + 1, watch)[1:]
        if asks:
            answer_s, least_s = statistics.median(answers_s), min(answers_s)
            # a shot is long against an answer; where the answer was held up, that must not make it infinitely fast
            seconds = tuple(max(s - least_s, s / 2) for s in shots_s)
            found[first, second] = Way(answer_s / 2, least_s / 2, seconds, much.numel() * 4, company[mine])
    return found


def _shots(x: torch.Tensor, asks: bool, peer: int, count: int, watch: Stopwatch) -> list[float]:
    """Seconds until each of `count` messages was answered by a few bytes; of the side that asks."""
    group, answer = dist.group.WORLD, torch.zeros(FEW, device=watch.device)
    assert group is not None
    seconds = []
    for _ in range(count):
        start_s = time.perf_counter()
        if asks:
            ping(x, answer, peer, group)
        else:
            pong(x, answer, peer, group)
        if watch.device.type == "cuda":
            torch.cuda.synchronize(watch.device)
        seconds.append(time.perf_counter() - start_s)
    return seconds
