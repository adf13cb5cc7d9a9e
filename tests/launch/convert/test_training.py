"""Imported checkpoints in training: any layout loads them with the same values, and what training saves is exported again."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import torch
import torch.distributed.checkpoint as dcp

from checkpoints import State, state_of, whole
from helpers import run_threads
from jobs import command_ranks, settings
from moefold.launch.checkpoint import SCHEMA, Checkpointer, described, engine_state, parameter_shapes, write_complete
from moefold.launch.convert.compare import check
from moefold.launch.convert.run import export_checkpoint, import_checkpoint
from moefold.launch.convert.source import open_source
from moefold.launch.convert.tiles import Shard, stored_shard, tensor_of
from moefold.moe.config import ModelConfig
from moefold.moe.errors import CheckpointError
from moefold.moe.hf.families import FAMILIES, write_tensors
from moefold.parallel.parity import ParityCase, build_engine
from tiny_models import MODELS, SIZES, as_tensors, randomize, tiny_model


def load_and_save(rank: int, world: int, layout: dict[str, int], path: Path, out: Path, model: ModelConfig) -> Any:
    engine = build_engine(ParityCase(model, global_batch=8, seq_len=8, num_micro=1, precision="fp32"), layout)
    checkpointer = Checkpointer(out, keep=2, background=False)
    with pytest.raises(CheckpointError, match=r"weights only, so there is nothing to resume; start .* checkpoint.init_from"):
        checkpointer.load(path, engine)
    assert checkpointer.load(path, engine, weights_only=True).step == 0
    state = engine_state(engine)
    dcp.save(state, checkpoint_id=out)
    return state_of(engine), sorted(state), parameter_shapes(engine)


@pytest.mark.parametrize(
    ("name", "world", "layout"),
    [
        ("glm4_moe", 4, {"ep": 2, "tp": 2}),
        ("qwen2_moe", 4, {"ep": 2, "etp": 2, "tp": 2}),
        ("qwen3_moe", 3, {}),
    ],
)
def test_any_layout_loads_an_import_and_what_it_saves_is_the_same_model(
    name: str, world: int, layout: dict[str, int], tmp_path: Path
) -> None:
    """Three ranks do not divide four experts: their shards cut the model width."""
    tiny_model(name).save_pretrained(tmp_path / "hf")
    native = tmp_path / "native"
    import_checkpoint(tmp_path / "hf", native, shard_bytes=1024)
    source = open_source(native)
    (tmp_path / "saved").mkdir()
    ranks = run_threads(load_and_save, world, layout, native, tmp_path / "saved", source.config)
    states: list[State] = [rank[0] for rank in ranks]
    loaded = {n.removeprefix("weight "): v for n, v in whole(states).items() if n.startswith("weight ") or "expert_bias" in n}
    wanted = as_tensors(write_tensors(FAMILIES["moefold"], source.config, source.parts))
    assert loaded.keys() == wanted.keys()
    assert all(np.array_equal(loaded[n], wanted[n].numpy()) for n in wanted)
    # and back, from the shards of this layout
    _, names, shapes = ranks[0]
    out = tmp_path / "saved"
    meta = {"schema": SCHEMA, "step": 3, "tokens": 0, "model": dataclasses.asdict(source.config), "data": {}, "layout": {}}
    write_complete(out, meta | {"names": names, "shapes": shapes, "files": described([*out.glob("__*"), out / ".metadata"])})
    assert check(tmp_path / "hf", out).same


@pytest.mark.ranks
def test_train_an_import_on_two_ranks_and_let_transformers_go_on(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder, native, out = tmp_path / "hf", tmp_path / "native", tmp_path / "out"
    kind, keys = MODELS["mixtral"]
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **keys, "vocab_size": 264}))
    randomize(theirs)
    theirs.save_pretrained(folder)
    import_checkpoint(folder, native)
    lr = 1e-3
    flat = settings(tmp_path, train__steps=2, train__lr=lr, train__warmup_steps=0, train__eval_batches=0, parallel__ep=2)
    table: dict[str, Any] = {}
    for path, value in flat.items():
        section, key = path.rsplit(".", 1)
        if section != "model" and not section.startswith("model."):
            table.setdefault(section, {})[key] = value
    (tmp_path / "train.toml").write_text(tomli_w.dumps(table))
    words = ["pretrain", native / "model.toml", tmp_path / "train.toml", "--checkpoint.init_from", native]
    ended = command_ranks(2, words, tmp_path)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert f"starting at step 0 with the weights of {native}" in ended[0].out
    exported = export_checkpoint(tmp_path / "run", out, like=folder)
    assert exported.source.step == 2 and exported.target == "mixtral"
    # two steps of AdamW move a weight by little more than twice the learning rate
    found = check(folder, out)
    assert len(found.different) == len(found.a.parts) and not found.config
    assert all(d.most is not None and 0 < d.most < 3 * lr for d in found.different), found.render()
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    made = model.generate(torch.tensor([[72, 101, 108]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 6)
    # what has no optimizer cannot be resumed
    ended = command_ranks(
        1, [*words[:3], "--checkpoint.resume", native, "--run.dir", tmp_path / "other", "--parallel.ep", 1], tmp_path
    )
    assert ended[0].code == 3
    assert (
        "it holds weights only, so there is nothing to resume; start a new run from it with checkpoint.init_from" in ended[0].err
    )
    assert json.loads((native / "complete.json").read_text())["imported"]["family"] == "mixtral"


# --- shards in files ----------------------------------------------------------------------------------------------------


def saved(path: Path, tensor: torch.Tensor) -> tuple[int, int]:
    """Append a tensor to a file; where it is."""
    with path.open("ab") as file:
        offset = file.tell()
        torch.save(tensor, file)
        return offset, file.tell() - offset


@pytest.mark.parametrize("shape", [(7,), (5, 6), (4, 2, 6, 3), (3, 4, 5)], ids=str)
def test_shards_of_any_cut_make_up_the_tensor(shape: tuple[int, ...], tmp_path: Path) -> None:
    value, path, draw = torch.randn(shape), tmp_path / "file", np.random.default_rng(len(shape))
    cuts = [sorted({0, size, int(draw.integers(1, size))}) for size in shape]
    ranges = [list(itertools.pairwise(cut)) for cut in cuts]
    shards = []
    for index in np.ndindex(*(len(r) for r in ranges)):
        box = [ranges[axis][i] for axis, i in enumerate(index)]
        offset, length = saved(path, value[tuple(slice(a, b) for a, b in box)].contiguous())
        with path.open("rb") as file:
            shards.append(Shard(tuple(a for a, _ in box), stored_shard(file, path, offset, length)))
    whole_tensor = tensor_of(shape, shards)
    assert np.array_equal(whole_tensor.rows().reshape(shape), value.numpy())
    rows, cols = whole_tensor.num_rows, whole_tensor.cols
    part = whole_tensor.block(rows // 2, rows, 1, cols, "F32")
    assert np.array_equal(part, value.numpy().reshape(rows, cols)[rows // 2 :, 1:])
    with pytest.raises(ValueError, match="shards hold"):
        tensor_of(shape, shards[1:])


def test_only_plain_tensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    cases: list[tuple[Any, str]] = [
        (torch.randn(3, 4).t(), r"stored with strides \[1, 4\] for its shape \[4, 3\]"),
        ({"a": torch.randn(3)}, "has no tensor at byte"),
        (torch.nn.Linear(2, 2), "holds a torch.nn"),
    ]
    for value, said in cases:
        offset, length = saved(path, value)
        with path.open("rb") as file, pytest.raises(CheckpointError, match=said):
            stored_shard(file, path, offset, length)
    with path.open("rb") as file, pytest.raises(CheckpointError, match="has no tensor at byte 3"):
        stored_shard(file, path, 3, 100)
