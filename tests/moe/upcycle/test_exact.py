"""Every upcycling that says it keeps the function does, and those that say they do not do not: against an FFN in numpy."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import numpy as np
import pytest

from moefold.moe.errors import ConfigError
from moefold.moe.upcycle import METHODS, UpcycleOptions, upcycle_parts
from upcycle_oracle import dense_config, dense_parts, gap, tokens

EXACT = 1e-12
ROUTERS: list[dict[str, Any]] = [
    {},
    {"order": "topk_softmax"},
    {"score": "sigmoid", "expert_bias": True},
    {"scaling_factor": 2.5},
    {"scale_placement": "routed_scaling"},
    {"renormalize": False, "router_init": "zeros"},
    {"renormalize": False, "router_init": "zeros", "score": "sigmoid"},
    {"renormalize": False, "router_init": "zeros", "scale_placement": "routed_scaling"},
    {"router_init": "zeros", "router_noise_std": 0.3},
]
SHARED: list[dict[str, Any]] = [
    {},
    {"num_shared_experts": 1},
    {"shared_width": 6},
    {"shared_width": 6, "shared_gate": True},
    {"num_shared_experts": 1, "shared_init": "zero"},
]
SHAPES = [(1, 3, 2), (1, 4, 4), (2, 6, 2), (2, 8, 4), (3, 9, 6), (4, 8, 8)]
"""(granularity, experts, top_k)"""


def upcycled(width: int = 24, model: dict[str, Any] | None = None, **options: Any) -> tuple[float, str | None]:
    """(error of the layer, what `exact` says)."""
    config = dense_config(width, **(model or {}))
    parts, chosen = dense_parts(config), UpcycleOptions(**{"router_std": 1.0, "seed": 3} | options)
    told = METHODS[chosen.method].exact(config, chosen)
    return gap((config, parts), upcycle_parts([(config, parts)], chosen)), told


@pytest.mark.parametrize("shared", SHARED, ids=lambda o: "-".join(map(str, o.values())) or "none")
@pytest.mark.parametrize(("pieces", "experts", "top_k"), SHAPES)
def test_copies_keep_the_function(pieces: int, experts: int, top_k: int, shared: dict[str, Any]) -> None:
    """Whole and cut, each router, with shared neurons or without, limited to whole copies or not."""
    for router in ROUTERS:
        sizes = {"method": "virtual_groups", "granularity": pieces, "num_experts": experts, "top_k": top_k, "pad_multiple": 2}
        for limited in (None, False) if pieces > 1 else (None,):
            error, told = upcycled(**sizes, **router, **shared, group_limited=limited)
            assert told is None, (router, told)
            assert error < EXACT, (router, limited, error)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_shuffled_copies_keep_the_function(activation: str, shuffle: bool) -> None:
    sizes = {"method": "virtual_groups", "granularity": 4, "num_experts": 12, "top_k": 8}
    error, told = upcycled(**sizes, shuffle=shuffle, model={"activation": activation})
    assert told is None and error < EXACT


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_whole_copies_are_chosen_however_ties_are_broken(score: str) -> None:
    """A router that does not tell tokens apart: without the limit, which pieces are chosen rests on how ties are broken."""
    config = dense_config()
    parts = dense_parts(config)
    sizes: dict[str, Any] = {"method": "virtual_groups", "granularity": 2, "num_experts": 6, "top_k": 4, "score": score}
    found = {}
    for limited in (True, False):
        options = UpcycleOptions(**sizes, group_limited=limited, router_init="zeros")
        result = upcycle_parts([(config, parts)], options)
        found[limited] = [gap((config, parts), result, ties=ties) for ties in ("low", "high", "odd")]
    assert max(found[True]) < EXACT
    # pieces of a copy are neighbours, so that orders by index choose whole ones too
    assert max(found[False][:2]) < EXACT < 0.1 < found[False][2]


@pytest.mark.parametrize(("experts", "granularity", "top_k"), [(2, 1, 1), (5, 3, 2), (8, 4, 3), (4, 24, 4)])
@pytest.mark.parametrize("gate", [False, True])
def test_dense_as_shared_keeps_the_function(experts: int, granularity: int, top_k: int, gate: bool) -> None:
    sizes = {"method": "dense_shared", "num_experts": experts, "granularity": granularity, "top_k": top_k, "shared_gate": gate}
    for renormalize, score, scaling in product((True, False), ("softmax", "sigmoid"), (1.0, 2.5)):
        if top_k == 1 and renormalize:
            continue
        error, told = upcycled(**sizes, renormalize=renormalize, score=score, scaling_factor=scaling)
        assert told is None and error < EXACT


@pytest.mark.parametrize("experts", [2, 3, 8])
@pytest.mark.parametrize("shared", SHARED[:3], ids=["none", "as wide", "6"])
def test_all_pieces_of_a_split_sum_to_the_dense_ffn(experts: int, shared: dict[str, Any]) -> None:
    sizes = {"method": "split", "num_experts": experts, "top_k": experts, "router_init": "zeros", "pad_multiple": 1}
    for split_by, renormalize, score in product(("random", "weights"), (True, False), ("softmax", "sigmoid")):
        error, told = upcycled(**sizes, **shared, split_by=split_by, renormalize=renormalize, score=score)
        assert told is None and error < EXACT


@pytest.mark.parametrize("multiple", [2, 5, 16])
@pytest.mark.parametrize("pieces", [1, 2, 4])
def test_padding_keeps_the_function(multiple: int, pieces: int) -> None:
    """23 neurons: pieces differ by one."""
    options = {"method": "virtual_groups", "num_experts": 2 * pieces, "granularity": pieces, "top_k": 2 * pieces}
    for shared in ({}, {"shared_width": 3}):
        error, told = upcycled(23, **options, **shared, pad_multiple=multiple)
        assert told is None and error < EXACT


INEXACT: list[tuple[str, dict[str, Any], str, tuple[float, float]]] = [
    (
        "not normalised",
        {"method": "copy", "num_experts": 8, "renormalize": False, "router_std": 0.02},
        "not normalised",
        (1e-3, 0.2),
    ),
    (
        "sigmoid, not normalised",
        {"method": "copy", "num_experts": 4, "renormalize": False, "score": "sigmoid"},
        "sigmoid",
        (0.05, 2),
    ),
    (
        "independent rows",
        {"method": "virtual_groups", "granularity": 2, "num_experts": 8, "router_init": "normal"},
        "rows differ within a copy",
        (0.1, 5),
    ),
    ("a split, not all chosen", {"method": "split", "num_experts": 4, "router_init": "zeros"}, "2 of 4 pieces", (0.3, 5)),
    ("a split, weighed", {"method": "split", "num_experts": 4, "top_k": 4}, "weighed differently", (0.05, 5)),
    ("drop", {"method": "drop", "num_experts": 4}, "50 % stay whole", (0.1, 3)),
    ("noise", {"method": "noise", "num_experts": 4}, "noise of std 0.02", (1e-3, 0.5)),
]


@pytest.mark.parametrize(("options", "reason", "bounds"), [case[1:] for case in INEXACT], ids=[case[0] for case in INEXACT])
def test_what_is_not_exact_says_so(options: dict[str, Any], reason: str, bounds: tuple[float, float]) -> None:
    error, told = upcycled(**options)
    assert told is not None and reason in told
    assert bounds[0] < error < bounds[1]


@pytest.mark.parametrize(
    "options",
    [
        {"method": "drop", "reinit_ratio": 0.0},
        {"method": "noise", "noise_std": 0.0},
        {"method": "noise", "noise_share": 0.0},
        {"method": "copy", "top_k": 4, "renormalize": False},
        {"method": "copy", "renormalize": False, "router_std": 0.0},
        {"method": "virtual_groups", "granularity": 2, "top_k": 4, "renormalize": False},
    ],
    ids=["no drop", "no noise", "no share", "all experts", "std 0", "all copies"],
)
def test_the_harmless_ends_of_inexact_settings_are_exact(options: dict[str, Any]) -> None:
    error, told = upcycled(num_experts=4, **options)
    assert told is None and error < EXACT


def test_the_cube_root_on_all_matrices_is_off_and_more_so_the_finer() -> None:
    """As published for granular upcycling; SiLU is not homogeneous."""
    errors = []
    for pieces in (2, 4, 8):
        sizes = {"method": "virtual_groups", "granularity": pieces, "num_experts": 2 * pieces, "top_k": pieces}
        error, told = upcycled(**sizes, scale_placement="both")
        assert told is not None and "5, 9 and 13 %" in told
        errors.append(error)
    assert 0.05 < errors[0] < errors[1] < errors[2] < 1
    whole, told = upcycled(method="virtual_groups", granularity=1, num_experts=4, scale_placement="both")
    assert told is None and whole < EXACT


def test_a_norm_after_the_ffn_takes_varying_weights_out_up_to_its_eps() -> None:
    from upcycle_oracle import arrays, ffn, moe_forward, relative

    config = dense_config(norm_order="post")
    parts, options = dense_parts(config), UpcycleOptions(num_experts=8, renormalize=False, router_std=1.0)
    told = METHODS["copy"].exact(config, options)
    assert told is not None and "norm_eps" in told
    moe, made = upcycle_parts([(config, parts)], options)
    x_TD = tokens()

    def normed(y_TD: Any) -> Any:
        return y_TD / np.sqrt(np.square(y_TD).mean(axis=-1, keepdims=True) + config.norm_eps)

    wanted = ffn(x_TD, arrays(parts), "layers.0.ffn", "silu")
    found = moe_forward(x_TD, arrays(made), moe)
    assert relative(found, wanted) > 0.1
    assert relative(normed(found), normed(wanted)) < 1e-3


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"granularity": 4, "num_experts": 8, "top_k": 6}, r"top_k.*is 6.*granularity = 4.*legal: \[4, 8\]"),
    ({"granularity": 4, "num_experts": 10, "top_k": 4}, r"num_experts.*is 10.*multiples of 4"),
    ({"granularity": 5, "num_experts": 10, "top_k": 5}, r"granularity.*is 5.*24 neurons.*legal: \[1, 2, 3, 4, 6, 8, 12, 24\]"),
    (
        {"granularity": 4, "num_experts": 8, "top_k": 4, "num_shared_experts": 1},
        r"granularity.*is 4.*beside num_shared_experts = 1.*legal: \[1, 2, 3, 5, 7, 11, 23\]",
    ),
    ({"granularity": 30, "num_experts": 60, "top_k": 30}, r"cuts 30 pieces from 24 neurons; at most 24"),
    ({"granularity": 2, "num_experts": 4, "shared_width": 24}, r"shared_width.*is 24.*24 neurons.*dense_shared"),
    ({"granularity": 2, "num_experts": 4, "shared_width": 30, "shared_init": "zero"}, r"shared_width.*30.*only 24"),
    ({"granularity": 1, "num_experts": 4, "group_limited": True}, r"group_limited.*no copies to choose"),
    ({"granularity": 2, "num_experts": 4, "dense_prefix_layers": 2}, r"dense_prefix_layers.*is 2.*2 layers"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_sizes_that_cannot_be_are_refused_with_legal_ones(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        METHODS["virtual_groups"].plan(dense_config(), UpcycleOptions(method="virtual_groups", **options))
    assert re.search(message, str(told.value)), told.value
