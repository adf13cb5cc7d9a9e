"""Spread a model over a mesh: one function, in this order: dispatcher and peers, local shards with initial values, tensor
parallelism, recompute, data sharding. The model itself knows of none of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

from ..moe.config import ModelConfig
from ..moe.dispatch import Dispatcher, LocalDispatcher, Pieces
from ..moe.init import initial_value
from ..moe.layer import MoELayer
from ..moe.model import Block, Model
from .all_to_all import AllToAllDispatcher
from .gradient_windows import GradientWindows
from .hierarchical import HierarchicalDispatcher
from .mesh import Mesh
from .peers import MeshPeers
from .recorder import CommRecorder
from .recorder_fsdp import record_sharding
from .sharding import WHOLE, Placement, ShardedParameter, place
from .tensor import attach_tensor_parallel
from .wire import Wire

LayerPieces = int | Pieces | Mapping[int, Pieces]
"""What all layers are sent in, one number for both directions or two, or each by its index among the model's blocks."""
COMPUTE_DTYPES = (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp64", torch.float64))


def compute_dtype(precision: str) -> torch.dtype:
    """dtype of activations and matrix products under a `train.precision`."""
    return dict(COMPUTE_DTYPES)[precision]


def build_dispatcher(name: str, mesh: Mesh, num_experts: int, **options: Any) -> Dispatcher | None:
    """The dispatcher of `model.moe.dispatcher`, None if all experts are on every rank. New ones are one file and a row here.

    options: `pieces`, `recorder`, `layer` and `wire` of the dispatchers. In two levels, both send by that wire.
    """
    if mesh.topology.ep * mesh.topology.etp == 1:
        return None
    makers: dict[str, Callable[[], Dispatcher]] = {
        "all_to_all": lambda: AllToAllDispatcher(mesh.ep_etp_group, mesh.topology.ep, mesh.topology.etp, num_experts, **options),
        "hierarchical": lambda: _hierarchical(mesh, num_experts, **options),
    }
    return makers[name]()


def _hierarchical(mesh: Mesh, num_experts: int, **options: Any) -> Dispatcher:
    """Two levels, or one where all ranks of the group share a node."""
    etp, groups = mesh.topology.etp, mesh.by_node
    assert groups is not None, "the mesh was built without a map of nodes"
    ranks, nodes = len(groups.levels.inside[0]), len(groups.levels.inside)
    if nodes == 1:
        return AllToAllDispatcher(groups.inside, ranks // etp, etp, num_experts, **options)
    inner: Dispatcher = LocalDispatcher()
    if ranks > 1:
        # what comes in pieces over the slow links is dealt out at once
        # and its experts are numbered anew: rows by expert are told once, above
        whole = options | {"pieces": 1, "axis": "inside_node", "counts_rows": False}
        inner = AllToAllDispatcher(groups.inside, ranks // etp, etp, num_experts // nodes, **whole)
    return HierarchicalDispatcher(groups, inner, num_experts, mesh.device, **options)


def parallelize(
    config: ModelConfig,
    mesh: Mesh,
    *,
    seed: int,
    precision: str = "fp32",
    recompute: str = "none",
    pieces: LayerPieces = 1,
    recorder: CommRecorder | None = None,
    windows: GradientWindows | None = None,
) -> tuple[Model, tuple[ShardedParameter, ...]]:
    """Build the model on this rank: its shards of the weights that `seed` gives, ready for forward and backward.

    Never holds more than one block of unsharded weights. Collective over the mesh.

    windows: sums gradients instead of FSDP; backward then belongs inside its `around`.

    Returns:
        The model, and its parameters in a fixed order that is the same on every rank.
    """
    with torch.device("meta"):
        model = Model(config, init=False)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    placements = {n: place(n, s, mesh, full_qk_norm=config.qk_norm == "full") for n, s in shapes.items()}
    attach_doors(model, mesh, pieces, recorder)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype(precision), reduce_dtype=dtype) if precision == "bf16" else None
    fill = functools.partial(_materialise, placements=placements, config=config, mesh=mesh, seed=seed, dtype=dtype)
    for index, block in enumerate(model.blocks):
        fill(block, f"layers.{index}.")
    for part in ("embed", "head"):
        fill(getattr(model, part), f"{part}.")
    if config.tie_embeddings:
        model.head.weight_VD = model.embed.weight_VD
    attach_tensor_parallel(model, mesh.tp_group, recorder)
    if recompute == "selective":
        apply_recompute(model)
    for index, block in enumerate(model.blocks):
        _shard_block(block, f"layers.{index}.", placements, mesh, policy, replicas=windows is None)
    _shard_module(model, mesh, expert=False, policy=policy, replicas=windows is None)
    if recorder is not None:
        record_sharding(model, mesh, recorder, replicas=windows is None)
    parameters = tuple(ShardedParameter(placements[name], p) for name, p in model.named_parameters())
    if windows is not None:
        windows.attach(model, mesh, parameters)
    return model, parameters


def attach_doors(model: Model, mesh: Mesh, pieces: LayerPieces = 1, recorder: CommRecorder | None = None) -> None:
    """Give every MoE layer its dispatcher and its peers. pieces: of all layers, or of each by its index."""
    for index, block in enumerate(model.blocks):
        if (layer := block.moe) is not None:
            layer.peers = MeshPeers(mesh.tp_group, mesh.world_group, recorder, index)
            own = pieces if isinstance(pieces, int | Pieces) else pieces[index]
            options = {"pieces": own, "recorder": recorder, "layer": index, "wire": Wire.of(layer.config)}
            dispatcher = build_dispatcher(layer.config.dispatcher, mesh, layer.config.num_experts, **options)
            layer.dispatcher = dispatcher or layer.dispatcher


def moe_layers(model: Model) -> list[MoELayer]:
    """The MoE layers of a model, in order."""
    return [block.moe for block in model.blocks if block.moe is not None]


@torch.no_grad()
def _materialise(
    module: nn.Module,
    prefix: str,
    *,
    placements: dict[str, Placement],
    config: ModelConfig,
    mesh: Mesh,
    seed: int,
    dtype: torch.dtype,
) -> None:
    """Replace meta parameters by this rank's tp, etp and ep shards with their initial values, and buffers by zeros."""
    for path, child in module.named_modules():
        for leaf, parameter in list(child._parameters.items()):
            name = prefix + (f"{path}." if path else "") + leaf
            if parameter is None or name not in placements:
                continue  # a tied weight: it has one logical name
            p = placements[name]
            experts = mesh.topology.expert_range(mesh.coordinates.ep, p.global_shape[0]) if p.kind == "expert" else None
            value = initial_value(
                name, p.global_shape, seed=seed, std=config.init_std, num_layers=config.num_layers, experts=experts
            )
            local = p.slice_local(value, mesh).to(mesh.device, dtype, copy=True).contiguous()
            setattr(child, leaf, nn.Parameter(local))
        for leaf, buffer in list(child._buffers.items()):
            if buffer is not None:
                child._buffers[leaf] = torch.zeros_like(buffer, device=mesh.device)


def apply_recompute(model: Model) -> None:
    """Recompute attention, experts and feed-forward in backward from their inputs.

    Routing and the all-to-all stay outside: they are never run twice, so nothing is counted twice and no token can take another
    route in backward.
    """
    for block in model.blocks:
        parts: list[nn.Module | None] = [block.attention, block.ffn]
        if block.moe is not None:
            parts.append(block.moe.shared_expert)
            # not forward, which sends and receives
            block.moe.experts.compute = _recomputed(block.moe.experts.compute)  # type: ignore[method-assign]
        for part in parts:
            if part is not None:
                part.forward = _recomputed(part.forward)


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    return functools.partial(checkpoint, forward, use_reentrant=False, preserve_rng_state=False)


def _shard_block(
    block: Block,
    prefix: str,
    placements: dict[str, Placement],
    mesh: Mesh,
    policy: MixedPrecisionPolicy | None,
    replicas: bool,
) -> None:
    if block.moe is not None:
        dims = {p: placements[f"{prefix}moe.experts.{n}"].data_dim for n, p in block.moe.experts.named_parameters()}
        _shard_module(block.moe.experts, mesh, expert=True, policy=policy, replicas=replicas, data_dims=dims)
    # these stay whole and uncast on every rank
    ignored = {p for n, p in block.named_parameters() if n.endswith(WHOLE)}
    _shard_module(block, mesh, expert=False, policy=policy, replicas=replicas, ignored=ignored)


def _shard_module(
    module: nn.Module,
    mesh: Mesh,
    *,
    expert: bool,
    policy: MixedPrecisionPolicy | None,
    replicas: bool,
    data_dims: dict[nn.Parameter, int] | None = None,
    ignored: set[nn.Parameter] | None = None,
) -> None:
    """FSDP2 over the data ranks, with gradients summed instead of averaged. replicas: whether it sums over replicas too."""
    dims = data_dims or {}
    fully_shard(
        module,
        mesh=mesh.data_mesh(expert, replicas),
        shard_placement_fn=lambda p: Shard(dims.get(p, 0)),
        mp_policy=policy or MixedPrecisionPolicy(cast_forward_inputs=False),
        ignored_params=ignored or set(),
    )
    assert isinstance(module, FSDPModule)
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)
