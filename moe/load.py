"""What one forward pass of a layer (or of all layers, stacked) says about its routing: sums that may be added up anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..kernels.sort_tokens import count_choices
from .compress import Sent
from .router import Routing


@dataclass(frozen=True)
class Losses:
    """Auxiliary losses of the tokens at hand, without coefficients: balance is 1 at perfect balance, z is a mean."""

    balance: Tensor
    z: Tensor


@dataclass(frozen=True)
class Aux:
    """Sums over the valid tokens of a forward pass. A layer's fields carry the axes below; a model's have layers L in front.

    counts_BE: int64, choices per sequence and expert, before drops.
    probs_BE: sum of the scores normalised over experts; differentiable.
    z_B: sum of logsumexp(logits)^2; differentiable.
    valid_B: int64, valid tokens.
    dropped_B: int64, choices that found no place (capacity).
    logit_max: largest |logit|.
    rows_sent, error, norm: see `compress.Sent`.
    routing: the routing itself, for one layer; None for a stack.
    """

    counts_BE: Tensor
    probs_BE: Tensor
    z_B: Tensor
    valid_B: Tensor
    dropped_B: Tensor
    logit_max: Tensor
    rows_sent: Tensor
    error: Tensor
    norm: Tensor
    routing: Routing | None = None

    @property
    def counts_E(self) -> Tensor:
        """Choices per expert of all sequences."""
        return self.counts_BE.sum(-2)

    @property
    def losses(self) -> Losses:
        """Losses of these tokens alone, summed over layers if stacked; differentiable. Across ranks, `Balancer` is the way."""
        tokens = self.valid_B.sum(-1).clamp_min(1)
        frequency_E = normalize(self.counts_E, self.probs_BE.dtype)
        balance = self.counts_BE.shape[-1] * (frequency_E * self.probs_BE.sum(-2)).sum(-1) / tokens
        return Losses(balance.sum(), (self.z_B.sum(-1) / tokens).sum())

    @staticmethod
    def stack(layers: Sequence[Aux]) -> Aux:
        """One record with a leading axis of layers."""
        sums: dict[str, Any] = {f.name: torch.stack([getattr(a, f.name) for a in layers]) for f in fields(Aux)[:-1]}
        return Aux(**sums)


def normalize(counts_E: Tensor, dtype: torch.dtype) -> Tensor:
    """Counts as frequencies that sum to 1 over the last axis (all 0 where nothing was counted)."""
    total = counts_E.sum(-1, keepdim=True)
    return counts_E.to(dtype) / total.clamp_min(1).to(dtype)


def measure_load(routing: Routing, valid_BS: Tensor | None, kept_TK: Tensor | None, batch: int, sent: Sent | None = None) -> Aux:
    """Sums of one layer's routing, per sequence. `kept_TK` marks choices that travel (None: all valid ones).

    sent: what travelled for them; None = each kept choice as itself.
    """
    logits_TE, (T, E) = routing.logits_TE, routing.logits_TE.shape
    probs_TE = routing.scores_TE / routing.scores_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(logits_TE.dtype).tiny)
    z_T, chosen_TK, logit_TE = routing.z_T, routing.indices_TK, logits_TE.detach().abs()
    if valid_BS is not None:
        valid_T = valid_BS.reshape(-1)
        probs_TE = probs_TE.masked_fill(~valid_T[:, None], 0)
        z_T = z_T.masked_fill(~valid_T, 0)
        chosen_TK = torch.where(valid_T[:, None], chosen_TK, E)
        logit_TE = logit_TE.masked_fill(~valid_T[:, None], 0)
        valid_B = valid_BS.sum(-1)
    else:
        valid_B = torch.full((batch,), T // batch, dtype=torch.int64, device=logits_TE.device)
    counts_BE = count_choices(chosen_TK.reshape(batch, -1), E + 1)[:, :E]
    routed_B = chosen_TK.shape[-1] * valid_B
    dropped_B = torch.zeros_like(valid_B) if kept_TK is None else routed_B - kept_TK.reshape(batch, -1).sum(1)
    sent = sent or Sent.exactly((routed_B - dropped_B).sum())
    return Aux(
        counts_BE=counts_BE,
        probs_BE=probs_TE.view(batch, -1, E).sum(1),
        z_B=z_T.view(batch, -1).sum(1),
        valid_B=valid_B,
        dropped_B=dropped_B,
        logit_max=logit_TE.amax() if logit_TE.numel() else logit_TE.new_zeros(()),
        rows_sent=sent.rows,
        error=sent.error,
        norm=sent.norm,
        routing=routing,
    )
