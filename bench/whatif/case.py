"""The step of `bench.profile_whatif` and the ways that it is sent. Starts no processes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from moefold.launch.settings import DataConfig, RunConfig, TrainConfig
from moefold.moe.config import ModelConfig, MoEConfig
from moefold.parallel.config import ParallelConfig
from moefold.parallel.step_volume import Way


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model that is small in operations and wide in rows, all of whose experts are spread over `hosts` x `ranks_per_host`.

    host_sequences: of `seq_len` tokens, for each host and step.
    """

    hosts: int = 4
    ranks_per_host: int = 2
    layers: int = 2
    dim: int = 256
    expert_dim: int = 128
    experts: int = 32
    top_k: int = 8
    seq_len: int = 128
    host_sequences: int = 4
    vocab: int = 264

    @property
    def world(self) -> int:
        return self.hosts * self.ranks_per_host

    def config(self) -> RunConfig:
        moe = MoEConfig(num_experts=self.experts, top_k=self.top_k, expert_dim=self.expert_dim)
        model = ModelConfig(
            dim=self.dim,
            num_layers=self.layers,
            num_heads=4,
            head_dim=32,
            vocab_size=self.vocab,
            max_seq_len=self.seq_len,
            moe=moe,
        )
        return RunConfig(
            model=model,
            parallel=ParallelConfig(ep=self.world, hsdp=self.world),
            data=DataConfig(seq_len=self.seq_len),
            train=TrainConfig(steps=1, global_batch=self.hosts * self.host_sequences, device="cpu", threads=1),
        )


def ways(shape: Shape) -> list[Way]:
    """The base first: one level, all ranks one group of experts; then other dispatchers, wires, rates, pieces and foldings."""
    base = Way(dispatcher="all_to_all", ep=shape.world)
    two = replace(base, dispatcher="hierarchical")
    found = [
        base,
        replace(base, wire="int8"),
        replace(base, rate=0.5),
        replace(base, rate=0.2),
        replace(base, rate=0.2, wire="int8"),
        replace(base, pieces=2),
        replace(base, pieces=4, rate=0.5),
        two,
        replace(two, pieces=2),
        replace(two, wire="int8", pieces=2),
        replace(two, rate=0.2),
        replace(two, rate=0.5, wire="e4m3"),
        replace(base, ep=shape.world // 2),
        replace(base, ep=shape.world // 2, etp=2),
        replace(two, ep=shape.world // 2),
        replace(base, tp=2),
    ]
    return found
