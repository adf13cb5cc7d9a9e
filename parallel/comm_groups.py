"""Which ranks talk to each other: the groups that `comm_sweep` measures, of all ranks or a layout, and a rank's seat in one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

from ..moe.errors import TopologyError
from .comm_ops import Seat
from .nodes import NodeMap, TwoLevels, two_levels
from .topology import Topology


def make_seat(
    name: str,
    groups: Sequence[Sequence[int]],
    *,
    nodes: NodeMap,
    etp: int = 1,
    timeout_s: float = 600.0,
) -> tuple[Seat, str]:
    """Make these process groups, which together hold every rank once; this rank's seat. Collective.

    Returns:
        The seat, and why it has no two levels ("" where it has): nodes that do not hold equal parts of each group, or one node.
    """
    why, levels = "", []
    try:
        levels = [two_levels(members, nodes, etp) for members in groups]
        if any(len(level.inside) == 1 or len(level.inside[0]) == 1 for level in levels):
            why, levels = "one rank on each node, or all on one node", []
    except TopologyError as error:
        why = error.problems[0].what
    rank = dist.get_rank()
    own = _own_group(groups, timeout_s)
    inside = across = None
    if levels:
        inside = _own_group([ranks for level in levels for ranks in level.inside], timeout_s)
        across = _own_group([ranks for level in levels for ranks in level.across], timeout_s)
    index = next(i for i, members in enumerate(groups) if rank in members)
    level: TwoLevels | None = levels[index] if levels else None
    members = tuple(sorted(groups[index]))
    return Seat(name, rank, members, own, ping_pairs(members, nodes), level, inside, across), why


def _own_group(groups: Sequence[Sequence[int]], timeout_s: float) -> dist.ProcessGroup:
    """Make these groups, as every rank must, and return the one that this rank is in."""
    own = None
    for members in groups:
        group = dist.new_group(list(members), timeout=timedelta(seconds=timeout_s))
        own = group if dist.get_rank() in members else own
    assert own is not None, "the groups hold every rank"
    return own


def ping_pairs(members: Sequence[int], nodes: NodeMap) -> tuple[tuple[int, int], ...]:
    """Disjoint pairs of a group that share no link: of the first ranks of its nodes; one pair inside where it has one node."""
    by_node = nodes.split(members)
    if len(by_node) == 1:
        return ((members[0], members[1]),) if len(members) > 1 else ()
    first = [ranks[0] for ranks in by_node]
    return tuple(zip(first[::2], first[1::2], strict=False))


def layout_groups(topology: Topology, nodes: NodeMap) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Groups that ranks of a layout talk in, by what they are called: ep_etp, tp, dp_shard, dp_replicate, edp_shard,
    edp_replicate, and the parts of ep_etp inside and across nodes. Those of one rank are left out; names with the same groups are
    joined by '='."""
    axes = ("ep_etp", "tp", "dp_shard", "dp_replicate", "edp_shard", "edp_replicate")
    found = {axis: topology.groups(axis) for axis in axes if topology.size(axis) > 1}
    return _without_doubles({**found, **node_groups(topology.groups("ep_etp"), nodes, topology.etp)})


def world_groups(nodes: NodeMap) -> dict[str, tuple[tuple[int, ...], ...]]:
    """All ranks, and their parts inside and across nodes."""
    world = (tuple(range(len(nodes.node_of_rank))),)
    return _without_doubles({"world": world, **node_groups(world, nodes)})


def node_groups(groups: Sequence[Sequence[int]], nodes: NodeMap, etp: int = 1) -> dict[str, tuple[tuple[int, ...], ...]]:
    """ "inside": the ranks of each group that share a node; "across": those of the same place on its nodes. Only with several of
    each, and where nodes hold equal parts."""
    try:
        levels = [two_levels(members, nodes, etp) for members in groups]
    except TopologyError:
        return {}
    inside = tuple(ranks for level in levels for ranks in level.inside)
    across = tuple(tuple(sorted(ranks)) for level in levels for ranks in level.across)
    both = {"inside": inside, "across": across}
    return {name: split for name, split in both.items() if len(split[0]) > 1}


def _without_doubles(named: dict[str, tuple[tuple[int, ...], ...]]) -> dict[str, tuple[tuple[int, ...], ...]]:
    names: dict[frozenset[tuple[int, ...]], list[str]] = {}
    for name, groups in named.items():
        names.setdefault(frozenset(groups), []).append(name)
    return {"=".join(same): named[same[0]] for same in names.values()}
