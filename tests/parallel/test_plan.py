"""Plans as data: what a layer sends by formula and by counting, the way through JSON, and refusals that name both sides."""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import GlooPool
from moefold.moe.config import CompressConfig, ModelConfig, MoEConfig
from moefold.moe.dispatch import Pieces
from moefold.moe.errors import ConfigError
from moefold.parallel.cost_model import ComputeModel, LinkFit, LinkModel
from moefold.parallel.gradient_placement import WindowBytes
from moefold.parallel.mesh import build_mesh
from moefold.parallel.plan import (
    Fingerprint,
    LayerPlan,
    Load,
    ModelSummary,
    Plan,
    check_plan,
    distinct_nodes,
    fingerprint,
    layer_work,
)
from moefold.parallel.schedule import Costs
from moefold.parallel.topology import Topology

LOAD = Load(tokens=100, dim=16, row_bytes=32, num_experts=8, top_k=2, expert_dim=32, shared_dim=64, ep=4, etp=1, nodes=2)
LINKS = {"flat": LinkModel(1.0, 0.0), "across": LinkModel(2.0, 0.0), "inside": LinkModel(3.0, 0.0)}
HERE = Fingerprint((("a", 2), ("b", 2)), ("cpu x86_64, 2 cores",), "gloo", 4, dp=4, hsdp=1, tp=1, ep=4, etp=1)
MODEL = ModelSummary((0, 2), LOAD, "hierarchical")
FIT = LinkFit("all_to_all", 2, LinkModel(1e-4, 1e-9, 4096.0), ((1024.0, 1e-4), (1e6, 1.1e-3)), 0.01, 0.02)
PLAN = Plan(
    version="0.1.0",
    fingerprint=HERE,
    model=MODEL,
    layers=(
        LayerPlan(0, Pieces(3, 3), 0.1, 0.2, 0.15, 0.3, WindowBytes(0, 5)),
        LayerPlan(2, Pieces(2, 4), 0.1, 0.2, 0.15, 0.3, WindowBytes(7, 1 << 40)),
    ),
    links={"flat": FIT},
    costs=Costs(ComputeModel(1e-4, 1e-11), ComputeModel(2e-4, 1e-11), 1.4),
)


# --- what travels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("experts", "top_k", "nodes"), [(8, 2, 2), (8, 3, 4), (6, 6, 3), (8, 1, 4), (4, 2, 1)])
def test_distinct_nodes_counts_every_choice(experts: int, top_k: int, nodes: int) -> None:
    each = experts // nodes
    seen = [len({expert // each for expert in chosen}) for chosen in itertools.combinations(range(experts), top_k)]
    assert distinct_nodes(experts, top_k, nodes) == pytest.approx(sum(seen) / len(seen))


def test_one_level_sends_each_choice_but_those_that_stay() -> None:
    work = layer_work(LOAD, LINKS, "all_to_all")
    [hop] = work.hops
    assert (hop.resource, hop.link) == ("across", LINKS["flat"])
    assert hop.out_bytes == hop.back_bytes == pytest.approx(100 * 2 * 16 * 2 * 3 / 4)
    # of the three other ranks two are on the other node
    assert work.wire_bytes == pytest.approx({"across": 100 * 2 * 16 * 2 * 2 / 4 * 2, "inside": 100 * 2 * 16 * 2 / 4 * 2})
    assert work.flops == 100 * 2 * 6 * 16 * 32
    assert work.shared_flops == 100 * 6 * 16 * 64


def test_slices_of_an_expert_each_get_a_copy() -> None:
    whole, sliced = (layer_work(replace(LOAD, ep=ep, etp=etp), LINKS, "all_to_all") for ep, etp in ((4, 1), (2, 2)))
    assert sliced.hops[0].out_bytes == 2 * whole.hops[0].out_bytes
    assert sliced.flops == whole.flops


def test_two_levels_send_a_token_once_to_a_node() -> None:
    across, inside = layer_work(LOAD, LINKS, "hierarchical").hops
    rows = 100 * distinct_nodes(8, 2, 2) / 2
    assert (across.resource, across.link, inside.resource, inside.link) == ("across", LINKS["across"], "inside", LINKS["inside"])
    assert across.back_bytes == pytest.approx(rows * 16 * 2)
    assert across.out_bytes == pytest.approx(rows * (16 * 2 + 2 * 2 * 4)), "with weight and place of each choice"
    assert inside.out_bytes == inside.back_bytes == pytest.approx(100 * 2 * 16 * 2 / 2)
    lonely = layer_work(replace(LOAD, ep=2), {"across": LINKS["across"]}, "hierarchical")
    assert [hop.resource for hop in lonely.hops] == ["across"], "a node with one rank has nothing to deal out"


def test_two_levels_on_one_node_are_one() -> None:
    load = replace(LOAD, nodes=1)
    assert layer_work(load, LINKS, "hierarchical") == layer_work(load, LINKS, "all_to_all")
    assert layer_work(load, LINKS, "all_to_all").hops[0].resource == "inside"
    assert layer_work(replace(load, ep=1), {}, "all_to_all").hops == ()


def test_two_levels_agree_with_a_drawn_routing() -> None:
    draw, tokens = random.Random(3), 20_000
    nodes = [{e // 4 for e in draw.sample(range(8), 2)} for _ in range(tokens)]
    leaving = sum(len(chosen - {0}) for chosen in nodes)
    work = layer_work(replace(LOAD, tokens=tokens), LINKS, "hierarchical")
    assert work.hops[0].back_bytes == pytest.approx(leaving * 16 * 2, rel=0.03)


def test_compression_sends_fewer_rows_that_each_go_to_one_expert() -> None:
    exact, fewer = (layer_work(LOAD, LINKS, "all_to_all", rate) for rate in (1.0, 0.25))
    assert fewer.hops[0].out_bytes == exact.hops[0].out_bytes / 4
    assert fewer.flops == exact.flops / 4 and fewer.shared_flops == exact.shared_flops
    across = layer_work(LOAD, LINKS, "hierarchical", 0.25).hops[0]
    assert across.back_bytes == pytest.approx(100 * 2 * 0.25 / 2 * 16 * 2)


# --- the record ---------------------------------------------------------------------------------------------


def test_a_plan_comes_back_from_json(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(PLAN.to_json())
    assert Plan.read(path) == PLAN
    nothing = replace(PLAN, layers=(LayerPlan(0, Pieces()), LayerPlan(2, Pieces())), links={}, costs=None)
    assert Plan.from_json(nothing.to_json()) == nothing


def test_pieces_of_a_layer() -> None:
    assert (PLAN.chunks(0), PLAN.chunks(2)) == (Pieces(3, 3), Pieces(2, 4))
    with pytest.raises(KeyError):
        PLAN.chunks(1)


def test_windows_are_given_to_all_layers_or_to_none() -> None:
    assert PLAN.windows == {0: WindowBytes(0, 5), 2: WindowBytes(7, 1 << 40)}
    assert replace(PLAN, layers=(PLAN.layers[0], replace(PLAN.layers[1], windows=None))).windows is True


def changed(change: Any) -> str:
    data = json.loads(PLAN.to_json())
    change(data)
    return json.dumps(data)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "is not JSON"),
        ("[]", "has schema None, but this version reads 3"),
        (changed(lambda d: d.update(schema=2)), "has schema 2, but this version reads 3"),
        (changed(lambda d: d["layers"][0]["windows"].update(rest=-1)), r"layers\[0\]\.windows: -1 bytes in the window 'rest'"),
        (changed(lambda d: d.pop("layers")), "the plan must have .*layers"),
        (changed(lambda d: d.update(note="x")), "the plan must have"),
        (changed(lambda d: d["layers"][1].update(chunks=4)), r"layers\[1\]\.chunks must have backward, forward, but is 4"),
        (changed(lambda d: d["layers"][1]["chunks"].update(forward="2")), r"layers\[1\]\.chunks\.forward is '2'"),
        (changed(lambda d: d["layers"][1]["chunks"].update(forward=True)), r"layers\[1\]\.chunks\.forward is True"),
        (changed(lambda d: d["layers"][1]["chunks"].update(forward=0)), r"layers\[1\]\.chunks: 0 pieces forward and 4 backward"),
        (changed(lambda d: d["layers"][1]["chunks"].update(forward=3)), "3 pieces forward and 4 backward: .* divide the other"),
        (changed(lambda d: d["layers"].pop()), r"pieces for the layers \[0\], but the MoE layers are \[0, 2\]"),
        (changed(lambda d: d["model"]["load"].update(tokens=1.5)), r"model\.load\.tokens is 1\.5"),
        (changed(lambda d: d["fingerprint"]["hosts"][0].append(3)), r"fingerprint\.hosts\[0\] is"),
        (changed(lambda d: d["links"]["flat"]["model"].update(alpha_s=None)), r"links\.flat\.model\.alpha_s is None"),
        (PLAN.to_json().replace("0.0001", "Infinity", 1), "is inf"),
    ],
)
def test_a_file_that_is_no_plan_is_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)p\.json: .*{says}.*moefold plan"):
        Plan.from_json(text, "p.json")


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: cannot be read \(No such file.*moefold plan CONFIG --out"):
        Plan.read(tmp_path / "nowhere.json")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="is not text"):
        Plan.read(tmp_path / "binary")


def test_a_plan_for_this_run_passes() -> None:
    check_plan(PLAN, HERE, MODEL)
    check_plan(Plan.from_json(PLAN.to_json()), HERE, MODEL)


@pytest.mark.parametrize(
    ("here", "model", "says"),
    [
        (
            replace(HERE, hosts=(("c", 4),)),
            MODEL,
            r"hosts \(ranks\) = a \(2\), b \(2\), but this run has c \(4\)",
        ),
        (replace(HERE, devices=("H200",)), MODEL, "devices = cpu x86_64, 2 cores, but this run has H200"),
        (replace(HERE, backend="nccl"), MODEL, "backend = gloo, but this run has nccl"),
        (replace(HERE, hsdp=4), MODEL, "hsdp = 1, but this run has 4"),
        (HERE, replace(MODEL, layers=(0,)), "MoE layers = 0, 2, but this run has 0"),
        (HERE, replace(MODEL, dispatcher="all_to_all"), "dispatcher = hierarchical, but this run has all_to_all"),
        (HERE, replace(MODEL, rate=0.2), r"rate of rows = 1\.0, but this run has 0\.2"),
        (HERE, replace(MODEL, load=replace(LOAD, tokens=50)), "tokens per rank and pass = 100, but this run has 50"),
        (HERE, replace(MODEL, load=replace(LOAD, row_bytes=64)), "row_bytes = 32, but this run has 64"),
    ],
)
def test_a_plan_from_elsewhere_is_refused_with_both_sides(here: Fingerprint, model: ModelSummary, says: str) -> None:
    with pytest.raises(ConfigError, match=rf"p\.json: was made for {says}; measure again with `moefold plan") as caught:
        check_plan(PLAN, here, model, "p.json")
    assert len(caught.value.problems) == 1


def test_of_many_hosts_a_few_are_named() -> None:
    many = replace(HERE, hosts=tuple((f"n{i}", 8) for i in range(64)))
    with pytest.raises(ConfigError, match=r"this run has n0 \(8\), .*n7 \(8\) \.\. \(64 in all\);") as caught:
        check_plan(PLAN, many, MODEL)
    assert "n8" not in str(caught.value)


def test_all_differences_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        check_plan(PLAN, replace(HERE, world=8, ep=8), replace(MODEL, load=replace(LOAD, ep=8)))
    assert len(caught.value.problems) == 3


# --- of a model and a mesh ----------------------------------------------------------------------------------


def config(**moe: Any) -> ModelConfig:
    layer = MoEConfig(num_experts=8, top_k=2, expert_dim=32, num_shared_experts=2, **moe)
    sizes: dict[str, Any] = {"dim": 16, "num_layers": 4, "num_heads": 2, "vocab_size": 32, "max_seq_len": 8}
    return ModelConfig(**sizes, dense_ffn_dim=16, dense_prefix_layers=1, moe_every=2, moe=layer)


def test_a_summary_of_a_model() -> None:
    topology = Topology(4, ep=4)
    summary = ModelSummary.of(config(), topology, tokens=100, nodes=2, precision="bf16")
    assert summary == ModelSummary((1, 3), LOAD, "all_to_all", 1.0)
    compressed = config(compress=CompressConfig(method="lsh", rate=0.3))
    assert ModelSummary.of(compressed, topology, tokens=100, nodes=2, precision="bf16").rate == 0.3
    open_rate = config(compress=CompressConfig(method="lsh", rate=None))
    assert ModelSummary.of(open_rate, topology, tokens=100, nodes=2, precision="bf16").rate == 1.0
    bytes_on_the_wire = config(compress=CompressConfig(wire="int8", wire_block=8))
    assert ModelSummary.of(bytes_on_the_wire, topology, tokens=100, nodes=2, precision="bf16").load.row_bytes == 16 + 2 * 4
    # without a gate there are two matrices instead of three
    plain = ModelSummary.of(replace(config(), ffn_gate=False), topology, tokens=100, nodes=2, precision="bf16")
    assert plain.work(LINKS).flops == summary.work(LINKS).flops * 2 / 3
    with pytest.raises(ConfigError, match="nothing to plan"):
        ModelSummary.of(replace(config(), moe=None), Topology(1), tokens=1, nodes=1, precision="fp32")


def print_of(rank: int, world: int) -> Fingerprint:
    return fingerprint(build_mesh(Topology(world, ep=2, hsdp=2), torch.device("cpu")))


@pytest.mark.ranks
def test_ranks_have_one_fingerprint(gloo_pool: GlooPool) -> None:
    first, second = gloo_pool.run(print_of, 2)
    assert first == second
    assert [ranks for _, ranks in first.hosts] == [2] and len(first.devices) == 1
    assert (first.backend, first.world, first.dp, first.hsdp, first.tp, first.ep, first.etp) == ("gloo", 2, 2, 2, 1, 2, 1)
