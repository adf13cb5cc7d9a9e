"""First rows of routers: their spread, what repeats, and centroids from files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moefold.moe.errors import DataError
from moefold.moe.upcycle import UpcycleOptions, upcycle_parts
from moefold.moe.upcycle.router_init import router
from upcycle_oracle import Values, arrays, dense_config, dense_parts, gap


def rows(copies: int, pieces: int = 1, layer: int = 0, **options: Any) -> Values:
    method = {"method": "virtual_groups", "granularity": pieces, "top_k": pieces * 2} if pieces > 1 else {}
    chosen = UpcycleOptions(num_experts=copies * pieces, **method, **options)
    matrix = router(layer, chosen, 64, copies, pieces)
    assert matrix.dtype == "F32" and matrix.shape == (copies * pieces, 64)
    return matrix.rows().astype(np.float64)


@pytest.mark.parametrize("std", [0.02, 1.0])
def test_normal_rows(std: float) -> None:
    found = rows(64, router_std=std)
    assert found.std() == pytest.approx(std, rel=0.05) and abs(found.mean()) < 0.06 * std
    assert np.abs(found - rows(64, layer=1, router_std=std)).max() > std, "each layer has its own"


def test_rows_are_repeated_within_a_copy() -> None:
    repeated, apart = rows(4, 3), rows(4, 3, router_init="normal")
    assert (repeated == rows(4, 3, router_init="repeated")).all()
    assert (repeated == repeated[::3].repeat(3, axis=0)).all() and len(np.unique(repeated, axis=0)) == 4
    assert len(np.unique(apart, axis=0)) == 12


def test_zeros_and_noise_on_them() -> None:
    assert not rows(8, router_init="zeros").any()
    noisy = rows(8, 2, router_init="zeros", router_noise_std=0.5)
    assert noisy.std() == pytest.approx(0.5, rel=0.15) and (noisy[::2] == noisy[1::2]).all()


def test_centroids_of_one_file_or_of_each_layer(tmp_path: Path) -> None:
    given = np.random.default_rng(0).normal(3, 5, (4, 64))
    np.save(tmp_path / "all.npy", given)
    np.savez(tmp_path / "each.npz", **{"layers.0": given, "layers.7": 2 * given[::-1]})
    options = {"router_init": "centroids", "centroids": str(tmp_path / "all.npy")}
    found = rows(4, **options)
    np.testing.assert_allclose(np.sqrt(np.square(found).mean(axis=1)), 0.02, rtol=1e-6)
    np.testing.assert_allclose(found / found[:, :1], given / given[:, :1], rtol=1e-5)
    assert (found == rows(4, layer=5, **options)).all()
    raw = options | {"centroids": str(tmp_path / "each.npz"), "router_std": 0.0}
    assert (rows(4, **raw) == given.astype(np.float32)).all()
    assert (rows(4, layer=7, **raw) == (2 * given[::-1]).astype(np.float32)).all()
    with pytest.raises(DataError, match=r"each\.npz has no array 'layers\.1'; it holds layers\.0, layers\.7"):
        rows(4, layer=1, **raw)
    assert (rows(4, 2, **options)[::2] == found).all() and (rows(4, 2, **options)[1::2] == found).all()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((3, 64)), r"shape \[3, 64\], but layer 0 needs floating-point rows of shape \[4, 64\]"),
        (np.ones((4, 64), np.int32), "int32"),
        (np.full((4, 64), np.inf), "not finite"),
        (np.diag(np.arange(4.0)) @ np.ones((4, 64)), "row 0 for layer 0 is 0"),
        (b"x" * 200, "cannot be read as .npy or .npz"),
        (b"PK\x03\x04", "cannot be read"),
        (None, "cannot be read"),
    ],
    ids=["count", "integers", "infinite", "zero", "text", "zip", "absent"],
)
def test_centroids_that_do_not_fit_are_refused(given: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.npy"
    if isinstance(given, bytes):
        path.write_bytes(given)
    elif given is not None:
        np.save(path, given)
    with pytest.raises(DataError, match=message):
        rows(4, router_init="centroids", centroids=str(path))


def test_copies_with_centroids_keep_the_function(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(3, 8)))
    config = dense_config()
    parts = dense_parts(config)
    for method, experts in (("copy", 3), ("virtual_groups", 6)):
        sizes = {"granularity": 2} if experts == 6 else {}
        options: dict[str, Any] = {"method": method, "num_experts": experts, "router_init": "centroids", **sizes}
        made = upcycle_parts([(config, parts)], UpcycleOptions(**options, centroids=str(tmp_path / "rows.npy")))
        assert arrays(made[1])["layers.1.moe.router"].any()
        assert gap((config, parts), made) < 1e-12
