"""One rank: where it stands, what ends it, and which of several failures is told."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers import GlooPool, run_ranks
from jobs import alone
from moefold.launch.process import (
    Crew,
    PeerFailedError,
    Rank,
    StopRequest,
    _fresh_store,
    as_named,
    choose_device,
    exit_code_of,
    is_secondary,
    joined,
    record_failure,
)
from moefold.launch.rundir import RunDir
from moefold.launch.settings import RunSection
from moefold.moe.errors import CheckpointError, CommError, ConfigError, DataError, NumericsError

pytestmark = pytest.mark.alone

CPU = torch.device("cpu")
CLOSED = RuntimeError("[gloo/transport/tcp/pair.cc:544] Connection closed by peer [127.0.0.1]:31337")
LATE = RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation to complete")


# --- where a rank stands ----------------------------------------------------------------------------------------------


def test_a_process_of_its_own_is_the_only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert Rank.here() == Rank(0, 1, 0, 1, False)


def test_torchrun_says_which_rank_this_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    assert Rank.here() == Rank(5, 8, 1, 4, True)


def here(rank: int, world: int) -> tuple[int, int, bool]:
    place = Rank.here()
    with joined(place, CPU, timeout_s=5):
        pass
    return place.rank, place.world, dist.is_initialized()


def test_a_process_group_that_exists_is_used_and_left_alone(gloo_pool: GlooPool) -> None:
    assert gloo_pool.run(here, 2) == [(0, 2, True), (1, 2, True)]


def test_alone_a_process_group_and_the_threads_last_as_long_as_the_body() -> None:
    def join() -> None:
        with pytest.raises(DataError), joined(Rank(0, 1, 0, 1, False), CPU, timeout_s=5, threads=3):
            assert dist.get_world_size() == 1
            assert torch.get_num_threads() == 3
            raise DataError("no text")
        assert not dist.is_initialized()
        assert torch.get_num_threads() == 1

    alone(join)


def test_ranks_that_do_not_find_each_other_are_a_communication_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in places.items():
        monkeypatch.setenv(name, value)
    lost = pytest.raises(CommError, match=r"rank 1 of 2 did not find the others \(parallel\.timeout_s = 1\)")

    def join() -> None:
        with lost, joined(Rank.here(), CPU, timeout_s=1):
            raise AssertionError("nobody else is here")

    alone(join)


def start_twice(rank: int, world: int, path: Path) -> list[str]:
    store = dist.FileStore(str(path), world)
    dist.rendezvous = lambda *args, **kwargs: iter([(store, rank, world)])
    seen = []
    for start in ("first", "second"):
        if rank == 0:
            time.sleep(0.3)  # the other rank is here before, and finds what the start before has left
        mine = _fresh_store(Rank(rank, world, rank, world, True), timedelta(seconds=10))
        if rank == 0:
            mine.set("address", f"{start} address")
        seen.append(mine.get("address").decode())
    return seen


def test_a_start_does_not_see_what_another_one_left_in_the_store(tmp_path: Path) -> None:
    assert run_ranks(start_twice, 2, tmp_path / "store") == [["first address", "second address"]] * 2


def test_every_rank_of_a_machine_refuses_more_ranks_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device("auto", Rank(1, 2, 1, 2, True)) == torch.device("cuda", 1)
    assert choose_device("cpu", Rank(0, 4, 0, 4, True)) == CPU
    for rank in range(4):
        with pytest.raises(ConfigError, match=r"train\.device: is 'auto', but this machine has 2 GPUs for 4 ranks"):
            choose_device("auto", Rank(rank, 4, rank, 4, True))


# --- stop requests ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGUSR2, 75), (signal.SIGINT, 130)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_signal_is_remembered_and_the_handlers_come_back(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == number
        assert stop.exit_code == code
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_ends_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


# --- kinds of errors --------------------------------------------------------------------------------------------------


def raised_from(error: Exception, cause: Exception) -> Exception:
    try:
        raise error from cause
    except Exception as chained:
        return chained


@pytest.mark.parametrize(
    ("error", "secondary"),
    [
        (CLOSED, True),
        (ConnectionResetError(104, "Connection reset by peer"), True),
        (dist.DistNetworkError("failed to recv, got 0 bytes. Connection was likely closed"), True),
        (raised_from(CheckpointError("saving failed"), CLOSED), True),
        (PeerFailedError("rank 2 failed"), True),
        (ValueError("Connection closed by peer"), False),
        (LATE, False),
        (RuntimeError("shapes do not match"), False),
        (KeyboardInterrupt(), False),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_errors_that_only_say_that_a_peer_has_gone(error: BaseException, secondary: bool) -> None:
    assert is_secondary(error) == secondary


def test_a_time_out_of_a_collective_becomes_a_communication_error() -> None:
    named = as_named(LATE)
    assert isinstance(named, CommError)
    assert "parallel.timeout_s" in str(named)
    assert "Timed out waiting 3000ms" in str(named)
    for other in (CLOSED, RuntimeError("shapes"), NumericsError("the request timed out"), ValueError("timed out")):
        assert as_named(other) is other


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (DataError("x"), 3),
        (NumericsError("x"), 4),
        (CommError("x"), 5),
        (MemoryError("x"), 6),
        (torch.OutOfMemoryError("x"), 6),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried"), 6),
        (PeerFailedError("x", 4), 4),
        (KeyboardInterrupt(), 130),
        (RuntimeError("x"), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else str(value),
)
def test_exit_codes(error: BaseException, code: int) -> None:
    assert exit_code_of(error) == code


# --- the first cause --------------------------------------------------------------------------------------------------


class FakeCrew(Crew):
    """Ranks that are all this process, except for dead ones."""

    def __init__(self, rank: int, world: int, dead: tuple[int, ...] = ()):
        gone = multiprocessing.get_context("fork").Process(target=int)
        gone.start()
        gone.join()
        assert gone.pid is not None
        host = socket.gethostname()
        self.rank, self.world = rank, world
        self.members = [(host, gone.pid if r in dead else os.getpid()) for r in range(world)]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir.create(RunSection(dir=str(tmp_path / "run")), "")
    run.start_attempt(4)
    return run


def test_the_first_rank_to_fail_records_and_tells_and_the_others_follow(run: RunDir) -> None:
    first = record_failure(run, FakeCrew(2, 4), NumericsError("loss is nan"))
    assert (first.exit_code, first.recorded_here) == (4, True)
    assert first.message == f"rank 2 on {socket.gethostname()}: NumericsError: loss is nan"
    start_s = time.monotonic()
    second = record_failure(run, FakeCrew(0, 4), CLOSED)
    assert time.monotonic() - start_s < 1
    assert (second.exit_code, second.message, second.recorded_here) == (4, first.message, False)
    attempt = run.status()["attempts"][-1]
    assert (attempt["state"], attempt["exit_code"], attempt["error"]) == ("nan", 4, first.message)
    report = json.loads((run.logs() / "error-rank-00000.json").read_text())
    assert report["secondary"]
    assert "Connection closed by peer" in report["traceback"]


def fail_later(path: Path) -> None:
    time.sleep(0.5)
    record_failure(RunDir(path), FakeCrew(3, 4), ValueError("the cause"))


def test_a_rank_that_lost_its_peers_waits_for_the_one_that_knows_why(run: RunDir) -> None:
    late = multiprocessing.get_context("fork").Process(target=fail_later, args=(run.path,))
    late.start()
    failure = record_failure(run, FakeCrew(0, 4), CLOSED, wait_s=20)
    late.join()
    assert failure.message.endswith("ValueError: the cause")
    assert not failure.recorded_here


def test_a_rank_that_died_silently_is_named(run: RunDir) -> None:
    start_s = time.monotonic()
    failure = record_failure(run, FakeCrew(0, 4, dead=(1,)), CLOSED, wait_s=20)
    assert time.monotonic() - start_s < 5
    assert failure.message.startswith(f"rank 1 on {socket.gethostname()}: process ")
    assert "killed" in failure.message
    assert (failure.exit_code, failure.recorded_here) == (1, True)


def test_a_lost_peer_that_nobody_explains_is_still_recorded(run: RunDir) -> None:
    failure = record_failure(run, FakeCrew(0, 4), CLOSED, wait_s=0.2)
    assert "Connection closed by peer" in failure.message
    assert run.status()["attempts"][-1]["exit_code"] == 1


# --- what rank 0 does for all -----------------------------------------------------------------------------------------


def share(rank: int, world: int) -> tuple[object, ...]:
    crew = Crew()
    value = crew.from_first(lambda: {"made by": rank})

    def refuse() -> None:
        raise DataError("no text at all")

    def crash() -> None:
        raise OSError(28, "No space left on device")

    found: list[object] = []
    for work in (refuse, crash):
        try:
            crew.from_first(work)
        except Exception as error:
            found += [type(error).__name__, str(error), getattr(error, "told", None)]
    crew.wait()
    return value, crew.share(f"word of {rank}"), *found, [pid for _, pid in crew.members][rank] == os.getpid(), crew.dead()


def test_the_result_or_the_error_of_rank_0_reaches_all_and_it_alone_tells() -> None:
    first, second = run_ranks(share, 2)
    assert first[:2] == second[:2] == ({"made by": 0}, "word of 0")
    assert first[2:5] == ("DataError", "no text at all", False)
    assert second[2:5] == ("DataError", "no text at all", True)
    assert first[5:8] == ("OSError", "[Errno 28] No space left on device", None)
    assert second[5:8] == ("PeerFailedError", "rank 0: OSError: [Errno 28] No space left on device", True)
    assert first[8:] == second[8:] == (True, [])
