"""Initial weights: a function of (seed, logical name, expert index) alone, so that every layout starts from the same model."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# projections that write into the residual stream; scaled down with depth (GPT-2, Megatron)
OUTPUT_PROJECTIONS = ("wo_DQ", "w2_DF", "w2_EDF")
# vectors that start at zero: biases, and what compression adds
ZEROS = ("bq_Q", "bk_C", "bv_C", "bo_D", "b13_2F", "b2_D", "b13_E2F", "b2_ED", "bias_D", "scale_D")


def _generator(seed: int, name: str, expert: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/{name}/{expert}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def initial_value(
    name: str, shape: tuple[int, ...], *, seed: int, std: float, num_layers: int, experts: Iterable[int] | None = None
) -> Tensor:
    """The fp32 starting value of one parameter, made on CPU whatever the device.

    Args:
        name: logical name, such as `layers.3.moe.experts.w2_EDF`.
        shape: global shape; axis 0 of an expert parameter is the expert.
        experts: global indices of the experts wanted (expert parameters only); None = all.

    Returns:
        Tensor of `shape`, with axis 0 reduced to `experts` if given. Vectors are ones (norm weights), biases and that of
        compression zeros; matrices, learned positions and the gate of shared experts are normal with standard deviation `std`,
        output projections with std / sqrt(2 * num_layers).
    """
    leaf = name.rsplit(".", 1)[-1]
    of_experts = ".experts." in f".{name}"
    wanted = list(range(shape[0]) if experts is None else experts) if of_experts else []
    if leaf in ZEROS:
        return torch.zeros((len(wanted), *shape[1:]) if of_experts else shape)
    if len(shape) == 1 and leaf != "gate_D":
        return torch.ones(shape)
    scale = std / math.sqrt(2 * num_layers) if leaf in OUTPUT_PROJECTIONS else std
    if not of_experts:
        return torch.empty(shape).normal_(0.0, scale, generator=_generator(seed, name, 0))
    rows = [torch.empty(shape[1:]).normal_(0.0, scale, generator=_generator(seed, name, e)) for e in wanted]
    return torch.stack(rows) if rows else torch.empty(0, *shape[1:])


@torch.no_grad()
def init_weights(module: nn.Module, *, seed: int, std: float = 0.02, num_layers: int = 1) -> None:
    """Fill all parameters of an unsharded module in place; buffers (expert biases) start at zero."""
    for name, parameter in module.named_parameters():
        value = initial_value(name, tuple(parameter.shape), seed=seed, std=std, num_layers=num_layers)
        parameter.copy_(value)
    for buffer in module.buffers():
        buffer.zero_()
