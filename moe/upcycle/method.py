"""What an upcycling method is, and what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

from ..checks import raise_if
from ..config import BalanceConfig, ModelConfig, MoEConfig, RouterConfig
from ..errors import ConfigError, Problem
from ..hf.matrix import Matrix
from .experts import Ffn
from .options import UpcycleOptions
from .sizes import Sizes, output_scale

Models = ModelConfig | Sequence[ModelConfig]


class Method(ABC):
    """A function from parts of dense models to parts of a Mixture-of-Experts model."""

    name: ClassVar[str]
    several: ClassVar[bool] = False
    """Whether it takes several dense models."""

    @abstractmethod
    def plan(self, dense: Models, options: UpcycleOptions) -> ModelConfig:
        """The model that results. Raises ConfigError naming option, value and legal values."""

    @abstractmethod
    def exact(self, dense: Models, options: UpcycleOptions) -> str | None:
        """None where the result computes what the dense model does, to rounding; else why not, and how far off it will be.

        Raises ConfigError as `plan`.
        """

    @abstractmethod
    def layer(self, index: int, ffn: Sequence[Ffn], options: UpcycleOptions, config: ModelConfig) -> dict[str, Matrix]:
        """Parts of MoE layer `index`, without its norms, from the FFN of that layer in each dense model; config is the plan."""

    def attention(
        self, index: int, attention: Sequence[Mapping[str, Matrix]], options: UpcycleOptions, config: ModelConfig
    ) -> dict[str, Matrix]:
        """Parts of the attention of layer `index` that are not made by `rest`, from that of each dense model by names below it
        (`q`, `o_bias`); most methods make none."""
        return {}

    def rest(self, name: str, matrices: Sequence[Matrix], options: UpcycleOptions) -> Matrix:
        """A part that neither `layer` nor `attention` makes, from that of each dense model."""
        return matrices[0]

    def check(self, dense: Sequence[tuple[ModelConfig, Mapping[str, Matrix]]], options: UpcycleOptions) -> None:
        """Look at values that the method relies on, before anything is written; most rely on none. Raises CheckpointError."""
        return None


def one_model(dense: Models, method: str) -> ModelConfig:
    """The only model. Raises ConfigError for another number of them."""
    models = [dense] if isinstance(dense, ModelConfig) else list(dense)
    if len(models) != 1:
        what = f"is '{method}', which takes one dense model, but {len(models)} are given; merge, bam and flex_olmo take several"
        raise ConfigError([Problem("upcycle.method", what)])
    return models[0]


def same_models(dense: Models, options: UpcycleOptions) -> list[ModelConfig]:
    """Several models that differ at most in their longest sequence (with rotary positions). Raises ConfigError with every
    difference."""
    models = [dense] if isinstance(dense, ModelConfig) else list(dense)
    problems = []
    if len(models) < 2:
        what = f"is '{options.method}', which takes one dense model for each expert, but {len(models)} is given"
        problems.append(Problem("upcycle.method", what))
    if options.num_experts not in (None, len(models)):
        what = f"is {options.num_experts}, but {len(models)} models are given, one for each expert; leave it out"
        problems.append(Problem("upcycle.num_experts", what))
    for i, model in enumerate(models[1:], start=1):
        for name, value in vars(model).items():
            wanted = getattr(models[0], name)
            # that is no more than a limit, unless there is a weight for each position
            free = name == "max_seq_len" and model.positions == "rotary"
            if not free and value != wanted:
                problems.append(
                    Problem(f"model {i}, {name}", f"is {value}, but {wanted} in model 0; only FFN weights may differ")
                )
    raise_if(problems)
    return models


def moe_model(dense: ModelConfig, options: UpcycleOptions, sizes: Sizes, num_experts: int, num_groups: int = 1) -> ModelConfig:
    """The dense model with its FFNs replaced by experts. Raises ConfigError where that is no model.

    num_groups: copies, of which top_k / granularity are chosen as a whole; 1 = no such limit.
    """
    scaling = options.scaling_factor
    if options.scale_placement == "routed_scaling":
        scaling = output_scale(options, num_experts)
    router = RouterConfig(
        score=options.score,
        order=options.order,
        renormalize=options.renormalize,
        scaling_factor=scaling,
        num_groups=num_groups,
        top_groups=1 if num_groups == 1 else options.top_k // options.pieces,
        # each is how the formats that have this limit with that score do it; on equal rows they order groups alike
        group_score="max" if num_groups > 1 and options.score == "softmax" else "top2_sum",
    )
    whole = sizes.shared_dim % sizes.expert_dim == 0
    moe = MoEConfig(
        num_experts=num_experts,
        top_k=options.top_k,
        expert_dim=sizes.expert_dim,
        num_shared_experts=sizes.shared_dim // sizes.expert_dim if whole else 0,
        shared_dim=None if whole else sizes.shared_dim,
        shared_gate=options.shared_gate,
        router=router,
        balance=BalanceConfig(aux_loss_coeff=options.aux_loss_coeff, expert_bias=options.expert_bias),
    )
    prefix, every = options.dense_prefix_layers, options.moe_every
    if prefix >= dense.num_layers:
        what = f"is {prefix}, but the model has {dense.num_layers} layers, so none would have experts"
        raise ConfigError([Problem("upcycle.dense_prefix_layers", what)])
    width = sizes.dense if prefix or (every > 1 and dense.num_layers > 1) else None
    return replace(dense, moe=moe, dense_prefix_layers=prefix, moe_every=every, dense_ffn_dim=width)


def zero_router(options: UpcycleOptions) -> bool:
    """Whether all logits are 0, so that all weights are equal."""
    if options.router_init == "zeros":
        return not options.router_noise_std
    return options.router_init != "centroids" and not options.router_std


def weight_gap(dense: ModelConfig, options: UpcycleOptions, num_experts: int, *, shared: bool) -> str | None:
    """Why the weights of equal experts do not sum to what `output_scale` assumes; None where they do.

    Figures here and in the other reasons are those of `python -m bench upcycle_quality`, rounded.
    """
    if options.normalized or zero_router(options):
        return None
    if options.score == "softmax" and options.top_k == num_experts:
        return None
    what = "softmax" if options.score == "softmax" else "sigmoid scores"
    text = f"the router's weights are not normalised, so the chosen experts' part of the {what} varies from token to token"
    if dense.norm_order == "post" and not shared:
        return f"{text}; the norm after the FFN takes that out, except for what norm_eps is beside its output"
    seen = "5e-5, 5e-3 and 9e-2" if options.score == "softmax" else "1e-5, 1e-3 and 2e-2"
    return (
        f"{text}: KL(dense || MoE) was about {seen} at router_std 0.002, 0.02 and 0.1 (small random model, 8 experts, top-2, dim "
        "64; it grows with dim); exact is renormalize = true, or router_init = 'zeros' without noise"
    )


def placement_gap(options: UpcycleOptions, num_experts: int, *, gated: bool = True) -> str | None:
    """Why scaling all matrices changes the output; None where they are not so scaled."""
    factor = output_scale(options, num_experts)
    if options.scale_placement != "both" or factor == 1:
        return None
    if not gated:
        return (
            f"both matrices are scaled by the square root of {factor:g}, but the activation is not homogeneous; exact is "
            "scale_placement = 'down' or 'routed_scaling'"
        )
    return (
        f"all three matrices are scaled by the cube root of {factor:g}, but the gate's activation is not homogeneous: logits "
        "were off by about 5, 9 and 13 % at granularity 2, 4 and 8 in a small random SwiGLU model; exact is "
        "scale_placement = 'down' or 'routed_scaling'"
    )


def joined(*reasons: str | None) -> str | None:
    """All reasons in one text; None where there is none."""
    return "; ".join(reason for reason in reasons if reason) or None
