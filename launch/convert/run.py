"""Hugging Face folder to training checkpoint, training checkpoint to Hugging Face folder of any family that can hold the model,
and larger models from trained ones. Imports no torch itself: reading and writing training checkpoints does."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ... import __version__
from ...moe.config import ModelConfig
from ...moe.errors import CheckpointError, ConfigError, Problem
from ...moe.hf.codec import common_dtype
from ...moe.hf.families import FAMILIES, NATIVE, write_tensors
from ...moe.hf.family import Family, NotHeldError, Runtime
from ...moe.hf.files import CONFIG
from ...moe.hf.matrix import Matrix
from ...moe.hf.rewrites import adapt, rewritten
from ...moe.hf.shards import Tensors
from ...moe.hf.writer import SHARD_BYTES, write_checkpoint
from ...moe.upcycle.growth import stack_depth, widen_ffn
from ..config import dump
from ..settings import DataConfig, RunConfig, TrainConfig
from ..upcycle.progress import Told
from .results import MODEL_TOML, Exported, Imported
from .source import Source, open_hf, open_source

Dtype = Literal["bf16", "fp16", "fp32", "fp64"]
DTYPES = (("bf16", "BF16", "bfloat16"), ("fp16", "F16", "float16"), ("fp32", "F32", "float32"), ("fp64", "F64", "float64"))
"""Option, name in safetensors, name in config.json."""
NARROW = ("BF16", "F16")
_LAYER = re.compile(r"layers\.(\d+)\.")


class NotConvertedError(ConfigError):
    """A model that the format asked for cannot hold."""

    title = "not converted"


@dataclass(frozen=True, kw_only=True)
class _Form:
    """How a model is to be written. dtype: of its weights; dtypes: of parts that are wider. donor: whose special tokens and files
    it gets."""

    family: Family
    runtime: Runtime
    dtype: str
    dtypes: Mapping[str, str]
    donor: Source
    made_by: str
    shard_bytes: int


def import_checkpoint(
    folder: str | Path, out: str | Path, *, shard_bytes: int | None = None, progress: Told | None = None
) -> Imported:
    """Make a training checkpoint, weights only, of a Hugging Face folder. `checkpoint.init_from` takes it under any layout.

    Weights become float32 (float64 stays); `export_checkpoint` makes the same tensors of it again. OUT/model.toml holds the
    section [model]. About `shard_bytes` (256 MiB) are in memory at a time. Called again after an interruption, it goes on.

    Raises:
        CheckpointError: the folder is missing, damaged, quantised; OUT is not empty; the disk is too small; an interrupted import
            to OUT was of something else, or the folder has changed since.
        ConfigError: a model that cannot be represented, with every reason.
    """
    from .native_write import SHARD_BYTES as DEFAULT
    from .native_write import write_native

    if Path(folder).is_dir() and not (Path(folder) / CONFIG).is_file():
        source = open_source(folder)
        raise CheckpointError(f"{source.path} is a training checkpoint already; `convert export` makes Hugging Face folders")
    source, out = open_hf(folder), Path(out).absolute()
    wrote = write_native(
        out,
        source.config,
        source.parts,
        imported=source.imported(),
        texts={MODEL_TOML: _model_toml(source, out)},
        carry=source.carry,
        shard_bytes=shard_bytes or DEFAULT,
        progress=progress,
    )
    return Imported(source=source, out=out, nbytes=wrote.nbytes, resumed=wrote.resumed)


def export_checkpoint(
    checkpoint: str | Path,
    out: str | Path,
    *,
    target: str | None = None,
    runtime: Runtime = "transformers",
    dtype: Dtype | None = None,
    like: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Told | None = None,
) -> Exported:
    """Write a training checkpoint (or another Hugging Face folder) as a Hugging Face folder. Called again after an interruption,
    it goes on.

    Args:
        checkpoint: a checkpoint, or a run directory, whose latest is taken.
        target: `model_type` to write; None = that of `like`, or of what the checkpoint was imported from.
        runtime: the program that is to run it.
        dtype: of the weights; None = that of `like`, or of what the checkpoint was imported from, else float32 (as trained).
            Where it is that, parts that were wider there are so here.
        like: a Hugging Face folder of which tokenizer files and special tokens are taken too.

    Raises:
        NotConvertedError: the target cannot hold the model; every reason, and which formats can.
        CheckpointError: files that are missing or damaged, OUT that is not empty, a disk that is too small.
    """
    donor = None if like is None else open_hf(like)
    source = open_source(checkpoint, progress)
    donor = donor or source
    target = target or donor.family
    if target is None:
        what = f"is not set, and {source.path} was trained here; {held_by(source.config, runtime)}"
        raise NotConvertedError([Problem("target", what)])
    main = donor.dtype if dtype is None else dict((option, name) for option, name, _ in DTYPES)[dtype]
    dtypes = donor.dtypes
    if donor.family is None or donor.dtype != main:
        # a rounded selection bias would choose other experts
        dtypes = {part: "F32" for part in source.parts if part.endswith(".router_bias") and main in NARROW}
    form = _Form(
        family=_family(target, source.config, runtime),
        runtime=runtime,
        dtype=main,
        dtypes=dtypes,
        donor=donor,
        made_by="moefold convert export",
        shard_bytes=shard_bytes,
    )
    notes = []
    if source.kind == "training" and main in NARROW and not (source.family and source.dtype == main):
        notes.append(f"float32 weights were rounded to {main}; --dtype fp32 keeps them as they are")
    if not any(path.name.startswith(("tokenizer", "spiece", "vocab")) for path in donor.carry):
        notes.append("there is no tokenizer to take along; --like HF_FOLDER takes that of another model")
    return _write(source, Path(out).absolute(), (source.config, source.parts), form, tuple(notes), progress)


def grow(
    folder: str | Path,
    out: str | Path,
    *,
    depth_times: int | None = None,
    ffn_times: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Told | None = None,
) -> Exported:
    """Write a larger model of the same family: its layers `depth_times` over (G_stack, arXiv 2405.15319; trains on from a worse
    loss), or every feed-forward network `ffn_times` as wide (Net2WiderNet, arXiv 1511.05641; the same function).

    Raises ConfigError unless exactly one of the two is given, and where the model cannot be grown so; else as
    `export_checkpoint`.
    """
    if (depth_times is None) == (ffn_times is None):
        raise ConfigError([Problem("grow", f"depth_times = {depth_times}, ffn_times = {ffn_times}: give exactly one of them")])
    source = open_source(folder, progress)
    if source.family is None:
        raise ConfigError(
            [Problem("grow", f"{source.path} was trained here: make a Hugging Face folder by convert export first")]
        )
    L = source.config.num_layers
    if depth_times is not None:
        grown = stack_depth(source.config, source.parts, depth_times)
        note = f"{L} layers became {grown[0].num_layers}, so it does not compute what the source does: train on"
    else:
        assert ffn_times is not None
        grown = widen_ffn(source.config, source.parts, ffn_times)
        note = "it computes what the source does; copies of a neuron get equal gradients, so add noise before training on"
    origin = {part: _LAYER.sub(lambda found: f"layers.{int(found[1]) % L}.", part) for part in grown[1]}
    form = _Form(
        family=_family(source.family, grown[0], "transformers"),
        runtime="transformers",
        dtype=source.dtype,
        dtypes={part: source.dtypes[before] for part, before in origin.items() if before in source.dtypes},
        donor=source,
        made_by=f"moefold convert grow, depth x {depth_times or 1}, ffn x {ffn_times or 1}",
        shard_bytes=shard_bytes,
    )
    return _write(source, Path(out).absolute(), grown, form, (note,), progress)


def held_by(config: ModelConfig, runtime: Runtime) -> str:
    """Which formats can hold a model, in words."""
    found = []
    for name, family in FAMILIES.items():
        try:
            _, rewrites = adapt(family, config, runtime)
        except NotHeldError:
            continue
        found.append(f"{name} (after {', '.join(r.name for r in rewrites)})" if rewrites else name)
    return f"these can hold the model: {', '.join(found)}" if found else f"no format can hold the model for {runtime}"


def _family(target: str, config: ModelConfig, runtime: Runtime) -> Family:
    """The family of a target that can hold a model, perhaps after rewrites."""
    name = NATIVE if target == "native" else target
    if name not in FAMILIES:
        what = f"is {target!r}, which is no format that is written; {held_by(config, runtime)}"
        raise NotConvertedError([Problem("target", what)])
    try:
        adapt(FAMILIES[name], config, runtime)
    except NotHeldError as error:
        problems = [Problem(name, reason) for reason in error.reasons]
        raise NotConvertedError([*problems, Problem("instead", held_by(config, runtime))]) from error
    return FAMILIES[name]


def _write(
    source: Source,
    out: Path,
    model: tuple[ModelConfig, Mapping[str, Matrix]],
    form: _Form,
    notes: tuple[str, ...],
    progress: Told | None,
) -> Exported:
    family, donor = form.family, form.donor
    _, rewrites = adapt(family, model[0], form.runtime)
    config, parts = rewritten(rewrites, *model)
    tensors = _with_dtypes(form, config, write_tensors(family, config, parts, form.runtime))
    named = next(long for _, name, long in DTYPES if name == form.dtype)
    config_json = family.write(config, form.runtime) | dict(donor.special) | {"dtype": named, "torch_dtype": named}
    manifest = {
        "made_by": form.made_by,
        "moefold": __version__,
        "source": str(source.path),
        "step": source.step,
        "target": family.model_type,
        "runtime": form.runtime,
        "dtype": form.dtype,
        "rewrites": [rewrite.name for rewrite in rewrites],
    }

    def told(done: int, total: int, seconds: float) -> None:
        if progress is not None:
            progress("writing", done, total, seconds)

    written = write_checkpoint(
        out, config_json, tensors, manifest=manifest, shard_bytes=form.shard_bytes, carry=donor.carry, progress=told
    )
    return Exported(
        source=source,
        out=out,
        target=family.model_type,
        dtype=form.dtype,
        tensors=len(tensors),
        nbytes=written.tensor_bytes,
        rewrites=rewrites,
        carried=tuple(path.name for path in donor.carry),
        notes=notes,
    )


def _with_dtypes(form: _Form, config: ModelConfig, matrices: Mapping[str, Matrix]) -> Tensors:
    """Every tensor with the dtype to store it as: that of the weights, or wider where one of its parts is."""
    layouts = form.family.tensors(config)
    kinds = {
        name: common_dtype([form.dtypes.get(part, form.dtype) for part in layouts[name].parts] or [form.dtype])
        for name in matrices
    }
    return {name: (matrix, kinds[name]) for name, matrix in matrices.items()}


def _model_toml(source: Source, out: Path) -> str:
    """The section [model] as a file, and how to train with it."""
    import tomli_w

    # the other sections are not written; a sequence of one token fits every model
    whole = dump(RunConfig(model=source.config, data=DataConfig(seq_len=1), train=TrainConfig(steps=1)))
    lines = [
        f"# The model of {source.path.name} ({source.family}). To train it, from its weights:",
        "#",
        f"#   moefold pretrain {out / MODEL_TOML} TRAIN.toml --checkpoint.init_from {out}",
    ]
    if any(path.name == "tokenizer.json" for path in source.carry):
        lines += ["#", f"# with its tokenizer: --data.tokenizer {out / 'tokenizer.json'}"]
    return "\n".join(lines) + "\n\n" + tomli_w.dumps({"model": tomllib.loads(whole)["model"]})
