"""Whether two checkpoints hold the same model: part by part, bit by bit, and setting by setting."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...moe.config import ModelConfig
from ...moe.hf.codec import work_dtype
from ...moe.hf.limits import grouped, normalized
from ...moe.hf.matrix import Matrix
from ..upcycle.progress import Told
from .source import Source, open_source, shifted

DIFFERENT = 3
"""Exit code for models that differ."""
OTHER_USE = (
    *(f"moe.balance.{name}" for name in ("scope", "aux_loss_coeff", "accumulation", "carry", "straggler_coeff", "z_loss_coeff")),
    *("moe.balance.bias_update_rate", "moe.dispatcher", "moe.kernels", "moe.compress.", "init_std", "max_seq_len"),
)
"""Settings of how a model is trained or run: they change nothing of what it computes."""
STEP_BYTES = 4 << 20
SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A part that differs. most: the largest absolute difference; relative: that over the largest absolute value of A. Both are
    None where shapes differ or one side lacks it, as `what` says."""

    part: str
    what: str
    most: float | None = None
    relative: float | None = None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What comparing A with B found. equal: parts with the same bits. config: settings that differ, as (path, in A, in B), of the
    function; use: those of training and running alone. stored: parts of equal values that two folders hold in
    other dtypes."""

    a: Source
    b: Source
    equal: int
    different: tuple[Difference, ...]
    config: tuple[tuple[str, Any, Any], ...]
    use: tuple[tuple[str, Any, Any], ...]
    stored: int

    @property
    def same(self) -> bool:
        """Whether both compute the same, bit by bit as far as it depends on them."""
        return not self.different and not self.config

    @property
    def exit_code(self) -> int:
        return 0 if self.same else DIFFERENT

    def to_dict(self) -> dict[str, Any]:
        def table(rows: tuple[tuple[str, Any, Any], ...]) -> list[dict[str, Any]]:
            return [{"setting": path, "a": left, "b": right} for path, left, right in rows]

        facts: dict[str, Any] = {"a": str(self.a.path), "b": str(self.b.path), "same": self.same, "equal_parts": self.equal}
        facts["different_parts"] = [vars(difference) for difference in self.different]
        return facts | {"config": table(self.config), "use": table(self.use), "stored_otherwise": self.stored}

    def render(self) -> str:
        total = self.equal + len(self.different)
        lines = ["same model" if self.same else "different models", f"  A  {self.a.describe()}", f"  B  {self.b.describe()}"]
        lines.append(f"  {self.equal} of {total} parts are equal bit by bit")
        worst = sorted(self.different, key=lambda d: -(math.inf if d.most is None else d.most))
        lines += [f"    {d.part}: {d.what}" for d in worst[:SHOWN]]
        if len(worst) > SHOWN:
            lines.append(f"    and {len(worst) - SHOWN} more, of smaller differences (--json has all)")
        lines += [f"  setting {path}: {left!r} in A, {right!r} in B" for path, left, right in self.config]
        lines += [
            f"  note: {path}, which is not of the function: {left!r} in A, {right!r} in B" for path, left, right in self.use
        ]
        if self.stored:
            lines.append(f"  note: {self.stored} parts of equal values are stored in other dtypes")
        return "\n".join(lines)


def check(a: str | Path, b: str | Path, *, progress: Told | None = None) -> Comparison:
    """Compare any two of: Hugging Face folder, training checkpoint, run directory (its latest checkpoint).

    Values are compared in float32 (float64 where either is), where 16-bit values have exact counterparts: bfloat16 weights are
    equal to the float32 ones of a training checkpoint made of them. Some MiB are in memory at a time. Raises as `open_source`.
    """
    one, other = open_source(a, progress), open_source(b, progress)
    names = [*one.parts, *(name for name in other.parts if name not in one.parts)]
    begin_s, equal, stored, different = time.monotonic(), 0, 0, list[Difference]()
    for done, name in enumerate(names, 1):
        found = _compare(name, one.parts.get(name), other.parts.get(name))
        if found is not None:
            different.append(found)
        else:
            equal += 1
            stored += one.kind == other.kind == "hf" and one.parts[name].dtype != other.parts[name].dtype
        if progress is not None:
            progress("comparing", done, len(names), time.monotonic() - begin_s)
    left, right = settings_of(one.config), settings_of(other.config)
    settings = [(path, left.get(path), right.get(path)) for path in {**left, **right} if left.get(path) != right.get(path)]
    return Comparison(
        a=one,
        b=other,
        equal=equal,
        different=tuple(different),
        config=tuple(row for row in settings if not row[0].startswith(OTHER_USE)),
        use=tuple(row for row in settings if row[0].startswith(OTHER_USE)),
        stored=stored,
    )


def settings_of(config: ModelConfig) -> dict[str, Any]:
    """Dotted path -> value of every setting, those that follow from others or can be said in several ways said in one."""

    def leaves(table: Mapping[str, Any], path: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in table.items():
            found |= leaves(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
        return found

    said, moe = leaves(asdict(config), ""), config.moe
    scale = config.attention_scale
    usual = scale is None or math.isclose(scale, config.resolved_head_dim**-0.5, rel_tol=1e-12)
    said |= {"head_dim": config.resolved_head_dim, "num_kv_heads": config.resolved_kv_heads}
    said |= {"attention_scale": None if usual else scale, "moe_layers": config.moe_layers}
    del said["dense_prefix_layers"], said["moe_every"]
    if len(config.moe_layers) == config.num_layers:
        said["dense_ffn_dim"] = None
    if moe is not None:
        said["moe.shared_width"] = moe.shared_width
        said["moe.router.weights_sum_to_1"] = normalized(moe)
        for name in ("num_shared_experts", "shared_dim", "router.order", "router.renormalize"):
            del said[f"moe.{name}"]
        if not grouped(moe):
            said |= {f"moe.router.{name}": None for name in ("num_groups", "top_groups", "group_score")}
        if moe.capacity_factor is None:
            said["moe.drop_policy"] = None
    return said


def _compare(name: str, a: Matrix | None, b: Matrix | None) -> Difference | None:
    if a is None or b is None:
        return Difference(part=name, what=f"only in {'B' if a is None else 'A'}")
    if a.shape != b.shape:
        return Difference(part=name, what=f"shape {list(a.shape)} in A, {list(b.shape)} in B")
    if a == b:
        return None
    if (bare := shifted(a)) is not None and (other := shifted(b)) is not None:
        # 1 + w has not all bits of w
        a, b = bare, other
    wide = "F64" if "F64" in (work_dtype(a.dtype), work_dtype(b.dtype)) else "F32"
    bits, differing, most, largest = np.dtype("u8" if wide == "F64" else "u4"), 0, 0.0, 0.0
    for start, stop in a.steps(nbytes=STEP_BYTES):
        x, y = (np.ascontiguousarray(m.block(start, stop, 0, m.cols, wide)) for m in (a, b))
        unequal = x.view(bits) != y.view(bits)
        if unequal.any():
            differing += int(unequal.sum())
            with np.errstate(invalid="ignore", over="ignore"):
                gap = np.abs(x[unequal].astype("f8") - y[unequal].astype("f8"))
            # a NaN on one side is as far as can be
            most = max(most, float(np.where(np.isnan(gap), np.inf, gap).max()))
        finite = np.abs(x[np.isfinite(x)])
        largest = max(largest, float(finite.max(initial=0)))
    if not differing:
        return None
    relative = most / largest if largest else math.inf
    what = f"{differing} of {math.prod(a.shape)} values differ, by {most:.3g} at most ({relative:.2g} of the largest value)"
    return Difference(part=name, what=what, most=most, relative=relative)
