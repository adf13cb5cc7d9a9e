"""A checkpoint folder as Hugging Face writes it: config.json and safetensors files. Opening it reads headers only."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import CheckpointError
from .codec import FLOATS
from .matrix_sources import Stored
from .safetensors_header import read_header

CONFIG, SINGLE, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"

CARRIED = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt", "merges.txt", "tekken.json"),
    *("chat_template.json", "chat_template.jinja", "LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE", "USE_POLICY.md"),
)
"""Files that go with a model whatever its weights become: tokenizer, generation defaults, licence."""

WIDE_ALLOWED = re.compile(r"norm|bias|router|(^|\.)(shared_expert_)?gate\.weight$")
"""Names of matrices that may be F32 where the others are not: vectors may anyway."""

Progress = Callable[[int, int, float], None]
"""Called with bytes done, bytes in total, and seconds since the start."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder whose files agree with one another.

    folder: where. config: config.json. tensors: by name, in the order of index or file. files: config.json and the files with
    tensors, and their sizes in bytes. carry: files to take along (tokenizer, licence). dtype: that of the weights. metadata:
    of the first file's header.
    """

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, Stored]
    files: Mapping[str, int]
    carry: tuple[Path, ...]
    dtype: str
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, folder: str | Path) -> Checkpoint:
        """Read config.json and all headers.

        Raises CheckpointError: no such folder; no config.json; no safetensors files; a shard that is missing, truncated or
        malformed; an index that disagrees with its shards; quantised weights; weights of several dtypes.
        """
        folder = Path(folder).absolute()
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder; a checkpoint is a folder with config.json and safetensors files")
        config = read_json(folder / CONFIG, "every checkpoint has one: it says what the tensors are")
        tensors, names, metadata = _tensors(folder)
        if not tensors:
            raise CheckpointError(f"{folder} holds no tensors")
        _refuse_quantised(folder, config, tensors)
        files = {name: (folder / name).stat().st_size for name in (CONFIG, *names)}
        carry = tuple(folder / name for name in CARRIED if (folder / name).is_file())
        freeze = MappingProxyType
        dtype = _weights_dtype(folder, tensors)
        return cls(folder, freeze(config), freeze(tensors), freeze(files), carry, dtype, freeze(metadata))

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes() for tensor in self.tensors.values())

    def hashes(self, progress: Progress | None = None) -> dict[str, str]:
        """SHA-256 of each of `files`, as hexadecimal digits. Reads everything once: about as fast as one core hashes."""
        start_s, total, before, found = time.monotonic(), sum(self.files.values()), 0, {}
        for name, size in self.files.items():

            def told(done: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + done, total, time.monotonic() - start_s)

            found[name] = file_sha256(self.folder / name, told)
            before += size
        return found


def file_sha256(path: Path, told: Callable[[int], None] | None = None) -> str:
    """SHA-256 of a file, read in pieces of 1 MiB. told: called with the bytes done, now and then."""
    digest, buffer, done = hashlib.sha256(), bytearray(1 << 20), 0
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(memoryview(buffer)[:count])
                before, done = done, done + count
                if told is not None and before >> 26 != done >> 26:
                    told(done)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if told is not None:
        told(done)
    return digest.hexdigest()


def read_json(path: Path, why: str) -> dict[str, Any]:
    """An object in a JSON file. Raises CheckpointError; `why` says what a missing file would be for."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; {why}") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, but must hold an object")
    return value


def _tensors(folder: Path) -> tuple[dict[str, Stored], list[str], dict[str, str]]:
    """All tensors, the files that have to do with them, and the metadata."""
    single, index = (folder / SINGLE).is_file(), (folder / INDEX).is_file()
    if single and index:
        raise CheckpointError(f"{folder} has both {SINGLE} and {INDEX}: remove the one that is not meant")
    if single:
        tensors, metadata = read_header(folder / SINGLE)
        return tensors, [SINGLE], metadata
    if index:
        return _from_index(folder)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf"))
    if not others:
        raise CheckpointError(f"{folder} has neither {SINGLE} nor {INDEX}, so there are no weights to read")
    if all(name.endswith(".safetensors") for name in others):
        raise CheckpointError(f"{folder} has {_few(others)}, but no {INDEX} that says which tensor is where: copy it as well")
    raise CheckpointError(
        f"{folder} has {_few(others)}, but no safetensors files. Convert it first, with transformers: "
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained(NEW_FOLDER)"
    )


def _from_index(folder: Path) -> tuple[dict[str, Stored], list[str], dict[str, str]]:
    path = folder / INDEX
    places = read_json(path, "it says which tensor is where").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise CheckpointError(f"{path} has no weight_map from tensors to files")
    shards = sorted(set(places.values()))
    foreign = [name for name in shards if Path(name).name != name]
    if foreign:
        raise CheckpointError(f"{path} names {foreign[0]!r}, which is not a file of this folder")
    missing = [name for name in shards if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(f"{folder} lacks {_few(missing)} of the {len(shards)} shards in {INDEX}: download or copy it again")
    headers = {name: read_header(folder / name) for name in shards}
    there = {(tensor, shard) for shard, (tensors, _) in headers.items() for tensor in tensors}
    absent = [tensor for tensor, shard in places.items() if (tensor, shard) not in there]
    if absent:
        raise CheckpointError(f"{path} says that {_few(absent)} is in {places[absent[0]]}, but it is not")
    unlisted = sorted(there - set(places.items()))
    if unlisted:
        raise CheckpointError(f"{path} does not list {_few([tensor for tensor, _ in unlisted])}, which is in {unlisted[0][1]}")
    return {name: headers[shard][0][name] for name, shard in places.items()}, [INDEX, *shards], headers[shards[0]][1]


def _refuse_quantised(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Stored]) -> None:
    if config.get("quantization_config"):
        method = config["quantization_config"]
        method = method.get("quant_method", "some method") if isinstance(method, dict) else method
        raise CheckpointError(f"{folder} is quantised ({method}, says {CONFIG}): use the checkpoint that it was made from")
    narrow = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype.startswith("F8") or (tensor.dtype not in FLOATS and name.rsplit(".", 1)[-1].endswith("weight"))
    ]
    if narrow:
        kind = tensors[narrow[0]].dtype
        raise CheckpointError(f"{folder}: {_few(narrow)} is {kind}, so it is quantised: use the checkpoint that it was made from")


def _weights_dtype(folder: Path, tensors: Mapping[str, Stored]) -> str:
    """The dtype of most bytes. Others are refused, but F32 in norms, biases and routers."""
    nbytes: Counter[str] = Counter()
    for tensor in tensors.values():
        if tensor.dtype in FLOATS:
            nbytes[tensor.dtype] += tensor.nbytes()
    if not nbytes:
        raise CheckpointError(f"{folder} holds no floating-point tensors")
    main = nbytes.most_common(1)[0][0]
    odd = [
        name
        for name, tensor in tensors.items()
        if tensor.dtype in FLOATS and tensor.dtype != main
        if tensor.dtype != "F32" or (len(tensor.shape) > 1 and not WIDE_ALLOWED.search(name))
    ]
    if odd:
        raise CheckpointError(
            f"{folder} is {main}, but {_few(odd)} is {tensors[odd[0]].dtype}; only norms, biases and routers may differ, "
            "and be F32: load it with transformers in one dtype and save it again"
        )
    return main


def _few(names: list[str]) -> str:
    """The first name, and how many more."""
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"
