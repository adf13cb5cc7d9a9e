"""How one run is spread over ranks. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..moe.config import positive, raise_if
from ..moe.errors import Problem


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of parallelism; the number of data-parallel ranks follows from the world size."""

    dp: int | None = None
    """Data-parallel ranks of the dense part; None = world / tp. Set it to have the world size checked."""
    hsdp: int = 1
    """Replicas of the sharded state (hybrid sharding): parameters are sharded over dp / hsdp ranks, replicated over hsdp. 1 = fully sharded, dp = plain data parallel."""
    tp: int = 1
    """Tensor-parallel ranks of attention, dense FFN, embedding and loss, with sequence parallelism."""
    ep: int = 1
    """Expert-parallel ranks: each holds num_experts / ep experts."""
    etp: int = 1
    """Tensor-parallel ranks inside one expert. 1 is faster for fine-grained experts."""
    micro_batch: int | None = None
    """Sequences per rank and forward pass; None = no accumulation (global_batch / dp)."""
    recompute: Literal["none", "selective"] = "none"
    """selective: recompute attention and feed-forward inner activations in backward; the all-to-all is never repeated."""
    timeout_s: float = 600.0
    """A collective that takes longer than this stops the job (exit code 5)."""

    def __post_init__(self) -> None:
        path = "parallel"
        problems = positive(self, path, ["hsdp", "tp", "ep", "etp", "timeout_s"])
        for name in ("dp", "micro_batch"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                problems.append(Problem(f"{path}.{name}", f"is {value}, but must be positive, or left out"))
        raise_if(problems)
