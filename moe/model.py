"""A decoder-only language model whose feed-forward layers are dense or Mixture-of-Experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Norm, make_norm
from .attention_experts import make_attention
from .config import ModelConfig
from .errors import DataError
from .experts import FeedForward, FfnKind
from .init import init_weights
from .layer import MoELayer
from .load import Aux
from .loss import VocabShard, WholeVocab, cross_entropy_sum


class TokenEmbedding(nn.Module):
    """Rows of a table by token id, times `embed_scale`, plus those of another by position if positions are learned."""

    positions_SD: nn.Parameter | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.scale = config.embed_scale
        self.weight_VD = nn.Parameter(torch.empty(config.vocab_size, config.dim))
        learned = config.positions == "learned"
        self.positions_SD = nn.Parameter(torch.empty(config.max_seq_len, config.dim)) if learned else None

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """int64 ids [B, S] -> [B, S, D]."""
        return place_tokens(F.embedding(tokens_BS, self.weight_VD), self.scale, self.positions_SD)


def place_tokens(x_BSD: Tensor, scale: float, positions_SD: Tensor | None, part: tuple[int, int] = (0, 1)) -> Tensor:
    """Scaled embeddings, and to each the row of its position. Positions are those in the sequence, whatever documents it holds.

    part: (i, n) where x holds the i-th of n equal parts of each sequence.
    Raises DataError for sequences that are longer than the table.
    """
    if scale != 1:
        x_BSD = x_BSD * scale
    if positions_SD is None:
        return x_BSD
    length, (index, parts) = x_BSD.shape[1], part
    if length * parts > positions_SD.shape[0]:
        what = f"sequences have {length * parts} tokens, but the model has learned {positions_SD.shape[0]} positions"
        raise DataError(f"{what} (model.max_seq_len); cut them, or take a model with rotary positions")
    return x_BSD + positions_SD[index * length : (index + 1) * length]


class OutputHead(nn.Module):
    """Final norm and projection to the vocabulary. `shard` says which of its rows are here."""

    def __init__(self, config: ModelConfig, embedding: TokenEmbedding):
        super().__init__()
        self.norm = make_norm(config)
        tied = embedding.weight_VD if config.tie_embeddings else nn.Parameter(torch.empty(config.vocab_size, config.dim))
        self.weight_VD, self.logits_scale = tied, config.logits_scale
        self.shard: VocabShard = WholeVocab()

    def forward(self, x_BSD: Tensor, labels_BS: Tensor | None = None, valid_BS: Tensor | None = None) -> Tensor:
        """Logits [B, S, V], or with labels the sum of the valid tokens' losses."""
        x_BSD = self.norm(x_BSD)
        if self.logits_scale != 1:
            x_BSD = x_BSD / self.logits_scale
        if labels_BS is None:
            return F.linear(x_BSD, self.weight_VD)
        valid_T = None if valid_BS is None else valid_BS.reshape(-1)
        return cross_entropy_sum(x_BSD.flatten(0, 1), self.weight_VD, labels_BS.reshape(-1), valid_T, self.shard)


class Block(nn.Module):
    """Attention and feed-forward, each added to the residual stream, with a norm before it, or after it."""

    def __init__(self, config: ModelConfig, index: int):
        super().__init__()
        self.norm_order, self.residual_scale = config.norm_order, config.residual_scale
        self.attention_norm = make_norm(config)
        self.attention = make_attention(config)
        self.ffn_norm = make_norm(config)
        self.moe: MoELayer | None = None
        self.ffn: FeedForward | None = None
        kind = FfnKind.of(config)
        if config.is_moe_layer(index):
            assert config.moe is not None
            self.moe = MoELayer(config.dim, config.moe, kind=kind, init=False)
        else:
            assert config.dense_ffn_dim is not None
            self.ffn = FeedForward(config.dim, config.dense_ffn_dim, kind)

    def forward(self, x_BSD: Tensor, valid_BS: Tensor | None, document_BS: Tensor | None) -> tuple[Tensor, Aux | None]:
        """x [B, S, D] -> [B, S, D] and the layer's `Aux` (None if dense)."""
        z_BSD = self._before(self.attention_norm, x_BSD)
        y_BSD = self.attention(z_BSD, document_BS)
        bias_BSD = self.attention.output_bias(z_BSD)
        if bias_BSD is not None:
            y_BSD = y_BSD + bias_BSD
        x_BSD = x_BSD + self._after(self.attention_norm, y_BSD)
        z_BSD = self._before(self.ffn_norm, x_BSD)
        if self.moe is None:
            assert self.ffn is not None
            y_BSD = self.ffn(z_BSD)
            if self.ffn.b2_D is not None:
                y_BSD = y_BSD + self.ffn.b2_D
            return x_BSD + self._after(self.ffn_norm, y_BSD), None
        local_valid_BS = None if valid_BS is None else self.moe.peers.shard_sequence(valid_BS)
        y_BSD, aux = self.moe(z_BSD, local_valid_BS)
        # the routing itself is not kept beyond its layer: its sums are all that the step needs
        return x_BSD + self._after(self.ffn_norm, y_BSD), replace(aux, routing=None)

    def _before(self, norm: Norm, x_BSD: Tensor) -> Tensor:
        """What attention or feed-forward sees of the residual stream."""
        return norm(x_BSD) if self.norm_order == "pre" else x_BSD

    def _after(self, norm: Norm, y_BSD: Tensor) -> Tensor:
        """What is added to the residual stream of an output."""
        y_BSD = norm(y_BSD) if self.norm_order == "post" else y_BSD
        return y_BSD if self.residual_scale == 1 else y_BSD * self.residual_scale


class Model(nn.Module):
    """The language model.

    Args:
        config: see `ModelConfig`.
        seed: of the initial weights.
        init: False leaves the weights unset, for a loader (used with the meta device).
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0, init: bool = True):
        super().__init__()
        self.config = config
        self.embed = TokenEmbedding(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_layers))
        self.head = OutputHead(config, self.embed)
        if init:
            init_weights(self, seed=seed, std=config.init_std, num_layers=config.num_layers)

    @property
    def blocks(self) -> list[Block]:
        """The layers, typed."""
        return cast(list[Block], list(self.layers))

    def forward(
        self,
        tokens_BS: Tensor,
        valid_BS: Tensor | None = None,
        *,
        labels_BS: Tensor | None = None,
        document_BS: Tensor | None = None,
        on_aux: Callable[[Aux], None] | None = None,
    ) -> tuple[Tensor, Aux | None]:
        """Run the model.

        Args:
            tokens_BS: int64 ids.
            valid_BS: bool, False for positions that count nowhere: not routed, no loss, no statistics. None = all valid.
            labels_BS: int64 ids to predict. None = return logits.
            document_BS: ids that keep attention inside each document.
            on_aux: called with the stacked `Aux` as soon as all tokens are routed, before the head, so that sums over ranks can
                travel while the head computes.

        Returns:
            Logits [B, S, V], or with labels the sum of the valid tokens' losses (a scalar in at least fp32; divide it by the
            valid tokens of the global batch); and `Aux` stacked over the MoE layers, None without any.

        Raises:
            DataError: sequences that are longer than the learned positions.
        """
        x_BSD = self.embed(tokens_BS)
        layers_aux: list[Aux] = []
        for block in self.blocks:
            x_BSD, aux = block(x_BSD, valid_BS, document_BS)
            if aux is not None:
                layers_aux.append(aux)
        aux = Aux.stack(layers_aux) if layers_aux else None
        if aux is not None and on_aux is not None:
            on_aux(aux)
        return self.head(x_BSD, labels_BS, valid_BS), aux
