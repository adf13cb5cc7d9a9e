"""BAM: equal specialists compute what each of them does, for any router; different ones what a plain loop over experts says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moefold.moe.attention import Attention, RMSNorm
from moefold.moe.config import ModelConfig
from moefold.moe.errors import ConfigError
from moefold.moe.hf.families import FAMILIES, NATIVE, write_tensors
from moefold.moe.hf.matrix import Constant, Matrix
from moefold.moe.hf.parts import part_shapes
from moefold.moe.model import Model
from moefold.moe.upcycle import METHODS, UpcycleOptions, upcycle_parts
from upcycle_oracle import arrays, dense_config, dense_parts, moe_forward

IDS_BS = torch.tensor([[1, 4, 9, 4, 2, 0, 7], [10, 3, 3, 8, 5, 6, 1]])
KINDS: list[dict[str, Any]] = [{}, {"qk_norm": "head", "attention_bias": "all", "num_kv_heads": 1, "sliding_window": 4}]
SHARING = pytest.mark.parametrize("kv", ["own", "shared"])


def model_of(config: ModelConfig, parts: Mapping[str, Matrix]) -> Model:
    """Our model in float64 with the weights of parts."""
    built = Model(config, init=False).double().requires_grad_(False)
    made = write_tensors(FAMILIES[NATIVE], config, parts)
    built.load_state_dict({name: torch.from_numpy(m.rows().astype(np.float64)).view(m.shape) for name, m in made.items()})
    return built


def specialists(count: int, **kind: Any) -> list[tuple[ModelConfig, dict[str, Matrix]]]:
    config = dense_config(**kind)
    return [(config, dense_parts(config, seed)) for seed in range(count)]


ROUTERS: list[dict[str, Any]] = [
    {"router_std": 3.0},
    {"router_init": "zeros"},
    {"router_std": 3.0, "score": "sigmoid", "scaling_factor": 2.5},
    {"order": "topk_softmax", "dense_prefix_layers": 1},
]


@SHARING
@pytest.mark.parametrize("kind", KINDS, ids=["plain", "many settings"])
def test_equal_specialists_keep_the_function_for_any_router(kind: dict[str, Any], kv: str) -> None:
    [one] = specialists(1, **kind)
    wanted, _ = model_of(*one)(IDS_BS)
    for router in ROUTERS:
        options = UpcycleOptions(method="bam", attention_expert_kv=kv, **router)  # type: ignore[arg-type]
        found, _ = model_of(*upcycle_parts([one] * 3, options))(IDS_BS)
        assert (found - wanted).abs().max() < 1e-12 * wanted.abs().max(), router
    assert "no one dense model" in (METHODS["bam"].exact([one[0]] * 3, options) or "")


def attended(config: ModelConfig, weights: Mapping[str, Tensor], x_BSD: Tensor) -> Tensor:
    """The plain attention of these weights, named as parts below it, with its output bias."""
    plain = Attention(config).double().requires_grad_(False)
    names = FAMILIES[NATIVE].names
    plain.load_state_dict({names[f"attention.{n}"].removeprefix("attention."): w for n, w in weights.items()})
    y_BSD: Tensor = plain(x_BSD)
    return y_BSD if plain.bo_D is None else y_BSD + plain.bo_D


def normed(config: ModelConfig, weight_D: Tensor, x_BSD: Tensor) -> Tensor:
    norm = RMSNorm(config.dim, config.norm_eps).double().requires_grad_(False)
    norm.weight_D.copy_(weight_D)
    return norm(x_BSD)


@SHARING
@pytest.mark.parametrize("kind", KINDS, ids=["plain", "many settings"])
def test_different_specialists_compute_what_a_loop_over_them_does(kind: dict[str, Any], kv: str) -> None:
    models, shares = specialists(3, **kind), np.array([1.0, 3.0, 4.0]) / 8
    dense = models[0][0]
    values = [{n: torch.from_numpy(a) for n, a in arrays(parts).items()} for _, parts in models]
    mean = {n: sum(s * v[n] for s, v in zip(shares.tolist(), values, strict=True)) for n in values[0]}
    options = UpcycleOptions(method="bam", attention_expert_kv=kv, merge_weights=(1.0, 3.0, 4.0), router_std=1.0)  # type: ignore[arg-type]
    made, parts = upcycle_parts(models, options)
    routers = arrays(parts)
    x_BSD = mean["embed"][IDS_BS]
    for layer in range(2):
        at = f"layers.{layer}"
        z_BSD = normed(dense, mean[f"{at}.attention_norm"], x_BSD)
        share_BSN = (z_BSD @ torch.from_numpy(routers[f"{at}.attention.router"]).T).softmax(-1)
        for e, own in enumerate(values):
            leaves = [n.removeprefix(f"{at}.attention.") for n in own if n.startswith(f"{at}.attention.")]
            common = [n for n in leaves if kv == "shared" and n[0] in "kv"]
            weights = {n: (mean if n in common else own)[f"{at}.attention.{n}"] for n in leaves}
            x_BSD = x_BSD + share_BSN[..., e, None] * attended(dense, weights, z_BSD)
        z_BSD = normed(dense, mean[f"{at}.ffn_norm"], x_BSD)
        # experts of the result are checked against the sources below
        y_TD = moe_forward(z_BSD.flatten(0, 1).numpy(), routers, made, layer)
        x_BSD = x_BSD + torch.from_numpy(y_TD).view(x_BSD.shape)
        for e, own in enumerate(values):
            assert (routers[f"{at}.moe.experts.{e}.up"] == own[f"{at}.ffn.up"].numpy()).all()
    wanted = normed(dense, mean["head.norm"], x_BSD) @ mean["head.weight"].T
    found, _ = model_of(made, parts)(IDS_BS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-11)
    first, _ = model_of(*models[0])(IDS_BS)
    assert (found - first).abs().max() > 0.1


def test_each_model_gives_one_expert_of_both_kinds() -> None:
    models = specialists(3, num_layers=3)
    options = UpcycleOptions(method="bam", dense_prefix_layers=1)
    made, parts = upcycle_parts(models, options)
    assert (made.attention_experts, made.attention_expert_kv, made.moe_layers) == (3, "own", (1, 2))
    assert list(parts) == list(part_shapes(made))
    # copied, not computed: also in the layer whose feed-forward network stays dense
    for e, (_, own) in enumerate(models):
        assert all(parts[f"layers.0.attention.experts.{e}.{name}"] is own[f"layers.0.attention.{name}"] for name in "qkvo")
    shared, common = upcycle_parts(models, UpcycleOptions(method="bam", attention_expert_kv="shared"))
    assert shared.kv_sets == 1 and "layers.0.attention.experts.0.k" not in common
    mean = sum(own["layers.1.attention.v"].rows() for _, own in models) / 3
    np.testing.assert_allclose(common["layers.1.attention.v"].rows(), mean, rtol=1e-12, atol=1e-15)


def test_routers_of_both_kinds_are_made_alike_and_drawn_apart(tmp_path: Path) -> None:
    models = specialists(3)
    _, drawn = upcycle_parts(models, UpcycleOptions(method="bam", router_std=0.5))
    rows = [drawn[f"layers.{i}.{of}.router"].rows() for i in range(2) for of in ("attention", "moe")]
    assert all(not np.array_equal(a, b) for i, a in enumerate(rows) for b in rows[:i])
    assert np.std(np.concatenate(rows)) == pytest.approx(0.5, rel=0.25)
    _, zeros = upcycle_parts(models, UpcycleOptions(method="bam", router_init="zeros"))
    assert not zeros["layers.0.attention.router"].rows().any()
    given = np.random.default_rng(0).normal(size=(3, 8)).astype(np.float32)
    np.save(tmp_path / "rows.npy", given)
    options = UpcycleOptions(method="bam", router_init="centroids", centroids=str(tmp_path / "rows.npy"), router_std=0.0)
    _, centroids = upcycle_parts(models, options)
    assert all((centroids[f"layers.1.{of}.router"].rows() == given).all() for of in ("attention", "moe"))


def test_routers_are_float32_whatever_the_models_are() -> None:
    config = dense_config()
    half: dict[str, Matrix] = {name: Constant(shape, 0.5, "BF16") for name, shape in part_shapes(config).items()}
    _, parts = upcycle_parts([(config, half)] * 2, UpcycleOptions(method="bam"))
    assert {m.dtype for name, m in parts.items() if name.endswith("router")} == {"F32"}
    assert {m.dtype for name, m in parts.items() if not name.endswith("router")} == {"BF16"}


REFUSED: list[tuple[dict[str, Any], int, dict[str, Any], str]] = [
    ({}, 1, {}, "takes one dense model for each expert, but 1 is given"),
    ({"num_experts": 3}, 2, {}, "num_experts.*is 3, but 2 models are given"),
    ({"merge_weights": (1.0, 2.0, 3.0)}, 2, {}, "merge_weights.*has 3 numbers, but 2 models"),
    ({}, 2, {"attention_experts": 2}, "model 0, attention_experts.*is 2.*have none yet; use method 'merge'"),
]


@pytest.mark.parametrize(("options", "count", "kind", "message"), REFUSED)
def test_models_that_do_not_fit_are_refused(options: dict[str, Any], count: int, kind: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        METHODS["bam"].plan([dense_config(**kind)] * count, UpcycleOptions(method="bam", **options))
    assert re.search(message, str(told.value)), told.value


def test_other_methods_read_no_sharing() -> None:
    with pytest.raises(ConfigError, match=r"attention_expert_kv: is shared, but method 'merge' reads no.*read by bam"):
        UpcycleOptions(method="merge", attention_expert_kv="shared")


def test_models_with_attention_experts_are_merged_as_they_are() -> None:
    config = dense_config(attention_experts=2)
    one = (config, dense_parts(config))
    made = upcycle_parts([one] * 2, UpcycleOptions(method="merge"))
    assert made[0].attention_experts == 2
    found, wanted = (model_of(*m)(IDS_BS)[0] for m in (made, one))
    assert (found - wanted).abs().max() < 1e-12 * wanted.abs().max()
