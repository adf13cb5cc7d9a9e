"""Which ranks share a machine: pure integers. Two-level communication follows from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..moe.errors import Problem, TopologyError


@dataclass(frozen=True)
class NodeMap:
    """Node of every rank of the world, numbered in the order in which the nodes first appear."""

    node_of_rank: tuple[int, ...]

    @staticmethod
    def by_name(names: Sequence[str]) -> NodeMap:
        """Ranks with the same host name share a node."""
        order = {name: index for index, name in enumerate(dict.fromkeys(names))}
        return NodeMap(tuple(order[name] for name in names))

    @staticmethod
    def by_size(world: int, ranks_per_node: int) -> NodeMap:
        """`ranks_per_node` neighbouring ranks share a node.

        Raises:
            TopologyError: a number that does not divide the world.
        """
        if ranks_per_node < 1 or world % ranks_per_node:
            legal = [n for n in range(1, world + 1) if world % n == 0]
            what = f"is {ranks_per_node}, which does not divide the {world} ranks of the world; legal: {legal}"
            raise TopologyError([Problem("parallel.ranks_per_node", what)])
        return NodeMap(tuple(rank // ranks_per_node for rank in range(world)))

    def split(self, members: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """The ranks of a group by node: nodes in the order of their first member, ranks in the order of the group."""
        nodes: dict[int, list[int]] = {}
        for rank in members:
            nodes.setdefault(self.node_of_rank[rank], []).append(rank)
        return tuple(tuple(ranks) for ranks in nodes.values())


@dataclass(frozen=True)
class TwoLevels:
    """A group of ep * etp ranks as a rectangle: `inside[n]` are its ranks on node n, `across[i]` the i-th ranks of all nodes.

    owners[n]: expert-parallel coordinates that live on node n, in the order of their ranks.
    """

    inside: tuple[tuple[int, ...], ...]
    across: tuple[tuple[int, ...], ...]
    owners: tuple[tuple[int, ...], ...]

    def experts(self, num_experts: int) -> tuple[tuple[int, ...], ...]:
        """The routed experts of each node, in the order of the ranks that hold them."""
        each = num_experts // sum(map(len, self.owners))
        return tuple(tuple(e for owner in owners for e in range(owner * each, (owner + 1) * each)) for owners in self.owners)


def two_levels(members: Sequence[int], nodes: NodeMap, etp: int) -> TwoLevels:
    """Split a group of ranks, ordered by (ep, etp), by node.

    Raises:
        TopologyError: nodes with different numbers of the group's ranks, or an expert whose slices lie on several nodes.
    """
    inside = nodes.split(members)
    sizes = {len(ranks) for ranks in inside}
    where = "model.moe.dispatcher"
    way_out = "use 'all_to_all', or another parallel.ep (parallel.ranks_per_node says how ranks lie on nodes)"
    if len(sizes) > 1:
        listed = ", ".join(f"{len(ranks)} ({', '.join(map(str, ranks))})" for ranks in inside)
        what = f"is 'hierarchical', which needs as many ranks of a group on each node, but there are {listed}; {way_out}"
        raise TopologyError([Problem(where, what)])
    place = {rank: index for index, rank in enumerate(members)}
    all_owners = []
    for ranks in inside:
        slices = [place[rank] // etp for rank in ranks]
        owners = tuple(dict.fromkeys(slices))
        if len(owners) * etp != len(ranks):
            what = f"is 'hierarchical', but the {etp} slices of one expert (parallel.etp) lie on several nodes; {way_out}"
            raise TopologyError([Problem(where, what)])
        all_owners.append(owners)
    return TwoLevels(inside, tuple(zip(*inside, strict=True)), tuple(all_owners))
