"""GPT-2: logits of transformers, files of every kind, what is refused, and what its format cannot hold."""

from __future__ import annotations

import tracemalloc
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moefold.moe.config import ModelConfig, MoEConfig
from moefold.moe.errors import CheckpointError, ConfigError
from moefold.moe.hf.families import FAMILIES, family_of, ignored_tensors, read_parts, write_tensors
from moefold.moe.hf.files import Checkpoint
from moefold.moe.hf.matrix import Given, Rows, Stored
from moefold.moe.hf.rewrites import adapt, rewritten
from moefold.moe.hf.rules import ARCHETYPES, TARGETS, rule_for
from moefold.moe.hf.transposed import BAND_BYTES, Band, Transposed
from numeric import assert_same
from tiny_models import native_model, randomize, stored, tiny_model

GPT2 = FAMILIES["gpt2"]
IDS = torch.arange(34).view(2, 17) * 7 % 37


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As transformers saves it."""
    path = tmp_path_factory.mktemp("gpt2")
    tiny_model("gpt2").save_pretrained(path)
    return path


def opened(folder: Path, into: Path, tensors: Mapping[str, torch.Tensor]) -> Checkpoint:
    """The same config.json with other tensors."""
    into.mkdir()
    (into / "config.json").write_text((folder / "config.json").read_text())
    save_file({name: t.contiguous() for name, t in tensors.items()}, into / "model.safetensors")
    return Checkpoint.open(into)


@pytest.mark.parametrize("changes", [{}, {"n_head": 1, "activation_function": "silu"}, {"tie_word_embeddings": False}])
def test_logits_are_those_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    """Odd sizes, heads of odd width, biases and norms of any value."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 21, "n_layer": 2, "n_head": 3, "n_positions": 19, "vocab_size": 37, "n_inner": 26}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id"))
    theirs = GPT2LMHeadModel(GPT2Config(**(sizes | tokens | changes))).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    config, parts = read_parts(Checkpoint.open(tmp_path))
    assert config.num_params == sum(p.numel() for p in theirs.parameters())
    with torch.no_grad():
        got, want = native_model(config, parts)(IDS)[0], theirs(IDS).logits
    assert_same({"logits": got}, {"logits": want}, 1e-5)


def test_the_first_releases_have_other_names_and_masks(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in weights.items()}
    masks = {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    old = opened(folder, tmp_path / "old", bare | masks)
    (config, parts), (wanted, wanted_parts) = read_parts(old), read_parts(Checkpoint.open(folder))
    assert config == wanted and {n: stored(m) for n, m in parts.items()} == {n: stored(m) for n, m in wanted_parts.items()}
    ignored = ignored_tensors(old, family_of(old.config, old.tensors), config)
    assert list(ignored) == list(masks) and all("mask" in why for why in ignored.values())
    # what is written has the names of today
    assert {n: stored(m) for n, m in write_tensors(GPT2, config, parts).items()} == {
        n: stored(m) for n, m in Checkpoint.open(folder).tensors.items()
    }
    with pytest.raises(CheckpointError, match=r"h.0.crossattention.q_attn.bias is no tensor of a gpt2 model"):
        read_parts(opened(folder, tmp_path / "more", weights | {"transformer.h.0.crossattention.q_attn.bias": torch.ones(3)}))


@pytest.mark.parametrize("name", ["attn.c_attn.bias", "mlp.c_fc.bias", "mlp.c_fc.weight", "ln_1.bias"])
def test_whole_numbers_are_refused_wherever_they_are(name: str, folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = f"transformer.h.1.{name}"
    with pytest.raises(CheckpointError, match=rf"damaged.*: {name} is I8, so it is quantised: use the checkpoint that it was"):
        read_parts(opened(folder, tmp_path / "damaged", weights | {name: weights[name].to(torch.int8)}))


def test_projections_are_read_in_bands() -> None:
    """Values do not depend on the steps that they are read in, nor on who else shares the band."""
    values = torch.randn(5, 300, dtype=torch.float64).numpy()
    band = Band()
    one, other = Transposed(Given(values), band), Transposed(Given(values + 1), band)
    for start, stop, left, right in ((0, 300, 0, 5), (17, 40, 1, 3), (299, 300, 4, 5), (3, 3, 0, 5)):
        for matrix, add in ((one, 0), (other, 1)):
            assert (matrix.block(start, stop, left, right, "F64") == values.T[start:stop, left:right] + add).all()
    assert stored(Rows(one, 7, 90)) == values.T[7:90].tobytes()
    wide = Given(torch.randn(BAND_BYTES // 4 // 3, 8, dtype=torch.float32).numpy())
    # four bands, and a block of two of them
    assert (Transposed(wide, band).block(2, 7, 0, 9, "F32") == wide.values[:9, 2:7].T).all()
    with pytest.raises(ValueError, match=r"not what has shape \[3\]"):
        Transposed(Given(values[0, :3]), band)


def test_of_a_file_with_many_rows_little_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bands are narrower than what is read by itself, so that whole rows are read: 64 times what is wanted of them."""
    rows, cols, width = 16384, 1024, 16
    values = np.random.default_rng(0).integers(0, 1 << 15, (rows, cols), dtype="u2")
    values.tofile(tmp_path / "w")
    tensor = Stored(path=tmp_path / "w", offset=0, shape=values.shape, dtype="BF16")
    monkeypatch.setattr("moefold.moe.hf.transposed.BAND_BYTES", 4 * rows * width)
    monkeypatch.setattr("moefold.moe.hf.matrix_sources.WIDE_BYTES", 3 * cols * 2)
    matrix = Transposed(tensor, Band())
    tracemalloc.start()
    try:
        found = matrix.block(width + 2, width + 5, 0, rows, "BF16")
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (found == values[:, width + 2 : width + 5].T).all()
    wanted = rows * width * 2
    assert held < wanted + (64 << 10) and peak < wanted + (128 << 10) < values.nbytes / 40
    # a last step of fewer rows, and other values of the type
    assert (tensor.block(5, 12, 1000, 1024, "BF16") == values[5:12, 1000:]).all()
    assert (tensor.block(5, 12, 3, 9, "F32").view("<u4") == values[5:12, 3:9].astype("u4") << 16).all()


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx (config.json): is True"),
    ({"add_cross_attention": True}, "add_cross_attention (config.json): is True"),
    ({"activation_function": "relu"}, "activation_function (config.json): is 'relu'"),
    ({"activation_function": "gelu"}, "activation_function (config.json): is 'gelu'"),
    ({"n_positions": 0}, "n_positions (config.json): is 0"),
    ({"n_head": 5}, "does not divide dim = 768"),
    ({"rotary_dim": 64}, "rotary_dim (config.json): is 64, and what it does in a gpt2 model is not known"),
]


@pytest.mark.parametrize(("keys", "told"), REFUSED, ids=["-".join(keys) + str(*keys.values()) for keys, _ in REFUSED])
def test_what_differs_is_refused(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GPT2.read({"model_type": "gpt2", **keys})
    assert told in str(caught.value)


def test_keys_left_out_mean_what_transformers_means() -> None:
    from transformers import GPT2Config

    for keys in ({}, {"n_embd": 60, "n_inner": 7, "scale_attn_weights": False}, {"reorder_and_upcast_attn": True}):
        assert GPT2.read({"model_type": "gpt2", **keys}) == GPT2.read(GPT2Config(**keys).to_dict())
    small = GPT2.read({"model_type": "gpt2"})
    assert small.num_params == 124_439_808 and small.dense_ffn_dim == 3072
    assert GPT2.read(GPT2.write(small)) == small


def test_no_format_with_experts_holds_it_but_our_own() -> None:
    for target in TARGETS:
        rule = rule_for("GPT-2", ARCHETYPES["GPT-2"], target)
        assert rule.mark == "x"
        if target in FAMILIES:
            told = " ".join(rule.reasons)
            words = ("norm is 'layer'", "positions is 'learned'", "ffn_gate is False", "ffn_bias is True")
            assert all(word in told for word in words) and (target != "mixtral" or "attention_bias is 'all'" in told)
    assert rule_for("GPT-2", ARCHETYPES["GPT-2"], "moefold").mark == "="


DENSE = ModelConfig(
    dim=16,
    num_layers=2,
    num_heads=4,
    vocab_size=37,
    max_seq_len=32,
    dense_ffn_dim=24,
    attention_bias="all",
    norm="layer",
    positions="learned",
    activation="gelu_tanh",
    ffn_gate=False,
    ffn_bias=True,
)
UNWRITABLE: list[tuple[dict[str, Any], str]] = [
    ({"norm": "rms"}, "norm is 'rms'"),
    ({"positions": "rotary"}, "positions is 'rotary'"),
    ({"ffn_gate": True}, "ffn_gate is True"),
    ({"ffn_bias": False}, "ffn_bias is False"),
    ({"num_kv_heads": 2}, "num_kv_heads is 2, but the format has as many as heads: 4"),
    ({"head_dim": 8}, "head_dim is 8"),
    ({"sliding_window": 4}, "sliding_window is 4"),
    ({"norm_order": "post"}, "norm_order is 'post'"),
    ({"moe": MoEConfig(num_experts=4, top_k=2, expert_dim=8)}, "has layers with experts"),
]


@pytest.mark.parametrize(("changes", "told"), UNWRITABLE, ids=[next(iter(changes)) for changes, _ in UNWRITABLE])
def test_what_its_format_cannot_hold(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        GPT2.write(replace(DENSE, **changes))
    assert told in str(caught.value)


def test_scales_are_folded_into_biases_too() -> None:
    """Rewrites that make our own model one that GPT-2's format holds keep its logits."""
    from moefold.moe.hf.parts import part_shapes

    scales = {"attention_scale": 0.3, "embed_scale": 2.0, "residual_scale": 0.4, "logits_scale": 3.0}
    config = replace(DENSE, **scales, attention_bias="none")
    draw = torch.Generator().manual_seed(0)
    parts: dict[str, Any] = {
        name: Given(torch.empty(shape).normal_(0.5 if len(shape) == 1 else 0, 0.3, generator=draw).numpy())
        for name, shape in part_shapes(config).items()
    }
    held, rewrites = adapt(GPT2, config)
    after, made = rewritten(rewrites, config, parts)
    assert held == after and GPT2.read(GPT2.write(held)) == held
    with torch.no_grad():
        got, want = (native_model(c, p)(IDS)[0] for c, p in ((after, made), (config, parts)))
    assert_same({"logits": got}, {"logits": want}, 1e-5)
