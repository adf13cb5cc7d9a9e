"""AdamW over local shards, and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..moe.init import ZEROS
from .sharding import ShardedParameter


def decays(parameter: ShardedParameter) -> bool:
    """Weight decay applies to matrices, not to norms (vectors), biases or routers. Experts decay whether or not they got
    tokens."""
    place = parameter.placement
    bias = place.name.rsplit(".", 1)[-1] in ZEROS
    return len(place.global_shape) > 1 and place.kind != "whole" and not bias


class ShardedAdamW:
    """torch.optim.AdamW (Loshchilov & Hutter, arXiv 1711.05101) on this rank's shards.

    AdamW works element by element, so it needs to know nothing of layouts; running it on plain local tensors spares the
    distributed-tensor bookkeeping of every operation.
    """

    def __init__(
        self,
        parameters: Sequence[ShardedParameter],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        implementation: Literal["fused", "foreach"] = "fused",
    ):
        # ranks whose shard of an unevenly split parameter is empty have nothing to step
        self.parameters = [p for p in parameters if p.local.numel()]
        self.locals = [p.local.requires_grad_() for p in self.parameters]
        groups = [
            {"params": [x for p, x in zip(self.parameters, self.locals, strict=True) if decays(p)], "weight_decay": weight_decay},
            {"params": [x for p, x in zip(self.parameters, self.locals, strict=True) if not decays(p)], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, **{implementation: True})
        for x in self.locals:
            state = self.adamw.state[x]
            state["step"] = torch.zeros((), dtype=torch.float32, device=x.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(x), torch.zeros_like(x)

    def step(self, lr: float) -> None:
        """Update the shards with the gradients of their parameters, then drop the gradients."""
        for group in self.adamw.param_groups:
            group["lr"] = lr
        for p, x in zip(self.parameters, self.locals, strict=True):
            x.grad = p.local_grad
        self.adamw.step()
        for p, x in zip(self.parameters, self.locals, strict=True):
            x.grad = p.parameter.grad = None

    def moments(self) -> list[tuple[ShardedParameter, str, Tensor]]:
        """(parameter, `exp_avg` or `exp_avg_sq`, local tensor) of every shard, for checkpoints; loading writes in place."""
        keys = ("exp_avg", "exp_avg_sq")
        return [(p, k, self.adamw.state[x][k]) for p, x in zip(self.parameters, self.locals, strict=True) for k in keys]

    def set_step(self, step: int) -> None:
        """Restore the step count that bias correction depends on."""
        for x in self.locals:
            self.adamw.state[x]["step"].fill_(step)


def learning_rate(
    step: int,
    *,
    peak: float,
    total_steps: int,
    schedule: Literal["cosine", "wsd", "constant"],
    warmup_steps: int = 0,
    decay_steps: int | None = None,
    min_ratio: float = 0.1,
) -> float:
    """Learning rate of optimizer step `step` (from 0): linear warm-up, then the schedule, ending at peak * min_ratio.

    cosine: half a cosine from the end of the warm-up (Loshchilov & Hutter, arXiv 1608.03983). wsd: stable, then linear decay
    over the
    last `decay_steps` (default: a fifth of the run; arXiv 2404.06395). constant: no decay.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    if schedule == "cosine":
        done = (step - warmup_steps) / max(1, total_steps - 1 - warmup_steps)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    else:
        length = decay_steps or max(1, total_steps // 5)
        share = min(1.0, (total_steps - 1 - step) / length)
    return peak * (min_ratio + (1 - min_ratio) * max(0.0, share))
