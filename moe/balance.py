"""Keeping experts evenly used: the load-balancing loss at three scopes, its state over micro-batches, and the expert bias.

The loss of a layer is E * sum_e f_e * P_e, with f_e the frequency of expert e among all choices and P_e its mean normalised
score; it is 1 at perfect balance (Switch, arXiv 2101.03961, eq. 4; global batch: arXiv 2501.11873, section 3). f carries no
gradient, so the gradient of a token's score is E * f_e / tokens: it needs f only in backward, while P is a plain sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .config import BalanceConfig
from .load import Aux, normalize
from .peers import NoPeers, Peers, Wait


class DeferredBalance(torch.autograd.Function):
    """0 in forward; in backward the gradient coeff * E * f of the score sums, with f asked for only then.

    So the sum of counts over ranks that f needs has the rest of the forward pass to travel in.
    """

    @staticmethod
    def forward(ctx: Any, probs_LGE: Tensor, frequency: Wait, coeff: float) -> Tensor:
        ctx.frequency, ctx.scale = frequency, coeff * probs_LGE.shape[-1]
        ctx.set_materialize_grads(False)
        ctx.dtype = probs_LGE.dtype
        return probs_LGE.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.frequency().to(ctx.dtype) * (ctx.scale * grad), None, None


def once(produce: Wait) -> Wait:
    """`produce`, called at most once however often the result is asked for."""
    result: list[Tensor] = []

    def get() -> Tensor:
        if not result:
            result.append(produce())
        return result[0]

    return get


class Balancer:
    """The auxiliary losses of one model over the micro-batches of a step, and the counts they need.

    Use: `start_step(M)`; for each micro-batch add `losses(aux)` to the sum of token losses before dividing by the valid tokens of
    the global batch; `end_step(counts)`. Every rank does the same number of micro-batches.

    Args:
        config: scopes and coefficients.
        peers: ranks that hold other tokens.
    """

    def __init__(self, config: BalanceConfig, peers: Peers | None = None):
        self.config = config
        self.peers: Peers = peers or NoPeers()
        self.previous_LE: Tensor | None = None
        self._seen: Wait | None = None
        self._exact_LE: Tensor | None = None
        self._micro = self._num_micro = 0

    def start_step(self, num_micro: int, exact_LE: Tensor | None = None) -> None:
        """Begin a step of `num_micro` micro-batches. `exact_LE` are its global counts, for `accumulation = "exact"`."""
        if self.config.scope == "global" and self.config.accumulation == "exact" and num_micro > 1 and exact_LE is None:
            raise ValueError('accumulation = "exact" with several micro-batches needs the counts of a first pass (exact_LE)')
        self._micro, self._num_micro, self._exact_LE, self._seen = 0, num_micro, exact_LE, None

    def losses(self, aux: Aux) -> Tensor:
        """The auxiliary terms of one micro-batch on this rank, as a sum over its tokens (to be divided with the token losses).

        Its value leaves the balance terms out (they are known after the step, see `balance_value`); its gradient has all.
        """
        self._micro += 1
        assert self._micro <= self._num_micro, "more micro-batches than start_step announced"
        c = self.config
        total = c.z_loss_coeff * aux.z_B.sum()
        if c.aux_loss_coeff:
            total = total + self._term(aux, c.scope, c.aux_loss_coeff)
        if c.straggler_coeff:
            total = total + self._term(aux, "micro", c.straggler_coeff)
        return total

    def _term(self, aux: Aux, scope: str, coeff: float) -> Tensor:
        if scope == "sequence":
            summed = self.peers.start_sum(aux.counts_BE, "micro")
            return DeferredBalance.apply(aux.probs_BE, lambda: normalize(summed(), aux.probs_BE.dtype), coeff)
        counts_LGE = aux.counts_BE.sum(-2, keepdim=True)
        probs_LGE = aux.probs_BE.sum(-2, keepdim=True)
        counts = self.peers.start_sum(counts_LGE, "micro") if scope == "micro" else self._global_counts(counts_LGE)
        return DeferredBalance.apply(probs_LGE, lambda: normalize(counts(), torch.float64), coeff)

    def _global_counts(self, counts_LGE: Tensor) -> Wait:
        """Estimate of the step's global counts [L, 1, E] as of this micro-batch."""
        if self._exact_LE is not None:
            exact_LGE = self._exact_LE.unsqueeze(-2)
            return lambda: exact_LGE
        summed, before = self.peers.start_sum(counts_LGE, "global"), self._seen
        # each micro-batch adds to the one before it, so that the order in which backwards run does not matter
        seen = self._seen = once(lambda: summed().double() if before is None else before() + summed().double())
        # the last step stands in for the share of this step that has not been seen yet
        unseen = 1 - self._micro / self._num_micro
        weight = self.config.carry * unseen if self.config.accumulation == "prior" else 0.0
        if self.previous_LE is None or not weight:
            return seen
        rest_LGE = weight * self.previous_LE.unsqueeze(-2)
        return lambda: seen() + rest_LGE

    def end_step(self, counts_LE: Tensor) -> None:
        """Remember the step's global counts [L, E]; the next step starts from them."""
        self.previous_LE = counts_LE.double()
        self._seen = self._exact_LE = None

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs: the last step's counts (empty before the first step)."""
        return {} if self.previous_LE is None else {"previous_LE": self.previous_LE}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.previous_LE = state.get("previous_LE")


def balance_value(counts_LE: Tensor, probs_LE: Tensor, tokens: Tensor | int) -> Tensor:
    """E * sum_e f_e * P_e per layer [L], from counts and score sums over `tokens` tokens; 1 at perfect balance."""
    frequency_LE = normalize(counts_LE, torch.float64)
    mean_LE = probs_LE.double() / torch.as_tensor(tokens, device=probs_LE.device).clamp_min(1)
    return counts_LE.shape[-1] * (frequency_LE * mean_LE).sum(-1)


@torch.no_grad()
def update_expert_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> None:
    """Loss-free balancing, in place: b += rate * sign(mean load - load), then centred (arXiv 2408.15664, algorithm 1).

    Called once per step with the counts of the global batch. Centring changes no choice and keeps the bias from drifting.
    """
    counts = counts_E.double()
    bias_E += (rate * torch.sign(counts.mean() - counts)).to(bias_E.dtype)
    bias_E -= bias_E.mean()
