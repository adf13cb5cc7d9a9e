"""A decoder-only language model whose feed-forward layers are dense or Mixture-of-Experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, RMSNorm
from .config import ModelConfig
from .experts import SwiGLU
from .init import init_weights
from .layer import MoELayer
from .load import Aux
from .loss import VocabShard, WholeVocab, cross_entropy_sum


class TokenEmbedding(nn.Module):
    """Rows of a table by token id."""

    def __init__(self, vocab_size: int, dim: int):
        super().__init__()
        self.weight_VD = nn.Parameter(torch.empty(vocab_size, dim))

    def forward(self, tokens_BS: Tensor) -> Tensor:
        """int64 ids [B, S] -> [B, S, D]."""
        return F.embedding(tokens_BS, self.weight_VD)


class OutputHead(nn.Module):
    """Final norm and projection to the vocabulary. `shard` says which of its rows are here."""

    def __init__(self, config: ModelConfig, embedding: TokenEmbedding):
        super().__init__()
        self.norm = RMSNorm(config.dim, config.norm_eps)
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
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.moe: MoELayer | None = None
        self.ffn: SwiGLU | None = None
        if config.is_moe_layer(index):
            assert config.moe is not None
            self.moe = MoELayer(config.dim, config.moe, activation=config.activation, init=False)
        else:
            assert config.dense_ffn_dim is not None
            self.ffn = SwiGLU(config.dim, config.dense_ffn_dim, config.activation)

    def forward(self, x_BSD: Tensor, valid_BS: Tensor | None, document_BS: Tensor | None) -> tuple[Tensor, Aux | None]:
        """x [B, S, D] -> [B, S, D] and the layer's `Aux` (None if dense)."""
        y_BSD = self.attention(self._before(self.attention_norm, x_BSD), document_BS)
        if self.attention.bo_D is not None:
            y_BSD = y_BSD + self.attention.bo_D
        x_BSD = x_BSD + self._after(self.attention_norm, y_BSD)
        z_BSD = self._before(self.ffn_norm, x_BSD)
        if self.moe is None:
            assert self.ffn is not None
            return x_BSD + self._after(self.ffn_norm, self.ffn(z_BSD)), None
        local_valid_BS = None if valid_BS is None else self.moe.peers.shard_sequence(valid_BS)
        y_BSD, aux = self.moe(z_BSD, local_valid_BS)
        # the routing itself is not kept beyond its layer: its sums are all that the step needs
        return x_BSD + self._after(self.ffn_norm, y_BSD), replace(aux, routing=None)

    def _before(self, norm: RMSNorm, x_BSD: Tensor) -> Tensor:
        """What attention or feed-forward sees of the residual stream."""
        return norm(x_BSD) if self.norm_order == "pre" else x_BSD

    def _after(self, norm: RMSNorm, y_BSD: Tensor) -> Tensor:
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
        self.embed = TokenEmbedding(config.vocab_size, config.dim)
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
        """
        x_BSD = self.embed(tokens_BS)
        if self.config.embed_scale != 1:
            x_BSD = x_BSD * self.config.embed_scale
        layers_aux: list[Aux] = []
        for block in self.blocks:
            x_BSD, aux = block(x_BSD, valid_BS, document_BS)
            if aux is not None:
                layers_aux.append(aux)
        aux = Aux.stack(layers_aux) if layers_aux else None
        if aux is not None and on_aux is not None:
            on_aux(aux)
        return self.head(x_BSD, labels_BS, valid_BS), aux
