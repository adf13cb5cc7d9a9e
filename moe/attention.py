"""Causal self-attention with rotary positions and grouped queries."""

from __future__ import annotations

import math

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


class Attention(nn.Module):
    """Grouped-query attention. The number of heads follows from the weights, so that a rank may hold some of them.

    The output bias is the block's to add: of a rank with some of the heads the output is a part of a sum.
    """

    bq_Q: nn.Parameter | None
    bk_C: nn.Parameter | None
    bv_C: nn.Parameter | None
    bo_D: nn.Parameter | None

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.rotary_dim = config.resolved_head_dim, config.rotary_dim
        self.rope_theta, self.rope_scaling = config.rope_theta, config.rope_scaling
        self.scale, self.window = config.attention_scale, config.sliding_window
        q_dim, kv_dim = config.num_heads * self.head_dim, config.resolved_kv_heads * self.head_dim
        self.wq_QD = nn.Parameter(torch.empty(q_dim, config.dim))
        self.wk_CD = nn.Parameter(torch.empty(kv_dim, config.dim))
        self.wv_CD = nn.Parameter(torch.empty(kv_dim, config.dim))
        self.wo_DQ = nn.Parameter(torch.empty(config.dim, q_dim))
        biased = {"bq_Q": q_dim, "bk_C": kv_dim, "bv_C": kv_dim, "bo_D": config.dim}
        for name, width in biased.items():
            wanted = config.attention_bias == "all" or (config.attention_bias == "qkv" and name != "bo_D")
            self.register_parameter(name, nn.Parameter(torch.empty(width)) if wanted else None)
        self.qk_norm = config.qk_norm
        widths = {"none": None, "head": (self.head_dim, self.head_dim), "full": (q_dim, kv_dim)}[config.qk_norm]
        if widths is not None:
            self.q_norm, self.k_norm = (RMSNorm(w, config.norm_eps) for w in widths)

    def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, S, head_dim]."""
        q, k, v = (F.linear(x_BSD, w, b) for w, b in ((self.wq_QD, self.bq_Q), (self.wk_CD, self.bk_C), (self.wv_CD, self.bv_C)))
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def forward(self, x_BSD: Tensor, document_BS: Tensor | None = None) -> Tensor:
        """x [B, S, D] -> [B, S, D] without output bias; `document_BS` (ids) keeps attention inside each document."""
        q, k, v = self.project(x_BSD)
        tables = rope_tables(x_BSD.shape[1], self.rotary_dim, self.rope_theta, x_BSD, self.rope_scaling)
        q, k = rotate(q, *tables), rotate(k, *tables)
        mask = causal_mask(x_BSD, document_BS, self.window)
        o_BHSd = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )
        return F.linear(o_BHSd.transpose(1, 2).flatten(2), self.wo_DQ)
