"""What compression saves, from a run's files to the report: rows, expert work, bytes and error, none taken for another."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import run_threads
from moefold.launch.comm_file import rows_abroad
from moefold.launch.metrics import MetricsWriter, make_record
from moefold.launch.report import report
from moefold.launch.report_compress import notes, savings, sent_share
from moefold.launch.report_parts import load_runs
from moefold.launch.settings import RunConfig
from moefold.launch.train import compression_metrics
from moefold.moe.config import CompressConfig, ModelConfig, MoEConfig
from moefold.parallel.comm_record import CommRecord
from moefold.parallel.engine import Engine, MicroBatch
from moefold.parallel.mesh import build_mesh
from moefold.parallel.topology import Topology

CONFIG = """
[model]
dim = 128
num_layers = 3
num_heads = 4
vocab_size = 257
max_seq_len = 64
dense_prefix_layers = 1
dense_ffn_dim = 64
[model.moe]
num_experts = 4
top_k = 2
expert_dim = 64
[model.moe.compress]
{compress}
[data]
seq_len = 64
[train]
steps = 100
global_batch = 8
precision = "{precision}"
[parallel]
recompute = "{recompute}"
"""
MIB = 1 << 20
CHOICES = 8 * 64 * 2 * 2
"""Tokens of a step, experts of each, MoE layers."""


def make_run(
    path: Path, compress: str, axes: dict[str, int], *, precision: str = "bf16", recompute: str = "none", error: bool = True
) -> Path:
    """A run whose recorder has seen the steps 9 and 19 (records 10 and 20), and whose rate was higher before."""
    path.mkdir()
    (path / "config.toml").write_text(CONFIG.format(compress=compress, precision=precision, recompute=recompute))
    (path / "comm.json").write_text(json.dumps({"ranks": 2, "steps": [9, 19], "rows_abroad_bytes": axes}))
    writer = MetricsWriter(path / "metrics.jsonl")
    for step, share in ((5, 1.0), (10, 0.2), (20, 0.3)):
        values: dict[str, Any] = {"moe/drop_frac": 0.0}
        if "lsh" in compress:
            values |= {"moe/rows_sent_frac": share, "moe/rows_sent_L": [share - 0.1, share + 0.1], "moe/compress_rate": share}
            values |= {"moe/compress_error": 0.07, "moe/compress_error_L": [0.05, 0.09]} if error else {}
        writer.write("step", step, values)
    writer.close()
    return path


def rows_of(path: Path) -> dict[str, tuple[float | None, float | None]]:
    (run,) = load_runs([path])
    return {str(name): (exact, now) for name, exact, now in savings(run, RunConfig.load(str(path / "config.toml")))}


def test_rows_work_bytes_and_error_are_told_apart(tmp_path: Path) -> None:
    axes = {"ep_etp": 2 * 3 * MIB}
    found = rows_of(
        make_run(tmp_path / "both", 'method = "lsh"\nwire = "int8"\nwire_block = 32\nhashes = 6\nhash_width = 16', axes)
    )
    assert found["rows to experts"] == (CHOICES, pytest.approx(CHOICES / 4))
    work = 18 * CHOICES * 128 * 64 / 1e12
    assert found["work of routed experts (TFLOP)"] == pytest.approx((work, work / 4))
    assert found["work for codes (TFLOP)"] == pytest.approx((0, 2 * CHOICES / 2 * 128 * 6 * 16 / 1e12))
    assert found["bytes of a row on the wire"] == (256, 128 + 4 * 4)
    # a quarter of the rows, each in 144 of 256 bytes
    exact, now = found["bytes of rows between ranks, over ep_etp (MiB)"]
    assert (exact, now) == (pytest.approx(3 * 4 * 256 / 144), 3)
    assert found["error of merging rows, newest"] == (0, 0.07)


def test_a_smaller_row_saves_no_work(tmp_path: Path) -> None:
    axes = {"across_nodes": 4 * MIB, "inside_node": 2 * MIB}
    found = rows_of(make_run(tmp_path / "wire", 'wire = "e4m3"', axes, precision="fp32", recompute="selective"))
    assert found["rows to experts"] == (CHOICES, CHOICES)
    assert found["work of routed experts (TFLOP)"] == pytest.approx((24 * CHOICES * 128 * 64 / 1e12,) * 2)
    assert "work for codes (TFLOP)" not in found and "error of merging rows, newest" not in found
    assert found["bytes of rows between ranks, over across_nodes (MiB)"] == (pytest.approx(2 * 512 / 132), 2)
    assert found["bytes of rows between ranks, over inside_node (MiB)"] == (pytest.approx(1 * 512 / 132), 1)


def test_what_nobody_has_counted_is_not_made_up(tmp_path: Path) -> None:
    path = make_run(tmp_path / "levels", 'method = "lsh"', {"across_nodes": 4 * MIB}, error=False)
    found = rows_of(path)
    assert found["bytes of rows between ranks, over across_nodes (MiB)"] == (None, 2)
    assert found["error of merging rows, newest"] == (0, None)
    (path / "comm.json").unlink()
    assert not [name for name in rows_of(path) if "between ranks" in name]
    (run,) = load_runs([path])
    assert sent_share(run) == 0.3, "without sampled steps the newest record"
    (path / "metrics.jsonl").unlink()
    assert rows_of(path)["rows to experts"] == (CHOICES, None)


def test_the_section_says_it_and_stays_away_without_compression(tmp_path: Path) -> None:
    both = 'method = "lsh"\nwire = "int8"\nerror_tokens = 16'
    runs = [make_run(tmp_path / "a", both, {"ep_etp": MIB}), make_run(tmp_path / "plain", "", {"ep_etp": MIB})]
    written = report(*runs)
    assert written.sections["compression"]
    html = unescape(re.sub(r"<[^>]*>", "|", written.path.read_text()))
    for text in (
        "What compression saves and costs (comm.json, metrics.jsonl): a",
        "Fewer rows make both the traffic and the work of the experts smaller; a smaller row only the traffic.",
        "Rows of the 16 tokens per rank and layer that the error is measured on are in the bytes.",
        "at most 1/254 of the largest of its block; gradients on their way back as well.",
        "Compression by layer at step 20: a",
        "Rate in the schedule",
    ):
        assert text in html, text
    assert "saves and costs (comm.json, metrics.jsonl): plain" not in html
    assert re.search(r"\|1\|+20\|+0\.05\|", html) and re.search(r"\|2\|+40\|+0\.09\|", html), "layers by the model's numbers"
    assert not report(runs[1]).sections["compression"]
    with open(runs[0] / "metrics.jsonl", "a") as file:  # the last steps send all, and measure nothing
        head = {"schema": 1, "kind": "step", "step": 30, "attempt": 0, "time_s": 2e9}
        file.write(json.dumps({**head, "moe/rows_sent_frac": 1.0, "moe/rows_sent_L": [1.0, 1.0]}) + "\n")
    html = unescape(re.sub(r"<[^>]*>", "|", report(runs[0]).path.read_text()))
    assert "Compression by layer at step 20" in html, "rows and error of the same step"


def test_notes_ask_for_what_is_missing() -> None:
    assert "The error was not measured: set model.moe.compress.error_tokens above 0." in notes(CompressConfig(method="lsh"))
    assert [text for text in notes(CompressConfig(wire="e4m3")) if "experts" in text or "error" in text] == []


# where the figures come from


def record(axis: str, what: str, members: tuple[int, ...], sent: tuple[int, ...]) -> CommRecord:
    times = {"begin_s": 0.0, "wait_s": 0.0, "end_s": 1.0}
    place: dict[str, Any] = {"step": 0, "seq": 0, "call": 0, "op": "all_to_all", "layer": 0, "direction": "forward"}
    return CommRecord(axis=axis, members=members, what=what, sent=sent, received=sent, **place, **times)


def test_bytes_abroad_are_rows_that_left_their_rank() -> None:
    records = [
        [record("across_nodes", "dispatch", (0, 2), (5, 7)), record("across_nodes", "counts", (0, 2), (1, 1))],
        [record("inside_node", "combine", (0, 1), (11, 13)), record("across_nodes", "notes", (1, 3), (1, 1))],
        [record("across_nodes", "combine", (0, 2), (17, 19))],
    ]
    assert rows_abroad(records) == {"across_nodes": 7 + 17, "inside_node": 11}


def step_metrics(rank: int, world: int, compress: CompressConfig) -> dict[str, Any]:
    moe = MoEConfig(num_experts=4, top_k=2, expert_dim=8, compress=compress)
    config = ModelConfig(dim=16, num_layers=2, num_heads=2, vocab_size=32, max_seq_len=16, moe=moe)
    engine = Engine(config, build_mesh(Topology(world, ep=world), torch.device("cpu")))
    if compress.method != "none":
        engine.set_compression(0.5, sampled=4)
    text_BS = torch.arange(34).view(2, 17) * (3 + rank) % 32
    return compression_metrics(engine.train_step([MicroBatch(text_BS[:, :-1], text_BS[:, 1:])], 1e-3).stats, engine)


def test_a_step_tells_rows_rate_and_error_of_each_layer() -> None:
    first, second = run_threads(step_metrics, 2, CompressConfig(method="lsh", hash_width=4))
    assert first == second
    assert first["moe/compress_rate"] == 0.5
    # of 64 choices on each rank 32 rows at most, and at least one for each expert that was chosen
    assert len(first["moe/rows_sent_L"]) == 2 and all(0 < share <= 0.5 for share in first["moe/rows_sent_L"])
    assert first["moe/rows_sent_frac"] == pytest.approx(sum(first["moe/rows_sent_L"]) / 2)
    assert first["moe/compress_error"] == pytest.approx(sum(first["moe/compress_error_L"]) / 2)
    make_record("step", 1, 0, first)  # all are registered, with these shapes
    assert run_threads(step_metrics, 2, CompressConfig(wire="int8"))[0] == {}
