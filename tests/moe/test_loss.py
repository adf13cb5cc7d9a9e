"""The chunked cross-entropy against torch's own: values, gradients, masks, a sharded vocabulary, precision and memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moefold.moe import loss
from moefold.moe.loss import cross_entropy_sum
from numeric import assert_same, with_gradients

T, V, D = 13, 24, 6


def tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    return {"x_TD": torch.randn(T, D).to(dtype), "w_VD": torch.randn(V, D).to(dtype)}


def specified(x_TD: Tensor, w_VD: Tensor, labels_T: Tensor, valid_T: Tensor | None = None) -> Tensor:
    labels_T = labels_T if valid_T is None else labels_T.masked_fill(~valid_T, -100)
    wide = torch.promote_types(x_TD.dtype, torch.float32)
    return F.cross_entropy(x_TD.to(wide) @ w_VD.to(wide).T, labels_T, reduction="sum")


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 5, T - 1, T, 100])
@pytest.mark.parametrize("masked", [False, True], ids=["all-valid", "masked"])
def test_equals_torch_for_any_chunk(monkeypatch: pytest.MonkeyPatch, rows_per_chunk: int, masked: bool) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", rows_per_chunk * V + 3)
    labels = {"labels_T": torch.randint(V, (T,)), "valid_T": torch.rand(T) < 0.6 if masked else None}
    inputs = tensors()
    got, want = (with_gradients(partial(fn, **labels), inputs) for fn in (cross_entropy_sum, specified))
    assert_same(got, want, rtol=1e-13)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["fp64", "fp32", "bf16"]
)
def test_dtypes(dtype: torch.dtype, rtol: float) -> None:
    labels_T, inputs = torch.randint(V, (T,)), tensors(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    got = with_gradients(partial(cross_entropy_sum, labels_T=labels_T), inputs)
    assert [x.dtype for x in got.values()] == [wide, dtype, dtype]
    want = with_gradients(partial(specified, labels_T=labels_T), {n: x.to(wide) for n, x in inputs.items()})
    assert_same({n: x.to(wide) for n, x in got.items()}, want, rtol)


def test_the_divisor_is_not_rounded_to_bf16() -> None:
    inputs = {"x_TD": torch.randn(500, 32), "w_VD": torch.randn(V, 32)}
    inputs = {name: x.bfloat16().requires_grad_() for name, x in inputs.items()}
    labels_T = torch.randint(V, (500,))
    # 1/3 in bf16 is 0.2 % too large, and so would be every gradient
    whole, third = (
        torch.autograd.grad(cross_entropy_sum(**inputs, labels_T=labels_T) / d, list(inputs.values())) for d in (1, 3)
    )
    for a, b in zip(whole, third, strict=True):
        a, b = a.double().flatten(), b.double().flatten()
        assert abs((a @ b) / (a @ a) * 3 - 1) < 4e-4


def test_large_logits_stay_finite() -> None:
    x_TD, w_VD = torch.full((2, 1), 1e4), torch.linspace(-1, 1, V)[:, None]
    total = cross_entropy_sum(x_TD, w_VD, torch.tensor([V - 1, 0]))
    assert total.item() == pytest.approx(2e4)


@pytest.mark.parametrize("label", [-100, V, 10_000])
def test_masked_positions_may_hold_any_label(label: int) -> None:
    inputs, labels_T, valid_T = tensors(), torch.randint(V, (T,)), torch.arange(T) != 4
    want = with_gradients(partial(cross_entropy_sum, labels_T=labels_T, valid_T=valid_T), inputs)
    labels_T[4] = label
    assert_same(with_gradients(partial(cross_entropy_sum, labels_T=labels_T, valid_T=valid_T), inputs), want)


@pytest.mark.parametrize("label", [-100, V, 10_000])
def test_a_valid_label_outside_the_vocabulary_is_no_loss(label: int) -> None:
    labels_T = torch.randint(V, (T,))
    labels_T[4] = label
    assert cross_entropy_sum(**tensors(), labels_T=labels_T).isnan()


@pytest.mark.parametrize("tokens", [0, 5], ids=["no-tokens", "all-masked"])
def test_nothing_to_predict_is_zero(tokens: int) -> None:
    inputs = {"x_TD": torch.randn(tokens, D), "w_VD": torch.randn(V, D)}
    masks = {"labels_T": torch.zeros(tokens, dtype=torch.int64), "valid_T": torch.zeros(tokens, dtype=torch.bool)}
    got = with_gradients(partial(cross_entropy_sum, **masks), inputs)
    assert not any(x.any() for x in got.values())


def test_a_frozen_head_still_passes_gradients_on() -> None:
    inputs, labels_T = tensors(), torch.randint(V, (T,))
    want = with_gradients(partial(cross_entropy_sum, labels_T=labels_T), inputs)
    for name in inputs:
        frozen = {n: x for n, x in inputs.items() if n != name}
        other = next(iter(frozen))
        got = with_gradients(partial(cross_entropy_sum, labels_T=labels_T, **{name: inputs[name].detach()}), frozen)
        assert_same({"gradient": got[f"gradient of {other}"]}, {"gradient": want[f"gradient of {other}"]})


class ThreadShard:
    """One of several ranks that are threads: partial results meet in a shared list."""

    def __init__(self, rank: int, offset: int, slots: list[Tensor | None], barrier: threading.Barrier):
        self.rank, self.offset, self.slots, self.barrier = rank, offset, slots, barrier

    def join(self, x: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
        self.slots[self.rank] = x
        self.barrier.wait()
        result = reduce(torch.stack([slot for slot in self.slots if slot is not None]))
        self.barrier.wait()
        return result

    def max(self, x: Tensor) -> Tensor:
        return self.join(x, lambda parts: parts.amax(0))

    def sum(self, x: Tensor) -> Tensor:
        return self.join(x, lambda parts: parts.sum(0))


def on_shards(inputs: dict[str, Tensor], rows: list[int], **masks: Any) -> list[dict[str, Tensor]]:
    """Results of every rank, with `rows` rows of the vocabulary each."""
    slots: list[Tensor | None] = [None] * len(rows)
    barrier = threading.Barrier(len(rows), timeout=20)
    results: list[dict[str, Tensor]] = [{} for _ in rows]

    def work(rank: int) -> None:
        offset = sum(rows[:rank])
        shard = ThreadShard(rank, offset, slots, barrier)
        mine = {"x_TD": inputs["x_TD"].clone(), "w_VD": inputs["w_VD"][offset : offset + rows[rank]].clone()}
        results[rank] = with_gradients(lambda **leaves: cross_entropy_sum(**leaves, **masks, shard=shard), mine)

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(len(rows))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


@pytest.mark.parametrize("rows", [[12, 12], [1, 20, 3]], ids=["halves", "uneven"])
@pytest.mark.parametrize("masked", [False, True], ids=["all-valid", "masked"])
def test_a_sharded_vocabulary_adds_up(monkeypatch: pytest.MonkeyPatch, rows: list[int], masked: bool) -> None:
    inputs, masks = tensors(), {"labels_T": torch.randint(V, (T,)), "valid_T": torch.rand(T) < 0.6 if masked else None}
    want = with_gradients(partial(cross_entropy_sum, **masks), inputs)
    # every rank takes as many steps as the others: the size of a chunk depends on its rows, so let it be one
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 1)
    parts = on_shards(inputs, rows, **masks)
    for part in parts:
        assert_same({"output": part["output"]}, {"output": want["output"]}, rtol=1e-13)
    got = {
        "output": want["output"],
        "gradient of x_TD": torch.stack([part["gradient of x_TD"] for part in parts]).sum(0),
        "gradient of w_VD": torch.cat([part["gradient of w_VD"] for part in parts]),
    }
    assert_same(got, want, rtol=1e-13)


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns, and the number of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.products = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket is torch.ops.aten.mm
        self.elements = max(
            [self.elements, *(x.numel() for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, Tensor))]
        )
        return result


def test_never_holds_the_logits_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "CHUNK_ELEMENTS", 8 * 100)
    x_TD, w_VD = torch.randn(256, 4, requires_grad=True), torch.randn(100, 4, requires_grad=True)
    with Largest() as largest:
        cross_entropy_sum(x_TD, w_VD, torch.randint(100, (256,))).backward()
    assert 8 * 100 <= largest.elements <= max(8 * 100, 256 * 4)


def test_no_gradient_is_formed_where_none_is_recorded() -> None:
    inputs = {name: x.requires_grad_() for name, x in tensors().items()}
    counts = []
    for grad in (True, False):
        with torch.set_grad_enabled(grad), Largest() as largest:
            cross_entropy_sum(**inputs, labels_T=torch.zeros(T, dtype=torch.int64))
        counts.append(largest.products)
    assert counts == [3, 1]
