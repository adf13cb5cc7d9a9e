"""The .bin/.idx format: both ways against megatron-core, and every kind of damage is named."""

import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from moefold.launch.data.indexed import HEADER, MAGIC, IndexedTokens, IndexedWriter, TokenSlice
from moefold.moe.errors import DataError

DOCUMENTS = [[5, 6, 7], [8], [9, 10, 11, 12], [1, 2]]
FLAT = [t for d in DOCUMENTS for t in d]


def write(path, documents=DOCUMENTS, dtype=np.uint16):
    with IndexedWriter(path, dtype) as w:
        for d in documents:
            w.append(np.array(d))
            w.end_document()
    return str(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.int64])
def test_round_trip(tmp_path, dtype):
    tokens = IndexedTokens(write(tmp_path / "x", dtype=dtype))
    assert len(tokens) == len(FLAT)
    assert tokens.read(0, len(FLAT)).tolist() == FLAT
    assert tokens.read(2, 3).tolist() == FLAT[2:5]
    assert tokens.document_starts.tolist() == [0, 3, 4, 8]
    assert tokens.documents == 4
    assert tokens.read(0, 1).dtype == np.int64


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_opens_by_any_of_its_names(tmp_path, suffix):
    assert len(IndexedTokens(write(tmp_path / "x") + suffix)) == len(FLAT)


def test_reading_gives_a_copy(tmp_path):
    tokens = IndexedTokens(write(tmp_path / "x"))
    tokens.read(0, 3)[:] = 0
    assert tokens.read(0, 3).tolist() == FLAT[:3]


@pytest.mark.parametrize(("start", "length"), [(-1, 2), (0, 11), (10, 1), (3, -1)])
def test_reading_outside_is_an_error(tmp_path, start, length):
    with pytest.raises(IndexError):
        IndexedTokens(write(tmp_path / "x")).read(start, length)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_reads_ours(tmp_path, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    theirs = IndexedDataset(write(tmp_path / "x", dtype=dtype), mmap=True)
    assert [np.array(theirs[i]).tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]
    assert theirs.index.dtype == dtype


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_we_read_megatrons(tmp_path, dtype):
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    from torch import tensor

    builder = IndexedDatasetBuilder(str(tmp_path / "x.bin"), dtype=dtype)
    builder.add_item(tensor([5, 6, 7]))  # two sequences in one document
    builder.add_item(tensor([8]))
    builder.end_document()
    builder.add_document(tensor([9, 10, 11, 12, 1, 2]), [4, 2])
    builder.finalize(str(tmp_path / "x.idx"))
    tokens = IndexedTokens(tmp_path / "x")
    assert tokens.read(0, len(tokens)).tolist() == FLAT
    assert tokens.document_starts.tolist() == [0, 4]
    assert tokens.dtype == dtype


def test_documents_by_position(tmp_path):
    tokens = IndexedTokens(write(tmp_path / "x", [[1, 2], [], [3, 4, 5], [6], []]))
    assert tokens.starts_between(1, 5).tolist() == [2, 2]
    assert tokens.starts_between(0, 100).tolist() == tokens.document_starts.tolist() == [0, 2, 2, 5, 6]
    assert [tokens.documents_between(*r) for r in [(0, 2), (0, 3), (3, 5), (4, 6), (2, 2)]] == [1, 3, 1, 2, 0]
    assert [tokens.nearest_start(i) for i in range(7)] == [0, 0, 2, 2, 5, 5, 6]


def test_slice_numbers_documents_from_its_window(tmp_path):
    part = TokenSlice(IndexedTokens(write(tmp_path / "x", [[1, 2], [], [3, 4, 5], [6], [7, 7, 7]])), 1, 9)
    assert len(part) == 8
    assert part.read(0, 8).tolist() == [2, 3, 4, 5, 6, 7, 7, 7]
    assert part.document_ids(0, 8).tolist() == [0, 1, 1, 1, 2, 3, 3, 3]
    assert part.document_ids(3, 4).tolist() == [0, 1, 2, 2]
    assert [part.windows(s) for s in (1, 2, 3, 7, 8)] == [7, 3, 2, 1, 0]
    with pytest.raises(IndexError):
        part.read(4, 5)


def test_a_failed_write_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), IndexedWriter(tmp_path / "x", np.uint16) as w:
        w.append(np.array([1, 2]))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rewrite_leaves_the_old_pair(tmp_path):
    write(tmp_path / "x")
    with pytest.raises(DataError, match="70000 does not fit into uint16"):
        write(tmp_path / "x", [[1], [70000]])
    assert IndexedTokens(tmp_path / "x").read(0, len(FLAT)).tolist() == FLAT
    assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_write_leaves_no_readable_pair(tmp_path):
    code = f"""
import os, numpy as np
from moefold.launch.data.indexed import IndexedWriter
w = IndexedWriter({str(tmp_path / "x")!r}, np.uint16)
w.append(np.arange(10)); w.end_document(); w._file.flush()
os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == 9
    with pytest.raises(DataError, match="no such file"):
        IndexedTokens(tmp_path / "x")


def test_floats_are_refused_when_writing(tmp_path):
    with pytest.raises(DataError, match="float32 is no token type"):
        IndexedWriter(tmp_path / "x", np.float32)


def patch(path, at, content):
    with open(path, "r+b") as f:
        f.seek(at)
        f.write(content)


def cut(path, size):
    os.truncate(path, size)


SIZES, POINTERS, MARKS = HEADER.size, HEADER.size + 16, HEADER.size + 48
DAMAGE = {
    "wrong magic": (lambda p: patch(p + ".idx", 0, b"GARBAGE"), r"x\.idx: is not a Megatron index: expected the magic .*GARBAGE"),
    "empty index": (lambda p: cut(p + ".idx", 0), r"x\.idx: is not a Megatron index"),
    "short header": (lambda p: cut(p + ".idx", 20), r"x\.idx: is truncated: expected a header of 34 bytes, found 20"),
    "version": (lambda p: patch(p + ".idx", 9, struct.pack("<Q", 2)), "expected format version 1, found 2"),
    "unknown type": (lambda p: patch(p + ".idx", 17, b"\x63"), "type code of 1 to 8, found 99"),
    "float type": (lambda p: patch(p + ".idx", 17, b"\x07"), "expected an integer token type, found float32"),
    "truncated index": (lambda p: cut(p + ".idx", 100), r"expected 122 bytes for 4 sequences and 5 document marks, found 100"),
    "modes": (lambda p: patch(p + ".idx", 122, b"\0" * 4), "multimodal"),
    "trailing bytes": (lambda p: patch(p + ".idx", 122, b"\0" * 9), "expected 122 bytes, found 131"),
    "negative length": (
        lambda p: patch(p + ".idx", SIZES + 4, struct.pack("<i", -1)),
        "sequence 1: expected a length of 0 or more, found -1",
    ),
    "pointer": (
        lambda p: patch(p + ".idx", POINTERS + 16, struct.pack("<q", 6)),
        "sequence 2: expected byte offset 8 .* found 6",
    ),
    "last mark": (lambda p: patch(p + ".idx", MARKS + 32, struct.pack("<q", 9)), "document marks from 0 to 4, found 0 to 9"),
    "mark order": (lambda p: patch(p + ".idx", MARKS + 16, struct.pack("<q", 0)), "document mark 2: expected 1 or more, found 0"),
    "short bin": (lambda p: cut(p + ".bin", 18), r"x\.bin: expected 20 bytes, .* found 18"),
    "long bin": (lambda p: patch(p + ".bin", 20, b"\0\0"), r"x\.bin: expected 20 bytes, .* found 22"),
    "no bin": (lambda p: os.unlink(p + ".bin"), r"x\.bin: there is no such file"),
    "no index": (lambda p: os.unlink(p + ".idx"), r"x\.idx: there is no such file"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path, damage):
    path = write(tmp_path / "x")
    do, message = DAMAGE[damage]
    do(path)
    with pytest.raises(DataError, match=message):
        IndexedTokens(path)


def test_empty_streams_are_errors(tmp_path):
    with pytest.raises(DataError, match="is empty: expected at least one sequence"):
        IndexedTokens(write(tmp_path / "none", []))
    with pytest.raises(DataError, match="is empty: expected at least one token"):
        IndexedTokens(write(tmp_path / "hollow", [[], []]))


def test_header_is_the_documented_one(tmp_path):
    with open(write(tmp_path / "x") + ".idx", "rb") as f:
        assert HEADER.unpack(f.read(34)) == (MAGIC, 1, 8, 4, 5)
