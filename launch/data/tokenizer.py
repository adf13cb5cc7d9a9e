"""Text to token ids and back: bytes by default, or a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...moe.errors import DataError

EOS_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "<|im_end|>")


class Tokenizer(Protocol):
    """What the data pipeline needs from a tokenizer."""

    @property
    def name(self) -> str:
        """As written in `data.tokenizer`."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the same text could give other ids."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eos_id(self) -> int:
        """Id that ends a document."""

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, int32, without any special token added."""

    def decode(self, ids: np.ndarray) -> str:
        """Text of `ids`. Never fails: the end-of-document token is empty, what is no text becomes U+FFFD."""

    def count_bytes(self, ids: np.ndarray) -> int:
        """UTF-8 bytes of the text that `ids` stand for; the end-of-document token has none."""


class ByteTokenizer:
    """Ids 0 to 255 are the bytes of the UTF-8 text, 256 ends a document."""

    name = "bytes"
    fingerprint = "bytes-256eos"
    vocab_size = 257
    eos_id = 256

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int32)

    def decode(self, ids: np.ndarray) -> str:
        ids = np.asarray(ids).reshape(-1)
        ids = ids[ids != self.eos_id]
        # 0xff never occurs in UTF-8, so an id that is no byte shows up as U+FFFD like any other broken byte.
        known = np.where((ids >= 0) & (ids < 256), ids, 0xFF)
        return known.astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def count_bytes(self, ids: np.ndarray) -> int:
        return int(np.count_nonzero((ids >= 0) & (ids < 256)))


class JsonTokenizer:
    """A `tokenizer.json`, read by the optional library `tokenizers`."""

    def __init__(self, path: Path, spec: str) -> None:
        try:
            from tokenizers import Tokenizer as Backend
        except ImportError as e:
            raise DataError(
                f"data.tokenizer = '{spec}': reading a tokenizer.json needs the library 'tokenizers'; "
                "install it with: pip install 'moefold[tokenizers]', or use data.tokenizer = 'bytes'"
            ) from e
        try:
            content = path.read_bytes()
            self._backend: Any = Backend.from_str(content.decode("utf-8"))
        except Exception as e:  # the library raises bare Exception for whatever it cannot parse
            raise DataError(f"data.tokenizer = '{spec}': {path} is not a readable tokenizer.json: {e}") from e
        # Files made for encoders may ask for truncation or padding, which would cut documents without a word.
        self._backend.no_truncation()
        self._backend.no_padding()
        self.name = spec
        self.fingerprint = f"json-{hashlib.sha256(content).hexdigest()[:32]}"
        vocabulary = self._backend.get_vocab(with_added_tokens=True)
        self._known = np.zeros(max(vocabulary.values(), default=-1) + 1, dtype=bool)
        self._known[list(vocabulary.values())] = True
        self.vocab_size = len(self._known)
        self.eos_id = self._find_eos(path)

    def _find_eos(self, path: Path) -> int:
        for name in EOS_NAMES:
            found = self._backend.token_to_id(name)
            if found is not None:
                return int(found)
        added = [t.content for _, t in sorted(self._backend.get_added_tokens_decoder().items())]
        raise DataError(
            f"data.tokenizer: {path} has no end-of-document token: looked for {', '.join(EOS_NAMES)}; "
            f"its added tokens are {added[:40]}; add one of these names to it"
        )

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, ids: np.ndarray) -> str:
        ids = np.asarray(ids).reshape(-1)
        ids = ids[ids != self.eos_id]
        known = (ids >= 0) & (ids < self.vocab_size)
        known &= self._known[np.where(known, ids, 0)]
        cuts = np.flatnonzero(~known)  # a padded vocabulary lets a model sample ids that stand for nothing
        runs = np.split(ids, np.stack([cuts, cuts + 1], axis=1).reshape(-1)) if len(cuts) else [ids]
        texts = [
            self._backend.decode(run.tolist(), skip_special_tokens=False) if i % 2 == 0 else "\ufffd"
            for i, run in enumerate(runs)
        ]
        return "".join(texts)

    def count_bytes(self, ids: np.ndarray) -> int:
        return len(self.decode(ids).encode("utf-8", errors="replace"))


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names: 'bytes', a `tokenizer.json`, or a folder that holds one.

    Raises DataError if it is missing, cannot be read, or has no end-of-document token.
    """
    if spec == "bytes":
        return ByteTokenizer()
    path = Path(spec).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise DataError(f"data.tokenizer = '{spec}': there is no file {path}; use 'bytes' or the path of a tokenizer.json")
    return JsonTokenizer(path, spec)
