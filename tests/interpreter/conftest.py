"""Kernels in Triton's interpreter: a process of their own, because Triton decides at import whether it interprets."""

from __future__ import annotations

import pytest

from moefold.kernels.triton_support import interpreting


@pytest.fixture(autouse=True)
def interpreted() -> None:
    """Skip where kernels are compiled: they would need CUDA tensors."""
    if not interpreting():
        pytest.skip("Triton compiles in this process; run TRITON_INTERPRET=1 pytest tests/interpreter")
