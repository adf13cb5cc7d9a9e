"""GPT-2 from a folder of transformers to our own format with experts, and what is said about it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moefold.launch.config import load
from moefold.launch.upcycle import run, upcycle
from moefold.launch.upcycle.report import ProofError
from moefold.launch.upcycle.targets import RefusedError
from moefold.moe.hf.families import read_parts
from moefold.moe.hf.files import Checkpoint
from moefold.moe.hf.matrix import Scaled
from moefold.moe.hf.shards import Tensors
from numeric import assert_same
from tiny_models import native_model, tiny_model

IDS = torch.arange(34).view(2, 17) * 7 % 37


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A folder with biases everywhere, and its logits in transformers."""
    model = tiny_model("gpt2")
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    with torch.no_grad():
        return folder, model(IDS).logits


EXACT: list[dict[str, Any]] = [
    {"num_experts": 4},
    {"method": "virtual_groups", "num_experts": 6, "granularity": 2, "top_k": 4, "shared_width": 4},
    {"method": "dense_shared", "num_experts": 3, "granularity": 2, "shared_gate": True, "renormalize": False},
    {"method": "split", "num_experts": 2, "top_k": 2, "router_init": "zeros", "dense_prefix_layers": 1},
]


@pytest.mark.parametrize("options", EXACT, ids=[options.get("method", "copy") for options in EXACT])
def test_with_experts_its_logits_are_those_of_transformers(
    options: dict[str, Any], gpt2: tuple[Path, Tensor], tmp_path: Path
) -> None:
    folder, want = gpt2
    result = upcycle(folder, tmp_path / "out", target="native", proof_tokens=24, **options)
    assert result.proof is not None and result.proof.passed and result.proof.exact and result.proof.worst.worst < 1e-5
    config, parts = read_parts(Checkpoint.open(result.folder))
    assert config == result.config == load(str(result.folder / "pretrain.toml")).config.model
    assert config.positions == "learned" and config.moe is not None
    with torch.no_grad():
        got = native_model(config, parts)(IDS)[0]
    assert_same({"logits": got}, {"logits": want}, 1e-5)


@pytest.fixture(scope="module")
def halves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model in 16 bits."""
    folder = tmp_path_factory.mktemp("halves")
    tiny_model("gpt2").to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_in_16_bits_what_is_only_transposed_is_not_rounded(halves: Path, tmp_path: Path) -> None:
    result = upcycle(halves, tmp_path / "out", target="native", num_experts=4, proof_tokens=24)
    assert result.proof is not None and result.proof.passed and result.proof.stored_dtype == "BF16"
    assert result.proof.tolerance == 1e-5 > result.proof.worst.worst and "no weight was rounded" in result.proof.tolerance_says
    [origin] = result.manifest["sources"]
    assert {use["use"] for use in origin["tensors"].values()} == {"copied"}


def test_in_16_bits_a_projection_that_is_one_percent_off_fails(
    halves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, name = run.write_checkpoint, "layers.1.moe.experts.w2_EDF"

    def spoil(folder: Path, config: dict[str, Any], tensors: Tensors, **options: Any) -> Any:
        matrix, dtype = tensors[name]
        return write(folder, config, {**tensors, name: (Scaled(matrix, 1.01), dtype)}, **options)

    monkeypatch.setattr(run, "write_checkpoint", spoil)
    with pytest.raises(ProofError, match="does NOT compute what the dense model does"):
        upcycle(halves, tmp_path / "out", target="native", num_experts=4, proof_tokens=24)


def test_no_other_format_is_chosen(gpt2: tuple[Path, Tensor], tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="positions is 'learned'") as error:
        upcycle(gpt2[0], tmp_path / "out", target="mixtral", num_experts=4)
    assert "exact with these options: --target native" in str(error.value)
