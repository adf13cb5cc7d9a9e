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
from dataclasses import dataclass
from typing import Literal

from ..moe.dispatch import Pieces
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

    out_bytes, back_bytes: what leaves a rank for others on the way there and back, for all units together.
    across_share: part of these bytes that leaves the node. messages: exchanges that rows take on the way there.
    counts_bytes: of the exchange of counts before it, which the host waits for.
    """

    resource: Resource
    link: LinkModel
    out_bytes: float
    back_bytes: float
    across_share: float
    messages: int = 1
    counts_bytes: float = 0.0

    def seconds(self, way: str, parts: int) -> float:
        """Of one of so many exchanges on the way "out" or "back"."""
        alone = self.link.seconds((self.out_bytes if way == "out" else self.back_bytes) / parts)
        return alone + (self.link.alpha_s * (self.messages - 1) if way == "out" else 0.0)


@dataclass(frozen=True)
class LayerWork:
    """What one rank does in a MoE layer for one micro-batch.

    hops: outermost first; none where all experts are at home. flops: of its experts, forward. shared_flops: of the shared
    experts, which are computed while the first rows travel.
    """

    hops: tuple[Hop, ...]
    flops: float
    shared_flops: float = 0.0

    @property
    def wire_bytes(self) -> dict[str, float]:
        """Bytes that leave a rank for others "across" nodes and "inside" its own, there and back."""
        across = sum((hop.out_bytes + hop.back_bytes) * hop.across_share for hop in self.hops)
        return {"across": across, "inside": sum(hop.out_bytes + hop.back_bytes for hop in self.hops) - across}


@dataclass(frozen=True)
class Costs:
    """Of the experts, forward by operations and backward by twice as many, and `contention` with the links. late: whether the
    second half of backward, for weights, is computed while the rows' gradients travel.

    The shared experts are taken to be as fast for their operations.
    """

    forward: ComputeModel
    backward: ComputeModel
    contention: float = 1.0
    late: bool = True


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


def layer_ops(work: LayerWork, costs: Costs, chunks: int | Pieces, *, backward: bool = False) -> tuple[Op, ...]:
    """The operations of a layer in the order of the code that sends it in these pieces (one number: that of both directions).

    Forward: counts; every exchange of the outermost hop starts; shared experts; then for each unit: wait for the exchange that
    brings its rows, inner hops there, experts, inner hops back (each is waited for), and start the way back of the units that
    share an exchange once the last of them is there. At the end, wait for all. The counts of an outermost hop travel together
    for all units, those of an inner one before each.

    Backward is the mirror image, from the last unit to the first, without counts: gradients start on the way back, take inner
    hops, experts, inner hops, and start on the way there. Experts take twice the operations: those for rows before that, those
    for weights after it if they come late. The shared experts' backward comes then.

    Raises:
        ValueError: fewer than one piece.
    """
    ways = Pieces.of(chunks)
    exchanges = ways.backward if backward else ways.forward
    together = ways.units // exchanges
    thread, outer, inner = _Thread(), work.hops[:1], work.hops[1:]
    model, factor = (costs.backward, 2.0) if backward else (costs.forward, 1.0)
    units = range(ways.units - 1, -1, -1) if backward else range(ways.units)
    turn = range(exchanges - 1, -1, -1) if backward else range(exchanges)
    there, back = ("back", "out") if backward else ("out", "back")

    def count(hop: Hop, name: str) -> None:
        if hop.counts_bytes and not backward:
            thread.run(name, hop.resource, hop.link.seconds(hop.counts_bytes), "c")

    def shared() -> None:
        if work.shared_flops:
            thread.run("shared", "compute", model.seconds(factor * work.shared_flops), "s")

    for hop in outer:
        count(hop, "counts")
        for i in turn:
            thread.start(f"{there} {i}", hop.resource, hop.seconds(there, exchanges), _mark(i))
    if not backward:
        shared()
    for done, unit in enumerate(units, 1):
        i = unit // together
        for _ in outer:
            thread.wait(f"{there} {i}")
        for depth, hop in enumerate(inner, 1):
            count(hop, f"counts {unit} ({depth})")
            thread.run(f"{there} {unit} ({depth})", hop.resource, hop.seconds(there, ways.units), _mark(unit))
        experts_s = model.seconds(factor * work.flops / ways.units)
        late_s = experts_s / 2 if backward and outer and costs.late else 0.0
        thread.run(f"experts {unit}", "compute", experts_s - late_s, _mark(unit))
        for depth, hop in reversed(list(enumerate(inner, 1))):
            thread.run(f"{back} {unit} ({depth})", hop.resource, hop.seconds(back, ways.units), _mark(unit))
        for hop in outer if done % together == 0 else ():
            thread.start(f"{back} {i}", hop.resource, hop.seconds(back, exchanges), _mark(i))
        if late_s:
            thread.run(f"weights {unit}", "compute", late_s, _mark(unit))
    if backward:
        shared()
    for i in turn:
        for _ in outer:
            thread.wait(f"{back} {i}")
    return tuple(thread.ops)


def _mark(index: int) -> str:
    return _MARKS[index % len(_MARKS)]


def simulate(work: LayerWork, costs: Costs, chunks: int | Pieces, *, backward: bool = False) -> Timeline:
    """One pass of a layer in these pieces, see `layer_ops`."""
    return run(layer_ops(work, costs, chunks, backward=backward), contention=costs.contention)


@dataclass(frozen=True)
class Way:
    """A layer in these pieces, and its predicted seconds."""

    chunks: Pieces
    forward_s: float
    backward_s: float

    @property
    def both_s(self) -> float:
        return self.forward_s + self.backward_s


@dataclass(frozen=True)
class Choice:
    """Every way of cutting a layer that comes into question, with one piece among them."""

    ways: tuple[Way, ...]

    @property
    def best(self) -> Way:
        """The fewest units, then the fewest exchanges, of about the least time."""
        return self._fewest(self.ways)

    @property
    def mirrored(self) -> Way:
        """The best of those with one number for both directions."""
        return self._fewest([way for way in self.ways if way.chunks.forward == way.chunks.backward])

    @staticmethod
    def _fewest(ways: Sequence[Way]) -> Way:
        limit_s = min(way.both_s for way in ways) * (1 + CLOSE)
        near = [way for way in ways if way.both_s <= limit_s]
        return min(near, key=lambda way: (way.chunks.units, way.chunks.forward + way.chunks.backward, way.both_s))

    def way(self, chunks: int | Pieces) -> Way:
        """In these pieces. Raises KeyError where they do not come into question."""
        return {way.chunks: way for way in self.ways}[Pieces.of(chunks)]

    @property
    def chunks(self) -> Pieces:
        """The pieces of the best."""
        return self.best.chunks

    @property
    def gain(self) -> float:
        """Predicted time of one piece / predicted time of the best."""
        return self.way(1).both_s / self.best.both_s if self.best.both_s else 1.0


def best_chunks(work: LayerWork, costs: Costs, most: int = MOST_CHUNKS) -> Choice:
    """Simulate every number of units up to `most`, with each number of exchanges that divides it in one of the directions."""
    ways = []
    for units in range(1, most + 1):
        fewer = [exchanges for exchanges in range(1, units + 1) if units % exchanges == 0]
        there = {n: simulate(work, costs, Pieces(n, units)).makespan_s for n in fewer}
        back = {n: simulate(work, costs, Pieces(units, n), backward=True).makespan_s for n in fewer}
        ways += [Way(Pieces(units, n), there[units], back[n]) for n in fewer]
        ways += [Way(Pieces(n, units), there[n], back[units]) for n in fewer[:-1]]
    return Choice(tuple(ways))
