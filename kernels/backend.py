"""Which implementation of an op runs: the one asked for, or by one rule, which is logged once."""

from __future__ import annotations

import functools
import importlib.util
import logging
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Backend = Literal["auto", "torch", "triton"]

CAPABILITY = (9, 0)
"""The oldest CUDA architecture whose shared memory and matrix instructions the Triton kernels are made for."""


class Choice(NamedTuple):
    """backend: "torch" or "triton". why: the reason, for the log."""

    backend: str
    why: str


def rule(device: torch.device, dtype: torch.dtype, products: bool) -> Choice:
    """The rule behind "auto": Triton on CUDA devices that the kernels are made for, else torch.

    products: the op is a matrix product; then only 16-bit dtypes, since the tensor cores take no others without loss.
    """
    if device.type != "cuda":
        return Choice("torch", f"tensors are on {device.type}; Triton kernels are for CUDA")
    if products and dtype not in (torch.bfloat16, torch.float16):
        return Choice("torch", f"the Triton products are for bfloat16 and float16, not {dtype}")
    index = torch.cuda.current_device() if device.index is None else device.index
    return _rule_of_machine(index)


@functools.cache
def _rule_of_machine(index: int) -> Choice:
    if importlib.util.find_spec("triton") is None:
        return Choice("torch", "triton is not installed")
    capability = torch.cuda.get_device_capability(index)
    name = f"{torch.cuda.get_device_name(index)}, compute capability {capability[0]}.{capability[1]}"
    if capability < CAPABILITY:
        return Choice("torch", f"{name}: the Triton kernels are sized for {CAPABILITY[0]}.{CAPABILITY[1]} and newer")
    return Choice("triton", name)


def choose(op: str, backend: str, x: Tensor, *, products: bool = False, others: tuple[str, ...] = ()) -> str:
    """The implementation of `op` for tensors like `x`: `backend` itself, or for "auto" what `rule` says.

    others: further names that the op knows.

    Raises:
        ValueError: an unknown name.
    """
    if backend == "auto":
        choice = rule(x.device, x.dtype, products)
        _log_once(op, *choice)
        return choice.backend
    legal = ("auto", "torch", "triton", *others)
    if backend not in legal:
        raise ValueError(f"{op}: backend {backend!r} is none of {', '.join(map(repr, legal))}")
    return backend


@functools.cache
def _log_once(op: str, backend: str, why: str) -> None:
    # cached, so that a rule applied millions of times says so once
    logging.getLogger("moefold.kernels").info("%s runs on %s (%s)", op, backend, why)
