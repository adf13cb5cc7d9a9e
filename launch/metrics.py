"""Metrics of a run: the registry of names, the file they are written to, its reader, and the sinks of one record.

`metrics.jsonl` holds one JSON object per line:
`{"schema": 1, "kind": "step" | "eval" | "run", "step": n, "attempt": a, "time_s": unix, "train/loss": 2.71, ...}`.
A `step` or `eval` record of step n is written after n optimizer steps. A `run` record says that training starts, or goes
on, from its step: every earlier record of a later step belongs to a future that was lost with the killed process. Such
records stay in the file (nothing is rewritten, so a crash cannot destroy history) and `read_metrics` leaves them out.
Imports no torch.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from ..moe.errors import DataError
from .console import console_line as console_line

SCHEMA = 1
Kind = Literal["step", "eval", "run"]
Shape = Literal["scalar", "layer", "layer x expert", "domain -> layer x expert"]
_HEAD = ("schema", "kind", "step", "attempt", "time_s")


@dataclass(frozen=True)
class Metric:
    """One registered metric. `key` may end in `<domain>`, which stands for the name of a data source."""

    key: str
    unit: str
    definition: str
    shape: Shape = "scalar"


REGISTRY: tuple[Metric, ...] = (
    Metric("train/loss", "nats/token", "Cross entropy, summed over the tokens of the global batch and divided by their number"),
    Metric("train/aux_loss", "1", "Load-balancing loss before its coefficient, mean over MoE layers; 1 = perfectly balanced"),
    Metric(
        "train/z_loss", "nats²", "Router z-loss before its coefficient: mean over tokens and MoE layers of logsumexp(logits)²"
    ),
    Metric("train/grad_norm", "1", "Global L2 norm of the gradient before clipping; every logical parameter counts once"),
    Metric("train/lr", "1", "Learning rate of the step"),
    Metric("train/tokens", "tokens", "Training tokens consumed so far, over all ranks and attempts"),
    Metric(
        "perf/step_s",
        "s",
        "Wall-clock time of one step, from asking for data to the end of the update; mean since the last line. "
        "Evaluation, checkpoints and logging are outside",
    ),
    Metric("perf/tokens_per_s", "tokens/s", "Tokens of the global batch / perf/step_s"),
    Metric("perf/tokens_per_s_gpu", "tokens/s", "perf/tokens_per_s / number of ranks"),
    Metric("perf/tflops_gpu", "TFLOP/s", "Forward and backward operations of active parameters and causal attention, per rank"),
    Metric("perf/mfu", "fraction", "perf/tflops_gpu / dense peak of the device; absent where the peak is not known"),
    Metric("perf/data_wait_s", "s/step", "Part of perf/step_s spent waiting for data"),
    Metric("perf/optimizer_s", "s/step", "Part of perf/step_s in clipping, optimizer update and expert bias"),
    Metric("perf/checkpoint_s", "s/step", "Time that checkpoints hold up training, spread over the steps since the last line"),
    Metric("perf/log_s", "s/step", "Time that metrics hold up training, spread over the steps since the last line"),
    Metric(
        "comm/a2a_s",
        "s/step",
        "Time that a rank waits in the all-to-all (counts, dispatch, notes, combine; both ways); mean over ranks",
    ),
    Metric("comm/a2a_share", "fraction", "comm/a2a_s / time of the step from its first collective to its last"),
    Metric("comm/a2a_gib", "GiB/step", "What a rank sends to others in the all-to-all; mean over ranks"),
    Metric("comm/exposed_share", "fraction", "Time that a rank waits in any collective / time of the step as in comm/a2a_share"),
    Metric("comm/hidden_s", "s/step", "Time of collectives under way while a rank works on, at most; mean over ranks"),
    Metric("comm/skew_s", "s/step", "Part of the waiting until the last rank has come to a collective; mean over ranks"),
    Metric("mem/peak_gib", "GiB", "Peak device memory allocated since the last line (on a CPU: of the process); largest rank"),
    Metric("gpu/power_w", "W", "Power draw of the device, mean since the last line; mean over ranks"),
    Metric("gpu/temperature_c", "°C", "Temperature of the device; hottest rank"),
    Metric("gpu/sm_clock_mhz", "MHz", "Clock of the multiprocessors; slowest rank"),
    Metric("gpu/throttled_frac", "fraction", "Readings, one a second, in which power or heat held the clocks back; worst rank"),
    Metric("gpu/mem_used_gib", "GiB", "Memory of the device in use, by whatever runs on it; largest rank"),
    Metric("gpu/sm_util", "fraction", "Time in which multiprocessors had work (GPM); mean over ranks"),
    Metric("gpu/tensor_util", "fraction", "Time in which tensor cores had work (GPM); mean over ranks"),
    Metric("gpu/dram_util", "fraction", "Of the bandwidth of the device's memory (GPM); mean over ranks"),
    Metric("gpu/pcie_tx_gib_s", "GiB/s", "Sent over PCIe by the device; mean over ranks"),
    Metric("gpu/pcie_rx_gib_s", "GiB/s", "Received over PCIe by the device; mean over ranks"),
    Metric("gpu/nvlink_tx_gib_s", "GiB/s", "Sent over all NVLinks of the device; mean over ranks; absent without links"),
    Metric("gpu/nvlink_rx_gib_s", "GiB/s", "Received over all NVLinks of the device; mean over ranks; absent without links"),
    Metric("moe/load_cv", "1", "Standard deviation / mean of the load over experts, in the global batch; mean over MoE layers"),
    Metric("moe/load_max", "ratio", "Load ratio of the busiest expert (load / ideal, 1 = balanced); mean over MoE layers"),
    Metric("moe/load_min", "ratio", "Load ratio of the least used expert; mean over MoE layers"),
    Metric("moe/dead_frac", "fraction", "Experts that no token of the global batch was sent to; mean over MoE layers"),
    Metric("moe/entropy", "fraction", "Entropy of the load over experts / log(experts); 1 = balanced; mean over MoE layers"),
    Metric("moe/drop_frac", "fraction", "Token-expert pairs dropped over capacity / all pairs; 0 when dropless"),
    Metric("moe/rows_sent_frac", "fraction", "Rows sent to experts / choices that were not dropped; with compression"),
    Metric(
        "moe/compress_error",
        "1",
        "Of sampled tokens: length of the error that compression makes in the experts' weighted sum / length of the exact sum; "
        "mean over MoE layers",
    ),
    Metric(
        "moe/compress_rate",
        "fraction",
        "Part of the choices that the schedule of the compression lets travel as rows; absent where the codes alone decide",
    ),
    Metric("moe/rows_sent_L", "fraction", "moe/rows_sent_frac of every MoE layer", "layer"),
    Metric("moe/compress_error_L", "1", "moe/compress_error of every MoE layer", "layer"),
    Metric("moe/max_violation", "1", "moe/load_max - 1 (MaxVio, arXiv 2408.15664), in the global batch; mean over MoE layers"),
    Metric(
        "moe/max_violation_micro",
        "1",
        "Largest load ratio - 1 within one micro-batch of one data rank; mean over micro-batches and MoE layers",
    ),
    Metric("moe/router_logit_max", "1", "Largest absolute router logit; over all MoE layers"),
    Metric("moe/bias_max", "1", "Largest absolute expert bias; over all MoE layers"),
    Metric("moe/load_LE", "ratio", "Load ratio of every expert of every MoE layer, in the global batch", "layer x expert"),
    Metric(
        "moe/domain_load",
        "ratio",
        "Load ratio of every expert, counted over the tokens of one data source",
        "domain -> layer x expert",
    ),
    Metric("eval/loss", "nats/token", "Cross entropy on held-out text"),
    Metric("eval/bits_per_byte", "bits/byte", "eval/loss · tokens / (ln 2 · bytes): comparable between tokenizers"),
    Metric("eval/loss_compressed", "nats/token", "eval/loss with the compression of training"),
    Metric("eval/bits_per_byte_compressed", "bits/byte", "eval/bits_per_byte with the compression of training"),
    Metric("eval/bits_per_byte/<domain>", "bits/byte", "eval/bits_per_byte of the held-out text of one data source"),
    Metric(
        "eval/bigram_bits_per_byte", "bits/byte", "Held-out text under a byte-bigram model of the training text: the baseline"
    ),
)


def metric(key: str) -> Metric:
    """The registered metric of `key`. Raises ValueError, with the nearest names, for a key that is not registered."""
    for m in REGISTRY:
        stem, wild, _ = m.key.partition("<domain>")
        if m.key == key or (wild and key.startswith(stem) and len(key) > len(stem)):
            return m
    near = difflib.get_close_matches(key, [m.key for m in REGISTRY], n=3)
    hint = (
        f"did you mean {' or '.join(map(repr, near))}?" if near else "register it in launch/metrics.py with unit and definition."
    )
    raise ValueError(f"metric {key!r} is not registered; {hint}")


def metric_table() -> str:
    """The registry as a Markdown table: the one in launch/README.md."""
    head = ["| Key | Unit | Definition |", "|---|---|---|"]
    shape = {"scalar": "", "layer": " (array)", "layer x expert": " (array)", "domain -> layer x expert": " (object of arrays)"}
    return "\n".join([*head, *(f"| `{m.key}` | {m.unit} | {m.definition}{shape[m.shape]} |" for m in REGISTRY)])


def _plain(value: Any, digits: int | None) -> Any:
    """`value` as JSON: arrays as lists, whole numbers kept, numbers that are not finite as None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v, digits) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, digits) for v in value]
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    if not math.isfinite(number):
        return None
    return number if digits is None else round(number, digits)


def _depth(value: Any) -> int:
    return 1 + _depth(value[0]) if isinstance(value, list) and value else int(isinstance(value, list))


def make_record(kind: Kind, step: int, attempt: int, values: Mapping[str, Any], time_s: float | None = None) -> dict[str, Any]:
    """One record, ready for JSON. Numbers that are not finite become None; arrays keep 4 decimals.

    Raises ValueError for a key that is not registered or a value whose shape is not the registered one.
    """
    now = time.time() if time_s is None else time_s
    record: dict[str, Any] = {"schema": SCHEMA, "kind": kind, "step": step, "attempt": attempt, "time_s": round(now, 3)}
    for key, value in values.items():
        shape = metric(key).shape
        # Load ratios are shown with two decimals; four keep a 64 x 256 array of a record small.
        plain = _plain(value, None if shape == "scalar" else 4)
        parts = list(plain.values()) if isinstance(plain, dict) else [plain]
        fits = isinstance(plain, dict) == shape.startswith("domain")
        if not fits or any(_depth(p) != {"scalar": 0, "layer": 1}.get(shape, 2) for p in parts):
            raise ValueError(f"metric {key!r} must be {shape}, but got {type(value).__name__}: {str(value)[:80]}")
        record[key] = plain
    return record


class MetricsWriter:
    """Appends records to `metrics.jsonl`, each in one write that is on its way to the disk before `write` returns.

    Opening repairs the torn last line of a killed process and writes the `run` record of this attempt.
    start_step: the step of the checkpoint that training goes on from; 0 for a new run.
    """

    def __init__(self, path: str | Path, *, attempt: int = 0, start_step: int = 0) -> None:
        self.path, self.attempt = Path(path), attempt
        _repair(self.path)
        # Unbuffered: what was written survives the process, whatever kills it.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self.write("run", start_step, {})

    def write(self, kind: Kind, step: int, values: Mapping[str, Any]) -> dict[str, Any]:
        """Append one record and return it; see `make_record` for what is accepted."""
        record = make_record(kind, step, self.attempt, values)
        self._file.write(json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n")
        return record

    def close(self) -> None:
        self._file.close()


def _repair(path: Path) -> None:
    """Remove a last line that a killed process did not finish; complete one that only lacks its line break."""
    if not path.exists() or path.stat().st_size == 0:
        return
    with open(path, "r+b") as file:
        data = file.read()
        if data.endswith(b"\n"):
            return
        keep = data.rfind(b"\n") + 1
        try:
            json.loads(data[keep:])
        except ValueError:
            file.truncate(keep)
        else:
            file.write(b"\n")
        file.flush()
        os.fsync(file.fileno())


@dataclass(frozen=True)
class Metrics:
    """What `read_metrics` found: `step` and `eval` records in order of their steps, without those of a lost future."""

    path: Path
    records: tuple[Mapping[str, Any], ...] = ()
    runs: tuple[Mapping[str, Any], ...] = ()
    """The `run` records: one per attempt, with the step it started from."""
    lost_steps: Mapping[int, int] = field(default_factory=lambda: MappingProxyType({}))
    """Attempt -> logged steps of earlier attempts that it had to do again."""
    torn: bool = False
    """Whether the last line is not complete: the process was killed while it wrote, or is writing now."""

    def column(self, key: str, x: str = "step") -> tuple[list[float], list[float]]:
        """(x, value) of every record that has the scalar `key`; NaN where the value was not finite.

        x: "step", "time_s" (unix) or another scalar key of the same record; records without it are left out.
        """
        rows = [r for r in self.records if key in r and r.get(x) is not None]
        return [r[x] for r in rows], [math.nan if r[key] is None else r[key] for r in rows]

    def arrays(self, key: str) -> tuple[list[int], list[Any]]:
        """(step, value) of every record that has the array-valued `key`; values as nested lists."""
        rows = [r for r in self.records if key in r]
        return [r["step"] for r in rows], [r[key] for r in rows]

    def last(self, key: str) -> Any:
        """The newest value of `key` (NaN if it was not finite), or None if it was never recorded."""
        for record in reversed(self.records):
            if key in record:
                return math.nan if record[key] is None else record[key]
        return None

    @property
    def names(self) -> list[str]:
        """The metric keys that occur, in the order of their first occurrence."""
        return list(dict.fromkeys(k for r in self.records for k in r if k not in _HEAD))


def read_metrics(path: str | Path) -> Metrics:
    """Read `metrics.jsonl`. A torn last line is left out and reported in `torn`; a file that does not exist is empty.

    Of several records of the same kind and step the last one counts. Raises DataError, naming the line, for a line in the
    middle that is not a record and for a schema newer than this one.
    """
    path = Path(path)
    if not path.exists():
        return Metrics(path)
    lines = path.read_bytes().split(b"\n")
    kept: dict[tuple[str, int], dict[str, Any]] = {}
    runs: list[dict[str, Any]] = []
    lost: dict[int, int] = {}
    torn = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        record = _parse(line)
        if record is None:
            torn = number == len(lines)
            if not torn:
                raise DataError(f"{path}:{number}: not a metrics record (`{line[:40]!r}`); delete this line to read the others")
            break
        if record["schema"] > SCHEMA:
            raise DataError(f"{path}:{number}: schema {record['schema']}, but this moefold reads up to {SCHEMA}; update moefold")
        if record["kind"] == "run":
            runs.append(record)
            stale = [key for key in kept if key[1] > record["step"]]
            lost[record["attempt"]] = max((step for _, step in stale), default=record["step"]) - record["step"]
            for key in stale:
                del kept[key]
        else:
            kept[record["kind"], record["step"]] = record
    records = tuple(sorted(kept.values(), key=lambda r: r["step"]))
    return Metrics(path, records, tuple(runs), MappingProxyType(lost), torn)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and all(name in record for name in _HEAD) else None


class TensorBoardSink:
    """Scalars of `step` and `eval` records as TensorBoard events in `folder`.

    start_step: events of later steps, written by a killed attempt, are hidden.
    """

    def __init__(self, folder: str | Path, *, start_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)

    def write(self, record: Mapping[str, Any]) -> None:
        for key, value in record.items():
            if key not in _HEAD and metric(key).shape == "scalar":
                self._writer.add_scalar(key, math.nan if value is None else value, record["step"], record["time_s"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Sinks:
    """Where the records of a run go: the metrics file, the console and, if asked for, TensorBoard.

    Every rank may build one and call it; ranks other than 0 open and write nothing.
    attempt, start_step: as for `MetricsWriter`. total_steps: steps of the whole run.
    tensorboard_dir: folder of the event files; None = no TensorBoard. console: whether to print a line per record.
    device: unit of the throughput per rank in the console line ("gpu" or "rank").
    """

    def __init__(
        self,
        metrics_path: str | Path,
        *,
        total_steps: int,
        rank: int = 0,
        attempt: int = 0,
        start_step: int = 0,
        tensorboard_dir: str | Path | None = None,
        console: bool = True,
        device: str = "gpu",
    ) -> None:
        self._total_steps, self._device, self._console = total_steps, device, console
        self._file: MetricsWriter | None = None
        self._tensorboard: TensorBoardSink | None = None
        if rank == 0:
            self._file = MetricsWriter(metrics_path, attempt=attempt, start_step=start_step)
            if tensorboard_dir is not None:
                self._tensorboard = TensorBoardSink(tensorboard_dir, start_step=start_step)

    def write(self, kind: Kind, step: int, values: Mapping[str, Any]) -> None:
        """Write one `step` or `eval` record everywhere. Raises ValueError for a key that is not registered."""
        if self._file is None:
            return
        record = self._file.write(kind, step, values)
        if self._tensorboard is not None:
            self._tensorboard.write(record)
        if self._console:
            print(console_line(record, self._total_steps, device=self._device), flush=True)

    def close(self) -> None:
        for sink in (self._file, self._tensorboard):
            if sink is not None:
                sink.close()


if __name__ == "__main__":
    print(metric_table())
