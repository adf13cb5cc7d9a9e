"""How many pieces to send each MoE layer in: the verb `moefold plan`. Measures the cluster, simulates, writes the plan."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..moe.config import ModelConfig
from ..moe.dispatch import Pieces
from ..moe.errors import ConfigError, Problem, TopologyError
from ..moe.experts import FfnKind
from ..moe.model import Model
from ..parallel.apply import compute_dtype
from ..parallel.cost_model import ComputeFit, LinkFit, measure_links
from ..parallel.expert_costs import late_weights, measure_contention, measure_experts
from ..parallel.gradient_placement import LayerGaps, Placement, gap_between, place_gradients
from ..parallel.mesh import Mesh, build_mesh, find_nodes
from ..parallel.nodes import NodeMap, two_levels
from ..parallel.plan import LayerPlan, ModelSummary, Plan, fingerprint, layer_work
from ..parallel.schedule import MOST_CHUNKS, Choice, Costs, LayerWork, best_chunks, simulate
from ..parallel.sharding import WHOLE
from ..parallel.topology import Topology
from .layout import check_topology
from .plan_text import size_text
from .process import Rank, as_named, choose_device, joined
from .rundir import write_atomic
from .settings import RunConfig

MEASURE_S = 3.0
"""Seconds of measuring: enough for medians of every size on a quiet cluster."""
WHAT_IF_RATE = 0.2
MAX_ERROR = 0.25
"""Mean relative error of a link's model above which its plan is doubted aloud."""
FEW_ROWS = 16
"""Rows of the smallest measurement of the experts, at least."""


@dataclass(frozen=True)
class Variant:
    """A way of sending, as it is or as it could be. sent: bytes that a rank sends over each link, there and back."""

    dispatcher: str
    rate: float
    sent: Mapping[str, float]
    choice: Choice

    def to_dict(self) -> dict[str, Any]:
        return {
            "dispatcher": self.dispatcher,
            "rate": self.rate,
            "sent_bytes": dict(self.sent),
            "chunks": asdict(self.choice.chunks),
            "mirrored_chunks": self.choice.mirrored.chunks.units,
            "predicted": [asdict(way) for way in self.choice.ways],
        }


@dataclass(frozen=True)
class Findings:
    """What a plan with links was made from. variants: the configured way first. timelines: forward and backward of the choice."""

    experts: tuple[ComputeFit, ComputeFit]
    variants: tuple[Variant, ...]
    gradients: Placement | None
    timelines: tuple[str, str]


@dataclass(frozen=True)
class PlanResult:
    """What `plan` found, on every rank alike. rank: this one. out: file that rank 0 has written."""

    plan: Plan
    rank: int
    seconds: float
    findings: Findings | None = None
    notes: tuple[str, ...] = ()
    out: str | None = None
    exit_code: int = field(default=0, init=False)

    def render(self) -> str:
        """Tables for a terminal: links, experts, predicted times by number of pieces, what other ways of sending would take."""
        from .plan_text import render

        return render(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON: the plan as it is written to a file, and what it was made from."""
        found = self.findings
        return {
            "plan": self.plan.to_dict(),
            "seconds": self.seconds,
            "notes": list(self.notes),
            "experts": None if found is None else [asdict(fit) for fit in found.experts],
            "variants": [] if found is None else [variant.to_dict() for variant in found.variants],
            "gradients": None if found is None or found.gradients is None else asdict(found.gradients),
        }

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.render())}</pre>"


def plan(config: RunConfig, *, measure_s: float = MEASURE_S, out: str | None = None) -> PlanResult:
    """Measure links and experts, simulate every number of pieces, and choose. Every rank calls it; under torchrun it joins the
    other ranks, else it runs alone, and then there is no link to plan for: one piece.

    Predicted are the exchanges and products of a layer; routing and moving rows on a rank are the same in any number of pieces
    but for their calls, and are left out, as is what sharding over data ranks gathers.

    Args:
        measure_s: seconds to measure for.
        out: file for the plan, which rank 0 writes.

    Raises:
        ConfigError: a model without MoE layers, or a place for `out` that does not exist.
        TopologyError: the configuration cannot be laid out on these ranks.
    """
    here = Rank.here()
    topology = check_topology(config, here, "plan")
    if not 0 < measure_s < float("inf"):
        raise ConfigError([Problem("--measure-s", f"is {measure_s}, but must be a positive number of seconds")])
    if out is not None and here.rank == 0 and not Path(out).absolute().parent.is_dir():
        raise ConfigError([Problem("--out", f"is {out}, but its folder does not exist; make it first")])
    device = choose_device(config.train.device, here)
    with joined(here, device, timeout_s=config.parallel.timeout_s, threads=config.train.threads):
        try:
            result = _plan(config, topology, device, here.rank, measure_s)
        except RuntimeError as error:
            named = as_named(error)
            if named is error:
                raise
            raise named from error
    if out is not None:
        if here.rank == 0:
            write_atomic(Path(out), result.plan.to_json())
        result = replace(result, out=out)
    return result


def _plan(config: RunConfig, topology: Topology, device: torch.device, rank: int, measure_s: float) -> PlanResult:
    start_s = time.perf_counter()
    nodes, notes = split_nodes(config, topology)
    mesh = build_mesh(topology, device, config.parallel.timeout_s, nodes)
    measured = measure(config, mesh, nodes, measure_s)
    made, found = measured.plan, None
    if measured.choice is not None:
        assert made.costs is not None and measured.experts is not None
        models = {name: fit.model for name, fit in made.links.items()}
        work, choice = made.model.work(models), measured.choice
        drawn = [simulate(work, made.costs, choice.chunks, backward=b).draw() for b in (False, True)]
        found = Findings(
            experts=measured.experts,
            variants=_variants(made.model, models, made.costs, choice),
            gradients=measured.gradients,
            timelines=(f"forward in {choice.chunks.forward}\n{drawn[0]}", f"backward in {choice.chunks.backward}\n{drawn[1]}"),
        )
    return PlanResult(made, rank, time.perf_counter() - start_s, found, (*notes, *measured.doubts))


@dataclass(frozen=True)
class Measured:
    """A plan, the choice it holds, the experts' fits and where gradients go; these are None where there is no link. doubts: about
    measurements."""

    plan: Plan
    choice: Choice | None = None
    experts: tuple[ComputeFit, ComputeFit] | None = None
    gradients: Placement | None = None
    doubts: tuple[str, ...] = ()


def measure(config: RunConfig, mesh: Mesh, nodes: NodeMap | None, measure_s: float = MEASURE_S) -> Measured:
    """Time links and experts of a mesh and choose the pieces; the same on every rank. Collective.

    nodes: of `split_nodes`. measure_s: seconds to measure for.
    """
    model, made_of = summary(config, mesh, nodes), fingerprint(mesh)
    if mesh.topology.ep * mesh.topology.etp == 1:
        return Measured(Plan(__version__, made_of, model, tuple(LayerPlan(layer, Pieces()) for layer in model.layers), {}))
    links = measure_links(mesh, 0.6 * measure_s)
    experts, contention = _measure_work(config, model, mesh, links["flat"], 0.4 * measure_s)
    moe, dtype = config.model.moe, compute_dtype(config.train.precision)
    assert moe is not None
    late = late_weights(moe.kernels, FfnKind.of(config.model), dtype, mesh.device)
    costs = Costs(experts[0].model, experts[1].model, contention, late)
    work = model.work({name: fit.model for name, fit in links.items()})
    choice = best_chunks(work, costs)
    best, whole = choice.best, choice.way(1)
    seconds = (best.forward_s, best.backward_s, whole.forward_s, whole.backward_s)
    placed = _placed(config, model, mesh.topology, links, work, costs, choice)
    windows = dict(zip(reversed(model.layers), placed.windows, strict=True)) if placed is not None else {}
    layers = tuple(LayerPlan(layer, best.chunks, *seconds, windows.get(layer)) for layer in model.layers)
    return Measured(Plan(__version__, made_of, model, layers, links, costs), choice, experts, placed, tuple(_doubts(links)))


def summary(config: RunConfig, mesh: Mesh, nodes: NodeMap | None) -> ModelSummary:
    """The model of a run as a plan knows it."""
    topology = mesh.topology
    rows = config.parallel.micro_batch or config.train.global_batch // topology.dp
    tokens = rows * config.data.seq_len // topology.tp
    across = 1 if nodes is None else len(nodes.split(topology.groups("ep_etp")[0]))
    return ModelSummary.of(config.model, topology, tokens=tokens, nodes=across, precision=config.train.precision)


def split_nodes(config: RunConfig, topology: Topology) -> tuple[NodeMap | None, list[str]]:
    """Where ranks live, if groups in two levels can be made there; what is to be said otherwise. Collective."""
    nodes = find_nodes(config.parallel.ranks_per_node)
    moe, notes = config.model.moe, []
    try:
        for members in topology.groups("ep_etp"):
            two_levels(members, nodes, topology.etp)
    except TopologyError as error:
        if moe is not None and moe.dispatcher == "hierarchical":
            raise
        notes.append(f"no figures for two levels, and all bytes count as inside a node: {error.problems[0].what}")
        return None, notes
    return nodes, notes


def _doubts(links: Mapping[str, LinkFit]) -> list[str]:
    """What is to be said about measurements that no model fits."""
    longer = "measure longer (moefold plan --measure-s), or when nothing else runs here"
    doubts = []
    for name, fit in links.items():
        if fit.model.beta_s_per_byte == 0:
            doubts.append(f"link '{name}': up to {size_text(fit.samples[-1][0])}, time did not grow with size; {longer}")
        elif fit.mean_error > MAX_ERROR:
            doubts.append(f"link '{name}': measurements are {fit.mean_error:.0%} from its model on average; {longer}")
    return doubts


def _measure_work(
    config: RunConfig, model: ModelSummary, mesh: Mesh, flat: LinkFit, budget_s: float
) -> tuple[tuple[ComputeFit, ComputeFit], float]:
    """Cost of the experts of one rank over the sizes of pieces that come into question, and contention with the link."""
    load, moe = model.load, config.model.moe
    assert moe is not None
    rows = max(FEW_ROWS * MOST_CHUNKS, load.tokens * load.top_k * load.etp)
    shape = (load.num_experts // load.ep, load.dim, load.expert_dim // load.etp)
    kind: dict[str, Any] = {"dtype": compute_dtype(config.train.precision), "kernels": moe.kernels}
    kind["kind"] = FfnKind.of(config.model)
    pieces = [max(FEW_ROWS, rows // r) for r in (1, 2, 4, MOST_CHUNKS)]
    experts = measure_experts(*shape, pieces, device=mesh.device, group=mesh.world_group, budget_s=budget_s / 2, **kind)
    # an exchange as long as the computation shows most, if it stays within what was measured
    size = min(flat.model.fits(experts[0].model.seconds(2.0 * load.matrices * load.dim * shape[2] * rows)), flat.samples[-1][0])
    size = int(max(size, flat.samples[0][0]))
    return experts, measure_contention(mesh, size, *shape, rows, budget_s=budget_s / 2, **kind)


def _variants(model: ModelSummary, links: Mapping[str, Any], costs: Costs, choice: Choice) -> tuple[Variant, ...]:
    """The configured way, then others: with and without two levels, with and without compression."""
    ways = [(model.dispatcher, model.rate)]
    dispatchers = ["all_to_all", *(["hierarchical"] if "across" in links else [])]
    ways += [(d, rate) for rate in (1.0, WHAT_IF_RATE) for d in dispatchers if (d, rate) != ways[0]]
    found = []
    for dispatcher, rate in ways:
        work = layer_work(model.load, links, dispatcher, rate)
        best = choice if (dispatcher, rate) == ways[0] else best_chunks(work, costs)
        found.append(Variant(dispatcher, rate, work.wire_bytes, best))
    return tuple(found)


def _placed(
    config: RunConfig,
    model: ModelSummary,
    topology: Topology,
    links: Mapping[str, LinkFit],
    work: LayerWork,
    costs: Costs,
    choice: Choice,
) -> Placement | None:
    """Where gradients go. Attention and dense layers are taken to be as fast for their operations as experts in backward, and
    what FSDP gathers meanwhile is left out."""
    if "gradients" not in links:
        return None
    # with several exchanges, others are under way while experts compute
    alone = choice.chunks.backward == 1
    resource = work.hops[0].resource
    experts_s = gap_between(simulate(work, costs, choice.chunks, backward=True), resource) if alone else 0.0
    sizes, seconds = gradient_bytes(config.model, topology), rest_seconds(config, model, costs)
    tops = list(reversed(model.layers))
    gaps = []
    for top, below in zip(tops, [*tops[1:], -1], strict=True):
        group = slice(below + 1, top + 1)
        other_bytes = sum(other for _, other in sizes.blocks[group])
        gaps.append(LayerGaps(experts_s, sum(seconds[group]), sizes.blocks[top][0], other_bytes))
    above_bytes = sum(other for _, other in sizes.blocks[tops[0] + 1 :])
    return place_gradients(gaps, links["gradients"].model, first_bytes=above_bytes, last_bytes=sizes.outside)


def rest_seconds(config: RunConfig, model: ModelSummary, costs: Costs) -> list[float]:
    """Backward of each block without its MoE layer: twice the products with weights and the two of causal attention; all of these
    once more where they are recomputed."""
    m = config.model
    width = m.attention_experts * m.num_heads * m.resolved_head_dim
    seen = min(config.data.seq_len, m.sliding_window or config.data.seq_len)
    passes = 3 if config.parallel.recompute == "selective" else 2
    found = []
    for parameters in _parameters(config.model)[0]:
        values = sum(n for name, n in parameters.items() if not name.startswith("moe."))
        forward = model.load.tokens * (2.0 * values + 2.0 * seen * width)
        found.append(costs.backward.seconds(passes * forward))
    return found


@dataclass(frozen=True)
class GradientBytes:
    """Of fp32 gradients that one rank adds up with others. blocks: each one's (experts, others). outside: of blocks."""

    blocks: tuple[tuple[float, float], ...]
    outside: float


def gradient_bytes(config: ModelConfig, topology: Topology) -> GradientBytes:
    """What a rank adds up with other ranks (with replicas, of its shard); tensor-parallel ranks share evenly."""
    t = topology
    # with replicas, shards have been added up before
    expert = 4.0 * (t.edp > 1) / (t.ep * t.etp) / (t.edp_shard if t.edp_replicate > 1 else 1)
    other = 4.0 * (t.dp > 1) / t.tp / (t.dp_shard if t.dp_replicate > 1 else 1)
    blocks, outside = _parameters(config)
    found = []
    for named in blocks:
        # what is whole on every rank is summed after backward
        parameters = {name: n for name, n in named.items() if not name.endswith(WHOLE)}
        experts = sum(n for name, n in parameters.items() if ".experts." in f".{name}")
        found.append((expert * experts, other * (sum(parameters.values()) - experts)))
    return GradientBytes(tuple(found), other * outside)


def _parameters(config: ModelConfig) -> tuple[list[dict[str, int]], int]:
    """How many values the parameters of each block have, by name, and all those outside of blocks."""
    with torch.device("meta"):
        model = Model(config, init=False)
    blocks = [{name: p.numel() for name, p in block.named_parameters()} for block in model.blocks]
    return blocks, sum(p.numel() for p in model.parameters()) - sum(sum(b.values()) for b in blocks)


def main() -> int:
    """`torchrun --nproc-per-node N -m moefold.launch.plan CONFIG.toml ...`: the verb `plan` with the same arguments."""
    from .cli import main as command

    return command(["plan", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
