"""Elements of safetensors files as numpy arrays. numpy has no bfloat16: BF16 travels as uint16, the upper half of a float32."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CheckpointError

Array = npt.NDArray[Any]

ITEM_BYTES = MappingProxyType(
    {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4}
    | {"F16": 2, "BF16": 2, "I16": 2, "U16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "BOOL": 1}
)
"""Bytes of one element, by the names that safetensors files use."""

FLOATS = ("F64", "F32", "F16", "BF16")
"""What can be computed with, the widest first; F16 and BF16 hold neither one another."""

CARRIERS = MappingProxyType(
    {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "<i1"}
    | {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "<u1", "BOOL": "<u1", "F8_E4M3": "<u1", "F8_E5M2": "<u1"}
)
"""numpy's name of the type in which elements of a dtype travel; little-endian, as the files are."""


LEAST_TOO_LARGE = (2 - 2**-8) * 2.0**127
"""The smallest number that is rounded to infinity in BF16."""


def item_bytes(dtype: str) -> int:
    """Bytes of one element. Raises CheckpointError for a dtype that we do not know."""
    if dtype not in ITEM_BYTES:
        raise CheckpointError(f"dtype {dtype!r} is not one of {', '.join(ITEM_BYTES)}")
    return ITEM_BYTES[dtype]


def carrier(dtype: str) -> np.dtype[Any]:
    """The numpy type in which elements travel."""
    item_bytes(dtype)
    return np.dtype(CARRIERS[dtype])


def work_dtype(dtype: str) -> str:
    """F64 for F64, else F32: what values are computed in. Raises CheckpointError for integers and 8-bit floats."""
    if dtype not in FLOATS:
        raise CheckpointError(f"{dtype} values cannot be computed with, only {', '.join(FLOATS)}")
    return "F64" if dtype == "F64" else "F32"


def common_dtype(dtypes: list[str]) -> str:
    """The narrowest dtype that holds all of them; F32 for F16 with BF16."""
    first = dtypes[0]
    if all(dtype == first for dtype in dtypes):
        return first
    for dtype in dtypes:
        work_dtype(dtype)
    return "F64" if "F64" in dtypes else "F32"


def convert(values: Array, source: str, target: str) -> Array:
    """Elements in the carrier of `source` -> in that of `target`, rounded to nearest, ties to even.

    Raises CheckpointError where a finite value becomes infinite, and for dtypes that are not `FLOATS` and differ.
    """
    if source == target:
        return values
    work_dtype(source), work_dtype(target)
    if source == "BF16":
        bits = values.astype("<u4")
        bits <<= np.uint32(16)
        wide: Array = bits.view("<f4")
    else:
        wide = values
    if target == "BF16":
        return _to_bf16(wide)
    if target in ("F64", "F32") and source != "F64":
        return wide.astype(carrier(target), copy=False)
    with np.errstate(over="ignore"):
        narrow = wide.astype(carrier(target), copy=False)
    _check_range(narrow.view("<u2") if target == "F16" else narrow, wide, target)
    return narrow


def _to_bf16(values: Array) -> Array:
    """float16, float32 or float64 -> bfloat16 in uint16."""
    bits = _single_bits(values) if values.dtype == np.float64 else np.ascontiguousarray(values, "<f4").view("<u4")
    out = bits >> np.uint32(16)
    out &= np.uint32(1)
    out += np.uint32(0x7FFF)
    out += bits
    half = np.ascontiguousarray(out.view("<u2")[..., 1::2])
    if not (values.max(initial=0) < LEAST_TOO_LARGE and values.min(initial=0) > -LEAST_TOO_LARGE):
        nan = np.isnan(values)
        # adding may have carried a NaN over into another value
        half[nan] = (bits[nan] >> np.uint32(16)).astype("<u2") | np.uint16(0x0040)
        _check_range(half, values, "BF16")
    return half


def _single_bits(values: Array) -> Array:
    """Bits of float64 values as float32, such that rounding those to BF16 is as rounding once.

    Rounding twice is wrong only where the first time ends in the middle of two BF16 numbers, and did not begin there.
    """
    with np.errstate(over="ignore"):
        single = values.astype("<f4")
    bits = single.view("<u4")
    middle = np.nonzero((bits & np.uint32(0xFFFF)) == 0x8000)
    if len(middle[0]):
        there, here = np.abs(values[middle]), np.abs(single[middle].astype("<f8"))
        bits[middle] += (there > here).astype("<u4")
        bits[middle] -= (there < here).astype("<u4")
    return bits


def _check_range(out: Array, values: Array, target: str) -> None:
    """Raise if rounding has made a finite value infinite."""
    if target == "BF16":
        infinite = (out & np.uint16(0x7FFF)) == 0x7F80
    elif target == "F16":
        infinite = (out & np.uint16(0x7FFF)) == 0x7C00
    else:
        infinite = np.isinf(out)
    if infinite.any():
        lost = infinite & np.isfinite(values)
        if lost.any():
            worst = float(np.abs(values[lost]).max())
            raise CheckpointError(f"the value {worst:g} is too large for {target}: store this tensor as F32 or BF16")
