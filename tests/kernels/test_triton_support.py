"""Sizes of grids and tiles, and which devices kernels accept."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
from moefold.kernels import triton_support
from moefold.kernels.triton_support import cdiv, check_devices, next_power_of_2, row_major, wide_dtype


def test_sizes() -> None:
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [next_power_of_2(n) for n in (0, 1, 2, 3, 4, 5, 1025)] == [1, 1, 2, 4, 4, 8, 2048]
    assert [wide_dtype(d) for d in (torch.bfloat16, torch.float16, torch.float32)] == [torch.float32] * 3
    assert wide_dtype(torch.float64) == torch.float64


def test_row_major_copies_only_where_columns_lie_apart() -> None:
    x = torch.randn(6, 8)
    assert row_major(x[:, 2:5]).data_ptr() == x[:, 2:5].data_ptr()
    for apart in (x.T, torch.ones(()).expand(3, 4), x[:, ::2]):
        assert row_major(apart).stride(-1) == 1
        assert torch.equal(row_major(apart), apart)


@pytest.mark.parametrize(
    ("devices", "said"),
    [
        ({"x": "cuda:0", "w": "cpu"}, "op: x on cuda:0, w on cpu; all tensors must be on one device"),
        ({"x": "cpu", "w": "cpu"}, "op: x on cpu, w on cpu; Triton kernels read CUDA tensors only"),
        ({"x": "cuda:1"}, "op: x on cuda:1, but the current device is cuda:0"),
        ({"x": "cuda:0", "w": "cuda:0"}, None),
        ({"x": "meta"}, None),
    ],
    ids=["two-devices", "cpu", "not-current", "cuda", "recorded"],
)
def test_devices(monkeypatch: pytest.MonkeyPatch, devices: dict[str, str], said: str | None) -> None:
    monkeypatch.setattr(triton_support, "_INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    tensors = {name: SimpleNamespace(device=torch.device(device)) for name, device in devices.items()}
    if said is None:
        return check_devices("op", **tensors, absent=None)
    with pytest.raises(ValueError, match=said):
        check_devices("op", **tensors, absent=None)
