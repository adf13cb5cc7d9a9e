"""Routing as it is wished instead of as the router chooses: for measurements. Routers compute as ever, and are then overruled.

A wished load is a share of the choices for each expert. Tokens draw their experts by systematic sampling (Madow, Annals of
Mathematical Statistics 20, 1949): a token's top_k experts are distinct, and each is among them as often as its share says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..kernels.sort_tokens import count_choices
from ..moe.layer import MoELayer
from ..moe.router import Routing, TopKRouter


def zipf_load(num_experts: int, exponent: float, seed: int) -> Tensor:
    """float64 [E], sum 1: the expert on place r has a share of 1 / r^exponent; places are drawn, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    places_E = torch.randperm(num_experts, generator=generator) + 1
    load_E = places_E.double() ** -exponent
    return load_E / load_E.sum()


def inclusion(load_E: Tensor, top_k: int) -> Tensor:
    """Probability of each expert to be among the `top_k` of a token, float64 [E], sum top_k.

    In proportion to the load; an expert that would be chosen more than once per token is always chosen, and the others share
    what is left in proportion.

    Raises:
        ValueError: a negative load, or fewer than top_k experts with any.
    """
    load_E = load_E.double()
    if (load_E < 0).any() or int((load_E > 0).sum()) < top_k:
        raise ValueError(f"loads {load_E.tolist()}: none may be negative, and {top_k} must be positive")
    always_E = torch.zeros_like(load_E, dtype=torch.bool)
    while True:
        left = top_k - int(always_E.sum())
        rest_E = load_E.masked_fill(always_E, 0)
        chance_E = torch.where(always_E, 1.0, left * rest_E / rest_E.sum().clamp_min(torch.finfo(torch.float64).tiny))
        over_E = (chance_E >= 1) & ~always_E
        if not over_E.any():
            return chance_E
        always_E |= over_E


def draw_choices(chance_E: Tensor, tokens: int, top_k: int, generator: torch.Generator) -> Tensor:
    """int64 [T, K]: distinct experts of each token; expert e is among them with probability chance_E[e] (sum top_k)."""
    E = chance_E.numel()
    order_TE = torch.rand(tokens, E, generator=generator).argsort(1)
    ends_TE = chance_E[order_TE].cumsum(1)
    first_T1 = torch.rand(tokens, 1, generator=generator, dtype=torch.float64)
    at_TK = (first_T1 + torch.arange(top_k)).contiguous()
    # rounding of the sum must not lead beyond the last expert
    place_TK = torch.searchsorted(ends_TE, at_TK, right=True).clamp_max(E - 1)
    return order_TE.gather(1, place_TK)


def draw_evenly(num_experts: int, tokens: int, top_k: int, generator: torch.Generator) -> Tensor:
    """int64 [T, K]: distinct experts of each token, all equally often as far as top_k divides their number."""
    per_order = num_experts // top_k
    orders = -(-tokens // per_order)
    drawn_OE = torch.rand(orders, num_experts, generator=generator).argsort(1)
    return drawn_OE[:, : per_order * top_k].reshape(-1, top_k)[:tokens]


@contextmanager
def forced(layers: Sequence[MoELayer], loads_LE: Tensor | None, seed: int) -> Iterator[None]:
    """While the body runs, the routers of these layers choose by `loads_LE` (one row for each layer; None = all evenly).

    The same tokens get the same experts in every pass of a layer. Weights are those that the router's scores give these experts.
    seed: another one on each rank that holds other tokens.
    """
    routers = [layer.router for layer in layers]
    for index, router in enumerate(routers):
        load_E = None if loads_LE is None else loads_LE[index]
        router.forward = _Overruled(router, load_E, seed + 1000 * index)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for router in routers:
            del router.forward


@contextmanager
def choices_of(layers: Sequence[MoELayer]) -> Iterator[list[list[Tensor]]]:
    """While the body runs, collects for each layer the chosen experts [T, K] of its passes."""
    found: list[list[Tensor]] = [[] for _ in layers]

    def keep(index: int) -> Any:
        def hook(_: Any, __: Any, routing: Routing) -> None:
            found[index].append(routing.indices_TK.detach())

        return hook

    handles = [layer.router.register_forward_hook(keep(index)) for index, layer in enumerate(layers)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class _Overruled:
    def __init__(self, router: TopKRouter, load_E: Tensor | None, seed: int):
        self.router, self.seed = router, seed
        self.chance_E = None if load_E is None else inclusion(load_E, router.rule.top_k)
        self.drawn: dict[int, Tensor] = {}

    def __call__(self, x_TD: Tensor, valid_T: Tensor | None = None) -> Routing:
        free = type(self.router).forward(self.router, x_TD, valid_T)
        T, E = free.logits_TE.shape
        indices_TK = self._choices(T, E).to(x_TD.device)
        chosen_TK = indices_TK
        if valid_T is not None:
            chosen_TK = torch.where(valid_T[:, None], indices_TK, E)
        counts_E = count_choices(chosen_TK.flatten(), E + 1)[:E]
        return Routing(indices_TK, self._weights(free, indices_TK), free.scores_TE, free.logits_TE, free.z_T, counts_E)

    def _choices(self, tokens: int, num_experts: int) -> Tensor:
        if tokens not in self.drawn:
            generator, K = torch.Generator().manual_seed(self.seed), self.router.rule.top_k
            if self.chance_E is None:
                self.drawn[tokens] = draw_evenly(num_experts, tokens, K, generator)
            else:
                self.drawn[tokens] = draw_choices(self.chance_E, tokens, K, generator)
        return self.drawn[tokens]

    def _weights(self, free: Routing, indices_TK: Tensor) -> Tensor:
        rule = self.router.rule
        if rule.order == "topk_softmax":
            weights_TK = free.logits_TE.gather(1, indices_TK).softmax(-1)
        else:
            weights_TK = free.scores_TE.gather(1, indices_TK)
            if rule.renormalize:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(torch.finfo(weights_TK.dtype).tiny)
        return weights_TK * rule.scaling_factor
