"""Rows in one byte per value: what arrives is what was rounded, gradients pass straight through, bytes are as few as promised."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, Literal, cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from helpers import GlooPool, RankError, run_threads
from moefold.kernels import quant_rows
from moefold.kernels.quant_rows import dequantize_rows, quantize_rows
from moefold.launch.parity import parity
from moefold.launch.settings import RunConfig, TrainConfig
from moefold.moe.config import MAX_WIRE_BLOCK, CompressConfig, ModelConfig, MoEConfig
from moefold.moe.dispatch import Computing, DispatchPlan, Experts, make_plan
from moefold.moe.errors import CommError, ConfigError
from moefold.moe.experts import GroupedExperts
from moefold.parallel.apply import build_dispatcher, moe_layers
from moefold.parallel.engine import Engine, MicroBatch
from moefold.parallel.hierarchical import HierarchicalDispatcher
from moefold.parallel.mesh import build_mesh
from moefold.parallel.nodes import NodeMap
from moefold.parallel.recorder import CommRecorder
from moefold.parallel.topology import Topology
from moefold.parallel.transfer import Transfer
from moefold.parallel.wire import Wire
from numeric import assert_same

Format = Literal["int8", "e4m3"]
Figures = dict[str, Tensor]
FORMATS: tuple[Format, ...] = ("int8", "e4m3")
EACH_FORMAT = pytest.mark.parametrize("format", FORMATS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
D, F, E, K = 40, 12, 8, 2


def rounded(x_RD: Tensor, wire: Wire) -> Tensor:
    """The rows that should arrive."""
    codes_RD, scales_RB = quantize_rows(x_RD, wire.format, wire.block)
    return dequantize_rows(codes_RD, scales_RB, x_RD.dtype, wire.block)


def row_bytes(wire: Wire, dim: int = D) -> int:
    return CompressConfig(wire=wire.format, wire_block=wire.block).row_bytes(dim, 99)


def rows(seed: int, count: int, dim: int = D, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    x_RD = torch.randn(count, dim, generator=generator) * 10 ** torch.linspace(-3, 2, count)[:, None]
    return x_RD.to(dtype)


# packing


@EACH_FORMAT
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    count=st.integers(0, 5),
    dim=st.integers(0, 300),
    block=st.none() | st.integers(1, 400),
    dtype=st.sampled_from(DTYPES),
)
@example(count=1, dim=3, block=2, dtype=torch.float32)
@example(count=4, dim=0, block=None, dtype=torch.bfloat16)
def test_a_row_packs_into_its_codes_and_scales(
    format: Format, count: int, dim: int, block: int | None, dtype: torch.dtype
) -> None:
    wire, x_RD = Wire(format, block), rows(count + dim, count, dim, dtype)
    bytes_RW = wire.pack(x_RD)
    assert bytes_RW.dtype == torch.uint8
    scales = -(-dim // block) if block else min(dim, 1)
    assert bytes_RW.shape == (count, dim + 4 * scales) == (count, row_bytes(wire, dim))
    back_RD = wire.unpack(bytes_RW, dim, dtype)
    assert back_RD.dtype == dtype and torch.equal(back_RD, rounded(x_RD, wire))


@EACH_FORMAT
def test_what_comes_out_is_as_near_as_the_rounding_promises(format: Format) -> None:
    wire, x_RD = Wire(format, 16), rows(3, 50, 64)
    back_RD = wire.unpack(wire.pack(x_RD), 64, torch.float32)
    largest_RD = x_RD.view(50, 4, 16).abs().amax(-1).repeat_interleave(16, 1)
    error_RD = (back_RD - x_RD).abs()
    scale_RD = largest_RD / (127 if format == "int8" else 448)
    bound_RD = scale_RD / 2 if format == "int8" else torch.maximum(x_RD.abs() / 16, scale_RD / 1024)
    assert (error_RD <= bound_RD * (1 + 1e-5)).all()
    assert error_RD.amax() > 0


def test_a_row_that_is_broken_stays_visible() -> None:
    x_RD = rows(1, 3)
    x_RD[1, 5] = torch.inf
    back_RD = Wire("int8", 8).unpack(Wire("int8", 8).pack(x_RD), D, torch.float32)
    assert back_RD[1, :8].isnan().all() and back_RD[1, 8:].isfinite().all() and back_RD[::2].isfinite().all()


# one exchange


def counts(source: int, world: int) -> list[int]:
    """Rows from a rank to each: uneven, and none between some."""
    return [(3 * source + 5 * target) % 4 for target in range(world)]


def there_and_back(rank: int, world: int, wire: Wire | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, list[Any]]:
    """(rows that arrived, gradient that came back, records) of a transfer with two rows that stay."""
    group = dist.group.WORLD
    assert group is not None
    recorder = CommRecorder(rank, torch.device("cpu"))
    send, receive = counts(rank, world), [counts(source, world)[rank] for source in range(world)]
    x_RD = rows(rank, sum(send) + 2, dtype=dtype).requires_grad_()
    transfer = Transfer(send, receive, group, recorder.probe("ep_etp", group, "dispatch"), wire=wire)
    y_XD = transfer.finish(transfer.start(x_RD))
    y_XD.backward(rows(100 + rank, sum(receive), dtype=dtype))
    assert x_RD.grad is not None
    return y_XD.detach(), x_RD.grad, recorder.records()


def check_exchange(results: list[tuple[Tensor, Tensor, list[Any]]], wire: Wire, dtype: torch.dtype) -> None:
    world = len(results)

    def blocks(seed: int, splits: list[int]) -> tuple[Tensor, ...]:
        return rounded(rows(seed, sum(splits) + (2 if seed < 100 else 0), dtype=dtype), wire)[: sum(splits)].split(splits)

    for rank, (y_XD, grad_RD, records) in enumerate(results):
        send, receive = counts(rank, world), [counts(source, world)[rank] for source in range(world)]
        assert torch.equal(y_XD, torch.cat([blocks(source, counts(source, world))[rank] for source in range(world)]))
        # straight through: what comes back is the gradient at the other end, rounded like a row
        at = [[counts(source, world)[target] for source in range(world)] for target in range(world)]
        want_RD = torch.cat([blocks(100 + target, at[target])[rank] for target in range(world)])
        assert torch.equal(grad_RD, torch.cat([want_RD, torch.zeros(2, D, dtype=dtype)]))
        forward, backward = records
        assert forward.sent == tuple(n * row_bytes(wire) for n in send)
        assert forward.received == backward.sent == tuple(n * row_bytes(wire) for n in receive)
        assert (forward.direction, backward.direction) == ("forward", "backward")


@EACH_FORMAT
@pytest.mark.parametrize("block", [16, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_arrive_as_the_other_rank_rounded_them(format: Format, block: int | None, dtype: torch.dtype) -> None:
    wire = Wire(format, block)
    check_exchange(run_threads(there_and_back, 3, wire, dtype), wire, dtype)


@pytest.mark.ranks
@EACH_FORMAT
def test_rows_arrive_as_the_other_rank_rounded_them_on_processes(format: Format, gloo_pool: GlooPool) -> None:
    wire = Wire(format, 16)
    check_exchange(gloo_pool.run(there_and_back, 3, wire, torch.bfloat16), wire, torch.bfloat16)


def test_without_a_wire_rows_arrive_as_they_were() -> None:
    for rank, (y_XD, _, records) in enumerate(run_threads(there_and_back, 3, None, torch.float32)):
        want = [rows(s, sum(counts(s, 3)) + 2)[: sum(counts(s, 3))].split(counts(s, 3))[rank] for s in range(3)]
        assert torch.equal(y_XD, torch.cat(want))
        assert records[0].sent == tuple(4 * D * n for n in counts(rank, 3))


# a layer


class Echo:
    """Experts that double rows, so that what is written out needs no experts."""

    def __call__(self, x_TD: Tensor, work: Any) -> Tensor:
        return work(x_TD, self)

    def late(self) -> Computing:
        return self

    def compute(self, x: Tensor, counts_E: Tensor, plan: DispatchPlan | None = None, shared_TD: Tensor | None = None) -> Tensor:
        return 2 * x


class Straight(torch.autograd.Function):
    """The rounding of rows, and of their gradients."""

    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, wire: Wire) -> Tensor:
        ctx.wire = wire
        return rounded(x_RD, wire)

    @staticmethod
    def backward(ctx: Any, grad_RD: Tensor) -> tuple[Tensor, None]:
        return rounded(grad_RD, ctx.wire), None


def layer_inputs(rank: int, tokens: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(50 + rank)
    indices_TK = torch.rand(tokens, E, generator=generator).argsort(-1)[:, :K]
    return rows(rank, tokens), indices_TK, torch.rand(tokens, K, generator=generator)


def passed(rank: int, world: int, nodes: str, pieces: int, etp: int, wire: Wire | None) -> tuple[Figures, Counter[str], str]:
    """Output and gradients of one pass over echoing experts, bytes of rows by (axis, purpose), and the kind of the dispatcher."""
    mesh = build_mesh(Topology(world, ep=world // etp, etp=etp), torch.device("cpu"), nodes=NodeMap.by_name(nodes))
    recorder = CommRecorder(rank, mesh.device)
    name = "all_to_all" if len(set(nodes)) == 1 else "hierarchical"
    dispatcher = build_dispatcher(name, mesh, E, pieces=pieces, recorder=recorder, layer=0, wire=wire)
    assert dispatcher is not None
    x_TD, indices_TK, weights_TK = layer_inputs(rank)
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    y_TD = dispatcher(x_TD, make_plan(indices_TK, weights_TK, E), cast(Experts, Echo()))
    y_TD.backward(rows(200 + rank, len(x_TD)))
    assert x_TD.grad is not None and weights_TK.grad is not None
    sent: Counter[str] = Counter()
    for record in recorder.records():
        sent[f"{record.axis} {record.what} {record.direction}"] += sum(record.sent)
    return (
        {"output": y_TD.detach(), "gradient of x": x_TD.grad, "gradient of weights": weights_TK.grad},
        sent,
        type(dispatcher).__name__,
    )


def on_one_process(rank: int, wire: Wire) -> Figures:
    """The same written out: every choice's row is rounded on its way there and back."""
    x_TD, _, weights_TK = layer_inputs(rank)
    x_TD.requires_grad_()
    weights_TK.requires_grad_()
    T = len(x_TD)
    there_RD = Straight.apply(x_TD.repeat_interleave(K, 0), wire)
    back_TKD = Straight.apply(2 * there_RD, wire).view(T, K, D)
    y_TD = (back_TKD * weights_TK[..., None]).sum(1)
    y_TD.backward(rows(200 + rank, T))
    assert x_TD.grad is not None and weights_TK.grad is not None
    return {"output": y_TD.detach(), "gradient of x": x_TD.grad, "gradient of weights": weights_TK.grad}


@EACH_FORMAT
@pytest.mark.parametrize("pieces", [1, 3])
def test_a_layer_rounds_each_choice_on_each_way(format: Format, pieces: int) -> None:
    """Own rows too: so it is the same for every number of ranks, which the numbers of one process show."""
    wire = Wire(format, 16)
    for world in (2, 4):
        for rank, (got, sent, _) in enumerate(run_threads(passed, world, "a" * world, pieces, 1, wire)):
            assert_same(got, on_one_process(rank, wire), 1e-6)
            assert sent["ep_etp dispatch forward"] == 7 * K * row_bytes(wire)


def test_every_row_of_every_level_travels_so_and_notes_do_not() -> None:
    wire = Wire("e4m3", 16)
    exact, found = (run_threads(passed, 4, "aabb", 2, 1, w) for w in (None, wire))
    for (_, whole, kind), (got, sent, _) in zip(exact, found, strict=True):
        assert kind == HierarchicalDispatcher.__name__
        assert sent.keys() == whole.keys() and {key.split()[0] for key in sent} == {"across_nodes", "inside_node"}
        for key, nbytes in whole.items():
            if key.split()[1] in ("dispatch", "combine"):
                assert sent[key] * 4 * D == nbytes * row_bytes(wire) and nbytes
            else:
                assert sent[key] == nbytes, key
        assert got["output"].isfinite().all()


def test_two_levels_round_about_as_the_flat_exchange() -> None:
    """Not alike: a node's rows of a token are added before they cross, and come to their experts over two roundings."""
    for (got, *_), (exact, *_) in zip(
        run_threads(passed, 4, "abba", 1, 1, Wire("int8", 16)), run_threads(passed, 4, "abba", 1, 1, None), strict=True
    ):
        for name in ("output", "gradient of x"):  # not of the weights: products that nearly cancel
            error = ((got[name] - exact[name]).norm(dim=1) / exact[name].norm(dim=1)).amax()
            assert 0 < error < 0.03, f"{name}: {error:.3g}"


def test_the_copies_for_the_slices_of_an_expert_are_rounded_alike() -> None:
    wire = Wire("int8", 16)
    for rank, (got, sent, _) in enumerate(run_threads(passed, 4, "aaaa", 1, 2, wire)):
        want = on_one_process(rank, wire)
        # both ranks of an expert return all of it here, rounded alike, and both gradients come back
        assert_same({"output": got["output"]}, {"output": 2 * want["output"]}, 1e-6)
        assert sent["ep_etp dispatch forward"] == 2 * 7 * K * row_bytes(wire)


def experts_gradient(rank: int, world: int, wire: Wire | None) -> Figures:
    """Gradients of real experts and of the tokens."""
    mesh = build_mesh(Topology(world, ep=world), torch.device("cpu"))
    dispatcher = build_dispatcher("all_to_all", mesh, E, wire=wire)
    assert dispatcher is not None
    experts = GroupedExperts(E // world, D, F)
    generator = torch.Generator().manual_seed(rank)
    with torch.no_grad():
        for p in experts.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / 4)
    x_TD, indices_TK, weights_TK = layer_inputs(rank, 32)
    x_TD = (x_TD / x_TD.norm(dim=1, keepdim=True)).requires_grad_()
    y_TD = dispatcher(x_TD, make_plan(indices_TK, weights_TK, E), experts)
    y_TD.square().sum().backward()
    assert x_TD.grad is not None and experts.w13_E2FD.grad is not None and experts.w2_EDF.grad is not None
    return {"y": y_TD.detach(), "x": x_TD.grad, "w13": experts.w13_E2FD.grad, "w2": experts.w2_EDF.grad}


@pytest.mark.parametrize(("format", "limit"), [("int8", 0.015), ("e4m3", 0.15)])
def test_gradients_of_experts_and_tokens_stay_near_the_exact_ones(format: Format, limit: float) -> None:
    found, exact = (run_threads(experts_gradient, 2, wire) for wire in (Wire(format), None))
    for got, want in zip(found, exact, strict=True):
        for name, x in want.items():
            error = float((got[name] - x).norm() / x.norm())
            assert 1e-4 < error < limit, f"{name}: {error:.3g}"


# in training, and what is refused


def model(**compress: Any) -> ModelConfig:
    moe = MoEConfig(num_experts=4, top_k=2, expert_dim=8, compress=CompressConfig(**compress))
    return ModelConfig(dim=16, num_layers=1, num_heads=2, vocab_size=32, max_seq_len=8, moe=moe)


def train(rank: int, world: int, config: ModelConfig, precision: str = "fp32") -> tuple[list[float], int]:
    """Losses of steps on the same text, and bytes of rows sent by the first."""
    mesh = build_mesh(Topology(world, ep=world), torch.device("cpu"))
    recorder = CommRecorder(rank, mesh.device)
    engine = Engine(config, mesh, precision=precision, recorder=recorder)
    text_BS = torch.arange(18).view(2, 9) * (3 + rank) % 32
    batch = MicroBatch(text_BS[:, :-1], text_BS[:, 1:])
    losses = [engine.train_step([batch], 1e-2).loss for _ in range(8)]
    assert len(moe_layers(engine.model)) == 1
    return losses, sum(sum(r.sent) for r in recorder.records(step=0) if r.what in ("dispatch", "combine"))


@pytest.mark.parametrize(("method", "format", "precision"), [("none", "e4m3", "bf16"), ("lsh", "int8", "fp32")])
def test_a_model_trains_on_rounded_rows(method: Any, format: Format, precision: str) -> None:
    settings_ = {"method": method, "hash_width": 4, "rate": None}
    plain, found = (run_threads(train, 2, model(**settings_, wire=w, wire_block=8), precision) for w in ("none", format))
    for (losses, nbytes), (exact, exact_bytes) in zip(found, plain, strict=True):
        assert losses[-1] < losses[0] - 0.3
        assert losses != exact and losses == pytest.approx(exact, rel=0.05)
        if method == "none":
            assert nbytes * 16 * 2 == exact_bytes * (16 + 2 * 4)
        else:
            assert 0 < nbytes < exact_bytes


def test_float64_is_refused() -> None:
    config = model(wire="int8")
    with pytest.raises(RankError, match=r"CommError.*model\.moe\.compress\.wire = 'int8'.*float64.*set train\.precision"):
        run_threads(train, 2, config, "fp64")
    with pytest.raises(CommError, match="'none' to send them exactly"):
        Wire("e4m3").pack(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"model\.moe\.compress\.wire: is 'int8', which takes no float64"):
        RunConfig(model=replace(config, max_seq_len=4096), train=TrainConfig(steps=1, precision="fp64"))
    rounding = RunConfig(model=replace(config, max_seq_len=4096), train=TrainConfig(steps=1))
    with pytest.raises(ConfigError, match=r"model\.moe\.compress\.wire: is 'int8', which rounds rows.* parity is of exact rows"):
        parity(rounding, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wire": "fp8"}, "is 'fp8', but must be one of 'none', 'int8', 'e4m3'"),
        ({"wire_block": 0}, "wire_block: is 0, but must be positive"),
        ({"wire_block": -1}, "wire_block: is -1, but must be positive"),
        ({"wire_block": MAX_WIRE_BLOCK + 1}, f"is {MAX_WIRE_BLOCK + 1}, but one scale is for at most {MAX_WIRE_BLOCK} columns"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CompressConfig(**changes)


def test_settings_become_a_wire() -> None:
    assert CompressConfig().row_bytes(10, 2) == 20 and not CompressConfig().on
    assert CompressConfig(wire="int8", wire_block=4).on
    assert Wire.of(MoEConfig(num_experts=4, top_k=2, expert_dim=8)) is None
    compress = CompressConfig(wire="e4m3", wire_block=None)
    assert Wire.of(MoEConfig(num_experts=4, top_k=2, expert_dim=8, kernels="torch", compress=compress)) == Wire(
        "e4m3", None, "torch"
    )
    assert MAX_WIRE_BLOCK == quant_rows.MAX_BLOCK, "the settings know the limit of the kernel"
