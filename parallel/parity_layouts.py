"""The layouts and model variants that are compared with one process, and which are combined: one table for tests and benchmarks.

Every layout runs with 1, 2 and 4 micro-batches per step. Variants are dealt out over these cases so that each meets many layouts;
the full product would say little more and take hours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..moe.config import BalanceConfig, CompressConfig, ModelConfig, MoEConfig, RopeScaling, RouterConfig
from .engine import OptimizerSettings
from .parity import ParityCase
from .topology import Topology

ACCUMULATIONS = (1, 2, 4)


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism of a world, for `Topology`. The name gives the degrees: world 8, tp 2, ep 4 is `8:tp2-ep4`."""

    world: int
    tp: int = 1
    ep: int = 1
    etp: int = 1
    hsdp: int = 1

    @property
    def degrees(self) -> dict[str, int]:
        return {name: n for name in ("hsdp", "tp", "etp", "ep") if (n := getattr(self, name)) > 1}

    @property
    def name(self) -> str:
        return f"{self.world}:" + ("-".join(f"{k}{v}" for k, v in self.degrees.items()) or ("dp" if self.world > 1 else "single"))

    @property
    def topology(self) -> Topology:
        return Topology(self.world, **self.degrees)


# "dp" alone is data parallelism over the whole world; hsdp equal to dp is plain replication
LAYOUTS = (
    Layout(1),
    Layout(2),
    Layout(4),
    Layout(8),
    Layout(2, ep=2),
    Layout(4, ep=4),
    Layout(8, ep=8),
    Layout(4, ep=2),
    Layout(8, ep=2),
    Layout(8, ep=4),
    Layout(2, tp=2),
    Layout(4, tp=4),
    Layout(4, tp=2),
    Layout(8, tp=2),
    Layout(8, tp=4),
    Layout(2, tp=2, ep=2),
    Layout(4, tp=2, ep=2),
    Layout(4, tp=2, ep=4),
    Layout(8, tp=2, ep=4),
    Layout(8, tp=2, ep=2),
    Layout(8, tp=2, ep=8),
    Layout(4, tp=4, ep=2),
    Layout(4, tp=4, ep=4),
    Layout(8, tp=4, ep=2),
    Layout(2, etp=2),
    Layout(4, etp=2),
    Layout(4, etp=4),
    Layout(4, etp=2, ep=2),
    Layout(8, etp=2, ep=4),
    Layout(8, etp=4, ep=2),
    Layout(2, tp=2, etp=2),
    Layout(4, tp=2, etp=2),
    Layout(4, tp=2, etp=4),
    Layout(4, tp=2, etp=2, ep=2),
    Layout(8, tp=2, etp=2, ep=2),
    Layout(8, tp=4, etp=2, ep=4),
    Layout(2, hsdp=2),
    Layout(4, hsdp=2),
    Layout(4, hsdp=4),
    Layout(8, hsdp=2),
    Layout(8, hsdp=8),
    Layout(4, hsdp=2, ep=2),
    Layout(8, hsdp=2, ep=2),
    Layout(8, hsdp=4, ep=4),
    Layout(4, hsdp=2, tp=2),
    Layout(8, hsdp=2, tp=2, ep=2),
    Layout(8, hsdp=2, etp=2, ep=2),
)


@dataclass(frozen=True)
class Variant:
    """Settings that make a case differ from the plain one, by section, and the layouts and accumulations they make sense for."""

    name: str
    model: tuple[tuple[str, Any], ...] = ()
    moe: tuple[tuple[str, Any], ...] = ()
    router: tuple[tuple[str, Any], ...] = ()
    balance: tuple[tuple[str, Any], ...] = ()
    case: tuple[tuple[str, Any], ...] = ()
    fits: Callable[[Layout, int], bool] = lambda layout, num_micro: True

    def build(self, layout: Layout, num_micro: int, *, steps: int = 5, seed: int = 0) -> ParityCase:
        """The case of this variant on a layout: one sequence per rank and micro-batch (at least four per step).

        The first sequence has no valid token, so that the first rank's first micro-batch is empty.
        """
        config = {"num_experts": 8, "top_k": 2, "expert_dim": 8, "num_shared_experts": 1} | dict(self.moe)
        balance = {"aux_loss_coeff": 0.1, "z_loss_coeff": 1e-2} | dict(self.balance)
        moe = MoEConfig(**config, router=RouterConfig(**dict(self.router)), balance=BalanceConfig(**balance))
        shape: dict[str, Any] = {"dim": 16, "num_layers": 2, "num_heads": 4, "head_dim": 4, "vocab_size": 32, "max_seq_len": 8}
        shape |= {"dense_prefix_layers": 1, "dense_ffn_dim": 16, "qk_norm": "head", "moe": moe} | dict(self.model)
        rows = layout.topology.dp * num_micro
        settings: dict[str, Any] = {
            "global_batch": rows * -(-4 // rows),
            "seq_len": 8,
            "valid_share": 0.6,
            "steps": steps,
            "seed": seed,
        }
        settings |= {"optimizer": OptimizerSettings(grad_clip=None)} | dict(self.case)
        return ParityCase(model=ModelConfig(**shape), num_micro=num_micro, **settings)


def _accumulates(layout: Layout, num_micro: int) -> bool:
    return num_micro > 1


def _without_experts(layout: Layout, num_micro: int) -> bool:
    return layout.ep * layout.etp == 1


def _six_experts_uneven(layout: Layout, num_micro: int) -> bool:
    return 6 % layout.ep == 0 and (6 // layout.ep) % layout.topology.edp_shard != 0


def _two_kv_heads(layout: Layout, num_micro: int) -> bool:
    return layout.tp <= 2


HOT = (4.0, *(0.0,) * 3, *(-4.0,) * 4)
"""Selection bias that sends every token to expert 0, and none to the last four of eight."""

VARIANTS = (
    Variant("plain"),
    Variant("running", balance=(("accumulation", "running"),), fits=_accumulates),
    Variant("prior-carry-2", balance=(("accumulation", "prior"), ("carry", 2.0)), fits=_accumulates),
    Variant("exact", balance=(("accumulation", "exact"),), fits=_accumulates),
    Variant("micro", balance=(("scope", "micro"),)),
    Variant("sequence", balance=(("scope", "sequence"),)),
    Variant("straggler", balance=(("straggler_coeff", 0.05),)),
    Variant("expert-bias", balance=(("expert_bias", True), ("bias_update_rate", 0.01))),
    Variant("capacity-position", moe=(("capacity_factor", 0.6),)),
    Variant("capacity-probability", moe=(("capacity_factor", 0.6), ("drop_policy", "probability"))),
    Variant("recompute", case=(("recompute", "selective"),)),
    Variant(
        "sigmoid-groups",
        moe=(("num_shared_experts", 2),),
        router=(("score", "sigmoid"), ("scaling_factor", 2.5), ("num_groups", 4), ("top_groups", 2)),
        balance=(("scope", "sequence"), ("expert_bias", True)),
    ),
    Variant(
        "late-softmax",
        moe=(("num_shared_experts", 0), ("top_k", 3)),
        router=(("order", "topk_softmax"), ("num_groups", 2), ("group_score", "max")),
    ),
    Variant("top-1", moe=(("top_k", 1),), router=(("renormalize", False),)),
    Variant("every-second", model=(("num_layers", 4), ("moe_every", 2))),
    Variant("hot-expert", balance=(("expert_bias", True), ("z_loss_coeff", 0.0)), case=(("start_bias", HOT),)),
    Variant("clipped", case=(("optimizer", OptimizerSettings(grad_clip=0.05)),)),
    Variant("full-qk-norm", model=(("qk_norm", "full"), ("num_kv_heads", 2)), fits=_two_kv_heads),
    Variant("tied", model=(("tie_embeddings", True), ("qk_norm", "none"))),
    Variant("dense", model=(("moe", None),), fits=_without_experts),
    Variant("uneven-experts", moe=(("num_experts", 6),), fits=_six_experts_uneven),
    Variant("uneven-width", model=(("dim", 18),), moe=(("num_experts", 6),), fits=_six_experts_uneven),
    Variant("all-valid", case=(("valid_share", 1.0),)),
)

MODELS = (
    Variant(
        "biased-post-norm",
        model=(
            ("attention_bias", "all"),
            ("norm_order", "post"),
            ("sliding_window", 3),
            ("num_kv_heads", 2),
            ("qk_norm", "full"),
        ),
        moe=(("shared_dim", 12), ("shared_gate", True)),
    ),
    Variant(
        "scaled-gelu",
        model=(
            ("activation", "gelu_tanh"),
            ("attention_bias", "qkv"),
            ("rope_fraction", 0.5),
            ("rope_scaling", RopeScaling(kind="llama3", factor=4.0, original_max_seq_len=16)),
            ("attention_scale", 0.3),
            ("embed_scale", 4.0),
            ("residual_scale", 0.5),
            ("logits_scale", 3.0),
            ("tie_embeddings", True),
        ),
        moe=(("shared_gate", True),),
    ),
    Variant(
        "gpt2",
        model=(
            ("norm", "layer"),
            ("positions", "learned"),
            ("activation", "gelu_tanh"),
            ("ffn_gate", False),
            ("ffn_bias", True),
            ("attention_bias", "all"),
            ("tie_embeddings", True),
            ("qk_norm", "none"),
        ),
        # an uneven number of experts, whose biases are then split by their width
        moe=(("num_experts", 6), ("capacity_factor", 1.2)),
    ),
    Variant(
        "attention-experts",
        model=(("attention_experts", 3), ("attention_bias", "all"), ("qk_norm", "full"), ("num_kv_heads", 2)),
    ),
    Variant(
        "attention-experts-shared",
        model=(
            ("attention_experts", 2),
            ("attention_expert_kv", "shared"),
            ("attention_bias", "all"),
            ("norm_order", "post"),
            ("sliding_window", 3),
        ),
        case=(("recompute", "selective"),),
    ),
)
"""Kinds of models with many settings at once, for the layouts in `model_cases`; each meets what shards its weights."""


@dataclass(frozen=True)
class Planned:
    """One case of the table."""

    layout: Layout
    num_micro: int
    variant: Variant

    @property
    def name(self) -> str:
        return f"{self.layout.name}-x{self.num_micro}-{self.variant.name}"

    def build(self, *, seed: int = 0) -> ParityCase:
        # most of the time goes into many ranks with many micro-batches, where three updates show what five do
        steps = 3 if self.layout.world * self.num_micro > 8 else 5
        return self.variant.build(self.layout, self.num_micro, steps=steps, seed=seed)


@dataclass(frozen=True)
class Sending:
    """Another way for rows to travel, which must not change a number: settings laid over any case, and the layouts they fit."""

    name: str
    moe: tuple[tuple[str, Any], ...]
    case: tuple[tuple[str, Any], ...] = ()
    fits: Callable[[Layout], bool] = lambda layout: layout.ep * layout.etp > 1

    def over(self, case: ParityCase) -> ParityCase:
        assert case.model.moe is not None
        model = replace(case.model, moe=replace(case.model.moe, **dict(self.moe)))
        settings: dict[str, Any] = {"model": model} | dict(self.case)
        return replace(case, **settings)


def _on_nodes(ranks_per_node: int) -> Callable[[Layout], bool]:
    """Whether experts spread over several nodes, each with whole experts."""
    return lambda layout: layout.ep * layout.etp > ranks_per_node >= layout.etp


UNIQUE_CODES = CompressConfig(method="lsh", rate=None, radius=0.0)
"""Rows that share a code without being equal travel exactly, as with unique codes: compression runs, and loses nothing."""

SENDINGS = (
    Sending("two-per-node", (("dispatcher", "hierarchical"),), (("ranks_per_node", 2),), _on_nodes(2)),
    Sending("one-per-node", (("dispatcher", "hierarchical"),), (("ranks_per_node", 1),), _on_nodes(1)),
    Sending("unique-codes", (("compress", UNIQUE_CODES),)),
    Sending("three-pieces", (), (("pieces", 3),)),
    Sending("two-pieces-two-per-node", (("dispatcher", "hierarchical"),), (("ranks_per_node", 2), ("pieces", 2)), _on_nodes(2)),
    Sending(
        "unique-codes-two-per-node",
        (("compress", UNIQUE_CODES), ("dispatcher", "hierarchical")),
        (("ranks_per_node", 2),),
        _on_nodes(2),
    ),
)


def plan() -> tuple[Planned, ...]:
    """Every layout with every accumulation, each with the fitting variant that has had the fewest such cases so far."""
    total: Counter[str] = Counter()
    at: Counter[tuple[str, int | str]] = Counter()
    cases = []
    for layout in LAYOUTS:
        for num_micro in ACCUMULATIONS:
            fitting = [v for v in VARIANTS if v.fits(layout, num_micro)]
            variant = min(fitting, key=lambda v: (at[v.name, layout.name], total[v.name], at[v.name, layout.world]))
            total[variant.name] += 1
            at.update([(variant.name, layout.name), (variant.name, layout.world)])
            cases.append(Planned(layout, num_micro, variant))
    return tuple(cases)


def model_cases() -> tuple[Planned, ...]:
    """`MODELS` on the layouts that shard or sum what they have more than others do: heads, hidden width, experts, replicas."""
    biased, scaled, gpt2, mixed, mixed_shared = MODELS
    return (
        Planned(Layout(2, tp=2), 2, biased),
        Planned(Layout(4, tp=2, ep=2), 1, biased),
        Planned(Layout(8, hsdp=2, tp=2, ep=2), 1, biased),
        Planned(Layout(4, tp=4, ep=2), 1, scaled),
        Planned(Layout(4, tp=2, etp=2), 2, scaled),
        Planned(Layout(4, tp=2), 2, gpt2),
        Planned(Layout(4, etp=2, ep=2), 1, gpt2),
        Planned(Layout(8, tp=2, ep=2), 1, gpt2),
        Planned(Layout(4, tp=2, ep=2), 1, mixed),
        Planned(Layout(2, tp=2), 2, mixed_shared),
    )
