"""A small model with every kind of parameter, its whole training state, and cases that save and load it; for rank workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from moefold.launch.checkpoint import Checkpointer
from moefold.moe.config import BalanceConfig, ModelConfig, MoEConfig, RouterConfig
from moefold.parallel.parity import ParityCase, Piece, RecordingEngine, assemble, build_engine, run_steps

META = {"model": {}, "data": {}, "layout": {}, "tokens": 96}
DP4 = {"hsdp": 1}
State = dict[str, Any]


def model(*, dim: int = 16, bias: bool = True) -> ModelConfig:
    """Dense prefix, shared expert, expert bias, odd vocabulary: every kind of parameter, and shards of unequal size."""
    moe = MoEConfig(
        num_experts=4,
        top_k=2,
        expert_dim=16,
        num_shared_experts=1,
        router=RouterConfig(score="sigmoid"),
        balance=BalanceConfig(expert_bias=bias, bias_update_rate=0.01),
    )
    return ModelConfig(
        dim=dim,
        num_layers=2,
        num_heads=4,
        vocab_size=44,
        max_seq_len=8,
        dense_prefix_layers=1,
        dense_ffn_dim=24,
        moe=moe,
    )


CASE = ParityCase(model(), global_batch=8, seq_len=8, num_micro=2, precision="fp32")


def state_of(engine: RecordingEngine) -> State:
    """Everything that training goes on from, as this rank holds it."""
    return {
        "pieces": {f"weight {p.placement.name}": engine.piece(p, p.local) for p in engine.parameters}
        | {f"{key} {p.placement.name}": engine.piece(p, local) for p, key, local in engine.optimizer.moments()},
        "bias": {name: buffer.numpy().copy() for name, buffer in engine.model.named_buffers()},
        "balance": None if engine.balancer.previous_LE is None else engine.balancer.previous_LE.numpy().copy(),
        "step": engine.step,
        "adam step": {float(s["step"]) for s in engine.optimizer.adamw.state.values()},
        "random": torch.get_rng_state().numpy().copy(),
    }


def whole(states: list[State]) -> dict[str, np.ndarray]:
    """The logical state of all ranks: tensors put together, and what must be the same everywhere taken once."""
    pieces: dict[str, list[Piece]] = {}
    for state in states:
        for name, piece in state["pieces"].items():
            pieces.setdefault(name, []).append(piece)
    result = {}
    for name, parts in pieces.items():
        result[name], disagreement = assemble(parts)
        assert disagreement == 0, f"ranks disagree about {name}"
    for state in states:
        for name, value in {**state["bias"], "balance": state["balance"], "random": state["random"]}.items():
            assert np.array_equal(value, result.setdefault(name, value)), f"ranks disagree about {name}"
        assert state["adam step"] == {float(state["step"])}
        assert state["step"] == states[0]["step"]
    return {**result, "step": np.array(states[0]["step"])}


def assert_same(got: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert sorted(got) == sorted(wanted)
    different = [name for name in wanted if not np.array_equal(got[name], wanted[name])]
    assert not different


def train_and_save(rank: int, world: int, layout: dict[str, int], folder: Path, steps: int) -> State:
    engine = build_engine(CASE, layout)
    run_steps(engine, CASE, range(steps))
    checkpointer = Checkpointer(folder, keep=2, background=False)
    torch.rand(3)  # a random state that no fresh process has
    checkpointer.save(engine, META)
    return state_of(engine)


def load(rank: int, world: int, layout: dict[str, int], path: Path) -> State:
    engine = build_engine(CASE, layout)
    Checkpointer(path.parent, keep=2, background=False).load(path, engine)
    return state_of(engine)


def save_steps(rank: int, world: int, folder: Path, steps: range, keep: int, start: Path | None = None) -> None:
    engine = build_engine(CASE, {})
    checkpointer = Checkpointer(folder, keep=keep, background=True)
    if start is not None:
        checkpointer.load(start, engine)
    for step in steps:
        run_steps(engine, CASE, range(step, step + 1))
        checkpointer.save(engine, META)
    checkpointer.wait()


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
