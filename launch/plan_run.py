"""The plan of overlap that a run uses: its pieces, where it comes from, and whether what is recorded agrees with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..moe.errors import ConfigError
from ..parallel.apply import LayerPieces
from ..parallel.gradient_windows import Windows
from ..parallel.mesh import Mesh
from ..parallel.plan import Plan, check_plan, differences, fingerprint
from ..parallel.recorder import CommRecorder
from ..parallel.recorder_analysis import collectives
from ..parallel.recorder_drift import Drift
from .comm import CommLog
from .comm_file import write_comm
from .plan import MEASURE_S, measure, split_nodes, summary
from .plan_text import verdict
from .process import Crew
from .rundir import write_atomic
from .settings import RunConfig

FILE = "plan.json"
"""Of a run directory: the plan that `parallel.plan = "auto"` has measured."""


@dataclass(frozen=True)
class RunPlan:
    """What layers are sent in, and the plan that says so, if there is one. kept: its file, where it is this run's own. windows:
    where gradients are summed."""

    pieces: LayerPieces
    plan: Plan | None = None
    kept: Path | None = None
    windows: Windows = False


def plan_for_run(
    config: RunConfig, mesh: Mesh, crew: Crew, folder: Path, say: Callable[[str], None], measure_s: float = MEASURE_S
) -> RunPlan:
    """The pieces of `parallel.pieces`, of the plan in the file `parallel.plan`, or of the run's own where that is "auto".

    The run's own plan is `FILE` in its directory. It is measured where there is none, where it was made for another cluster,
    layout or model, and where it has been found stale; `say` tells which. It decides how tokens are cut, never what is computed,
    up to the order of sums. Collective, except for `parallel.pieces`.

    Raises:
        ConfigError: the file `parallel.plan` cannot be read, or is for something else; a model without MoE layers.
    """
    if config.parallel.plan is None:
        return RunPlan(config.parallel.pieces, windows=config.parallel.gradient_windows)
    if config.parallel.plan != "auto":
        return _of(planned(config, mesh), config)
    path = folder / FILE
    nodes, _ = split_nodes(config, mesh.topology)
    here, model = fingerprint(mesh), summary(config, mesh, nodes)
    text = crew.from_first(lambda: path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None)
    plan, why = None, "there is none yet"
    if text is not None:
        try:
            plan = Plan.from_json(text, str(path))
            why = "; ".join(differences(plan, here, model)) or plan.stale or ""
        except ConfigError as error:
            why = str(error)
    if plan is None or why:
        say(f"plan: measuring {measure_s:.2g} s, as {f'that of {path} is of no use: ' if text is not None else ''}{why}")
        measured = measure(config, mesh, nodes, measure_s)
        plan = measured.plan
        if crew.rank == 0:
            write_atomic(path, plan.to_json())
        for doubt in measured.doubts:
            say(f"plan: {doubt}")
    say(f"plan: {verdict(plan)} ({path})")
    return _of(plan, config, path)


def _of(plan: Plan, config: RunConfig, kept: Path | None = None) -> RunPlan:
    windows: Windows = plan.windows if config.parallel.gradient_windows else False
    return RunPlan({layer: plan.chunks(layer) for layer in plan.model.layers}, plan, kept, windows)


def planned(config: RunConfig, mesh: Mesh) -> Plan:
    """The plan in the file `parallel.plan`. Collective.

    Raises:
        ConfigError: it cannot be read, or was made for another model, layout or cluster.
    """
    path = config.parallel.plan
    assert path is not None
    plan = Plan.read(path)
    nodes, _ = split_nodes(config, mesh.topology)
    check_plan(plan, fingerprint(mesh), summary(config, mesh, nodes), path)
    return plan


class PlannedComm(CommLog):
    """A `CommLog` that compares each sample with the plan, and says once, and in comm.json, when they have drifted apart.

    The run's own plan is then marked stale, so that the next start measures again.
    """

    def __init__(self, recorder: CommRecorder, crew: Crew, path: Path, by: RunPlan):
        super().__init__(recorder, crew.group, path, [host for host, _ in crew.members])
        assert by.plan is not None and by.plan.costs is not None
        self.by = by
        self.drift = Drift({name: fit.model for name, fit in by.plan.links.items()}, by.plan.costs.contention)

    def sample(self, step: int) -> dict[str, float]:
        metrics = super().sample(step)
        # other ranks have no metrics, and neither has a step that was left out
        if metrics:
            found = collectives(self.latest.records)
            said = self.drift.add(found, max(o.error_s for o in self.offsets))
            if said is not None:
                self._warn(said)
        return metrics

    def _warn(self, said: str) -> None:
        kept, plan = self.by.kept, self.by.plan
        assert plan is not None
        if kept is not None:
            write_atomic(kept, replace(plan, stale=said).to_json())
        print(f"warning: {self._text(said)}", file=sys.stderr, flush=True)

    def _text(self, said: str) -> str:
        again = "the next start of this run measures anew" if self.by.kept is not None else "measure again with `moefold plan`"
        return f"{said}; {again}"

    def write(self) -> None:
        super().write()
        if self.drift.said is not None:
            # among the causes of waiting, which a report repeats
            data: dict[str, Any] = json.loads(self.path.read_text(encoding="utf-8"))
            nobody = dict.fromkeys(("rank", "peer", "layer", "expert"))
            stale = {"kind": "stale_plan", **nobody, "lost_s": 0.0, "share": 0.0, "text": self._text(self.drift.said)}
            write_comm(self.path, data | {"verdicts": [*data["verdicts"], stale]})


def open_comm(recorder: CommRecorder | None, crew: Crew, path: Path, by: RunPlan) -> CommLog | None:
    """The log of a run's communication, None where nothing is recorded."""
    if recorder is None:
        return None
    if by.plan is None or not by.plan.links or by.plan.costs is None:
        return CommLog(recorder, crew.group, path, [host for host, _ in crew.members])
    return PlannedComm(recorder, crew, path, by)
