"""The verb `moefold upcycle`: its options and examples. Imports neither torch nor numpy."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from ...moe.errors import ConfigError, Problem
from ...moe.upcycle.options import UpcycleOptions
from ..verb import Flags, Verb, print_json
from .progress import Bar
from .verbs_record import RECORD

if TYPE_CHECKING:
    from ...moe.hf.rules import Rule

HELP: Mapping[str, str] = MappingProxyType(
    {
        "method": "what experts are made of",
        "num_experts": "routed experts E, pieces counted one by one",
        "top_k": "routed experts for each token, pieces counted one by one",
        "granularity": "pieces that one copy of the feed-forward network is cut into",
        "score": "of the router; follows the format",
        "order": "softmax before or after top-k; follows the format",
        "renormalize": "divide a token's weights by their sum",
        "scaling_factor": "multiplies the router's weights",
        "expert_bias": "select by score + bias; follows the format",
        "aux_loss_coeff": "load-balancing loss of the configurations that are written",
        "group_limited": "choose whole copies; follows the format",
        "num_shared_experts": "shared experts, each as wide as a routed one",
        "shared_width": "or neurons of all of them together",
        "shared_init": "shared experts take their part of the network, or start without output",
        "shared_gate": "sigmoid gate before the shared experts, as Qwen2-MoE has",
        "dense_prefix_layers": "first layers that stay dense",
        "moe_every": "after them, every n-th layer has experts",
        "pad_multiple": "widen experts by zeros to a multiple of this",
        "scale_placement": "where the output's scale goes; both is not exact",
        "shuffle": "shuffle neurons before copies are cut",
        "router_init": "first rows of the router",
        "router_std": "their deviation; also that of centroids",
        "router_noise_std": "noise on a router of zeros",
        "centroids": "rows of the router, .npy or .npz; made by moefold upcycle record",
        "seed": "of everything that is drawn",
        "reinit_ratio": "drop: share of each expert's neurons that is drawn anew",
        "per_matrix": "drop: draw them for each matrix",
        "noise_std": "noise: its deviation",
        "noise_share": "noise: share of the weights",
        "split_by": "split: which neurons come together",
        "activations": "split: recorded activations: a folder made by moefold upcycle record, or .npy with {layer}",
        "kmeans_steps": "split: at most",
        "merge_weights": "merge, bam: weight of each model, as 1,2,1",
        "attention_expert_kv": "bam: keys and values of attention experts",
        "without": "flex_olmo: models that opt out, as 1,3",
        "trust_frozen": "flex_olmo: do not compare what was frozen",
    }
)
"""What each option of `UpcycleOptions` is, in a few words."""
OTHER_NAMES: Mapping[str, str] = MappingProxyType({"num_experts": "--experts", "reinit_ratio": "--reinit"})


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--from", dest="dense", nargs="+", metavar="DENSE", help="folder of a dense model; several to merge")
    parser.add_argument("--to", metavar="OUT", help="folder to write; the same command again goes on with an interrupted one")
    target = "auto (default), native, or a model_type: mixtral, qwen2_moe, qwen3_moe, olmoe, flex_olmo, glm4_moe, granitemoe"
    parser.add_argument("--target", default="auto", metavar="TYPE", help=target)
    runtime = "program that is to run it (default: %(default)s)"
    parser.add_argument("--runtime", default="transformers", choices=["transformers", "vllm"], help=runtime)
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights (default: as they are stored)")
    parser.add_argument("--inexact-ok", action="store_true", help="also write what computes something else than the dense model")
    proof = "compare the files with the dense model (default: %(default)s)"
    parser.add_argument("--proof", default="full", choices=["full", "none"], help=proof)
    parser.add_argument("--proof-tokens", type=int, default=512, metavar="N", help="on so many tokens (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="and there (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="show which format can hold which dense model, and why not")
    parser.add_argument(
        "--advise", action="store_true", help="say whether it is worth it, by published rules or a law; write nothing"
    )
    parser.add_argument("--dense-tokens", type=float, metavar="N", help="advise: tokens that the dense model was trained on")
    parser.add_argument("--tokens", type=float, metavar="N", help="advise: tokens that the result would be trained on")
    losses = "advise: measured points (columns kind,dense_tokens,tokens,loss) that a law is fitted to"
    parser.add_argument("--losses", metavar="CSV", help=losses)
    parser.add_argument("--json", action="store_true", help="print JSON")
    hints = get_type_hints(UpcycleOptions)
    for f in fields(UpcycleOptions):
        names = [OTHER_NAMES[f.name]] if f.name in OTHER_NAMES else []
        flags = [*names, f"--{f.name.replace('_', '-')}"]
        parser.add_argument(*flags, dest=f"set_{f.name}", help=_help(f.name, f.default), **_reading(hints[f.name]))


def _help(name: str, default: object) -> str:
    shown = default not in (None, ()) and "follows the format" not in HELP[name]
    return HELP[name] + (f" (default: {str(default).lower() if isinstance(default, bool) else default})" if shown else "")


def _reading(hint: Any) -> dict[str, Any]:
    """How argparse reads an option of a type."""
    inner = next((part for part in get_args(hint) if part is not type(None)), hint) if type(None) in get_args(hint) else hint
    if get_origin(inner) is Literal:
        return {"choices": get_args(inner)}
    if get_origin(inner) is tuple:
        return {"type": _several(get_args(inner)[0]), "metavar": "A,B"}
    if inner is bool:
        return {"type": _true_or_false, "metavar": "true|false"}
    return {"type": inner, "metavar": {int: "N", float: "X", str: "FILE"}[inner]}


def _several(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    def read(text: str) -> tuple[Any, ...]:
        return tuple(kind(word) for word in text.split(","))

    read.__name__ = f"list of {kind.__name__}"
    return read


def _true_or_false(text: str) -> bool:
    if text not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"is {text!r}, but must be true or false")
    return text == "true"


def _run(options: argparse.Namespace, flags: Flags) -> int:
    if options.list:
        return _list(options)
    asked = {f.name: v for f in fields(UpcycleOptions) if (v := getattr(options, f"set_{f.name}")) is not None}
    needed = {"--from": options.dense, **({} if options.advise else {"--to": options.to})}
    if missing := [name for name, value in needed.items() if not value]:
        raise ConfigError([Problem(name, "is missing; or --list shows what can be upcycled") for name in missing])
    if options.advise:
        return _advise(options, asked)
    if options.losses is not None:
        raise ConfigError([Problem("--losses", "is for --advise only")])
    from . import upcycle

    result = upcycle(
        options.dense,
        options.to,
        target=options.target,
        runtime=options.runtime,
        dtype=options.dtype,
        inexact_ok=options.inexact_ok,
        proof=options.proof,
        proof_tokens=options.proof_tokens,
        device=options.device,
        progress=Bar(),
        say=lambda line: print(line, file=sys.stderr),
        **asked,
    )
    if options.json:
        print_json(result.to_dict())
    else:
        print(result.render())
    return result.exit_code


def _advise(options: argparse.Namespace, asked: Mapping[str, Any]) -> int:
    from .advise import advise
    from .manifest import Source
    from .targets import choose

    given = {"--dense-tokens": options.dense_tokens, "--tokens": options.tokens}
    if missing := [name for name, value in given.items() if value is None]:
        raise ConfigError([Problem(name, "is missing: --advise compares both budgets, as in 2e12") for name in missing])
    dense = [Source.open(folder).config for folder in options.dense]
    config = choose(dense, options.target, asked, options.runtime, inexact=True).taken.config
    assert config is not None
    advice = advise(dense[0], config, dense_tokens=options.dense_tokens, tokens=options.tokens, losses=options.losses)
    if options.json:
        print_json(advice.to_dict())
    else:
        print(advice.render())
    return 0


def _list(options: argparse.Namespace) -> int:
    from ...moe.hf.rules import rule_table

    rules = rule_table(options.runtime)
    if options.json:
        print_json([{**vars(rule), "mark": rule.mark} for rule in rules])
    else:
        print(rules_text(rules, options.runtime))
    return 0


def rules_text(rules: tuple[Rule, ...], runtime: str) -> str:
    """The rule table for the console, and below it what every mark but `=` means."""
    targets, names = list(dict.fromkeys(rule.target for rule in rules)), list(dict.fromkeys(rule.dense for rule in rules))
    marks = {(rule.dense, rule.target): rule.mark for rule in rules}
    width = max(map(len, names))
    lines = [f"{'':{width}}  {'  '.join(targets)}"]
    for name in names:
        lines.append(f"{name:{width}}  " + "  ".join(f"{marks[name, target]:{len(target)}}" for target in targets).rstrip())
    lines += ["", f"for {runtime}: = exact, (=) exact after a rewrite, x impossible", ""]
    for name in names:
        groups: dict[str, list[str]] = {}
        for rule in rules:
            if rule.dense == name and rule.mark != "=":
                why = "; ".join(rule.reasons) or f"exact after {', '.join(rule.rewrites)}"
                groups.setdefault(why, []).append(rule.target)
        lines += [f"{name}, {', '.join(held)}: {why}" for why, held in groups.items()]
    return "\n".join(lines)


VERBS: Mapping[str, Verb] = MappingProxyType(
    {
        "upcycle": Verb(
            "make a Mixture-of-Experts model of a dense one, and prove that it computes the same",
            (
                "moefold upcycle --from Llama-3.2-1B --to Llama-8x1B --experts 8 --top-k 2",
                "moefold upcycle --list",
                "moefold upcycle --from Qwen3-0.6B --to Qwen3-64x --method virtual_groups --experts 64 --granularity 8 --top-k 8",
                "moefold upcycle --method bam --from seed seed-code seed-law --to mixed --target native --inexact-ok",
            ),
            (),
            _options,
            _run,
            settings=False,
        ),
        "upcycle record": RECORD,
    }
)
