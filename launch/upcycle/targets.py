"""Which format the result is written in: that asked for, if it holds the model and keeps the function; or the best that does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...moe.config import ModelConfig
from ...moe.errors import ConfigError, Problem
from ...moe.hf.families import FAMILIES, NATIVE, REFUSED
from ...moe.hf.family import Family, NotHeldError, Runtime
from ...moe.hf.rewrites import Rewrite, adapt
from ...moe.hf.rules import TARGETS
from ...moe.upcycle.build import fitted
from ...moe.upcycle.methods import METHODS
from ...moe.upcycle.options import UpcycleOptions

AUTO, OWN = "auto", "native"
EXACT_METHODS = "copy, virtual_groups and dense_shared"


class RefusedError(ConfigError):
    """An upcycling that is not done: the format cannot hold the model, or the result would compute something else."""

    title = "not upcycled"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One format, and what upcycling into it would be.

    options: with the format's own routing where none was asked for; None where they fit no more then. config: the model as the
    format holds it, after `rewrites`. reasons: why it cannot be written; config is None then. gap: why the result would not
    compute what the dense model does.
    """

    target: str
    options: UpcycleOptions | None = None
    config: ModelConfig | None = None
    rewrites: tuple[Rewrite, ...] = ()
    reasons: tuple[str, ...] = ()
    gap: str | None = None

    @property
    def exact(self) -> bool:
        return not self.reasons and self.gap is None

    @property
    def splits(self) -> bool:
        """Whether ties of rounded router logits could still choose a part of a copy."""
        if self.options is None or self.config is None or self.config.moe is None:
            return False
        copies, limited = self.options.method in ("virtual_groups", "drop", "noise"), self.config.moe.router.num_groups > 1
        return copies and self.options.pieces > 1 and self.options.top_k < self.config.moe.num_experts and not limited

    def verdict(self) -> str:
        """In a few words."""
        if self.reasons:
            more = f" (and {len(self.reasons) - 1} more)" if len(self.reasons) > 1 else ""
            return f"cannot hold it: {self.reasons[0]}{more}"
        how = f" after {', '.join(rewrite.name for rewrite in self.rewrites)}" if self.rewrites else ""
        ties = "; has no group limit, so that ties of 16-bit router logits may split a copy" if self.splits else ""
        return f"holds it, but the method is not exact{how}{ties}" if self.gap else f"exact{how}{ties}"


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The format that was taken. considered: verdict on every format that was looked at, by name."""

    taken: Candidate
    considered: Mapping[str, str]

    def lines(self) -> list[str]:
        """Why this one, in a line for each format."""
        name = self.taken.target
        others = [
            f"{'also' if verdict.startswith('exact') else 'not'} {other}: {verdict}"
            for other, verdict in self.considered.items()
            if other != name
        ]
        return [f"format {name}: {self.considered[name]}", *others]


def family_named(target: str) -> Family:
    """The family of a target; `native` is our own. Raises ConfigError for a name that is none."""
    name = NATIVE if target == OWN else target
    if name in FAMILIES:
        return FAMILIES[name]
    held = [family for family in TARGETS if family in FAMILIES]
    why = f"which cannot hold dense models: {REFUSED[name]}" if name in REFUSED else "which is no format that is written"
    raise ConfigError([Problem("upcycle.target", f"is {target!r}, {why}; legal: {AUTO}, {', '.join(held)}, {OWN}")])


def choose(
    dense: Sequence[ModelConfig], target: str, asked: Mapping[str, Any], runtime: Runtime = "transformers", inexact: bool = False
) -> Choice:
    """The format to write, `target` or, for "auto", by the rules: exact first, then fewest rewrites, then with a limit that keeps
    copies whole, then in the order of the rule table.

    asked: options of `UpcycleOptions` that were given; others follow the format. inexact: whether a method may change what is
    computed. Raises ConfigError for options that fit no format, RefusedError with every reason and the alternatives.
    """
    # what no format can mend is told as it is
    options = UpcycleOptions(**asked)
    METHODS[options.method].plan(list(dense), options)
    if target != AUTO:
        family_named(target)
        taken = consider(dense, target, asked, runtime)
        if taken.reasons or (taken.gap and not inexact):
            raise _refused(taken, [consider(dense, other, asked, runtime) for other in (*_written(), OWN) if other != target])
        return Choice(taken=taken, considered={target: taken.verdict()})
    found = [consider(dense, other, asked, runtime) for other in _written()]
    usable = [c for c in found if not c.reasons and (inexact or c.gap is None)]
    if not usable:
        raise _none_fits([*found, consider(dense, OWN, asked, runtime)], runtime)
    best = min(usable, key=lambda c: (c.gap is not None, len(c.rewrites), c.splits))
    return Choice(taken=best, considered={c.target: c.verdict() for c in found})


def consider(dense: Sequence[ModelConfig], target: str, asked: Mapping[str, Any], runtime: Runtime) -> Candidate:
    """What upcycling into one format would be. Weights are normalised where the format can, since that keeps the function."""
    family = family_named(target)
    routing = family.routing
    usual = {"score": routing.score, "order": routing.order, "expert_bias": family.expert_bias}
    kinds = [usual | {"renormalize": True}, *([] if routing.renormalize else [usual | {"renormalize": False}])]
    found = [_candidate(dense, family, target, {**kind, **asked}, runtime) for kind in kinds]
    return next((c for c in found if c.exact), next((c for c in found if not c.reasons), found[0]))


def _written() -> tuple[str, ...]:
    return tuple(target for target in TARGETS if target in FAMILIES)


def _candidate(
    dense: Sequence[ModelConfig], family: Family, target: str, settings: Mapping[str, Any], runtime: Runtime
) -> Candidate:
    def holds(config: ModelConfig) -> bool:
        try:
            adapt(family, config, runtime)
        except NotHeldError:
            return False
        return True

    try:
        options = fitted(list(dense), UpcycleOptions(**settings), holds)
    except ConfigError as error:
        return Candidate(target=target, reasons=tuple(f"{p.where} {p.what}" for p in error.problems))
    method = METHODS[options.method]
    try:
        config, rewrites = adapt(family, method.plan(list(dense), options), runtime)
    except NotHeldError as error:
        return Candidate(target=target, options=options, reasons=error.reasons)
    gap = method.exact(list(dense), options)
    return Candidate(target=target, options=options, config=config, rewrites=rewrites, gap=gap)


def _refused(taken: Candidate, others: Sequence[Candidate]) -> RefusedError:
    """Every reason against one format, and what could be done instead."""
    exact = [f"--target {c.target}" for c in others if c.exact]
    holding = [f"--target {c.target}" for c in others if not c.reasons and not c.exact]
    if taken.reasons:
        problems = [Problem(taken.target, reason) for reason in taken.reasons]
        way = f"exact with these options: {', '.join(exact)}" if exact else ""
        way = way or (f"these hold the model, but the method changes it: {', '.join(holding)}" if holding else "")
        return RefusedError([*problems, Problem("instead", way or "no format holds this model")])
    way = f"exact are {', '.join(exact)}" if exact else f"exact are the methods {EXACT_METHODS}"
    way += "; or --inexact-ok writes it as it is, and the report says how far off it is"
    method = taken.options.method if taken.options is not None else ""
    return RefusedError([Problem("upcycle.method", f"is {method!r}, not exact here: {taken.gap}"), Problem("instead", way)])


def _none_fits(found: Sequence[Candidate], runtime: str) -> RefusedError:
    """What stands against each format."""
    held = [c for c in found if not c.reasons]
    if any(c.target != OWN for c in held):
        return _refused(next(c for c in held if c.target != OWN), [])
    problems = [Problem(c.target, reason) for c in found for reason in c.reasons]
    own = [c for c in held if c.target == OWN]
    way = f"--target {OWN} holds it, for training here; only moefold reads that" if own else f"another --runtime than {runtime}"
    return RefusedError([*problems, Problem("instead", way)])
