"""One collective of one rank, as plain data. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Op = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]
Direction = Literal["forward", "backward", "update"]


@dataclass(frozen=True, slots=True)
class CommRecord:
    """One collective on one rank. Times are seconds on the clock of this rank; `recorder_analysis` aligns the ranks.

    Bytes are those of the collective itself, by whose data reaches whom, whatever ring or tree carries it. With P ranks, a part
    of n bytes in an all-gather goes to each other rank; of n bytes in a reduce-scatter, n / P go to each other; an all-reduce is
    one of each, 2 n / P (added over the peers, the "bus" bytes of nccl-tests). What does not divide is rounded up.

    step: optimizer step. seq: position among all collectives of this rank. call: position among those of its group and axis,
    which is the same on all members: (axis, members, call) names one collective on every rank that took part.
    axis: of the mesh, see `topology.AXES`. members: global ranks of the group, in its order. what: purpose, such as "dispatch".
    layer: index of the model's block, None outside blocks. sent, received: bytes to and from each member; of an all-to-all the
    rank's own rows count too, at its own place, though they cross no wire.
    rows_E: for a dispatch, rows of this rank for each expert of the layer.
    begin_s: when this rank came to the collective (on a GPU: when its stream did). wait_s: from when on it waited; the same as
    `begin_s` unless work went on meanwhile; None where the wait is not seen (side streams of FSDP on a GPU).
    end_s: when it went on. exact_end: False where the collective had ended before it was waited for, so that `end_s` is late.
    arrivals_s: when rows of each member had arrived, as far as the waiting in turn shows (gloo only).
    failed: it raised an error.
    """

    step: int
    seq: int
    axis: str
    members: tuple[int, ...]
    call: int
    op: Op
    what: str
    layer: int | None
    direction: Direction
    sent: tuple[int, ...]
    received: tuple[int, ...]
    begin_s: float
    wait_s: float | None
    end_s: float
    exact_end: bool = True
    failed: bool = False
    rows_E: tuple[int, ...] | None = None
    arrivals_s: tuple[float | None, ...] | None = None

    @property
    def key(self) -> tuple[str, tuple[int, ...], int]:
        """Names this collective on all its ranks."""
        return self.axis, self.members, self.call

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> CommRecord:
        """The record that `to_dict` gave, also after a way through JSON. Unknown keys raise TypeError."""
        lists: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
        return CommRecord(**lists)
