"""What an upcycling has done: the object that is returned, its text, its page. Imports no torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...moe.config import ModelConfig
from ...moe.errors import CheckpointError
from ...moe.hf.writer import Written
from ..console import duration, human
from ..html_page import Part, frame, html_page, write_html
from ..report_parts import csv_link, figure, join, table
from ..rundir import write_atomic
from .progress import size
from .targets import Choice

if TYPE_CHECKING:
    from .proof import Proof

JSON, PAGE = "upcycle.json", "upcycle.html"
SCHEMA = 1


class ProofError(CheckpointError):
    """A result that does not compute what it should. result: with its proof; path: where the files were put aside."""

    def __init__(self, result: UpcycleResult, path: Path):
        self.result, self.path = result, path
        super().__init__(f"{result.line}. It is kept in {path}, with {PAGE} and without config.json")


@dataclass(frozen=True, kw_only=True)
class UpcycleResult:
    """A model that was upcycled.

    folder: where it is. config: the model, as its format holds it. dense: the one (or the first) that it was made of.
    manifest: moefold.json but the sizes of files. written: files and bytes. peak_bytes: most memory that the process had while
    it wrote, None where it had loaded torch before. proof: None if none was asked for. notes: what to know before it is used.
    """

    folder: Path
    config: ModelConfig
    dense: ModelConfig
    choice: Choice
    manifest: Mapping[str, Any]
    written: Written | None
    peak_bytes: int | None
    proof: Proof | None
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """3 for a proof that has failed, else 0."""
        return 0 if self.proof is None or self.proof.passed else 3

    @property
    def line(self) -> str:
        """The verdict in one sentence."""
        if self.proof is not None:
            return f"{self.folder.name} {self.proof.line()}"
        return (
            f"{self.folder.name} was written; nobody has compared it with the dense model: --proof full does that, now or later"
        )

    @property
    def tone(self) -> str:
        if self.exit_code:
            return "bad"
        return "good" if self.proof is not None and self.proof.exact else "warn"

    def uses(self) -> Counter[str]:
        """How many tensors of the sources were copied, transformed, or ignored."""
        return Counter(use["use"] for source in self.manifest["sources"] for use in source["tensors"].values())

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of what is shown of the model."""
        moe, options = self.config.moe, self.manifest["options"]
        assert moe is not None
        shared = f" and {moe.shared_width} shared neurons" if moe.shared_width else ""
        uses = self.uses()
        rows = [
            ("sources", ", ".join(f"{s['folder']} ({s['model_type']})" for s in self.manifest["sources"])),
            (
                "format",
                f"{self.manifest['target']} for {self.manifest['runtime']}, weights {self.manifest['dtype']}, routers F32",
            ),
            ("method", options["method"]),
            (
                "experts",
                f"{moe.num_experts} of width {moe.expert_dim}, top-{moe.top_k}{shared}, in {len(self.config.moe_layers)} layers",
            ),
            *_attention(self.config),
            ("parameters", f"{human(self.config.num_params)}, of which a token uses {human(self.config.num_active_params)}"),
            ("dense model", f"{human(self.dense.num_params)} parameters"),
            ("source tensors", f"{uses['copied']} copied, {uses['transformed']} transformed, {uses['ignored']} ignored"),
        ]
        if self.written is not None:
            resumed = f", of which {size(self.written.resumed_bytes)} by earlier runs" if self.written.resumed_bytes else ""
            rows.append(("written", f"{size(sum(self.written.files.values()))} in {duration(self.written.seconds)}{resumed}"))
        if self.peak_bytes is not None:
            rows.append(("memory", f"{size(self.peak_bytes)} at most, while writing"))
        return rows

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        written = (
            None
            if self.written is None
            else {
                "files": dict(self.written.files),
                "tensor_bytes": self.written.tensor_bytes,
                "resumed_bytes": self.written.resumed_bytes,
                "seconds": self.written.seconds,
            }
        )
        return {
            "schema": SCHEMA,
            "line": self.line,
            "exit_code": self.exit_code,
            "folder": str(self.folder),
            "target": self.manifest["target"],
            "considered": dict(self.choice.considered),
            "exact": self.manifest["exact"],
            "gap": self.manifest["gap"],
            "rewrites": self.manifest["rewrites"],
            "options": self.manifest["options"],
            "params": self.config.num_params,
            "active_params": self.config.num_active_params,
            "model": asdict(self.config),
            "tensors": dict(self.uses()),
            "written": written,
            "peak_bytes": self.peak_bytes,
            "notes": list(self.notes),
            "proof": None if self.proof is None else self.proof.to_dict(),
        }

    def render(self) -> str:
        """For the console."""
        facts = self.facts()
        width = max(len(name) for name, _ in facts)
        lines = [self.line, *(f"  {name:{width}}  {text}" for name, text in facts)]
        lines += [f"  rewritten: {rewrite['says']}" for rewrite in self.manifest["rewrites"]]
        lines += [] if len(self.choice.considered) == 1 else [f"  {text}" for text in self.choice.lines()]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def page(self) -> str:
        """One HTML file that needs no network."""
        items = "".join(f"<li>{escape(note)}</li>" for note in self.notes)
        lead = (
            f'<div class="verdict {self.tone}" role="status"><p><strong>{escape(self.line)}</strong></p>'
            f"{f'<ul>{items}</ul>' if items else ''}</div>"
        )
        title = f"Upcycling: {self.folder.name}"
        return html_page(
            f"{title} – moefold", title, lead, [_facts(self), _layers(self), _choice(self), _sources(self), _options(self)]
        )

    def write(self, folder: Path) -> Path:
        """upcycle.json and upcycle.html into a folder; returns the page's path."""
        write_atomic(folder / JSON, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
        write_html(folder / PAGE, self.page())
        return folder / PAGE

    def _repr_html_(self) -> str:
        return frame(self.page(), f"upcycling of {self.folder.name}")


def _attention(config: ModelConfig) -> list[tuple[str, str]]:
    """The fact of attention experts, where there are some."""
    if config.attention_experts == 1:
        return []
    kept = "each with its own keys and values" if config.attention_expert_kv == "own" else "on the same keys and values"
    return [("attention", f"{config.attention_experts} experts in every layer, all run for each token, {kept}")]


def _facts(result: UpcycleResult) -> Part:
    rewrites = [(rewrite["name"], rewrite["says"]) for rewrite in result.manifest["rewrites"]]
    body = table("The model", ["", ""], result.facts())
    return Part(
        "model", "Model", body + (table("Rewrites, exact, that the format needs", ["name", "what"], rewrites) if rewrites else "")
    )


def _layers(result: UpcycleResult) -> Part:
    proof = result.proof
    if proof is None:
        return Part("proof", "Proof", None, "nobody has made it; the same command with --proof full does")
    from ..plots import Series, lines
    from .proof import layer_rows

    x = [float(layer.layer) for layer in proof.layers]
    curves = [Series("float32", x, [_drawn(layer.worst) for layer in proof.layers])]
    if proof.stored is not None:
        curves.append(Series(proof.stored_dtype, x, [_drawn(layer.stored_worst) for layer in proof.layers]))
    head = ["layer", "kind", "largest, float32", "mean, float32", f"largest, {proof.stored_dtype}", f"mean, {proof.stored_dtype}"]
    rows = layer_rows(proof.layers)
    plot = lines(
        "layers", "Difference by layer", "layer", "largest difference / largest value", curves, from_zero=True, wide=True
    )
    says = (
        "What each layer's feed-forward network adds to the residual stream, dense and upcycled, for the same input. Largest: "
        f"largest difference / largest value; mean: likewise. Allowed: {proof.tolerance:.1e} ({proof.tolerance_says}). "
        f"Compared with {proof.against}, on {proof.tokens}."
    )
    ends = [["float32", proof.end.worst, proof.end.kl, proof.end.top1]]
    if proof.stored is not None:
        ends.append([proof.stored_dtype, proof.stored.worst, proof.stored.kl, proof.stored.top1])
    end = table(
        "From tokens to logits, each model alone",
        ["computed in", "largest difference / largest logit", "KL(dense || upcycled), nats", "same top token"],
        [[kind, *(f"{v:.3g}" for v in values)] for kind, *values in ends],
    )
    shown = figure("Difference by layer", plot, says, JSON, csv_link("layers", head, rows, JSON))
    expected = f"<p>{escape(f'Expected: {proof.expected}.')}</p>" if proof.expected else ""
    return Part("proof", "Proof", join(expected, end, shown, table("By layer", head, rows)))


def _drawn(value: float | None) -> float:
    """What a plot can show: a gap for values that are not finite."""
    return value if value is not None and math.isfinite(value) else math.nan


def _choice(result: UpcycleResult) -> Part:
    rows = [
        (target, ("taken: " if target == result.manifest["target"] else "") + text)
        for target, text in result.choice.considered.items()
    ]
    return Part("format", "Format", table("Formats that were considered", ["format", "verdict"], rows))


def _sources(result: UpcycleResult) -> Part:
    files = [
        (f"{Path(source['folder']).name}/{name}", file["bytes"], file["sha256"])
        for source in result.manifest["sources"]
        for name, file in source["files"].items()
    ]
    rows = [
        (name, use["use"], use.get("into", 0), use.get("why") or ", ".join(use.get("by", [])))
        for source in result.manifest["sources"]
        for name, use in source["tensors"].items()
        if use["use"] != "copied"
    ]
    changed = (
        table("Tensors that were not just copied", ["tensor", "use", "into", "how, or why not"], rows[:200]) if rows else None
    )
    more = f"<p>{len(rows) - 200} more are in moefold.json.</p>" if len(rows) > 200 else None
    return Part("sources", "Sources", join(table("Files that were read", ["file", "bytes", "SHA-256"], files), changed, more))


def _options(result: UpcycleResult) -> Part:
    rows = [(name, "none" if value is None else str(value)) for name, value in result.manifest["options"].items()]
    versions = list(result.manifest["versions"].items())
    return Part(
        "options", "Options", join(table("Options", ["name", "value"], rows), table("Versions", ["name", "version"], versions))
    )
