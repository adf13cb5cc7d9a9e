"""Configuration of one model: frozen, keyword-only records, checked when built. Imports no torch.

Every record checks itself in `__post_init__` and raises one `ConfigError` that lists all of its problems,
with paths as they are written in TOML files and flags (`model.moe.top_k`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from typing import Any, Literal, get_args, get_type_hints

from .checks import check_types, positive, raise_if
from .config_parts import MAX_WIRE_BLOCK, BalanceConfig, CompressConfig, RopeScaling, RouterConfig
from .errors import Problem

__all__ = [
    "MAX_WIRE_BLOCK",
    "Activation",
    "BalanceConfig",
    "CompressConfig",
    "MoEConfig",
    "ModelConfig",
    "RopeScaling",
    "RouterConfig",
    "with_defaults",
]

Activation = Literal["silu", "gelu_tanh"]
_NO_CAPACITY = "no token would reach an expert; use a positive factor, or leave it out for dropless"


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
    """Experts that see every token; they act as one network of width num_shared_experts * expert_dim."""
    shared_dim: int | None = None
    """Hidden width of the shared experts together; None = num_shared_experts * expert_dim."""
    shared_gate: bool = False
    """Each token weighs the shared experts' output by sigmoid(x . w), with a trained w (Qwen2-MoE, arXiv 2407.10671)."""
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
        problems = positive(self, path, ["num_experts", "top_k", "expert_dim", "shared_dim"])
        if self.num_shared_experts < 0:
            problems.append(Problem(f"{path}.num_shared_experts", f"is {self.num_shared_experts}, but must be >= 0"))
        if self.shared_gate and not self.shared_width:
            what = "is true, but there are no shared experts to weigh; set num_shared_experts or shared_dim, or leave it out"
            problems.append(Problem(f"{path}.shared_gate", what))
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

    @property
    def shared_width(self) -> int:
        """Hidden width of the shared experts together; 0 = there are none."""
        return self.num_shared_experts * self.expert_dim if self.shared_dim is None else self.shared_dim

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
    """Longest sequence that the model is made for; with learned positions, rows of their table."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm on queries and keys: per head (Qwen3) or over the full projection (OLMoE)."""
    attention_bias: Literal["none", "qkv", "all"] = "none"
    """Biases of attention: of the query, key and value projections (Qwen2), or of the output projection too."""
    attention_scale: float | None = None
    """Multiplies the products of queries and keys; None = head_dim^-0.5."""
    sliding_window: int | None = None
    """In every layer, a position sees itself and the sliding_window - 1 before it (Mistral, arXiv 2310.06825); None = all
    earlier ones."""
    attention_experts: int = 1
    """Attention blocks of each layer, whose outputs are mixed for each token by the softmax of a trained router over all of them
    (soft routing: BAM, arXiv 2408.08274)."""
    attention_expert_kv: Literal["own", "shared"] = "own"
    """own: each attention expert has queries, keys, values and output, and so keys and values to cache; shared: one set of keys
    and values for all, queries and output for each."""
    norm_order: Literal["pre", "post"] = "pre"
    """Where a layer's norms are: x + f(norm(x)); or x + norm(f(x)) (OLMo 2, arXiv 2501.00656)."""
    norm: Literal["rms", "layer"] = "rms"
    """Of layers and head: RMSNorm (arXiv 1910.07467), or LayerNorm with weight and bias (GPT-2; arXiv 1607.06450)."""
    positions: Literal["rotary", "learned"] = "rotary"
    """How tokens know their place: queries and keys are turned, or a trained vector for each place in the sequence is added to
    the embedding (GPT-2)."""
    activation: Activation = "silu"
    """Of every feed-forward network, of its gate where it has one: SiLU (SwiGLU), or GELU by its tanh formula (Gemma, GPT-2)."""
    ffn_gate: bool = True
    """Feed-forward networks, dense or of experts, are w2 (act(gate x) * (up x)); without a gate w2 act(up x) (GPT-2)."""
    ffn_bias: bool = False
    """Biases of all their projections."""
    tie_embeddings: bool = False
    """Use the token embedding as output head."""
    dense_prefix_layers: int = 0
    """The first layers are dense (DeepSeek: 1 to 3)."""
    moe_every: int = 1
    """After the dense prefix, every n-th layer is MoE, the first one included."""
    dense_ffn_dim: int | None = None
    """Hidden width of dense feed-forward layers; needed when there are any."""
    rope_theta: float = 10_000.0
    rope_fraction: float = 1.0
    """Part of each head, from its start, that rotary embedding turns (GLM-4: 0.5)."""
    rope_scaling: RopeScaling | None = None
    embed_scale: float = 1.0
    """Multiplies token embeddings (Gemma: sqrt(dim)), before learned positions are added."""
    residual_scale: float = 1.0
    """Multiplies what attention and feed-forward add to the residual stream (Granite)."""
    logits_scale: float = 1.0
    """Divides the logits (Granite)."""
    norm_eps: float = 1e-6
    init_std: float = 0.02
    """Standard deviation of the initial weights (output projections divided by sqrt(2 * num_layers))."""
    moe: MoEConfig | None = None
    """None makes every layer dense."""

    def __post_init__(self) -> None:
        path = "model"
        check_types(self, path)
        sizes = ["dim", "num_layers", "num_heads", "head_dim", "vocab_size", "max_seq_len", "moe_every", "dense_ffn_dim"]
        sizes += ["attention_experts"]
        scales = ["attention_scale", "embed_scale", "residual_scale", "logits_scale"]
        problems = positive(self, path, [*sizes, "sliding_window", "rope_theta", "norm_eps", "init_std", *scales])
        if not 0 < self.rope_fraction <= 1:
            what = f"is {self.rope_fraction}, but must be over 0 and at most 1 (1 turns whole heads)"
            problems.append(Problem(f"{path}.rope_fraction", what))
        problems += self._attention_problems(path) if not problems else []
        if self.moe is not None and self.moe.compress.method != "none" and self.moe.compress.hash_width > self.dim > 0:
            what = f"is {self.moe.compress.hash_width}, more directions than dim = {self.dim}"
            problems.append(Problem(f"{path}.moe.compress.hash_width", what))
        problems += self._kind_problems(path)
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
        elif self.positions == "learned":
            problems += self._unturned_problems(path)
        elif self.resolved_head_dim % 2:
            what = f"is {self.resolved_head_dim}, but rotary embedding needs an even number"
            problems.append(Problem(f"{path}.head_dim", what))
        elif self.rotary_dim % 2 or not self.rotary_dim:
            hd = self.resolved_head_dim
            what = (
                f"is {self.rope_fraction}, which turns {self.rotary_dim} of head_dim = {hd} columns, but rotary embedding needs "
                f"an even number; legal: multiples of {2 / hd:g}"
            )
            problems.append(Problem(f"{path}.rope_fraction", what))
        if self.resolved_kv_heads <= 0 or self.num_heads % self.resolved_kv_heads:
            problems.append(
                Problem(f"{path}.num_kv_heads", f"is {self.num_kv_heads}, which does not divide num_heads = {self.num_heads}")
            )
        if self.attention_expert_kv == "shared" and self.attention_experts == 1:
            what = "is 'shared', but attention_experts = 1 has none to share them with; set attention_experts, or leave it out"
            problems.append(Problem(f"{path}.attention_expert_kv", what))
        return problems

    def _kind_problems(self, path: str) -> list[Problem]:
        """Of the kind of feed-forward network: what the Triton products do not have."""
        others = {"activation": self.activation != "silu", "ffn_gate": not self.ffn_gate, "ffn_bias": self.ffn_bias}
        found = ", ".join(f"{name} = {getattr(self, name)!r}" for name, other in others.items() if other)
        if self.moe is None or self.moe.kernels != "triton" or not found:
            return []
        what = f"is 'triton', whose products are SwiGLU without biases only, but {found}; use 'auto' or 'torch'"
        return [Problem(f"{path}.moe.kernels", what)]

    def _unturned_problems(self, path: str) -> list[Problem]:
        """Settings of rotary embedding that learned positions would leave without effect."""
        usual = {"rope_theta": 10_000.0, "rope_fraction": 1.0, "rope_scaling": None}
        return [
            Problem(f"{path}.{name}", f"is {getattr(self, name)}, but positions = 'learned' turns no heads; leave it out")
            for name, value in usual.items()
            if getattr(self, name) != value
        ]

    @property
    def resolved_head_dim(self) -> int:
        return self.dim // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Columns of a head that rotary embedding turns; 0 = there is none."""
        return int(self.resolved_head_dim * self.rope_fraction) if self.positions == "rotary" else 0

    @property
    def resolved_kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def kv_sets(self) -> int:
        """Sets of keys and values in each layer: one, or one for each attention expert that has its own."""
        return self.attention_experts if self.attention_expert_kv == "own" else 1

    def is_moe_layer(self, index: int) -> bool:
        """Whether layer `index` (from 0) has experts."""
        after_prefix = index - self.dense_prefix_layers
        return self.moe is not None and after_prefix >= 0 and after_prefix % self.moe_every == 0

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers."""
        return tuple(i for i in range(self.num_layers) if self.is_moe_layer(i))

    @property
    def _norm_params(self) -> int:
        return self.dim * (2 if self.norm == "layer" else 1)

    @property
    def ffn_matrices(self) -> int:
        """Of one feed-forward network: gate, up and down, or two of them without a gate."""
        return 3 if self.ffn_gate else 2

    def _ffn_biases(self, width: int) -> int:
        """Biases of one feed-forward network of a hidden width; of width 0 there is none."""
        return (width * (self.ffn_matrices - 1) + self.dim) if self.ffn_bias and width else 0

    def _vector_params(self, index: int, experts: int) -> int:
        """Norm weights and biases of one layer: what no matrix product is made with."""
        N, sets, hd = self.attention_experts, self.kv_sets, self.resolved_head_dim
        q, kv = N * self.num_heads * hd, sets * self.resolved_kv_heads * hd
        norms = 2 * self._norm_params + {"none": 0, "head": (N + sets) * hd, "full": q + kv}[self.qk_norm]
        biases = {"none": 0, "qkv": q + 2 * kv, "all": q + 2 * kv + N * self.dim}[self.attention_bias]
        if not self.is_moe_layer(index):
            return norms + biases + self._ffn_biases(self.dense_ffn_dim or 0)
        assert self.moe is not None
        return norms + biases + experts * self._ffn_biases(self.moe.expert_dim) + self._ffn_biases(self.moe.shared_width)

    def _layer_params(self, index: int, experts: int) -> int:
        d, hd = self.dim, self.resolved_head_dim
        q, kv = self.attention_experts * self.num_heads * hd, self.kv_sets * self.resolved_kv_heads * hd
        mixing = d * self.attention_experts if self.attention_experts > 1 else 0
        outside = d * q + 2 * d * kv + q * d + mixing + self._vector_params(index, experts)
        matrices = d * self.ffn_matrices
        if not self.is_moe_layer(index):
            return outside + matrices * (self.dense_ffn_dim or 0)
        assert self.moe is not None
        shared = matrices * self.moe.shared_width + (d if self.moe.shared_gate else 0)
        router, routed = d * self.moe.num_experts, matrices * self.moe.expert_dim * experts
        return outside + router + self.moe.codec_params(d) + routed + shared

    def _params(self, experts: int) -> int:
        embeddings = self.vocab_size * self.dim * (1 if self.tie_embeddings else 2)
        embeddings += self._position_params + self._norm_params
        return embeddings + sum(self._layer_params(i, experts) for i in range(self.num_layers))

    @property
    def _position_params(self) -> int:
        return self.max_seq_len * self.dim if self.positions == "learned" else 0

    @property
    def num_params(self) -> int:
        """All trained parameters: embedding, learned positions, head (once if tied), norms, biases, routers, every expert. The
        selection biases of routers are not trained."""
        return self._params(self.moe.num_experts if self.moe else 0)

    @property
    def num_active_params(self) -> int:
        """Parameters one token passes through: as `num_params`, with top_k of the routed experts per MoE layer. Embedding and
        head included."""
        return self._params(self.moe.top_k if self.moe else 0)

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations per token of a forward and backward pass (3 x forward, a multiply-add is 2).

        Counts matrix products of active parameters (look-ups, norms, biases and softmax are free; recompute is not counted) and
        attention scores of visible positions only: 2 * seq_len * heads * head_dim per layer and attention expert forward, less
        with a sliding window.
        """
        lookup = self.vocab_size * self.dim * (0 if self.tie_embeddings else 1) + self._position_params
        active = self.moe.top_k if self.moe else 0
        vectors = self._norm_params + sum(self._vector_params(i, active) for i in range(self.num_layers))
        scales = len(self.moe_layers) * self.moe.codec_params(self.dim) if self.moe else 0
        matmul = 2 * (self.num_active_params - lookup - vectors - scales)
        window = min(self.sliding_window or seq_len, seq_len)
        # twice the positions that one sees on average: those before it, up to the window
        seen_twice = 2 * window - window * window / seq_len
        attention = self.num_layers * 2 * seen_twice * self.attention_experts * self.num_heads * self.resolved_head_dim
        return 3.0 * (matmul + attention)


def with_defaults(table: Mapping[str, Any], record: type = ModelConfig) -> dict[str, Any]:
    """A table of settings as an older version wrote it (`dataclasses.asdict`), with those it did not know at their defaults.

    A setting that comes later has a default that changes nothing, so the result describes the model that was meant.
    """
    hints, filled = get_type_hints(record), dict(table)
    for f in fields(record):
        inner = next((hint for hint in (hints[f.name], *get_args(hints[f.name])) if is_dataclass(hint)), None)
        if isinstance(inner, type) and isinstance(filled.get(f.name), Mapping):
            filled[f.name] = with_defaults(filled[f.name], inner)
        elif f.name not in filled and f.default is not MISSING:
            filled[f.name] = f.default
        elif f.name not in filled and f.default_factory is not MISSING:
            filled[f.name] = asdict(f.default_factory())
    return filled
