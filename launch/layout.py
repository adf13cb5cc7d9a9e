"""The layout of the processes that run now."""

from __future__ import annotations

from collections.abc import Mapping

from ..moe.errors import Problem, TopologyError
from ..parallel.topology import Topology
from .config import Loaded, check_world
from .process import Rank
from .settings import RunConfig


def check_topology(config: RunConfig, here: Rank, verb: str = "pretrain", origins: Mapping[str, str] | None = None) -> Topology:
    """The layout of this world. Raises TopologyError with every problem, and how to start more ranks if this is one alone.

    verb: what to start so, as torchrun takes it: "pretrain", "profile moe". origins: of the settings.
    """
    try:
        return check_world(Loaded(config, origins or {}), here.world)
    except TopologyError as error:
        p = config.parallel
        if here.launched or max(p.dp or 1, p.hsdp, p.tp, p.ep, p.etp) == 1:
            raise
        how = f"`torchrun --nproc-per-node N -m moefold.launch.{verb} ...`"
        hint = f"is 1: this process was not started by torchrun; use {how}"
        raise TopologyError([*error.problems, Problem("world", hint)]) from error
