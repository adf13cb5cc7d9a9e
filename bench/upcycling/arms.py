"""The arms that are compared, and their training: a dense model first, then what each arm makes of it, or starts anew."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch

from moefold.launch.config import Loaded, check_world
from moefold.launch.data.loader import Data, open_data
from moefold.launch.evaluate import evaluate, micro_batch
from moefold.launch.pretrain import build_engine
from moefold.launch.process import Rank, joined
from moefold.launch.settings import RunConfig
from moefold.moe.config import ModelConfig
from moefold.moe.upcycle import METHODS, UpcycleOptions, upcycle_parts
from moefold.parallel.engine import Engine
from moefold.parallel.mesh import build_mesh
from moefold.parallel.optimizer import learning_rate

from .models import Arrays, arrays_of, distance, model_of, parts_of

POINTS = 5
"""Evaluations of a training after its start, evenly spaced in compute; the last one is at its end."""
WARMUP = 0.05
"""Part of a training in which the learning rate rises; then it falls to a tenth, as half a cosine."""
TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Arm:
    """start: from the trained dense model as it is, from what the options make of it, or from random weights of that model."""

    start: Literal["dense", "upcycled", "scratch"]
    options: UpcycleOptions | None = None


COPY = UpcycleOptions(method="copy", num_experts=8, top_k=2)
GRANULAR = UpcycleOptions(method="virtual_groups", num_experts=16, granularity=2, top_k=2, group_limited=False)
ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "dense": Arm("dense"),
        "scratch": Arm("scratch", COPY),
        "scratch_granular": Arm("scratch", GRANULAR),
        "copy": Arm("upcycled", COPY),
        "granular": Arm("upcycled", GRANULAR),
        "granular_whole": Arm("upcycled", replace(GRANULAR, group_limited=None)),
        "drop": Arm("upcycled", replace(COPY, method="drop", reinit_ratio=0.5)),
        "dense_shared": Arm("upcycled", UpcycleOptions(method="dense_shared", num_experts=16, granularity=4, top_k=2)),
    }
)
"""All have eight copies' worth of routed neurons, dense_shared four and the dense FFN. granular chooses one copy's worth, so that
a token costs what it costs the dense model, and may mix pieces of several copies once they differ. granular_whole may not: the
weights of its one copy sum to 1 whichever that is, so that only the balance loss trains the choice. copy and drop choose two
copies, dense_shared half of one beside the dense FFN."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all arms have in common.

    pretrain_steps: of the dense model. steps: of the dense model that cost what every arm may spend afterwards. batch: sequences
    of a step. lr: peak, in pretraining and again in every arm. router_std, aux_loss_coeff: of all models with experts. folder: of
    prepared text and dense models. data: other settings of [data].
    """

    pretrain_steps: int
    steps: int
    batch: int
    eval_batches: int
    lr: float
    router_std: float
    aux_loss_coeff: float
    folder: Path
    data: Mapping[str, object]

    def config(self, seed: int) -> RunConfig:
        """The quickstart on one rank, with one expert's worth of dense FFN in place of experts."""
        settings: dict[str, object] = {"parallel.dp": 1, "parallel.hsdp": 1, "parallel.ep": 1, "train.device": "cpu"}
        settings |= {"train.steps": self.steps, "train.global_batch": self.batch, "train.lr": self.lr, "train.warmup_steps": 0}
        settings |= {"train.seed": seed, "data.seed": seed, "train.eval_batches": self.eval_batches}
        settings |= {f"data.{name}": value for name, value in self.data.items()}
        config = RunConfig.load("quickstart", overrides=settings)
        assert config.model.moe is not None
        return replace(config, model=replace(config.model, moe=None, dense_ffn_dim=config.model.moe.expert_dim))

    def options(self, arm: Arm, seed: int) -> UpcycleOptions:
        assert arm.options is not None
        return replace(arm.options, router_std=self.router_std, aux_loss_coeff=self.aux_loss_coeff, seed=seed)

    def open(self, config: RunConfig) -> Data:
        return open_data(
            config.data,
            vocab_size=config.model.vocab_size,
            global_batch=self.batch,
            cache_dir=self.folder,
            eval_batches=self.eval_batches,
        )

    def dense_path(self, seed: int) -> Path:
        return self.folder / f"dense-{seed}.npz"


@dataclass(frozen=True)
class Point:
    """Held-out bits per byte after `step` steps, which is `share` of the arm's compute."""

    share: float
    step: int
    bits: float


@dataclass(frozen=True)
class Training:
    """One finished training.

    steps: of how many. params: of the model. flops_ratio: of a token, by that of the dense model. compute: spent, as a part of
    what there was. exact: whether its start should compute what the dense model does. kl, error: of its start to the dense model
    (see `distance`); None from scratch. points: the first before any step. step_s: median processor time of a step.
    """

    arm: str
    seed: int
    steps: int
    params: int
    flops_ratio: float
    compute: float
    exact: bool
    kl: float | None
    error: float | None
    points: tuple[Point, ...]
    step_s: float

    @property
    def bits(self) -> float:
        return self.points[-1].bits


@contextmanager
def alone() -> Iterator[None]:
    """One rank with one thread."""
    with joined(Rank.here(), torch.device("cpu"), timeout_s=TIMEOUT_S, threads=1):
        yield


def pretrain(seed: int, setting: Setting) -> float:
    """Train the dense model of a seed and keep its weights in the folder; returns its held-out bits per byte."""
    config = setting.config(seed)
    with alone():
        data, engine = setting.open(config), engine_of(config)
        fit(engine, config, data, 0, setting.pretrain_steps, lambda _: None)
        np.savez(setting.dense_path(seed), **weights(engine))
        return bits_of(engine, data)


def train_arm(name: str, seed: int, setting: Setting) -> Training:
    """Spend the compute of one arm. The batches are those after the ones that the dense model was trained on."""
    arm, config = ARMS[name], setting.config(seed)
    dense = config.model
    with alone():
        model, arrays, exact = start_of(arm, dense, seed, setting)
        data = setting.open(config)
        kl = error = None
        if arrays is not None:
            assert data.evaluation is not None
            models = model_of(dense, dense_weights(seed, setting)), model_of(model, arrays)
            kl, error = distance(*models, data.evaluation.batch(0).tokens_BS)
        engine = engine_of(replace(config, model=model))
        if arrays is not None:
            load(engine, arrays)
        ratio = model.flops_per_token(config.data.seq_len) / dense.flops_per_token(config.data.seq_len)
        # never more than there is to spend
        total = max(POINTS, int(setting.steps / ratio))
        points = [Point(0.0, 0, bits_of(engine, data))]
        stops = {round(total * n / POINTS): n / POINTS for n in range(1, POINTS + 1)}

        def after(step: int) -> None:
            if step in stops:
                points.append(Point(stops[step], step, bits_of(engine, data)))

        step_s = fit(engine, config, data, setting.pretrain_steps, total, after)
    spent = total * ratio / setting.steps
    return Training(name, seed, total, model.num_params, ratio, spent, exact, kl, error, tuple(points), step_s)


def start_of(arm: Arm, dense: ModelConfig, seed: int, setting: Setting) -> tuple[ModelConfig, Arrays | None, bool]:
    """(model, its first weights or None for random ones, whether it should compute what the dense model does)."""
    if arm.start == "dense":
        return dense, dense_weights(seed, setting), True
    options = setting.options(arm, seed)
    if arm.start == "scratch":
        return METHODS[options.method].plan(dense, options), None, False
    model, parts = upcycle_parts([(dense, parts_of(dense, dense_weights(seed, setting)))], options)
    return model, arrays_of(model, parts), METHODS[options.method].exact(dense, options) is None


def fit(engine: Engine, config: RunConfig, data: Data, first: int, total: int, after: Callable[[int], None]) -> float:
    """Train for `total` steps on the batches from `first` on, with a learning rate that begins anew.

    after: called with the number of steps done. Returns the median processor time of a step, in seconds.
    """
    t, seconds = config.train, []
    for step in range(total):
        batch = micro_batch(data.train.batch(first + step), engine.mesh.device)
        lr = learning_rate(
            step,
            peak=t.lr,
            total_steps=total,
            schedule="cosine",
            warmup_steps=round(WARMUP * total),
            min_ratio=t.min_lr_ratio,
        )
        start_s = time.process_time()
        engine.train_step([batch], lr)
        seconds.append(time.process_time() - start_s)
        after(step + 1)
    return statistics.median(seconds)


def engine_of(config: RunConfig) -> Engine:
    """A model of the configuration with its first weights, on this rank."""
    domains = len(config.data.sources)
    return build_engine(config, build_mesh(check_world(Loaded(config, {}), 1), torch.device("cpu")), domains)


def bits_of(engine: Engine, data: Data) -> float:
    """Held-out bits per byte."""
    assert data.evaluation is not None
    return evaluate(engine, data, data.evaluation.batch_size).bits_per_byte


def weights(engine: Engine) -> dict[str, np.ndarray]:
    """A copy of the weights, by the names of the model's state."""
    return {p.placement.name: p.local.numpy().copy() for p in engine.parameters}


@torch.no_grad()
def load(engine: Engine, arrays: Arrays) -> None:
    """Replace the weights."""
    named = {p.placement.name: p.local for p in engine.parameters}
    assert named.keys() == arrays.keys(), f"weights and tensors differ: {sorted(named.keys() ^ arrays.keys())}"
    for name, local in named.items():
        local.copy_(torch.from_numpy(arrays[name]))


def dense_weights(seed: int, setting: Setting) -> dict[str, np.ndarray]:
    """Those that `pretrain` has kept."""
    with np.load(setting.dense_path(seed)) as file:
        return dict(file)
