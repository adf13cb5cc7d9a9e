"""Pretraining from configuration to finished run directory: what a run leaves, computes and starts from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from jobs import (
    alone,
    command_ranks,
    complete_steps,
    last_attempt,
    losses,
    make_config,
    pretrain_ranks,
    settings,
    toml_file,
    write_corpus,
)
from moefold.launch.metrics import read_metrics
from moefold.launch.pretrain import pretrain
from moefold.launch.train import Trainer
from moefold.moe.errors import CheckpointError, DataError
from moefold.parallel.plan import Plan

pytestmark = pytest.mark.ranks

# --- what a run leaves ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with a completed run of one process, `run`, of 6 steps, with everything that a run can leave."""
    folder = tmp_path_factory.mktemp("finished")
    config = make_config(
        folder, train__steps=6, checkpoint__every=3, train__eval_every=2, train__sample_tokens=8, log__report=True, log__every=2
    )

    def train() -> None:
        result = pretrain(config)
        assert (result.exit_code, result.step, result.run_dir) == (0, 6, folder / "run")
        assert result.evaluation is not None
        assert not dist.is_initialized()

    alone(train)
    return folder


def test_a_python_call_trains_without_torchrun(finished: Path) -> None:
    assert last_attempt(finished / "run")["state"] == "completed"
    assert last_attempt(finished / "run")["world_size"] == 1
    assert complete_steps(finished / "run") == [3, 6]


def test_metrics_are_complete(finished: Path) -> None:
    lines = [json.loads(line) for line in (finished / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in lines if r["kind"] == "run"] == [0]
    assert [r["step"] for r in lines if r["kind"] == "step"] == [2, 4, 6]
    assert {r["step"] for r in lines if r["kind"] == "eval"} == {2, 4, 6}
    step = next(r for r in lines if r["kind"] == "step" and r["step"] == 6)
    wanted = {"train/loss", "train/grad_norm", "train/lr", "train/aux_loss", "perf/tokens_per_s", "moe/load_LE", "moe/entropy"}
    assert wanted <= set(step)
    assert step["train/tokens"] == 6 * 8 * 32
    assert np.shape(step["moe/load_LE"]) == (2, 4)
    metrics = read_metrics(finished / "run" / "metrics.jsonl")
    assert metrics.last("eval/loss") < metrics.column("eval/loss")[1][0]
    assert 0 < metrics.last("eval/bigram_bits_per_byte") < 8
    assert metrics.last("eval/bits_per_byte") == pytest.approx(metrics.last("eval/bits_per_byte/text"))


def test_sample_and_report_are_written(finished: Path) -> None:
    sample = (finished / "run" / "sample.txt").read_text()
    assert sample.partition("⟦…⟧")[0] in (finished / "text.txt").read_text()
    assert "<svg" in (finished / "run" / "report.html").read_text()


def test_a_completed_run_that_is_started_again_trains_and_writes_nothing_more(finished: Path) -> None:
    run = finished / "run"
    before = {p: p.stat().st_mtime_ns for p in run.glob("checkpoints/*/complete.json")}
    ended = command_ranks(1, ["pretrain", run / "config.toml"], finished)[0]
    assert ended.code == 0, ended.err
    assert "resuming from step 6" in ended.out
    assert {p: p.stat().st_mtime_ns for p in run.glob("checkpoints/*/complete.json")} == before
    assert list(losses(run)) == [2, 4, 6]


def test_evaluation_does_not_depend_on_the_layout(finished: Path, tmp_path: Path) -> None:
    source = {"type": "text", "path": str(finished / "text.txt"), "name": "text"}
    same = {"train__steps": 6, "data__sources": [source], "checkpoint__resume": str(finished / "run")}
    seen = [read_metrics(finished / "run" / "metrics.jsonl").last("eval/loss")]
    planned = {"parallel__ep": 2, "parallel__plan": "auto"}
    for world, layout in ((2, planned), (2, {"parallel__tp": 2}), (1, {"parallel__micro_batch": 2})):
        name = "-".join([str(world), *layout])
        assert pretrain_ranks(world, make_config(tmp_path, name, **same, **layout)) == [0] * world
        seen.append(read_metrics(tmp_path / name / "metrics.jsonl").last("eval/loss"))
    assert seen[1:] == pytest.approx([seen[0]] * 3, rel=1e-6)
    own = Plan.read(tmp_path / "-".join(["2", *planned]) / "plan.json")
    assert (own.fingerprint.world, own.fingerprint.ep, list(own.links)) == (2, 2, ["flat", "gradients"])


# --- precision and recompute ------------------------------------------------------------------------------------------


def test_bf16_trains_with_router_bias_and_master_weights_in_fp32(tmp_path: Path) -> None:
    def look(rank: int) -> None:
        real = Trainer.run

        def run(self: Trainer):  # type: ignore[no-untyped-def]
            model, seen = self.engine.model, []
            router = model.blocks[0].moe.router
            router.register_forward_hook(
                lambda m, args, out: seen.append((args[0].dtype, m.weight_ED.dtype, out.logits_TE.dtype))
            )
            result = real(self)
            assert set(seen) == {(torch.bfloat16, torch.float32, torch.float32)}
            assert router.expert_bias_E.dtype == torch.float32
            assert router.expert_bias_E.abs().max() > 0
            assert {p.local.dtype for p in self.engine.parameters} == {torch.float32}
            return result

        Trainer.run = run  # type: ignore[method-assign]

    same = {"train__steps": 12, "parallel__ep": 2, "model__moe__balance__expert_bias": True}
    assert pretrain_ranks(2, make_config(tmp_path, "bf16", train__precision="bf16", **same), look) == [0, 0]
    assert pretrain_ranks(2, make_config(tmp_path, "fp32", **same)) == [0, 0]
    low, full = losses(tmp_path / "bf16"), losses(tmp_path / "fp32")
    assert low[12] < low[1] - 1
    assert list(low.values()) == pytest.approx(list(full.values()), rel=0.02)
    assert low != full


def test_recompute_changes_no_bit_of_the_losses(tmp_path: Path) -> None:
    for name in ("none", "selective"):
        config = make_config(tmp_path, name, train__steps=5, parallel__ep=2, parallel__recompute=name)
        assert pretrain_ranks(2, config) == [0, 0]
    assert losses(tmp_path / "selective") == losses(tmp_path / "none")
    assert len(losses(tmp_path / "none")) == 5


def test_compression_follows_its_schedule_and_evaluation_is_exact_first(tmp_path: Path) -> None:
    compress = {"method": "lsh", "rate": 0.5, "warmup": 0.25, "anneal": 0.25, "in_eval": True, "error_tokens": 8, "hash_width": 4}
    two_levels = {"parallel__ep": 2, "parallel__ranks_per_node": 1, "parallel__pieces": 2}
    config = make_config(
        tmp_path,
        train__steps=8,
        train__eval_every=4,
        model__moe__dispatcher="hierarchical",
        **two_levels,
        **{f"model__moe__compress__{name}": value for name, value in compress.items()},
    )
    assert pretrain_ranks(2, config) == [0, 0]
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    steps, rates = metrics.column("moe/compress_rate")
    assert (steps, rates) == (list(range(1, 9)), [1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.75, 1.0])
    sent = dict(zip(*metrics.column("moe/rows_sent_frac"), strict=True))
    assert all((sent[step] == 1) == (rate == 1) for step, rate in zip(steps, rates, strict=True))
    assert all(sent[step] <= rate + 0.02 for step, rate in zip(steps, rates, strict=True))
    errors = dict(zip(*metrics.column("moe/compress_error"), strict=True))
    assert {step for step, error in errors.items() if error > 0} == {step for step in steps if sent[step] < 1}
    exact, compressed = (dict(zip(*metrics.column(key), strict=True)) for key in ("eval/loss", "eval/loss_compressed"))
    assert list(exact) == list(compressed) == [4, 8]
    assert all(exact[step] != compressed[step] for step in exact)
    # a run may go on with another rate
    settings = {**compress, "rate": 0.25, "anneal": 0.0}
    goes_on = make_config(
        tmp_path,
        train__steps=9,
        model__moe__dispatcher="hierarchical",
        **two_levels,
        **{f"model__moe__compress__{name}": value for name, value in settings.items()},
    )
    assert pretrain_ranks(2, goes_on) == [0, 0]
    rates = dict(zip(*read_metrics(tmp_path / "run" / "metrics.jsonl").column("moe/compress_rate"), strict=True))
    assert list(rates)[-1] == 9 and rates[9] == 0.25


# --- what a run starts from -----------------------------------------------------------------------------------------------


def test_init_from_takes_the_weights_alone(finished: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "other.txt", 30_000)
    source = {"type": "text", "path": str(tmp_path / "other.txt"), "name": "other"}
    file = toml_file(tmp_path, train__steps=2, data__sources=[source], train__global_batch=4, parallel__ep=2)
    ended = command_ranks(2, ["pretrain", file, "--checkpoint.init_from", finished / "run"], tmp_path)
    assert [e.code for e in ended] == [0, 0], ended
    assert "starting at step 0 with the weights of " in ended[0].out
    curve = losses(tmp_path / "run")
    assert list(curve) == [1, 2]
    assert curve[1] < losses(finished / "run")[4]
    metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert metrics.column("train/tokens")[1] == [4 * 32, 2 * 4 * 32]
    # its own checkpoint wins when it is started again
    ended = command_ranks(2, ["pretrain", file, "--checkpoint.init_from", finished / "run", "--train.steps", 3], tmp_path)
    assert "resuming from step 2" in ended[0].out
    assert "is ignored: a checkpoint to resume from wins" in ended[0].out


def test_resuming_from_another_directory_goes_on_there(finished: Path, tmp_path: Path) -> None:
    shutil.copy2(finished / "text.txt", tmp_path / "text.txt")
    start = finished / "run" / "checkpoints" / "step-00000003"
    same = {"train__steps": 6, "log__every": 2}
    assert pretrain_ranks(1, make_config(tmp_path, checkpoint__resume=str(start), **same)) == [0]
    assert complete_steps(tmp_path / "run") == [6]
    whole = losses(finished / "run")
    assert losses(tmp_path / "run") == {s: whole[s] for s in (4, 6)}


def test_a_dense_model_trains_and_resumes(tmp_path: Path) -> None:
    values = {k: v for k, v in settings(tmp_path, train__steps=3).items() if not k.startswith("model.moe.")}
    from moefold.launch.config import load

    for steps in (3, 4):
        config = load(overrides={**values, "model.dense_ffn_dim": 32, "train.steps": steps}).config
        assert pretrain_ranks(2, config) == [0, 0]
    assert list(losses(tmp_path / "run")) == [1, 2, 3, 4]


def test_an_error_of_the_function_is_the_named_one(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_bytes(b"\xff\xfe\x00" * 1000)

    def call() -> None:
        with pytest.raises(DataError):
            pretrain(make_config(tmp_path))
        with pytest.raises(CheckpointError):
            pretrain(make_config(tmp_path, "new", checkpoint__resume="must"))
        assert not dist.is_initialized()

    alone(call)
