"""The simulator: hand-made timelines, closed forms, rules that any layer keeps, and the best number of pieces by brute force."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefold.moe.dispatch import Pieces
from moefold.parallel.cost_model import ComputeModel, LinkModel
from moefold.parallel.schedule import (
    CLOSE,
    MOST_CHUNKS,
    Choice,
    Costs,
    Hop,
    LayerWork,
    Op,
    Timeline,
    Way,
    best_chunks,
    layer_ops,
    run,
    simulate,
)


def line(alpha_s: float, s_per_unit: float) -> LinkModel:
    return LinkModel(alpha_s, s_per_unit)


def flat(out_s: float = 4.0, experts_s: float = 4.0, alpha_s: float = 0.0, **more: object) -> LayerWork:
    """A layer whose exchanges take `out_s` each way when nothing is cut, at 1 byte and 1 operation per second."""
    return LayerWork((Hop("across", line(alpha_s, 1.0), out_s, out_s, 1.0),), experts_s, **more)  # type: ignore[arg-type]


def costs(alpha_s: float = 0.0, contention: float = 1.0) -> Costs:
    return Costs(ComputeModel(alpha_s, 1.0), ComputeModel(alpha_s, 1.0), contention)


def when(timeline: Timeline) -> dict[str, tuple[float, float]]:
    return {span.op.name: (span.start_s, span.end_s) for span in timeline.spans}


# --- the simulator ------------------------------------------------------------------------------------------


def test_a_queue_keeps_its_order_and_a_list_schedule_does_not() -> None:
    ops = [
        Op("a", "compute", 5.0),
        Op("needs a", "across", 1.0, ("a",)),
        Op("free", "across", 2.0),
    ]
    assert when(run(ops)) == {"a": (0, 5), "needs a": (5, 6), "free": (6, 8)}
    assert when(run(ops, in_order=False)) == {"a": (0, 5), "free": (0, 2), "needs a": (5, 6)}


def test_gaps_and_use_of_a_resource() -> None:
    ops = [Op("a", "across", 2.0), Op("b", "compute", 3.0, ("a",)), Op("c", "across", 1.0, ("b",)), Op("d", "compute", 4.0)]
    timeline = run(ops)
    assert timeline.makespan_s == 9
    assert timeline.idle("across") == ((2, 5), (6, 9))
    assert timeline.idle("compute") == ((0, 2),)
    assert timeline.idle("inside") == ((0, 9),)
    assert (timeline.busy_s("across"), timeline.busy_s("compute"), timeline.busy_s("inside")) == (3, 7, 0)
    assert run([]).makespan_s == 0 and run([]).idle("across") == ()


def test_contention_slows_what_runs_at_the_same_time() -> None:
    """3 s and 2 s at half speed together: the shorter ends after 4 s, the longer has 1 s left for itself."""
    both = [Op("x", "across", 3.0), Op("y", "compute", 2.0)]
    assert when(run(both, contention=2.0)) == {"x": (0, 5), "y": (0, 4)}
    links = [Op("x", "across", 3.0), Op("y", "inside", 2.0)]
    assert run(links, contention=2.0).makespan_s == 3, "links do not slow each other"


@pytest.mark.parametrize(
    ("ops", "says"),
    [
        ([Op("a", "across", 1.0), Op("a", "compute", 1.0)], "2 operations have 1 names"),
        ([Op("a", "across", 1.0, ("b",))], "'a' comes after 'b', which does not exist"),
        ([Op("a", "across", 1.0, ("b",)), Op("b", "compute", 1.0, ("a",))], "wait for one another: a, b"),
        ([Op("a", "across", 1.0, ("b",)), Op("b", "across", 1.0)], "wait for one another: a, b"),
    ],
)
def test_what_cannot_run_is_refused(ops: list[Op], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run(ops)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["across", "inside", "compute"]), st.floats(0, 9), st.integers(0, 2**12)), max_size=12))
def test_queues_agree_with_one_pass(drawn: list[tuple[str, float, int]]) -> None:
    """In order, an operation starts when the one before it on its resource and all that it comes after have ended."""
    ops, ends, free = [], {}, {"across": 0.0, "inside": 0.0, "compute": 0.0}
    for i, (resource, seconds, mask) in enumerate(drawn):
        after = tuple(op.name for j, op in enumerate(ops) if mask >> j & 1)
        ops.append(Op(str(i), resource, seconds, after))  # type: ignore[arg-type]
        start = max([free[resource], *(ends[name] for name in after)])
        ends[str(i)] = free[resource] = start + seconds
    found = {name: end for name, (_, end) in when(run(ops)).items()}
    assert found == pytest.approx(ends, rel=1e-9, abs=1e-9)
    loose = run(ops, in_order=False)
    assert all(span.start_s >= max((when(loose)[n][1] for n in span.op.after), default=0) - 1e-9 for span in loose.spans)


# --- FSMoE's closed forms (gradients aside) -----------------------------------------------------------------


def fsmoe(r: int, a: float, g: float, x: float) -> float:
    """The best of four list schedules of r pieces: across, inside, experts, inside, across, both links in either priority."""
    out = [Op(f"D{i}", "across", a) for i in range(r)]
    gather = [Op(f"G{i}", "inside", g, (f"D{i}",)) for i in range(r)]
    experts = [Op(f"X{i}", "compute", x, (f"G{i}",)) for i in range(r)]
    scatter = [Op(f"S{i}", "inside", g, (f"X{i}",)) for i in range(r)]
    back = [Op(f"C{i}", "across", a, (f"S{i}",)) for i in range(r)]
    orders = [(*p, *q) for p in ((out, back), (back, out)) for q in ((gather, scatter), (scatter, gather))]
    lists = ([op for part in order for op in part] for order in orders)
    return min(run([*ops, *experts], in_order=False).makespan_s for ops in lists)


def test_fsmoe_cases_two_and_four_are_exact_and_case_three_is_an_upper_bound() -> None:
    draw, errors = random.Random(1), {2: [], 3: [], 4: []}  # type: ignore[var-annotated]
    for _ in range(600):
        r, (a, g, x) = draw.randint(1, 8), (draw.uniform(0.1, 2) for _ in range(3))
        if (a > g and r * x > 2 * (r - 1) * a) or (a <= g and r * x > (r - 1) * 2 * g):
            case, closed = 2, 2 * a + 2 * g + r * x
        else:
            case, closed = (3, 2 * r * a + 2 * g) if a > g else (4, 2 * a + r * 2 * g)
        errors[case].append(closed / fsmoe(r, a, g, x) - 1)
    assert min(map(len, errors.values())) > 100
    assert max(map(abs, errors[2] + errors[4])) < 1e-9
    assert min(errors[3]) > -1e-9 and max(errors[3]) < 0.25
    assert 0.02 < statistics.median(errors[3]) < 0.1


# --- the order of the code ----------------------------------------------------------------------------------


def test_forward_of_two_pieces_by_hand() -> None:
    work = flat(4.0, 6.0, shared_flops=1.0)
    assert when(simulate(work, costs(), 2)) == {
        "out 0": (0, 2),
        "out 1": (2, 4),
        "shared": (0, 1),
        "experts 0": (2, 5),
        "back 0": (5, 7),
        "experts 1": (5, 8),
        "back 1": (8, 10),
    }


def test_backward_mirrors_it_with_twice_the_work() -> None:
    work = flat(4.0, 6.0, shared_flops=1.0)
    timeline = simulate(work, costs(), 2, backward=True)
    assert when(timeline) == {
        "back 1": (0, 2),
        "back 0": (2, 4),
        "experts 1": (2, 5),
        "out 1": (5, 7),
        "weights 1": (5, 8),
        "experts 0": (8, 11),
        "out 0": (11, 13),
        "weights 0": (11, 14),
        "shared": (14, 16),
    }
    assert timeline.makespan_s == 16
    assert timeline.idle("across") == ((4, 5), (7, 11), (13, 16))


def test_two_levels_wait_inside_for_each_piece() -> None:
    hops = (
        Hop("across", line(0.0, 1.0), 4.0, 2.0, 1.0, messages=1, counts_bytes=1.0),
        Hop("inside", line(0.0, 1.0), 2.0, 2.0, 0.0, counts_bytes=0.5),
    )
    assert when(simulate(LayerWork(hops, 2.0), costs(), 2)) == {
        "counts": (0, 1),
        "out 0": (1, 3),
        "out 1": (3, 5),
        "counts 0 (1)": (3, 3.5),
        "out 0 (1)": (3.5, 4.5),
        "experts 0": (4.5, 5.5),
        "back 0 (1)": (5.5, 6.5),
        "back 0": (6.5, 7.5),
        "counts 1 (1)": (6.5, 7),
        "out 1 (1)": (7, 8),
        "experts 1": (8, 9),
        "back 1 (1)": (9, 10),
        "back 1": (10, 11),
    }
    backward = simulate(LayerWork(hops, 2.0), costs(), 2, backward=True)
    assert not [span for span in backward.spans if span.op.name.startswith("counts")]
    assert when(backward)["back 1 (1)"] == (1, 2) and when(backward)["out 1 (1)"] == (3, 4)


def test_a_second_message_costs_its_start_on_the_way_there_only() -> None:
    for messages, expected in ((1, 5.0), (2, 6.0)):
        work = LayerWork((Hop("across", line(0.5, 1.0), 4.0, 2.0, 1.0, messages),), 0.0)
        spans = when(simulate(work, costs(), 2))
        assert spans["out 1"][1] == expected
        assert spans["back 1"][1] - spans["back 1"][0] == 1.5


def test_units_that_share_an_exchange_wait_for_it_together_and_leave_together() -> None:
    work, two_in_one = flat(4.0, 6.0, shared_flops=1.0), Pieces(1, 2)
    assert when(simulate(work, costs(), two_in_one)) == {
        "out 0": (0, 4),
        "shared": (0, 1),
        "experts 0": (4, 7),
        "experts 1": (7, 10),
        "back 0": (10, 14),
    }
    assert when(simulate(work, costs(), two_in_one, backward=True)) == when(simulate(work, costs(), 2, backward=True))
    mirrored = simulate(work, costs(), Pieces(4, 2), backward=True)
    spans = when(mirrored)
    assert [name for name in spans if name.startswith("back")] == ["back 1", "back 0"]
    assert spans["experts 3"][0] == spans["back 1"][1] and spans["out 1"][0] == spans["experts 2"][1]
    assert spans["out 0"][0] == spans["experts 0"][1]


def test_units_cross_inner_hops_one_by_one() -> None:
    hops = (Hop("across", line(0.0, 1.0), 4.0, 4.0, 1.0), Hop("inside", line(0.0, 1.0), 2.0, 2.0, 0.0))
    spans = when(simulate(LayerWork(hops, 2.0), costs(), Pieces(1, 2)))
    assert spans["out 0"] == (0, 4) and spans["back 0"] == (10, 14)
    assert (spans["out 0 (1)"], spans["out 1 (1)"]) == ((4, 5), (7, 8))


def test_all_experts_at_home() -> None:
    assert simulate(LayerWork((), 3.0, 1.0), costs(), 2).makespan_s == 4


def test_no_pieces_are_refused() -> None:
    with pytest.raises(ValueError, match="0 pieces forward and 0 backward: there must be at least 1"):
        layer_ops(flat(), costs(), 0)


def test_equal_parts_gain_at_most_a_half() -> None:
    """Dispatch, experts and combine of the same length on one link: 3 becomes 2, as measured on gloo; never less."""
    times = [simulate(flat(4.0, 4.0), costs(), r).makespan_s for r in (1, 2, 4, 64)]
    assert times[0] == 12 and times[1] == 8
    assert all(t == 8 for t in times[1:])


@st.composite
def layers(draw: st.DrawFn) -> tuple[LayerWork, Costs]:
    size, start = st.floats(0.1, 10), st.floats(0, 0.5)
    across = Hop("across", line(draw(start), 1.0), draw(size), draw(size), 1.0, draw(st.integers(1, 2)), draw(start))
    inside = Hop("inside", line(draw(start), 1.0), draw(size), draw(size), 0.0, 1, draw(start))
    hops = draw(st.sampled_from([(across,), (across, inside)]))
    work = LayerWork(hops, draw(size), draw(st.floats(0, 3)))
    models = [ComputeModel(draw(start), 1.0) for _ in range(2)]
    return work, Costs(*models, draw(st.floats(1, 2)))


@settings(deadline=None, max_examples=60)
@given(layers(), st.integers(1, 6), st.integers(1, 3), st.booleans(), st.booleans())
def test_any_layer_keeps_the_rules(layer: tuple[LayerWork, Costs], few: int, factor: int, swap: bool, backward: bool) -> None:
    work, cost = layer
    chunks = Pieces(few * factor, few) if swap else Pieces(few, few * factor)
    together = chunks.units // (chunks.backward if backward else chunks.forward)
    timeline = simulate(work, cost, chunks, backward=backward)
    spans = when(timeline)
    for resource in ("across", "inside", "compute"):
        one_after_another = timeline.on(resource)
        ends = [span.end_s for span in one_after_another]
        assert all(span.start_s >= end - 1e-9 for span, end in zip(one_after_another[1:], ends, strict=False))
        gaps = sum(end - start for start, end in timeline.idle(resource))
        assert gaps + timeline.busy_s(resource) == pytest.approx(timeline.makespan_s)
    assert all(span.start_s >= max((spans[n][1] for n in span.op.after), default=0.0) - 1e-9 for span in timeline.spans)
    first, then = ("back", "out") if backward else ("out", "back")
    for unit in range(chunks.units):
        exchange = unit // together
        assert spans[f"{first} {exchange}"][1] <= spans[f"experts {unit}"][0] + 1e-9
        assert spans[f"experts {unit}"][1] <= spans[f"{then} {exchange}"][0] + 1e-9


# --- the choice ---------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=10)
@given(layers())
def test_the_choice_is_that_of_brute_force(layer: tuple[LayerWork, Costs]) -> None:
    choice, total = best_chunks(*layer), {}
    for forward, backward in itertools.product(range(1, MOST_CHUNKS + 1), repeat=2):
        if forward % backward == 0 or backward % forward == 0:
            pieces = Pieces(forward, backward)
            total[pieces] = sum(simulate(*layer, pieces, backward=b).makespan_s for b in (False, True))
    assert {way.chunks: way.both_s for way in choice.ways} == pytest.approx(total)
    near = [pieces for pieces, t in total.items() if t <= min(total.values()) * (1 + CLOSE)]
    assert choice.chunks in near
    assert (choice.chunks.units, sum(pair(choice.chunks))) == min((p.units, sum(pair(p))) for p in near)
    assert choice.gain == pytest.approx(total[Pieces()] / total[choice.chunks])
    least = min(t for p, t in total.items() if p.forward == p.backward)
    assert choice.mirrored.both_s <= least * (1 + CLOSE) and choice.best.both_s <= least * (1 + CLOSE)


def pair(pieces: Pieces) -> tuple[int, int]:
    return pieces.forward, pieces.backward


def test_costly_starts_want_few_pieces_and_long_transfers_several() -> None:
    assert best_chunks(flat(4.0, 4.0, alpha_s=5.0), costs()).chunks == Pieces()
    assert best_chunks(flat(4.0, 4.0, alpha_s=0.01), costs()).chunks.units > 1
    assert best_chunks(flat(4.0, 4.0), costs(alpha_s=5.0)).chunks == Pieces()
    assert best_chunks(flat(4.0, 4.0), costs(contention=2.0)).chunks == Pieces(), "nothing is gained side by side"


def test_each_direction_may_have_its_own_number() -> None:
    """Experts much faster than their backward: forward has little to hide behind, and each more exchange costs its start."""
    work = flat(4.0, 4.0, alpha_s=0.25)
    uneven = Costs(ComputeModel(0.0, 0.05), ComputeModel(0.0, 1.0))
    choice = best_chunks(work, uneven)
    assert choice.chunks.forward < choice.chunks.backward
    assert choice.best.both_s < choice.mirrored.both_s


def test_so_small_a_gain_cannot_be_predicted() -> None:
    ways = (Way(Pieces(1, 1), 1.005, 1.0), Way(Pieces(2, 2), 1.0, 1.0), Way(Pieces(1, 2), 0.9, 1.2))
    assert Choice(ways).chunks == Pieces(1, 1)
    assert Choice((*ways, Way(Pieces(2, 1), 0.9, 1.0), Way(Pieces(4, 4), 0.89, 1.0))).chunks == Pieces(2, 1)
    with pytest.raises(KeyError):
        Choice(ways).way(3)


def test_a_drawing_has_one_line_for_each_resource_in_use() -> None:
    drawn = simulate(flat(2.0, 2.0), costs(), 2).draw(width=40).splitlines()
    assert [text.split("|")[0].strip() for text in drawn] == ["across", "compute"]
    assert all(len(text.split("|")[1]) == 40 for text in drawn)
    assert drawn[0].split("|")[1] == "0" * 10 + "1" * 10 + "0" * 10 + "1" * 10
    assert drawn[1].split("|")[1] == "." * 10 + "0" * 10 + "1" * 10 + "." * 10
