"""Steps of an engine, timed by stage on every rank and put together: seconds, waiting and transfer, bytes, rows of experts."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from .comm_record import CommRecord
from .engine import Engine, MicroBatch
from .recorder_analysis import ALL_TO_ALL, Split, aligned, collectives, expert_rows, totals
from .recorder_clock import clock_offsets
from .stage_clock import OTHER, STAGES, WAITING, Key, StageClock, split_by_stage


@dataclass(frozen=True)
class StageTime:
    """Seconds of one stage in a step, on average over steps: mean over ranks and of the rank that spent most.

    skew_s, transfer_s, hidden_s: of its collectives, mean over ranks, see `recorder_analysis.Split`. layer: None outside blocks.
    """

    stage: str
    layer: int | None
    direction: str
    mean_s: float
    most_s: float
    skew_s: float = 0.0
    transfer_s: float = 0.0
    hidden_s: float = 0.0


@dataclass(frozen=True)
class StepProfile:
    """What steps took, the same on every rank.

    seconds: of each step, as the slowest rank saw it, without the hooks that tell stages apart; stages are those of other steps
    in turn with these, which take a little longer. sent_bytes: what a rank sent to others in the all-to-alls of a step, mean
    over ranks, by axis. rows_LE: rows for each expert in the forward passes of a step, by layer, all ranks together.
    loss: of the last step.
    """

    seconds: tuple[float, ...]
    stages: tuple[StageTime, ...]
    sent_bytes: Mapping[str, float]
    rows_LE: Mapping[int, tuple[int, ...]]
    loss: float

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Relative standard deviation of the median: 1.25 standard deviations of a step by the root of their number, where the
        median of absolute deviations stands for the standard deviation, which one disturbed step would blow up."""
        middle = self.median_s
        scatter = 1.4826 * statistics.median(abs(s - middle) for s in self.seconds)
        return 1.2533 * scatter / middle / len(self.seconds) ** 0.5

    def total(self, *stages: str, direction: str | None = None, most: bool = False) -> float:
        """Seconds of these stages together; most: of the slowest rank of each."""
        chosen = [s for s in self.stages if s.stage in stages and direction in (None, s.direction)]
        return sum(s.most_s if most else s.mean_s for s in chosen)

    def by_stage(self) -> tuple[StageTime, ...]:
        """All layers together, in the order of `STAGES`; `most_s` then is the sum of each layer's slowest rank."""
        sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0] * 5)
        for s in self.stages:
            for place, value in enumerate((s.mean_s, s.most_s, s.skew_s, s.transfer_s, s.hidden_s)):
                sums[s.stage, s.direction][place] += value
        order = {stage: place for place, stage in enumerate(STAGES)}
        keys = sorted(sums, key=lambda key: (order[key[0]], key[1] != "forward"))
        return tuple(StageTime(stage, None, direction, *sums[stage, direction]) for stage, direction in keys)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "seconds": list(self.seconds),
            "median_s": self.median_s,
            "stages": [asdict(stage) for stage in self.stages],
            "sent_bytes": dict(self.sent_bytes),
            "expert_rows": {str(layer): list(rows) for layer, rows in self.rows_LE.items()},
            "loss": self.loss,
        }


def time_steps(engine: Engine, batches: Sequence[MicroBatch], steps: int, warm_up: int = 1) -> tuple[float, ...]:
    """Seconds of each of some steps that change no weights, as the slowest rank saw them. Collective."""
    seconds = [_step(engine, batches)[0] for _ in range(warm_up + steps)][warm_up:]
    return _slowest(engine, seconds)


def profile_steps(engine: Engine, batches: Sequence[MicroBatch], steps: int, warm_up: int = 1) -> StepProfile:
    """Steps that change no weights: `steps` as they are and, in turn with them, as many with every stage and collective timed.
    Collective; the engine must have a recorder."""
    recorder = engine.recorder
    assert recorder is not None, "collectives are seen by the engine's recorder"
    for _ in range(warm_up):
        _step(engine, batches)
    seconds: list[float] = []
    times: dict[Key, float] = defaultdict(float)
    records: list[CommRecord] = []
    clock, loss = StageClock(recorder.clock), 0.0
    for _ in range(steps):
        seconds.append(_step(engine, batches)[0])
        recorder.take()
        with clock.attached(engine):
            _, loss, begin_s, end_s = _step(engine, batches)
            mine = recorder.take()
            records += mine
            for key, part_s in split_by_stage(clock.take(), mine, begin_s, end_s).items():
                times[key] += part_s / steps
    offsets = [o.offset_s for o in clock_offsets(engine.mesh.world_group)] if engine.mesh.topology.world > 1 else [0.0]
    found = _shared(engine, (dict(times), records), lambda every: _together(every, offsets, steps))
    stages, sent, rows = found
    return StepProfile(_slowest(engine, seconds), stages, sent, rows, loss)


def _step(engine: Engine, batches: Sequence[MicroBatch]) -> tuple[float, float, float, float]:
    """(seconds, loss, begin, end) of one step with a learning rate of 0, begun together."""
    dist.barrier(group=engine.mesh.world_group)
    _settle(engine)
    if engine.recorder is not None:
        engine.recorder.anchor()
    begin_s = time.perf_counter()
    loss = engine.train_step(batches, 0.0).loss
    _settle(engine)
    end_s = time.perf_counter()
    return end_s - begin_s, loss, begin_s, end_s


def _settle(engine: Engine) -> None:
    if engine.mesh.device.type == "cuda":
        torch.cuda.synchronize(engine.mesh.device)


def _slowest(engine: Engine, seconds: Sequence[float]) -> tuple[float, ...]:
    times = torch.tensor(seconds, dtype=torch.float64, device=engine.mesh.device)
    dist.all_reduce(times, op=dist.ReduceOp.MAX, group=engine.mesh.world_group)
    return tuple(times.tolist())


def _shared(engine: Engine, mine: Any, combine: Any) -> Any:
    """`combine` of what all ranks give, in the order of ranks; computed by rank 0."""
    first = engine.mesh.rank == 0
    gathered: list[Any] | None = [None] * engine.mesh.topology.world if first else None
    dist.gather_object(mine, gathered, dst=0, group=engine.mesh.world_group)
    box = [combine(gathered) if gathered is not None else None]
    dist.broadcast_object_list(box, src=0, group=engine.mesh.world_group)
    return box[0]


def _together(
    every: Sequence[tuple[dict[Key, float], list[CommRecord]]], offsets_s: Sequence[float], steps: int
) -> tuple[tuple[StageTime, ...], dict[str, float], dict[int, tuple[int, ...]]]:
    world = len(every)
    records = aligned([mine for _, mine in every], offsets_s)
    waits = totals(collectives(records), lambda r, _: (WAITING.get(r.what, OTHER), r.layer, r.direction))
    keys = {key for times, _ in every for key in times} | set(waits)
    order = {stage: place for place, stage in enumerate(STAGES)}
    stages = []
    for key in sorted(keys, key=lambda k: (order[k[0]], -1 if k[1] is None else k[1], k[2])):
        own = [times.get(key, 0.0) for times, _ in every]
        wait = waits.get(key, Split())
        skew_s, transfer_s, hidden_s = (part / world / steps for part in (wait.skew_s, wait.transfer_s, wait.hidden_s))
        stage, layer, direction = key
        stages.append(StageTime(stage, layer, direction, sum(own) / world, max(own), skew_s, transfer_s, hidden_s))
    sent: dict[str, float] = defaultdict(float)
    for rank, mine in enumerate(records):
        for record in mine:
            if record.what in ALL_TO_ALL:
                abroad = sum(n for peer, n in zip(record.members, record.sent, strict=True) if peer != rank)
                sent[record.axis] += abroad / world / steps
    rows = {layer: tuple(n // steps for n in counts) for layer, counts in expert_rows(records).items()}
    return tuple(stages), dict(sent), rows
