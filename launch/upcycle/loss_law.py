"""Laws of loss over training tokens, fitted to measured points. Imports numpy, no torch.

Upcycled models follow L(D1, D2) = A D1^-a1 D2^(-a2 + a3 log D1) + E, with D1 the tokens of the dense model and D2 those after
upcycling (Liew et al., arXiv 2502.03009); dense models and those from scratch follow L(D) = B D^-b + E. Coefficients belong to
the models and data of the points, so that none are built in.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from ...moe.checks import raise_if
from ...moe.errors import ConfigError, Problem
from ..console import human

Kind = Literal["dense", "scratch", "upcycle"]
Array = npt.NDArray[np.float64]

COLUMNS = ("kind", "dense_tokens", "tokens", "loss")
NEEDED = MappingProxyType({"dense": 5, "scratch": 5, "upcycle": 7})
"""Fewest points of a kind: its coefficients, and two more, so that leaving one out still leaves something to judge by."""
SPREAD = 2.0
"""Smallest ratio of the largest to the smallest value in a column."""
BEYOND = 3.0
"""How many times beyond the measured tokens is said to be beyond the measured range."""
NEAREST, GRID, HALVINGS = 1e-6, 41, 36
"""Search of the floor: closest to the lowest loss (as a share of it), places that are tried first, steps after that."""
OUTLIER = 3.0
"""A point below the floor of all others by so many of their root mean square residuals belongs to something else."""


@dataclass(frozen=True)
class Point:
    """A measured loss, nats per token. dense_tokens: before upcycling. tokens: since then, or of all. where: FILE:line."""

    kind: Kind
    dense_tokens: float
    tokens: float
    loss: float
    where: str

    @property
    def place(self) -> tuple[float, float]:
        """What the law is a function of, (D1, D2); a dense model's tokens count together, and have no D1."""
        return (self.dense_tokens, self.tokens) if self.kind == "upcycle" else (1.0, self.dense_tokens + self.tokens)


@dataclass(frozen=True)
class Estimate:
    """A predicted value. error: its standard error by the jackknife. beyond: how many times outside the measured tokens."""

    value: float
    error: float
    beyond: float

    @property
    def text(self) -> str:
        far = f", {self.beyond:.3g} times beyond the measured range" if self.beyond > BEYOND else ""
        return f"{self.value:.4g} +- {self.error:.2g}{far}"


@dataclass(frozen=True)
class Law:
    """loss = exp(log_scale) D1^-a1 D2^(-a2 + a3 log D1) + floor, with natural logarithms; a1 = a3 = 0 but for upcycled models."""

    log_scale: float
    a1: float
    a2: float
    a3: float
    floor: float

    def exponent(self, dense_tokens: float) -> float:
        """Of tokens: the loss above the floor falls with tokens to the power of minus this."""
        return self.a2 - self.a3 * math.log(dense_tokens)

    def power(self, dense_tokens: float) -> tuple[float, float]:
        """s and b of the loss above the floor at some D1, exp(s) D2^-b."""
        return self.log_scale - self.a1 * math.log(dense_tokens), self.exponent(dense_tokens)

    def loss(self, dense_tokens: float, tokens: float) -> float:
        """At D1, D2; infinite where that is beyond float64."""
        log_scale, exponent = self.power(dense_tokens)
        power = log_scale - exponent * math.log(tokens)
        return self.floor + (math.exp(power) if power < 700 else math.inf)


@dataclass(frozen=True)
class Fitted:
    """A law and the points it was fitted to. without: laws fitted to all points but one. rms, largest: relative residuals."""

    kind: Kind
    points: tuple[Point, ...]
    law: Law
    without: tuple[Law, ...]
    rms: float
    largest: float

    def predict(self, dense_tokens: float, tokens: float) -> Estimate:
        """The loss at D1, D2 (D1 = 1 but for upcycled models)."""
        error = jackknife([law.loss(dense_tokens, tokens) for law in self.without])
        return Estimate(self.law.loss(dense_tokens, tokens), error, max(self.beyond(0, dense_tokens), self.beyond(1, tokens)))

    def beyond(self, axis: Literal[0, 1], value: float) -> float:
        """How many times outside the measured range; 1 = inside."""
        there = [point.place[axis] for point in self.points]
        return max(1.0, value / max(there), min(there) / value)

    def to_dict(self) -> dict[str, Any]:
        names = ("log_scale", "a1", "a2", "a3", "floor") if self.kind == "upcycle" else ("log_scale", "a2", "floor")
        found = {name: {"value": getattr(self.law, name), "error": self.error(name)} for name in names}
        facts: dict[str, Any] = {"points": len(self.points), "rms_percent": 100 * self.rms, "largest_percent": 100 * self.largest}
        return facts | {"coefficients": found}

    def error(self, name: str) -> float:
        """Standard error of a coefficient, by the jackknife."""
        return jackknife([getattr(law, name) for law in self.without])

    @property
    def text(self) -> str:
        """One line."""
        law = self.law
        shape = f"D^-{law.a2:.3g}" if self.kind != "upcycle" else f"D1^-{law.a1:.3g} D2^(-{law.a2:.3g} + {law.a3:.3g} log D1)"
        fit = f"{len(self.points)} points, off by {100 * self.rms:.2g} % (RMS), {100 * self.largest:.2g} % at most"
        return f"exp({law.log_scale:.3g}) {shape} + {law.floor:.3g} (+- {self.error('floor'):.2g}); {fit}"


def jackknife(values: Sequence[float]) -> float:
    """Standard error of a statistic from its values with one point left out each (Quenouille 1956, Tukey 1958)."""
    n = len(values)
    if not all(map(math.isfinite, values)):
        return math.inf
    return float(np.sqrt((n - 1) * np.var(np.asarray(values))))


# --- points -----------------------------------------------------------------------------------------------------------


def read_points(path: str | Path) -> tuple[Point, ...]:
    """Points of a CSV file: the columns kind (dense, scratch, upcycle), dense_tokens, tokens, loss, in any order.

    dense_tokens may be empty for dense and scratch. Further columns are not looked at; lines that begin with # are comments.
    Raises ConfigError with every line that cannot be used, and why.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([Problem("--losses", f"{path} cannot be read: {error}")]) from error
    rows = [(number, line) for number, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not rows:
        raise ConfigError([Problem(str(path), f"is empty; it needs the columns {','.join(COLUMNS)}")])
    problems, points = list[Problem](), list[Point]()
    header = _cells(rows[0][1], f"{path}:{rows[0][0]}")
    if isinstance(header, Problem):
        raise ConfigError([header])
    twice = [name for name in COLUMNS if header.count(name) > 1]
    absent = [name for name in COLUMNS if name not in header]
    problems += [Problem(f"{path}:{rows[0][0]}", f"has the column {name} more than once; keep one") for name in twice]
    problems += [Problem(f"{path}:{rows[0][0]}", f"has no column {name}; needed are {','.join(COLUMNS)}") for name in absent]
    raise_if(problems)
    for number, line in rows[1:]:
        where = f"{path}:{number}"
        row = _cells(line, where)
        if isinstance(row, Problem):
            problems.append(row)
            continue
        if len(row) != len(header):
            problems.append(Problem(where, f"has {len(row)} cells, but the header {len(header)}"))
            continue
        found = _point(dict(zip(header, row, strict=True)), where)
        if isinstance(found, Point):
            points.append(found)
        else:
            problems += found
    raise_if(problems)
    return tuple(points)


def _cells(line: str, where: str) -> list[str] | Problem:
    """Of one line, which is read by itself: a quote that is left open would swallow the lines after it."""
    try:
        return [cell.strip() for row in csv.reader([line], strict=True) for cell in row]
    except csv.Error as error:
        hint = "; a quoted cell must end on the line it begins on" if '"' in line else ""
        return Problem(where, f"is no line of CSV ({error}){hint}")


def _point(row: dict[str, str], where: str) -> Point | list[Problem]:
    kind, problems, numbers = row["kind"], list[Problem](), dict[str, float]()
    if kind not in get_args(Kind):
        return [Problem(where, f"kind is {kind!r}, but must be one of {', '.join(get_args(Kind))}")]
    for name in COLUMNS[1:]:
        optional = name == "dense_tokens" and kind != "upcycle"
        try:
            numbers[name] = float(row[name] or ("0" if optional else ""))
        except ValueError:
            problems.append(Problem(where, f"{name} is {row[name]!r}, which is no number"))
            continue
        least = "at least 0" if optional else "over 0"
        if not (0 < numbers[name] < math.inf or (optional and numbers[name] == 0)):
            of_dense = (kind, name) == ("dense", "tokens")
            hint = "; it counts all that the model has seen, dense_tokens may be empty" if of_dense else ""
            problems.append(Problem(where, f"{name} is {row[name]}, but must be a finite number {least}{hint}"))
    if kind == "scratch" and numbers.get("dense_tokens", 0) > 0:
        problems.append(
            Problem(where, f"dense_tokens is {row['dense_tokens']}, but a model from scratch has none: leave it empty")
        )
    return problems or Point(cast(Kind, kind), numbers["dense_tokens"], numbers["tokens"], numbers["loss"], where)


# --- fit --------------------------------------------------------------------------------------------------------------


def fit(kind: Kind, points: Sequence[Point]) -> Fitted:
    """The law of one kind, fitted to its points by least squares of relative residuals; the same on every run.

    For each floor, the logarithm of what is above it is linear in the other coefficients; the floor itself is found by trying
    places between 0 and the lowest loss, spaced evenly in the logarithm of the distance to it, and golden section.
    Raises ConfigError for points that do not determine the coefficients: too few, without spread, or below the floor of the
    others.
    """
    points = tuple(point for point in points if point.kind == kind)
    _check(kind, points)
    law = _law(kind, points)
    without = []
    for left_out in points:
        others = [point for point in points if point is not left_out]
        if not _determined(kind, others):
            what = f"is the only point that the interaction or an exponent of kind {kind} rests on: measure more like it"
            raise ConfigError([Problem(left_out.where, what)])
        without.append(_law(kind, others))
        rms = float(np.sqrt(np.mean(_residuals(without[-1], others) ** 2)))
        if left_out.loss < without[-1].floor * (1 - OUTLIER * rms) and left_out.loss < without[-1].floor - 1e-9:
            what = (
                f"loss is {left_out.loss:g}, below the floor of {without[-1].floor:.4g} that the other points of kind {kind} have"
            )
            raise ConfigError([Problem(left_out.where, f"{what}: it was measured otherwise, or is of another model or data")])
    relative = _residuals(law, points)
    return Fitted(kind, points, law, tuple(without), float(np.sqrt(np.mean(relative**2))), float(np.abs(relative).max()))


def _check(kind: Kind, points: Sequence[Point]) -> None:
    """Raise ConfigError unless the points can determine a law."""
    if len(points) < NEEDED[kind]:
        needs = ", ".join(f"{count} of kind {name}" for name, count in NEEDED.items())
        raise ConfigError([Problem("--losses", f"has {len(points)} points of kind {kind}; a law needs at least {needs}")])
    problems = []
    for axis in (0, 1) if kind == "upcycle" else (1,):
        there, name = {point.place[axis] for point in points}, COLUMNS[1 + axis]
        if max(there) < SPREAD * min(there):
            what = (
                f"{name} of kind {kind} go from {human(min(there))} to {human(max(there))} only, so nothing can be said of how "
            )
            problems.append(Problem("--losses", f"{what}the loss depends on them: measure at {SPREAD:g} times as many at least"))
    if len({point.place[1] for point in points}) < 3:
        problems.append(
            Problem("--losses", f"has fewer than three different numbers of tokens of kind {kind}, so no floor shows")
        )
    raise_if(problems)
    if not _determined(kind, points):
        what = f"dense_tokens and tokens of kind {kind} change together, so their effects cannot be told apart"
        raise ConfigError([Problem("--losses", f"{what}: measure several tokens for each dense model")])


def _design(kind: Kind, points: Sequence[Point]) -> tuple[Array, float, float]:
    """Columns 1, x1, x2, x1 x2 (1 and x2 for one variable) of centred logarithms [n, 4 or 2], and the two centres."""
    logs = np.log(np.array([point.place for point in points]))
    m1, m2 = (float(m) for m in logs.mean(0))
    x1, x2 = logs[:, 0] - m1, logs[:, 1] - m2
    one = np.ones_like(x1)
    return np.stack((one, x1, x2, x1 * x2) if kind == "upcycle" else (one, x2), axis=1), m1, m2


def _determined(kind: Kind, points: Sequence[Point]) -> bool:
    design = _design(kind, points)[0]
    sizes = np.linalg.norm(design, axis=0)
    return bool((sizes > 1e-6).all()) and int(np.linalg.matrix_rank(design / sizes, tol=1e-6)) == design.shape[1]


def _law(kind: Kind, points: Sequence[Point]) -> Law:
    design, m1, m2 = _design(kind, points)
    loss = np.array([point.loss for point in points])
    lowest = float(loss.min())

    def at(nearness: float) -> tuple[float, Array]:
        """Sum of squared relative residuals, and coefficients, for a floor at some log distance from the lowest loss."""
        floor = lowest * -math.expm1(nearness)
        # a weight turns errors of the logarithm into relative errors of the loss: noise is about equal in those
        weight = (loss - floor) / loss
        c = np.linalg.lstsq(design * weight[:, None], np.log(loss - floor) * weight, rcond=None)[0]
        with np.errstate(over="ignore"):
            return float(np.sum(((floor + np.exp(design @ c)) / loss - 1) ** 2)), c

    best = _lowest(lambda nearness: at(nearness)[0], math.log(NEAREST), 0.0)
    c = at(best)[1]
    c0, c1, c2, c3 = c if kind == "upcycle" else (c[0], 0.0, c[1], 0.0)
    floor = lowest * -math.expm1(best)
    log_scale = c0 - c1 * m1 - c2 * m2 + c3 * m1 * m2
    return Law(float(log_scale), float(c3 * m2 - c1), float(c3 * m1 - c2), float(c3), floor)


def _lowest(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a function of one variable is lowest: the best of a grid, then golden section between its neighbours."""
    grid = np.linspace(low, high, GRID)
    found = int(np.argmin([function(float(x)) for x in grid]))
    a, b = float(grid[max(found - 1, 0)]), float(grid[min(found + 1, GRID - 1)])
    golden = (math.sqrt(5) - 1) / 2
    c, d = b - golden * (b - a), a + golden * (b - a)
    at_c, at_d = function(c), function(d)
    for _ in range(HALVINGS):
        if at_c < at_d:
            b, d, at_d = d, c, at_c
            c = b - golden * (b - a)
            at_c = function(c)
        else:
            a, c, at_c = c, d, at_d
            d = a + golden * (b - a)
            at_d = function(d)
    return (a + b) / 2


def _residuals(law: Law, points: Sequence[Point]) -> Array:
    return np.array([law.loss(*point.place) / point.loss - 1 for point in points])
