"""Settings of the compression: what is refused and in which words, the schedule of the rate, and what is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moefold.moe.compress import rate_at
from moefold.moe.config import CompressConfig, ModelConfig, MoEConfig
from moefold.moe.errors import ConfigError
from moefold.moe.layer import MoELayer
from moefold.moe.model import Model

Build = Callable[..., object]


def lsh(**changes: Any) -> CompressConfig:
    return CompressConfig(**({"method": "lsh"} | changes))


def moe(**changes: Any) -> MoEConfig:
    return MoEConfig(**({"num_experts": 4, "top_k": 2, "expert_dim": 8, "compress": lsh()} | changes))


def model(dim: int = 16, **changes: Any) -> ModelConfig:
    return ModelConfig(dim=dim, num_layers=3, num_heads=2, vocab_size=32, max_seq_len=8, dense_ffn_dim=8, moe=moe(**changes))


# what is refused


NEGATIVE = "but must not be negative"
SHARE = "but must be over 0 and at most 1 (1 sends every row)"
RULES: list[tuple[Build, dict[str, Any], str, str]] = [
    *((lsh, {"rate": rate}, "rate", f"is {rate}, {SHARE}") for rate in (0.0, -0.1, 1.01, math.nan, math.inf)),
    *((lsh, {name: n}, name, f"is {n}, but must be positive") for name in ("hashes", "hash_width") for n in (0, -1, -3)),
    (lsh, {"hash_width": 12}, "hash_width", "is 12, but must be a power of two"),
    *((lsh, {name: -1}, name, f"is -1, {NEGATIVE}") for name in ("exact_choices", "error_tokens")),
    *((lsh, {name: -0.1}, name, f"is -0.1, {NEGATIVE}") for name in ("radius", "warmup", "anneal")),
    *((lsh, {name: math.nan}, name, f"is nan, {NEGATIVE}") for name in ("radius", "warmup", "anneal")),
    (lsh, {"radius": math.inf}, "radius", f"is inf, {NEGATIVE}, and must be finite"),
    (lsh, {"warmup": 0.6, "anneal": 0.5}, "warmup", "is 0.6, and anneal is 0.5: together more than all steps"),
    (lsh, {"warmup": 1.5}, "warmup", "is 1.5, and anneal is 0.0: together more than all steps"),
    (lsh, {"method": "topk"}, "method", "is 'topk', but must be one of 'none', 'lsh'"),
    (lsh, {"compensation": "vector"}, "compensation", "is 'vector', but must be one of 'none', 'identity', 'scalar'"),
    (lsh, {"rate": "0.2"}, "rate", "is '0.2', but must be a number or None"),
    (lsh, {"hashes": 2.5}, "hashes", "is 2.5, but must be a whole number"),
    (lsh, {"gate_weighted": 1}, "gate_weighted", "is 1, but must be true or false"),
    (moe, {"compress": lsh(exact_choices=3)}, "exact_choices", "is 3, more than top_k = 2"),
    (model, {"dim": 4}, "hash_width", "is 8, more directions than dim = 4"),
]


def rule_id(rule: tuple[Build, dict[str, Any], str, str]) -> str:
    return "-".join(
        [rule[0].__name__, rule[2], *(f"{value}" for value in rule[1].values() if not isinstance(value, CompressConfig))]
    )


@pytest.mark.parametrize(("build", "changes", "name", "what"), RULES, ids=map(rule_id, RULES))
def test_each_rule_names_the_setting_and_its_value_once(build: Build, changes: dict[str, Any], name: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(**changes)
    [problem] = caught.value.problems
    assert problem.where == f"model.moe.compress.{name}"
    assert what in problem.what


def test_all_problems_come_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        lsh(rate=2.0, hashes=0, hash_width=3, radius=-1.0, exact_choices=-1, warmup=-1.0, anneal=3.0, error_tokens=-2)
    found = [p.where.removeprefix("model.moe.compress.") for p in caught.value.problems]
    assert sorted(found) == sorted(
        ["rate", "hashes", "hash_width", "radius", "exact_choices", "warmup", "error_tokens", "warmup"]
    )


def test_a_section_that_is_no_record_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.moe\.compress: is {'method': 'lsh'}, but must be a CompressConfig"):
        moe(compress={"method": "lsh"})


@pytest.mark.parametrize(
    "build",
    [
        lambda: lsh(rate=1.0, radius=0.0, hashes=1, hash_width=1, warmup=0.0, anneal=1.0),
        lambda: lsh(rate=1e-9, warmup=1.0),
        lambda: lsh(rate=None, warmup=0.7, anneal=0.3),
        lambda: lsh(rate=1, radius=1),
        lambda: moe(compress=lsh(exact_choices=2)),
        lambda: model(dim=16),
        lambda: model(dim=8, compress=lsh(hash_width=8)),
        lambda: model(dim=8, compress=CompressConfig(hash_width=16)),
    ],
    ids=["corners", "almost-nothing", "no-rate", "whole-numbers", "exact-top_k", "width-of-dim", "smaller-width", "width-unused"],
)
def test_the_edge_of_what_is_legal_is_accepted(build: Build) -> None:
    assert build() == build()


# the rate over a run


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [0.2] * 10),
        ({"method": "none"}, [1.0] * 10),
        ({"method": "none", "rate": None}, [1.0] * 10),
        ({"rate": 1.0, "anneal": 0.5}, [1.0] * 10),
        ({"warmup": 0.3}, [1.0] * 3 + [0.2] * 7),
        ({"warmup": 0.25}, [1.0] * 3 + [0.2] * 7),
        ({"warmup": 1.0}, [1.0] * 10),
        ({"anneal": 0.4}, [0.2] * 6 + [0.4, 0.6, 0.8, 1.0]),
        ({"anneal": 1.0}, [0.28 + 0.08 * step for step in range(10)]),
        ({"warmup": 0.5, "anneal": 0.5}, [1.0] * 5 + [0.36, 0.52, 0.68, 0.84, 1.0]),
        # less than one step of annealing is one
        ({"anneal": 0.05}, [0.2] * 9 + [1.0]),
        ({"rate": None}, [None] * 10),
        ({"rate": None, "warmup": 0.2, "anneal": 0.3}, [1.0] * 2 + [None] * 5 + [1.0] * 3),
    ],
    ids=str,
)
def test_rates_of_ten_steps(changes: dict[str, Any], expected: list[float | None]) -> None:
    found = [rate_at(lsh(**changes), step, 10) for step in range(10)]
    assert [None if r is None else round(r, 12) for r in found] == [None if r is None else round(r, 12) for r in expected]
    assert rate_at(lsh(**changes), 0, 1) in (expected[0], 0.2, 1.0, None), "a run of one step"


@given(
    rate=st.floats(0.01, 1),
    warmup=st.integers(0, 100),
    anneal=st.integers(1, 100),
    total=st.integers(1, 500),
)
@settings(deadline=None)
def test_the_rate_never_falls_after_the_warmup_and_stays_in_its_bounds(rate: float, warmup: int, anneal: int, total: int) -> None:
    config = lsh(rate=rate, warmup=warmup / 100, anneal=min(anneal, 100 - warmup) / 100)
    rates = [rate_at(config, step, total) for step in range(total + 2)]
    ends = -(-warmup * total // 100)
    assert rates[:ends] == [1.0] * ends, "no step of the warmup is missed"
    after = [r for r in rates[ends:] if r is not None]
    assert after == sorted(after) and all(rate <= r <= 1 for r in after)
    assert len(after) == total + 2 - ends
    assert after[-1] == (1.0 if config.anneal else rate)
    if config.anneal == 0:
        assert after[0] == rate, "warmed up too long"
    elif ends < total:
        assert rates[total - 1] == 1.0, "the last step sends every row"


@pytest.mark.parametrize(("part", "total", "steps"), [(0.07, 100, 7), (0.14, 50, 7), (0.29, 100, 29), (0.57, 300, 171)])
def test_parts_of_a_run_are_the_fractions_that_were_meant(part: float, total: int, steps: int) -> None:
    warmed, annealed = lsh(warmup=part), lsh(anneal=part)
    assert [rate_at(warmed, s, total) for s in (steps - 1, steps)] == [1.0, 0.2]
    assert rate_at(annealed, total - steps - 1, total) == 0.2 < rate_at(annealed, total - steps, total)  # type: ignore[operator]


# what is trained


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize(("compensation", "extra"), [("none", 0), ("identity", 0), ("scalar", 1), ("diagonal", 16)])
def test_parameters_are_those_of_the_model(compensation: str, extra: int, prefix: int) -> None:
    config = replace(model(compress=lsh(compensation=compensation)), dense_prefix_layers=prefix)
    plain = replace(config, moe=moe(compress=CompressConfig(compensation=compensation)))  # type: ignore[arg-type]
    assert config.num_params == sum(p.numel() for p in Model(config).parameters())
    assert config.num_params - plain.num_params == (3 - prefix) * extra
    assert config.num_active_params - plain.num_active_params == (3 - prefix) * extra


def test_compression_adds_no_matrix_product() -> None:
    with_it, without = (model(compress=lsh(compensation=c)) for c in ("diagonal", "identity"))
    assert with_it.flops_per_token(8) == without.flops_per_token(8)


def test_a_layer_without_compression_has_no_codec() -> None:
    assert MoELayer(16, moe(compress=CompressConfig(compensation="diagonal"))).codec is None
    layer = MoELayer(16, moe(compress=lsh(compensation="diagonal")))
    assert torch.equal(dict(layer.named_parameters())["codec.scale_D"], torch.zeros(16))
