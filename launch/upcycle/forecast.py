"""What fitted laws of loss say at a budget: upcycled, dense trained on, from scratch, and where from scratch overtakes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from ...moe.errors import ConfigError, Problem
from ..console import human
from .loss_law import BEYOND, COLUMNS, NEEDED, Estimate, Fitted, Kind, Law, Point, fit, jackknife

CERTAIN = 2.0
"""A difference counts where it is more than so many of its standard errors."""
SEARCHED, GRID, HALVINGS = 1e4, 241, 60
"""Search of a crossover: how many times beyond the measured tokens on either side, places tried first, bisections after that."""
NAMES: tuple[tuple[Kind, str], ...] = (("upcycle", "upcycled"), ("dense", "dense trained on"), ("scratch", "from scratch"))


@dataclass(frozen=True)
class Crossover:
    """Where a model from scratch overtakes the upcycled one of the same shape, which takes the same FLOPs per token.

    tokens: of both; 0 where from scratch is ahead as far down as was looked, infinite where it never is as far up. times:
    uncertainty as a factor (the jackknife's standard error of the logarithm), infinite where some point decides whether there
    is a crossover at all. beyond: how many times outside the measured tokens. looked: smallest and largest tokens of the search.
    """

    tokens: float
    times: float
    beyond: float
    looked: tuple[float, float]

    @property
    def text(self) -> str:
        if not self.tokens:
            return f"from scratch is ahead everywhere, from {human(self.looked[0])} tokens on"
        if math.isinf(self.tokens):
            return f"from scratch is never ahead, up to {human(self.looked[1])} tokens"
        sure = f"times or divided by {self.times:.3g}" if math.isfinite(self.times) else "which rests on single points"
        far = f", {self.beyond:.3g} times beyond the measured range" if self.beyond > BEYOND else ""
        return f"from scratch overtakes at {human(self.tokens)} tokens ({sure}{far})"

    def to_dict(self) -> dict[str, Any]:
        found = 0 < self.tokens < math.inf
        facts: dict[str, Any] = {"found": found, "tokens": self.tokens if found else None, "line": self.text}
        facts["times"] = self.times if found and math.isfinite(self.times) else None
        return facts | {"beyond": self.beyond if found else None, "looked": list(self.looked)}


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What the laws say of one budget. path: of the points. fits: laws of the kinds that have points. losses: theirs, nats per
    token."""

    path: str
    fits: Mapping[Kind, Fitted]
    losses: Mapping[Kind, Estimate]
    crossover: Crossover | None
    dense_tokens: float

    @property
    def verdict(self) -> Kind | Literal["undecided"]:
        """The kind of the lowest loss where that is certain, as far as it concerns upcycling."""
        own, others = self.losses["upcycle"], {kind: e for kind, e in self.losses.items() if kind != "upcycle"}
        best = min(others, key=lambda kind: others[kind].value)
        gap, margin = others[best].value - own.value, CERTAIN * math.hypot(own.error, others[best].error)
        if abs(gap) <= margin or math.isnan(gap):
            return "undecided"
        return "upcycle" if gap > 0 else best

    @property
    def line(self) -> str:
        """In one sentence."""
        said = {
            "upcycle": "upcycling is worth it",
            "undecided": f"undecided, losses differ by less than {CERTAIN:g} standard errors",
            "scratch": "train from scratch",
            "dense": "train the dense model on",
        }
        values = ", ".join(f"{name} {self.losses[kind].value:.4g}" for kind, name in NAMES if kind in self.losses)
        return f"{said[self.verdict]}: loss {values}"

    def notes(self) -> tuple[str, ...]:
        """What to know before this is believed."""
        notes = [f"the laws hold for the models and data of {self.path} alone, each at the end of its learning rate schedule"]
        for kind, name in NAMES:
            if kind not in self.losses:
                notes.append(f"{name}: {self.path} has no points of kind {kind} ({NEEDED[kind]} are needed), so nothing is said")
        own = self.fits["upcycle"]
        ends = sorted(point.dense_tokens for point in own.points)[:: len(own.points) - 1]
        powers = [own.law.exponent(tokens) for tokens in ends]
        way = "less each counts, as was published" if own.law.a3 > 0 else "more each counts, unlike what was published"
        notes.append(
            f"tokens after upcycling count to the power of -{powers[0]:.3g} after {human(ends[0])} dense tokens and of "
            f"-{powers[1]:.3g} after {human(ends[1])}: the longer the dense training, the {way}"
        )
        if own.law.exponent(self.dense_tokens) <= 0:
            notes.append(
                f"after {human(self.dense_tokens)} dense tokens the law has the upcycled loss rise: it is out of its range"
            )
        return tuple(notes)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON; what is not finite is null."""
        return {
            "verdict": self.verdict,
            "line": self.line,
            "points": self.path,
            "losses": {kind: {name: _finite(v) for name, v in vars(estimate).items()} for kind, estimate in self.losses.items()},
            "crossover": None if self.crossover is None else self.crossover.to_dict(),
            "laws": {kind: fitted.to_dict() for kind, fitted in self.fits.items()},
            "notes": list(self.notes()),
        }

    def render(self) -> str:
        """For the console."""
        lines = [f"  {name:18}loss {self.losses[kind].text}" for kind, name in NAMES if kind in self.losses]
        lines += [] if self.crossover is None else [f"  crossover         {self.crossover.text}"]
        lines += [f"  law, {kind:13}{fitted.text}" for kind, fitted in self.fits.items()]
        return "\n".join(lines + [f"  note: {note}" for note in self.notes()])


def forecast(path: str, points: Sequence[Point], *, dense_tokens: float, tokens: float, continued_tokens: float) -> Forecast:
    """Fit a law to every kind that there are points of, and evaluate them.

    path: where the points come from. dense_tokens: D1. tokens: D2, and those of a model of the same shape from scratch.
    continued_tokens: what the dense model gets for the same FLOPs, on top of dense_tokens.
    Raises ConfigError as `fit`, and where there is nothing to compare upcycling with.
    """
    kinds = {point.kind for point in points}
    if "upcycle" not in kinds or len(kinds) < 2:
        have = ", ".join(sorted(kinds)) or "none"
        what = f"{path} has points of kind {have}; needed are {NEEDED['upcycle']} of kind upcycle and"
        what = f"{what} {NEEDED['scratch']} of kind scratch or dense, as rows of {','.join(COLUMNS)}"
        raise ConfigError([Problem("--losses", what)])
    places: dict[Kind, tuple[float, float]] = {
        "upcycle": (dense_tokens, tokens),
        "dense": (1.0, dense_tokens + continued_tokens),
        "scratch": (1.0, tokens),
    }
    fits = {kind: fit(kind, points) for kind, _ in NAMES if kind in kinds}
    losses = {kind: fitted.predict(*places[kind]) for kind, fitted in fits.items()}
    crossover = _crossover(fits["upcycle"], fits["scratch"], dense_tokens) if "scratch" in fits else None
    return Forecast(path=path, fits=fits, losses=losses, crossover=crossover, dense_tokens=dense_tokens)


def _crossover(upcycled: Fitted, scratch: Fitted, dense_tokens: float) -> Crossover:
    measured = [point.tokens for fitted in (upcycled, scratch) for point in fitted.points]
    looked = (min(measured) / SEARCHED, max(measured) * SEARCHED)

    def crossing(law: Law, other: Law) -> float:
        return _crossing(law, other, dense_tokens, looked)

    tokens = crossing(upcycled.law, scratch.law)
    if not 0 < tokens < math.inf:
        return Crossover(tokens, math.inf, 1.0, looked)
    sides = (
        [crossing(law, scratch.law) for law in upcycled.without],
        [crossing(upcycled.law, law) for law in scratch.without],
    )
    logs = [[math.log(t) if 0 < t < math.inf else math.inf for t in side] for side in sides]
    error = math.hypot(*(jackknife(side) for side in logs))
    times = math.exp(error) if error < 50 else math.inf
    beyond = max(upcycled.beyond(1, tokens), scratch.beyond(1, tokens), upcycled.beyond(0, dense_tokens))
    return Crossover(tokens, times, beyond, looked)


def _crossing(upcycled: Law, scratch: Law, dense_tokens: float, looked: tuple[float, float]) -> float:
    """The fewest tokens from which on the loss from scratch is lower, by bisection; 0 or infinity where it always or never is."""

    def ahead(log_tokens: float) -> bool:
        tokens = math.exp(log_tokens)
        return scratch.loss(1.0, tokens) < upcycled.loss(dense_tokens, tokens)

    grid = [float(x) for x in np.linspace(math.log(looked[0]), math.log(looked[1]), GRID)]
    states = [ahead(x) for x in grid]
    if all(states):
        return 0.0
    turns = [i for i in range(GRID - 1) if not states[i] and states[i + 1]]
    if not turns:
        return math.inf
    low, high = grid[turns[0]], grid[turns[0] + 1]
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if ahead(middle) else (middle, high)
    return math.exp(high)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
