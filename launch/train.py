"""The training loop: one file, readable from top to bottom."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from ..moe.compress import rate_at
from ..moe.stats import drop_fraction, load_ratio, load_stats
from ..parallel.engine import Engine, MicroBatch, StepResult
from ..parallel.optimizer import learning_rate
from ..parallel.step_stats import StepStats
from .checkpoint import Checkpointer
from .data.loader import Data, Prefetcher
from .evaluate import Evaluation, evaluate, micro_batch
from .instruments import Instruments
from .memory import peak_resident_bytes
from .metrics import Sinks
from .process import StopRequest
from .settings import RunConfig


@dataclass
class Times:
    """Seconds since the last metric line, by where they went; `steps` says over how many steps."""

    steps: int = 0
    step: float = 0.0
    data: float = 0.0
    optimizer: float = 0.0
    checkpoint: float = 0.0
    log: float = 0.0

    def metrics(self) -> dict[str, float]:
        n = max(1, self.steps)
        names = (
            ("perf/step_s", self.step),
            ("perf/data_wait_s", self.data),
            ("perf/optimizer_s", self.optimizer),
            ("perf/checkpoint_s", self.checkpoint),
            ("perf/log_s", self.log),
        )
        return {name: total / n for name, total in names}


@dataclass
class Trainer:
    """Everything the loop works with. `meta` is written into every checkpoint."""

    config: RunConfig
    engine: Engine
    data: Data
    checkpointer: Checkpointer
    sinks: Sinks
    stop: StopRequest
    meta: Mapping[str, Any]
    tokens: int = 0
    instruments: Instruments = field(default_factory=Instruments)
    times: Times = field(default_factory=Times)
    last_lr: float = 0.0

    def run(self) -> Evaluation | None:
        """Train from the engine's step to the end.

        Returns the last evaluation, which is not recorded yet (what it is compared with goes into the same record), or None
        when stopped early or without held-out text.
        """
        c = self.config
        total = c.train.total_steps(c.data.seq_len)
        with Prefetcher(self.load, self.engine.step, total) as batches:
            while self.engine.step < total:
                result = self.train_step(batches, total)
                step = self.engine.step
                if step % c.log.every == 0 or step == total:
                    self.log(result)
                # after the last step there is nothing to stop: the rest is short
                if result.vote and step < total:
                    self.save()
                    return None
                if c.checkpoint.every and step % c.checkpoint.every == 0 and step < total:
                    self.save()
                if c.train.eval_every and step % c.train.eval_every == 0 and step < total:
                    self.evaluate()
        self.save()
        return self.evaluate(record=False)

    def load(self, step: int) -> list[MicroBatch]:
        """This rank's micro-batches of a step; runs in the prefetch thread."""
        c, mesh = self.config, self.engine.mesh
        rows, micros = self.micro_rows
        share = c.train.global_batch // micros
        starts = [m * share + mesh.coordinates.dp * rows for m in range(micros)]
        return [micro_batch(self.data.train.batch(step, range(lo, lo + rows)), mesh.device) for lo in starts]

    @property
    def micro_rows(self) -> tuple[int, int]:
        """Sequences per rank and forward pass, and micro-batches per step."""
        per_rank = self.config.train.global_batch // self.engine.mesh.topology.dp
        rows = self.config.parallel.micro_batch or per_rank
        return rows, per_rank // rows

    def train_step(self, batches: Prefetcher[list[MicroBatch]], total: int) -> StepResult:
        """Get data, update once, account for the time."""
        t, c = self.config.train, self.times
        self.instruments.before(self.engine.step)
        start_s = time.perf_counter()
        batch = next(batches)
        c.data += time.perf_counter() - start_s
        lr = learning_rate(
            self.engine.step,
            peak=t.lr,
            total_steps=total,
            schedule=t.schedule,
            warmup_steps=t.warmup_steps,
            decay_steps=t.decay_steps,
            min_ratio=t.min_lr_ratio,
        )
        self.compress(self.engine.step, total)
        result = self.engine.train_step(batch, lr, vote=self.stop.signal is not None)
        self.tokens += result.tokens
        c.optimizer += result.optimizer_s
        c.step += time.perf_counter() - start_s
        c.steps += 1
        self.instruments.after(self.engine.step - 1)
        self.last_lr = lr
        return result

    def compress(self, step: int, total: int) -> None:
        """Have the step compress as its place in the schedule says, and measure the error if it will be logged."""
        moe = self.config.model.moe
        if moe is not None and moe.compress.method != "none":
            logged = (step + 1) % self.config.log.every == 0 or step + 1 == total
            self.engine.set_compression(rate_at(moe.compress, step, total), moe.compress.error_tokens if logged else 0)

    def log(self, result: StepResult) -> None:
        """One metric record."""
        start_s = time.perf_counter()
        values = {
            "train/loss": result.loss,
            "train/grad_norm": result.grad_norm,
            "train/lr": self.last_lr,
            "train/tokens": self.tokens,
            **self.times.metrics(),
            **self._throughput(result),
            **load_metrics(result, self.engine, self.data.domains),
            "mem/peak_gib": self._peak_memory_gib(),
            **self.instruments.sample(self.engine.step - 1),
        }
        self.sinks.write("step", self.engine.step, values)
        self.times = Times(log=time.perf_counter() - start_s)

    def _throughput(self, result: StepResult) -> dict[str, float]:
        step_s = self.times.step / max(1, self.times.steps)
        world = self.engine.mesh.topology.world
        rate = result.tokens / step_s
        flops = self.config.model.flops_per_token(self.config.data.seq_len) * rate / world
        values = {"perf/tokens_per_s": rate, "perf/tokens_per_s_gpu": rate / world, "perf/tflops_gpu": flops / 1e12}
        device = self.engine.mesh.device
        if device.type == "cuda" and self.config.train.precision == "bf16":
            peak = peak_bf16_flops(torch.cuda.get_device_name(device))
            values |= {"perf/mfu": flops / peak} if peak else {}
        return values

    def _peak_memory_gib(self) -> float:
        device = self.engine.mesh.device
        if device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
        else:
            peak = peak_resident_bytes()
        gib = torch.tensor(peak / 2**30, dtype=torch.float64, device=device)
        if self.engine.mesh.topology.world > 1:
            dist.all_reduce(gib, op=dist.ReduceOp.MAX, group=self.engine.mesh.world_group)
        return float(gib)

    def save(self) -> None:
        """Start a checkpoint of the current step."""
        start_s = time.perf_counter()
        self.checkpointer.save(self.engine, {**self.meta, "tokens": self.tokens})
        self.times.checkpoint += time.perf_counter() - start_s

    def evaluate(self, *, record: bool = True) -> Evaluation | None:
        """Evaluate on held-out text, if there is any."""
        if self.data.evaluation is None:
            return None
        self.engine.set_compression(1.0)
        result = evaluate(self.engine, self.data, self.micro_rows[0])
        moe = self.config.model.moe
        if moe is not None and moe.compress.method != "none" and moe.compress.in_eval:
            self.engine.set_compression(moe.compress.rate)
            result = replace(result, compressed=evaluate(self.engine, self.data, self.micro_rows[0]))
            self.engine.set_compression(1.0)
        if record:
            self.sinks.write("eval", self.engine.step, result.metrics())
        return result


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 peak in FLOP/s of a GPU by its name, from NVIDIA's data sheets; None where it is not known."""
    for part, peak in (("H200", 989.4e12), ("H100 80GB HBM3", 989.4e12), ("H100 PCIe", 756e12), ("A100", 312e12)):
        if part in device_name:
            return peak
    return None


def load_metrics(result: StepResult, engine: Engine, domains: tuple[str, ...]) -> dict[str, Any]:
    """The `moe/` metrics of a step; empty for a dense model."""
    s = result.stats
    if s.counts_LDE is None or s.counts_LE is None or s.balance_L is None:
        return {}
    assert s.z_L is not None and s.dropped_L is not None and s.max_violation_micro_L is not None
    load = load_stats(s.counts_LE)
    biases = [layer.router.expert_bias_E.abs().max() for layer in engine.layers if layer.router.biased]
    values: dict[str, Any] = {
        "train/aux_loss": float(s.balance_L.mean()),
        "train/z_loss": float(s.z_L.mean()),
        "moe/load_cv": float(load.cv.mean()),
        "moe/load_max": float(load.max_violation.mean()) + 1,
        "moe/load_min": float(load.min_ratio.mean()),
        "moe/dead_frac": float(load.dead_frac.mean()),
        "moe/entropy": float(load.entropy.mean()),
        "moe/drop_frac": float(drop_fraction(s.dropped_L, s.counts_LE).mean()),
        "moe/max_violation": float(load.max_violation.mean()),
        "moe/max_violation_micro": float(s.max_violation_micro_L.mean()),
        "moe/router_logit_max": s.logit_max,
        "moe/load_LE": load_ratio(s.counts_LE).tolist(),
    }
    values |= compression_metrics(s, engine)
    if biases:
        values["moe/bias_max"] = float(torch.stack(biases).max())
    if len(domains) > 1:
        # a domain without tokens in this batch says nothing about its experts
        present = [(d, name) for d, name in enumerate(domains) if s.counts_LDE[:, d].any()]
        values["moe/domain_load"] = {name: load_ratio(s.counts_LDE[:, d]).tolist() for d, name in present}
    return values


def compression_metrics(s: StepStats, engine: Engine) -> dict[str, Any]:
    """The `moe/` metrics of a step whose rows may have been merged; empty without such compression."""
    codecs = [layer.codec for layer in engine.layers if layer.codec is not None]
    if not codecs or s.rows_sent_L is None or s.counts_LE is None:
        return {}
    assert s.dropped_L is not None and s.compress_error_L is not None
    kept_L = s.counts_LE.sum(-1) - s.dropped_L
    values: dict[str, Any] = {
        "moe/rows_sent_frac": float(s.rows_sent_L.sum() / kept_L.sum().clamp_min(1)),
        "moe/rows_sent_L": (s.rows_sent_L / kept_L.clamp_min(1)).tolist(),
    }
    if codecs[0].rate is not None:
        values["moe/compress_rate"] = codecs[0].rate
    measured_L = s.compress_error_L[s.compress_error_L.isfinite()]
    if measured_L.numel():
        values |= {"moe/compress_error": float(measured_L.mean()), "moe/compress_error_L": s.compress_error_L.tolist()}
    return values
