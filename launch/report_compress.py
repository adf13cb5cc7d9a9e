"""The report's section on compression: what it saves on the wire and in the experts, each by itself, and what it costs."""

from __future__ import annotations

import math
from html import escape
from typing import Any

from ..moe.config import CompressConfig
from ..moe.errors import MoefoldError
from .report_parts import RunData, Runs, join, row, table
from .report_sections import curves
from .settings import RunConfig

VALUE_BYTES = (("fp32", 4), ("bf16", 2), ("fp64", 8))
ROUNDING = (
    ("int8", "a value is off by at most 1/254 of the largest of its block"),
    ("e4m3", "a value is off by at most 1/16 of itself, or 1/458752 of the largest of its block where that is more"),
)
"""Of a wire format, what `kernels.quant_rows` promises."""


def compression(runs: Runs) -> str | None:
    """Rows, expert work, bytes and error of runs with compression; the schedule and the error over steps."""
    found = [(run, config) for run in runs if (config := _config(run)) is not None]
    if not found:
        return None
    several = len(runs) > 1
    return join(
        row(
            curves(runs, "moe/rows_sent_frac", "Rows sent of the choices", zero=True),
            curves(runs, "moe/compress_rate", "Rate in the schedule", zero=True),
            curves(runs, "moe/compress_error", "Error of merging rows", zero=True),
            curves(runs, "eval/loss_compressed", "Held-out loss with compression"),
        ),
        *(_savings(run, config, several) for run, config in found),
        *(_layers(run, several) for run, _ in found),
    )


def _config(run: RunData) -> RunConfig | None:
    """The settings of a run that compresses; None for one that does not, or whose settings this version does not know."""
    if not run.config:
        return None
    try:
        config = RunConfig.load(str(run.path / "config.toml"))
    except MoefoldError:
        return None  # the section on the setup says so
    return config if config.model.moe is not None and config.model.moe.compress.on else None


def _of(run: RunData, several: bool) -> str:
    return f": {run.name}" if several else ""


def sent_share(run: RunData) -> float | None:
    """Rows sent / choices in the steps that comm.json is made of, else in the newest record; 1 without merging of rows."""
    shares = dict(zip(*run.metrics.column("moe/rows_sent_frac"), strict=True))
    # the recorder counts steps from 0, a record comes after its step
    sampled = [v for s in run.comm.get("steps", []) if (v := shares.get(s + 1)) is not None and math.isfinite(v)]
    if sampled:
        return sum(sampled) / len(sampled)
    last = run.metrics.last("moe/rows_sent_frac")
    return last if last is None or math.isfinite(last) else None


def savings(run: RunData, config: RunConfig) -> list[list[Any]]:
    """Rows of the table: [what, exact, now]; None where it is not known. Per step, over all ranks."""
    model, moe = config.model, config.model.moe
    assert moe is not None
    c, merges = moe.compress, moe.compress.method != "none"
    share = sent_share(run) if merges else 1.0
    dropped = run.metrics.last("moe/drop_frac") or 0.0
    tokens = config.train.global_batch * config.data.seq_len * len(model.moe_layers)
    choices = tokens * moe.top_k * (1 - dropped)
    # three products, 2 operations each, forward and twice as much backward; recompute repeats the forward part
    passes = 4 if config.parallel.recompute == "selective" else 3
    work = choices * passes * 2 * model.ffn_matrices * model.dim * moe.expert_dim / 1e12
    lines: list[list[Any]] = [
        ["rows to experts", choices, _times(choices, share)],
        ["work of routed experts (TFLOP)", work, _times(work, share)],
    ]
    if merges:
        lines.append(["work for codes (TFLOP)", 0.0, 2 * tokens * model.dim * c.hashes * c.hash_width / 1e12])
    wide = dict(VALUE_BYTES)[config.train.precision]
    there, here = c.row_bytes(model.dim, wide), CompressConfig().row_bytes(model.dim, wide)
    lines.append(["bytes of a row on the wire", here, there])
    steps = len(run.comm.get("steps", []))
    for axis, nbytes in run.comm.get("rows_abroad_bytes", {}).items():
        now = nbytes / max(1, steps)
        # in two levels, exact choices of a token that share a node would have crossed as one: nobody has counted these
        known = axis == "ep_etp" or not merges
        exact = now * here / there / share if known and share else None
        lines.append([f"bytes of rows between ranks, over {axis} (MiB)", _times(exact, 2**-20), now / 2**20])
    if merges:
        lines.append(["error of merging rows, newest", 0.0, run.metrics.last("moe/compress_error")])
    return lines


def _times(value: float | None, factor: float | None) -> float | None:
    return None if value is None or factor is None else value * factor


def _savings(run: RunData, config: RunConfig, several: bool) -> str:
    moe = config.model.moe
    assert moe is not None
    lines = [[*line, 100 * line[2] / line[1] if line[1] and line[2] is not None else None] for line in savings(run, config)]
    head = ["of a step, all ranks", "exact", "compressed", "of exact (%)"]
    return (
        table(f"What compression saves and costs (comm.json, metrics.jsonl){_of(run, several)}", head, lines)
        + f'<div class="card"><ul>{"".join(f"<li>{escape(text)}</li>" for text in notes(moe.compress))}</ul></div>'
    )


def notes(c: CompressConfig) -> list[str]:
    """How to read the table."""
    out = []
    if c.method != "none":
        out.append("Fewer rows make both the traffic and the work of the experts smaller; a smaller row only the traffic.")
        out.append("Exact bytes between ranks: as if the choices had crossed as often as the rows that were sent.")
        if c.error_tokens:
            out.append(f"Rows of the {c.error_tokens} tokens per rank and layer that the error is measured on are in the bytes.")
        else:
            out.append("The error was not measured: set model.moe.compress.error_tokens above 0.")
    if c.wire != "none":
        out.append(f"On the wire ({c.wire}) {dict(ROUNDING)[c.wire]}; gradients on their way back as well.")
    return out


def _layers(run: RunData, several: bool) -> str | None:
    records = [r for r in run.metrics.records if "moe/rows_sent_L" in r]
    if not records:
        return None
    # rows and error of one step: the newest in which the error was measured
    newest = next((r for r in reversed(records) if "moe/compress_error_L" in r), records[-1])
    shares = newest["moe/rows_sent_L"]
    errors = newest.get("moe/compress_error_L", [None] * len(shares))
    lines = [
        [f"{layer}", None if share is None else 100 * share, error]
        for layer, share, error in zip(run.layers(len(shares)), shares, errors, strict=True)
    ]
    head = ["layer", "rows sent (%)", "error of merging"]
    return table(f"Compression by layer at step {newest['step']}{_of(run, several)}", head, lines)
