"""The benchmarks of the experts and of the ragged products: a smoke run with interpreted kernels, messages, and figures."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench.protocol.contender import absent
from bench.protocol.options import LeftOut, Plan, our_backend, plan_of, setting_of, words_of
from bench.protocol.shapes import ROUTINGS, TINY
from bench.protocol.timing import Budget
from bench.result import Row, load_goals

from bench import grouped_gemm, moe_mlp
from sources import ROOT

BENCHES = {"moe_mlp": moe_mlp, "grouped_gemm": grouped_gemm}
SMOKE = Plan((TINY,), ("balanced",), torch.float32, torch.device("cpu"), Budget(0, 1, least=1), smoke=True)


def parsed(name: str, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    BENCHES[name].options(parser)
    return parser.parse_args(words)


def test_smoke_with_interpreted_kernels(tmp_path: Path) -> None:
    """Both in one process, as most of the time goes into its start."""
    words = ["--smoke", "--rounds", "1", "--routings", "empty"]
    runs = [["grouped_gemm", *words], ["moe_mlp", *words, "--units", "experts"]]
    runs = [[*run, "--json", str(tmp_path / f"{run[0]}.json")] for run in runs]
    code = f"import sys\nfrom bench.__main__ import main\nsys.exit(max(main(words) for words in {runs!r}))"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for name in BENCHES:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        ours = [row for row in found["rows"] if row["contender"] == "ours"]
        assert {row["unit"] for row in ours} == {"experts"} if name == "moe_mlp" else set(grouped_gemm.UNITS)
        assert all(row["p50_ms"] > 0 and row["error"] < 1e-6 and row["note"] == "Triton, interpreted" for row in ours)
        # everybody is timed or says why not
        assert all(row["p50_ms"] or row["note"].startswith(("absent: ", "refused: ")) for row in found["rows"])
        assert any(row["contender"] == "torch grouped_mm" and row["p50_ms"] for row in found["rows"])
        assert "least_ratio_to_best" in found["figures"]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_every_routing_passes_on_torch_back_ends(routing: str) -> None:
    """In this process nothing is interpreted, and the table says so."""
    assert our_backend(torch.device("cpu")) == "torch"
    options = parsed("grouped_gemm", "--smoke", "--routings", routing, "--rounds", "1")
    rows = grouped_gemm.run(options).rows
    assert {row["unit"] for row in rows} == set(grouped_gemm.UNITS)
    assert {row["contender"] for row in rows if row["p50_ms"]} == {"ours", "torch grouped_mm", "loop", "bmm bound"}
    assert all("torch back ends" in str(row["note"]) for row in rows if row["contender"] == "ours")


def test_rows_of_one_rank() -> None:
    rows = moe_mlp._unit_rows("grouped", SMOKE, setting_of(SMOKE), LeftOut([]))
    assert {row["contender"] for row in rows if row["p50_ms"]} == {"ours", "torch grouped_mm", "bmm bound"}
    assert len(rows) == 9 and "E2 K1" in str(rows[0]["shape"])


def test_the_layer_routes_for_itself() -> None:
    rows = moe_mlp._unit_rows("layer", SMOKE, setting_of(SMOKE), LeftOut(["bmm bound"]))
    assert {row["routing"] for row in rows} == {"by router"}
    assert {(row["contender"], row["pass"]) for row in rows} == {
        (name, part) for name in ("ours", "torch grouped_mm") for part in ("fwd", "bwd", "fwd+bwd")
    }
    assert all(row["error"] is not None and float(row["error"]) < 1e-6 for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
@pytest.mark.parametrize("name", BENCHES)
def test_without_cuda_a_message_and_exit_code_2(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        BENCHES[name].run(parsed(name))
    assert stopped.value.code == 2
    assert "torch finds none; --smoke runs a tiny case on the CPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--device", "cpu"], "--device cpu goes with --smoke only"),
        (["--smoke", "--rounds", "0"], "--rounds 0 --processes 1: both must be at least 1"),
        (["--smoke", "--processes", "0"], "--rounds 50 --processes 0"),
    ],
)
def test_options_that_cannot_be_run(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        plan_of(parsed("moe_mlp", *words))
    assert stopped.value.code == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", BENCHES)
def test_the_words_for_further_processes_mean_the_same(name: str) -> None:
    words = ["--shapes", "A", "C", "--routings", "zipf", "--rounds", "7", "--smoke", "--sweep-tokens", "--dtype", "fp16"]
    words += ["--device", "cpu", "--units", BENCHES[name].UNITS[0], "--without", "loop", "torch grouped_mm"]
    options = parsed(name, *words)
    assert vars(parsed(name, *words_of(options))) == vars(options)


def test_a_name_to_leave_out_that_nobody_has_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    left_out = LeftOut(["loop", "lop"])
    assert [one.name for one in left_out.keep([absent("loop", "x"), absent("other", "x")])] == ["other"]
    left_out.warn()
    assert capsys.readouterr().err == "--without: no contender was named lop\n"


def rows_of_a_run() -> list[Row]:
    place = {"unit": "experts", "shape": "A: T32768 H2048 F768 E128 K8", "routing": "balanced"}
    ours = {**place, "contender": "ours", "kind": "ours", "ratio": 1.0, "saved_%": 31.0}
    theirs = {**place, "contender": "torch grouped_mm", "kind": "peer", "saved_%": 90.0, "tflops": 200.0}
    return [
        {**ours, "pass": "fwd", "tflops": 560.0},
        {**ours, "pass": "fwd+bwd", "tflops": 480.0},
        {**ours, "pass": "fwd+bwd", "tflops": 1.0, "routing": "zipf"},
        {**theirs, "pass": "fwd", "ratio": 1.9},
        {**theirs, "pass": "fwd+bwd", "ratio": 2.1},
    ]


def test_the_figures_that_goals_are_stated_for() -> None:
    figures = moe_mlp.figures(rows_of_a_run())
    assert figures == {
        "forward_tflops": 560.0,
        "forward_backward_tflops": 480.0,
        "ratio_grouped_mm": 2.1,
        "saved_share": 0.31,
        "least_ratio_to_best": 1.9,
    }
    goals = load_goals("moe_mlp")
    assert {goal.figure for goal in goals} == set(figures)
    assert all(goal.device == "cuda" and goal.met(figures[goal.figure]) for goal in goals)
    assert moe_mlp.figures([]) == {}
