"""One optimizer step over any layout: forward and backward of the micro-batches, gradient sums, clipping, update, statistics.

The loss of a step is (sum of token losses + auxiliary sums) / (valid tokens of the global batch). The divisor is known before
the first backward, and every reduction of gradients is a sum, so nothing depends on how the batch is split.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from ..moe.balance import Balancer, update_expert_bias
from ..moe.config import BalanceConfig, ModelConfig
from ..moe.errors import NumericsError
from ..moe.load import Aux
from ..moe.model import Model
from .apply import LayerPieces, moe_layers, parallelize
from .collectives import all_reduce
from .gradient_windows import GradientWindows, Windows
from .gradients import clip_gradients, complete_gradients, gradient_norm
from .mesh import Mesh
from .optimizer import ShardedAdamW
from .recorder import CommRecorder, probe_for
from .step_stats import StepStats, StepSums


@dataclass(frozen=True)
class MicroBatch:
    """What one rank feeds the model at once. Tensor-parallel ranks get the same one.

    tokens_BS, labels_BS: int64. valid_BS: bool, None = all. document_BS: ids for attention inside documents. domain_B: int64.
    sample_ids_B: int64 global sample numbers, named in error messages.
    """

    tokens_BS: Tensor
    labels_BS: Tensor
    valid_BS: Tensor | None = None
    document_BS: Tensor | None = None
    domain_B: Tensor | None = None
    sample_ids_B: Tensor | None = None

    def valid_tokens(self) -> int:
        return self.tokens_BS.numel() if self.valid_BS is None else int(self.valid_BS.sum())


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW settings that do not change over a run."""

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    grad_clip: float | None = 1.0
    implementation: str = "fused"


@dataclass(frozen=True)
class StepResult:
    """What a step did; the same on every rank except for the times. vote: whether any rank voted to stop after this step."""

    loss: float
    grad_norm: float
    tokens: int
    stats: StepStats
    optimizer_s: float
    vote: bool = False


class Engine:
    """A model spread over a mesh, with its optimizer and balance state.

    Args:
        config: the model.
        mesh: where it runs.
        seed: of the initial weights.
        precision, recompute, pieces: see `TrainConfig` and `ParallelConfig`; pieces may differ by layer.
        num_domains: sources of training text, for statistics.
        recorder: of this rank's communication; None = none is recorded.
        gradient_windows: where gradients are summed over data ranks, see `gradient_windows.Windows`.
    """

    def __init__(
        self,
        config: ModelConfig,
        mesh: Mesh,
        *,
        seed: int = 0,
        precision: str = "fp32",
        recompute: str = "none",
        pieces: LayerPieces = 1,
        optimizer: OptimizerSettings | None = None,
        num_domains: int = 1,
        recorder: CommRecorder | None = None,
        gradient_windows: Windows = False,
    ):
        self.config, self.mesh, self.num_domains, self.recorder = config, mesh, num_domains, recorder
        self.model: Model
        how: dict[str, Any] = {"precision": precision, "recompute": recompute, "pieces": pieces, "recorder": recorder}
        self.windows = None if gradient_windows is False else GradientWindows(gradient_windows, recorder)
        self.model, self.parameters = parallelize(config, mesh, seed=seed, windows=self.windows, **how)
        self.settings = optimizer or OptimizerSettings()
        self.optimizer = ShardedAdamW(
            self.parameters,
            lr=0.0,
            betas=self.settings.betas,
            eps=self.settings.eps,
            weight_decay=self.settings.weight_decay,
            implementation="foreach" if self.settings.implementation == "foreach" else "fused",
        )
        self.layers = moe_layers(self.model)
        balance = config.moe.balance if config.moe is not None else BalanceConfig(aux_loss_coeff=0.0)
        self.balancer = Balancer(balance, self.layers[0].peers if self.layers else None)
        self.step = 0

    def train_step(self, batches: Sequence[MicroBatch], lr: float, *, vote: bool = False) -> StepResult:
        """Run the micro-batches (the same number on every rank) and update the weights once. Collective.

        vote: whether this rank wants to stop; the result says whether any does, so that all stop after the same step.

        Raises:
            NumericsError: on every rank, before the update, when the loss or a gradient is not finite anywhere.
        """
        if self.recorder is not None:
            self.recorder.start_step(self.step)
        tokens = self._global_tokens(batches)
        exact_LE = self._exact_counts(batches)
        self.balancer.start_step(len(batches), exact_LE)
        sums = StepSums(self.mesh, self.num_domains, self.recorder)
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            self._sum_over_replicas(last)
            windows = nullcontext() if self.windows is None else self.windows.around(first=index == 0, last=last)
            self._forward_backward(batch, tokens, sums, windows)
        complete_gradients(self.parameters, self.mesh, self.recorder)
        norm = gradient_norm(self.parameters, self.mesh, self.recorder)
        stats = sums.reduce(tokens, vote)
        loss, grad_norm = stats.loss, float(norm)
        if self.recorder is not None:
            self.recorder.anchor()  # the host has just waited for the device
        if not (abs(loss) < float("inf") and grad_norm < float("inf")):
            self._raise_not_finite(batches, sums, loss, grad_norm)
        start_s = time.perf_counter()
        self._update(norm, lr, stats)
        return StepResult(loss, grad_norm, tokens, stats, time.perf_counter() - start_s, stats.vote)

    def set_compression(self, rate: float | None, sampled: int = 0) -> None:
        """What part of the rows travels to experts from now on, and how many tokens per layer the error is measured on.

        Acts on layers with compression, see `moe.compress.LSHCodec`. The same on every rank.
        """
        for layer in self.layers:
            if layer.codec is not None:
                layer.codec.rate, layer.codec.sampled = rate, sampled

    def _sum_over_replicas(self, now: bool) -> None:
        """Whether the next backward adds gradients over replicas; once per step is enough, on its last micro-batch."""
        if self.recorder is not None:
            self.recorder.sums_over_replicas = now
        if self.mesh.topology.hsdp > 1 and self.windows is None:
            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.set_requires_all_reduce(now, recurse=False)

    def _forward_backward(self, batch: MicroBatch, tokens: int, sums: StepSums, windows: AbstractContextManager[None]) -> None:
        terms: list[Tensor] = []
        loss_sum, aux = self.model(
            batch.tokens_BS,
            batch.valid_BS,
            labels_BS=batch.labels_BS,
            document_BS=batch.document_BS,
            on_aux=lambda aux: terms.append(self.balancer.losses(aux)),
        )
        total = loss_sum if not terms else loss_sum + terms[0].to(loss_sum.dtype)
        with windows, nullcontext() if self.recorder is None else self.recorder.during("backward"):
            (total / tokens).backward()
        sums.add(loss_sum.detach(), aux, batch.domain_B)

    @torch.no_grad()
    def _update(self, norm: Tensor, lr: float, stats: StepStats) -> None:
        if self.settings.grad_clip is not None:
            clip_gradients(self.parameters, norm, self.settings.grad_clip)
        self.optimizer.step(lr)
        if stats.counts_LE is not None:
            self.balancer.end_step(stats.counts_LE)
            for layer, counts_E in zip(self.layers, stats.counts_LE, strict=True):
                if layer.router.biased:
                    update_expert_bias(layer.router.expert_bias_E, counts_E, layer.config.balance.bias_update_rate)
        self.step += 1

    @torch.no_grad()
    def _exact_counts(self, batches: Sequence[MicroBatch]) -> Tensor | None:
        """Global counts [L, E] of the step by a pass without gradients, for `accumulation = "exact"`."""
        c = self.balancer.config
        if c.scope != "global" or c.accumulation != "exact" or not c.aux_loss_coeff or not self.layers:
            return None
        counts_LE: Tensor | None = None
        for batch in batches:
            aux: Aux = self.model(batch.tokens_BS, batch.valid_BS, labels_BS=batch.labels_BS, document_BS=batch.document_BS)[1]
            counts_LE = aux.counts_E if counts_LE is None else counts_LE + aux.counts_E
        assert counts_LE is not None
        return self.balancer.peers.start_sum(counts_LE, "global")().double()

    def _global_tokens(self, batches: Sequence[MicroBatch]) -> int:
        """Valid tokens of the step over all ranks, counted once per data rank; at least 1."""
        count = torch.tensor(sum(b.valid_tokens() for b in batches), dtype=torch.int64, device=self.mesh.device)
        if self.mesh.topology.world > 1:
            world = self.mesh.world_group
            all_reduce(count, world, probe_for(self.recorder, "world", world, "tokens"))
        return max(1, int(count) // self.mesh.topology.tp)

    @torch.no_grad()
    def evaluate(self, batch: MicroBatch) -> tuple[Tensor, Aux | None]:
        """Sum of the losses of one batch on this data rank (float scalar tensor), without touching any training state."""
        loss_sum, aux = self.model(batch.tokens_BS, batch.valid_BS, labels_BS=batch.labels_BS, document_BS=batch.document_BS)
        return loss_sum, aux

    @torch.no_grad()
    def logits(self, tokens_BS: Tensor) -> Tensor:
        """Logits [B, S, V] of the whole vocabulary. Collective: every rank passes the same tokens."""
        return self.model(tokens_BS)[0]

    def reshard(self) -> None:
        """Drop gathered weights after a pass without backward, before weights are overwritten."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _raise_not_finite(self, batches: Sequence[MicroBatch], sums: StepSums, loss: float, grad_norm: float) -> None:
        """Every rank raises the same error, naming the ranks whose own loss or gradients went wrong and their samples."""
        bad_grads = [p.placement.name for p in self.parameters if (g := p.local_grad) is not None and not g.isfinite().all()]
        ids = [i for b in batches if b.sample_ids_B is not None for i in b.sample_ids_B.tolist()]
        mine = {"rank": self.mesh.rank, "loss": float(sums.loss), "bad": bad_grads[:3], "samples": ids}
        reports: list[dict] = [mine]
        if self.mesh.topology.world > 1:
            reports = [{}] * self.mesh.topology.world
            dist.all_gather_object(reports, mine, group=self.mesh.world_group)
        losses = [r for r in reports if not abs(r["loss"]) < float("inf")]
        guilty = losses or [r for r in reports if r["bad"]] or reports
        lines = [
            f"  rank {r['rank']}: loss sum {r['loss']:.6g}; not finite: {', '.join(r['bad']) or 'no local gradient'}; "
            f"samples {r['samples']}"
            for r in guilty
        ]
        raise NumericsError(
            f"step {self.step}: loss {loss:.6g}, gradient norm {grad_norm:.6g}; the weights were not updated\n" + "\n".join(lines)
        )
