"""The collectives that `comm_sweep` times: buffers of a size, the call, what crosses the wire, and whether the data is right.

A size S counts bytes of one rank's buffer, its own part included: the one it sends, for all_gather the one it gathers, as
nccl-tests counts. What crosses the wire is given apart, by rank, as the larger of what leaves it and what reaches it:

    all_to_all              S (n - 1) / n; uneven: the hottest rank is reached by its multiple of that
    hierarchical            S (N - 1) / N between N nodes, then S (r - 1) / r among the r ranks of a node, added up
    all_gather, reduce_scatter   S (n - 1) / n
    all_reduce              2 S (n - 1) / n, the least that any way of adding up needs
    send_recv               S
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.distributed as dist
from torch import Tensor

from .collectives import all_gather_dim, all_reduce, reduce_scatter_dim
from .nodes import TwoLevels
from .transfer import exchange_rows

PRIME = 251
"""Test data are whole numbers below it: exact in every type, and different for neighbouring blocks and elements."""
MOST_TURNS, TURN_BYTES = 16, 16 * 1024
"""Short messages go there and back several times, up to so many bytes together: the first turn after a barrier finds caches and
processor cold."""


@dataclass(frozen=True)
class Seat:
    """This rank's place in one of the groups that are measured at the same time.

    members: ranks of its group, ascending. levels, inside, across: the same group by node, where it can be sent in two levels.
    pairs: ranks that play ping-pong; the others are idle then.
    """

    name: str
    rank: int
    members: tuple[int, ...]
    group: dist.ProcessGroup
    pairs: tuple[tuple[int, int], ...] = ()
    levels: TwoLevels | None = None
    inside: dist.ProcessGroup | None = None
    across: dist.ProcessGroup | None = None

    @property
    def ranks(self) -> int:
        return len(self.members)

    @property
    def place(self) -> int:
        return self.members.index(self.rank)


@dataclass(frozen=True)
class Call:
    """One collective on buffers of one size, to be run again and again.

    size: S in bytes. count: elements of S. wire_mean, wire_max: bytes over the wire, over the ranks of a group.
    fresh: put the test data in. run: the collective. wrong: elements of its last result, after `fresh`, that are not right.
    ready: what goes before a run and is not timed. part: of the time of a run that counts (1/2: there and back).
    timed: whether this rank's time counts. waits: whether a run waits for the start of all ranks of the group.
    """

    size: int
    count: int
    wire_mean: float
    wire_max: float
    fresh: Callable[[], object]
    run: Callable[[], object]
    wrong: Callable[[], int]
    ready: Callable[[], object] = lambda: None
    part: float = 1.0
    timed: bool = True
    waits: bool = True


@dataclass(frozen=True)
class Operation:
    """factor: busbw / algbw by the size of a group. build: the call for a seat, about `size` bytes, and an imbalance."""

    factor: Callable[[int], float]
    build: Callable[[Seat, int, torch.dtype, torch.device, float], Call]
    two_levels: bool = False
    gloo_only: bool = False


def pattern(source: int, target: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What `source` sends to `target`: [count] whole numbers, which repeat after `PRIME`."""
    return _repeated((torch.arange(PRIME, device=device) + 131 * source + 31 * target) % PRIME, count).to(dtype)


def _repeated(period: Tensor, count: int) -> Tensor:
    return period.repeat(-(-count // PRIME))[:count]


def wrong_elements(got: Tensor, want: Tensor, terms: int = 1) -> int:
    """Elements that differ; by more than rounding where `terms` were added up."""
    if terms == 1:
        return int((got != want).sum())
    slack = terms * torch.finfo(want.dtype).eps * want.abs().double()
    return int((~((got.double() - want.double()).abs() <= slack)).sum())


def uneven_split(count: int, ranks: int, imbalance: float) -> list[int]:
    """Elements for each rank out of `count`: the first gets `imbalance` times the mean, the others share the rest alike."""
    hot = min(count, round(imbalance * count / ranks))
    others = [(count - hot) // (ranks - 1)] * (ranks - 1)
    return [count - sum(others), *others]


def _even(size: int, dtype: torch.dtype, ranks: int) -> int:
    """Elements of one of `ranks` equal blocks of a buffer of about `size` bytes."""
    return max(1, round(size / dtype.itemsize / ranks))


def _exchanged(seat: Seat, split: Sequence[int], dtype: torch.dtype, device: torch.device, through: str) -> Call:
    """All-to-all of `split` elements to each rank of the group, by every one of them."""
    me, n = seat.place, seat.ranks
    x_R = torch.zeros(sum(split), dtype=dtype, device=device)
    receive = [split[me]] * n
    out: list[Tensor] = []

    def run() -> None:
        if through == "torch":
            y_R = x_R.new_empty(sum(receive))
            dist.all_to_all_single(y_R, x_R, receive, list(split), group=seat.group)
        else:
            y_R = exchange_rows(x_R, split, receive, seat.group)
        out[:] = [y_R]

    def fresh() -> None:
        blocks = [pattern(seat.rank, target, k, dtype, device) for target, k in zip(seat.members, split, strict=True)]
        x_R.copy_(torch.cat(blocks))

    def wrong() -> int:
        want_R = torch.cat([pattern(source, seat.rank, split[me], dtype, device) for source in seat.members])
        return wrong_elements(out[0], want_R)

    count, item = sum(split), dtype.itemsize
    larger = [item * max(count - k, (n - 1) * k) for k in split]
    return Call(item * count, count, item * count * (n - 1) / n, max(larger), fresh, run, wrong)


def _all_to_all(seat: Seat, size: int, dtype: torch.dtype, device: torch.device, imbalance: float) -> Call:
    return _exchanged(seat, [_even(size, dtype, seat.ranks)] * seat.ranks, dtype, device, "ours")


def _torch_all_to_all(seat: Seat, size: int, dtype: torch.dtype, device: torch.device, imbalance: float) -> Call:
    return _exchanged(seat, [_even(size, dtype, seat.ranks)] * seat.ranks, dtype, device, "torch")


def _uneven(seat: Seat, size: int, dtype: torch.dtype, device: torch.device, imbalance: float) -> Call:
    count = seat.ranks * _even(size, dtype, seat.ranks)
    return _exchanged(seat, uneven_split(count, seat.ranks, imbalance), dtype, device, "ours")


def _hierarchical(seat: Seat, size: int, dtype: torch.dtype, device: torch.device, imbalance: float) -> Call:
    """To the rank of the same place on each node, and from there to the ranks of that node."""
    assert seat.levels is not None and seat.inside is not None and seat.across is not None
    levels, inside, across = seat.levels, seat.inside, seat.across
    nodes, each = len(levels.inside), len(levels.inside[0])
    block = _even(size, dtype, seat.ranks)
    node_of = {rank: node for node in levels.inside for rank in node}
    # groups order their ranks by number, which is not the order of nodes where these interleave
    columns = {rank: sorted(column) for column in levels.across for rank in column}
    targets = [rank for first in columns[seat.rank] for rank in sorted(node_of[first])]
    sources = [rank for beside in sorted(node_of[seat.rank]) for rank in columns[beside]]
    x_R = torch.zeros(seat.ranks * block, dtype=dtype, device=device)
    out: list[Tensor] = []

    def run() -> None:
        here_R = exchange_rows(x_R, [each * block] * nodes, [each * block] * nodes, across)
        by_place_R = here_R.view(nodes, each, block).transpose(0, 1).reshape(-1)
        out[:] = [exchange_rows(by_place_R, [nodes * block] * each, [nodes * block] * each, inside)]

    def fresh() -> None:
        x_R.copy_(torch.cat([pattern(seat.rank, target, block, dtype, device) for target in targets]))

    def wrong() -> int:
        return wrong_elements(out[0], torch.cat([pattern(source, seat.rank, block, dtype, device) for source in sources]))

    size = x_R.numel() * dtype.itemsize
    wire = size * ((nodes - 1) / nodes + (each - 1) / each)
    return Call(size, x_R.numel(), wire, wire, fresh, run, wrong)


def _all_gather(seat: Seat, size: int, dtype: torch.dtype, device: torch.device, imbalance: float) -> Call:
    n, block = seat.ranks, _even(size, dtype, seat.ranks)
    x_R = torch.zeros(block, dtype=dtype, device=device)
    out: list[Tensor] = []

    def run() -> None:
        out[:] = [all_gather_dim(x_R, 0, seat.group)]

    def wrong() -> int:
        return wrong_elements(out[0], torch.cat([pattern(source, 0, block, dtype, device) for source in seat.members]))

    wire = dtype.itemsize * block * (n - 1)
    size = dtype.itemsize * block * n
    return Call(size, block * n, wire, wire, lambda: x_R.copy_(pattern(seat.rank, 0, block, dtype, device)), run, wrong)


def _sums(seat: Seat, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What adding up their `pattern`s gives. One period of it, so that it costs little with many ranks."""
    return _repeated(sum(pattern(source, 0, PRIME, torch.float64, device) for source in seat.members), count).to(dtype)  # type: ignore[arg-type]


def _reduce_scatter(seat: Seat, size: int, dtype: torch.dtype, device: torch.device, imbalance: float) -> Call:
    n, block = seat.ranks, _even(size, dtype, seat.ranks)
    x_R = torch.zeros(n * block, dtype=dtype, device=device)
    out: list[Tensor] = []

    def run() -> None:
        out[:] = [reduce_scatter_dim(x_R, 0, seat.group)]

    def wrong() -> int:
        return wrong_elements(out[0], _sums(seat, n * block, dtype, device).chunk(n)[seat.place], n)

    wire = dtype.itemsize * block * (n - 1)
    fill = lambda: x_R.copy_(pattern(seat.rank, 0, n * block, dtype, device))  # noqa: E731
    return Call(dtype.itemsize * n * block, n * block, wire, wire, fill, run, wrong)


def _all_reduce(seat: Seat, size: int, dtype: torch.dtype, device: torch.device, imbalance: float) -> Call:
    """In place, as training does: later runs add up what earlier ones left, so only the first after `fresh` can be checked."""
    n, count = seat.ranks, max(1, round(size / dtype.itemsize))
    x_R = torch.zeros(count, dtype=dtype, device=device)
    wire = 2 * dtype.itemsize * count * (n - 1) / n

    def wrong() -> int:
        found = wrong_elements(x_R, _sums(seat, count, dtype, device), n)
        x_R.zero_()  # sums of sums would overflow
        return found

    fill = lambda: x_R.copy_(pattern(seat.rank, 0, count, dtype, device))  # noqa: E731
    return Call(dtype.itemsize * count, count, wire, wire, fill, lambda: all_reduce(x_R, seat.group), wrong)


def _send_recv(seat: Seat, size: int, dtype: torch.dtype, device: torch.device, imbalance: float) -> Call:
    """Ping-pong: the first of a pair sends, the second sends it back. On the clock of the first, from when both are awake."""
    count = max(1, round(size / dtype.itemsize))
    size = dtype.itemsize * count
    mine = next((pair for pair in seat.pairs if seat.rank in pair), None)
    if mine is None:
        return Call(size, count, size, size, lambda: None, lambda: None, lambda: 0, part=0.5, timed=False, waits=False)
    first = seat.rank == mine[0]
    peer = seat.members.index(mine[1] if first else mine[0])
    x_R, y_R = (torch.zeros(count, dtype=dtype, device=device) for _ in range(2))
    call = torch.zeros(1, dtype=dtype, device=device)
    turns = max(1, min(MOST_TURNS, TURN_BYTES // size))

    def turn(there: Tensor, back: Tensor) -> None:
        if first:
            ping(there, back, peer, seat.group)
        else:
            pong(back, back, peer, seat.group)

    def wrong() -> int:
        return wrong_elements(y_R, pattern(*mine, count, dtype, device))

    fill = lambda: x_R.copy_(pattern(*mine, count, dtype, device))  # noqa: E731

    def run() -> None:
        for _ in range(turns):
            turn(x_R, y_R)

    ready = functools.partial(turn, call, torch.zeros_like(call))
    return Call(size, count, size, size, fill, run, wrong, ready, 0.5 / turns, timed=first, waits=False)


def ping(x: Tensor, answer: Tensor, peer: int, group: dist.ProcessGroup) -> None:
    """Send `x` to a member of the group and wait for what it answers with `pong`."""
    dist.send(x, group=group, group_dst=peer)
    dist.recv(answer, group=group, group_src=peer)


def pong(x: Tensor, answer: Tensor, peer: int, group: dist.ProcessGroup) -> None:
    """Wait for `x` from a member of the group and send it `answer`."""
    dist.recv(x, group=group, group_src=peer)
    dist.send(answer, group=group, group_dst=peer)


def _shared(n: int) -> float:
    return (n - 1) / n


def _both_ways(n: int) -> float:
    return 2 * (n - 1) / n


OPERATIONS: Mapping[str, Operation] = MappingProxyType(
    {
        "all_to_all": Operation(_shared, _all_to_all),
        "torch": Operation(_shared, _torch_all_to_all, gloo_only=True),
        "uneven": Operation(_shared, _uneven),
        "hierarchical": Operation(_shared, _hierarchical, two_levels=True),
        "all_gather": Operation(_shared, _all_gather),
        "reduce_scatter": Operation(_shared, _reduce_scatter),
        "all_reduce": Operation(_both_ways, _all_reduce),
        "send_recv": Operation(lambda n: 1.0, _send_recv),
    }
)
"""What can be measured. torch: `all_to_all_single`, where the transport's own is not what training uses; uneven: an all_to_all
whose hottest rank gets a multiple of the mean; send_recv: half the time of a ping-pong between two ranks of different nodes."""
