"""Every two ranks are timed once, in few rounds of disjoint pairs."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from helpers import GlooPool
from moefold.parallel.comm_pairs import PairTimes, Way, measure_pairs, rank_rounds, shot_bytes, tournament
from moefold.parallel.cost_model import LinkModel
from moefold.parallel.nodes import NodeMap


@pytest.mark.parametrize("players", range(1, 12))
def test_each_meets_each_other_once_in_few_rounds(players: int) -> None:
    rounds = tournament(players)
    assert sorted(pair for meetings in rounds for pair in meetings) == list(itertools.combinations(range(players), 2))
    for meetings in rounds:
        assert len({player for pair in meetings for player in pair}) == 2 * len(meetings), "disjoint"
    assert len(rounds) == (0 if players == 1 else players - 1 + players % 2)


@pytest.mark.parametrize("node_of_rank", [(0, 0, 1, 1), (0, 1, 0, 1, 2, 2), (0, 0, 0, 1, 1, 2), tuple(range(5)), (0,) * 4, (0,)])
def test_ranks_of_hosts_meet_all_others_and_never_two_at_once(node_of_rank: tuple[int, ...]) -> None:
    world, rounds = len(node_of_rank), rank_rounds(NodeMap(node_of_rank))
    assert sorted(pair for pairs in rounds for pair in pairs) == list(itertools.combinations(range(world), 2))
    for pairs in rounds:
        assert pairs and len({rank for pair in pairs for rank in pair}) == 2 * len(pairs)
        assert len({node_of_rank[a] == node_of_rank[b] for a, b in pairs}) == 1, "inside and between hosts are not mixed"


def test_as_many_pairs_at_once_as_hosts_have_ranks() -> None:
    rounds = rank_rounds(NodeMap.by_size(32, 8))
    assert len(rounds) == 3 * 8 + 7, "of the order of the ranks"
    assert {len(pairs) for pairs in rounds} == {16}


def measured(rank: int, world: int, ranks_per_node: int, budget_s: float) -> PairTimes:
    return measure_pairs(NodeMap.by_size(world, ranks_per_node), torch.device("cpu"), 65536, budget_s)


@pytest.mark.ranks
def test_four_ranks_on_two_hosts(gloo_pool: GlooPool) -> None:
    times, *others = gloo_pool.run(measured, 4, 2, math.inf)
    assert all(other.ways == times.ways for other in others)
    assert sorted(times.ways) == sorted(itertools.permutations(range(4), 2))
    assert (times.rounds, times.done, times.nbytes) == (3, 3, 65536)
    for (a, b), way in times.ways.items():
        assert way.at_once == (1 if a // 2 == b // 2 else 2)
        assert 0 < way.least_latency_s <= way.latency_s < 1 and len(way.seconds) == 3
        assert way.best_bytes_per_s >= way.bytes_per_s > 0
    assert sorted(times.host_rates(NodeMap.by_size(4, 2))) == [(0, 1), (1, 0)]

    first_round = gloo_pool.run(measured, 4, 2, 0.0)
    assert [(t.rounds, t.done, len(t.ways)) for t in first_round] == [(3, 1, 4)] * 4, "all ranks stop at the same round"


def test_a_meeting_of_hosts_is_as_fast_as_its_slowest_pair_and_the_better_measurement_counts() -> None:
    nodes = NodeMap.by_size(4, 2)
    way = Way(1e-4, 1e-4, (1.0, 1.0, 4.0), 100, at_once=2)
    pairs = [(a, b) for a in (0, 1) for b in (2, 3)]
    times = PairTimes({pair: way for pair in pairs}, 3, 3, 100, 1.0)
    # two flows of 100 bytes in 2 s on average
    assert times.host_rates(nodes) == {(0, 1): 100.0}
    slow = replace(way, seconds=(9.0, 9.0, 9.0), latency_s=5e-5)
    assert times.again(replace(times, ways={(0, 2): slow})).host_rates(nodes) == {(0, 1): 100.0}
    assert times.again(replace(times, ways={(0, 2): slow})).ways[0, 2].latency_s == 5e-5
    fast = replace(way, seconds=(0.5, 0.5, 0.5))
    assert times.again(replace(times, ways={(0, 2): fast})).host_rates(nodes, best=True) == {(0, 1): 400.0}


def test_a_shot_is_long_enough_to_be_timed_and_no_longer_than_allowed() -> None:
    slow = LinkModel(1e-4, 1 / 24e6)
    assert shot_bytes(slow, 2**30) == pytest.approx(24e6 * 0.01, rel=0.01)
    far = LinkModel(5e-3, 1 / 24e6)
    assert shot_bytes(far, 2**30) == pytest.approx(32 * far.half_bandwidth_bytes, rel=0.01)
    assert shot_bytes(LinkModel(1e-5, 1 / 400e9), 2**26) == 2**26
    assert shot_bytes(None, 2**26) == 2**16 == shot_bytes(LinkModel(1e-4, 0.0), 1024)
