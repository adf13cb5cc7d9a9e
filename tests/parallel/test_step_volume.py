"""Rows of every exchange, against a plain count of where each token goes; ways and their names."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moefold.moe.config import CompressConfig, ModelConfig, MoEConfig
from moefold.moe.errors import TopologyError
from moefold.parallel.nodes import NodeMap
from moefold.parallel.step_volume import Choices, Way, count_pairs, expert_blocks, volume
from moefold.parallel.topology import Topology

WORLD, E, K, T = 8, 16, 4, 24
NODES = NodeMap.by_size(WORLD, 2)
FLAT = Way(dispatcher="all_to_all", ep=8)


def drawn() -> list[Tensor]:
    """Uneven choices [T, K] of each rank."""
    generator = torch.Generator().manual_seed(0)
    share = torch.arange(E) + 1.0
    return [torch.multinomial(share.expand(T, E), K, generator=generator) for _ in range(WORLD)]


def choices(of: list[Tensor]) -> Choices:
    counts = torch.stack([torch.bincount(i.flatten(), minlength=E) for i in of])
    return Choices(counts, {n: torch.stack([count_pairs(i, E, n) for i in of]) for n in (2, 4)})


@pytest.mark.parametrize(("ep", "etp"), [(8, 1), (4, 1), (4, 2), (2, 2)])
def test_one_level_sends_each_choice_to_every_slice_of_its_expert(ep: int, etp: int) -> None:
    topology, of = Topology(WORLD, ep=ep, etp=etp), drawn()
    out, received = [0] * WORLD, [0] * WORLD
    node_out, node_in = [0] * 4, [0] * 4
    for members in topology.groups("ep_etp"):
        for source in members:
            for expert, part in itertools.product(of[source].flatten().tolist(), range(etp)):
                target = members[expert // (E // ep) * etp + part]
                received[target] += 1
                out[source] += source != target
                if source // 2 != target // 2:
                    node_out[source // 2] += 1
                    node_in[target // 2] += 1
    found = volume(replace(FLAT, ep=ep, etp=etp), choices(of), topology, NODES)
    assert found.rows == pytest.approx(sum(received) / WORLD) and found.most_rows == max(received)
    [hop] = found.hops
    assert hop.mean == pytest.approx(sum(out) / WORLD)
    mean = sum(node_out) / 4
    assert hop.busiest == pytest.approx(max(*node_out, *node_in) / mean)


@pytest.mark.parametrize(("ep", "rate"), [(8, 1.0), (4, 1.0), (8, 0.25)])
def test_two_levels_send_each_token_once_to_each_node_and_deal_it_out_there(ep: int, rate: float) -> None:
    topology, of = Topology(WORLD, ep=ep), drawn()
    each, up, down = E // ep, 0, 0
    for members in topology.groups("ep_etp"):
        for source in members:
            for token in of[source].tolist():
                owners = [members[expert // each] for expert in token]
                wanted = [owner // 2 for owner in owners] if rate < 1 else {owner // 2 for owner in owners}
                up += sum(node != source // 2 for node in wanted)
                down += sum(owner % 2 != source % 2 for owner in owners)
    way = replace(FLAT, dispatcher="hierarchical", ep=ep, rate=rate)
    across, inside = volume(way, choices(of), topology, NODES).hops
    assert across.mean == pytest.approx(rate * up / WORLD)
    assert inside.mean == pytest.approx(rate * down / WORLD)
    assert across.busiest >= 1 and inside.busiest >= 1


def test_experts_at_home_move_nothing() -> None:
    found = volume(replace(FLAT, ep=1), choices(drawn()), Topology(WORLD), NODES)
    assert found.hops == () and found.rows == T * K


def test_blocks_of_experts_follow_from_nodes() -> None:
    assert expert_blocks(Topology(WORLD, ep=8), NODES, E) == 4
    assert expert_blocks(Topology(WORLD, ep=2), NODES, E) == 1
    assert expert_blocks(Topology(4, ep=4), NodeMap.by_name(["a", "b", "a", "b"]), E) is None
    with pytest.raises(TopologyError, match="needs as many ranks"):
        expert_blocks(Topology(3, ep=3), NodeMap.by_name(["a", "a", "b"]), 3)


def test_a_way_is_a_model_a_layout_and_a_name() -> None:
    moe = MoEConfig(num_experts=E, top_k=K, expert_dim=8, compress=CompressConfig(hashes=3))
    base = ModelConfig(dim=16, num_layers=1, num_heads=2, vocab_size=32, max_seq_len=8, moe=moe)
    way = Way(dispatcher="hierarchical", wire="int8", rate=0.2, pieces=2, ep=4, tp=2)
    model, topology = way.model(base), way.topology(Topology(WORLD, ep=8, hsdp=8))
    assert model.moe is not None and model.moe.dispatcher == "hierarchical"
    c = model.moe.compress
    assert (c.method, c.rate, c.wire, c.hashes) == ("lsh", 0.2, "int8", 3)
    assert (topology.ep, topology.tp, topology.dp, topology.hsdp) == (4, 2, 4, 4), "replicas stay on all data ranks"
    assert Way.of(model, topology, 2) == way
    assert way.name == "hierarchical, ep 4, tp 2, 2 pieces, LSH 20%, int8"
    assert Way.of(replace(way, rate=1.0).model(base), topology, 1).rate == 1.0
