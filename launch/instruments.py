"""What watches a run while it trains: the log of its collectives, a window of torch.profiler, and counters of its GPUs."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from ..moe.errors import ConfigError, Problem
from ..parallel.recorder_clock import clock_offsets
from .comm import CommLog
from .gpu_counters import NAMES, GpuSampler, Reading, gpu_metrics, mean_of, open_device
from .process import Crew
from .rundir import RunDir, write_json
from .settings import LogConfig
from .trace import DEFAULT_RANKS, TraceWindow

GPU_SCHEMA = 1


class GpuLog:
    """The counters of every rank's GPU: means as metrics, the newest of each rank in gpu.json. Every rank has one.

    sampler: of this rank; None where its GPU has no counters for us.
    """

    def __init__(self, sampler: GpuSampler | None, crew: Crew, run: RunDir):
        self.sampler, self.crew, self.run = sampler, crew, run
        self._newest: list[Reading] = []

    def sample(self) -> dict[str, float]:
        """The `gpu/` metrics since the last call on rank 0, else empty. Collective."""
        mine = mean_of([]) if self.sampler is None else self.sampler.take()
        gathered: list[Any] | None = [None] * self.crew.world if self.crew.rank == 0 else None
        dist.gather_object(mine, gathered, group=self.crew.group, group_dst=0)
        self._newest = gathered or []
        return gpu_metrics(self._newest)

    def write(self) -> None:
        """Write gpu.json, if this is rank 0 and has readings."""
        if not any(v is not None for reading in self._newest for v in reading.values.values()):
            return
        ranks = [
            {"rank": rank, "host": host, "values": {n: r.values.get(n) for n in NAMES}, "reasons": list(r.reasons)}
            for rank, (r, (host, _)) in enumerate(zip(self._newest, self.crew.members, strict=True))
        ]
        write_json(self.run.path / "gpu.json", {"schema": GPU_SCHEMA, "ranks": ranks})


@dataclass
class Instruments:
    """Those that are on. Every rank has the same ones, and calls them at the same steps."""

    comm: CommLog | None = None
    window: TraceWindow | None = None
    gpu: GpuLog | None = None
    stack: ExitStack = field(default_factory=ExitStack)

    def before(self, step: int) -> None:
        """Before a step (counted from 0)."""
        if self.window is not None:
            self.window.before(step)

    def after(self, step: int) -> None:
        """After it."""
        if self.window is not None:
            self.window.after(step)

    def sample(self, step: int) -> dict[str, float]:
        """Metrics of the step that has just been taken, on rank 0. Collective."""
        found = self.comm.sample(step) if self.comm is not None else {}
        return found | (self.gpu.sample() if self.gpu is not None else {})

    def __enter__(self) -> Instruments:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Write down what is not written yet; nothing here waits for other ranks."""
        self.stack.close()
        if self.window is not None:
            self.window.close()
        if self.comm is not None:
            self.comm.write()
        if self.gpu is not None:
            self.gpu.write()


def open_instruments(config: LogConfig, comm: CommLog | None, crew: Crew, run: RunDir, device: torch.device) -> Instruments:
    """What `config` asks for, beside the log of collectives.

    Raises:
        ConfigError: `log.trace_ranks` names a rank that there is not.
    """
    out = Instruments(comm)
    recorder = None
    if comm is not None:
        comm.hosts, recorder = tuple(host for host, _ in crew.members), comm.recorder
    if config.trace_steps:
        ranks = config.trace_ranks or tuple(range(min(DEFAULT_RANKS, crew.world)))
        if missing := [rank for rank in ranks if rank >= crew.world]:
            what = f"names rank {missing[0]}, but there are ranks 0 to {crew.world - 1}; leave it out, or start more ranks"
            raise ConfigError([Problem("log.trace_ranks", what)])
        steps = (config.trace_steps[0], config.trace_steps[1])
        folder = run.path / "trace" / f"attempt-{run.attempt:02d}"
        compare = comm.compare_clocks if comm is not None else lambda: clock_offsets(crew.group)
        out.window = TraceWindow(steps, ranks, crew.rank, folder, compare, recorder)
    if config.gpu and device.type == "cuda":
        import pynvml

        found = open_device(f"GPU-{torch.cuda.get_device_properties(device).uuid}", pynvml)
        sampler = None if found is None else out.stack.enter_context(GpuSampler(found))
        out.gpu = GpuLog(sampler, crew, run)
    return out
