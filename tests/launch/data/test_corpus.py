"""Sources become token streams: what is read, how it is split, when the cache is used, and what every mistake says."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moefold.launch.data import documents
from moefold.launch.data.corpus import check, prepare
from moefold.launch.data.indexed import IndexedTokens, IndexedWriter
from moefold.launch.data.tokenizer import ByteTokenizer, load_tokenizer
from moefold.launch.settings import DataConfig, SourceConfig
from moefold.moe.errors import DataError

BYTES = ByteTokenizer()


def prep(tmp_path, *sources, holdout=0.2, tokenizer=BYTES, said=None):
    config = DataConfig(sources=sources, holdout=holdout)
    return prepare(sources, tokenizer, config, tmp_path / "cache", said.append if said is not None else None)


def text_of(part, tokenizer=BYTES):
    """The documents of a token range."""
    ids = part.open().read(0, part.tokens)
    return [tokenizer.decode(d) for d in np.split(ids, np.flatnonzero(ids == tokenizer.eos_id) + 1)]


def write_files(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root)


def many(n=60):
    return {f"part-{i % 3}/{i:03}.txt": f"document {i} – ende\n" * (1 + i % 5) for i in range(n)}


def text_source(path, **kw):
    return SourceConfig(**{"type": "text", "path": str(path), "name": "t"} | kw)


def test_folder_of_text(tmp_path):
    files = many()
    (source,) = prep(tmp_path, text_source(write_files(tmp_path / "in", files)))
    train, heldout = text_of(source.train), text_of(source.heldout)
    assert train[-1] == heldout[-1] == ""  # nothing after the last end of document
    expected = [files[k] for k in sorted(files)]
    assert [d for d in expected if d in train] == train[:-1]
    assert sorted(train[:-1] + heldout[:-1]) == sorted(expected)
    assert 3 <= len(heldout) - 1 <= 25
    assert (source.train.documents, source.heldout.documents) == (len(train) - 1, len(heldout) - 1)
    assert source.train.bytes + source.heldout.bytes == sum(len(d.encode()) for d in expected)
    assert source.train.tokens == source.train.bytes + source.train.documents
    assert source.max_id == 256


def test_split_depends_on_relative_names_only(tmp_path):
    files = many()
    one = prep(tmp_path, text_source(write_files(tmp_path / "a", files)))[0]
    moved = prep(tmp_path, text_source(write_files(tmp_path / "deep/b", files), name="other", weight=3.0))[0]
    globbed = prep(tmp_path, text_source(tmp_path / "a/**/*.txt"))[0]
    more = prep(tmp_path, text_source(write_files(tmp_path / "c", files | {"new.txt": "new"})))[0]
    assert text_of(one.heldout) == text_of(moved.heldout) == text_of(globbed.heldout)
    assert set(text_of(one.heldout)) <= set(text_of(more.heldout))


def test_single_file_keeps_its_end_out(tmp_path):
    text = "".join(f"line {i}\n" for i in range(1000))
    (source,) = prep(tmp_path, text_source(write_files(tmp_path, {"one.txt": text}) + "/one.txt"), holdout=0.1)
    assert "".join(text_of(source.train) + text_of(source.heldout)) == text
    assert source.heldout.tokens == pytest.approx(0.1 * len(text), rel=0.01)
    assert source.train.bytes + source.heldout.bytes == len(text)
    assert (source.train.start, source.train.stop) == (0, source.heldout.start)


def test_few_files_split_at_a_document_near_the_share(tmp_path):
    names = [n for n in (f"{i}.txt" for i in range(100)) if not documents.held_out(n, 0.2)][:5]
    (source,) = prep(tmp_path, text_source(write_files(tmp_path / "in", {n: n * 100 for n in names})))
    assert [len(text_of(r)) for r in (source.train, source.heldout)] == [5, 2]


def test_no_holdout(tmp_path):
    files = many()
    (source,) = prep(tmp_path, text_source(write_files(tmp_path / "in", files)), holdout=0.0)
    assert source.heldout is None
    assert source.train.documents == len(files)


def test_jsonl(tmp_path):
    rows = [{"body": f"text {i} ü\n", "id": i} for i in range(80)]
    lines = "\ufeff" + "\n\n".join(json.dumps(r) for r in rows)
    source = SourceConfig(type="jsonl", path=write_files(tmp_path, {"x.jsonl": lines}) + "/x.jsonl", field="body")
    (found,) = prep(tmp_path, source)
    assert sorted(text_of(found.train)[:-1] + text_of(found.heldout)[:-1]) == sorted(r["body"] for r in rows)
    (again,) = prep(
        tmp_path, replace(source, path=write_files(tmp_path / "r", {"y.jsonl": "\n".join(map(json.dumps, rows[::-1]))}))
    )
    assert sorted(text_of(found.heldout)) == sorted(text_of(again.heldout))


def test_text_is_read_in_pieces_that_join_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 7)
    text = "äöü€🌍\nlong line without an end " * 5 + "\n\n" + "x" * 50
    file = documents._file(write_files(tmp_path, {"a": "\ufeff" + text}) + "/a", str(tmp_path))
    problems = documents.Problems()
    pieces = list(documents._text_pieces(file, problems))
    assert "".join(pieces) == text and not problems.found and len(pieces) > 10


@pytest.mark.parametrize("piece", [3, 1 << 20])
def test_bad_byte_offset_does_not_depend_on_pieces(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(documents, "PIECE_BYTES", piece)
    path = write_files(tmp_path / "in", {"a.txt": "ab€cd€".encode() + b"\xe2\x82zz"}) + "/a.txt"
    with pytest.raises(DataError, match=r"a\.txt: is not UTF-8: byte 0xe2 at offset 10"):
        prep(tmp_path, text_source(path))


def test_cache_is_reused_until_something_changes(tmp_path):
    root, said = write_files(tmp_path / "in", many()), []
    first = prep(tmp_path, text_source(root), said=said)
    assert prep(tmp_path, text_source(root), said=said) == first and len(said) == 1
    assert prep(tmp_path, text_source(root, weight=2.0), said=said)[0].weight == 2.0 and len(said) == 1
    prep(tmp_path, text_source(root), holdout=0.3, said=said)
    assert len(said) == 2
    os.utime(Path(root) / "part-0/000.txt", ns=(1, 1))
    prep(tmp_path, text_source(root), said=said)
    assert len(said) == 3
    write_files(tmp_path / "in", {"new.txt": "new"})
    prep(tmp_path, text_source(root), said=said)
    assert len(said) == 4


def test_damaged_cache_is_named_and_made_again(tmp_path):
    root, said = write_files(tmp_path / "in", many()), []
    first = prep(tmp_path, text_source(root))
    os.truncate(first[0].train.path + ".bin", 10)
    assert prep(tmp_path, text_source(root), said=said) == first
    assert "damaged" in said[0] and "expected" in said[0]
    assert text_of(first[0].train)


def test_an_interrupted_preparation_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(self, text):
        raise KeyboardInterrupt

    root = write_files(tmp_path / "in", many())
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(ByteTokenizer, "encode", interrupt)
        prep(tmp_path, text_source(root))
    assert list((tmp_path / "cache").iterdir()) == []
    assert prep(tmp_path, text_source(root))


def test_runs_that_prepare_the_same_data_at_once_agree(tmp_path):
    root = write_files(tmp_path / "in", many())
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: prep(tmp_path, text_source(root)), range(8)))
    assert all(f == found[0] for f in found)
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_preparing_needs_no_torch():
    code = "import sys; from moefold.launch.data import bigram, blend, corpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_empty_files_among_others_are_left_out_and_counted(tmp_path):
    said = []
    root = write_files(tmp_path / "in", many() | {"e1.txt": "", "e2.txt": ""})
    (source,) = prep(tmp_path, text_source(root), said=said)
    assert source.train.documents + source.heldout.documents == 60
    assert said[-1] == "data: 't': left out 2 empty documents"


def test_embedded_library(tmp_path):
    code, prose = prep(
        tmp_path, SourceConfig(type="python-code", name="code"), SourceConfig(type="python-docs", name="prose"), holdout=0.05
    )
    assert code.train.bytes > 4e6 and prose.train.bytes > 1e6
    for source in (code, prose):
        total = source.train.bytes + source.heldout.bytes
        assert 0.01 < source.heldout.bytes / total < 0.12
    assert any("def " in d for d in text_of(code.heldout)) and any("statement" in d for d in text_of(prose.train))


def test_library_files_are_the_library_alone():
    names = [f.name for f in documents.library_files()]
    assert names == sorted(names) and {"argparse.py", "json/decoder.py"} <= set(names)
    parts = {p for n in names for p in n.split("/")[:-1]}
    assert not parts & {"site-packages", "test", "tests", "idle_test", "pydoc_data"}


def test_a_module_and_its_docstrings_are_on_the_same_side():
    files = documents.library_files()
    code = documents.read_documents(SourceConfig(type="python-code"), files, documents.Problems())
    docs = documents.read_documents(SourceConfig(type="python-docs"), files, documents.Problems())
    assert {d.key for d in code} == {d.key for d in docs if not d.key.startswith("topics/")}


BAD_TEXT = {
    "latin-1": ({"a.txt": b"gr\xfc\xdfe"}, r"a\.txt: is not UTF-8: byte 0xfc at offset 2; convert it"),
    "cut character": ({"a.txt": b"abc\xe2\x82"}, r"a\.txt: is not UTF-8: byte 0xe2 at offset 3"),
    "binary": ({"a.txt": b"ELF\x00\x01"}, r"a\.txt: holds a NUL byte at offset 3"),
    "utf-16": ({"a.txt": "hello".encode("utf-16")}, r"NUL byte at offset 3, so it is binary or UTF-16"),
    "all empty": ({"a.txt": "", "b.txt": ""}, "2 files, all empty"),
    "no files": ({".hidden": "x"}, "matches no file"),
    "nothing but a mark": ({"a.txt": b"\xef\xbb\xbf"}, "no text in any of its documents"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_bad_text(tmp_path, case):
    files, message = BAD_TEXT[case]
    with pytest.raises(DataError, match=message):
        prep(tmp_path, text_source(write_files(tmp_path / "in", files)))
    assert not (tmp_path / "cache").exists() or list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(("path", "message"), [("nowhere", "there is no such file or folder"), ("*.nope", "matches no file")])
def test_missing_path(tmp_path, path, message):
    with pytest.raises(DataError, match=rf"data.sources 't': path = '.*{path[-4:]}': {message}"):
        prep(tmp_path, text_source(tmp_path / path))


BAD_LINES = {
    "not json": (b"{oops}", "is not JSON: .* at column 2"),
    "no object": (b"[1, 2]", "expected a JSON object, found list"),
    "no field": (b'{"txt": "a", "id": 1}', r"has no field 'text'; its keys are 'txt', 'id'"),
    "no string": (b'{"text": 3}', "field 'text' is int, expected a string"),
    "latin-1": (b'{"text": "\xfc"}', "is not UTF-8: byte 0xfc at column 11"),
    "half a pair": (b'{"text": "a\\ud83d"}', "field 'text' has half of a surrogate pair at character 1"),
}


@pytest.mark.parametrize("case", BAD_LINES)
def test_bad_jsonl_line(tmp_path, case):
    line, message = BAD_LINES[case]
    path = write_files(tmp_path / "in", {"x.jsonl": b'{"text": "good"}\n' + line + b'\n{"text": "good"}\n'})
    with pytest.raises(DataError, match=rf"x\.jsonl:2: {message}"):
        prep(tmp_path, SourceConfig(type="jsonl", path=path))


def test_all_problems_of_all_sources_at_once(tmp_path):
    a = write_files(tmp_path / "a", {"1.txt": b"\xff", "2.txt": b"\x00", "3.txt": "fine"})
    b = write_files(tmp_path / "b", {"x.jsonl": "{}\n[]\n"})
    with pytest.raises(DataError) as e:
        prep(
            tmp_path,
            text_source(a),
            SourceConfig(type="jsonl", path=b),
            text_source(tmp_path / "missing", name="m"),
            SourceConfig(type="indexed", path=str(tmp_path / "gone")),
        )
    lines = str(e.value).splitlines()
    assert lines[0] == "data error: 6 problems"
    for line, piece in zip(lines[1:], ["1.txt", "2.txt", "x.jsonl:1", "x.jsonl:2", "'m'", "gone.idx"], strict=True):
        assert piece in line


def test_no_more_than_twenty_problems(tmp_path):
    path = write_files(tmp_path / "in", {"x.jsonl": "[]\n" * 100})
    with pytest.raises(DataError) as e:
        prep(tmp_path, SourceConfig(type="jsonl", path=path))
    assert str(e.value).startswith("data error: 20 problems; stopped") and len(str(e.value).splitlines()) == 21


def write_indexed(path, docs):
    with IndexedWriter(path, np.int32) as w:
        for d in docs:
            w.append(np.asarray(d))
            w.end_document()
    return str(path)


def indexed_source(path, **kw):
    return SourceConfig(type="indexed", path=str(path), name="i", **kw)


def test_indexed_is_used_in_place(tmp_path):
    path = write_indexed(tmp_path / "x", [np.full(100, i % 256) for i in range(50)])
    (source,) = prep(tmp_path, indexed_source(path + ".bin"), holdout=0.1)
    assert source.train.path == source.heldout.path == path
    assert (source.train.stop, source.heldout.start, source.heldout.stop) == (4500, 4500, 5000)
    assert (source.train.documents, source.heldout.documents) == (45, 5)
    assert (source.min_id, source.max_id) == (0, 49)


def test_indexed_of_one_document_is_cut_inside(tmp_path):
    (source,) = prep(tmp_path, indexed_source(write_indexed(tmp_path / "x", [np.arange(200)])), holdout=0.9)
    assert (source.train.tokens, source.heldout.tokens) == (20, 180)


def test_indexed_rescans_when_the_file_changes(tmp_path):
    path = write_indexed(tmp_path / "x", [np.arange(100)])
    assert prep(tmp_path, indexed_source(path))[0].max_id == 99
    write_indexed(tmp_path / "x", [np.arange(120)])
    assert prep(tmp_path, indexed_source(path))[0].max_id == 119


@pytest.mark.parametrize(("bad", "shown"), [(50256, "50256"), (257, "257"), (-2, "-2")])
def test_indexed_of_another_tokenizer(tmp_path, bad, shown):
    path = write_indexed(tmp_path / "x", [[1, 2, bad, 3]])
    with pytest.raises(DataError, match=f"'i': holds token id {shown}, but data.tokenizer = 'bytes' has ids 0 to 256"):
        prep(tmp_path, indexed_source(path))


def test_other_tokenizer_other_tokens(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<eos>": 0, "document": 1, "[UNK]": 2}
    backend = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "t.json"))
    root = write_files(tmp_path / "in", many())
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    (source,) = prep(tmp_path, text_source(root), tokenizer=tokenizer, holdout=0.0)
    stream = IndexedTokens(source.train.path)
    assert stream.read(0, 5).tolist() == [1, 2, 2, 2, 0]
    assert source.train.path != prep(tmp_path, text_source(root), holdout=0.0)[0].train.path


def test_vocabulary_too_small(tmp_path):
    prepared = prep(tmp_path, text_source(write_files(tmp_path / "in", many())))
    check(prepared, vocab_size=257, seq_len=8, global_batch=2)
    with pytest.raises(
        DataError, match=r"'t': holds token id 256, but model.vocab_size = 256; set model.vocab_size to 257 or more"
    ):
        check(prepared, vocab_size=256, seq_len=8, global_batch=2)


def test_too_little_text(tmp_path):
    prepared = prep(tmp_path, text_source(write_files(tmp_path / "in", {"a.txt": "x" * 99})), holdout=0.0)
    check(prepared, 257, seq_len=33, global_batch=3)  # 100 tokens: exactly 3 windows of 33 inputs and their labels
    with pytest.raises(DataError, match=r"hold 3 windows of 33 tokens .* needs train.global_batch = 4"):
        check(prepared, 257, seq_len=33, global_batch=4)
    with pytest.raises(DataError, match=r"has 100 training tokens, fewer than one window of data.seq_len \+ 1 = 101"):
        check(prepared, 257, seq_len=100, global_batch=1)
