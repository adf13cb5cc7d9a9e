"""Parts depend on seed and name only, not on how they are read, and are never in memory as a whole."""

from __future__ import annotations

import os
import tracemalloc
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moefold.moe.errors import CheckpointError
from moefold.moe.hf.matrix import Constant, FileRange, Given, Matrix, Stored
from moefold.moe.hf.parts import part_shapes
from moefold.moe.upcycle import UpcycleOptions, upcycle_parts
from moefold.moe.upcycle.choices import ByChance, Picked, Recent, Renewed
from moefold.moe.upcycle.draws import STATISTIC_ROWS, choose, moments, permutation
from moefold.moe.upcycle.methods.flex_olmo import same_values
from upcycle_oracle import dense_config, dense_parts

RECIPES: list[dict[str, Any]] = [
    {"method": "virtual_groups", "num_experts": 4, "granularity": 2, "shuffle": True, "pad_multiple": 8},
    {"method": "drop", "num_experts": 2},
    {"method": "drop", "num_experts": 2, "per_matrix": True, "scaling_factor": 3.0},
    {"method": "noise", "num_experts": 2, "num_shared_experts": 1},
    {"method": "dense_shared", "num_experts": 3, "shared_gate": True},
    {"method": "split", "num_experts": 4},
    {"method": "split", "num_experts": 4, "split_by": "weights"},
    {"method": "merge"},
    {"method": "flex_olmo", "trust_frozen": True},
]


def build(recipe: dict[str, Any], seed: int = 7) -> dict[str, Matrix]:
    config = replace(dense_config(), num_layers=1)
    several = recipe["method"] in ("merge", "flex_olmo")
    models = [(config, dense_parts(config, number)) for number in range(2 if several else 1)]
    return upcycle_parts(models, UpcycleOptions(**recipe, seed=seed))[1]


def stored(matrix: Matrix, dtype: str, bounds: list[int]) -> bytes:
    """All bytes, read from one bound to the next."""
    return b"".join(bytes(c) for a, b in pairwise(bounds) for c in matrix.chunks(dtype, a, b))  # type: ignore[arg-type]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: "-".join(str(v) for v in r.values()))
def test_bytes_do_not_depend_on_how_they_are_read(recipe: dict[str, Any]) -> None:
    first, second = build(recipe), build(recipe)
    for name, matrix in first.items():
        n, cols = matrix.num_rows, matrix.cols
        whole = stored(matrix, "F32", [0, n])
        odd = sorted({0, n, *range(n % 3, n, 5)})
        assert stored(second[name], "F32", odd) == whole, f"{name} in steps"
        backwards = [second[name].block(i, i + 1, cols // 3, cols, "F32") for i in reversed(range(n))]
        assert (np.concatenate(backwards[::-1]) == matrix.block(0, n, 0, cols, "F32")[:, cols // 3 :]).all(), f"{name} in windows"
        assert matrix == second[name], f"{name} is made of the same"


def test_another_seed_draws_anew() -> None:
    for recipe in RECIPES:
        one, other = build(recipe), build(recipe, seed=8)
        assert not np.array_equal(one["layers.0.moe.router"].rows(), other["layers.0.moe.router"].rows())
        experts = [n for n in one if ".experts." in n]
        same = all(np.array_equal(one[n].rows(), other[n].rows()) for n in experts)
        copied = recipe["method"] in ("dense_shared", "merge", "flex_olmo")
        assert same == copied, recipe


def test_layers_and_experts_are_drawn_apart() -> None:
    config = dense_config()
    parts = dense_parts(config)
    parts |= {f"layers.1.ffn.{m}": parts[f"layers.0.ffn.{m}"] for m in ("gate", "up", "down")}
    for method in ("drop", "noise"):
        made = upcycle_parts([(config, parts)], UpcycleOptions(method=method, num_experts=2))[1]  # type: ignore[arg-type]
        drawn = [made[f"layers.{i}.moe.experts.{e}.gate"].rows() for i in range(2) for e in range(2)]
        assert all(not np.array_equal(a, b) for n, a in enumerate(drawn) for b in drawn[:n])


def test_permutations_are_those_of_every_numpy() -> None:
    """Written down, as a library that draws differently would change all models."""
    assert permutation(8, 0, "layers.0.moe.split").tolist() == [4, 7, 5, 0, 6, 3, 2, 1]
    assert choose(100, 0, 5, 0, "layers.0.moe.experts.0.drop").tolist() == [3, 22, 39, 62, 72]
    assert sorted(permutation(1000, 3, "x").tolist()) == list(range(1000))


@pytest.mark.parametrize("rows", [1, STATISTIC_ROWS, 2 * STATISTIC_ROWS + 7])
def test_moments_are_those_of_all_elements(rows: int) -> None:
    """Also where the mean is large against the deviation, in which sums of squares lose everything."""
    values = 1e6 + np.random.default_rng(0).normal(size=(rows, 5)) + np.arange(rows)[:, None] / 100
    mean, std = moments(Given(values))
    exact = values - 1e6
    assert mean == pytest.approx(1e6 + exact.mean(), rel=1e-14)
    assert std == pytest.approx(exact.std(), rel=1e-9)
    assert moments(Given(np.zeros((4, 0)))) == (0.0, 0.0)


def test_untouched_weights_stay_ranges_of_the_file(tmp_path: Path) -> None:
    """Copies, and pieces' rows of gate and up: copied without being decoded. Nothing is read when parts are made."""
    config, offset = dense_config(), 0
    parts: dict[str, Matrix] = {}
    for name, shape in part_shapes(config).items():
        parts[name] = Stored(path=tmp_path / "absent", offset=offset, shape=shape, dtype="BF16")
        offset += parts[name].nbytes()
    options = UpcycleOptions(method="virtual_groups", granularity=2, num_experts=4, num_shared_experts=1)
    _, made = upcycle_parts([(config, parts)], options)
    for name, matrix in made.items():
        ranges = all(isinstance(chunk, FileRange) for chunk in matrix.chunks("BF16")) if "down" not in name else None
        if "router" not in name and "down" not in name:
            assert ranges, name
    third = made["layers.1.moe.experts.3.gate"]
    (chunk,) = third.chunks("BF16")
    assert chunk == FileRange(tmp_path / "absent", parts["layers.1.ffn.gate"].offset + 16 * 8 * 2, 8 * 8 * 2)  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="absent cannot be read"):
        list(made["layers.1.moe.experts.3.down"].chunks("BF16"))


@pytest.mark.parametrize(
    "recipe",
    [
        {"method": "drop", "num_experts": 2},
        {"method": "noise", "num_experts": 2, "noise_share": 1.0},
        {"method": "virtual_groups", "num_experts": 64, "granularity": 64, "top_k": 64, "shuffle": True},
        {"method": "split", "num_experts": 64},
    ],
    ids=lambda r: str(r["method"]),
)
def test_no_matrix_is_ever_whole_in_memory(recipe: dict[str, Any], tmp_path: Path) -> None:
    """One expert of a matrix that would take 64 MiB decoded, streamed."""
    config = replace(dense_config(8192, dim=2048, head_dim=8), num_layers=1)
    path = tmp_path / "zeros"
    path.touch()
    os.truncate(path, 8192 * 2048 * 2)
    parts: dict[str, Matrix] = {
        name: Stored(path=path, offset=0, shape=shape, dtype="BF16") for name, shape in part_shapes(config).items()
    }
    tracemalloc.start()
    _, made = upcycle_parts([(config, parts)], UpcycleOptions(**recipe))
    for which in ("gate", "down"):
        matrix = made[f"layers.0.moe.experts.1.{which}"]
        # what is drawn takes its time: a part of it
        stop = matrix.num_rows if recipe["method"] in ("virtual_groups", "split") else 64
        for _ in matrix.chunks("BF16", 0, stop):
            pass
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 32 << 20, f"{peak >> 20} MiB"


def test_frozen_weights_are_compared_by_value() -> None:
    zero, other = Constant((3, 4), 0.0), Constant((3, 4), 1.0)
    assert same_values(zero, Constant((3, 4), -0.0)) and not same_values(zero, other)
    assert not same_values(zero, Constant((4, 3), 0.0))
    assert not same_values(Constant((1, 1), float("nan")), Constant((1, 1), float("nan"), "BF16"))


def test_renewed_matrices_say_what_they_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    source = Stored(path=path, offset=0, shape=(4, 2), dtype="F32")
    half, other = (ByChance(4, 0, 0, 2, 0, name, Recent()) for name in "ab")
    assert Renewed(source, half, 0, 0, "x").sources() == {path}
    assert Renewed(source, half, 0, 0, "x") == Renewed(source, ByChance(4, 0, 0, 2, 0, "a", Recent()), 0, 0, "x")
    assert Renewed(source, half, 0, 0, "x") != Renewed(source, other, 0, 0, "x")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Renewed(source, half, 0, 0, "x").rows()


def test_lists_of_neurons_are_not_kept() -> None:
    """Two of a layer at most, however many experts have been read."""
    recent, values = Recent(), Given(np.arange(40.0).reshape(20, 2))
    parts = [Picked(values, ByChance(20, 0, 4 * i, 4 * i + 4, 0, "x", recent), 0) for i in range(5)]
    seen = np.concatenate([part.rows() for part in parts])
    assert sorted(seen[:, 0].tolist()) == list(range(0, 40, 2)) and len(recent.kept) == 2
    assert (parts[0].rows() == seen[:4]).all()
