"""The traces of several ranks as one, on the clock of rank 0, for Perfetto or chrome://tracing. Imports no torch.

Each rank's file has times of its profiler's clock. Marks in it, whose time on the rank's own clock is known, take them there, and
the offsets between the clocks of ranks (measured at both ends of the window) to rank 0's. Rank R has the processes R * `PER_RANK`
(its host), the next (its collectives, as the recorder saw them) and more (its GPUs).
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ...moe.errors import RunDirError
from ..report_parts import RunData

MARK = "moefold/clock"
PER_RANK = 1000
SLACK_S, DRIFT = 1e-3, 1e-4
"""What clocks may go apart within a window, and of its length; more is a jump."""
HOW = "train with log.trace_steps = [start, stop], or with log.comm = true on several ranks, for the collectives of one step"


@dataclass(frozen=True)
class MergedTrace:
    """What was written. error_s: how far events of two ranks may be off. source: where the events come from."""

    path: Path
    ranks: tuple[int, ...]
    events: int
    error_s: float
    source: str

    def to_dict(self) -> dict[str, Any]:
        return {**self.__dict__, "path": str(self.path), "ranks": list(self.ranks)}

    def render(self) -> str:
        listed = f"{len(self.ranks)} rank{'s' if len(self.ranks) > 1 else ''}"
        about = f"{self.events} events of {listed}, {self.source}; clocks aligned to ±{1e3 * self.error_s:.2g} ms"
        return f"trace: {self.path} ({about}); open it at ui.perfetto.dev"


@dataclass(frozen=True)
class _Rank:
    """One rank's files. about: the small one; see `launch/trace.py`."""

    about: Mapping[str, Any]
    trace: Path

    @property
    def rank(self) -> int:
        return int(self.about["rank"])


def merge_traces(run: RunData, out: str | os.PathLike[str]) -> MergedTrace:
    """Write one trace of all ranks that have one; without any, of the collectives of the newest sampled step in comm.json.

    Files of the newest attempt count. Events keep the order of their time within each rank, and ranks follow one another.

    Raises:
        RunDirError: neither is there, a file is damaged, a clock jumped within the window, or `out` cannot be written.
    """
    target = Path(out)
    ranks = _newest(run.path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _opened(part, target.name.endswith(".gz")) as file:
            if ranks:
                count, error_s = _write_ranks(file, ranks)
                first = ranks[0].about
                source = f"steps {first['steps'][0]} to {first['steps'][1] - 1} by torch.profiler and the recorder"
                found = tuple(r.rank for r in ranks)
            else:
                count, error_s, found = _write_spans(file, run)
                source = f"collectives of step {run.comm['spans']['step']} by the recorder"
        os.replace(part, target)
    except OSError as error:
        raise RunDirError(f"{target}: cannot be written ({error.strerror}); choose another file (--trace)") from error
    finally:
        part.unlink(missing_ok=True)
    return MergedTrace(target, found, count, error_s, source)


def _opened(path: Path, zipped: bool) -> AbstractContextManager[IO[str]]:
    return gzip.open(path, "wt", compresslevel=5) if zipped else open(path, "w", encoding="utf-8")


def _newest(run: Path) -> list[_Rank]:
    for folder in sorted((run / "trace").glob("attempt-*"), reverse=True):
        found = []
        for path in sorted(folder.glob("rank-*.json")):
            trace = path.with_name(f"{path.stem}.trace.json.gz")
            if path.name.endswith(".trace.json") or not trace.exists():
                continue
            try:
                found.append(_Rank(json.loads(path.read_text(encoding="utf-8")), trace))
            except ValueError as error:
                raise RunDirError(f"{path}: cannot be read ({error}); remove it to merge the others") from error
        if found:
            return sorted(found, key=lambda r: r.rank)
    return []


def _write_ranks(file: IO[str], ranks: Sequence[_Rank]) -> tuple[int, float]:
    """(events, how far those of two ranks may be off)."""
    # large files: one at a time, so the zero of time is found from the marks, which come before everything else
    zero_us = min(1e6 * (min(r.about["marks_s"]) + r.about["offsets_s"][0]) for r in ranks)
    count, errors = 0, [0.0]
    writer = _Writer(file)
    for r in ranks:
        try:
            with gzip.open(r.trace, "rt", encoding="utf-8") as source:
                events = json.load(source)["traceEvents"]
        except (OSError, EOFError, ValueError, KeyError) as error:
            raise RunDirError(f"{r.trace}: is damaged ({error}); remove it to merge the others") from error
        shift_us, error_s = alignment(r.about, events, str(r.trace))
        errors.append(error_s)
        moved = _of_rank(events, r.rank, str(r.about["host"]), shift_us - zero_us)
        offset_us = 1e6 * r.about["offsets_s"][0] - zero_us
        moved += [_collective(x, r.rank, offset_us) for x in r.about["records"]]
        count += writer.rank(r.rank, str(r.about["host"]), moved)
    writer.close()
    return count, sum(sorted(errors)[-2:])


def alignment(about: Mapping[str, Any], events: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """(microseconds to add to the file's times to be on the clock of rank 0, how far off in seconds that may be).

    Raises:
        RunDirError: marks are missing, or a clock jumped between the ends of the window.
    """
    marks = sorted((e for e in events if e.get("name") == MARK and e.get("ph") == "X"), key=lambda e: e["ts"])
    # each mark is also there as it was seen from a device's side, if at all: those are not of the host
    marks = [e for e in marks if e.get("cat") in ("user_annotation", "cpu_op")]
    if not marks or len(marks) != len(about["marks_s"]):
        raise RunDirError(
            f"{name}: has {len(marks)} of {len(about['marks_s'])} clock marks, so it cannot be aligned; record again"
        )
    pairs = [(e["dur"], 1e6 * s - e["ts"] - e["dur"] / 2, s) for e, s in zip(marks, about["marks_s"], strict=True)]
    half = len(pairs) // 2
    first, last = min(pairs[:half] or pairs), min(pairs[half:])
    length_s = abs(last[2] - first[2])
    offsets = about["offsets_s"]
    allowed_s = SLACK_S + DRIFT * length_s
    of_file_s = abs(last[1] - first[1]) / 1e6 - (first[0] + last[0]) / 2e6
    of_rank_s = abs(offsets[-1] - offsets[0]) - sum(about["errors_s"])
    jumped_s = max(of_file_s, of_rank_s)
    if jumped_s > allowed_s:
        raise RunDirError(
            f"{name}: a clock of rank {about['rank']} (host {about['host']}) jumped by {jumped_s:.3g} s within the window, so "
            "its events cannot be put beside those of others; look at time synchronisation and suspended hosts, then record again"
        )
    shift_us = (first[1] + last[1]) / 2 + 1e6 * sum(offsets) / len(offsets)
    return shift_us, max(about["errors_s"]) + max(first[0], last[0]) / 2e6


def _of_rank(events: Sequence[Mapping[str, Any]], rank: int, host: str, shift_us: float) -> list[dict[str, Any]]:
    """The events with numbers of their own and times on the common clock; the marks are left out."""
    processes: dict[Any, int] = {}
    threads: dict[tuple[Any, Any], int] = {}
    named = {e["pid"]: e["args"].get("labels", "") for e in events if e.get("ph") == "M" and e.get("name") == "process_labels"}
    # processes with a word for a number hold the profiler's own overview
    used = {e["pid"] for e in events if e.get("ph") not in ("M", None) and isinstance(e.get("pid"), int)}
    out: list[dict[str, Any]] = []
    for event in events:
        pid = event.get("pid")
        if (
            event.get("name") == MARK
            or pid not in used
            or (event.get("ph") == "M" and str(event.get("name")).startswith("process_"))
        ):
            continue
        if pid not in processes:
            place = len(processes)
            processes[pid] = rank * PER_RANK + (0 if place == 0 else place + 1)
            label = f"rank {rank} · {host}" + (f" · {named[pid]}" if named.get(pid) else "")
            out += _process(processes[pid], label)
        tid = event.get("tid")
        if not isinstance(tid, int):
            tid = threads.setdefault((pid, tid), 10_000_000 + len(threads))
        moved = {**event, "pid": processes[pid], "tid": tid}
        if "ts" in event and event.get("ph") != "M":
            moved["ts"] = event["ts"] + shift_us
        for key in ("id", "bind_id"):
            if key in event:
                moved[key] = f"{rank}-{event[key]}"
        out.append(moved)
    return out


def _process(pid: int, label: str) -> list[dict[str, Any]]:
    head = {"ph": "M", "pid": pid, "tid": 0}
    return [
        {**head, "name": "process_name", "args": {"name": label}},
        {**head, "name": "process_sort_index", "args": {"sort_index": pid}},
    ]


def _collective(record: Mapping[str, Any], rank: int, offset_us: float) -> dict[str, Any]:
    layer = "" if record["layer"] is None else f" of layer {record['layer']}"
    begin_us = 1e6 * record["begin_s"] + offset_us
    keep = ("axis", "op", "direction", "step", "layer")
    args = {**{k: record[k] for k in keep}, "sent_bytes": sum(record["sent"]), "received_bytes": sum(record["received"])}
    return _span(f"{record['what']}{layer}", rank, begin_us, 1e6 * (record["end_s"] - record["begin_s"]), args)


def _span(name: str, rank: int, ts: float, dur: float, args: Mapping[str, Any]) -> dict[str, Any]:
    pid = rank * PER_RANK + 1
    return {"ph": "X", "cat": "collective", "name": name, "pid": pid, "tid": 0, "ts": ts, "dur": dur, "args": dict(args)}


def _write_spans(file: IO[str], run: RunData) -> tuple[int, float, tuple[int, ...]]:
    """The collectives of one step from comm.json: (events, error, ranks)."""
    spans = run.comm.get("spans")
    if not spans or not spans.get("ranks"):
        raise RunDirError(f"{run.path}: there is nothing to make a trace of; {HOW}")
    hosts, writer, count = run.comm.get("hosts", []), _Writer(file), 0
    for rank, rows in ((int(r), rows) for r, rows in spans["ranks"].items()):
        events = []
        for kind, begin, wait, moving, end in rows:
            what, axis, layer, direction, op = spans["kinds"][kind]
            args = {"axis": axis, "op": op, "direction": direction, "layer": layer, "step": spans["step"]}
            args |= {"waits_us": None if wait is None else wait - begin, "moves_us": None if moving is None else end - moving}
            events.append(_span(what if layer is None else f"{what} of layer {layer}", rank, begin, end - begin, args))
        count += writer.rank(rank, hosts[rank] if rank < len(hosts) else "", events)
    writer.close()
    return count, 2 * float(run.comm.get("clock_error_s", 0.0)), tuple(int(r) for r in spans["ranks"])


class _Writer:
    """Writes the events of one rank after another."""

    def __init__(self, file: IO[str]):
        self.file, self._first = file, True
        file.write('{"displayTimeUnit": "ms", "traceEvents": [\n')

    def rank(self, rank: int, host: str, events: list[dict[str, Any]]) -> int:
        """Those of one rank by time, its collectives on as many rows as overlap; how many there are."""
        spans = [e for e in events if e.get("cat") == "collective"]
        lanes: list[float] = []
        for event in sorted(spans, key=lambda e: e["ts"]):
            lane = next((i for i, end in enumerate(lanes) if end <= event["ts"]), len(lanes))
            lanes[lane:] = [event["ts"] + event["dur"], *lanes[lane + 1 :]]
            event["tid"] = lane
        if spans:
            events = [*_process(rank * PER_RANK + 1, f"rank {rank} · {host} · collectives"), *events]
        for event in sorted(events, key=lambda e: (e.get("ph") != "M", e.get("ts", 0.0))):
            self.file.write(("" if self._first else ",\n") + json.dumps(event, separators=(",", ":")))
            self._first = False
        return sum(e.get("ph") != "M" for e in events)

    def close(self) -> None:
        self.file.write("\n]}\n")
