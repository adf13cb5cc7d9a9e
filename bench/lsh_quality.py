"""What does LSH compression cost in held-out loss, at equal steps and at equal time?

The quickstart's model is trained with compression off and with variants of it, each with several seeds of weights and data
order, and evaluated on the same held-out text: exactly, with every row sent, and compressed as in training. One process holds
all experts. Rows are merged on the rank they come from, so this process stands for one rank, which merges among all tokens of a
batch; more ranks with smaller shares each would find fewer rows alike. All rows count as sent over the link.

Time at equal steps is simulated: a step takes the processor time that it was measured to take here, with the work of compression
and with the experts' smaller one, and its bytes divided by a link's rate. That rate is chosen so that with compression off half
of a step is communication. The learning rate is constant after its warm-up, so that losses at different steps may be compared.

Finished trainings are kept in the file of --cache, and are not repeated while their setting is the same. It does not know of
changes in the code: after one, start with another file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from moefold.launch.config import Loaded, check_world
from moefold.launch.data.bigram import baseline
from moefold.launch.data.loader import Data, open_data
from moefold.launch.evaluate import evaluate, micro_batch
from moefold.launch.pretrain import build_engine
from moefold.launch.process import Rank, joined
from moefold.launch.settings import RunConfig
from moefold.moe.compress import rate_at
from moefold.moe.config import CompressConfig
from moefold.parallel.engine import Engine
from moefold.parallel.mesh import build_mesh
from moefold.parallel.optimizer import learning_rate
from moefold.parallel.step_stats import StepStats

from .result import Result, Row

RADIUS = 0.7
"""Of the radii 0.3 to 0.8 on a model of 400 steps: the one with about the rows of lsh_40, which it can be compared with."""
VARIANTS = MappingProxyType(
    {
        "off": CompressConfig(),
        **{f"lsh_{percent}": CompressConfig(method="lsh", rate=percent / 100) for percent in (40, 20, 10)},
        **{f"{kind}_20": CompressConfig(method="lsh", compensation=kind) for kind in ("identity", "scalar", "diagonal")},
        "radius_20": CompressConfig(method="lsh", radius=RADIUS),
        "exact_1_20": CompressConfig(method="lsh", exact_choices=1),
        "gate_weighted_20": CompressConfig(method="lsh", gate_weighted=True),
        "anneal_20": CompressConfig(method="lsh", anneal=0.1),
        "scheduled_20": CompressConfig(method="lsh", warmup=0.25, anneal=0.25),
    }
)
"""Compression by name; the number is the rate in percent. lsh_20 is the default, which has no compensation."""
POINTS = 6
"""Evaluations of a training, evenly spaced; the last one is at its end."""
SAMPLED = 256
"""Tokens on which the error is measured before each evaluation."""
TRANSFERS = 4
"""Per layer and step: to the experts and back, forward and backward."""
VALUE_BYTES = 4


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="NAME", help="some of: %(choices)s"
    )
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of each (default: %(default)s)")
    parser.add_argument("--steps", type=steps, default=240, help="training steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32, help="sequences of a step (default: %(default)s)")
    parser.add_argument("--eval-batches", type=int, default=4, help="held-out batches of this size (default: %(default)s)")
    parser.add_argument("--cache", type=Path, metavar="PATH", help="keep finished trainings here, one JSON object per line")


def steps(text: str) -> int:
    """A number of steps of which some are left to time, beside those that are evaluated."""
    number = int(text)
    if number <= 2 * POINTS:
        raise argparse.ArgumentTypeError(f"{number} steps, but {POINTS} are evaluated and not timed; give more than {2 * POINTS}")
    return number


@dataclass(frozen=True)
class Point:
    """Where a training stands after `step` steps: choices that were to travel so far, rows that did, and the held-out loss."""

    step: int
    choices: int
    rows: int
    bits: float


@dataclass(frozen=True)
class Training:
    """One finished training.

    setting: what it depends on, beside variant and seed. points: with the exact evaluation, in bits per byte. bits_compressed:
    the last one compressed as in training. error: length of the error in the experts' weighted sum by that of the exact sum,
    mean over layers and over the last half of the points; None where every row travelled. step_s: median processor time of a
    step. bigram: bits per byte of a bigram model on the same text.
    """

    variant: str
    seed: int
    setting: Mapping[str, Any]
    points: tuple[Point, ...]
    bits_compressed: float
    error: float | None
    step_s: float
    bigram: float

    @property
    def bits(self) -> float:
        return self.points[-1].bits

    @property
    def rows_share(self) -> float:
        return self.points[-1].rows / self.points[-1].choices


@dataclass(frozen=True)
class Cache:
    """Finished trainings, in memory and, if there is a path, in a file that grows by a line each."""

    path: Path | None
    found: list[Training] = field(default_factory=list)

    @staticmethod
    def read(path: Path | None) -> Cache:
        """What is in the file. A last line that was cut short by an interruption is left out."""
        lines = path.read_text().splitlines(keepends=True) if path is not None and path.exists() else []
        if lines and not lines[-1].endswith("\n"):
            assert path is not None
            path.write_text("".join(lines[:-1]))
            del lines[-1]
        return Cache(path, [from_json(line) for line in lines])

    def get(self, variant: str, seed: int, setting: Mapping[str, Any]) -> Training | None:
        wanted = (variant, seed, dict(setting))
        return next((t for t in self.found if (t.variant, t.seed, dict(t.setting)) == wanted), None)

    def add(self, training: Training) -> None:
        self.found.append(training)
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps(asdict(training)) + "\n")


def from_json(line: str) -> Training:
    values = json.loads(line)
    return Training(**{**values, "points": tuple(Point(**point) for point in values["points"])})


def configure(variant: str, seed: int, options: argparse.Namespace, data: Mapping[str, object] | None = None) -> RunConfig:
    """The quickstart's model and text on one rank; `data` changes settings of [data]."""
    settings: dict[str, object] = {"parallel.dp": 1, "parallel.hsdp": 1, "parallel.ep": 1}
    settings |= {"train.device": "cpu", "train.steps": options.steps, "train.global_batch": options.batch}
    settings |= {"train.schedule": "constant", "train.warmup_steps": options.steps // 5}
    settings |= {"train.seed": seed, "data.seed": seed, "train.eval_batches": options.eval_batches}
    settings |= {f"model.moe.compress.{name}": value for name, value in asdict(VARIANTS[variant]).items() if value is not None}
    settings |= {f"data.{name}": value for name, value in (data or {}).items()}
    return RunConfig.load("quickstart", overrides=settings)


def setting_of(config: RunConfig) -> dict[str, Any]:
    """What the result of a training depends on, as it is kept in the file."""
    moe = config.model.moe
    assert moe is not None
    return {
        "steps": config.train.steps,
        "batch": config.train.global_batch,
        "eval_batches": config.train.eval_batches,
        "sources": [asdict(source) for source in config.data.sources],
        "compress": asdict(moe.compress),
    }


@contextmanager
def alone() -> Iterator[Path]:
    """One rank with one thread, and a folder for the prepared text."""
    rank = joined(Rank.here(), torch.device("cpu"), timeout_s=600.0, threads=1)
    with tempfile.TemporaryDirectory(prefix="moefold-bench-") as folder, rank:
        yield Path(folder)


def train(config: RunConfig, variant: str, folder: Path) -> Training:
    """One training from its beginning to its end; text is prepared in `folder` unless it is there."""
    t, total, batch_size = config.train, config.train.total_steps(config.data.seq_len), config.train.global_batch
    data = open_data(
        config.data, vocab_size=config.model.vocab_size, global_batch=batch_size, cache_dir=folder, eval_batches=t.eval_batches
    )
    mesh = build_mesh(check_world(Loaded(config, {}), 1), torch.device("cpu"))
    engine = build_engine(config, mesh, len(data.domains))
    compress = config.model.moe.compress if config.model.moe is not None else CompressConfig()
    stops = {round(total * n / POINTS) for n in range(1, POINTS + 1)}
    points: list[Point] = []
    errors, seconds = [], []
    choices = rows = 0
    for step in range(total):
        batch = micro_batch(data.train.batch(step), mesh.device)
        engine.set_compression(rate_at(compress, step, total), SAMPLED if step + 1 in stops else 0)
        lr = learning_rate(step, peak=t.lr, total_steps=total, schedule=t.schedule, warmup_steps=t.warmup_steps)
        start_s = time.process_time()
        result = engine.train_step([batch], lr)
        if step + 1 not in stops:
            # those in which the error is measured have more to do
            seconds.append(time.process_time() - start_s)
        sent = travelled(result.stats)
        choices, rows = choices + sent[0], rows + sent[1]
        if step + 1 in stops:
            points.append(Point(step + 1, choices, rows, held_out(engine, data, 1.0)))
            errors.append(error_of(result.stats))
            bits, share = points[-1].bits, sent[1] / sent[0]
            tell(f"{variant} seed {t.seed}: step {step + 1} of {total}, {bits:.4f} bits per byte, {share:.3f} sent")
    late = [error for error in errors[len(errors) // 2 :] if error is not None]
    compressed = points[-1].bits if compress.method == "none" else held_out(engine, data, compress.rate)
    step_s = statistics.median(seconds)
    bigram = baseline(data).bits_per_byte
    mean_error = statistics.fmean(late) if late else None
    return Training(variant, t.seed, setting_of(config), tuple(points), compressed, mean_error, step_s, bigram)


def travelled(stats: StepStats) -> tuple[int, int]:
    """(choices that were to travel, rows that did) in all layers of a step."""
    assert stats.counts_LE is not None and stats.dropped_L is not None and stats.rows_sent_L is not None
    return int(stats.counts_LE.sum() - stats.dropped_L.sum()), int(stats.rows_sent_L.sum())


def error_of(stats: StepStats) -> float | None:
    """Relative error of a step, mean over the layers in which it was measured."""
    assert stats.compress_error_L is not None
    measured_L = stats.compress_error_L[stats.compress_error_L.isfinite()]
    return float(measured_L.mean()) if measured_L.numel() else None


def held_out(engine: Engine, data: Data, rate: float | None) -> float:
    """Bits per byte with this part of the rows sent."""
    assert data.evaluation is not None
    engine.set_compression(rate)
    return evaluate(engine, data, data.evaluation.batch_size).bits_per_byte


def tell(text: str) -> None:
    print(text, flush=True)


def run(options: argparse.Namespace) -> Result:
    cache, done = Cache.read(options.cache), []
    work = [(variant, seed) for seed in range(options.seeds) for variant in options.variants]
    with alone() as folder:
        for number, (variant, seed) in enumerate(work, 1):
            config = configure(variant, seed, options)
            training = cache.get(variant, seed, setting_of(config))
            if training is None:
                start_s = time.monotonic()
                training = train(config, variant, folder)
                cache.add(training)
                tell(f"{number} of {len(work)} done: {variant}, seed {seed}, {time.monotonic() - start_s:.0f} s")
            done.append(training)
    return summary(done, config.model.dim)


def summary(trainings: Sequence[Training], dim: int) -> Result:
    """Rows by variant, and figures where there is one with compression off to compare with."""
    by_variant: dict[str, list[Training]] = {}
    for training in trainings:
        by_variant.setdefault(training.variant, []).append(training)
    off = by_variant.get("off")
    link = None if off is None else link_rate(off, dim)
    rows = [row_of(name, found, off, link, dim) for name, found in by_variant.items()]
    return Result(rows, figures(rows, trainings) if off is not None else {})


def row_of(name: str, found: Sequence[Training], off: Sequence[Training] | None, link: float | None, dim: int) -> Row:
    """Means over the seeds of one variant; with `off`, against these. gap: in bits at equal steps, positive if worse."""
    bits, errors = [t.bits for t in found], [t.error for t in found if t.error is not None]
    row: dict[str, str | int | float | None] = {
        "variant": name,
        "seeds": len(found),
        "rows_share": statistics.fmean(t.rows_share for t in found),
        "bits": statistics.fmean(bits),
        "spread": max(bits) - min(bits),
        "bits_compressed": statistics.fmean(t.bits_compressed for t in found),
        "error": statistics.fmean(errors) if errors else None,
        "compute_ms": 1e3 * statistics.fmean(t.step_s for t in found),
    }
    if off is None or link is None:
        return row
    end_s, end_of_off_s = (time_at_end(trainings, dim, link) for trainings in (found, off))
    # at the end of the faster of the two
    until_s = min(end_s, end_of_off_s)
    gain = mean_bits_at(off, until_s, dim, link) - mean_bits_at(found, until_s, dim, link)
    gap = statistics.fmean(bits) - statistics.fmean(t.bits for t in off)
    return row | {"gap": gap, "time_by_off": end_s / end_of_off_s, "gain_at_equal_time": gain}


def figures(rows: Sequence[Row], trainings: Sequence[Training]) -> dict[str, float]:
    """Of the variants that were run: gaps at equal steps, in bits and by the spread of the seeds with compression off; gains at
    equal time; and how far the model without compression is below a bigram model."""
    found: dict[str, float] = {}
    [off] = [row for row in rows if row["variant"] == "off"]
    found["off_below_bigram_bits"] = trainings[0].bigram - number(off, "bits")
    found["seed_spread_bits"] = number(off, "spread")
    for row in rows:
        if row is off:
            continue
        name = row["variant"]
        found |= {f"{name}_gap_bits": number(row, "gap"), f"{name}_rows_share": number(row, "rows_share")}
        found[f"{name}_gain_at_equal_time_bits"] = number(row, "gain_at_equal_time")
        if number(off, "spread") > 0:
            found[f"{name}_gap_over_spread"] = number(row, "gap") / number(off, "spread")
    return found


def number(row: Row, name: str) -> float:
    value = row[name]
    assert isinstance(value, int | float)
    return float(value)


def row_bytes(rows: float, dim: int) -> float:
    """Bytes of rows that travel to experts and back, forward and backward."""
    return TRANSFERS * VALUE_BYTES * dim * rows


def link_rate(off: Sequence[Training], dim: int) -> float:
    """Bytes per second of the link on which a step with compression off takes as long to send as to compute."""
    end = off[0].points[-1]
    return row_bytes(end.rows / end.step, dim) / statistics.fmean(t.step_s for t in off)


def time_after(training: Training, point: Point, step_s: float, dim: int, link: float) -> float:
    """Simulated seconds from the start to a point."""
    return point.step * step_s + row_bytes(point.rows, dim) / link


def time_at_end(trainings: Sequence[Training], dim: int, link: float) -> float:
    """Simulated seconds of a whole training, mean over seeds."""
    step_s = statistics.fmean(t.step_s for t in trainings)
    return statistics.fmean(time_after(t, t.points[-1], step_s, dim, link) for t in trainings)


def mean_bits_at(trainings: Sequence[Training], until_s: float, dim: int, link: float) -> float:
    """Held-out loss after so many simulated seconds, mean over seeds; on the line between the two points around it.

    Before the first point it is that of the first one, after the last that of the last.
    """
    step_s = statistics.fmean(t.step_s for t in trainings)
    values = []
    for training in trainings:
        known = [(time_after(training, point, step_s, dim, link), point.bits) for point in training.points]
        values.append(interpolate(known, until_s))
    return statistics.fmean(values)


def interpolate(known: Sequence[tuple[float, float]], at: float) -> float:
    """The value at a place, between known (place, value) in order."""
    for (left, before), (right, after) in pairwise(known):
        if left <= at <= right:
            return before + (after - before) * (at - left) / (right - left)
    return known[0][1] if at < known[0][0] else known[-1][1]
