"""Degrees that cannot be laid out: exactly these are refused, all of them at once, with suggestions that work."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefold.moe.errors import ConfigError, TopologyError
from moefold.parallel.topology import Topology
from topologies import suggested, topologies


def problems_of(world: object, **degrees: object) -> dict[str, str]:
    with pytest.raises(TopologyError) as caught:
        Topology(world, **degrees)  # type: ignore[arg-type]
    where = [p.where for p in caught.value.problems]
    assert len(where) == len(set(where)), "a setting was reported twice"
    return {p.where: p.what for p in caught.value.problems}


# World 64 has only powers of two as divisors, so each of these is wrong whatever the others are.
PLANTED: dict[str, list[object]] = {
    "pp": [3, 0, -2, 2.0, True, "2"],
    "dp": [5, 0, -1, 64.0, "64"],
    "hsdp": [3, 128, 0, 1.5],
    "cp": [7, 65, 0, None],
    "tp": [3, 128, -4, "1"],
    "ep": [9, 256, 0, 8.0],
    "etp": [11, 0, False, None],
}


@settings(max_examples=300, deadline=None)
@given(data=st.data(), names=st.sets(st.sampled_from(sorted(PLANTED)), min_size=1))
def test_exactly_the_planted_violations_are_found(data: st.DataObject, names: set[str]) -> None:
    degrees = {name: data.draw(st.sampled_from(PLANTED[name]), label=name) for name in sorted(names)}
    found = problems_of(64, **degrees)
    assert set(found) == {f"parallel.{name}" for name in names}
    for name in names:
        assert repr(degrees[name]) in found[f"parallel.{name}"], "the message does not name the value"


@settings(max_examples=300, deadline=None)
@given(
    world=st.integers(1, 1024),
    degrees=st.fixed_dictionaries(
        {}, optional={name: st.integers(1, 24) for name in ("pp", "dp", "hsdp", "cp", "tp", "ep", "etp")}
    ),
)
def test_a_topology_is_refused_exactly_when_it_cannot_be_laid_out(world: int, degrees: dict[str, int]) -> None:
    d = {"pp": 1, "hsdp": 1, "cp": 1, "tp": 1, "ep": 1, "etp": 1} | degrees
    dense, expert = d["pp"] * d["cp"] * d["tp"], d["pp"] * d["ep"] * d["etp"]
    legal = world % dense == 0 and world % expert == 0
    legal = legal and d.get("dp", world // dense) * dense == world and (world // dense) % d["hsdp"] == 0
    if legal:
        assert Topology(world, **degrees).world == world
    else:
        assert problems_of(world, **degrees)


@settings(max_examples=200, deadline=None)
@given(topo=topologies(max_world=360), data=st.data())
def test_following_one_suggestion_mends_one_mistake(topo: Topology, data: st.DataObject) -> None:
    degrees = {n: getattr(topo, n) for n in ("pp", "dp", "hsdp", "cp", "tp", "ep", "etp")}
    given_dp = data.draw(st.booleans(), label="dp is given")
    if not given_dp:
        del degrees["dp"]
    wrong = data.draw(st.sampled_from(sorted(degrees)))
    # A prime above every divisor of the world.
    degrees[wrong] = 367
    found = problems_of(topo.world, **degrees)
    assert set(found) == {f"parallel.{wrong}"}
    for value in suggested(found[f"parallel.{wrong}"]):
        assert Topology(topo.world, **(degrees | {wrong: value})).world == topo.world


@pytest.mark.parametrize(
    ("world", "degrees", "where", "what"),
    [
        (
            64,
            {"tp": 3},
            "parallel.tp",
            "is 3, but must divide world = 64; nearest legal values: 2, 4; or start a multiple of 3 ranks",
        ),
        (
            12,
            {"pp": 2, "cp": 2, "tp": 2},
            "parallel.tp",
            "is 2, but must divide world / (pp * cp) = 12 / (2 * 2) = 3; nearest legal values: 1, 3; "
            "or start a multiple of 8 ranks",
        ),
        (
            8,
            {"ep": 4, "etp": 4},
            "parallel.ep",
            "is 4, but must divide world / etp = 8 / 4 = 2; nearest legal values: 2; or start a multiple of 16 ranks",
        ),
        (
            8,
            {"tp": 4, "dp": 4},
            "parallel.dp",
            "is 4, but must be world / tp = 8 / 4 = 2; nearest legal values: 2, or leave it out; or start 16 ranks",
        ),
        (
            8,
            {"tp": 2, "hsdp": 3},
            "parallel.hsdp",
            "is 3, but must divide dp = world / tp = 8 / 2 = 4; nearest legal values: 2, 4",
        ),
        (8, {"dp": 8, "hsdp": 3}, "parallel.hsdp", "is 3, but must divide dp = 8; nearest legal values: 2, 4"),
        (0, {}, "world", "is 0, but must be positive"),
        ("8", {}, "world", "is '8', but must be a whole number"),
    ],
    ids=["tp", "tp-beside-others", "ep-beside-etp", "dp", "hsdp", "hsdp-with-dp", "no-ranks", "world-is-text"],
)
def test_messages_name_value_reason_and_way_out(world: object, degrees: dict[str, int], where: str, what: str) -> None:
    assert problems_of(world, **degrees) == {where: what}


def test_both_views_are_judged_even_when_the_dense_one_is_wrong() -> None:
    assert set(problems_of(12, pp=2, cp=2, tp=2, ep=4, etp=2)) == {"parallel.tp", "parallel.ep"}


def test_topology_errors_are_config_errors_with_exit_code_2() -> None:
    with pytest.raises(ConfigError) as caught:
        Topology(8, tp=3, ep=5)
    assert caught.value.exit_code == 2
    assert str(caught.value).startswith("topology error: 2 problems\n  parallel.tp: is 3")
