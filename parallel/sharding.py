"""Where each parameter lives: one table, from which shards, gradient sums, norms and checkpoints all follow.

| parameter                       | tp / etp           | ep      | data ranks        | gradient          |
|---------------------------------|--------------------|---------|-------------------|-------------------|
| attention wq, wk, wv; dense w13 | output width       | -       | sharded over dp   | sum over dp       |
| attention bq, bk, bv; dense b13 | output width       | -       | sharded over dp   | sum over dp       |
| attention wo; dense w2          | input width        | -       | sharded over dp   | sum over dp       |
| embedding, head                 | vocabulary rows    | -       | sharded over dp   | sum over dp       |
| norms, shared experts, bo,      | whole              | -       | sharded over dp   | sum over dp, tp   |
| dense b2, learned positions     |                    |         |                   |                   |
| routers, that of attention too; | whole              | -       | whole, never cast | sum over all      |
| compensation (`codec`); gate of |                    |         |                   |                   |
| shared experts; b2 of experts   |                    |         |                   |                   |
| experts w13, b13, w2            | hidden width (etp) | experts | sharded over edp  | sum over edp      |

Sums, never means: the loss is divided once, by the valid tokens of the global batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from .mesh import Mesh

Kind = Literal["dense", "expert", "whole"]

# suffix of the logical name -> dim that tp shards (experts: etp, counted in the stacked tensor)
TP_DIMS = (
    (".wq_QD", 0),
    (".wk_CD", 0),
    (".wv_CD", 0),
    (".wo_DQ", 1),
    (".bq_Q", 0),
    (".bk_C", 0),
    (".bv_C", 0),
    ("ffn.w13_2FD", 1),
    ("ffn.b13_2F", 1),
    ("ffn.w2_DF", 1),
    ("embed.weight_VD", 0),
    ("head.weight_VD", 0),
    ("experts.w13_E2FD", 2),
    ("experts.b13_E2F", 2),
    ("experts.w2_EDF", 2),
)
# held whole and uncast by every rank
WHOLE = ("router.weight_ED", "router.weight_ND", "codec.scale_D", "shared_expert.gate_D", "b2_ED")
# dim of the model width in expert weights (of the hidden width, in biases): sharded over edp when the local experts do not divide
EXPERT_WIDTH_DIMS = (("experts.w13_E2FD", 3), ("experts.b13_E2F", 2), ("experts.w2_EDF", 1))


@dataclass(frozen=True)
class Placement:
    """Where one parameter lives.

    kind: dense (sharded over dp), expert (over ep, etp, edp) or whole (on every rank).
    tp_dim: dim split over tp (dense) or etp (expert); None = whole there.
    data_dim: dim split over the data shards (dp_shard or edp_shard).
    """

    name: str
    global_shape: tuple[int, ...]
    kind: Kind
    tp_dim: int | None
    data_dim: int

    def slice_local(self, value: Tensor, mesh: Mesh) -> Tensor:
        """This rank's part over tp or etp of a value whose expert axis holds the local experts already."""
        if self.tp_dim is None:
            return value
        at, topo = mesh.coordinates, mesh.topology
        size, index = (topo.etp, at.etp) if self.kind == "expert" else (topo.tp, at.tp)
        return value.chunk(size, dim=self.tp_dim)[index]

    def replicas(self, mesh: Mesh) -> int:
        """Ranks that hold the same shard: what a sum over all ranks counts too often."""
        topo = mesh.topology
        if self.kind == "whole":
            return topo.world
        if self.kind == "expert":
            return topo.edp_replicate
        return topo.dp_replicate * (1 if self.tp_dim is not None else topo.tp)

    def sum_group(self) -> Literal["none", "tp", "world"]:
        """Ranks whose gradients are still to be added after the reduction over the data shards."""
        if self.kind == "whole":
            return "world"
        return "tp" if self.kind == "dense" and self.tp_dim is None else "none"


def place(name: str, shape: tuple[int, ...], mesh: Mesh, *, full_qk_norm: bool) -> Placement:
    """The placement of a parameter by its logical name and global shape."""
    kind: Kind = "expert" if ".experts." in f".{name}" else "whole" if name.endswith(WHOLE) else "dense"
    tp_dim = next((dim for suffix, dim in TP_DIMS if name.endswith(suffix)), None)
    if full_qk_norm and name.endswith((".q_norm.weight_D", ".k_norm.weight_D")):
        tp_dim = 0
    data_dim = 0
    if kind == "expert" and (shape[0] // mesh.topology.ep) % mesh.topology.edp_shard:
        width_dim = next(dim for suffix, dim in EXPERT_WIDTH_DIMS if name.endswith(suffix))
        width = shape[width_dim] // (mesh.topology.etp if width_dim == tp_dim else 1)
        data_dim = width_dim if width % mesh.topology.edp_shard == 0 else 0
    return Placement(name, shape, kind, tp_dim, data_dim)


def layout_mesh(placement: Placement, mesh: Mesh) -> tuple[DeviceMesh, list[Replicate | Shard]]:
    """Mesh and placements of the parameter as one logical tensor, for checkpoints. Makes no process group.

    Axes are ordered so that nested shards of the same dim split in the order they were made: ep, then tp or etp, then data.
    """
    topo, device = mesh.topology, mesh.device.type
    ranks = torch.arange(topo.world)
    data = Shard(placement.data_dim)
    if placement.kind == "expert":
        grid = ranks.view(topo.edp_replicate, topo.edp_shard, topo.ep, topo.etp).permute(0, 2, 3, 1)
        inner: Replicate | Shard = Replicate() if placement.tp_dim is None else Shard(placement.tp_dim)
        placements: list[Replicate | Shard] = [Replicate(), Shard(0), inner, data]
    else:
        grid = ranks.view(topo.dp_replicate, topo.dp_shard, topo.tp).permute(0, 2, 1)
        placements = [Replicate(), Replicate() if placement.tp_dim is None else Shard(placement.tp_dim), data]
    return DeviceMesh(device, grid.contiguous(), _init_backend=False), placements


@dataclass(frozen=True)
class ShardedParameter:
    """A parameter as it lives on this rank, with its logical identity."""

    placement: Placement
    parameter: nn.Parameter

    @property
    def local(self) -> Tensor:
        """This rank's values, sharing storage with the parameter."""
        value = self.parameter.detach()
        return value.to_local() if isinstance(value, DTensor) else value

    @property
    def local_grad(self) -> Tensor | None:
        """This rank's gradient, sharing storage."""
        grad = self.parameter.grad
        return grad.to_local() if isinstance(grad, DTensor) else grad

    def logical(self, local: Tensor, mesh: Mesh) -> Tensor:
        """`local` (values, or optimizer moments of the same shape) as one logical tensor with global shape."""
        if self.placement.kind == "whole":
            return local
        device_mesh, placements = layout_mesh(self.placement, mesh)
        shape = torch.Size(self.placement.global_shape)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local, device_mesh, placements, run_check=False, shape=shape, stride=stride)
