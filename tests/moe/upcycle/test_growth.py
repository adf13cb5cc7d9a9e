"""Deeper and wider models: which layers are repeated, and that wider FFNs compute what narrow ones do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from moefold.moe.errors import ConfigError
from moefold.moe.hf.parts import part_shapes
from moefold.moe.upcycle import UpcycleOptions, stack_depth, upcycle_parts, widen_ffn
from upcycle_oracle import arrays, dense_config, dense_parts, ffn, moe_forward, relative, tokens


def test_layers_are_stacked_as_a_whole() -> None:
    config = dense_config(num_layers=3)
    parts = dense_parts(config)
    deeper, stacked = stack_depth(config, parts, 2)
    assert deeper.num_layers == 6 and list(stacked) == list(part_shapes(deeper))
    for i in range(6):
        assert stacked[f"layers.{i}.ffn.up"] is parts[f"layers.{i % 3}.ffn.up"]
    assert stacked["embed"] is parts["embed"] and stacked["head.norm"] is parts["head.norm"]
    assert stack_depth(config, parts, 1) == (config, parts)


def test_moe_layers_are_stacked_where_the_pattern_goes_on() -> None:
    config = dense_config(num_layers=4)
    model = config, dense_parts(config)
    every_second = upcycle_parts([model], UpcycleOptions(num_experts=2, moe_every=2))
    deeper, stacked = stack_depth(*every_second, 3)
    assert {name: m.shape for name, m in stacked.items()} == part_shapes(deeper)
    every_third = upcycle_parts([model], UpcycleOptions(num_experts=2, moe_every=3))
    with pytest.raises(ConfigError, match=r"times.*is 2, but layer 4 would repeat the MoE layer 0.*makes it dense"):
        stack_depth(*every_third, 2)
    prefix = upcycle_parts([model], UpcycleOptions(num_experts=2, dense_prefix_layers=1))
    with pytest.raises(ConfigError, match=r"layer 4 would repeat the dense layer 0.*dense_prefix_layers = 1.*makes it MoE"):
        stack_depth(*prefix, 2)


@pytest.mark.parametrize(("times", "shares"), [(2, None), (3, None), (2, (0.75, 0.25)), (1, None)])
def test_a_wider_ffn_keeps_the_function(times: int, shares: Any) -> None:
    config, x_TD = dense_config(activation="gelu_tanh"), tokens()
    parts = dense_parts(config)
    wider, wide = widen_ffn(config, parts, times, shares)
    assert {name: matrix.shape for name, matrix in wide.items()} == part_shapes(wider)
    assert wider.dense_ffn_dim == 24 * times
    wanted = ffn(x_TD, arrays(parts), "layers.1.ffn", "gelu_tanh")
    assert relative(ffn(x_TD, arrays(wide), "layers.1.ffn", "gelu_tanh"), wanted) < 1e-12


@pytest.mark.parametrize("shared", [{"num_shared_experts": 1}, {"shared_width": 6}], ids=["as wide", "6"])
def test_wider_experts_keep_the_function(shared: dict[str, int]) -> None:
    config, x_TD = dense_config(num_layers=3), tokens()
    options = UpcycleOptions(num_experts=4, dense_prefix_layers=1, **shared)  # type: ignore[arg-type]
    moe, parts = upcycle_parts([(config, dense_parts(config))], options)
    wider, wide = widen_ffn(moe, parts, 2)
    assert {name: matrix.shape for name, matrix in wide.items()} == part_shapes(wider)
    wanted = moe_forward(x_TD, arrays(parts), moe, 1)
    assert relative(moe_forward(x_TD, arrays(wide), wider, 1), wanted) < 1e-12


def test_growth_and_upcycling_meet() -> None:
    """Widening by a power of two and then cutting is virtual groups of the widened model: still the dense function."""
    config = dense_config()
    parts = dense_parts(config)
    grown = widen_ffn(*stack_depth(config, parts, 2), 2)
    options = UpcycleOptions(method="virtual_groups", granularity=4, num_experts=8, top_k=4)
    moe, experts = upcycle_parts([grown], options)
    found = moe_forward(tokens(), arrays(experts), moe, 3)
    assert relative(found, ffn(tokens(), arrays(parts), "layers.1.ffn", "silu")) < 1e-12


def test_growth_that_cannot_be_is_refused() -> None:
    config = dense_config()
    parts = dense_parts(config)
    for grow in (stack_depth, widen_ffn):
        with pytest.raises(ConfigError, match=r"times.*is 0, but must be at least 1"):
            grow(config, parts, 0)
    for shares in ((1.0,), (0.5, 0.6), (np.nan, 0.5)):
        with pytest.raises(ConfigError, match=r"shares.*must be 2 numbers that sum to 1"):
            widen_ffn(config, parts, 2, shares)
