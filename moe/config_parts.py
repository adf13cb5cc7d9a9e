"""Parts of a model's configuration: its router, balance, compression and rotary scaling. Imports no torch.

Used through `moe.config`, which has all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import check_types, not_negative, positive, raise_if
from .errors import Problem

MAX_WIRE_BLOCK = 32768
"""Columns that the kernel of the wire takes for one scale: `kernels.quant_rows.MAX_BLOCK`, which imports torch."""


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    """How a token chooses its experts. Logits and scores are always computed in fp32 (fp64 for fp64 input)."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    """Score function over the logits of all experts (softmax) or of each expert alone (sigmoid, DeepSeek-V3)."""
    order: Literal["softmax_topk", "topk_softmax"] = "softmax_topk"
    """Softmax over all experts, then top-k (Mixtral, Qwen3, OLMoE); or top-k of logits, then softmax over these (gpt-oss)."""
    renormalize: bool = True
    """Divide the chosen weights by their sum, so that a token's weights sum to 1."""
    scaling_factor: float = 1.0
    """Multiplies the weights at the end (DeepSeek-V3: 2.5)."""
    num_groups: int = 1
    """Experts are split into this many equal groups of neighbours; 1 = no group limit."""
    top_groups: int = 1
    """A token may only use experts of its best `top_groups` groups."""
    group_score: Literal["top2_sum", "max"] = "top2_sum"
    """Score of a group: sum of its two best experts (DeepSeek-V3) or its best one (DeepSeek-V2)."""

    def __post_init__(self) -> None:
        path = "model.moe.router"
        check_types(self, path)
        problems = positive(self, path, ["num_groups", "top_groups", "scaling_factor"])
        if self.top_groups > self.num_groups > 0:
            problems.append(Problem(f"{path}.top_groups", f"is {self.top_groups}, more than num_groups = {self.num_groups}"))
        if self.score == "sigmoid" and self.order == "topk_softmax":
            problems.append(Problem(f"{path}.order", "is 'topk_softmax', which needs score = 'softmax'; use 'softmax_topk'"))
        raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    """What keeps the experts evenly used. Every loss is 1 at perfect balance, summed over layers with its coefficient."""

    scope: Literal["global", "micro", "sequence"] = "global"
    """Tokens over which expert frequencies are taken: the whole global batch (arXiv 2501.11873), the micro-batch of one data
    rank, or each sequence."""
    aux_loss_coeff: float = 0.01
    """Coefficient of the load-balancing loss E * sum_e f_e * P_e."""
    accumulation: Literal["running", "prior", "exact"] = "prior"
    """Global scope with several micro-batches: counts so far (the paper's buffer); those plus the last step's counts for the part
    not seen yet; or a counting pass first (twice the forward work)."""
    carry: float = 2.0
    """Weight of the last step's counts in `accumulation = "prior"`; 0 gives `running`. The default has the best worst case of
    those measured by `python -m bench balance_modes`; for micro-batches that are well mixed, 0.5 to 1 is better."""
    straggler_coeff: float = 0.0
    """Coefficient of an additional micro-batch loss that evens out single micro-batches (about 1 % of aux_loss_coeff). It depends
    on the micro-batch by definition, so it is off by default."""
    z_loss_coeff: float = 0.0
    """Coefficient of the router z-loss, mean over tokens of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906, eq. 5)."""
    expert_bias: bool = False
    """Select by score + bias and move the bias towards balance once per step (arXiv 2408.15664)."""
    bias_update_rate: float = 1e-3
    """Step of the bias update."""

    def __post_init__(self) -> None:
        path = "model.moe.balance"
        check_types(self, path)
        raise_if(not_negative(self, path, ["aux_loss_coeff", "straggler_coeff", "z_loss_coeff", "carry", "bias_update_rate"]))


@dataclass(frozen=True, kw_only=True)
class CompressConfig:
    """Sending less. Fewer rows than there are choices: those of one expert that hash alike travel as their mean (LSH-MoE, arXiv
    2411.08446). And, with or without that, fewer bytes per row (`wire`). Routing, losses and capacity are always those of the
    original tokens."""

    method: Literal["none", "lsh"] = "none"
    """lsh: codes of cross-polytope hashes, one row for each (expert, code)."""
    rate: float | None = 0.2
    """Rows that travel, as a part of the choices that would, per rank and layer; codes are shortened and buckets merged until
    that is kept. None = as many as the whole codes tell apart. One row per expert is the least there can be."""
    hashes: int = 16
    """Length of a code; more tell more rows apart, and change nothing where `rate` is reached with fewer."""
    hash_width: int = 8
    """Random directions of each hash, at most the model's dim; tokens are seen from their mean."""
    radius: float | None = None
    """Rows farther from their mean than this part of their length travel exactly, also beyond `rate`. None = no bound."""
    exact_choices: int = 0
    """Choices of each token, best first, that always travel exactly."""
    gate_weighted: bool = False
    """Means are weighted by the router weights, so that the weighted sums of a token lose least."""
    compensation: Literal["none", "identity", "scalar", "diagonal"] = "none"
    """What is added to an expert's result for what the mean lost, x - c: nothing; itself (the paper), which is much longer than
    that result where experts are trained from the start; or itself times a trained number or vector, which starts at 0."""
    detach_residual: bool = False
    """x - c passes no gradient to the tokens; by default it does, which is the true gradient."""
    warmup: float = 0.0
    """Part of the steps, at the start, in which every row travels."""
    anneal: float = 0.0
    """Part of the steps, at the end, over which the rate rises to 1 in a straight line."""
    in_eval: bool = False
    """Whether evaluation is repeated with compression as in training. The exact one, in which every row travels, comes first."""
    error_tokens: int = 0
    """Tokens per rank and layer whose exact result is computed too at steps that are logged, to show the error. 0 = none."""
    wire: Literal["none", "int8", "e4m3"] = "none"
    """Between ranks, a row and its gradient travel with one byte per value and a scale per block of columns, there and back, in
    training and evaluation; not in float64. none: in the type of the computation."""
    wire_block: int | None = 128
    """Columns of one scale on the wire; None = the whole row."""

    def __post_init__(self) -> None:
        path = "model.moe.compress"
        check_types(self, path)
        problems = positive(self, path, ["hashes", "hash_width", "wire_block"])
        problems += not_negative(self, path, ["radius", "exact_choices", "warmup", "anneal", "error_tokens"])
        if self.rate is not None and not 0 < self.rate <= 1:
            problems.append(Problem(f"{path}.rate", f"is {self.rate}, but must be over 0 and at most 1 (1 sends every row)"))
        if self.hash_width > 0 and self.hash_width & (self.hash_width - 1):
            problems.append(Problem(f"{path}.hash_width", f"is {self.hash_width}, but must be a power of two"))
        if self.warmup + self.anneal > 1:
            what = f"is {self.warmup}, and anneal is {self.anneal}: together more than all steps"
            problems.append(Problem(f"{path}.warmup", what))
        if self.wire_block is not None and self.wire_block > MAX_WIRE_BLOCK:
            what = f"is {self.wire_block}, but one scale is for at most {MAX_WIRE_BLOCK} columns; usual is 128"
            problems.append(Problem(f"{path}.wire_block", what))
        raise_if(problems)

    @property
    def on(self) -> bool:
        """Whether anything is compressed."""
        return self.method != "none" or self.wire != "none"

    def row_bytes(self, dim: int, value_bytes: int) -> int:
        """Bytes on the wire of a row of `dim` values, each of `value_bytes` where rows travel as they are."""
        return dim * value_bytes if self.wire == "none" else dim + 4 * -(-dim // (self.wire_block or max(dim, 1)))


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Slower rotary angles, for sequences longer than those that a model was first trained on."""

    kind: Literal["linear", "llama3"]
    """linear: every frequency divided by `factor` (Chen et al., arXiv 2306.15595). llama3: only wavelengths that are long in
    sequences of `original_max_seq_len`, with a ramp between long and short (Llama 3, arXiv 2407.21783)."""
    factor: float
    """Divides the frequencies."""
    low_freq_factor: float = 1.0
    """llama3: wavelengths over original_max_seq_len / low_freq_factor are divided by the whole factor."""
    high_freq_factor: float = 4.0
    """llama3: wavelengths under original_max_seq_len / high_freq_factor stay."""
    original_max_seq_len: int | None = None
    """llama3: longest sequence before scaling, in tokens."""

    def __post_init__(self) -> None:
        path = "model.rope_scaling"
        check_types(self, path)
        problems = positive(self, path, ["factor", "low_freq_factor", "high_freq_factor", "original_max_seq_len"])
        if not problems and self.low_freq_factor >= self.high_freq_factor:
            what = f"is {self.low_freq_factor}, but must be under high_freq_factor = {self.high_freq_factor}"
            problems.append(Problem(f"{path}.low_freq_factor", what))
        if self.kind == "llama3" and self.original_max_seq_len is None:
            what = "is not set, but kind = 'llama3' needs it; set the longest sequence that the model saw before scaling"
            problems.append(Problem(f"{path}.original_max_seq_len", what))
        if self.kind == "linear" and self.original_max_seq_len is not None:
            what = f"is {self.original_max_seq_len}, which only kind = 'llama3' uses; leave it out"
            problems.append(Problem(f"{path}.original_max_seq_len", what))
        raise_if(problems)
