"""One upcycling from beginning to end: proof, manifest, interruptions, results that fail, the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moefold.launch.config import load
from moefold.launch.upcycle import upcycle
from moefold.launch.upcycle.report import ProofError
from moefold.launch.upcycle.targets import RefusedError
from moefold.launch.upcycle.tokens import proof_tokens
from moefold.launch.verb import Verb
from moefold.moe.errors import CheckpointError, ConfigError
from moefold.moe.hf.files import file_sha256

SIZES: dict[str, Any] = {"num_experts": 4, "proof_tokens": 24}


def files(folder: Path) -> dict[str, bytes]:
    """What does not tell when it was made."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith("upcycle.")}


def test_an_exact_result_is_proven_and_explains_itself(dense_model: Any, tmp_path: Path) -> None:
    source, said, stages = dense_model("Qwen2, Qwen2.5"), [], []
    result = upcycle(source, tmp_path / "out", **SIZES, say=said.append, progress=lambda *step: stages.append(step))
    proof = result.proof
    assert proof is not None and proof.passed and proof.exact and result.exit_code == 0
    assert 0 <= proof.worst.worst < 1e-5 and proof.end.worst < 1e-5 and proof.end.kl < 1e-9 and proof.end.top1 == 1
    assert [(layer.layer, layer.experts) for layer in proof.layers] == [(0, True), (1, True)]
    assert "ids drawn with seed 0, as there is no tokenizer.json" in proof.tokens
    assert said[0].startswith("format qwen2_moe: exact\nnot mixtral: cannot hold it: attention_bias is 'qkv'")
    assert [stage for i, (stage, *_) in enumerate(stages) if i == 0 or stages[i - 1][0] != stage] == [
        "hashing",
        "writing",
        "proof",
    ]
    assert all(0 <= done <= total for _, done, total, _ in stages) and stages[-1][1] == stages[-1][2]
    manifest = json.loads((result.folder / "moefold.json").read_text())
    [origin] = manifest["sources"]
    assert origin["files"]["model.safetensors"]["sha256"] == file_sha256(source / "model.safetensors")
    assert origin["tensors"]["model.layers.0.mlp.up_proj.weight"] == {
        "use": "copied",
        "into": 4,
        "first": "model.layers.0.mlp.experts.0.up_proj.weight",
    }
    assert manifest["options"]["seed"] == 0 and manifest["exact"] and manifest["gap"] is None
    told = json.loads((result.folder / "upcycle.json").read_text())
    assert told == json.loads(json.dumps(result.to_dict())) and told["proof"]["passed"]
    page = (result.folder / "upcycle.html").read_text()
    assert "computes what the dense model does" in page and "<svg" in page and 'src="http' not in page
    assert "computes what the dense model does" in result.render() and result._repr_html_().startswith("<iframe")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_weights_in_16_bits_are_compared_in_both_types(dense_model: Any, tmp_path: Path) -> None:
    """Gemma's embedding is scaled and its norms are added to 1, and experts are cut in three: all of this is rounded again."""
    source = dense_model("Gemma 1", torch.bfloat16)
    sizes = {"method": "virtual_groups", "num_experts": 6, "granularity": 3, "top_k": 3, "target": "mixtral", "proof_tokens": 24}
    result = upcycle(source, tmp_path / "out", **sizes)
    proof = result.proof
    assert proof is not None and proof.passed and proof.stored is not None
    assert 1e-5 < proof.worst.worst < proof.tolerance == pytest.approx(1e-5 + 2**-6)
    assert proof.stored_dtype == "BF16" and proof.worst.worst < (proof.layers[1].stored_worst or 0) < 0.1
    table = result.manifest["sources"][0]["tensors"]
    assert table["model.layers.0.mlp.down_proj.weight"]["by"] == ["times 3"]
    assert "weighted sum" in table["model.norm.weight"]["by"]
    assert "glm4_moe and native can" in result.render()
    # powers of two round nothing
    sizes |= {"num_experts": 8, "granularity": 2, "top_k": 2}
    exact = upcycle(dense_model("Llama 1-3", torch.bfloat16), tmp_path / "two", **sizes).proof
    assert exact is not None and exact.tolerance == 1e-5 > exact.worst.worst


def test_another_type_and_our_own_format(dense_model: Any, tmp_path: Path) -> None:
    """float32 to bfloat16: compared with the dense model rounded alike. One layer stays dense."""
    sizes = {**SIZES, "target": "native", "dtype": "bf16", "dense_prefix_layers": 1, "shared_width": 8}
    result = upcycle(dense_model("OLMo 2"), tmp_path / "out", **sizes)
    proof = result.proof
    assert proof is not None and proof.passed and proof.tolerance == 1e-5 + 2**-6 and "rounded to BF16" in proof.against
    assert [layer.experts for layer in proof.layers] == [False, True] and proof.layers[0].worst == 0
    config = load(str(result.folder / "pretrain.toml")).config
    assert config.model == result.config and config.train.precision == "bf16"
    assert config.checkpoint.init_from == str(tmp_path / "out-native")


def test_an_inexact_method_needs_leave_and_states_its_gap(dense_model: Any, tmp_path: Path) -> None:
    sizes = {**SIZES, "method": "drop", "target": "mixtral"}
    with pytest.raises(RefusedError, match=r"50 % stay whole.*\n.*exact are the methods copy, virtual_groups and dense_shared"):
        upcycle(dense_model(), tmp_path / "out", **sizes)
    result = upcycle(dense_model(), tmp_path / "out", **sizes, inexact_ok=True)
    proof = result.proof
    assert proof is not None and proof.passed and not proof.exact and result.exit_code == 0 and result.tone == "warn"
    assert proof.worst.worst > 0.01 and proof.end.kl > 1e-4
    assert "50 % stay whole" in (result.folder / "upcycle.html").read_text()
    assert result.manifest["sources"][0]["tensors"]["model.layers.0.mlp.up_proj.weight"]["by"] == ["partly drawn anew"]


def test_several_models_are_merged(dense_model: Any, tmp_path: Path) -> None:
    sources = [dense_model(), dense_model("Llama 1-3", torch.bfloat16)]
    result = upcycle(sources, tmp_path / "out", method="merge", target="mixtral", inexact_ok=True, proof="none")
    assert result.config.moe is not None and result.config.moe.num_experts == 2
    assert [s["dtype"] for s in result.manifest["sources"]] == ["F32", "BF16"]
    assert result.tone == "warn" and "nobody has compared it" in result.line
    assert "the same command with --proof full does" in result.page()


class Killed(BaseException):
    pass


def killer(stage: str, part: float) -> Callable[[str, int, int, float], None]:
    """Ends a run at some point."""

    def progress(now: str, done: int, total: int, seconds: float) -> None:
        if now == stage and done >= part * total:
            raise Killed

    return progress


@pytest.mark.parametrize(("stage", "part"), [("writing", 0.5), ("proof", 0.3)])
def test_the_same_call_goes_on_with_an_interrupted_run(stage: str, part: float, dense_model: Any, tmp_path: Path) -> None:
    whole = upcycle(dense_model(), tmp_path / "whole", **SIZES, proof="none").folder
    source, out = dense_model(), tmp_path / "out"
    with pytest.raises(Killed):
        upcycle(source, out, **SIZES, progress=killer(stage, part))
    assert not out.exists()
    stages = []
    with pytest.raises(CheckpointError, match="other options"):
        upcycle(source, out, **SIZES, seed=1)
    result = upcycle(source, out, **SIZES, progress=lambda now, *_: stages.append(now))
    # sources are not read again, and files that are complete not written again
    assert set(stages) == ({"writing", "proof"} if stage == "writing" else {"proof"})
    assert (result.written is None) == (stage == "proof")
    ours, wanted = files(out), files(whole)
    names = ours.pop("pretrain.toml").decode(), wanted.pop("pretrain.toml").decode()
    assert names[0] == names[1].replace(str(whole), str(out)).replace("whole", "out")
    assert ours == wanted
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "whole"]
    with pytest.raises(CheckpointError, match="an upcycled model that is complete"):
        upcycle(source, out, **SIZES)
    # what was not proven at first can be later, but only as what it is
    with pytest.raises(CheckpointError, match="whole was made with other options"):
        upcycle(source, whole, **SIZES, seed=1)
    if stage == "proof":
        later = upcycle(source, whole, **SIZES)
        assert (
            later.written is None
            and later.proof is not None
            and later.proof.passed
            and files(whole).keys() == ours.keys() | {"pretrain.toml"}
        )


@pytest.mark.parametrize(("value", "says"), [(0.5, "does NOT compute what the dense model does"), (np.nan, "not finite")])
def test_a_result_that_fails_its_proof_is_put_aside(value: float, says: str, dense_model: Any, tmp_path: Path) -> None:
    """The last values written are spoilt before they are read back."""

    def spoil(stage: str, done: int, total: int, seconds: float) -> None:
        if stage == "writing" and done == total:
            file = tmp_path / "out.unproven.partial" / "model.safetensors"
            raw = bytearray(file.read_bytes())
            at = raw.index(b"}}") + 2
            raw[-4096:] = np.full(1024, value, "<f4").tobytes()
            assert at < len(raw) - 4096
            file.write_bytes(raw)

    (tmp_path / "out.failed-proof").mkdir()
    with pytest.raises(ProofError, match=says) as error:
        upcycle(dense_model(), tmp_path / "out", **SIZES, progress=spoil)
    aside = tmp_path / "out.failed-proof-1"
    assert error.value.exit_code == 3 and error.value.path == aside and error.value.result.exit_code == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.failed-proof", aside.name]
    assert not (aside / "config.json").exists() and (aside / "config.failed-proof.json").exists()
    assert says in (aside / "upcycle.html").read_text()
    proof = json.loads((aside / "upcycle.json").read_text(), parse_constant=pytest.fail)["proof"]
    assert not proof["passed"] and (proof["end"]["worst"] is None) == np.isnan(value)


def test_real_text_is_used_where_the_tokenizer_can_be_read(dense_model: Any, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<|endoftext|>": 0, "?": 1, "the": 2, "a": 3, "of": 4, ".": 5, "(": 6}
    backend = Tokenizer(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    found = proof_tokens(tmp_path, 61, 200, 450, seed=0)
    assert found.ids_BS.shape == (2, 200) and "Python documentation and library" in found.says
    assert set(found.ids_BS.reshape(-1).tolist()) > {0, 1, 2, 3, 4}
    assert "its tokenizer has ids up to 6, the model only up to 4" in proof_tokens(tmp_path, 5, 16, 40, seed=0).says
    (tmp_path / "tokenizer.json").write_text("{")
    drawn = proof_tokens(tmp_path, 61, 16, 40, seed=0)
    assert "not a readable tokenizer.json" in drawn.says and 30 < drawn.ids_BS.max() < 61
    assert np.array_equal(drawn.ids_BS, proof_tokens(tmp_path / "none", 61, 16, 40, seed=0).ids_BS)


def test_files_are_written_without_torch(dense_model: Any, tmp_path: Path) -> None:
    code = (
        "import sys; from moefold.launch.upcycle import upcycle;"
        f"r = upcycle({str(dense_model())!r}, {str(tmp_path / 'out')!r}, num_experts=4, proof='none');"
        "print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules)), r.peak_bytes < 100e6)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[] True"


def run(verb: Verb, *words: str) -> int:
    """As the command line does it."""
    import argparse

    parser = argparse.ArgumentParser()
    verb.options(parser)
    return verb.run(parser.parse_args(words), {})


def test_the_command(dense_model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moefold.launch.upcycle.verbs_upcycle import VERBS

    verb, source = VERBS["upcycle"], str(dense_model())
    words = ["--from", source, "--to", str(tmp_path / "out"), "--experts", "4", "--proof", "none", "--json"]
    assert run(verb, *words, "--renormalize", "true", "--router-std", "0.01") == 0
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert told["options"]["router_std"] == 0.01 and told["target"] == "mixtral"
    assert "format mixtral: exact" in captured.err and "writing 100%" in captured.err and "\r" not in captured.err
    assert run(verb, "--list") == 0
    captured = capsys.readouterr()
    assert "for transformers: = exact, (=) exact after a rewrite, x impossible" in captured.out
    assert "Qwen3, mixtral, qwen2_moe, granitemoe: qk_norm is 'head'" in captured.out
    assert run(verb, "--list", "--json", "--runtime", "vllm") == 0
    cells = {(cell["dense"], cell["target"]): cell for cell in json.loads(capsys.readouterr().out)}
    assert cells["Llama 1-3", "qwen2_moe"]["rewrites"] == ["zero_qkv_bias"]
    with pytest.raises(ConfigError, match="--to: is missing"):
        run(verb, "--from", source)
    assert run(verb, "--advise", "--from", source, "--experts", "4", "--dense-tokens", "1e9", "--tokens", "3e9") == 0
    assert "train from scratch: the budget is 4.07 times" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"--losses: none.csv cannot be read"):
        words = ["--advise", "--from", source, "--experts", "4", "--dense-tokens", "1e9", "--tokens", "3e9"]
        run(verb, *words, "--losses", "none.csv")


@pytest.mark.parametrize(("top_k", "limited", "noted"), [(2, None, True), (4, None, False), (2, False, False)])
def test_a_choice_of_copies_that_no_loss_trains_is_noted(
    top_k: int, limited: bool | None, noted: bool, dense_model: Any, tmp_path: Path
) -> None:
    sizes = {"method": "virtual_groups", "num_experts": 8, "granularity": 2, "top_k": top_k, "group_limited": limited}
    result = upcycle(dense_model("Llama 1-3"), tmp_path / "out", target="glm4_moe", proof="none", **sizes)
    assert any("does not train the choice of copies" in note for note in result.notes) == noted
