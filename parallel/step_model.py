"""What a training step would take if it were sent another way: predicted from one measured step and from parts measured alone.

    step(way) = step(base) + sum over parts of (part(way) - part(base))

so that whatever has no formula here, the base's remainder, is carried over as it was measured. Parts, in seconds per step:

* layers: sum over MoE layers and micro-batches of the makespans, forward and backward, that `schedule.simulate` gives for the
  exchanges on alpha-beta links and the experts' products, in that number of pieces, slowed by the measured contention. Rows are
  counted from the choices that the base made (`step_volume`): a link takes as long as its busiest node, experts as long as those
  of the busiest rank. Links and products are calibrated: times what ranks of the base waited for rows, and its experts took,
  relative to what the model says of the base. Waiting for a late rank counts too: in a chain of exchanges most of it comes from
  those before.
* rows: c (times that a row is copied), for sorting, permuting at both ends, starting exchanges and restoring; c from the base's
  stages. In one level a row is copied 2 times at its source and 2 at its expert. In two levels that happens on the node, without
  the 2 at the expert if it has one rank; besides, a (token, node) pair is copied once at its source and summed up there.
* codec: layers x micro-batches x (hashing, means and restoring of a rank's tokens, forward and backward), measured alone.
* wire: layers x micro-batches x 4 (rows of each hop) x (packing and unpacking of one row); 4 = there and back, both directions.
* sharding: collectives of FSDP and of tensor parallelism at the sizes that formulas give (`step_costs.sharding_calls`), measured
  alone. optimizer: the base's, by the parameters that a rank updates.

What is not predicted: other shapes of dense products under another tp (their work per rank stays the same), memory, and how much
of sharding's communication a GPU or `parallel.gradient_windows` would hide: steps are profiled with sums where FSDP has them.

Uncertainty is one standard deviation: that of the base's measured median, and of each part its error (of the fit, or of repeated
measurements) times as much as the part changes. Errors of parts are taken as independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from .cost_model import ComputeFit, ComputeModel, LinkFit, LinkModel
from .plan import Load, distinct_nodes, layer_work
from .schedule import Costs, LayerWork, simulate
from .step_costs import Measured
from .step_profile import StepProfile
from .step_volume import Volume, Way

LEAST_S = 1e-4
"""A part of the base shorter than this calibrates nothing."""
FACTORS = (0.2, 5.0)
"""Bounds of a calibration: outside of them, model and measurement do not speak of the same thing."""
HALVINGS = 24
"""Steps to a factor that has to be searched for."""


@dataclass(frozen=True)
class Folding:
    """What was measured for one folding (ep, etp, tp) of the ranks. links, experts: see `cost_model`. load: of a layer.

    sharding: seconds of its collectives in a step. parameters: that a rank updates. packed_row_bytes: of a row in one byte per
    value, where that can be sent.
    """

    load: Load
    links: Mapping[str, LinkFit]
    experts: tuple[ComputeFit, ComputeFit] | None
    contention: float
    sharding: Measured
    parameters: int
    packed_row_bytes: int
    late: bool = True


@dataclass(frozen=True)
class Base:
    """The step that was measured: how it was sent, its stages, and what it consists of."""

    way: Way
    profile: StepProfile
    layers: int
    micros: int


@dataclass(frozen=True)
class Alone:
    """What was measured without the rest. codec: by rate, of one layer and micro-batch. wire_row: of one row, by wire."""

    codec: Mapping[float, Measured]
    wire_row: Mapping[str, Measured]


@dataclass(frozen=True)
class Part:
    """Seconds of one part of a step, and its relative error."""

    seconds: float
    error: float


@dataclass(frozen=True)
class Prediction:
    """Of one way. error_s: one standard deviation. parts: seconds of each part of the model."""

    way: Way
    seconds: float
    error_s: float
    parts: Mapping[str, float]
    sent_bytes: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"name": self.way.name}


@dataclass(frozen=True)
class Calibration:
    """Measured by modelled time of the base: of its exchanges and of its experts; and seconds of one copy of a row."""

    exchange: float = 1.0
    experts: float = 1.0
    copy_s: float = 0.0


def layers_work(way: Way, folding: Folding, volumes: Sequence[Volume]) -> list[LayerWork]:
    """Each MoE layer's exchanges and products, with the rows that were counted instead of those of the formula."""
    links = {name: fit.model for name, fit in folding.links.items()}
    load = folding.load if way.wire == "none" else replace(folding.load, row_bytes=folding.packed_row_bytes)
    formula = layer_work(load, links, way.dispatcher, way.rate)
    found = []
    for counted in volumes:
        hops = []
        for hop, rows, expected in zip(formula.hops, counted.hops, _expected_rows(way, load), strict=True):
            factor = rows.mean * rows.busiest / expected if expected else 1.0
            hops.append(replace(hop, out_bytes=hop.out_bytes * factor, back_bytes=hop.back_bytes * factor))
        flops = 2.0 * load.matrices * counted.most_rows * load.dim * load.expert_dim / load.etp
        found.append(replace(formula, hops=tuple(hops), flops=flops))
    return found


def _expected_rows(way: Way, load: Load) -> list[float]:
    """Rows that a rank sends to others on each hop where all sets of experts are as likely: what `layer_work` assumes."""
    ranks, rows = load.ep * load.etp, load.tokens * load.top_k * way.rate
    if ranks == 1:
        return []
    if way.dispatcher != "hierarchical" or load.nodes == 1:
        return [rows * load.etp * (ranks - 1) / ranks]
    choices = 1 if way.rate < 1 else load.top_k
    up = rows / choices * distinct_nodes(load.num_experts, choices, load.nodes) * (load.nodes - 1) / load.nodes
    inside = ranks // load.nodes
    return [up, rows * load.etp * (inside - 1) / inside][: 1 + (inside > 1)]


def _scaled(work: LayerWork, factor: float) -> LayerWork:
    def link(model: LinkModel) -> LinkModel:
        return LinkModel(factor * model.alpha_s, factor * model.beta_s_per_byte, model.bucket_bytes)

    return replace(work, hops=tuple(replace(hop, link=link(hop.link)) for hop in work.hops))


def _costs(folding: Folding, factor: float) -> Costs:
    if folding.experts is None:
        return Costs(ComputeModel(0.0, 0.0), ComputeModel(0.0, 0.0))
    forward, backward = (fit.model for fit in folding.experts)
    return Costs(
        ComputeModel(factor * forward.alpha_s, factor * forward.s_per_flop),
        ComputeModel(factor * backward.alpha_s, factor * backward.s_per_flop),
        folding.contention,
        folding.late,
    )


def _makespans(work: Sequence[LayerWork], costs: Costs, pieces: int) -> tuple[float, float]:
    """(seconds, part of them in which nothing is computed) of all layers, both directions."""
    total_s = computing_s = 0.0
    for layer in work:
        for backward in (False, True):
            timeline = simulate(layer, costs, pieces, backward=backward)
            total_s += timeline.makespan_s
            computing_s += timeline.busy_s("compute")
    return total_s, max(0.0, total_s - computing_s)


def copies(way: Way, load: Load, volumes: Sequence[Volume]) -> float:
    """Copies of rows on one rank in forward, all layers together; 0 where experts are at home and copy as they compute."""
    if not any(v.hops for v in volumes):
        return 0.0
    per_row, passing = 4, 0.0
    if way.dispatcher == "hierarchical" and load.nodes > 1:
        per_row = 4 if load.ep * load.etp > load.nodes else 2
        # what stays on the node passes it as well
        passing = sum(v.hops[0].mean for v in volumes) * load.nodes / (load.nodes - 1)
    return per_row * sum(v.rows for v in volumes) + 2 * passing


def calibrate(base: Base, folding: Folding, volumes: Sequence[Volume]) -> Calibration:
    """How the model has to be stretched to give the base's measured stages."""
    p, moves = base.profile, copies(base.way, folding.load, volumes)
    copy_s = p.total("sort", "permute", "restore") / (base.micros * moves) if moves else 0.0
    work, costs = layers_work(base.way, folding, volumes), _costs(folding, 1.0)
    products_s = sum(costs.forward.seconds(w.flops) + costs.backward.seconds(2 * w.flops) for w in work)
    experts = _factor(p.total("experts", most=True) / base.micros, products_s)
    rows_only = [replace(w, hops=tuple(replace(hop, counts_bytes=0.0) for hop in w.hops)) for w in work]

    def waiting_s(factor: float) -> float:
        return _makespans([_scaled(w, factor) for w in rows_only], _costs(folding, experts), base.way.pieces)[1]

    exchange = _solved(p.total("dispatch", "combine") / base.micros, waiting_s)
    return Calibration(exchange, experts, copy_s)


def _solved(measured_s: float, modelled_s: Callable[[float], float]) -> float:
    """The factor by which the model gives what was measured. Not in proportion: a part is hidden, and the rest grows faster."""
    low, high = FACTORS
    if min(measured_s, modelled_s(high)) < LEAST_S:
        return 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if modelled_s(middle) < measured_s else (low, middle)
    return (low + high) / 2


def _factor(measured_s: float, modelled_s: float) -> float:
    if min(measured_s, modelled_s) < LEAST_S:
        return 1.0
    return min(max(measured_s / modelled_s, FACTORS[0]), FACTORS[1])


def parts(
    way: Way,
    base: Base,
    folding: Folding,
    counted: Mapping[Way, Sequence[Volume]],
    alone: Alone,
    stretch: Calibration,
    own: Folding,
) -> dict[str, Part]:
    """Seconds per step of every part that depends on the way. counted: see `predict`. own: folding of the base."""
    volumes = counted[way.moves]
    work = [_scaled(w, stretch.exchange) for w in layers_work(way, folding, volumes)]
    total_s, waiting_s = _makespans(work, _costs(folding, stretch.experts), way.pieces)
    links = [folding.links[name] for name in _used(way, folding)]
    link_error = max((fit.mean_error for fit in links), default=0.0)
    expert_error = max((fit.mean_error for fit in folding.experts), default=0.0) if folding.experts else 0.0
    error_s = ((waiting_s * link_error) ** 2 + ((total_s - waiting_s) * expert_error) ** 2) ** 0.5
    found = {
        "layers": Part(base.micros * total_s, error_s / total_s if total_s else 0.0),
        "rows": Part(base.micros * stretch.copy_s * copies(way, folding.load, volumes), base.profile.spread),
        "sharding": Part(folding.sharding.seconds, folding.sharding.spread),
        "optimizer": Part(base.profile.total("optimizer") * folding.parameters / own.parameters, base.profile.spread),
    }
    if way.rate < 1:
        codec = alone.codec[way.rate]
        found["codec"] = Part(base.layers * base.micros * codec.seconds, codec.spread)
    if way.wire != "none":
        row, count = alone.wire_row[way.wire], sum(v.rows + sum(h.mean for h in v.hops[1:]) for v in volumes if v.hops)
        found["wire"] = Part(4 * base.micros * count * row.seconds, row.spread)
    return found


def _used(way: Way, folding: Folding) -> list[str]:
    if way.dispatcher == "hierarchical" and folding.load.nodes > 1:
        return [name for name in ("across", "inside") if name in folding.links]
    return ["flat"] if "flat" in folding.links else []


def predict(
    ways: Sequence[Way],
    base: Base,
    foldings: Mapping[tuple[int, int, int], Folding],
    volumes: Mapping[Way, Sequence[Volume]],
    alone: Alone,
) -> list[Prediction]:
    """Every way's step, in the order given; the base's is its measured one.

    Args:
        foldings: by `Way.folding`. volumes: for every MoE layer, by the `moves` of each way and of the base.
    """
    own = foldings[base.way.folding]
    stretch = calibrate(base, own, volumes[base.way.moves])
    there = parts(base.way, base, own, volumes, alone, stretch, own)
    found = []
    for way in ways:
        folding = foldings[way.folding]
        mine = parts(way, base, folding, volumes, alone, stretch, own)
        seconds, variance = base.profile.median_s, (base.profile.spread * base.profile.median_s) ** 2
        for name in {**there, **mine}:
            one, other = mine.get(name, Part(0.0, 0.0)), there.get(name, Part(0.0, 0.0))
            seconds += one.seconds - other.seconds
            # the same measurement of both: its error counts only as far as they differ
            same = folding is own and name in there and name in mine
            change = abs(one.seconds - other.seconds) if same else (one.seconds**2 + other.seconds**2) ** 0.5
            variance += (max(one.error, other.error) * change) ** 2
        sent = _sent(way, base, folding, volumes[way.moves])
        found.append(Prediction(way, max(seconds, 0.0), variance**0.5, {n: part.seconds for n, part in mine.items()}, sent))
    return found


def _sent(way: Way, base: Base, folding: Folding, volumes: Sequence[Volume]) -> dict[str, float]:
    """Bytes of rows that a rank sends in a step, both directions: the mean rank's, across nodes and inside."""
    total = {"across": 0.0, "inside": 0.0}
    for work, counted in zip(layers_work(way, folding, volumes), volumes, strict=True):
        hops = tuple(
            replace(h, out_bytes=h.out_bytes / rows.busiest, back_bytes=h.back_bytes / rows.busiest)
            for h, rows in zip(work.hops, counted.hops, strict=True)
        )
        for where, size in replace(work, hops=hops).wire_bytes.items():
            total[where] += 2 * base.micros * size
    return total
