"""`moefold upcycle record`: what a dense model sees of several domains, as files that `moefold upcycle` makes experts by.

What is being made is in OUT.partial, and gets its name when it is complete; record.json, written last, says what it is.
"""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ... import __version__
from ...moe.errors import ConfigError, DataError, Problem
from ...moe.hf.files import file_sha256
from ...moe.hf.journal import write_durably
from .manifest import Source
from .progress import Told
from .record_files import ACTIVATIONS, CENTROIDS, JSON, ActivationFiles, check_out, staged, write_centroids
from .record_tokens import Domain, DomainTokens, Ids, check_domains, read_domains

SCHEMA = 1
SEQ_LEN = 512
TOKENS = 8192
"""Of each domain."""


@dataclass(frozen=True, kw_only=True)
class RecordOptions:
    """How a dense model is recorded. The fields are arguments of `record_dense`."""

    tokens_per_domain: int = TOKENS
    """At most; the first of each domain."""
    centroids_per_domain: int = 1
    """K > 1 divides each domain's tokens into K groups of one size by balanced k-means: domains * K experts."""
    activations_tokens: int = 0
    """In all, evenly from each domain; 0 = no activations."""
    activations_dtype: Literal["float32", "float16"] = "float32"
    layers: tuple[int, ...] | None = None
    """None = all."""
    seq_len: int = SEQ_LEN
    """Tokens that attend to one another, at most as many as the model is made for."""
    seed: int = 0
    """Of the first centres of k-means."""
    tokenizer: str | None = None
    """'bytes', or the path of a tokenizer.json; None = the checkpoint's."""
    field: str = "text"
    """Key of the text in .jsonl objects."""

    def problems(self, num_layers: int) -> list[Problem]:
        """What cannot be, for a model of so many layers."""
        path, found = "upcycle.record", []
        for name in ("tokens_per_domain", "centroids_per_domain", "seq_len"):
            if getattr(self, name) < 1:
                found.append(Problem(f"{path}.{name}", f"is {getattr(self, name)}, but must be positive"))
        for name in ("activations_tokens", "seed"):
            if getattr(self, name) < 0:
                found.append(Problem(f"{path}.{name}", f"is {getattr(self, name)}, but must not be negative"))
        if self.activations_dtype not in ("float32", "float16"):
            found.append(Problem(f"{path}.activations_dtype", f"is {self.activations_dtype!r}; legal: float32, float16"))
        unknown = [i for i in self.layers or () if not 0 <= i < num_layers]
        if unknown or self.layers == ():
            found.append(Problem(f"{path}.layers", f"names {unknown or 'none'}; the model has layers 0 to {num_layers - 1}"))
        return found


@dataclass(frozen=True)
class RecordResult:
    """What was recorded: the folder, and record.json."""

    folder: Path
    record: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return {"folder": str(self.folder), **self.record}

    def render(self) -> str:
        """For the console: domains, how well their centroids tell them apart, and what to do next."""
        record, options = self.record, self.record["options"]
        domains = record["domains"]
        width = max(len(domain["name"]) for domain in domains)
        experts, layers, dense = record["experts"], len(record["layers"]), record["source"]["folder"]
        lines = [f"{self.folder} holds {experts} centroids for each of {layers} layers of {dense}"]
        shares = list(record["own_share"].values())
        for i, domain in enumerate(domains):
            own = [share[i] for share in shares]
            less = " (all there are)" if domain["tokens"] < options["tokens_per_domain"] else ""
            lines.append(
                f"  {domain['name']:{width}}  {domain['tokens']} tokens{less}; nearest to a centroid of their own: "
                f"{sum(own) / len(own):.0%} (layers: {min(own):.0%} to {max(own):.0%}); by chance {1 / len(domains):.0%}"
            )
        what = f"--experts {experts} --router-init centroids --centroids {self.folder / CENTROIDS}"
        lines.append(f"next: moefold upcycle ... {what}")
        if options["activations_tokens"]:
            where = self.folder / ACTIVATIONS
            lines.append(f"or:   moefold upcycle ... --method split --split-by activations --activations {where}")
        return "\n".join(lines)


def record_dense(
    dense: str | PathLike[str],
    out: str | PathLike[str],
    domains: Sequence[Domain],
    *,
    device: str = "auto",
    progress: Told | None = None,
    **options: Any,
) -> RecordResult:
    """Run a dense model over text of several domains and write what upcycling reads: centroids.npz, activations/, record.json.

    centroids.npz has `layers.N` float32 [experts, dim] for each layer: the mean over a domain's tokens of what a router in the
    place of the feed-forward network would see (its input: normed before it, or, in families with norms after it, the residual
    stream), domains in their order. activations/layers.N.npy has [tokens, neurons], the activations of the gate.
    The same call writes the same bytes on the same machine. Memory is that of one layer and of hidden states of all tokens.

    Args:
        dense: folder of a Hugging Face checkpoint of any family that is read.
        out: folder to make; must not exist, or be empty.
        domains: texts, or token ids; the first `tokens_per_domain` of each are taken.
        device: that the model is computed on: "cpu", "cuda", or "auto".
        progress: called with stage, done, total and seconds.
        options: fields of `RecordOptions`.

    Raises:
        ConfigError: options that do not fit, domains of one name, a model that has experts already.
        CheckpointError: a checkpoint that cannot be read or gives values that are not finite, a folder that is not empty, a disk
            that is full.
        DataError: no tokenizer, domains that are missing, empty or unreadable, fewer tokens than centroids or activations need.
    """
    out, told, asked = Path(out).absolute(), progress if progress is not None else _untold, _options(options)
    source = Source.open(Path(dense))
    _check(source, domains, asked)
    place = _device(device)
    check_out(out)
    tokens = read_domains(
        domains,
        folder=source.checkpoint.folder,
        tokenizer=asked.tokenizer,
        vocab_size=source.config.vocab_size,
        count=asked.tokens_per_domain,
        field=asked.field,
    )
    picks = _picks(tokens, asked)
    hashes = source.checkpoint.hashes(lambda done, total, seconds: told("hashing", done, total, seconds))
    with staged(out) as folder:
        shares = _write(folder, source, tokens, picks, asked, place, told)
        about = {
            "command": _command(source.checkpoint.folder, out, domains, asked, device),
            "options": json.loads(json.dumps(asdict(asked))),
            "source": _about_source(source, hashes),
            "domains": [_about(one, picked, asked) for one, picked in zip(tokens, picks, strict=True)],
            "experts": len(tokens) * asked.centroids_per_domain,
        }
        record = _record(folder, about, shares)
        write_durably(folder / JSON, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return RecordResult(out, record)


def _check(source: Source, domains: Sequence[Domain], asked: RecordOptions) -> None:
    """Raise ConfigError with all that can be known to be wrong before any text is read."""
    problems, moe = check_domains(domains) + asked.problems(source.config.num_layers), source.config.moe
    if moe is not None:
        what = f"is {source.checkpoint.folder}, which has {moe.num_experts} experts and a router already; give the dense model"
        problems.insert(0, Problem("upcycle.record.dense", f"{what} that one with experts is to be made of"))
    if problems:
        raise ConfigError(problems)


def _write(
    folder: Path,
    source: Source,
    tokens: Sequence[DomainTokens],
    picks: Sequence[Ids],
    asked: RecordOptions,
    place: str,
    told: Told,
) -> dict[int, tuple[float, ...]]:
    """Write centroids and activations; for each layer, the share of each domain's tokens that are nearest to their own."""
    import torch

    from .layers import Side
    from .record_layers import Wanted, record_layers

    config = source.config
    assert config.dense_ffn_dim is not None
    layers = tuple(range(config.num_layers)) if asked.layers is None else tuple(sorted(set(asked.layers)))
    wanted = Wanted(
        layers=layers,
        groups=asked.centroids_per_domain,
        seq_len=min(asked.seq_len, config.max_seq_len),
        picks=tuple(picks),
        seed=asked.seed,
    )
    files = ActivationFiles(folder, layers, sum(map(len, picks)), config.dense_ffn_dim, asked.activations_dtype)
    side = Side(config, source.parts, None, torch.device(place))
    try:
        found = record_layers(side, [one.ids_T for one in tokens], wanted, files.write, told)
    finally:
        files.close()
    write_centroids(folder, {one.layer: one.centroids_ED for one in found})
    return {one.layer: one.own_share for one in found}


def _record(folder: Path, about: Mapping[str, Any], shares: Mapping[int, Sequence[float]]) -> dict[str, Any]:
    """record.json. Nothing in it depends on when it is made."""
    import torch

    paths = sorted(folder.rglob("*.np[yz]"), key=lambda path: path.relative_to(folder).as_posix())
    return {
        "made_by": "moefold upcycle record",
        "schema": SCHEMA,
        "versions": {
            "moefold": __version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
        },
        **about,
        "layers": list(shares),
        "own_share": {str(layer): [round(share, 4) for share in own] for layer, own in shares.items()},
        "files": {
            path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in paths
        },
    }


def _about_source(source: Source, hashes: Mapping[str, str]) -> dict[str, Any]:
    return {
        "folder": str(source.checkpoint.folder),
        "model_type": source.family.model_type,
        "dtype": source.checkpoint.dtype,
        "files": {name: {"bytes": nbytes, "sha256": hashes[name]} for name, nbytes in source.checkpoint.files.items()},
    }


def _about(one: DomainTokens, picked: Ids, asked: RecordOptions) -> dict[str, Any]:
    return {
        "name": one.domain.name,
        "path": one.domain.path,
        "kind": one.kind,
        "tokens": len(one.ids_T),
        "ids_sha256": one.sha256,
        "centroids": asked.centroids_per_domain,
        "activations_tokens": len(picked),
    }


def _picks(tokens: Sequence[DomainTokens], asked: RecordOptions) -> list[Ids]:
    """Positions of each domain whose activations are taken: as many of each (or one more), spread evenly. Raises DataError."""
    groups, share = asked.centroids_per_domain, -(-asked.activations_tokens // len(tokens))
    short = [one for one in tokens if len(one.ids_T) < max(groups, share)]
    if short:
        one, held = short[0], len(short[0].ids_T)
        what = f"domain '{one.domain.name}' has {held} tokens"
        if held < groups:
            raise DataError(f"{what}, fewer than centroids_per_domain = {groups}; give more text, or ask for at most {held}")
        most = min(len(other.ids_T) for other in tokens) * len(tokens)
        ways = f"give more text, raise tokens_per_domain, or ask for at most {most}"
        raise DataError(f"{what}, but activations_tokens = {asked.activations_tokens} takes {share} of each domain; {ways}")
    counts = [len(part) for part in np.array_split(np.arange(asked.activations_tokens), len(tokens))]
    pairs = zip(tokens, counts, strict=True)
    return [np.arange(count, dtype=np.int64) * len(one.ids_T) // max(count, 1) for one, count in pairs]


def _command(folder: Path, out: Path, domains: Sequence[Domain], asked: RecordOptions, device: str) -> str:
    """The command line that does the same."""
    words = ["moefold", "upcycle", "record", "--from", str(folder), "--out", str(out)]
    for domain in domains:
        words += ["--token-ids" if domain.token_ids else "--domain", f"{domain.name}={domain.path}"]
    for f in fields(asked):
        value = getattr(asked, f.name)
        if value != f.default:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words += [f"--{f.name.replace('_', '-')}", text]
    return shlex.join([*words, *(["--device", device] if device != "auto" else [])])


def _options(options: Mapping[str, Any]) -> RecordOptions:
    known = [f.name for f in fields(RecordOptions)]
    if unknown := [name for name in options if name not in known]:
        raise ConfigError([Problem(f"upcycle.record.{name}", f"unknown option; known: {', '.join(known)}") for name in unknown])
    return RecordOptions(**options)


def _device(device: str) -> str:
    import torch

    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError([Problem("upcycle.record.device", f"is {device!r}; legal: auto, cpu, cuda")])
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError([Problem("upcycle.record.device", "is 'cuda', but torch finds no such device here; use 'cpu'")])
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _untold(stage: str, done: int, total: int, seconds: float) -> None:
    """Progress that nobody asked for."""
