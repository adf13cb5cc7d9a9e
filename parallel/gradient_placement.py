"""How many bytes of gradients to sum in each window of the slow link in backward: a prediction, which `gradient_windows` follows.
Without torch, but for what `schedule` needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .cost_model import LinkModel
from .schedule import Resource, Timeline

Window = Literal["experts", "rest"]
"""When the slow link is idle in the backward of a MoE layer: while its experts compute, if nothing else is under way, and between
its last exchange and the first of the next MoE layer."""


@dataclass(frozen=True)
class WindowBytes:
    """Bytes of gradients that are summed in the windows of a MoE layer and one micro-batch, see `Window`.

    Raises:
        ValueError: fewer than none.
    """

    experts: int
    rest: int

    def __post_init__(self) -> None:
        for window, size in (("experts", self.experts), ("rest", self.rest)):
            if size < 0:
                raise ValueError(f"{size} bytes in the window '{window}': there must be at least 0")


@dataclass(frozen=True)
class LayerGaps:
    """Of a MoE layer with the dense blocks below it, in backward: seconds that the slow link is idle in each `Window`, and bytes
    of the gradients that exist from the end of its experts' backward on, and of all others."""

    experts_s: float
    rest_s: float
    expert_bytes: float
    other_bytes: float


@dataclass(frozen=True)
class Placement:
    """Where reductions of gradients go.

    windows: per layer, in the order of backward. exposed_s: of what is left at the end. serial_s: of all reductions, each after
    its own layer and with nothing beside it.
    """

    windows: tuple[WindowBytes, ...]
    exposed_s: float
    serial_s: float

    @property
    def gain_s(self) -> float:
        return self.serial_s - self.exposed_s


def place_gradients(
    layers: Sequence[LayerGaps], link: LinkModel, *, first_bytes: float = 0.0, last_bytes: float = 0.0
) -> Placement:
    """Fill the windows of the slow link in backward with reductions of gradients that exist by then: the first step of FSMoE's
    adaptive gradient partitioning (ASPLOS 2025, section 5).

    Args:
        layers: in the order of backward.
        link: of the reduction; T of a tensor's bytes.
        first_bytes, last_bytes: of gradients that exist before the first of these layers, and at the end only (of embedding and
            head, which FSDP reduces together).
    """
    waiting, placed = first_bytes, []
    for layer in layers:
        experts = min(waiting, link.fits(layer.experts_s))
        waiting += layer.expert_bytes - experts
        rest = min(waiting, link.fits(layer.rest_s))
        waiting += layer.other_bytes - rest
        placed.append(WindowBytes(int(experts), int(rest)))
    sizes = [size for layer in layers for size in (layer.expert_bytes, layer.other_bytes)]
    serial_s = sum(link.seconds(size) for size in (first_bytes, *sizes, last_bytes) if size)
    waiting += last_bytes
    exposed_s = min(link.seconds(waiting), serial_s) if waiting else 0.0
    return Placement(tuple(placed), exposed_s, serial_s)


def gap_between(timeline: Timeline, resource: Resource) -> float:
    """Seconds that a link is idle between the first and the last operation on it."""
    spans = timeline.on(resource)
    inner = [(a, b) for a, b in timeline.idle(resource) if spans[0].end_s <= a and b <= spans[-1].start_s]
    return sum((b - a for a, b in inner), 0.0)
