"""The Triton kernels at the limits of a GPU: offsets beyond 32 bits, graphs, memory, and the layer that uses them by default."""

from __future__ import annotations

import pytest
import torch

from gpu.bodies import check_captured, check_layer, check_saved, formula_bytes
from gpu.large_bodies import (
    check_layer_offsets,
    check_permute_offsets,
    check_product_offsets,
    check_unpermute_offsets,
)
from gpu.measures import poison_free_memory
from gpu.operations import Draw, Size, expert_layer
from moefold.kernels.backend import rule
from moefold.kernels.moe_mlp import choose_backend

pytestmark = pytest.mark.gpu
BEYOND = 1 << 31
"""Elements that 32 bits with a sign do not number."""
MANY_ROWS = Size(65536, 8, 64, 4160, 1)
MANY_TOKENS = Size(524288, 1, 64, 4160, 1)


def needs(device: torch.device, gib: int) -> None:
    total = torch.cuda.get_device_properties(device).total_memory >> 30
    if total < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory; {device} has {total}")


@pytest.mark.parametrize("size", [MANY_ROWS, MANY_TOKENS], ids=["rows", "tokens"])
def test_permute_beyond_32_bits(device: torch.device, size: Size) -> None:
    needs(device, 24)
    assert size.T * size.K * size.D > BEYOND
    check_permute_offsets(size, Draw(device, torch.bfloat16))


@pytest.mark.parametrize("size", [MANY_ROWS, MANY_TOKENS], ids=["rows", "tokens"])
def test_unpermute_beyond_32_bits(device: torch.device, size: Size) -> None:
    needs(device, 32)
    assert size.T * size.K * size.D > BEYOND
    check_unpermute_offsets(size, Draw(device, torch.bfloat16))


@pytest.mark.parametrize(
    ("size", "gather", "elements"),
    [
        (Size(65536, 8, 64, 64, 4160), True, 65536 * 8 * 4160),
        (Size(65536, 8, 64, 4160, 64), False, 65536 * 8 * 4160),
        (Size(524288, 1, 64, 4160, 64), True, 524288 * 4160),
        (Size(1024, 4, 520, 2048, 2048), True, 520 * 2048 * 2048),
    ],
    ids=["products", "rows", "tokens", "weights"],
)
def test_grouped_gemm_beyond_32_bits(device: torch.device, size: Size, gather: bool, elements: int) -> None:
    needs(device, 40)
    assert elements > BEYOND
    check_product_offsets(size, Draw(device, torch.bfloat16), gather)


@pytest.mark.parametrize(
    ("size", "elements"),
    [
        (Size(65536, 8, 64, 64, 2080), 65536 * 8 * 2 * 2080),
        (Size(1024, 4, 520, 2048, 1024), 520 * 2 * 1024 * 2048),
    ],
    ids=["pre-activation", "weights"],
)
def test_moe_layer_mlp_beyond_32_bits(device: torch.device, size: Size, elements: int) -> None:
    needs(device, 48)
    assert elements > BEYOND
    check_layer_offsets(size, Draw(device, torch.bfloat16))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward-and-backward"])
def test_one_graph_from_the_gate_to_the_output(device: torch.device, backward: bool) -> None:
    check_captured(Size(512, 4, 16, 512, 256), Draw(device, torch.bfloat16), backward)


def test_memory_kept_for_backward(device: torch.device) -> None:
    size, draw = Size(16384, 8, 128, 2048, 768), Draw(device, torch.bfloat16)
    check_saved(size, draw)
    operation = expert_layer(size, draw)
    leaves = {name: x.requires_grad_() for name, x in operation.leaves.items()}
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    output_TD = operation.ours(**leaves)["tokens"]
    torch.cuda.synchronize(device)
    # what autograd's hooks do not see is counted too; the tokens were there before
    kept = torch.cuda.memory_allocated(device) - before - output_TD.nbytes + leaves["x_TD"].nbytes
    expected = formula_bytes(size, draw.dtype)
    assert expected <= kept <= 1.05 * expected, f"{kept} bytes are kept, {kept / expected:.3f} of {expected}"


def test_free_memory_is_poisoned(device: torch.device) -> None:
    for count in (100, 100_000, 3_000_000, 200_000_000):
        for dtype in (torch.bfloat16, torch.float32):
            # anew, because the comparison writes to free memory
            poison_free_memory(device)
            assert torch.empty(count, dtype=dtype, device=device).isnan().all(), f"{count} elements of {dtype}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_layer_runs_on_triton_by_rule(device: torch.device, dtype: torch.dtype) -> None:
    assert rule(device, dtype, products=True).backend == "triton"
    assert choose_backend(torch.empty(0, 8, dtype=dtype, device=device)) == "triton"
    check_layer(Size(1024, 4, 16, 512, 256), Draw(device, dtype), "auto")


def test_products_in_fp32_run_on_torch_by_rule(device: torch.device) -> None:
    assert rule(device, torch.float32, products=False).backend == "triton"
    assert choose_backend(torch.empty(0, 8, device=device)) == "loop"
