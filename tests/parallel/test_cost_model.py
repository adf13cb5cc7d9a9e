"""Models of links and experts: what was planted is found through noise and outliers; ranks agree on what they measured."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import GlooPool
from moefold.parallel.cost_model import (
    SIZES,
    ComputeModel,
    LinkFit,
    LinkModel,
    fit_compute,
    fit_link,
    measure_links,
)
from moefold.parallel.expert_costs import contention, measure_contention, measure_experts
from moefold.parallel.mesh import build_mesh
from moefold.parallel.nodes import NodeMap
from moefold.parallel.topology import Topology

SLOW = LinkModel(1.5e-4, 8 / 183e6, 4096)
FAST = LinkModel(2e-5, 1 / 370e9)


def measured(model: Any, sizes: Any, *, noise: float = 0.0, repeats: int = 15) -> list[tuple[float, list[float]]]:
    """Repetitions at each size: the model's time, up to `noise` more or less."""
    draw = random.Random(7)
    return [(m, [model.seconds(m) * (1 + draw.uniform(-noise, noise)) for _ in range(repeats)]) for m in sizes]


@pytest.mark.parametrize("model", [SLOW, FAST, LinkModel(6e-4, 1e-9, 65536)], ids=["slow", "fast", "wide bucket"])
def test_what_was_planted_is_found(model: LinkModel) -> None:
    fit = fit_link(measured(model, SIZES), what="all_to_all", ranks=4)
    assert fit.model.alpha_s == pytest.approx(model.alpha_s, rel=1e-6)
    assert fit.model.beta_s_per_byte == pytest.approx(model.beta_s_per_byte, rel=1e-6)
    assert fit.max_error < 1e-6
    assert (fit.what, fit.ranks, len(fit.samples)) == ("all_to_all", 4, len(SIZES))
    assert all(fit.model.seconds(m) == pytest.approx(model.seconds(m), rel=1e-6) for m in (1, 3000, 10**5, 10**8))


def test_noise_moves_the_model_little() -> None:
    fit = fit_link(measured(SLOW, SIZES, noise=0.1))
    assert fit.model.alpha_s == pytest.approx(SLOW.alpha_s, rel=0.1)
    assert fit.model.beta_s_per_byte == pytest.approx(SLOW.beta_s_per_byte, rel=0.03)
    assert 0.3 * SLOW.bucket_bytes < fit.model.bucket_bytes < 2 * SLOW.bucket_bytes
    assert 0 < fit.mean_error <= fit.max_error < 0.1


def test_a_bucket_is_worth_its_number() -> None:
    """A straight line is far off for small messages, as on real shaped links."""
    times = measured(SLOW, SIZES)
    assert fit_link(times).max_error < 1e-6
    assert fit_compute(times).max_error > 0.2, "the same fit without a bucket"


def test_outliers_in_repetitions_and_in_a_whole_size_count_little() -> None:
    times = measured(SLOW, SIZES, noise=0.02)
    for _, seconds in times:
        seconds[0] *= 50
    size, seconds = times[4]
    times[4] = (size, [3 * t for t in seconds])
    fit = fit_link(times)
    assert fit.model.alpha_s == pytest.approx(SLOW.alpha_s, rel=0.15)
    assert fit.model.beta_s_per_byte == pytest.approx(SLOW.beta_s_per_byte, rel=0.05)
    assert fit.max_error > 0.5, "the residuals tell of it"


def test_the_minimum_can_be_asked_for() -> None:
    times = [(m, [SLOW.seconds(m), 9.0, 9.0]) for m in SIZES]
    assert fit_link(times, of="minimum").model.seconds(10**6) == pytest.approx(SLOW.seconds(10**6), rel=1e-6)
    assert fit_link(times).model.alpha_s == pytest.approx(9.0)


@settings(deadline=None, max_examples=40)
@given(
    alpha=st.floats(1e-6, 1e-2),
    beta=st.floats(1e-12, 1e-6),
    bucket=st.sampled_from([0.0, *map(float, SIZES[:-3])]),
)
def test_any_planted_link_predicts_its_own_times(alpha: float, beta: float, bucket: float) -> None:
    model = LinkModel(alpha, beta, bucket)
    fit = fit_link(measured(model, SIZES, repeats=1))
    assert fit.max_error < 1e-6


def test_nothing_is_negative() -> None:
    falling = fit_link([(1000, [4.0]), (2000, [3.0]), (4000, [2.0]), (8000, [1.0])]).model
    through_zero = fit_link([(1000, [0.5]), (2000, [2.0]), (4000, [5.0]), (8000, [11.0])]).model
    for model in (falling, through_zero):
        assert model.alpha_s >= 0 and model.beta_s_per_byte >= 0


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ([(1.0, [1.0]), (2.0, [1.0])], "measurements of 2 sizes"),
        ([(1.0, [1.0]), (2.0, [0.0]), (3.0, [1.0])], r"0\.0 s for a size of 2"),
        ([(1.0, [1.0]), (2.0, [math.nan]), (3.0, [1.0])], "cannot have been measured"),
    ],
)
def test_measurements_that_tell_nothing_are_refused(times: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        fit_link(times)


def test_half_of_the_bandwidth() -> None:
    for model in (SLOW, FAST, LinkModel(1e-4, 1e-9, 30_000), LinkModel(1e-4, 1e-9, 60_000)):
        m = model.half_bandwidth_bytes
        assert m / model.seconds(m) == pytest.approx(model.bytes_per_s / 2)
    assert LinkModel(1e-4, 0.0).half_bandwidth_bytes == math.inf


def test_what_fits_into_a_time_takes_that_time() -> None:
    for seconds in (2e-4, 1e-3, 0.5):
        assert SLOW.seconds(SLOW.fits(seconds)) == pytest.approx(seconds)
    assert SLOW.fits(1e-4) == 0
    assert LinkModel(1e-4, 0.0).fits(1e-3) == math.inf


def test_products_have_a_line() -> None:
    model = ComputeModel(3e-4, 1e-11)
    fit = fit_compute(measured(model, (1e6, 1e7, 1e8, 1e9), noise=0.02))
    assert fit.model.alpha_s == pytest.approx(model.alpha_s, rel=0.05)
    assert fit.model.s_per_flop == pytest.approx(model.s_per_flop, rel=0.05)
    with pytest.raises(ValueError, match="two numbers"):
        fit_compute([(1.0, [1.0])])


def test_contention_from_three_times() -> None:
    assert contention(3.0, 2.0, 3.0) == 1.0
    assert contention(2.0, 2.0, 4.0) == 2.0
    assert contention(0.0903, 0.0606, 0.118) == pytest.approx(1.457, abs=1e-3)
    assert contention(3.0, 2.0, 2.9) == 1.0, "noise must not make it a gain"


def on_two_ranks(rank: int, world: int, budget_s: float) -> tuple[dict[str, LinkFit], float, float]:
    mesh = build_mesh(Topology(world, ep=2), torch.device("cpu"), nodes=NodeMap.by_size(world, 1))
    start_s = time.perf_counter()
    fits = measure_links(mesh, budget_s, SIZES[:6])
    took_s = time.perf_counter() - start_s
    return fits, took_s, measure_contention(mesh, 65536, 2, 16, 32, 64, dtype=torch.float32, budget_s=0.1)


@pytest.mark.ranks
def test_two_ranks_measure_the_same_links(gloo_pool: GlooPool) -> None:
    (mine, took_s, slower), (theirs, _, also_slower) = gloo_pool.run(on_two_ranks, 2, 0.6)
    assert mine == theirs and slower == also_slower >= 1
    assert set(mine) == {"flat", "across", "gradients"}, "a node has one rank, so nothing is inside"
    for name, fit in mine.items():
        assert fit.ranks == 2 and len(fit.samples) >= 4
        assert fit.what == ("reduce_scatter" if name == "gradients" else "all_to_all")
        assert [size for size, _ in fit.samples] == list(SIZES[: len(fit.samples)])
        assert fit.model.alpha_s > 0 or fit.model.beta_s_per_byte > 0
    assert took_s < 5


def alone(rank: int, world: int) -> dict[str, LinkFit]:
    return measure_links(build_mesh(Topology(1), torch.device("cpu")), 0.1)


@pytest.mark.ranks
def test_one_rank_has_no_links(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(alone, 1) == [{}]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for one another on a busy machine take any time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_experts_take_longer_for_more_rows(one_thread: None) -> None:
    rows = (16, 4096)
    shape: dict[str, Any] = {"dtype": torch.float32, "device": torch.device("cpu"), "kernels": "torch"}
    forward, backward = measure_experts(2, 64, 64, rows, budget_s=0.1, **shape)
    assert [flops for flops, _ in forward.samples] == [6.0 * 64 * 64 * r for r in rows]
    assert [flops for flops, _ in backward.samples] == [12.0 * 64 * 64 * r for r in rows]
    for fit in (forward, backward):
        assert fit.samples[-1][1] > fit.samples[0][1]
        assert fit.model.s_per_flop > 0
