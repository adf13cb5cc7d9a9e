"""What a run says about its kernels before it trains, where Triton is at hand."""

from __future__ import annotations

import pytest
import torch

from moefold.kernels.self_check import Finding
from moefold.launch import kernel_check
from moefold.launch.kernel_check import check_backend, describe_kernels
from moefold.moe.config import MoEConfig
from moefold.moe.errors import NumericsError

MOE = MoEConfig(num_experts=4, top_k=2, expert_dim=8, kernels="triton")
CPU = torch.device("cpu")


def test_the_kernels_are_named_and_checked() -> None:
    check_backend(MOE, CPU)
    text = describe_kernels(MOE, CPU, torch.float32)
    assert "experts on 'triton' in torch.float32" in text
    assert "19 results equal torch's" in text


def test_wrong_numbers_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Finding("moe_mlp", "gradient of w13", 0.3, 0.06)
    monkeypatch.setattr(kernel_check, "check_kernels", lambda *args: [Finding("permute", "output", 0.0, 0.06), bad])
    with pytest.raises(NumericsError, match=r"moe_mlp, gradient of w13: relative error 0.3.*\n.*kernels = \"torch\"") as error:
        describe_kernels(MOE, CPU, torch.float32)
    assert "permute" not in str(error.value)
