"""Gradients after backward: the sums that data sharding left open, the global norm, clipping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_reduce
from .mesh import Mesh
from .recorder import CommRecorder, probe_for
from .sharding import ShardedParameter


def complete_gradients(parameters: Sequence[ShardedParameter], mesh: Mesh, recorder: CommRecorder | None = None) -> None:
    """Sum gradients of weights that several ranks hold whole but saw different tokens with: one all-reduce per group.

    Every rank takes part with every parameter; one that got no gradient on this rank counts as zero.
    """
    for where, group in (("tp", mesh.tp_group), ("world", mesh.world_group)):
        members = [p for p in parameters if p.placement.sum_group() == where]
        if not members or dist.get_world_size(group) == 1:
            continue
        for p in members:
            if p.parameter.grad is None:
                p.parameter.grad = torch.zeros_like(p.parameter)
        grads = [g for p in members if (g := p.local_grad) is not None]
        flat = torch.cat([g.flatten() for g in grads])
        all_reduce(flat, group, probe_for(recorder, where, group, "gradients"), direction="backward")
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view(grad.shape))


def gradient_norm(parameters: Sequence[ShardedParameter], mesh: Mesh, recorder: CommRecorder | None = None) -> Tensor:
    """Euclidean norm over all logical parameters, each counted once; float64 scalar, the same on every rank.

    Each rank's sum of squares is weighted by 1 / (ranks that hold the same shard), so that one sum over all ranks is exact in
    every layout, and no rank can miss it.
    """
    total = torch.zeros((), dtype=torch.float64, device=mesh.device)
    pairs = [(p, g) for p in parameters if (g := p.local_grad) is not None and g.numel()]
    if pairs:
        norms = torch.stack(torch._foreach_norm([g for _, g in pairs])).double()
        weights = torch.tensor([1 / p.placement.replicas(mesh) for p, _ in pairs], dtype=torch.float64, device=mesh.device)
        total = (norms.square() * weights).sum()
    if mesh.topology.world > 1:
        all_reduce(total, mesh.world_group, probe_for(recorder, "world", mesh.world_group, "norm"), direction="update")
    return total.sqrt()


def clip_gradients(parameters: Sequence[ShardedParameter], norm: Tensor, limit: float) -> None:
    """Scale all gradients so that their norm is at most `limit`; no host synchronisation."""
    grads = [g for p in parameters if (g := p.local_grad) is not None and g.numel()]
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    if grads:
        torch._foreach_mul_(grads, scale.to(grads[0].dtype))
