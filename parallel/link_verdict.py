"""Which host, rank or link is slow, from rates between pairs: pure, and silent where nothing stands out.

The usual rate is the median over pairs without one of the members, for the member whose absence makes it highest: so a single
slow member, which spoils most pairs of a small cluster, does not become the usual one. A pair is slow below 1 / threshold of it.
A member most of whose outgoing pairs are slow is slow in sending, most of whose incoming ones in receiving; slow pairs that no
member explains are slow links. Two members have one link and nothing to compare it with but its two directions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

Kind = Literal["slow_host", "slow_rank", "slow_link", "slow_answer"]
BETWEEN, WITHIN, LATENCY = 1.5, 3.0, 4.0
"""Times slower than usual from where on a pair is called slow: between hosts; within one, where processes share its cores and its
memory; and for latency, which must be longer by `LATENCY_S` too."""
LATENCY_S = 5e-4


@dataclass(frozen=True)
class LinkFinding:
    """One thing that is slow. members: the host or rank, or the two ends (from, to) of a link.

    way: "sends", "receives" or "both". factor: times slower than usual; rate, usual: bytes/s, for slow_answer seconds.
    """

    kind: Kind
    members: tuple[str, ...]
    way: Literal["sends", "receives", "both"]
    factor: float
    rate: float
    usual: float
    text: str


Rates = Mapping[tuple[int, int], float]


def usual_rate(rates: Rates) -> float:
    """The rate that pairs have where nothing is slow; see above."""
    members = sorted({m for pair in rates for m in pair})
    without = [[r for pair, r in rates.items() if m not in pair] for m in members]
    return max([median(left) for left in without if left] or [max(rates.values())])


def slow_pairs(rates: Rates, threshold: float) -> frozenset[tuple[int, int]]:
    """Pairs that are slower than usual by more than this factor."""
    if len(rates) < 2:
        return frozenset()
    usual = usual_rate(rates)
    return frozenset(pair for pair, rate in rates.items() if rate * threshold < usual)


def judge(rates: Rates, names: Sequence[str], kind: Literal["slow_host", "slow_rank"], threshold: float) -> list[LinkFinding]:
    """What is slow among members with these names, the worst first. rates: (from, to) -> bytes/s, for all pairs or some."""
    slow = slow_pairs(rates, threshold)
    if not slow:
        return []
    usual, out = usual_rate(rates), []
    members = sorted({m for pair in rates for m in pair})
    sends = {m for m in members if len(members) > 2 and _most([p for p in rates if p[0] == m], slow)}
    receives = {m for m in members if len(members) > 2 and _most([p for p in rates if p[1] == m], slow)}
    for m in sorted(sends | receives):
        way: Literal["sends", "receives", "both"] = (
            "both" if m in sends and m in receives else "sends" if m in sends else "receives"
        )
        its = [p for p in rates if (p[0] == m and m in sends) or (p[1] == m and m in receives)]
        rate = median(rates[p] for p in its)
        how = {"both": "sends and receives", "sends": "sends", "receives": "receives"}[way]
        what = "host" if kind == "slow_host" else "rank"
        text = f"{what} {names[m]} is slow: it {how} {_rates(rate, usual)}"
        out.append(LinkFinding(kind, (names[m],), way, usual / rate, rate, usual, text))
    left = {p for p in slow if p[0] not in sends and p[1] not in receives}
    out += _links(left, rates, names, usual, "host" if kind == "slow_host" else "rank")
    return sorted(out, key=lambda f: -f.factor)


def _most(pairs: Sequence[tuple[int, int]], slow: frozenset[tuple[int, int]]) -> bool:
    return len(pairs) > 1 and 2 * sum(p in slow for p in pairs) > len(pairs)


def _links(left: set[tuple[int, int]], rates: Rates, names: Sequence[str], usual: float, what: str) -> list[LinkFinding]:
    out = []
    for a, b in sorted(left):
        both = (b, a) in left
        if both and a > b:
            continue
        rate = min(rates[a, b], rates[b, a]) if both else rates[a, b]
        ways = f"between {what} {names[a]} and {what} {names[b]}" if both else f"from {what} {names[a]} to {what} {names[b]}"
        text = f"the link {ways} is slow: it carries {_rates(rate, usual)}"
        out.append(LinkFinding("slow_link", (names[a], names[b]), "both" if both else "sends", usual / rate, rate, usual, text))
    return out


def late_pairs(seconds: Rates) -> frozenset[tuple[int, int]]:
    """Pairs (lower first) that answer much later than is usual. seconds: (from, to) -> fastest latency seen."""
    either = _answers(seconds)
    if len(either) < 2:
        return frozenset()
    usual = _usual_answer(either)
    return frozenset(p for p, s in either.items() if s > LATENCY * usual and s > usual + LATENCY_S)


def _answers(seconds: Rates) -> dict[tuple[int, int], float]:
    """Both directions are one answer: the faster one."""
    either: dict[tuple[int, int], float] = {}
    for (a, b), s in seconds.items():
        pair = (min(a, b), max(a, b))
        either[pair] = min(s, either.get(pair, s))
    return either


def _usual_answer(either: Rates) -> float:
    return 1 / usual_rate({pair: 1 / s for pair, s in either.items()})


def judge_latency(seconds: Rates, names: Sequence[str], what: str) -> list[LinkFinding]:
    """Pairs that answer late, see `late_pairs`; those of one member most of whose pairs do are put together."""
    either, late, out = _answers(seconds), set(late_pairs(seconds)), []
    for m in sorted({m for p in either for m in p}) if late else ():
        its = [p for p in either if m in p]
        hit = [p for p in its if p in late]
        if len(its) > 1 and 2 * len(hit) > len(its):
            late -= set(hit)
            own = median(either[p] for p in its)
            out.append(_answer((names[m],), f"{what} {names[m]} answers", own, _usual_answer(either)))
    for a, b in sorted(late):
        subject = f"{what} {names[a]} and {what} {names[b]} answer each other"
        out.append(_answer((names[a], names[b]), subject, either[a, b], _usual_answer(either)))
    return out


def _answer(members: tuple[str, ...], subject: str, own_s: float, usual_s: float) -> LinkFinding:
    text = f"{subject} after {2e3 * own_s:.3g} ms, where {2e3 * usual_s:.3g} ms is usual ({own_s / usual_s:.3g} times)"
    return LinkFinding("slow_answer", members, "both", own_s / usual_s, own_s, usual_s, text)


def _rates(rate: float, usual: float) -> str:
    return f"{rate_text(rate)} where {rate_text(usual)} is usual ({usual / rate:.3g} times slower)"


def rate_text(bytes_per_s: float) -> str:
    """In GB/s or MB/s (powers of ten), three digits."""
    scale, unit = (1e9, "GB/s") if bytes_per_s >= 1e9 else (1e6, "MB/s")
    return f"{bytes_per_s / scale:.3g} {unit}"
