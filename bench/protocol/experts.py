"""The experts of a layer one after the other, in any dtype: the exact results, and the plain computation everybody is held to.

One expert at a time, so that the check of a layer with 45 GB of weights in fp32 needs the memory of one expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .contender import Named, Problem
from .gate import check_names, relative_error

SMALL_T = 2048
"""Up to so many tokens the exact results are in fp64, beyond in fp32."""


@dataclass(frozen=True)
class Part:
    """One expert's share: its rows' tokens and choices, outputs (not yet weighted), and gradients of its inputs."""

    expert: int
    tokens_N: Tensor
    choices_N: Tensor
    y_ND: Tensor
    grad_x_ND: Tensor
    grad_w13_2FD: Tensor
    grad_w2_DF: Tensor
    grad_weights_N: Tensor


def exact_dtype(problem: Problem) -> torch.dtype:
    """In what the problem's exact results are formed."""
    return torch.float64 if problem.shape.T <= SMALL_T else torch.float32


def parts(problem: Problem, dtype: torch.dtype) -> Iterator[Part]:
    """Every expert that has rows, computed in `dtype` by torch's operations and its autograd."""
    for expert in range(problem.shape.E):
        tokens_N, choices_N = (problem.indices_TK == expert).nonzero(as_tuple=True)
        if not len(tokens_N):
            continue
        inputs = [problem.x_TD[tokens_N], problem.w13_E2FD[expert], problem.w2_EDF[expert]]
        x_ND, w13_2FD, w2_DF = (x.to(dtype).requires_grad_() for x in inputs)
        y_ND = (F.silu(x_ND @ w13_2FD[0].T) * (x_ND @ w13_2FD[1].T)) @ w2_DF.T
        weights_N1 = problem.weights_TK[tokens_N, choices_N].to(dtype)[:, None].requires_grad_()
        direction_ND = problem.direction_TD[tokens_N].to(dtype)
        grads = torch.autograd.grad(y_ND * weights_N1, [x_ND, w13_2FD, w2_DF, weights_N1], direction_ND)
        yield Part(expert, tokens_N, choices_N, y_ND.detach(), grads[0], grads[1], grads[2], grads[3][:, 0])


def token_results(problem: Problem, part: Part, into: Mapping[str, Tensor]) -> None:
    """Add one expert's share to what is by token: out, dX, dS."""
    weights_N1 = problem.weights_TK[part.tokens_N, part.choices_N].to(part.y_ND.dtype)[:, None]
    # the tokens of one expert differ, so that no two rows meet in these adds
    into["out"].index_add_(0, part.tokens_N, part.y_ND * weights_N1)
    into["dX"].index_add_(0, part.tokens_N, part.grad_x_ND)
    into["dS"][part.tokens_N, part.choices_N] = part.grad_weights_N


def empty_token_results(problem: Problem, dtype: torch.dtype) -> dict[str, Tensor]:
    like = {"out": problem.x_TD, "dX": problem.x_TD, "dS": problem.weights_TK}
    return {name: torch.zeros_like(x, dtype=dtype) for name, x in like.items()}


def plain_results(problem: Problem, router_EH: Tensor | None = None) -> dict[str, Tensor]:
    """Everything by torch's operations in the problem's dtype, sums over a token's experts too: the eager reference.

    With a router its logits and weights are in fp32, and there are dR and a dX that includes it, in place of dS.
    """
    if router_EH is not None:
        weights = RouterWeights(problem, problem.indices_TK, router_EH, torch.float32)
        results = plain_results(replace(problem, weights_TK=weights.values_TK.detach()))
        grad_x, grad_router = weights.gradients(results.pop("dS"))
        return results | {"dX": results["dX"] + grad_x.to(problem.dtype), "dR": grad_router}
    results = empty_token_results(problem, problem.dtype)
    grad_w13, grad_w2 = torch.zeros_like(problem.w13_E2FD), torch.zeros_like(problem.w2_EDF)
    for part in parts(problem, problem.dtype):
        token_results(problem, part, results)
        grad_w13[part.expert], grad_w2[part.expert] = part.grad_w13_2FD, part.grad_w2_DF
    return results | {"dW13": grad_w13, "dW2": grad_w2}


class RouterWeights:
    """The weights of given choices by a router [E, H]: softmax over all experts, chosen ones divided by their sum; in `dtype`."""

    def __init__(self, problem: Problem, indices_TK: Tensor, router_EH: Tensor, dtype: torch.dtype):
        self.inputs = tuple(x.detach().to(dtype).requires_grad_() for x in (problem.x_TD, router_EH))
        self.scores_TE = torch.softmax(F.linear(*self.inputs), -1)
        chosen_TK = self.scores_TE.gather(1, indices_TK)
        self.values_TK = chosen_TK / chosen_TK.sum(-1, keepdim=True)

    def gradients(self, grad_TK: Tensor) -> tuple[Tensor, ...]:
        """Of the tokens and the router."""
        return torch.autograd.grad(self.values_TK, self.inputs, grad_TK.to(self.values_TK.dtype))


class ExactJudge:
    """Relative errors of out, dX, dW13, dW2 and dS against `exact_dtype`; the gradients only where there are any.

    Experts without rows must have gradients of exactly zero.

    With a router (the whole layer is judged) there is dR instead of dS, and results have the choices they are for as "indices":
    tokens between whose experts rounding decides may go to either. Computes the exact results anew for each judgement, which is
    cheaper than room for all of them.
    """

    def __init__(self, problem: Problem, router_EH: Tensor | None = None):
        self.problem, self.router_EH = problem, router_EH

    def __call__(self, got: Named) -> dict[str, float]:
        problem, dtype, weights = self.problem, exact_dtype(self.problem), None
        inputs = problem.leaves()
        if self.router_EH is not None:
            inputs = {name: x for name, x in inputs.items() if name != "dS"} | {"dR": self.router_EH}
            check_names(got, {"indices": problem.indices_TK.shape})
            weights = RouterWeights(problem, got["indices"], self.router_EH, dtype)
            _check_choices(weights.scores_TE, got["indices"])
            problem = replace(problem, indices_TK=got["indices"], weights_TK=weights.values_TK.detach())
        backward = any(name in got for name in inputs)
        check_names(got, {"out": problem.x_TD.shape, **({n: x.shape for n, x in inputs.items()} if backward else {})})
        errors, exact = _errors(problem, got, dtype, backward)
        if weights is not None:
            grad_x, exact["dR"] = weights.gradients(exact.pop("dS"))
            exact["dX"] += grad_x
        names = ("out", *inputs) if backward else ("out",)
        return {name: errors[name] if name in errors else relative_error(got[name], exact[name]) for name in names}


def _errors(problem: Problem, got: Named, dtype: torch.dtype, backward: bool) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Relative errors of the weights' gradients, where there are any, and the exact results by token."""
    exact = empty_token_results(problem, dtype)
    squares = {name: [0.0, 0.0] for name in ("dW13", "dW2") if backward}
    empty = set(range(problem.shape.E))
    for part in parts(problem, dtype):
        token_results(problem, part, exact)
        empty.discard(part.expert)
        for name, want in zip(squares, (part.grad_w13_2FD, part.grad_w2_DF), strict=False):
            _add_squares(squares[name], got[name][part.expert], want)
    for name in squares:
        for expert in empty:
            if got[name][expert].count_nonzero():
                raise ValueError(f"{name} of expert {expert} is not exactly zero, though it has no rows")
    return {name: math.sqrt(a / b) if b else math.sqrt(a) for name, (a, b) in squares.items()}, exact


def _check_choices(scores_TE: Tensor, indices_TK: Tensor) -> None:
    """Raises ValueError where a choice is worse than the k-th best by more than rounding in fp32."""
    best_TK = scores_TE.detach().topk(indices_TK.shape[1]).values
    chosen_T = scores_TE.detach().gather(1, indices_TK).amin(1)
    behind = float((best_TK[:, -1] - chosen_T).max() / best_TK.max())
    if not behind <= 1e-5:
        raise ValueError(f"an expert was chosen whose score is {behind:.1e} (of the largest) below the best ones'")


def _add_squares(into: list[float], got: Tensor, want: Tensor) -> None:
    into[0] += float((got.double() - want.double()).square().sum())
    into[1] += float(want.double().square().sum())
