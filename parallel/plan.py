"""A plan of communication overlap as data: how many pieces each MoE layer is sent in, for which cluster, layout and model.

It is measured and written once (`moefold plan`), and read by runs. A plan from elsewhere is refused, not adapted: what it says
follows from the links it was measured on.
"""

from __future__ import annotations

import json
import os
import platform
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from math import comb, isfinite
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import torch
import torch.distributed as dist

from ..moe.config import ModelConfig
from ..moe.dispatch import Pieces
from ..moe.errors import ConfigError, Problem
from .apply import compute_dtype
from .cost_model import LinkFit, LinkModel
from .gradient_placement import WindowBytes
from .gradient_windows import Windows
from .mesh import Mesh
from .schedule import Costs, Hop, LayerWork, Resource
from .topology import Topology

SCHEMA = 3
MOST_SHOWN = 8
"""Hosts or layers that an error lists."""
_AGAIN = "measure again with `moefold plan CONFIG --out FILE`"


@dataclass(frozen=True)
class Load:
    """One MoE layer on one rank. tokens: of a rank's micro-batch. row_bytes: of one row on the wire. shared_dim: hidden width of
    all shared experts together. matrices: of one network, 3 with a gate and 2 without.

    ep, etp: degrees. nodes: that the ranks of an (ep, etp) group lie on, evenly.
    """

    tokens: int
    dim: int
    row_bytes: int
    num_experts: int
    top_k: int
    expert_dim: int
    shared_dim: int = 0
    ep: int = 1
    etp: int = 1
    nodes: int = 1
    matrices: int = 3


def distinct_nodes(num_experts: int, top_k: int, nodes: int) -> float:
    """Nodes that a token is sent to on average, if each set of top_k experts is as likely: N (1 - C(E - E/N, K) / C(E, K))."""
    return nodes * (1 - comb(num_experts - num_experts // nodes, top_k) / comb(num_experts, top_k))


def layer_work(load: Load, links: Mapping[str, LinkModel], dispatcher: str, rate: float = 1.0) -> LayerWork:
    """What a rank sends and computes if every set of experts is as likely, nothing is dropped, and part `rate` of rows travels.

    A row that stands for several choices (rate < 1) goes to one expert, so that two levels do not save rows then; what coding and
    restoring cost is left out. In one level everything counts as "across" where the group lies on several nodes.

    links: "flat"; for two levels "across", and "inside" where a node has several ranks of a group.
    """
    ranks = load.ep * load.etp
    rows = load.tokens * load.top_k * rate
    copies_bytes = rows * load.etp * load.row_bytes
    hops: tuple[Hop, ...] = ()
    if dispatcher == "hierarchical" and load.nodes > 1:
        leaves, inside = (load.nodes - 1) / load.nodes, ranks // load.nodes
        choices = 1 if rate < 1 else load.top_k
        up_rows = rows / choices * distinct_nodes(load.num_experts, choices, load.nodes) * leaves
        notes_bytes = up_rows * 2 * choices * 4
        up_bytes = up_rows * load.row_bytes
        hops = (Hop("across", links["across"], up_bytes + notes_bytes, up_bytes, 1.0, 2, 8.0 * load.nodes),)
        if inside > 1:
            down_bytes = copies_bytes * (inside - 1) / inside
            hops += (Hop("inside", links["inside"], down_bytes, down_bytes, 0.0, 1, 8.0 * load.num_experts / load.nodes),)
    elif ranks > 1:
        flat_bytes = copies_bytes * (ranks - 1) / ranks
        where: Resource = "across" if load.nodes > 1 else "inside"
        share = (load.nodes - 1) / load.nodes / ((ranks - 1) / ranks)
        hops = (Hop(where, links["flat"], flat_bytes, flat_bytes, share, 1, 8.0 * load.num_experts * load.etp),)
    shared_flops = 2.0 * load.matrices * load.tokens * load.dim * load.shared_dim
    return LayerWork(hops, 2.0 * load.matrices * rows * load.dim * load.expert_dim, shared_flops)


@dataclass(frozen=True)
class ModelSummary:
    """What a plan needs to know of a model and its layout. layers: indices of MoE layers. rate: part of the rows that travels.
    Of a compression whose rate is not fixed it is 1: a plan cannot know it."""

    layers: tuple[int, ...]
    load: Load
    dispatcher: str
    rate: float = 1.0

    @staticmethod
    def of(model: ModelConfig, topology: Topology, *, tokens: int, nodes: int, precision: str) -> ModelSummary:
        """tokens: that one rank routes at once. nodes: of an (ep, etp) group. precision: `train.precision`.

        Raises:
            ConfigError: a model without MoE layers.
        """
        moe = model.moe
        if moe is None or not model.moe_layers:
            raise ConfigError([Problem("model.moe", "is not set, so that there is nothing to plan; plans are for MoE layers")])
        compress = moe.compress
        load = Load(
            tokens=tokens,
            dim=model.dim,
            row_bytes=compress.row_bytes(model.dim, compute_dtype(precision).itemsize),
            num_experts=moe.num_experts,
            top_k=moe.top_k,
            expert_dim=moe.expert_dim,
            shared_dim=moe.shared_width,
            ep=topology.ep,
            etp=topology.etp,
            nodes=nodes,
            matrices=model.ffn_matrices,
        )
        rate = 1.0 if compress.method == "none" or compress.rate is None else compress.rate
        return ModelSummary(model.moe_layers, load, moe.dispatcher, rate)

    def work(self, links: Mapping[str, LinkModel]) -> LayerWork:
        """Of each MoE layer, see `layer_work`."""
        return layer_work(self.load, links, self.dispatcher, self.rate)


@dataclass(frozen=True)
class Fingerprint:
    """A cluster and a layout. hosts: (name, ranks there), by name. devices: names, each once."""

    hosts: tuple[tuple[str, int], ...]
    devices: tuple[str, ...]
    backend: str
    world: int
    dp: int
    hsdp: int
    tp: int
    ep: int
    etp: int


def fingerprint(mesh: Mesh) -> Fingerprint:
    """Of the processes that run now. Collective; the same on every rank."""
    if mesh.device.type == "cuda":
        device = torch.cuda.get_device_name(mesh.device)
    else:
        device = f"{mesh.device.type} {platform.machine()}, {os.cpu_count()} cores"
    ranks = [("", "")] * mesh.topology.world
    dist.all_gather_object(ranks, (socket.gethostname(), device), group=mesh.world_group)
    t = mesh.topology
    return Fingerprint(
        hosts=tuple(sorted(Counter(host for host, _ in ranks).items())),
        devices=tuple(sorted({device for _, device in ranks})),
        backend=str(dist.get_backend(mesh.ep_etp_group)),
        world=t.world,
        dp=t.dp,
        hsdp=t.hsdp,
        tp=t.tp,
        ep=t.ep,
        etp=t.etp,
    )


@dataclass(frozen=True)
class LayerPlan:
    """One MoE layer: its index among the model's blocks, the pieces it is sent in, and the seconds predicted for them and for one
    piece; None where nothing travels, so that nothing was predicted.

    windows: gradients that are summed in its backward, None where there is nobody to sum with or nothing was predicted.
    """

    layer: int
    chunks: Pieces
    forward_s: float | None = None
    backward_s: float | None = None
    forward_1_s: float | None = None
    backward_1_s: float | None = None
    windows: WindowBytes | None = None


@dataclass(frozen=True)
class Plan:
    """Pieces of every MoE layer, and what they follow from. version: of moefold. costs: None as in `LayerPlan`. stale: why a run
    has found that the plan holds no more; None = it has not."""

    version: str
    fingerprint: Fingerprint
    model: ModelSummary
    layers: tuple[LayerPlan, ...]
    links: Mapping[str, LinkFit]
    costs: Costs | None = None
    stale: str | None = None

    def chunks(self, layer: int) -> Pieces:
        """Pieces of the MoE layer in this block of the model. Raises KeyError for a block without one."""
        return {plan.layer: plan.chunks for plan in self.layers}[layer]

    @property
    def windows(self) -> Windows:
        """Where gradients are summed: as predicted, and at the next place where nothing was."""
        given = {plan.layer: plan.windows for plan in self.layers if plan.windows is not None}
        return given if len(given) == len(self.layers) else True

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"schema": SCHEMA, **asdict(self)}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str = "plan") -> Plan:
        """What `to_json` wrote. where: named in errors.

        Raises:
            ConfigError: not JSON, of another schema, or a value that is missing, unknown or of the wrong kind.
        """
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ConfigError([Problem(where, f"is not JSON ({error}); {_AGAIN}")]) from error
        schema = data.pop("schema", None) if isinstance(data, dict) else None
        if schema != SCHEMA:
            raise ConfigError([Problem(where, f"has schema {schema!r}, but this version reads {SCHEMA}; {_AGAIN}")])
        try:
            plan: Plan = _typed(Plan, data, "")
        except _WrongValueError as error:
            raise ConfigError([Problem(where, f"{error}; {_AGAIN}")]) from error
        if (named := [p.layer for p in plan.layers]) != list(plan.model.layers):
            what = f"names pieces for the layers {named}, but the MoE layers are {list(plan.model.layers)}"
            raise ConfigError([Problem(where, f"{what}; {_AGAIN}")])
        return plan

    @staticmethod
    def read(path: str | Path) -> Plan:
        """The plan in a file. Raises ConfigError as `from_json`, and where the file cannot be read."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "is not text"
            what = f"cannot be read ({reason}); write one with `moefold plan CONFIG --out FILE`"
            raise ConfigError([Problem(str(path), what)]) from error
        return Plan.from_json(text, str(path))


def check_plan(plan: Plan, here: Fingerprint, model: ModelSummary, where: str = "plan") -> None:
    """Raise ConfigError naming everything in which the plan's cluster, layout or model is not that of this run.

    here: see `fingerprint`. model: see `ModelSummary.of`. where: of the plan, named in the error.
    """
    problems = [Problem(where, f"{difference}; {_AGAIN}") for difference in differences(plan, here, model)]
    if problems:
        raise ConfigError(problems)


def differences(plan: Plan, here: Fingerprint, model: ModelSummary) -> list[str]:
    """What of the plan's cluster, layout or model is not that of this run; empty where it may be used."""
    pairs: list[tuple[Any, Any]] = [(plan.fingerprint, here), (plan.model, model), (plan.model.load, model.load)]
    return [
        f"was made for {_said(f.name)} = {_shown(a)}, but this run has {_shown(b)}"
        for old, new in pairs
        for f in fields(old)
        if f.name != "load" and (a := getattr(old, f.name)) != (b := getattr(new, f.name))
    ]


def _said(name: str) -> str:
    names = {"hosts": "hosts (ranks)", "tokens": "tokens per rank and pass", "layers": "MoE layers", "rate": "rate of rows"}
    return names.get(name, name)


def _shown(value: Any) -> str:
    if not isinstance(value, tuple):
        return str(value)
    words = [f"{item[0]} ({item[1]})" if isinstance(item, tuple) else str(item) for item in value]
    more = f" .. ({len(words)} in all)" if len(words) > MOST_SHOWN else ""
    return ", ".join(words[:MOST_SHOWN]) + more


class _WrongValueError(ValueError):
    """A value of a plan's file that is not of the kind it must be."""


def _typed(hint: Any, value: Any, path: str) -> Any:
    """JSON as the type that `hint` says: records from objects with exactly their fields, tuples from lists."""
    name, origin, args = path.lstrip(".") or "the plan", get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        names = {f.name for f in fields(hint)}
        if not isinstance(value, dict) or set(value) != names:
            found = sorted(value) if isinstance(value, dict) else value
            raise _WrongValueError(f"{name} must have {', '.join(sorted(names))}, but is {found}")
        values = {key: _typed(hints[key], item, f"{path}.{key}") for key, item in value.items()}
        try:
            return hint(**values)  # type: ignore[operator]
        except ValueError as error:
            raise _WrongValueError(f"{name}: {error}") from error
    if origin is UnionType:
        return None if value is None and NoneType in args else _typed(args[0], value, path)
    if isinstance(value, dict) and origin is Mapping:
        return {key: _typed(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, list) and origin is tuple:
        kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
        if len(kinds) == len(value):
            return tuple(_typed(kind, item, f"{path}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value):
        return float(value)
    if hint in (int, str, bool) and type(value) is hint:
        return value
    raise _WrongValueError(f"{name} is {value!r}, which it cannot be")
