"""Every cell of the rule table: what it says is exact has the logits of the dense model in transformers, all else is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from moefold.launch.config import load
from moefold.launch.upcycle import upcycle
from moefold.launch.upcycle.manifest import Source
from moefold.launch.upcycle.targets import RefusedError, choose, consider
from moefold.moe.errors import ConfigError
from moefold.moe.hf.families import REFUSED
from moefold.moe.hf.rules import ARCHETYPES, Rule, rule_table

RULES = rule_table()
EXACT = [rule for rule in RULES if rule.mark != "x"]
OTHERS = [rule for rule in RULES if rule.mark == "x" and rule.target not in REFUSED]


def gap(out: Tensor, dense: Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((out - dense).abs().max() / dense.abs().max())


def named(rule: Rule) -> str:
    return f"{rule.dense}-{rule.target}".replace(" ", "_")


@pytest.mark.parametrize("rule", EXACT, ids=named)
def test_exact_pairs_have_the_same_logits(rule: Rule, dense_model: Any, logits: Callable[[Path], Tensor], tmp_path: Path) -> None:
    folder = dense_model(rule.dense)
    result = upcycle(folder, tmp_path / "out", target=rule.target, num_experts=4, proof="none")
    assert gap(logits(result.folder), logits(folder)) < 1e-5
    assert tuple(rewrite["name"] for rewrite in result.manifest["rewrites"]) == rule.rewrites
    assert load(str(result.folder / "pretrain.toml")).config.model == result.config
    written = json.loads((result.folder / "config.json").read_text())
    assert (written["model_type"], written["eos_token_id"], written["dtype"]) == (rule.target, 2, "float32")


GRANULAR = [
    ("Llama 1-3", "mixtral", {}),
    ("Llama 3.1, tied", "qwen2_moe", {"num_shared_experts": 2}),
    ("Qwen2, Qwen2.5", "glm4_moe", {}),
    ("Gemma 1", "granitemoe", {}),
    ("Qwen3", "qwen3_moe", {"dense_prefix_layers": 1}),
    ("OLMo 2", "flex_olmo", {"pad_multiple": 32}),
    ("Llama 1-3", "glm4_moe", {"scale_placement": "routed_scaling"}),
    ("Mistral", "qwen2_moe", {"method": "dense_shared", "granularity": 3, "top_k": 2}),
    ("Qwen3", "glm4_moe", {"method": "dense_shared", "granularity": 2, "top_k": 3, "pad_multiple": 24}),
]


@pytest.mark.parametrize(("name", "target", "options"), GRANULAR, ids=lambda v: v if isinstance(v, str) else "")
def test_fine_grained_ones_too(
    name: str, target: str, options: dict[str, Any], dense_model: Any, logits: Callable[[Path], Tensor], tmp_path: Path
) -> None:
    folder = dense_model(name)
    sizes = {"method": "virtual_groups", "num_experts": 8, "granularity": 2, "top_k": 4} | options
    out = upcycle(folder, tmp_path / "out", target=target, proof="none", **sizes).folder
    assert gap(logits(out), logits(folder)) < 1e-5


def test_all_reasons_against_other_pairs_are_known(dense_model: Any) -> None:
    readable = {name: Source.open(dense_model(name)).config for name in {rule.dense for rule in EXACT}}
    cells = [rule for rule in OTHERS if rule.dense in readable]
    for rule in cells:
        found = consider([readable[rule.dense]], rule.target, {"num_experts": 4}, "transformers")
        # sizes of tiny models are others than those in the table
        assert [why.split(" is ")[0] for why in found.reasons] == [why.split(" is ")[0] for why in wanted(rule)], rule
    assert len(cells) == 38


@pytest.mark.parametrize(("name", "target"), [("OLMo 2", "olmoe"), ("Llama, attention bias", "mixtral")])
def test_other_pairs_are_refused_and_the_way_is_named(name: str, target: str, dense_model: Any) -> None:
    with pytest.raises(RefusedError) as error:
        choose([Source.open(dense_model(name)).config], target, {"num_experts": 4})
    *reasons, instead = error.value.problems
    [rule] = [rule for rule in OTHERS if (rule.dense, rule.target) == (name, target)]
    assert [p.where for p in reasons] == [target] * len(reasons) and tuple(p.what for p in reasons) == rule.reasons
    exact = [other.target for other in EXACT if other.dense == name]
    assert instead.what == "exact with these options: " + ", ".join(f"--target {t}" for t in [*exact, "native"])


def wanted(rule: Rule) -> tuple[str, ...]:
    """The reasons of a rule; heads of the tiny Llama and Mistral are wider than dim / num_heads, too."""
    if rule.target == "olmoe" and rule.dense in ("Llama 1-3", "Mistral", "Qwen3"):
        return (rule.reasons[0], "head_dim is 12", *rule.reasons[1:])
    return rule.reasons


@pytest.mark.parametrize(
    "name", [name for name in ARCHETYPES if name != "GPT-2" and not any(r.mark != "x" for r in RULES if r.dense == name)]
)
def test_models_that_cannot_be_read_are_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps(dict(ARCHETYPES[name])))
    save_file({"some.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    reason = next(rule.reasons[0] for rule in RULES if rule.dense == name)
    with pytest.raises(ConfigError) as error:
        upcycle(tmp_path, tmp_path / "out", num_experts=4)
    assert reason.split(" is ")[-1] in str(error.value)


AUTOMATIC = [
    ("Llama 1-3", {}, "transformers", "mixtral"),
    ("Llama 1-3", {"method": "virtual_groups", "granularity": 2}, "transformers", "glm4_moe"),
    ("Llama 1-3", {"method": "virtual_groups", "granularity": 2, "group_limited": False}, "transformers", "mixtral"),
    ("Llama 1-3", {"num_shared_experts": 1}, "transformers", "glm4_moe"),
    ("Llama, attention bias", {}, "transformers", "granitemoe"),
    ("Mistral, sliding window", {}, "transformers", "mixtral"),
    ("Qwen2, Qwen2.5", {}, "transformers", "qwen2_moe"),
    ("Qwen3", {}, "vllm", "qwen3_moe"),
    ("OLMo 2", {}, "transformers", "flex_olmo"),
    ("Gemma 1", {}, "transformers", "granitemoe"),
]


@pytest.mark.parametrize(("name", "options", "runtime", "target"), AUTOMATIC)
def test_the_format_is_chosen_by_the_rules(
    name: str, options: dict[str, Any], runtime: Any, target: str, dense_model: Any
) -> None:
    dense = Source.open(dense_model(name)).config
    choice = choose([dense], "auto", {"num_experts": 8, "top_k": 2} | options, runtime)
    assert choice.taken.target == target and choice.taken.exact
    assert choice.lines()[0].startswith(f"format {target}: exact")
    assert len(choice.considered) == 7


@pytest.mark.parametrize("name", ["Llama, attention bias", "Mistral, sliding window", "Gemma 1"])
def test_what_a_program_ignores_is_refused_for_it(name: str, dense_model: Any) -> None:
    dense = Source.open(dense_model(name)).config
    with pytest.raises(RefusedError, match=r"vllm 0\.33\.0") as error:
        choose([dense], "auto", {"num_experts": 4}, "vllm")
    assert "another --runtime than vllm" in str(error.value)
