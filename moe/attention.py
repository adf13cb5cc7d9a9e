"""Causal self-attention with rotary positions and grouped queries."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig, RopeScaling


class RMSNorm(nn.Module):
    """x / rms(x) * weight, computed in at least fp32 (Zhang & Sennrich, arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight_D = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], same dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), x.shape[-1:], self.weight_D.to(wide), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias, computed in at least fp32 (Ba et al., arXiv 1607.06450)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight_D, self.bias_D = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D], same dtype."""
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x.to(wide), x.shape[-1:], self.weight_D.to(wide), self.bias_D.to(wide), self.eps).to(x.dtype)


Norm = RMSNorm | LayerNorm


def make_norm(config: ModelConfig) -> Norm:
    """The norm over the model's width that layers and head have."""
    return (LayerNorm if config.norm == "layer" else RMSNorm)(config.dim, config.norm_eps)


def rope_tables(
    seq_len: int, rotary_dim: int, theta: float, like: Tensor, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin [S, rotary_dim / 2] of the rotary angles position * theta^(-2i / rotary_dim) (Su et al., arXiv 2104.09864),
    with frequencies as `scaling` changes them."""
    wide = torch.promote_types(like.dtype, torch.float32)
    exponent = torch.arange(0, rotary_dim, 2, dtype=wide, device=like.device) / rotary_dim
    frequency = theta**-exponent
    if scaling is not None:
        frequency = scaled_frequencies(frequency, scaling)
    angles = torch.outer(torch.arange(seq_len, dtype=wide, device=like.device), frequency)
    return angles.cos(), angles.sin()


def scaled_frequencies(frequency: Tensor, scaling: RopeScaling) -> Tensor:
    """The frequencies after scaling. linear: all / factor. llama3: a wavelength that fits `high_freq_factor` times or more into
    the original length stays, one that fits `low_freq_factor` times or less is / factor, with a straight line between."""
    if scaling.kind == "linear":
        return frequency / scaling.factor
    assert scaling.original_max_seq_len is not None
    fits = scaling.original_max_seq_len * frequency / (2 * math.pi)
    stays = ((fits - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return stays * frequency + (1 - stays) * frequency / scaling.factor


def rotate(x_BHSd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + r/2}) of the first r columns, the "half" layout that Hugging Face checkpoints use. The tables
    have r / 2 columns; later columns of x stay."""
    turned = 2 * cos_Sd.shape[-1]
    if not turned:
        return x_BHSd
    a, b = x_BHSd[..., :turned].to(cos_Sd.dtype).chunk(2, dim=-1)
    pairs = [a * cos_Sd - b * sin_Sd, b * cos_Sd + a * sin_Sd]
    rest = [] if turned == x_BHSd.shape[-1] else [x_BHSd[..., turned:].to(cos_Sd.dtype)]
    return torch.cat(pairs + rest, dim=-1).to(x_BHSd.dtype)


def causal_mask(x_BSD: Tensor, document_BS: Tensor | None = None, window: int | None = None) -> Tensor | None:
    """bool [B or 1, 1, S, S]: a position sees itself and earlier ones, of its own document, and the last `window` only. None
    where it sees all earlier ones."""
    seq_len = x_BSD.shape[1]
    windowed = window is not None and window < seq_len
    if document_BS is None and not windowed:
        return None
    if document_BS is None:
        seen_BSS = torch.ones(1, seq_len, seq_len, dtype=torch.bool, device=x_BSD.device).tril()
    else:
        seen_BSS = (document_BS[:, :, None] == document_BS[:, None, :]).tril()
    if windowed:
        assert window is not None
        seen_BSS = seen_BSS.triu(1 - window)
    return seen_BSS[:, None]


class Positions(NamedTuple):
    """What position says: tables of the rotation, and which positions are seen (None = all earlier ones)."""

    cos_Sd: Tensor
    sin_Sd: Tensor
    mask: Tensor | None


class Attention(nn.Module):
    """Grouped-query attention. The number of heads follows from the weights, so that a rank may hold some of them.

    The output bias is the block's to add (`output_bias`): of a rank with some of the heads the output is a part of a sum.

    Args:
        holds: the projections that are here, of q, k, v and o. What lacks some is a part of attention with several experts.
    """

    wq_QD: nn.Parameter
    wk_CD: nn.Parameter
    wv_CD: nn.Parameter
    wo_DQ: nn.Parameter
    bq_Q: nn.Parameter | None
    bk_C: nn.Parameter | None
    bv_C: nn.Parameter | None
    bo_D: nn.Parameter | None
    q_norm: RMSNorm
    k_norm: RMSNorm

    def __init__(self, config: ModelConfig, holds: str = "qkvo"):
        super().__init__()
        self.head_dim, self.rotary_dim = config.resolved_head_dim, config.rotary_dim
        self.rope_theta, self.rope_scaling = config.rope_theta, config.rope_scaling
        self.scale, self.window = config.attention_scale, config.sliding_window
        q_dim, kv_dim = config.num_heads * self.head_dim, config.resolved_kv_heads * self.head_dim
        weights = {"wq_QD": (q_dim, config.dim), "wk_CD": (kv_dim, config.dim), "wv_CD": (kv_dim, config.dim)}
        weights["wo_DQ"] = (config.dim, q_dim)
        for name, shape in weights.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)) if name[1] in holds else None)
        biased = {"bq_Q": q_dim, "bk_C": kv_dim, "bv_C": kv_dim, "bo_D": config.dim}
        for name, width in biased.items():
            wanted = config.attention_bias == "all" or (config.attention_bias == "qkv" and name != "bo_D")
            self.register_parameter(name, nn.Parameter(torch.empty(width)) if wanted and name[1] in holds else None)
        self.qk_norm = config.qk_norm
        widths = {"none": {}, "head": {"q": self.head_dim, "k": self.head_dim}, "full": {"q": q_dim, "k": kv_dim}}
        for which, width in widths[config.qk_norm].items():
            if which in holds:
                setattr(self, f"{which}_norm", RMSNorm(width, config.norm_eps))

    def positions(self, x_BSD: Tensor, document_BS: Tensor | None = None) -> Positions:
        """What the positions of x say; `document_BS` (ids) keeps attention inside each document."""
        tables = rope_tables(x_BSD.shape[1], self.rotary_dim, self.rope_theta, x_BSD, self.rope_scaling)
        return Positions(*tables, causal_mask(x_BSD, document_BS, self.window))

    def keys_values(self, x_BSD: Tensor, at: Positions) -> tuple[Tensor, Tensor]:
        """Keys, turned, and values of x [B, S, D]: each [B, heads, S, head_dim]."""
        # a bias of keys that are neither turned nor normed shifts all scores of a query alike, which the softmax takes out: with
        # it, its gradient would be rounding errors, of which an optimizer that divides by their size makes steps
        bias = self.bk_C if self.rotary_dim or self.qk_norm != "none" else None
        k = self._heads(x_BSD, self.wk_CD, bias, None if self.qk_norm == "none" else self.k_norm)
        return rotate(k, at.cos_Sd, at.sin_Sd), self._heads(x_BSD, self.wv_CD, self.bv_C, None)

    def attend(self, x_BSD: Tensor, keys: Tensor, values: Tensor, at: Positions) -> Tensor:
        """What queries of x [B, S, D] find in keys and values [B, heads, S, head_dim]: [B, S, D], without output bias."""
        q = self._heads(x_BSD, self.wq_QD, self.bq_Q, None if self.qk_norm == "none" else self.q_norm)
        o_BHSd = F.scaled_dot_product_attention(
            rotate(q, at.cos_Sd, at.sin_Sd),
            keys,
            values,
            attn_mask=at.mask,
            is_causal=at.mask is None,
            scale=self.scale,
            enable_gqa=True,
        )
        return F.linear(o_BHSd.transpose(1, 2).flatten(2), self.wo_DQ)

    def forward(self, x_BSD: Tensor, document_BS: Tensor | None = None) -> Tensor:
        """x [B, S, D] -> [B, S, D] without output bias; `document_BS` (ids) keeps attention inside each document."""
        at = self.positions(x_BSD, document_BS)
        return self.attend(x_BSD, *self.keys_values(x_BSD, at), at)

    def output_bias(self, x_BSD: Tensor) -> Tensor | None:
        """What is to be added to the output for x [B, S, D], on whichever positions; None = nothing."""
        return self.bo_D

    def _heads(self, x_BSD: Tensor, weight: Tensor, bias: Tensor | None, norm: nn.Module | None) -> Tensor:
        """A projection of x, by heads [B, heads, S, head_dim], with its norm over all of it or over each head."""
        y = F.linear(x_BSD, weight, bias)
        if norm is not None and self.qk_norm == "full":
            y = norm(y)
        y = y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return norm(y) if norm is not None and self.qk_norm == "head" else y
