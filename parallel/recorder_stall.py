"""A watch over collectives that do not end: says who waits for whom, before the time-out of the group kills the job.

Each rank runs a `StallWatch`. One that has been in a collective for too long asks all ranks, through the store, where they stand;
each answers with the collective it is in and the last one it finished, and the lowest rank that is stuck prints one account.
Whom they wait for is a matter of counting: a rank that has begun fewer collectives of a group than its members wait in. If it
waits itself in another group, the search goes on there. (Telling by what each rank entered last: MegaScale, arXiv 2402.15627.)
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType

import torch.distributed as dist

from .recorder import CommRecorder, Span


@dataclass(frozen=True)
class Place:
    """A collective by name; see `CommRecord`. since_s: seconds that a rank has been in it; 0 for one that has ended."""

    axis: str
    members: tuple[int, ...]
    call: int
    op: str
    what: str
    layer: int | None
    direction: str
    step: int
    since_s: float = 0.0

    def __str__(self) -> str:
        where = "" if self.layer is None else f" of layer {self.layer}"
        return f"{self.what}{where} ({self.direction}, {self.op} over {self.axis} ranks {list(self.members)}, step {self.step})"


@dataclass(frozen=True)
class State:
    """Where a rank stands.

    open: the oldest collective it is in. last: the newest that it finished. calls: collectives begun, by `call_key`.
    """

    rank: int
    open: Place | None
    last: Place | None
    calls: Mapping[str, int]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> State:
        data = json.loads(text)
        places = {
            k: None if data[k] is None else Place(**{**data[k], "members": tuple(data[k]["members"])}) for k in ("open", "last")
        }
        return State(rank=data["rank"], calls=data["calls"], **places)


def call_key(axis: str, members: Sequence[int]) -> str:
    return f"{axis}:{','.join(map(str, members))}"


def state_of(recorder: CommRecorder, now_s: float, first_seen_s: Mapping[int, float]) -> State:
    """Where the rank of this recorder stands. first_seen_s: when a span that is under way was first seen, by its number."""
    newest: Span | None = None
    oldest: Span | None = None
    for span in recorder.spans():
        if span.complete():
            newest = newest if span.failed else span
        elif oldest is None and span.waiting is not None:
            oldest = span  # of those that somebody waits for
    since_s = 0.0 if oldest is None else now_s - first_seen_s.get(oldest.seq, now_s)
    calls = {call_key(axis, members): n for (axis, members), n in recorder.calls().items()}
    return State(recorder.rank, _place(oldest, since_s), _place(newest, 0.0), calls)


def _place(span: Span | None, since_s: float) -> Place | None:
    if span is None:
        return None
    p = span.probe
    return Place(p.group.axis, p.group.members, span.call, span.op, p.what, p.layer, span.direction, span.step, round(since_s, 3))


def awaited(states: Mapping[int, State]) -> tuple[int, ...]:
    """Ranks that the others wait for, at the end of every chain: they are in no collective that lacks another rank, or silent.

    states: by rank, of all that have answered. Empty where all have come: then the wire is stuck, not a rank.
    """
    blamed: set[int] = set()
    for start in states:
        front, seen = [start], {start}
        while front:
            rank = front.pop()
            missing = _missing(states, rank)
            if not missing and rank != start and (rank not in states or states[rank].open is None):
                blamed.add(rank)
            new = [m for m in missing if m not in seen]
            seen.update(new)
            front += new
    return tuple(sorted(blamed))


def _missing(states: Mapping[int, State], rank: int) -> list[int]:
    """Members that have not come to the collective that this rank is in."""
    state = states.get(rank)
    if state is None or state.open is None:
        return []
    place = state.open
    key = call_key(place.axis, place.members)
    return [m for m in place.members if m != rank and (m not in states or states[m].calls.get(key, 0) <= place.call)]


def account(states: Mapping[int, State], world: int) -> str:
    """What is known of a stall, one line for each rank. states: by rank, of all that have answered."""
    stuck = {r: s.open for r, s in states.items() if s.open is not None}
    longest_s = max((p.since_s for p in stuck.values()), default=0.0)
    guilty = awaited(states)
    who = (
        f"waiting for rank {', '.join(map(str, guilty))}"
        if guilty
        else "all ranks have come: the network or a device does not move"
    )
    lines = [f"stall: {len(stuck)} of {world} ranks have been in a collective for up to {longest_s:.1f} s; {who}"]
    for rank in range(world):
        state = states.get(rank)
        if state is None:
            lines.append(f"  rank {rank}: no answer (its process is gone, or does not run Python)")
            continue
        now = f"for {state.open.since_s:.1f} s in {state.open}" if state.open is not None else "in no collective"
        lines.append(f"  rank {rank}: {now}; last completed: {state.last or 'none'}")
    return "\n".join(lines)


class StallWatch:
    """Watches the recorder of this rank from a thread while the body of its `with` runs.

    Args:
        recorder: of this rank.
        store: that all ranks share. Its own connection (`clone()` of the group's): a store that waits for a key in one thread
            keeps the others from asking.
        world: number of ranks; all of them run a watch.
        limit_s: how long a collective may take before it is called a stall; well below the group's time-out.
        tell: gets the account, on one rank; None = standard error.
    """

    def __init__(
        self,
        recorder: CommRecorder,
        store: dist.Store,
        world: int,
        limit_s: float,
        tell: Callable[[str], None] | None = None,
    ):
        if limit_s <= 0:
            raise ValueError(f"limit_s = {limit_s}: a collective needs some time; take a fraction of parallel.timeout_s")
        self.recorder, self.store, self.world, self.limit_s = recorder, store, world, limit_s
        self.tell = tell or (lambda text: print(text, file=sys.stderr, flush=True))
        self.error: BaseException | None = None
        self._poll_s = min(5.0, limit_s / 4)
        self._end = threading.Event()
        self._seen: dict[int, float] = {}
        self._thread = threading.Thread(target=self._run, daemon=True, name="stall watch")

    def __enter__(self) -> StallWatch:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._end.set()
        self._thread.join(2 * self._poll_s)

    def _run(self) -> None:
        told, polls = -1, 0
        while not self._end.wait(self._poll_s):
            try:
                round_ = self.store.add("stall/round", 0)
                state = self._look()
                stuck = state.open is not None and state.open.since_s >= self.limit_s
                if told == round_ and not stuck:
                    self.store.add("stall/round", 1)  # it has moved on: the next stall is another one
                elif stuck or self.store.check([f"stall/{round_}/asked"]):
                    # again at each turn, so that what is told is new
                    self.store.set(f"stall/{round_}/{self.recorder.rank}", state.to_json())
                    self.store.set(f"stall/{round_}/asked", "")
                    polls += 1
                    if stuck and polls > 2 and told != round_ and self._tell(round_, may_wait=polls < 8):
                        told = round_
                else:
                    polls = 0
            except (dist.DistError, RuntimeError) as lost:
                self.error = lost  # the store is gone, and with it the job
                return

    def _look(self) -> State:
        """The state of this rank now; remembers since when a span has been under way."""
        now_s = time.monotonic()
        under_way = {span.seq for span in self.recorder.spans() if not span.complete()}
        self._seen = {seq: self._seen.get(seq, now_s) for seq in under_way}
        return state_of(self.recorder, now_s, self._seen)

    def _tell(self, round_: int, may_wait: bool) -> bool:
        """Tell of the stall if this is the lowest rank that is stuck; may_wait: not before all have answered. Whether it told."""
        keys = {rank: f"stall/{round_}/{rank}" for rank in range(self.world)}
        states = {rank: State.from_json(self.store.get(key).decode()) for rank, key in keys.items() if self.store.check([key])}
        stuck = [rank for rank, s in states.items() if s.open is not None and s.open.since_s >= self.limit_s]
        if (may_wait and len(states) < self.world) or min(stuck, default=None) != self.recorder.rank:
            return False
        if self.store.add(f"stall/{round_}/told", 1) > 1:
            return False
        self.tell(account(states, self.world))
        return True
