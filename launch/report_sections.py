"""The sections of a report: each a function from runs to HTML, or to None where the runs have no data for it."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ..moe.errors import MoefoldError
from . import plots
from .console import duration
from .metrics import metric
from .plots import Series
from .report_parts import SOURCE, RunData, Runs, csv_link, figure, flat, join, number, row, table, tabs

ENDED_WELL, GOING_ON = ("completed",), ("created", "running", "unknown")


def verdict(run: RunData) -> list[tuple[str, str]]:
    """The run in plain words: (tone, sentence), tone being "good", "warn", "bad" or "" (no judgement)."""
    return [*_state(run), *_loss(run), *_held_out(run), *_balance(run)]


def _state(run: RunData) -> list[tuple[str, str]]:
    steps = [r["step"] for r in run.metrics.records]
    where = f"last record at step {number(steps[-1])}" if steps else "no metrics yet"
    tone = "good" if run.state in ENDED_WELL else "" if run.state in GOING_ON else "bad"
    out = [(tone, f"State: {run.state}, {where}.")]
    broken = [a for a in run.attempts[:-1] if a.get("exit_code") != 0]
    if broken:
        again = sum(run.metrics.lost_steps.values())
        times = f"{len(broken)} time{'s' if len(broken) > 1 else ''}"
        redone = f"; {again} step{'s' if again > 1 else ''} had to be done again" if again else "; no logged step was lost"
        out.append(("warn", f"Interrupted {times}{redone}."))
    error = _first_line(run.attempts[-1].get("error")) if run.attempts else ""
    return out + ([("bad", f"Last error: {error}")] if error else [])


def _loss(run: RunData) -> list[tuple[str, str]]:
    steps, losses = run.metrics.column("train/loss")
    if not losses:
        return []
    first, last = losses[0], plots.smoothed(losses)[-1]
    out = [("", f"Training loss went from {first:.3f} to {last:.3f} nats/token (running mean) in {number(steps[-1])} steps.")]
    bad = sum(not math.isfinite(v) for v in losses)
    return out + ([("bad", f"The loss was not finite in {bad} of {len(losses)} records.")] if bad else [])


def _held_out(run: RunData) -> list[tuple[str, str]]:
    bits, base = run.metrics.last("eval/bits_per_byte"), run.metrics.last("eval/bigram_bits_per_byte")
    if bits is None:
        return []
    text = f"Held-out text takes {bits:.3f} bits per byte"
    if base is None:
        return [("", f"{text}.")]
    better = bits < base
    share = f"{abs(1 - bits / base):.0%} {'below' if better else 'above'}"
    return [("good" if better else "bad", f"{text}, {share} the byte-bigram baseline ({base:.3f}).")]


def _balance(run: RunData) -> list[tuple[str, str]]:
    top, dead = run.metrics.last("moe/load_max"), run.metrics.last("moe/dead_frac")
    if top is None:
        return []
    tone, word = ("good", "balanced") if top <= 1.25 else ("warn", "unevenly used") if top <= 2 else ("bad", "badly unbalanced")
    out = [(tone, f"Experts are {word}: max load ×{top:.2f} (mean over layers, 1 = ideal).")]
    if dead:
        out.append(("bad", f"{dead:.1%} of the experts got no token in the last logged step."))
    drop = run.metrics.last("moe/drop_frac")
    return out + ([("warn", f"{drop:.1%} of the token-expert pairs were dropped over capacity.")] if drop else [])


def setup(runs: Runs) -> str | None:
    """What was run: settings at a glance, where it came from and, for several runs, what differs."""
    if not any(r.config or r.origin for r in runs):
        return None
    names = [r.name for r in runs] if len(runs) > 1 else ["value"]
    differ = None
    if len(runs) > 1:
        rows = [cells for cells in _side_by_side([flat(r.config) for r in runs]) if len(set(cells[1:])) > 1]
        rows = rows or [["(no difference)", *("" for _ in runs)]]
        differ = table("Settings that differ (config.toml)", ["setting", *names], rows)
    settings = _side_by_side([_highlights(r) for r in runs])
    # for one run, where each setting was written stands beside it
    chosen = runs[0].origin.get("settings_from", {}) if len(runs) == 1 else {}
    if chosen:
        settings = [[*cells, chosen.get(cells[0], "default" if "." in cells[0] else "").split("/")[-1]] for cells in settings]
    origin = _side_by_side([flat({k: v for k, v in r.origin.items() if k != "settings_from"}) for r in runs])
    return join(
        differ,
        row(
            table("Settings (config.toml)", ["setting", *names, *(["from"] if chosen else [])], settings) if settings else None,
            table("Provenance (origin.json)", ["what", *names], origin) if origin else None,
        ),
    )


def _side_by_side(columns: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """One row per key, one column per mapping."""
    keys = dict.fromkeys(k for c in columns for k in c)
    return [[key, *(_text(c.get(key)) for c in columns)] for key in keys]


def _text(value: Any) -> str:
    return "–" if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _highlights(run: RunData) -> dict[str, Any]:
    c = flat(run.config)
    if not c:
        return {}
    names = """
        model.dim model.num_layers model.num_heads model.vocab_size model.moe.num_experts model.moe.top_k model.moe.expert_dim
        model.moe.num_shared_experts model.moe.capacity_factor model.moe.router.score model.moe.balance.scope
        model.moe.balance.aux_loss_coeff model.moe.balance.expert_bias
        parallel.dp parallel.tp parallel.ep parallel.etp parallel.micro_batch data.seq_len data.tokenizer
        train.steps train.tokens train.global_batch train.lr train.schedule train.precision train.seed"""
    return {**_sizes(run), **{name: c[name] for name in names.split() if name in c}}


def _sizes(run: RunData) -> dict[str, str]:
    from .settings import RunConfig

    try:
        model = RunConfig.load(str(run.path / "config.toml")).model
    except MoefoldError as error:
        # An old run may have settings that this version does not know: its report is still worth having.
        return {"parameters": f"not known: {str(error).splitlines()[-1].strip()}"}
    return {"parameters": number(model.num_params), "active parameters": number(model.num_active_params)}


def curves(
    runs: Runs,
    key: str,
    title: str,
    *,
    x: str = "step",
    xlabel: str = "step",
    smooth: bool = False,
    zero: bool = False,
    wide: bool = False,
    unless_zero: bool = False,
) -> str | None:
    """A figure with the scalar `key` of every run over `x` (a key of the same record, or "hours"); None without data.

    zero: start the axis at 0. unless_zero: no figure if every value is 0; the table of all metrics still says so.
    """
    series = [s for r in runs if (s := _series(r, key, x)).y]
    if not series or (unless_zero and not any(v for s in series for v in s.y)):
        return None
    name = f"{key}-{x}".replace("/", "-").replace("_", "-")
    m = metric(key)
    # "GiB" or "tokens/s" say it all; a number without a unit needs its name.
    ylabel = key.split("/", 1)[1].replace("_", " ") if m.unit in ("1", "fraction", "ratio") else m.unit
    svg = plots.lines(name, title, xlabel, ylabel, series, smooth=smooth, from_zero=zero, wide=wide)
    rows = [[s.label, a, b] for s in series for a, b in zip(s.x, s.y, strict=True)]
    how = " Pale: as recorded; strong: running mean." if smooth and max(len(s.y) for s in series) >= 25 else ""
    return figure(title, svg, f"{key}: {m.definition}.{how}", SOURCE, csv_link(name, ["run", x, key], rows, SOURCE))


def _series(run: RunData, key: str, x: str) -> Series:
    xs, ys = run.metrics.column(key, "time_s" if x == "hours" else x)
    hours = run.hours() if x == "hours" else {}
    return Series(run.name, [hours[t] for t in xs] if x == "hours" else xs, ys)


def training(runs: Runs) -> str | None:
    """Loss by step, by tokens and by time; gradient norm, learning rate and the balance losses by step."""
    views = {
        "by step": curves(runs, "train/loss", "Training loss", smooth=True, wide=True),
        "by tokens": curves(
            runs, "train/loss", "Training loss by tokens", x="train/tokens", xlabel="training tokens", smooth=True, wide=True
        ),
        "by time": curves(
            runs, "train/loss", "Training loss by time", x="hours", xlabel="hours in attempts", smooth=True, wide=True
        ),
    }
    shown = {label: body for label, body in views.items() if body}
    loss = tabs("loss-x", shown) if shown else None
    return join(
        loss,
        row(
            curves(runs, "train/grad_norm", "Gradient norm before clipping", smooth=True),
            curves(runs, "train/lr", "Learning rate", zero=True),
            curves(runs, "train/aux_loss", "Load-balancing loss", smooth=True),
            curves(runs, "train/z_loss", "Router z-loss", smooth=True),
        ),
    )


def held_out(runs: Runs) -> str | None:
    """Bits per byte on held-out text against the baseline, and by domain."""
    labels = {"eval/bits_per_byte": "all", "eval/bigram_bits_per_byte": "byte-bigram baseline"}
    found = dict.fromkeys(k for r in runs for k in r.metrics.names if k.startswith("eval/bits_per_byte/") or k in labels)
    if not found:
        return curves(runs, "eval/loss", "Held-out loss")
    # Several runs are compared by their totals; every domain of every run would be a thicket.
    drawn = [k for k in found if len(runs) == 1 or k in labels]
    series = []
    for run in runs:
        of = f"{run.name}: " if len(runs) > 1 else ""
        for key in drawn:
            xs, ys = run.metrics.column(key)
            if ys:
                series.append(Series(of + labels.get(key, key.rsplit("/", 1)[-1]), xs, ys))
    rows = [[labels.get(k, k.rsplit("/", 1)[-1]), *(r.metrics.last(k) for r in runs)] for k in found]
    data = [[s.label, a, b] for s in series for a, b in zip(s.x, s.y, strict=True)]
    svg = plots.lines("held-out", "Held-out bits per byte", "step", "bits/byte", series, wide=True)
    m = metric("eval/bits_per_byte")
    link = csv_link("held-out", ["what", "step", "bits_per_byte"], data, SOURCE)
    fig = figure("Held-out bits per byte", svg, f"{m.key}: {m.definition}.", SOURCE, link)
    names = [r.name for r in runs] if len(runs) > 1 else ["bits/byte"]
    return fig + table("Newest evaluation, bits per byte", ["held-out text", *names], rows)


PARTS = (
    ("data", "perf/data_wait_s"),
    ("optimizer", "perf/optimizer_s"),
    ("checkpoint", "perf/checkpoint_s"),
    ("metrics", "perf/log_s"),
)


def breakdown(run: RunData) -> tuple[list[float], dict[str, list[float]]]:
    """(steps, part -> seconds per step) of a run: the measured parts, and the rest of perf/step_s as forward and backward."""
    records = [r for r in run.metrics.records if r.get("perf/step_s") is not None]
    present = {label: key for label, key in PARTS if any(r.get(key) is not None for r in records)}
    if not present:
        return [], {}
    parts = {label: [float(r.get(key) or 0) for r in records] for label, key in present.items()}
    inside = [label for label in parts if label not in ("checkpoint", "metrics")]
    rest = [max(0.0, r["perf/step_s"] - sum(parts[label][i] for label in inside)) for i, r in enumerate(records)]
    return [r["step"] for r in records], {"forward, backward, other": rest, **parts}


def throughput(runs: Runs) -> str | None:
    """Tokens per second, where the time of a step goes, its distribution, and memory."""
    times = [Series(r.name, *r.metrics.column("perf/step_s")) for r in runs]
    times = [s for s in times if any(math.isfinite(v) for v in s.y)]
    spread = None
    if times:
        m = metric("perf/step_s")
        rows = [[s.label, a, b] for s in times for a, b in zip(s.x, s.y, strict=True)]
        svg = plots.histogram("step-time", "Step time", "time of a step (s)", "share of records", times, (0.5, 0.95))
        what = f"perf/step_s: {m.definition}. Values beyond the 99th percentile are in the last bar."
        spread = figure(
            "Step time, distribution", svg, what, SOURCE, csv_link("step-time", ["run", "step", "step_s"], rows, SOURCE)
        )
    return join(
        row(
            curves(runs, "perf/tokens_per_s", "Throughput", zero=True),
            spread,
            *(_stack(r, i, len(runs)) for i, r in enumerate(runs) if len(runs) <= 3),
            curves(runs, "perf/mfu", "Model FLOP utilisation", zero=True),
            curves(runs, "mem/peak_gib", "Peak memory", zero=True),
        ),
        _time_table(runs),
    )


def _stack(run: RunData, index: int, count: int) -> str | None:
    steps, parts = breakdown(run)
    if not steps:
        return None
    title = "Where the time of a step goes" + (f": {run.name}" if count > 1 else "")
    svg = plots.stack(f"breakdown-{index}", title, "step", "time per step (s)", steps, parts)
    rows = [[step, *(p[i] for p in parts.values())] for i, step in enumerate(steps)]
    what = "Measured parts on rank 0; the rest of perf/step_s is forward, backward and other. Checkpoint and metrics come on top."
    return figure(title, svg, what, SOURCE, csv_link(f"breakdown-{index}", ["step", *parts], rows, SOURCE))


def _time_table(runs: Runs) -> str | None:
    rows = []
    for run in runs:
        values = sorted(v for v in run.metrics.column("perf/step_s")[1] if math.isfinite(v))
        if not values:
            continue
        cells = [run.name, plots.quantile(values, 0.5), plots.quantile(values, 0.95), run.metrics.last("perf/tokens_per_s")]
        _, parts = breakdown(run)
        total = sum(map(sum, parts.values()))
        split = ", ".join(f"{label} {sum(p) / total:.0%}" for label, p in parts.items()) if total else "–"
        rows.append([*cells, split])
    head = ["run", "step p50 (s)", "step p95 (s)", "tokens/s (newest)", "share of time"]
    return table("Step time (p50 and p95 are over logged records)", head, rows) if rows else None


def attempts(runs: Runs) -> str | None:
    """Every start of every run, how it ended and where it went on from."""
    rows = []
    for run in runs:
        began = {r["attempt"]: r["step"] for r in run.metrics.runs}
        for i, a in enumerate(run.attempts):
            start, end = a.get("start_s"), a.get("end_s")
            took = duration(end - start) if start is not None and end is not None else "no end recorded"
            where = [began.get(i), run.metrics.lost_steps.get(i), a.get("world_size")]
            how = [a.get("state"), a.get("exit_code"), _first_line(a.get("error"))]
            rows.append([f"{run.name} / {i}" if len(runs) > 1 else i, _moment(start), took, *where, *how])
    head = ["attempt", "start (UTC)", "took", "from step", "steps done again", "ranks", "state", "exit code", "error"]
    return table("Attempts (status.json)", head, rows) if rows else None


def _first_line(text: object) -> str:
    return next(iter(str(text or "").strip().splitlines()), "")


def _moment(unix: float | None) -> str:
    return "–" if unix is None else datetime.datetime.fromtimestamp(unix, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def sample(runs: Runs) -> str | None:
    """Text that the model wrote at the end of the run."""
    found = [r for r in runs if r.sample]
    blocks = [
        f'<div class="card"><h3>{escape(r.name)}</h3><pre tabindex="0">{escape((r.sample or "")[:20_000])}</pre></div>'
        for r in found
    ]
    return f"{''.join(blocks)}<p>Source: <code>sample.txt</code>.</p>" if blocks else None


def final(runs: Runs) -> str | None:
    """The newest value of every scalar metric, with unit and definition."""
    rows = []
    for key in dict.fromkeys(k for r in runs for k in r.metrics.names):
        values = [r.metrics.last(key) for r in runs]
        if not any(isinstance(v, (list, dict)) for v in values):
            rows.append([key, *values, *_meaning(key)])
    names = [r.name for r in runs] if len(runs) > 1 else ["value"]
    return table(f"Newest value of every metric ({SOURCE})", ["metric", *names, "unit", "definition"], rows) if rows else None


def _meaning(key: str) -> tuple[str, str]:
    try:
        return metric(key).unit, metric(key).definition
    except ValueError:
        # A run of a newer version may have metrics that this one has no definition for.
        return "–", "not registered in this version"
