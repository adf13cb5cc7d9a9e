"""Other projects' kernels through our adapters: same results as our specification, and a reason where they cannot run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path

import pytest
import torch
from bench.peers import (
    adapted,
    dense_routing,
    layer_peers,
    megatron,
    modules_replaced,
    permute_peers,
    regroup_peers,
    sort_peers,
    transformer_engine,
    unpermute_peers,
)
from bench.protocol.contender import Contender, Problem, make_problem
from bench.protocol.gate import results_of
from bench.protocol.shapes import Shape
from torch import Tensor

from moefold.kernels.moe_mlp import reference as mlp_reference
from moefold.kernels.permute import reference
from moefold.kernels.sort_tokens import sort_tokens
from numeric import assert_same

SHAPE = Shape("small", 21, 24, 16, 8, 3)
LAYERS = ("liger", "megatron", "megatron vllm", "transformers eager", "transformers grouped_mm")


@pytest.fixture(params=["balanced", "empty"])
def problem(request: pytest.FixtureRequest) -> Problem:
    return make_problem(SHAPE, request.param, torch.float32, "cpu")


def named(contenders: list[Contender], name: str) -> Contender:
    """That contender, or a skip with its own reason."""
    contender = next(c for c in contenders if c.name == name)
    if contender.why_absent is not None:
        pytest.skip(f"{name}: {contender.why_absent}")
    return contender


def order_of(problem: Problem) -> dict[str, Tensor]:
    order_R, row_TK, counts_E = sort_tokens(problem.indices_TK, SHAPE.E)
    return {"order": order_R, "row": row_TK, "counts": counts_E}


def differentiated(out: Tensor, leaves: Mapping[str, Tensor], direction: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(out, list(leaves.values()), direction)
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def specified_layer(problem: Problem) -> dict[str, Tensor]:
    leaves, plan = problem.leaves(), order_of(problem)
    x_TD, w13, w2, weights_TK = leaves.values()
    rows_RD = reference.permute(x_TD, plan["order"], plan["row"])
    y_RD = mlp_reference.moe_mlp(rows_RD, w13, w2, plan["counts"])
    return differentiated(reference.unpermute(y_RD, weights_TK, plan["order"], plan["row"]), leaves, problem.direction_TD)


def test_every_layer_peer_is_known() -> None:
    assert tuple(c.name for c in layer_peers(make_problem(SHAPE, "balanced", torch.float32, "cpu"))) == LAYERS


@pytest.mark.parametrize("name", LAYERS)
def test_layer_peers_compute_our_layer(problem: Problem, name: str) -> None:
    peer = named(layer_peers(problem), name)
    before = {key: x.clone() for key, x in problem.leaves().items()}
    got, want = results_of(peer), specified_layer(problem)
    assert_same(got, want if peer.backward is not None else {"out": want["out"]}, 2e-6)
    assert_same(problem.leaves(), before)


@pytest.mark.parametrize("name", ["megatron", "transformer_engine"])
def test_permute_peers_copy_tokens_into_our_order(problem: Problem, name: str) -> None:
    direction_RD = torch.randn(SHAPE.R, SHAPE.H)
    peer = named(permute_peers(problem, direction_RD), name)
    leaves, plan = {"dX": problem.leaves()["dX"]}, order_of(problem)
    want = differentiated(reference.permute(leaves["dX"], plan["order"], plan["row"]), leaves, direction_RD)
    assert_same(results_of(peer), want, 1e-6)


@pytest.mark.parametrize("name", ["megatron", "transformer_engine"])
def test_unpermute_peers_sum_the_rows_of_a_token(problem: Problem, name: str) -> None:
    y_RD = torch.randn(SHAPE.R, SHAPE.H)
    peer = named(unpermute_peers(problem, y_RD), name)
    leaves, plan = {"dY": y_RD.clone().requires_grad_(), "dS": problem.leaves()["dS"]}, order_of(problem)
    out_TD = reference.unpermute(leaves["dY"], leaves["dS"], plan["order"], plan["row"])
    assert_same(results_of(peer), differentiated(out_TD, leaves, problem.direction_TD), 1e-6)


def test_a_peer_that_regroups_says_why_it_is_absent_or_regroups() -> None:
    x_RD, counts_WL = torch.randn(9, 4), torch.tensor([[2, 1], [3, 3]])
    (peer,) = regroup_peers(x_RD, counts_WL, torch.randn(9, 4))
    named([peer], "torchao")
    assert_same({"out": results_of(peer)["out"]}, {"out": x_RD[[0, 1, 3, 4, 5, 2, 6, 7, 8]]})


def test_plans_of_peers_are_ours_or_absent(problem: Problem) -> None:
    peers, want = sort_peers(problem), order_of(problem)
    assert [c.name for c in peers] == ["liger", "transformer_engine", "megatron vllm", "torchao"]
    for peer in peers:
        if peer.why_absent is not None:
            assert "No module named" in peer.why_absent or "CUDA" in peer.why_absent
        elif peer.kind == "peer":
            got = {key: x.long() for key, x in results_of(peer).items()}
            assert_same(got, {key: want[key] for key in got})


def test_dense_routing_holds_the_choices() -> None:
    problem = make_problem(SHAPE, "zipf", torch.float32, "cpu")
    chosen_TE, weights_TE = dense_routing(problem)
    assert chosen_TE.sum(1).tolist() == [SHAPE.K] * SHAPE.T
    assert_same({"weights": weights_TE.gather(1, problem.indices_TK)}, {"weights": problem.weights_TK})
    assert not weights_TE[~chosen_TE].any()


def missing(name: str) -> Contender:
    raise ModuleNotFoundError("No module named 'gone'", name="gone")


def broken(name: str) -> Contender:
    raise RuntimeError("compiled for another torch\nand much more")


@pytest.mark.parametrize(
    ("build", "why"), [(missing, "No module named 'gone'"), (broken, "RuntimeError: compiled for another torch")]
)
def test_what_cannot_be_set_up_says_why(build: Callable[[str], Contender], why: str) -> None:
    contender = adapted("theirs", build)
    assert (contender.name, contender.why_absent) == ("theirs", why)


def test_without_a_gpu_the_vllm_kernels_say_so(problem: Problem) -> None:
    contender = next(c for c in layer_peers(problem) if c.name == "megatron vllm")
    assert contender.why_absent == "needs a CUDA device"


BROKEN_PACKAGE = "raise RuntimeError('its libraries are not there')\n"
PERMUTATION = """
import transformer_engine_torch as tex
import transformer_engine.pytorch.triton.permutation as triton_permutation
from transformer_engine.pytorch.constants import TE_DType
from transformer_engine.pytorch.quantized_tensor import QuantizedTensor, _quantized_tensor_passthrough_ops
from transformer_engine.pytorch.tensor.float8_tensor import Float8Tensor
from transformer_engine.pytorch.tensor.float8_blockwise_tensor import Float8BlockwiseQTensor
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Tensor

def moe_permute(x):
    assert not isinstance(x, (QuantizedTensor, Float8Tensor, Float8BlockwiseQTensor, MXFP8Tensor))
    return triton_permutation.KERNEL
"""


@pytest.fixture
def half_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package like Transformer Engine without its compiled part: to import it normally is an error, and not an ImportError."""
    files = {
        "transformer_engine/__init__.py": BROKEN_PACKAGE,
        "transformer_engine/common/__init__.py": BROKEN_PACKAGE,
        "transformer_engine/common/triton/__init__.py": "",
        "transformer_engine/common/triton/permutation.py": "KERNEL = 'kernel'\n",
        "transformer_engine/pytorch/__init__.py": BROKEN_PACKAGE,
        "transformer_engine/pytorch/permutation.py": PERMUTATION,
        "transformer_engine/pytorch/triton/__init__.py": BROKEN_PACKAGE,
        "transformer_engine/pytorch/triton/permutation.py": "from transformer_engine.common.triton.permutation import KERNEL\n",
        "needs_te.py": "try:\n    import transformer_engine\n    there = True\nexcept ImportError:\n    there = False\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    transformer_engine.permutation_module.cache_clear()
    yield tmp_path
    transformer_engine.permutation_module.cache_clear()
    sys.modules.pop("needs_te", None)


@pytest.mark.usefixtures("half_installed")
def test_triton_kernels_load_without_the_compiled_library() -> None:
    module = transformer_engine.permutation_module()
    assert module.moe_permute(1) == "kernel"
    assert not [name for name in sys.modules if name.startswith("transformer_engine")], "stand-ins must not stay"
    with pytest.raises(RuntimeError, match="its libraries are not there"):
        import_module("transformer_engine")


@pytest.mark.usefixtures("half_installed")
def test_megatron_does_not_see_a_package_that_cannot_be_imported() -> None:
    assert megatron._imported("needs_te").there is False


def test_replaced_modules_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "__init__.py").write_text("real = True\n")
    (tmp_path / "outer" / "inner.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    import outer  # type: ignore[import-not-found]
    import outer.inner  # type: ignore[import-not-found]

    before = (outer, outer.inner)
    with pytest.raises(ZeroDivisionError), modules_replaced("outer", {"outer": None, "other": None}):
        with pytest.raises(ImportError):
            import outer.inner
        with pytest.raises(ImportError):
            import other  # type: ignore[import-not-found]  # noqa: F401
        raise ZeroDivisionError
    assert (sys.modules["outer"], sys.modules["outer.inner"]) == before
    assert "other" not in sys.modules
    for name in ("outer", "outer.inner"):
        del sys.modules[name]
