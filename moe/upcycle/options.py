"""What an upcycling does: one frozen record, checked when built. Imports neither torch nor numpy."""

from __future__ import annotations

from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Literal

from ..checks import check_types, not_negative, positive, raise_if
from ..errors import Problem

MethodName = Literal["copy", "virtual_groups", "drop", "noise", "dense_shared", "split", "merge", "bam", "flex_olmo"]
RouterInit = Literal["auto", "normal", "zeros", "repeated", "centroids"]

SEVERAL = ("merge", "bam", "flex_olmo")
"""Methods that take several dense models, one for each expert."""
_GROUPED = ("virtual_groups", "drop", "noise")
_READ_BY = MappingProxyType(
    {
        "granularity": (*_GROUPED, "dense_shared", "split"),
        "group_limited": _GROUPED,
        "shuffle": _GROUPED,
        "num_shared_experts": ("copy", *_GROUPED, "split"),
        "shared_width": ("copy", *_GROUPED, "split"),
        "shared_init": ("copy", *_GROUPED, "split"),
        "shared_gate": ("copy", *_GROUPED, "dense_shared", "split"),
        "scale_placement": ("copy", *_GROUPED, "split", "merge", "bam"),
        "reinit_ratio": ("drop",),
        "per_matrix": ("drop",),
        "noise_std": ("noise",),
        "noise_share": ("noise",),
        "split_by": ("split",),
        "activations": ("split",),
        "kmeans_steps": ("split",),
        "merge_weights": ("merge", "bam"),
        "attention_expert_kv": ("bam",),
        "without": ("flex_olmo",),
        "trust_frozen": ("flex_olmo",),
    }
)
"""Methods that read a setting; set for another one it would change nothing, which is an error. Settings not named here are
read by every method."""


@dataclass(frozen=True, kw_only=True)
class UpcycleOptions:
    """How a Mixture-of-Experts model is made of one dense model, or of several. Sizes left out follow from the method."""

    method: MethodName = "copy"
    """copy: every expert is the dense FFN. virtual_groups: copies, each cut into `granularity` pieces. drop, noise: those, partly
    drawn anew or with noise added. dense_shared: the dense FFN is the shared expert, routed ones start without output. split:
    one FFN cut into all experts. merge: one expert from each of several models, all else averaged. bam: so, but attention is kept
    too, as one attention expert from each model. flex_olmo: a public model's FFN and those that were trained beside it."""
    num_experts: int | None = None
    """Routed experts of the result, pieces counted one by one; None only where each model gives one (merge, bam, flex_olmo)."""
    top_k: int = 2
    """Routed experts for each token, pieces counted one by one."""
    granularity: int | None = None
    """Pieces G into which one copy of the FFN is cut; None = 1 (split: num_experts)."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    order: Literal["softmax_topk", "topk_softmax"] = "softmax_topk"
    renormalize: bool = True
    scaling_factor: float = 1.0
    """Multiplies the router's weights in the result; experts are made smaller by as much."""
    expert_bias: bool = False
    """Whether the router of the result selects by score + bias; biases start at 0."""
    aux_loss_coeff: float = 0.01
    group_limited: bool | None = None
    """Choose whole copies: num_groups = copies, top_groups = top_k / granularity (DeepSeek's limit), so that no rounding can
    choose a part of one. None = yes, unless `fitted` finds that the target cannot say so."""

    num_shared_experts: int = 0
    """Shared experts as wide as routed ones: the FFN is cut into granularity + num_shared_experts pieces."""
    shared_width: int | None = None
    """Or the shared experts' neurons all together, when they are not a multiple of a routed one's."""
    shared_init: Literal["part", "zero"] = "part"
    """part: the shared expert takes its neurons out of the dense FFN, the routed ones share the rest. zero: it is there, but
    without output, and routed experts have the whole FFN (for formats that need a shared expert)."""
    shared_gate: bool = False
    """Write a gate of weight 0 for the shared expert (Qwen2-MoE): it halves the output, which is doubled."""
    dense_prefix_layers: int = 0
    moe_every: int = 1
    pad_multiple: int | None = None
    """Widen experts by neurons of zeros to a multiple of this; then pieces may also differ by one neuron. None = never."""
    scale_placement: Literal["down", "both", "routed_scaling"] = "down"
    """Where the factor goes that makes up for the router's weights: the down projection (exact); its cube root to all three
    matrices, its square root to both where there is no gate (arXiv 2410.07524, trains better in their runs, exact for none of the
    activations here); or the router's scaling_factor (exact)."""
    shuffle: bool = False
    """Shuffle each copy's neurons before it is cut, so that copies are cut differently (Qwen1.5-MoE)."""

    router_init: RouterInit = "auto"
    """normal: N(0, router_std) for each expert. zeros: 0, plus router_noise_std. repeated: one normal row for each copy, the same
    for its pieces. centroids: rows from a file. auto: repeated where copies are cut, else normal."""
    router_std: float = 0.02
    """Also the root mean square that centroids are brought to, as longer rows make the softmax one-hot; 0 = as given."""
    router_noise_std: float = 0.0
    centroids: str | None = None
    """A .npy file [rows, dim] for all layers, or a .npz with one array `layers.INDEX` for each MoE layer (bam: each layer, for
    attention's router too); one row for each expert, or for each copy where copies are cut."""
    seed: int = 0

    reinit_ratio: float = 0.5
    """Share of each expert's neurons that is drawn anew."""
    per_matrix: bool = False
    """Draw the set of neurons for each of the three matrices, as the released code of Drop-Upcycling does, and not once."""
    noise_std: float = 0.02
    noise_share: float = 0.5
    """Share of single weights that get noise."""
    split_by: Literal["random", "weights", "activations"] = "random"
    """Which neurons come together: chance; or balanced k-means on rows of the gate matrix, or on recorded activations."""
    activations: str | None = None
    """Recorded activations: a folder with a file `layers.INDEX.npy` [tokens, neurons] for each MoE layer; or the path of such a
    file, with `{layer}` for the layer's index."""
    kmeans_steps: int = 20
    merge_weights: tuple[float, ...] = ()
    """Weight of each model where they are averaged, made to sum to 1; () = all equal."""
    attention_expert_kv: Literal["own", "shared"] = "own"
    """Whether attention experts keep the keys and values of their models, or share the average of these."""
    without: tuple[int, ...] = ()
    """Models, by index, that opt out: their expert and router row are left out. 0, the public model, cannot."""
    trust_frozen: bool = False
    """Take the public model's weights outside of the FFNs without comparing the other models' to them."""

    def __post_init__(self) -> None:
        path = "upcycle"
        check_types(self, path)
        counts = ["num_experts", "top_k", "granularity", "shared_width", "moe_every", "pad_multiple", "kmeans_steps"]
        problems = positive(self, path, [*counts, "scaling_factor"])
        stds = ["router_std", "router_noise_std", "noise_std", "reinit_ratio", "noise_share", "aux_loss_coeff"]
        problems += not_negative(self, path, [*stds, "num_shared_experts", "dense_prefix_layers", "seed"])
        for name in ("reinit_ratio", "noise_share"):
            if getattr(self, name) > 1:
                problems.append(Problem(f"{path}.{name}", f"is {getattr(self, name)}, but is a share, so at most 1"))
        raise_if(problems + self._unread(path) + self._size_problems(path) + self._router_problems(path))

    def _unread(self, path: str) -> list[Problem]:
        defaults = {f.name: f.default for f in fields(self)}
        return [
            Problem(
                f"{path}.{name}", f"is {getattr(self, name)}, but method '{self.method}' reads no {name}; {_readers(methods)}"
            )
            for name, methods in _READ_BY.items()
            if self.method not in methods and getattr(self, name) != defaults[name]
        ]

    def _size_problems(self, path: str) -> list[Problem]:
        problems = []
        if self.num_experts is None and self.method not in SEVERAL:
            problems.append(Problem(f"{path}.num_experts", f"is not set, but method '{self.method}' needs it"))
        if self.num_experts is not None and self.top_k > self.num_experts:
            problems.append(Problem(f"{path}.top_k", f"is {self.top_k}, more than num_experts = {self.num_experts}"))
        if self.num_shared_experts and self.shared_width is not None:
            what = (
                f"is {self.shared_width}, but num_shared_experts = {self.num_shared_experts} says it too; leave one of them out"
            )
            problems.append(Problem(f"{path}.shared_width", what))
        if self.method == "virtual_groups" and self.granularity is None:
            what = "is not set, but is what virtual_groups cuts copies by; set it, or use method 'copy' for whole ones"
            problems.append(Problem(f"{path}.granularity", what))
        if self.shared_gate and self.method != "dense_shared" and not (self.num_shared_experts or self.shared_width):
            what = "is true, but there is no shared expert to weigh; set num_shared_experts or shared_width"
            problems.append(Problem(f"{path}.shared_gate", what))
        if self.scale_placement == "routed_scaling" and self.scaling_factor != 1:
            what = f"is {self.scaling_factor}, but scale_placement = 'routed_scaling' sets it; leave one of them out"
            problems.append(Problem(f"{path}.scaling_factor", what))
        return problems

    def _router_problems(self, path: str) -> list[Problem]:
        problems = []
        if self.score == "sigmoid" and self.order == "topk_softmax":
            problems.append(Problem(f"{path}.order", "is 'topk_softmax', which needs score = 'softmax'; use 'softmax_topk'"))
        if self.top_k == 1 and self.normalized:
            what = (
                "with top_k = 1 makes every weight 1, so the router would get no gradient from the loss; "
                "set renormalize = false and order = 'softmax_topk'"
            )
            problems.append(Problem(f"{path}.renormalize", what))
        if (self.router_init == "centroids") != (self.centroids is not None):
            what = f"is {self.router_init!r}, and centroids is {self.centroids!r}: set both or none"
            problems.append(Problem(f"{path}.router_init", what))
        if self.router_noise_std and self.router_init != "zeros":
            what = f"is {self.router_noise_std}, but is added to router_init = 'zeros' only; router_std is for the others"
            problems.append(Problem(f"{path}.router_noise_std", what))
        if self.router_init == "repeated" and self.method not in _GROUPED:
            what = f"is 'repeated', but method '{self.method}' cuts no copies that could share a row; use 'normal'"
            problems.append(Problem(f"{path}.router_init", what))
        if (self.split_by == "activations") != (self.activations is not None):
            what = f"is {self.split_by!r}, and activations is {self.activations!r}: set both or none"
            problems.append(Problem(f"{path}.split_by", what))
        elif self.activations is not None and "{layer}" not in self.activations and self.activations.endswith(".npy"):
            what = f"is {self.activations!r}, without {{layer}}; every layer has activations of its own: write act-{{layer}}.npy"
            problems.append(Problem(f"{path}.activations", what))
        return problems

    def activations_of(self, layer: int) -> str | None:
        """Path of the recorded activations of one layer; None where there are none."""
        if self.activations is None or "{layer}" in self.activations:
            return self.activations and self.activations.replace("{layer}", str(layer))
        return f"{self.activations.rstrip('/')}/layers.{layer}.npy"

    @property
    def normalized(self) -> bool:
        """Whether a token's weights sum to scaling_factor whatever the logits are."""
        return self.renormalize or self.order == "topk_softmax"

    @property
    def pieces(self) -> int:
        """Pieces G that one copy of the FFN is cut into."""
        if self.method == "split":
            return self.granularity or self.num_experts or 1
        return self.granularity or 1


def _readers(methods: tuple[str, ...]) -> str:
    return f"leave it out (read by {', '.join(methods)})"
