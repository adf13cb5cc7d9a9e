"""First rows of a router. Always float32, whatever the experts are stored as: 16-bit logits tie where routing must not."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..errors import DataError
from ..hf.matrix import Constant, Given, Matrix, Normal, RepeatRows
from .options import UpcycleOptions


def router(layer: int, options: UpcycleOptions, dim: int, copies: int, pieces: int, of: str = "moe") -> Matrix:
    """Rows [copies * pieces, dim] of the router of a layer; those of one copy's pieces are neighbours.

    They are the same within a copy, so that its pieces are chosen together and weigh the same (virtual groups, arXiv
    2410.07524), unless router_init = "normal". of: "moe" or "attention", which are drawn apart. Raises DataError for centroids
    that do not fit.
    """
    name, kind = f"layers.{layer}.{of}.router", options.router_init
    if kind == "normal":
        return Normal((copies * pieces, dim), options.router_std, options.seed, name)
    if kind == "zeros" and not options.router_noise_std:
        return Constant((copies * pieces, dim), 0.0, "F32")
    if kind == "centroids":
        rows: Matrix = Given(centroids(options, layer, copies, dim))
    else:
        std = options.router_noise_std if kind == "zeros" else options.router_std
        rows = Normal((copies, dim), std, options.seed, name)
    return rows if pieces == 1 else RepeatRows(rows, pieces)


def centroids(options: UpcycleOptions, layer: int, count: int, dim: int) -> npt.NDArray[np.float32]:
    """Rows [count, dim] for one layer, each brought to a root mean square of router_std unless that is 0.

    Raises DataError for a file that is missing, of another shape, without this layer, or with values that are not finite.
    """
    path = Path(options.centroids or "")
    rows = _load(path, layer)
    if rows.shape != (count, dim) or rows.dtype.kind != "f":
        what = f"{rows.dtype} of shape {list(rows.shape)}, but layer {layer} needs floating-point rows of shape [{count}, {dim}]"
        raise DataError(f"upcycle.centroids: {path} holds {what}, one for each expert or copy")
    rows = rows.astype(np.float64)
    if not np.isfinite(rows).all():
        raise DataError(f"upcycle.centroids: {path} has values for layer {layer} that are not finite")
    if options.router_std:
        sizes = np.sqrt(np.square(rows).mean(axis=1, keepdims=True))
        if not sizes.all():
            row = int(np.flatnonzero(sizes == 0)[0])
            what = (
                f"row {row} for layer {layer} is 0 and cannot be brought to router_std; set router_std = 0 to take rows as given"
            )
            raise DataError(f"upcycle.centroids: {path}: {what}")
        rows = rows * (options.router_std / sizes)
    return rows.astype(np.float32)


def _load(path: Path, layer: int) -> npt.NDArray[np.generic]:
    key = f"layers.{layer}"
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            if key in loaded.files:
                return np.asarray(loaded[key])
            held = ", ".join(sorted(loaded.files)) or "nothing"
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"upcycle.centroids: {path} cannot be read as .npy or .npz: {error}") from error
    raise DataError(f"upcycle.centroids: {path} has no array {key!r}; it holds {held}")
