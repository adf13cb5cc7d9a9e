"""What a call costs besides time: memory at its peak, memory kept for backward, launches, and stops of the host."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

MIB = 2.0**20
SYNCS = frozenset({"cudaStreamSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cuEventSynchronize", "cudaMemcpy"})


@dataclass(frozen=True)
class Saved:
    """Bytes that autograd keeps for backward, each storage counted once. weights: those of parameters, which exist anyway."""

    activations: int
    weights: int


def saved_bytes(forward: Callable[[], object], weights: Collection[Tensor]) -> Saved:
    """Storages that one forward packs for backward. Inputs count as activations: somebody must keep them alive.

    What an autograd function keeps elsewhere than in its saved tensors is not seen here, but in `held_bytes`.
    """
    sizes: dict[int, int] = {}
    apart = {w.untyped_storage().data_ptr() for w in weights}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        # alive until all is counted: freed storages would give their addresses to others
        outputs = forward()
    del outputs
    return Saved(
        sum(size for at, size in sizes.items() if at not in apart), sum(size for at, size in sizes.items() if at in apart)
    )


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Allocated at the highest point of a call, above what was before; None without CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def held_bytes(forward: Callable[[], Mapping[str, Tensor]], device: torch.device) -> int | None:
    """Allocated after a forward, its outputs apart: all that waits for backward, inputs not counted; None without CUDA."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    outputs = forward()
    torch.cuda.synchronize(device)
    own = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in outputs.values()}
    return torch.cuda.memory_allocated(device) - before - sum(own.values())


@dataclass(frozen=True)
class Counts:
    """Kernels, copies and fills that one call queues, and its waits for the device; None where no profiler says."""

    launches: int | None
    syncs: int | None


def count(call: Callable[[], object], device: torch.device) -> Counts:
    """By torch's profiler, on a call that has been made before."""
    if device.type != "cuda":
        return Counts(None, None)
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profile:
        call()
        # waits for the whole device, which is not among the waits that are counted
        torch.cuda.synchronize(device)
    events = profile.events() or []
    launches = sum(event.device_type == torch.autograd.DeviceType.CUDA for event in events)
    # a profiler that may not read the device's counters reports no launch at all
    return Counts(launches, sum(event.name in SYNCS for event in events)) if launches else Counts(None, None)
