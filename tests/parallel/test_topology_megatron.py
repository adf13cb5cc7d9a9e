"""Our groups against megatron-core's rank generator, for everything it can express.

Its order is written fastest first, "tp-cp-ep-dp-pp". The dense view is its generator without ep; the expert view is one
whose tp is our etp, without cp. It knows neither hybrid sharding nor a joint view, so those have their own tests.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from moefold.parallel.topology import Topology
from topologies import factorisations

ORDER = "tp-cp-ep-dp-pp"
DENSE = {"pp": "pp", "dp": "dp", "cp": "cp", "tp": "tp", "dp_cp": "dp-cp"}
EXPERT = {"pp": "pp", "edp": "dp", "ep": "ep", "etp": "tp", "ep_etp": "tp-ep"}


@pytest.fixture(scope="module")
def rank_generator() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it reports optional GPU packages that are absent
        parallel_state = pytest.importorskip("megatron.core.parallel_state", reason="needs the extra 'megatron'")
    return parallel_state.RankGenerator


def theirs(groups: list[list[int]]) -> list[tuple[int, ...]]:
    """Their groups by first rank: the order of groups carries no meaning, the order inside one does."""
    return sorted(map(tuple, groups))


def assert_same_groups(rank_generator: Any, topo: Topology) -> None:
    dense = rank_generator(tp=topo.tp, ep=1, dp=topo.dp, pp=topo.pp, cp=topo.cp, order=ORDER)
    expert = rank_generator(tp=topo.etp, ep=topo.ep, dp=topo.edp, pp=topo.pp, cp=1, order=ORDER)
    for generator, names in ((dense, DENSE), (expert, EXPERT)):
        for ours, token in names.items():
            assert list(topo.groups(ours)) == theirs(generator.get_ranks(token)), f"{ours} of {topo!r}"


@pytest.mark.parametrize("world", [1, 2, 6, 8, 12, 16], ids="world={}".format)
def test_every_layout_of_a_small_world(rank_generator: Any, world: int) -> None:
    for topo in factorisations(world):
        assert_same_groups(rank_generator, topo)


@pytest.mark.parametrize(
    "topo",
    [
        Topology(64, pp=2, tp=2, ep=8),
        Topology(128, pp=8, tp=2, ep=8),
        Topology(128, pp=2, cp=2, tp=2, ep=8, etp=2),
        Topology(256, pp=4, cp=4, tp=4, ep=64),
        Topology(240, pp=5, cp=2, tp=3, ep=4, etp=6),
        Topology(1024, pp=8, cp=2, tp=8, ep=32, etp=4),
    ],
    ids=repr,
)
def test_layouts_of_larger_jobs(rank_generator: Any, topo: Topology) -> None:
    assert_same_groups(rank_generator, topo)
