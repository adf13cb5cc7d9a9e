"""The verb `moefold upcycle record`: its options and examples. Imports neither torch nor numpy."""

from __future__ import annotations

import argparse

from ...moe.errors import ConfigError, Problem
from ..verb import Flags, Verb, add_json, print_json
from .progress import Bar


def _options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--from", dest="dense", metavar="DENSE", help="folder of a dense model")
    add("--out", metavar="FOLDER", help="folder to make: centroids.npz, activations/layers.N.npy, record.json")
    text = "text of a domain: a file, folder or glob of UTF-8 text or .jsonl, python-code or python-docs; once for each domain"
    add("--domain", dest="domains", metavar="NAME=PATH", action="append", type=_text, help=text)
    ids = "or its token ids: .npy of one dimension, or .bin with .idx"
    add("--token-ids", dest="domains", metavar="NAME=FILE", action="append", type=_ids, help=ids)
    default = "(default: %(default)s)"
    add("--tokens-per-domain", type=int, default=8192, metavar="N", help=f"the first N of each {default}")
    add("--centroids-per-domain", type=int, default=1, metavar="K", help=f"means of K groups of each domain's tokens {default}")
    add(
        "--activations-tokens", type=int, default=0, metavar="M", help="record activations of M tokens, for split (default: none)"
    )
    add("--activations-dtype", choices=["float32", "float16"], default="float32", help=f"of their files {default}")
    add("--layers", type=_layers, metavar="A,B-C", help="record these only (default: all)")
    add("--seq-len", type=int, default=512, metavar="N", help=f"tokens that attend to one another {default}")
    add("--seed", type=int, default=0, metavar="N", help=f"of the groups of a domain {default}")
    add("--tokenizer", metavar="PATH", help="tokenizer.json, or bytes (default: the tokenizer.json of the model)")
    add("--field", default="text", metavar="KEY", help=f"of the text in .jsonl {default}")
    add("--device", default="auto", choices=["auto", "cpu", "cuda"], help=f"to compute on {default}")
    add_json(parser)


def _text(text: str) -> tuple[str, str, bool]:
    name, _, path = text.partition("=")
    if not (name and path):
        raise argparse.ArgumentTypeError(f"is {text!r}, but must be NAME=PATH, as in code=code.txt")
    return name, path, False


def _ids(text: str) -> tuple[str, str, bool]:
    name, path, _ = _text(text)
    return name, path, True


def _layers(text: str) -> tuple[int, ...]:
    found: list[int] = []
    for word in text.split(","):
        first, dash, last = word.partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise argparse.ArgumentTypeError(f"is {text!r}, but must be layers from 0 on, as in 0,2,5-7")
        found += range(int(first), int(last or first) + 1)
    return tuple(found)


def _run(options: argparse.Namespace, flags: Flags) -> int:
    needed = {"--from": options.dense, "--out": options.out, "--domain": options.domains}
    if missing := [name for name, value in needed.items() if not value]:
        ways = {"--domain": "is missing: NAME=PATH of text, once for each domain (or --token-ids)"}
        raise ConfigError([Problem(name, ways.get(name, "is missing")) for name in missing])
    from .record import Domain, record_dense

    result = record_dense(
        options.dense,
        options.out,
        [Domain(name=name, path=path, token_ids=ids) for name, path, ids in options.domains],
        tokens_per_domain=options.tokens_per_domain,
        centroids_per_domain=options.centroids_per_domain,
        activations_tokens=options.activations_tokens,
        activations_dtype=options.activations_dtype,
        layers=options.layers,
        seq_len=options.seq_len,
        seed=options.seed,
        tokenizer=options.tokenizer,
        field=options.field,
        device=options.device,
        progress=Bar(),
    )
    if options.json:
        print_json(result.to_dict())
    else:
        print(result.render())
    return 0


RECORD = Verb(
    "run a dense model over text of several domains: centroids for a router, activations for split",
    (
        "moefold upcycle record --from Llama-3.2-1B --out seen --domain code=code.txt --domain law=law.jsonl",
        "moefold upcycle record --from Llama-3.2-1B --out seen --domain code=python-code --domain prose=python-docs "
        "--activations-tokens 4096",
    ),
    (),
    _options,
    _run,
    settings=False,
)
