"""The collectives of FSDP2 under the recorder, through its public hooks for custom communication.

All-gathers of weights and reduce-scatters of gradients are replaced by the same calls with a span around them. The all-reduce
over replicas (hybrid sharding) has no such hook: its span is a bracket, from the end of the reduce-scatter (with one shard, from
where its output is allocated) to the hook that runs after the all-reduce, and so takes in a copy of the gradients.

On a GPU these run on streams of FSDP, beside the model: how long the model then waits is not seen here (`wait_s` is None).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..moe.model import Model
from .mesh import Mesh
from .recorder import CommRecorder, Probe, Span


def sharded_units(model: Model) -> Iterator[tuple[nn.Module, str, int | None]]:
    """The modules that FSDP gathers and reduces as one, with their data axis and the index of their block, None outside."""
    for index, block in enumerate(model.blocks):
        yield block, "dp", index
        if block.moe is not None:
            yield block.moe.experts, "edp", index
    yield model, "dp", None


def record_sharding(model: Model, mesh: Mesh, recorder: CommRecorder, *, replicas: bool = True) -> None:
    """Have the weights' gathers, scatters and sums over replicas of a model from `apply.parallelize` recorded.

    replicas: False where FSDP does not make the sums over replicas.
    """
    for module, axis, layer in sharded_units(model):
        _record(module, recorder, axis, mesh, layer, replicas)


def _record(module: nn.Module, recorder: CommRecorder, axis: str, mesh: Mesh, layer: int | None, sums: bool) -> None:
    assert isinstance(module, FSDPModule), f"{type(module).__name__} is not sharded: record after `parallelize`"
    view = mesh.expert if axis == "edp" else mesh.dense
    shards, replicas = view.get_group(f"{axis}_shard"), view.get_group(f"{axis}_replicate")
    if not sums or dist.get_world_size(replicas) == 1:
        record_fsdp(module, recorder, axis, shards, layer)
    else:
        record_hsdp(module, recorder, axis, shards, replicas, layer)


def record_fsdp(
    module: FSDPModule, recorder: CommRecorder, axis: str, shards: dist.ProcessGroup, layer: int | None = None
) -> None:
    """Have this module's gathers and scatters of weights recorded, on axis `<axis>_shard`; not those of modules inside it.

    shards: the group that the module's weights are sharded over. layer: index of the block, None outside blocks.
    """
    gather = recorder.probe(f"{axis}_shard", shards, "gather_weights", layer)
    scatter = recorder.probe(f"{axis}_shard", shards, "gradients", layer)
    module.set_custom_all_gather(_Gather(gather))  # type: ignore[arg-type] # its base class is not public
    module.set_custom_reduce_scatter(_Scatter(scatter, None))  # type: ignore[arg-type]


def record_hsdp(
    module: FSDPModule,
    recorder: CommRecorder,
    axis: str,
    shards: dist.ProcessGroup,
    replicas: dist.ProcessGroup,
    layer: int | None = None,
) -> None:
    """As `record_fsdp`, and the sums over replicas on axis `<axis>_replicate`, as brackets.

    Set `recorder.sums_over_replicas` along with the module's `set_requires_all_reduce`.
    """
    record_fsdp(module, recorder, axis, shards, layer)
    scatter = recorder.probe(f"{axis}_shard", shards, "gradients", layer)
    bracket = _Bracket(recorder.probe(f"{axis}_replicate", replicas, "gradients", layer))
    module.set_custom_reduce_scatter(_Scatter(scatter, bracket))  # type: ignore[arg-type]
    module.set_all_reduce_hook(bracket.close)


class _Bracket:
    """The all-reduce between two places that FSDP lets us see."""

    def __init__(self, probe: Probe):
        self.probe = probe
        self.span: Span | None = None

    def open(self) -> None:
        """The all-reduce is next; of two calls the second counts."""
        if not self.probe.recorder.sums_over_replicas:
            return
        if self.span is None:
            self.span = self.probe.span("all_reduce", direction="backward").__enter__()
        else:
            self.span.begun = self.probe.recorder.clock.mark()
        self.span.waiting = _waiting(self.span)

    def close(self, reduced: Tensor) -> None:
        """It has been called on `reduced`. On a GPU this runs in its stream."""
        if self.span is None:
            raise RuntimeError("FSDP summed over replicas while CommRecorder.sums_over_replicas said that it would not")
        self.span.nbytes = reduced.numel() * reduced.element_size()
        self.span.__exit__(None, None, None)
        self.span = None


def _waiting(span: Span) -> Any:
    """When the model begins to wait: at once, where collectives return when they have ended; else it is not seen."""
    return span.begun if span.probe.recorder.clock.host else None


def _allocate(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(*size, dtype=dtype, device=device)


class _Gather:
    def __init__(self, probe: Probe):
        self.probe = probe

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return _allocate(size, dtype, device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False) -> None:
        if async_op:
            raise ValueError(
                "FSDPModule.unshard(async_op=True) is not recorded: unshard synchronously, or train without recorder"
            )
        # named differently from torch 2.13 on
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        with self.probe.span("all_gather", input_tensor.numel() * input_tensor.element_size()) as span:
            gather(output_tensor, input_tensor, group=group)
        span.waiting = _waiting(span)


class _Scatter:
    def __init__(self, probe: Probe, bracket: _Bracket | None):
        self.probe, self.bracket = probe, bracket

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        out = _allocate(size, dtype, device)
        if self.bracket is not None and len(self.probe.group.members) == 1:
            self.bracket.open()  # nothing is scattered
        return out

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        if async_op:
            raise ValueError("an asynchronous reduce-scatter is not recorded: use no recorder")
        scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
        nbytes = input_tensor.numel() * input_tensor.element_size()
        with self.probe.span("reduce_scatter", nbytes, direction="backward") as span:
            scatter(output_tensor, input_tensor, op=op, group=group)
        span.waiting = _waiting(span)
        if self.bracket is not None:
            self.bracket.open()
