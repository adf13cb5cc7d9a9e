"""Metrics: registered names only, a file that survives being killed, and lines for people."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moefold.launch.console import console_line, duration, human
from moefold.launch.metrics import REGISTRY, MetricsWriter, Sinks, make_record, metric, metric_table, read_metrics
from moefold.moe.errors import DataError

README = Path(__file__).parents[2] / "launch" / "README.md"


def write(path: Path, steps: range, *, attempt: int = 0, start: int = 0, loss: float = 1.0) -> None:
    """One attempt of a run: a record per step."""
    writer = MetricsWriter(path, attempt=attempt, start_step=start)
    for step in steps:
        writer.write("step", step, {"train/loss": loss})
    writer.close()


def test_readme_has_the_table_of_the_registry() -> None:
    assert metric_table() in README.read_text(), (
        "run `python -m moefold.launch.metrics` and paste its table into launch/README.md"
    )


def test_registry_has_every_key_once_with_unit_and_definition() -> None:
    keys = [m.key for m in REGISTRY]
    assert len(keys) == len(set(keys))
    assert all(m.unit and len(m.definition) > 15 and "/" in m.key for m in REGISTRY)


def test_domain_keys_are_registered_by_their_pattern() -> None:
    assert metric("eval/bits_per_byte/code").key == "eval/bits_per_byte/<domain>"
    assert metric("eval/bits_per_byte").key == "eval/bits_per_byte"
    with pytest.raises(ValueError, match="not registered"):
        metric("eval/bits_per_byte/")


@pytest.mark.parametrize(
    ("key", "hint"), [("train/los", "did you mean 'train/loss'"), ("zzz", "register it in launch/metrics.py")]
)
def test_unregistered_key_is_an_error_and_writes_nothing(key: str, hint: str, tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match=hint):
        writer.write("step", 1, {"train/loss": 1.0, key: 2.0})
    assert read_metrics(tmp_path / "m.jsonl").records == ()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train/loss", [1.0]),
        ("train/loss", {"a": 1.0}),
        ("moe/load_LE", 1.0),
        ("moe/load_LE", [1.0]),
        ("moe/rows_sent_L", 1.0),
        ("moe/rows_sent_L", [[1.0]]),
        ("moe/domain_load", [[1.0]]),
    ],
)
def test_value_of_another_shape_is_an_error(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"metric '{key}' must be"):
        make_record("step", 1, 0, {key: value})


def test_record_has_its_head_and_plain_numbers() -> None:
    values = {"train/loss": np.float32(2.5), "train/tokens": np.int64(7), "moe/load_LE": np.array([[1 / 3, 2.0]])}
    record = make_record("step", 3, 1, values, time_s=12.34567)
    head = {"schema": 1, "kind": "step", "step": 3, "attempt": 1, "time_s": 12.346}
    assert json.loads(json.dumps(record)) == {**head, "train/loss": 2.5, "train/tokens": 7, "moe/load_LE": [[0.3333, 2.0]]}
    assert isinstance(record["train/tokens"], int)


def test_values_that_are_not_finite_are_null_in_the_file_and_nan_when_read(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    writer = MetricsWriter(path)
    writer.write("step", 1, {"train/loss": math.nan, "train/grad_norm": math.inf, "moe/load_LE": [[math.nan, 1.0]]})
    assert path.read_text().count("null") == 3 and "NaN" not in path.read_text() and "Infinity" not in path.read_text()
    found = read_metrics(path)
    assert math.isnan(found.column("train/loss")[1][0]) and math.isnan(found.last("train/grad_norm"))
    assert found.arrays("moe/load_LE") == ([1], [[[None, 1.0]]])


def test_columns_hold_the_records_that_have_the_key(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl")
    writer.write("step", 1, {"train/loss": 3.0})
    writer.write("step", 2, {"train/loss": 2.0, "train/tokens": 64})
    writer.write("eval", 2, {"eval/loss": 2.5})
    found = read_metrics(tmp_path / "m.jsonl")
    assert found.column("train/loss") == ([1, 2], [3.0, 2.0])
    assert found.column("train/loss", x="train/tokens") == ([64], [2.0])
    assert found.column("eval/loss") == ([2], [2.5])
    assert found.column("moe/load_cv") == ([], []) and found.last("moe/load_cv") is None
    assert found.last("train/loss") == 2.0
    assert found.names == ["train/loss", "train/tokens", "eval/loss"]


def test_every_line_is_in_the_file_as_soon_as_it_is_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "m.jsonl")
    writer.write("step", 1, {"train/loss": 3.0})
    assert read_metrics(tmp_path / "m.jsonl").last("train/loss") == 3.0


def test_resumed_run_supersedes_the_lost_future_even_with_other_steps(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 8), loss=1.0)
    write(path, range(6, 11, 2), attempt=1, start=4, loss=2.0)
    found = read_metrics(path)
    assert found.column("train/loss") == ([1, 2, 3, 4, 6, 8, 10], [1, 1, 1, 1, 2, 2, 2])
    assert dict(found.lost_steps) == {0: 0, 1: 3}
    assert [(r["attempt"], r["step"]) for r in found.runs] == [(0, 0), (1, 4)]
    assert len(path.read_text().splitlines()) == 2 + 7 + 3, "history is kept in the file"


def test_last_of_several_records_of_a_step_counts(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 4), loss=1.0)
    write(path, range(3, 4), attempt=1, start=3, loss=5.0)
    assert read_metrics(path).column("train/loss") == ([1, 2, 3], [1.0, 1.0, 5.0])


@pytest.mark.parametrize("cut", [1, 10, 40])
def test_torn_last_line_is_left_out_by_the_reader_and_repaired_by_the_writer(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 4))
    path.write_bytes(path.read_bytes()[:-cut])
    before = read_metrics(path)
    # Without its line break alone the last record is still whole.
    kept = [1, 2, 3] if cut == 1 else [1, 2]
    assert before.column("train/loss")[0] == kept and before.torn is (cut > 1)
    write(path, range(4, 5), attempt=1, start=3)
    after = read_metrics(path)
    assert after.column("train/loss")[0] == [*kept, 4] and not after.torn
    assert all(json.loads(line)["schema"] == 1 for line in path.read_text().splitlines())


def test_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, range(1, 3))
    path.write_text(path.read_text().replace('"step":1,', '"step":1;'))
    with pytest.raises(DataError, match=r"m\.jsonl:2: not a metrics record"):
        read_metrics(path)


def test_newer_schema_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text(json.dumps({**make_record("step", 1, 0, {}), "schema": 2}) + "\n")
    with pytest.raises(DataError, match="schema 2"):
        read_metrics(path)


def test_missing_and_empty_files_have_no_records(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    assert read_metrics(tmp_path / "none.jsonl").records == () == read_metrics(tmp_path / "empty.jsonl").records


def test_writer_killed_between_lines_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    code = f"""
import os
from moefold.launch.metrics import MetricsWriter
writer = MetricsWriter({str(path)!r})
for step in range(1, 101):
    writer.write("step", step, {{"train/loss": 1.0}})
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert read_metrics(path).column("train/loss")[0] == list(range(1, 101))


FULL = {
    "train/loss": 2.7131,
    "train/grad_norm": 0.84,
    "train/lr": 3e-4,
    "perf/step_s": 1.5,
    "perf/tokens_per_s": 1.24e6,
    "perf/tokens_per_s_gpu": 19_400,
    "perf/checkpoint_s": 0.2,
    "mem/peak_gib": 61.2,
    "moe/load_cv": 0.12,
    "moe/drop_frac": 0.0,
}


def test_console_line_of_a_full_record() -> None:
    line = console_line(make_record("step", 1200, 0, FULL), 10_000)
    assert line == (
        "step 1200/10000  loss 2.713  grad 0.84  lr 3.0e-04  1.24M tok/s (19.4k/gpu)  mem 61.2 GiB  "
        "load cv 0.12  drop 0.0%  eta 4h09m"
    )


def test_console_line_leaves_out_what_is_not_there_and_shows_what_is_not_finite() -> None:
    assert console_line(make_record("step", 1, 0, {"train/loss": math.nan}), 10) == "step 1/10  loss nan"
    last = console_line(make_record("step", 10, 0, {"perf/step_s": 1.0, "perf/tokens_per_s": 512.0}), 10)
    assert last == "step 10/10  512 tok/s"


def test_console_line_of_an_evaluation() -> None:
    values = {"eval/loss": 1.5, "eval/bits_per_byte": 2.1, "eval/bigram_bits_per_byte": 3.4, "eval/bits_per_byte/code": 2.0}
    line = console_line(make_record("eval", 50, 0, values), 100)
    assert line == "step 50/100  held-out loss 1.500  bits/byte 2.100  bigram 3.400  code 2.000"


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999.4, "999"), (999.6, "1k"), (19_400, "19.4k"), (1.24e6, "1.24M"), (999_600, "1M"), (2e12, "2T")],
)
def test_human_numbers(value: float, text: str) -> None:
    assert human(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.6, "1m00s"), (750, "12m30s"), (15_120, "4h12m"), (86_399.9, "1d0h"), (273_600, "3d4h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sinks_write_file_console_and_tensorboard_on_rank_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sinks = Sinks(tmp_path / "m.jsonl", total_steps=10, tensorboard_dir=tmp_path / "tb", device="rank")
    sinks.write("step", 5, {"train/loss": 2.0, "perf/tokens_per_s": 10.0, "perf/tokens_per_s_gpu": 5.0, "moe/load_LE": [[1.0]]})
    sinks.write("eval", 5, {"eval/bits_per_byte/code": 1.5})
    sinks.close()
    out = capsys.readouterr().out.splitlines()
    assert out == ["step 5/10  loss 2.000  10 tok/s (5/rank)", "step 5/10  code 1.500"]
    assert read_metrics(tmp_path / "m.jsonl").last("train/loss") == 2.0
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "perf/tokens_per_s",
        "perf/tokens_per_s_gpu",
        "eval/bits_per_byte/code",
    }
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(5, 2.0)]


def test_tensorboard_hides_the_lost_future_of_a_resumed_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for attempt, start, steps in [(0, 0, range(1, 7)), (1, 4, range(5, 6))]:
        sinks = Sinks(
            tmp_path / "m.jsonl", total_steps=9, attempt=attempt, start_step=start, tensorboard_dir=tmp_path / "tb", console=False
        )
        for step in steps:
            sinks.write("step", step, {"train/loss": 1.0 + attempt})
        sinks.close()
    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0)]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sinks = Sinks(tmp_path / "m.jsonl", total_steps=10, rank=3, tensorboard_dir=tmp_path / "tb")
    sinks.write("step", 1, {"train/loss": 1.0})
    sinks.close()
    assert list(tmp_path.iterdir()) == [] and capsys.readouterr().out == ""


@pytest.mark.parametrize("module", ["metrics", "report", "plots"])
def test_import_needs_neither_torch_nor_matplotlib(module: str) -> None:
    heavy = ("torch", "matplotlib", "numpy", "pydantic")
    code = f"import sys, moefold.launch.{module}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
