"""Process groups and device meshes of a `Topology`: the only place that makes them."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from ..moe.errors import TopologyError
from .topology import Coordinates, Topology


@dataclass(frozen=True)
class Mesh:
    """The groups of one rank, in both views of the world.

    dense: DeviceMesh (dp_replicate, dp_shard, tp); expert: DeviceMesh (edp_replicate, edp_shard, ep, etp).
    world_group: all ranks; ep_etp_group: ranks that together hold one copy of all experts, ordered by (ep, etp).
    """

    topology: Topology
    coordinates: Coordinates
    rank: int
    device: torch.device
    dense: DeviceMesh
    expert: DeviceMesh
    world_group: dist.ProcessGroup
    ep_etp_group: dist.ProcessGroup

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.dense.get_group("tp")

    def data_mesh(self, expert: bool) -> DeviceMesh:
        """The mesh that parameters are sharded over: 1-D, or (replicate, shard) with replicas."""
        mesh, prefix = (self.expert, "edp") if expert else (self.dense, "dp")
        if self.topology.hsdp == 1:
            return mesh[f"{prefix}_shard"]
        return mesh[f"{prefix}_replicate", f"{prefix}_shard"]


def build_mesh(topology: Topology, device: torch.device, timeout_s: float = 600.0) -> Mesh:
    """Make the groups. Collective: every rank of the default process group calls it with the same topology.

    Raises:
        TopologyError: pipeline or context parallelism, or a world of another size.
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
    joint_group = None
    for members in topology.groups("ep_etp"):
        group = dist.new_group(list(members), timeout=timedelta(seconds=timeout_s))
        joint_group = group if rank in members else joint_group
    assert joint_group is not None and dist.group.WORLD is not None
    return Mesh(topology, topology.coordinates(rank), rank, device, dense, expert, dist.group.WORLD, joint_group)
