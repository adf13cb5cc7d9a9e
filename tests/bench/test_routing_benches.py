"""The benchmarks of permuting, gating, sorting and LSH: a smoke run, their formulas by hand, their judges, figures and goals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from bench.__main__ import main
from bench.protocol.contender import Contender, Problem, make_problem
from bench.protocol.gate import results_of
from bench.protocol.options import LeftOut
from bench.protocol.shapes import Shape, shape_named
from bench.protocol.table import Setting
from bench.protocol.timing import Budget, Clock, Gauges
from bench.result import load_goals

from bench import lsh, permute, sort_tokens, topk_gate
from moefold.kernels.lsh import reference as lsh_reference
from moefold.kernels.permute import reference
from numeric import assert_same
from sources import ROOT

BENCHES = {"permute": permute, "topk_gate": topk_gate, "sort_tokens": sort_tokens, "lsh": lsh}
SHAPE = Shape("small", 19, 16, 1, 4, 2)
A = shape_named("A")


@pytest.fixture
def problem() -> Problem:
    return make_problem(SHAPE, "zipf", torch.float64, "cpu")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    """All four with interpreted kernels, in one process, as most of the time goes into its start."""
    folder = tmp_path_factory.mktemp("smoke")
    runs = [[name, "--smoke", "--rounds", "1", "--json", str(folder / f"{name}.json")] for name in BENCHES]
    code = f"import sys\nfrom bench.__main__ import main\nsys.exit(max(main(words) for words in {runs!r}))"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in BENCHES}


@pytest.mark.parametrize("name", BENCHES)
def test_smoke_measures_ours_in_every_unit(smoke: dict[str, dict], name: str) -> None:
    rows = smoke[name]["rows"]
    ours = {(row["unit"], row["pass"]): row for row in rows if row["contender"] == "ours"}
    assert {unit for unit, _ in ours} == set(BENCHES[name].UNITS)
    forward_only = {"sort_tokens": {"sort", "gate+sort"}, "lsh": {"codes", "buckets"}}.get(name, set())
    assert {unit for unit, part in ours if part == "bwd"} == set(BENCHES[name].UNITS) - forward_only
    assert all(row["p50_ms"] > 0 and row["error"] < 1e-5 for row in ours.values())
    assert all("interpreted" in row["note"] for unit, row in ((u, r) for (u, _), r in ours.items()) if unit != "buckets")


def test_nobody_who_runs_is_refused(smoke: dict[str, dict]) -> None:
    notes = [f"{row['contender']}: {row['note']}" for bench in smoke.values() for row in bench["rows"]]
    assert not [note for note in notes if "refused" in note or "stopped" in note]
    assert [note for note in notes if "absent: needs a CUDA device" in note], "a peer that cannot run here says why"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, so nothing is refused")
@pytest.mark.parametrize("name", BENCHES)
def test_without_a_gpu_the_way_out_is_named(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([name])
    assert end.value.code == 2
    assert "--smoke" in capsys.readouterr().err


def test_contenders_can_be_left_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    names = ["torch back end", "megatron", "transformer_engine"]
    out = tmp_path / "rows.json"
    assert main(["permute", "--smoke", "--rounds", "1", "--units", "combine", "--without", *names, "--json", str(out)]) == 0
    assert {row["contender"] for row in json.loads(out.read_text())["rows"]} == {"ours", "index_select, sum"}
    assert "--without" not in capsys.readouterr().err


def planted(unit: str, part: str = "fwd", **cells: object) -> dict:
    """A row as `measure` makes it, as far as figures look at it."""
    row = {"unit": unit, "shape": str(A), "routing": "balanced", "contender": "ours", "kind": "ours", "pass": part}
    return row | dict.fromkeys(("of_copy_%", "ratio", "graph_ms")) | cells


def test_figures_of_permute_are_those_of_the_worst_shape() -> None:
    small = str(replace(A, name="A-1024", T=1024))
    rows = [
        planted("permute", **{"of_copy_%": 90.0}),
        planted("permute", routing="hot", **{"of_copy_%": 80.0}),
        planted("permute", "bwd", **{"of_copy_%": 10.0}),
        planted("permute", shape=small, **{"of_copy_%": 1.0}),
        planted("permute", contender="torch", kind="peer", ratio=1.5, **{"of_copy_%": 2.0}),
        planted("permute", contender="ours + plan", kind="peer", ratio=1.1),
        planted("combine", contender="absent one", kind="peer", **{"pass": "-"}),
    ]
    assert permute.figures(rows) == {"permute_of_copy": 0.8, "permute_peer_ratio": 1.5}


def test_figures_of_sort_are_replays_on_shape_a() -> None:
    rows = [
        planted("gate+sort", graph_ms=0.04),
        planted("gate+sort", routing="hot", graph_ms=0.05),
        planted("gate+sort", shape=str(shape_named("B")), graph_ms=0.5),
        planted("sort", contender="argsort", kind="peer", ratio=3.0, graph_ms=9.0),
    ]
    assert sort_tokens.figures(rows) == {"gate_and_sort_us": pytest.approx(50.0), "sort_peer_ratio": 3.0}


@pytest.mark.parametrize("name", BENCHES)
def test_goals_are_stated_for_figures_that_there_are(name: str) -> None:
    module: ModuleType = BENCHES[name]
    cells = {"of_copy_%": 50.0, "graph_ms": 1.0}
    rows = [planted(unit, part, **cells) for unit in module.UNITS for part in ("fwd", "bwd")]
    assert {goal.figure for goal in load_goals(name)} <= set(module.figures(rows))


def test_bytes_of_shape_a() -> None:
    T, H, R, E = 32768, 2048, 262144, 128
    assert topk_gate.gate_bytes(A, "fwd", losses=False) == 4 * T * E + 8 * R
    assert topk_gate.gate_bytes(A, "bwd", losses=False) == 8 * T * E + 8 * R
    assert topk_gate.gate_bytes(A, "fwd+bwd", losses=True) == 5 * 4 * T * E + 2 * 4 * T + 16 * R
    assert permute.moved(5.0)("fwd+bwd") == 10.0
    assert permute.moved(5.0, 2.0)("bwd") == 2.0
    assert (A.T, A.H, A.R, A.E) == (T, H, R, E)


def test_bytes_of_a_case(problem: Problem) -> None:
    T, K, H, R, size = SHAPE.T, SHAPE.K, SHAPE.H, SHAPE.R, 8
    assert permute.permute_case(problem).bytes("bwd") == size * (T + R) * H
    combined = permute.combine_case(problem)
    assert combined.bytes("fwd") == size * (T + R) * H + 8 * R
    assert combined.bytes("bwd") == size * (T + 2 * R) * H + 12 * R
    assert permute.combine_with_adds_case(problem).bytes("fwd") == size * (3 * T + R) * H + 8 * R
    C = lsh.buckets_for(problem).experts_C.numel()
    assert C <= lsh.RATE * T * K
    assert lsh.centroid_case(problem).bytes("fwd") == size * (T + C) * H + 8 * R
    assert lsh.restore_case(problem).bytes("fwd") == size * (2 * C + 2 * T) * H + 8 * R
    assert lsh.restore_case(problem).bytes("bwd") == size * (4 * C + 3 * T) * H + 12 * R


def test_exact_results_are_those_of_the_specifications(problem: Problem) -> None:
    order_R, row_TK = permute.in_order(problem)
    y_RD, weights_TK = torch.randn(SHAPE.R, SHAPE.H, dtype=torch.float64), problem.weights_TK.double()
    leaves = {"dY": y_RD.clone().requires_grad_(), "dS": weights_TK.clone().requires_grad_()}
    out_TD = reference.unpermute(*leaves.values(), order_R, row_TK)
    grads = torch.autograd.grad(out_TD, list(leaves.values()), problem.direction_TD)
    exact = permute._exact_combine(problem, y_RD, order_R, row_TK)
    assert_same(exact, {"out": out_TD.detach(), "dY": grads[0].float(), "dS": grads[1]}, 1e-7)
    assert_same({"out": exact["out"]}, {"out": out_TD.detach()}, 1e-14)


def test_exact_restore_is_that_of_the_specification(problem: Problem) -> None:
    buckets = lsh.buckets_for(problem)
    C, D = buckets.experts_C.numel(), SHAPE.H
    inputs = [torch.randn(C, D), torch.randn(C, D), problem.x_TD, problem.weights_TK, torch.randn(D)]
    inputs = [x.double().requires_grad_() for x in inputs]
    out_TD = lsh_reference.restore(*inputs[:4], buckets, inputs[4])
    grads = dict(zip(("dE", "dC", "dX", "dS", "dA"), torch.autograd.grad(out_TD, inputs, problem.direction_TD), strict=True))
    named = dict(zip(grads, (x.detach() for x in inputs), strict=True))
    assert_same(lsh.exact_restore(named, buckets, problem.direction_TD), {"out": out_TD.detach(), **grads}, 1e-12)


def test_source_counts_are_those_of_the_tokens_parts() -> None:
    problem = make_problem(Shape("s", 12, 4, 1, 8, 3), "zipf", torch.float32, "cpu")
    want = [[0, 0], [0, 0], [0, 0], [0, 0]]
    for t, experts in enumerate(problem.indices_TK.tolist()):
        for expert in experts:
            if expert < 2:
                want[t // 3][expert] += 1
    assert permute.source_counts(problem, 4).tolist() == want


def test_logits_lead_to_the_routing() -> None:
    problem = make_problem(Shape("s", 200, 4, 1, 16, 5), "hot", torch.float32, "cpu")
    best_TK = topk_gate.logits_for(problem).topk(5, dim=-1).indices
    assert torch.equal(best_TK.sort(-1).values, problem.indices_TK.sort(-1).values)


def plan_results(problem: Problem) -> dict[str, torch.Tensor]:
    return sort_tokens.sorted_by_argsort(problem.indices_TK, SHAPE.E)


def test_a_plan_is_judged_by_every_part_that_it_has(problem: Problem) -> None:
    judge, right = sort_tokens.PlanJudge(problem, with_gate=False), plan_results(problem)
    assert judge(right) == {"order": 0.0, "row": 0.0, "counts": 0.0}
    assert judge({"rows": right["row"].flip(-1).int()}) == {"rows": 0.0}
    unstable = right["order"].clone()
    unstable[:2] = unstable[:2].flip(0)
    assert judge(right | {"order": unstable})["order"] > 0
    assert judge(right | {"counts": right["counts"].roll(1)})["counts"] > 0
    with pytest.raises(ValueError, match="none of order, row, counts, rows among its results \\(map\\)"):
        judge({"map": right["row"]})


def test_choices_are_judged_by_exact_scores() -> None:
    logits_TE = torch.tensor([[1.0, 2.0, 3.0, 3.0], [0.0, 4.0, 1.0, -1.0]], requires_grad=True)
    task = topk_gate.Task(Shape("s", 2, 4, 1, 4, 2), logits_TE, {"weights": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    right = results_of(topk_gate.plain_gate(task, losses=False))
    assert max(task.judge(right).values()) < 1e-6
    # scores that are equal may change places; the gradient then belongs to the choices that were made
    other = right | {"indices": torch.stack([right["indices"][0].flip(0), right["indices"][1]])}
    other["dLogits"] = torch.stack([right["dLogits"][0][[0, 1, 3, 2]], right["dLogits"][1]])
    assert max(task.judge(other).values()) < 1e-6
    assert task.judge(right | {"indices": torch.tensor([[2, 1], [1, 2]])})["indices"] > 0.1
    assert task.judge(right | {"dLogits": right["dLogits"].flip(0)})["dLogits"] > 0.1
    with pytest.raises(ValueError, match="no weights among its results"):
        task.judge({"indices": right["indices"]})


def test_codes_are_judged_by_how_far_tokens_reach(problem: Problem) -> None:
    rotation_HPD = lsh.rotation_for(problem)
    right = {"codes": lsh.cross_polytope_codes(problem.x_TD, rotation_HPD)}
    assert lsh.judge_codes(problem.x_TD, rotation_HPD, right) == {"codes": pytest.approx(0.0, abs=1e-12)}
    other_sign = right["codes"].clone()
    other_sign[0, 0] ^= 1
    assert lsh.judge_codes(problem.x_TD, rotation_HPD, {"codes": other_sign})["codes"] > 0.01


def test_ours_that_is_wrong_ends_the_benchmark(problem: Problem) -> None:
    case = permute.permute_case(problem)
    ours = case.contenders[0]
    assert ours.forward is not None and ours.kind == "ours"
    forward = ours.forward

    def wrong() -> dict[str, torch.Tensor]:
        return {"out": forward()["out"].roll(1, 0)}

    setting = Setting(Clock(torch.device("cpu")), Budget(0, 1, least=1), Gauges(torch.device("cpu")), None)
    planted = replace(case, contenders=[Contender("ours", wrong, ours.backward, leaves=ours.leaves, kind="ours")])
    with pytest.raises(SystemExit, match="'ours' fails its check, so nothing is timed: error of out"):
        planted.rows({"unit": "permute", "shape": "s", "routing": "zipf", "max_over_mean": 1.0}, setting, LeftOut([]))
