"""The check of the kernels at the start of a run: quiet where they are right, precise where one is wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moefold.kernels import self_check
from moefold.kernels.self_check import check_kernels


@pytest.fixture(scope="module")
def findings() -> list[self_check.Finding]:
    return check_kernels(torch.device("cpu"), torch.float32)


def test_right_kernels_pass(findings: list[self_check.Finding]) -> None:
    assert [f for f in findings if not f.good] == []
    assert {f.op for f in findings} == {"topk_gate", "sort_tokens", "permute", "unpermute", "moe_mlp", "moe_layer_mlp"}
    assert {f.result for f in findings if f.op == "moe_mlp"} == {
        "output",
        "gradient of rows",
        "gradient of w13",
        "gradient of w2",
    }


def test_a_wrong_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = self_check.permute

    def wrong(x_TD: Tensor, order_R: Tensor, row_TK: Tensor, kept_TK: Tensor | None, backend: str) -> Tensor:
        rows = right(x_TD, order_R, row_TK, kept_TK, "torch")
        if backend == "triton":
            rows = rows.clone()
            rows[3, 5] += 0.1
        return rows

    monkeypatch.setattr(self_check, "permute", wrong)
    monkeypatch.setattr(
        self_check,
        "moe_mlp",
        lambda rows, w13, w2, counts_E, backend: rows * float("nan" if backend == "triton" else 1) + 0 * (w13.sum() + w2.sum()),
    )
    bad = {(f.op, f.result) for f in check_kernels(torch.device("cpu"), torch.float32) if not f.good}
    assert ("permute", "output") in bad
    assert ("permute", "gradient of x") not in bad
    assert ("moe_mlp", "output") in bad
    assert {op for op, _ in bad} == {"permute", "moe_mlp"}
