"""What every test gets: fixed seeds, few threads, GPU tests only where there is a GPU, and ranks to run on."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from helpers import SEED, GlooPool

THREADS = 2


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)


def pytest_report_header(config: pytest.Config) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device: tests marked gpu are skipped"
    return f"torch {torch.__version__}, {THREADS} threads, seed {SEED}, {device}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if not torch.cuda.is_available():
        for item in gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none"))
    # last, because processes cannot be forked for the others once autograd has run on a GPU
    items[:] = [item for item in items if not item.get_closest_marker("gpu")] + gpu


@pytest.fixture(autouse=True)
def seeds() -> None:
    """The same random numbers, whichever tests ran before."""
    random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(autouse=True)
def no_process_group_left() -> Iterator[None]:
    """Benchmarks and other projects' layers join a group of one process for good: the next test must not find it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory from torch.empty, empty_like, new_empty and resize_ holds NaN (largest value for integers): reading it shows.

    Holds in ranks too. Operations without a deterministic implementation warn.
    """
    mode, fill = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("warn")
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode(mode)


@pytest.fixture(scope="session")
def gloo_pool() -> Iterator[GlooPool]:
    """Eight processes that form a gloo world of up to eight ranks for every case; forked when first needed."""
    pool = GlooPool(8)
    yield pool
    pool.close()
