"""Topology: group algebra of both views, the pipeline-order trap, and how a layout is shown."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefold import parallel
from moefold.moe.errors import TopologyError
from moefold.parallel.config import ParallelConfig
from moefold.parallel.topology import AXES, Topology
from topologies import divisors, factorisations, topologies

SINGLE_AXES = {"dense": ("pp", "dp", "cp", "tp"), "expert": ("pp", "edp", "ep", "etp")}


def assert_group_algebra(topo: Topology) -> None:
    """What must hold for the groups of every axis, told from `coordinates` and from the sizes alone."""
    ranks = range(topo.world)
    at = [topo.coordinates(rank) for rank in ranks]
    for axis in AXES:
        groups = topo.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(ranks), f"{axis} groups do not partition the ranks"
        assert {len(group) for group in groups} == {topo.size(axis)}, axis
    for axes in SINGLE_AXES.values():
        for axis in axes:
            others = [a for a in axes if a != axis]
            for group in topo.groups(axis):
                assert [getattr(at[r], axis) for r in group] == list(range(len(group))), (
                    f"{axis} is not ordered by its coordinate"
                )
                assert len({tuple(getattr(at[r], a) for a in others) for r in group}) == 1, f"{axis} groups mix other coordinates"
    # One pp coordinate serves both views, so the stages of the expert view must be those of the dense one.
    by_expert_view: dict[tuple[int, int, int], list[int]] = {}
    for rank in ranks:
        by_expert_view.setdefault((at[rank].edp, at[rank].ep, at[rank].etp), []).append(rank)
    assert sorted(map(tuple, by_expert_view.values())) == list(topo.groups("pp"))


def test_every_factorisation_of_small_worlds_obeys_the_group_algebra() -> None:
    for world in (1, 2, 3, 4, 6, 8, 12, 16):
        for topo in factorisations(world):
            assert_group_algebra(topo)


@settings(max_examples=60, deadline=None)
@given(topo=topologies())
def test_any_factorisation_up_to_1024_ranks_obeys_the_group_algebra(topo: Topology) -> None:
    assert_group_algebra(topo)


@settings(max_examples=200, deadline=None)
@given(topo=topologies())
def test_product_identities_of_both_views(topo: Topology) -> None:
    assert topo.world == topo.pp * topo.dp * topo.cp * topo.tp == topo.pp * topo.edp * topo.ep * topo.etp
    assert topo.dp == topo.dp_replicate * topo.dp_shard
    assert topo.edp == topo.edp_replicate * topo.edp_shard
    assert topo.dp_replicate == topo.hsdp
    # The largest split of edp by a factor of hsdp.
    assert topo.edp_replicate == max(d for d in divisors(topo.edp) if topo.hsdp % d == 0)
    assert topo.size("ep_etp") == topo.ep * topo.etp
    assert topo.size("dp_cp") == topo.dp * topo.cp


@settings(max_examples=100, deadline=None)
@given(topo=topologies(), data=st.data())
def test_coordinates_place_a_rank_with_pp_outermost_and_the_last_axis_fastest(topo: Topology, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, topo.world - 1))
    c = topo.coordinates(rank)
    assert rank == ((c.pp * topo.dp + c.dp) * topo.cp + c.cp) * topo.tp + c.tp
    assert rank == ((c.pp * topo.edp + c.edp) * topo.ep + c.ep) * topo.etp + c.etp
    assert (c.dp_replicate, c.dp_shard) == divmod(c.dp, topo.dp_shard)
    assert (c.edp_replicate, c.edp_shard) == divmod(c.edp, topo.edp_shard)


@settings(max_examples=60, deadline=None)
@given(topo=topologies(max_world=256))
def test_group_of_is_the_one_group_that_holds_the_rank(topo: Topology) -> None:
    for axis in AXES:
        home = {rank: group for group in topo.groups(axis) for rank in group}
        for rank in {0, topo.world // 3, topo.world - 1}:
            assert topo.group_of(axis, rank) == home[rank], axis


@settings(max_examples=100, deadline=None)
@given(topo=topologies())
def test_ep_etp_groups_are_contiguous_and_ordered_by_ep_then_etp(topo: Topology) -> None:
    size = topo.ep * topo.etp
    assert topo.groups("ep_etp") == tuple(tuple(range(start, start + size)) for start in range(0, topo.world, size))
    at = [topo.coordinates(rank) for rank in topo.groups("ep_etp")[-1]]
    assert [(c.ep, c.etp) for c in at] == list(itertools.product(range(topo.ep), range(topo.etp)))


@settings(max_examples=100, deadline=None)
@given(topo=topologies())
def test_dp_cp_groups_hold_one_tp_shard_and_are_ordered_by_dp_then_cp(topo: Topology) -> None:
    for group in (topo.groups("dp_cp")[0], topo.groups("dp_cp")[-1]):
        at = [topo.coordinates(rank) for rank in group]
        assert [(c.dp, c.cp) for c in at] == list(itertools.product(range(topo.dp), range(topo.cp)))
        assert len({(c.pp, c.tp) for c in at}) == 1


@settings(max_examples=100, deadline=None)
@given(topo=topologies(), per_rank=st.integers(1, 4))
def test_edp_ranks_hold_the_same_experts_and_an_ep_group_holds_each_once(topo: Topology, per_rank: int) -> None:
    num_experts = topo.ep * per_rank

    def held(rank: int) -> range:
        return topo.expert_range(topo.coordinates(rank).ep, num_experts)

    for group in (topo.groups("edp")[0], topo.groups("edp")[-1]):
        assert len({held(rank) for rank in group}) == 1
    for group in (topo.groups("ep")[0], topo.groups("ep")[-1]):
        assert [expert for rank in group for expert in held(rank)] == list(range(num_experts))


@settings(max_examples=100, deadline=None)
@given(topo=topologies())
def test_replicate_and_shard_groups_together_make_the_data_group(topo: Topology) -> None:
    for axis in ("dp", "edp"):
        whole = topo.groups(axis)[-1]
        shards = [topo.group_of(f"{axis}_shard", rank) for rank in topo.group_of(f"{axis}_replicate", whole[0])]
        assert tuple(rank for shard in shards for rank in shard) == whole


def test_a_small_layout_written_out() -> None:
    topo = Topology(8, tp=2, ep=4, hsdp=2)
    assert (topo.dp, topo.edp) == (4, 2)
    assert topo.groups("tp") == ((0, 1), (2, 3), (4, 5), (6, 7))
    assert topo.groups("dp") == ((0, 2, 4, 6), (1, 3, 5, 7))
    assert topo.groups("dp_shard") == ((0, 2), (1, 3), (4, 6), (5, 7))
    assert topo.groups("dp_replicate") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert topo.groups("ep") == ((0, 1, 2, 3), (4, 5, 6, 7))
    assert topo.groups("edp") == topo.groups("edp_replicate") == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert topo.groups("edp_shard") == tuple((rank,) for rank in range(8))
    assert topo.groups("world") == (tuple(range(8)),)
    assert topo.expert_range(3, 16) == range(12, 16)


def ordered_groups(sizes: dict[str, int], axis: str) -> set[frozenset[int]]:
    """Groups of one axis when ranks count through `sizes`, outermost first: an independent enumeration."""
    groups: dict[tuple[int, ...], list[int]] = {}
    where = list(sizes).index(axis)
    for rank, position in enumerate(itertools.product(*map(range, sizes.values()))):
        groups.setdefault(position[:where] + position[where + 1 :], []).append(rank)
    return {frozenset(group) for group in groups.values()}


def test_pp_inside_dp_disagrees_between_the_views_but_pp_outermost_never_does() -> None:
    disagreements = 0
    for topo in factorisations(16):
        if topo.pp == 1:
            continue
        inside_dense = ordered_groups({"dp": topo.dp, "pp": topo.pp, "cp": topo.cp, "tp": topo.tp}, "pp")
        inside_expert = ordered_groups({"edp": topo.edp, "pp": topo.pp, "ep": topo.ep, "etp": topo.etp}, "pp")
        assert (inside_dense == inside_expert) == (topo.cp * topo.tp == topo.ep * topo.etp)
        disagreements += inside_dense != inside_expert
        ours = {frozenset(group) for group in topo.groups("pp")}
        assert ours == ordered_groups({"pp": topo.pp, "dp": topo.dp, "cp": topo.cp, "tp": topo.tp}, "pp")
        assert ours == ordered_groups({"pp": topo.pp, "edp": topo.edp, "ep": topo.ep, "etp": topo.etp}, "pp")
    assert disagreements


def test_the_trap_at_128_ranks() -> None:
    topo = Topology(128, pp=8, tp=2, ep=8)
    listed = [
        ordered_groups({"dp": topo.dp, "pp": topo.pp, "cp": 1, "tp": topo.tp}, "pp"),
        ordered_groups({"edp": topo.edp, "pp": topo.pp, "ep": topo.ep, "etp": 1}, "pp"),
    ]
    assert listed[0] != listed[1]
    assert topo.groups("pp")[0] == tuple(range(0, 128, 16))
    assert_group_algebra(topo)


@pytest.mark.parametrize("rank", [-1, 8])
def test_a_rank_outside_the_world_is_refused(rank: int) -> None:
    topo = Topology(8)
    for ask in (topo.coordinates, lambda r: topo.group_of("dp", r)):
        with pytest.raises(TopologyError, match=rf"rank: is {rank}, but world = 8 has ranks 0 to 7"):
            ask(rank)


def test_an_unknown_axis_is_refused_with_the_list_of_axes() -> None:
    topo = Topology(8)
    for ask in (topo.groups, topo.size, lambda axis: topo.group_of(axis, 0)):
        with pytest.raises(TopologyError, match=r"axis: is 'ddp'.*edp_shard, ep, etp, ep_etp"):
            ask("ddp")


def test_expert_range_refuses_experts_that_do_not_divide_and_foreign_coordinates() -> None:
    topo = Topology(8, ep=8)
    with pytest.raises(TopologyError) as caught:
        topo.expert_range(8, 12)
    assert {p.where: p.what for p in caught.value.problems} == {
        "ep coordinate": "is 8, but must be between 0 and 7",
        "parallel.ep": "is 8, but must divide num_experts = 12; nearest legal values: 4",
    }


def test_from_parallel_takes_every_degree_of_the_section() -> None:
    config = ParallelConfig(dp=4, hsdp=2, tp=2, ep=2, etp=2, micro_batch=1)
    assert Topology.from_parallel(8, config) == Topology(8, dp=4, hsdp=2, tp=2, ep=2, etp=2)
    with pytest.raises(TopologyError, match=r"parallel.dp: is 4, but must be world / tp = 16 / 2 = 8"):
        Topology.from_parallel(16, config)


def test_equal_layouts_are_equal_hashable_and_round_trip_through_repr() -> None:
    topo = Topology(world=64, pp=2, tp=2, ep=8, etp=1)
    assert topo == Topology(64, pp=2, dp=16, tp=2, ep=8)
    assert len({topo, Topology(64, pp=2, dp=16, tp=2, ep=8), Topology(64)}) == 2
    assert eval(repr(topo)) == topo
    with pytest.raises(AttributeError):
        topo.tp = 4  # type: ignore[misc]


def test_to_dict_is_json_with_every_degree() -> None:
    assert json.loads(json.dumps(Topology(16, tp=2, ep=8, hsdp=4).to_dict())) == {
        "world": 16,
        "pp": 1,
        "dp": 8,
        "hsdp": 4,
        "cp": 1,
        "tp": 2,
        "ep": 8,
        "etp": 1,
        "edp": 2,
        "dp_replicate": 4,
        "dp_shard": 2,
        "edp_replicate": 2,
        "edp_shard": 1,
    }


def test_the_printed_table_shows_both_views_and_what_travels() -> None:
    text = str(Topology(64, pp=2, tp=2, ep=8))
    assert text.splitlines()[:2] == [
        "64 ranks = pp 2 x dp 16 x cp 1 x tp 2   (dense view)",
        "         = pp 2 x edp 4 x ep 8 x etp 1   (expert view)",
    ]
    rows = {tuple(line.split()[:2]): re.split(r"\s{2,}", line.strip())[2:] for line in text.splitlines()[3:]}
    assert len(rows) == 10
    assert rows["expert", "ep"] == ["8", "0 1 .. 7", "rows to their experts and back (all-to-all)"]
    assert rows["dense", "cp"] == ["1", "0", "nothing"], "an axis of one rank communicates nothing"


def test_the_html_table_has_one_row_per_axis_of_each_view() -> None:
    page = Topology(64, pp=2, tp=2, ep=8)._repr_html_()
    assert page.count("<tr>") == 11
    assert "<td>expert</td><td>ep</td><td>8</td>" in page


def test_the_package_names_resolve_and_an_unknown_one_does_not() -> None:
    assert parallel.Topology is Topology
    assert all(hasattr(parallel, name) for name in parallel.__all__)
    assert set(parallel.__all__) <= set(dir(parallel))
    assert not hasattr(parallel, "Topologie")


def test_importing_the_topology_does_not_import_torch() -> None:
    code = "import sys; from moefold.parallel import Topology; Topology(8); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
