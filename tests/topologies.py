"""Legal topologies for tests: a hypothesis strategy and complete lists."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

from hypothesis import strategies as st

from moefold.parallel.topology import Topology


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


@st.composite
def topologies(draw: st.DrawFn, max_world: int = 1024) -> Topology:
    """Any legal factorisation: the dense view is drawn factor by factor, the expert view divides the same stage."""
    degrees, room = {}, max_world
    for name in draw(st.permutations(["pp", "dp", "cp", "tp"])):
        degrees[name] = draw(st.integers(1, min(room, 64)))
        room //= degrees[name]
    stage = degrees["dp"] * degrees["cp"] * degrees["tp"]
    ep = draw(st.sampled_from(divisors(stage)))
    etp = draw(st.sampled_from(divisors(stage // ep)))
    hsdp = draw(st.sampled_from(divisors(degrees["dp"])))
    return Topology(stage * degrees["pp"], ep=ep, etp=etp, hsdp=hsdp, **degrees)


def factorisations(world: int) -> Iterator[Topology]:
    """Every legal topology of `world` ranks without hybrid sharding."""
    for pp in divisors(world):
        stage = world // pp
        dense = [(cp, tp) for cp in divisors(stage) for tp in divisors(stage // cp)]
        for (cp, tp), (ep, etp) in itertools.product(dense, dense):
            yield Topology(world, pp=pp, cp=cp, tp=tp, ep=ep, etp=etp)


def suggested(what: str) -> list[int]:
    """The legal values that an error message names."""
    listed = re.search(r"nearest legal values: ([\d, ]*\d)", what)
    assert listed, f"no legal values in {what!r}"
    return [int(value) for value in listed.group(1).split(",")]
