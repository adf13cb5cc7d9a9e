"""The verb `moefold profile comm`: what it prints, writes and refuses, and how it ends when a rank does not live to see it."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from helpers import GlooPool
from jobs import command_ranks
from moefold.launch.cli import main
from moefold.launch.profile import comm
from moefold.launch.profile.comm import CommOptions, CommProfile, parse_size, profile_comm
from moefold.launch.profile.comm_sections import model_line
from moefold.launch.profile.page import page_html
from moefold.moe.errors import ConfigError
from moefold.parallel.comm_ops import OPERATIONS
from moefold.parallel.comm_sweep import Curve, Row
from moefold.parallel.config import ParallelConfig
from moefold.parallel.cost_model import LinkFit, LinkModel

QUICK = CommOptions(begin=1024, end=16384, factor=4.0, iters=3, warmup=0)
WORDS = ["--begin", "1K", "--end", "16K", "--factor", "4", "--iters", "3", "--budget-s", "2", "--train.device", "cpu"]


@pytest.fixture(autouse=True)
def not_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def test_sizes_as_people_write_them() -> None:
    assert [parse_size(text, "--end") for text in ("512", "8K", "8k", "64M", "1.5GiB", "2 MB")] == [
        *(512, 8192, 8192, 64 * 2**20, 3 * 2**29, 2**21),
    ]
    with pytest.raises(ConfigError, match="--end: is 'large', which is no size; write bytes, or 8K, 64M, 1G"):
        parse_size("large", "--end")
    assert QUICK.sizes() == (1024, 4096, 16384)
    assert CommOptions(begin=1000, end=1000).sizes() == (1000,)
    assert CommOptions().sizes() == tuple(8192 * 2**i for i in range(14))


def test_all_wrong_options_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        CommOptions(begin=0, end=-1, factor=1, iters=2, warmup=-1, budget_s=0, imbalance=0.5, dtype="int4", operations=("a2a",))
    told = {problem.where for problem in caught.value.problems}
    assert told == {"--begin", "--end", "--factor", "--iters", "--warmup", "--budget-s", "--imbalance", "--dtype", "--ops"}
    assert "names a2a; there are all_to_all, torch, uneven" in str(caught.value)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "world: is 1: this process was not started by torchrun; start it as `torchrun --nproc-per-node N -m moefold.launch"),
        (["--end", "huge"], "--end: is 'huge', which is no size"),
        (["--iters", "1"], "--iters: is 1, but a median wants at least 3"),
        (["--parallel.pe", "2"], "parallel.pe (flag --parallel.pe): unknown key"),
    ],
)
def test_usage_errors(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", "comm", *args]) == 2
    assert says in capsys.readouterr().err


def on_ranks(rank: int, world: int, parallel: dict[str, Any] | None, fields: dict[str, Any]) -> CommProfile | str:
    os.environ.pop("LOCAL_RANK", None)
    settings = None if parallel is None else ParallelConfig(**parallel)
    layout = bool(set(parallel or ()) - {"ranks_per_node"})
    files = {f"{kind}_file": fields.pop(kind) for kind in ("json", "csv", "html") if kind in fields}
    try:
        return profile_comm(settings, CommOptions(**{**vars(QUICK), **fields}), layout=layout, device="cpu", **files)
    except ConfigError as error:
        return str(error)


@pytest.mark.ranks
def test_all_ranks_of_two_hosts(gloo_pool: GlooPool, tmp_path: Path) -> None:
    files = {kind: str(tmp_path / f"comm.{kind}") for kind in ("json", "csv", "html")}
    first, *others = gloo_pool.run(on_ranks, 4, {"ranks_per_node": 2}, files)
    assert [other.curves for other in others] == [first.curves] * 3 and [other.rank for other in others] == [1, 2, 3]
    assert list(first.groups) == ["world", "inside", "across"] and first.exit_code == 0 and first.wrong == 0
    measured = [(curve.scope, curve.operation) for curve in first.curves]
    assert measured == [("world", name) for name in OPERATIONS] + [("inside", "all_to_all"), ("across", "all_to_all")]
    assert first.pairs is not None and len(first.pairs.ways) == 12

    text = first.render()
    assert text.startswith("4 ranks on 2 hosts, gloo on cpu")
    for expected in (
        "all_to_all (receives first) over world: 4 ranks",
        "torch (all_to_all_single) over world",
        "uneven all_to_all (hottest rank x2)",
        "all_to_all (receives first) over inside: 2 ranks, 2 groups at once",
        "link models",
        "between hosts, all their ranks at once",
        "latency between ranks, us",
        "# size: bytes of one rank's buffer, its own part included",
        "# slow: below 1/1.5 of the usual rate between hosts",
        "two hosts have one link and nothing to compare it with",
    ):
        assert expected in text
    assert first.verdict in text

    data = json.loads((tmp_path / "comm.json").read_text())
    assert data == json.loads(json.dumps(first.to_dict()))
    assert data["schema"] == 1 and data["curves"][0]["rows"][0]["busbw"] == first.curves[0].rows[0].busbw
    assert len(data["curves"][0]["fit"]["residuals"]) == 3 and len(data["pairs"]["ways"]) == 12

    rows = list(csv.DictReader(io.StringIO((tmp_path / "comm.csv").read_text())))
    assert [(row["operation"], row["size_bytes"]) for row in rows[:3]] == [("all_to_all", s) for s in ("1024", "4096", "16384")]
    assert float(rows[0]["time_us"]) == pytest.approx(1e6 * first.curves[0].rows[0].time_s, rel=1e-4)
    assert {row["wrong"] for row in rows} == {"0"}

    page = (tmp_path / "comm.html").read_text()
    for section in first.sections():
        assert section.body is not None and f'id="{section.anchor}"' in page
    assert page.count("<svg") == 4 + 4 and "http://" not in page.replace("http://www.w3.org", "")


def test_a_model_that_begins_at_no_time_is_drawn_where_it_has_a_bandwidth() -> None:
    sizes = (1024, 4096, 16384)
    rows = tuple(
        Row("all_to_all", "world", 2, n, n // 4, "float32", 3, 1e-5, 1e-5, 1e-5, 1e-5, 0.0, n / 2, n / 2, 0) for n in sizes
    )
    fit = LinkFit("all_to_all", 2, LinkModel(0.0, 1e-9, 2048.0), tuple((n / 2, 1e-5) for n in sizes), 0.1, 0.2)
    xs, busbw = model_line(Curve("all_to_all", "world", 2, rows, fit, None, 0.0))
    # half of a size crosses the wire: up to 4096 the model takes no time at all
    assert 4096 < min(xs) < max(xs) == pytest.approx(16384)
    assert busbw[-1] == pytest.approx(0.5 * 16384 / ((16384 / 2 - 2048) * 1e-9) / 1e9)


@pytest.mark.ranks
def test_the_groups_of_a_layout(gloo_pool: GlooPool) -> None:
    first, *_ = gloo_pool.run(on_ranks, 4, {"ep": 2, "tp": 2, "ranks_per_node": 2}, {"pairs": False})
    assert first.groups["ep_etp=tp=inside"] == ((0, 1), (2, 3)) and "dp_shard=edp_shard" in first.groups
    measured = [(curve.scope, curve.operation) for curve in first.curves]
    together = ["all_to_all", "torch", "uneven", "all_gather", "reduce_scatter", "all_reduce", "send_recv"]
    assert measured[:7] == [("ep_etp=tp=inside", name) for name in together]
    assert measured[7:] == [("dp_shard=edp_shard", "all_gather"), ("dp_shard=edp_shard", "reduce_scatter")]
    assert first.pairs is None and "pairs of ranks were not measured" in first.verdict
    assert first.sections()[2].body is None and "--no-pairs" in page_html("x", "y", first.sections())
    assert any("no hierarchical exchange" in note for note in first.notes)

    only, *_ = gloo_pool.run(on_ranks, 4, {"ep": 2}, {"groups": ("ep_etp",), "operations": ("all_reduce",), "pairs": False})
    assert [(c.scope.split("=")[0], c.operation) for c in only.curves] == [("ep_etp", "all_reduce")]


@pytest.mark.ranks
def test_what_cannot_be_measured_is_refused_on_all_ranks(gloo_pool: GlooPool) -> None:
    for parallel, fields, says in (
        (None, {"groups": ("tp",)}, "--groups: names tp; groups of more than one rank are here: world, inside"),
        ({"ep": 2, "ranks_per_node": 3}, {}, "parallel.ranks_per_node: is 3"),
        ({"ep": 4}, {}, "parallel.ep: is 4, but must divide world = 2"),
        (None, {"operations": ("hierarchical",)}, "--ops: asks for hierarchical, which cannot be measured on these ranks"),
    ):
        assert all(says in text for text in gloo_pool.run(on_ranks, 2, parallel, fields)), says


def other_version(rank: int, world: int) -> str:
    comm.__version__ = f"1.{rank}"
    return str(on_ranks(rank, world, None, {}))


@pytest.mark.ranks
def test_ranks_with_different_versions_are_named() -> None:
    from helpers import run_ranks

    for text in run_ranks(other_version, 2):
        assert "version: differs between ranks (moefold 1.0 with torch" in text and "ranks [1]" in text


def in_the_sweep(act: Any) -> Any:
    """On rank 1, when the first operation has been measured."""

    def before(rank: int) -> None:
        from moefold.parallel import comm_sweep

        real, seen = comm_sweep._curve, []

        def curve(*args: Any) -> Any:
            seen.append(args)
            if rank == 1 and len(seen) == 2:
                act()
            return real(*args)

        comm_sweep._curve = curve

    return before


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("act", "says"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "a rank has gone while links were measured"),
        (lambda: time.sleep(6), "a collective did not complete within parallel.timeout_s"),
    ],
    ids=["dies", "hangs"],
)
def test_a_rank_that_is_lost_ends_all_with_the_code_of_communication_and_no_file(tmp_path: Path, act: Any, says: str) -> None:
    files = ["--json", str(tmp_path / "a.json"), "--csv", str(tmp_path / "a.csv"), "--html", str(tmp_path / "a.html")]
    words = ["profile", "comm", *WORDS, *files, "--parallel.timeout_s", "4"]
    ended = command_ranks(3, words, tmp_path, in_the_sweep(act))
    assert [ended[0].code, ended[2].code] == [5, 5], [e.err for e in ended]
    assert all(says in ended[rank].err and "Traceback" not in ended[rank].err for rank in (0, 2))
    assert not list(tmp_path.glob("a.*"))
