"""`moefold profile moe`: two ranks from routing to page, one process, recorded routing, and what is refused."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import GlooPool
from moefold.launch.metrics import make_record
from moefold.launch.profile import moe_text
from moefold.launch.profile.case import Case, Load, one_layer
from moefold.launch.profile.moe import LAYER_STAGES, MoeProfile, profile_moe
from moefold.launch.profile.page import page_html
from moefold.launch.profile.verbs_moe import VERB, _measure
from moefold.launch.profile.whatif import candidates, near_foldings, side_by_side
from moefold.launch.settings import RunConfig, SourceConfig
from moefold.moe.errors import ConfigError, DataError, TopologyError
from moefold.parallel.cost_model import ComputeModel, LinkFit, LinkModel
from moefold.parallel.nodes import NodeMap
from moefold.parallel.topology import Topology


def quickstart(**overrides: Any) -> RunConfig:
    free: dict[str, Any] = {"parallel.dp": None, "parallel.hsdp": 1, "parallel.ep": 1, "train.device": "cpu", "train.threads": 1}
    small = {"model.moe.expert_dim": 32, "train.global_batch": 4, "data.seq_len": 32}
    return RunConfig.load("quickstart", overrides=free | small | overrides)


@pytest.fixture(autouse=True)
def not_launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield


def recorded_run(folder: Path, loads: list[list[float]] | None) -> str:
    """A run directory with one metric line."""
    values: dict[str, Any] = {"train/loss": 2.0} | ({} if loads is None else {"moe/load_LE": loads})
    folder.mkdir()
    (folder / "status.json").write_text(json.dumps({"state": "completed", "attempts": []}))
    (folder / "config.toml").write_text("")
    (folder / "metrics.jsonl").write_text(json.dumps(make_record("step", 1, 1, values)) + "\n")
    return str(folder)


def on_ranks(rank: int, world: int, run: str, bad_run: str) -> tuple[MoeProfile, MoeProfile, str, list[str]]:
    os.environ.pop("LOCAL_RANK", None)
    config = quickstart(**{"parallel.ep": 2, "parallel.ranks_per_node": 1, "model.moe.num_shared_experts": 1})
    told: list[str] = []
    zipf = profile_moe(config, load=Load("zipf", 1.0), steps=1, measure_s=0.2, measure=1, progress=told.append)
    layer = profile_moe(config, load=Load("recorded", run=run), whole_step=False, steps=1, predict=False)
    with pytest.raises(DataError) as refused:
        profile_moe(config, load=Load("recorded", run=bad_run), steps=1)
    return zipf, layer, str(refused.value), told


def test_two_ranks_profile_predict_and_measure(gloo_pool: GlooPool, tmp_path: Path) -> None:
    # the layer that is profiled alone is the only one of its model
    run = recorded_run(tmp_path / "run", [[4.0, *[4 / 7] * 7]])
    bad = recorded_run(tmp_path / "bad", [[1.0] * 4])
    (zipf, layer, refused, told), (other, _, also_refused, silent) = gloo_pool.run(on_ranks, 2, run, bad)
    assert refused == also_refused and "loads are of 1 layers of 4 experts, but this model has 2 of 8" in refused
    assert told and not silent and any("measuring 1 of" in line for line in told)
    assert zipf.to_dict() | {"seconds": 0} == other.to_dict() | {"seconds": 0}, "every rank finds the same"
    assert (zipf.rank, other.rank, zipf.world, zipf.exit_code) == (0, 1, 2, 0)

    assert zipf.what_if is not None
    outcomes = zipf.what_if.outcomes
    assert [o.prediction.seconds for o in outcomes] == sorted(o.prediction.seconds for o in outcomes)
    base = next(o for o in outcomes if o.way == zipf.way)
    assert base.prediction.seconds == zipf.profile.median_s and base.gain == 1
    timed = [o for o in outcomes if o.measured_s is not None]
    assert base in timed and len(timed) in (1, 2) and all(o.error is not None for o in timed)
    assert {o.way.dispatcher for o in outcomes} == {"all_to_all", "hierarchical"}
    assert {o.way.folding for o in outcomes} >= {(2, 1, 1), (1, 1, 1), (1, 2, 1)}
    assert all(o.prediction.sent_bytes["across"] > 0 for o in outcomes if o.way.ep == 2)

    # Zipf over 8 experts: the first gets 1 / H(8) = 37 % of the choices
    for rows in zipf.profile.rows_LE.values():
        assert sum(rows) == 2 * 128 and 0.3 < max(rows) / sum(rows) < 0.45
    # an expert cannot get more than one choice of each token: half of them, with two each
    [rows] = layer.profile.rows_LE.values()
    assert rows.index(max(rows)) == 0 and max(rows) / sum(rows) == pytest.approx(0.5, abs=0.02)
    shows(zipf, layer)


def shows(zipf: MoeProfile, layer: MoeProfile) -> None:
    text = zipf.render()
    assert "Zipf routing with exponent 1" in text and "<- configured" in text and text.splitlines()[-1] == zipf.verdict()
    stages = {s.stage for s in moe_text.shown_stages(zipf)}
    assert {"attention", "head", "optimizer", "gradients", "experts", "dispatch"} <= stages
    alone = {s.stage for s in moe_text.shown_stages(layer)}
    assert alone <= set(LAYER_STAGES) and {"experts", "dispatch", "combine", "route", "restore", "shared"} <= alone
    assert "what if" not in layer.render() and "one MoE layer" in layer.render()
    assert json.loads(json.dumps(zipf.to_dict()))["what_if"]["base"]["ep"] == 2
    head, *lines = zipf.to_csv().splitlines()
    assert head.startswith("stage,direction,mean_ms") and len(lines) == len(moe_text.stage_rows(zipf))

    sections = zipf.sections()
    assert [s.anchor for s in sections] == ["stages", "what-if", "experts"]
    page = page_html("Step by stage", zipf.verdict(), sections)
    assert zipf.what_if is not None
    # only the best are shown, by times that change; in the file are all
    assert "<svg" in page and zipf.what_if.outcomes[0].way.name in page and "what-if.csv" in page
    assert all(o.way.name in (sections[1].csv or "") for o in zipf.what_if.outcomes)
    [missing] = [s for s in layer.sections() if s.body is None]
    assert missing.anchor == "what-if" and "several ranks" in missing.missing


def test_one_process_has_nothing_to_send(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("What is written here is what the step is made of.\n" * 100)
    config = quickstart()
    source = SourceConfig(type="text", path=str(tmp_path / "a.txt"))
    config = replace(config, data=replace(config.data, sources=(source,), holdout=0.0))
    found = profile_moe(config, load=Load("balanced", tokens="text"), steps=1)
    assert found.what_if is None and found.notes == ("one rank: nothing travels, so there is nothing to send another way",)
    assert not any(found.profile.total(stage) for stage in ("counts", "dispatch", "combine", "gather weights"))
    assert found.profile.total("experts") > 0 and "nothing travels between ranks" in found.render()


def test_the_verb_writes_what_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    VERB.options(parser)
    alone = {"parallel.dp": 1, "parallel.hsdp": 1, "parallel.ep": 1, "train.device": "cpu", "train.global_batch": 1}
    files = {name: tmp_path / f"found.{name}" for name in ("out", "json", "csv")}
    words = ["quickstart", "--layer", "--steps", "1", *(w for n, path in files.items() for w in (f"--{n}", str(path)))]
    assert VERB.run(parser.parse_args(words), alone) == 0
    said = capsys.readouterr()
    assert "profile of one MoE layer on 1 rank" in said.out and f"page: {files['out']}" in said.out
    assert "timing 1 steps" in said.err
    data = json.loads(files["json"].read_text())
    assert data["world"] == 1 and not data["whole_step"] and data["what_if"] is None
    assert files["csv"].read_text().startswith("stage,") and "<svg" in files["out"].read_text()
    with pytest.raises(ConfigError, match="does not go with --whole-step"):
        VERB.run(parser.parse_args(["quickstart", "--layer", "--whole-step"]), alone)


def case(world: int, nodes: NodeMap, **overrides: Any) -> Case:
    config = quickstart(**{"train.global_batch": 16} | overrides)
    p = config.parallel
    topology = Topology(world, hsdp=p.hsdp, tp=p.tp, ep=p.ep, etp=p.etp)
    return Case(config, topology, torch.device("cpu"), nodes, Load(), None, torch.zeros(0))


def test_ways_that_come_into_question() -> None:
    on = case(8, NodeMap.by_size(8, 2), **{"parallel.ep": 4, "parallel.hsdp": 8, "parallel.micro_batch": 1})
    assert near_foldings(on) == [(8, 1, 1), (2, 1, 1), (2, 2, 1), (4, 1, 2), (4, 2, 1)]
    ways = candidates(on)
    assert ways[0] == on.way and len(set(ways)) == len(ways) > 50
    assert {w.wire for w in ways} == {"none", "int8", "e4m3"} and {w.rate for w in ways} == {1.0, 0.5, 0.2}
    inside = [w for w in ways if w.dispatcher == "hierarchical" and w.folding in ((2, 1, 1), (2, 2, 1))]
    assert [w.folding for w in inside] == [(2, 2, 1)], "a group within one node has no second level"
    # fewer data ranks get more sequences in as many micro-batches
    assert on.micros == 2 and on.rows(Topology(8, hsdp=4, tp=2, ep=4)) == 2
    exact = case(8, NodeMap.by_size(8, 2), **{"parallel.ep": 4, "train.precision": "fp64"})
    assert {w.wire for w in candidates(exact)} == {"none"}
    assert {w.dispatcher for w in candidates(case(8, NodeMap.by_size(8, 8), **{"parallel.ep": 4}))} == {"all_to_all"}


def test_contention_is_told_from_long_exchanges_and_products() -> None:
    sizes = (1e4, 2e6)

    def link(s_per_byte: float) -> LinkFit:
        return LinkFit("all_to_all", 8, LinkModel(0.0, s_per_byte), tuple((size, s_per_byte * size) for size in sizes), 0.0, 0.0)

    forward, slow, fast = ComputeModel(0.0, 1e-10), link(2e-7), link(1e-9)
    # 1000 rows take 10 ms: ten times as many would take long, but eight is the most
    assert side_by_side(1000, 1e5, slow, forward, 8) == (pytest.approx(0.08 / 2e-7, abs=1), 8000)
    assert side_by_side(5000, 1e5, slow, forward, 8) == (pytest.approx(0.10 / 2e-7, abs=1), 10000)
    assert side_by_side(1000, 1e5, slow, forward, 1) == (pytest.approx(0.01 / 2e-7, abs=1), 1000), "on a device rows are memory"
    assert side_by_side(1000, 1e5, fast, forward, 8) == (2e6, 1000), "all that was measured of the link takes 2 ms"
    assert side_by_side(1, 1e5, slow, forward, 8) == (1e4, 8), "nor is it asked for less"


def test_one_layer_is_the_first_with_experts() -> None:
    model = quickstart(**{"model.dense_prefix_layers": 1, "model.dense_ffn_dim": 32}).model
    assert model.moe_layers == (1,) and one_layer(model).moe_layers == (0,) and one_layer(model).num_layers == 1


@pytest.mark.parametrize(
    ("settings", "options", "says"),
    [
        ({"model.moe.compress.method": "lsh", "model.moe.compress.rate": None}, {}, "compress.rate: is not set"),
        ({"model.dense_prefix_layers": 2, "model.dense_ffn_dim": 64}, {}, "no MoE layers to profile"),
        ({}, {"steps": 0}, "--steps: is 0, but must be positive"),
        ({}, {"measure": -1}, "--measure: is -1"),
        ({}, {"measure_s": float("inf")}, "--measure-s: is inf"),
    ],
)
def test_what_cannot_be_profiled_is_said(settings: dict[str, Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        profile_moe(quickstart(**settings), **options)


def test_more_ranks_than_there_are_name_torchrun() -> None:
    with pytest.raises(TopologyError, match=r"torchrun --nproc-per-node N -m moefold\.launch\.profile moe"):
        profile_moe(quickstart(**{"parallel.ep": 2}))


@pytest.mark.parametrize(
    ("load", "says"),
    [
        (("recorded",), "needs --from-run RUN"),
        (("zipf", 1.0, "runs/a"), "does not go with --from-run"),
        (("zipf", -1.0), "--zipf"),
    ],
)
def test_loads_that_do_not_go_together(load: tuple[Any, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Load(*load)


def test_a_run_without_loads_is_no_source_of_them(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no line has moe/load_LE"):
        Load("recorded", run=recorded_run(tmp_path / "run", None)).loads_LE(quickstart().model)


def test_the_verb_counts_ways() -> None:
    assert (_measure("all"), _measure("3")) == (None, 3)
    with pytest.raises(ConfigError, match="'some', but must be a number of ways or 'all'"):
        _measure("some")
    assert VERB.settings and all(" moe quickstart" in example for example in VERB.examples)
