"""Which kernels a run uses on this machine, and what it says about it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moefold.kernels.triton_support import interpreting
from moefold.launch.kernel_check import check_backend, describe_kernels
from moefold.moe.config import MoEConfig
from moefold.moe.errors import ConfigError

MOE = MoEConfig(num_experts=4, top_k=2, expert_dim=8)
CPU = torch.device("cpu")


def test_torch_on_cpu() -> None:
    check_backend(MOE, CPU)
    text = describe_kernels(MOE, CPU, torch.bfloat16)
    assert text.startswith("kernels: experts on 'loop' in torch.bfloat16, routing and rows on 'torch' (tensors are on cpu;")
    assert "experts on 'loop'" in describe_kernels(MOE, CPU, torch.float32, "gelu_tanh")
    assert "as configured" in describe_kernels(replace(MOE, kernels="torch"), CPU, torch.float32)


@pytest.mark.skipif(interpreting(), reason="kernels are interpreted in this process")
def test_triton_on_cpu_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"model.moe.kernels: is 'triton', but the run is on cpu.*use 'auto' or 'torch'"):
        check_backend(replace(MOE, kernels="triton"), CPU)
