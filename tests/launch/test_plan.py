"""The verb `moefold plan`: one process, two processes, what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers import GlooPool
from moefold.launch.cli import main
from moefold.launch.plan import PlanResult, gradient_bytes, plan
from moefold.launch.plan_run import FILE, PlannedComm, RunPlan, open_comm, plan_for_run
from moefold.launch.plan_text import layers_text, pieces_text, size_text
from moefold.launch.pretrain import build_engine
from moefold.launch.process import Crew
from moefold.launch.report import report
from moefold.launch.rundir import RunDir
from moefold.launch.settings import RunConfig, RunSection
from moefold.moe.dispatch import Pieces
from moefold.moe.errors import ConfigError, TopologyError
from moefold.moe.model import Model
from moefold.parallel.apply import LayerPieces
from moefold.parallel.cost_model import LinkModel
from moefold.parallel.gradient_placement import WindowBytes
from moefold.parallel.mesh import Mesh, build_mesh
from moefold.parallel.plan import Plan
from moefold.parallel.recorder import CommRecorder
from moefold.parallel.recorder_drift import SAMPLES
from moefold.parallel.topology import Topology
from moefold.parallel.transfer import exchange_rows

ALONE = ["quickstart", "--parallel.dp", "1", "--parallel.hsdp", "1", "--parallel.ep", "1"]


def quickstart(**overrides: Any) -> RunConfig:
    free: dict[str, Any] = {"parallel.dp": None, "parallel.hsdp": 1, "parallel.ep": 1, "train.device": "cpu"}
    small = {"model.moe.expert_dim": 32, "train.global_batch": 4, "train.threads": 1}
    return RunConfig.load("quickstart", overrides=free | small | overrides)


@pytest.fixture(autouse=True)
def not_launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    assert torch.get_num_threads() == threads


def test_one_process_has_no_link_and_one_piece(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert main(["plan", *ALONE, "--train.device", "cpu", "--out", str(path)]) == 0
    out = capsys.readouterr().out
    assert "plan for 1 rank on 1 host" in out and "no link to plan for, 1 piece" in out
    assert out.splitlines()[-1] == f"written: {path}"
    written = Plan.read(path)
    assert [(p.layer, p.chunks, p.forward_s) for p in written.layers] == [(0, Pieces(), None), (1, Pieces(), None)]
    assert written.links == {} and written.costs is None


def test_json_of_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *ALONE, "--train.device", "cpu", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["plan"]["fingerprint"]["world"] == 1 and data["variants"] == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([*ALONE, "--out", "/nowhere/plan.json"], "--out: is /nowhere/plan.json, but its folder does not exist"),
        ([*ALONE, "--measure-s", "0"], "--measure-s: is 0.0, but must be a positive number of seconds"),
        ([*ALONE, "--measure-s", "soon"], "invalid float value: 'soon'"),
        (["quickstart"], "torchrun --nproc-per-node N -m moefold.launch.plan"),
    ],
)
def test_usage_errors(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *args]) == 2
    assert says in capsys.readouterr().err


def test_a_model_without_experts_is_refused() -> None:
    config = quickstart()
    dense = RunConfig.load("quickstart", overrides={"model.dense_prefix_layers": 2, "model.dense_ffn_dim": 64, "parallel.ep": 1})
    with pytest.raises(ConfigError, match="nothing to plan"):
        plan(RunConfig(model=dense.model, data=config.data, train=config.train))


def on_ranks(rank: int, world: int, overrides: dict[str, Any], out: str) -> tuple[PlanResult, str, str]:
    os.environ.pop("LOCAL_RANK", None)
    result = plan(quickstart(**overrides), measure_s=0.5, out=out)
    return result, result.render(), json.dumps(result.to_dict())


@pytest.mark.ranks
def test_two_ranks_agree_on_a_plan_and_one_writes_it(gloo_pool: GlooPool, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    overrides = {"parallel.ep": 2, "parallel.ranks_per_node": 1, "model.moe.num_shared_experts": 1}
    (first, text, data), (second, *_) = gloo_pool.run(on_ranks, 2, overrides, str(path))
    assert first.plan == second.plan == Plan.read(path)
    assert (first.rank, second.rank, first.exit_code) == (0, 1, 0)
    assert first.findings is not None and second.findings is not None
    assert first.findings.variants == second.findings.variants
    assert {"flat", "across", "gradients"} == set(first.plan.links)

    ways = [(v.dispatcher, v.rate) for v in first.findings.variants]
    assert ways == [("all_to_all", 1.0), ("hierarchical", 1.0), ("all_to_all", 0.2), ("hierarchical", 0.2)]
    flat, two_levels, compressed, _ = first.findings.variants
    assert compressed.sent["across"] == pytest.approx(0.2 * flat.sent["across"])
    assert two_levels.sent["across"] < flat.sent["across"]

    chosen = flat.choice
    for layer in first.plan.layers:
        assert layer.chunks == chosen.chunks
        assert (layer.forward_s, layer.backward_s) == (chosen.best.forward_s, chosen.best.backward_s)
        assert (layer.forward_1_s, layer.backward_1_s) == (chosen.way(1).forward_s, chosen.way(1).backward_s)
    assert first.findings.gradients is not None
    windows = list(reversed(first.findings.gradients.windows))
    assert [layer.windows for layer in first.plan.layers] == windows and first.plan.windows == dict(enumerate(windows))
    assert first.findings.gradients.exposed_s <= first.findings.gradients.serial_s
    assert "parallel.gradient_windows = true puts them there" in text
    table = [line.split() for line in text.splitlines()]
    for r in (1, 2, 4, 8):
        assert any(row[:2] == [str(r), f"{chosen.way(r).forward_s * 1e3:.3g}"] for row in table)
    assert "MoE layers 0-1" in text and "<- chosen" in text and "<- configured" in text
    assert json.loads(data)["variants"][0]["chunks"] == asdict(chosen.chunks)


def refused(rank: int, world: int) -> str:
    with pytest.raises(TopologyError) as caught:
        plan(quickstart(**{"parallel.ep": 2, "parallel.ranks_per_node": 3}), measure_s=0.1)
    return str(caught.value)


@pytest.mark.ranks
def test_nodes_that_do_not_divide_the_ranks_are_refused_everywhere(gloo_pool: GlooPool) -> None:
    assert all("parallel.ranks_per_node: is 3" in text for text in gloo_pool.run(refused, 2))


def test_gradients_are_shared_as_the_layout_shares_them() -> None:
    model = quickstart().model
    assert model.moe is not None
    experts = 4.0 * 3 * model.moe.num_experts * model.moe.expert_dim * model.dim
    whole = gradient_bytes(model, Topology(2))
    assert [of_experts for of_experts, _ in whole.blocks] == [experts] * 2
    others = whole.blocks[0][1]
    # routers are whole on every rank, and summed after backward
    parameters = sum(p.numel() for n, p in Model(model, init=False).named_parameters() if not n.endswith("router.weight_ED"))
    assert whole.outside + 2 * (experts + others) == pytest.approx(4.0 * parameters) and whole.outside > 0 < others
    assert gradient_bytes(model, Topology(2, ep=2)).blocks == ((0.0, others),) * 2
    assert gradient_bytes(model, Topology(4, ep=2)).blocks == ((experts / 2, others),) * 2
    assert gradient_bytes(model, Topology(1)).blocks == ((0.0, 0.0),) * 2
    # shards are summed before
    replicated = gradient_bytes(model, Topology(4, hsdp=2, ep=2))
    assert replicated.blocks == ((experts / 2, others / 2),) * 2 and replicated.outside == whole.outside / 2


def test_layers_and_sizes_as_text() -> None:
    assert layers_text((0, 1, 2, 5, 7, 8)) == "MoE layers 0-2, 5, 7-8" and layers_text((3,)) == "MoE layer 3"
    texts = [pieces_text(Pieces(*numbers)) for numbers in ((1, 1), (3, 3), (1, 2), (4, 2))]
    assert texts == ["1 piece", "3 pieces", "1 piece forward and 2 backward", "4 pieces forward and 2 backward"]
    assert [size_text(size) for size in (12.0, 2048.0, 3.5 * 2**20, float("inf"))] == ["12 B", "2 KiB", "3.5 MiB", "-"]


def pieces_of(config: RunConfig, mesh: Mesh) -> LayerPieces:
    return plan_for_run(config, mesh, Crew(), Path("unused"), print).pieces


def runs_by(rank: int, world: int, overrides: dict[str, Any], path: str) -> tuple[list[Pieces], Any, list[str]]:
    """Pieces and windows of a run by the plan, and what is said of a plan for other sizes or one that is not there."""
    config = quickstart(**overrides, **{"parallel.plan": path, "parallel.gradient_windows": True})
    mesh = build_mesh(Topology(world, ep=2), torch.device("cpu"))
    by = plan_for_run(config, mesh, Crew(), Path("unused"), print)
    engine = build_engine(config, mesh, 1, None, by.pieces, by.windows)
    assert plan_for_run(quickstart(**overrides), mesh, Crew(), Path("unused"), print).windows is False
    said = []
    others: tuple[dict[str, Any], ...] = ({"model.moe.expert_dim": 16}, {"parallel.plan": path + ".gone"})
    for other in others:
        with pytest.raises(ConfigError) as error:
            pieces_of(quickstart(**overrides | {"parallel.plan": path} | other), mesh)
        said.append(str(error.value))
    assert engine.windows is not None
    return [layer.dispatcher.pieces for layer in engine.layers], engine.windows.given, said


def test_a_run_takes_its_pieces_from_the_plan_or_refuses_it(gloo_pool: GlooPool, tmp_path: Path) -> None:
    path, overrides = tmp_path / "plan.json", {"parallel.ep": 2}
    gloo_pool.run(on_ranks, 2, overrides, str(path))
    made = Plan.read(path)
    windows = [WindowBytes(0, 7), WindowBytes(1000, 0)]
    each = zip(made.layers, (Pieces(2, 2), Pieces(2, 4)), windows, strict=True)
    chosen = replace(made, layers=tuple(replace(layer, chunks=pieces, windows=w) for layer, pieces, w in each))
    path.write_text(chosen.to_json())
    for pieces, given, (other_model, no_file) in gloo_pool.run(runs_by, 2, overrides, str(path)):
        assert pieces == [Pieces(2, 2), Pieces(2, 4)] and given == dict(enumerate(windows))
        assert f"{path}: was made for" in other_model and "32" in other_model and "16" in other_model
        assert "cannot be read" in no_file
    with pytest.raises(ConfigError, match=r"parallel\.pieces .*is 2, but the plan p\.json says how many"):
        quickstart(**overrides, **{"parallel.plan": "p.json", "parallel.pieces": 2})


def starts(rank: int, world: int, folder: Path) -> list[tuple[RunPlan, list[str]]]:
    """What a run with its own plan does at its first start, at the next, with other sizes, with a stale and a broken plan."""
    found = []
    file, crew = folder / FILE, Crew()

    def start(**overrides: Any) -> None:
        config = quickstart(**{"parallel.ep": 2, "parallel.plan": "auto"} | overrides)
        mesh, said = build_mesh(Topology(world, ep=2), torch.device("cpu")), list[str]()
        found.append((plan_for_run(config, mesh, crew, folder, said.append, measure_s=0.2), said))
        crew.wait()

    start()
    start()
    start(**{"model.moe.expert_dim": 16})
    if rank == 0:
        file.write_text(replace(Plan.read(file), stale="it was slow").to_json())
    start(**{"model.moe.expert_dim": 16})
    if rank == 0:
        file.write_text("{")
    start()
    return found


def test_a_run_keeps_its_own_plan_and_measures_anew_where_it_is_of_no_use(gloo_pool: GlooPool, tmp_path: Path) -> None:
    path = tmp_path / FILE
    ranks = gloo_pool.run(starts, 2, tmp_path)
    assert [plan for plan, _ in ranks[0]] == [plan for plan, _ in ranks[1]]
    (first, news), (again, reused), (other, differs), (stale, tells), (broken, last) = ranks[0]
    assert first.plan is not None and first.kept == path and Plan.read(path) == broken.plan
    assert first.pieces == {layer.layer: layer.chunks for layer in first.plan.layers}
    assert again == first and len(reused) == 1 and str(path) in reused[0]
    assert news[0] == "plan: measuring 0.2 s, as there is none yet" and "MoE layers 0-1: " in news[-1]
    assert "expert_dim = 32, but this run has 16" in differs[0] and other.plan != first.plan
    assert f"that of {path} is of no use: it was slow" in tells[0] and stale.plan is not None and stale.plan.stale is None
    assert "is not JSON" in last[0]


def drifts(rank: int, world: int, folder: Path, own: bool) -> tuple[bool, str]:
    """Exchanges against a plan that predicts a link a thousand times as slow; what rank 0 has in comm.json."""
    crew, x_RD = Crew(), torch.ones(400, 64)
    plan = Plan.read(folder / FILE)
    slow = {name: replace(fit, model=LinkModel(1e-3, 1e-5)) for name, fit in plan.links.items()}
    by = RunPlan(1, replace(plan, links=slow), folder / FILE if own else None)
    recorder = CommRecorder(rank, torch.device("cpu"))
    log = open_comm(recorder, crew, folder / "comm.json", by)
    assert isinstance(log, PlannedComm) and dist.group.WORLD is not None
    probe = recorder.probe("ep_etp", dist.group.WORLD, "dispatch", 0)
    for step in range(SAMPLES):
        assert log.drift.said is None
        recorder.start_step(step)
        exchange_rows(x_RD, [200, 200], [200, 200], dist.group.WORLD, probe)
        log.sample(step)
    log.write()
    crew.wait()
    return log.drift.said is not None, (folder / "comm.json").read_text()


def test_a_plan_that_has_drifted_is_told_kept_as_stale_and_repeated_in_the_report(gloo_pool: GlooPool, tmp_path: Path) -> None:
    run = RunDir.create(RunSection(dir=str(tmp_path / "run")), "", argv=["moefold"])
    gloo_pool.run(on_ranks, 2, {"parallel.ep": 2}, str(run.path / FILE))
    for own in (False, True):
        (told, text), (other, _) = gloo_pool.run(drifts, 2, run.path, own)
        assert told and not other, "rank 0 tells for all"
        [stale] = [v["text"] for v in json.loads(text)["verdicts"] if v["kind"] == "stale_plan"]
        assert "times as long as the plan of overlap predicts" in stale
        assert ("next start of this run measures anew" in stale) == own == (Plan.read(run.path / FILE).stale is not None)
    assert stale in unescape(report(run.path).path.read_text())


def test_without_a_plan_or_a_link_nothing_is_compared(tmp_path: Path, gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(plain_log, 1, tmp_path) == ["CommLog"]


def plain_log(rank: int, world: int, folder: Path) -> str:
    crew, config = Crew(), quickstart(**{"parallel.plan": "auto"})
    by = plan_for_run(config, build_mesh(Topology(1), torch.device("cpu")), crew, folder, print)
    assert by.pieces == {0: Pieces(), 1: Pieces()} and by.plan is not None and by.plan.links == {}
    assert open_comm(None, crew, folder / "comm.json", by) is None
    return type(open_comm(CommRecorder(0, torch.device("cpu")), crew, folder / "comm.json", by)).__name__
