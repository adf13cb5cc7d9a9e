"""Pretraining: from a configuration to a finished run directory. `moefold pretrain` and `torchrun -m moefold.launch.pretrain`."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..kernels.moe_mlp import choose_backend
from ..moe.errors import CheckpointError, MoefoldError, Problem, TopologyError
from ..parallel.apply import compute_dtype
from ..parallel.engine import Engine, OptimizerSettings
from ..parallel.mesh import Mesh, build_mesh
from ..parallel.topology import Topology
from .checkpoint import Checkpointer
from .config import Loaded, check_world, dump
from .data.bigram import baseline
from .data.loader import Data, open_data
from .evaluate import Evaluation, sample_text
from .metrics import Sinks
from .process import Rank, StopRequest, as_named, choose_device, joined, record_failure
from .resume import Decision, decide_resume
from .rundir import RunDir, write_atomic
from .settings import RunConfig
from .train import Trainer


@dataclass(frozen=True)
class RunResult:
    """How a run ended. exit_code: 0 completed, 75 stopped on request after saving, 130 interrupted after saving."""

    run_dir: Path
    exit_code: int
    step: int
    evaluation: Evaluation | None


def check_topology(config: RunConfig, here: Rank, origins: Mapping[str, str] | None = None) -> Topology:
    """The layout of this world. Raises TopologyError with every problem, and how to start more ranks if this is one alone."""
    try:
        return check_world(Loaded(config, origins or {}), here.world)
    except TopologyError as error:
        if here.launched:
            raise
        hint = "is 1: this process was not started by torchrun; use `torchrun --nproc-per-node N -m moefold.launch.pretrain ...`"
        raise TopologyError([*error.problems, Problem("world", hint)]) from error


def pretrain(config: RunConfig, *, origins: Mapping[str, str] | None = None) -> RunResult:
    """Train a model as `config` says; every rank calls it. Under torchrun it joins the other ranks, else it runs alone.

    Args:
        origins: where each setting came from (of `launch.config.load`), kept in origin.json.

    Raises:
        MoefoldError: the same on every rank where the cause is common; see moe/errors.py. What ended the run is also in status.json.
    """
    here = Rank.here()
    topology = check_topology(config, here, origins)
    device = choose_device(config.train.device, here.local_rank)
    with joined(here, device, timeout_s=config.parallel.timeout_s, threads=config.train.threads), StopRequest() as stop:
        run, decision = _open_run(config, here, origins)
        try:
            result = _train(config, topology, device, here, run, decision, stop)
        except BaseException as error:
            named = as_named(error)
            _tell_failure(run, here, named)
            if named is error:
                raise
            raise named from error
        if here.rank == 0:
            state = "completed" if result.exit_code == 0 else "interrupted" if result.exit_code == 130 else "preempted"
            run.finish_attempt(state)
            _finish_report(config, run)
            run.unlock()
        dist.barrier()
        return result


def _tell_failure(run: RunDir, here: Rank, error: BaseException) -> None:
    """Have the first cause of all ranks in status.json, and say it once."""
    code, message = record_failure(run, here, error)
    if here.rank == 0:
        print(f"run failed (exit code {code}): {message}\nlogs: {run.logs()}", file=sys.stderr, flush=True)
        run.unlock()


def _share(value: object) -> Any:
    """Rank 0's value on every rank."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def _open_run(config: RunConfig, here: Rank, origins: Mapping[str, str] | None) -> tuple[RunDir, Decision]:
    """Rank 0 makes or opens, and locks, the run directory and decides what to start from; all ranks get its answer or its error."""
    outcome: Any = None
    run: RunDir | None = None
    if here.rank == 0:
        chosen = {path: origin for path, origin in (origins or {}).items() if origin != "default"}
        try:
            run = RunDir.open_or_create(config.run, dump(config), extra={"settings_from": chosen})
            run.lock()
            own = run.latest_checkpoint()
            decision = decide_resume(config.checkpoint.resume, own, run.used, config.checkpoint.init_from, run_dir=str(run.path))
            run.start_attempt(here.world)
            outcome = (str(run.path), decision)
        except MoefoldError as error:
            outcome = error
    outcome = _share(outcome)
    if isinstance(outcome, MoefoldError):
        if run is not None:
            run.unlock()
        raise outcome
    path, decision = outcome
    return run or RunDir(path), decision


def _train(
    config: RunConfig, topology: Topology, device: torch.device, here: Rank, run: RunDir, decision: Decision, stop: StopRequest
) -> RunResult:
    say = _Console(here.rank == 0)
    say(f"run: {run.path}\n{decision.message}\n{topology}")
    data = open_data(
        config.data,
        vocab_size=config.model.vocab_size,
        global_batch=config.train.global_batch,
        cache_dir=run.path / "data",
        eval_batches=config.train.eval_batches,
        is_writer=here.rank == 0,
        share=_share,
        progress=say,
    )
    mesh = build_mesh(topology, device, config.parallel.timeout_s)
    engine = _build_engine(config, mesh, len(data.domains))
    checkpointer = Checkpointer(run.checkpoints, keep=config.checkpoint.keep, background=config.checkpoint.async_save)
    meta = {"model": dataclasses.asdict(config.model), "data": _data_identity(config, data), "layout": topology.to_dict()}
    tokens = _restore(engine, checkpointer, decision, meta, say)
    _first_screen(config, engine, data, say)
    sinks = Sinks(
        run.metrics,
        total_steps=config.train.total_steps(config.data.seq_len),
        rank=here.rank,
        attempt=run.attempt,
        start_step=engine.step,
        tensorboard_dir=run.tensorboard if config.log.tensorboard else None,
        device="gpu" if device.type == "cuda" else "rank",
    )
    trainer = Trainer(config, engine, data, checkpointer, sinks, stop, meta, tokens)
    try:
        evaluation = trainer.run()
        done = engine.step >= config.train.total_steps(config.data.seq_len)
        if done and evaluation is not None:
            _compare_with_bigram(data, evaluation, engine.step, sinks, here, say)
        if done and config.train.sample_tokens:
            text = sample_text(
                engine, data, length=config.train.sample_tokens, seq_len=config.data.seq_len, seed=config.train.seed
            )
            if here.rank == 0:
                write_atomic(run.path / "sample.txt", text)
            say(f"sample:\n{text}")
    finally:
        sinks.close()
    checkpointer.wait()
    say(f"checkpoint: {run.latest_checkpoint()}")
    code = 0 if done else int(_share(stop.exit_code if stop.signal is not None else 75))
    return RunResult(run.path, code, engine.step, evaluation)


def _build_engine(config: RunConfig, mesh: Mesh, num_domains: int) -> Engine:
    o = config.train.optimizer
    return Engine(
        config.model,
        mesh,
        seed=config.train.seed,
        precision=config.train.precision,
        recompute=config.parallel.recompute,
        optimizer=OptimizerSettings((o.beta1, o.beta2), o.eps, o.weight_decay, config.train.grad_clip, o.implementation),
        num_domains=num_domains,
    )


def _data_identity(config: RunConfig, data: Data) -> dict[str, Any]:
    """What the order of the samples depends on; a resumed run with another one would repeat or skip text."""
    return {
        "sources": [[s.name, s.weight, len(s.tokens)] for s in data.train.sources],
        "tokenizer": data.tokenizer.fingerprint,
        "seq_len": config.data.seq_len,
        "global_batch": config.train.global_batch,
        "seed": config.data.seed,
        "document_mask": config.data.document_mask,
    }


def _restore(engine: Engine, checkpointer: Checkpointer, decision: Decision, meta: Mapping[str, Any], say: _Console) -> int:
    """Load what the decision says; returns the tokens trained so far. Raises CheckpointError where the data is another one."""
    if decision.kind == "fresh":
        return 0
    assert decision.path is not None
    restored = checkpointer.load(decision.path, engine, weights_only=decision.kind == "init")
    if decision.kind == "init":
        return 0
    changed = [
        f"data.{key}: {restored.meta['data'].get(key)} there, {value} here"
        for key, value in meta["data"].items()
        if restored.meta["data"].get(key) != value
    ]
    if changed:
        raise CheckpointError(
            f"{decision.path} was trained on other data, so its position means nothing here:\n  "
            + "\n  ".join(changed)
            + "\nuse the same [data] and train.global_batch, or start a new run with checkpoint.init_from"
        )
    if restored.meta["layout"] != meta["layout"]:
        say(f"layout of the checkpoint: {restored.meta['layout']}")
    return int(restored.meta["tokens"])


def _first_screen(config: RunConfig, engine: Engine, data: Data, say: _Console) -> None:
    m, t = config.model, config.train
    example = torch.empty(0, dtype=compute_dtype(t.precision), device=engine.mesh.device)
    text = ", ".join(f"{s.name} {len(s.tokens) / 1e6:.1f}M tokens (weight {s.weight:g})" for s in data.train.sources)
    total = t.total_steps(config.data.seq_len)
    say(f"model: {m.num_params / 1e6:.2f}M parameters, {m.num_active_params / 1e6:.2f}M active; precision {t.precision}")
    say(f"experts: back end '{choose_backend(example)}' for {example.dtype} on {example.device.type}")
    say(f"data: {text}; tokenizer {data.tokenizer.name}")
    say(f"steps: {engine.step} of {total} done, {t.global_batch * config.data.seq_len} tokens each")
    if m.moe is not None and m.moe.balance.aux_loss_coeff == 0 and not m.moe.balance.expert_bias:
        say("warning: nothing balances the experts (aux_loss_coeff = 0 and expert_bias = false)")


def _compare_with_bigram(data: Data, evaluation: Evaluation, step: int, sinks: Sinks, here: Rank, say: _Console) -> None:
    if here.rank != 0:
        return
    bigram = baseline(data)
    sinks.write("eval", step, {**evaluation.metrics(), "eval/bigram_bits_per_byte": bigram.bits_per_byte})
    rows = [("all", evaluation.bits_per_byte, bigram.bits_per_byte)]
    rows += [(name, bits, bigram.by_domain.get(name, float("nan"))) for name, bits in evaluation.by_domain.items()]
    for name, ours, theirs in rows:
        say(f"held-out {name:12} {ours:.4f} bits per byte; a bigram byte model of the same training text {theirs:.4f}")


def _finish_report(config: RunConfig, run: RunDir) -> None:
    if not config.log.report:
        return
    from .report import report

    try:
        print(f"report: {report(run.path).path}", flush=True)
    except Exception as error:
        # the run is complete without its report; it can be made again at any time
        print(f"report could not be written ({error}); try `moefold report {run.path}`", file=sys.stderr, flush=True)


class _Console:
    """Prints on rank 0 only."""

    def __init__(self, on: bool):
        self.on, self.start_s = on, time.monotonic()

    def __call__(self, text: str) -> None:
        if self.on:
            print(text, flush=True)


def main() -> int:
    """`torchrun --nproc-per-node N -m moefold.launch.pretrain CONFIG.toml ...`: the verb `pretrain` with the same arguments."""
    from .cli import main as command

    return command(["pretrain", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
