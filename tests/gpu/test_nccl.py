"""The layouts on GPUs with NCCL: `torchrun --nproc-per-node N -m pytest -m gpu tests/gpu` (N = 1, 2, 4 or 8)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moefold.moe.config import BalanceConfig, ModelConfig, MoEConfig
from moefold.parallel.parity import ParityCase, RankTrace, run_layout, run_reference
from moefold.parallel.parity_compare import compare

pytestmark = pytest.mark.gpu
WORLD = int(os.environ.get("WORLD_SIZE", 1))
LAYOUTS: tuple[dict[str, Any], ...] = (
    {},
    {"hsdp": 2},
    {"ep": 2},
    {"tp": 2},
    {"tp": 2, "ep": 2},
    {"ep": 4},
    {"tp": 2, "ep": 4},
    {"ep": 2, "etp": 2},
    {"tp": 2, "ep": 2, "etp": 2},
    {"ep": 8},
)


def fits(layout: dict[str, Any]) -> bool:
    dense, expert = layout.get("tp", 1) * layout.get("hsdp", 1), layout.get("ep", 1) * layout.get("etp", 1)
    return WORLD % dense == 0 and WORLD % expert == 0


@pytest.fixture(scope="module")
def device() -> Iterator[torch.device]:
    """This rank's GPU, in a process group of all ranks that torchrun started (or of this one alone)."""
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(local)
    if "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
    yield local
    dist.destroy_process_group()


def model(**moe: Any) -> ModelConfig:
    config = {"num_experts": 8, "top_k": 2, "expert_dim": 32, "num_shared_experts": 1} | moe
    return ModelConfig(
        dim=32,
        num_layers=3,
        num_heads=4,
        num_kv_heads=2,
        vocab_size=64,
        max_seq_len=32,
        dense_prefix_layers=1,
        dense_ffn_dim=64,
        qk_norm="head",
        moe=MoEConfig(**config, balance=BalanceConfig(aux_loss_coeff=0.1, z_loss_coeff=0.01, expert_bias=True)),
    )


@pytest.mark.parametrize("layout", [x for x in LAYOUTS if fits(x)], ids=str)
@pytest.mark.parametrize("moe", [{}, {"capacity_factor": 1.0}], ids=["dropless", "capacity"])
def test_layout_equals_one_process_on_cpu(device: torch.device, layout: dict[str, Any], moe: dict[str, Any]) -> None:
    case = ParityCase(model(**moe), global_batch=16, seq_len=16, num_micro=2, steps=3, valid_share=0.6)
    mine = run_layout(case, layout, device)
    ranks: list[Any] = [None] * WORLD
    dist.all_gather_object(ranks, mine)
    traces: list[RankTrace] = ranks
    worst = max(compare(run_reference(case), traces), key=lambda d: d.worst)
    assert worst.worst < 1e-9, worst


def test_bf16_trains_with_the_router_in_fp32(device: torch.device) -> None:
    case = ParityCase(model(), global_batch=16, seq_len=16, steps=20, precision="bf16", lr=1e-2)
    trace = run_layout(case, {"ep": 2} if WORLD % 2 == 0 else {}, device)
    loss = trace.figures.loss
    assert all(x == x for x in loss)
    assert min(loss[-5:]) < loss[0]


def test_reruns_are_bitwise_equal(device: torch.device) -> None:
    case = ParityCase(model(), global_batch=16, seq_len=16, steps=3, precision="fp32")
    layout = {"ep": 2} if WORLD % 2 == 0 else {}
    first, second = (run_layout(case, layout, device) for _ in range(2))
    assert first.figures.loss == second.figures.loss
    for name, piece in first.weights.items():
        assert (piece.values == second.weights[name].values).all(), name
