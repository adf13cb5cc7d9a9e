"""Lazy matrices against numpy: every block, every chunk, in any steps; what is untouched keeps its bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefold.moe.errors import CheckpointError
from moefold.moe.hf.codec import carrier, convert
from moefold.moe.hf.matrix import (
    Cols,
    Constant,
    FileRange,
    Given,
    Joined,
    Matrix,
    Mean,
    Normal,
    Padded,
    RepeatRows,
    Replaced,
    Reshaped,
    Rows,
    Scaled,
    Stacked,
    Stored,
    WeightedSum,
)

A, B = np.arange(35, dtype="f4").reshape(7, 5) - 11, np.linspace(-3, 4, 35, dtype="f4").reshape(7, 5)
V = np.arange(6, dtype="f4")
HEAD = 13


def stored(folder: Path, name: str, values: np.ndarray, dtype: str | None = None) -> Stored:
    """`values` in a file, behind some other bytes."""
    path = folder / name
    dtype = dtype or {"f4": "F32", "f8": "F64", "f2": "F16"}[values.dtype.str[1:]]
    path.write_bytes(b"x" * HEAD + values.tobytes() + b"y")
    return Stored(path=path, offset=HEAD, shape=values.shape, dtype=dtype)


def data(matrix: Matrix, dtype: str, *rows: int) -> bytes:
    """All chunks of a matrix, with ranges of files read."""
    found = b""
    for chunk in matrix.chunks(dtype, *rows):
        if isinstance(chunk, FileRange):
            found += chunk.path.read_bytes()[chunk.offset : chunk.offset + chunk.nbytes]
        else:
            found += bytes(chunk)
    return found


def copied(matrix: Matrix) -> bool:
    """Whether no chunk passes through memory."""
    return all(isinstance(chunk, FileRange) for chunk in matrix.chunks(matrix.dtype))


CASES: dict[str, tuple[Callable[[Matrix, Matrix, Matrix], Matrix], np.ndarray]] = {
    "stored": (lambda a, b, v: a, A),
    "vector": (lambda a, b, v: v, V),
    "rows": (lambda a, b, v: Rows(a, 2, 6), A[2:6]),
    "rows by slice": (lambda a, b, v: Rows(a, slice(3, None)), A[3:]),
    "rows by index": (lambda a, b, v: Rows(a, [6, 0, 1, 1, 5]), A[[6, 0, 1, 1, 5]]),
    "no rows": (lambda a, b, v: Rows(a, []), A[:0]),
    "cols": (lambda a, b, v: Cols(a, slice(1, 4)), A[:, 1:4]),
    "cols by index": (lambda a, b, v: Cols(a, np.array([4, 1, 1])), A[:, [4, 1, 1]]),
    "cols of a vector": (lambda a, b, v: Cols(v, 2, 4), V[2:4]),
    "scaled": (lambda a, b, v: Scaled(a, 0.3), A * np.float32(0.3)),
    "given": (lambda a, b, v: Given(B), B),
    "constant": (lambda a, b, v: Constant((3, 2), 1.5), np.full((3, 2), 1.5, "f4")),
    "mean": (lambda a, b, v: Mean([a, b, b]), ((A + 2.0 * B.astype("f8")) / 3).astype("f4")),
    "weighted sum": (lambda a, b, v: WeightedSum((a, b), (2, -0.5)), (2 * A.astype("f8") - 0.5 * B).astype("f4")),
    "repeated rows": (lambda a, b, v: RepeatRows(a, 3), A.repeat(3, axis=0)),
    "replaced rows": (lambda a, b, v: Replaced(a, [5, 2], Rows(b, 0, 2)), np.stack([*A[:2], B[1], *A[3:5], B[0], A[6]])),
    "replaced cols": (lambda a, b, v: Replaced(a, [3, 0], Cols(b, 0, 2), axis=1), np.c_[B[:, 1], A[:, 1:3], B[:, 0], A[:, 4]]),
    "padded": (lambda a, b, v: Padded(a, 8, 9), np.pad(A, ((0, 1), (0, 4)))),
    "stacked": (lambda a, b, v: Stacked((a, Scaled(b, 1.0), a)), np.concatenate([A, B, A])),
    "stacked along a new axis": (lambda a, b, v: Stacked((a, b), new_axis=True), np.stack([A, B])),
    "stacked vectors": (lambda a, b, v: Stacked((v, v)), np.concatenate([V, V])),
    "vectors as rows": (lambda a, b, v: Stacked((v, v), new_axis=True), np.stack([V, V])),
    "joined": (lambda a, b, v: Joined((a, Cols(b, 0, 2), a)), np.concatenate([A, B[:, :2], A], axis=1)),
    "reshaped": (lambda a, b, v: Reshaped(a, (5, 7)), A.reshape(5, 7)),
    "reshaped to more dimensions": (lambda a, b, v: Reshaped(Stacked((a, b)), (2, 7, 5)), np.stack([A, B])),
    "reshaped to a vector": (lambda a, b, v: Reshaped(Rows(a, 1, 3), (10,)), A[1:3].reshape(10)),
    "deep": (
        lambda a, b, v: Scaled(Cols(Stacked((Rows(a, [3, 1]), Padded(Cols(b, 1, 4), 7, 5))), [4, 2, 0]), 2),
        2 * np.concatenate([A[[3, 1]], np.pad(B[:, 1:4], ((0, 0), (0, 2)))])[:, [4, 2, 0]],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_and_chunks_are_those_of_numpy(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, want = CASES[case]
    sources = [stored(tmp_path, name, values) for name, values in (("a", A), ("b", B), ("v", V))]
    matrix = make(*sources)
    assert matrix.shape == want.shape and matrix.dtype == "F32"
    flat = want.reshape(matrix.num_rows, matrix.cols)
    assert (matrix.rows() == flat).all() and matrix.rows().dtype == np.float32
    rng = np.random.default_rng(0)
    for _ in range(30):
        start, stop = sorted(rng.integers(0, matrix.num_rows + 1, 2))
        left, right = sorted(rng.integers(0, matrix.cols + 1, 2))
        assert (matrix.block(start, stop, left, right, "F32") == flat[start:stop, left:right]).all()
        assert data(matrix, "F32", start, stop) == flat[start:stop].tobytes()
    assert data(matrix, "BF16") == torch.from_numpy(flat).bfloat16().view(torch.int16).numpy().tobytes()
    # in the smallest steps, and where parts of rows are read by themselves
    monkeypatch.setattr("moefold.moe.hf.matrix_base.CHUNK_BYTES", 1)
    monkeypatch.setattr("moefold.moe.hf.matrix_sources.SEGMENT_BYTES", 1)
    assert data(matrix, "F32") == want.tobytes()
    assert make(*sources) == matrix and repr(make(*sources)) == repr(matrix) and hash(make(*sources)) == hash(matrix)
    assert matrix.sources() <= {tmp_path / name for name in "abv"}


def test_what_is_not_computed_is_copied_from_its_file(tmp_path: Path) -> None:
    a, b, v = (stored(tmp_path, name, values) for name, values in (("a", A), ("b", B), ("v", V)))
    whole = [a, v, Rows(a, 1, 4), Scaled(a, 1), Stacked((a, b)), Stacked((v, v)), Reshaped(Stacked((a, b)), (2, 7, 5))]
    assert all(map(copied, [*whole, Reshaped(a, (35,)), Stacked((a, Rows(b, 0, 3)))]))
    assert list(Rows(a, 2, 4).chunks("F32")) == [FileRange(tmp_path / "a", HEAD + 2 * 5 * 4, 2 * 5 * 4)]
    assert not any(map(copied, [Scaled(a, 2), Cols(a, 0, 2), Rows(a, [0, 1]), Mean([a])]))
    assert not any(isinstance(chunk, FileRange) for chunk in a.chunks("BF16"))


def test_every_pattern_of_bits_survives(tmp_path: Path) -> None:
    bits = np.arange(1 << 16, dtype="u2").reshape(256, 256)
    matrix = stored(tmp_path, "bits", bits, "BF16")
    want = bits.tobytes()
    # through memory, but never decoded
    for same in (Cols(matrix, np.arange(256)), Rows(matrix, np.arange(256)), Padded(matrix, 256, 256), RepeatRows(matrix, 1)):
        assert not copied(same) and data(same, "BF16") == want
    decoded, real = matrix.rows(), torch.from_numpy(bits.view("i2")).view(torch.bfloat16).float().numpy()
    assert (decoded.view("u4") == real.view("u4")).all()
    finite = np.isfinite(decoded)
    assert (convert(decoded, "F32", "BF16")[finite] == bits[finite]).all()
    assert np.isnan(convert(convert(decoded, "F32", "BF16"), "BF16", "F32")[np.isnan(decoded)]).all()


@given(st.lists(st.floats(width=32, allow_nan=True).filter(lambda x: not abs(x) >= 3.38e38), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_rounding_is_to_nearest_even(values: list[float]) -> None:
    x = np.array(values, "f4")
    want = torch.from_numpy(x).bfloat16().float().numpy()
    assert np.array_equal(convert(convert(x, "F32", "BF16"), "BF16", "F32"), want, equal_nan=True)


def test_double_precision_is_rounded_once() -> None:
    # just above the middle of two BF16 numbers, which float32 rounds to the middle, from where it would go down
    x = np.array([1 + 2**-8 + 2**-40, 1 + 2**-8, 1 + 3 * 2**-8 - 2**-40, -(1 + 2**-8 + 2**-40), np.nan, np.inf, 1e-42])
    found = convert(convert(x, "F64", "BF16"), "BF16", "F32")
    assert np.array_equal(found[:6], [1 + 2**-7, 1, 1 + 2**-7, -(1 + 2**-7), np.nan, np.inf], equal_nan=True)
    assert found[6] == torch.tensor(1e-42).bfloat16().float().item()
    # against exact arithmetic: the nearest of the two neighbours, and the even one of two that are as near
    rng = np.random.default_rng(0)
    x = (1 + rng.integers(0, 256, 4000) * 2.0**-8 + rng.choice([0, 1, -1], 4000) * 2.0 ** rng.integers(-50, -20, 4000)) * -3.0
    # between 3 and 6, where BF16 numbers are 2^-6 or 2^-5 apart
    step = np.where(np.abs(x) >= 4, 2.0**-5, 2.0**-6)
    low = np.floor(np.abs(x) / step) * step
    over, odd = np.abs(x) - low, np.floor(low / step) % 2 == 1
    want = -(low + np.where((over > step / 2) | ((over == step / 2) & odd), step, 0))
    assert (convert(convert(x, "F64", "BF16"), "BF16", "F32") == want).all()


@pytest.mark.parametrize(("source", "target", "value"), [("F32", "F16", 7e4), ("F32", "BF16", 3.4e38), ("F64", "F32", 1e39)])
def test_what_does_not_fit_is_refused(source: str, target: str, value: float) -> None:
    x = np.array([1.0, -value, np.inf], carrier(source))
    with pytest.raises(CheckpointError, match=f"the value .* is too large for {target}: store this tensor as"):
        convert(x, source, target)
    kept = convert(x[2:], source, target)
    assert np.isinf(kept if target != "BF16" else convert(kept, "BF16", "F32")).all(), "infinity was there before"


def test_a_scaled_value_that_is_too_large_is_refused(tmp_path: Path) -> None:
    values = np.array([[np.nan, np.inf, 1e30]], "f4")
    assert np.array_equal(Scaled(Given(values), 2).rows(), 2 * values, equal_nan=True), (
        "what is not finite before may be so after"
    )
    with pytest.raises(CheckpointError, match="times 1e\\+10 is too large for F32"):
        Scaled(Given(values), 1e10).rows()


def test_dtypes_that_meet_are_widened(tmp_path: Path) -> None:
    half, single = stored(tmp_path, "h", A.astype("f2")), stored(tmp_path, "s", B)
    brain = stored(tmp_path, "b", convert(A, "F32", "BF16"), "BF16")
    double = stored(tmp_path, "d", A.astype("f8"))
    found = [Stacked(pair).dtype for pair in ((half, half), (half, brain), (half, single), (brain, double))]
    assert found == ["F16", "F32", "F32", "F64"]
    assert (Scaled(double, 1 / 3).rows() == A.astype("f8") * (1 / 3)).all()
    # halves of integers below 2^7 are exact everywhere
    assert (Mean([brain, double]).rows() == A).all()


def test_the_mean_of_equals_has_their_bits(tmp_path: Path) -> None:
    matrix = stored(tmp_path, "b", convert(B, "F32", "BF16"), "BF16")
    assert data(Mean([matrix] * 7), "BF16") == data(matrix, "BF16")


def test_normal_values_depend_on_seed_name_and_position_only() -> None:
    noise = Normal((700, 300), std=0.5, seed=3, name="layers.0.router", mean=2.0)
    all_at_once = noise.rows()
    assert noise.group < noise.num_rows, "or there is nothing to see"
    for start, stop, left, right in ((0, 1, 0, 300), (217, 219, 5, 6), (430, 700, 0, 299)):
        assert (noise.block(start, stop, left, right, "F32") == all_at_once[start:stop, left:right]).all()
    assert abs(all_at_once.mean() - 2) < 5 * 0.5 / all_at_once.size**0.5 and abs(all_at_once.std() / 0.5 - 1) < 0.01
    others = [Normal((700, 300), 0.5, 4, "layers.0.router", 2.0), Normal((700, 300), 0.5, 3, "layers.1.router", 2.0)]
    for other in others:
        correlation = np.corrcoef(other.rows().ravel(), all_at_once.ravel())[0, 1]
        assert abs(correlation) < 5 / all_at_once.size**0.5
    assert not (all_at_once[: noise.group] == all_at_once[noise.group : 2 * noise.group]).any()
    half = Normal((700, 300), std=1.0, seed=0, name="n", share=0.25).rows()
    assert abs((half != 0).mean() - 0.25) < 0.01 and abs(half[half != 0].std() - 1) < 0.02


def test_mistakes_are_named(tmp_path: Path) -> None:
    a, v = stored(tmp_path, "a", A), stored(tmp_path, "v", V)
    mistakes: list[tuple[Callable[[], object], str]] = [
        (lambda: Rows(a, 3, 9), "rows 3..9 .* not a range inside 0..7"),
        (lambda: Rows(a, [7]), "rows go from 7 to 7, but there are 7"),
        (lambda: Cols(a, [-1, 2]), "columns go from -1 to 2, but there are 5"),
        (lambda: Cols(a, [0.5]), "must be a list of whole numbers"),
        (lambda: Replaced(a, [1, 1], Rows(a, 0, 2)), "named more than once"),
        (lambda: Replaced(a, [1, 2], Rows(a, 0, 3)), r"it must be \[2, 5\]"),
        (lambda: Replaced(a, [1, 2], a, axis=2), "axis is 2"),
        (lambda: Padded(a, 3, 9), "larger than"),
        (lambda: Stacked((a, v)), "differ in more than the first dimension"),
        (lambda: Stacked(()), "nothing to stack"),
        (lambda: Joined((a, Rows(a, 0, 2))), "differ in more than the last dimension"),
        (lambda: Mean([a, v]), "differ"),
        (lambda: Reshaped(a, (6, 6)), "another number of elements"),
        (lambda: RepeatRows(a, 0), "repeated 0 times"),
        (lambda: Normal((2, 2), -1.0, 0, ""), "std is -1.0"),
        (lambda: Given(np.arange(3)), "must be float16, float32 or float64"),
    ]
    for make, message in mistakes:
        with pytest.raises(ValueError, match=message):
            make()


def test_files_that_fail_are_named(tmp_path: Path) -> None:
    a = stored(tmp_path, "a", A)
    whole = stored(tmp_path, "i", np.arange(6, dtype="i4").reshape(2, 3), "I32")
    with pytest.raises(CheckpointError, match="I32 values cannot be computed with"):
        whole.rows()
    assert data(whole, "I32") == np.arange(6, dtype="i4").tobytes()
    (tmp_path / "a").write_bytes(b"x" * 100)
    with pytest.raises(CheckpointError, match=r"a ends at byte 100, inside a tensor: it is truncated"):
        a.rows()
    (tmp_path / "a").unlink()
    with pytest.raises(CheckpointError, match="a cannot be read: No such file"):
        a.rows()
