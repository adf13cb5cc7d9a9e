"""The rule that names slow hosts and links: planted faults by name, and nothing on healthy clusters."""

from __future__ import annotations

import itertools
import random

import pytest

from moefold.parallel.link_verdict import BETWEEN, LinkFinding, judge, judge_latency

Rates = dict[tuple[int, int], float]
RATE = 24e6


def healthy(hosts: int, noise: float = 0.0, seed: int = 0) -> Rates:
    draw = random.Random(seed)
    return {pair: RATE * draw.uniform(1 - noise, 1 + noise) for pair in itertools.permutations(range(hosts), 2)}


def slowed(rates: Rates, *pairs: tuple[int, int], factor: float = 5.0) -> Rates:
    return {pair: rate / factor if pair in pairs else rate for pair, rate in rates.items()}


def found(rates: Rates) -> list[LinkFinding]:
    return judge(rates, [f"h{i}" for i in range(10)], "slow_host", BETWEEN)


def named(rates: Rates) -> list[tuple[str, tuple[str, ...], str]]:
    return [(f.kind, f.members, f.way) for f in found(rates)]


@pytest.mark.parametrize("hosts", range(2, 9))
def test_nothing_is_named_on_a_healthy_cluster(hosts: int) -> None:
    for seed in range(40):
        assert found(healthy(hosts, noise=0.19, seed=seed)) == []


@pytest.mark.parametrize("hosts", [3, 4, 5, 8])
@pytest.mark.parametrize("way", ["sends", "receives", "both"])
def test_a_slow_host_is_named_with_its_direction(hosts: int, way: str) -> None:
    rates = healthy(hosts, noise=0.1)
    out = [p for p in rates if p[0] == 1] if way != "receives" else []
    into = [p for p in rates if p[1] == 1] if way != "sends" else []
    assert named(slowed(rates, *out, *into)) == [("slow_host", ("h1",), way)]


@pytest.mark.parametrize("hosts", [3, 4, 8])
def test_a_slow_link_is_not_blamed_on_its_ends(hosts: int) -> None:
    assert named(slowed(healthy(hosts), (0, 2), (2, 0))) == [("slow_link", ("h0", "h2"), "both")]
    assert named(slowed(healthy(hosts), (2, 0))) == [("slow_link", ("h2", "h0"), "sends")]


def test_two_faults_are_told_apart_the_worst_first() -> None:
    rates = healthy(8, noise=0.1)
    of_five = [p for p in rates if 5 in p]
    both = slowed(slowed(rates, *of_five, factor=4), (1, 2), (2, 1), factor=9)
    assert named(both) == [("slow_link", ("h1", "h2"), "both"), ("slow_host", ("h5",), "both")]
    assert [round(f.factor) for f in found(slowed(healthy(8), *of_five, factor=4))] == [4]
    # one bad link of a slow host is its own
    assert named(slowed(rates, *of_five)) == [("slow_host", ("h5",), "both")]


def test_two_hosts_are_compared_by_direction_only() -> None:
    assert named(slowed(healthy(2), (0, 1), (1, 0))) == [], "both are alike: slow or not, nobody knows"
    assert named(slowed(healthy(2), (0, 1))) == [("slow_link", ("h0", "h1"), "sends")]


def test_the_text_says_who_how_fast_and_what_is_usual() -> None:
    [finding] = found(slowed(healthy(4), *[p for p in healthy(4) if 2 in p]))
    assert finding.text == "host h2 is slow: it sends and receives 4.8 MB/s where 24 MB/s is usual (5 times slower)"
    assert (finding.rate, finding.usual, finding.factor) == (RATE / 5, RATE, 5.0)


def test_just_under_the_threshold_is_silent() -> None:
    pairs = [p for p in healthy(4) if 2 in p]
    assert found(slowed(healthy(4), *pairs, factor=BETWEEN - 0.01)) == []
    assert named(slowed(healthy(4), *pairs, factor=BETWEEN + 0.01)) == [("slow_host", ("h2",), "both")]


def test_pairs_that_were_not_measured_are_left_out() -> None:
    rates = slowed(healthy(5), *[p for p in healthy(5) if 2 in p])
    del rates[2, 0], rates[0, 2], rates[3, 4]
    assert named(rates) == [("slow_host", ("h2",), "both")]
    assert found({(0, 1): 1.0}) == [] == found({})


def test_late_answers_are_named_and_small_differences_are_not() -> None:
    names = [f"h{i}" for i in range(5)]
    answers = {pair: 60e-6 for pair in itertools.permutations(range(5), 2)}
    assert judge_latency(answers, names, "host") == []
    far = {pair: 10e-3 if 3 in pair else s for pair, s in answers.items()}
    assert [(f.kind, f.members) for f in judge_latency(far, names, "host")] == [("slow_answer", ("h3",))]
    link = answers | {(1, 2): 5e-3, (2, 1): 5e-3}
    [finding] = judge_latency(link, names, "host")
    assert finding.text == "host h1 and host h2 answer each other after 10 ms, where 0.12 ms is usual (83.3 times)"
    # ten times, but on the scale of a processor's hiccups
    assert judge_latency({p: s / 10 if 3 not in p else s for p, s in answers.items()}, names, "host") == []
