"""Upcycling a dense checkpoint on disk: speed against a plain copy, peak memory, and kills that change nothing.

Makes a random Llama checkpoint and turns it into Mixtral checkpoints of eight times its feed-forward weights, each in a process
of its own that never imports torch: `copy` (every expert a copy) and `virtual_groups` (every copy cut in two: row slices of gate
and up, scaled column slices of down). A plain copy is the source's files copied with shutil, which lets the kernel do it, again
and again until as many bytes are written. Both end when the disk has everything. They take turns; the ratio is the median of
neighbours' ratios. Then `virtual_groups` is killed at random bytes and run again each time: files must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from moefold.moe.config import ModelConfig
from moefold.moe.hf.families import FAMILIES, read_parts, write_tensors
from moefold.moe.hf.files import Checkpoint, file_sha256
from moefold.moe.hf.matrix import Normal
from moefold.moe.hf.parts import part_shapes
from moefold.moe.hf.writer import JOURNAL_BYTES, write_checkpoint
from moefold.moe.upcycle import UpcycleOptions, upcycle_parts

from .result import Result, Row

ROOT = Path(__file__).resolve().parent.parent
COPIES = 8
METHODS = {
    "copy": UpcycleOptions(method="copy", num_experts=COPIES, top_k=2),
    "virtual_groups": UpcycleOptions(
        method="virtual_groups", num_experts=2 * COPIES, granularity=2, top_k=4, group_limited=False
    ),
}
WIDTHS = ((8192, 28672), (4096, 14336), (2048, 7168), (1024, 3584), (256, 896))
"""Model and feed-forward width of Llama models, the largest of which a layer fits the size is taken."""
POLL_S = 0.0005


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gib", type=float, default=10.0, help="about the size of one result (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of everybody (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=10, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bytes at which to kill (default: %(default)s)")
    parser.add_argument(
        "--folder", type=Path, help="on the disk to measure; needs 2.3 times the size (default: that of temporary files)"
    )


def run(options: argparse.Namespace) -> Result:
    with tempfile.TemporaryDirectory(prefix="upcycle-", dir=options.folder) as name:
        folder = Path(name)
        config = dense_config(options.gib)
        make_source(folder / "source", config)
        taken = [one_round(folder, config, number) for number in range(options.rounds)]
        kills = [kill(folder, share) for share in kill_shares(options.kills, options.seed)] if options.kills else []
    rows: list[Row] = [row for rows in taken for row in rows]
    figures = summary(rows)
    if kills:
        rows += kills
        figures["kills_unchanged_share"] = statistics.mean(float(row["unchanged"] is True) for row in kills)
        figures["peak_rss_mib"] = max(figures["peak_rss_mib"], *(float(row["peak_rss_mib"] or 0) for row in kills))
    return Result(rows, figures)


def summary(rows: list[Row]) -> dict[str, float]:
    """ratio_to_copy of every method and the least of them, and the most memory that any run held."""
    copies = [float(row["mb_per_s"] or 0) for row in rows if row["what"] == "plain copy"]
    figures = {}
    for method in METHODS:
        ours = [float(row["mb_per_s"] or 0) for row in rows if row["what"] == method]
        figures[f"{method}_ratio_to_copy"] = statistics.median(a / b for a, b in zip(ours, copies, strict=True))
    figures["ratio_to_copy"] = min(figures.values())
    figures["peak_rss_mib"] = max(float(row["peak_rss_mib"] or 0) for row in rows)
    return figures


def row(what: str, number: int, nbytes: int, seconds: float, **cells: str | float | bool | None) -> Row:
    empty = {"peak_rss_mib": None, "killed_at_mib": None, "kept_mib": None, "unchanged": None}
    speed = nbytes / seconds / 1e6 if seconds else None
    return {"what": what, "round": number, "mib": nbytes / 2**20, "seconds": seconds, "mb_per_s": speed, **empty, **cells}


def dense_config(gib: float) -> ModelConfig:
    """A Llama model with as many layers as give about `gib` GiB of experts."""
    size = gib * 2**30
    for dim, ffn_dim in WIDTHS:
        layer = COPIES * 3 * dim * ffn_dim * 2
        if layer <= 1.1 * size or dim == WIDTHS[-1][0]:
            break
    heads = dim // 128
    return ModelConfig(
        dim=dim,
        num_layers=max(1, round(size / layer)),
        num_heads=heads,
        num_kv_heads=min(8, heads),
        vocab_size=1024,
        max_seq_len=2048,
        moe=None,
        dense_ffn_dim=ffn_dim,
    )


def make_source(folder: Path, config: ModelConfig) -> None:
    family = FAMILIES["llama"]
    parts = {name: Normal(shape, 0.02, 0, name, of_dtype="BF16") for name, shape in part_shapes(config).items()}
    tensors = {name: (matrix, "BF16") for name, matrix in write_tensors(family, config, parts).items()}
    write_checkpoint(folder, family.write(config), tensors, manifest={}, shard_bytes=1 << 30)


def one_round(folder: Path, config: ModelConfig, number: int) -> list[Row]:
    """A plain copy and every method, each from a disk that has nothing left to write."""
    rows: list[Row] = []
    for method in METHODS:
        os.sync()
        told = upcycle(folder, method)
        rows.append(row(method, number, int(told["bytes"]), told["seconds"], peak_rss_mib=told["rss_mib"]))
        shutil.rmtree(folder / "out")
    nbytes = int(statistics.mean(float(r["mib"] or 0) for r in rows) * 2**20)
    os.sync()
    rows.insert(0, row("plain copy", number, nbytes, plain_copy(folder, nbytes)))
    shutil.rmtree(folder / "copies")
    return rows


def plain_copy(folder: Path, nbytes: int) -> float:
    """Seconds to copy the source's files until `nbytes` are written, and to have the disk keep them."""
    sources = sorted((folder / "source").glob("*.safetensors"))
    (folder / "copies").mkdir()
    begin_s, left, count = time.perf_counter(), nbytes, 0
    while left > 0:
        source = sources[count % len(sources)]
        target = folder / "copies" / str(count)
        shutil.copyfile(source, target)
        with target.open("r+b") as file:
            if target.stat().st_size > left:
                file.truncate(left)
            os.fsync(file.fileno())
        left -= target.stat().st_size
        count += 1
    return time.perf_counter() - begin_s


def upcycle(folder: Path, method: str, kill_at: int | None = None) -> dict[str, float]:
    """What a process of its own says of its run; nothing if it was killed when the files had `kill_at` bytes."""
    source_bytes = written(folder / "source")
    # a small result would otherwise never come to its first journal
    every = JOURNAL_BYTES if kill_at is None else min(JOURNAL_BYTES, source_bytes // 4)
    command = [sys.executable, "-m", "bench.upcycle_stream", str(folder), method, str(every)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        while kill_at is not None and process.poll() is None:
            if written(folder / "out.partial") > kill_at:
                process.kill()
            time.sleep(POLL_S)
        said = process.communicate()[0]
    if kill_at is not None and process.returncode == -9:
        return {}
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(said)


def written(folder: Path) -> int:
    try:
        return sum(entry.stat().st_size for entry in os.scandir(folder) if entry.name.endswith(".safetensors"))
    except FileNotFoundError:  # not there yet, or renamed while it was read
        return 0


def child(folder: Path, method: str, journal_bytes: int) -> None:
    """Upcycle the source, and print bytes, seconds and peak memory."""
    begin_s = time.perf_counter()
    config, parts = upcycle_parts([read_parts(Checkpoint.open(folder / "source"))], METHODS[method])
    family = FAMILIES["mixtral"]
    tensors = {name: (matrix, matrix.dtype) for name, matrix in write_tensors(family, config, parts).items()}
    settings = {"method": method}
    found = write_checkpoint(
        folder / "out", family.write(config), tensors, manifest=settings, shard_bytes=2 << 30, journal_bytes=journal_bytes
    )
    seconds = time.perf_counter() - begin_s
    if "torch" in sys.modules:
        raise RuntimeError("upcycling has imported torch")
    status = Path("/proc/self/status").read_text()
    rss_mib = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024
    print(json.dumps({"bytes": sum(found.files.values()), "seconds": seconds, "rss_mib": rss_mib, "kept": found.resumed_bytes}))


def kill_shares(count: int, seed: int) -> list[float]:
    """At which parts of the bytes to kill."""
    draw = random.Random(seed)
    return [draw.random() for _ in range(count)]


def kill(folder: Path, share: float, method: str = "virtual_groups") -> Row:
    """Kill a run, run it again, and compare all files with those of the first run that is left alone."""
    expected = folder / "expected.json"
    if not expected.exists():
        upcycle(folder, method)
        expected.write_text(json.dumps(hashes(folder / "out")))
        shutil.rmtree(folder / "out")
    want: Mapping[str, list[str | int]] = json.loads(expected.read_text())
    total = sum(int(size) for name, (_, size) in want.items() if name.endswith(".safetensors"))
    said = upcycle(folder, method, int(share * total))
    if not said and not (folder / "out.partial").exists():
        # it came to its end while it was being killed
        shutil.rmtree(folder / "out")
        return kill(folder, 0.9 * share, method)
    killed = not said
    at = written(folder / "out.partial") if killed else total
    if killed:
        said = upcycle(folder, method)
    unchanged = killed and hashes(folder / "out") == want
    shutil.rmtree(folder / "out")
    cells = {"killed_at_mib": at / 2**20, "kept_mib": said["kept"] / 2**20, "unchanged": unchanged}
    return row("killed, run again", 0, total, said["seconds"], peak_rss_mib=said["rss_mib"], **cells)


def hashes(folder: Path) -> dict[str, list[str | int]]:
    """Hash and size of every file."""
    return {path.name: [file_sha256(path), path.stat().st_size] for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
