"""What every rank of `bench.a2a_lab` does: one engine, which takes steps with one variant after the other.

There is one set of weights for all: dispatchers hold none, so they are exchanged between steps. After the first steps, which
train, the learning rate is 0: every turn does all the work of a step and leaves the weights as they are, so that losses of exact
variants can be compared in every turn.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from moefold.moe.dispatch import Dispatcher, Flight
from moefold.parallel.apply import build_dispatcher
from moefold.parallel.comm_record import CommRecord
from moefold.parallel.engine import Engine, MicroBatch
from moefold.parallel.mesh import build_mesh
from moefold.parallel.nodes import NodeMap
from moefold.parallel.recorder import CommRecorder
from moefold.parallel.recorder_analysis import Split, collectives, totals
from moefold.parallel.topology import Topology
from moefold.parallel.transfer import Exchange
from moefold.parallel.wire import Wire

from .asleep import add_sleep
from .case import Case, Turn, Variant
from .deepspeed_peer import DeepSpeedPeer

CPU = torch.device("cpu")
SAMPLED = 64
"""Tokens per rank and layer that the error of compression is measured on, in the turn that is not timed."""


def start_with_all_to_all(
    exchange: Exchange, send: Sequence[int], receive: Sequence[int], group: dist.ProcessGroup
) -> list[dist.Work | None]:
    """In place of `Exchange._start_on_gloo`: gloo's own all-to-all."""
    splits = (list(receive), list(send))
    return [dist.all_to_all_single(exchange.arriving, exchange.rows, *splits, group=group, async_op=True)]


class Bench:
    """One rank's engine and its dispatchers. Collective, as are the methods.

    Args:
        windows_XBS: token windows [steps, world * sequences, seq_len + 1], one for each step of training and a last one for all
            turns.
        nodes: which ranks share a host.
    """

    def __init__(self, case: Case, variants: Sequence[Variant], windows_XBS: Tensor, nodes: NodeMap):
        self.case, self.variants, self.nodes = case, variants, nodes
        self.rank = dist.get_rank()
        self.recorder = CommRecorder(self.rank, CPU)
        world = case.world
        mesh = build_mesh(Topology(world=world, ep=world, hsdp=world), CPU, nodes=nodes)
        self.engine = Engine(case.model(), mesh, recorder=self.recorder, gradient_windows=any(v.windows for v in variants))
        self.windows = self.engine.windows
        self.dispatchers = {v.name: self._dispatchers(v) for v in variants if not v.deepspeed}
        own = slice(self.rank * case.sequences, (self.rank + 1) * case.sequences)
        self.batches = [MicroBatch(w[own, :-1].contiguous(), w[own, 1:].contiguous()) for w in windows_XBS]
        self._train()
        for layer in self.engine.layers if case.expert_us else ():
            add_sleep(layer, 1e-6 * case.expert_us)
        self.peer = DeepSpeedPeer(case, self.engine, self.recorder) if any(v.deepspeed for v in variants) else None

    def _dispatchers(self, variant: Variant) -> list[Dispatcher]:
        """One for each layer."""
        made = []
        for index in range(self.case.layers):
            options: dict[str, Any] = {
                "pieces": variant.pieces,
                "recorder": self.recorder,
                "layer": index,
                "wire": wire_of(variant),
            }
            made.append(build_dispatcher(variant.dispatcher, self.engine.mesh, self.case.experts, **options))
        assert all(d is not None for d in made), "experts are spread over the ranks"
        return [d for d in made if d is not None]

    def _train(self) -> None:
        self.engine.set_compression(1.0)
        total = len(self.batches) - 1
        for index, batch in enumerate(self.batches[:-1]):
            warm = min(1.0, (index + 1) / max(1, total // 5))
            self.engine.train_step([batch], self.case.lr * warm)

    def turn(self, variant: Variant, link: int, number: int, sampled: int = 0) -> Turn | None:
        """One step with this variant, on rank 0; None on the others. sampled: tokens to measure the error of compression on."""
        dist.barrier()
        self.recorder.take()
        start_s, start_cpu_s = time.perf_counter(), time.process_time()
        step = self._deepspeed_step if variant.deepspeed else self._step
        loss, rows_sent, error = step(variant, sampled)
        seconds = time.perf_counter() - start_s
        mine = (seconds, time.process_time() - start_cpu_s, self.recorder.take())
        gathered: list[Any] | None = [None] * self.case.world if self.rank == 0 else None
        dist.gather_object(mine, gathered)
        if gathered is None:
            return None
        all_seconds, all_cpu_s, records = zip(*gathered, strict=True)
        # processes of one machine have one clock
        split = totals(collectives(records), lambda record, rank: None).get(None, Split())
        return Turn(
            variant=variant.name,
            link=link,
            number=number,
            seconds=max(all_seconds),
            cpu_s=sum(all_cpu_s),
            loss=loss,
            bytes_between=bytes_between(records, self.nodes),
            rows_between=rows_between(records, self.nodes, row_bytes(variant, self.case.dim)),
            rows_sent=rows_sent,
            exposed=split.exposed_s / sum(all_seconds),
            transfer=split.transfer_s / sum(all_seconds),
            error=error,
        )

    def _step(self, variant: Variant, sampled: int) -> tuple[float, int, float | None]:
        """(loss, rows sent to experts, error of compression)."""
        for layer, dispatcher in zip(self.engine.layers, self.dispatchers[variant.name], strict=True):
            layer.dispatcher = dispatcher
        # without, sums are made where FSDP wants them
        self.engine.windows = self.windows if variant.windows else None
        self.engine.set_compression(self.case.rate if variant.compressed else 1.0, sampled if variant.compressed else 0)
        # flights that do not travel have nothing to wait for
        late = nullcontext() if variant.late else mock.patch.object(Flight, "travels", False)
        with by_all_to_all() if variant.own_all_to_all else nullcontext(), late:
            stats = self.engine.train_step([self.batches[-1]], 0.0).stats
        assert stats.rows_sent_L is not None and stats.compress_error_L is not None
        error = float(stats.compress_error_L.max())
        return stats.loss, int(stats.rows_sent_L.sum()), error if error == error else None

    def _deepspeed_step(self, variant: Variant, sampled: int) -> tuple[float, int, float | None]:
        assert self.peer is not None
        loss, rows = self.peer.step(self.batches[-1], self.case.tokens, variant)
        return loss, rows, None

    def round(self, link: int, number: int, sampled: int = 0) -> list[Turn]:
        """A turn of each variant that is due, on rank 0; empty on the others. Who begins changes from round to round."""
        first = number % len(self.variants)
        order = [v for v in (*self.variants[first:], *self.variants[:first]) if number % v.every == 0]
        return [turn for v in order if (turn := self.turn(v, link, number, sampled)) is not None]

    def first_round(self) -> list[Turn]:
        """Turns that are not timed: they open connections, and the error of compression is measured."""
        return self.round(-1, 0, SAMPLED)


def wire_of(variant: Variant) -> Wire | None:
    return None if variant.wire == "none" else Wire(variant.wire)


def row_bytes(variant: Variant, dim: int) -> int:
    """Of one row on the way to an expert."""
    row_1D, wire = torch.zeros(1, dim), wire_of(variant)
    return (row_1D if wire is None else wire.pack(row_1D)).nbytes


def by_all_to_all() -> AbstractContextManager[object]:
    """While inside, rows go by gloo's own all-to-all."""
    return mock.patch.object(Exchange, "_start_on_gloo", start_with_all_to_all)


def bytes_between(records: Sequence[Sequence[CommRecord]], nodes: NodeMap) -> int:
    """Bytes of all-to-alls that left a host, added over ranks."""
    return sum(_abroad(record, rank, nodes) for rank, mine in enumerate(records) for record in mine if record.op == "all_to_all")


def rows_between(records: Sequence[Sequence[CommRecord]], nodes: NodeMap, row_bytes: int) -> float:
    """Rows that left a host on the way to experts, in forward."""
    away = (
        _abroad(record, rank, nodes)
        for rank, mine in enumerate(records)
        for record in mine
        if record.what == "dispatch" and record.direction == "forward"
    )
    return sum(away) / row_bytes


def _abroad(record: CommRecord, rank: int, nodes: NodeMap) -> int:
    node_of = nodes.node_of_rank
    return sum(n for peer, n in zip(record.members, record.sent, strict=True) if node_of[peer] != node_of[rank])
