"""The proof of an upcycling: the dense model and the result, read back from its files, computed side by side, layer by layer.

For each layer, both are given what the dense model's layer is given, so that errors do not add up; and both models also go on
alone, from the same tokens to their logits. Memory is that of one layer of each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...moe.attention_experts import AttentionRouter
from ...moe.config import ModelConfig
from ...moe.hf.matrix import Matrix
from ...moe.model import Block
from ...moe.router import TopKRouter
from .layers import Side, added, load_block, load_embedding, load_logits
from .progress import Told
from .tokens import ProofTokens

LOSSLESS, UNIT = 1e-5, MappingProxyType({"BF16": 2.0**-8, "F16": 2.0**-11})
"""Tolerance of a layer that is computed in float32 from the same bits; spacing of 16-bit values around 1."""
END = 10.0
"""How much larger the tolerance of the logits is than that of a layer."""


@dataclass(frozen=True, kw_only=True)
class LayerGap:
    """What the feed-forward network of one layer adds to the residual stream, against the dense one's, for the same input.

    worst: largest difference / largest value. mean: mean difference / mean value (absolute). stored_*: computed in the type that
    weights are stored in, where this is not float32.
    """

    layer: int
    experts: bool
    worst: float
    mean: float
    stored_worst: float | None = None
    stored_mean: float | None = None


@dataclass(frozen=True, kw_only=True)
class EndGap:
    """The logits of both models.

    worst: largest difference / largest value. kl: mean of KL(dense || result) over positions, in nats. top1: share of positions
    with the same most likely token.
    """

    worst: float
    kl: float
    top1: float


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What came out. exact: whether the result should compute what the dense model does. expected: if not, the gap to expect.

    tolerance: of a layer's `worst` in float32; `end_tolerance` of the logits'. against: which dense weights were compared with.
    """

    tokens: str
    against: str
    exact: bool
    expected: str | None
    tolerance: float
    tolerance_says: str
    layers: tuple[LayerGap, ...]
    end: EndGap
    stored: EndGap | None
    stored_dtype: str
    seconds: float

    @property
    def end_tolerance(self) -> float:
        return END * self.tolerance

    @property
    def worst(self) -> LayerGap:
        """The layer that is farthest off; a NaN is farther than any number."""
        return max(self.layers, key=lambda layer: _rank(layer.worst))

    @property
    def finite(self) -> bool:
        """Whether all numbers are."""
        numbers = [layer.worst for layer in self.layers] + [self.end.worst, self.end.kl]
        numbers += [layer.stored_worst or 0.0 for layer in self.layers] + ([self.stored.worst] if self.stored else [])
        return all(map(math.isfinite, numbers))

    @property
    def passed(self) -> bool:
        """For an exact method, whether everything is within tolerance; for others, whether it is finite."""
        within = self.worst.worst <= self.tolerance and self.end.worst <= self.end_tolerance
        return self.finite and (within or not self.exact)

    def line(self) -> str:
        """The verdict in one sentence."""
        worst, end = self.worst, self.end
        found = (
            f"largest error {worst.worst:.1e} (layer {worst.layer}), logits {end.worst:.1e}, KL {end.kl:.1e} nats, "
            f"same top token {end.top1:.1%}"
        )
        if not self.finite:
            return f"some values are not finite: {found}"
        if not self.exact:
            return f"differs from the dense model, as was to be expected: {found}"
        verb = "computes" if self.passed else "does NOT compute"
        allowed = f"allowed are {self.tolerance:.1e} per layer and {self.end_tolerance:.1e} at the end"
        return f"{verb} what the dense model does: {found}; {allowed}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data; None for numbers that are not finite, which JSON has not."""
        found = {"passed": self.passed, "line": self.line(), **asdict(self), "end_tolerance": self.end_tolerance}
        return {key: _plain(value) for key, value in found.items()}


def tolerance_for(dtype: str, rounded: bool) -> tuple[float, str]:
    """Tolerance of one layer, and where it comes from."""
    if not rounded or dtype not in UNIT:
        return LOSSLESS, "float32 sums in another order; no weight was rounded"
    return LOSSLESS + 4 * UNIT[dtype], f"4 times the spacing of {dtype} around 1, as scaled weights were rounded to it once more"


@torch.inference_mode()
def prove(
    dense: Side, result: Side, tokens: ProofTokens, *, exact: bool, expected: str | None, rounded: bool, dtype: str, told: Told
) -> Proof:
    """Compare a dense model with what was made of it.

    dense, result: configuration and parts of each, with the same number of layers. exact: whether they should agree; expected:
    why not, if not. rounded: whether weights were computed and rounded to `dtype`, the type most weights are stored in.
    """
    begin_s = time.monotonic()
    ids_BS = torch.from_numpy(tokens.ids_BS)
    wide = torch.float64 if dtype == "F64" else torch.float32
    kinds = [wide, *([{"BF16": torch.bfloat16, "F16": torch.float16}[dtype]] if dtype in UNIT else [])]
    streams = {kind: _Pair(load_embedding(dense, ids_BS, kind), load_embedding(result, ids_BS, kind)) for kind in kinds}
    layers = []
    for index in range(dense.config.num_layers):
        told("proof", index, dense.config.num_layers + 1, time.monotonic() - begin_s)
        layers.append(_layer(index, dense, result, streams))
    told("proof", dense.config.num_layers, dense.config.num_layers + 1, time.monotonic() - begin_s)
    ends = [_end(dense, result, streams[kind]) for kind in kinds]
    told("proof", dense.config.num_layers + 1, dense.config.num_layers + 1, time.monotonic() - begin_s)
    tolerance, says = tolerance_for(dtype, rounded)
    against = "the dense model's stored weights"
    return Proof(
        tokens=tokens.says,
        against=against if dense.through is None else f"{against}, rounded to {dtype} as the result's are",
        exact=exact,
        expected=expected,
        tolerance=tolerance,
        tolerance_says=says,
        layers=tuple(layers),
        end=ends[0],
        stored=ends[1] if len(ends) > 1 else None,
        stored_dtype=dtype,
        seconds=time.monotonic() - begin_s,
    )


@dataclass
class _Pair:
    """The residual streams [B, S, D] of both models, in one type."""

    dense: Tensor
    result: Tensor


def _layer(index: int, dense: Side, result: Side, streams: Mapping[torch.dtype, _Pair]) -> LayerGap:
    """Compare one layer in every type, and move the streams on."""
    gaps: list[tuple[float, float]] = []
    blocks: tuple[Block, Block] | None = None
    for kind, pair in streams.items():
        # the first type is the widest: later ones are rounded from it, without reading again
        blocks = _narrowed(blocks, kind) if blocks else (load_block(dense, index, kind), load_block(result, index, kind))
        there, wanted = added(blocks[0], dense.config, pair.dense)
        _, found = added(blocks[1], result.config, pair.dense)
        gaps.append(relative(found, wanted))
        pair.result, _ = added(blocks[1], result.config, pair.result)
        pair.dense = there
    first, second = gaps[0], gaps[1] if len(gaps) > 1 else (None, None)
    return LayerGap(
        layer=index,
        experts=result.config.is_moe_layer(index),
        worst=first[0],
        mean=first[1],
        stored_worst=second[0],
        stored_mean=second[1],
    )


def _narrowed(blocks: tuple[Block, Block], kind: torch.dtype) -> tuple[Block, Block]:
    """Both layers in a narrower type, routers as they are: their logits are always computed in float32."""
    for block in blocks:
        routers = [m for m in block.modules() if isinstance(m, (TopKRouter, AttentionRouter))]
        wide = [{name: t.clone() for name, t in router.state_dict().items()} for router in routers]
        block.to(kind)
        for router, state in zip(routers, wide, strict=True):
            router.float().load_state_dict(state)
    return blocks


def _end(dense: Side, result: Side, pair: _Pair) -> EndGap:
    wanted_TV, found_TV = (load_logits(side, x).flatten(0, 1) for side, x in ((dense, pair.dense), (result, pair.result)))
    worst, _ = relative(found_TV, wanted_TV)
    kl, same = 0.0, 0
    for p_TV, q_TV in zip(wanted_TV.split(32), found_TV.split(32), strict=True):
        p_TV, q_TV = F.log_softmax(p_TV.double(), -1), F.log_softmax(q_TV.double(), -1)
        kl += float((p_TV.exp() * (p_TV - q_TV)).sum())
        same += int((p_TV.argmax(-1) == q_TV.argmax(-1)).sum())
    return EndGap(worst=worst, kl=kl if math.isnan(kl) else max(kl, 0.0) / len(wanted_TV), top1=same / len(wanted_TV))


def relative(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """(largest difference / largest value, mean difference / mean value) of [..., D]; where all is 0 as it should be, 0."""
    rows = []
    # float64 for a few positions at a time: all of them may be larger than a layer
    for x, y in zip(found.flatten(0, -2).split(32), wanted.flatten(0, -2).split(32), strict=True):
        gap, size = (x.double() - y.double()).abs(), y.double().abs()
        rows.append(torch.stack([gap.max(), size.max(), gap.sum(), size.sum()]))
    table = torch.stack(rows)
    pairs = ((table[:, 0].max(), table[:, 1].max()), (table[:, 2].sum(), table[:, 3].sum()))
    worst, mean = (0.0 if d == 0 else d / s if s else math.inf for d, s in ((float(d), float(s)) for d, s in pairs))
    return worst, mean


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _rank(value: float) -> float:
    return math.inf if math.isnan(value) else value


def model_side(config: ModelConfig, parts: Mapping[str, Matrix], through: str | None, device: str) -> Side:
    """One of the two models. through: type that its weights are rounded to first."""
    kinds = {None: None, "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    return Side(config, parts, kinds[through], torch.device(device))


def layer_rows(layers: Sequence[LayerGap]) -> list[list[object]]:
    """Rows of a table: layer, kind, and errors."""
    return [
        [f"{g.layer}", "experts" if g.experts else "dense", *(None if v is None else f"{v:.2e}" for v in _errors(g))]
        for g in layers
    ]


def _errors(gap: LayerGap) -> tuple[float | None, ...]:
    return gap.worst, gap.mean, gap.stored_worst, gap.stored_mean
