"""Upcycling: dense checkpoints into Mixture-of-Experts ones, part by part. Names load on first use; nothing here needs torch."""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .build import fitted, upcycle_parts
    from .growth import stack_depth, widen_ffn
    from .methods import METHODS
    from .methods.flex_olmo import opt_out
    from .options import UpcycleOptions

__all__ = ["METHODS", "UpcycleOptions", "fitted", "opt_out", "stack_depth", "upcycle_parts", "widen_ffn"]

_HOMES = MappingProxyType(
    {
        "METHODS": "methods",
        "UpcycleOptions": "options",
        "fitted": "build",
        "opt_out": "methods.flex_olmo",
        "stack_depth": "growth",
        "upcycle_parts": "build",
        "widen_ffn": "growth",
    }
)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
