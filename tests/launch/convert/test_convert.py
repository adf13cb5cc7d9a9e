"""Conversion between Hugging Face folders and training checkpoints: all families come back bit by bit."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moefold.launch.convert import native_write
from moefold.launch.convert.compare import check
from moefold.launch.convert.run import NotConvertedError, export_checkpoint, grow, import_checkpoint
from moefold.launch.convert.source import open_hf, open_source
from moefold.launch.resume import decide_resume
from moefold.moe.errors import CheckpointError, ConfigError
from moefold.moe.hf.families import FAMILIES, family_of
from moefold.moe.hf.files import Checkpoint
from tiny_models import stored, tiny_model

ONE_EACH = ("llama-bias-llama3-tied", "mistral", "qwen2", "qwen3", "olmo2", "gemma", "gpt2", "mixtral")
ONE_EACH += ("qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "glm4_moe", "granitemoe")
TOKENS_BS = torch.arange(10).view(1, 10) * 7 % 37


def save(name: str, folder: Path, dtype: torch.dtype = torch.bfloat16, wide: str = "") -> Path:
    """A tiny model of transformers in a folder with a tokenizer; parameters with `wide` in their names in float32."""
    model = tiny_model(name).to(dtype)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if wide and wide in parameter_name:
                parameter.data = torch.linspace(-1e-9, 0.1, parameter.numel()).view(parameter.shape)
    model.config.bos_token_id = 3
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def contents(folder: Path) -> dict[str, tuple[str, bytes]]:
    """dtype and bytes of every tensor."""
    return {name: (tensor.dtype, stored(tensor)) for name, tensor in Checkpoint.open(folder).tensors.items()}


def test_one_of_each_family_is_converted() -> None:
    kinds = {name.split("-")[0] for name in ONE_EACH}
    assert kinds | {"moefold"} == set(FAMILIES)


@pytest.mark.parametrize("name", ONE_EACH)
def test_there_and_back_every_bit_is_the_same(name: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "hf")
    imported = import_checkpoint(folder, tmp_path / "native", shard_bytes=2048)
    assert check(folder, tmp_path / "native").same
    assert len(list((tmp_path / "native").glob("*.distcp"))) > 1
    exported = export_checkpoint(tmp_path / "native", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    before, after = (Checkpoint.open(path).config for path in (folder, tmp_path / "again"))
    assert family_of(after).read(after) == family_of(before).read(before)
    assert (after["model_type"], after["dtype"], after["bos_token_id"]) == (before["model_type"], before["dtype"], 3)
    assert exported.rewrites == () and exported.target == imported.source.family == before["model_type"]
    assert exported.carried == ("generation_config.json", "tokenizer.json")
    # and from there once more
    import_checkpoint(tmp_path / "again", tmp_path / "native2")
    assert check(tmp_path / "native", tmp_path / "native2").same
    metas = [json.loads((tmp_path / n / "complete.json").read_text()) for n in ("native", "native2")]
    assert all(metas[0][key] == metas[1][key] for key in ("model", "names", "shapes", "step", "imported"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "hf", "native", "native2"]


@pytest.mark.parametrize(("name", "wide"), [("gemma", "norm"), ("glm4_moe", "mlp.gate.weight")])
def test_parts_in_float32_stay_so_and_small_norms_of_gemma_keep_their_bits(name: str, wide: str, tmp_path: Path) -> None:
    folder = save(name, tmp_path / "hf", wide=wide)
    assert {dtype for dtype, _ in contents(folder).values()} == {"BF16", "F32"}
    import_checkpoint(folder, tmp_path / "native")
    export_checkpoint(tmp_path / "native", tmp_path / "again")
    assert contents(tmp_path / "again") == contents(folder)
    assert check(folder, tmp_path / "again").same


@pytest.mark.parametrize(("dtype", "name"), [(torch.float16, "F16"), (torch.float32, "F32"), (torch.float64, "F64")])
def test_every_dtype_comes_back(dtype: torch.dtype, name: str, tmp_path: Path) -> None:
    folder = save("mixtral", tmp_path / "hf", dtype)
    import_checkpoint(folder, tmp_path / "native")
    exported = export_checkpoint(tmp_path / "native", tmp_path / "again")
    assert exported.dtype == name
    assert contents(tmp_path / "again") == contents(folder)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A Mixtral in bfloat16, and the training checkpoint made of it."""
    root = tmp_path_factory.mktemp("mixtral")
    folder = save("mixtral", root / "hf")
    import_checkpoint(folder, root / "native", shard_bytes=2048)
    return folder, root / "native"


def trained(native: Path, out: Path) -> Path:
    """The same checkpoint as training would have saved it: nothing says what it was imported from."""
    from moefold.launch.checkpoint import write_complete

    shutil.copytree(native, out)
    meta = json.loads((out / "complete.json").read_text())
    write_complete(out, {key: value for key, value in meta.items() if key not in ("imported", "crc32")})
    return out


def test_what_was_trained_is_written_as_what_can_hold_it(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    native = trained(mixtral[1], tmp_path / "trained")
    with pytest.raises(
        NotConvertedError, match=r"target: is not set, and .* was trained here; these can hold the model: mixtral"
    ):
        export_checkpoint(native, tmp_path / "out")
    full = export_checkpoint(native, tmp_path / "full", target="mixtral")
    assert full.dtype == "F32" and "rounded" not in full.render()
    half = export_checkpoint(native, tmp_path / "half", target="mixtral", dtype="bf16")
    assert half.dtype == "BF16" and "rounded to BF16" in half.render() and "there is no tokenizer" in half.render()
    like = export_checkpoint(native, tmp_path / "like", like=mixtral[0])
    assert (like.target, like.dtype, like.carried) == ("mixtral", "BF16", ("generation_config.json", "tokenizer.json"))
    assert contents(tmp_path / "like") == contents(tmp_path / "half") == contents(mixtral[0])
    other = export_checkpoint(native, tmp_path / "qwen", target="qwen2_moe")
    assert [rewrite.name for rewrite in other.rewrites] == ["zero_qkv_bias"] or other.rewrites == ()
    own = export_checkpoint(native, tmp_path / "own", target="native")
    assert own.target == "moefold" and check(tmp_path / "own", native).same


def test_a_selection_bias_of_a_trained_model_is_not_rounded(tmp_path: Path) -> None:
    import_checkpoint(save("glm4_moe", tmp_path / "hf", torch.float32), tmp_path / "native")
    export_checkpoint(trained(tmp_path / "native", tmp_path / "trained"), tmp_path / "out", target="glm4_moe", dtype="bf16")
    kinds = {name: dtype for name, (dtype, _) in contents(tmp_path / "out").items()}
    assert {name.rsplit(".", 1)[-1] for name, dtype in kinds.items() if dtype == "F32"} == {"e_score_correction_bias"}


def test_a_target_that_cannot_hold_the_model_is_refused_with_all_reasons_and_the_alternatives(tmp_path: Path) -> None:
    import_checkpoint(save("granitemoe", tmp_path / "hf"), tmp_path / "native")
    for target, said in (("llama", ["has layers with experts", "granitemoe"]), ("phi3", ["is 'phi3'", "granitemoe"])):
        with pytest.raises(NotConvertedError) as error:
            export_checkpoint(tmp_path / "native", tmp_path / "out", target=target)
        assert all(words in str(error.value) for words in (*said, "these can hold the model")), error.value
        assert error.value.exit_code == 2
    with pytest.raises(NotConvertedError, match=r"the model class has no biases.*\n  instead: no format .* for vllm"):
        export_checkpoint(tmp_path / "native", tmp_path / "out", runtime="vllm")
    assert not (tmp_path / "out").exists()


# --- damaged and foreign input ----------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("__0_1_0.distcp", cut, "it is truncated or was changed"),
        ("__0_1_0.distcp", flip, r"does not hold what was written \(CRC-32 differs\)"),
        ("__0_1_0.distcp", Path.unlink, "__0_1_0.distcp is missing"),
        (".metadata", flip, "CRC-32 differs"),
        ("complete.json", flip, "complete.json cannot be read"),
        ("complete.json", Path.unlink, "it was not written to its end"),
    ],
)
def test_damaged_checkpoints_are_refused(
    mixtral: tuple[Path, Path], tmp_path: Path, file: str, damage: Callable[[Path], None], said: str
) -> None:
    native = tmp_path / "native"
    shutil.copytree(mixtral[1], native)
    damage(native / file)
    with pytest.raises(CheckpointError, match=said):
        export_checkpoint(native, tmp_path / "out")
    with pytest.raises(CheckpointError, match=said):
        check(native, mixtral[1])


def test_what_is_neither_of_both_is_said_to_be_so(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a folder"):
        import_checkpoint(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"neither a Hugging Face folder .* nor a checkpoint"):
        import_checkpoint(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a training checkpoint already"):
        import_checkpoint(mixtral[1], tmp_path / "out")
    with pytest.raises(CheckpointError, match="is a Hugging Face folder: make one of it with `moefold convert import"):
        decide_resume("auto", None, False, str(mixtral[0]))
    with pytest.raises(CheckpointError, match="no complete checkpoint there; check the path"):
        decide_resume("auto", None, False, str(tmp_path))


def test_nothing_is_written_over(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("")
    for write in (import_checkpoint, export_checkpoint):
        with pytest.raises(CheckpointError, match="exists and is not an empty folder"):
            write(mixtral[0], out)
    (out / "mine").rename(tmp_path / "mine")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "mine").rename(tmp_path / "out.partial" / "mine")
    with pytest.raises(CheckpointError, match=r"has mine but no import.lock, so it is not an interrupted import"):
        import_checkpoint(mixtral[0], out)
    assert (tmp_path / "out.partial" / "mine").is_file()


def test_an_import_that_fails_leaves_no_checkpoint_and_says_how_to_go_on(
    mixtral: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = tmp_path / "hf", tmp_path / "out"
    shutil.copytree(mixtral[0], folder)
    source = open_hf(folder)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(CheckpointError, match="inside a tensor: it is truncated"):
        native_write.write_native(out, source.config, source.parts, imported={}, texts={}, shard_bytes=2048)
    assert not out.exists() and list((tmp_path / "out.partial").glob("*.distcp"))
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(
        CheckpointError, match=r"was begun with other options, sources or another version.*or remove .*out.partial"
    ):
        import_checkpoint(folder, out)
    shutil.rmtree(tmp_path / "out.partial")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", full)
        with pytest.raises(CheckpointError, match=r"cannot be written: OSError: .*No space left"):
            import_checkpoint(folder, out)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(torch, "save", interrupted)
        import_checkpoint(folder, out)
    import_checkpoint(folder, out)
    assert check(folder, out).same and not (tmp_path / "out.partial").exists()


# --- comparison -------------------------------------------------------------------------------------------------------


def test_differences_are_found_and_measured(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(mixtral[0], tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors["model.norm.weight"][5] += 0.5
    tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
    tensors["model.layers.1.self_attn.q_proj.weight"][0, 0] = 0.0
    save_file(tensors, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4, "max_position_embeddings": 16}))
    for other in mixtral:
        found = check(other, tmp_path / "other")
        assert found.exit_code == 3 and not found.same
        by_part = {difference.part: difference for difference in found.different}
        assert sorted(by_part) == ["head.norm", "layers.0.attention.q", "layers.1.attention.q"]
        assert by_part["head.norm"].most == pytest.approx(0.5, rel=0.02)
        assert by_part["layers.0.attention.q"].most == np.inf
        assert "1 of 256 values differ" in by_part["layers.1.attention.q"].what
        assert found.config == (("norm_eps", 1e-6, 1e-4),) or found.config == (("norm_eps", 1e-5, 1e-4),)
        assert [row[0] for row in found.use] == ["max_seq_len"]
        assert "different models" in found.render() and "head.norm: 1 of 16 values differ, by 0.5" in found.render()
        assert json.loads(json.dumps(found.to_dict()))["same"] is False


def test_zeros_of_other_signs_are_other_bits(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for name, zero in (("a", 0.0), ("b", -0.0)):
        shutil.copytree(mixtral[0], tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors["model.norm.weight"][5] = zero
        save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    (difference,) = check(tmp_path / "a", tmp_path / "b").different
    assert (difference.part, difference.most) == ("head.norm", 0.0)


def test_other_models_differ_in_parts_and_shapes(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    found = check(mixtral[0], save("qwen3", tmp_path / "qwen3"))
    said = {difference.part: difference.what for difference in found.different}
    assert said["layers.0.moe.router"] == "only in A" and said["layers.0.ffn.gate"] == "only in B"
    assert said["layers.0.attention.q"] == "shape [16, 16] in A, [24, 16] in B"
    assert {"qk_norm", "moe.num_experts", "head_dim", "moe_layers"} <= {row[0] for row in found.config}
    assert "and" in found.render() and "more, of smaller differences" in found.render()


def test_settings_that_say_the_same_are_no_difference(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    from moefold.launch.checkpoint import write_complete

    native = trained(mixtral[1], tmp_path / "trained")
    meta = json.loads((native / "complete.json").read_text())
    moe = meta["model"]["moe"]
    moe["router"] |= {"order": "topk_softmax", "renormalize": False}
    moe["balance"]["aux_loss_coeff"] = 0.5
    meta["model"] |= {"head_dim": 4, "attention_scale": 0.5}
    write_complete(native, {key: value for key, value in meta.items() if key != "crc32"})
    found = check(mixtral[0], native)
    assert found.same and [row[0] for row in found.use] == ["moe.balance.aux_loss_coeff"]
    assert "moe.balance.aux_loss_coeff, which is not of the function" in found.render()


# --- growth and the command ---------------------------------------------------------------------------------------------


def logits(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS_BS).logits


def test_a_wider_model_computes_the_same_and_a_deeper_one_repeats_layers(tmp_path: Path) -> None:
    folder = save("qwen3", tmp_path / "hf", torch.float32)
    wide = grow(folder, tmp_path / "wide", ffn_times=2)
    assert wide.target == "qwen3" and "computes what the source does" in wide.render()
    assert torch.allclose(logits(tmp_path / "wide"), logits(folder), atol=1e-4)
    assert open_source(tmp_path / "wide").config.dense_ffn_dim == 48
    grow(folder, tmp_path / "deep", depth_times=2)
    before, after = (open_source(path).parts for path in (folder, tmp_path / "deep"))
    assert stored(after["layers.3.ffn.up"]) == stored(after["layers.1.ffn.up"]) == stored(before["layers.1.ffn.up"])
    assert logits(tmp_path / "deep").shape == logits(folder).shape
    with pytest.raises(ConfigError, match="give exactly one of them"):
        grow(folder, tmp_path / "none")
    with pytest.raises(ConfigError, match="times: is 0, but must be at least 1"):
        grow(folder, tmp_path / "none", depth_times=0)


def test_the_verbs(mixtral: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from argparse import ArgumentParser

    from moefold.launch.verbs_convert import VERBS

    def run(name: str, *words: object) -> int:
        parser = ArgumentParser()
        VERBS[name].options(parser)
        return VERBS[name].run(parser.parse_args([str(word) for word in words]), {})

    native, again = tmp_path / "native", tmp_path / "again"
    assert run("convert import", mixtral[0], native) == 0
    assert f"moefold pretrain {native / 'model.toml'} TRAIN.toml --checkpoint.init_from {native}" in capsys.readouterr().out
    assert run("convert export", native, again, "--dtype", "fp32", "--json") == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "F32"
    assert run("convert check", native, again) == 0
    assert "same model" in capsys.readouterr().out
    assert run("convert grow", again, tmp_path / "grown", "--depth-times", 2) == 0
    assert run("convert check", native, tmp_path / "grown", "--json") == 3
    assert all(name.startswith("convert ") and verb.examples for name, verb in VERBS.items())
    for example in (line.split() for verb in VERBS.values() for line in verb.examples if line.startswith("moefold convert")):
        parser = ArgumentParser()
        VERBS[" ".join(example[1:3])].options(parser)
        parser.parse_args(example[3:])


def test_help_and_folders_of_hugging_face_need_no_torch() -> None:
    code = "import sys, moefold.launch.verbs_convert as v; assert not {'torch', 'numpy'} & set(sys.modules)\n"
    code += "import moefold.launch.convert.run, moefold.launch.convert.compare; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
