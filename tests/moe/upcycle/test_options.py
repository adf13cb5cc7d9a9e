"""Options that contradict each other, or that the method does not read, are refused; the record needs neither torch nor numpy."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any, get_args

import pytest

import moefold.moe.upcycle
from moefold.moe.errors import ConfigError
from moefold.moe.upcycle import METHODS, UpcycleOptions
from moefold.moe.upcycle.options import MethodName

CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({}, r"upcycle\.num_experts: is not set, but method 'copy' needs it"),
    ({"num_experts": 2, "top_k": 4}, r"top_k: is 4, more than num_experts = 2"),
    ({"num_experts": 0}, r"num_experts: is 0, but must be positive"),
    ({"num_experts": 4, "reinit_ratio": 0.3}, r"reinit_ratio: is 0.3, but method 'copy' reads no reinit_ratio.*read by drop"),
    ({"num_experts": 4, "granularity": 2}, r"granularity: is 2, but method 'copy' reads no.*virtual_groups, drop, noise"),
    ({"method": "drop", "num_experts": 4, "reinit_ratio": 1.5}, r"reinit_ratio: is 1.5, but is a share"),
    ({"method": "noise", "num_experts": 4, "noise_share": -0.1}, r"noise_share: is -0.1, but must not be negative"),
    ({"method": "virtual_groups", "num_experts": 4}, r"granularity: is not set.*use method 'copy'"),
    ({"num_experts": 4, "num_shared_experts": 1, "shared_width": 4}, r"shared_width: is 4, but num_shared_experts = 1 says"),
    ({"num_experts": 4, "shared_gate": True}, r"shared_gate: is true, but there is no shared expert"),
    ({"num_experts": 4, "scaling_factor": 2.0, "scale_placement": "routed_scaling"}, r"scaling_factor: is 2.0, but.*sets it"),
    ({"num_experts": 4, "score": "sigmoid", "order": "topk_softmax"}, r"order: .*needs score = 'softmax'"),
    ({"num_experts": 4, "top_k": 1}, r"renormalize: with top_k = 1 makes every weight 1.*renormalize = false"),
    ({"num_experts": 4, "router_init": "centroids"}, r"router_init: is 'centroids', and centroids is None"),
    ({"num_experts": 4, "centroids": "rows.npy"}, r"router_init: is 'auto', and centroids is 'rows.npy'"),
    ({"num_experts": 4, "router_noise_std": 0.1}, r"router_noise_std: is 0.1, but is added to router_init = 'zeros' only"),
    ({"num_experts": 4, "router_init": "repeated"}, r"router_init: is 'repeated', but method 'copy' cuts no copies"),
    ({"method": "split", "num_experts": 4, "split_by": "activations"}, r"split_by: is 'activations', and activations is None"),
    (
        {"method": "split", "num_experts": 4, "split_by": "activations", "activations": "a.npy"},
        r"activations: is 'a.npy', without \{layer\}",
    ),
    ({"method": "mixtral", "num_experts": 4}, r"method: is 'mixtral', but must be one of 'copy'"),
]


@pytest.mark.parametrize(("options", "message"), CONTRADICTIONS)
def test_contradictions_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as told:
        UpcycleOptions(**options)
    assert re.search(message, str(told.value)), told.value


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as told:
        UpcycleOptions(top_k=1, noise_std=1.0, router_noise_std=0.5)
    assert len(told.value.problems) == 4


@pytest.mark.parametrize(
    ("options", "legal"),
    [
        ({"method": "split", "num_experts": 5}, r"num_experts.*is 5.*legal: \[1, 2, 3, 4, 6, 8, 12, 24\]"),
        ({"method": "split", "num_experts": 4, "granularity": 2}, r"granularity.*is 2, but split makes one copy"),
        ({"method": "split", "num_experts": 1, "top_k": 1, "renormalize": False}, r"num_experts.*is 1.*at least 2"),
    ],
)
def test_splits_that_cannot_be_are_refused(options: dict[str, Any], legal: str) -> None:
    from upcycle_oracle import dense_config

    with pytest.raises(ConfigError) as told:
        METHODS["split"].plan(dense_config(), UpcycleOptions(**options))
    assert re.search(legal, str(told.value)), told.value


def test_every_method_is_there() -> None:
    assert tuple(METHODS) == get_args(MethodName)
    assert all(METHODS[name].name == name for name in METHODS)
    assert {name for name in METHODS if METHODS[name].several} == {"merge", "bam", "flex_olmo"}


def test_public_names_load() -> None:
    for name in moefold.moe.upcycle.__all__:
        assert getattr(moefold.moe.upcycle, name) is not None and name in dir(moefold.moe.upcycle)
    with pytest.raises(AttributeError, match="no attribute 'upcicle'"):
        moefold.moe.upcycle.upcicle  # noqa: B018


def test_imports_without_torch() -> None:
    """Methods need numpy; options, which help and checks of settings use, not even that."""
    code = (
        "import sys, moefold.moe.upcycle.options, moefold.moe.upcycle.sizes\n"
        "assert not {'torch', 'numpy'} & set(sys.modules), sorted({'torch', 'numpy'} & set(sys.modules))\n"
        "from moefold.moe.upcycle import METHODS, fitted, opt_out, stack_depth, upcycle_parts, widen_ffn\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
