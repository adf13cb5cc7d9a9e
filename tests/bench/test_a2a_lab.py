"""The benchmark of the all-to-all over real links, without the links: formula, choice, judge, table, figures, and two ranks."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from bench.__main__ import main
from bench.a2a.asleep import add_sleep
from bench.a2a.case import (
    DEEPSPEED,
    DEEPSPEED_DROPPING,
    DEEPSPEED_RECEIVING,
    EVERYTHING,
    FLAT,
    HIERARCHICAL,
    VARIANTS,
    Case,
    Turn,
    Variant,
    check_losses,
    chosen,
)
from bench.a2a.steps import Bench, bytes_between, row_bytes, rows_between
from bench.result import load_goals

from bench import a2a_lab
from helpers import run_ranks
from lab.bed import LabUnavailable
from moefold.moe.config import MoEConfig
from moefold.moe.layer import MoELayer
from moefold.parallel.comm_record import CommRecord
from moefold.parallel.nodes import NodeMap

NAMED = {v.name: v for v in VARIANTS}
SIZES = {"dim": 16, "head_dim": 4, "expert_dim": 8, "experts": 8, "top_k": 4, "seq_len": 16, "host_sequences": 2, "hashes": 4}
TINY = Case(hosts=2, ranks_per_host=1, layers=1, train_steps=2, **SIZES)


def planted(variant: str = FLAT, **fields: object) -> Turn:
    values: dict = {"link": 0, "number": 0, "seconds": 1.0, "cpu_s": 0.5, "loss": 2.0, "bytes_between": 10**6}
    values |= {"rows_between": 100.0, "rows_sent": Case().choices, "exposed": 0.6, "transfer": 0.4}
    return Turn(variant=variant, **values | fields)


def test_the_formula_counts_hosts_over_all_sets_of_experts() -> None:
    case = replace(TINY, hosts=4, experts=8, top_k=3)
    sets = list(itertools.combinations(range(8), 3))
    hosts = sum(len({expert // 2 for expert in chosen}) for chosen in sets) / len(sets)
    assert case.formula == pytest.approx(3 / hosts)


def test_the_case_is_one_where_two_levels_should_pay() -> None:
    assert Case().formula >= 1.5
    assert Case().choices == Case().tokens * 8 * 2
    assert Case().model().moe_layers == (0, 1)


def test_variants_are_left_out_by_the_beginning_of_their_names() -> None:
    assert chosen([]) == list(VARIANTS)
    left = [v.name for v in chosen(["DeepSpeed", "hierarchical, 3"])]
    assert left == [n for n in NAMED if not n.startswith("DeepSpeed") and "3 pieces" not in n]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--without", "nobody"], "no variant's name begins so"),
        (["--without", "flat"], "which all are compared with"),
        (["--ranks-per-host", "3"], "3 ranks per host do not divide"),
    ],
)
def test_a_choice_that_cannot_be_is_refused_before_anything_starts(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["a2a_lab", *words])
    assert end.value.code == 2
    assert said in capsys.readouterr().err


def test_without_a_lab_the_reason_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def nothing() -> str:
        raise LabUnavailable("rootless: no user namespaces")

    monkeypatch.setattr("lab.bed.available", nothing)
    with pytest.raises(SystemExit) as end:
        main(["a2a_lab", "--quick"])
    assert end.value.code == 2
    assert "none can be made here: rootless: no user namespaces" in capsys.readouterr().err


@pytest.mark.parametrize("name", [n for n, v in NAMED.items() if v.exact and n != FLAT])
@pytest.mark.parametrize("loss", [2.0 * (1 + 3e-5), float("nan")])
def test_who_says_exact_and_is_not_is_refused(name: str, loss: float) -> None:
    check_losses([planted(), planted(name, loss=2.0 * (1 + 5e-6))], list(VARIANTS))
    with pytest.raises(ValueError, match="what does not compute the same cannot be compared") as error:
        check_losses([planted(), planted(name, loss=loss)], list(VARIANTS))
    assert repr(name) in str(error.value)


def test_compression_may_change_the_loss() -> None:
    compressed = [v.name for v in VARIANTS if not v.exact]
    assert {EVERYTHING, "flat, LSH"} <= set(compressed)
    check_losses([planted(), *(planted(name, loss=2.5) for name in compressed)], list(VARIANTS))


def test_ratios_are_those_of_the_same_round() -> None:
    seconds = {FLAT: (4.0, 8.0, 6.0), HIERARCHICAL: (2.0, 5.0, 2.0)}
    turns = [planted(v, number=n, seconds=s) for v, all_s in seconds.items() for n, s in enumerate(all_s)]
    turns += [planted(FLAT, link=1, number=0, seconds=100.0)]
    assert a2a_lab.times_faster(turns, 0, HIERARCHICAL, FLAT) == [2.0, 1.6, 3.0]
    assert a2a_lab.times_faster(turns, 0, FLAT, FLAT) == [1.0] * 3
    assert a2a_lab.times_faster(turns, 0, HIERARCHICAL, DEEPSPEED) == []
    case, variants = Case(), [NAMED[FLAT], NAMED[HIERARCHICAL]]
    _, row = a2a_lab.table(case, variants, ["100mbit"], [], turns)
    want = {"link": "100mbit", "variant": HIERARCHICAL, "step_ms": 2000.0, "least_ms": 2000.0, "times_faster": 2.0, "worst": 1.6}
    assert {key: row[key] for key in want} == want


def test_rows_tell_what_crossed_and_what_went_to_experts() -> None:
    case = Case()
    sent = {"bytes_between": 3_000_000, "rows_between": 25.0, "rows_sent": case.choices // 5, "loss": 2.25}
    turns = [planted(), planted(EVERYTHING, **sent)]
    variants = [NAMED[FLAT], NAMED[EVERYTHING]]
    flat, row = a2a_lab.table(case, variants, ["1gbit"], [planted(EVERYTHING, link=-1, error=0.25)], turns)
    assert (flat["rows_between_hosts"], flat["rows_to_experts"], flat["error"]) == (1.0, 1.0, None)
    assert (row["between_hosts_mb"], row["rows_between_hosts"], row["rows_to_experts"]) == (
        3.0,
        0.25,
        pytest.approx(0.2, abs=1e-4),
    )
    assert (row["loss"], row["error"], row["exposed"], row["transfer"]) == (2.25, 0.25, 0.6, 0.4)
    assert list(flat) == list(row)


def all_turns(link: int, transfer: float, in_pieces: Callable[[int], float], **seconds: float) -> list[Turn]:
    """A turn of each variant. in_pieces: seconds of those that are not named."""
    known = dict(zip((FLAT, HIERARCHICAL, EVERYTHING, DEEPSPEED), seconds.values(), strict=True))
    return [planted(v.name, link=link, seconds=known.get(v.name, in_pieces(v.pieces)), transfer=transfer) for v in VARIANTS]


def test_figures_are_the_least_over_the_rates() -> None:
    slow = all_turns(0, 0.7, lambda pieces: 2.0 + pieces / 4, flat=6.0, hierarchical=3.0, everything=1.0, deepspeed=12.0)
    fast = all_turns(1, 0.5, lambda pieces: 2.5 - pieces / 4, flat=3.0, hierarchical=2.4, everything=1.5, deepspeed=4.5)
    found = a2a_lab.figures(Case(), ["100mbit", "300mbit"], slow + fast)
    assert found["hierarchical_gain"] == found["hierarchical_gain_300mbit"] == pytest.approx(1.25)
    assert found["hierarchical_gain_100mbit"] == 2.0
    assert found["everything_gain"] == 2.0
    assert found["everything_over_deepspeed"] == 3.0
    # the best way of overlap, and only where the share of transfer is one that is judged
    assert found["overlap_gain_100mbit"] == pytest.approx(3.0 / 2.25)
    assert found["overlap_gain"] == found["overlap_gain_300mbit"] == pytest.approx(2.4 / 1.5)
    assert "overlap_gain" not in a2a_lab.figures(Case(), ["100mbit"], slow)


def test_goals_are_stated_for_figures_that_there_are() -> None:
    goals = {goal.figure: goal.at_least for goal in load_goals("a2a_lab")}
    assert goals == {"hierarchical_gain": 1.3, "overlap_gain": 1.2, "everything_gain": 2.2, "everything_over_deepspeed": 3.0}
    assert set(goals) <= set(a2a_lab.figures(Case(), ["1gbit"], all_turns(0, 0.5, lambda _: 1.0, a=1.0, b=1.0, c=1.0, d=1.0)))


@pytest.mark.parametrize(("late", "slept"), [(False, ["3", "6"]), (True, ["3", "3", "3"])], ids=["together", "late"])
def test_experts_sleep_for_their_rows(late: bool, slept: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[str] = []
    monkeypatch.setattr("bench.a2a.asleep.time.sleep", lambda seconds: naps.append(f"{seconds:g}"))
    layer = MoELayer(8, MoEConfig(num_experts=2, top_k=2, expert_dim=4))
    add_sleep(layer, 0.5)
    experts = layer.experts.late() if late else layer.experts
    experts.compute(torch.randn(6, 8, requires_grad=True), torch.tensor([2, 4])).sum().backward()
    assert naps == slept and layer.experts.w2_EDF.grad is not None


def record(what: str, direction: str, members: tuple[int, ...], sent: tuple[int, ...]) -> CommRecord:
    op = "all_reduce" if direction == "update" else "all_to_all"
    names: dict = {"axis": "x", "what": what, "op": op, "direction": direction, "members": members, "sent": sent}
    return CommRecord(step=0, seq=0, call=0, layer=0, received=sent, begin_s=0.0, wait_s=0.0, end_s=1.0, **names)


def test_only_what_leaves_a_host_crosses() -> None:
    nodes = NodeMap((0, 0, 1, 1))
    records = [
        [record("dispatch", "forward", (0, 1, 2, 3), (8, 16, 32, 64)), record("gradients", "update", (0, 2), (0, 5))],
        [record("dispatch", "forward", (0, 1), (128, 256)), record("notes", "forward", (1, 3), (1, 2))],
        [record("dispatch", "backward", (0, 2), (512, 7))],
        [],
    ]
    assert bytes_between(records, nodes) == 32 + 64 + 2 + 512
    assert rows_between(records, nodes, 8) == (32 + 64) / 8
    assert row_bytes(NAMED[FLAT], 256) == 1024
    assert row_bytes(NAMED[f"{EVERYTHING}, int8"], 256) < 1024 / 3


def turns_of_a_rank(rank: int, world: int, variants: list[Variant]) -> tuple[list[Turn], list[Turn], float]:
    windows_XBS = torch.randint(0, 256, (TINY.train_steps + 1, world * TINY.sequences, TINY.seq_len + 1))
    bench = Bench(TINY, variants, windows_XBS, NodeMap.by_size(world, 1))
    before = [p.detach().clone() for p in bench.engine.model.parameters()]
    first, later = bench.first_round(), [*bench.round(0, 2), *bench.round(0, 3)]
    moved = max(float((p - b).abs().max()) for p, b in zip(bench.engine.model.parameters(), before, strict=True))
    return first, later, moved


@pytest.mark.ranks
def test_two_ranks_take_all_turns_with_one_set_of_weights() -> None:
    # fresh processes: DeepSpeed keeps its groups, and would take them into the next world of a pool
    variants = [v for v in VARIANTS if v.pieces < 3]
    (first, later, moved), (none, none_later, _) = run_ranks(turns_of_a_rank, 2, variants)
    assert none == none_later == []
    assert moved == 0.0
    assert [t.variant for t in first] == [v.name for v in variants]
    # each round begins with another variant, and DeepSpeed's are not in every one
    orders = [[*variants[2:], *variants[:2]], [*variants[3:], *variants[:3]]]
    assert [t.variant for t in later] == [v.name for v in orders[0] if not v.deepspeed] + [v.name for v in orders[1]]
    check_losses(first + later, variants)
    of = {t.variant: t for t in later}
    choices = TINY.choices
    for variant in variants:
        turn = of[variant.name]
        assert 0 <= turn.transfer <= turn.exposed <= 1
        if not variant.deepspeed:
            assert (turn.rows_sent == choices) is not variant.compressed
    assert of[EVERYTHING].rows_sent < choices / 2
    assert of[FLAT].bytes_between == of["flat, gloo all-to-all"].bytes_between
    assert of[HIERARCHICAL].rows_between < of[FLAT].rows_between < choices
    assert of[f"{EVERYTHING}, int8"].bytes_between < of[EVERYTHING].bytes_between
    # padded to the rows of the fullest expert, and sent in either order
    assert of[DEEPSPEED].rows_sent == of[DEEPSPEED_RECEIVING].rows_sent > choices
    assert of[DEEPSPEED].bytes_between == of[DEEPSPEED_RECEIVING].bytes_between == of[DEEPSPEED].rows_between * 4 * 4 * TINY.dim
    rank_tokens = TINY.sequences * TINY.seq_len
    capacity = math.ceil(1.25 * rank_tokens * TINY.top_k / TINY.experts)
    assert of[DEEPSPEED_DROPPING].rows_sent == 2 * TINY.experts * capacity
    errors = {t.variant: t.error for t in first}
    assert errors[FLAT] is None and errors[EVERYTHING] is not None and errors[EVERYTHING] > 0
    assert statistics.fmean(t.seconds for t in later) > 0
