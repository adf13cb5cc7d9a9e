"""Token ids of the domains that a dense model is recorded on: text by a tokenizer, or ids as they are. Imports no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from ...moe.errors import DataError, Problem
from ..data.documents import Problems, list_files, read_documents
from ..data.indexed import IndexedTokens
from ..data.tokenizer import Tokenizer, load_tokenizer
from ..settings import SourceConfig

EMBEDDED: tuple[Literal["python-code", "python-docs"], ...] = ("python-code", "python-docs")
"""Texts that every machine has, named instead of a path."""
SLICE_CHARS = 1 << 18
"""Text that is tokenised at once: of a long document only the beginning is needed."""

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One kind of text.

    name: what it is called. path: UTF-8 text, .jsonl, a folder or glob of either, or "python-code" or "python-docs" for what this
    machine's Python brings; with token_ids, ids instead: .npy of one dimension, or .bin with .idx.
    """

    name: str
    path: str
    token_ids: bool = False


@dataclass(frozen=True)
class DomainTokens:
    """The first tokens of a domain, in the order of its files. kind: how its path was read."""

    domain: Domain
    kind: str
    ids_T: Ids

    @property
    def sha256(self) -> str:
        """Of the ids as little-endian int64: whatever else the text has does not matter."""
        return hashlib.sha256(self.ids_T.astype("<i8").tobytes()).hexdigest()


def check_domains(domains: Sequence[Domain]) -> list[Problem]:
    """What is wrong with names and paths."""
    problems, seen = [], set[str]()
    if not domains:
        problems.append(Problem("domain", "is not given; name one file of text for each domain: --domain code=code.txt"))
    for domain in domains:
        if not domain.name or not domain.path:
            problems.append(Problem("domain", f"is '{domain.name}={domain.path}', but must be NAME=PATH, as in code=code.txt"))
        elif domain.name in seen:
            problems.append(
                Problem("domain", f"'{domain.name}' is given twice; each domain has a centroid and a name of its own")
            )
        seen.add(domain.name)
    return problems


def read_domains(
    domains: Sequence[Domain], *, folder: Path, tokenizer: str | None, vocab_size: int, count: int, field: str = "text"
) -> list[DomainTokens]:
    """The first `count` tokens of each domain, or all if it has fewer; each document ends with the token that ends one.

    Args:
        domains: what to read.
        folder: of the checkpoint, whose tokenizer.json is used.
        tokenizer: another one instead: 'bytes', or the path of a tokenizer.json.
        vocab_size: of the model; ids are below it.
        count: tokens of each domain.
        field: key of the text in .jsonl objects.

    Raises:
        DataError: no tokenizer, or one with more ids than the model; domains that are missing, empty or unreadable, all at once.
    """
    known = None if all(domain.token_ids for domain in domains) else _tokenizer(folder, tokenizer, vocab_size)
    problems, found = Problems(), list[DomainTokens]()
    for domain in domains:
        before = len(problems.found)
        if domain.token_ids:
            kind, ids = "token ids", _stored_ids(domain, count, vocab_size, problems)
        else:
            assert known is not None
            source = _source(domain, field)
            kind, ids = source.type, _text_ids(source, known, count, problems)
        if not len(ids) and len(problems.found) == before:
            problems.add(
                f"domain '{domain.name}'", f"{domain.path} is empty, so it has no mean; give a file with text, or leave it out"
            )
        found.append(DomainTokens(domain, kind, ids))
    problems.raise_if()
    return found


def _tokenizer(folder: Path, spec: str | None, vocab_size: int) -> Tokenizer:
    ways = "give one by --tokenizer PATH (or bytes), or ids that are made already by --token-ids NAME=FILE"
    if spec is None and not (folder / "tokenizer.json").is_file():
        raise DataError(f"{folder} has no tokenizer.json, so text cannot become the ids that the model knows; {ways}")
    tokenizer = load_tokenizer(str(folder) if spec is None else spec)
    if tokenizer.vocab_size > vocab_size:
        what = f"has ids up to {tokenizer.vocab_size - 1}, but the model in {folder} only up to {vocab_size - 1}"
        raise DataError(f"the tokenizer {tokenizer.name} {what}; {ways}")
    return tokenizer


def _source(domain: Domain, field: str) -> SourceConfig:
    path = Path(domain.path).expanduser()
    for kind in EMBEDDED:
        if domain.path == kind and not path.exists():
            return SourceConfig(type=kind, name=domain.name)
    objects = domain.path.endswith(".jsonl") or (path.is_dir() and next(path.rglob("*.jsonl"), None) is not None)
    return SourceConfig(type="jsonl" if objects else "text", path=domain.path, name=domain.name, field=field)


def _text_ids(source: SourceConfig, tokenizer: Tokenizer, count: int, problems: Problems) -> Ids:
    """Ids of documents one after another, up to `count`; what is behind them is not read."""
    found: list[Ids] = []
    have = 0
    for document in read_documents(source, list_files(source, problems), problems):
        begun = have
        for text in _slices(document.pieces):
            found.append(tokenizer.encode(text).astype(np.int64))
            have += len(found[-1])
            if have >= count:
                break
        if have > begun:
            found.append(np.array([tokenizer.eos_id], np.int64))
            have += 1
        if have >= count:
            break
    return np.concatenate(found)[:count] if found else np.empty(0, np.int64)


def _slices(pieces: Iterator[str]) -> Iterator[str]:
    for piece in pieces:
        for start in range(0, len(piece), SLICE_CHARS):
            yield piece[start : start + SLICE_CHARS]


def _stored_ids(domain: Domain, count: int, vocab_size: int, problems: Problems) -> Ids:
    where, path = f"domain '{domain.name}'", Path(domain.path).expanduser()
    try:
        if path.suffix == ".npy":
            stored = np.load(path, mmap_mode="r", allow_pickle=False)
            if stored.ndim != 1 or stored.dtype.kind not in "iu":
                shape = f"{stored.dtype} of shape {list(stored.shape)}"
                problems.add(where, f"{path} is {shape}, but token ids must be integers of one dimension")
                return np.empty(0, np.int64)
            ids = stored[:count].astype(np.int64)
        else:
            stream = IndexedTokens(path)
            ids = stream.read(0, min(count, len(stream))).astype(np.int64)
    except (OSError, ValueError, EOFError) as error:
        problems.add(where, f"{path} cannot be read as .npy: {error}")
        return np.empty(0, np.int64)
    except DataError as error:
        problems.add(where, str(error))
        return np.empty(0, np.int64)
    wrong = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if len(wrong):
        what = f"{path} has id {ids[wrong[0]]} at position {wrong[0]}, but the model has ids 0 to {vocab_size - 1}"
        problems.add(where, f"{what}; make ids with the tokenizer of this model")
    return ids
