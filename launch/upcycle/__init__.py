"""Upcycling with everything around it: choice of a format, manifest, proof, report; and recording what a dense model sees.

Importing this package imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .record import record_dense as record_dense
    from .record_tokens import Domain as Domain
    from .run import upcycle as upcycle

_HOMES = MappingProxyType({"upcycle": "run", "record_dense": "record", "Domain": "record_tokens"})


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
