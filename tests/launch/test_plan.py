"""The verb `moefold plan`: one process, two processes, what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import GlooPool
from moefold.launch.cli import main
from moefold.launch.plan import PlanResult, _bytes, _layers, gradient_bytes, plan, planned_pieces
from moefold.launch.pretrain import build_engine
from moefold.launch.settings import RunConfig
from moefold.moe.errors import ConfigError, TopologyError
from moefold.parallel.mesh import build_mesh
from moefold.parallel.plan import Plan
from moefold.parallel.topology import Topology

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
    assert [(p.layer, p.chunks, p.forward_s) for p in written.layers] == [(0, 1, None), (1, 1, None)]
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
        assert (layer.forward_s, layer.backward_s) == chosen.seconds(chosen.chunks)
        assert (layer.forward_1_s, layer.backward_1_s) == chosen.seconds(1)
    table = [line.split() for line in text.splitlines()]
    for r in (1, 2, 4, 8):
        assert any(row[:2] == [str(r), f"{chosen.seconds(r)[0] * 1e3:.3g}"] for row in table)
    assert "MoE layers 0-1" in text and "<- chosen" in text and "<- configured" in text
    assert json.loads(data)["variants"][0]["chunks"] == chosen.chunks


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
    assert gradient_bytes(model, Topology(2, ep=2)) == pytest.approx([size - experts for size in whole])
    assert gradient_bytes(model, Topology(4, ep=2)) == pytest.approx([size - experts / 2 for size in whole])
    assert gradient_bytes(model, Topology(1)) == [0.0, 0.0]


def test_layers_and_sizes_as_text() -> None:
    assert _layers((0, 1, 2, 5, 7, 8)) == "MoE layers 0-2, 5, 7-8" and _layers((3,)) == "MoE layer 3"
    assert [_bytes(size) for size in (12.0, 2048.0, 3.5 * 2**20, float("inf"))] == ["12 B", "2 KiB", "3.5 MiB", "-"]


def runs_by(rank: int, world: int, overrides: dict[str, Any], path: str) -> tuple[list[int], list[str]]:
    """Pieces of the layers that a run builds by the plan, and what is said of a plan for other sizes or one that is not there."""
    config = quickstart(**overrides, **{"parallel.plan": path})
    mesh = build_mesh(Topology(world, ep=2), torch.device("cpu"))
    engine = build_engine(config, mesh, 1, None, planned_pieces(config, mesh))
    said = []
    others: tuple[dict[str, Any], ...] = ({"model.moe.expert_dim": 16}, {"parallel.plan": path + ".gone"})
    for other in others:
        with pytest.raises(ConfigError) as error:
            planned_pieces(quickstart(**overrides | {"parallel.plan": path} | other), mesh)
        said.append(str(error.value))
    return [layer.dispatcher.pieces for layer in engine.layers], said


def test_a_run_takes_its_pieces_from_the_plan_or_refuses_it(gloo_pool: GlooPool, tmp_path: Path) -> None:
    path, overrides = tmp_path / "plan.json", {"parallel.ep": 2}
    gloo_pool.run(on_ranks, 2, overrides, str(path))
    made = Plan.read(path)
    chosen = replace(made, layers=tuple(replace(layer, chunks=2 + i) for i, layer in enumerate(made.layers)))
    path.write_text(chosen.to_json())
    for pieces, (other_model, no_file) in gloo_pool.run(runs_by, 2, overrides, str(path)):
        assert pieces == [2, 3]
        assert f"{path}: was made for" in other_model and "32" in other_model and "16" in other_model
        assert "cannot be read" in no_file
    with pytest.raises(ConfigError, match=r"parallel\.pieces .*is 2, but the plan p\.json says how many"):
        quickstart(**overrides, **{"parallel.plan": "p.json", "parallel.pieces": 2})
