"""Does a layout give the numbers of one process? Run both on the same data and compare every tensor by name.

The one process is a plain model under plain autograd with `torch.optim.AdamW`: it shares the model's modules with the layout, but
no engine, no sharding, no reductions and no balance state; auxiliary losses are written out from their formulas.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from ..moe.balance import balance_value
from ..moe.config import ModelConfig
from ..moe.load import Aux
from ..moe.model import Model
from .apply import moe_layers
from .engine import Engine, MicroBatch, OptimizerSettings
from .mesh import build_mesh, nodes_for
from .sharding import ShardedParameter
from .topology import Topology

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class ParityCase:
    """What both sides run.

    ranks_per_node: ranks that count as one machine, for experts in two levels. pieces,
    gradient_windows: see `ParallelConfig`.
    num_micro: micro-batches per step. valid_share: share of positions that count (1 = all); which ones differs between sequences,
    so that ranks hold unequal numbers. Micro-batch m of a step takes rows [m, m + 1) * global_batch / num_micro, data ranks
    split it.
    start_bias: selection bias of every layer's experts before the first step, for models that have one; empty = zeros.
    """

    model: ModelConfig
    global_batch: int
    seq_len: int
    num_micro: int = 1
    steps: int = 5
    valid_share: float = 1.0
    recompute: str = "none"
    precision: str = "fp64"
    lr: float = 1e-2
    seed: int = 0
    start_bias: tuple[float, ...] = ()
    ranks_per_node: int | None = None
    pieces: int = 1
    gradient_windows: bool = False
    optimizer: OptimizerSettings = field(default_factory=lambda: OptimizerSettings(grad_clip=1.0))


@dataclass
class Trace:
    """What a run did: figures per step, and every gradient and weight by logical name, as float64 arrays of global shape."""

    loss: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    balance: list[np.ndarray] = field(default_factory=list)
    z: list[np.ndarray] = field(default_factory=list)
    counts: list[np.ndarray] = field(default_factory=list)
    dropped: list[np.ndarray] = field(default_factory=list)
    gradients: list[Arrays] = field(default_factory=list)
    weights: Arrays = field(default_factory=dict)
    biases: Arrays = field(default_factory=dict)


@dataclass(frozen=True)
class GlobalBatch:
    """A whole batch: tokens and labels int64 [rows, S], valid bool [rows, S] or None."""

    tokens: Tensor
    labels: Tensor
    valid: Tensor | None

    def rows(self, start: int, stop: int) -> MicroBatch:
        valid = None if self.valid is None else self.valid[start:stop]
        return MicroBatch(self.tokens[start:stop], self.labels[start:stop], valid)


def make_batch(case: ParityCase, step: int) -> GlobalBatch:
    """The batch of a step: random tokens; the first sequence of a masked batch has no valid token at all."""
    generator = torch.Generator().manual_seed(case.seed * 1_000_003 + step)
    text = torch.randint(0, case.model.vocab_size, (case.global_batch, case.seq_len + 1), generator=generator)
    valid = None
    if case.valid_share < 1:
        share = torch.rand(case.global_batch, 1, generator=generator) * 2 * case.valid_share
        valid = torch.rand(case.global_batch, case.seq_len, generator=generator) < share
        valid[0] = False
    return GlobalBatch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), valid)


def micro_rows(case: ParityCase, dp: int, data_rank: int, micro: int) -> tuple[int, int]:
    """First and end row of a data rank's share of micro-batch `micro`."""
    per_micro = case.global_batch // case.num_micro
    per_rank = per_micro // dp
    start = micro * per_micro + data_rank * per_rank
    return start, start + per_rank


# --- one process ------------------------------------------------------------------------------------------------------


def run_reference(case: ParityCase, dp: int = 1) -> Trace:
    """The run on one process. `dp` only says how the batch is split where the loss depends on it by definition (scope
    `micro`)."""
    model = Model(case.model, seed=case.seed)
    model = model.double() if case.precision == "fp64" else model
    for layer in moe_layers(model):
        if layer.router.biased:
            layer.router.expert_bias_E = layer.router.expert_bias_E.float()
    _set_start_bias(case, model)
    named = dict(model.named_parameters())
    o = case.optimizer
    matrices = {n for n, p in named.items() if p.dim() > 1 and "router" not in n and not n.rsplit(".", 1)[-1].startswith("b")}
    decayed = [p for n, p in named.items() if n in matrices]
    plain = [p for n, p in named.items() if n not in matrices]
    groups = [{"params": decayed, "weight_decay": o.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=case.lr, betas=o.betas, eps=o.eps)
    trace, previous_LE = Trace(), None
    for step in range(case.steps):
        previous_LE = _reference_step(case, model, make_batch(case, step), dp, previous_LE, trace)
        trace.gradients.append({n: _array(p.grad if p.grad is not None else torch.zeros_like(p)) for n, p in named.items()})
        norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in named.values() if p.grad is not None]))
        trace.grad_norm.append(float(norm))
        if o.grad_clip is not None and norm > o.grad_clip:
            for p in named.values():
                if p.grad is not None:
                    p.grad *= o.grad_clip / (norm + 1e-6)
        adamw.step()
        adamw.zero_grad()
        _reference_bias(model, previous_LE)
    trace.weights = {n: _array(p) for n, p in named.items()}
    trace.biases = {n: _array(b) for n, b in model.named_buffers()}
    return trace


def _reference_step(
    case: ParityCase, model: Model, batch: GlobalBatch, dp: int, previous_LE: Tensor | None, trace: Trace
) -> Tensor | None:
    """Backward of one step; returns its counts [L, E]."""
    valid = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.valid is None else batch.valid
    tokens = max(1, int(valid.sum()))
    runs = []
    for micro in range(case.num_micro):
        for data_rank in range(dp):
            b = batch.rows(*micro_rows(case, dp, data_rank, micro))
            runs.append((micro, *model(b.tokens_BS, b.valid_BS, labels_BS=b.labels_BS)))
    loss_sum = torch.stack([r[1] for r in runs]).sum()
    auxes: list[tuple[int, Aux]] = [(micro, aux) for micro, _, aux in runs if aux is not None]
    (loss_sum / tokens + _reference_aux(case, auxes, tokens, previous_LE)).backward()
    trace.loss.append(float(loss_sum.detach()) / tokens)
    if not auxes:
        return None
    counts_LE = torch.stack([a.counts_E for _, a in auxes]).sum(0)
    probs_LE = torch.stack([a.probs_BE.detach().sum(1) for _, a in auxes]).sum(0)
    trace.counts.append(counts_LE.numpy())
    trace.balance.append(_array(balance_value(counts_LE, probs_LE, tokens)))
    trace.z.append(_array(torch.stack([a.z_B.detach().sum(1) for _, a in auxes]).sum(0) / tokens))
    trace.dropped.append(torch.stack([a.dropped_B.sum(1) for _, a in auxes]).sum(0).numpy())
    return counts_LE


def _reference_aux(case: ParityCase, auxes: list[tuple[int, Aux]], tokens: int, previous_LE: Tensor | None) -> Tensor:
    """Auxiliary losses from their formulas: coeff * E / tokens * sum over groups of tokens of sum_e f_e * (sum of scores)_e."""
    total = torch.zeros((), dtype=torch.float64)
    if not auxes:
        return total
    assert case.model.moe is not None
    c, E = case.model.moe.balance, case.model.moe.num_experts

    def product(counts: Tensor, probs: Tensor) -> Tensor:
        share = counts.double() / counts.double().sum(-1, keepdim=True).clamp_min(1)
        return E * (share * probs.double()).sum() / tokens

    everything_LE = torch.stack([a.counts_E for _, a in auxes]).sum(0)
    for micro, aux in auxes:
        probs_LE = aux.probs_BE.sum(1)
        total = total + c.z_loss_coeff * aux.z_B.double().sum() / tokens + c.straggler_coeff * product(aux.counts_E, probs_LE)
        if c.scope == "micro":
            total = total + c.aux_loss_coeff * product(aux.counts_E, probs_LE)
        elif c.scope == "sequence":
            total = total + c.aux_loss_coeff * product(aux.counts_BE, aux.probs_BE)
        else:
            counts_LE = everything_LE
            if c.accumulation != "exact":
                counts_LE = torch.stack([a.counts_E for m, a in auxes if m <= micro]).sum(0).double()
                if c.accumulation == "prior" and previous_LE is not None:
                    counts_LE = counts_LE + c.carry * (1 - (micro + 1) / case.num_micro) * previous_LE
            total = total + c.aux_loss_coeff * product(counts_LE, probs_LE)
    return total


def _reference_bias(model: Model, counts_LE: Tensor | None) -> None:
    for index, layer in enumerate(moe_layers(model)):
        if layer.router.biased and counts_LE is not None:
            load = counts_LE[index].double()
            moved = layer.router.expert_bias_E + layer.config.balance.bias_update_rate * torch.sign(load.mean() - load).float()
            layer.router.expert_bias_E.copy_(moved - moved.mean())


def _set_start_bias(case: ParityCase, model: Model) -> None:
    for layer in moe_layers(model):
        if layer.router.biased and case.start_bias:
            layer.router.expert_bias_E.copy_(torch.tensor(case.start_bias))


def _array(x: Tensor) -> np.ndarray:
    return x.detach().double().cpu().numpy().copy()


# --- a layout ---------------------------------------------------------------------------------------------------------


@dataclass
class Piece:
    """One rank's part of a logical tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    values: np.ndarray


@dataclass
class RankTrace:
    """What one rank saw: figures, and its pieces of gradients (per step) and weights."""

    figures: Trace
    gradients: list[dict[str, Piece]] = field(default_factory=list)
    weights: dict[str, Piece] = field(default_factory=dict)


class RecordingEngine(Engine):
    """An engine that keeps a copy of its gradients before each update."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.recorded: list[dict[str, Piece]] = []
        self.offsets: dict[str, tuple[int, ...]] = {}

    def _update(self, norm: Tensor, lr: float, stats) -> None:  # type: ignore[no-untyped-def]
        grads = {p: p.local_grad if p.local_grad is not None else torch.zeros_like(p.local) for p in self.parameters}
        self.recorded.append({p.placement.name: self.piece(p, g) for p, g in grads.items()})
        super()._update(norm, lr, stats)

    def piece(self, parameter: ShardedParameter, local: Tensor) -> Piece:
        name = parameter.placement.name
        if name not in self.offsets:
            self.offsets[name] = self._offset(parameter)
        return Piece(self.offsets[name], parameter.placement.global_shape, _array(local))

    def _offset(self, parameter: ShardedParameter) -> tuple[int, ...]:
        """Where this rank's values begin in the logical tensor."""
        logical = parameter.logical(parameter.local, self.mesh)
        if not isinstance(logical, DTensor):
            return (0,) * parameter.local.dim()
        return tuple(compute_local_shape_and_global_offset(logical.shape, logical.device_mesh, logical.placements)[1])


def build_engine(case: ParityCase, layout: dict[str, int], device: torch.device | None = None) -> RecordingEngine:
    """The case's model on this rank of the default process group, before its first step. Collective."""
    nodes = nodes_for(case.model, case.ranks_per_node)
    mesh = build_mesh(Topology(dist.get_world_size(), **layout), device or torch.device("cpu"), nodes=nodes)
    how: dict[str, Any] = {"precision": case.precision, "recompute": case.recompute, "pieces": case.pieces}
    how |= {"seed": case.seed, "optimizer": case.optimizer, "gradient_windows": case.gradient_windows}
    engine = RecordingEngine(case.model, mesh, **how)
    _set_start_bias(case, engine.model)
    return engine


def run_steps(engine: RecordingEngine, case: ParityCase, steps: range) -> RankTrace:
    """Train on the batches of these steps of the case. Collective."""
    result, at = RankTrace(Trace()), engine.mesh.coordinates
    for step in steps:
        batch = make_batch(case, step)
        rows = [micro_rows(case, engine.mesh.topology.dp, at.dp, m) for m in range(case.num_micro)]
        out = engine.train_step([batch.rows(*r) for r in rows], case.lr)
        figures, stats = result.figures, out.stats
        figures.loss.append(out.loss)
        figures.grad_norm.append(out.grad_norm)
        if stats.counts_LE is not None and stats.balance_L is not None and stats.z_L is not None and stats.dropped_L is not None:
            figures.counts.append(stats.counts_LE.cpu().numpy())
            figures.balance.append(_array(stats.balance_L))
            figures.z.append(_array(stats.z_L))
            figures.dropped.append(stats.dropped_L.cpu().numpy())
    result.gradients, engine.recorded = engine.recorded, []
    result.weights = {p.placement.name: engine.piece(p, p.local) for p in engine.parameters}
    result.figures.biases = {n: _array(b) for n, b in engine.model.named_buffers()}
    return result


def run_layout(case: ParityCase, layout: dict[str, int], device: torch.device | None = None) -> RankTrace:
    """The run on this rank of the default process group. `layout`: keyword arguments of `Topology` without world."""
    return run_steps(build_engine(case, layout, device), case, range(case.steps))


def assemble(pieces: list[Piece]) -> tuple[np.ndarray, float]:
    """The logical tensor from the pieces of all ranks, and the largest disagreement between ranks that hold the same values.

    Raises:
        ValueError: values that no rank holds.
    """
    whole = np.full(pieces[0].shape, np.nan)
    disagreement = 0.0
    for p in pieces:
        at = tuple(slice(o, o + n) for o, n in zip(p.offset, p.values.shape, strict=True))
        known = ~np.isnan(whole[at])
        if known.any():
            disagreement = max(disagreement, float(np.abs(whole[at] - p.values)[known].max(initial=0.0)))
        whole[at] = p.values
    if np.isnan(whole).any():
        raise ValueError(f"{int(np.isnan(whole).sum())} of {whole.size} values are held by no rank (or are NaN)")
    return whole, disagreement
