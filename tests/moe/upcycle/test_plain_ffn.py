"""Upcycling of feed-forward networks without a gate and with biases: exact where it says so, refused where it makes no sense."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from moefold.moe.config import ModelConfig
from moefold.moe.errors import ConfigError
from moefold.moe.hf.matrix import Matrix
from moefold.moe.upcycle import METHODS, UpcycleOptions, stack_depth, upcycle_parts, widen_ffn
from upcycle_oracle import GPT2, arrays, dense_config, dense_parts, ffn, gap, tokens

EXACT = 1e-12
KINDS: Mapping[str, Mapping[str, Any]] = {"gpt2": GPT2, "plain": {"ffn_gate": False}, "biased": {"ffn_bias": True}}
CUT = {"method": "virtual_groups", "num_experts": 6, "granularity": 2, "top_k": 4}
SPLIT = {"method": "split", "num_experts": 4, "top_k": 4, "router_init": "zeros"}
SETTINGS: list[dict[str, Any]] = [
    {"method": "copy", "num_experts": 4},
    {"method": "copy", "num_experts": 4, "scaling_factor": 2.5, "score": "sigmoid"},
    {"method": "copy", "num_experts": 4, "renormalize": False, "router_init": "zeros"},
    CUT,
    CUT | {"scaling_factor": 2.5, "shuffle": True},
    CUT | {"scale_placement": "routed_scaling"},
    CUT | {"renormalize": False, "router_init": "zeros", "score": "sigmoid"},
    CUT | {"renormalize": False, "router_init": "zeros", "scale_placement": "routed_scaling"},
    CUT | {"shared_width": 6},
    CUT | {"shared_width": 5, "shared_gate": True, "pad_multiple": 4},
    CUT | {"num_shared_experts": 1, "shared_init": "zero"},
    SPLIT,
    SPLIT | {"split_by": "weights", "renormalize": False},
    SPLIT | {"num_shared_experts": 2, "score": "sigmoid", "renormalize": False},
    {"method": "dense_shared", "num_experts": 5, "granularity": 3, "top_k": 2},
    {"method": "dense_shared", "num_experts": 4, "shared_gate": True, "renormalize": False, "pad_multiple": 16},
    {"method": "drop", "num_experts": 4, "reinit_ratio": 0.0},
    {"method": "noise", "num_experts": 4, "noise_share": 0.0},
]


def made(kind: Mapping[str, Any], **options: Any) -> tuple[Any, Any, str | None]:
    """(dense model, what is made of it, what `exact` says), each model as config and parts."""
    config = dense_config(**kind)
    parts, chosen = dense_parts(config), UpcycleOptions(**{"router_std": 1.0, "seed": 3} | options)
    return (config, parts), upcycle_parts([(config, parts)], chosen), METHODS[chosen.method].exact(config, chosen)


def values(parts: Mapping[str, Matrix], name: str) -> Any:
    return arrays({name: parts[name]})[name]


@pytest.mark.parametrize("kind", KINDS)
def test_methods_keep_the_function(kind: str) -> None:
    for options in SETTINGS:
        dense, result, told = made(KINDS[kind], **options)
        assert told is None, (options, told)
        assert gap(dense, result) < EXACT, options
        assert result[0].num_params == sum(int(np.prod(m.shape)) for m in result[1].values()), options


def test_the_second_bias_is_counted_once() -> None:
    (_, dense), (_, cut), _ = made(GPT2, **CUT)
    bias, name = values(dense, "layers.0.ffn.down_bias"), "layers.0.moe.experts.3.{}"
    # pieces are doubled to be weighed by a half each, their bias is whole
    assert np.array_equal(values(cut, name.format("down_bias")), bias)
    assert np.array_equal(values(cut, name.format("down")), 2 * values(dense, "layers.0.ffn.down")[:, 12:])
    assert np.array_equal(values(cut, name.format("up_bias")), values(dense, "layers.0.ffn.up_bias")[12:])
    (_, dense), (_, shared), _ = made(GPT2, method="dense_shared", num_experts=4, shared_gate=True)
    assert np.array_equal(values(shared, "layers.1.moe.shared.down_bias"), 2 * values(dense, "layers.1.ffn.down_bias"))
    assert not values(shared, name.format("down_bias")).any()


def test_a_root_of_the_scale_goes_to_every_matrix() -> None:
    (_, dense), (_, cut), told = made(GPT2, **CUT, scale_placement="both")
    assert told is not None and "square root of 2" in told
    name = "layers.0.moe.experts.0"
    before = {n: values(dense, f"layers.0.ffn.{n}") for n in ("up", "up_bias", "down", "down_bias")}
    np.testing.assert_allclose(values(cut, f"{name}.up"), 2**0.5 * before["up"][:12])
    np.testing.assert_allclose(values(cut, f"{name}.up_bias"), 2**0.5 * before["up_bias"][:12])
    np.testing.assert_allclose(values(cut, f"{name}.down"), 2**0.5 * before["down"][:, :12])
    assert np.array_equal(values(cut, f"{name}.down_bias"), before["down_bias"])


@pytest.mark.parametrize("per_matrix", [False, True])
def test_drop_draws_whole_neurons(per_matrix: bool) -> None:
    (_, dense), (_, result), told = made(GPT2, method="drop", num_experts=2, per_matrix=per_matrix)
    assert told is not None and f"{25 if per_matrix else 50} % stay whole" in told
    kept = {}
    for name in ("up", "up_bias", "down", "down_bias"):
        same = values(result, f"layers.0.moe.experts.1.{name}") == values(dense, f"layers.0.ffn.{name}")
        kept[name] = same if same.ndim == 1 else same.all(axis=1 if name == "up" else 0)
    assert kept["up"].sum() == kept["down"].sum() == 12 and kept["down_bias"].all()
    assert (kept["up"] == kept["up_bias"]).all()
    assert (kept["up"] == kept["down"]).all() != per_matrix


def test_noise_leaves_biases_alone() -> None:
    (_, dense), (_, result), told = made(GPT2, method="noise", num_experts=2)
    assert told is not None
    same = {
        name: float((values(result, f"layers.0.moe.experts.0.{name}") == values(dense, f"layers.0.ffn.{name}")).mean())
        for name in ("up", "up_bias", "down", "down_bias")
    }
    assert same["up_bias"] == same["down_bias"] == 1 and 0.3 < same["up"] < 0.7 and 0.3 < same["down"] < 0.7


def test_models_are_merged_with_their_biases() -> None:
    config = dense_config(**GPT2)
    models = [(config, dense_parts(config, seed)) for seed in range(3)]
    result, parts = upcycle_parts(models, UpcycleOptions(method="merge", top_k=2))
    assert result.moe is not None and result.moe.num_experts == 3
    for name in ("positions", "head.norm_bias", "layers.1.attention_norm_bias"):
        np.testing.assert_allclose(values(parts, name), np.mean([values(p, name) for _, p in models], axis=0))
    for e, (_, dense) in enumerate(models):
        wanted = ffn(tokens(), arrays(dense), "layers.0.ffn", "gelu_tanh")
        np.testing.assert_allclose(ffn(tokens(), arrays(parts), f"layers.0.moe.experts.{e}", "gelu_tanh"), wanted)
    # without learned positions this would only be the smaller limit
    other = dense_config(**GPT2, max_seq_len=8)
    with pytest.raises(ConfigError, match="max_seq_len"):
        METHODS["merge"].plan([config, other], UpcycleOptions(method="merge"))


def test_flex_olmo_refuses_them() -> None:
    config = dense_config(**GPT2)
    with pytest.raises(ConfigError, match=r"(?s)ffn_gate: is False.*ffn_bias: is True.*use method 'merge'"):
        METHODS["flex_olmo"].plan([config, config], UpcycleOptions(method="flex_olmo"))


def test_growth_keeps_biases_with_their_neurons() -> None:
    for options in (None, CUT):
        (config, parts), result, _ = made(GPT2, **(options or CUT))
        model: tuple[ModelConfig, Mapping[str, Matrix]] = (config, parts) if options is None else result
        at = "layers.1.ffn" if options is None else "layers.1.moe.experts.2"
        wide, wider = widen_ffn(*model, 2, [0.25, 0.75])
        wanted = ffn(tokens(), arrays(model[1]), at, "gelu_tanh")
        np.testing.assert_allclose(ffn(tokens(), arrays(wider), at, "gelu_tanh"), wanted)
        assert wide.num_params == sum(int(np.prod(m.shape)) for m in wider.values())
        deep, deeper = stack_depth(*model, 2)
        assert list(deeper) and deep.num_params == sum(int(np.prod(m.shape)) for m in deeper.values())
        assert deeper["layers.3.ffn_norm_bias"] is model[1]["layers.1.ffn_norm_bias"]
