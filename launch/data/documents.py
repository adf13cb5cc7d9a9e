"""The documents of a source, one after the other: found, read and checked, but not yet tokenised."""

from __future__ import annotations

import ast
import codecs
import glob
import hashlib
import importlib
import json
import os
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ...moe.errors import DataError
from ..settings import SourceConfig

PIECE_BYTES = 4 << 20
MAX_PROBLEMS = 20
# Tests are repetitive and a fifth of the library; pydoc_data is the prose source; config-* and _sysconfigdata hold paths of
# the machine that Python was built on.
NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"})


class Problems:
    """Collects what is wrong with the data, so that a user sees everything at once (the first 20 findings)."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, where: str, what: str) -> None:
        self.found.append(f"{where}: {what}")

    @property
    def full(self) -> bool:
        return len(self.found) >= MAX_PROBLEMS

    def raise_if(self) -> None:
        """Raise one DataError with all problems, if there are any."""
        if not self.found:
            return
        shown = self.found[:MAX_PROBLEMS]
        more = "; stopped looking there" if self.full else ""
        title = f"data error: {len(shown)} problem{'s' if len(shown) != 1 else ''}{more}"
        raise DataError("\n".join([title, *(f"  {p}" for p in shown)]))


@dataclass(frozen=True)
class File:
    """A file of a source. `name` is its path below the source's root with forward slashes: the same on every machine."""

    path: str
    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Document:
    """`key` decides whether it is held out; `pieces` are its text in order, each at most a few MiB."""

    key: str
    pieces: Iterator[str]


def label(source: SourceConfig) -> str:
    """How messages name a source."""
    return f"data.sources '{source.domain}'"


def held_out(key: str, share: float) -> bool:
    """Whether a document is kept out of training: its key's SHA-256, read as a fraction, is below `share`."""
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()[:8], "big") < share * 2.0**64


def _file(path: str, root: str) -> File:
    stat = os.stat(path)
    return File(path, Path(os.path.relpath(path, root)).as_posix(), stat.st_size, stat.st_mtime_ns)


def _walk(root: str, skip: Callable[[str], bool], suffix: str = "") -> list[File]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would skip an unreadable folder without a word

    found = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = sorted(d for d in folders if not skip(d))
        found += [
            _file(os.path.join(folder, n), root)
            for n in names
            if n.endswith(suffix) and not skip(n) and os.path.isfile(os.path.join(folder, n))
        ]
    return sorted(found, key=lambda f: f.name)


def library_files() -> list[File]:
    """The `.py` files of this machine's standard library, without tests and files that Python's build made."""
    root = sysconfig.get_paths()["stdlib"]
    return _walk(root, lambda n: n in NOT_LIBRARY or n.startswith(("config-", "_sysconfigdata")), ".py")


def _glob_root(pattern: str) -> str:
    parts = Path(pattern).parts
    plain = next((i for i, p in enumerate(parts) if glob.has_magic(p)), len(parts))
    return str(Path(*parts[:plain])) if plain else "."


def list_files(source: SourceConfig, problems: Problems) -> list[File]:
    """Files of a source in the order they are read. What is missing or empty goes to `problems`.

    A folder means every file below it that is not hidden (text) or every `.jsonl` file (jsonl).
    """
    if source.type in ("python-code", "python-docs"):
        files = library_files()
        if not files:
            problems.add(
                label(source), f"this Python has no library sources in {sysconfig.get_paths()['stdlib']}; give text by `path`"
            )
        return files
    assert source.path is not None
    path = os.path.expanduser(source.path)
    if os.path.isfile(path):
        files = [_file(path, os.path.dirname(path) or ".")]
    elif os.path.isdir(path):
        files = _walk(path, lambda n: n.startswith("."), ".jsonl" if source.type == "jsonl" else "")
    elif glob.has_magic(path):
        found = [p for p in glob.glob(path, recursive=True) if os.path.isfile(p)]
        files = sorted((_file(p, _glob_root(path)) for p in found), key=lambda f: f.name)
    else:
        problems.add(label(source), f"path = '{source.path}': there is no such file or folder (looked in {os.getcwd()})")
        return []
    if not files:
        problems.add(
            label(source), f"path = '{source.path}': matches no file{' ending in .jsonl' if source.type == 'jsonl' else ''}"
        )
    elif not any(f.size for f in files):
        problems.add(label(source), f"path = '{source.path}': {len(files)} file{'s' if len(files) > 1 else ''}, all empty")
    return files


def _text_pieces(file: File, problems: Problems) -> Iterator[str]:
    """The text of a file in pieces that end after a line, so that memory stays bounded and tokenizers see whole words."""
    decoder, held, offset = codecs.getincrementaldecoder("utf-8")(), "", 0
    with open(file.path, "rb") as f:
        while True:
            block = f.read(PIECE_BYTES)
            nul = block.find(b"\0")
            if nul >= 0:
                problems.add(
                    file.path,
                    f"holds a NUL byte at offset {offset + nul}, so it is binary or UTF-16; leave it out or convert it to UTF-8",
                )
                return
            pending = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as e:
                at = offset - pending + e.start
                problems.add(
                    file.path, f"is not UTF-8: byte 0x{e.object[e.start]:02x} at offset {at}; convert it, for example with iconv"
                )
                return
            if offset == 0:
                text = text.removeprefix("\ufeff")
            offset += len(block)
            held += text
            if not block:
                if held:
                    yield held
                return
            cut = held.rfind("\n") + 1 or len(held)
            yield held[:cut]
            held = held[cut:]


def _jsonl_text(line: bytes, field: str) -> str:
    """The text of one line. Raises ValueError saying what is wrong with it."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as e:
        raise ValueError(f"is not UTF-8: byte 0x{line[e.start]:02x} at column {e.start + 1}") from e
    except json.JSONDecodeError as e:
        raise ValueError(f"is not JSON: {e.msg} at column {e.colno}") from e
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object, found {type(value).__name__}")
    if field not in value:
        keys = ", ".join(repr(k) for k in list(value)[:10]) or "none"
        raise ValueError(f"has no field '{field}'; its keys are {keys}; set the source's `field` to the one that holds the text")
    text = value[field]
    if not isinstance(text, str):
        raise ValueError(f"field '{field}' is {type(text).__name__}, expected a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as e:
        raise ValueError(f"field '{field}' has half of a surrogate pair at character {e.start}, which is no text") from e
    return text


def _jsonl_documents(files: list[File], field: str, problems: Problems) -> Iterator[Document]:
    for file in files:
        with open(file.path, "rb") as f:
            for number, line in enumerate(f, start=1):
                if problems.full:
                    return
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.strip():
                    continue
                try:
                    text = _jsonl_text(line, field)
                except ValueError as e:
                    problems.add(f"{file.path}:{number}", str(e))
                    continue
                yield Document(text, iter([text]))


def _docstrings(file: File) -> Iterator[str]:
    """The docstrings of a module as one piece; a generator, so that a file is parsed only when it is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old modules are not this user's concern
        try:
            tree = ast.parse(Path(file.path).read_bytes())
        except (SyntaxError, ValueError):
            return  # code for another Python (a template or a site file) has no docstrings to read
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
    yield "\n\n".join(d for d in found if d)


def _docs_documents(files: list[File], problems: Problems) -> Iterator[Document]:
    """Python's documentation topics (0.5 MB), then the docstrings of each library module (2 MB together).

    Docstrings are keyed by their module's file name, as the module is in `python-code`: both are held out or neither.
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        problems.add(
            "data.sources",
            "this Python comes without documentation topics (pydoc_data); use 'python-code', or give text by `path`",
        )
        return
    for name in sorted(topics):
        yield Document(f"topics/{name}", iter([topics[name]]))
    for file in files:
        yield Document(file.name, _docstrings(file))


def read_documents(source: SourceConfig, files: list[File], problems: Problems) -> Iterator[Document]:
    """Documents of a text-like source, in a fixed order. Unreadable ones go to `problems`, with file and place."""
    if source.type == "jsonl":
        yield from _jsonl_documents(files, source.field, problems)
    elif source.type == "python-docs":
        yield from _docs_documents(files, problems)
    else:
        for file in files:
            if problems.full:
                return
            yield Document(file.name, _text_pieces(file, problems))
