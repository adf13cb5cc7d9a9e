"""Load statistics on counts made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from moefold.moe.stats import counts_by_domain, drop_fraction, load_ratio, load_stats

EVEN, ONE, HALF, NONE = [5, 5, 5, 5], [0, 20, 0, 0], [10, 10, 0, 0], [0, 0, 0, 0]
SKEWED = [1, 2, 3, 10]


def test_load_ratio_is_1_when_balanced_and_E_when_collapsed() -> None:
    ratios = load_ratio(torch.tensor([EVEN, ONE, SKEWED, NONE]))
    assert ratios.dtype == torch.float64
    assert ratios.tolist() == [[1, 1, 1, 1], [0, 4, 0, 0], [0.25, 0.5, 0.75, 2.5], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("counts", "cv", "max_violation", "min_ratio", "dead_frac", "entropy"),
    [
        (EVEN, 0, 0, 1, 0, 1),
        (ONE, math.sqrt(3), 3, 0, 0.75, 0),
        (HALF, 1, 1, 0, 0.5, 0.5),
        (
            SKEWED,
            math.sqrt((3**2 + 2**2 + 1**2 + 6**2) / 4) / 4,
            1.5,
            0.25,
            0,
            -sum(n / 16 * math.log(n / 16, 4) for n in SKEWED),
        ),
        (NONE, 0, 0, 0, 1, 1),
        ([7], 0, 0, 1, 0, 1),
    ],
    ids=["even", "one-takes-all", "half-dead", "skewed", "no-tokens", "one-expert"],
)
def test_definitions(
    counts: list[int], cv: float, max_violation: float, min_ratio: float, dead_frac: float, entropy: float
) -> None:
    stats = load_stats(torch.tensor(counts))
    got = [stats.cv, stats.max_violation, stats.min_ratio, stats.dead_frac, stats.entropy]
    assert [x.item() for x in got] == pytest.approx([cv, max_violation, min_ratio, dead_frac, entropy], abs=1e-14)


def test_layers_are_judged_one_by_one() -> None:
    stats = load_stats(torch.tensor([ONE, EVEN, HALF]))
    assert stats.max_violation.tolist() == [3, 0, 1]
    assert stats.dead_frac.tolist() == [0.75, 0, 0.5]


def test_large_counts_keep_their_digits() -> None:
    # 2^53 + 1 is no float64, but ratios stay right to rounding
    big = 1 << 40
    assert load_stats(torch.tensor([big, big + 1])).max_violation.item() == pytest.approx(0.5 / big, rel=1e-3)


def test_drop_fraction_is_of_choices() -> None:
    assert drop_fraction(torch.tensor([5, 0, 0]), torch.tensor([EVEN, ONE, NONE])).tolist() == [0.25, 0, 0]


def test_counts_by_domain() -> None:
    counts_LBE = torch.tensor([[[1, 0], [2, 1], [0, 5]], [[9, 0], [0, 0], [1, 1]]])
    by_domain = counts_by_domain(counts_LBE, torch.tensor([2, 0, 2]), 4)
    assert by_domain.tolist() == [[[2, 1], [0, 0], [1, 5], [0, 0]], [[0, 0], [0, 0], [10, 1], [0, 0]]]
    assert torch.equal(by_domain.sum(1), counts_LBE.sum(1))
