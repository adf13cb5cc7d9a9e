"""The files of a recording: a folder that appears when it is complete, centroids, activations of any size. Imports no torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from zipfile import ZipFile, ZipInfo

import numpy as np
import numpy.typing as npt

from ...moe.errors import CheckpointError
from ...moe.hf.journal import sync_folder
from ...moe.hf.lock import locked
from .progress import size

JSON, CENTROIDS, ACTIVATIONS, LOCK = "record.json", "centroids.npz", "activations", "record.lock"

Values = npt.NDArray[Any]


def check_out(out: Path) -> None:
    """Raise CheckpointError where a recording would be written over something, or over another that is under way."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        done = " (a recording that is complete)" if (out / JSON).is_file() else ""
        raise CheckpointError(f"{out} exists and is not an empty folder{done}: choose another, or remove it")
    aside = _aside(out)
    if aside.exists() and not (aside / LOCK).is_file():
        raise CheckpointError(f"{aside}, where {out.name} is to be made, is no recording that was interrupted: move it away")


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """OUT.partial to write into, which becomes OUT at the end, or is removed where that is not reached. What a killed process has
    left there is removed first.

    Raises CheckpointError where another process writes there, and for errors of the file system, such as a full disk.
    """
    aside = _aside(out)
    try:
        with locked(aside, LOCK):
            try:
                _empty(aside)
                yield aside
            except BaseException:
                shutil.rmtree(aside)
                raise
            # record.json is what makes it a recording: the folder gets its name after it, without the lock
            (aside / LOCK).unlink()
            sync_folder(aside)
            aside.rename(out)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or aside} cannot be written: {error.strerror or error}; nothing was left there"
        ) from error
    sync_folder(out.parent)


def _aside(out: Path) -> Path:
    return out.with_name(out.name + ".partial")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()


def write_centroids(folder: Path, rows: Mapping[int, Values]) -> None:
    """centroids.npz of one array for each layer, as `router_init.centroids` reads it."""
    with (folder / CENTROIDS).open("wb") as file:
        with ZipFile(file, "w") as archive:
            for layer, rows_ED in rows.items():
                # an entry made of a bare ZipInfo carries no time of day, so that the bytes are those of every run
                with archive.open(ZipInfo(f"layers.{layer}.npy"), "w", force_zip64=True) as entry:
                    np.lib.format.write_array(entry, rows_ED, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())


class ActivationFiles:
    """activations/layers.N.npy [tokens, neurons] for each layer, written block after block, one layer at a time.

    Not through memory maps, whose process a full disk kills. Raises CheckpointError where there is too little room from the
    start, and for values that the type cannot hold.
    """

    def __init__(self, folder: Path, layers: Sequence[int], tokens: int, neurons: int, dtype: str):
        self.folder, self.dtype, self.shape = folder / ACTIVATIONS, np.dtype(dtype), (tokens, neurons)
        self._layer, self._rows = -1, 0
        self._file: IO[bytes] | None = None
        wanted = len(layers) * tokens * neurons * self.dtype.itemsize
        free = shutil.disk_usage(folder).free
        if wanted > free:
            ways = "fewer activations_tokens, fewer layers or float16 need less"
            raise CheckpointError(f"activations need {size(wanted)}, but {folder.parent} has room for {size(free)}; {ways}")
        if tokens:
            self.folder.mkdir()

    def write(self, layer: int, values: Values) -> None:
        """The next rows of a layer; its file is closed with the last one."""
        with np.errstate(over="ignore"):
            stored = values.astype(self.dtype)
        if not np.isfinite(stored).all():
            what = "are not finite: the model's weights are damaged, or of a wrong type"
            if np.isfinite(values).all():
                what = f"reach {np.abs(values).max():g}, too large for {self.dtype}; set activations_dtype = 'float32'"
            raise CheckpointError(f"activations of layer {layer} {what}")
        if self._file is None:
            self._layer, self._rows = layer, 0
            self._file = (self.folder / f"layers.{layer}.npy").open("wb")
            head = {"descr": self.dtype.newbyteorder("<").str, "fortran_order": False, "shape": self.shape}
            np.lib.format.write_array_header_1_0(self._file, head)
        assert layer == self._layer and values.shape[1] == self.shape[1]
        self._file.write(stored.tobytes())
        self._rows += len(values)
        if self._rows >= self.shape[0]:
            assert self._rows == self.shape[0]
            self._file.flush()
            os.fsync(self._file.fileno())
            self.close()

    def close(self) -> None:
        """Let go of a file that is not complete."""
        if self._file is not None:
            self._file.close()
            self._file = None
