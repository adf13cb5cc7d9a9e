"""What a MoE layer takes when it is sent in pieces: a simulation of its operations on links and processor, and the best number.

Resources are "compute" and two links, "across" nodes and "inside" one. A link is one queue for both ways of a token: in an
all-to-all every rank sends and receives at once, so that dispatch and combine of different pieces want the same two directions
(on gloo, equal parts of dispatch, experts and combine gain at most 3 / 2 by overlap, which this gives; two queues would give 3).
A group's exchanges run in the order in which they were started: gloo sends over one connection per pair of ranks, NCCL on one
stream. Exchanges of different groups run side by side.

The order is that of the code, not the best one: operations are started by the host thread, and what computes waits there. On a
CPU the host is what computes. On a GPU its place is taken by the compute stream, which waits for events of the communication
streams at the same points; what the host needs to enqueue everything is left out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from .cost_model import ComputeModel, LinkModel

Resource = Literal["across", "inside", "compute"]
MOST_CHUNKS = 16
CLOSE = 0.01
"""Predicted times that differ by less than this part count as equal: fewer pieces then cost less of what is not predicted."""
_MARKS = "0123456789abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Op:
    """One operation. after: names of those that must have ended. mark: one character for drawings."""

    name: str
    resource: Resource
    seconds: float
    after: tuple[str, ...] = ()
    mark: str = "#"


@dataclass(frozen=True)
class Span:
    """When an operation ran."""

    op: Op
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """A simulated run: spans by start."""

    spans: tuple[Span, ...]

    @property
    def makespan_s(self) -> float:
        return max((span.end_s for span in self.spans), default=0.0)

    def on(self, resource: Resource) -> tuple[Span, ...]:
        """What ran on a resource, by start."""
        return tuple(span for span in self.spans if span.op.resource == resource)

    def busy_s(self, resource: Resource) -> float:
        return sum(span.end_s - span.start_s for span in self.on(resource))

    def idle(self, resource: Resource) -> tuple[tuple[float, float], ...]:
        """(start, end) of every gap between 0 and the makespan."""
        edges = [(0.0, 0.0), *((span.start_s, span.end_s) for span in self.on(resource)), (self.makespan_s, self.makespan_s)]
        return tuple((end, start) for (_, end), (start, _) in itertools.pairwise(edges) if start > end)

    def draw(self, width: int = 72) -> str:
        """One line of characters for each resource in use; a dot is idle time."""
        scale = width / self.makespan_s if self.makespan_s else 0.0
        lines = []
        for resource in ("across", "inside", "compute"):
            line = ["."] * width
            for span in self.on(resource):
                first, last = round(span.start_s * scale), round(span.end_s * scale)
                line[first:last] = span.op.mark * (last - first)
            if self.on(resource):
                lines.append(f"{resource:7} |{''.join(line)}|")
        return "\n".join(lines)


def run(ops: Sequence[Op], *, in_order: bool = True, contention: float = 1.0) -> Timeline:
    """Simulate operations, each as early as its resource and those before it allow.

    Args:
        in_order: a resource takes its operations in the order of `ops`, as a queue does. False: it takes the first one in this
            order that is ready (a list schedule), and does not let go of it before its end.
        contention: how many times slower "compute" and links run while both do, see `cost_model.contention`.

    Raises:
        ValueError: operations of the same name, one after an unknown one, or some that wait for one another.
    """
    names = {op.name for op in ops}
    if len(names) < len(ops):
        raise ValueError(f"{len(ops)} operations have {len(names)} names")
    if unknown := [(op.name, name) for op in ops for name in op.after if name not in names]:
        raise ValueError(f"{unknown[0][0]!r} comes after {unknown[0][1]!r}, which does not exist")
    queues = {resource: [op for op in ops if op.resource == resource] for resource in dict.fromkeys(op.resource for op in ops)}
    ended: set[str] = set()
    running: dict[Resource, _Running] = {}
    spans, now_s = [], 0.0
    while len(ended) < len(ops):
        for resource, queue in queues.items():
            ready = (op for op in (queue[:1] if in_order else queue) if ended.issuperset(op.after))
            if resource not in running and (op := next(ready, None)) is not None:
                queue.remove(op)
                running[resource] = _Running(op, now_s, op.seconds)
        if not running:
            stuck = [op.name for queue in queues.values() for op in queue]
            raise ValueError(f"operations wait for one another: {', '.join(stuck)}")
        slower = contention if "compute" in running and len(running) > 1 else 1.0
        step_s = min(r.left_s for r in running.values())
        now_s += step_s * slower
        for resource, r in list(running.items()):
            # rounding must not leave a sliver that ends later
            r.left_s = 0.0 if r.left_s <= step_s * (1 + 1e-12) else r.left_s - step_s
            if r.left_s == 0:
                spans.append(Span(r.op, r.start_s, now_s))
                ended.add(r.op.name)
                del running[resource]
    place = {op.name: index for index, op in enumerate(ops)}
    return Timeline(tuple(sorted(spans, key=lambda span: (span.start_s, place[span.op.name]))))


@dataclass
class _Running:
    op: Op
    start_s: float
    left_s: float


@dataclass(frozen=True)
class Hop:
    """One exchange on a token's way to its expert.

    out_bytes, back_bytes: what leaves a rank for others on the way there and back, for all pieces together.
    across_share: part of these bytes that leaves the node. messages: exchanges that a piece takes on the way there.
    counts_bytes: of the exchange of counts before it, which the host waits for.
    """

    resource: Resource
    link: LinkModel
    out_bytes: float
    back_bytes: float
    across_share: float
    messages: int = 1
    counts_bytes: float = 0.0


@dataclass(frozen=True)
class LayerWork:
    """What one rank does in a MoE layer for one micro-batch.

    hops: outermost first; none where all experts are at home. flops: of its experts, forward. shared_flops: of the shared
    experts. shared_under_way: whether they are computed while the first rows travel, else when all is back.
    """

    hops: tuple[Hop, ...]
    flops: float
    shared_flops: float = 0.0
    shared_under_way: bool = True

    @property
    def wire_bytes(self) -> dict[str, float]:
        """Bytes that leave a rank for others "across" nodes and "inside" its own, there and back."""
        across = sum((hop.out_bytes + hop.back_bytes) * hop.across_share for hop in self.hops)
        return {"across": across, "inside": sum(hop.out_bytes + hop.back_bytes for hop in self.hops) - across}


@dataclass(frozen=True)
class Costs:
    """Of the experts, forward by operations and backward by twice as many, and `contention` with the links.

    The shared experts are taken to be as fast for their operations.
    """

    forward: ComputeModel
    backward: ComputeModel
    contention: float = 1.0


class _Thread:
    """Operations in the order in which the code starts them: what it has waited for comes before whatever it starts next."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self._reached: tuple[str, ...] = ()

    def start(self, name: str, resource: Resource, seconds: float, mark: str) -> str:
        self.ops.append(Op(name, resource, seconds, self._reached, mark))
        return name

    def wait(self, name: str) -> None:
        self._reached = tuple(dict.fromkeys((*self._reached, name)))

    def run(self, name: str, resource: Resource, seconds: float, mark: str) -> None:
        """Start, and wait: nothing that was reached before need be waited for again."""
        self._reached = (self.start(name, resource, seconds, mark),)


def layer_ops(work: LayerWork, costs: Costs, chunks: int, *, backward: bool = False) -> tuple[Op, ...]:
    """The operations of a layer in the order of the code that sends it in `chunks` pieces.

    Forward: counts; every piece starts on the outermost hop; shared experts; then for each piece: wait for its rows, inner hops
    there, experts, inner hops back (each is waited for), start its way back. At the end, wait for all. The counts of an outermost
    hop travel together for all pieces, those of an inner one before it.

    Backward is the mirror image, from the last piece to the first, without counts: gradients start on the way back, take inner
    hops, experts with twice the operations, inner hops, and start on the way there; the shared experts' backward comes then.

    Raises:
        ValueError: fewer than one piece.
    """
    if chunks < 1:
        raise ValueError(f"chunks = {chunks}, but a layer is sent in at least 1 piece")
    thread, outer, inner = _Thread(), work.hops[:1], work.hops[1:]
    model, factor = (costs.backward, 2.0) if backward else (costs.forward, 1.0)
    pieces = range(chunks - 1, -1, -1) if backward else range(chunks)
    there, back = ("back", "out") if backward else ("out", "back")

    def seconds(hop: Hop, way: str) -> float:
        alone = hop.link.seconds((hop.out_bytes if way == "out" else hop.back_bytes) / chunks)
        return alone + (hop.link.alpha_s * (hop.messages - 1) if way == "out" else 0.0)

    def count(hop: Hop, name: str) -> None:
        if hop.counts_bytes and not backward:
            thread.run(name, hop.resource, hop.link.seconds(hop.counts_bytes), "c")

    def shared() -> None:
        if work.shared_flops:
            thread.run("shared", "compute", model.seconds(factor * work.shared_flops), "s")

    if backward and not work.shared_under_way:
        shared()
    for hop in outer:
        count(hop, "counts")
        for piece in pieces:
            thread.start(f"{there} {piece}", hop.resource, seconds(hop, there), _mark(piece))
    if work.shared_under_way and not backward:
        shared()
    for piece in pieces:
        for _ in outer:
            thread.wait(f"{there} {piece}")
        for depth, hop in enumerate(inner, 1):
            count(hop, f"counts {piece} ({depth})")
            thread.run(f"{there} {piece} ({depth})", hop.resource, seconds(hop, there), _mark(piece))
        thread.run(f"experts {piece}", "compute", model.seconds(factor * work.flops / chunks), _mark(piece))
        for depth, hop in reversed(list(enumerate(inner, 1))):
            thread.run(f"{back} {piece} ({depth})", hop.resource, seconds(hop, back), _mark(piece))
        for hop in outer:
            thread.start(f"{back} {piece}", hop.resource, seconds(hop, back), _mark(piece))
    if work.shared_under_way and backward:
        shared()
    for piece in pieces:
        for _ in outer:
            thread.wait(f"{back} {piece}")
    if not work.shared_under_way and not backward:
        shared()
    return tuple(thread.ops)


def _mark(piece: int) -> str:
    return _MARKS[piece % len(_MARKS)]


def simulate(work: LayerWork, costs: Costs, chunks: int, *, backward: bool = False) -> Timeline:
    """One pass of a layer in `chunks` pieces, see `layer_ops`."""
    return run(layer_ops(work, costs, chunks, backward=backward), contention=costs.contention)


@dataclass(frozen=True)
class Choice:
    """Predicted seconds (forward, backward) of a layer in 1, 2, ... pieces, and the best: the fewest of about the least."""

    times: tuple[tuple[float, float], ...]
    chunks: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunks", self._best([sum(both) for both in self.times]))

    @staticmethod
    def _best(seconds: Sequence[float]) -> int:
        return next(r for r, t in enumerate(seconds, 1) if t <= min(seconds) * (1 + CLOSE))

    def seconds(self, chunks: int) -> tuple[float, float]:
        """(forward, backward) in this many pieces."""
        return self.times[chunks - 1]

    @property
    def forward_chunks(self) -> int:
        """Best for forward alone."""
        return self._best([forward for forward, _ in self.times])

    @property
    def backward_chunks(self) -> int:
        """Best for backward alone."""
        return self._best([backward for _, backward in self.times])

    @property
    def gain(self) -> float:
        """Predicted time of one piece / predicted time of the choice."""
        chosen = sum(self.seconds(self.chunks))
        return sum(self.seconds(1)) / chosen if chosen else 1.0


def best_chunks(work: LayerWork, costs: Costs, most: int = MOST_CHUNKS) -> Choice:
    """Simulate every number of pieces up to `most`. The best one is that of forward and backward together, which share it."""
    passes = ([simulate(work, costs, r, backward=b).makespan_s for b in (False, True)] for r in range(1, most + 1))
    return Choice(tuple((forward, backward) for forward, backward in passes))


@dataclass(frozen=True)
class Placement:
    """Where reductions of gradients would go.

    placed_bytes: per layer, in the order of backward, what its gaps take. exposed_s: of what is left at the end. serial_s: of all
    reductions, each after its own layer and with nothing beside it.
    """

    placed_bytes: tuple[float, ...]
    exposed_s: float
    serial_s: float

    @property
    def gain_s(self) -> float:
        return self.serial_s - self.exposed_s


def place_gradients(gaps: Sequence[Sequence[tuple[float, float]]], gradient_bytes: Sequence[float], link: LinkModel) -> Placement:
    """Fill the gaps of the slow link in backward with reductions of gradients that exist by then: the first step of FSMoE's
    adaptive gradient partitioning (ASPLOS 2025, section 5).

    Only a prediction: training reduces the gradients of a block when its backward has ended, and does not place them in gaps yet.

    Args:
        gaps: per layer in the order of backward, (start, end) of each gap, see `Timeline.idle`.
        gradient_bytes: per layer, of the gradients that exist once its backward has ended.
        link: of the reduction; T of a tensor's bytes.
    """
    waiting, placed = 0.0, []
    for windows, arriving in zip(gaps, gradient_bytes, strict=True):
        before = waiting
        for start_s, end_s in windows:
            waiting -= min(waiting, link.fits(end_s - start_s))
        placed.append(before - waiting)
        waiting += arriving
    serial_s = sum(link.seconds(size) for size in gradient_bytes if size)
    exposed_s = min(link.seconds(waiting), serial_s) if waiting else 0.0
    return Placement(tuple(placed), exposed_s, serial_s)
