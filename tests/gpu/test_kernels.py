"""The Triton kernels on a GPU: `pytest -m gpu tests/gpu`. Exactness, reruns and layouts; see test_kernel_limits.py for the rest.

Every body also runs in Triton's interpreter, on a CPU and in small: tests/interpreter/test_gpu_bodies.py.
"""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

from gpu.bodies import check_all_kernels, check_exact, check_never_waits, check_repeats
from gpu.measures import Relay, inside_wider_rows, transposed
from gpu.operations import OPERATIONS, Draw, Size
from gpu.routing_bodies import (
    RULES,
    check_broken_logits,
    check_buckets,
    check_codes,
    check_distances,
    check_gate,
    check_quantised,
    check_sort,
    check_ties,
)

pytestmark = pytest.mark.gpu
NAMES = MappingProxyType({torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"})
DTYPES = pytest.mark.parametrize("dtype", NAMES, ids=NAMES.values())
OPS = pytest.mark.parametrize("op", OPERATIONS)
RELAYS = pytest.mark.parametrize("relay", [transposed, inside_wider_rows], ids=["transposed", "misaligned"])

PRODUCTION = MappingProxyType(
    {
        "qwen3-30b": Size(4096, 8, 128, 2048, 768),
        "gpt-oss-20b": Size(4096, 4, 32, 2880, 2880, drops=True),
        "deepseek-v3-rank": Size(2048, 8, 16, 7168, 2048),
        "qwen3-next": Size(1024, 10, 256, 2048, 512),
    }
)
UGLY = MappingProxyType(
    {
        "no-tokens": Size(0, 2, 8, 256, 128),
        "one-token": Size(1, 2, 8, 256, 128),
        "tile-less-one": Size(127, 1, 1, 256, 128),
        "tile-and-one": Size(129, 1, 1, 256, 128),
        "every-expert": Size(77, 8, 8, 320, 192),
        "odd": Size(201, 3, 5, 75, 45, drops=True),
        "one-takes-all": Size(1001, 2, 16, 264, 200, "one"),
        "empty-experts": Size(300, 2, 64, 328, 104, "few", drops=True),
        "one-column": Size(40, 2, 4, 1, 1, drops=True),
    }
)


@DTYPES
def test_the_check_at_the_start_of_a_run(device: torch.device, dtype: torch.dtype) -> None:
    check_all_kernels(device, dtype)


@DTYPES
@pytest.mark.parametrize("shape", PRODUCTION)
@OPS
def test_production_shapes(device: torch.device, op: str, shape: str, dtype: torch.dtype) -> None:
    check_exact(OPERATIONS[op](PRODUCTION[shape], Draw(device, dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", UGLY)
@OPS
def test_ugly_shapes(device: torch.device, op: str, shape: str, dtype: torch.dtype) -> None:
    check_exact(OPERATIONS[op](UGLY[shape], Draw(device, dtype)))


@RELAYS
@OPS
def test_strided_tensors(device: torch.device, op: str, relay: Relay) -> None:
    check_exact(OPERATIONS[op](Size(300, 3, 12, 320, 136, drops=True), Draw(device, torch.bfloat16)), relay)


@pytest.mark.parametrize("shape", ["qwen3-30b", "gpt-oss-20b"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@OPS
def test_reruns_are_bitwise_equal_in_poisoned_memory(device: torch.device, op: str, shape: str, dtype: torch.dtype) -> None:
    check_repeats(OPERATIONS[op](PRODUCTION[shape], Draw(device, dtype)))


@pytest.mark.parametrize("shape", ["odd", "one-takes-all", "empty-experts"])
@OPS
def test_small_reruns_in_poisoned_memory(device: torch.device, op: str, shape: str) -> None:
    check_repeats(OPERATIONS[op](UGLY[shape], Draw(device, torch.bfloat16)))


@pytest.mark.parametrize("shape", ["no-tokens", "odd", "empty-experts"])
@OPS
def test_the_host_never_waits(device: torch.device, op: str, shape: str) -> None:
    check_never_waits(OPERATIONS[op](UGLY[shape], Draw(device, torch.bfloat16)))


@pytest.mark.parametrize("tokens", [1, 127, 4096])
@pytest.mark.parametrize("rule", RULES)
def test_gate(device: torch.device, rule: str, tokens: int) -> None:
    check_gate(RULES[rule], tokens, Draw(device, torch.float32))


@RELAYS
def test_gate_of_strided_logits(device: torch.device, relay: Relay) -> None:
    check_gate(RULES["top2-groups"], 300, Draw(device, torch.float32), relay)


@pytest.mark.parametrize(("experts", "k"), [(12, 4), (128, 8), (256, 8)])
def test_equal_logits_choose_the_lowest_expert(device: torch.device, experts: int, k: int) -> None:
    check_ties(Draw(device, torch.float32), 4096, experts, k)


@pytest.mark.parametrize("experts", [8, 128])
def test_broken_logits(device: torch.device, experts: int) -> None:
    check_broken_logits(Draw(device, torch.float32), 300, experts, 4)


@pytest.mark.parametrize(
    "size",
    [*PRODUCTION.values(), *UGLY.values(), Size(32768, 8, 512, 1, 1), Size(50000, 8, 300, 1, 1, "few", drops=True)],
    ids=lambda size: f"{size.T}x{size.K}-of-{size.E}-{size.routing}",
)
def test_sort(device: torch.device, size: Size) -> None:
    check_sort(size, Draw(device, torch.float32))


@DTYPES
@pytest.mark.parametrize(
    ("width", "hashes", "directions"), [(2048, 6, 16), (2048, 8, 32), (768, 6, 64), (300, 3, 256), (75, 5, 4)]
)
def test_lsh_codes(device: torch.device, dtype: torch.dtype, width: int, hashes: int, directions: int) -> None:
    check_codes(Draw(device, dtype), 1001, width, hashes, directions)


@pytest.mark.parametrize("drops", [False, True], ids=["all-kept", "drops"])
def test_lsh_buckets(device: torch.device, drops: bool) -> None:
    check_buckets(Size(300, 3, 8, 1, 1, drops=drops), Draw(device, torch.float32))


@DTYPES
@pytest.mark.parametrize("size", [Size(4096, 8, 128, 2048, 1), Size(301, 3, 7, 75, 1, drops=True)], ids=["large", "odd"])
def test_lsh_distances(device: torch.device, dtype: torch.dtype, size: Size) -> None:
    check_distances(size, Draw(device, dtype))


@DTYPES
@pytest.mark.parametrize(
    ("width", "block"), [(7168, 128), (2880, 128), (2880, None), (75, 32), (7, None)], ids=["7168", "2880", "rows", "odd", "few"]
)
def test_quantised_rows(device: torch.device, dtype: torch.dtype, width: int, block: int | None) -> None:
    check_quantised(Draw(device, dtype), 1001, width, block)
    check_quantised(Draw(device, dtype), 33, width, block, inside_wider_rows)
