"""The one rule that chooses between torch and Triton."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

from moefold.kernels import backend
from moefold.kernels.backend import choose, rule

CUDA = torch.device("cuda", 0)


@pytest.fixture
def fresh_rule() -> Iterator[None]:
    """The rule asks the machine once: let each test ask its own."""
    for cached in (backend._rule_of_machine, backend._log_once):
        cached.cache_clear()
    yield
    for cached in (backend._rule_of_machine, backend._log_once):
        cached.cache_clear()


def pretend(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], triton: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "some GPU")
    if not triton:
        monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("fresh_rule")
@pytest.mark.parametrize(
    ("capability", "dtype", "products", "expected", "why"),
    [
        ((9, 0), torch.bfloat16, True, "triton", "some GPU, compute capability 9.0"),
        ((9, 0), torch.float16, True, "triton", "9.0"),
        ((10, 0), torch.bfloat16, True, "triton", "10.0"),
        ((8, 0), torch.bfloat16, True, "torch", "sized for 9.0"),
        ((9, 0), torch.float32, True, "torch", "not torch.float32"),
        ((9, 0), torch.float32, False, "triton", "9.0"),
        ((9, 0), torch.int64, False, "triton", "9.0"),
    ],
)
def test_cuda(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype, products: bool, expected: str, why: str
) -> None:
    pretend(monkeypatch, capability)
    choice = rule(CUDA, dtype, products)
    assert choice.backend == expected
    assert why in choice.why


@pytest.mark.usefixtures("fresh_rule")
def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, (9, 0), triton=False)
    assert rule(CUDA, torch.bfloat16, True) == ("torch", "triton is not installed")


def test_tensors_elsewhere() -> None:
    assert rule(torch.device("cpu"), torch.bfloat16, True).backend == "torch"
    assert rule(torch.device("meta"), torch.bfloat16, False).backend == "torch"


@pytest.mark.usefixtures("fresh_rule")
def test_the_rule_is_logged_once_for_each_op(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="moefold.kernels"):
        for op in ("permute", "permute", "moe_mlp", "permute"):
            assert choose(op, "auto", torch.empty(0)) == "torch"
    assert [record.getMessage().split()[0] for record in caplog.records] == ["permute", "moe_mlp"]
    assert "tensors are on cpu" in caplog.records[0].getMessage()


def test_what_is_asked_for_is_taken_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="moefold.kernels"):
        assert choose("permute", "triton", torch.empty(0)) == "triton"
        assert choose("moe_mlp", "loop", torch.empty(0), others=("loop",)) == "loop"
    assert not caplog.records
    with pytest.raises(ValueError, match="permute: backend 'loop' is none of 'auto', 'torch', 'triton'"):
        choose("permute", "loop", torch.empty(0))
