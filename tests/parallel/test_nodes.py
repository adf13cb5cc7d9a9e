"""Which ranks share a node, and how a group of ranks splits into two levels."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import RankError, run_threads
from moefold.moe.errors import TopologyError
from moefold.parallel.mesh import Mesh, build_mesh, find_nodes
from moefold.parallel.nodes import NodeMap, TwoLevels, two_levels
from moefold.parallel.topology import Topology


def test_nodes_are_numbered_as_they_appear() -> None:
    assert NodeMap.by_name(["b", "a", "b", "c", "a"]).node_of_rank == (0, 1, 0, 2, 1)
    assert NodeMap.by_name([]).node_of_rank == ()


@pytest.mark.parametrize(
    ("world", "each", "nodes"), [(6, 2, (0, 0, 1, 1, 2, 2)), (4, 1, (0, 1, 2, 3)), (3, 3, (0, 0, 0)), (1, 1, (0,))]
)
def test_neighbours_share_a_node(world: int, each: int, nodes: tuple[int, ...]) -> None:
    assert NodeMap.by_size(world, each).node_of_rank == nodes


@pytest.mark.parametrize("each", [4, 5, 7, 12, 0, -2])
def test_a_number_that_does_not_divide_the_world_is_named_with_those_that_do(each: int) -> None:
    with pytest.raises(TopologyError) as caught:
        NodeMap.by_size(6, each)
    [problem] = caught.value.problems
    assert problem.where == "parallel.ranks_per_node"
    assert problem.what == f"is {each}, which does not divide the 6 ranks of the world; legal: [1, 2, 3, 6]"


def test_a_group_splits_by_node_in_the_order_of_its_members() -> None:
    nodes = NodeMap.by_name("abcabc")
    assert nodes.split(range(6)) == ((0, 3), (1, 4), (2, 5))
    assert nodes.split([1, 3, 4]) == ((1, 4), (3,))
    assert nodes.split([5]) == ((5,),)


@pytest.mark.parametrize(
    ("names", "members", "etp", "expected"),
    [
        ("aabb", (0, 1, 2, 3), 1, TwoLevels(((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 1), (2, 3)))),
        ("abab", (0, 1, 2, 3), 1, TwoLevels(((0, 2), (1, 3)), ((0, 1), (2, 3)), ((0, 2), (1, 3)))),
        ("aabb", (0, 1, 2, 3), 2, TwoLevels(((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0,), (1,)))),
        ("aaaa", (0, 1, 2, 3), 2, TwoLevels(((0, 1, 2, 3),), ((0,), (1,), (2,), (3,)), ((0, 1),))),
        ("abcd", (0, 1, 2, 3), 1, TwoLevels(((0,), (1,), (2,), (3,)), ((0, 1, 2, 3),), ((0,), (1,), (2,), (3,)))),
        # the second group of a larger world: coordinates count inside the group
        ("aabbccdd", (4, 5, 6, 7), 1, TwoLevels(((4, 5), (6, 7)), ((4, 6), (5, 7)), ((0, 1), (2, 3)))),
        (
            "aabbbbaa",
            tuple(range(8)),
            2,
            TwoLevels(((0, 1, 6, 7), (2, 3, 4, 5)), ((0, 2), (1, 3), (6, 4), (7, 5)), ((0, 3), (1, 2))),
        ),
    ],
    ids=["two-by-two", "interleaved", "slices", "one-node", "one-rank-each", "second-group", "slices-around"],
)
def test_levels_of_examples(names: str, members: tuple[int, ...], etp: int, expected: TwoLevels) -> None:
    assert two_levels(members, NodeMap.by_name(names), etp) == expected


def test_experts_of_a_node_are_those_of_its_ranks_in_their_order() -> None:
    assert two_levels(range(4), NodeMap.by_name("abba"), 1).experts(8) == ((0, 1, 6, 7), (2, 3, 4, 5))
    assert two_levels(range(4), NodeMap.by_name("aabb"), 2).experts(6) == ((0, 1, 2), (3, 4, 5))


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], NodeMap, int]:
    """(members, nodes, etp): whole experts on each node, nodes of one size, in any order."""
    etp, owners, nodes = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    names = draw(st.permutations([n for n in range(nodes) for _ in range(owners)]))
    first = draw(st.integers(0, 2)) * etp
    of_rank = [n for n in names for _ in range(etp)]
    return list(range(first, first + len(of_rank))), NodeMap.by_name([*"x" * first, *map(str, of_rank)]), etp


@given(layout=layouts(), each=st.integers(1, 3))
@settings(deadline=None)
def test_two_levels_are_a_rectangle_that_holds_every_rank_and_every_expert_once(
    layout: tuple[list[int], NodeMap, int], each: int
) -> None:
    members, nodes, etp = layout
    levels = two_levels(members, nodes, etp)
    assert sorted(rank for ranks in levels.inside for rank in ranks) == members
    assert tuple(zip(*levels.inside, strict=True)) == levels.across
    for ranks, experts in zip(levels.inside, levels.experts(each * len(members) // etp), strict=True):
        assert len({nodes.node_of_rank[rank] for rank in ranks}) == 1
        assert list(ranks) == sorted(ranks), "process groups order their ranks by number"
        # rank by rank, what the flat layout gives them: slice i of the group holds the i-th block of experts
        owners = [(rank - members[0]) // etp for rank in ranks[::etp]]
        assert list(experts) == [e for owner in owners for e in range(owner * each, (owner + 1) * each)]


def test_nodes_of_different_sizes_are_refused_with_their_ranks() -> None:
    with pytest.raises(TopologyError) as caught:
        two_levels(range(4), NodeMap.by_name("aaab"), 1)
    [problem] = caught.value.problems
    assert problem.where == "model.moe.dispatcher"
    assert "is 'hierarchical', which needs as many ranks of a group on each node" in problem.what
    assert "3 (0, 1, 2), 1 (3)" in problem.what
    assert "use 'all_to_all', or another parallel.ep (parallel.ranks_per_node" in problem.what


@pytest.mark.parametrize(("names", "etp"), [("abab", 2), ("abba", 2), ("aabb", 4), ("abcabc", 2), ("aaabbb", 2)])
def test_an_expert_on_several_nodes_is_refused(names: str, etp: int) -> None:
    with pytest.raises(TopologyError) as caught:
        two_levels(range(len(names)), NodeMap.by_name(names), etp)
    [problem] = caught.value.problems
    assert problem.where == "model.moe.dispatcher"
    assert f"the {etp} slices of one expert (parallel.etp) lie on several nodes; use 'all_to_all'" in problem.what


# in a run


def found_nodes(rank: int, world: int, ranks_per_node: int | None) -> NodeMap:
    return find_nodes(ranks_per_node)


def test_nodes_are_found_by_host_name_or_by_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "xyxy"[dist.get_rank()])
    assert run_threads(found_nodes, 4, None) == [NodeMap((0, 1, 0, 1))] * 4
    assert run_threads(found_nodes, 4, 2) == [NodeMap((0, 0, 1, 1))] * 4
    with pytest.raises(RankError, match=r"parallel\.ranks_per_node: is 3, which does not divide the 4 ranks"):
        run_threads(found_nodes, 4, 3)


def make_mesh(rank: int, world: int, names: str, ep: int, etp: int) -> Mesh:
    return build_mesh(Topology(world, ep=ep, etp=etp), torch.device("cpu"), nodes=NodeMap.by_name(names))


@pytest.mark.parametrize(
    ("names", "ep", "etp", "message"),
    [
        ("aaab", 4, 1, "as many ranks of a group on each node, but there are 3"),
        # the first group is fine, the second is not
        ("aabbabbb", 4, 1, "as many ranks of a group on each node"),
        ("abab", 2, 2, "slices of one expert"),
    ],
)
def test_a_mesh_names_nodes_that_hold_no_equal_parts(names: str, ep: int, etp: int, message: str) -> None:
    with pytest.raises(RankError, match=rf"model\.moe\.dispatcher: is 'hierarchical', .*{message}"):
        run_threads(make_mesh, len(names), names, ep, etp)


def test_groups_of_one_run_may_lie_on_different_numbers_of_nodes() -> None:
    for mesh in run_threads(make_mesh, 4, "aabc", 2, 1):
        assert mesh.by_node is not None
        assert mesh.by_node.levels.inside == (((0, 1),) if mesh.rank < 2 else ((2,), (3,)))


def test_a_mesh_has_no_levels_unless_it_is_told_of_nodes() -> None:
    meshes = run_threads(lambda rank, world: build_mesh(Topology(2, ep=2), torch.device("cpu")), 2)
    assert [mesh.by_node for mesh in meshes] == [None, None]
