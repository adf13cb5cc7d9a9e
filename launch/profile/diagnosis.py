"""What holds a recorded job up, by name: a host, a processor shared with other programs, links, or an expert. Without torch.

From the verdicts in comm.json (see `recorder_verdict`), which name ranks: those of one host are put together, the same expert of
several layers counts once, and a rank whose threads found no free core is told from one that computes slowly.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any, Literal

from ...parallel.recorder_analysis import ALL_TO_ALL
from .page import Tone

Kind = Literal["slow_rank", "busy_cpu", "slow_link", "hot_expert"]
CROWDED = 0.25
"""Of a step, from where on waiting for a core is told when most ranks do it."""
KINDS = ("slow_rank", "slow_link", "hot_expert")
"""Of the verdicts that are put together here."""
MAIN = 1 / 3
"""Of the largest cause's share, from where on another one is named beside it: smaller ones are often its echo."""
BY_CORES = 0.5
"""Of the excess of a slow rank's computing, how much waiting for a core must explain to be the cause."""
AS_SLOW = 0.7
"""Of the excess of the rank that is blamed, from where on another one of its host is as slow."""
SEVERE_SHARE = 0.25
"""Of the ranks' time lost to one cause, from where on the page calls for attention."""
FRACTIONS = ((0.25, "a quarter"), (1 / 3, "a third"), (0.5, "half"), (2 / 3, "two thirds"), (0.75, "three quarters"))


@dataclass(frozen=True)
class Finding:
    """One cause of waiting.

    ranks: that are slow, that hold the expert, or whose links are slow. host: theirs, None where they are on several. peer_host:
    the other end of one slow link. lost_s: what ranks waited because of it, added over ranks and sampled steps; share: of all
    ranks' time; of_waiting: of all their waiting in collectives.
    """

    kind: Kind
    ranks: tuple[int, ...]
    host: str | None
    lost_s: float
    share: float
    of_waiting: float
    text: str
    peer_host: str | None = None
    layers: tuple[int, ...] = ()
    expert: int | None = None


@dataclass(frozen=True)
class Diagnosis:
    """line: the verdict in one sentence. findings: causes, the worst first; minor: those that are too small to be named there.

    notes: what else was found while recording, such as a plan that has become stale.
    a2a, other: parts of the ranks' time that they wait in the all-to-all, and in all other collectives. aligned: whether there is
    a step whose records are on one clock; without one, who waited for whom is not known.
    """

    line: str
    tone: Tone
    a2a: float
    other: float
    findings: tuple[Finding, ...]
    minor: tuple[Finding, ...]
    notes: tuple[str, ...] = ()
    aligned: bool = True

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def diagnose(comm: Mapping[str, Any]) -> Diagnosis:
    """What comm.json says, of any schema that `comm_file.check_comm` lets pass."""
    if not comm.get("collectives") and comm.get("unaligned_s"):
        worst_s = max(comm["unaligned_s"].values())
        line = (
            f"The clocks of the ranks jumped during each of the {len(comm['unaligned_s'])} sampled steps (by {worst_s:.3g} s at "
            "least), so their times are not compared: look at time synchronisation and suspended hosts, then record again."
        )
        return Diagnosis(line, "bad", 0.0, 0.0, (), (), aligned=False)
    a2a, other = shares(comm)
    found = sorted((*_slow(comm), *_links(comm), *_hot(comm)), key=lambda f: -f.lost_s)
    top = max((f.share for f in found), default=0.0)
    main = tuple(f for f in found if f.share > MAIN * top)
    minor = tuple(f for f in found if f not in main)
    cause = f"; {of_a_whole(main[0].of_waiting)} of the waiting is due to {_name(main[0])}" if main else ""
    nobody = "" if main else "; no rank, link or expert stands out"
    line = f"{a2a:.0%} of the step is waiting in the all-to-all and {other:.0%} in other collectives{cause}{nobody}."
    tone: Tone = "bad" if top >= SEVERE_SHARE else "warn" if main else "good"
    notes = tuple(v["text"] for v in comm.get("verdicts", []) if v["kind"] not in KINDS) + _crowded(comm)
    return Diagnosis(line, tone, a2a, other, main, minor, notes)


def _crowded(comm: Mapping[str, Any]) -> tuple[str, ...]:
    """Whether most ranks lack cores: then nobody is to blame alone."""
    waits = comm.get("rank_times", {}).get("cpu_wait_s", [])
    if not waits or any(w is None for w in waits):
        return ()
    step_s = comm["covered_s"] / comm["ranks"] / max(1, len(comm["steps"]))
    usual_s = median(waits)
    if usual_s < CROWDED * step_s:
        return ()
    return (
        f"most ranks wait for a free core ({1e3 * usual_s:.3g} ms of a step of {1e3 * step_s:.3g} ms): there are more threads "
        "than cores, so what is said of single ranks is uncertain",
    )


def shares(comm: Mapping[str, Any]) -> tuple[float, float]:
    """Parts of the ranks' time that they wait in the all-to-all, and in other collectives."""
    covered_s = comm.get("covered_s", 0.0)
    waited = {True: 0.0, False: 0.0}
    for row in comm.get("layers", []):
        waited[row["what"] in ALL_TO_ALL] += row["skew_s"] + row["transfer_s"]
    return (waited[True] / covered_s, waited[False] / covered_s) if covered_s else (0.0, 0.0)


def of_a_whole(share: float) -> str:
    """A part in words where it is close to a simple one."""
    if share >= 0.95:
        return "nearly all"
    near, word = min(FRACTIONS, key=lambda f: abs(f[0] - share))
    return word if abs(near - share) <= 0.03 else f"{share:.0%}"


def _name(finding: Finding) -> str:
    where = f" of host {finding.host}" if finding.host and len(finding.ranks) > 1 else ""
    on = f" (host {finding.host})" if finding.host and not where else ""
    ranks = rank_names(finding.ranks)
    if finding.kind == "slow_rank":
        return f"{ranks}{where}{on}, slower than the others on as much work"
    if finding.kind == "busy_cpu":
        return f"{ranks}{where}{on}, whose processor is busy with other work"
    if finding.kind == "hot_expert":
        return f"expert {finding.expert} on {ranks}{on}, which gets more rows than others"
    if finding.peer_host is not None:
        return f"the slow link from host {finding.host} to host {finding.peer_host}"
    return f"the slow links of {ranks}{where}{on}"


def rank_names(ranks: Sequence[int]) -> str:
    """ "rank 3", "ranks 4-7" or "ranks 1, 5"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    whole = list(ranks) == list(range(ranks[0], ranks[-1] + 1))
    return f"ranks {ranks[0]}–{ranks[-1]}" if whole else f"ranks {', '.join(map(str, ranks))}"


def _host(comm: Mapping[str, Any], rank: int | None) -> str | None:
    hosts = comm.get("hosts", [])
    return (hosts[rank] or None) if rank is not None and rank < len(hosts) else None


def _finding(comm: Mapping[str, Any], kind: Kind, verdicts: Sequence[Mapping[str, Any]], text: str, **more: Any) -> Finding:
    ranks = tuple(sorted({v["rank"] for v in verdicts}))
    hosts = {_host(comm, r) for r in ranks}
    lost_s = sum(v.get("lost_s", 0.0) for v in verdicts)
    waited_s = sum(row["skew_s"] + row["transfer_s"] for row in comm.get("layers", []))
    share = sum(v["share"] for v in verdicts)
    host = next(iter(hosts)) if len(hosts) == 1 else None
    return Finding(kind, ranks, host, lost_s, share, lost_s / waited_s if waited_s else 0.0, text, **more)


def _slow(comm: Mapping[str, Any]) -> list[Finding]:
    """Slow ranks, put together by host and cause."""
    groups: dict[tuple[Kind, Any], list[Mapping[str, Any]]] = defaultdict(list)
    for v in comm.get("verdicts", []):
        if v["kind"] == "slow_rank":
            kind: Kind = "busy_cpu" if _starved(comm, v["rank"]) else "slow_rank"
            groups[kind, _host(comm, v["rank"]) or v["rank"]].append(v)
    out = []
    for (kind, _), verdicts in groups.items():
        text = "; ".join(v["text"] for v in verdicts)
        if kind == "busy_cpu":
            waits = ", ".join(f"rank {v['rank']} {comm['rank_times']['cpu_wait_s'][v['rank']]:.3g} s" for v in verdicts)
            text = (
                f"{text}. It is ready to compute but gets no core ({waits} of each step): end what else runs on its host, "
                "or give each rank cores of its own"
            )
        finding = _finding(comm, kind, verdicts, text)
        out.append(replace(finding, ranks=_with_neighbours(comm, finding)))
    return out


def _with_neighbours(comm: Mapping[str, Any], finding: Finding) -> tuple[int, ...]:
    """The slow ranks, and those of their host that compute about as slowly: only the last of them to come is blamed."""
    work = comm.get("rank_times", {}).get("work_s", [])
    if finding.host is None or any(w is None for w in work):
        return finding.ranks
    usual_s = median(w for r, w in enumerate(work) if r not in finding.ranks) if len(work) > len(finding.ranks) else 0.0
    least_s = min((work[r] - usual_s for r in finding.ranks if r < len(work)), default=0.0)
    beside = [r for r in range(len(work)) if _host(comm, r) == finding.host and work[r] - usual_s > AS_SLOW * least_s > 0]
    return tuple(sorted({*finding.ranks, *beside}))


def _starved(comm: Mapping[str, Any], rank: int) -> bool:
    """Whether waiting for a core explains most of what this rank computes longer than the others."""
    times = comm.get("rank_times", {})
    work, waits = times.get("work_s", []), times.get("cpu_wait_s", [])
    if len(work) < 2 or rank >= len(work) or any(w is None for w in [*work, *waits]):
        return False
    more = work[rank] - median(w for r, w in enumerate(work) if r != rank)
    without_core = waits[rank] - median(w for r, w in enumerate(waits) if r != rank)
    return bool(more > 0 and without_core > BY_CORES * more)


def _links(comm: Mapping[str, Any]) -> list[Finding]:
    """Slow links: of a host where all its ranks' are, else between two hosts, else of a rank."""
    found = [v for v in comm.get("verdicts", []) if v["kind"] == "slow_link"]
    of_ranks: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    between: dict[tuple[Any, Any], list[Mapping[str, Any]]] = defaultdict(list)
    for v in found:
        host, peer = _host(comm, v["rank"]), v.get("peer")
        if peer is None:
            of_ranks[host or v["rank"]].append(v)
        else:
            between[host or v["rank"], _host(comm, peer) or peer].append(v)
    out = [_finding(comm, "slow_link", verdicts, "; ".join(v["text"] for v in verdicts)) for verdicts in of_ranks.values()]
    for (_, peer), verdicts in between.items():
        text = "; ".join(v["text"] for v in verdicts)
        out.append(_finding(comm, "slow_link", verdicts, text, peer_host=peer if isinstance(peer, str) else f"of rank {peer}"))
    return out


def _hot(comm: Mapping[str, Any]) -> list[Finding]:
    """Hot experts: the same one of several layers counts once."""
    groups: dict[tuple[int, Any], list[Mapping[str, Any]]] = defaultdict(list)
    for v in comm.get("verdicts", []):
        if v["kind"] == "hot_expert":
            groups[v["rank"], v.get("expert")].append(v)
    out = []
    for (_, expert), verdicts in groups.items():
        layers = tuple(sorted({v["layer"] for v in verdicts if v.get("layer") is not None}))
        text = "; ".join(v["text"] for v in verdicts)
        out.append(_finding(comm, "hot_expert", verdicts, text, layers=layers, expert=expert))
    return out
