"""From times of pairs to what is slow: hosts first, then ranks and links that no slow host explains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...parallel.comm_pairs import Pair, PairTimes
from ...parallel.link_verdict import BETWEEN, WITHIN, LinkFinding, Rates, judge, judge_latency, late_pairs, slow_pairs
from ...parallel.nodes import NodeMap


def _rank_rates(times: PairTimes, wanted: Callable[[Pair], bool]) -> dict[Pair, float]:
    return {pair: way.best_bytes_per_s for pair, way in times.ways.items() if wanted(pair)}


def _is_inside(nodes: NodeMap) -> Callable[[Pair], bool]:
    return lambda pair: nodes.node_of_rank[pair[0]] == nodes.node_of_rank[pair[1]]


def _latencies(times: PairTimes, nodes: NodeMap) -> tuple[dict[Pair, float], dict[Pair, float]]:
    """Fastest latencies: between nodes, of the fastest two ranks; inside nodes, of two ranks."""
    between: dict[Pair, float] = {}
    inside: dict[Pair, float] = {}
    for (a, b), way in times.ways.items():
        ends = (nodes.node_of_rank[a], nodes.node_of_rank[b])
        if ends[0] == ends[1]:
            inside[a, b] = way.least_latency_s
        else:
            between[ends] = min(way.least_latency_s, between.get(ends, way.least_latency_s))
    return between, inside


def suspects(times: PairTimes, nodes: NodeMap) -> frozenset[Pair]:
    """Pairs of ranks (lower first) that are to be measured again before anything is said of them."""
    inside, (late_between, late_inside) = _is_inside(nodes), _latencies(times, nodes)
    ends = slow_pairs(times.host_rates(nodes, best=True), BETWEEN) | late_pairs(late_between)
    ranks = slow_pairs(_rank_rates(times, inside), WITHIN) | slow_pairs(_rank_rates(times, lambda p: not inside(p)), WITHIN)
    ranks |= late_pairs(late_inside)

    def doubtful(pair: Pair) -> bool:
        a, b = (nodes.node_of_rank[rank] for rank in pair)
        return pair in ranks or pair[::-1] in ranks or (a, b) in ends or (b, a) in ends

    return frozenset((min(p), max(p)) for p in times.ways if doubtful(p))


def find_faults(times: PairTimes, nodes: NodeMap, names: Sequence[str]) -> tuple[LinkFinding, ...]:
    """What is slow, the worst first; see `link_verdict` for the rule. names: of nodes."""
    rank_names = [str(rank) for rank in range(len(nodes.node_of_rank))]
    between = times.host_rates(nodes, best=True)
    found = judge(between, names, "slow_host", BETWEEN) if between else []
    slow_nodes = {names.index(m) for f in found for m in f.members}
    inside = _is_inside(nodes)

    def unexplained(pair: Pair) -> bool:
        return not inside(pair) and not slow_nodes & {nodes.node_of_rank[rank] for rank in pair}

    several = any(way.at_once > 1 for way in times.ways.values())
    classes: list[Rates] = [_rank_rates(times, inside), *([_rank_rates(times, unexplained)] if several else [])]
    for rates in classes:
        found += judge(rates, rank_names, "slow_rank", WITHIN) if rates else []
    late_between, late_inside = _latencies(times, nodes)
    found += judge_latency(late_between, names, "host") + judge_latency(late_inside, rank_names, "rank")
    return tuple(sorted(found, key=lambda f: -f.factor))
