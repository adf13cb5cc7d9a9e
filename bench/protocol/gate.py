"""Correctness before speed: who is not exact enough, or not reproducible where it must be, is not timed.

The measure is the relative L2 error, ||got - exact|| / ||exact||, of every output and gradient by name. Allowed is 1.1 times the
error of the same computation written as plain torch operations in the same dtype, plus the rounding of the comparison itself.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .contender import Contender, Named, Problem
from .timing import one_line

MARGIN = 1.1
COMPARISON = 4 * torch.finfo(torch.float32).eps
"""Errors in fp32 that no comparison tells apart: a different order of summation alone gives as much."""

Judge = Callable[[Named], Mapping[str, float]]
"""Relative errors by name, of all outputs and gradients that there must be; ValueError where one is missing or ill-shaped."""


@dataclass(frozen=True)
class Checked:
    """A contender after its check. errors: relative, by name; first_s: seconds of its first call, compilation included."""

    contender: Contender
    errors: Mapping[str, float]
    first_s: float | None = None
    refused: str | None = None


def relative_error(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact|| in fp64; 0 where both are zero, infinite where only `exact` is."""
    wide = exact.double()
    difference, size = float((got.double() - wide).norm()), float(wide.norm())
    if size == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / size


def against(exact: Named) -> Judge:
    """Judges by results at hand: every name of `exact` must be there, with its shape."""

    def judge(got: Named) -> dict[str, float]:
        check_names(got, {name: x.shape for name, x in exact.items()})
        return {name: relative_error(got[name], x) for name, x in exact.items()}

    return judge


def check_names(got: Named, shapes: Mapping[str, torch.Size | tuple[int, ...]]) -> None:
    """Raises ValueError for a result that is missing or has another shape, naming it."""
    for name, shape in shapes.items():
        if name not in got:
            raise ValueError(f"no {name} among its results ({', '.join(got)})")
        if tuple(got[name].shape) != tuple(shape):
            raise ValueError(f"{name} is {tuple(got[name].shape)}, not {tuple(shape)}")


def allowances(plain: Mapping[str, float]) -> dict[str, float]:
    """From the errors of the plain computation to those that are allowed."""
    return {name: MARGIN * error + COMPARISON for name, error in plain.items()}


def results_of(contender: Contender) -> dict[str, Tensor]:
    """Outputs and gradients by name, in our layout, of one forward and backward."""
    assert contender.forward is not None
    outputs = contender.forward()
    results = {name: x.detach() for name, x in outputs.items()}
    if contender.backward is not None:
        results |= contender.named_gradients(contender.backward(outputs, False))
    return results


def timed_results_of(contender: Contender, device: torch.device) -> tuple[dict[str, Tensor], float]:
    """`results_of`, and the seconds it took, the wait for the device included."""
    start_s = time.perf_counter()
    results = results_of(contender)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return results, time.perf_counter() - start_s


def check(contender: Contender, judge: Judge, allowed: Mapping[str, float], device: torch.device) -> tuple[Checked, Named]:
    """Errors within what is allowed, or the reason for refusal; and the results. An absent contender and a bound pass through."""
    if contender.why_absent is not None or contender.kind == "bound":
        return Checked(contender, {}), {}
    try:
        results, first_s = timed_results_of(contender, device)
        errors = judge(results)
    except Exception as error:
        # whatever another project's code raises: the table shows it, and the others go on
        return Checked(contender, {}, refused=one_line(error)), {}
    wrong = [f"{n} {e:.2e} > {allowed[n]:.2e}" for n, e in errors.items() if not e <= allowed[n]]
    return Checked(contender, errors, first_s, f"error of {', '.join(wrong)}" if wrong else None), results


Demand = Callable[[Contender, Named], str | None]
"""(contender, its results) -> what is wrong with them; None where nothing is."""


def admit(
    contenders: Sequence[Contender],
    judge: Judge,
    allowed: Mapping[str, float],
    device: torch.device,
    demands: Sequence[Demand] = (),
) -> list[Checked]:
    """Check everybody. Ours must also repeat itself to the last bit, and meet `demands`.

    Raises:
        SystemExit: ours fails; there is no point in its speed then.
    """
    out = []
    for contender in contenders:
        checked, results = check(contender, judge, allowed, device)
        if contender.kind == "ours" and contender.why_absent is None:
            wrong = checked.refused or next(
                filter(None, (demand(contender, results) for demand in (check_repeats, *demands))), None
            )
            if wrong:
                raise SystemExit(f"'{contender.name}' fails its check, so nothing is timed: {wrong}")
        out.append(checked)
        del results
        free(device)
    return out


def check_repeats(contender: Contender, results: Named) -> str | None:
    """Why another run on the same input is not bitwise equal to `results`; None where it is."""
    return differences(results, results_of(contender), "two runs differ in")


def check_expert_order(results: Named, permuted: Contender, back: Callable[[Named], Named]) -> str | None:
    """Why results depend on how the experts are numbered; None where they do not, to the last bit.

    permuted: the same contender on the problem with other numbers for the experts; back: from its results to the original's.
    """
    return differences(results, back(results_of(permuted)), "results depend on the order of experts:")


def differences(one: Named, other: Named, says: str) -> str | None:
    """`says` with the names of tensors that are not bitwise equal; None where all are."""
    names = [name for name in one if not torch.equal(one[name], other[name])]
    return f"{says} {', '.join(names)}" if names else None


def renumbered(problem: Problem, new_E: Tensor) -> tuple[Problem, Callable[[Named], Named]]:
    """The same problem where expert e has the number new_E[e]; and the way back for results by the names of `Problem.leaves`.

    Rows in expert order (`grouped`) come in the new order.
    """
    old_E = torch.argsort(new_E)
    indices_TK = new_E[problem.indices_TK]
    rows = torch.arange(problem.shape.T, device=problem.device)
    if problem.shape.grouped:
        rows = indices_TK[:, 0].sort(stable=True).indices
    place = torch.argsort(rows)
    changed = replace(
        problem,
        x_TD=problem.x_TD[rows],
        direction_TD=problem.direction_TD[rows],
        indices_TK=indices_TK[rows],
        weights_TK=problem.weights_TK[rows],
        w13_E2FD=problem.w13_E2FD[old_E],
        w2_EDF=problem.w2_EDF[old_E],
    )

    def back(results: Named) -> Named:
        return {name: x[new_E] if name in ("dW13", "dW2") else x[place] for name, x in results.items()}

    return changed, back


def free(device: torch.device) -> None:
    """Gives memory of checks back before anything is timed."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
