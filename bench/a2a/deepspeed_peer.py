"""The same model with DeepSpeed's MoE layers, in a plain data-parallel loop.

Attention, norms, embedding and head are our modules with our weights; each MoE layer is `deepspeed.moe.layer.MoE` with
`ep_size` = all ranks, gate and experts with our weights. Told to drop no token, it pads every expert to the rows of the fullest
one on any rank; with a capacity, to that. The loop: forward, backward, one all-reduce of the dense gradients as one tensor, one
of loss and norm, clipping, fused AdamW. It takes no statistics and has no balance loss, so it does less than ours beside the
layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefold.moe.model import Model
from moefold.parallel.collectives import all_reduce
from moefold.parallel.engine import Engine, MicroBatch
from moefold.parallel.recorder import CommRecorder, Probe
from moefold.parallel.transfer import exchange_rows

from ..moe_layer import Expert, Shape
from .case import Case, Variant


class DeepSpeedFFN(nn.Module):
    """DeepSpeed's MoE where a block has its feed-forward network."""

    b2_D = None
    """It leaves no bias to the block."""

    def __init__(self, case: Case):
        super().__init__()
        from deepspeed.moe.layer import MoE

        shape = Shape("", T=0, D=case.dim, F=case.expert_dim, E=case.experts, K=case.top_k)
        # the deterministic choice that everybody makes
        how: dict[str, Any] = {"drop_tokens": False, "top2_2nd_expert_sampling": False}
        self.moe = MoE(case.dim, Expert(shape), case.experts, ep_size=case.world, k=case.top_k, **how)
        self.moe.set_deepspeed_parallelism()

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.moe(x_BSD)[0]

    @torch.no_grad()
    def load(self, router_ED: Tensor, w13_LGD: Tensor, w2_LDF: Tensor) -> None:
        """Take the router's weights and those of this rank's experts."""
        layer: Any = self.moe.deepspeed_moe
        layer.gate.wg.weight.copy_(router_ED)
        for expert, w13_GD, w2_DF in zip(layer.experts.deepspeed_experts, w13_LGD, w2_LDF, strict=True):
            expert.w13.weight.copy_(w13_GD)
            expert.w2.weight.copy_(w2_DF)


class Door:
    """Stands for `deepspeed.comm` in DeepSpeed's MoE: what goes through is recorded, and sent in either order.

    Every layer calls it for dispatch and for combine, in backward the other way round.
    """

    def __init__(self, comm: Any, probes: dict[str, Probe], receive_first: bool):
        self._comm, self._probes, self._receive_first = comm, probes, receive_first
        self._calls = 0
        self.rows = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._comm, name)

    def all_to_all_single(self, output: Tensor, tensor: Tensor, group: dist.ProcessGroup) -> None:
        backward = self._probes["dispatch"].recorder.direction == "backward"
        what = ("dispatch", "combine")[(self._calls + backward) % 2]
        self._calls += 1
        x_RD, world = tensor.flatten(0, -2), dist.get_world_size(group)
        splits = [x_RD.shape[0] // world] * world
        if what == "dispatch" and not backward:
            self.rows += x_RD.shape[0]
        if self._receive_first:
            output.copy_(exchange_rows(x_RD, splits, splits, group, self._probes[what]).view_as(output))
            return
        with self._probes[what].span("all_to_all", send=splits, receive=splits, row_bytes=x_RD.element_size() * x_RD.shape[1]):
            self._comm.all_to_all_single(output, tensor, group=group)


class DeepSpeedPeer:
    """The model on this rank, with the weights that the engine has now. Collective, as is `step`."""

    def __init__(self, case: Case, engine: Engine, recorder: CommRecorder):
        import deepspeed
        from deepspeed.moe import sharded_moe

        # it would compile a shared-memory all-reduce that only inference uses
        with mock.patch("deepspeed.comm.torch.build_shm_op", return_value=None):
            deepspeed.init_distributed("gloo")
        self._module, self.recorder, self.settings = sharded_moe, recorder, engine.settings
        self.model = Model(replace(engine.config, moe=None, dense_ffn_dim=1), init=False)
        for block in self.model.blocks:
            block.ffn = DeepSpeedFFN(case)  # type: ignore[assignment]
        self._load(engine)
        named = dict(self.model.named_parameters())
        self.experts = [p for name, p in named.items() if "deepspeed_experts" in name]
        self.dense = [p for name, p in named.items() if "deepspeed_experts" not in name]
        s = self.settings
        self.optimizer = torch.optim.AdamW(
            named.values(), lr=0.0, betas=s.betas, eps=s.eps, weight_decay=s.weight_decay, fused=True
        )
        self.world = engine.mesh.world_group
        self.layer_probes = {what: recorder.probe("ep", self.world, what) for what in ("dispatch", "combine")}
        self.gradients = recorder.probe("world", self.world, "gradients")
        self.statistics = recorder.probe("world", self.world, "statistics")

    @torch.no_grad()
    def _load(self, engine: Engine) -> None:
        theirs = dict(self.model.named_parameters())
        ours = {name: _whole(p, expert=".experts." in name) for name, p in engine.model.named_parameters()}
        for index, block in enumerate(self.model.blocks):
            parts = (f"layers.{index}.moe.{leaf}" for leaf in ("router.weight_ED", "experts.w13_E2FD", "experts.w2_EDF"))
            router_ED, w13_L2FD, w2_LDF = (ours.pop(name) for name in parts)
            assert isinstance(block.ffn, DeepSpeedFFN)
            block.ffn.load(router_ED, w13_L2FD.flatten(1, 2), w2_LDF)
        for name, value in ours.items():
            theirs[name].copy_(value)

    def step(self, batch: MicroBatch, tokens: int, variant: Variant) -> tuple[float, int]:
        """(loss, rows that all ranks sent to experts, padding included). The learning rate is 0."""
        for block in self.model.blocks:
            gate = block.ffn.moe.deepspeed_moe.gate  # type: ignore[union-attr]
            gate.drop_tokens, gate.capacity_factor = variant.capacity is not None, variant.capacity or 1.0
        self.optimizer.zero_grad(set_to_none=True)
        with self._door(not variant.own_all_to_all) as door:
            loss_sum, _ = self.model(batch.tokens_BS, labels_BS=batch.labels_BS)
            with self.recorder.during("backward"):
                (loss_sum / tokens).backward()
        grads = [p.grad for p in self.dense if p.grad is not None]
        assert len(grads) == len(self.dense), "every dense weight takes part"
        flat = torch.cat([g.flatten() for g in grads])
        all_reduce(flat, self.world, self.gradients, direction="update")
        # experts that no token has chosen have no gradient
        own = [p.grad for p in self.experts if p.grad is not None]
        squares = sum((g.square().sum() for g in own), torch.zeros(()))
        sums = torch.stack([loss_sum.detach().double(), squares.double(), torch.tensor(float(door.rows), dtype=torch.float64)])
        all_reduce(sums, self.world, self.statistics, direction="update")
        factor = self._clip_factor(flat.square().sum().double() + sums[1])
        for grad, summed in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(summed.view_as(grad) * factor)
        for grad in own:
            grad.mul_(factor)
        self.optimizer.step()
        return float(sums[0]) / tokens, int(sums[2])

    def _clip_factor(self, square_norm: Tensor) -> float:
        limit = self.settings.grad_clip
        return 1.0 if limit is None else min(1.0, limit / float(square_norm.sqrt()))

    @contextmanager
    def _door(self, receive_first: bool) -> Iterator[Door]:
        door = Door(self._module.dist, self.layer_probes, receive_first)
        with mock.patch.object(self._module, "dist", door):
            yield door


def _whole(parameter: Tensor, *, expert: bool) -> Tensor:
    """A copy's worth of a parameter: of experts those of this rank, of others all of it. Collective."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local() if expert else parameter.full_tensor()
