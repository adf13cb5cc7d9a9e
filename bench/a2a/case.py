"""The model and the batch of `bench.a2a_lab`, and the ways of sending that it compares. Starts no processes."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Literal, NoReturn

from moefold.moe.config import CompressConfig, ModelConfig, MoEConfig
from moefold.parallel.plan import distinct_nodes

VOCAB = 264
LOSS_TOLERANCE = 1e-5
"""Relative, between variants that say that they send exactly."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model that is small in operations and wide in rows, on `hosts` x `ranks_per_host` ranks with all experts spread over all.

    host_sequences: of `seq_len` tokens, for each host and step. train_steps: exact ones before anything is measured, so that
    hidden states and routing are those of a model that has begun to learn. rate, hashes: of compression, where a variant
    compresses. expert_us: microseconds per row that experts sleep, see `asleep`; 0 = they only compute.
    """

    hosts: int = 4
    ranks_per_host: int = 2
    layers: int = 2
    dim: int = 256
    head_dim: int = 32
    expert_dim: int = 128
    experts: int = 32
    top_k: int = 8
    seq_len: int = 128
    host_sequences: int = 8
    train_steps: int = 40
    lr: float = 2e-3
    rate: float = 0.2
    hashes: int = 14
    expert_us: float = 0.0

    @property
    def world(self) -> int:
        return self.hosts * self.ranks_per_host

    @property
    def sequences(self) -> int:
        """Of a step, for each rank."""
        return self.host_sequences // self.ranks_per_host

    @property
    def tokens(self) -> int:
        """Of a step, over all ranks."""
        return self.hosts * self.host_sequences * self.seq_len

    @property
    def choices(self) -> int:
        """(token, expert, layer) of a step, over all ranks: the rows that a flat exchange sends."""
        return self.tokens * self.top_k * self.layers

    @property
    def formula(self) -> float:
        """Rows between hosts of the flat exchange by those of the hierarchical one, if each set of experts is as likely."""
        return self.top_k / distinct_nodes(self.experts, self.top_k, self.hosts)

    def __post_init__(self) -> None:
        if self.host_sequences % self.ranks_per_host or self.experts % self.world:
            raise ValueError(
                f"{self.ranks_per_host} ranks per host do not divide the {self.host_sequences} sequences of each of {self.hosts} "
                f"hosts, or their share of {self.experts} experts; 1, 2 and 4 do in the case that is measured"
            )

    def model(self) -> ModelConfig:
        """Its layers can compress; how much, the engine is told before each step."""
        compress = CompressConfig(method="lsh", rate=self.rate, hashes=self.hashes)
        moe = MoEConfig(num_experts=self.experts, top_k=self.top_k, expert_dim=self.expert_dim, compress=compress)
        return ModelConfig(
            dim=self.dim,
            num_layers=self.layers,
            num_heads=4,
            head_dim=self.head_dim,
            vocab_size=VOCAB,
            max_seq_len=self.seq_len,
            moe=moe,
        )


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A way of sending rows to experts and back.

    dispatcher: of `parallel.apply.build_dispatcher`, or 'deepspeed': DeepSpeed's layer in a loop of its own. pieces: see
    `ParallelConfig`. compressed: at the rate of the case; else every row travels. wire: see `CompressConfig`. own_all_to_all:
    rows go by gloo's own all-to-all, which posts sends first; else every receive is posted before any send. capacity: DeepSpeed's
    factor, over which it drops choices; None = it drops none, and pads instead. windows: gradients are summed where no rows
    travel in backward; else when FSDP comes to it. late: the gradients of experts' weights are computed while those of rows
    travel, as in training; else before these leave. every: takes part in each so many rounds.
    """

    name: str
    dispatcher: str
    pieces: int = 1
    compressed: bool = False
    wire: Literal["none", "int8"] = "none"
    own_all_to_all: bool = False
    capacity: float | None = None
    windows: bool = False
    late: bool = True
    every: int = 1

    @property
    def exact(self) -> bool:
        """Whether its loss is that of every other exact one."""
        return not self.compressed and self.wire == "none" and self.capacity is None

    @property
    def deepspeed(self) -> bool:
        return self.dispatcher == "deepspeed"


FLAT, HIERARCHICAL, EVERYTHING, DEEPSPEED = "flat", "hierarchical", "hierarchical, 2 pieces, LSH", "DeepSpeed-MoE"
DEEPSPEED_RECEIVING, DEEPSPEED_DROPPING = "DeepSpeed-MoE, receive first", "DeepSpeed-MoE, capacity 1.25"
VARIANTS = (
    Variant(name=FLAT, dispatcher="all_to_all", late=False),
    Variant(name="flat, late", dispatcher="all_to_all"),
    Variant(name="flat, gloo all-to-all", dispatcher="all_to_all", own_all_to_all=True, late=False),
    Variant(name="flat, LSH", dispatcher="all_to_all", compressed=True),
    Variant(name=HIERARCHICAL, dispatcher="hierarchical", late=False),
    Variant(name="hierarchical, late", dispatcher="hierarchical"),
    Variant(name="hierarchical, late, windows", dispatcher="hierarchical", windows=True),
    Variant(name="hierarchical, 2 pieces", dispatcher="hierarchical", pieces=2),
    Variant(name="hierarchical, 2 pieces, windows", dispatcher="hierarchical", pieces=2, windows=True),
    Variant(name="hierarchical, 3 pieces", dispatcher="hierarchical", pieces=3),
    Variant(name="hierarchical, 4 pieces", dispatcher="hierarchical", pieces=4),
    Variant(name=EVERYTHING, dispatcher="hierarchical", pieces=2, compressed=True),
    Variant(name=f"{EVERYTHING}, int8", dispatcher="hierarchical", pieces=2, compressed=True, wire="int8"),
    # slow, so less often
    Variant(name=DEEPSPEED, dispatcher="deepspeed", own_all_to_all=True, every=3),
    Variant(name=DEEPSPEED_RECEIVING, dispatcher="deepspeed", every=3),
    Variant(name=DEEPSPEED_DROPPING, dispatcher="deepspeed", own_all_to_all=True, capacity=1.25, every=3),
)
OVERLAPPED = tuple(v.name for v in VARIANTS if v.dispatcher == "hierarchical" and v.late and v.exact)
"""What the gain of overlap is taken from: weights' gradients come late, in pieces or not, and in windows or not."""


def chosen(without: list[str]) -> list[Variant]:
    """The variants without those whose names begin with one of these words.

    Raises:
        ValueError: a word that no name begins with, or one that leaves nothing to compare with.
    """
    names = [v.name for v in VARIANTS]
    for word in without:
        if not any(name.startswith(word) for name in names):
            raise ValueError(f"--without {word!r}: no variant's name begins so; there are: {'; '.join(names)}")
    left = [v for v in VARIANTS if not v.name.startswith(tuple(without))]
    if FLAT not in [v.name for v in left]:
        raise ValueError(f"--without {' '.join(without)}: leaves out {FLAT!r}, which all are compared with")
    return left


@dataclass(frozen=True)
class Turn:
    """One step of one variant, over all ranks.

    link: index of the link's rate; -1 for the turn before any. seconds: of the slowest rank. cpu_s: processor
    time of all ranks. bytes_between, rows_between: of
    all-to-alls, what crossed from host to host: everything, and the rows of the forward dispatch. rows_sent: to experts, each
    counted once, wherever it lives. exposed, transfer: parts of the ranks' time that they waited in collectives; from when the
    last rank had come. error: of compression, relative, where it was measured.
    """

    variant: str
    link: int
    number: int
    seconds: float
    cpu_s: float
    loss: float
    bytes_between: int
    rows_between: float
    rows_sent: int
    exposed: float
    transfer: float
    error: float | None = None


def check_losses(turns: list[Turn], variants: list[Variant]) -> None:
    """Raises ValueError where a variant that sends exactly has another loss than `FLAT`, on the same batch and weights."""
    exact = {v.name for v in variants if v.exact}
    want = next(turn.loss for turn in turns if turn.variant == FLAT)
    wrong = [t for t in turns if t.variant in exact and not abs(t.loss - want) <= LOSS_TOLERANCE * abs(want)]
    if wrong:
        listed = ", ".join(f"{t.variant!r}: {t.loss:.8g}" for t in wrong)
        raise ValueError(f"{listed}, but {FLAT!r} has a loss of {want:.8g}; what does not compute the same cannot be compared")


def refuse(reason: object) -> NoReturn:
    """End the benchmark with exit code 2 and the reason."""
    print(f"a2a_lab: {reason}", file=sys.stderr, flush=True)
    sys.exit(2)
