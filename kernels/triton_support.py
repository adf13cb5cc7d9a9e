"""What the Triton kernels share: whether they are interpreted, grids, and checks of the tensors that reach them.

Imports triton, so that only `triton_impl.py` modules import this one; the public functions import those when they need them.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

# read once: @triton.jit decides at decoration, that is at import, whether a kernel will be interpreted
_INTERPRETING = bool(triton.knobs.runtime.interpret)


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter on CPU tensors; true for the whole process or not at all."""
    return _INTERPRETING


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (1 for n <= 1): Triton's tiles have no other sizes."""
    return 1 << max(n - 1, 0).bit_length()


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums are formed: fp64 for fp64, else fp32."""
    return torch.promote_types(dtype, torch.float32)


def row_major(x: Tensor) -> Tensor:
    """`x` with its last axis contiguous: kernels take a row stride and vectorise along the row. A copy only where needed."""
    return x if x.stride(-1) == 1 or x.numel() == 0 else x.contiguous()


def check_devices(op: str, **tensors: Tensor | None) -> None:
    """Every tensor is on one device, and on one that kernels can read (or on "meta", where launches are only recorded).

    Raises:
        ValueError: names the operation, the tensors and their devices.
    """
    devices = {name: x.device for name, x in tensors.items() if x is not None}
    listed = f"{op}: {', '.join(f'{name} on {device}' for name, device in devices.items())}"
    if len(set(devices.values())) > 1:
        raise ValueError(f"{listed}; all tensors must be on one device")
    device = next(iter(devices.values()))
    if not _INTERPRETING and device.type not in ("cuda", "meta"):
        raise ValueError(f"{listed}; Triton kernels read CUDA tensors only, choose another backend for these")
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        # Triton launches on the current device, whatever the tensors' is
        raise ValueError(f"{listed}, but the current device is cuda:{torch.cuda.current_device()}; see torch.cuda.set_device")
