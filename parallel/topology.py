"""Which rank does what: pure integers, no torch, no process group.

The same ranks are counted in two ways (MoE parallel folding, arXiv 2504.14960):

    world = pp * dp  * cp * tp      dense view: attention, dense FFN, embeddings, router
          = pp * edp * ep * etp     expert view: routed experts

In both views pp is the outermost axis and the last axis is the fastest. With pp outermost a stage is one block of
neighbouring ranks in either view, so the pipeline stages of both agree for every factorisation; with pp inside dp they
agree only where cp * tp == ep * etp.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import gcd, prod
from types import MappingProxyType
from typing import Any

from ..moe.config import ModelConfig
from ..moe.errors import Problem, TopologyError
from .config import ParallelConfig
from .degrees import degree_problems, divisors, fits, indivisible, multiples, nearest

DENSE_DIMS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""Factors of the dense view, outermost first."""
EXPERT_DIMS = ("pp", "edp_replicate", "edp_shard", "ep", "etp")
"""Factors of the expert view, outermost first."""

# Axis -> (view it belongs to, factors that vary inside one of its groups).
_AXES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = MappingProxyType(
    {
        "world": (DENSE_DIMS, DENSE_DIMS),
        "pp": (DENSE_DIMS, ("pp",)),
        "dp": (DENSE_DIMS, ("dp_replicate", "dp_shard")),
        "dp_replicate": (DENSE_DIMS, ("dp_replicate",)),
        "dp_shard": (DENSE_DIMS, ("dp_shard",)),
        "dp_cp": (DENSE_DIMS, ("dp_replicate", "dp_shard", "cp")),
        "cp": (DENSE_DIMS, ("cp",)),
        "tp": (DENSE_DIMS, ("tp",)),
        "edp": (EXPERT_DIMS, ("edp_replicate", "edp_shard")),
        "edp_replicate": (EXPERT_DIMS, ("edp_replicate",)),
        "edp_shard": (EXPERT_DIMS, ("edp_shard",)),
        "ep": (EXPERT_DIMS, ("ep",)),
        "etp": (EXPERT_DIMS, ("etp",)),
        "ep_etp": (EXPERT_DIMS, ("ep", "etp")),
    }
)
AXES = tuple(_AXES)
"""Every axis name that `Topology.groups` knows."""

_TRAFFIC: Mapping[str, str] = MappingProxyType(
    {
        "pp": "activations and their gradients, between neighbouring stages",
        "dp_replicate": "gradients of dense weights (all-reduce, once per step)",
        "dp_shard": "dense weights (all-gather) and their gradients (reduce-scatter)",
        "cp": "keys and values of attention",
        "tp": "activations of attention and dense FFN (all-gather, reduce-scatter); gradients of norms and routers",
        "edp_replicate": "gradients of expert weights (all-reduce, once per step)",
        "edp_shard": "expert weights (all-gather) and their gradients (reduce-scatter)",
        "ep": "rows to their experts and back (all-to-all)",
        "etp": "rows of one expert (all-gather, reduce-scatter)",
    }
)


@dataclass(frozen=True, kw_only=True)
class Coordinates:
    """Position of one rank on every axis, counted from 0, in the dense and in the expert view."""

    pp: int
    dp_replicate: int
    dp_shard: int
    dp: int
    cp: int
    tp: int
    edp_replicate: int
    edp_shard: int
    edp: int
    ep: int
    etp: int


@dataclass(frozen=True, init=False)
class Topology:
    """Degrees of parallelism of `world` ranks; `dp` and `edp` follow from the others.

    hsdp splits dp into `dp_replicate` (outer) x `dp_shard`. The expert data axis is split by the part of hsdp that divides
    it, `edp_replicate` = gcd(hsdp, edp): experts are already spread over ep ranks, and their gradients are summed over all
    of edp whatever its split, so any split gives the same numbers.

    Raises TopologyError with every violation and the nearest legal values.
    """

    world: int
    pp: int
    dp: int
    hsdp: int
    cp: int
    tp: int
    ep: int
    etp: int
    edp: int = field(init=False, repr=False)

    def __init__(
        self,
        world: int,
        *,
        pp: int = 1,
        dp: int | None = None,
        hsdp: int = 1,
        cp: int = 1,
        tp: int = 1,
        ep: int = 1,
        etp: int = 1,
    ) -> None:
        problems = degree_problems(world, {"pp": pp, "cp": cp, "tp": tp, "etp": etp, "ep": ep, "dp": dp, "hsdp": hsdp})
        if problems:
            raise TopologyError(problems)
        derived = {"dp": world // (pp * cp * tp), "edp": world // (pp * ep * etp)}
        given = {"world": world, "pp": pp, "hsdp": hsdp, "cp": cp, "tp": tp, "ep": ep, "etp": etp}
        for name, value in (given | derived).items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_parallel(cls, world: int, config: ParallelConfig) -> Topology:
        """The topology of `world` ranks under a run's `[parallel]` section. Raises TopologyError."""
        return cls(world, dp=config.dp, hsdp=config.hsdp, tp=config.tp, ep=config.ep, etp=config.etp)

    @property
    def dp_replicate(self) -> int:
        """Copies of the sharded dense state."""
        return self.hsdp

    @property
    def dp_shard(self) -> int:
        """Ranks that one copy of the dense state is sharded over."""
        return self.dp // self.hsdp

    @property
    def edp_replicate(self) -> int:
        """Copies of the sharded expert state of one (ep, etp) coordinate."""
        return gcd(self.hsdp, self.edp)

    @property
    def edp_shard(self) -> int:
        """Ranks that one copy of an (ep, etp) coordinate's expert state is sharded over."""
        return self.edp // self.edp_replicate

    def size(self, axis: str) -> int:
        """Ranks in one group of `axis`. Raises TopologyError for an unknown axis."""
        return prod(getattr(self, dim) for dim in self._axis(axis)[1])

    def coordinates(self, rank: int) -> Coordinates:
        """Position of `rank` on every axis. Raises TopologyError for a rank outside the world."""
        self._check_rank(rank)
        at = {
            dim: rank // stride % getattr(self, dim)
            for view in (DENSE_DIMS, EXPERT_DIMS)
            for dim, stride in self._strides(view).items()
        }
        dp = at["dp_replicate"] * self.dp_shard + at["dp_shard"]
        edp = at["edp_replicate"] * self.edp_shard + at["edp_shard"]
        return Coordinates(dp=dp, edp=edp, **at)

    def groups(self, axis: str) -> tuple[tuple[int, ...], ...]:
        """Every group of `axis`, by first rank; the ranks of a group ascend with their coordinate on the axis.

        axis: one of `AXES`. Joint axes hold the product: "dp_cp" ordered by (dp, cp), "ep_etp" (one replica of all
        experts) by (ep, etp). Raises TopologyError for an unknown axis.
        """
        view, dims = self._axis(axis)
        inside = self._offsets(view, dims)
        outside = self._offsets(view, [dim for dim in view if dim not in dims])
        return tuple(tuple(start + step for step in inside) for start in outside)

    def group_of(self, axis: str, rank: int) -> tuple[int, ...]:
        """The group of `axis` that `rank` is in. Raises TopologyError for an unknown axis or rank."""
        view, dims = self._axis(axis)
        self._check_rank(rank)
        strides = self._strides(view)
        start = rank - sum(rank // strides[dim] % getattr(self, dim) * strides[dim] for dim in dims)
        return tuple(start + step for step in self._offsets(view, dims))

    def expert_range(self, ep_coordinate: int, num_experts: int) -> range:
        """Global indices of the experts that ranks with this ep coordinate hold: neighbours, num_experts / ep of them.

        Raises TopologyError when ep does not divide num_experts, or for a coordinate outside ep.
        """
        problems = []
        if not 0 <= ep_coordinate < self.ep:
            problems.append(Problem("ep coordinate", f"is {ep_coordinate}, but must be between 0 and {self.ep - 1}"))
        if num_experts % self.ep:
            problems.append(indivisible("parallel.ep", self.ep, "num_experts", num_experts, self._legal("ep", [num_experts])))
        if problems:
            raise TopologyError(problems)
        local = num_experts // self.ep
        return range(ep_coordinate * local, (ep_coordinate + 1) * local)

    def to_dict(self) -> dict[str, int]:
        """All degrees, given and derived, as plain integers for JSON."""
        names = ("world", "pp", "dp", "hsdp", "cp", "tp", "ep", "etp", "edp")
        split = ("dp_replicate", "dp_shard", "edp_replicate", "edp_shard")
        return {name: getattr(self, name) for name in names + split}

    def __str__(self) -> str:
        lines = [
            f"{self.world} ranks = pp {self.pp} x dp {self.dp} x cp {self.cp} x tp {self.tp}   (dense view)",
            f"{'':{len(str(self.world))}}       = pp {self.pp} x edp {self.edp} x ep {self.ep} x etp {self.etp}   (expert view)",
        ]
        table = [("view", "axis", "size", "group of rank 0", "communicates"), *self._rows()]
        widths = [max(len(row[i]) for row in table) for i in range(4)]
        for view, axis, size, ranks, traffic in table:
            lines.append(f"  {view:{widths[0]}}  {axis:{widths[1]}}  {size:>{widths[2]}}  {ranks:{widths[3]}}  {traffic}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{name}</th>" for name in ("view", "axis", "size", "group of rank 0", "communicates"))
        body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in self._rows())
        caption = (
            f"{self.world} ranks = pp {self.pp} x dp {self.dp} x cp {self.cp} x tp {self.tp} "
            f"= pp {self.pp} x edp {self.edp} x ep {self.ep} x etp {self.etp}"
        )
        return f"<table><caption>{caption}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

    def _rows(self) -> list[tuple[str, str, str, str, str]]:
        rows = []
        for view, dims in (("dense", DENSE_DIMS), ("expert", EXPERT_DIMS)):
            for dim in dims:
                ranks, size = self.group_of(dim, 0), getattr(self, dim)
                shown = ranks if size <= 4 else (*ranks[:2], "..", ranks[-1])
                rows.append((view, dim, str(size), " ".join(map(str, shown)), _TRAFFIC[dim] if size > 1 else "nothing"))
        return rows

    def _legal(self, name: str, divides: Iterable[int]) -> list[int]:
        """Values of a degree that divide all of `divides` and fit the world, the others as they are and dp free to follow."""
        common = gcd(*divides)
        degrees: dict[str, Any] = {n: getattr(self, n) for n in ("pp", "cp", "tp", "etp", "ep", "hsdp")}
        return [d for d in divisors(self.world) if common % d == 0 and fits(self.world, degrees | {"dp": None, name: d})]

    def _strides(self, view: tuple[str, ...]) -> dict[str, int]:
        strides, stride = {}, self.world
        for dim in view:
            stride //= getattr(self, dim)
            strides[dim] = stride
        return strides

    def _offsets(self, view: tuple[str, ...], dims: Iterable[str]) -> list[int]:
        """Rank offsets of every combination of coordinates on `dims` (outermost first), the last one fastest."""
        offsets, strides = [0], self._strides(view)
        for dim in dims:
            offsets = [base + i * strides[dim] for base in offsets for i in range(getattr(self, dim))]
        return offsets

    def _axis(self, axis: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        if axis not in _AXES:
            raise TopologyError([Problem("axis", f"is {axis!r}, which does not exist; axes: {', '.join(AXES)}")])
        return _AXES[axis]

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world:
            raise TopologyError([Problem("rank", f"is {rank}, but world = {self.world} has ranks 0 to {self.world - 1}")])


def check_model(
    topology: Topology,
    model: ModelConfig,
    *,
    global_batch: int | None = None,
    micro_batch: int | None = None,
    seq_len: int | None = None,
) -> list[Problem]:
    """Everything about a model and its batch that does not fit a topology, each with the nearest legal values.

    global_batch: sequences per optimizer step over all ranks; micro_batch: sequences per rank and forward pass
    (None: global_batch / dp); seq_len: tokens per sequence. What is None is not checked. An empty list means it fits.
    """
    problems = _expert_problems(topology, model) + _tensor_problems(topology, model, seq_len)
    if topology.pp > model.num_layers:
        legal = [d for d in topology._legal("pp", [topology.world]) if d <= model.num_layers]
        what = f"is {topology.pp}, but num_layers = {model.num_layers} leaves stages empty; {nearest(topology.pp, legal)}"
        problems.append(Problem("parallel.pp", what))
    split = topology.tp * topology.cp
    if seq_len is not None and seq_len % split:
        what = f"is {seq_len}, but tp * cp = {split} ranks share a sequence evenly; {nearest(seq_len, multiples(seq_len, split))}"
        problems.append(Problem("data.seq_len", what))
    return problems + _batch_problems(topology.dp, global_batch, micro_batch)


def require_model(
    topology: Topology,
    model: ModelConfig,
    *,
    global_batch: int | None = None,
    micro_batch: int | None = None,
    seq_len: int | None = None,
) -> None:
    """Raise TopologyError with everything that `check_model` finds, if anything."""
    problems = check_model(topology, model, global_batch=global_batch, micro_batch=micro_batch, seq_len=seq_len)
    if problems:
        raise TopologyError(problems)


def _expert_problems(topology: Topology, model: ModelConfig) -> list[Problem]:
    if model.moe is None or not model.moe_layers:
        return [
            Problem(f"parallel.{name}", f"is {getattr(topology, name)}, but the model has no MoE layers; set it to 1")
            for name in ("ep", "etp")
            if getattr(topology, name) > 1
        ]
    needs = [("ep", "model.moe.num_experts", model.moe.num_experts), ("etp", "model.moe.expert_dim", model.moe.expert_dim)]
    return [
        indivisible(f"parallel.{name}", getattr(topology, name), what, number, topology._legal(name, [number]))
        for name, what, number in needs
        if number % getattr(topology, name)
    ]


def _tensor_problems(topology: Topology, model: ModelConfig, seq_len: int | None) -> list[Problem]:
    tp = topology.tp
    needs = {
        "model.num_heads": model.num_heads,
        "model.num_kv_heads": model.resolved_kv_heads,
        "model.vocab_size": model.vocab_size,
    }
    if model.dense_ffn_dim and len(model.moe_layers) < model.num_layers:
        needs["model.dense_ffn_dim"] = model.dense_ffn_dim
    # A suggestion that only satisfies one of several demands would send the user in circles.
    together = [*needs.values(), *([seq_len // topology.cp] if seq_len and seq_len % topology.cp == 0 else [])]
    legal = topology._legal("tp", together)
    problems = {name: indivisible("parallel.tp", tp, name, number, legal) for name, number in needs.items() if number % tp}
    padded = -(-model.vocab_size // tp) * tp
    way_out = {"model.vocab_size": f"; or pad model.vocab_size to {padded}"}
    return [Problem(p.where, p.what + way_out.get(name, "")) for name, p in problems.items()]


def _batch_problems(dp: int, global_batch: int | None, micro_batch: int | None) -> list[Problem]:
    named = (("train.global_batch", global_batch), ("parallel.micro_batch", micro_batch))
    problems = [Problem(where, f"is {n}, but must be positive") for where, n in named if n is not None and n <= 0]
    if problems or global_batch is None:
        return problems
    if global_batch % dp:
        unit = dp * (micro_batch or 1)
        what = f"is {global_batch}, but must be a multiple of dp * micro_batch = {dp} * {micro_batch or 1} = {unit}"
        return [Problem("train.global_batch", f"{what}; {nearest(global_batch, multiples(global_batch, unit))}")]
    per_rank = global_batch // dp
    if micro_batch is not None and per_rank % micro_batch:
        return [indivisible("parallel.micro_batch", micro_batch, "global_batch / dp", per_rank, divisors(per_rank))]
    return []
