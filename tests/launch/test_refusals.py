"""What pretraining refuses, with which exit code, and what it leaves then: before the run directory is made, and after."""

from __future__ import annotations

import shutil
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jobs import (
    command_ranks,
    complete_steps,
    last_attempt,
    losses,
    make_config,
    pretrain_ranks,
    run_command,
    toml_file,
    torchrun_command,
    write_corpus,
)
from moefold.launch.data.indexed import IndexedWriter
from moefold.launch.layout import check_topology
from moefold.launch.pretrain import changes, other_run
from moefold.launch.process import Rank
from moefold.launch.rundir import RunDir
from moefold.moe.errors import TopologyError

pytestmark = [pytest.mark.ranks, pytest.mark.alone]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a completed run of one process, `run`, of 6 steps."""
    folder = tmp_path_factory.mktemp("finished")
    assert pretrain_ranks(1, make_config(folder, train__steps=6, checkpoint__every=3)) == [0]
    return folder


# --- what is refused before there is a run directory ----------------------------------------------------------------------


def refuse(folder: Path, world: int, args: list[object], code: int) -> str:
    """Run `moefold pretrain`; it must end with `code` on all ranks, leave no run directory, and say why once: the text."""
    ended = command_ranks(world, ["pretrain", *args], folder)
    assert [e.code for e in ended] == [code] * world, ended
    assert not (folder / "run").exists()
    assert not (folder / "runs").exists()
    (text,) = [e.err for e in ended if e.err.strip()]
    assert "Traceback" not in text
    return text


def test_all_problems_of_a_configuration_are_told_at_once(tmp_path: Path) -> None:
    flags = ["--train.stepz", 3, "--model.moe.top_k", 9, "--model.moe.capacity_factor", 0, "--train.lr", -1]
    text = refuse(tmp_path, 2, [toml_file(tmp_path), *flags], 2)
    assert "train.stepz (flag --train.stepz): unknown key; did you mean 'steps'?" in text
    for setting in ("model.moe.top_k", "model.moe.capacity_factor", "train.lr"):
        assert f"{setting} (flag --{setting}): is" in text


def test_degrees_that_do_not_fit_are_told_at_once(tmp_path: Path) -> None:
    flags = ["--parallel.tp", 3, "--parallel.ep", 3, "--parallel.micro_batch", 3]
    text = refuse(tmp_path, 2, [toml_file(tmp_path), *flags], 2)
    assert text.startswith("topology error: ")
    for setting in ("parallel.tp", "parallel.ep"):
        assert f"{setting} (flag --{setting}): is 3" in text


def test_ranks_that_nobody_started_are_a_topology_error_that_names_torchrun(tmp_path: Path) -> None:
    text = refuse(tmp_path, 1, [toml_file(tmp_path), "--parallel.dp", 4], 2)
    assert "parallel.dp" in text
    assert "use `torchrun --nproc-per-node N -m moefold.launch.pretrain" in text


def test_torchrun_is_not_named_where_it_would_not_help(tmp_path: Path) -> None:
    config = make_config(tmp_path, parallel__micro_batch=3)
    with pytest.raises(TopologyError, match="micro_batch") as caught:
        check_topology(config, Rank(0, 1, 0, 1, False))
    assert "torchrun" not in str(caught.value)


def test_all_problems_of_the_data_are_told_at_once(tmp_path: Path) -> None:
    write_corpus(tmp_path / "good.txt", 1000)
    (tmp_path / "empty.txt").write_text("")
    with IndexedWriter(tmp_path / "cut", np.uint16) as writer:
        writer.append(np.arange(100, dtype=np.int32))
        writer.end_document()
    (tmp_path / "cut.idx").write_bytes((tmp_path / "cut.idx").read_bytes()[:20])
    sources = [{"type": "text", "path": str(tmp_path / n)} for n in ("good.txt", "nowhere.txt", "empty.txt")]
    sources.append({"type": "indexed", "path": str(tmp_path / "cut")})
    file = toml_file(tmp_path, data__sources=sources, data__tokenizer=str(tmp_path / "no-tokenizer.json"))
    text = refuse(tmp_path, 2, [file], 3)
    assert text.startswith("data error: 4 problems")
    for word in ("nowhere.txt': there is no such file", "empty.txt': 1 file, all empty", "cut.idx", "no-tokenizer.json"):
        assert word in text


@pytest.mark.parametrize("setting", ["resume", "init_from"])
def test_a_path_without_a_checkpoint(tmp_path: Path, setting: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"weights")
    text = refuse(tmp_path, 2, [toml_file(tmp_path), f"--checkpoint.{setting}", tmp_path / "model"], 3)
    assert f"checkpoint.{setting} = '{tmp_path / 'model'}': no complete checkpoint there" in text


def test_resume_must_without_anything_to_resume(tmp_path: Path) -> None:
    text = refuse(tmp_path, 2, [toml_file(tmp_path), "--checkpoint.resume", "must"], 3)
    assert "has no complete checkpoint (checkpoint.resume = 'must')" in text


def test_torchrun_says_once_what_is_wrong(tmp_path: Path) -> None:
    ended = run_command(torchrun_command(2, toml_file(tmp_path), "--parallel.ep", "3"), tmp_path)
    assert ended.code == 1  # torchrun's own, whatever the workers' is
    assert ended.err.count("parallel.ep (flag --parallel.ep): is 3") == 1
    assert "exitcode  : 2 " in ended.err
    assert not (tmp_path / "run").exists()


# --- what is refused later: status.json says so ---------------------------------------------------------------------------


def fails(folder: Path, args: list[object], code: int = 3, run: str = "run") -> str:
    """Run on two ranks; both end with `code`, status.json says failed, and the message is told once. Returns the message."""
    ended = command_ranks(2, ["pretrain", *args], folder)
    assert [e.code for e in ended] == [code, code], ended
    attempt = last_attempt(folder / run)
    assert (attempt["state"], attempt["exit_code"]) == ("failed", code)
    assert sum(e.err.count("run failed") for e in ended) == 1
    assert not any("Traceback" in e.err for e in ended)
    return attempt["error"]


def test_binary_data(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(bytes(range(256)) * 100)
    assert "text.txt" in fails(tmp_path, [toml_file(tmp_path)])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_less_text_than_one_batch(tmp_path: Path) -> None:
    write_corpus(tmp_path / "text.txt", 200)
    assert "one global batch needs train.global_batch = 8" in fails(tmp_path, [toml_file(tmp_path)])


def test_a_vocabulary_too_small_for_the_tokenizer(tmp_path: Path) -> None:
    error = fails(tmp_path, [toml_file(tmp_path, model__vocab_size=256)])
    assert "holds token id 256, but model.vocab_size = 256; set model.vocab_size to 257 or more" in error


def test_a_failed_start_does_not_keep_the_directory_from_being_used(tmp_path: Path) -> None:
    file = toml_file(tmp_path, train__steps=2)
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\x00" * 1000)
    fails(tmp_path, [file])
    write_corpus(tmp_path / "text.txt")
    assert [e.code for e in command_ranks(2, ["pretrain", file], tmp_path)] == [0, 0]
    assert [a["state"] for a in RunDir.open(tmp_path / "run").status()["attempts"]] == ["failed", "completed"]


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the finished run with its text, to be resumed."""
    shutil.copytree(finished / "run", tmp_path / "run")
    shutil.copy2(finished / "text.txt", tmp_path / "text.txt")
    yield tmp_path


def test_a_truncated_checkpoint_at_the_path_to_resume_from(again: Path) -> None:
    path = again / "run" / "checkpoints" / "step-00000003"
    file = next(path.glob("*.distcp"))
    file.write_bytes(file.read_bytes()[:-5])
    error = fails(again, [toml_file(again, "other"), "--checkpoint.resume", path], run="other")
    assert f"{path} cannot be used: " in error
    assert "truncated" in error
    assert complete_steps(again / "other") == []


def test_resuming_with_a_model_of_another_shape(again: Path) -> None:
    error = fails(again, [toml_file(again, train__steps=9), "--model.dim", 32])
    assert "it holds another model: embed.weight_VD is [264, 16] there and [264, 32] here" in error
    assert complete_steps(again / "run") == [3, 6]


def test_resuming_with_a_model_of_the_same_shape_that_computes_something_else(again: Path) -> None:
    error = fails(again, [toml_file(again, train__steps=9), "--model.moe.top_k", 1, "--model.moe.router.renormalize", "false"])
    assert "model.moe.top_k: 2 in the checkpoint, 1 here" in error
    assert "model.moe.router.renormalize: True in the checkpoint, False here" in error


def test_resuming_on_other_data(again: Path) -> None:
    error = fails(again, [toml_file(again, train__steps=9), "--train.global_batch", 4, "--data.seed", 3])
    assert "data.global_batch: 8 in the checkpoint, 4 here" in error
    assert "data.seed: 0 in the checkpoint, 3 here" in error
    assert "or start a new run with checkpoint.init_from" in error


def test_how_a_model_is_trained_may_change_at_a_resume_and_is_told(again: Path) -> None:
    flags = ["--model.moe.balance.aux_loss_coeff", 0.1, "--checkpoint.resume", "must", "--train.steps", 7]
    ended = command_ranks(1, ["pretrain", toml_file(again), *flags], again)[0]
    assert ended.code == 0, ended.err
    assert "changed: model.moe.balance.aux_loss_coeff: 0.01 in the checkpoint, 0.1 here" in ended.out
    assert "changed: train.steps: 6 before, 7 now" in ended.out
    assert 7 in losses(again / "run")
    # the directory says what each attempt ran with
    own = [tomllib.loads((again / "run" / name).read_text()) for name in ("logs/attempt-00/config.toml", "config.toml")]
    assert [c["train"]["steps"] for c in own] == [6, 7]


def test_a_directory_that_a_living_process_uses(again: Path) -> None:
    before = (again / "run" / "status.json").read_bytes()
    with RunDir.open(again / "run"):
        ended = command_ranks(2, ["pretrain", toml_file(again)], again)
    assert [e.code for e in ended] == [3, 3]
    (text,) = [e.err for e in ended if e.err.strip()]
    assert "is in use by process " in text
    assert (again / "run" / "status.json").read_bytes() == before


def test_never_resume_refuses_a_used_directory_and_leaves_it_as_it_is(again: Path) -> None:
    before = (again / "run" / "status.json").read_bytes()
    ended = command_ranks(1, ["pretrain", toml_file(again), "--checkpoint.resume", "never"], again)[0]
    assert ended.code == 3
    assert "is not empty (checkpoint.resume = 'never')" in ended.err
    assert (again / "run" / "status.json").read_bytes() == before


def test_a_directory_of_somebody_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("draft")
    ended = command_ranks(2, ["pretrain", toml_file(tmp_path)], tmp_path)
    assert [e.code for e in ended] == [3, 3]
    assert sum("is not empty and not a run directory" in e.err for e in ended) == 1
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_a_crash_of_rank_0_before_the_run_starts_ends_the_others_at_once(tmp_path: Path) -> None:
    def no_space(rank: int) -> None:
        def create(*args: object, **kwargs: object) -> None:
            raise OSError(28, "No space left on device")

        RunDir.create = create  # type: ignore[assignment,method-assign]

    start_s = time.monotonic()
    ended = command_ranks(2, ["pretrain", toml_file(tmp_path)], tmp_path, no_space)
    assert time.monotonic() - start_s < 20
    assert [e.code for e in ended] == [1, 1]
    assert "No space left on device" in ended[0].err


# --- differences ----------------------------------------------------------------------------------------------------------


def test_changes_name_every_value_that_differs() -> None:
    assert changes("m", {"a": 1, "b": {"c": 2}}, {"a": 1, "b": {"c": 3}, "d": 4}) == [
        "m.b.c: 2 in the checkpoint, 3 here",
        "m.d: None in the checkpoint, 4 here",
    ]


def test_only_what_changes_the_model_or_the_order_of_samples_stops_a_resume() -> None:
    def run(**model: object) -> dict[str, object]:
        return {"model": {"num_heads": 2, "max_seq_len": 32, "moe": {"balance": {"carry": 1.0}}} | model, "data": {"seed": 0}}

    assert other_run(run(), run()) is None
    assert other_run(run(), run(max_seq_len=64, moe={"balance": {"carry": 0.0}})) is None
    assert "model.num_heads: 2 in the checkpoint, 4 here" in str(other_run(run(), run(num_heads=4)))
    # settings that a checkpoint of an older version does not name are those that change nothing
    assert other_run(run(), run(attention_bias="none", sliding_window=None)) is None
    assert "model.attention_bias: none in the checkpoint, qkv here" in str(other_run(run(), run(attention_bias="qkv")))
    assert "data.seed: 0 in the checkpoint, 1 here" in str(other_run(run(), {**run(), "data": {"seed": 1}}))
