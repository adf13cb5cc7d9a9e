"""How one run is spread over ranks. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..moe.checks import check_types, positive, raise_if
from ..moe.errors import Problem


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """Degrees of parallelism; the number of data-parallel ranks follows from the world size."""

    dp: int | None = None
    """Data-parallel ranks of the dense part; None = world / tp. Set it to have the world size checked."""
    hsdp: int = 1
    """Replicas of the sharded state (hybrid sharding): parameters are sharded over dp / hsdp ranks, replicated over hsdp.
    1 = fully sharded, dp = plain data parallel."""
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
    ranks_per_node: int | None = None
    """Neighbouring ranks that share a machine, for communication in two levels; None = those with the same host name."""
    pieces: int = 1
    """Parts that the tokens of a layer are sent to the experts in, so that experts compute on one while the next travels;
    gradients come back in as many."""
    plan: str | None = None
    """Instead of `pieces`: the file of `moefold plan` for this model, layout and cluster, which says how many each layer is sent
    in, forward and backward; or 'auto': measured in the first seconds of the run and kept in its directory."""
    gradient_windows: bool = False
    """Sum gradients over data ranks where no rows travel in backward, instead of whenever FSDP comes to it: as much as the plan
    gives to each place, or without a plan all that is there. Same sums; needs memory for the gradients that wait."""
    timeout_s: float = 600.0
    """A collective that takes longer than this stops the job (exit code 5)."""

    def __post_init__(self) -> None:
        path = "parallel"
        check_types(self, path)
        names = ["dp", "hsdp", "tp", "ep", "etp", "micro_batch", "ranks_per_node", "pieces", "timeout_s"]
        problems = positive(self, path, names)
        if self.plan is not None and self.pieces != 1:
            problems.append(
                Problem(f"{path}.pieces", f"is {self.pieces}, but the plan {self.plan} says how many; set one of both")
            )
        raise_if(problems)
