"""The load-balancing loss token by token, as its formula reads (arXiv 2501.11873, section 3), and routers to apply it to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from moefold.moe.balance import Balancer
from moefold.moe.config import BalanceConfig, MoEConfig, RouterConfig
from moefold.moe.load import Aux, measure_load
from moefold.moe.peers import Peers
from moefold.moe.router import TopKRouter

B, S, D, E, K, L = 3, 5, 6, 8, 2, 2
SCOPES = ("global", "micro", "sequence")
ROUTERS = {
    "softmax": RouterConfig(renormalize=False),
    "sigmoid": RouterConfig(score="sigmoid"),
    "topk-softmax": RouterConfig(order="topk_softmax"),
}
Micro = tuple[Tensor, Tensor | None]


def make_routers(config: RouterConfig = ROUTERS["softmax"], layers: int = L) -> list[TopKRouter]:
    routers = [TopKRouter(D, MoEConfig(num_experts=E, top_k=K, expert_dim=1, router=config)).double() for _ in range(layers)]
    for router in routers:
        torch.nn.init.normal_(router.weight_ED)
    return routers


def forward(routers: Sequence[TopKRouter], x_BSD: Tensor, valid_BS: Tensor | None = None) -> Aux:
    """The stacked `Aux` of routers that all see the same tokens."""
    valid_T = None if valid_BS is None else valid_BS.flatten()
    return Aux.stack([measure_load(r(x_BSD.flatten(0, 1), valid_T), valid_BS, None, len(x_BSD)) for r in routers])


def micro_batches(count: int, padded: bool = False) -> list[Micro]:
    lengths = torch.randint(1, S + 1, (count, B, 1))
    return [(torch.randn(B, S, D, dtype=torch.float64), torch.arange(S) < lengths[m] if padded else None) for m in range(count)]


def tokens_in(micros: Sequence[Micro]) -> int:
    return sum(B * S if valid is None else int(valid.sum()) for _, valid in micros)


def weights_of(routers: Sequence[TopKRouter]) -> list[Tensor]:
    return [router.weight_ED for router in routers]


def valid_rows(micro: Micro) -> list[list[Tensor]]:
    """The valid tokens of each sequence."""
    x_BSD, valid_BS = micro
    return [[x_BSD[b, s] for s in range(S) if valid_BS is None or valid_BS[b, s]] for b in range(len(x_BSD))]


def literal_counts(router: TopKRouter, rows: Sequence[Tensor]) -> list[int]:
    chosen = router(torch.stack(list(rows))).indices_TK.flatten().tolist()
    return [chosen.count(e) for e in range(E)]


def literal_term(router: TopKRouter, rows: Sequence[Tensor], counts: Sequence[float]) -> Tensor:
    """Sum over tokens of E * sum over experts of (the expert's share of the counts) * (the token's normalised score)."""
    total = torch.zeros((), dtype=torch.float64)
    share_E = torch.tensor([count / max(sum(counts), 1) for count in counts], dtype=torch.float64)
    for x in rows:
        logits = router.weight_ED @ x
        scores = torch.sigmoid(logits) if router.rule.score == "sigmoid" else torch.softmax(logits, 0)
        total = total + E * (share_E * scores / scores.sum()).sum()
    return total


def literal_gradients(routers: Sequence[TopKRouter], term: Callable[[TopKRouter], Tensor]) -> dict[str, Tensor]:
    loss = torch.stack([term(router) for router in routers]).sum()
    return dict(zip(map(str, range(L)), torch.autograd.grad(loss, weights_of(routers)), strict=True))


def gradients(routers: Sequence[TopKRouter], loss: Tensor) -> dict[str, Tensor]:
    return dict(zip(map(str, range(L)), torch.autograd.grad(loss, weights_of(routers)), strict=True))


def balancer(peers: Peers | None = None, **changes: Any) -> Balancer:
    return Balancer(BalanceConfig(**({"aux_loss_coeff": 1.0} | changes)), peers)


def run_micro(state: Balancer, routers: Sequence[TopKRouter], micro: Micro, tokens: int = 1) -> dict[str, Tensor]:
    return gradients(routers, state.losses(forward(routers, *micro)) / tokens)
