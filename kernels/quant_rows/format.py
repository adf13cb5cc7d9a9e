"""The number formats of rows on the wire."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch


@dataclass(frozen=True, kw_only=True)
class Format:
    """One byte per value.

    largest: the code that the largest magnitude of a block is mapped to.
    integer: codes are whole numbers, of equal distance; else a float of its own.
    """

    dtype: torch.dtype
    largest: float
    integer: bool


FORMATS = MappingProxyType(
    {
        "e4m3": Format(dtype=torch.float8_e4m3fn, largest=448.0, integer=False),
        "int8": Format(dtype=torch.int8, largest=127.0, integer=True),
    }
)
