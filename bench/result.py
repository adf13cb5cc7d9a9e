"""What a benchmark returns, its table, and the goals it is held to."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GOALS = Path(__file__).parent / "goals.toml"

Cell = str | int | float | bool | None
Row = Mapping[str, Cell]


@dataclass(frozen=True)
class Result:
    """rows: the table, all with the same keys; units are part of a key. figures: the numbers that goals are stated for."""

    rows: Sequence[Row]
    figures: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of one benchmark.

    at_least, at_most: the bound; one of them is given. device: "cuda" where it only holds with a GPU. why: where the bound comes
    from, and for a missed one the reason.
    """

    bench: str
    figure: str
    why: str
    at_least: float | None = None
    at_most: float | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"goal {self.bench}.{self.figure} needs either at_least or at_most")

    @property
    def bound(self) -> str:
        return f">= {self.at_least:g}" if self.at_least is not None else f"<= {self.at_most:g}"

    def met(self, value: float) -> bool:
        """Whether a figure keeps the bound; a figure that is not a number does not."""
        return value >= self.at_least if self.at_least is not None else value <= self.at_most  # type: ignore[operator]


def load_goals(bench: str, path: Path = GOALS) -> list[Goal]:
    """Goals of one benchmark: tables `[bench.figure]` of a TOML file."""
    stated = tomllib.loads(path.read_text()).get(bench, {})
    return [Goal(bench, figure, **settings) for figure, settings in stated.items()]


def check(goals: Sequence[Goal], figures: Mapping[str, float], *, cuda: bool) -> tuple[list[str], bool]:
    """One line for each goal, and whether none is missed. A goal whose figure is absent is missed."""
    lines, kept = [], True
    for goal in goals:
        name = f"{goal.bench}.{goal.figure}"
        if goal.device == "cuda" and not cuda:
            lines.append(f"not checked  {name} {goal.bound}: needs a CUDA device")
            continue
        value = figures.get(goal.figure)
        if value is not None and goal.met(value):
            lines.append(f"met          {name} {goal.bound}: {value:.6g}")
            continue
        kept = False
        lines.append(f"MISSED       {name} {goal.bound}: {'no such figure' if value is None else f'{value:.6g}'} ({goal.why})")
    return lines, kept


def render(rows: Sequence[Row]) -> str:
    """The rows as a table for a terminal, numbers to the right."""
    if not rows:
        return "(no rows)"
    names = list(rows[0])
    cells = [[_text(row[name]) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]
    right = [all(not isinstance(row[name], str) for row in rows) for name in names]
    lines = [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)).rstrip()
        for line in [names, *cells]
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _text(value: Cell) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def as_json(result: Result, provenance: Mapping[str, Any]) -> dict[str, Any]:
    return {"provenance": dict(provenance), "figures": dict(result.figures), "rows": [dict(row) for row in result.rows]}
