"""Whether upcycling is worth it: against training the dense model on, and against experts from scratch. Imports no torch.

What was published is said, each with its source and limits. The coefficients of the published law (arXiv 2502.03009) belong to
its models and data, so that one is evaluated only where it can be fitted to measured losses that are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...moe.checks import raise_if
from ...moe.config import ModelConfig
from ...moe.errors import Problem
from ..console import human

if TYPE_CHECKING:
    from .forecast import Forecast

Verdict = Literal["upcycle", "undecided", "scratch"]

SCRATCH_FROM = 2.0
UPCYCLE_UP_TO = 1.0
NO_LAW = (
    "losses of your own models, or published ones, say more: --losses FILE.csv with the columns kind,dense_tokens,tokens,loss "
    "(kind: dense, scratch or upcycle) has a law fitted to them, with its uncertainty"
)


@dataclass(frozen=True)
class Evidence:
    """A published finding. limits: of what it was found on."""

    says: str
    source: str
    limits: str


UPCYCLE_OR_SCRATCH = (
    Evidence(
        "upcycle where the budget is far below the dense model's training, train from scratch from twice of it on",
        "Skywork-MoE, arXiv 2406.06563",
        "a rule of thumb from 13 B dense models with 16 experts; nothing is said on what lies between",
    ),
    Evidence(
        "upcycling pays off up to about the compute that the dense model took",
        "Sparse Upcycling, arXiv 2212.05055",
        "T5 and vision transformers, experts that are plain copies",
    ),
    Evidence(
        "the better the dense model is trained, the less each further token gains, and beyond some number of tokens training "
        "from scratch wins",
        "scaling law of upcycling, arXiv 2502.03009",
        "the direction only; its coefficients hold for its own models and data",
    ),
)
DENSE_OR_UPCYCLE = (
    Evidence(
        "after 1 T further tokens, validation loss 1.377 (MMLU 65.3) for the dense model trained on, 1.320 (66.2) for 64 "
        "granular experts at the same FLOPs per token, 1.306 (67.6) for 8 copies with top-2, which take more",
        "NVIDIA, arXiv 2410.07524",
        "one model, Nemotron-4 15B; granularity helped at 0.1 T tokens and much less at 1 T",
    ),
    Evidence(
        "5.9 B active parameters equal a 13 B dense model at a quarter of its training FLOPs, half of each expert drawn anew",
        "Drop-Upcycling, arXiv 2502.19261",
        "500 B tokens",
    ),
)


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What is advised. verdict: by published rules. ratio: FLOPs of the budget / those that the dense model took. law: what laws
    fitted to measured losses say; None where none were given."""

    verdict: Verdict
    dense_tokens: float
    tokens: float
    dense_flops: float
    flops: float
    continued_tokens: float
    seq_len: int
    law: Forecast | None = None

    @property
    def ratio(self) -> float:
        return self.flops / self.dense_flops

    @property
    def line(self) -> str:
        """The verdict of published rules in one sentence."""
        times = f"the budget is {self.ratio:.3g} times the compute that the dense model took"
        words = {
            "upcycle": "upcycling is worth it",
            "undecided": "undecided: published rules leave this range open",
            "scratch": "train from scratch",
        }
        return f"{words[self.verdict]}: {times}"

    def evidence(self) -> tuple[Evidence, ...]:
        """What this rests on."""
        return UPCYCLE_OR_SCRATCH if self.verdict == "scratch" else UPCYCLE_OR_SCRATCH + DENSE_OR_UPCYCLE

    def to_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("dense_tokens", "tokens", "dense_flops", "flops", "ratio", "seq_len")}
        found = [vars(evidence) for evidence in self.evidence()]
        return {
            "verdict": self.verdict,
            "line": self.line,
            **numbers,
            "continued_tokens": self.continued_tokens,
            "evidence": found,
            "law": None if self.law is None else self.law.to_dict(),
        }

    def render(self) -> str:
        """For the console."""
        heads = [self.line] if self.law is None else [f"by the fitted law: {self.law.line}", f"by published rules: {self.line}"]
        lines = [
            *heads,
            f"  dense so far    {human(self.dense_tokens)} tokens, {self.dense_flops:.3g} FLOPs",
            f"  budget          {human(self.tokens)} tokens of the upcycled model, {self.flops:.3g} FLOPs",
            f"  the same buys   {human(self.continued_tokens)} more tokens of the dense model",
            *([] if self.law is None else [f"laws fitted to {self.law.path}, +- one standard error:", self.law.render()]),
            "",
            f"rules: upcycle up to {UPCYCLE_UP_TO:g} times the dense model's compute, from scratch from {SCRATCH_FROM:g} times",
        ]
        for evidence in self.evidence():
            lines += [f"- {evidence.says}", f"  ({evidence.source}; {evidence.limits})"]
        lines += [NO_LAW] if self.law is None else []
        return "\n".join(lines)


def advise(
    dense: ModelConfig, result: ModelConfig, *, dense_tokens: float, tokens: float, losses: str | Path | None = None
) -> Advice:
    """Compare the compute of a budget with what the dense model took, by the published rules; and losses, by a fitted law.

    dense_tokens: that the dense model was trained on. tokens: that the result would be trained on. losses: CSV file of measured
    points (see `loss_law.read_points`). FLOPs are those of `ModelConfig.flops_per_token` at sequences of min(4096, max_seq_len).
    Raises ConfigError for numbers that are not positive, and for points that no law can be fitted to.
    """
    given = {"dense_tokens": dense_tokens, "tokens": tokens}
    raise_if([Problem(name, f"is {n}, but must be a number over 0") for name, n in given.items() if not 0 < n < float("inf")])
    seq_len = min(4096, dense.max_seq_len)
    each = dense.flops_per_token(seq_len)
    spent, budget = dense_tokens * each, tokens * result.flops_per_token(seq_len)
    ratio = budget / spent
    verdict: Verdict = "scratch" if ratio >= SCRATCH_FROM else "upcycle" if ratio <= UPCYCLE_UP_TO else "undecided"
    law = None
    if losses is not None:
        # only now: numpy takes a moment
        from .forecast import forecast
        from .loss_law import read_points

        law = forecast(str(losses), read_points(losses), dense_tokens=dense_tokens, tokens=tokens, continued_tokens=budget / each)
    return Advice(
        verdict=verdict,
        dense_tokens=dense_tokens,
        tokens=tokens,
        dense_flops=spent,
        flops=budget,
        continued_tokens=budget / each,
        seq_len=seq_len,
        law=law,
    )
