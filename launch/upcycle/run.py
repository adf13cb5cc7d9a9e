"""`moefold upcycle`: from dense checkpoints to a Mixture-of-Experts one, with its manifest, proof and report.

Nothing here imports torch before the files are written, so that a model of any size is written in little memory. What is being
made is in OUT.unproven(.partial), and gets its name when it has been proven.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from ...moe.config import ModelConfig
from ...moe.errors import CheckpointError, ConfigError, Problem
from ...moe.hf.codec import common_dtype
from ...moe.hf.families import carried, read_parts, write_tensors
from ...moe.hf.family import Runtime
from ...moe.hf.files import CONFIG, Checkpoint, read_json
from ...moe.hf.journal import JOURNAL
from ...moe.hf.matrix import Matrix
from ...moe.hf.rewrites import rewritten
from ...moe.hf.shards import Tensors
from ...moe.hf.writer import MANIFEST, SHARD_BYTES, Written, write_checkpoint
from ...moe.upcycle.build import upcycle_parts
from ...moe.upcycle.options import UpcycleOptions
from ..memory import peak_resident_bytes
from ..rundir import write_atomic
from .manifest import Source, make_manifest, narrower, rounds, source_hashes, tensor_uses
from .progress import Told
from .recipe import FILE as RECIPE
from .recipe import recipe
from .report import JSON, ProofError, UpcycleResult
from .targets import AUTO, Choice, choose, family_named

Dtype = Literal["fp32", "bf16", "fp16"]
DTYPES = (("fp32", "F32", "float32"), ("bf16", "BF16", "bfloat16"), ("fp16", "F16", "float16"), ("fp64", "F64", "float64"))
"""Option, name in safetensors, name in config.json."""
PROOF_TOKENS = 512


@dataclass(frozen=True)
class Plan:
    """All that is known before anything is written."""

    sources: tuple[Source, ...]
    choice: Choice
    options: UpcycleOptions
    config: ModelConfig
    tensors: Tensors
    config_json: Mapping[str, Any]
    dtype: str
    rounded: bool


def upcycle(
    dense: str | PathLike[str] | Sequence[str | PathLike[str]],
    out: str | PathLike[str],
    *,
    target: str = AUTO,
    runtime: Runtime = "transformers",
    dtype: Dtype | None = None,
    inexact_ok: bool = False,
    proof: Literal["full", "none"] = "full",
    proof_tokens: int = PROOF_TOKENS,
    device: str = "auto",
    shard_bytes: int = SHARD_BYTES,
    progress: Told | None = None,
    say: Callable[[str], None] | None = None,
    **options: Any,
) -> UpcycleResult:
    """Make a Mixture-of-Experts checkpoint of a dense one (or of several), and prove that it computes the same.

    Called again with the same arguments after it was interrupted, it goes on where it was. Memory while writing does not depend
    on the size of the model.

    Args:
        dense: folder of a Hugging Face checkpoint, or several for methods that take several.
        out: folder to make; must not exist, be empty, or hold this very result, not proven yet.
        target: model_type to write, "native" for our own format, or "auto": the best that holds the model exactly.
        runtime: program that is to run it; what it ignores of config.json counts as not held.
        dtype: of the weights; None = as stored. Routers are always float32.
        inexact_ok: write a result that computes something else than the dense model, and say how far off it is.
        proof: "full" compares the written files with the dense model, layer by layer and from tokens to logits.
        proof_tokens: number of tokens for that.
        device: that the proof is computed on: "cpu", "cuda", or "auto".
        shard_bytes: most bytes of tensors in a file.
        progress: called with stage, done, total and seconds.
        say: called with what is decided before the long work begins: the format, and why.
        options: of `UpcycleOptions`: method, num_experts, top_k, granularity, ...

    Raises:
        ConfigError: options that do not fit; `RefusedError` with every reason where the target does not hold the model or the
            method is not exact.
        CheckpointError: sources that cannot be read, a folder that is not empty, a full disk; `ProofError` for a result that
            fails its proof, which is kept beside under another name.
    """
    out, told = Path(out).absolute(), progress if progress is not None else _untold
    _check_arguments(proof, proof_tokens, runtime, dtype, device, options)
    _check_out(out, proof)
    folders = [dense] if isinstance(dense, (str, PathLike)) else list(dense)
    plan = make_plan([Path(folder) for folder in folders], target, runtime, dtype, inexact_ok, options)
    if say is not None:
        say("\n".join(plan.choice.lines()))
    cache = out.with_name(out.name + ".sources.json")
    manifest = _manifest(plan, runtime, cache, told)
    written, peak = _write(out, plan, manifest, shard_bytes, told)
    try:
        return _finish(out, plan, manifest, written, peak, None if proof == "none" else proof_tokens, device, told)
    finally:
        # what was interrupted is still there and needs it
        if not _staging(out).exists():
            cache.unlink(missing_ok=True)


def make_plan(
    folders: Sequence[Path], target: str, runtime: Runtime, dtype: Dtype | None, inexact_ok: bool, options: Mapping[str, Any]
) -> Plan:
    """Open the sources, choose the format, and lay out every tensor. Reads headers, and what a method checks first."""
    if not folders:
        raise ConfigError([Problem("upcycle.dense", "names no folder; give one of a dense model, or several to merge")])
    sources = tuple(Source.open(folder) for folder in folders)
    choice = choose([source.config for source in sources], target, options, runtime, inexact_ok)
    taken = choice.taken
    assert taken.options is not None
    family = family_named(taken.target)
    planned, parts = upcycle_parts([(source.config, source.parts) for source in sources], taken.options)
    config, parts = rewritten(taken.rewrites, planned, parts)
    first = sources[0].checkpoint
    own = common_dtype([source.checkpoint.dtype for source in sources])
    main = own if dtype is None else next(name for option, name, _ in DTYPES if option == dtype)
    matrices = write_tensors(family, config, parts, runtime)
    layouts = family.tensors(config)
    tensors = {name: (m, _dtype(m, layouts[name].parts, main, dtype is None)) for name, m in matrices.items()}
    named = next(long for _, name, long in DTYPES if name == main)
    config_json = family.write(config, runtime) | carried(first.config) | {"dtype": named, "torch_dtype": named}
    rounded = any(rounds(matrix, kind) for matrix, kind in tensors.values())
    return Plan(sources, choice, taken.options, config, tensors, config_json, main, rounded)


def _manifest(plan: Plan, runtime: Runtime, cache: Path, told: Told) -> dict[str, Any]:
    uses = tensor_uses(plan.sources, plan.tensors, plan.options)
    hashes = source_hashes(plan.sources, cache, told)
    return make_manifest(plan.sources, hashes, plan.choice.taken, uses, runtime=runtime, dtype=plan.dtype)


def _dtype(matrix: Matrix, parts: tuple[str, ...], main: str, keep: bool) -> str:
    """How a tensor is stored: routers in F32, others in `main`; with keep, vectors (norms) that need more bits as they are."""
    if any(part.endswith((".router", ".router_bias")) for part in parts):
        return "F32"
    return matrix.dtype if keep and len(matrix.shape) == 1 and narrower(main, matrix.dtype) else main


def _write(out: Path, plan: Plan, manifest: Mapping[str, Any], shard_bytes: int, told: Told) -> tuple[Written | None, int | None]:
    """Write the files, unless an earlier run has; (what was written, most memory of this process)."""
    staging = _staging(out)
    if _unproven(out):
        # complete, but not proven: taken up from there
        _check_same(out, manifest)
        out.rename(staging)
    if (staging / MANIFEST).is_file() and not (staging / JOURNAL).is_file():
        _check_same(staging, manifest)
        return None, None
    clean = "torch" not in sys.modules
    written = write_checkpoint(
        staging,
        plan.config_json,
        plan.tensors,
        manifest=manifest,
        shard_bytes=shard_bytes,
        carry=plan.sources[0].checkpoint.carry,
        progress=lambda done, total, seconds: told("writing", done, total, seconds),
    )
    return written, peak_resident_bytes() if clean else None


def _check_same(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a folder that was written as something else."""
    found = read_json(folder / MANIFEST, "it says what was written")
    if {key: value for key, value in found.items() if key != "files"} != manifest:
        raise CheckpointError(f"{folder} was made with other options, sources or another version: remove it to start again")


def _finish(
    out: Path,
    plan: Plan,
    manifest: Mapping[str, Any],
    written: Written | None,
    peak: int | None,
    proof_tokens: int | None,
    device: str,
    told: Told,
) -> UpcycleResult:
    """Read the files back, prove, report, and give the folder its name."""
    staging, source = _staging(out), plan.sources[0]
    config, parts = read_parts(Checkpoint.open(staging))
    proof = None
    if proof_tokens is not None:
        from .proof import model_side, prove
        from .tokens import proof_tokens as choose_tokens

        place = _device(device)
        through = plan.dtype if narrower(plan.dtype, source.checkpoint.dtype) else None
        tokens = choose_tokens(source.checkpoint.folder, config.vocab_size, config.max_seq_len, proof_tokens, plan.options.seed)
        proof = prove(
            model_side(source.config, source.parts, through, place),
            model_side(config, parts, None, place),
            tokens,
            exact=plan.choice.taken.gap is None,
            expected=plan.choice.taken.gap,
            rounded=plan.rounded,
            dtype=plan.dtype,
            told=told,
        )
    text = recipe(out, plan.config, plan.options, dtype=plan.dtype, tokenizer=(staging / "tokenizer.json").is_file())
    write_atomic(staging / RECIPE, text)
    result = UpcycleResult(
        folder=out,
        config=plan.config,
        dense=source.config,
        choice=plan.choice,
        manifest=manifest,
        written=written,
        peak_bytes=peak,
        proof=proof,
        notes=_notes(plan),
    )
    result.write(staging)
    if result.exit_code:
        _put_aside(out, result)
    staging.rename(out)
    return result


def _put_aside(out: Path, result: UpcycleResult) -> None:
    """Keep a result that has failed, such that no program takes it for a model, and raise ProofError."""
    names = [out.with_name(f"{out.name}.failed-proof{f'-{i}' if i else ''}") for i in range(1000)]
    aside = next(name for name in names if not name.exists())
    (_staging(out) / CONFIG).rename(_staging(out) / "config.failed-proof.json")
    _staging(out).rename(aside)
    raise ProofError(result, aside)


def _notes(plan: Plan) -> tuple[str, ...]:
    """What to know before the result is used."""
    notes = []
    moe = plan.config.moe
    if plan.choice.taken.splits:
        notes.append(
            "the format cannot limit a token to whole copies: programs that compute router logits in 16 bits may, where these "
            "tie, choose parts of two copies; glm4_moe and native can"
        )
    if moe is not None and moe.router.top_groups == 1 < moe.router.num_groups and plan.options.normalized:
        notes.append(
            "a token takes one whole copy with a weight of 1, so that the model's loss does not train the choice of copies: "
            "choose two copies (top_k = 2 * granularity) or set group_limited = false before training"
        )
    if plan.options.router_init == "zeros" and not plan.options.router_noise_std:
        notes.append("the router is 0, so that every token takes the same experts: set router_noise_std before training")
    if plan.config.num_layers and moe is not None and moe.num_experts & (moe.num_experts - 1):
        notes.append(f"{moe.num_experts} experts are no power of two, which some converters to other formats want")
    return tuple(notes)


def _staging(out: Path) -> Path:
    """Where the result is until it has been proven."""
    return out.with_name(out.name + ".unproven")


def _check_out(out: Path, proof: str) -> None:
    again = proof == "full" and _unproven(out) and not _staging(out).exists()
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not again:
        done = " (an upcycled model that is complete)" if (out / JSON).is_file() else ""
        raise CheckpointError(f"{out} exists and is not an empty folder{done}: choose another, or remove it")


def _unproven(out: Path) -> bool:
    """Whether a folder holds a complete result of ours that was not compared with the dense model."""
    return (out / JSON).is_file() and read_json(out / JSON, "").get("proof", False) is None


def _check_arguments(
    proof: str, proof_tokens: int, runtime: str, dtype: str | None, device: str, options: Mapping[str, Any]
) -> None:
    problems = []
    legal = (
        ("proof", proof, ("full", "none")),
        ("runtime", runtime, ("transformers", "vllm")),
        ("dtype", dtype, (None, "fp32", "bf16", "fp16")),
        ("device", device, ("auto", "cpu", "cuda")),
    )
    for name, value, values in legal:
        if value not in values:
            problems.append(Problem(f"upcycle.{name}", f"is {value!r}; legal: {', '.join(map(str, values))}"))
    if proof_tokens < 1:
        problems.append(Problem("upcycle.proof_tokens", f"is {proof_tokens}, but must be positive; for none, set proof = 'none'"))
    known = [f.name for f in fields(UpcycleOptions)]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            problems.append(
                Problem(f"upcycle.{name}", f"unknown option; {f'did you mean {near[0]!r}?' if near else f'known: {known}'}")
            )
    if problems:
        raise ConfigError(problems)


def _device(device: str) -> str:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError([Problem("upcycle.device", "is 'cuda', but torch finds no such device here; use 'cpu'")])
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def _untold(stage: str, done: int, total: int, seconds: float) -> None:
    """Progress that nobody asked for."""
