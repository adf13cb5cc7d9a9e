"""From a dense checkpoint to an upcycled, trained and exported one that transformers generates from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import command_ranks, write_corpus
from moefold.launch.convert.compare import check
from moefold.launch.convert.run import export_checkpoint, import_checkpoint
from moefold.launch.upcycle import upcycle
from tiny_models import MODELS, SIZES, randomize

LR = 1e-3


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("sizes", "layout"),
    [
        ({"target": "qwen2_moe", "num_experts": 4, "shared_width": 8, "shared_gate": True}, {"ep": 2, "tp": 2}),
        (
            {"target": "mixtral", "method": "virtual_groups", "num_experts": 4, "granularity": 2, "top_k": 2},
            {"ep": 1, "etp": 2, "tp": 2},
        ),
    ],
    ids=["copy-ep2-tp2", "virtual_groups-etp2-tp2"],
)
def test_train_an_upcycled_model_in_a_layout_and_generate_from_it(
    sizes: dict[str, Any], layout: dict[str, int], tmp_path: Path
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, keys = MODELS["llama"]
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **keys, "vocab_size": 264}))
    randomize(dense)
    dense.save_pretrained(tmp_path / "dense")
    folder, native = tmp_path / "moe", tmp_path / "moe-native"
    result = upcycle(tmp_path / "dense", folder, **sizes, proof_tokens=24)
    assert result.proof is not None and result.proof.exact
    import_checkpoint(folder, native)
    source = f'[{{type="text", path="{write_corpus(tmp_path / "text.txt")}", name="text"}}]'
    flags = {
        **{f"parallel.{name}": size for name, size in layout.items()},
        **{"data.sources": source, "data.seq_len": 32, "train.tokens": "none", "train.steps": 2, "train.global_batch": 8},
        **{"train.lr": LR, "train.warmup_steps": 0, "train.threads": 1, "run.dir": tmp_path / "run", "log.tensorboard": "false"},
    }
    words = ["pretrain", folder / "pretrain.toml", *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]
    ended = command_ranks(2, words, tmp_path)
    assert [rank.code for rank in ended] == [0, 0], ended
    out = tmp_path / "out"
    export_checkpoint(tmp_path / "run", out, like=folder)
    found = check(folder, out)
    assert found.different and not found.config, found.render()
    # two steps of AdamW move a weight by little more than twice the learning rate
    assert all(d.most is not None and 0 < d.most < 3 * LR for d in found.different), found.render()
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    made = model.generate(torch.tensor([[72, 101, 108]]), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 6)
