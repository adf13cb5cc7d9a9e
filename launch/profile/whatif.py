"""The same step sent other ways: which ones come into question, what they are predicted to take, and what they take."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from ...moe.errors import ConfigError
from ...moe.experts import FfnKind
from ...parallel.apply import build_dispatcher, compute_dtype
from ...parallel.cost_model import ComputeModel, LinkFit, measure_links
from ...parallel.engine import Engine
from ...parallel.expert_costs import late_weights, measure_contention, measure_experts
from ...parallel.forced_routing import choices_of
from ...parallel.plan import ModelSummary
from ...parallel.step_costs import (
    Measured,
    measure_calls,
    measure_codec,
    measure_wire,
    parameters_of,
    send_rows,
    sharding_calls,
)
from ...parallel.step_model import Alone, Base, Folding, Prediction, predict
from ...parallel.step_profile import StepProfile, time_steps
from ...parallel.step_volume import Choices, Way, count_pairs, volume
from ...parallel.topology import Topology
from ...parallel.wire import Wire
from ..config import Loaded, check_world
from .case import Case

RATES, PIECES, WIRES = (0.5, 0.2), (1, 2, 4), ("none", "int8", "e4m3")
"""What is asked of every dispatcher: parts of rows that travel, pieces, and types on the wire."""
FEW_ROWS = 16
"""Rows of the smallest measurement of the experts, at least."""
LONG_S, MOST_TIMES = 0.1, 8
"""Of products that are to tell contention on a CPU: how long they should take, and at most how many times a layer's rows."""
WARM_UPS = 3
"""Times that a layer's rows are sent before links are measured."""
MOST_FOLDINGS = 6
"""Other foldings that are looked at: each is measured for a few seconds."""


@dataclass(frozen=True)
class Outcome:
    """One way: predicted, and measured where it was asked for. measured_s: median of its steps, the slowest rank's; spread: of
    this median, relative. gain: predicted, of the base's step by this one's."""

    prediction: Prediction
    gain: float
    measured_s: float | None = None
    measured_spread: float | None = None

    @property
    def way(self) -> Way:
        return self.prediction.way

    @property
    def error(self) -> float | None:
        """Predicted by measured, less 1."""
        return None if self.measured_s is None else self.prediction.seconds / self.measured_s - 1

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            **self.prediction.to_dict(),
            "gain": self.gain,
            "measured_s": self.measured_s,
            "measured_spread": self.measured_spread,
        }


@dataclass(frozen=True)
class WhatIf:
    """Ways by predicted time, the fastest first; the base is among them. foldings: what was measured for each."""

    base: Way
    outcomes: tuple[Outcome, ...]
    foldings: Mapping[tuple[int, int, int], Folding]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        links = {
            ".".join(map(str, folding)): {
                "links": {name: asdict(fit) for name, fit in found.links.items()},
                "experts": None if found.experts is None else [asdict(fit) for fit in found.experts],
                "contention": found.contention,
                "sharding": asdict(found.sharding),
            }
            for folding, found in self.foldings.items()
        }
        outcomes = [o.to_dict() for o in self.outcomes]
        return {"base": asdict(self.base), "ways": outcomes, "foldings": links, "notes": list(self.notes)}


def candidates(case: Case) -> list[Way]:
    """Every way of the configured folding, and each other folding near it, in one and in two levels and exactly."""
    base = case.way
    dispatchers = ("all_to_all", "hierarchical")
    wires = WIRES if case.config.train.precision != "fp64" else WIRES[:1]
    rates = tuple(dict.fromkeys((1.0, base.rate, *RATES)))
    pieces = tuple(dict.fromkeys((base.pieces, *PIECES)))
    ways = [
        replace(base, dispatcher=d, wire=w, rate=rate, pieces=n)  # type: ignore[arg-type]
        for d in dispatchers
        for w in wires
        for rate in rates
        for n in pieces
    ]
    if base.ep * base.etp == 1:
        ways = []
    for ep, etp, tp in near_foldings(case):
        ways += [replace(base, dispatcher=d, ep=ep, etp=etp, tp=tp) for d in dispatchers]  # type: ignore[arg-type]
    every = list(dict.fromkeys((base, *ways)))
    # pieces, wires and rates fit wherever their dispatcher does
    fits = {(d, folding): True for d, folding in {(way.dispatcher, way.folding) for way in every}}
    for d, (ep, etp, tp) in fits:
        fits[d, (ep, etp, tp)] = can_run(case, Way(dispatcher=d, ep=ep, etp=etp, tp=tp))
    return [way for way in every if fits[way.dispatcher, way.folding]]


def near_foldings(case: Case) -> list[tuple[int, int, int]]:
    """(ep, etp, tp) that differ from the configured one by a step: one degree twice or half as large, or ep the largest that can
    be, and slices of experts instead of experts."""
    ep, etp, tp = case.way.folding
    wanted = [(2 * ep, etp, tp), (ep // 2, etp, tp), (ep // 2, 2 * etp, tp), (2 * ep, etp // 2, tp)]
    wanted += [(ep, etp, 2 * tp), (ep, etp, tp // 2), (ep, 2 * etp, tp), (ep, etp // 2, tp)]
    whole = case.topology.world // etp
    fits = [f for f in dict.fromkeys([*wanted, (whole, etp, tp)]) if min(f) >= 1 and f != (ep, etp, tp)]
    base = case.way
    found = [f for f in fits if can_run(case, replace(base, ep=f[0], etp=f[1], tp=f[2], dispatcher="all_to_all"))]
    return found[:MOST_FOLDINGS]


def can_run(case: Case, way: Way) -> bool:
    """Whether a way fits the ranks, the model, the batch and the nodes."""
    parallel = case.config.parallel
    try:
        topology = way.topology(case.topology)
        layout = replace(parallel, dp=None, hsdp=topology.hsdp, ep=way.ep, etp=way.etp, tp=way.tp, micro_batch=None)
        check_world(Loaded(replace(case.config, parallel=layout, model=way.model(case.config.model)), {}), topology.world)
    except ConfigError:
        return False
    if case.config.train.global_batch // topology.dp % case.micros:
        return False
    if way.dispatcher != "hierarchical":
        return True
    return case.has_levels(topology) and way.ep * way.etp > 1 and _nodes_of_group(case, topology) > 1


def _nodes_of_group(case: Case, topology: Topology) -> int:
    return len(case.nodes.split(topology.groups("ep_etp")[0]))


def measure_folding(
    case: Case, ways: Sequence[Way], choices_TK: torch.Tensor, budget_s: float, contention: float | None = None
) -> Folding:
    """Time the links of a folding's groups, its experts and its sharding. Collective.

    Args:
        ways: those of the folding. choices_TK: of this rank's tokens. contention: if known already.
    """
    way = ways[0]
    _warm_up(case, ways, choices_TK)
    mesh, nodes = case.mesh(way)
    config, topology = case.config, mesh.topology
    assert config.model.moe is not None
    tokens = case.tokens(topology)
    on = 1 if nodes is None else _nodes_of_group(case, topology)
    summary = ModelSummary.of(config.model, topology, tokens=tokens, nodes=on, precision=config.train.precision)
    # its rows in the type of computation: what a way's wire makes of them is that way's
    dtype = compute_dtype(config.train.precision)
    load = replace(summary.load, row_bytes=config.model.dim * dtype.itemsize)
    rows = max(FEW_ROWS * 16, tokens * load.top_k * load.etp)
    shape = (load.num_experts // topology.ep, load.dim, load.expert_dim // topology.etp)
    network = FfnKind.of(config.model)
    kind: dict[str, Any] = {"dtype": dtype, "kernels": config.model.moe.kernels, "kind": network}
    sizes = [max(FEW_ROWS, rows // n) for n in (16, 4, 2, 1)]
    experts = measure_experts(*shape, sizes, device=mesh.device, group=mesh.world_group, budget_s=0.3 * budget_s, **kind)
    # up to what is exchanged at once: the rates of small messages say little of large ones where links have buffers
    most_bytes = rows * load.row_bytes
    sizes = [most_bytes // n for n in (64, 16, 4, 1)]
    links = measure_links(mesh, 0.5 * budget_s, sizes) if topology.world > 1 else {}
    if contention is None:
        contention = 1.0
        if "flat" in links:
            most = MOST_TIMES if mesh.device.type == "cpu" else 1
            size, many = side_by_side(rows, 2.0 * load.matrices * load.dim * shape[2], links["flat"], experts[0].model, most)
            contention = measure_contention(mesh, size, *shape, many, budget_s=0.2 * budget_s, **kind)
    calls = sharding_calls(config.model, mesh, tokens=tokens * topology.tp, micros=case.micros, value_bytes=dtype.itemsize)
    sharding, parameters = measure_calls(calls, mesh), parameters_of(config.model, mesh)
    packed = replace(config.model.moe.compress, wire="int8").row_bytes(config.model.dim, dtype.itemsize)
    late = late_weights(config.model.moe.kernels, network, dtype, mesh.device)
    return Folding(load, links, experts, contention, sharding, parameters, packed, late)


def side_by_side(rows: int, row_flops: float, flat: LinkFit, forward: ComputeModel, most: int) -> tuple[int, int]:
    """(bytes that leave a rank, rows of the experts): an exchange and products that take about as long, to be timed together.

    Where threads share cores, an exchange that starts beside products waits for its turn once, however long it is. Of short ones
    that would be most of the contention, so the rows are taken up to `most` times, until their products take `LONG_S` or the
    largest exchange that the link was fitted to.
    """
    sizes = [size for size, _ in flat.samples]
    once_s, long_s = forward.seconds(row_flops * rows), min(LONG_S, flat.model.seconds(sizes[-1]))
    times = min(most, max(1, math.ceil(long_s / once_s))) if once_s > 0 else 1
    size = flat.model.fits(forward.seconds(row_flops * rows * times))
    return int(max(sizes[0], min(size, sizes[-1]))), rows * times


def _warm_up(case: Case, ways: Sequence[Way], choices_TK: torch.Tensor) -> None:
    """Send a layer's rows there and back with each dispatcher of these ways, so that new connections find their buffers' size
    before they are measured. Collective."""
    mesh, _ = case.mesh(ways[0])
    model, dtype = case.config.model, compute_dtype(case.config.train.precision)
    assert model.moe is not None
    for name in sorted({way.dispatcher for way in ways}):
        dispatcher = build_dispatcher(name, mesh, model.moe.num_experts)
        if dispatcher is not None:
            send_rows(dispatcher, choices_TK, model.moe.num_experts, model.dim, times=WARM_UPS, dtype=dtype, mesh=mesh)


def measure_alone(case: Case, ways: Sequence[Way]) -> Alone:
    """Time compression at each rate and each wire that these ways use. Collective."""
    mesh, _ = case.mesh(case.way)
    moe, dim, tokens = case.config.model.moe, case.config.model.dim, case.tokens(case.topology)
    assert moe is not None
    dtype = compute_dtype(case.config.train.precision)
    codec: dict[float, Measured] = {}
    wires: dict[str, Measured] = {}
    for rate in sorted({way.rate for way in ways if way.rate < 1}):
        model = replace(case.way, rate=rate).model(case.config.model)
        assert model.moe is not None
        codec[rate] = measure_codec(model.moe, dim, tokens, rate, dtype=dtype, mesh=mesh)
    for name in sorted({way.wire for way in ways if way.wire != "none"}):
        rows = max(FEW_ROWS, tokens * moe.top_k)
        found = measure_wire(Wire(name, moe.compress.wire_block, moe.kernels), dim, rows, dtype=dtype, mesh=mesh)
        wires[name] = Measured(found.seconds / rows, found.spread)
    return Alone(codec, wires)


def gather_choices(case: Case, engine: Engine, ways: Sequence[Way]) -> tuple[list[Choices], torch.Tensor]:
    """What every rank's tokens choose in one step, by layer; and this rank's choices in the first. Collective."""
    model = case.config.model
    assert model.moe is not None
    E = model.moe.num_experts
    with case.routed(engine), choices_of(engine.layers) as found:
        engine.train_step(case.batches(engine.mesh), 0.0)
    blocks = sorted({_nodes_of_group(case, way.topology(case.topology)) for way in ways if way.dispatcher == "hierarchical"})
    lines = []
    for passes in found:
        sums = [sum(torch.bincount(i.flatten(), minlength=E).double() for i in passes)]
        sums += [sum(count_pairs(i, E, n).double() for i in passes) for n in blocks]
        lines.append(torch.cat([torch.as_tensor(s) for s in sums]).cpu() / len(passes))
    every: list[Any] = [None] * case.topology.world
    dist.all_gather_object(every, torch.stack(lines), group=engine.mesh.world_group)
    whole_LRX = torch.stack(every, 1)
    parts = whole_LRX.split([E, *blocks], dim=2)
    pairs = dict(zip(blocks, parts[1:], strict=True))
    every_layer = [Choices(parts[0][i], {n: part[i] for n, part in pairs.items()}) for i in range(len(lines))]
    return every_layer, found[0][0]


def what_if(
    case: Case, engine: Engine, profile: StepProfile, ways: Sequence[Way], measure_s: float, tell: Callable[[str], None]
) -> WhatIf:
    """Predict these ways and the base from the base's profile and what is measured here. Collective.

    measure_s: seconds for the links, experts and sharding of each folding, about.
    """
    ways = list(dict.fromkeys((case.way, *ways)))
    choices, own_TK = gather_choices(case, engine, ways)
    foldings: dict[tuple[int, int, int], Folding] = {}
    contention: float | None = None
    for ep, etp, tp in dict.fromkeys(way.folding for way in ways):
        tell(f"measuring links and experts of ep {ep}, etp {etp}, tp {tp}")
        same = [way for way in ways if way.folding == (ep, etp, tp)]
        foldings[ep, etp, tp] = measure_folding(case, same, own_TK, measure_s, contention)
        contention = foldings[ep, etp, tp].contention
    tell("measuring compression")
    alone = measure_alone(case, ways)
    volumes = {}
    for moves in {way.moves for way in ways}:
        topology = moves.topology(case.topology)
        volumes[moves] = [volume(moves, layer, topology, case.nodes) for layer in choices]
    base = Base(case.way, profile, len(engine.layers), case.micros)
    found = predict(ways, base, foldings, volumes, alone)
    outcomes = [Outcome(p, profile.median_s / p.seconds if p.seconds else float("inf")) for p in found]
    return WhatIf(case.way, tuple(sorted(outcomes, key=lambda o: o.prediction.seconds)), foldings)


def measured(case: Case, found: WhatIf, count: int | None, steps: int, tell: Callable[[str], None]) -> WhatIf:
    """Time the best `count` ways (None: all of them) and the base: an engine of its own for each. Collective."""
    best = found.outcomes if count is None else found.outcomes[:count]
    chosen = [o.way for o in best if o.way != found.base] + [found.base]
    times: dict[Way, tuple[float, ...]] = {}
    for number, way in enumerate(chosen, 1):
        tell(f"measuring {number} of {len(chosen)}: {way.name}")
        engine = case.engine(way)
        with case.routed(engine):
            times[way] = time_steps(engine, case.batches(engine.mesh), steps)
        del engine
    return replace(found, outcomes=tuple(_with(o, times.get(o.way)) for o in found.outcomes))


def _with(outcome: Outcome, seconds: tuple[float, ...] | None) -> Outcome:
    if seconds is None:
        return outcome
    profile = StepProfile(seconds, (), {}, {}, 0.0)
    return replace(outcome, measured_s=statistics.median(seconds), measured_spread=profile.spread)
