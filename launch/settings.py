"""The sections of a run's configuration, as they are written in TOML files. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..moe.checks import check_types, not_negative, positive, raise_if
from ..moe.config import ModelConfig
from ..moe.errors import Problem
from ..parallel.config import ParallelConfig

MAX_TRACED = 20
"""Steps of one trace: the file of a rank has some MiB for each."""


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """Where a run lives."""

    name: str = "run"
    """Used in the directory name `<root>/<name>-<YYYYMMDD-HHMMSS>`."""
    root: str = "runs"
    """Folder that new run directories are made in."""
    dir: str | None = None
    """Exact run directory; set it to resume a run, or to let a scheduler requeue it."""

    def __post_init__(self) -> None:
        check_types(self, "run")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of training text. Its name is the domain in load statistics."""

    type: Literal["python-code", "python-docs", "text", "jsonl", "indexed"]
    """python-code, python-docs: this machine's Python library and its documentation topics; text: UTF-8 files; jsonl: one object
    per line; indexed: Megatron .bin/.idx."""
    path: str | None = None
    """File, folder or glob pattern (text, jsonl); path without or with .bin/.idx (indexed)."""
    name: str | None = None
    """Domain name; None = the type, or the file name."""
    weight: float = 1.0
    """Share of the training samples, relative to the other sources."""
    field: str = "text"
    """Key of the text in a jsonl object."""

    def __post_init__(self) -> None:
        check_types(self, "data.sources")
        problems = positive(self, "data.sources", ["weight"])
        needs_path = self.type in ("text", "jsonl", "indexed")
        if needs_path and not self.path:
            problems.append(Problem("data.sources.path", f"is not set, but a source of type '{self.type}' needs one"))
        if not needs_path and self.path:
            problems.append(
                Problem(
                    "data.sources.path",
                    f"is '{self.path}', but a source of type '{self.type}' reads this machine's Python library; remove it",
                )
            )
        raise_if(problems)

    @property
    def domain(self) -> str:
        if self.name or self.path is None:
            return self.name or self.type
        stem = self.path.rstrip("/").rsplit("/", 1)[-1].split(".")[0]
        return self.type if not stem or set(stem) & set("*?[") else stem


def _embedded() -> tuple[SourceConfig, ...]:
    return (
        SourceConfig(type="python-code", name="code", weight=0.85),
        SourceConfig(type="python-docs", name="prose", weight=0.15),
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training text. The order of samples is a function of (seed, step) alone, whatever the layout."""

    sources: tuple[SourceConfig, ...] = field(default_factory=_embedded)
    """Blended by weight. Default: this machine's Python library (code) and documentation topics (prose)."""
    tokenizer: str = "bytes"
    """'bytes' (256 byte values and an end-of-document token) or the path of a tokenizer.json."""
    seq_len: int = 256
    """Tokens S that the model sees per sequence."""
    holdout: float = 0.05
    """Share of the documents kept out of training for evaluation, chosen by a hash of their name or content."""
    document_mask: bool = False
    """Keep attention inside a document, and take no loss on the first token after its end."""
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self, "data")
        problems = positive(self, "data", ["seq_len"])
        if not self.sources:
            problems.append(Problem("data.sources", "is empty; leave it out to train on this machine's Python library"))
        if not 0 <= self.holdout < 1:
            problems.append(Problem("data.holdout", f"is {self.holdout}, but must be in [0, 1)"))
        names = [s.domain for s in self.sources]
        for name in sorted({n for n in names if names.count(n) > 1}):
            problems.append(Problem("data.sources.name", f"'{name}' is used by several sources; give each its own name"))
        raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW. Norms, biases and routers are not decayed."""

    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    implementation: Literal["fused", "foreach"] = "fused"

    def __post_init__(self) -> None:
        path = "train.optimizer"
        check_types(self, path)
        problems = positive(self, path, ["eps"]) + not_negative(self, path, ["weight_decay"])
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                problems.append(Problem(f"{path}.{name}", f"is {getattr(self, name)}, but must be in [0, 1)"))
        raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The optimisation itself."""

    steps: int | None = None
    """Optimizer steps; give this or `tokens`."""
    tokens: int | None = None
    """Training tokens; rounded up to whole steps."""
    global_batch: int = 32
    """Sequences per optimizer step, over all ranks."""
    lr: float = 1e-3
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Learning rate at the end, relative to the peak."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """cosine; wsd: warm-up, stable, then linear decay over the last `decay_steps`; constant after warm-up."""
    warmup_steps: int = 0
    decay_steps: int | None = None
    """Length of the wsd decay; None = a fifth of the run."""
    grad_clip: float | None = 1.0
    """Largest global gradient norm; None = no clipping."""
    precision: Literal["fp32", "bf16", "fp64"] = "fp32"
    """bf16: parameters kept and gradients reduced in fp32, compute in bf16, router in fp32. fp64 is for parity checks."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None
    """CPU threads per rank; None = cores of this machine / ranks on it, at least 1."""
    eval_every: int = 0
    """Steps between evaluations on held-out text; 0 = only at the end."""
    eval_batches: int = 8
    """Global batches of one evaluation; 0 = never evaluate."""
    sample_tokens: int = 200
    """Length of the text sampled at the end of a run; 0 = none."""
    seed: int = 0
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        path = "train"
        check_types(self, path)
        problems = positive(self, path, ["global_batch", "lr", "steps", "tokens", "grad_clip", "decay_steps", "threads"])
        problems += not_negative(self, path, ["warmup_steps", "eval_every", "eval_batches", "sample_tokens"])
        if (self.steps is None) == (self.tokens is None):
            problems.append(
                Problem(f"{path}.steps", f"= {self.steps} and {path}.tokens = {self.tokens}: set exactly one of them")
            )
        if not 0 <= self.min_lr_ratio <= 1:
            problems.append(Problem(f"{path}.min_lr_ratio", f"is {self.min_lr_ratio}, but must be in [0, 1]"))
        raise_if(problems)

    def total_steps(self, seq_len: int) -> int:
        """Optimizer steps of the run, from `steps` or `tokens`."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return -(-self.tokens // (self.global_batch * seq_len))


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints are layout-free: any layout loads any other's."""

    every: int = 0
    """Steps between checkpoints; 0 = only at the end."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    async_save: bool = True
    """Write in the background while training goes on."""
    resume: str = "auto"
    """auto: continue if the run directory has a checkpoint; must: fail if it has none; never: fail if it has one; or the path of
    a checkpoint."""
    init_from: str | None = None
    """Checkpoint whose weights a new run starts from; step, optimizer and data start at zero."""

    def __post_init__(self) -> None:
        check_types(self, "checkpoint")
        raise_if(positive(self, "checkpoint", ["keep"]) + not_negative(self, "checkpoint", ["every"]))


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    every: int = 10
    """Steps between metric lines."""
    tensorboard: bool = True
    comm: bool = True
    """Record every collective: `comm/` metrics and comm.json, for runs on several ranks."""
    gpu: bool = True
    """Read the counters of NVIDIA GPUs once a second, where there are some: `gpu/` metrics."""
    trace_steps: tuple[int, ...] = ()
    """[start, stop]: run torch.profiler over the steps start <= step < stop; `moefold profile run --trace` merges ranks."""
    trace_ranks: tuple[int, ...] = ()
    """Ranks that `trace_steps` is for, of which each writes one file; empty = ranks 0 to 7, as far as there are."""
    report: bool = True
    """Write report.html at the end."""

    def __post_init__(self) -> None:
        check_types(self, "log")
        problems = positive(self, "log", ["every"])
        steps, ranks = list(self.trace_steps), list(self.trace_ranks)
        if steps and (len(steps) != 2 or not 0 <= steps[0] < steps[1] <= steps[0] + MAX_TRACED):
            what = f"is {steps}, but must be [start, stop] with 0 <= start < stop <= start + {MAX_TRACED}: traces are large"
            problems.append(Problem("log.trace_steps", what))
        if any(rank < 0 for rank in ranks) or len(set(ranks)) < len(ranks):
            problems.append(Problem("log.trace_ranks", f"is {ranks}, but must name ranks once each, counted from 0"))
        raise_if(problems)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything one pretraining run is made of."""

    model: ModelConfig
    run: RunSection = field(default_factory=RunSection)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check_types(self, "")
        problems = []
        if self.data.seq_len > self.model.max_seq_len:
            problems.append(
                Problem("data.seq_len", f"is {self.data.seq_len}, longer than model.max_seq_len = {self.model.max_seq_len}")
            )
        steps = self.train.total_steps(self.data.seq_len)
        if self.train.warmup_steps > steps:
            problems.append(
                Problem("train.warmup_steps", f"is {self.train.warmup_steps}, more than the {steps} steps of the run")
            )
        wire = "none" if self.model.moe is None else self.model.moe.compress.wire
        if wire != "none" and self.train.precision == "fp64":
            what = f"is {wire!r}, which takes no float64 (train.precision = 'fp64'); use 'none' to send rows exactly"
            problems.append(Problem("model.moe.compress.wire", what))
        raise_if(problems)

    @staticmethod
    def load(*files: str, overrides: dict[str, object] | None = None) -> RunConfig:
        """Merge TOML files left to right, then dotted overrides; see `launch/config.py`.

        Raises ConfigError with every problem of all files and flags at once.
        """
        from .config import load

        return load(*files, overrides=overrides).config
