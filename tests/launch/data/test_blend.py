"""Which sample is what: bijective, in proportion, every window once per epoch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefold.launch.data.blend import Blend, make_key, period_counts, permute_index
from moefold.moe.errors import DataError

WEIGHTS = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=8)


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_bijective(n, key):
    assert np.array_equal(np.sort(permute_index(np.arange(n), n, key)), np.arange(n))


@given(n=st.integers(2**40, 2**62), data=st.data())
def test_permutation_of_huge_ranges_stays_inside_and_distinct(n, data):
    i = np.unique(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=20)))
    out = permute_index(i, n, 7)
    assert out.min() >= 0 and out.max() < n and len(np.unique(out)) == len(i)


def test_permutation_of_one_index_agrees_with_many():
    many = permute_index(np.arange(100), 100, 5)
    assert [int(permute_index(i, 100, 5)[0]) for i in range(100)] == many.tolist()


def test_permutation_takes_a_key_per_index():
    keys = make_key(3, np.arange(50))
    both = permute_index(np.full(50, 4), 17, keys)
    assert both.tolist() == [int(permute_index(4, 17, int(k))[0]) for k in keys]


@pytest.mark.parametrize("n", [2, 5, 24, 1000])
def test_permutation_looks_uniform(n):
    """Over 4000 keys, where index 0 and index n-1 go: chi-square within 6 standard deviations of its mean."""
    keys = make_key(11, np.arange(4000))
    for i in (0, n - 1):
        seen = np.bincount(permute_index(np.full(4000, i), n, keys), minlength=n)
        chi2 = ((seen - 4000 / n) ** 2 / (4000 / n)).sum()
        assert abs(chi2 - (n - 1)) < 6 * np.sqrt(2 * (n - 1))


def test_neighbours_are_scattered():
    out = permute_index(np.arange(10_000), 10_000, 1)
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.05


@pytest.mark.parametrize("i", [-1, 10, 11])
def test_permutation_refuses_what_is_outside(i):
    with pytest.raises(ValueError, match=r"\[0, 10\)"):
        permute_index(i, 10, 0)


def test_keys_depend_on_every_part_and_their_order():
    keys = [int(make_key(*p)[0]) for p in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (-1, 0)]]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("weights", "counts"),
    [([1], [1]), ([0.85, 0.15], [17, 3]), ([1, 1, 1], [1, 1, 1]), ([2, 1], [2, 1]), ([1, 1e-9], [4095, 1])],
)
def test_period(weights, counts):
    assert period_counts(weights).tolist() == counts


@given(WEIGHTS)
@settings(max_examples=50)
def test_period_follows_the_weights(weights):
    counts = period_counts(weights)
    period, share = counts.sum(), np.array(weights) / np.sum(weights)
    assert period <= 4096 and counts.min() >= 1
    # each source that is rounded up from 0 to 1 may take one sample from the largest
    assert np.abs(counts - share * period).max() <= len(weights)


def test_too_many_sources():
    with pytest.raises(DataError, match="9 sources, but at most 8"):
        period_counts([1] * 9, max_period=8)


@pytest.mark.parametrize("weights", [[0.85, 0.15], [0.5, 0.3, 0.2], [np.pi, 1.0]], ids=str)
def test_every_prefix_is_close_to_the_weights(weights):
    source, _, _ = Blend(weights, [50] * len(weights), 0).locate(np.arange(10_000))
    for s, share in enumerate(np.array(weights) / np.sum(weights)):
        drift = np.abs(np.cumsum(source == s) - share * np.arange(1, 10_001))
        assert drift.max() < 3


@pytest.mark.parametrize("windows", [(1, 1), (7, 3), (100, 13)], ids=str)
def test_an_epoch_covers_each_window_once(windows):
    source, window, epoch = Blend([0.7, 0.3], windows, 5).locate(np.arange(5000))
    for s, n in enumerate(windows):
        mine = source == s
        assert np.array_equal(epoch[mine], np.arange(mine.sum()) // n)
        for e in range(epoch[mine].max()):
            assert np.array_equal(np.sort(window[mine & (epoch == e)]), np.arange(n))


def test_epochs_seeds_and_sources_have_their_own_order():
    def order(seed, source, epoch):
        s, w, e = Blend([1, 1], [64, 64], seed).locate(np.arange(300))
        return tuple(w[(s == source) & (e == epoch)])

    assert len({order(0, 0, 0), order(0, 0, 1), order(0, 1, 0), order(1, 0, 0)}) == 4


def test_a_sample_does_not_depend_on_what_was_asked_before():
    blend = Blend([3, 2], [11, 5], 9)
    source, window, epoch = blend.locate(np.arange(200))
    for i in (199, 0, 57):
        assert [int(x[0]) for x in Blend([3, 2], [11, 5], 9).locate(i)] == [source[i], window[i], epoch[i]]


def test_epochs_counts_what_was_drawn():
    blend = Blend([0.85, 0.15], [10, 4], 0)
    for n in (0, 1, 19, 20, 333):
        source = blend.locate(np.arange(n))[0]
        assert np.allclose(blend.epochs(n), np.bincount(source, minlength=2) / [10, 4])
