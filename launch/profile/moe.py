"""Where the time of a training step goes, stage by stage, and what the same step would take sent another way: `profile moe`."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ... import __version__
from ...moe.errors import CommError, ConfigError, MoefoldError, Problem
from ...parallel.engine import Engine
from ...parallel.mesh import find_nodes
from ...parallel.plan import ModelSummary
from ...parallel.stage_clock import IN_LAYER
from ...parallel.step_profile import StepProfile, profile_steps
from ...parallel.step_volume import Way, expert_blocks
from ...parallel.topology import Topology
from ..layout import check_topology
from ..process import Rank, as_named, choose_device, is_secondary, joined
from ..settings import RunConfig
from .case import Case, Load, one_layer
from .whatif import WhatIf, candidates, measured, what_if

if TYPE_CHECKING:
    from .page import Section

LAYER_STAGES = (*IN_LAYER, "statistics")
"""Of one MoE layer."""


@dataclass(frozen=True)
class MoeProfile:
    """What `profile_moe` found, the same on every rank. rank: this one.

    formula_bytes: rows that a rank sends to others in a step if every set of experts is as likely, both directions, by place.
    whole_step: else only what belongs to the MoE layer is shown.
    """

    rank: int
    world: int
    way: Way
    load: str
    tokens: int
    whole_step: bool
    profile: StepProfile
    formula_bytes: Mapping[str, float]
    what_if: WhatIf | None
    notes: tuple[str, ...]
    seconds: float
    exit_code: int = field(default=0, init=False)

    def render(self) -> str:
        """Tables for a terminal."""
        from .moe_text import render

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "schema": 1,
            "version": __version__,
            "world": self.world,
            "way": asdict(self.way),
            "load": self.load,
            "tokens": self.tokens,
            "whole_step": self.whole_step,
            "step": self.profile.to_dict(),
            "formula_bytes": dict(self.formula_bytes),
            "what_if": None if self.what_if is None else self.what_if.to_dict(),
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def to_csv(self) -> str:
        """The table of stages."""
        from .moe_text import stage_csv

        return stage_csv(self)

    def verdict(self) -> str:
        """One sentence: what takes most, and what would help most."""
        from .moe_text import verdict

        return verdict(self)

    def sections(self) -> list[Section]:
        """For a page, see `page.write_page`."""
        from .moe_sections import sections

        return sections(self)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.render())}</pre>"


def profile_moe(
    config: RunConfig,
    *,
    load: Load | None = None,
    whole_step: bool = True,
    steps: int = 5,
    predict: bool = True,
    measure: int | None = 0,
    measure_s: float = 2.0,
    progress: Callable[[str], None] = lambda _: None,
) -> MoeProfile:
    """Time some steps of a configuration by stage, with the learning rate at 0. Every rank calls it; under torchrun it joins the
    other ranks, else it runs alone, and then nothing travels.

    Args:
        load: tokens and their routing. whole_step: False times the first MoE layer in a model of its own.
        steps: that are timed. predict: also say what other ways of sending would take.
        measure: that many of the best predicted ways are timed too; None = all.
        measure_s: seconds to measure links and experts of each folding for, about.
        progress: told on rank 0 what goes on.

    Raises:
        ConfigError: a model without MoE layers, or values that cannot be used.
        TopologyError: the configuration cannot be laid out on these ranks.
        DataError: no recorded routing where it is asked for.
        CommError: ranks of other versions, one that died, or a collective that took too long.
    """
    _check(config, steps, measure, measure_s)
    config = replace(config, parallel=replace(config.parallel, plan=None))
    if not whole_step:
        config = replace(config, model=one_layer(config.model))
    here = Rank.here()
    topology = check_topology(config, here, "profile moe")
    device = choose_device(config.train.device, here)
    tell = progress if here.rank == 0 else (lambda _: None)
    with joined(here, device, timeout_s=config.parallel.timeout_s, threads=config.train.threads):
        try:
            return _profile(config, topology, device, load or Load(), whole_step, steps, predict, measure, measure_s, tell)
        except MoefoldError:
            raise
        except RuntimeError as error:
            if is_secondary(error):
                raise CommError(f"another rank has gone ({error}); see its own message") from error
            named = as_named(error)
            if named is error:
                raise
            raise named from error


def _check(config: RunConfig, steps: int, measure: int | None, measure_s: float) -> None:
    problems, moe = [], config.model.moe
    if moe is None or not config.model.moe_layers:
        problems.append(Problem("model.moe", "is not set, so that there are no MoE layers to profile"))
    elif moe.compress.method != "none" and moe.compress.rate is None:
        what = "is not set, so that what travels cannot be predicted; give a rate to profile with"
        problems.append(Problem("model.moe.compress.rate", what))
    for name, value in (("--steps", steps), ("--measure-s", measure_s)):
        if not 0 < value < float("inf"):
            problems.append(Problem(name, f"is {value}, but must be positive"))
    if measure is not None and measure < 0:
        problems.append(Problem("--measure", f"is {measure}, but must be a number of ways, 0 for none, or 'all'"))
    if problems:
        raise ConfigError(problems)


def _profile(
    config: RunConfig,
    topology: Topology,
    device: torch.device,
    load: Load,
    whole_step: bool,
    steps: int,
    predict: bool,
    measure: int | None,
    measure_s: float,
    tell: Callable[[str], None],
) -> MoeProfile:
    start_s, notes = time.perf_counter(), _agreed()
    nodes = find_nodes(config.parallel.ranks_per_node)
    assert config.model.moe is not None
    if config.model.moe.dispatcher == "hierarchical":
        expert_blocks(topology, nodes, config.model.moe.num_experts)  # raises where two levels cannot be made
    case = Case.make(config, topology, device, nodes, load)
    tell(f"timing {steps} steps: {case.way.name}")
    engine = case.engine(case.way)
    with case.routed(engine):
        profile = profile_steps(engine, case.batches(engine.mesh), steps)
    found: WhatIf | None = None
    if predict and topology.world > 1:
        found = what_if(case, engine, profile, candidates(case), measure_s, tell)
        if measure != 0:
            found = measured(case, found, measure, steps, tell)
    elif predict:
        notes.append("one rank: nothing travels, so there is nothing to send another way")
    return MoeProfile(
        rank=engine.mesh.rank,
        world=topology.world,
        way=case.way,
        load=load.text,
        tokens=case.tokens(topology),
        whole_step=whole_step,
        profile=profile,
        formula_bytes=_formula(case, engine),
        what_if=found,
        notes=tuple(notes),
        seconds=time.perf_counter() - start_s,
    )


def _agreed() -> list[str]:
    """Notes on this start. Raises CommError, on every rank, where ranks run other versions."""
    versions: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(versions, (__version__, torch.__version__, sys.version_info[:2]))
    if len(set(versions)) > 1:
        listed = ", ".join(f"rank {r}: moefold {m}, torch {t}" for r, (m, t, _) in enumerate(versions))
        raise CommError(f"ranks run different versions, whose times cannot be compared ({listed}); install the same everywhere")
    return []


def _formula(case: Case, engine: Engine) -> dict[str, float]:
    """Bytes of rows that leave a rank in a step by `plan.layer_work`, where every set of experts is as likely."""
    from ...parallel.cost_model import LinkModel
    from ...parallel.plan import layer_work

    topology = engine.mesh.topology
    _, nodes = case.mesh(case.way)
    on = 1 if nodes is None else len(nodes.split(topology.groups("ep_etp")[0]))
    tokens, precision = case.tokens(topology), case.config.train.precision
    summary = ModelSummary.of(engine.config, topology, tokens=tokens, nodes=on, precision=precision)
    free = dict.fromkeys(("flat", "across", "inside"), LinkModel(0.0, 0.0))
    work = layer_work(summary.load, free, case.way.dispatcher, case.way.rate)
    return {where: 2 * case.micros * len(engine.layers) * size for where, size in work.wire_bytes.items()}
