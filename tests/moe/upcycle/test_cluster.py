"""Balanced k-means: sizes are kept, planted clusters are found, exchanges cannot improve it, and rounding cannot change it."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moefold.moe.errors import DataError
from moefold.moe.hf.matrix import Given, Matrix
from moefold.moe.upcycle import UpcycleOptions, upcycle_parts
from moefold.moe.upcycle.cluster import UNIT, Clusters, assign, balanced_kmeans, matrix_features, recorded_features
from moefold.moe.upcycle.draws import permutation
from upcycle_oracle import arrays, dense_config, dense_parts

GROUPS, EACH = 4, 6


def planted(columns: int, noise: float = 0.05) -> tuple[Any, Any]:
    """(rows [24, columns] around four directions, the direction of each), shuffled."""
    draw = np.random.default_rng(2)
    group = draw.permutation(np.arange(GROUPS).repeat(EACH))
    lengths = draw.uniform(0.1, 10, (GROUPS * EACH, 1))
    return lengths * (np.eye(GROUPS, columns)[group] + noise * draw.normal(size=(GROUPS * EACH, columns))), group


def neurons_of(parts: dict[str, Matrix], dense: dict[str, Matrix]) -> list[set[int]]:
    """The neurons of layer 0 that each expert has, told by their rows of up."""
    rows = [tuple(row) for row in arrays(dense)["layers.0.ffn.up"].tolist()]
    experts = [arrays(parts)[f"layers.0.moe.experts.{e}.up"].tolist() for e in range(GROUPS)]
    return [{rows.index(tuple(row)) for row in expert} for expert in experts]


@pytest.mark.parametrize("split_by", ["weights", "activations"])
def test_neurons_that_belong_together_come_together(split_by: str, tmp_path: Path) -> None:
    config = dense_config(GROUPS * EACH)
    dense = dense_parts(config)
    options: dict[str, Any] = {"method": "split", "num_experts": GROUPS, "split_by": split_by}
    if split_by == "weights":
        rows, group = planted(8)
        dense["layers.0.ffn.gate"] = Given(rows)
    else:
        rows, group = planted(50)
        for layer in range(2):
            np.save(tmp_path / f"act-{layer}.npy", np.ascontiguousarray(rows.T.astype(np.float32)))
        options["activations"] = str(tmp_path / "act-{layer}.npy")
    found = [neurons_of(upcycle_parts([(config, dense)], UpcycleOptions(**options, seed=s))[1], dense) for s in range(6)]
    wanted = sorted(sorted(np.flatnonzero(group == g).tolist()) for g in range(GROUPS))
    assert all(len(expert) == EACH for experts in found for expert in experts)
    hits = [sorted(map(sorted, experts)) == wanted for experts in found]
    assert sum(hits) >= 3, "k-means depends on where it starts, but finds clusters that are far apart from most starts"
    if split_by == "activations":
        sources = upcycle_parts([(config, dense)], UpcycleOptions(**options))[1]["layers.1.moe.experts.0.up"].sources()
        assert sources == {tmp_path / "act-1.npy"}


def test_shared_neurons_are_not_dealt_out() -> None:
    gate = Given(np.random.default_rng(0).normal(size=(24, 8)))
    members = Clusters(gate, None, 4, (7, 7, 6), 20, 0, "x").members
    assert [len(m) for m in members] == [7, 7, 6]
    assert sorted(np.concatenate(members).tolist()) == list(range(4, 24))


@pytest.mark.parametrize("seed", range(4))
def test_no_exchange_of_two_improves_an_assignment(seed: int) -> None:
    sizes = (3, 4, 2, 3)
    closeness = np.random.default_rng(seed).integers(-50, 50, (12, 4))
    labels = assign(closeness, sizes)
    assert tuple(np.bincount(labels, minlength=4)) == sizes

    def total(chosen: Any) -> int:
        return int(closeness[np.arange(12), chosen].sum())

    for i, j in combinations(range(12), 2):
        swapped = labels.copy()
        swapped[[i, j]] = labels[[j, i]]
        assert total(swapped) <= total(labels)
    again = assign(closeness, sizes, np.random.default_rng(9).permutation(np.arange(4).repeat(sizes)))
    assert tuple(np.bincount(again, minlength=4)) == sizes


def test_two_clusters_are_assigned_best() -> None:
    """With two clusters, exchanges of pairs reach the best there is; against all ways."""
    closeness = np.random.default_rng(1).integers(-50, 50, (8, 2))
    ways = [sum(closeness[i, int(i in chosen)] for i in range(8)) for chosen in combinations(range(8), 5)]
    labels = assign(closeness, (3, 5))
    assert closeness[np.arange(8), labels].sum() == max(ways)


def test_steps_never_make_it_worse() -> None:
    features = matrix_features(Given(np.random.default_rng(3).normal(size=(60, 16))), 0, 60)
    spread = []
    for steps in (1, 2, 5, 50):
        labels = balanced_kmeans(features, (20, 20, 20), steps, permutation(60, 0, "x"))
        groups = [features[labels == k].astype(np.float64) for k in range(3)]
        spread.append(sum(np.square(g - g.mean(axis=0)).sum() for g in groups))
    assert spread[0] > spread[-1] and spread == sorted(spread, reverse=True)


def test_features_are_directions_in_whole_numbers() -> None:
    """So that every product of two, in any order of summation, is the same number."""
    rows = np.random.default_rng(4).normal(size=(9, 700)) * np.logspace(-8, 8, 9)[:, None]
    rows[3] = 0
    features = matrix_features(Given(rows), 0, 9).astype(np.float64)
    lengths = np.linalg.norm(features, axis=1)
    assert (features[3] == 0).all() and lengths[[0, 1, 2, 4]] == pytest.approx(UNIT, rel=1e-3)
    closeness = features @ features.T
    assert (closeness == sum(np.outer(column, column) for column in features.T[::-1])).all()


def test_recorded_activations_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moefold.moe.upcycle import cluster

    values = np.random.default_rng(5).normal(size=(37, 24)).astype(np.float32)
    np.save(tmp_path / "a.npy", values)
    whole = recorded_features(tmp_path / "a.npy", 24, 4, 24)
    monkeypatch.setattr(cluster, "_BLOCK_BYTES", 5 * 24 * 4)
    assert (recorded_features(tmp_path / "a.npy", 24, 4, 24) == whole).all()
    assert (whole == matrix_features(Given(values.T.astype(np.float64)), 4, 24)).all()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros((5, 23), np.float32), r"shape \[5, 23\], but must be floating-point of shape \[tokens, 24\]"),
        (np.zeros((5, 24), np.int64), "int64"),
        (np.full((5, 24), np.nan), "not finite"),
        (np.asfortranarray(np.zeros((5, 24))), "column order"),
        (b"text", "not a .npy file"),
        (None, "cannot be read"),
    ],
    ids=["width", "integers", "nan", "fortran", "text", "absent"],
)
def test_recordings_that_do_not_fit_are_refused(values: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    if isinstance(values, bytes):
        path.write_bytes(values)
    elif values is not None:
        np.save(path, values)
    with pytest.raises(DataError, match=message):
        recorded_features(path, 24, 0, 24)


def test_a_truncated_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.ones((9, 24)))
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="truncated"):
        recorded_features(path, 24, 0, 24)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("seen/activations", "seen/activations/layers.7.npy"),
        ("seen/", "seen/layers.7.npy"),
        ("a-{layer}.npy", "a-7.npy"),
        (None, None),
    ],
)
def test_recordings_are_a_folder_or_files_of_a_pattern(given: str | None, found: str | None) -> None:
    recorded: dict[str, Any] = {} if given is None else {"split_by": "activations", "activations": given}
    assert UpcycleOptions(method="split", num_experts=4, **recorded).activations_of(7) == found
