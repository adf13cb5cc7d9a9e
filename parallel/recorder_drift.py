"""Whether exchanges of rows take as long as the plan that was made for them predicts. Pure, and without torch.

Compared is the time in which rows moved: from when the last rank had come, and the exchange before on the same connections had
ended, until the last rank had its rows. Of an exchange whose end nobody saw, as it was over before anyone waited, only an upper
bound is known: it may show that rows are faster than predicted, but not that they are slower.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from .comm_record import CommRecord
from .recorder_analysis import Collective

if TYPE_CHECKING:
    from .cost_model import LinkModel

FACTOR = 2.0
"""Times by which a step's exchanges may be slower (beyond what experts at work explain) or faster than predicted."""
SAMPLES = 5
"""Samples in a row that are farther off, from which on a plan is stale: one may be chance."""
LINKS = MappingProxyType({"ep_etp": "flat", "across_nodes": "across", "inside_node": "inside"})
"""The measured link of each axis that rows travel on."""
ROWS = ("dispatch", "combine")
WAITED = 0.1
"""Part of an exchange that a rank must have waited for it, or else its end was seen too late."""


@dataclass(frozen=True)
class Compared:
    """Seconds of the exchanges of rows of one step. seen: of those whose end was seen, measured and predicted. most: of all, at
    most and predicted. exchanges: how many of both."""

    seen: tuple[float, float] = (0.0, 0.0)
    most: tuple[float, float] = (0.0, 0.0)
    exchanges: tuple[int, int] = (0, 0)

    def plus(self, seen_s: float | None, most_s: float, predicted_s: float) -> Compared:
        """With one exchange more; seen_s: None where its end was not seen."""
        (measured_s, of_these_s), (at_most_s, of_all_s), (few, all_) = self.seen, self.most, self.exchanges
        most = (at_most_s + most_s, of_all_s + predicted_s)
        if seen_s is None:
            return Compared(self.seen, most, (few, all_ + 1))
        return Compared((measured_s + seen_s, of_these_s + predicted_s), most, (few + 1, all_ + 1))


def compare(found: Sequence[Collective], links: Mapping[str, LinkModel]) -> Compared:
    """The collectives of a step, see `recorder_analysis.collectives`, against the models of the links by name."""
    groups: dict[tuple[str, tuple[int, ...]], list[Collective]] = defaultdict(list)
    for c in found:
        if c.first.op == "all_to_all" and LINKS.get(c.first.axis) in links:
            groups[c.first.axis, c.first.members].append(c)
    out = Compared()
    for (axis, _), mine in groups.items():
        free_s, free_seen = float("-inf"), True
        for c in sorted(mine, key=lambda c: c.first.call):
            came_s, end_s = max(r.begin_s for r in c.records), max(r.end_s for r in c.records)
            seen = any(r.end_s == end_s and _saw_the_end(r) for r in c.records)
            if c.first.what in ROWS:
                since_free_s = max(0.0, end_s - max(came_s, free_s))
                known = seen and (free_seen or free_s <= came_s)
                most_s = since_free_s if free_seen else end_s - came_s
                out = out.plus(since_free_s if known else None, most_s, links[LINKS[axis]].seconds(_largest_bytes(c)))
            free_s, free_seen = (end_s, seen) if end_s > free_s else (free_s, free_seen)
    return out


def _saw_the_end(r: CommRecord) -> bool:
    return r.exact_end and r.wait_s is not None and r.end_s - r.wait_s >= WAITED * (r.end_s - r.begin_s)


def _largest_bytes(c: Collective) -> int:
    """The most that one rank sends to others, or gets from them."""
    return max(
        sum(n for peer, n in zip(r.members, way, strict=True) if peer != rank)
        for rank, r in zip(c.first.members, c.records, strict=True)
        for way in (r.sent, r.received)
    )


class Drift:
    """Samples in a row that are off in the same direction.

    contention: see `cost_model.contention`: as much slower an exchange may be while experts compute.
    """

    def __init__(self, links: Mapping[str, LinkModel], contention: float):
        self.links, self.contention = links, contention
        self.in_a_row = 0
        self.said: str | None = None

    def add(self, found: Sequence[Collective], clock_error_s: float = 0.0) -> str | None:
        """What is to be said of the plan once this sample makes it stale, only once; else None.

        clock_error_s: how far the clocks of ranks may be apart, for each exchange.
        """
        c = compare(found, self.links)
        (measured_s, expected_s), slack_s = c.seen, 2 * clock_error_s * c.exchanges[0]
        slower = measured_s - slack_s > FACTOR * self.contention * expected_s > 0
        (most_s, of_all_s), more_slack_s = c.most, 2 * clock_error_s * c.exchanges[1]
        faster = most_s + more_slack_s < of_all_s / FACTOR
        if not c.exchanges[1] or self.said is not None:
            return None
        sign = slower - faster
        self.in_a_row = self.in_a_row + sign if sign * self.in_a_row > 0 else sign
        if abs(self.in_a_row) >= SAMPLES:
            self.said = self._text(*c.seen, c.exchanges[0]) if slower else self._text(*c.most, c.exchanges[1])
        return self.said

    def _text(self, took_s: float, expected_s: float, exchanges: int) -> str:
        limit = f"{FACTOR * self.contention:.3g}" if took_s > expected_s else f"1 / {FACTOR:.3g}"
        return (
            f"exchanges of rows take {took_s / expected_s:.2g} times as long as the plan of overlap predicts "
            f"({1e3 * took_s:.3g} ms against {1e3 * expected_s:.3g} ms, {exchanges} exchanges of a step), and were "
            f"beyond {limit} times in {SAMPLES} samples in a row"
        )
