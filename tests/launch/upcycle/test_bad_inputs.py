"""What cannot be upcycled is told before anything is written: the value, where it came from, and the way out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moefold.launch.upcycle import upcycle
from moefold.launch.upcycle.advise import advise
from moefold.launch.upcycle.progress import Bar, size
from moefold.launch.upcycle.targets import choose
from moefold.moe.config import ModelConfig
from moefold.moe.errors import CheckpointError, ConfigError, MoefoldError
from moefold.moe.hf.families import FAMILIES
from moefold.moe.hf.rules import copies


def change(**keys: Any) -> Callable[[Path], object]:
    """A change of config.json."""

    def apply(folder: Path) -> object:
        file = folder / "config.json"
        return file.write_text(json.dumps(json.loads(file.read_text()) | keys))

    return apply


def truncate(folder: Path) -> object:
    file = folder / "model.safetensors"
    return file.write_bytes(file.read_bytes()[:-8])


def lose_a_shard(folder: Path) -> object:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / names["a"])
    return (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def only_pickles(folder: Path) -> object:
    return (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


DAMAGED: list[tuple[str, Callable[[Path], object], str]] = [
    ("unknown architecture", change(model_type="lama"), "is 'lama', which is not known; did you mean 'llama'?"),
    ("refused architecture", change(model_type="opt"), "learned positions, LayerNorm"),
    ("already with experts", change(model_type="mixtral", num_local_experts=2), "lacks model.layers.0.block_sparse_moe"),
    ("quantised", change(quantization_config={"quant_method": "gptq"}), "is quantised (gptq"),
    ("unknown key", change(attention_sinks=4), "attention_sinks"),
    ("other size", change(intermediate_size=40), "has shape [48, 32], but config.json makes it [40, 32]"),
    ("truncated", truncate, "model.safetensors"),
    ("missing shard", lose_a_shard, "lacks model-00002-of-00002.safetensors of the 2 shards"),
    ("no safetensors", only_pickles, "Convert it first, with transformers"),
    ("no config.json", lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
]


@pytest.mark.parametrize(("damage", "says"), [case[1:] for case in DAMAGED], ids=[case[0] for case in DAMAGED])
def test_a_source_that_cannot_be_read(damage: Callable[[Path], object], says: str, dense_model: Any, tmp_path: Path) -> None:
    shutil.copytree(dense_model(), tmp_path / "dense")
    damage(tmp_path / "dense")
    with pytest.raises(MoefoldError) as error:
        upcycle(tmp_path / "dense", tmp_path / "out", num_experts=4)
    assert says in str(error.value) and error.value.exit_code in (2, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "upcycle.num_experts: is not set, but method 'copy' needs it"),
        ({"num_experts": 2, "top_k": 4}, "upcycle.top_k: is 4, more than num_experts = 2"),
        (
            {"method": "virtual_groups", "num_experts": 8, "granularity": 4, "top_k": 2},
            "upcycle.top_k: is 2, but only whole copies of granularity = 4 pieces give the dense FFN's output; legal: [4, 8]",
        ),
        ({"method": "virtual_groups", "num_experts": 10, "granularity": 5, "top_k": 5}, "does not cut 48 neurons evenly"),
        ({"num_experts": 4, "experts": 4}, "upcycle.experts: unknown option; did you mean 'num_experts'?"),
        (
            {"num_experts": 4, "target": "mixtrall"},
            "upcycle.target: is 'mixtrall', which is no format that is written; legal: auto",
        ),
        ({"num_experts": 4, "target": "deepseek_v3"}, "one rotary key for all heads"),
        ({"num_experts": 4, "target": "llama"}, "has layers with experts, and this format has none"),
        ({"num_experts": 4, "dtype": "int8", "proof": "some"}, "upcycle.dtype: is 'int8'; legal: None, fp32, bf16, fp16"),
        ({"num_experts": 4, "runtime": "vlm"}, "upcycle.runtime: is 'vlm'; legal: transformers, vllm"),
        ({"num_experts": 4, "proof_tokens": 0}, "for none, set proof = 'none'"),
        (
            {"num_experts": 4, "target": "mixtral", "num_shared_experts": 1},
            "exact with these options: --target qwen2_moe, --target",
        ),
        ({"num_experts": 4, "target": "glm4_moe", "order": "topk_softmax"}, "needs score = 'softmax'"),
        ({"num_experts": 4, "renormalize": False, "target": "qwen2_moe"}, "the router's weights are not normalised"),
        ({"method": "merge"}, "takes one dense model for each expert, but 1 is given"),
    ],
)
def test_options_that_do_not_fit(options: dict[str, Any], says: str, dense_model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        upcycle(dense_model(), tmp_path / "out", **options)
    assert says in str(error.value)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_over(dense_model: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="is not an empty folder"):
        upcycle(dense_model(), tmp_path, num_experts=4)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


DENSE = ModelConfig(dim=64, num_layers=4, num_heads=4, vocab_size=256, max_seq_len=128, dense_ffn_dim=256)


@pytest.mark.parametrize(("tokens", "verdict"), [(1e9, "upcycle"), (8e9, "undecided"), (4e10, "scratch")])
def test_advice_follows_from_compute(tokens: float, verdict: str) -> None:
    result = copies(DENSE, FAMILIES["mixtral"])
    advice = advise(DENSE, result, dense_tokens=1e10, tokens=tokens)
    each = result.flops_per_token(128) / DENSE.flops_per_token(128)
    assert advice.verdict == verdict and advice.ratio == pytest.approx(tokens * each / 1e10)
    assert advice.continued_tokens == pytest.approx(tokens * each)
    text = advice.render()
    assert text.startswith(advice.line) and all(f"arXiv {n}" in text for n in ("2406.06563", "2212.05055", "2502.03009"))
    assert advice.to_dict()["evidence"]
    with pytest.raises(ConfigError, match="tokens: is 0"):
        advise(DENSE, result, dense_tokens=1e10, tokens=0)


def test_a_model_with_experts_is_no_start() -> None:
    with pytest.raises(ConfigError, match="starts from a dense model, but the one given has experts already"):
        choose([copies(DENSE, FAMILIES["mixtral"])], "auto", {"num_experts": 4})


class Terminal:
    """A stream that remembers."""

    def __init__(self, live: bool):
        self.live, self.text = live, ""

    def isatty(self) -> bool:
        return self.live

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_progress_for_people_and_for_files() -> None:
    plain, live = Terminal(False), Terminal(True)
    for stream in (plain, live):
        bar = Bar(stream)  # type: ignore[arg-type]
        # 100 bytes were there already, so the speed is that of the others
        for done, seconds in ((100, 0.0), (150, 5.0), (200, 10.0), (250, 11.0), (400, 15.0)):
            bar("writing", done << 20, 400 << 20, seconds)
    assert plain.text.splitlines() == [
        "writing  50%  200.0 MiB of 400.0 MiB  10.0 MiB/s  20s left",
        "writing 100%  400.0 MiB of 400.0 MiB  20.0 MiB/s  15s",
    ]
    assert live.text.count("\r") == 5 and live.text.endswith("\n") and "[############............]  50%" in live.text
    assert [size(n) for n in (5, 2048, 3 << 20, 3 << 29)] == ["5 B", "2 KiB", "3.0 MiB", "1.50 GiB"]
