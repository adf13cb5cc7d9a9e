"""Is upcycling worth it? A dense model trained on, upcycled in several ways, or left for a new one with experts: equal compute.

A dense model is trained: the quickstart's, with one FFN as wide as one of its experts. Then every arm spends the same number of
floating-point operations (`ModelConfig.flops_per_token`) on the same batches in the same order, as far as it comes: those after
the ones that the dense model has seen. An arm whose tokens cost more takes fewer steps. The learning rate is reset: all arms have
the schedule of the dense model's training over their compute, a warm-up to the same peak, then half a cosine down to a tenth of
it; optimizers start empty. So they can be compared at equal parts of the compute, and at the end, on the same held-out text.

Arms: dense trains the dense model on. copy, granular (virtual groups), granular_whole (always whole ones), drop (half of each
expert's neurons drawn anew) and dense_shared start from it as `moefold upcycle` makes them. scratch and scratch_granular are
models like copy's and granular's, with random weights. Two arms differ where they are apart by more than the larger of their seed
spreads; a seed is one of first weights, data order and upcycling.

Beside that, the gap at the start is measured for all settings of upcycling that do not keep the function (see `bench.upcycling`).
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from moefold.launch.data.bigram import baseline

from .result import Result, Row
from .upcycling.arms import ARMS, POINTS, Setting, Training, pretrain, train_arm
from .upcycling.gaps import Gap, inexact_gaps

QUICK = {"seeds": 1, "pretrain_steps": 60, "steps": 60, "eval_batches": 2}


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="NAME", help="some of: %(choices)s")
    parser.add_argument("--seeds", type=int, default=3, help="repetitions of each (default: %(default)s)")
    parser.add_argument("--first-seed", type=int, default=0, help="try settings on others than the default %(default)s")
    parser.add_argument("--pretrain-steps", type=int, default=3600, help="of the dense model (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2400, help="of the dense model that cost the compute of an arm")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step (default: %(default)s)")
    parser.add_argument("--eval-batches", type=int, default=16, help="held-out batches of this size (default: %(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak, of the dense model and of all arms (default: %(default)s)")
    parser.add_argument("--router-std", type=float, default=0.02, help="of upcycled routers (default: %(default)s)")
    parser.add_argument("--aux", type=float, default=0.01, help="coefficient of the balance loss (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes that train side by side (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"to see that it runs: {QUICK}")


def run(options: argparse.Namespace) -> Result:
    sizes: dict[str, Any] = vars(options) | (QUICK if options.quick else {})
    seeds = range(sizes["first_seed"], sizes["first_seed"] + sizes["seeds"])
    gaps = inexact_gaps()
    for gap in gaps:
        tell(f"start of {gap.name}: KL {gap.kl:.2g} nats, logits off by {gap.error:.2g}")
    with tempfile.TemporaryDirectory(prefix="moefold-bench-") as folder:
        setting = Setting(
            pretrain_steps=sizes["pretrain_steps"],
            steps=sizes["steps"],
            batch=sizes["batch"],
            eval_batches=sizes["eval_batches"],
            lr=sizes["lr"],
            router_std=sizes["router_std"],
            aux_loss_coeff=sizes["aux"],
            folder=Path(folder),
            data={},
        )
        bigram, trainings = measure(setting, sizes["arms"], seeds, sizes["workers"])
    return summary(trainings, gaps, bigram)


def measure(setting: Setting, arms: Sequence[str], seeds: Iterable[int], workers: int) -> tuple[float, list[Training]]:
    """(bits per byte of a bigram model, all trainings); with one worker, in this process."""
    seeds = list(seeds)
    # prepared here, so that no two workers do so at once
    bigram = baseline(setting.open(setting.config(seeds[0]))).bits_per_byte
    pool: Executor = Here()
    if workers > 1:
        # forked ones would have the threads' locks, but not the threads
        pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    with pool:
        try:
            return bigram, all_of(setting, arms, seeds, pool)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def all_of(setting: Setting, arms: Sequence[str], seeds: Sequence[int], pool: Executor) -> list[Training]:
    """Train dense models first; what does not start from them fills the time until they are there."""
    start_s = time.monotonic()
    anew = [name for name in arms if ARMS[name].start == "scratch"]
    others = [name for name in arms if name not in anew]
    dense = {seed: pool.submit(pretrain, seed, setting) for seed in seeds} if others else {}
    futures = [pool.submit(train_arm, name, seed, setting) for seed in seeds for name in anew]
    for seed, done in dense.items():
        tell(f"dense model of seed {seed}: {done.result():.4f} bits per byte, {time.monotonic() - start_s:.0f} s")
        futures += [pool.submit(train_arm, name, seed, setting) for name in others]
    for number, future in enumerate(as_completed(futures), 1):
        t = future.result()
        course = " ".join(f"{point.bits:.4f}" for point in t.points)
        tell(f"{number} of {len(futures)}: {t.arm} seed {t.seed}, {t.steps} steps: {course}; {time.monotonic() - start_s:.0f} s")
    trainings = {(t.arm, t.seed): t for t in (future.result() for future in futures)}
    return [trainings[name, seed] for name in arms for seed in seeds]


class Here(Executor):
    """Does the work in this process when it is submitted."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def tell(text: str) -> None:
    print(text, flush=True)


def summary(trainings: Sequence[Training], gaps: Sequence[Gap], bigram: float) -> Result:
    """Rows by arm, best first, and figures: of the arms, of the best upcycled one, and of the gaps at the start."""
    by_arm: dict[str, list[Training]] = {}
    for training in trainings:
        by_arm.setdefault(training.arm, []).append(training)
    ranked = sorted(by_arm, key=lambda name: mean_bits(by_arm[name]))
    return Result([row_of(name, by_arm) for name in ranked], figures(ranked, by_arm, gaps, bigram))


def mean_bits(found: Sequence[Training]) -> float:
    return statistics.fmean(t.bits for t in found)


def spread(found: Sequence[Training]) -> float:
    """From the best to the worst seed."""
    return max(t.bits for t in found) - min(t.bits for t in found)


def row_of(name: str, by_arm: Mapping[str, Sequence[Training]]) -> Row:
    """Means over the seeds of one arm. gain: in bits per byte over training the dense model on, positive if better;
    least_gain: over the same seed's dense model, of the worst seed."""
    found = by_arm[name]
    kls = [t.kl for t in found if t.kl is not None]
    errors = [t.error for t in found if t.error is not None]
    courses = {f"bits_{100 * n // POINTS}%": statistics.fmean(t.points[n].bits for t in found) for n in range(POINTS + 1)}
    return {
        "arm": name,
        "seeds": len(found),
        "steps": found[0].steps,
        "params": found[0].params,
        "flops_by_dense": found[0].flops_ratio,
        "compute": found[0].compute,
        "start_kl": statistics.fmean(kls) if kls else None,
        "start_error": statistics.fmean(errors) if errors else None,
        **courses,
        "spread": spread(found),
        "gain": mean_bits(by_arm["dense"]) - mean_bits(found) if "dense" in by_arm else None,
        # the same seed is the same dense model and data order: these gains are of pairs
        "least_gain": min(d.bits - t.bits for d, t in zip(by_arm["dense"], found, strict=True)) if "dense" in by_arm else None,
        "bits_by_seed": " ".join(f"{t.bits:.4f}" for t in found),
        "step_ms": 1e3 * statistics.fmean(t.step_s for t in found),
    }


def figures(
    ranked: Sequence[str], by_arm: Mapping[str, Sequence[Training]], gaps: Sequence[Gap], bigram: float
) -> dict[str, float]:
    """Gains of the best upcycled arm over the dense one and over the better one from scratch, in bits and by the larger of the
    two spreads; the same over dense for every arm; and what was measured at starts. Only of arms that were run."""
    found = {f"start_kl_{gap.name}": gap.kl for gap in gaps} | {f"start_error_{gap.name}": gap.error for gap in gaps}
    kept = [t.error for name in ranked for t in by_arm[name] if t.exact and t.error is not None]
    if kept:
        found["worst_error_of_exact_starts"] = max(kept)
    if "dense" in by_arm:
        dense = by_arm["dense"]
        found["pretrained_below_bigram_bits"] = bigram - statistics.fmean(t.points[0].bits for t in dense)
        for name in ranked:
            if name != "dense":
                found |= gain(f"{name}_over_dense", by_arm[name], dense)
    # `ranked` has the best first
    best = next((name for name in ranked if ARMS[name].start == "upcycled"), None)
    anew = next((name for name in ranked if ARMS[name].start == "scratch"), None)
    for rival, arm in (("dense", "dense" if "dense" in by_arm else None), ("scratch", anew)):
        if best is not None and arm is not None:
            found |= gain(f"best_over_{rival}", by_arm[best], by_arm[arm])
    return found


def gain(name: str, found: Sequence[Training], rival: Sequence[Training]) -> dict[str, float]:
    """By how much the mean is better, in bits per byte; and that by the larger spread, if there is any."""
    bits, width = mean_bits(rival) - mean_bits(found), max(spread(found), spread(rival))
    return {f"{name}_bits": bits} | ({f"{name}_by_spread": bits / width} if width > 0 else {})
