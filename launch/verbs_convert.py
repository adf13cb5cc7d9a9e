"""The verbs `moefold convert ...`. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .verb import Flags, Verb, add_json, print_json


def _show(result: Any, json: bool) -> None:
    if json:
        print_json(result.to_dict())
    else:
        print(result.render())


def _import_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="HF_FOLDER", help="folder with config.json and safetensors files")
    parser.add_argument("out", metavar="OUT", help="checkpoint directory to make")
    add_json(parser)


def _import(options: argparse.Namespace, flags: Flags) -> int:
    from .convert.run import import_checkpoint
    from .upcycle.progress import Bar

    _show(import_checkpoint(options.folder, options.out, progress=Bar()), options.json)
    return 0


def _export_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint, or run directory, whose latest is taken")
    parser.add_argument("out", metavar="OUT", help="Hugging Face folder to make")
    parser.add_argument("--target", metavar="TYPE", help="model_type to write (default: the one it was imported from)")
    parser.add_argument("--runtime", choices=["transformers", "vllm"], default="transformers", help="program that is to run it")
    parser.add_argument(
        "--dtype", choices=["bf16", "fp16", "fp32", "fp64"], help="of the weights (default: as imported, else fp32)"
    )
    parser.add_argument("--like", metavar="HF_FOLDER", help="take type, dtype, tokenizer and special tokens from this folder")
    add_json(parser)


def _export(options: argparse.Namespace, flags: Flags) -> int:
    from .convert.run import export_checkpoint
    from .upcycle.progress import Bar

    names = ("target", "runtime", "dtype", "like")
    chosen = {name: getattr(options, name) for name in names}
    _show(export_checkpoint(options.checkpoint, options.out, **chosen, progress=Bar()), options.json)
    return 0


def _check_options(parser: argparse.ArgumentParser) -> None:
    for name in ("A", "B"):
        parser.add_argument(name.lower(), metavar=name, help="Hugging Face folder, checkpoint or run directory")
    add_json(parser)


def _check(options: argparse.Namespace, flags: Flags) -> int:
    from .convert.compare import check
    from .upcycle.progress import Bar

    found = check(options.a, options.b, progress=Bar())
    _show(found, options.json)
    return found.exit_code


def _grow_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", metavar="HF_FOLDER", help="folder with config.json and safetensors files")
    parser.add_argument("out", metavar="OUT", help="Hugging Face folder to make")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--depth-times", type=int, metavar="N", help="the whole sequence of layers N times over; to be trained on")
    how.add_argument("--ffn-times", type=int, metavar="N", help="every feed-forward network N times as wide; the same function")
    add_json(parser)


def _grow(options: argparse.Namespace, flags: Flags) -> int:
    from .convert.run import grow
    from .upcycle.progress import Bar

    grown = grow(options.folder, options.out, depth_times=options.depth_times, ffn_times=options.ffn_times, progress=Bar())
    _show(grown, options.json)
    return 0


VERBS: Mapping[str, Verb] = MappingProxyType(
    {
        "convert import": Verb(
            "make a checkpoint that training starts from of a Hugging Face folder",
            (
                "moefold convert import models/OLMoE-1B-7B olmoe",
                "moefold convert import models/OLMoE-1B-7B olmoe --json",
            ),
            (),
            _import_options,
            _import,
            settings=False,
        ),
        "convert export": Verb(
            "write a checkpoint as a Hugging Face folder, of any family that can hold the model",
            (
                "moefold convert export runs/olmoe-20260801-120000 out --like models/OLMoE-1B-7B",
                "moefold convert export runs/quickstart-20260801-120000 out --target mixtral --dtype bf16",
            ),
            (),
            _export_options,
            _export,
            settings=False,
        ),
        "convert check": Verb(
            "compare any two of Hugging Face folder, checkpoint and run directory, bit by bit; exit code 3 if they differ",
            ("moefold convert check models/OLMoE-1B-7B olmoe", "moefold convert check out models/OLMoE-1B-7B --json"),
            (),
            _check_options,
            _check,
            settings=False,
        ),
        "convert grow": Verb(
            "make a larger model of a trained one: deeper by repeating layers, or wider by repeating neurons",
            (
                "moefold convert grow models/Qwen3-0.6B deeper --depth-times 2",
                "moefold convert grow models/Qwen3-0.6B wider --ffn-times 2",
            ),
            (),
            _grow_options,
            _grow,
            settings=False,
        ),
    }
)
