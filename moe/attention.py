"""Causal self-attention with rotary positions and grouped queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


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


def rope_tables(seq_len: int, head_dim: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [S, head_dim / 2] of the rotary angles position * theta^(-2i / head_dim) (Su et al., arXiv 2104.09864)."""
    wide = torch.promote_types(like.dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, dtype=wide, device=like.device) / head_dim
    angles = torch.outer(torch.arange(seq_len, dtype=wide, device=like.device), theta**-exponent)
    return angles.cos(), angles.sin()


def rotate(x_BHSd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """Rotate the pairs (x_i, x_{i + d/2}), the "half" layout that Hugging Face checkpoints use."""
    a, b = x_BHSd.to(cos_Sd.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos_Sd - b * sin_Sd, b * cos_Sd + a * sin_Sd], dim=-1).to(x_BHSd.dtype)


def causal_mask(document_BS: Tensor) -> Tensor:
    """bool [B, 1, S, S]: a position sees earlier ones of its own document."""
    same_BSS = document_BS[:, :, None] == document_BS[:, None, :]
    return same_BSS.tril()[:, None]


class Attention(nn.Module):
    """Grouped-query attention. The number of heads follows from the weights, so that a rank may hold some of them."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim, self.rope_theta = config.resolved_head_dim, config.rope_theta
        q_dim, kv_dim = config.num_heads * self.head_dim, config.resolved_kv_heads * self.head_dim
        self.wq_QD = nn.Parameter(torch.empty(q_dim, config.dim))
        self.wk_CD = nn.Parameter(torch.empty(kv_dim, config.dim))
        self.wv_CD = nn.Parameter(torch.empty(kv_dim, config.dim))
        self.wo_DQ = nn.Parameter(torch.empty(config.dim, q_dim))
        self.qk_norm = config.qk_norm
        widths = {"none": None, "head": (self.head_dim, self.head_dim), "full": (q_dim, kv_dim)}[config.qk_norm]
        if widths is not None:
            self.q_norm, self.k_norm = (RMSNorm(w, config.norm_eps) for w in widths)

    def project(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, S, head_dim]."""
        q, k, v = (F.linear(x_BSD, w) for w in (self.wq_QD, self.wk_CD, self.wv_CD))
        if self.qk_norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        if self.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def forward(self, x_BSD: Tensor, document_BS: Tensor | None = None) -> Tensor:
        """x [B, S, D] -> [B, S, D]; `document_BS` (ids) keeps attention inside each document."""
        q, k, v = self.project(x_BSD)
        tables = rope_tables(x_BSD.shape[1], self.head_dim, self.rope_theta, x_BSD)
        q, k = rotate(q, *tables), rotate(k, *tables)
        mask = None if document_BS is None else causal_mask(document_BS)
        o_BHSd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return F.linear(o_BHSd.transpose(1, 2).flatten(2), self.wo_DQ)
