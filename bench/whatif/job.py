"""The torchrun job of `bench.profile_whatif`: `python -m bench.whatif.job FOLDER`, from the root of the repository.

FOLDER has what the job is to do (`job.json`). For each link rank 0 waits for a file `go-I` that says that the links have their
rate, writes `found-I.json` and says "measured I". First everything is predicted; then all ways take a step in turns, so that
whatever else the machine does meets all of them.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import record

from moefold.launch.config import Loaded, check_world
from moefold.launch.process import Rank, choose_device, joined
from moefold.launch.profile.case import Case, Load
from moefold.launch.profile.whatif import WhatIf, what_if
from moefold.parallel.mesh import find_nodes
from moefold.parallel.step_profile import profile_steps, time_steps

from ..a2a.job import await_links, say
from .case import Shape, ways

TIMEOUT_S = 300.0


@record
def main(folder: Path) -> None:
    job = json.loads((folder / "job.json").read_text())
    shape = Shape(**job["shape"])
    here = Rank.here()
    with joined(here, choose_device("cpu", here), timeout_s=TIMEOUT_S, threads=1):
        bench = Bench(shape)
        say("ready")
        for link in range(job["links"]):
            await_links(folder / f"go-{link}")
            found = bench.link(job["steps"], job["rounds"], job["measure_s"])
            if here.rank == 0:
                (folder / f"found-{link}.json").write_text(json.dumps(found))
            say(f"measured {link}")
        dist.barrier()


class Bench:
    """One rank's case and an engine for each way. Collective, as are the methods."""

    def __init__(self, shape: Shape):
        config, here = shape.config(), Rank.here()
        topology = check_world(Loaded(config, {}), here.world)
        self.case = Case.make(config, topology, choose_device("cpu", here), find_nodes(), Load())
        self.ways = ways(shape)
        self.engines = {way: self.case.engine(way) for way in self.ways}

    def link(self, steps: int, rounds: int, measure_s: float) -> list[dict[str, Any]]:
        """Each way, predicted and measured, at the present rate of the links."""
        case, base = self.case, self.engines[self.ways[0]]
        begin_s = time.perf_counter()
        profile = profile_steps(base, case.batches(base.mesh), steps)
        found: WhatIf = what_if(case, base, profile, self.ways, measure_s, lambda _: None)
        predicted_s = time.perf_counter() - begin_s
        seconds: dict[str, list[float]] = {way.name: [] for way in self.ways}
        for number in range(rounds):
            first = number % len(self.ways)
            for way in (*self.ways[first:], *self.ways[:first]):
                engine = self.engines[way]
                # connections and buffers of the sockets are those of training, not of a start
                seconds[way.name] += time_steps(engine, case.batches(engine.mesh), 1, warm_up=1 if number == 0 else 0)
        return [
            o.prediction.to_dict()
            | {"measured_s": statistics.median(seconds[o.way.name]), "measurements_s": seconds[o.way.name]}
            | {"is_base": o.way == self.ways[0], "way": asdict(o.way), "prediction_took_s": predicted_s}
            for o in found.outcomes
        ]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
