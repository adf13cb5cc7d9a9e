"""Pretraining: from a configuration to a finished run directory. `moefold pretrain` and `torchrun -m moefold.launch.pretrain`."""

from __future__ import annotations

import dataclasses
import os
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..moe.config import CompressConfig, with_defaults
from ..moe.errors import CheckpointError, DataError, MoefoldError, NumericsError
from ..parallel.apply import LayerPieces, compute_dtype
from ..parallel.engine import Engine, OptimizerSettings
from ..parallel.gradient_windows import Windows
from ..parallel.mesh import Mesh, build_mesh, nodes_for
from ..parallel.recorder import CommRecorder
from ..parallel.topology import Topology
from .checkpoint import Checkpointer
from .comm import watch_stalls
from .config import dump
from .data.bigram import baseline
from .data.documents import Problems, label, list_files
from .data.indexed import IndexedTokens, stem
from .data.loader import Data, open_data
from .data.tokenizer import load_tokenizer
from .evaluate import Evaluation, sample_text
from .instruments import open_instruments
from .kernel_check import check_backend, describe_kernels
from .layout import check_topology
from .metrics import Sinks
from .plan_run import open_comm, plan_for_run
from .process import Crew, PeerFailedError, Rank, StopRequest, as_named, choose_device, is_secondary, joined, record_failure
from .resume import Decision, decide_resume
from .rundir import RunDir, state_of, write_atomic
from .settings import DataConfig, RunConfig
from .train import Trainer

COMPRESS_MAY_CHANGE = tuple(f.name for f in dataclasses.fields(CompressConfig) if f.name not in ("method", "compensation"))
"""What may be compressed otherwise; these two decide which weights there are."""
MAY_CHANGE = (
    "model.moe.balance.",
    "model.moe.capacity_factor:",
    "model.moe.drop_policy:",
    "model.moe.dispatcher:",
    "model.moe.kernels:",
    *(f"model.moe.compress.{name}:" for name in COMPRESS_MAY_CHANGE),
    "model.init_std:",
    "model.max_seq_len:",
)
"""Settings of the model that a resumed run may have other values of: how it is trained, not what it computes."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended. exit_code: 0 completed, 75 stopped on request after saving, 130 interrupted after saving."""

    run_dir: Path
    exit_code: int
    step: int
    evaluation: Evaluation | None


def pretrain(config: RunConfig, *, origins: Mapping[str, str] | None = None) -> RunResult:
    """Train a model as `config` says; every rank calls it. Under torchrun it joins the other ranks, else it runs alone.

    Args:
        origins: where each setting came from (of `launch.config.load`), kept in origin.json.

    Raises:
        MoefoldError: the same on every rank where the cause is common; see moe/errors.py. status.json says what ended the run.
        PeerFailedError: another rank ended the run.
    """
    here = Rank.here()
    topology = check_topology(config, here, origins=origins)
    device = choose_device(config.train.device, here)
    if config.model.moe is not None:
        check_backend(config.model.moe, device)
    joining = joined(here, device, timeout_s=config.parallel.timeout_s, threads=config.train.threads)
    with joining as store, StopRequest() as stop:
        crew = Crew(store)
        run, decision = _open_run(config, crew, origins)
        try:
            result = _train(config, topology, device, crew, run, decision, stop)
            if crew.rank == 0:
                run.finish_attempt(state_of(result.exit_code))
                _finish_report(config, run)
            crew.wait()
            return result
        except BaseException as error:
            ends_with = _recorded(run, crew, as_named(error))
            if ends_with is error:
                raise
            raise ends_with from error
        finally:
            run.unlock()


def _recorded(run: RunDir, crew: Crew, error: BaseException) -> BaseException:
    """Have the first cause of all ranks in status.json, say it once, and return the error that this rank ends with."""
    failure = record_failure(run, crew, error)
    if failure.recorded_here:
        text = f"run failed (exit code {failure.exit_code}): {failure.message}\nlogs: {run.logs()}"
        print(text, file=sys.stderr, flush=True)
    if is_secondary(error):
        error = PeerFailedError(failure.message, failure.exit_code)
    if isinstance(error, MoefoldError):
        error.told = True
    return error


def _open_run(config: RunConfig, crew: Crew, origins: Mapping[str, str] | None) -> tuple[RunDir, Decision]:
    """Rank 0 makes or opens, and locks, the run directory and decides what to start from; all ranks get its answer or its error.

    What can be checked without a directory is checked first, so that a run that cannot start leaves none.
    """
    opened: list[RunDir] = []

    def open_first() -> tuple[str, Decision]:
        check_sources(config.data)
        c, section = config.checkpoint, config.run
        exists = section.dir is not None and (Path(section.dir) / "status.json").is_file()
        if not exists:
            decision = decide_resume(c.resume, None, False, c.init_from, run_dir=section.dir or "the new run directory")
        text = dump(config)
        chosen = {path: origin for path, origin in (origins or {}).items() if origin != "default"}
        run = RunDir.open_or_create(section, text, extra={"settings_from": chosen})
        run.lock()
        opened.append(run)
        if exists:
            decision = decide_resume(c.resume, run.latest_checkpoint(), run.used, c.init_from, run_dir=str(run.path))
        run.start_attempt(crew.world)
        _renew_config(run, text)
        return str(run.path), decision

    try:
        path, decision = crew.from_first(open_first)
    except BaseException:
        for run in opened:
            run.unlock()
        raise
    return opened[0] if opened else RunDir(path), decision


def _renew_config(run: RunDir, text: str) -> None:
    """Rank 0: have config.toml say what the newest attempt runs with, keep each one with its logs, and tell the changes."""
    for line in changes("", tomllib.loads(run.config.read_text()), tomllib.loads(text), ("before", "now")):
        print(f"changed: {line}", flush=True)
    for path in (run.logs() / "config.toml", run.config):
        write_atomic(path, text)


def check_sources(config: DataConfig) -> None:
    """Raise DataError with everything that is wrong with the paths of the data, before anything is read or written."""
    problems = Problems()
    try:
        load_tokenizer(config.tokenizer)
    except DataError as error:
        problems.add("data.tokenizer", str(error))
    for source in config.sources:
        try:
            if source.type != "indexed":
                list_files(source, problems)
            elif source.path is not None:
                IndexedTokens(stem(os.path.expanduser(source.path)))
        except DataError as error:
            problems.add(label(source), str(error))
        except OSError as error:
            problems.add(label(source), f"{error.filename or source.path}: {error.strerror or error}")
    problems.raise_if()


def _train(
    config: RunConfig, topology: Topology, device: torch.device, crew: Crew, run: RunDir, decision: Decision, stop: StopRequest
) -> RunResult:
    say = _Console(crew.rank == 0)
    say(f"run: {run.path}\n{decision.message}\n{topology}")
    data = open_data(
        config.data,
        vocab_size=config.model.vocab_size,
        global_batch=config.train.global_batch,
        cache_dir=run.path / "data",
        eval_batches=config.train.eval_batches,
        is_writer=crew.rank == 0,
        share=crew.share,
        progress=say,
    )
    nodes = nodes_for(config.model, config.parallel.ranks_per_node)
    mesh = build_mesh(topology, device, config.parallel.timeout_s, nodes)
    recorder = CommRecorder(crew.rank, device) if config.log.comm and crew.world > 1 else None
    plan = plan_for_run(config, mesh, crew, run.path, say)
    engine = build_engine(config, mesh, len(data.domains), recorder, plan.pieces, plan.windows)
    checkpointer = Checkpointer(run.checkpoints, keep=config.checkpoint.keep, background=config.checkpoint.async_save)
    meta = {"model": dataclasses.asdict(config.model), "data": _data_identity(config, data), "layout": topology.to_dict()}
    tokens = _restore(engine, checkpointer, decision, meta, say)
    _first_screen(config, engine, data, say)
    sinks = Sinks(
        run.metrics,
        total_steps=config.train.total_steps(config.data.seq_len),
        rank=crew.rank,
        attempt=run.attempt,
        start_step=engine.step,
        tensorboard_dir=run.tensorboard if config.log.tensorboard else None,
        device="gpu" if device.type == "cuda" else "rank",
    )
    instruments = open_instruments(config.log, open_comm(recorder, crew, run.path / "comm.json", plan), crew, run, device)
    trainer = Trainer(config, engine, data, checkpointer, sinks, stop, meta, tokens, instruments)
    try:
        with watch_stalls(recorder, crew, config.parallel.timeout_s), instruments:
            evaluation = trainer.run()
        done = engine.step >= config.train.total_steps(config.data.seq_len)
        if done:
            _finish(config, engine, data, run, evaluation, sinks, crew, say)
        checkpointer.wait()
    except BaseException as error:
        _end_save(checkpointer, error)
        raise
    finally:
        sinks.close()
    say(f"checkpoint: {run.latest_checkpoint()}")
    code = 0 if done else int(crew.share(stop.exit_code if stop.signal is not None else 75))
    return RunResult(run.path, code, engine.step, evaluation)


def _end_save(checkpointer: Checkpointer, error: BaseException) -> None:
    """Let a save under way complete after a failure: it holds good state. Without its peers it cannot, so not for ever."""
    common = isinstance(error, NumericsError)
    try:
        checkpointer.wait(None if common else 0.0 if is_secondary(error) else 20.0)
    except CheckpointError as late:
        error.add_note(str(late))


def _finish(
    config: RunConfig,
    engine: Engine,
    data: Data,
    run: RunDir,
    evaluation: Evaluation | None,
    sinks: Sinks,
    crew: Crew,
    say: _Console,
) -> None:
    """After the last step: a sample of text, and the bigram model that the held-out loss is compared with."""
    length, seq_len = config.train.sample_tokens, config.data.seq_len
    if length:
        text = sample_text(engine, data, length=length, seq_len=seq_len, seed=config.train.seed)
        if crew.rank == 0:
            write_atomic(run.path / "sample.txt", text)
        say(f"sample:\n{text}")
    # last, because rank 0 may be at it for longer than a collective may take
    if evaluation is not None:
        _compare_with_bigram(data, evaluation, engine.step, sinks, crew, say)


def build_engine(
    config: RunConfig,
    mesh: Mesh,
    num_domains: int,
    recorder: CommRecorder | None = None,
    pieces: LayerPieces = 1,
    windows: Windows = False,
) -> Engine:
    """The model, its optimizer and its balance state as `config` wants them, spread over `mesh`. Collective."""
    o = config.train.optimizer
    return Engine(
        config.model,
        mesh,
        seed=config.train.seed,
        precision=config.train.precision,
        recompute=config.parallel.recompute,
        optimizer=OptimizerSettings((o.beta1, o.beta2), o.eps, o.weight_decay, config.train.grad_clip, o.implementation),
        num_domains=num_domains,
        pieces=pieces,
        recorder=recorder,
        gradient_windows=windows,
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
    """Load what the decision says; returns the tokens trained so far. Raises CheckpointError, with nothing loaded, where
    a resumed run would go on with another model or other data."""
    if decision.kind == "fresh":
        return 0
    assert decision.path is not None
    if decision.kind == "init":
        restored = checkpointer.load(decision.path, engine, weights_only=True)
        for line in changes("model", with_defaults(restored.meta["model"]), meta["model"]):
            say(f"note: {line}")
        return 0
    restored = checkpointer.load(decision.path, engine, accept=lambda theirs: other_run(theirs, meta))
    for line in changes("model", with_defaults(restored.meta["model"]), meta["model"]) + changes(
        "layout", restored.meta["layout"], meta["layout"]
    ):
        say(f"changed: {line}")
    return int(restored.meta["tokens"])


def changes(where: str, theirs: Any, ours: Any, words: tuple[str, str] = ("in the checkpoint", "here")) -> list[str]:
    """How two nested tables differ, one line for each value; `words` say where the values are."""
    if not isinstance(theirs, Mapping) or not isinstance(ours, Mapping):
        return [] if theirs == ours else [f"{where}: {theirs} {words[0]}, {ours} {words[1]}"]
    keys = [*theirs, *(key for key in ours if key not in theirs)]
    return [line for key in keys for line in changes(f"{where}.{key}".lstrip("."), theirs.get(key), ours.get(key), words)]


def other_run(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str | None:
    """Why a run must not go on from a checkpoint: what its model computes, or the order of samples, would change at its step."""
    before, now = (with_defaults(side["model"]) for side in (theirs, ours))  # an older version wrote fewer settings
    model = [line for line in changes("model", before, now) if not line.startswith(MAY_CHANGE)]
    data = changes("data", theirs["data"], ours["data"])
    reasons = []
    if model:
        reasons.append("it was trained as another model:\n  " + "\n  ".join(model))
    if data:
        reasons.append("it was trained on other data, so its position means nothing here:\n  " + "\n  ".join(data))
    if not reasons:
        return None
    way_out = "use the same [model], [data] and train.global_batch, or start a new run with checkpoint.init_from"
    return "\n".join([*reasons, way_out])


def _first_screen(config: RunConfig, engine: Engine, data: Data, say: _Console) -> None:
    m, t = config.model, config.train
    text = ", ".join(f"{s.name} {len(s.tokens) / 1e6:.1f}M tokens (weight {s.weight:g})" for s in data.train.sources)
    total = t.total_steps(config.data.seq_len)
    say(f"model: {m.num_params / 1e6:.2f}M parameters, {m.num_active_params / 1e6:.2f}M active; precision {t.precision}")
    if m.moe is not None:
        kind = {"gated": m.ffn_gate, "biased": m.ffn_bias}
        say(describe_kernels(m.moe, engine.mesh.device, compute_dtype(t.precision), m.activation, **kind))
    say(f"data: {text}; tokenizer {data.tokenizer.name}")
    say(f"steps: {engine.step} of {total} done, {t.global_batch * config.data.seq_len} tokens each")
    if m.moe is not None and m.moe.balance.aux_loss_coeff == 0 and not m.moe.balance.expert_bias:
        say("warning: nothing balances the experts (aux_loss_coeff = 0 and expert_bias = false)")


def _compare_with_bigram(data: Data, evaluation: Evaluation, step: int, sinks: Sinks, crew: Crew, say: _Console) -> None:
    if crew.rank != 0:
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
        self.on = on

    def __call__(self, text: str) -> None:
        if self.on:
            print(text, flush=True)


def main() -> int:
    """`torchrun --nproc-per-node N -m moefold.launch.pretrain CONFIG.toml ...`: the verb `pretrain` with the same arguments."""
    from .cli import main as command

    return command(["pretrain", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
