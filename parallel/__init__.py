"""How a model is spread over ranks. Names load on first use, so importing the package imports no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import ParallelConfig as ParallelConfig
    from .topology import Coordinates as Coordinates
    from .topology import Topology as Topology
    from .topology import check_model as check_model
    from .topology import require_model as require_model

_HOME = (
    ("ParallelConfig", ".config"),
    ("Topology", ".topology"),
    ("Coordinates", ".topology"),
    ("check_model", ".topology"),
    ("require_model", ".topology"),
)
__all__ = ["Coordinates", "ParallelConfig", "Topology", "check_model", "require_model"]


def __getattr__(name: str) -> Any:
    home = dict(_HOME).get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(home, __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
