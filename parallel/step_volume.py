"""What a way of sending moves, counted from choices that were made: rows per exchange, across nodes and at the busiest place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..moe.compress import CompressConfig
from ..moe.config import ModelConfig
from .nodes import NodeMap, two_levels
from .topology import Topology

DispatcherName = Literal["all_to_all", "hierarchical"]
WireName = Literal["none", "int8", "e4m3"]


@dataclass(frozen=True, kw_only=True)
class Way:
    """A configuration of one step that computes the same, but for the rounding of `wire` and the loss of `rate` < 1.

    rate: part of the rows that travels with LSH compression; 1 = all, without. pieces: see `ParallelConfig`.
    """

    dispatcher: DispatcherName
    wire: WireName = "none"
    rate: float = 1.0
    pieces: int = 1
    ep: int = 1
    etp: int = 1
    tp: int = 1

    @staticmethod
    def of(model: ModelConfig, topology: Topology, pieces: int) -> Way:
        """What a model with experts and a layout are configured to do. A compression must have a fixed rate."""
        assert model.moe is not None
        c = model.moe.compress
        rate = 1.0 if c.method == "none" or c.rate is None else c.rate
        kind = {"dispatcher": model.moe.dispatcher, "wire": c.wire, "rate": rate, "pieces": pieces}
        return Way(**kind, ep=topology.ep, etp=topology.etp, tp=topology.tp)  # type: ignore[arg-type]

    @property
    def folding(self) -> tuple[int, int, int]:
        """(ep, etp, tp)"""
        return self.ep, self.etp, self.tp

    @property
    def moves(self) -> Way:
        """The way of all that move the same rows: pieces and wire change none."""
        return replace(self, pieces=1, wire="none")

    @property
    def name(self) -> str:
        words = [self.dispatcher, f"ep {self.ep}"]
        words += [f"{axis} {size}" for axis, size in (("etp", self.etp), ("tp", self.tp)) if size > 1]
        words += [f"{self.pieces} pieces"] * (self.pieces > 1) + [f"LSH {self.rate:.0%}"] * (self.rate < 1)
        return ", ".join(words + [self.wire] * (self.wire != "none"))

    def model(self, base: ModelConfig) -> ModelConfig:
        """The model that sends this way."""
        assert base.moe is not None
        old = base.moe.compress
        lsh = {"method": "lsh", "rate": self.rate} if self.rate < 1 else {"method": "none"}
        compress: CompressConfig = replace(old, wire=self.wire, **lsh)
        return replace(base, moe=replace(base.moe, dispatcher=self.dispatcher, compress=compress))

    def topology(self, base: Topology) -> Topology:
        """This folding of the same ranks. Replicas stay as they are, or are all ranks if they were.

        Raises:
            TopologyError: degrees that do not fit the ranks.
        """
        dp = base.world // self.tp
        hsdp = dp if base.hsdp == base.dp else base.hsdp
        return Topology(base.world, hsdp=hsdp, tp=self.tp, ep=self.ep, etp=self.etp)


@dataclass(frozen=True)
class HopRows:
    """Rows of one exchange. mean: that a rank sends to others. busiest: what goes out of, or into, the busiest node (the busiest
    rank, where nothing leaves nodes) by that of the mean one."""

    mean: float
    busiest: float


@dataclass(frozen=True)
class Volume:
    """Of one layer and one micro-batch. hops: outermost first. rows, most_rows: that a rank's experts compute, mean and most."""

    hops: tuple[HopRows, ...]
    rows: float
    most_rows: float


@dataclass(frozen=True)
class Choices:
    """The choices of one layer on all ranks. counts_RE: of each expert. pairs_RB: (token, expert block) pairs that differ, for
    the partitions of experts into equal blocks of neighbours; keys are numbers of blocks."""

    counts_RE: Tensor
    pairs_RB: dict[int, Tensor]


def count_pairs(indices_TK: Tensor, num_experts: int, blocks: int) -> Tensor:
    """int64 [blocks]: tokens with a choice in each of equal blocks of neighbouring experts."""
    block_TK = indices_TK // (num_experts // blocks)
    hit_TB = torch.zeros(indices_TK.shape[0], blocks, dtype=torch.bool, device=indices_TK.device)
    return hit_TB.scatter_(1, block_TK, True).sum(0)


def expert_blocks(topology: Topology, nodes: NodeMap, num_experts: int) -> int | None:
    """In how many equal blocks of neighbouring experts the experts of a group lie on nodes; None where two levels are not these.

    Raises:
        TopologyError: as `nodes.two_levels`.
    """
    counts = set()
    for members in topology.groups("ep_etp"):
        experts = two_levels(members, nodes, topology.etp).experts(num_experts)
        each = num_experts // len(experts)
        if any(tuple(sorted(own)) != tuple(range(min(own), min(own) + each)) for own in experts):
            return None
        counts.add(len(experts))
    return counts.pop() if len(counts) == 1 else None


def volume(way: Way, choices: Choices, topology: Topology, nodes: NodeMap) -> Volume:
    """Count what travels. With rate < 1 each expert gets that part of its rows, and a row stands for one expert."""
    counts_RE = way.rate * choices.counts_RE.double()
    world = len(counts_RE)
    flat_RR = torch.zeros(world, world, dtype=torch.float64)
    up_RR, down_RR = torch.zeros_like(flat_RR), torch.zeros_like(flat_RR)
    levels = 1
    for members in topology.groups("ep_etp"):
        group = torch.tensor(members)
        to_owner_GO = counts_RE[group].view(len(members), topology.ep, -1).sum(-1)
        flat_RR[group[:, None], group] = to_owner_GO.repeat_interleave(topology.etp, 1)
        if way.dispatcher == "hierarchical":
            levels = _in_two_levels(way, choices, topology, nodes, members, up_RR, down_RR)
    received_R = flat_RR.sum(0)
    hops = [flat_RR] if levels == 1 else [up_RR, *([down_RR] if _abroad(down_RR).any() else [])]
    found = tuple(_hop(rows_RR, nodes) for rows_RR in hops) if topology.ep * topology.etp > 1 else ()
    return Volume(found, float(received_R.mean()), float(received_R.max()))


def _in_two_levels(
    way: Way, choices: Choices, topology: Topology, nodes: NodeMap, members: Sequence[int], up_RR: Tensor, down_RR: Tensor
) -> int:
    """Fill in the rows of both levels of one group; returns how many levels there are."""
    both = two_levels(members, nodes, topology.etp)
    E, count = choices.counts_RE.shape[1], len(both.inside)
    if count == 1:
        return 1
    pairs_RB = choices.counts_RE.view(len(choices.counts_RE), count, -1).sum(-1) if way.rate < 1 else choices.pairs_RB[count]
    pairs_RB = pairs_RB.double() * way.rate
    counts_RE = way.rate * choices.counts_RE.double()
    for ranks, experts in zip(both.inside, both.experts(E), strict=True):
        block = min(experts) // (E // count)
        each = E // topology.ep
        for across in both.across:
            landing = next(rank for rank in across if rank in ranks)
            for source in across:
                up_RR[source, landing] = pairs_RB[source, block]
                for place, target in enumerate(ranks):
                    first = experts[0] + place // topology.etp * each
                    down_RR[landing, target] += counts_RE[source, first : first + each].sum()
    return 2


def _abroad(rows_RR: Tensor) -> Tensor:
    return rows_RR - rows_RR.diag().diag()


def _hop(rows_RR: Tensor, nodes: NodeMap) -> HopRows:
    out_RR = _abroad(rows_RR)
    node_R = torch.tensor(nodes.node_of_rank)
    count = int(node_R.max()) + 1
    to_NN = torch.zeros(count, count, dtype=torch.float64)
    to_NN.index_put_((node_R[:, None].expand_as(out_RR), node_R.expand_as(out_RR)), out_RR, accumulate=True)
    between = _abroad(to_NN)
    matrix = between if between.any() else out_RR
    most, mean = max(float(matrix.sum(0).max()), float(matrix.sum(1).max())), float(matrix.sum(1).mean())
    return HopRows(float(out_RR.sum(1).mean()), most / mean if mean else 1.0)
