"""Which degrees of parallelism can be laid out on a number of ranks, and what to say about those that cannot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isqrt, lcm, prod
from typing import Any

from ..moe.errors import Problem

_DENSE = ("pp", "cp", "tp")
_EXPERT = ("pp", "ep", "etp")


def divisors(n: int) -> list[int]:
    """All divisors of a positive n, ascending."""
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


def multiples(value: int, unit: int) -> list[int]:
    """The positive multiples of `unit` next to a value that is none."""
    return [m for m in (value // unit * unit, (value // unit + 1) * unit) if m > 0]


def nearest(value: int, legal: Iterable[int]) -> str:
    """The legal values next to an illegal one, as the end of an error message."""
    ascending = sorted(legal)
    around = [v for v in ascending if v < value][-1:] + [v for v in ascending if v > value][:1]
    return f"nearest legal values: {', '.join(map(str, around))}" if around else "no value is legal with the other degrees"


def indivisible(where: str, degree: int, what: str, number: int, legal: list[int]) -> Problem:
    """The problem of a degree that does not divide a number of the model or the batch."""
    return Problem(where, f"is {degree}, but must divide {what} = {number}; {nearest(degree, legal)}")


def fits(world: int, degrees: Mapping[str, Any], *, exact: bool = True) -> bool:
    """Whether positive degrees (pp, cp, tp, etp, ep, hsdp, and dp or None) can be laid out on `world` ranks.

    exact = False: a given dp may leave room, for a degree that is still open.
    """
    dense, expert = (prod(degrees[n] for n in view) for view in (_DENSE, _EXPERT))
    if world % dense or world % expert:
        return False
    rest, dp = world // dense, degrees["dp"]
    if dp is not None and (rest != dp if exact else rest % dp):
        return False
    return bool((rest if dp is None else dp) % degrees["hsdp"] == 0)


def degree_problems(world: int, degrees: dict[str, Any]) -> list[Problem]:
    """Every violation of the given degrees (names as in `fits`), with the nearest legal values.

    Degrees are accepted one after the other, in the order of `degrees`, as long as they fit with those accepted before.
    A rejected one counts as open, so that it neither hides nor causes the violation of another.
    """
    problems = _value_problems(world, degrees)
    broken = {p.where.removeprefix("parallel.") for p in problems}
    if "world" in broken:
        return problems
    accepted: dict[str, Any] = {name: None if name == "dp" else 1 for name in degrees}
    rejected: list[str] = []
    for name, value in degrees.items():
        if name in broken or value is None:
            continue
        exact = not {*broken, *rejected} & {*_DENSE}
        if fits(world, accepted | {name: value}, exact=exact):
            accepted[name] = value
        else:
            rejected.append(name)
    ranks = "" if broken else _other_world(degrees)
    for name in rejected:
        exact = not ({*broken, *rejected} - {name}) & {*_DENSE}
        legal = [d for d in divisors(world) if fits(world, accepted | {name: d}, exact=exact)]
        what = f"is {degrees[name]}, but {_demand(name, world, accepted, exact)}; {nearest(degrees[name], legal)}"
        what += ", or leave it out" if name == "dp" else ""
        # Said once: it is the way out of all of them together.
        what += ranks if name == rejected[0] and name != "hsdp" else ""
        problems.append(Problem(f"parallel.{name}", what))
    return problems


def _value_problems(world: int, degrees: Mapping[str, Any]) -> list[Problem]:
    problems = []
    for name, value in {"world": world, **degrees}.items():
        where = name if name == "world" else f"parallel.{name}"
        if name == "dp" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int):
            problems.append(Problem(where, f"is {value!r}, but must be a whole number"))
        elif value <= 0:
            problems.append(Problem(where, f"is {value}, but must be positive"))
    return problems


def _other_world(degrees: Mapping[str, Any]) -> str:
    """The number of ranks that would fit the degrees as they are, as the end of an error message."""
    dense, expert = (prod(degrees[n] for n in view) for view in (_DENSE, _EXPERT))
    if degrees["dp"] is None:
        return f"; or start a multiple of {lcm(dense, expert)} ranks"
    total = dense * degrees["dp"]
    return f"; or start {total} ranks" if total % expert == 0 else ""


def _demand(name: str, world: int, accepted: Mapping[str, Any], exact: bool) -> str:
    """What the accepted degrees ask of `name`."""
    if name == "hsdp" and accepted["dp"]:
        return f"must divide dp = {accepted['dp']}"
    used = {n: accepted[n] for n in (_EXPERT if name in ("ep", "etp") else _DENSE) if n != name and accepted[n] > 1}
    number, total = str(world), "world"
    if used:
        product, values = " * ".join(used), " * ".join(map(str, used.values()))
        total = f"world / ({product})" if len(used) > 1 else f"world / {product}"
        number = f"{world} / ({values})" if len(used) > 1 else f"{world} / {values}"
        number += f" = {world // prod(used.values())}"
    if name == "hsdp" and exact:
        total = f"dp = {total}"
    return f"must be {total} = {number}" if name == "dp" and exact else f"must divide {total} = {number}"
