"""Other projects' kernels as contenders, with their own functions imported where they are installed; nothing of theirs is copied.

Every adapter gives each peer what its own project would have at hand at that point (weights in its layout as views of the same
memory, indices as int32 where it wants these), so that only its work is timed. What cannot run here is a contender that says why.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor

from ..protocol.contender import Contender, Problem, absent
from ..protocol.timing import one_line

NEEDS_CUDA = "needs a CUDA device"


def layer_peers(problem: Problem) -> list[Contender]:
    """Everybody who computes the experts of a layer from tokens, given indices and weights; output "out" [T, D].

    Those that can go backward have the gradients dX, dW13, dW2 and dS.
    """
    from . import liger, megatron, transformers

    return [
        adapted("liger", liger.fused_moe, problem),
        adapted("megatron", megatron.sequential_experts, problem),
        adapted("megatron vllm", megatron.vllm_forward, problem),
        adapted("transformers eager", transformers.eager, problem),
        adapted("transformers grouped_mm", transformers.grouped_mm, problem),
    ]


def permute_peers(problem: Problem, direction_RD: Tensor) -> list[Contender]:
    """Everybody who copies tokens into expert order, plan included: "out" [R, D], and backward dX for `direction_RD`."""
    from . import megatron, transformer_engine

    return [
        adapted("megatron", megatron.permute, problem, direction_RD),
        adapted("transformer_engine", transformer_engine.permute, problem, direction_RD),
    ]


def unpermute_peers(problem: Problem, y_RD: Tensor) -> list[Contender]:
    """Everybody who sums the rows y_RD, which stand in expert order, by token and weight: "out" [T, D], backward dY and dS."""
    from . import megatron, transformer_engine

    return [
        adapted("megatron", megatron.unpermute, problem, y_RD),
        adapted("transformer_engine", transformer_engine.unpermute, problem, y_RD),
    ]


def regroup_peers(x_RD: Tensor, counts_WL: Tensor, direction_RD: Tensor) -> list[Contender]:
    """Everybody who brings rows from the order (source rank, expert) into (expert, source rank), plan included.

    Output "out" [R, D], and backward dX for `direction_RD`. counts_WL: rows from each rank for each expert.
    """
    from . import torchao

    return [adapted("torchao", torchao.permute_and_pad, x_RD, counts_WL, direction_RD)]


def sort_peers(problem: Problem) -> list[Contender]:
    """Everybody who plans a permutation: those of "order" [R], "row" [T, K] and "counts" [E] that they make.

    "rows" [T, K] are a token's rows in any order of its choices.
    """
    from . import liger, megatron, torchao, transformer_engine

    return [
        adapted("liger", liger.routing_metadata, problem),
        adapted("transformer_engine", transformer_engine.row_id_map, problem),
        adapted("megatron vllm", megatron.vllm_align, problem),
        adapted("torchao", torchao.generate_indices, problem),
    ]


def adapted(name: str, build: Callable[..., Contender], *inputs: object) -> Contender:
    """What `build(name, *inputs)` returns; where the package is missing or cannot be set up, a contender that says so.

    All errors are caught: a peer that breaks with this torch must not end a benchmark, and the table shows what it raised.
    """
    try:
        return build(name, *inputs)
    except ImportError as error:
        return absent(name, str(error))
    except Exception as error:
        return absent(name, one_line(error))


def compiles_for(device: torch.device) -> bool:
    """Whether Triton kernels can read tensors of this device: they are on a GPU, or this process interprets kernels."""
    from moefold.kernels.triton_support import interpreting

    return device.type == "cuda" or interpreting()


def dense_routing(problem: Problem) -> tuple[Tensor, Tensor]:
    """(chosen_TE bool, weights_TE fp32 with zeros elsewhere): the form in which Megatron's router hands out its choices."""
    size = (problem.shape.T, problem.shape.E)
    chosen_TE = torch.zeros(size, dtype=torch.bool, device=problem.device).scatter_(1, problem.indices_TK, True)
    return chosen_TE, torch.zeros(size, device=problem.device).scatter_(1, problem.indices_TK, problem.weights_TK)


@contextmanager
def modules_replaced(package: str, stand_ins: Mapping[str, ModuleType | None]) -> Iterator[None]:
    """While inside, `stand_ins` are what `import` finds for these names; None makes their import fail.

    Afterwards everything of `package` that was imported inside is forgotten, and what was there before is back.
    """

    def belongs(name: str) -> bool:
        return name == package or name.startswith(f"{package}.") or name in stand_ins

    before = {name: module for name, module in sys.modules.items() if belongs(name)}
    for name in before:
        del sys.modules[name]
    sys.modules.update(stand_ins)  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in [name for name in sys.modules if belongs(name)]:
            del sys.modules[name]
        sys.modules.update(before)
