"""How wide experts are, and which neurons of the dense FFN each of them has. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from ..checks import raise_if
from ..config import ModelConfig
from ..errors import ConfigError, Problem
from .options import UpcycleOptions


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Where the neurons of one dense FFN go.

    dense: its neurons F. shared: (start, stop) of those that the shared expert has; empty = none.
    pieces: (start, stop) of each piece of a copy, counted in neurons of the dense FFN.
    expert_dim, shared_dim: hidden widths as stored, zeros of padding included; 0 = there is no shared expert.
    """

    dense: int
    shared: tuple[int, int]
    pieces: tuple[tuple[int, int], ...]
    expert_dim: int
    shared_dim: int

    @property
    def routed(self) -> tuple[int, int]:
        """(start, stop) of the neurons that routed experts have."""
        return self.pieces[0][0], self.pieces[-1][1]


def find_sizes(dense: ModelConfig, options: UpcycleOptions) -> Sizes:
    """Cut the FFN of `dense` as `options` say.

    Raises ConfigError for a model that has experts already and for widths that cannot be cut, with those that can.
    """
    if dense.moe is not None or dense.dense_ffn_dim is None:
        raise ConfigError([Problem("upcycle", "starts from a dense model, but the one given has experts already")])
    F, G, multiple = dense.dense_ffn_dim, options.pieces, options.pad_multiple or 1
    if options.method == "dense_shared":
        pieces = _cut(0, F, G, 0, options)
        return Sizes(
            dense=F, shared=(0, F), pieces=pieces, expert_dim=_width(pieces, multiple), shared_dim=_round_up(F, multiple)
        )
    n, width = options.num_shared_experts, options.shared_width or 0
    if options.shared_init == "zero" or not (n or width):
        pieces = _cut(0, F, G, 0, options)
        expert_dim = _width(pieces, multiple)
        shared_dim = n * expert_dim or _round_up(width, multiple)
        _check_shared(shared_dim, F, options)
        return Sizes(dense=F, shared=(0, 0), pieces=pieces, expert_dim=expert_dim, shared_dim=shared_dim)
    if n:
        pieces = _cut(0, F, G + n, n, options)
        expert_dim = _width(pieces, multiple)
        return Sizes(dense=F, shared=(0, pieces[n - 1][1]), pieces=pieces[n:], expert_dim=expert_dim, shared_dim=n * expert_dim)
    if width >= F:
        what = f"is {width}, but the FFN has {F} neurons and routed experts need some; for all of it, use method 'dense_shared'"
        raise ConfigError([Problem("upcycle.shared_width", what)])
    pieces = _cut(width, F, G, 0, options)
    return Sizes(
        dense=F,
        shared=(0, width),
        pieces=pieces,
        expert_dim=_width(pieces, multiple),
        shared_dim=_round_up(width, multiple),
    )


def _cut(start: int, stop: int, pieces: int, shared: int, options: UpcycleOptions) -> tuple[tuple[int, int], ...]:
    """Bounds of `pieces` equal parts of neurons start..stop, or such that differ by one where padding makes them equal."""
    width, problems = stop - start, []
    name = "num_experts" if options.method == "split" and options.granularity is None else "granularity"
    if pieces > width:
        problems.append(Problem(f"upcycle.{name}", f"cuts {pieces} pieces from {width} neurons; at most {width - shared}"))
    elif width % pieces and options.pad_multiple is None:
        legal = [d - shared for d in range(shared + 1, width + 1) if width % d == 0]
        more = f" beside num_shared_experts = {shared}" if shared else ""
        what = f"is {pieces - shared}, which does not cut {width} neurons evenly{more}; legal: {legal}, or set pad_multiple"
        problems.append(Problem(f"upcycle.{name}", what))
    raise_if(problems)
    bounds = [start + i * width // pieces for i in range(pieces + 1)]
    return tuple(pairwise(bounds))


def _check_shared(shared_dim: int, dense: int, options: UpcycleOptions) -> None:
    """A shared expert without output is still made of the dense FFN's neurons, which must be enough."""
    if shared_dim > _round_up(dense, options.pad_multiple or 1):
        name = "num_shared_experts" if options.num_shared_experts else "shared_width"
        what = f"is {getattr(options, name)}, a width of {shared_dim}, but the FFN has only {dense} neurons"
        raise ConfigError([Problem(f"upcycle.{name}", what)])


def _width(pieces: tuple[tuple[int, int], ...], multiple: int) -> int:
    return _round_up(max(stop - start for start, stop in pieces), multiple)


def _round_up(width: int, multiple: int) -> int:
    return -(-width // multiple) * multiple


def output_scale(options: UpcycleOptions, num_experts: int) -> float:
    """Factor by which experts are scaled so that the chosen ones give the dense FFN's output.

    A chosen expert's weight is w = scaling_factor / K where weights are normalised, and scaling_factor / E (softmax) or
    scaling_factor / 2 (sigmoid) where not and all logits are 0. Of K chosen pieces, K / G make up one copy, so that the factor
    is G / (w * K): G, E * G / K, 2 * G / K for scaling_factor = 1 (E * G^2 / T in arXiv 2410.07524, whose E counts copies).
    """
    if options.normalized:
        weight = 1 / options.top_k
    else:
        weight = 0.5 if options.score == "sigmoid" else 1 / num_experts
    return options.pieces / (weight * options.top_k * options.scaling_factor)
