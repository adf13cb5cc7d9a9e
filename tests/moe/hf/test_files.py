"""Opening checkpoint folders: against the safetensors package, and everything that can be wrong with a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from moefold.moe.errors import CheckpointError
from moefold.moe.hf.files import INDEX, SINGLE, Checkpoint

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def tensors(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {f"model.layers.{i}.mlp.{n}.weight": torch.randn(6, 4).to(dtype) for i in range(2) for n in ("up_proj", "down_proj")}


def make(folder: Path, *, sharded: bool = True, config: dict[str, Any] | None = None, **extra: torch.Tensor) -> Path:
    """A checkpoint of four small matrices (two in each shard) and `extra` in the last."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or {"model_type": "llama"}))
    all_of = tensors() | extra
    if not sharded:
        save_file(all_of, folder / SINGLE, {"format": "pt"})
        return folder
    names = list(all_of)
    places = {name: SHARDS[i > 1] for i, name in enumerate(names)}
    for shard in SHARDS:
        save_file({n: all_of[n] for n in names if places[n] == shard}, folder / shard, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("sharded", [False, True])
def test_tensors_are_those_of_safetensors(tmp_path: Path, sharded: bool) -> None:
    router = torch.randn(3, 4)
    folder = make(tmp_path / "m", sharded=sharded, **{"model.layers.0.mlp.gate.weight": router, "norm": torch.ones(4)})
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    found = Checkpoint.open(folder)
    want = tensors()
    assert found.dtype == "BF16" and found.config == {"model_type": "llama"} and found.metadata == {"format": "pt"}
    assert set(found.tensors) == {*want, "model.layers.0.mlp.gate.weight", "norm"}
    for name, tensor in want.items():
        assert (found.tensors[name].rows() == tensor.float().numpy()).all() and found.tensors[name].shape == (6, 4)
    assert (found.tensors["model.layers.0.mlp.gate.weight"].rows() == router.numpy()).all()
    assert found.nbytes == 4 * 48 + 48 + 16
    names = ["config.json", *((INDEX, *SHARDS) if sharded else (SINGLE,))]
    assert found.files == {name: (folder / name).stat().st_size for name in names}
    assert found.carry == (folder / "tokenizer.json",)
    calls: list[tuple[int, int]] = []
    hashes = found.hashes(lambda done, total, seconds: calls.append((done, total)))
    assert hashes == {name: sha256((folder / name).read_bytes()).hexdigest() for name in names}
    assert calls[-1] == (sum(found.files.values()),) * 2


def header(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the header of a file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])


def moved(table: dict[str, Any]) -> None:
    last = max((name for name in table if name != "__metadata__"), key=lambda name: table[name]["data_offsets"])
    table[last]["data_offsets"] = [n - 2 for n in table[last]["data_offsets"]]


def reshaped(table: dict[str, Any]) -> None:
    next(value for name, value in table.items() if name != "__metadata__")["shape"] = [5, 4]


def unknown(table: dict[str, Any]) -> None:
    next(value for name, value in table.items() if name != "__metadata__")["dtype"] = "BF17"


def index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads((folder / INDEX).read_text())
    change(value["weight_map"])
    (folder / INDEX).write_text(json.dumps(value))


def cut(path: Path, nbytes: int) -> None:
    path.write_bytes(path.read_bytes()[:nbytes])


def put(path: Path, text: str) -> None:
    path.write_text(text)


def bin_only(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


UP = "model.layers.0.mlp.up_proj.weight"
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json does not exist; every checkpoint has one"),
    "config no JSON": (lambda f: put(f / "config.json", "{"), r"config\.json is not JSON"),
    "config a list": (lambda f: put(f / "config.json", "[]"), r"config\.json holds a list, but must hold an object"),
    "missing shard": (lambda f: (f / SHARDS[1]).unlink(), f"lacks {SHARDS[1]} of the 2 shards"),
    "truncated shard": (lambda f: cut(f / SHARDS[0], 300), r"00001-of-00002\.safetensors cannot be read: .* it is truncated"),
    "truncated in the header": (lambda f: cut(f / SHARDS[0], 20), "its header alone would have .* truncated, or not safetensors"),
    "empty shard": (lambda f: cut(f / SHARDS[0], 0), "it has 0 bytes"),
    "longer shard": (lambda f: append(f / SHARDS[1]), "something was appended"),
    "header no JSON": (lambda f: put(f / SHARDS[0], "\x10\0\0\0\0\0\0\0" + "no JSON whatever"), "its header is not JSON"),
    "overlap": (lambda f: header(f / SHARDS[1], moved), "overlaps the tensor before it"),
    "other size": (lambda f: header(f / SHARDS[1], reshaped), r"is not the size of BF16 \[5, 4\]"),
    "unknown dtype": (lambda f: header(f / SHARDS[1], unknown), "has dtype 'BF17', known are"),
    "index names absent": (
        lambda f: index(f, lambda m: m.update(extra=SHARDS[0])),
        f"says that extra is in {SHARDS[0]}, but it is",
    ),
    "index misplaces": (lambda f: index(f, lambda m: m.update({UP: SHARDS[1]})), f"says that {UP} is in {SHARDS[1]}, but it is"),
    "index lacks": (lambda f: index(f, lambda m: m.pop(UP)), f"does not list {UP}, which is in {SHARDS[0]}"),
    "index leads away": (
        lambda f: index(f, lambda m: m.update({UP: "../x"})),
        r"names '\.\./x', which is not a file of this folder",
    ),
    "index without map": (lambda f: put(f / INDEX, "{}"), "has no weight_map"),
    "no index": (lambda f: (f / INDEX).unlink(), f"has {SHARDS[0]} .and 1 more., but no {INDEX}"),
    "index and single": (lambda f: make(f, sharded=False), f"both {SINGLE} and {INDEX}"),
    "bin only": (
        bin_only,
        r"has pytorch_model\.bin, but no safetensors files\. Convert it first, with transformers: .*save_pretrained",
    ),
    "no weights": (lambda f: [p.unlink() for p in f.glob("model*")], "there are no weights to read"),
    "quantised": (lambda f: make(f, config={"quantization_config": {"quant_method": "gptq"}}), "is quantised .gptq, says config"),
    "int8": (lambda f: make(f, a_weight=torch.zeros(2, 2, dtype=torch.int8)), "a_weight is I8, so it is quantised"),
    "float8": (lambda f: make(f, w=torch.zeros(2, 2).to(torch.float8_e4m3fn)), "w is F8_E4M3, so it is quantised"),
    "mixed": (lambda f: make(f, w=torch.zeros(2, 2)), "is BF16, but w is F32; only norms, biases and routers may differ"),
    "mixed halves": (lambda f: make(f, norm=torch.zeros(2).half()), "is BF16, but norm is F16"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_wrong_is_named(tmp_path: Path, case: str) -> None:
    folder = make(tmp_path / "m")
    Checkpoint.open(folder)
    damage, message = BROKEN[case]
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as caught:
        Checkpoint.open(folder)
    assert str(folder) in str(caught.value), "the message says where"


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder"):
        Checkpoint.open(tmp_path / "nowhere")


def test_gaps_and_doubles_in_a_header_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", sharded=False)
    entry = '"a":{"dtype":"U8","shape":[1],"data_offsets":[%d,%d]}'
    for text, message in (
        ("{%s}" % (entry % (1, 2)), "leaves 1 bytes before it unused"),
        (f"{{{entry % (0, 1)},{entry % (1, 2)}}}", "'a' is there twice"),
    ):
        (folder / SINGLE).write_bytes(len(text).to_bytes(8, "little") + text.encode() + b"\0\0")
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(folder)


def test_other_buffers_are_left_to_the_family(tmp_path: Path) -> None:
    folder = make(tmp_path / "m", **{"h.attn.bias": torch.ones(2, 2, dtype=torch.bool), "rotary.inv_freq": torch.ones(4)})
    found = Checkpoint.open(folder)
    assert found.tensors["h.attn.bias"].dtype == "BOOL" and found.tensors["rotary.inv_freq"].dtype == "F32"
    assert np.array_equal(found.tensors["rotary.inv_freq"].rows(), np.ones((1, 4)))
