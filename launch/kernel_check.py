"""At the start of a run: which kernels it will use, and whether they compute what torch computes on this machine."""

from __future__ import annotations

import torch

from ..kernels.backend import rule
from ..kernels.moe_mlp import choose_backend
from ..kernels.self_check import check_kernels
from ..moe.config import Activation, MoEConfig
from ..moe.errors import ConfigError, NumericsError, Problem


def check_backend(moe: MoEConfig, device: torch.device) -> None:
    """Raise ConfigError where `model.moe.kernels` cannot run on the device."""
    if moe.kernels != "triton" or device.type == "cuda":
        return
    from ..kernels.triton_support import interpreting

    if not interpreting():
        what = f"is 'triton', but the run is on {device.type}: Triton kernels run on CUDA devices; use 'auto' or 'torch'"
        raise ConfigError([Problem("model.moe.kernels", what)])


def describe_kernels(
    moe: MoEConfig,
    device: torch.device,
    dtype: torch.dtype,
    activation: Activation = "silu",
    *,
    gated: bool = True,
    biased: bool = False,
) -> str:
    """One line for the first screen: back ends, and why. Runs every kernel that is not torch's on a small problem first.

    Raises:
        NumericsError: a kernel's results differ from torch's; names op, result and error.
    """
    x = torch.empty(0, dtype=dtype, device=device)
    experts = choose_backend(x, moe.kernels, activation, gated=gated, biased=biased)
    rows = rule(device, torch.float32, products=False) if moe.kernels == "auto" else None
    name, why = (moe.kernels, "as configured") if rows is None else (rows.backend, rows.why)
    text = f"kernels: experts on '{experts}' in {dtype}, routing and rows on '{name}' ({why})"
    if "triton" not in (experts, name):
        return text
    findings = check_kernels(device, dtype, moe.kernels)
    if wrong := [f for f in findings if not f.good]:
        lines = "\n".join(f"  {f.op}, {f.result}: relative error {f.error:.2g}, allowed is {f.bound:.2g}" for f in wrong)
        raise NumericsError(
            f"Triton kernels give wrong numbers on {device} (torch {torch.__version__}):\n{lines}\n"
            f'set model.moe.kernels = "torch" to train without them'
        )
    return f"{text}; {len(findings)} results equal torch's"
