"""What a dense model sees of several domains: against transformers, and what upcycling makes of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moefold.launch.cli import main
from moefold.launch.data.indexed import IndexedWriter
from moefold.launch.upcycle import upcycle
from moefold.launch.upcycle.record import RecordResult, record_dense
from moefold.launch.upcycle.record_files import ActivationFiles
from moefold.launch.upcycle.record_layers import gate_activations
from moefold.launch.upcycle.record_tokens import Domain
from moefold.moe.errors import CheckpointError, MoefoldError
from moefold.moe.experts import FeedForward, FfnKind

WORDS = {"code": range(2, 5), "law": range(5, 8), "news": range(8, 11)}
"""Ids of the words that each domain is written in."""
SEQ_LEN, TOKENS = 16, 40
"""Two whole sequences of each domain, and half of one."""


def domain_ids(name: str) -> Any:
    """What the tokenizer makes of a domain's text: lines of 19 words and the end of a document, cut at TOKENS."""
    return np.tile(np.append(np.resize(np.array(WORDS[name]), 19), 0), 4)[:TOKENS]


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text of each domain: two files and a .jsonl."""
    folder = tmp_path_factory.mktemp("texts")
    documents = {name: [" ".join(f"w{i}" for i in np.resize(np.array(WORDS[name]), 19))] * 4 for name in WORDS}
    for name in ("code", "law"):
        (folder / name).mkdir()
        for i, text in enumerate(documents[name]):
            (folder / name / f"{i}.txt").write_text(text)
    (folder / "news.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in documents["news"]))
    return folder


@pytest.fixture(scope="session")
def spoken_model(dense_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a dense model with a tokenizer of 61 words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folders: dict[str, Path] = {}

    def saved(name: str = "Llama 1-3") -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("spoken") / "dense"
            shutil.copytree(dense_model(name), folders[name])
            words = {"<|endoftext|>": 0, "?": 1} | {f"w{i}": i for i in range(2, 61)}
            backend = Tokenizer(models.WordLevel(words, unk_token="?"))
            backend.pre_tokenizer = pre_tokenizers.Whitespace()
            backend.save(str(folders[name] / "tokenizer.json"))
        return folders[name]

    return saved


def domains(texts: Path) -> list[Domain]:
    paths = {"code": "code", "law": "law", "news": "news.jsonl"}
    return [Domain(name=name, path=str(texts / path)) for name, path in paths.items()]


def record(model: Path, out: Path, texts: Path, **options: Any) -> RecordResult:
    chosen = {"tokens_per_domain": TOKENS, "seq_len": SEQ_LEN, "field": "body", **options}
    return record_dense(model, out, domains(texts), **chosen)


def seen_by_transformers(folder: Path, ids_T: Any) -> tuple[list[Any], list[Any]]:
    """For each layer, (inputs [T, D] of the feed-forward network, its gate's activations [T, F]) in float32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    inputs: list[list[Tensor]] = [[] for _ in model.model.layers]
    gates: list[list[Tensor]] = [[] for _ in model.model.layers]
    for i, layer in enumerate(model.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, given, i=i: inputs[i].append(given[0][0]))
        layer.mlp.gate_proj.register_forward_hook(lambda _, __, out, i=i, act=layer.mlp.act_fn: gates[i].append(act(out[0])))
    with torch.no_grad():
        for row in torch.from_numpy(ids_T).split(SEQ_LEN):
            model(row[None])
    return [torch.cat(found).numpy() for found in inputs], [torch.cat(found).numpy() for found in gates]


@pytest.mark.parametrize("name", ["Llama 1-3", "OLMo 2", "Gemma 1", "Mistral, sliding window"])
def test_centroids_are_means_of_what_a_router_would_see(name: str, spoken_model: Any, texts: Path, tmp_path: Path) -> None:
    """OLMo 2 has its norm behind the network: there it is the residual stream."""
    model = spoken_model(name)
    result = record(model, tmp_path / "seen", texts, activations_tokens=20)
    found = np.load(tmp_path / "seen" / "centroids.npz")
    assert found.files == ["layers.0", "layers.1"]
    took = []
    for d, domain in enumerate(WORDS):
        inputs, gates = seen_by_transformers(model, domain_ids(domain))
        for layer in range(2):
            wanted = inputs[layer].astype(np.float64).mean(axis=0)
            assert np.abs(found[f"layers.{layer}"][d] - wanted).max() < 1e-5 * max(1, np.abs(wanted).max())
        took.append(gates)
    # 20 tokens of three domains: 7, 7 and 6, evenly spread
    picks = [np.arange(count) * TOKENS // count for count in (7, 7, 6)]
    for layer in range(2):
        wanted = np.concatenate([gates[layer][picked] for gates, picked in zip(took, picks, strict=True)])
        stored = np.load(tmp_path / "seen" / "activations" / f"layers.{layer}.npy")
        assert stored.dtype == np.float32
        np.testing.assert_allclose(stored, wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())
    about = json.loads((tmp_path / "seen" / "record.json").read_text())
    assert about == result.record and about["experts"] == 3 and about["layers"] == [0, 1]
    assert [(d["name"], d["kind"], d["tokens"], d["activations_tokens"]) for d in about["domains"]] == [
        ("code", "text", TOKENS, 7),
        ("law", "text", TOKENS, 7),
        ("news", "jsonl", TOKENS, 6),
    ]


def test_domains_find_their_experts_in_the_upcycled_model(spoken_model: Any, texts: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model, seen = spoken_model(), tmp_path / "seen"
    result = record(model, seen, texts)
    options = {"num_experts": 3, "router_init": "centroids", "centroids": str(seen / "centroids.npz"), "target": "mixtral"}
    upcycle(model, tmp_path / "out", **options, proof="none")
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    for d, name in enumerate(WORDS):
        counts = torch.zeros(2)
        for row in torch.from_numpy(domain_ids(name)).split(SEQ_LEN):
            with torch.no_grad():
                logits = moe(row[None], output_router_logits=True).router_logits
            counts += torch.tensor([int((layer.view(-1, 3).argmax(-1) == d).sum()) for layer in logits])
        shares = (counts / TOKENS).tolist()
        assert min(shares) > 0.85, (name, shares)
        # what the recording has promised, before anything was upcycled
        assert [result.record["own_share"][str(layer)][d] for layer in range(2)] == pytest.approx(shares, abs=1e-4)
    assert "nearest to a centroid of their own" in result.render() and "by chance 33%" in result.render()


def test_split_makes_the_same_clusters_of_a_recording(spoken_model: Any, texts: Path, tmp_path: Path) -> None:
    model = spoken_model()
    record(model, tmp_path / "seen", texts, activations_tokens=3 * TOKENS)
    took = [seen_by_transformers(model, domain_ids(name))[1] for name in WORDS]
    for layer in range(2):
        np.save(tmp_path / f"direct-{layer}.npy", np.concatenate([gates[layer] for gates in took]))
    options = {"method": "split", "num_experts": 4, "split_by": "activations", "target": "mixtral", "inexact_ok": True}
    made = []
    for name, path in (("a", tmp_path / "seen" / "activations"), ("b", tmp_path / "direct-{layer}.npy")):
        out = upcycle(model, tmp_path / name, **options, activations=str(path), proof="none")
        made.append((out.folder / "model.safetensors").read_bytes())
        assert len(out.manifest["inputs"]) == 2
    assert made[0] == made[1]
    by_chance = upcycle(model, tmp_path / "c", method="split", num_experts=4, target="mixtral", inexact_ok=True, proof="none")
    assert (by_chance.folder / "model.safetensors").read_bytes() != made[0], "the recording must matter"


def test_groups_of_a_domain_are_balanced_and_make_more_experts(spoken_model: Any, texts: Path, tmp_path: Path) -> None:
    model = spoken_model()
    record(model, tmp_path / "one", texts)
    two = record(model, tmp_path / "two", texts, centroids_per_domain=2, layers=(1,))
    whole, halves = (np.load(tmp_path / name / "centroids.npz") for name in ("one", "two"))
    assert halves.files == ["layers.1"] and two.record["experts"] == 6
    rows = halves["layers.1"].reshape(3, 2, -1)
    np.testing.assert_allclose(rows.mean(axis=1), whole["layers.1"], rtol=0, atol=1e-5)
    assert np.abs(rows[:, 0] - rows[:, 1]).max(axis=1).min() > 0.1
    options = {"router_init": "centroids", "centroids": str(tmp_path / "two" / "centroids.npz"), "dense_prefix_layers": 1}
    upcycle(model, tmp_path / "out", num_experts=6, target="native", proof_tokens=16, **options)


@pytest.mark.parametrize("gated", [True, False])
def test_activations_are_those_of_the_gate_or_of_the_only_projection(gated: bool) -> None:
    torch.manual_seed(0)
    ffn = FeedForward(8, 12, FfnKind("gelu_tanh", gated, biased=True)).double()
    for weight in ffn.parameters():
        torch.nn.init.normal_(weight)
    x_TD = torch.randn(5, 8, dtype=torch.float64)
    found_TF, w13_2FD, b13_2F = gate_activations(ffn, x_TD), ffn.w13_2FD, ffn.b13_2F
    assert b13_2F is not None
    # what is left to do gives the network's output
    up_TF = x_TD @ w13_2FD[1].T + b13_2F[1] if gated else 1.0
    torch.testing.assert_close((found_TF * up_TF) @ ffn.w2_DF.T, ffn(x_TD))


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_token_ids_stand_for_text_and_every_run_writes_the_same(spoken_model: Any, texts: Path, tmp_path: Path) -> None:
    model, options = spoken_model(), {"tokens_per_domain": TOKENS, "seq_len": SEQ_LEN, "activations_tokens": 9}
    made = [files(record(model, tmp_path / "out", texts, activations_tokens=9).folder)]
    shutil.rmtree(tmp_path / "out")
    made.append(files(record(model, tmp_path / "out", texts, activations_tokens=9).folder))
    assert made[0] == made[1]
    assert set(made[0]) == {"record.json", "centroids.npz", "activations/layers.0.npy", "activations/layers.1.npy"}
    np.save(tmp_path / "code.npy", domain_ids("code").astype(np.uint16))
    with IndexedWriter(tmp_path / "law", np.uint16) as writer:
        writer.append(domain_ids("law"))
        writer.end_document()
    given = [Domain(name=n, path=str(tmp_path / p), token_ids=True) for n, p in (("code", "code.npy"), ("law", "law"))]
    # a model without a tokenizer, with one domain still of text
    (bare := tmp_path / "bare").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, bare)
    by_ids = record_dense(bare, tmp_path / "ids", [*given, domains(texts)[2]], tokenizer=str(model), field="body", **options)
    for name in ("centroids.npz", "activations/layers.0.npy", "activations/layers.1.npy"):
        assert (by_ids.folder / name).read_bytes() == made[0][name]
    assert [d["kind"] for d in by_ids.record["domains"]] == ["token ids", "token ids", "jsonl"]


def test_a_killed_run_leaves_nothing_that_looks_complete(spoken_model: Any, texts: Path, tmp_path: Path) -> None:
    out, words = tmp_path / "out", [f"Domain(name={d.name!r}, path={d.path!r})" for d in domains(texts)]
    code = (
        "import os\nfrom moefold.launch.upcycle.record import Domain, record_dense\n"
        "def die(stage, done, total, seconds):\n    if stage == 'recording' and done == 4: os.kill(os.getpid(), 9)\n"
        f"record_dense({str(spoken_model())!r}, {str(out)!r}, [{', '.join(words)}], field='body', activations_tokens=9, "
        f"tokens_per_domain={TOKENS}, seq_len={SEQ_LEN}, progress=die)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert done.returncode == -9, done.stderr
    left = set(files(tmp_path))
    assert "out.partial/activations/layers.0.npy" in left and not {"out.partial/record.json", "out.partial/centroids.npz"} & left
    assert not out.exists()
    again = record(spoken_model(), out, texts, activations_tokens=9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"] and (again.folder / "record.json").is_file()

    def fail(stage: str, done: int, total: int, seconds: float) -> None:
        if stage == "recording" and done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record(spoken_model(), tmp_path / "other", texts, progress=fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_the_command(spoken_model: Any, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--from", str(spoken_model()), "--out", str(tmp_path / "seen"), "--field", "body", "--layers", "0-1"]
    given = ["--domain", f"code={texts / 'code'}", "--domain", f"news={texts / 'news.jsonl'}"]
    assert main(["upcycle", "record", *words, *given, "--tokens-per-domain", "99", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["domains"][0]["tokens"] == 80 and told["options"]["layers"] == [0, 1]
    # the command that is kept is the one that was given, in full
    shutil.rmtree(tmp_path / "seen")
    _, *again = told["command"].split()
    assert main(again) == 0
    shown = capsys.readouterr()
    assert "80 tokens (all there are)" in shown.out and "--experts 2 --router-init centroids" in shown.out
    assert "recording 100%" in shown.err
    assert json.loads((tmp_path / "seen" / "record.json").read_text()) == {k: v for k, v in told.items() if k != "folder"}
    assert main(["upcycle", "record", *words]) == 2
    assert "--domain: is missing" in capsys.readouterr().err
    assert main(["upcycle", "record", *words, "--domain", "code"]) == main(["upcycle", "record", *words, "--layers", "x"]) == 2
    # the verb of one word is still there
    assert main(["upcycle"]) == 2 and main(["upcycle", "--help"]) == 0


CASES: list[tuple[str, dict[str, Any], str]] = [
    ("unknown layer", {"layers": (0, 7)}, r"layers: names \[7\]; the model has layers 0 to 1"),
    ("no layer", {"layers": ()}, "layers: names none"),
    ("no tokens", {"tokens_per_domain": 0}, "tokens_per_domain: is 0, but must be positive"),
    ("dtype", {"activations_dtype": "int8"}, "activations_dtype: is 'int8'; legal: float32, float16"),
    ("unknown option", {"token": 3}, "upcycle.record.token: unknown option; known: tokens_per_domain"),
    ("device", {"device": "tpu"}, "device: is 'tpu'; legal"),
    ("groups", {"centroids_per_domain": 41}, "domain 'code' has 40 tokens, fewer than centroids_per_domain = 41"),
    ("activations", {"activations_tokens": 121}, "takes 41 of each domain; give more text, .* or ask for at most 120"),
    ("field", {"field": "text"}, r"has no field 'text'; its keys are 'body'"),
    ("tokenizer", {"tokenizer": "bytes"}, "the tokenizer bytes has ids up to 256, but the model in .* only up to 60"),
]


@pytest.mark.parametrize(("options", "says"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_options_that_do_not_fit(options: dict[str, Any], says: str, spoken_model: Any, texts: Path, tmp_path: Path) -> None:
    with pytest.raises(MoefoldError, match=says):
        record(spoken_model(), tmp_path / "out", texts, **options)
    assert not list(tmp_path.iterdir())


def test_domains_that_cannot_be_read(spoken_model: Any, dense_model: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n')
    np.save(tmp_path / "far.npy", np.array([3, 61]))
    np.save(tmp_path / "flat.npy", np.zeros((2, 2), np.int64))
    (tmp_path / "text.npy").write_text("text")
    given = [Domain(name=n, path=str(tmp_path / n)) for n in ("empty.txt", "blank.jsonl", "absent.txt")]
    given += [Domain(name=n, path=str(tmp_path / n), token_ids=True) for n in ("far.npy", "flat.npy", "text.npy", "gone.bin")]
    with pytest.raises(MoefoldError) as error:
        record_dense(spoken_model(), tmp_path / "out", given)
    for says in (
        "all empty",
        "blank.jsonl is empty",
        "no such file or folder",
        "id 61 at position 1, but the model has ids 0 to 60",
    ):
        assert says in str(error.value)
    for says in ("int64 of shape [2, 2], but token ids must be integers of one dimension", "text.npy cannot be read", "gone.bin"):
        assert says in str(error.value)
    with pytest.raises(MoefoldError, match=r"has no tokenizer\.json, so text cannot become .* --token-ids"):
        record_dense(dense_model(), tmp_path / "out", given)
    with pytest.raises(MoefoldError, match="'far' is given twice"):
        record_dense(spoken_model(), tmp_path / "out", [Domain(name="far", path="a"), Domain(name="far", path="b")])
    with pytest.raises(MoefoldError, match="name one file of text for each domain"):
        record_dense(spoken_model(), tmp_path / "out", [])


def test_a_model_with_experts_and_folders_in_use(spoken_model: Any, texts: Path, tmp_path: Path) -> None:
    upcycle(spoken_model(), tmp_path / "moe", num_experts=4, proof="none")
    with pytest.raises(MoefoldError, match="has 4 experts and a router already; give the dense model"):
        record(tmp_path / "moe", tmp_path / "out", texts)
    with pytest.raises(CheckpointError, match="moe exists and is not an empty folder"):
        record(spoken_model(), tmp_path / "moe", texts)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").touch()
    with pytest.raises(CheckpointError, match="is no recording that was interrupted: move it away"):
        record(spoken_model(), tmp_path / "out", texts)
    assert (tmp_path / "out.partial" / "mine").is_file()


def test_activations_that_no_file_can_hold(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"activations need .* fewer activations_tokens"):
        ActivationFiles(tmp_path, range(80), 10**9, 10**5, "float16")
    files = ActivationFiles(tmp_path, (3,), 4, 2, "float16")
    files.write(3, np.full((2, 2), 7.0))
    with pytest.raises(CheckpointError, match="layer 3 reach 70000, too large for float16; set activations_dtype = 'float32'"):
        files.write(3, np.full((2, 2), 7e4))
    with pytest.raises(CheckpointError, match="damaged"):
        files.write(3, np.full((2, 2), np.nan))
    files.write(3, np.full((2, 2), 8.0))
    stored = np.load(tmp_path / "activations" / "layers.3.npy")
    assert stored.dtype == np.float16 and (stored == [[7, 7]] * 2 + [[8, 8]] * 2).all()
