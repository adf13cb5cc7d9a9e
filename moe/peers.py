"""The door through which a layer learns of tokens that other ranks hold. Alone, there are none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol

from torch import Tensor

Scope = Literal["global", "micro"]
Wait = Callable[[], Tensor]


class Peers(Protocol):
    """Ranks that hold other tokens of the same sequences (sequence parallelism) or of the same batch (data parallelism)."""

    def shard_sequence(self, x_BS: Tensor) -> Tensor:
        """This rank's positions of x [B, S, ...]."""
        ...

    def gather_sequence(self, x_BS: Tensor) -> Tensor:
        """All positions of x [B, S_local, ...], in order; carries no gradient."""
        ...

    def start_sum(self, counts: Tensor, scope: Scope) -> Wait:
        """Start adding `counts` over the ranks that share the scope and return a function that waits for the sum.

        micro: ranks that hold parts of the same micro-batch; global: all ranks that hold different tokens of the step.
        The function may be called more than once.
        """
        ...


class NoPeers:
    """One process: every token is here."""

    def shard_sequence(self, x_BS: Tensor) -> Tensor:
        return x_BS

    def gather_sequence(self, x_BS: Tensor) -> Tensor:
        return x_BS

    def start_sum(self, counts: Tensor, scope: Scope) -> Wait:
        return lambda: counts
