"""Upcycling with everything around it: choice of a format, manifest, proof, report. Importing this package imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .run import upcycle as upcycle


def __getattr__(name: str) -> Any:
    if name != "upcycle":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .run import upcycle

    return upcycle
