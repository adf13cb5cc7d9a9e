"""Tokenizers: ids and text go both ways, and whatever cannot work is named."""

import shutil
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from moefold.launch.data.tokenizer import ByteTokenizer, load_tokenizer
from moefold.moe.errors import DataError

TEXTS = ["def f(x):\n    return x + 1\n", "grüße, 世界 🌍", "for i in range(10): print(i)"]


def write_bpe(path, special=("<|endoftext|>",), truncation=None):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 20, trainer)
    if truncation:
        backend.enable_truncation(truncation)
    backend.save(str(path))
    return str(path)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.count_bytes(ids) == len(text.encode())
    assert ids.dtype == np.int32


@given(st.lists(st.integers(-5, 400)))
def test_byte_decode_never_fails(ids):
    assert isinstance(ByteTokenizer().decode(np.array(ids, dtype=np.int64)), str)


def test_byte_tokenizer_marks_what_is_no_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(np.array([65, 256, 66])) == "AB"
    assert tokenizer.decode(np.array([65, 300, 66])) == "A\ufffdB"
    assert tokenizer.decode(np.array([0xE4, 66])) == "\ufffdB"
    assert tokenizer.count_bytes(np.array([65, 256, 0xE4])) == 2


@pytest.mark.parametrize("text", TEXTS)
def test_json_round_trip(tmp_path, text):
    tokenizer = load_tokenizer(write_bpe(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.count_bytes(np.append(ids, tokenizer.eos_id)) == len(text.encode())
    assert ids.max() < tokenizer.vocab_size


def test_json_from_a_folder(tmp_path):
    write_bpe(tmp_path / "tokenizer.json")
    assert load_tokenizer(str(tmp_path)).vocab_size == load_tokenizer(str(tmp_path / "tokenizer.json")).vocab_size


@pytest.mark.parametrize("name", ["</s>", "<eos>", "<|end_of_text|>", "<|im_end|>"])
def test_json_finds_the_end_of_document(tmp_path, name):
    tokenizer = load_tokenizer(write_bpe(tmp_path / "t.json", special=("<unk>", name)))
    assert tokenizer.eos_id == 1


def test_json_decodes_ids_that_stand_for_nothing(tmp_path):
    tokenizer = load_tokenizer(write_bpe(tmp_path / "t.json"))
    a, b = tokenizer.encode("for"), tokenizer.encode("range")
    strange = np.concatenate([[-1], a, [tokenizer.vocab_size + 7, 2**40], b]).astype(np.int64)
    assert tokenizer.decode(strange) == "\ufffdfor\ufffd\ufffdrange"


def test_truncation_in_the_file_does_not_cut_documents(tmp_path):
    tokenizer = load_tokenizer(write_bpe(tmp_path / "t.json", truncation=3))
    assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]


def test_fingerprint_follows_the_content(tmp_path):
    one = load_tokenizer(write_bpe(tmp_path / "a.json")).fingerprint
    same = load_tokenizer(str(shutil.copy(tmp_path / "a.json", tmp_path / "b.json"))).fingerprint
    other = load_tokenizer(write_bpe(tmp_path / "c.json", special=("</s>",))).fingerprint
    assert one == same != other != ByteTokenizer().fingerprint


def test_without_end_of_document_the_added_tokens_are_listed(tmp_path):
    with pytest.raises(DataError, match=r"no end-of-document token.*<\|endoftext\|>.*\['<pad>', '<fim>'\]"):
        load_tokenizer(write_bpe(tmp_path / "t.json", special=("<pad>", "<fim>")))


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*nothing\.json; use 'bytes'"):
        load_tokenizer(str(tmp_path / "nothing.json"))


@pytest.mark.parametrize("content", [b"{}", b"not json", b"\xff\xfe\x00"], ids=["no model", "text", "binary"])
def test_unreadable_file(tmp_path, content):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(DataError, match=r"not a readable tokenizer\.json"):
        load_tokenizer(str(tmp_path / "t.json"))


def test_missing_library_names_the_extra(tmp_path, monkeypatch):
    path = write_bpe(tmp_path / "t.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"moefold\[tokenizers\]"):
        load_tokenizer(path)
