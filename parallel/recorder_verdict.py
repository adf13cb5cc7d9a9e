"""Why ranks waited: a rank that computes slowly, an expert with too many rows, or a slow link. Pure, and without torch.

A rank that comes late to a collective is blamed as far as it computed longer than the others since its previous collective: being
held up there is somebody else's doing. Between dispatch and combine, the time that its larger share of rows explains, at the
others' time per row, is the experts' doing; the rest, and all of it elsewhere, is the rank's. Links are judged by the time in
which a rank waited for the rows of one peer only, after both had come; gloo's exchanges tell it, NCCL's do not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median, median_low
from typing import Literal

from .comm_record import CommRecord
from .recorder_analysis import Collective, Records, collectives, elapsed_s, expert_rows, stretches

Kind = Literal["slow_rank", "hot_expert", "slow_link"]
SLOW_LINK = 3.0
"""Times the usual rate of a link from where on it is called slow: links of one class differ by less."""


@dataclass(frozen=True)
class Verdict:
    """One cause of waiting. lost_s: seconds that ranks waited because of it, added over ranks; share: of all ranks' time.

    rank: the slow rank, the one that holds the hot expert, or the sender of the slow link. peer: the link's receiver, None where
    most links of the rank are slow. layer, expert: of the hot expert.
    """

    kind: Kind
    rank: int
    lost_s: float
    share: float
    text: str
    peer: int | None = None
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class _Stretch:
    """What a rank did before a collective.

    seconds: since its previous one ended. rows: bytes that its experts had to work on, None outside of experts.
    """

    seconds: float
    rows: int | None


def verdicts(records: Records, *, min_share: float = 0.05) -> tuple[Verdict, ...]:
    """Causes of waiting, the worst first. Empty where nothing takes `min_share` of the ranks' time.

    records: of every rank, on one clock; see `recorder_analysis.aligned`.
    """
    found = collectives(records)
    covered_s = elapsed_s(records)
    rows = expert_rows(records)
    causes = [*_late(found, _stretches(records), rows, covered_s), *_links(found, covered_s)]
    return tuple(sorted((v for v in causes if v.share >= min_share), key=lambda v: -v.lost_s))


def _stretches(records: Records) -> dict[tuple[int, int], _Stretch]:
    """(rank, seq) -> what came before that collective."""
    out: dict[tuple[int, int], _Stretch] = {}
    for rank, mine in ((rank, part) for rank, whole in enumerate(records) for part in stretches(whole)):
        rows: list[int] = []
        ends: list[float] = []
        for record in mine:
            passed = [end_s for end_s in ends if end_s <= record.begin_s]
            free_s = max(passed, default=None)
            if free_s is not None:
                out[rank, record.seq] = _Stretch(record.begin_s - free_s, rows[0] if rows else None)
            if record.wait_s is not None:
                ends = [*(e for e in ends if e > record.begin_s), record.end_s, *([free_s] if free_s is not None else [])]
            _follow_rows(record, rows)
    return out


def _follow_rows(record: CommRecord, rows: list[int]) -> None:
    """Keep `rows` the bytes of each piece at this rank's experts: from dispatch to combine, and on the way back."""
    now = (record.what, record.direction)
    if now in (("dispatch", "forward"), ("combine", "backward")):
        rows.append(sum(record.received))
    elif now in (("combine", "forward"), ("dispatch", "backward")) and rows:
        rows.pop(0)


def _late(
    found: Sequence[Collective], before: dict[tuple[int, int], _Stretch], rows: dict[int, list[int]], covered_s: float
) -> list[Verdict]:
    slow: dict[int, float] = defaultdict(float)
    hot: dict[tuple[int, int | None], float] = defaultdict(float)
    for c in found:
        mine = dict(
            zip(c.first.members, (before.get((m, r.seq)) for m, r in zip(c.first.members, c.records, strict=True)), strict=True)
        )
        last = mine.pop(c.last_rank)
        others = [s for s in mine.values() if s is not None]
        if last is None or not others or c.late_s <= 0:
            continue
        usual_s = median(s.seconds for s in others)
        excess_s = last.seconds - usual_s
        blamed = min(1.0, max(0.0, excess_s / c.late_s)) * sum(s.skew_s for s in c.splits)
        by_rows = _explained_by_rows(last, others, usual_s, excess_s)
        hot[c.last_rank, c.first.layer] += blamed * by_rows
        slow[c.last_rank] += blamed * (1 - by_rows)
    out = [
        Verdict("slow_rank", rank, s, _share(s, covered_s), _slow_text(rank, s, covered_s)) for rank, s in slow.items() if s > 0
    ]
    for (rank, layer), lost_s in hot.items():
        if lost_s > 0:
            out.append(_hot(rank, layer, lost_s, rows, covered_s))
    return out


def _explained_by_rows(last: _Stretch, others: Sequence[_Stretch], usual_s: float, excess_s: float) -> float:
    """Share of the excess that more rows explain, at the others' time per row."""
    if last.rows is None or excess_s <= 0:
        return 0.0
    usual = median(s.rows or 0 for s in others)
    if usual == 0:
        return 1.0 if last.rows else 0.0  # the others had nothing to do
    return min(1.0, max(0.0, usual_s * (last.rows / usual - 1) / excess_s))


def _share(seconds: float, covered_s: float) -> float:
    return seconds / covered_s if covered_s else 0.0


def _slow_text(rank: int, lost_s: float, covered_s: float) -> str:
    lost = f"the others waited {lost_s:.3g} s for it ({_share(lost_s, covered_s):.0%} of all ranks' time)"
    return f"rank {rank} computes more slowly than the others on as much work: {lost}; look at its clock, its load and its host"


def _hot(rank: int, layer: int | None, lost_s: float, rows: dict[int, list[int]], covered_s: float) -> Verdict:
    counts = rows.get(layer, []) if layer is not None else []
    expert = max(range(len(counts)), key=counts.__getitem__) if any(counts) else None
    load = (
        f" (the busiest of the layer is expert {expert}, load ×{counts[expert] * len(counts) / sum(counts):.2f})"
        if expert is not None
        else ""
    )
    waited = f"the others waited {lost_s:.3g} s ({_share(lost_s, covered_s):.0%} of all ranks' time)"
    text = f"experts of rank {rank} in layer {layer} get more rows than others{load}: {waited}; balance the routing"
    return Verdict("hot_expert", rank, lost_s, _share(lost_s, covered_s), text, layer=layer, expert=expert)


def _links(found: Sequence[Collective], covered_s: float) -> list[Verdict]:
    seconds: dict[tuple[int, int], list[float]] = defaultdict(list)
    nbytes: dict[tuple[int, int], int] = defaultdict(int)
    for c in found:
        for here, record in enumerate(c.records):
            for place, own_s in _own_waits(c, here):
                link = (record.members[place], record.members[here])
                seconds[link].append(own_s)
                nbytes[link] += record.received[place]
    if not seconds:
        return []
    rate = median_low(sum(s) / nbytes[link] for link, s in seconds.items())
    each_s = median_low(sum(s) / len(s) for s in seconds.values())
    lost = {}
    for link, waits in seconds.items():
        # short messages take their latency, whatever the rate
        expected_s = max(rate * nbytes[link], each_s * len(waits))
        if sum(waits) > SLOW_LINK * expected_s:
            lost[link] = sum(waits) - expected_s
    return _name_links(lost, seconds.keys(), covered_s)


def _own_waits(c: Collective, here: int) -> list[tuple[int, float]]:
    """(place, seconds) for each member whose rows this one waited for: alone, and after both had come."""
    record = c.records[here]
    arrived = [(t, place) for place, t in enumerate(record.arrivals_s or ()) if t is not None and place != here]
    out, before_s = [], record.begin_s if record.wait_s is None else record.wait_s
    for t, place in sorted(arrived):
        out.append((place, max(0.0, t - max(before_s, c.records[place].begin_s))))
        before_s = max(before_s, t)
    return out


def _name_links(lost: dict[tuple[int, int], float], every: Iterable[tuple[int, int]], covered_s: float) -> list[Verdict]:
    """One verdict for a rank most of whose links are slow, else one for each slow link."""
    links = list(every)
    out, left = [], dict(lost)
    for rank in sorted({r for link in lost for r in link}, key=lambda r: -sum(r in link for link in lost)):
        its, slow = [k for k in links if rank in k], [k for k in left if rank in k]
        if len(its) > 2 and 2 * len(slow) > len(its):
            lost_s = sum(left.pop(k) for k in slow)
            text = f"{len(slow)} of {len(its)} links of rank {rank} are slow: {_link_text(lost_s, covered_s)}"
            out.append(Verdict("slow_link", rank, lost_s, _share(lost_s, covered_s), text))
    for (source, target), lost_s in left.items():
        text = f"the link from rank {source} to rank {target} is slow: {_link_text(lost_s, covered_s)}"
        out.append(Verdict("slow_link", source, lost_s, _share(lost_s, covered_s), text, peer=target))
    return out


def _link_text(lost_s: float, covered_s: float) -> str:
    return f"rows came {lost_s:.3g} s later than by the usual rate ({_share(lost_s, covered_s):.0%} of all ranks' time)"
