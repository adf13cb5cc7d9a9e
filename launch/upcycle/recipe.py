"""A configuration to train the result with, and why its numbers are what they are. Imports no torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from ...moe.config import ModelConfig
from ...moe.upcycle.options import UpcycleOptions

FILE = "pretrain.toml"
BATCH_TOKENS = 1024 * 4096
"""Of the 8 x 1.5 B runs of Drop-Upcycling; 4 M tokens were better than 2 M and 32 M in NVIDIA's."""
TOKENS = 100_000_000_000
"""The shortest of NVIDIA's runs."""


def recipe(out: Path, config: ModelConfig, options: UpcycleOptions, *, dtype: str, tokenizer: bool) -> str:
    """TOML for `moefold pretrain`, every number with its source. out: folder of the model."""
    seq_len = min(4096, config.max_seq_len)
    batch = max(1, BATCH_TOKENS // seq_len)
    native = f"{out}-native"
    data = (
        [f"tokenizer = {_quoted(str(out / 'tokenizer.json'))}"]
        if tokenizer
        else [
            "# the model came without tokenizer.json: set the one that it was trained with",
            '# tokenizer = "tokenizer.json"',
        ]
    )
    return "\n".join(
        [
            f"# Training of {out.name}, upcycled by method {options.method}. Once, to have its weights as a checkpoint:",
            "#",
            f"#   moefold convert import {out} {native}",
            f"#   torchrun --nproc-per-node N -m moefold.launch.pretrain {out / FILE}",
            "",
            "[run]",
            f"name = {_quoted(out.name)}",
            "",
            *_model(config),
            *_balance(config, options),
            "",
            "[data]",
            "# Text of the kind that the dense model was trained on; without sources, this machine's Python library.",
            *data,
            f"seq_len = {seq_len}",
            "",
            *_train(seq_len, batch, dtype),
            "",
            "[checkpoint]",
            "# Weights only: step, optimizer and data start at zero.",
            f"init_from = {_quoted(native)}",
            "every = 500",
            "",
        ]
    )


def _train(seq_len: int, batch: int, dtype: str) -> list[str]:
    precision = "bf16" if dtype in ("BF16", "F16") else "fp32"
    return [
        "[train]",
        "# Your budget. Published: 0.1 T tokens (granularity helps there) and 1 T (much less), arXiv 2410.07524; 500 B, arXiv",
        "# 2502.19261. Whether that is worth it: moefold upcycle --advise.",
        f"tokens = {TOKENS:_}",
        f"# {batch * seq_len:,} tokens: about 4 M were better than 2 M and 32 M (arXiv 2410.07524).",
        f"global_batch = {batch}",
        "# Reset to the peak of the dense model's training, if you know it: better than going on with its last one (arXiv",
        "# 2410.07524). These are the peak, end and warm-up of 8 x 1.5 B models (code of arXiv 2502.19261).",
        "lr = 2e-4",
        "min_lr_ratio = 0.1",
        'schedule = "cosine"',
        "warmup_steps = 2000",
        f'precision = "{precision}"',
    ]


def _balance(config: ModelConfig, options: UpcycleOptions) -> list[str]:
    """The part on balance, below [model.moe]."""
    assert config.moe is not None
    lines = [
        "",
        "[model.moe.balance]",
        "# 1e-2 to 1e-3; without it experts die (arXiv 2410.07524). 0.02 in the runs of arXiv 2502.19261. A z-loss made no",
        "# difference (arXiv 2410.07524).",
        f"aux_loss_coeff = {config.moe.balance.aux_loss_coeff!r}",
    ]
    if config.moe.balance.expert_bias:
        lines.append("expert_bias = true")
    if options.router_init == "zeros" and not options.router_noise_std:
        lines += [
            "# The router is 0: every token takes the same experts until it has moved. Upcycle again with --router-noise-std",
            "# between 1e-3 and 2e-2, or mix noise into its logits at first (stochastic routing warm-up, arXiv 2503.05139).",
        ]
    else:
        lines += [
            "# If single experts run out of memory in the first steps, raise the coefficient for these: routing is random at",
            "# first. Ling mixes noise of the logits' mean and deviation into them while it warms up (arXiv 2503.05139).",
        ]
    return lines


def _model(config: ModelConfig) -> list[str]:
    """[model] and its tables: what differs from the defaults, and all sizes. Balance has a table with comments of its own."""
    tables: list[str] = []
    head = ["[model]", *_lines(config, tables, "model")]
    return [*head, *tables]


def _lines(record: Any, tables: list[str], path: str) -> list[str]:
    lines = []
    for f in dataclasses.fields(record):
        value = getattr(record, f.name)
        if dataclasses.is_dataclass(value):
            inner: list[str] = []
            below = [] if f.name in ("balance", "compress") else _lines(value, inner, f"{path}.{f.name}")
            tables += ["", f"[{path}.{f.name}]", *below] if below else []
            tables += inner
        elif value is not None and (f.default is dataclasses.MISSING or value != f.default):
            lines.append(f"{f.name} = {_value(value)}")
    return lines


def _value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return _quoted(value) if isinstance(value, str) else repr(value)


def _quoted(text: str) -> str:
    """A TOML string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in escaped) + '"'
