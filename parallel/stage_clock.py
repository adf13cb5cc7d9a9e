"""Where the time of a training step goes, on one rank: stages of the model, told apart from outside of it.

Forward, hooks and wrapped methods open and close spans around what a stage computes. Backward has no modules to hook into: but
every node of the autograd graph carries the number it was made under, and these numbers rise. So a node belongs to the stage that
was open when its number was drawn, and a hook before each node tells when the next stage begins. No product code knows of it.

A moment belongs to the span that was opened last (what is inside another stage is not counted there), and waiting for other
ranks, as the `CommRecorder` saw it, goes before all: so the stages of a step add up to its time.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..moe.dispatch import Dispatcher
from ..moe.layer import MoELayer
from .comm_record import CommRecord, Direction
from .engine import Engine
from .recorder_clock import Clock, Mark

OTHER = "other"
WAITING: Mapping[str, str] = MappingProxyType(
    {
        "counts": "counts",
        "dispatch": "dispatch",
        "notes": "dispatch",
        "combine": "combine",
        "gather_weights": "gather weights",
        "gradients": "gradients",
        **dict.fromkeys(("gather_sequence", "scatter_sequence", "loss", "embedding", "qk_norm", "capacity"), "tensor parallel"),
        **dict.fromkeys(("tokens", "statistics", "norm", "balance"), "step sums"),
    }
)
"""Stage of a rank that waits in a collective of this purpose."""
IN_LAYER = ("route", "sort", "compress", "permute", "counts", "dispatch", "experts", "combine", "restore", "shared")
"""Of a MoE layer, in the order of a token's way."""
STAGES = (
    *("embed", "attention", "norm", *IN_LAYER, "dense ffn", "statistics", "head"),
    *("tensor parallel", "gather weights", "gradients", "step sums", "optimizer"),
    OTHER,
)
"""In the order of a token's way. permute: rows into the order of experts and ranks, at both ends. counts: ranks tell each other
how many rows come; who is early waits there. restore: the weighted sum."""


@dataclass(frozen=True, slots=True)
class StageSpan:
    """One stage from begin to end on the clock of this rank, other stages inside of it included. layer: block, None outside."""

    stage: str
    layer: int | None
    direction: Direction
    begin_s: float
    end_s: float


Key = tuple[str, int | None, Direction]
"""(stage, layer, direction)"""


class _Open:
    __slots__ = ("begin", "end", "first", "last", "layer", "stage")

    def __init__(self, stage: str, layer: int | None, begin: Mark, first: int):
        self.stage, self.layer, self.begin, self.first = stage, layer, begin, first
        self.end: Mark = None
        self.last = first


class StageClock:
    """Times the stages of one engine on this rank while attached. clock: see `recorder_clock`."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self._stack: list[_Open] = []
        self._forward: list[_Open] = []
        self._update: list[_Open] = []
        self._switches: list[tuple[Mark, str | None, int | None]] = []
        self._in_backward = False
        self._undo: list[Callable[[], object]] = []

    @contextmanager
    def attached(self, engine: Engine) -> Iterator[StageClock]:
        """Hooks into the engine's model and optimizer; all are gone afterwards."""
        try:
            self._attach(engine)
            yield self
        finally:
            for undo in reversed(self._undo):
                undo()
            self._undo = []
            self.take()

    def take(self) -> list[StageSpan]:
        """The spans since the last call. The device must have nothing left to do."""
        read = self.clock.seconds
        spans = [StageSpan(o.stage, o.layer, "forward", read(o.begin), read(o.end)) for o in self._forward if o.end is not None]
        spans += [StageSpan(o.stage, None, "update", read(o.begin), read(o.end)) for o in self._update if o.end is not None]
        for (begin, stage, layer), (end, _, _) in itertools.pairwise(self._switches):
            if stage is not None:
                spans.append(StageSpan(stage, layer, "backward", read(begin), read(end)))
        self._stack, self._forward, self._update, self._switches = [], [], [], []
        return spans

    @contextmanager
    def span(self, stage: str, layer: int | None = None) -> Iterator[None]:
        """A forward stage around the body."""
        opened = self._begin(stage, layer)
        try:
            yield
        finally:
            self._end(opened)

    def _begin(self, stage: str, layer: int | None) -> _Open:
        opened = _Open(stage, layer, self.clock.mark(), _sequence())
        self._stack.append(opened)
        self._forward.append(opened)
        return opened

    def _end(self, opened: _Open) -> None:
        """Close a span, and whatever was left open inside of it."""
        now, number = self.clock.mark(), _sequence()
        while opened in self._stack:
            inner = self._stack.pop()
            inner.end, inner.last = now, number

    def _attach(self, engine: Engine) -> None:
        model = engine.model
        self._module(model.embed, "embed", None)
        for index, block in enumerate(model.blocks):
            self._module(block, OTHER, index)
            for part in (block.attention_norm, block.ffn_norm):
                self._module(part, "norm", index)
            self._module(block.attention, "attention", index)
            if block.ffn is not None:
                self._module(block.ffn, "dense ffn", index)
            if block.moe is not None:
                self._layer(block.moe, index)
        self._module(model.head, "head", None)
        self._hook(model.register_forward_hook(self._before_backward))
        step = engine.optimizer.step

        def timed(lr: float) -> None:
            opened = _Open("optimizer", None, self.clock.mark(), 0)
            step(lr)
            opened.end = self.clock.mark()
            self._update.append(opened)

        self._replace(engine.optimizer, "step", timed)

    def _hook(self, handle: Any) -> None:
        self._undo.append(handle.remove)

    def _module(self, module: nn.Module, stage: str, layer: int | None) -> None:
        """A span around a module's forward; what gathers its weights and has been there before stays inside."""
        opened: list[_Open] = []
        self._hook(module.register_forward_pre_hook(lambda *_: opened.append(self._begin(stage, layer)), prepend=True))
        self._hook(module.register_forward_hook(lambda *_: self._end(opened.pop())))

    def _layer(self, layer: MoELayer, index: int) -> None:
        sorting: list[_Open] = []

        def begin_sort(*_: Any) -> None:
            sorting.append(self._begin("sort", index))

        def end_sort(*_: Any) -> None:
            while sorting:
                self._end(sorting.pop())

        self._module(layer, "statistics", index)
        self._module(layer.router, "route", index)
        self._hook(layer.router.register_forward_hook(begin_sort))
        if layer.codec is not None:
            self._module(layer.codec, "compress", index)
            self._hook(layer.codec.register_forward_pre_hook(end_sort, prepend=True))
        self._module(layer.experts, "permute", index)
        self._hook(layer.experts.register_forward_pre_hook(end_sort, prepend=True))
        for name in ("compute", "late"):
            self._replace(layer.experts, name, self._timed(getattr(layer.experts, name), "experts", index))
        if layer.shared_expert is not None:
            self._module(layer.shared_expert, "shared", index)
        self._dispatcher(layer.dispatcher, index)

    def _dispatcher(self, dispatcher: Dispatcher, index: int) -> None:
        start = dispatcher.start

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.span("permute", index):
                flights = start(*args, **kwargs)
            for flight in flights:
                for name, stage in (("land", "permute"), ("finish", "restore")):
                    setattr(flight, name, self._timed(getattr(flight, name), stage, index))
            return flights

        self._replace(dispatcher, "start", timed)
        inner = getattr(dispatcher, "inner", None)
        if inner is not None:
            self._dispatcher(inner, index)

    def _timed(self, call: Callable[..., Any], stage: str, layer: int | None) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.span(stage, layer):
                return call(*args, **kwargs)

        return timed

    def _replace(self, owner: Any, name: str, by: Callable[..., Any]) -> None:
        before = vars(owner).get(name)
        setattr(owner, name, by)
        self._undo.append(lambda: delattr(owner, name) if before is None else setattr(owner, name, before))

    def _before_backward(self, _: nn.Module, __: Any, output: Any) -> None:
        """Hook into the nodes that this forward pass has made."""
        loss, aux = output
        roots = [loss, *([] if aux is None else [aux.probs_BE, aux.z_B])]
        made = sorted((o for o in self._forward if o.last > o.first), key=lambda o: o.first)
        if not made or not loss.requires_grad:
            return
        base = made[0].first
        owners: list[_Open | None] = [None] * (max(o.last for o in made) - base)
        for opened in made:  # those inside come later
            owners[opened.first - base : opened.last - base] = [opened] * (opened.last - opened.first)
        for node in _nodes(roots):
            place = node._sequence_nr() - base
            owner = owners[place] if 0 <= place < len(owners) else None
            stage, layer = (OTHER, None) if owner is None else (owner.stage, owner.layer)
            # of FSDP: it runs when the gradients of a module are there, and reduces them
            if "PostBackward" in node.name():
                stage = "gradients"
            node.register_prehook(self._switch_to(stage, layer))

    def _switch_to(self, stage: str, layer: int | None) -> Callable[[Any], None]:
        def switch(_: Any) -> None:
            if not self._in_backward:
                self._in_backward = True
                torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)
            elif self._switches[-1][1:] == (stage, layer):
                return
            self._switches.append((self.clock.mark(), stage, layer))

        return switch

    def _end_backward(self) -> None:
        self._in_backward = False
        self._switches.append((self.clock.mark(), None, None))


def _sequence() -> int:
    """Number that the next node of the graph gets."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def _nodes(roots: Sequence[Tensor]) -> Iterator[Any]:
    """Every node that made these tensors, but for those that add up a leaf's gradient."""
    open_ = [root.grad_fn for root in roots if root.grad_fn is not None]
    seen: set[Any] = set(open_)
    while open_:
        node = open_.pop()
        following = [parent for parent, _ in node.next_functions if parent is not None and parent not in seen]
        seen.update(following)
        open_ += following
        if node.next_functions:
            yield node


def split_by_stage(spans: Sequence[StageSpan], records: Sequence[CommRecord], begin_s: float, end_s: float) -> dict[Key, float]:
    """Seconds of each stage of one rank between two moments of its clock; they add up to end_s - begin_s.

    records: of this rank's collectives, on the same clock; those whose wait is not seen are left out.
    """
    waits = [
        StageSpan(WAITING.get(r.what, OTHER), r.layer, r.direction, r.wait_s, r.end_s) for r in records if r.wait_s is not None
    ]
    # (moment, end before begin, order of opening)
    every = [*sorted(spans, key=lambda s: (s.begin_s, -s.end_s)), *waits]
    moments: list[tuple[float, int, int]] = []
    for number, span in enumerate(every):
        low, high = max(begin_s, span.begin_s), min(end_s, span.end_s)
        if low < high:
            moments += [(low, 1, number), (high, 0, number)]
    times: dict[Key, float] = defaultdict(float)
    running: set[int] = set()
    before_s = begin_s
    for moment_s, begins, number in sorted(moments):
        times[_key(every, running)] += moment_s - before_s
        before_s = moment_s
        if begins:
            running.add(number)
        else:
            running.discard(number)
    times[_key(every, running)] += end_s - before_s
    return {key: seconds for key, seconds in times.items() if seconds}


def _key(every: Sequence[StageSpan], running: set[int]) -> Key:
    if not running:
        return OTHER, None, "update"
    span = every[max(running)]
    return span.stage, span.layer, span.direction
