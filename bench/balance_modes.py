"""Which way of counting over micro-batches comes closest to the balance gradient of the whole batch?

The global-batch balance loss needs the expert counts of a whole step at its first backward. `exact` counts in a pass of its own,
at twice the forward work. The affordable ways estimate: `running` takes the counts so far, `prior` adds the last step's counts
for the part not seen yet, weighted by `carry`. A small model trains with `exact`; at every few steps each way's router gradient
is compared with that of `exact` at the same weights, for the first micro-batch alone and for the whole step.

Scenarios differ in what a micro-batch holds. mixed: every sequence from any domain. own: each micro-batch one domain, in the same
order every step. shuffled: the same in another order every step. drawn: a domain at random, so that the mix changes from step
to step.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from moefold.moe.balance import Balancer
from moefold.moe.config import BalanceConfig, ModelConfig, MoEConfig
from moefold.moe.load import Aux
from moefold.moe.model import Model

from .result import Result, Row

EXACT = BalanceConfig(aux_loss_coeff=1.0, accumulation="exact")
CARRIES = tuple(sorted({0.5, 1.0, 2.0, 4.0, BalanceConfig().carry}))
MODES = (
    ("micro", BalanceConfig(aux_loss_coeff=1.0, scope="micro")),
    ("running", BalanceConfig(aux_loss_coeff=1.0, accumulation="running")),
    *((f"prior {c:g}", BalanceConfig(aux_loss_coeff=1.0, accumulation="prior", carry=c)) for c in CARRIES),
    ("exact", EXACT),
)
SCENARIOS = ("mixed", "own", "shuffled", "drawn")
MICROS, SEQUENCES, LENGTH = 8, 8, 32
WORDS = 8
"""Words of one domain; there are as many domains as micro-batches."""


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=40, help="training steps (default: %(default)s)")
    parser.add_argument("--every", type=int, default=4, help="steps between comparisons (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="repetitions (default: %(default)s)")
    parser.add_argument(
        "--aux", type=float, default=0.01, help="coefficient of the balance loss in training (default: %(default)s)"
    )


class Text:
    """Random text of domains with words of their own; in each, a word tells much of the next."""

    def __init__(self, seed: int):
        self.random = torch.Generator().manual_seed(seed)
        self.next_word = torch.randn(MICROS, WORDS, WORDS, generator=self.random).mul(2).softmax(-1)

    def domains(self, scenario: str) -> list[Tensor]:
        """The domain of each sequence, for every micro-batch of a step."""
        if scenario == "mixed":
            return [torch.randint(MICROS, (SEQUENCES,), generator=self.random) for _ in range(MICROS)]
        if scenario == "own":
            order = torch.arange(MICROS)
        elif scenario == "shuffled":
            order = torch.randperm(MICROS, generator=self.random)
        else:
            order = torch.randint(MICROS, (MICROS,), generator=self.random)
        return [domain.expand(SEQUENCES) for domain in order]

    def sequences(self, domain_B: Tensor) -> Tensor:
        """Words [B, LENGTH + 1] of these domains."""
        words = [torch.randint(WORDS, domain_B.shape, generator=self.random)]
        for _ in range(LENGTH):
            chances = self.next_word[domain_B, words[-1]]
            words.append(torch.multinomial(chances, 1, generator=self.random)[:, 0])
        return torch.stack(words, 1) + WORDS * domain_B[:, None]


@dataclass
class Closeness:
    """Collected over steps: cosine and relative error of a mode's gradient with the exact one."""

    first_cosine: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)


def router_gradients(balancer: Balancer, auxes: Sequence[Aux], routers: Sequence[Tensor], exact_LE: Tensor) -> list[Tensor]:
    """The balance term's gradient for all routers, flat, of each micro-batch in the order of a training step.

    Does not end the step.
    """
    balancer.start_step(len(auxes), exact_LE if balancer.config.accumulation == "exact" else None)
    tokens = sum(int(aux.valid_B.sum()) for aux in auxes)
    gradients = []
    for aux in auxes:
        grads = torch.autograd.grad(balancer.losses(aux) / tokens, routers, retain_graph=True)
        gradients.append(torch.cat([g.flatten() for g in grads]))
    return gradients


def measure(scenario: str, seed: int, options: argparse.Namespace) -> dict[str, Closeness]:
    """Train one model with exact counts and compare all modes at each of its steps."""
    moe = MoEConfig(num_experts=16, top_k=2, expert_dim=16, balance=EXACT)
    vocabulary = WORDS * MICROS
    model = Model(ModelConfig(dim=32, num_layers=2, num_heads=4, vocab_size=vocabulary, max_seq_len=LENGTH, moe=moe), seed=seed)
    routers = [layer.moe.router.weight_ED for layer in model.blocks if layer.moe is not None]
    adamw = torch.optim.AdamW(model.parameters(), lr=3e-3)
    balancers = {name: Balancer(config) for name, config in MODES}
    text, found = Text(seed), defaultdict[str, Closeness](Closeness)
    for step in range(options.steps):
        losses, auxes = [], []
        for domain_B in text.domains(scenario):
            words = text.sequences(domain_B)
            loss, aux = model(words[:, :-1], labels_BS=words[:, 1:])
            losses.append(loss)
            assert aux is not None
            auxes.append(aux)
        counts_LE = torch.stack([aux.counts_E for aux in auxes]).sum(0).double()
        exact = router_gradients(balancers["exact"], auxes, routers, counts_LE)
        for name, balancer in balancers.items():
            # the first step has no last step to start from
            if step and step % options.every == 0:
                note(found[name], router_gradients(balancer, auxes, routers, counts_LE), exact)
            balancer.end_step(counts_LE)
        tokens = MICROS * SEQUENCES * LENGTH
        (torch.stack(losses).sum() / tokens).backward()
        for router, part in zip(routers, sum_of(exact).split([r.numel() for r in routers]), strict=True):
            assert router.grad is not None
            router.grad += options.aux * part.view_as(router)
        adamw.step()
        adamw.zero_grad()
    return found


def sum_of(gradients: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(gradients)).sum(0)


def note(closeness: Closeness, gradients: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    mine, theirs = sum_of(gradients), sum_of(exact)
    closeness.first_cosine.append(float(torch.cosine_similarity(gradients[0], exact[0], dim=0)))
    closeness.cosine.append(float(torch.cosine_similarity(mine, theirs, dim=0)))
    closeness.error.append(float((mine - theirs).norm() / theirs.norm()))


def slug(name: str) -> str:
    """A mode's name as a part of a figure's: prior 0.5 -> prior_0_5."""
    return name.replace(" ", "_").replace(".", "_")


def run(options: argparse.Namespace) -> Result:
    rows: list[Row] = []
    cosines: dict[tuple[str, str], float] = {}
    for scenario in SCENARIOS:
        seeds = [measure(scenario, seed, options) for seed in range(options.seeds)]
        for name, _ in MODES:
            first = torch.tensor([x for found in seeds for x in found[name].first_cosine])
            cosine = torch.tensor([x for found in seeds for x in found[name].cosine])
            error = torch.tensor([x for found in seeds for x in found[name].error])
            row: Row = {
                "micro-batches": scenario,
                "mode": name,
                "cosine, first micro-batch": float(first.mean()),
                "cosine, whole step": float(cosine.mean()),
                "lowest": float(cosine.min()),
                "relative error": float(error.mean()),
            }
            rows.append(row)
            cosines[scenario, slug(name)] = float(cosine.mean())
    affordable = [slug(name) for name, _ in MODES if name not in ("exact", "micro")]
    worst = {mode: min(cosines[scenario, mode] for scenario in SCENARIOS) for mode in affordable}
    default = next(slug(name) for name, config in MODES if config == replace(BalanceConfig(), aux_loss_coeff=1.0))
    figures = {f"{mode}_worst_cosine": value for mode, value in worst.items()}
    figures["default_worst_cosine"] = worst[default]
    figures["default_behind_best"] = max(worst.values()) - worst[default]
    figures["default_ahead_of_running"] = worst[default] - worst["running"]
    return Result(rows, figures)
