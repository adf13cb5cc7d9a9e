"""What the experts' products cost on this cluster, alone and beside an exchange."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from ..kernels.backend import Backend
from ..kernels.moe_mlp import choose_backend, moe_mlp
from ..kernels.moe_mlp.late import WITH_LATE
from ..moe.experts import FfnKind
from .cost_model import ROW, ComputeFit, Watch, fit_compute, repeats, to_peers
from .mesh import Mesh
from .transfer import Transfer, exchange_rows


def late_weights(kernels: Backend, kind: FfnKind, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the gradients of experts' weights are computed while those of rows travel, see `LateGradients`."""
    x = torch.empty(0, dtype=dtype, device=device)
    return choose_backend(x, kernels, kind.activation, gated=kind.gated, biased=kind.biased) in WITH_LATE


def _evenly(rows: int, num_experts: int, device: torch.device) -> torch.Tensor:
    """Row counts [E] that differ by at most one."""
    return torch.tensor([rows // num_experts + (e < rows % num_experts) for e in range(num_experts)], device=device)


def measure_experts(
    num_experts: int,
    dim: int,
    expert_dim: int,
    rows: Sequence[int],
    *,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Backend = "auto",
    kind: FfnKind | None = None,
    group: dist.ProcessGroup | None = None,
    budget_s: float = 1.0,
) -> tuple[ComputeFit, ComputeFit]:
    """Time forward and backward of the experts of one rank on evenly spread rows; collective where there is a `group`.

    Args:
        num_experts, expert_dim: those of this rank. rows: row counts to measure, all experts together; at least two.
        kind: of network, None = `FfnKind()`.
        group: ranks that compute at the same time; the slowest one counts.

    Returns:
        Models by operations: 2 dim expert_dim for each matrix of a network and a row forward, twice that backward.
    """
    generator, kind = torch.Generator().manual_seed(0), kind or FfnKind()

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * dim**-0.5).to(device, dtype).requires_grad_()

    w13_E2FD, w2_EDF = normal(num_experts, kind.inner, expert_dim, dim), normal(num_experts, dim, expert_dim)
    b13_E2F = normal(num_experts, kind.inner, expert_dim) if kind.biased else None
    watch = Watch(group, device)
    forward: list[tuple[float, list[float]]] = []
    backward: list[tuple[float, list[float]]] = []
    for index, count in enumerate(sorted(set(rows))):
        x_RD = normal(count, dim)
        counts_E = _evenly(count, num_experts, device)
        share_s = budget_s / len(set(rows))
        flops = 2.0 * (kind.inner + 1) * dim * expert_dim * count

        def there(x_RD: torch.Tensor = x_RD, counts_E: torch.Tensor = counts_E) -> torch.Tensor:
            return moe_mlp(x_RD, w13_E2FD, w2_EDF, counts_E, kernels, kind.activation, b13_E2F)

        y_RD = there()

        def and_back(y_RD: torch.Tensor = y_RD) -> None:
            y_RD.backward(torch.ones_like(y_RD), retain_graph=True)

        for run, found, work in ((there, forward, flops), (and_back, backward, 2 * flops)):
            watch.times(run, 1 + (index == 0))  # memory, threads and compilation are not the experts' cost
            once_s = watch.times(run, 1)[0]
            found.append((work, watch.times(run, repeats(share_s / 2, once_s))))
    return fit_compute(forward), fit_compute(backward)


def contention(exchange_s: float, compute_s: float, both_s: float) -> float:
    """How much slower exchange and computation run while both do, from their times alone and started together.

    1 = they do not disturb each other (the longer one is all there is), 2 = nothing is gained for equal times. Where ranks
    share cores with their transport it lies between.
    """
    return max(1.0, 1 + (both_s - max(exchange_s, compute_s)) / min(exchange_s, compute_s))


def measure_contention(
    mesh: Mesh,
    size: int,
    num_experts: int,
    dim: int,
    expert_dim: int,
    rows: int,
    *,
    dtype: torch.dtype,
    kernels: Backend = "auto",
    kind: FfnKind | None = None,
    budget_s: float = 1.0,
) -> float:
    """`contention` of an exchange of `size` bytes over the flat group and the experts' forward on `rows` rows. Collective."""
    group, device, kind = mesh.ep_etp_group, mesh.device, kind or FfnKind()
    watch = Watch(mesh.world_group, device)
    split = to_peers(group, size)
    sent_RD = torch.ones(sum(split), ROW, device=device)
    w13_E2FD = torch.full((num_experts, kind.inner, expert_dim, dim), dim**-0.5, dtype=dtype, device=device)
    w2_EDF = torch.full((num_experts, dim, expert_dim), dim**-0.5, dtype=dtype, device=device)
    x_RD = torch.ones(rows, dim, dtype=dtype, device=device)
    counts_E = _evenly(rows, num_experts, device)

    b13_E2F = w13_E2FD[..., 0].contiguous() if kind.biased else None

    def compute() -> object:
        return moe_mlp(x_RD, w13_E2FD, w2_EDF, counts_E, kernels, kind.activation, b13_E2F)

    def both() -> object:
        transfer = Transfer(split, split, group)
        arriving_RD = transfer.start(sent_RD)
        compute()
        return transfer.finish(arriving_RD)

    fastest_s = []
    with torch.no_grad():
        for run in (lambda: exchange_rows(sent_RD, split, split, group), compute, both):
            once_s = watch.times(run, 1)[0]
            # not medians: a difference of times that something else has lengthened says nothing
            fastest_s.append(min(watch.times(run, repeats(budget_s / 3 - once_s, once_s))))
    return contention(*fastest_s)
