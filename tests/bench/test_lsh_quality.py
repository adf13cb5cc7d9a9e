"""The benchmark of LSH's quality: its formulas by hand, what it keeps and repeats, and trainings of a few steps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist
from bench.__main__ import main, parser_for
from bench.lsh_quality import (
    POINTS,
    VARIANTS,
    Cache,
    Point,
    Training,
    alone,
    configure,
    interpolate,
    link_rate,
    mean_bits_at,
    number,
    setting_of,
    summary,
    time_after,
    time_at_end,
    train,
)
from bench.result import load_goals

from bench import lsh_quality
from moefold.moe.config import CompressConfig

DIM = 8
STEPS = 14


def made(variant: str = "off", seed: int = 0, bits: float = 3.0, rows: int = 1000, step_s: float = 0.5) -> Training:
    """Ten steps, of 1000 choices altogether, of which so many rows travel; evaluated at half and at the end."""
    points = (Point(5, 500, rows // 2, bits + 1), Point(10, 1000, rows, bits))
    return Training(variant, seed, {"steps": 10}, points, bits + 0.1, None if variant == "off" else 0.25, step_s, bigram=3.7)


def parsed(*words: str) -> argparse.Namespace:
    return parser_for("lsh_quality", lsh_quality).parse_args(
        ["--steps", str(STEPS), "--batch", "2", "--eval-batches", "1", *words]
    )


# formulas


def test_half_of_a_step_of_off_is_communication() -> None:
    off = [made(step_s=0.4), made(seed=1, step_s=0.6)]
    # 100 rows a step, of 8 values of 4 bytes, there and back, forward and backward
    assert link_rate(off, DIM) == 100 * 8 * 4 * 4 / 0.5
    assert time_at_end(off, DIM, link_rate(off, DIM)) == pytest.approx(2 * 10 * 0.5)


def test_time_counts_the_work_and_the_rows_of_a_variant() -> None:
    off, other = [made(step_s=0.5)], made("lsh_20", rows=200, step_s=0.3)
    link = link_rate(off, DIM)
    assert time_after(other, other.points[0], 0.3, DIM, link) == pytest.approx(5 * 0.3 + 0.2 * 5 * 0.5)
    assert time_at_end([other], DIM, link) == pytest.approx(10 * 0.3 + 0.2 * 10 * 0.5)


def test_interpolation_is_on_the_line_and_ends_at_the_points() -> None:
    known = [(1.0, 8.0), (2.0, 4.0), (4.0, 2.0)]
    assert [interpolate(known, at) for at in (1.0, 1.5, 2.0, 3.5, 4.0)] == [8.0, 6.0, 4.0, 2.5, 2.0]
    assert interpolate(known, 0.0) == 8.0 and interpolate(known, 9.0) == 2.0


def test_loss_at_a_time_is_the_mean_over_seeds() -> None:
    off = [made(bits=3.0), made(seed=1, bits=3.4)]
    link = link_rate(off, DIM)
    # 5 steps take 5 s, and 10 take 10 s, as a step is half a second of work and as much of sending
    assert mean_bits_at(off, 7.5, DIM, link) == pytest.approx(3.7)


def test_a_table_by_hand() -> None:
    off = [made(seed=s, bits=b) for s, b in enumerate((3.0, 3.1, 2.9))]
    lsh = [made("lsh_20", s, b, rows=200, step_s=0.3) for s, b in enumerate((3.05, 3.05, 3.2))]
    result = summary([*off, *lsh], DIM)
    plain, row = result.rows
    assert (plain["variant"], plain["seeds"], plain["gap"], plain["time_by_off"], plain["error"]) == ("off", 3, 0, 1, None)
    assert number(row, "gap") == pytest.approx(0.1) and number(row, "spread") == pytest.approx(0.15)
    assert number(row, "bits_compressed") == pytest.approx(3.2) and row["error"] == 0.25
    assert number(row, "rows_share") == pytest.approx(0.2)
    assert number(row, "time_by_off") == pytest.approx((0.3 + 0.1) / 1.0)
    # the other ends after 4 s, before the first point of off
    assert number(row, "gain_at_equal_time") == pytest.approx(4.0 - 3.1)
    expected = {
        "off_below_bigram_bits": 0.7,
        "seed_spread_bits": 0.2,
        "lsh_20_gap_bits": 0.1,
        "lsh_20_rows_share": 0.2,
        "lsh_20_gain_at_equal_time_bits": 0.9,
        "lsh_20_gap_over_spread": 0.5,
    }
    assert result.figures == {name: pytest.approx(value) for name, value in expected.items()}


def test_a_slower_variant_is_compared_at_the_end_of_off() -> None:
    result = summary([made(), made("lsh_40", rows=1000, step_s=1.5)], DIM)
    # 20 s for ten steps against 10 s, when it is at its first point
    assert number(result.rows[1], "time_by_off") == pytest.approx(2.0)
    assert number(result.rows[1], "gain_at_equal_time") == pytest.approx(3.0 - 4.0)


def test_without_off_and_with_one_seed_there_is_nothing_to_compare_with() -> None:
    alone_ = summary([made("lsh_20")], DIM)
    assert alone_.figures == {} and "gap" not in alone_.rows[0]
    assert "lsh_20_gap_over_spread" not in summary([made(), made("lsh_20")], DIM).figures


def test_goals_are_stated_for_figures_that_there_are() -> None:
    trainings = [made(name, seed, bits=3.0 + seed) for name in VARIANTS for seed in range(2)]
    assert {goal.figure for goal in load_goals("lsh_quality")} <= set(summary(trainings, DIM).figures)


def test_variants_differ_and_one_is_the_default() -> None:
    assert all(a != b for i, a in enumerate(VARIANTS.values()) for b in list(VARIANTS.values())[:i])
    assert VARIANTS["lsh_20"] == CompressConfig(method="lsh") and VARIANTS["off"] == CompressConfig()


# what is kept


def test_finished_trainings_are_read_back(tmp_path: Path) -> None:
    cache = Cache.read(tmp_path / "new" / "cache.jsonl")
    for training in (made(), made("lsh_20", 1)):
        cache.add(training)
    assert cache.path is not None
    again = Cache.read(cache.path)
    assert again.found == cache.found == [made(), made("lsh_20", 1)]
    assert again.get("lsh_20", 1, {"steps": 10}) == made("lsh_20", 1)
    for variant, seed, steps in (("off", 1, 10), ("lsh_20", 0, 10), ("lsh_20", 1, 11)):
        assert again.get(variant, seed, {"steps": steps}) is None


def test_a_line_that_was_cut_short_is_left_out_and_repeated(tmp_path: Path) -> None:
    path = tmp_path / "cache.jsonl"
    whole = Cache.read(path)
    whole.add(made())
    path.write_text(path.read_text() + '{"variant": "lsh_20", "se')
    cache = Cache.read(path)
    assert cache.found == [made()]
    cache.add(made("lsh_20"))
    assert Cache.read(path).found == [made(), made("lsh_20")]


def test_only_what_is_missing_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    trained: list[tuple[str, int]] = []

    def planted(config: object, variant: str, folder: Path) -> Training:
        if len(trained) == 3:
            raise KeyboardInterrupt
        seed = config.train.seed  # type: ignore[attr-defined]
        trained.append((variant, seed))
        return replace(made(variant, seed, bits=3.0 + seed / 10), setting=setting_of(config))  # type: ignore[arg-type]

    monkeypatch.setattr(lsh_quality, "train", planted)
    words = ["lsh_quality", "--variants", "off", "lsh_20", "--seeds", "2", "--cache", str(tmp_path / "c.jsonl")]
    with pytest.raises(KeyboardInterrupt):
        main(words)
    assert trained == [("off", 0), ("lsh_20", 0), ("off", 1)]
    trained.clear()
    assert main(words) == 0
    assert trained == [("lsh_20", 1)]
    assert "lsh_20_gap_over_spread" in capsys.readouterr().out
    trained.clear()
    assert main([*words[:4], "--seeds", "1", "--steps", "100", *words[-2:]]) == 0
    assert trained == [("off", 0), ("lsh_20", 0)], "another number of steps is another training"


def test_too_few_steps_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["lsh_quality", "--steps", str(2 * POINTS)])
    assert f"give more than {2 * POINTS}" in capsys.readouterr().err


# trainings


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """Settings of [data]: words in an order that is easy to learn."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"{n % 7} red, {n % 5} green and {n % 3} blue balls lie in box {n % 11}.\n" for n in range(600)))
    sources = [{"type": "text", "path": str(path), "name": "balls"}]
    return {"sources": sources, "seq_len": 32, "holdout": 0.2}


def trained(variants: Sequence[str], text: dict[str, object]) -> dict[str, Training]:
    with alone() as folder:
        return {name: train(configure(name, 0, parsed(), text), name, folder) for name in variants}


def test_trainings_of_a_few_steps(text: dict[str, object]) -> None:
    found = trained(["off", "lsh_20", "anneal_20"], text)
    off, lsh, anneal = found.values()
    assert not dist.is_initialized()
    for training in found.values():
        assert [point.step for point in training.points] == [2, 5, 7, 9, 12, 14]
        # 2 sequences of 32 tokens, each with 2 choices in 2 layers
        assert [point.choices for point in training.points] == [256 * point.step for point in training.points]
        assert training.points[-1].bits < training.points[0].bits < 9 and training.step_s > 0 and 0 < training.bigram < 8
    assert off.rows_share == 1 and off.error is None and off.bits_compressed == off.bits
    assert lsh.rows_share <= 0.21 < anneal.rows_share and lsh.error is not None and lsh.error > 0
    assert lsh.bits != off.bits != lsh.bits_compressed
    result = summary(list(found.values()), DIM)
    assert result.figures["lsh_20_rows_share"] == lsh.rows_share
    assert lsh.setting == setting_of(configure("lsh_20", 0, parsed(), text)) != off.setting


def test_a_seed_is_one_of_weights_and_order(text: dict[str, object]) -> None:
    first, second = (configure("lsh_10", seed, parsed(), text) for seed in (0, 1))
    assert (first.train.seed, first.data.seed) == (0, 0) and (second.train.seed, second.data.seed) == (1, 1)
    assert setting_of(first) == setting_of(second)
    assert first.model.moe is not None and first.model.moe.compress == VARIANTS["lsh_10"]
