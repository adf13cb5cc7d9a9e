"""Token ids that a proof is made on: real text where the model's tokenizer can be read, else drawn. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...moe.errors import DataError
from ..data.documents import Problems, list_files, read_documents
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..settings import SourceConfig

SEQ_LEN = 256


@dataclass(frozen=True)
class ProofTokens:
    """ids_BS: int64. says: what they are."""

    ids_BS: npt.NDArray[np.int64]
    says: str


def proof_tokens(folder: Path, vocab_size: int, max_seq_len: int, count: int, seed: int) -> ProofTokens:
    """About `count` ids in sequences of at most 256.

    Text is this machine's Python: documentation topics and library, in turn. Ids are drawn from `seed` where the folder has no
    tokenizer.json, or one that cannot be read or does not fit the model; `says` tells which, and why.
    """
    length = max(1, min(SEQ_LEN, max_seq_len, count))
    rows = max(1, count // length)
    if not (folder / "tokenizer.json").is_file():
        return _drawn(rows, length, vocab_size, seed, "there is no tokenizer.json")
    try:
        tokenizer = load_tokenizer(str(folder))
    except DataError as error:
        return _drawn(rows, length, vocab_size, seed, str(error))
    if tokenizer.vocab_size > vocab_size:
        what = f"its tokenizer has ids up to {tokenizer.vocab_size - 1}, the model only up to {vocab_size - 1}"
        return _drawn(rows, length, vocab_size, seed, what)
    ids = _text_ids(tokenizer, rows * length)
    if len(ids) < rows * length:
        return _drawn(rows, length, vocab_size, seed, "this Python comes without library and documentation")
    what = f"{rows} sequences of {length} tokens of this machine's Python documentation and library"
    return ProofTokens(ids.reshape(rows, length), f"{what}, by the model's tokenizer")


def _drawn(rows: int, length: int, vocab_size: int, seed: int, why: str) -> ProofTokens:
    key = np.random.Philox(key=seed)
    ids = (key.random_raw(rows * length) % np.uint64(vocab_size)).astype(np.int64)
    return ProofTokens(ids.reshape(rows, length), f"{rows} sequences of {length} ids drawn with seed {seed}, as {why}")


def _text_ids(tokenizer: Tokenizer, count: int) -> npt.NDArray[np.int64]:
    """Ids of documents one after another, prose and code in turn, each with the token that ends it."""
    found: list[npt.NDArray[np.int64]] = []
    have = 0
    for text in _texts():
        found.append(np.append(tokenizer.encode(text).astype(np.int64), tokenizer.eos_id))
        have += len(found[-1])
        if have >= count:
            break
    return np.concatenate(found)[:count] if found else np.empty(0, np.int64)


def _texts() -> Iterator[str]:
    problems = Problems()
    sources = [SourceConfig(type="python-docs"), SourceConfig(type="python-code")]
    streams = [read_documents(source, list_files(source, problems), problems) for source in sources]
    while streams:
        for stream in tuple(streams):
            document = next(stream, None)
            if document is None:
                streams.remove(stream)
            else:
                # the beginning of each, so that a short proof sees several kinds of text
                yield "".join(document.pieces)[:400]
