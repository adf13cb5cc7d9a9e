"""What fitted laws of loss say at a budget: upcycled, dense trained on, from scratch, and where they cross."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from ...moe.errors import ConfigError, Problem
from ..console import human
from .loss_law import BEYOND, COLUMNS, NEEDED, Estimate, Fitted, Kind, Law, Point, fit, jackknife

CERTAIN = 2.0
"""A difference counts where it is more than so many of its standard errors."""
SEARCHED, HALVINGS = 1e4, 60
"""Search of a crossover: how many times beyond the measured tokens on either side, and bisections of each interval."""
Leader = Literal["scratch", "upcycle"]
NAMES: tuple[tuple[Kind, str], ...] = (("upcycle", "upcycled"), ("dense", "dense trained on"), ("scratch", "from scratch"))


@dataclass(frozen=True)
class Turn:
    """Tokens from which on another model has the lower loss. to: which.

    times: uncertainty as a factor (the jackknife's standard error of the logarithm), infinite where some point decides whether
    there is such a turn at all. beyond: how many times outside the measured tokens.
    """

    to: Leader
    tokens: float
    times: float
    beyond: float

    @property
    def sure(self) -> str:
        sure = f"times or divided by {self.times:.3g}" if math.isfinite(self.times) else "which rests on single points"
        far = f", {self.beyond:.3g} times beyond the measured range" if self.beyond > BEYOND else ""
        return f"({sure}{far})"


@dataclass(frozen=True)
class Crossover:
    """Who is ahead, of a model from scratch and the upcycled one of the same shape, which takes the same FLOPs per token.

    first: who is at the fewest tokens. turns: at most two, in the order of their tokens, which are those of both models.
    looked: smallest and largest tokens of the search, the budget among them.
    """

    first: Leader
    turns: tuple[Turn, ...]
    looked: tuple[float, float]

    @property
    def text(self) -> str:
        """In one sentence; "overtakes" is said of a turn that is the only one."""
        if not self.turns and self.first == "scratch":
            return f"from scratch is ahead everywhere, from {human(self.looked[0])} to {human(self.looked[1])} tokens"
        if not self.turns:
            return f"from scratch is never ahead, up to {human(self.looked[1])} tokens"
        at = [human(turn.tokens) for turn in self.turns]
        if len(self.turns) == 2:
            names = {"scratch": "from scratch", "upcycle": "upcycled"}
            between, around = names[self.turns[0].to], names[self.first]
            begin, end = (turn.sure for turn in self.turns)
            return f"{between} is ahead from {at[0]} tokens {begin} to {at[1]} tokens {end}, {around} before and after"
        if self.first == "scratch":
            return f"from scratch is ahead up to {at[0]} tokens, upcycled after {self.turns[0].sure}"
        return f"from scratch overtakes at {at[0]} tokens {self.turns[0].sure}"

    def to_dict(self) -> dict[str, Any]:
        """direction: who is ahead after the last turn, which tokens, times and beyond are of."""
        turns = [{name: _finite(v) if isinstance(v, float) else v for name, v in vars(turn).items()} for turn in self.turns]
        last = turns[-1] if turns else dict.fromkeys(("to", "tokens", "times", "beyond"))
        facts = {"found": bool(turns), "direction": last["to"], **{name: last[name] for name in ("tokens", "times", "beyond")}}
        return facts | {"line": self.text, "first": self.first, "turns": turns, "looked": list(self.looked)}


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
        return (*notes, self._interaction(), *self._rising())

    def _interaction(self) -> str:
        own = self.fits["upcycle"]
        ends = sorted(point.dense_tokens for point in own.points)[:: len(own.points) - 1]
        powers = [own.law.exponent(tokens) for tokens in ends]
        a3, error = own.law.a3, own.error("a3")
        # also where both are zero: nothing was seen
        if abs(a3) <= CERTAIN * error or not a3:
            said = f"these points do not show an interaction with the dense training ({a3:.2g} +- {error:.2g})"
        else:
            way = "less each counts, as was published" if a3 > 0 else "more each counts, unlike what was published"
            said = f"the longer the dense training, the {way}"
        return (
            f"tokens after upcycling count to the power of {-powers[0]:.3g} after {human(ends[0])} dense tokens and of "
            f"{-powers[1]:.3g} after {human(ends[1])}: {said}"
        )

    def _rising(self) -> list[str]:
        """Every law that has more tokens do no good."""
        found = []
        for kind, name in NAMES:
            if kind in self.fits and self.fits[kind].law.exponent(self.dense_tokens if kind == "upcycle" else 1.0) <= 0:
                place = f" after {human(self.dense_tokens)} dense tokens" if kind == "upcycle" else ""
                found.append(f"{name}{place}: by its law the loss does not fall with tokens: it is out of its range")
        return found

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
    crossover = None
    if "scratch" in fits:
        crossover = find_crossover(fits["upcycle"], fits["scratch"], dense_tokens=dense_tokens, tokens=tokens)
    return Forecast(path=path, fits=fits, losses=losses, crossover=crossover, dense_tokens=dense_tokens)


def find_crossover(upcycled: Fitted, scratch: Fitted, *, dense_tokens: float, tokens: float) -> Crossover:
    """Of two fitted laws at some D1. tokens: of the budget, which is among those that are looked at however far it is."""
    measured = [point.tokens for fitted in (upcycled, scratch) for point in fitted.points]
    # from 0 or up to infinity there is no logarithm
    low, high = max(min(measured) / SEARCHED, sys.float_info.min), min(max(measured) * SEARCHED, sys.float_info.max)
    looked = (min(low, tokens), max(high, tokens))

    def turns(law: Law, other: Law) -> dict[Leader, float]:
        return _turns(law, other, dense_tokens, looked)[1]

    first, found = _turns(upcycled.law, scratch.law, dense_tokens, looked)
    sides = ([turns(law, scratch.law) for law in upcycled.without], [turns(upcycled.law, law) for law in scratch.without])
    made = []
    for to, at in found.items():
        logs = [[math.log(side[to]) if to in side else math.inf for side in each] for each in sides]
        error = math.hypot(*(jackknife(side) for side in logs))
        beyond = max(upcycled.beyond(1, at), scratch.beyond(1, at), upcycled.beyond(0, dense_tokens))
        made.append(Turn(to, at, math.exp(error) if error < 50 else math.inf, beyond))
    return Crossover(first, tuple(made), looked)


def _turns(upcycled: Law, scratch: Law, dense_tokens: float, looked: tuple[float, float]) -> tuple[Leader, dict[Leader, float]]:
    """Who is ahead at the fewest tokens, and from how many tokens on another is, by who that is, in the order of tokens.

    The difference of two power laws has one extremum at most. On either side of it there is one turn at most, which bisection
    finds however close to the other it is; a grid could step over both. So there are at most two, in opposite directions.
    """
    own, other = (upcycled.power(dense_tokens), upcycled.floor), (scratch.power(1.0), scratch.floor)

    def gap(log_tokens: float) -> float:
        """Of the sign of the loss from scratch minus that of the upcycled; scaled, so that neither overflows."""
        powers = [log_scale - exponent * log_tokens for log_scale, exponent in (own[0], other[0])]
        top = max(0.0, *powers)
        return (other[1] - own[1]) * math.exp(-top) + math.exp(powers[1] - top) - math.exp(powers[0] - top)

    ends = [math.log(looked[0]), *_extremum(own[0], other[0]), math.log(looked[1])]
    places = [x for x in ends if ends[0] <= x <= ends[-1] and gap(x)]
    # of equal laws neither is ahead anywhere
    first: Leader = "scratch" if places and gap(places[0]) < 0 else "upcycle"
    found = dict[Leader, float]()
    for low, high in pairwise(places):
        to: Leader = "scratch" if gap(high) < 0 else "upcycle"
        if (gap(low) < 0) == (gap(high) < 0):
            continue
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if (gap(middle) < 0) == (to == "scratch") else (middle, high)
        found[to] = math.exp(high)
    return first, found


def _extremum(own: tuple[float, float], other: tuple[float, float]) -> list[float]:
    """Logarithm of the tokens where exp(s1 - b1 x) - exp(s2 - b2 x) has the derivative zero; empty where it has none."""
    (s1, b1), (s2, b2) = own, other
    if b1 * b2 <= 0 or b1 == b2:
        return []
    return [(s1 + math.log(abs(b1)) - s2 - math.log(abs(b2))) / (b1 - b2)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
