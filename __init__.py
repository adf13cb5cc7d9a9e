"""moefold: distributed Mixture-of-Experts training. Names load on first use, so `import moefold` imports no torch."""

from __future__ import annotations

from importlib import import_module
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .launch.parity import parity
    from .launch.plan import plan
    from .launch.pretrain import pretrain
    from .launch.report import report
    from .launch.settings import RunConfig
    from .launch.upcycle.run import upcycle
    from .moe.config import BalanceConfig, CompressConfig, ModelConfig, MoEConfig, RouterConfig
    from .moe.layer import MoELayer
    from .moe.model import Model
    from .parallel.topology import Topology

__version__ = "0.1.0"

__all__ = [
    "BalanceConfig",
    "CompressConfig",
    "MoEConfig",
    "MoELayer",
    "Model",
    "ModelConfig",
    "RouterConfig",
    "RunConfig",
    "Topology",
    "parity",
    "plan",
    "pretrain",
    "report",
    "upcycle",
]

_HOMES = MappingProxyType(
    {
        "BalanceConfig": "moe.config",
        "CompressConfig": "moe.config",
        "MoEConfig": "moe.config",
        "MoELayer": "moe.layer",
        "Model": "moe.model",
        "ModelConfig": "moe.config",
        "RouterConfig": "moe.config",
        "RunConfig": "launch.settings",
        "Topology": "parallel.topology",
        "parity": "launch.parity",
        "plan": "launch.plan",
        "pretrain": "launch.pretrain",
        "report": "launch.report",
        "upcycle": "launch.upcycle.run",
    }
)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{home}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
