"""What the checks on a GPU get: this process's device, and torch's products without shortcuts to compare with."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest
import torch

from moefold.kernels.backend import CAPABILITY


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """This process's GPU (under torchrun, that of its rank), one that the kernels are made for."""
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    if (capability := torch.cuda.get_device_capability(device)) < CAPABILITY:
        pytest.skip(f"the kernels are made for compute capability {CAPABILITY} and newer; {device} has {capability}")
    return device


@pytest.fixture
def device(gpu: torch.device) -> Iterator[torch.device]:
    """The GPU, with torch's matrix products in full precision, and memory given back afterwards."""
    products = torch.backends.cuda.matmul
    names = ("allow_tf32", "allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")
    before = {name: getattr(products, name) for name in names}
    for name in names:
        setattr(products, name, False)
    yield gpu
    for name, value in before.items():
        setattr(products, name, value)
    gc.collect()
    torch.cuda.empty_cache()
