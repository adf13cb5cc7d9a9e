"""Does this layout give the numbers of one process? The verb `moefold parity`, on processes of this machine, without a GPU."""

from __future__ import annotations

import html
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..moe.errors import ConfigError, Problem
from .config import Loaded, check_world
from .local_ranks import run_local_ranks
from .parity_case import parity_case
from .settings import RunConfig

if TYPE_CHECKING:
    from ..parallel.parity import ParityCase, Piece, RankTrace, RecordingEngine, Trace
    from ..parallel.parity_compare import Difference
    from ..parallel.topology import Topology

TOLERANCE = 1e-9
MAX_WORLD = 16

MEANINGS = (
    ("loss", "mean token loss"),
    ("grad_norm", "gradient norm before clipping"),
    ("balance", "load-balancing loss per layer"),
    ("z", "router z per layer"),
    ("counts", "choices per expert"),
    ("dropped", "choices over capacity"),
    ("gradient", "every gradient, before clipping"),
    ("update", "every weight after the last update"),
    ("expert_bias", "selection biases"),
    ("between_ranks", "copies on different ranks (absolute)"),
    ("resumed", "weights one step after loading a checkpoint"),
    ("loaded_alone", "weights and moments, loaded by one process"),
)


@dataclass(frozen=True)
class ParityResult:
    """What `parity` found. differences: the largest relative difference of each quantity over steps, ranks and tensors
    (see `Difference`)."""

    world: int
    topology: Topology
    case: ParityCase
    differences: tuple[Difference, ...]
    seconds: float
    tolerance: float = TOLERANCE

    @property
    def failures(self) -> tuple[Difference, ...]:
        """Differences above the tolerance (or not a number), worst first."""
        wrong = [d for d in self.differences if not d.worst <= self.tolerance]
        return tuple(sorted(wrong, key=lambda d: -d.worst))

    @property
    def passed(self) -> bool:
        return not self.failures

    @property
    def exit_code(self) -> int:
        return 0 if self.passed else 1

    def render(self) -> str:
        """The table for a terminal: each quantity with its worst difference and where that is, then the verdict."""
        c, m = self.case, self.case.model
        experts = f", {m.moe.num_experts} experts, top {m.moe.top_k}" if m.moe else ""
        lines = [
            f"parity of {self.world} ranks with one process, in float64 on gloo",
            *(f"  {line}" for line in str(self.topology).splitlines()[:2]),
            f"  scaled down to: dim {m.dim}, {m.num_layers} layers{experts}, vocabulary {m.vocab_size}; "
            f"{c.global_batch} sequences of {c.seq_len} tokens in {c.num_micro} micro-batches, {c.steps} steps",
            "",
        ]
        rows = [("quantity", "worst relative difference", "", "where", "meaning")]
        rows += [
            (d.quantity, f"{d.worst:.1e}", "FAIL" if d in self.failures else "ok", d.where, dict(MEANINGS).get(d.quantity, ""))
            for d in self.differences
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines += ["  " + "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, "", self._verdict()])

    def _verdict(self) -> str:
        if self.passed:
            worst = max(self.differences, key=lambda d: d.worst)
            return f"PASSED in {self.seconds:.1f} s: nothing differs by more than {worst.worst:.1e} (limit {self.tolerance:g})"
        worst = self.failures[0]
        return (
            f"FAILED in {self.seconds:.1f} s: {len(self.failures)} of {len(self.differences)} quantities differ by more than "
            f"{self.tolerance:g}; the worst is {worst.quantity} at {worst.where}: {worst.worst:.3g}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values for JSON."""
        return {
            "passed": self.passed,
            "tolerance": self.tolerance,
            "world": self.world,
            "topology": self.topology.to_dict(),
            "seconds": self.seconds,
            "differences": [d.to_dict() for d in self.differences],
            "failures": [d.quantity for d in self.failures],
        }

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(self.render())}</pre>"


def _inexact(config: RunConfig) -> list[Problem]:
    """Settings by which numbers depend on the layout on purpose."""
    if config.model.moe is None:
        return []
    c, problems = config.model.moe.compress, []
    if c.wire != "none":
        what = f"is {c.wire!r}, which rounds rows between ranks, and one process sends none; parity is of exact rows: use 'none'"
        problems.append(Problem("model.moe.compress.wire", what))
    if c.method != "none":
        what = f"is {c.method!r}, which merges rows of one rank, and one process has others; parity is of exact rows: use 'none'"
        problems.append(Problem("model.moe.compress.method", what))
    return problems


def parity(config: RunConfig, world: int) -> ParityResult:
    """Compare the layout of `config` on `world` ranks with one process, on a scaled-down model with all of its features.

    Compared are loss, gradients, gradient norm, auxiliary terms, updates, and a checkpoint: saved by the layout, loaded into a
    new engine of the same layout and trained one step further, and loaded by one process. A script that calls this needs the
    usual `if __name__ == "__main__":`, as it starts processes.

    Raises:
        ConfigError: more than 16 ranks, or rows that are merged or rounded on their way.
        TopologyError: the configuration cannot be laid out on `world` ranks.
    """
    topology = check_world(Loaded(config, {}), world)
    if world > MAX_WORLD:
        raise ConfigError([Problem("world", _too_large(topology))])
    if problems := _inexact(config):
        raise ConfigError(problems)
    start_s = time.monotonic()
    case = parity_case(config, topology)
    degrees = {name: getattr(topology, name) for name in ("hsdp", "tp", "ep", "etp")}
    with tempfile.TemporaryDirectory(prefix="moefold-parity-") as folder:
        ranks = run_local_ranks(on_rank, world, case, degrees, folder)
        reference, further, loaded = run_local_ranks(on_one_process, 1, case, topology.dp, folder)[0]
    from ..parallel.parity import assemble
    from ..parallel.parity_compare import compare, compare_tensors

    saved = {name: assemble([r.saved[name] for r in ranks])[0] for name in loaded}
    differences = [
        *compare(reference, [r.trace for r in ranks], TOLERANCE),
        compare_tensors("resumed", further.weights, [r.resumed.weights for r in ranks]),
        compare_tensors("loaded_alone", saved, [loaded]),
    ]
    return ParityResult(world, topology, case, tuple(differences), time.monotonic() - start_s)


def _too_large(topology: Topology) -> str:
    t = topology
    small = {name: min(getattr(t, name), 2) for name in ("tp", "ep", "etp", "hsdp")}
    # hybrid sharding is two kinds at once: replicas, and shards if it had them
    dp = small["hsdp"] * min(t.dp_shard, 2)
    world = lcm(small["tp"] * dp, small["ep"] * small["etp"] * min(t.edp, 2))
    flags = " ".join(f"--parallel.{name} {n}" for name, n in {"dp": world // small["tp"], **small}.items())
    return (
        f"is {t.world}, but parity runs all ranks on this machine, at most {MAX_WORLD}; "
        f"a smaller world has the same kinds of parallelism: --world {world} {flags}"
    )


@dataclass(frozen=True)
class RankResult:
    """One rank: its run, its weights and moments when it saved, and its step after loading them into a new engine."""

    trace: RankTrace
    saved: dict[str, Piece]
    resumed: RankTrace


def on_rank(rank: int, world: int, case: ParityCase, degrees: dict[str, int], folder: str) -> RankResult:
    """One rank of the layout."""
    from ..parallel.parity import build_engine, run_steps
    from .checkpoint import Checkpointer

    engine = build_engine(case, degrees)
    trace = run_steps(engine, case, range(case.steps))
    meta = {"model": asdict(case.model), "layout": engine.mesh.topology.to_dict(), "data": {}, "tokens": 0}
    Checkpointer(Path(folder), keep=1, background=False).save(engine, meta)
    again = _loaded(case, degrees, folder)
    return RankResult(trace, _state(engine), run_steps(again, case, range(case.steps, case.steps + 1)))


def on_one_process(rank: int, world: int, case: ParityCase, dp: int, folder: str) -> tuple[Trace, Trace, dict[str, Piece]]:
    """The reference, the reference with one more step, and the layout's checkpoint as one process loads it."""
    from ..parallel.parity import run_reference

    longer = replace(case, steps=case.steps + 1)
    return run_reference(case, dp), run_reference(longer, dp), _state(_loaded(case, {}, folder))


def _loaded(case: ParityCase, degrees: dict[str, int], folder: str) -> RecordingEngine:
    """An engine with other weights that has loaded the checkpoint in `folder`."""
    from ..parallel.parity import build_engine
    from .checkpoint import Checkpointer
    from .resume import find_checkpoint

    engine = build_engine(replace(case, seed=case.seed + 1), degrees)
    path = find_checkpoint(folder)
    assert path is not None, "the ranks have saved one"
    Checkpointer(Path(folder), keep=1, background=False).load(path, engine)
    return engine


def _state(engine: RecordingEngine) -> dict[str, Piece]:
    """Weights and moments of this rank by logical name."""
    state = {p.placement.name: engine.piece(p, p.local) for p in engine.parameters}
    return state | {f"{key} of {p.placement.name}": engine.piece(p, moment) for p, key, moment in engine.optimizer.moments()}
