"""The gradients of experts' weights are computed while those of rows travel, however tokens are sent."""

from __future__ import annotations

import threading
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest

from helpers import run_threads
from moefold.kernels.moe_mlp import LateGradients
from moefold.moe.dispatch import Pieces
from moefold.parallel.parity import ParityCase, build_engine, run_steps
from moefold.parallel.parity_layouts import VARIANTS, Layout
from moefold.parallel.transfer import Convoy

BY_NAME = {v.name: v for v in VARIANTS}


def train(rank: int, world: int, case: ParityCase, layout: dict[str, int]) -> int:
    run_steps(build_engine(case, layout), case, range(1))
    return threading.get_ident()


@pytest.fixture()
def logs(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[str]]:
    """What each thread does in backward: s(end) gradients of rows, w(ait) for some, compute those of W(eights)."""
    found: dict[int, list[str]] = defaultdict(list)
    put, take, due = Convoy.put, Convoy.take, LateGradients.due

    def tell(letter: str) -> None:
        found[threading.get_ident()].append(letter)

    def sends(by: Convoy, *args: Any) -> None:
        if by.direction == "backward" and len(by.waiting) + 1 == by.size:
            tell("s")
        put(by, *args)

    def waits(by: Convoy, *args: Any) -> Any:
        if by.direction == "backward" and by.exchange is not None:
            tell("w")
        return take(by, *args)

    def computes(by: LateGradients, grads: Any) -> Any:
        if by._work is not None:
            tell("W")
        return due(by, grads)

    monkeypatch.setattr(Convoy, "put", sends)
    monkeypatch.setattr(Convoy, "take", waits)
    monkeypatch.setattr(LateGradients, "due", computes)
    return found


CASES = {
    # combine there, dispatch back; weights while the latter travels
    "flat": ({}, "swsWw"),
    "recompute": ({"recompute": "selective"}, "swsWw"),
    "windows": ({"gradient_windows": True}, "swsWw"),
    # both units are sent before either is waited for, the last comes first
    "pieces": ({"pieces": 2}, "sswsWwsWww"),
    "one-exchange-back": ({"pieces": Pieces(2, 1)}, "swWsWw"),
    # rows and notes cross between nodes, and inside of one they are dealt out at once
    "two-levels": ({"ranks_per_node": 2}, "swswswssWww"),
}


@pytest.mark.parametrize(("changes", "layer"), CASES.values(), ids=CASES)
def test_weights_come_while_rows_travel(changes: dict[str, Any], layer: str, logs: dict[int, list[str]]) -> None:
    layout = Layout(4, ep=4)
    case = BY_NAME["plain"].build(layout, 1, steps=1)
    assert case.model.moe is not None
    if "ranks_per_node" in changes:
        case = replace(case, model=replace(case.model, moe=replace(case.model.moe, dispatcher="hierarchical")))
    case = replace(case, **changes)
    threads = run_threads(train, 4, case, {"ep": 4})
    layers = len(case.model.moe_layers)
    for thread in threads:
        assert "".join(logs[thread]) == layers * layer
