"""What the parts of a step cost here, measured alone: gathers and sums of sharding, activations of tensor parallelism, LSH
compression, rows in one byte. Every rank measures at once, as in a step: they share links, and on a CPU cores."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..kernels.permute import permute, unpermute
from ..moe.compress import LSHCodec
from ..moe.config import ModelConfig, MoEConfig
from ..moe.dispatch import Computing, Dispatcher, DispatchPlan, Experts, Flight, make_plan
from ..moe.init import init_weights
from ..moe.model import Model
from .collectives import all_gather_dim, all_reduce, reduce_scatter_dim
from .mesh import Mesh
from .sharding import place
from .wire import Wire

Axis = Literal["dp_shard", "dp_replicate", "edp_shard", "edp_replicate", "tp"]
REPEATS = 5
MOST_S = 1.0
"""Seconds for the repetitions of one measurement; at least two are made."""


@dataclass(frozen=True)
class Call:
    """A collective of a step. nbytes: of the whole tensor, before a scatter or after a gather. times: per step."""

    op: Literal["all_gather", "reduce_scatter", "all_reduce"]
    axis: Axis
    nbytes: int
    times: int


@dataclass(frozen=True)
class Measured:
    """Seconds, as the slowest rank saw them, and their relative spread."""

    seconds: float
    spread: float = 0.0


def sharding_calls(model: ModelConfig, mesh: Mesh, *, tokens: int, micros: int, value_bytes: int) -> list[Call]:
    """The collectives of FSDP and tensor parallelism in one step, by formula.

    Weights of a block are gathered for forward and for backward, those outside of blocks once; gradients (fp32) are scattered
    after each backward and summed over replicas in the last. A block's input to attention, or to a dense feed-forward layer, is
    gathered over tp and its output scattered, in both directions. Sums of a few numbers are left out.

    tokens: of a data rank's micro-batch. value_bytes: of one weight or activation in computation.
    """
    topology, calls = mesh.topology, []
    for (unit, kind), count in _unit_sizes(model, mesh).items():
        shard, replicate = getattr(topology, f"{kind}_shard"), getattr(topology, f"{kind}_replicate")
        if shard > 1:
            passes = 1 if unit == "root" else 2
            calls.append(Call("all_gather", f"{kind}_shard", count * value_bytes, passes * micros))  # type: ignore[arg-type]
            calls.append(Call("reduce_scatter", f"{kind}_shard", 4 * count, micros))  # type: ignore[arg-type]
        if replicate > 1:
            calls.append(Call("all_reduce", f"{kind}_replicate", 4 * count // shard, 1))  # type: ignore[arg-type]
    if topology.tp > 1:
        blocks = model.num_layers + sum(not model.is_moe_layer(i) for i in range(model.num_layers))
        activation_bytes = tokens * model.dim * value_bytes
        # and once each around embedding and head
        calls.append(Call("all_gather", "tp", activation_bytes, 2 * micros * (blocks + 1)))
        calls.append(Call("reduce_scatter", "tp", activation_bytes, 2 * micros * (blocks + 1)))
    return calls


def parameters_of(model: ModelConfig, mesh: Mesh) -> int:
    """That one rank updates, without those that every rank holds whole."""
    sizes = _unit_sizes(model, mesh).items()
    return sum(count // getattr(mesh.topology, f"{kind}_shard") for (_, kind), count in sizes)


def _unit_sizes(model: ModelConfig, mesh: Mesh) -> dict[tuple[str, str], int]:
    """Parameters of each unit that FSDP gathers, by (block or "root", "dp" or "edp"), after tp, ep and etp have split them."""
    topology, sizes = mesh.topology, dict[tuple[str, str], int]()
    with torch.device("meta"):
        whole = Model(model, init=False)
    for name, parameter in whole.named_parameters():
        p = place(name, tuple(parameter.shape), mesh, full_qk_norm=model.qk_norm == "full")
        if p.kind == "whole":
            continue
        split = 1 if p.tp_dim is None else topology.etp if p.kind == "expert" else topology.tp
        split *= topology.ep if p.kind == "expert" else 1
        unit = ".".join(name.split(".")[:2]) if name.startswith("layers.") else "root"
        key = (unit, "edp" if p.kind == "expert" else "dp")
        sizes[key] = sizes.get(key, 0) + parameter.numel() // split
    return sizes


def measure_calls(calls: Sequence[Call], mesh: Mesh) -> Measured:
    """Seconds of all these collectives, one after the other. Collective."""
    total_s = error_s = 0.0
    known: dict[tuple[str, str, int], Measured] = {}
    for call in calls:
        key = (call.op, call.axis, call.nbytes)
        if key not in known:
            known[key] = timed(_run(call, mesh), mesh.world_group, mesh.device)
        total_s += call.times * known[key].seconds
        error_s += call.times * known[key].seconds * known[key].spread
    return Measured(total_s, error_s / total_s if total_s else 0.0)


def _run(call: Call, mesh: Mesh) -> Callable[[], object]:
    view = mesh.expert if call.axis.startswith("edp") else mesh.dense
    group = view.get_group(call.axis)
    size = dist.get_world_size(group)
    part = max(1, call.nbytes // 4 // size)
    x = torch.zeros(part * (1 if call.op == "all_gather" else size), device=mesh.device)
    if call.op == "all_gather":
        return lambda: all_gather_dim(x, 0, group)
    return (lambda: reduce_scatter_dim(x, 0, group)) if call.op == "reduce_scatter" else (lambda: all_reduce(x, group))


def measure_codec(moe: MoEConfig, dim: int, tokens: int, rate: float, *, dtype: torch.dtype, mesh: Mesh) -> Measured:
    """Forward and backward of LSH compression around nothing: hashing, means and restoring of `tokens` tokens. Collective."""
    codec = LSHCodec(dim, moe).to(mesh.device)
    init_weights(codec, seed=0)
    codec.rate = rate
    generator = torch.Generator().manual_seed(mesh.rank)
    x_TD = torch.randn(tokens, dim, generator=generator).to(mesh.device, dtype).requires_grad_()
    indices_TK = torch.rand(tokens, moe.num_experts, generator=generator).argsort(1)[:, : moe.top_k].contiguous().to(mesh.device)
    weights_TK = torch.full(indices_TK.shape, 1 / moe.top_k, device=mesh.device)
    plan = make_plan(indices_TK, weights_TK, moe.num_experts, None, moe.kernels)

    def run() -> None:
        y_TD, _ = codec(_Mirror(), x_TD, plan, _Untouched())
        y_TD.backward(torch.ones_like(y_TD))

    return timed(run, mesh.world_group, mesh.device)


class _Mirror(Dispatcher):
    """Rows come back as they are, at once."""

    def start(self, xs_TD: Sequence[Tensor], plans: Sequence[DispatchPlan]) -> Sequence[Flight]:
        return [_Reflected(x_TD) for x_TD in xs_TD]


class _Reflected(Flight):
    travels = False

    def __init__(self, x_TD: Tensor):
        self.x_TD = x_TD

    def land(self, experts: Computing) -> None:
        """There is nothing to wait for."""

    def finish(self, shared_TD: Tensor | None = None) -> Tensor:
        y_TD = self.x_TD * 1.0
        return y_TD if shared_TD is None else y_TD + shared_TD


class _Untouched:
    """Experts that give rows back as they are."""

    def __call__(self, x_TD: Tensor, work: Callable[[Tensor, Experts], Tensor]) -> Tensor:
        return work(x_TD, self)

    def late(self) -> Computing:
        return self

    def compute(self, x: Tensor, counts_E: Tensor, plan: DispatchPlan | None = None, shared_TD: Tensor | None = None) -> Tensor:
        if plan is None:
            return x * 1.0
        if plan.kept_TK is not None and x.device.type == "cpu":
            plan = plan.cut(int(counts_E.sum()))  # as experts do
        rows_RD = permute(x, plan.order_R, plan.row_TK, plan.kept_TK, plan.kernels)
        return unpermute(rows_RD, plan.weights_TK, plan.order_R, plan.row_TK, plan.kept_TK, shared_TD, plan.kernels)


def send_rows(
    dispatcher: Dispatcher, indices_TK: Tensor, num_experts: int, dim: int, *, times: int, dtype: torch.dtype, mesh: Mesh
) -> None:
    """Send rows of this rank's choices to experts that do nothing, and back, in both directions; `times` times. Collective."""
    x_TD = torch.ones(indices_TK.shape[0], dim, device=mesh.device, dtype=dtype, requires_grad=True)
    weights_TK = torch.full(indices_TK.shape, 1 / indices_TK.shape[1], device=mesh.device).requires_grad_()
    for _ in range(times):
        y_TD = dispatcher(x_TD, make_plan(indices_TK, weights_TK, num_experts), _Untouched())
        y_TD.backward(torch.ones_like(y_TD))


def measure_wire(wire: Wire, dim: int, rows: int, *, dtype: torch.dtype, mesh: Mesh) -> Measured:
    """To pack and unpack `rows` rows once. Collective."""
    x_RD = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0)).to(mesh.device, dtype)
    return timed(lambda: wire.unpack(wire.pack(x_RD), dim, dtype), mesh.world_group, mesh.device)


def timed(run: Callable[[], object], group: dist.ProcessGroup, device: torch.device) -> Measured:
    """Time something on all ranks at once, begun together; the first run is not counted. Collective."""
    once_s, seconds = _once(run, group, device), []
    for _ in range(max(2, min(REPEATS, int(MOST_S / max(once_s, 1e-9))))):
        seconds.append(_once(run, group, device))
    middle = statistics.median(seconds)
    return Measured(middle, statistics.median(abs(s - middle) for s in seconds) / middle)


def _once(run: Callable[[], object], group: dist.ProcessGroup, device: torch.device) -> float:
    """Seconds of the slowest rank."""
    dist.barrier(group=group)
    start_s = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    took = torch.tensor(time.perf_counter() - start_s, dtype=torch.float64, device=device)
    dist.all_reduce(took, op=dist.ReduceOp.MAX, group=group)
    return float(took)
