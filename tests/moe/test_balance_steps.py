"""Balance over the micro-batches of a step and over ranks: what each accumulation counts, and when counts are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from balance_formula import (
    SCOPES,
    E,
    L,
    Micro,
    balancer,
    forward,
    gradients,
    literal_counts,
    literal_gradients,
    literal_term,
    make_routers,
    micro_batches,
    run_micro,
    tokens_in,
    valid_rows,
)
from moefold.moe.balance import Balancer
from moefold.moe.peers import NoPeers, Scope, Wait
from moefold.moe.router import TopKRouter
from numeric import assert_same


def step_gradients(
    state: Balancer, routers: Sequence[TopKRouter], micros: Sequence[Micro], exact_LE: Tensor | None = None
) -> list[dict[str, Tensor]]:
    state.start_step(len(micros), exact_LE)
    return [run_micro(state, routers, micro) for micro in micros]


def step_counts(routers: Sequence[TopKRouter], micros: Sequence[Micro]) -> Tensor:
    return torch.stack([forward(routers, *micro).counts_E for micro in micros]).sum(0)


@pytest.mark.parametrize(
    ("accumulation", "carry"),
    [("running", 1.0), ("prior", 0.0), ("prior", 1.0), ("prior", 0.5), ("exact", 1.0)],
    ids=["running", "prior-without-carry", "prior", "prior-half", "exact"],
)
@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
def test_micro_batches_of_two_steps_equal_the_transcription(accumulation: Any, carry: float, padded: bool) -> None:
    routers = make_routers()
    state = balancer(accumulation=accumulation, carry=carry)
    previous: dict[TopKRouter, list[int]] = {}

    def estimate(router: TopKRouter, rows: list[list[Tensor]], m: int) -> list[float]:
        """Counts that micro-batch m (from 0) of `rows` is judged by."""
        so_far = rows if accumulation == "exact" else rows[: m + 1]
        counts = [float(c) for c in literal_counts(router, [x for micro in so_far for x in micro])]
        if accumulation == "prior" and router in previous:
            left = carry * (len(rows) - (m + 1)) / len(rows)
            counts = [c + left * p for c, p in zip(counts, previous[router], strict=True)]
        return counts

    for micros in (micro_batches(3, padded), micro_batches(4, padded)):
        exact_LE = step_counts(routers, micros).double() if accumulation == "exact" else None
        got = step_gradients(state, routers, micros, exact_LE)
        rows = [[x for sequence in valid_rows(micro) for x in sequence] for micro in micros]
        for m in range(len(micros)):
            want = literal_gradients(routers, lambda r, m=m, rows=rows: literal_term(r, rows[m], estimate(r, rows, m)))
            assert_same(got[m], want, rtol=1e-11)
        state.end_step(step_counts(routers, micros))
        previous |= {r: literal_counts(r, [x for micro in rows for x in micro]) for r in routers}


@pytest.mark.parametrize("accumulation", ["running", "prior"])
def test_the_order_of_backwards_does_not_matter(accumulation: Any) -> None:
    routers, micros = make_routers(), micro_batches(4)
    state = balancer(accumulation=accumulation)
    state.end_step(step_counts(routers, micro_batches(2)))
    one_by_one = step_gradients(state, routers, micros)
    state.start_step(4)
    terms = [state.losses(forward(routers, *micro)) for micro in micros]
    backwards = {m: gradients(routers, terms[m]) for m in (2, 3, 0, 1)}
    for m in range(4):
        assert_same(backwards[m], one_by_one[m])


@pytest.mark.parametrize("scope", SCOPES)
def test_one_micro_batch_needs_no_history(scope: Any) -> None:
    routers, [micro], [other] = make_routers(), micro_batches(1), micro_batches(1)
    found = []
    for accumulation in ("running", "prior", "exact"):
        state = balancer(scope=scope, accumulation=accumulation)
        state.end_step(step_counts(routers, [other]))
        state.start_step(1)
        found.append(run_micro(state, routers, micro))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_exact_counts_make_the_split_invisible() -> None:
    routers, micros = make_routers(), micro_batches(4)
    whole = (torch.cat([x for x, _ in micros]), None)
    exact_LE = step_counts(routers, micros).double()
    parts = step_gradients(balancer(accumulation="exact"), routers, micros, exact_LE)
    state = balancer()
    state.start_step(1)
    assert_same({n: torch.stack([p[n] for p in parts]).sum(0) for n in parts[0]}, run_micro(state, routers, whole), rtol=1e-12)


def test_exact_counts_must_be_given() -> None:
    with pytest.raises(ValueError, match="first pass"):
        balancer(accumulation="exact").start_step(2)


def test_state_round_trip() -> None:
    routers, micros = make_routers(), micro_batches(3)
    state, fresh, restored = balancer(), balancer(), balancer()
    assert state.state_dict() == {}
    state.end_step(step_counts(routers, micro_batches(3)))
    restored.load_state_dict({name: value.clone() for name, value in state.state_dict().items()})
    want = step_gradients(state, routers, micros)
    for got, expected in zip(step_gradients(restored, routers, micros), want, strict=True):
        assert_same(got, expected)
    assert not torch.allclose(step_gradients(fresh, routers, micros)[0]["0"], want[0]["0"], rtol=1e-3)
    restored.load_state_dict({})
    assert restored.state_dict() == {}


class RecordingPeers(NoPeers):
    """One rank of two; `other` are the counts of the other one. Notes when a sum starts and when it is waited for."""

    def __init__(self, other_LGE: Tensor):
        self.other_LGE = other_LGE
        self.events: list[str] = []

    def start_sum(self, counts: Tensor, scope: Scope) -> Wait:
        self.events.append(f"start {scope}")

        def wait() -> Tensor:
            self.events.append("wait")
            return counts + self.other_LGE if scope == "global" else counts

        return wait


def test_global_counts_are_asked_for_in_backward_only() -> None:
    routers, [micro] = make_routers(), micro_batches(1)
    peers = RecordingPeers(torch.zeros(L, 1, E, dtype=torch.int64))
    state = balancer(peers)
    state.start_step(1)
    loss = state.losses(forward(routers, *micro))
    assert peers.events == ["start global"]
    assert loss.item() == 0
    gradients(routers, loss)
    assert peers.events == ["start global", "wait"]


def test_two_ranks_add_up_to_one() -> None:
    routers, micros = make_routers(), micro_batches(2, padded=True)
    tokens = tokens_in(micros)
    state = balancer()
    state.start_step(1)
    valid_BS = torch.cat([valid for _, valid in micros if valid is not None])
    want = run_micro(state, routers, (torch.cat([x for x, _ in micros]), valid_BS), tokens)
    parts = []
    for mine, other in (micros, micros[::-1]):
        state = balancer(RecordingPeers(forward(routers, *other).counts_E.unsqueeze(1)))
        state.start_step(1)
        parts.append(run_micro(state, routers, mine, tokens))
    assert_same({n: parts[0][n] + parts[1][n] for n in want}, want, rtol=1e-12)


def test_evaluation_changes_nothing() -> None:
    routers, micros, [seen] = make_routers(), micro_batches(2), micro_batches(1)
    want = step_gradients(balancer(), routers, micros)
    state = balancer()
    with torch.no_grad():
        for router in routers:
            router.eval()
        forward(routers, *seen)
    for got, expected in zip(step_gradients(state, routers, micros), want, strict=True):
        assert_same(got, expected)
