"""Metrics as one line for people. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def human(value: float) -> str:
    """A large number in three digits: 19400 -> '19.4k', 1.24e6 -> '1.24M'."""
    if not math.isfinite(value):
        return str(value)
    scaled, unit = value, ""
    for unit in ("", "k", "M", "G", "T"):
        # 999.5 would be printed as 1e+03, so it moves on to the next unit.
        if abs(scaled) < 999.5 or unit == "T":
            break
        scaled /= 1000
    return f"{scaled:.3g}{unit}"


def duration(seconds: float) -> str:
    """A span of time in two units: 15120 -> '4h12m', 45 -> '45s'."""
    s = max(0, round(seconds))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    return f"{s // 3600}h{s % 3600 // 60:02d}m" if s < 86400 else f"{s // 86400}d{s % 86400 // 3600}h"


def console_line(record: Mapping[str, Any], total_steps: int, *, device: str = "gpu") -> str:
    """One line for people. Metrics that the record does not have are left out; values that were not finite say 'nan'.

    total_steps: steps of the whole run, for progress and the estimated time to its end.
    device: what one rank runs on, as the unit of the throughput per rank ("gpu" or "rank").
    """

    def part(label: str, key: str, form: str, scale: float = 1.0, unit: str = "") -> list[str]:
        if key not in record:
            return []
        return [f"{label} " + ("nan" if record[key] is None else f"{record[key] * scale:{form}}{unit}")]

    parts = [f"step {record['step']}/{total_steps}"]
    if record["kind"] == "eval":
        parts += part("held-out loss", "eval/loss", ".3f")
        parts += part("bits/byte", "eval/bits_per_byte", ".3f")
        parts += part("bigram", "eval/bigram_bits_per_byte", ".3f")
        stem = "eval/bits_per_byte/"
        return "  ".join(parts + [p for k in record if k.startswith(stem) for p in part(k.removeprefix(stem), k, ".3f")])
    parts += part("loss", "train/loss", ".3f") + part("grad", "train/grad_norm", ".2f") + part("lr", "train/lr", ".1e")
    if record.get("perf/tokens_per_s") is not None:
        each = record.get("perf/tokens_per_s_gpu")
        parts.append(f"{human(record['perf/tokens_per_s'])} tok/s" + (f" ({human(each)}/{device})" if each is not None else ""))
    parts += part("mfu", "perf/mfu", ".0f", 100, "%") + part("mem", "mem/peak_gib", ".1f", unit=" GiB")
    parts += part("a2a", "comm/a2a_share", ".0f", 100, "%")
    parts += part("load cv", "moe/load_cv", ".2f") + part("drop", "moe/drop_frac", ".1f", 100, "%")
    if record.get("perf/step_s") is not None and record["step"] < total_steps:
        overhead = (record.get("perf/checkpoint_s") or 0) + (record.get("perf/log_s") or 0)
        parts.append(f"eta {duration((record['perf/step_s'] + overhead) * (total_steps - record['step']))}")
    return "  ".join(parts)
