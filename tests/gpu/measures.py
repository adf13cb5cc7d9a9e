"""What the checks of kernels measure: results with all gradients, their errors, waits of the host, memory, and graphs."""

from __future__ import annotations

import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from gpu.operations import Function, Operation

MARGIN = 1.1
"""Allowed is so many times the error of torch's computation in the same dtype."""
WORST_ROW = 2.0
"""The same for the row that is farthest off, an extreme among many and so less sharp; one wrong value stands out in its row."""
EPS32 = torch.finfo(torch.float32).eps

Relay = Callable[[Tensor], Tensor]
"""The same values in another place in memory."""


def as_it_is(x: Tensor) -> Tensor:
    return x


def transposed(x: Tensor) -> Tensor:
    """The last axis has a stride, the one before lies in one piece."""
    return x.mT.contiguous().mT if x.ndim > 1 else x


def inside_wider_rows(x: Tensor) -> Tensor:
    """Rows start at an address that no vector load accepts, and NaN lies between them."""
    if not x.ndim:
        return x
    inner = x.new_full((*x.shape[:-1], x.shape[-1] + 3), torch.nan)[..., 1:-2]
    return inner.copy_(x)


def relaid(operation: Operation, relay: Relay) -> Operation:
    """The same problem with its leaves elsewhere in memory."""
    return replace(operation, leaves={name: relay(x) for name, x in operation.leaves.items()})


def upstream(name: str, y: Tensor, dtype: torch.dtype) -> Tensor:
    """The gradient of an output: the same numbers in every dtype, as they are rounded to the one under test."""
    generator = torch.Generator(y.device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(y.shape, generator=generator, device=y.device).to(dtype).to(y.dtype)


def results(
    fn: Function,
    leaves: Mapping[str, Tensor],
    dtype: torch.dtype,
    through: tuple[str, ...] | None = None,
    relay: Relay = as_it_is,
) -> dict[str, Tensor]:
    """Outputs by name and the gradient of every leaf that has one, through the outputs `through`. No host synchronisation."""
    inputs = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    outputs = fn(**inputs)
    ways = [name for name, y in outputs.items() if y.requires_grad and (through is None or name in through)]
    along = [relay(upstream(name, outputs[name], dtype)) for name in ways]
    grads = torch.autograd.grad([outputs[name] for name in ways], list(inputs.values()), along, allow_unused=True)
    found = {name: y.detach() for name, y in outputs.items()}
    return found | {f"gradient of {name}": g for name, g in zip(inputs, grads, strict=True) if g is not None}


@dataclass(frozen=True)
class Error:
    """Distance from the exact result by its size. whole: over all values; worst: of the farthest row, by the usual row's size."""

    whole: float
    worst: float


def error_of(got: Tensor, exact: Tensor) -> Error:
    """Zero where both are zero; infinite where only the exact result is, or where the result holds a NaN."""
    if not exact.numel():
        return Error(0.0, 0.0)
    wide, got = exact.detach().double(), got.detach()
    rows = (-1, wide.shape[-1]) if wide.ndim > 1 else (-1, 1)
    missed_N = (got.double() - wide).reshape(rows).norm(dim=1)
    size, missed = float(wide.norm()), float(missed_N.norm())
    if size == 0.0 or not math.isfinite(missed):
        return Error(*2 * [0.0 if missed == 0.0 else math.inf])
    return Error(missed / size, float(missed_N.max()) / size * math.sqrt(len(missed_N)))


def allowed(plain: Error, like: Tensor, dtype: torch.dtype, terms: int) -> Error:
    """Errors that are allowed where torch's are `plain`, for a result of the shape of `like`.

    Added is what n rounded terms of a sum in fp32 usually come to, sqrt(n) (Higham and Mary, doi 10.1137/18M1226312); and
    where a result holds few numbers, the part of their rounding that is luck.
    """
    summed = EPS32 * max(8.0, math.sqrt(terms))
    width = like.shape[-1] if like.ndim > 1 else 1
    lucky, lucky_row = (2 * torch.finfo(dtype).eps / math.sqrt(max(n, 1)) for n in (like.numel(), width))
    return Error(MARGIN * plain.whole + summed + lucky, WORST_ROW * plain.worst + 4 * summed + lucky_row)


def poison_free_memory(device: torch.device) -> None:
    """Memory that CUDA's allocator hands out next holds ones in all bits: NaN as floats, -1 as integers.

    Blocks of every size class are filled and given back to the allocator, which prefers them to new memory. On a CPU,
    which has no such allocator, the fixture `poisoned_memory` is for that.
    """
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    large = min(8 << 30, torch.cuda.mem_get_info(device)[0] // 2)
    # up to 1 MiB are cut from small segments, more from large ones
    sizes = [*64 * [1 << 20], large]
    held = [torch.full((size,), 255, dtype=torch.uint8, device=device) for size in sizes]
    del held


@contextmanager
def _reads_noted(found: list[str]) -> Iterator[None]:
    """On a CPU: the names of the calls that would wait for a GPU."""

    def noting(name: str) -> Callable[..., Any]:
        read = getattr(torch.Tensor, name)

        def noted(self: Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append(name)
            return read(self, *args, **kwargs)

        return noted

    with ExitStack() as stack:
        for name in ("item", "tolist", "nonzero", "masked_select", "__bool__", "__int__", "__float__", "__index__"):
            stack.enter_context(mock.patch.object(torch.Tensor, name, noting(name)))
        yield


@contextmanager
def host_waits(device: torch.device, expected: int = 0) -> Iterator[None]:
    """The host waits exactly `expected` times for the device. With 0, on a GPU, a wait raises where it happens.

    Torch's own detector, which sees torch's waits. Launches of kernels that were compiled before do not wait.
    """
    found: list[str] = []
    if device.type != "cuda":
        with _reads_noted(found):
            yield
    else:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn" if expected else "error")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
        found = [str(w.message) for w in caught if "synchronizing" in str(w.message)]
    assert len(found) == expected, f"the host waits {len(found)} times instead of {expected}: {found}"


def captured(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`step` as a CUDA graph, of which the returned function is a replay; on a CPU `step` itself."""
    if device.type != "cuda":
        return step
    aside = torch.cuda.Stream(device)
    aside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(aside):
        # compiles, and makes what libraries set up at their first call
        for _ in range(2):
            step()
    torch.cuda.current_stream(device).wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def saved_bytes(fn: Function, leaves: Mapping[str, Tensor], without: tuple[str, ...]) -> int:
    """Bytes of the tensors that autograd keeps of `fn(**leaves)` for backward, each once, but not of the leaves `without`."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    inputs = {name: x.detach().requires_grad_() for name, x in leaves.items()}
    with torch.autograd.graph.saved_tensors_hooks(pack, as_it_is):
        fn(**inputs)
    return sum(size for at, size in kept.items() if at not in {leaves[name].untyped_storage().data_ptr() for name in without})
