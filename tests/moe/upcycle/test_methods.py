"""What each upcycling method does to weights: which stay, which are drawn, what they are drawn from, and what is left alone."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moefold.moe.config import ModelConfig
from moefold.moe.errors import CheckpointError, ConfigError
from moefold.moe.hf.matrix import Constant, Given, Matrix, Stored
from moefold.moe.hf.parts import part_shapes
from moefold.moe.upcycle import METHODS, UpcycleOptions, fitted, opt_out, upcycle_parts
from upcycle_oracle import arrays, dense_config, dense_parts, gap

Parts = dict[str, Matrix]


def made(width: int = 24, model: dict[str, Any] | None = None, **options: Any) -> tuple[Parts, ModelConfig, Parts]:
    """(dense parts, config of the result, its parts)."""
    config = dense_config(width, **(model or {}))
    parts = dense_parts(config)
    return parts, *upcycle_parts([(config, parts)], UpcycleOptions(**options))


def whole_neurons(dense: Parts, parts: Parts, expert: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Of an expert that is a copy of layer 0: the neurons whose three vectors are as in the dense FFN."""
    name, (old, new) = f"layers.0.moe.experts.{expert}", (arrays(dense), arrays(parts))
    same = [new[f"{name}.{m}"] == old[f"layers.0.ffn.{m}"] for m in ("gate", "up", "down")]
    return same[0].all(1) & same[1].all(1) & same[2].all(0)


@pytest.mark.parametrize(("ratio", "per_matrix", "share"), [(0.5, False, 0.5), (0.25, False, 0.75), (0.5, True, 0.125)])
def test_drop_leaves_a_share_of_the_neurons(ratio: float, per_matrix: bool, share: float) -> None:
    """One set of neurons for all matrices leaves 1 - r of them, one for each leaves (1 - r)^3."""
    options = {"method": "drop", "num_experts": 3, "reinit_ratio": ratio, "per_matrix": per_matrix, "scaling_factor": 1.0}
    dense, _, parts = made(1000, **options)
    kept = [whole_neurons(dense, parts, e) for e in range(3)]
    for neurons in kept:
        assert neurons.mean() == pytest.approx(share, abs=0 if not per_matrix else 0.03)
    assert not np.array_equal(kept[0], kept[1]), "every expert has its own set"
    new = arrays(parts)
    for m, axis in (("gate", 1), ("up", 1), ("down", 0)):
        same = (new[f"layers.0.moe.experts.0.{m}"] == arrays(dense)[f"layers.0.ffn.{m}"]).all(axis)
        assert same.mean() == 1 - ratio, "each matrix loses the same share"


def test_drop_draws_from_the_distribution_of_what_it_replaces() -> None:
    """Mean and deviation of the replaced rows or columns of each matrix, not of the whole matrix."""
    config = dense_config(600, dim=16)
    dense = dense_parts(config)
    ffn = {m: f"layers.0.ffn.{m}" for m in ("gate", "up", "down")}
    values = arrays(dense)
    for m, (mean, std) in {"gate": (3.0, 0.5), "up": (-1.0, 2.0), "down": (0.25, 0.125)}.items():
        dense[ffn[m]] = Given(mean + std * np.random.default_rng(5).normal(size=values[ffn[m]].shape))
    _, parts = upcycle_parts([(config, dense)], UpcycleOptions(method="drop", num_experts=2, reinit_ratio=0.5))
    for m, axis in (("gate", 1), ("up", 1), ("down", 0)):
        old, new = dense[ffn[m]].rows(), parts[f"layers.0.moe.experts.1.{m}"].rows()
        drawn = np.flatnonzero((old != new).any(axis))
        before, after = old.take(drawn, 1 - axis), new.take(drawn, 1 - axis)
        assert after.mean() == pytest.approx(before.mean(), abs=5 * before.std() / before.size**0.5)
        assert after.std() == pytest.approx(before.std(), rel=0.06)
        assert len(np.unique(after)) > 0.99 * after.size
        normal = parts[f"layers.0.moe.experts.1.{m}"].drawn  # type: ignore[attr-defined]
        assert (normal.mean, normal.std) == pytest.approx((before.mean(), before.std()), rel=1e-12)


def test_the_gap_of_drop_is_larger_with_a_set_for_each_matrix() -> None:
    errors = []
    for per_matrix in (False, True):
        config = dense_config(96, dim=16)
        parts = dense_parts(config)
        options = UpcycleOptions(method="drop", num_experts=8, per_matrix=per_matrix)
        errors.append(gap((config, parts), upcycle_parts([(config, parts)], options)))
        told = METHODS["drop"].exact(config, options)
        assert told is not None and ("12.5 %" if per_matrix else "50 %") in told
    assert 0.1 < errors[0] < errors[1]


def test_noise_is_on_a_share_of_single_weights() -> None:
    dense, _, parts = made(400, {"dim": 16}, method="noise", num_experts=2, noise_std=0.5, noise_share=0.25)
    differences = []
    for e in range(2):
        for m in ("gate", "up", "down"):
            d = arrays(parts)[f"layers.0.moe.experts.{e}.{m}"] - arrays(dense)[f"layers.0.ffn.{m}"]
            assert (d != 0).mean() == pytest.approx(0.25, abs=0.03)
            assert d[d != 0].std() == pytest.approx(0.5, rel=0.08)
            differences.append(d.reshape(-1))
    assert max(abs(np.corrcoef(differences)[np.triu_indices(6, 1)])) < 0.06, "every matrix has noise of its own"


def test_shuffling_an_experts_neurons_changes_nothing() -> None:
    config = dense_config()
    dense = dense_parts(config)
    moe, parts = upcycle_parts([(config, dense)], UpcycleOptions(num_experts=3))
    order = np.random.default_rng(0).permutation(24)
    values = arrays(parts)
    for m in ("gate", "up", "down"):
        name = f"layers.0.moe.experts.1.{m}"
        parts[name] = Given(values[name].take(order, 1 if m == "down" else 0))
    assert gap((config, dense), (moe, parts)) < 1e-12


def test_each_copy_is_cut_into_all_of_the_neurons() -> None:
    """Shuffled differently in each copy; pieces of one copy are neighbours and share a router row."""
    config = replace(dense_config(), num_layers=1)
    dense = dense_parts(config)
    numbered = dict(dense) | {"layers.0.ffn.gate": Given(np.arange(24.0)[:, None].repeat(8, 1))}
    options = {"method": "virtual_groups", "granularity": 4, "num_experts": 12, "top_k": 4, "shuffle": True}
    _, parts = upcycle_parts([(config, numbered)], UpcycleOptions(**options))
    values = arrays(parts)
    neurons = [values[f"layers.0.moe.experts.{e}.gate"][:, 0].astype(int).tolist() for e in range(12)]
    for copy in range(3):
        assert sorted(chain(*neurons[4 * copy : 4 * copy + 4])) == list(range(24))
    assert len({tuple(sorted(neurons[4 * copy])) for copy in range(3)}) == 3
    rows = values["layers.0.moe.router"]
    assert len(np.unique(rows, axis=0)) == 3 and (rows == rows[::4].repeat(4, axis=0)).all()


@pytest.mark.parametrize("split_by", ["random", "weights"])
def test_a_split_deals_every_neuron_out_once(split_by: str) -> None:
    dense, _, parts = made(23, method="split", num_experts=4, split_by=split_by, pad_multiple=4, router_init="zeros")
    gate = np.concatenate([arrays(parts)[f"layers.0.moe.experts.{e}.gate"] for e in range(4)])
    assert gate.shape == (32, 8)
    wanted = np.concatenate([arrays(dense)["layers.0.ffn.gate"], np.zeros((9, 8))])
    assert (np.sort(gate, axis=0) == np.sort(wanted, axis=0)).all()


def test_dense_layers_stay_as_they_are() -> None:
    """A dense prefix, and every second layer from there on."""
    layers = {"num_layers": 5}
    dense, config, parts = made(24, layers, num_experts=2, dense_prefix_layers=2, moe_every=2)
    assert config.moe_layers == (2, 4) and config.dense_ffn_dim == 24
    assert list(parts) == list(part_shapes(config))
    assert all(parts[name] is dense[name] for name in parts if ".moe." not in name)
    _, every, _ = made(24, layers, num_experts=2)
    assert every.moe_layers == (0, 1, 2, 3, 4) and every.dense_ffn_dim is None


@pytest.mark.parametrize("method", ["copy", "virtual_groups", "drop", "noise", "dense_shared", "split"])
def test_dtypes(method: str) -> None:
    """Weights keep theirs; the router, and its bias, are float32."""
    config = dense_config()
    dense: Parts = {name: Constant(shape, 0.5, "BF16") for name, shape in part_shapes(config).items()}
    cut = {"granularity": 2} if method == "virtual_groups" else {}
    options = UpcycleOptions(method=method, num_experts=4, expert_bias=True, pad_multiple=5, scaling_factor=2.0, **cut)  # type: ignore[arg-type]
    _, parts = upcycle_parts([(config, dense)], options)
    assert {matrix.dtype for name, matrix in parts.items() if "router" not in name} == {"BF16"}
    assert {matrix.dtype for name, matrix in parts.items() if "router" in name} == {"F32"}


def test_merging_averages_all_but_experts() -> None:
    config = dense_config(num_layers=3)
    models = [(config, dense_parts(config, seed)) for seed in range(3)]
    options = UpcycleOptions(method="merge", dense_prefix_layers=1)
    moe, parts = upcycle_parts(models, options)
    assert moe.moe is not None and moe.moe.num_experts == 3
    each, values = [arrays(p) for _, p in models], arrays(parts)
    for name in ("embed", "layers.2.attention.q", "layers.0.ffn.down", "layers.1.ffn_norm"):
        np.testing.assert_allclose(values[name], sum(e[name] for e in each) / 3, rtol=1e-12, atol=1e-15)
    for e in range(3):
        assert (values[f"layers.1.moe.experts.{e}.down"] == each[e]["layers.1.ffn.down"]).all()
    weighted = replace(options, merge_weights=(2.0, 0.0, 2.0))
    embed = arrays(upcycle_parts(models, weighted)[1])["embed"]
    np.testing.assert_allclose(embed, (each[0]["embed"] + each[2]["embed"]) / 2, rtol=1e-12, atol=1e-15)
    assert "different models" in (METHODS["merge"].exact([config] * 3, options) or "")


def test_merging_equal_models_keeps_the_function() -> None:
    config = dense_config()
    parts = dense_parts(config)
    parts["embed"] = Given(parts["embed"].rows().astype(np.float32))
    moe, merged = upcycle_parts([(config, parts)] * 3, UpcycleOptions(method="merge"))
    assert gap((config, parts), (moe, merged)) < 1e-12
    assert (merged["embed"].rows() == parts["embed"].rows()).all(), "the mean of equal numbers is that number"


def flexible(seed: int, config: ModelConfig, public: Parts) -> Parts:
    """A model of which only FFNs were trained."""
    return {name: m if ".ffn." not in name else dense_parts(config, seed)[name] for name, m in public.items()}


def test_flex_olmo_joins_experts_and_lets_owners_out() -> None:
    config = dense_config(norm_order="post", qk_norm="full")
    public = dense_parts(config)
    models = [(config, public), *((config, flexible(seed, config, public)) for seed in (1, 2, 3))]
    options = UpcycleOptions(method="flex_olmo", renormalize=False)
    moe, parts = upcycle_parts(models, options)
    values = arrays(parts)
    for e in range(4):
        assert (values[f"layers.1.moe.experts.{e}.up"] == models[e][1]["layers.1.ffn.up"].rows()).all()
    fewer, left = upcycle_parts(models, replace(options, without=(2,)))
    assert fewer.moe is not None and fewer.moe.num_experts == 3
    rows = values["layers.0.moe.router"]
    assert (arrays(left)["layers.0.moe.router"] == rows[[0, 1, 3]]).all(), "the other rows do not change"
    later, deleted = opt_out(moe, parts, [2])
    assert later == fewer and list(deleted) == list(left)
    assert all((a.rows() == b.rows()).all() for a, b in zip(deleted.values(), left.values(), strict=True))


def test_who_opts_out_leaves_nothing(tmp_path: Path) -> None:
    config = dense_config(norm_order="post", qk_norm="full")
    models = []
    for owner in range(3):
        parts = {
            name: Stored(path=tmp_path / f"{owner}.safetensors", offset=0, shape=shape, dtype="F32")
            for name, shape in part_shapes(config).items()
        }
        models.append((config, parts))
    options = UpcycleOptions(method="flex_olmo", without=(1,), trust_frozen=True)
    _, parts = upcycle_parts(models, options)  # type: ignore[arg-type]
    read = frozenset[Path]().union(*(matrix.sources() for matrix in parts.values()))
    assert {path.stem for path in read} == {"0", "2"}


def test_weights_that_should_have_been_frozen_are_compared() -> None:
    config = dense_config(norm_order="post")
    public = dense_parts(config)
    moved = flexible(1, config, public)
    moved["layers.1.attention.q"] = dense_parts(config, 1)["layers.1.attention.q"]
    options = UpcycleOptions(method="flex_olmo")
    with pytest.raises(CheckpointError, match=r"model 1 is not the public one.*layers\.1\.attention\.q; set trust_frozen"):
        upcycle_parts([(config, public), (config, moved)], options)
    _, parts = upcycle_parts([(config, public), (config, moved)], replace(options, trust_frozen=True))
    assert parts["layers.1.attention.q"] is public["layers.1.attention.q"]
    equal = {name: Given(matrix.rows().reshape(matrix.shape)) for name, matrix in flexible(2, config, public).items()}
    upcycle_parts([(config, public), (config, equal)], options)


SEVERAL: list[tuple[dict[str, Any], int, dict[str, Any], str]] = [
    ({"method": "copy", "num_experts": 4}, 2, {}, r"method.*is 'copy'.*2 are given.*merge, bam and flex_olmo"),
    ({"method": "merge"}, 1, {}, r"one dense model for each expert, but 1 is given"),
    ({"method": "merge", "num_experts": 3}, 2, {}, r"num_experts.*is 3, but 2 models"),
    ({"method": "merge"}, 2, {"rope_theta": 5e5}, r"model 1, rope_theta.*500000.*10000.*in model 0"),
    ({"method": "merge", "merge_weights": (1.0,)}, 2, {}, r"merge_weights.*has 1 numbers, but 2 models"),
    ({"method": "merge", "merge_weights": (1.0, -1.0)}, 2, {}, r"merge_weights.*not negative"),
    ({"method": "flex_olmo", "without": (0,)}, 3, {}, r"without.*names \[0\].*legal are 1 to 2"),
    ({"method": "flex_olmo", "without": (3,)}, 3, {}, r"without.*names \[3\]"),
    ({"method": "flex_olmo", "without": (1, 1)}, 3, {}, r"without.*twice"),
    ({"method": "flex_olmo", "without": (1, 2)}, 3, {}, r"top_k.*is 2, more than the 1 experts that are left"),
    ({"method": "flex_olmo", "renormalize": False}, 2, {}, r"renormalize.*norm_order = 'post'"),
]


@pytest.mark.parametrize(("options", "count", "changes", "message"), SEVERAL)
def test_models_that_do_not_fit_are_refused(options: dict[str, Any], count: int, changes: dict[str, Any], message: str) -> None:
    config = dense_config()
    models = [replace(config, max_seq_len=16 + i, **(changes if i else {})) for i in range(count)]
    chosen = UpcycleOptions(**options)
    with pytest.raises(ConfigError) as told:
        METHODS[chosen.method].plan(models, chosen)
    assert re.search(message, str(told.value)), told.value


def test_parts_that_are_not_the_models_are_refused() -> None:
    config = dense_config()
    parts = dense_parts(config)
    parts["extra"] = parts.pop("embed")
    parts["head.norm"] = Given(np.zeros(3))
    with pytest.raises(CheckpointError) as told:
        upcycle_parts([(config, parts)], UpcycleOptions(num_experts=2))
    for problem in ("embed is missing", "extra is not part of it", "head.norm is [3], not [8]"):
        assert problem in str(told.value)


def test_a_model_with_experts_is_refused() -> None:
    config = dense_config()
    moe, parts = upcycle_parts([(config, dense_parts(config))], UpcycleOptions(num_experts=2))
    with pytest.raises(ConfigError, match="has experts already"):
        upcycle_parts([(moe, parts)], UpcycleOptions(num_experts=2))
    with pytest.raises(ConfigError, match="groups would differ"):
        grouped = UpcycleOptions(method="virtual_groups", granularity=2, num_experts=4)
        opt_out(*upcycle_parts([(config, dense_parts(config))], grouped), [1])
    with pytest.raises(ConfigError, match="is dense"):
        opt_out(config, {}, [1])


def test_the_limit_to_whole_copies_gives_way_to_a_target_without_it() -> None:
    config = dense_config()
    options = UpcycleOptions(method="virtual_groups", granularity=2, num_experts=8, top_k=4)

    def groups(chosen: UpcycleOptions) -> int:
        moe = METHODS["virtual_groups"].plan(config, chosen).moe
        assert moe is not None
        return moe.router.num_groups

    assert groups(options) == groups(fitted(config, options, lambda model: True)) == 4
    assert groups(fitted(config, options, lambda model: False)) == 1
    asked = replace(options, group_limited=True)
    assert fitted(config, asked, lambda model: False) == asked
