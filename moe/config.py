"""Configuration of one model: frozen, keyword-only records, checked when built. Imports no torch.

Every record checks itself in `__post_init__` and raises one `ConfigError` that lists all of its problems,
with paths as they are written in TOML files and flags (`model.moe.top_k`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from .checks import check_types, not_negative, positive, raise_if
from .errors import Problem

MAX_WIRE_BLOCK = 32768
"""Columns that the kernel of the wire takes for one scale: `kernels.quant_rows.MAX_BLOCK`, which imports torch."""
_NO_CAPACITY = "no token would reach an expert; use a positive factor, or leave it out for dropless"


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
class MoEConfig:
    """One Mixture-of-Experts layer."""

    num_experts: int
    """Routed experts E."""
    top_k: int
    """Experts K that each token is sent to."""
    expert_dim: int
    """Hidden width F of one routed expert."""
    num_shared_experts: int = 0
    """Experts that see every token; they act as one SwiGLU of width num_shared_experts * expert_dim."""
    capacity_factor: float | None = None
    """None: dropless. Else each expert takes at most ceil(factor * K * S / E) tokens of a sequence with S valid tokens; the rest
    keep only their residual path."""
    drop_policy: Literal["position", "probability"] = "position"
    """Who is kept over capacity: the first tokens of the sequence or those with the highest weight."""
    dispatcher: Literal["all_to_all", "hierarchical"] = "all_to_all"
    """How rows travel between expert-parallel ranks: each to its expert's rank; or once to each node, and on from there."""
    kernels: Literal["auto", "torch", "triton"] = "auto"
    """Routing, row movement and products in torch or in Triton kernels; auto: Triton on CUDA devices from Hopper on (products
    in 16 bits only), else torch."""
    router: RouterConfig = field(default_factory=RouterConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    compress: CompressConfig = field(default_factory=CompressConfig)

    def __post_init__(self) -> None:
        path = "model.moe"
        check_types(self, path)
        problems = positive(self, path, ["num_experts", "top_k", "expert_dim"])
        if self.num_shared_experts < 0:
            problems.append(Problem(f"{path}.num_shared_experts", f"is {self.num_shared_experts}, but must be >= 0"))
        if self.capacity_factor is not None and not 0 < self.capacity_factor < math.inf:
            reason = "leave it out for dropless" if self.capacity_factor == math.inf else _NO_CAPACITY
            problems.append(Problem(f"{path}.capacity_factor", f"is {self.capacity_factor}: {reason}"))
        if self.compress.exact_choices > self.top_k:
            what = f"is {self.compress.exact_choices}, more than top_k = {self.top_k}"
            problems.append(Problem(f"{path}.compress.exact_choices", what))
        if self.top_k > self.num_experts > 0:
            problems.append(Problem(f"{path}.top_k", f"is {self.top_k}, more than num_experts = {self.num_experts}"))
        problems += self._router_problems(path) if self.num_experts > 0 and self.top_k > 0 else []
        raise_if(problems)

    def codec_params(self, dim: int) -> int:
        """Trained numbers of the compression of one layer."""
        if self.compress.method == "none":
            return 0
        return {"scalar": 1, "diagonal": dim}.get(self.compress.compensation, 0)

    def _router_problems(self, path: str) -> list[Problem]:
        r, problems = self.router, []
        in_reach = r.top_groups * self.num_experts // r.num_groups
        if self.num_experts % r.num_groups:
            legal = [g for g in range(1, self.num_experts + 1) if self.num_experts % g == 0]
            problems.append(
                Problem(
                    f"{path}.router.num_groups",
                    f"is {r.num_groups}, which does not divide num_experts = {self.num_experts}; legal: {legal}",
                )
            )
        elif in_reach < self.top_k <= self.num_experts:
            problems.append(
                Problem(f"{path}.router.top_groups", f"leaves {in_reach} experts to choose from, fewer than top_k = {self.top_k}")
            )
        elif r.num_groups > 1 and r.group_score == "top2_sum" and self.num_experts // r.num_groups < 2:
            problems.append(Problem(f"{path}.router.group_score", "is 'top2_sum', but groups hold one expert; use 'max'"))
        if self.top_k == 1 and (r.renormalize or r.order == "topk_softmax"):
            problems.append(
                Problem(
                    f"{path}.router.renormalize",
                    "with top_k = 1 makes every weight 1, so the router would get no gradient from the loss; "
                    "set renormalize = false and order = 'softmax_topk'",
                )
            )
        return problems


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer whose feed-forward layers are dense or Mixture-of-Experts."""

    dim: int
    """Model width D."""
    num_layers: int
    num_heads: int
    num_kv_heads: int | None = None
    """Key/value heads (grouped-query attention); None = num_heads."""
    head_dim: int | None = None
    """Width of one attention head; None = dim / num_heads."""
    vocab_size: int
    max_seq_len: int
    """Longest sequence the rotary tables cover."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm on queries and keys: per head (Qwen3) or over the full projection (OLMoE)."""
    tie_embeddings: bool = False
    """Use the token embedding as output head."""
    dense_prefix_layers: int = 0
    """The first layers are dense (DeepSeek: 1 to 3)."""
    moe_every: int = 1
    """After the dense prefix, every n-th layer is MoE, the first one included."""
    dense_ffn_dim: int | None = None
    """Hidden width of dense feed-forward layers; needed when there are any."""
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    init_std: float = 0.02
    """Standard deviation of the initial weights (output projections divided by sqrt(2 * num_layers))."""
    moe: MoEConfig | None = None
    """None makes every layer dense."""

    def __post_init__(self) -> None:
        path = "model"
        check_types(self, path)
        sizes = ["dim", "num_layers", "num_heads", "head_dim", "vocab_size", "max_seq_len", "moe_every", "dense_ffn_dim"]
        problems = positive(self, path, [*sizes, "rope_theta", "norm_eps", "init_std"])
        problems += self._attention_problems(path) if not problems else []
        if self.moe is not None and self.moe.compress.method != "none" and self.moe.compress.hash_width > self.dim > 0:
            what = f"is {self.moe.compress.hash_width}, more directions than dim = {self.dim}"
            problems.append(Problem(f"{path}.moe.compress.hash_width", what))
        if not 0 <= self.dense_prefix_layers <= max(self.num_layers, 0):
            problems.append(
                Problem(
                    f"{path}.dense_prefix_layers",
                    f"is {self.dense_prefix_layers}, but must be between 0 and num_layers = {self.num_layers}",
                )
            )
        if not problems and self.dense_ffn_dim is None and len(self.moe_layers) < self.num_layers:
            problems.append(
                Problem(f"{path}.dense_ffn_dim", "is not set, but some layers are dense; set the hidden width of their FFN")
            )
        raise_if(problems)

    def _attention_problems(self, path: str) -> list[Problem]:
        problems = []
        if self.head_dim is None and self.dim % self.num_heads:
            problems.append(
                Problem(f"{path}.num_heads", f"is {self.num_heads}, which does not divide dim = {self.dim}; set head_dim")
            )
        elif self.resolved_head_dim % 2:
            what = f"is {self.resolved_head_dim}, but rotary embedding needs an even number"
            problems.append(Problem(f"{path}.head_dim", what))
        if self.resolved_kv_heads <= 0 or self.num_heads % self.resolved_kv_heads:
            problems.append(
                Problem(f"{path}.num_kv_heads", f"is {self.num_kv_heads}, which does not divide num_heads = {self.num_heads}")
            )
        return problems

    @property
    def resolved_head_dim(self) -> int:
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def resolved_kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` (from 0) has experts."""
        after_prefix = index - self.dense_prefix_layers
        return self.moe is not None and after_prefix >= 0 and after_prefix % self.moe_every == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers."""
        return tuple(i for i in range(self.num_layers) if self.is_moe_layer(i))

    def _layer_params(self, index: int, experts: int) -> int:
        d, hd = self.dim, self.resolved_head_dim
        q, kv = self.num_heads * hd, self.resolved_kv_heads * hd
        attention = d * q + 2 * d * kv + q * d
        norms = 2 * d + {"none": 0, "head": 2 * hd, "full": q + kv}[self.qk_norm]
        if not self.is_moe_layer(index):
            return attention + norms + 3 * d * (self.dense_ffn_dim or 0)
        assert self.moe is not None
        router, expert = d * self.moe.num_experts, 3 * d * self.moe.expert_dim
        return attention + norms + router + self.moe.codec_params(d) + expert * (experts + self.moe.num_shared_experts)

    def _params(self, experts: int) -> int:
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        return embeddings + self.dim + sum(self._layer_params(i, experts) for i in range(self.num_layers))

    @property
    def num_params(self) -> int:
        """All trained parameters: embedding, head (once if tied), norms, routers, every expert. Expert biases are not trained."""
        return self._params(self.moe.num_experts if self.moe else 0)

    @property
    def num_active_params(self) -> int:
        """Parameters one token passes through: as `num_params`, with top_k of the routed experts per MoE layer. Embedding and
        head included."""
        return self._params(self.moe.top_k if self.moe else 0)

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations per token of a forward and backward pass (3 x forward, a multiply-add is 2).

        Counts matrix products of active parameters (embedding look-up, norms and softmax are free; recompute is not counted)
        and attention scores with the causal half only: 2 * seq_len * heads * head_dim per layer forward.
        """
        lookup = self.vocab_size * self.dim * (0 if self.tie_embeddings else 1)
        norms = self.dim + sum(
            2 * self.dim
            + {"none": 0, "head": 2, "full": self.num_heads + self.resolved_kv_heads}[self.qk_norm] * self.resolved_head_dim
            for _ in range(self.num_layers)
        )
        scales = len(self.moe_layers) * self.moe.codec_params(self.dim) if self.moe else 0
        matmul = 2 * (self.num_active_params - lookup - norms - scales)
        attention = self.num_layers * 2 * seq_len * self.num_heads * self.resolved_head_dim
        return 3.0 * (matmul + attention)
