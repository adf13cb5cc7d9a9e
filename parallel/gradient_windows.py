"""Sums of gradients over data ranks, placed where the slow link is idle: the adaptive gradient partitioning of FSMoE (ASPLOS
2025, section 5), for FSDP2.

By itself FSDP sums a block's gradients when its backward has ended: where collectives block (gloo) the next block waits for it,
elsewhere (NCCL) it competes for the link with the next block's exchanges of rows. Here FSDP hands each sum to a queue instead.
The queue is emptied at places of backward that are the same on every rank, as they follow from the program, not from who is
ready:

* "experts": the experts of a layer begin, all rows are here and none are sent back yet. Only with one exchange in backward, as
  with more of them others are under way.
* "rest": all exchanges of the layer have been waited for; attention and the dense blocks below it come next, up to the exchange
  of the next MoE layer.

In a window as many bytes are started as it has been given (`WindowBytes`), or all of the queue; then also above the first MoE
layer of backward, where no rows have travelled yet. What is left is started when backward has ended. Everything is waited for
there, before anybody reads a gradient.

What is summed: gradients over the shards (reduce-scatter), or, with replicas (hybrid sharding), what has been scattered over the
replicas (all-reduce): shards are then meant to be close, so that their scatter stays where FSDP has it. FSDP of its own reads
what is still being summed in these cases, none of which arises, and `_check` refuses gradients that do not lie where they were
summed: parameters of another type than their gradients' sums are not made by `apply`; gradients of earlier micro-batches are put
aside during backward and added after it; sums over replicas are made here, by FSDP's hook for an own all-reduce on a model that
is sharded over one axis; nothing is offloaded. Without a window open (`around`), a sum is made at once.

Sums run in process groups of their own, so that gathers of weights need not queue behind them. On CUDA they are started from the
stream of the model, which by then waits for the exchanges before, after what FSDP's own stream did to the same memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..moe.layer import MoELayer
from ..moe.model import Model
from .gradient_placement import Window, WindowBytes
from .mesh import Mesh
from .recorder import CommRecorder, Probe, Span, probe_for, waited
from .recorder_fsdp import sharded_units
from .sharding import ShardedParameter

Windows = bool | Mapping[int, WindowBytes]
"""Whether to use windows: False = FSDP sums when it likes; True = all that is there goes into the next one; or bytes for the
windows of each MoE layer, by its index among the model's blocks."""
EVERYTHING = sys.maxsize
LEAST_BYTES = 1 << 14
"""A smaller part of a sum is not worth a collective of its own."""


@dataclass(frozen=True, eq=False)
class _Sum:
    """How the gradients of one unit of FSDP are summed. name: for errors."""

    name: str
    group: dist.ProcessGroup
    probe: Probe | None
    scatters: bool


@dataclass
class _Queued:
    """A sum that waits for its turn. source: what is scattered, None where `out` is summed in place. ready: when both may be used
    (CUDA). done: values of `out` that are under way already."""

    by: _Sum
    out: Tensor
    source: Tensor | None
    ready: Any
    done: int = 0

    @property
    def value_bytes(self) -> int:
        """Of the whole tensor, for each value of `out`."""
        ranks = 1 if self.source is None else self.source.numel() // self.out.numel()
        return ranks * self.out.element_size()


@dataclass(frozen=True)
class _UnderWay:
    """A sum that has been started. kept: what it reads."""

    work: dist.Work
    span: Span | None
    kept: Tensor


class GradientWindows:
    """The queue of one rank's model, which all its blocks share.

    Args:
        given: see `Windows`; not False.
        recorder: gets a span for every part that is started: what goes on until it is waited for hides it.
    """

    def __init__(self, given: Windows, recorder: CommRecorder | None = None):
        self.given = None if isinstance(given, bool) else given
        self.recorder = recorder
        self.deferring = self.last = False
        self.parameters: tuple[ShardedParameter, ...] = ()
        self._all: tuple[ShardedParameter, ...] = ()
        self._replicated: frozenset[nn.Parameter] = frozenset()
        self._queue: list[_Queued] = []
        self._under_way: list[_UnderWay] = []
        self._outs: list[tuple[str, Tensor]] = []
        self._partial: dict[_Sum, Tensor] = {}
        self._spent: list[Tensor] = []
        self._at: tuple[int, Window] | None = None
        self._left = 0

    def attach(self, model: Model, mesh: Mesh, parameters: Sequence[ShardedParameter]) -> None:
        """Take over the sums of a model that `apply.parallelize` has sharded over one axis, and mark its windows. Collective.

        parameters: all of the model.
        """
        self._all = tuple(parameters)
        self.parameters = tuple(p for p in parameters if p.placement.kind != "whole")
        topology = mesh.topology
        replicated = {axis for axis in ("dp", "edp") if getattr(topology, f"{axis}_replicate") > 1}
        kinds = {axis: f"{axis}_replicate" if axis in replicated else f"{axis}_shard" for axis in ("dp", "edp")}
        several = [kind for kind in kinds.values() if getattr(topology, kind) > 1]
        groups = {kind: mesh.sum_group(kind) for kind in several}
        for module, axis, layer in sharded_units(model):
            kind = kinds[axis]
            if kind not in groups:
                continue  # nobody to sum with
            name = f"{'the model' if layer is None else f'layer {layer}'} ({axis})"
            probe = probe_for(self.recorder, kind, groups[kind], "gradients", layer)
            by = _Sum(name, groups[kind], probe, scatters=axis not in replicated)
            assert isinstance(module, FSDPModule)
            if not by.scatters:
                module.set_all_reduce_hook(_Replicas(self, by))
            else:
                module.set_custom_reduce_scatter(_Scatter(self, by))  # type: ignore[arg-type] # its base class is not public
        axis_of = {"expert": "edp", "dense": "dp"}
        self._replicated = frozenset(p.parameter for p in self.parameters if axis_of[p.placement.kind] in replicated)
        for index, block in enumerate(model.blocks):
            if block.moe is not None:
                self._mark_layer(block.moe, index)
            else:
                assert block.ffn is not None
                block.ffn.register_forward_hook(lambda _, args, out: _when_reached(out, self._go_on))

    def _mark_layer(self, layer: MoELayer, index: int) -> None:
        compute = layer.experts.compute

        def marked(*args: Any, **kwargs: Any) -> Tensor:
            out = compute(*args, **kwargs)
            # asked for at each call: a layer may be given another way of sending
            if layer.dispatcher.pieces.backward == 1:
                _when_reached(out, lambda: self._open(index, "experts"))
            return out

        def begin(module: nn.Module, args: tuple[Any, ...]) -> None:
            _when_reached(args[0], lambda: self._open(index, "rest"))

        layer.experts.compute = marked  # type: ignore[method-assign]
        layer.register_forward_pre_hook(begin)

    def add(self, by: _Sum, out: Tensor, source: Tensor | None) -> None:
        """FSDP wants this sum now: queue it, or make it at once where no window will come."""
        event = torch.cuda.current_stream().record_event() if out.is_cuda else None
        item = _Queued(by, out, source, event)
        if not self.deferring:
            now = self._start(item, out.numel())
            waited(now.work, now.span)
            return
        self._queue.append(item)
        self._outs.append((by.name, out))

    def sum_over_replicas(self, by: _Sum, out: Tensor) -> None:
        """The sum over replicas of what has been scattered, once for all micro-batches: added up until the last one."""
        if by in self._partial and self.deferring:
            total = self._partial[by]
            if not self.last:
                total += out
                return
            out += total
            # read by a stream that is not the one it was made in: freed when the model waits for both
            self._spent.append(self._partial.pop(by))
        elif self.deferring and not self.last:
            self._partial[by] = out
            return
        self.add(by, out, None)

    @contextmanager
    def around(self, *, first: bool = True, last: bool = True) -> Iterator[None]:
        """Backward of one micro-batch, the first or last of a step. When the body has ended, gradients are summed and in their
        places. If it raises, nothing is left of it, and no gradients.

        Raises:
            RuntimeError: FSDP has put gradients elsewhere than where they are summed.
        """
        if first:
            self._partial.clear()
        earlier = {p.parameter: p.parameter.grad for p in self.parameters if p.parameter.grad is not None}
        for parameter in earlier:
            # FSDP would add to it what is not summed yet
            parameter.grad = None
        self.deferring, self.last, self._at = True, last, None
        # what is given is given to windows, and none has opened
        self._left = EVERYTHING if self.given is None else 0
        try:
            yield
            self._finish(earlier)
        except BaseException:
            self._abandon()
            raise
        finally:
            self.deferring = False

    def _finish(self, earlier: Mapping[nn.Parameter, Tensor]) -> None:
        self._at, self._left = None, EVERYTHING
        self._launch()
        self._check()
        for one in self._under_way:
            waited(one.work, one.span)
        self._under_way, self._outs, self._spent = [], [], []
        if not self.last:
            # kept in `_partial`
            for parameter in self._replicated:
                parameter.grad = None
        for p in self.parameters:
            if (old := earlier.get(p.parameter)) is None:
                continue
            new, p.parameter.grad = p.local_grad, old
            if new is not None:
                p.local_grad.add_(new)  # type: ignore[union-attr]

    def _check(self) -> None:
        places = {g.untyped_storage().data_ptr() for p in self.parameters if (g := p.local_grad) is not None}
        for name, out in self._outs:
            if out.untyped_storage().data_ptr() not in places:
                raise RuntimeError(
                    f"the gradients of {name} are not where they are being summed: FSDP has copied them before (offloading, or "
                    "parameters of another type than the sums?); train with parallel.gradient_windows = false"
                )

    def _abandon(self) -> None:
        """What is under way ends by itself: waiting for ranks that may have failed would hide why."""
        for one in self._under_way:
            if one.span is not None:
                one.span.failed, one.span.ended = True, one.span.probe.recorder.clock.mark()
        self._queue, self._under_way, self._outs, self._spent = [], [], [], []
        self._partial.clear()
        for p in self._all:
            p.parameter.grad = None

    def _open(self, layer: int, window: Window) -> None:
        if not self.deferring:
            return
        if self._at != (layer, window):
            # of several units of a layer, the first opens the window of its experts
            self._at = (layer, window)
            self._left = EVERYTHING if self.given is None else getattr(self.given[layer], window)
        self._launch()

    def _go_on(self) -> None:
        """Still in the last window: a dense block begins."""
        if self.deferring:
            self._launch()

    def _let_go(self) -> None:
        """Free what has ended. Ranks may differ in it: it starts nothing.

        On gloo, scatters do not say that they have ended before somebody waits: there all are kept until backward has ended.
        """
        going = []
        for one in self._under_way:
            if one.work.is_completed():
                waited(one.work, one.span)
            else:
                going.append(one)
        self._under_way = going

    def _launch(self) -> None:
        """Start what the window has room for, the oldest first."""
        self._let_go()
        while self._queue:
            item = self._queue[0]
            values = int(min(item.out.numel() - item.done, self._left // item.value_bytes))
            whole = item.done + values == item.out.numel()
            if values == 0 or (not whole and values * item.value_bytes < LEAST_BYTES):
                return
            self._left -= values * item.value_bytes
            self._under_way.append(self._start(item, values))
            if whole:
                self._queue.pop(0)

    def _start(self, item: _Queued, values: int) -> _UnderWay:
        """Start the sum of so many values more."""
        if item.ready is not None:
            torch.cuda.current_stream().wait_event(item.ready)
        part = slice(item.done, item.done + values)
        item.done += values
        out, read = item.out[part], item.out[part]
        if item.source is not None:
            read = item.source
            if values < item.out.numel():
                read = item.source.view(-1, item.out.numel())[:, part].contiguous().flatten()
        probe, op = item.by.probe, "reduce_scatter" if item.by.scatters else "all_reduce"
        span = None
        if probe is not None:
            span = probe.span(op, read.numel() * read.element_size(), direction="backward").launch()  # type: ignore[arg-type]
        if item.by.scatters:
            # named differently from torch 2.13 on
            scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
            work = scatter(out, read, group=item.by.group, async_op=True)
        else:
            work = dist.all_reduce(out, group=item.by.group, async_op=True)
        return _UnderWay(work, span, read)


def _when_reached(x: Tensor, then: Callable[[], None]) -> None:
    """Call `then` in backward, when the gradient of `x` is there."""

    def reached(grad: Tensor) -> None:
        then()

    if x.requires_grad:
        x.register_hook(reached)


class _Scatter:
    """In place of FSDP's reduce-scatter."""

    def __init__(self, windows: GradientWindows, by: _Sum):
        self.windows, self.by = windows, by

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        assert op == dist.ReduceOp.SUM and not async_op, "`apply` has FSDP sum, synchronously"
        self.windows.add(self.by, output_tensor, input_tensor)


class _Replicas:
    """FSDP's hook for what comes after the reduce-scatter."""

    def __init__(self, windows: GradientWindows, by: _Sum):
        self.windows, self.by = windows, by

    def __call__(self, out: Tensor) -> None:
        self.windows.sum_over_replicas(self.by, out)
