"""One layer of a model at a time, loaded from parts and computed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...moe.config import ModelConfig
from ...moe.hf.families import FAMILIES, NATIVE, write_tensors
from ...moe.hf.matrix import Matrix
from ...moe.model import Block, OutputHead, TokenEmbedding, place_tokens


@dataclass(frozen=True)
class Side:
    """A model by its parts. through: type that weights are rounded to before anything else. device: where it is computed."""

    config: ModelConfig
    parts: Mapping[str, Matrix]
    through: torch.dtype | None
    device: torch.device

    @cached_property
    def native(self) -> dict[str, Matrix]:
        """All tensors, by the names of our model's state."""
        return write_tensors(FAMILIES[NATIVE], self.config, self.parts)

    def tensors(self, prefix: str) -> dict[str, Matrix]:
        """Tensors below `prefix`, by the names that modules have."""
        return {name.removeprefix(prefix): matrix for name, matrix in self.native.items() if name.startswith(prefix)}


def load_block(side: Side, index: int, kind: torch.dtype) -> Block:
    """Layer `index` with its weights, in `kind`; the router in float32 at least."""
    with torch.device("meta"):
        block = Block(side.config, index)
    block = block.to(kind).to_empty(device=side.device)
    _fill(block, side.tensors(f"layers.{index}."), side.through)
    return block


def load_embedding(side: Side, ids_BS: Tensor, kind: torch.dtype) -> Tensor:
    """Embeddings [B, S, D] of token ids; only their rows are read."""
    matrix = side.parts["embed"]
    unique, where = ids_BS.unique(return_inverse=True)
    rows = torch.from_numpy(np.concatenate([matrix.rows(i, i + 1) for i in unique.tolist()]))
    rows = rows.to(side.through) if side.through is not None else rows
    positions = None
    if "positions" in side.parts:
        positions = torch.from_numpy(np.array(side.parts["positions"].rows(0, ids_BS.shape[1])))
        positions = (positions.to(side.through) if side.through is not None else positions).to(side.device, kind)
    return place_tokens(rows.to(side.device, kind)[where.to(side.device)], side.config.embed_scale, positions)


def load_logits(side: Side, x_BSD: Tensor) -> Tensor:
    """Logits [B, S, V] of the residual stream after the last layer, on the CPU."""
    config, kind = side.config, x_BSD.dtype
    with torch.device("meta"):
        head = OutputHead(config, TokenEmbedding(config))
    head = head.to(kind).to_empty(device=side.device)
    tensors = side.tensors("head.")
    if config.tie_embeddings:
        tensors["weight_VD"] = side.parts["embed"]
    _fill(head, tensors, side.through)
    logits: Tensor = head(x_BSD)
    return logits.cpu()


def added(block: Block, config: ModelConfig, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """(the residual stream after a layer, what its feed-forward network has added), both [B, S, D].

    Taken where the network puts it out: subtracting streams would lose the digits in which they agree.
    """
    seen: list[Tensor] = []
    inner = block.ffn if block.moe is None else block.moe
    assert inner is not None
    hook = inner.register_forward_hook(lambda _, __, out: seen.append(out if isinstance(out, Tensor) else out[0]))
    try:
        out_BSD, _ = block(x_BSD, None, None)
    finally:
        hook.remove()
    (y_BSD,) = seen
    if block.ffn is not None and block.ffn.b2_D is not None:
        y_BSD = y_BSD + block.ffn.b2_D
    y_BSD = block.ffn_norm(y_BSD) if config.norm_order == "post" else y_BSD
    return out_BSD, y_BSD * config.residual_scale


def _fill(module: torch.nn.Module, tensors: Mapping[str, Matrix], through: torch.dtype | None) -> None:
    """Copy matrices into the parameters and buffers of their names, some rows at a time."""
    places = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if places.keys() != tensors.keys():
        raise AssertionError(f"weights and tensors differ: {sorted(places.keys() ^ tensors.keys())}")
    with torch.no_grad():
        for name, matrix in tensors.items():
            rows = places[name].view(matrix.num_rows, matrix.cols)
            for start, stop in matrix.steps():
                values = torch.from_numpy(np.array(matrix.rows(start, stop)))
                rows[start:stop].copy_(values.to(through) if through is not None else values)
