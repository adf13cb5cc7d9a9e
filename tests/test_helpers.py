"""The helpers that other tests trust: results in order, failures named, nothing hangs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from helpers import GlooPool, RankError, run_ranks, run_threads

pytestmark = pytest.mark.alone

Run = Callable[..., list[Any]]


@pytest.fixture(params=["processes", "pool", "threads"])
def run(request: pytest.FixtureRequest) -> Run:
    if request.param == "pool":
        return request.getfixturevalue("gloo_pool").run
    return {"processes": run_ranks, "threads": run_threads}[request.param]


@pytest.fixture
def pool() -> Iterator[GlooPool]:
    """A pool of its own, for tests that kill workers."""
    made = GlooPool(4)
    yield made
    made.close()


def who_am_i(rank: int, world_size: int, word: str) -> tuple[str, int, int, int]:
    time.sleep(0.05 * (world_size - rank))  # the last rank is ready first
    return word, rank, dist.get_rank(), dist.get_world_size()


def uneven_all_to_all(rank: int, world_size: int) -> list[float]:
    """Rank r sends r + 1 copies of its number to the first rank, one less to the next, never below zero."""

    def rows(source: int) -> list[int]:
        return [max(source + 1 - target, 0) for target in range(world_size)]

    sent, received = rows(rank), [rows(source)[rank] for source in range(world_size)]
    out = torch.full((sum(received),), -1.0)
    dist.all_to_all_single(out, torch.full((sum(sent),), float(rank)), received, sent)
    return out.tolist()


def one_fails(rank: int, world_size: int, failing: int) -> None:
    if rank == failing:
        raise ValueError(f"rank {rank} does not like this")
    dist.all_reduce(torch.ones(1))


def one_dies(rank: int, world_size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def one_is_missing(rank: int, world_size: int) -> None:
    if rank != 1:
        dist.all_reduce(torch.ones(1))
    else:
        time.sleep(60)


def process_id(rank: int, world_size: int) -> int:
    return os.getpid()


def draw(rank: int, world_size: int) -> float:
    return torch.rand(()).item()


def empty_is_nan(rank: int, world_size: int) -> bool:
    return bool(torch.empty(1000).isnan().all())


def sharded_step(rank: int, world_size: int) -> list[float]:
    """One fully sharded step: the state that torch keeps per world must not leak into the next case."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Linear(8, 8, bias=False)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("edp", "ep"))["ep"])
    (model(torch.ones(2, 8)) ** 2).sum().backward()
    grad = model.weight.grad
    assert grad is not None
    return grad.full_tensor().flatten()[:3].tolist()


@pytest.mark.ranks
def test_results_come_back_in_the_order_of_ranks(run: Run) -> None:
    assert run(who_am_i, 3, "hello") == [("hello", r, r, 3) for r in range(3)]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_uneven_all_to_all(run: Run, world_size: int) -> None:
    assert run(uneven_all_to_all, world_size) == [
        [float(source) for source in range(world_size) for _ in range(source + 1 - target)] for target in range(world_size)
    ]


@pytest.mark.ranks
@pytest.mark.parametrize("failing", [0, 2])
def test_a_failing_rank_is_named_and_the_others_do_not_hang(run: Run, failing: int) -> None:
    start_s = time.monotonic()
    with pytest.raises(RankError, match=rf"rank {failing} of 3 failed:(?s:.*)does not like this") as raised:
        run(one_fails, 3, failing)
    assert time.monotonic() - start_s < 10
    assert raised.value.rank == failing
    assert isinstance(raised.value.__cause__, ValueError)
    assert run(who_am_i, 2, "after") == [("after", r, r, 2) for r in range(2)], "a failure must not spoil the next case"


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["processes", "pool"])
def test_a_dead_rank_is_named_rather_than_those_that_lost_it(pool: GlooPool, kind: str) -> None:
    with pytest.raises(RankError, match="rank 1 of 3 failed:\nits process died, exit code -9"):
        (pool.run if kind == "pool" else run_ranks)(one_dies, 3)


@pytest.mark.ranks
def test_time_out_says_where_each_rank_hangs(pool: GlooPool) -> None:
    with pytest.raises(RankError, match=r"ranks \[0, 1, 2\] of 3 have not ended after 1 s(?s:.*)in one_is_missing"):
        pool.run(one_is_missing, 3, timeout_s=1)


def test_thread_time_out_names_the_ranks() -> None:
    def sleeps(rank: int, world_size: int) -> None:
        if rank == 1:
            time.sleep(1)

    with pytest.raises(RankError, match=r"ranks \[1\] of 2 have not ended after 0.2 s"):
        run_threads(sleeps, 2, timeout_s=0.2)


@pytest.mark.ranks
def test_pool_keeps_its_processes_and_a_failure_replaces_them(pool: GlooPool) -> None:
    first = pool.run(process_id, 4)
    assert len({*first, os.getpid()}) == 5
    assert pool.run(process_id, 2) == first[:2]
    with pytest.raises(RankError):
        pool.run(one_fails, 2, 1)
    assert not {*pool.run(process_id, 4)} & {*first}


@pytest.mark.ranks
def test_ranks_compute_after_the_test_has_used_threads_and_autograd() -> None:
    big = torch.rand(512, 512, requires_grad=True)
    (big @ big).sum().backward()
    assert big.grad is not None

    def gradient_sum(rank: int, world_size: int) -> float:
        own = big.detach().clone().requires_grad_()
        (own @ own).sum().backward()
        assert own.grad is not None
        return own.grad.sum().item()

    assert run_ranks(gradient_sum, 2, timeout_s=20) == pytest.approx([big.grad.sum().item()] * 2, rel=1e-4)


@pytest.mark.ranks
def test_pool_seeds_every_case(pool: GlooPool) -> None:
    first = pool.run(draw, 2)
    assert first[0] == first[1]
    assert pool.run(draw, 2) == first


@pytest.mark.ranks
def test_pool_forms_new_worlds_for_sharded_models(pool: GlooPool) -> None:
    results = {w: pool.run(sharded_step, w) for w in (2, 4)}
    again = pool.run(sharded_step, 2)
    assert results[2] == again
    assert all(torch.allclose(torch.tensor(r), torch.tensor(again[0])) for ranks in results.values() for r in ranks)


def test_pool_refuses_what_it_cannot_run(pool: GlooPool) -> None:
    with pytest.raises(ValueError, match="4 workers, the case wants 5"):
        pool.run(process_id, 5)
    with pytest.raises(TypeError, match="functions at module level"):
        pool.run(lambda rank, world_size: rank, 2)


@pytest.mark.ranks
def test_poisoned_memory_holds_here_and_in_ranks(pool: GlooPool, request: pytest.FixtureRequest) -> None:
    assert pool.run(empty_is_nan, 2) == [False, False]
    request.getfixturevalue("poisoned_memory")
    for made in (torch.empty(100), torch.empty_like(torch.ones(100)), torch.ones(3).new_empty(100)):
        assert made.isnan().all()
    assert (torch.empty(100, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert pool.run(empty_is_nan, 2) == [True, True]


def test_memory_is_not_poisoned_unless_asked_for() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
