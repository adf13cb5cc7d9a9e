"""A dense model over the tokens of several domains, one layer at a time: what a router would see there, and what neurons do."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.moe_mlp import act
from ...moe.errors import CheckpointError
from ...moe.experts import FeedForward
from ...moe.hf.matrix import Given
from ...moe.model import Block
from ...moe.upcycle.cluster import balanced_kmeans, matrix_features
from ...moe.upcycle.draws import permutation
from .layers import Side, load_block, load_embedding
from .progress import Told

BATCH_TOKENS = 2048
"""Tokens that a layer computes at once; so many rows of its widest matrix are held beside the hidden states."""
KMEANS_STEPS = 20

Ids = npt.NDArray[np.int64]
Values = npt.NDArray[Any]
Sink = Callable[[int, Values], None]
"""Takes activations [tokens, neurons] of a layer, block by block."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is recorded.

    layers: ascending. groups: centroids of each domain. seq_len: tokens that attend to one another. picks: for each domain, the
    positions whose activations are taken. seed: of the groups' first centres.
    """

    layers: tuple[int, ...]
    groups: int
    seq_len: int
    picks: tuple[Ids, ...]
    seed: int


@dataclass(frozen=True)
class LayerRecord:
    """centroids_ED: float32, those of one domain are neighbours. own_share: for each domain, the share of its tokens whose
    largest logit is that of a centroid of their own, with rows brought to one length as `router_init` does."""

    layer: int
    centroids_ED: Values
    own_share: tuple[float, ...]


@torch.inference_mode()
def record_layers(side: Side, ids: Sequence[Ids], wanted: Wanted, sink: Sink, told: Told) -> list[LayerRecord]:
    """Run a dense model over the ids [T] of each domain as far as its last wanted layer.

    Memory is that of one layer, and of hidden states [tokens, D] twice: those on their way, and what the router of the layer
    would see. Computed in float32, or float64 where the weights are. Raises CheckpointError for values that are not finite.
    """
    begin_s = time.monotonic()
    kind = torch.float64 if side.parts["embed"].dtype == "F64" else torch.float32
    streams = [[load_embedding(side, ids_BS, kind) for ids_BS in _batches(ids_T, wanted.seq_len)] for ids_T in ids]
    total, done = (wanted.layers[-1] + 1) * sum(map(len, streams)), 0
    found = []
    for layer in range(wanted.layers[-1] + 1):
        block, seen = load_block(side, layer, kind), list[Tensor]()
        for ids_T, batches in zip(ids, streams, strict=True):
            parts = []
            for i, x_BSD in enumerate(batches):
                batches[i], z_TD = _through(block, x_BSD)
                if layer in wanted.layers:
                    parts.append(z_TD.cpu())
                done += 1
                told("recording", done, total, time.monotonic() - begin_s)
            if parts:
                # what lies behind the last token only fills its sequence
                seen.append(torch.cat(parts)[: len(ids_T)])
        if layer in wanted.layers:
            found.append(_layer(layer, seen, wanted))
            _activations(layer, block, side, seen, wanted, sink)
    return found


def _batches(ids_T: Ids, seq_len: int) -> list[Tensor]:
    """Sequences [rows, seq_len] of neighbouring ids, a few at a time; the last one filled up at its end, which no token sees."""
    rows = -(-len(ids_T) // seq_len)
    ids_BS = torch.zeros(rows * seq_len, dtype=torch.int64)
    ids_BS[: len(ids_T)] = torch.from_numpy(ids_T)
    return list(ids_BS.view(rows, seq_len).split(max(1, BATCH_TOKENS // seq_len)))


def _through(block: Block, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
    """(the residual stream [B, S, D] after a layer, what its feed-forward network was given [B * S, D]).

    Taken where the network takes it in: the router of a layer with experts stands there, whatever norms come before or after.
    """
    seen: list[Tensor] = []
    assert block.ffn is not None
    hook = block.ffn.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        out_BSD, _ = block(x_BSD, None, None)
    finally:
        hook.remove()
    (z_BSD,) = seen
    return out_BSD, z_BSD.flatten(0, 1)


def _layer(layer: int, seen: Sequence[Tensor], wanted: Wanted) -> LayerRecord:
    rows_ED = np.concatenate([_means(layer, d, z_TD.numpy(), wanted) for d, z_TD in enumerate(seen)])
    if not np.isfinite(rows_ED).all():
        raise CheckpointError(
            f"layer {layer} of the model gives values that are not finite: its weights are damaged, or of a wrong type"
        )
    sizes_E = np.sqrt(np.square(rows_ED).mean(axis=1, keepdims=True))
    router_ED = torch.from_numpy(rows_ED / np.where(sizes_E == 0, 1, sizes_E)).to(seen[0].dtype)
    own = []
    for d, z_TD in enumerate(seen):
        nearest_T = (z_TD @ router_ED.T).argmax(dim=-1) // wanted.groups
        own.append(int((nearest_T == d).sum()) / len(z_TD))
    return LayerRecord(layer, rows_ED.astype(np.float32), tuple(own))


def _means(layer: int, domain: int, z_TD: Values, wanted: Wanted) -> npt.NDArray[np.float64]:
    """Mean [1, D] of the tokens of a domain; or means [groups, D] of as many groups of one size (or one more) that are alike in
    direction."""
    if wanted.groups == 1:
        return _sum(z_TD)[None] / len(z_TD)
    features = matrix_features(Given(z_TD), 0, len(z_TD))
    sizes = tuple(len(group) for group in np.array_split(np.arange(len(z_TD)), wanted.groups))
    first = permutation(len(z_TD), wanted.seed, f"layers.{layer}.centroids.{domain}")
    labels_T = balanced_kmeans(features, sizes, KMEANS_STEPS, first)
    return np.stack([_sum(z_TD[labels_T == k]) / size for k, size in enumerate(sizes)])


def _sum(z_TD: Values) -> npt.NDArray[np.float64]:
    """In float64, row after row: neither threads nor batches change its order."""
    total = np.zeros(z_TD.shape[1])
    for start in range(0, len(z_TD), BATCH_TOKENS):
        total += z_TD[start : start + BATCH_TOKENS].astype(np.float64).sum(axis=0)
    return total


def _activations(layer: int, block: Block, side: Side, seen: Sequence[Tensor], wanted: Wanted, sink: Sink) -> None:
    assert block.ffn is not None
    for z_TD, picked in zip(seen, wanted.picks, strict=True):
        for rows in np.array_split(picked, -(-len(picked) // BATCH_TOKENS)) if len(picked) else []:
            sink(layer, gate_activations(block.ffn, z_TD[torch.from_numpy(rows)].to(side.device)).cpu().numpy())


def gate_activations(ffn: FeedForward, x_TD: Tensor) -> Tensor:
    """act(gate x) [T, F], or act(up x) in a network without a gate: which neurons a token switches on (MoEfication, Zhang et
    al., arXiv 2110.01786, section 3.2)."""
    bias_F = None if ffn.b13_2F is None else ffn.b13_2F[0]
    return act(F.linear(x_TD, ffn.w13_2FD[0], bias_F), ffn.kind.activation)
