"""How fast this cluster's ranks talk, and which link or host is slow: the verb `moefold profile comm`. Runs under torchrun."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ... import __version__
from ...moe.errors import CommError, ConfigError, Problem
from ...parallel.comm_groups import layout_groups, make_seat, world_groups
from ...parallel.comm_ops import OPERATIONS, Seat
from ...parallel.comm_pairs import PairTimes, measure_pairs, shot_bytes
from ...parallel.comm_sweep import Curve, SweepPlan, Swept, applicable, sweep
from ...parallel.config import ParallelConfig
from ...parallel.link_verdict import LinkFinding
from ...parallel.mesh import find_nodes
from ...parallel.nodes import NodeMap
from ...parallel.topology import Topology
from ..process import Rank, as_named, choose_device, is_secondary, joined
from ..rundir import write_atomic, write_json
from .comm_faults import find_faults, suspects
from .comm_options import CommOptions as CommOptions
from .comm_options import parse_size as parse_size

if TYPE_CHECKING:
    from .page import Section, Tone

SCHEMA = 1
SWEEP_SHARE = 0.8
"""Of the time, for the sweep; the rest is for pairs."""
MAX_ERROR = 0.25
"""Mean relative error of a link model above which it is doubted aloud."""
USUAL = MappingProxyType(
    {
        "world": tuple(OPERATIONS),
        "ep_etp": ("all_to_all", "torch", "uneven", "hierarchical", "send_recv"),
        "tp": ("all_gather", "reduce_scatter", "all_reduce"),
        "dp_shard": ("all_gather", "reduce_scatter"),
        "edp_shard": ("all_gather", "reduce_scatter"),
        "dp_replicate": ("all_reduce",),
        "edp_replicate": ("all_reduce",),
        "inside": ("all_to_all",),
        "across": ("all_to_all",),
    }
)
"""What training does on groups of each kind, and so what is measured on them unless asked otherwise."""


@dataclass(frozen=True)
class CommProfile:
    """What `profile_comm` found, on every rank alike. rank: this one. hosts: of each rank. groups: by name, what was measured.

    pairs: None where not measured. findings: the worst first. written: files that rank 0 has written.
    """

    rank: int
    hosts: tuple[str, ...]
    node_names: tuple[str, ...]
    nodes: NodeMap
    backend: str
    device: str
    groups: dict[str, tuple[tuple[int, ...], ...]]
    options: CommOptions
    swept: Swept
    pairs: PairTimes | None
    findings: tuple[LinkFinding, ...]
    notes: tuple[str, ...]
    seconds: float
    written: tuple[str, ...] = field(default=())

    @property
    def curves(self) -> tuple[Curve, ...]:
        return self.swept.curves

    @property
    def wrong(self) -> int:
        """Elements with wrong data, over all collectives."""
        return sum(row.wrong for curve in self.curves for row in curve.rows)

    @property
    def exit_code(self) -> int:
        """5 where data arrived wrong: ranks disagree. A slow link is a finding, not a failure."""
        return CommError.exit_code if self.wrong else 0

    @property
    def verdict(self) -> str:
        """One sentence."""
        from .comm_tables import verdict

        return verdict(self)

    @property
    def tone(self) -> Tone:
        """How the verdict is meant, for a page."""
        return "bad" if self.wrong else "warn" if self.findings else "good"

    def render(self) -> str:
        """Tables for a terminal."""
        from .comm_tables import render

        return render(self)

    def csv(self) -> str:
        """One line for each collective and size."""
        from .comm_tables import sweep_csv

        return sweep_csv(self)

    def sections(self) -> list[Section]:
        """For an HTML page: bandwidth by size with the link models, and maps of pairs."""
        from .comm_sections import sections

        return sections(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        from .comm_tables import to_dict

        return to_dict(self)

    def _repr_html_(self) -> str:
        from .page import frame, page_html

        title = "Communication"
        return frame(page_html(title, self.verdict, self.sections(), tone=self.tone, details=self.notes), title)


def profile_comm(
    parallel: ParallelConfig | None = None,
    options: CommOptions | None = None,
    *,
    layout: bool = True,
    device: str = "auto",
    threads: int | None = None,
    json_file: str | None = None,
    csv_file: str | None = None,
    html_file: str | None = None,
) -> CommProfile:
    """Measure collectives by size, and every pair of ranks. Every rank calls it; under torchrun it joins the others.

    Args:
        parallel: a layout whose groups are measured; None = all ranks, and where nodes have several, those inside and across.
            Its `timeout_s` is the longest that any one collective may take, its `ranks_per_node` says how ranks lie on nodes.
        layout: False = only these two of `parallel` count, and all ranks are measured.
        device: auto, cpu or cuda. threads: of torch in each process.
        json_file, csv_file, html_file: what rank 0 writes when everything is measured; nothing is written where it fails.

    Raises:
        ConfigError: one process, options or groups that cannot be, folders that do not exist, ranks with different versions.
        TopologyError: a layout that does not fit these ranks.
        CommError: a collective that timed out, or a rank that has gone.
    """
    options = options or CommOptions()
    here = Rank.here()
    _require_ranks(here)
    files = {"--json": json_file, "--csv": csv_file, "--html": html_file}
    _require_folders(files, here)
    topology = Topology.from_parallel(here.world, parallel) if parallel is not None and layout else None
    settings = parallel or ParallelConfig()
    target = choose_device(device, here)
    with joined(here, target, timeout_s=settings.timeout_s, threads=threads):
        try:
            result = _measure(topology, settings, options, target)
        except RuntimeError as error:
            raise _named(error) from error
    if here.rank == 0:
        if json_file is not None:
            write_json(Path(json_file), result.to_dict())
        if csv_file is not None:
            write_atomic(Path(csv_file), result.csv())
        if html_file is not None:
            from .page import write_page

            write_page(html_file, "Communication", result.verdict, result.sections(), tone=result.tone, details=result.notes)
    return result


def _named(error: RuntimeError) -> BaseException:
    if is_secondary(error):
        first = (str(error).splitlines() or [""])[0]
        return CommError(f"a rank has gone while links were measured ({first}): see what the others say; nothing was written")
    return as_named(error)


def _require_ranks(here: Rank) -> None:
    if here.world > 1:
        return
    start = "start it as `torchrun --nproc-per-node N -m moefold.launch.profile comm ...`, on every node"
    what = "is 1: this process was not started by torchrun" if not here.launched else "is 1: one rank has nobody to talk to"
    raise ConfigError([Problem("world", f"{what}; {start}")])


def _require_folders(files: dict[str, str | None], here: Rank) -> None:
    if here.rank == 0:
        missing = [(flag, file) for flag, file in files.items() if file and not Path(file).absolute().parent.is_dir()]
        if missing:
            what = "is {}, but its folder does not exist; make it first"
            raise ConfigError([Problem(flag, what.format(file)) for flag, file in missing])


def _measure(topology: Topology | None, settings: ParallelConfig, options: CommOptions, device: torch.device) -> CommProfile:
    start_s = time.perf_counter()
    rank, world = dist.get_rank(), dist.get_world_size()
    hosts = _same_versions(world)
    nodes = find_nodes(settings.ranks_per_node)
    groups = _chosen(world_groups(nodes) if topology is None else layout_groups(topology, nodes), options.groups)
    jobs, notes = _jobs(groups, nodes, topology, options, settings.timeout_s)
    plan = SweepPlan(
        sizes=options.sizes(),
        iters=options.iters,
        warmup=options.warmup,
        imbalance=options.imbalance,
        dtype=getattr(torch, options.dtype),
        budget_s=options.budget_s * (SWEEP_SHARE if options.pairs else 1.0),
    )
    swept = sweep(jobs, plan, device)
    names = _node_names(nodes, hosts)
    pairs: PairTimes | None = None
    findings: tuple[LinkFinding, ...] = ()
    if options.pairs:
        left_s = max((1 - SWEEP_SHARE) * options.budget_s, options.budget_s - swept.seconds)
        pairs, findings = _pairs(nodes, names, device, swept, options, left_s)
        notes += _pair_notes(pairs, names)
    return CommProfile(
        rank=rank,
        hosts=hosts,
        node_names=names,
        nodes=nodes,
        backend="nccl" if device.type == "cuda" else str(dist.get_backend(jobs[0][0].group)),
        device=device.type,
        groups=groups,
        options=options,
        swept=swept,
        pairs=pairs,
        findings=findings,
        notes=tuple(notes + _sweep_notes(swept)),
        seconds=time.perf_counter() - start_s,
    )


def _same_versions(world: int) -> tuple[str, ...]:
    """Host name of every rank, after a check that all run the same program."""
    facts: list[Any] = [None] * world
    dist.all_gather_object(facts, (socket.gethostname(), __version__, torch.__version__))
    kinds: dict[tuple[str, str], list[int]] = {}
    for rank, (_, own, theirs) in enumerate(facts):
        kinds.setdefault((own, theirs), []).append(rank)
    if len(kinds) > 1:
        listed = "; ".join(f"moefold {own} with torch {theirs}: ranks {ranks}" for (own, theirs), ranks in kinds.items())
        raise ConfigError([Problem("version", f"differs between ranks ({listed}); install the same on every node")])
    return tuple(host for host, _, _ in facts)


def _node_names(nodes: NodeMap, hosts: Sequence[str]) -> tuple[str, ...]:
    """Of each node the host's name; with its ranks where a host has several nodes (parallel.ranks_per_node)."""
    parts = nodes.split(range(len(hosts)))
    own = [hosts[ranks[0]] for ranks in parts]
    alone = len(set(own)) == len(own)
    return tuple(name if alone else f"{name}[{','.join(map(str, ranks))}]" for name, ranks in zip(own, parts, strict=True))


def _chosen(
    found: dict[str, tuple[tuple[int, ...], ...]], wanted: tuple[str, ...] | None
) -> dict[str, tuple[tuple[int, ...], ...]]:
    if not found:
        what = "gives groups of one rank only, which have nothing to exchange; set a larger degree"
        raise ConfigError([Problem("parallel", what)])
    if wanted is None:
        return found
    known = {name: whole for whole in found for name in whole.split("=")}
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        what = f"names {', '.join(unknown) or 'nothing'}; groups of more than one rank are here: {', '.join(known)}"
        raise ConfigError([Problem("--groups", what)])
    return {known[name]: found[known[name]] for name in wanted}


def _jobs(
    groups: dict[str, tuple[tuple[int, ...], ...]],
    nodes: NodeMap,
    topology: Topology | None,
    options: CommOptions,
    timeout_s: float,
) -> tuple[list[tuple[Seat, str]], list[str]]:
    """What is measured where, and what cannot be. Collective: makes the process groups."""
    jobs, notes = [], []
    for name, members in groups.items():
        kinds = name.split("=")
        usual = [op for op in OPERATIONS if any(op in USUAL[kind] for kind in kinds)]
        asked = list(options.operations or usual)
        etp = topology.etp if topology is not None and "ep_etp" in kinds else 1
        seat, why = make_seat(name, members, nodes=nodes, etp=etp, timeout_s=timeout_s)
        jobs += [(seat, op) for op in asked if applicable(OPERATIONS[op], seat)]
        if "hierarchical" in asked and why:
            notes.append(f"no hierarchical exchange over {name}: {why}")
        if seat.ranks < options.imbalance and "uneven" in asked:
            notes.append(
                f"uneven over {name}: all rows go to one rank, which is only {seat.ranks} times the mean of {seat.ranks}"
            )
    if not jobs:
        why = "; ".join(notes) or "torch is no other way than all_to_all on this transport"
        what = f"asks for {', '.join(options.operations or ())}, which cannot be measured on these ranks: {why}"
        raise ConfigError([Problem("--ops", what)])
    return jobs, notes


def _pairs(
    nodes: NodeMap, names: Sequence[str], device: torch.device, swept: Swept, options: CommOptions, budget_s: float
) -> tuple[PairTimes, tuple[LinkFinding, ...]]:
    """Every two ranks; what seems slow is measured once more before it is named."""
    link = next((curve.fit for curve in swept.curves if curve.operation == "send_recv" and curve.fit), None)
    nbytes = shot_bytes(link.model if link is not None else None, options.end)
    times = measure_pairs(nodes, device, nbytes, budget_s)
    doubtful = suspects(times, nodes)
    if doubtful:
        times = times.again(measure_pairs(nodes, device, nbytes, max(budget_s, times.seconds), doubtful))
    return times, find_faults(times, nodes, names)


def _pair_notes(pairs: PairTimes, names: Sequence[str]) -> list[str]:
    notes = []
    if pairs.done < pairs.rounds:
        notes.append(f"pairs: time for {pairs.done} of {pairs.rounds} rounds only; give more with --budget-s")
    if len(names) == 2:
        notes.append("two hosts have one link and nothing to compare it with but its two directions")
    return notes


def _sweep_notes(swept: Swept) -> list[str]:
    stopped = [f"{c.operation} over {c.scope} at {c.stopped} bytes" for c in swept.curves if c.stopped is not None]
    notes = [f"no time for all sizes (--budget-s): stopped {'; '.join(stopped)}"] if stopped else []
    if swept.clock_error_s is None:
        notes.append("a rank's clock has changed during the sweep: the skew of starts is not known")
    for curve in swept.curves:
        if curve.fit is not None and curve.fit.mean_error > MAX_ERROR:
            where = f"{curve.operation} over {curve.scope}"
            notes.append(
                f"{where}: times are {curve.fit.mean_error:.0%} from the link model on average; is something else running?"
            )
    return notes
