"""Tensor parallelism with sequence parallelism, attached to a model from outside.

Between blocks a rank holds its share of each sequence's positions. Attention and dense feed-forward gather the positions, work on
their share of heads or hidden width, and scatter the sum. Norms, routers, shared experts and the output biases of attention and
feed-forward, added after the sum, work on the local positions, and so do learned positions, of which a rank adds its part; so
their weights are whole on every rank and their gradients are summed over the group. So are those of the router of attention
experts, which weighs what the heads of a rank put out. The vocabulary of embedding and head is sharded.
(Megatron-LM, arXiv 1909.08053; sequence parallelism: arXiv 2205.05198.)
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..moe.attention import Attention, RMSNorm
from ..moe.model import Model, TokenEmbedding, place_tokens
from .collectives import GatherSequence, Group, ScatterSequence, SumOverGroup, all_gather_dim, all_reduce
from .recorder import CommRecorder, Probe, probe_for


class MeshVocab:
    """This rank's rows of the vocabulary; see `moe.loss.VocabShard`."""

    def __init__(self, rows: int, group: Group, probe: Probe | None = None):
        self.group, self.probe, self.offset = group, probe, dist.get_rank(group) * rows

    def max(self, x: Tensor) -> Tensor:
        return all_reduce(x.clone(), self.group, self.probe, op=dist.ReduceOp.MAX)

    def sum(self, x: Tensor) -> Tensor:
        return all_reduce(x.clone(), self.group, self.probe)


class ShardedEmbedding(nn.Module):
    """Look up the ids of this rank's rows, sum over ranks, keep this rank's positions and place them: int64 [B, S] ->
    [B, S / tp, D]."""

    def __init__(self, embedding: TokenEmbedding, group: Group, probe: Probe | None = None):
        super().__init__()
        self.weight_VD, self.positions_SD, self.scale = embedding.weight_VD, embedding.positions_SD, embedding.scale
        self.group, self.probe, self.tp_rank = group, probe, dist.get_rank(group)

    def forward(self, tokens_BS: Tensor) -> Tensor:
        rows = self.weight_VD.shape[0]
        local_BS = tokens_BS - self.tp_rank * rows
        here_BS = (local_BS >= 0) & (local_BS < rows)
        x_BSD = F.embedding(local_BS.clamp(0, rows - 1), self.weight_VD) * here_BS[..., None]
        x_BSD = ScatterSequence.apply(x_BSD, self.group, self.probe)
        return place_tokens(x_BSD, self.scale, self.positions_SD, (self.tp_rank, dist.get_world_size(self.group)))


class ShardedRMSNorm(nn.Module):
    """RMSNorm over a width that is sharded over the group (QK-norm over the full projection)."""

    def __init__(self, norm: RMSNorm, group: Group, probe: Probe | None = None):
        super().__init__()
        self.weight_D, self.eps, self.group, self.probe = norm.weight_D, norm.eps, group, probe

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        squares = SumOverGroup.apply(x.to(wide).square().sum(-1, keepdim=True), self.group, self.probe)
        mean = squares / (x.shape[-1] * dist.get_world_size(self.group))
        return (x.to(wide) * torch.rsqrt(mean + self.eps) * self.weight_D.to(wide)).to(x.dtype)


def _surround(module: nn.Module, group: Group, gather: Probe | None, scatter: Probe | None) -> None:
    """Gather positions before the module and scatter the sum of its outputs after it."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return GatherSequence.apply(args[0], group, gather), *args[1:]

    def after(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return ScatterSequence.apply(output, group, scatter)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)


def attach_tensor_parallel(model: Model, group: Group, recorder: CommRecorder | None = None) -> None:
    """Make a model whose weights are already this rank's shards run on them. No-op for a group of one."""
    if dist.get_world_size(group) == 1:
        return

    def probe(what: str, layer: int | None = None) -> Probe | None:
        return probe_for(recorder, "tp", group, what, layer)

    model.embed = ShardedEmbedding(model.embed, group, probe("embedding"))  # type: ignore[assignment]
    for index, block in enumerate(model.blocks):
        gather, scatter = probe("gather_sequence", index), probe("scatter_sequence", index)
        _surround(block.attention, group, gather, scatter)
        if block.attention.qk_norm == "full":
            norm = probe("qk_norm", index)
            # of every attention expert, where there are several
            for attention in [m for m in block.attention.modules() if isinstance(m, Attention)]:
                for name in ("q_norm", "k_norm"):
                    if (whole := getattr(attention, name, None)) is not None:
                        setattr(attention, name, ShardedRMSNorm(whole, group, norm))
        if block.ffn is not None:
            _surround(block.ffn, group, gather, scatter)
    model.head.shard = MeshVocab(model.head.weight_VD.shape[0], group, probe("loss"))
    before_head = probe("gather_sequence")
    model.head.norm.register_forward_hook(lambda _, __, x_BSD: GatherSequence.apply(x_BSD, group, before_head))

    def whole_logits(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        # without labels the head returns logits [B, S, V / tp]; they are for sampling and carry no gradient
        return all_gather_dim(output.detach(), 2, group) if output.dim() == 3 else output

    model.head.register_forward_hook(whole_logits)
