"""Process groups and device meshes of a `Topology`: the only place that makes them."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..moe.config import ModelConfig
from ..moe.errors import TopologyError
from .nodes import NodeMap, TwoLevels, two_levels
from .topology import Coordinates, Topology


@dataclass(frozen=True)
class NodeGroups:
    """The (ep, etp) group of one rank in two levels.

    levels: the ranks of both. inside: the group's ranks on this node. across: the ranks of the same place on all of its nodes,
    ordered by number as in every process group.
    """

    levels: TwoLevels
    inside: dist.ProcessGroup
    across: dist.ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """The groups of one rank, in both views of the world.

    dense: DeviceMesh (dp_replicate, dp_shard, tp); expert: DeviceMesh (edp_replicate, edp_shard, ep, etp).
    world_group: all ranks; ep_etp_group: ranks that together hold one copy of all experts, ordered by (ep, etp).
    by_node: this group in two levels, where the mesh was built with a map of nodes. timeout_s: of a collective.
    """

    topology: Topology
    coordinates: Coordinates
    rank: int
    device: torch.device
    dense: DeviceMesh
    expert: DeviceMesh
    world_group: dist.ProcessGroup
    ep_etp_group: dist.ProcessGroup
    by_node: NodeGroups | None = None
    timeout_s: float = 600.0
    _for_sums: dict[str, dist.ProcessGroup] = field(default_factory=dict, compare=False, repr=False)

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.dense.get_group("tp")

    def sum_group(self, kind: str) -> dist.ProcessGroup:
        """A group of the ranks of such an axis for sums of gradients alone, made when it is first asked for. Collective."""
        if kind not in self._for_sums:
            self._for_sums[kind] = own_group(self.topology.groups(kind), self.rank, self.timeout_s)
        return self._for_sums[kind]

    def data_mesh(self, expert: bool, replicas: bool = True) -> DeviceMesh:
        """The mesh that parameters are sharded over: 1-D, or (replicate, shard) with replicas, unless these are left out."""
        mesh, prefix = (self.expert, "edp") if expert else (self.dense, "dp")
        if self.topology.hsdp == 1 or not replicas:
            return mesh[f"{prefix}_shard"]
        return mesh[f"{prefix}_replicate", f"{prefix}_shard"]


def find_nodes(ranks_per_node: int | None = None) -> NodeMap:
    """Which ranks of the default process group share a node: by number, else by host name. Collective.

    Raises:
        TopologyError: a number that does not divide the world.
    """
    world = dist.get_world_size()
    if ranks_per_node is not None:
        return NodeMap.by_size(world, ranks_per_node)
    names = [""] * world
    dist.all_gather_object(names, socket.gethostname())
    return NodeMap.by_name(names)


def nodes_for(model: ModelConfig, ranks_per_node: int | None = None) -> NodeMap | None:
    """`find_nodes` where the model's dispatcher sends in two levels, else None: what `build_mesh` takes. Collective."""
    if model.moe is None or model.moe.dispatcher != "hierarchical":
        return None
    return find_nodes(ranks_per_node)


def build_mesh(topology: Topology, device: torch.device, timeout_s: float = 600.0, nodes: NodeMap | None = None) -> Mesh:
    """Make the groups. Collective: every rank of the default process group calls it with the same topology and nodes.

    nodes: makes the groups for experts in two levels too.

    Raises:
        TopologyError: pipeline or context parallelism, a world of another size, or nodes that do not hold equal parts of a group.
    """
    if topology.pp != 1 or topology.cp != 1:
        raise TopologyError(
            f"pp = {topology.pp}, cp = {topology.cp}: pipeline and context parallelism cannot be run, set both to 1"
        )
    if dist.get_world_size() != topology.world:
        raise TopologyError(f"world = {topology.world}, but {dist.get_world_size()} processes are running")
    ranks = torch.arange(topology.world)
    dense = DeviceMesh(
        device.type,
        ranks.view(topology.dp_replicate, topology.dp_shard, topology.tp),
        mesh_dim_names=("dp_replicate", "dp_shard", "tp"),
    )
    expert = DeviceMesh(
        device.type,
        ranks.view(topology.edp_replicate, topology.edp_shard, topology.ep, topology.etp),
        mesh_dim_names=("edp_replicate", "edp_shard", "ep", "etp"),
    )
    rank = dist.get_rank()
    joint = topology.groups("ep_etp")
    levels = () if nodes is None else tuple(two_levels(members, nodes, topology.etp) for members in joint)
    joint_group = own_group(joint, rank, timeout_s)
    by_node = None
    if levels:
        inside = own_group([ranks for level in levels for ranks in level.inside], rank, timeout_s)
        across = own_group([ranks for level in levels for ranks in level.across], rank, timeout_s)
        own = next(level for level, members in zip(levels, joint, strict=True) if rank in members)
        by_node = NodeGroups(own, inside, across)
    assert dist.group.WORLD is not None
    groups = (dense, expert, dist.group.WORLD, joint_group, by_node)
    return Mesh(topology, topology.coordinates(rank), rank, device, *groups, timeout_s=timeout_s)


def own_group(groups: Sequence[Sequence[int]], rank: int, timeout_s: float) -> dist.ProcessGroup:
    """Make all of these groups, as every rank must, and return the one that this rank is in. Collective."""
    own = None
    for members in groups:
        group = dist.new_group(list(members), timeout=timedelta(seconds=timeout_s))
        own = group if rank in members else own
    assert own is not None
    return own
