"""The benchmark of upcycling: figures that texts quote, parts and back, its arithmetic by hand, and trainings of a few steps."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from bench.__main__ import main, parser_for
from bench.result import load_goals
from bench.upcycle_quality import all_of, gain, measure, summary
from bench.upcycling.arms import ARMS, COPY, POINTS, Point, Setting, Training, dense_weights, start_of
from bench.upcycling.gaps import CASES, DENSE, Gap, gap, inexact_gaps, random_parts
from bench.upcycling.models import arrays_of, distance, model_of, parts_of

from bench import upcycle_quality
from moefold.moe.hf.parts import part_shapes
from moefold.moe.upcycle import METHODS, UpcycleOptions, upcycle_parts


def made(arm: str, seed: int, bits: float, start: float = 3.0, error: float | None = 1e-7) -> Training:
    points = tuple(Point(n / POINTS, 2 * n, start + (bits - start) * n / POINTS) for n in range(POINTS + 1))
    kl = None if error is None else error**2
    return Training(arm, seed, 2 * POINTS, 1000, 1.5, 0.9, ARMS[arm].start == "dense", kl, error, points, 0.25)


# gaps at the start, and the texts that quote them


@pytest.fixture(scope="module")
def gaps() -> dict[str, Gap]:
    return {found.name: found for found in inexact_gaps()}


ROUTERS = r"about (\S+), (\S+) and (\S+) at router_std 0.002, 0.02 and 0.1"
QUOTED: list[tuple[str, tuple[str, ...]]] = [
    (ROUTERS, ("softmax_0.002", "softmax_0.02", "softmax_0.1")),
    (ROUTERS, ("sigmoid_0.002", "sigmoid_0.02", "sigmoid_0.1")),
    (r"about (\S+) in a small random model\), .* \(about (\S+)\)", ("independent_rows_limited", "independent_rows")),
    (r"about (\S+) at reinit_ratio 0.5 .*, (\S+) with per_matrix", ("drop", "drop_per_matrix")),
    (r"off by about (\S+), (\S+) and (\S+) % at granularity", ("all_scaled_2", "all_scaled_4", "all_scaled_8")),
]


@pytest.mark.parametrize(("text", "names"), QUOTED, ids=[names[0] for _, names in QUOTED])
def test_texts_quote_what_is_measured(gaps: dict[str, Gap], text: str, names: tuple[str, ...]) -> None:
    """Figures in the reasons that `exact` gives are the measured ones, rounded; each text is that of all settings it quotes."""
    measured = [100 * gaps[name].error if "%" in text else gaps[name].kl for name in names]
    for name in names:
        found = re.search(text, gaps[name].told)
        assert found, gaps[name].told
        assert [float(quoted) for quoted in found.groups()] == pytest.approx(measured, rel=0.4)


def test_every_case_is_inexact_and_says_so(gaps: dict[str, Gap]) -> None:
    assert list(gaps) == list(CASES)
    assert all(found.told for found in gaps.values())
    assert all(found.kl > 1e-6 and found.error > 1e-3 for found in gaps.values() if found.name != "post_norm")


def test_a_norm_after_the_ffn_and_an_exact_setting_leave_nothing(gaps: dict[str, Gap]) -> None:
    """And the random model is far enough from trivial for the figures to mean something: its logits have a size of 1."""
    exact = gap("exact", UpcycleOptions(method="copy", num_experts=8))
    assert not exact.told
    for found in (exact, gaps["post_norm"]):
        assert abs(found.kl) < 1e-9 and found.error < 1e-5, found
    model = model_of(DENSE, arrays_of(DENSE, random_parts(DENSE)))
    logits = model(torch.arange(64)[None])[0].detach()
    assert 0.8 < float(logits.std()) < 1.25


def test_the_distance_of_models_by_hand() -> None:
    class Fixed(torch.nn.Module):
        def __init__(self, chances: list[float]):
            super().__init__()
            self.logits_V = torch.tensor(chances, dtype=torch.float64).log()

        def forward(self, tokens_BS: torch.Tensor) -> tuple[torch.Tensor, None]:
            return self.logits_V.expand(*tokens_BS.shape, -1), None

    kl, error = distance(Fixed([0.5, 0.5]), Fixed([0.25, 0.75]), torch.zeros(2, 3, dtype=torch.int64))  # type: ignore[arg-type]
    assert kl == pytest.approx(0.5 * np.log(2) + 0.5 * np.log(2 / 3))
    assert error == pytest.approx(np.hypot(np.log(2), np.log(1.5)) / (np.log(2) * np.sqrt(2)))


def test_parts_and_back() -> None:
    config, parts = upcycle_parts(
        [(DENSE, random_parts(DENSE))], UpcycleOptions(num_experts=3, num_shared_experts=1, method="drop")
    )
    arrays = arrays_of(config, parts)
    again = parts_of(config, arrays)
    assert {name: matrix.shape for name, matrix in again.items()} == part_shapes(config)
    assert all(np.array_equal(again[name].rows(), parts[name].rows()) for name in parts)
    assert dict(model_of(config, arrays).named_parameters()).keys() == arrays.keys()


# arithmetic


def test_a_table_by_hand() -> None:
    dense = [made("dense", seed, bits, error=0.0) for seed, bits in enumerate((2.5, 2.6))]
    scratch = [made("scratch", seed, bits, error=None) for seed, bits in enumerate((2.9, 2.7))]
    copy = [made("copy", seed, bits) for seed, bits in enumerate((2.4, 2.45))]
    drop = [made("drop", seed, bits, error=0.5) for seed, bits in enumerate((2.6, 2.8))]
    result = summary([*dense, *scratch, *copy, *drop], [Gap("noise", "because", 0.25, 0.5)], bigram=3.5)
    assert [row["arm"] for row in result.rows] == ["copy", "dense", "drop", "scratch"], "the best first"
    first, last = result.rows[0], result.rows[-1]
    assert first["gain"] == pytest.approx(2.55 - 2.425) and first["spread"] == pytest.approx(0.05)
    assert first["bits_0%"] == 3.0 and first["bits_100%"] == pytest.approx(2.425) and first["bits_40%"] == pytest.approx(2.77)
    assert last["start_kl"] is None and last["start_error"] is None and first["step_ms"] == 250
    expected = {
        "start_kl_noise": 0.25,
        "start_error_noise": 0.5,
        "worst_error_of_exact_starts": 0.0,
        "pretrained_below_bigram_bits": 0.5,
        "best_over_dense_bits": 0.125,
        "best_over_dense_by_spread": 1.25,
        "copy_over_dense_bits": 0.125,
        "copy_over_dense_by_spread": 1.25,
        "drop_over_dense_bits": -0.15,
        "drop_over_dense_by_spread": -0.75,
        "scratch_over_dense_bits": -0.25,
        "scratch_over_dense_by_spread": -1.25,
        "best_over_scratch_bits": 0.375,
        "best_over_scratch_by_spread": 1.875,
    }
    assert result.figures == {name: pytest.approx(value) for name, value in expected.items()}


def test_the_rival_from_scratch_is_the_better_one() -> None:
    runs = [made("copy", 0, 2.4), made("scratch", 0, 2.9, error=None), made("scratch_granular", 0, 2.6, error=None)]
    found = summary(runs, [], 3.5).figures
    assert found["best_over_scratch_bits"] == pytest.approx(0.2)
    assert "best_over_dense_bits" not in found and "best_over_scratch_by_spread" not in found, "one seed has no spread"


def test_a_gain_is_measured_by_the_larger_spread() -> None:
    narrow, wide = ([made("copy", 0, b), made("copy", 1, 3.0)] for b in (2.9, 2.0))
    assert gain("x", wide, narrow) == {"x_bits": pytest.approx(0.45), "x_by_spread": pytest.approx(0.45)}
    assert gain("x", narrow, wide)["x_by_spread"] == pytest.approx(-0.45)


def test_goals_are_stated_for_figures_that_there_are() -> None:
    runs = [replace(made(name, seed, 2.0 + seed), exact=True) for name in ARMS for seed in range(2)]
    assert {goal.figure for goal in load_goals("upcycle_quality")} <= set(summary(runs, [], 3.5).figures)


# what is trained, and in which order


@pytest.fixture(scope="module")
def setting(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    """Trainings of a few steps on words in an order that is easy to learn."""
    folder = tmp_path_factory.mktemp("text")
    path = folder / "text.txt"
    path.write_text("".join(f"{n % 7} red, {n % 5} green and {n % 3} blue balls lie in box {n % 11}.\n" for n in range(600)))
    data = {"sources": [{"type": "text", "path": str(path), "name": "balls"}], "seq_len": 32, "holdout": 0.2}
    sizes = {"pretrain_steps": 8, "steps": 8, "batch": 2, "eval_batches": 1}
    return Setting(**sizes, lr=3e-3, router_std=0.05, aux_loss_coeff=0.02, folder=folder, data=data)


def test_all_arms_spend_the_same_and_exact_ones_start_from_the_dense_model(setting: Setting) -> None:
    bigram, found = measure(setting, list(ARMS), range(1), workers=1)
    assert not dist.is_initialized()
    assert 0 < bigram < 8 and [t.arm for t in found] == list(ARMS)
    trained = {t.arm: t for t in found}
    start = trained["dense"].points[0].bits
    for name, training in trained.items():
        assert [point.share for point in training.points] == [n / POINTS for n in range(POINTS + 1)]
        assert training.points[-1].step == training.steps and training.bits < training.points[0].bits
        # no step more than there is compute for, and no whole step less
        assert training.compute <= 1 < training.compute + training.flops_ratio / setting.steps
        assert training.step_s > 0 and (training.kl is None) == (training.error is None) == (ARMS[name].start == "scratch")
        if training.exact:
            assert training.error is not None and training.error < 1e-5
            assert training.points[0].bits == pytest.approx(start, rel=1e-5)
    assert {name for name, t in trained.items() if t.exact} == {"dense", "copy", "granular", "granular_whole", "dense_shared"}
    assert (trained["drop"].error or 0) > 1e-3
    assert trained["dense"].steps == 8 and trained["granular"].steps == 7 and trained["copy"].steps == 5
    assert trained["copy"].params == trained["scratch"].params > 3 * trained["dense"].params
    assert trained["scratch"].points[0].bits > start + 0.5, "pretraining counts for something"
    figures = summary(found, [], bigram).figures
    assert figures["worst_error_of_exact_starts"] < 1e-5


def test_settings_reach_the_models(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = setting.config(3).model
    options = setting.options(ARMS["granular"], 3)
    assert (options.router_std, options.aux_loss_coeff, options.seed) == (0.05, 0.02, 3)
    monkeypatch.setattr("bench.upcycling.arms.dense_weights", lambda seed, setting: arrays_of(dense, random_parts(dense)))
    anew, upcycled = (start_of(ARMS[name], dense, 3, setting) for name in ("scratch_granular", "granular"))
    assert anew[0] == upcycled[0] == METHODS["virtual_groups"].plan(dense, options) and anew[1] is None
    assert upcycled[1] is not None
    assert float(upcycled[1]["layers.0.moe.router.weight_ED"].std()) == pytest.approx(0.05, rel=0.2)
    assert dense.dense_ffn_dim == 128 and not dense.moe_layers
    assert setting.config(3).train.seed == setting.config(3).data.seed == 3


class Recorder(Executor):
    """Keeps what is submitted, and answers at once."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.calls.append((fn.__name__, *args[:-1]))
        future: Future[Any] = Future()
        future.set_result(2.5 if fn.__name__ == "pretrain" else made(args[0], args[1], 2.0))
        return future


def test_dense_models_come_first_and_only_where_they_are_needed(setting: Setting) -> None:
    pool = Recorder()
    found = all_of(setting, ["copy", "scratch"], [0, 1], pool)
    dense = [("pretrain", 0), ("pretrain", 1)]
    anew = [("train_arm", "scratch", 0), ("train_arm", "scratch", 1)]
    assert pool.calls == [*dense, *anew, ("train_arm", "copy", 0), ("train_arm", "copy", 1)]
    assert [(t.arm, t.seed) for t in found] == [("copy", 0), ("copy", 1), ("scratch", 0), ("scratch", 1)]
    pool = Recorder()
    all_of(setting, ["scratch"], [0, 1], pool)
    assert pool.calls == anew


def test_a_missing_dense_model_is_an_error(setting: Setting) -> None:
    with pytest.raises(FileNotFoundError):
        dense_weights(17, setting)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """What `run` asks for, without any training."""
    calls: list[tuple[Any, ...]] = []

    def planted(setting: Setting, arms: list[str], seeds: range, workers: int) -> tuple[float, list[Training]]:
        calls.append((setting, arms, list(seeds), workers))
        return 3.5, [made(name, seed, 2.0 + seed / 10) for name in arms for seed in seeds]

    monkeypatch.setattr(upcycle_quality, "measure", planted)
    monkeypatch.setattr(upcycle_quality, "inexact_gaps", lambda: [Gap("noise", "because", 0.25, 0.5)])
    yield calls


def test_options_reach_the_trainings(asked: list[tuple[Any, ...]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["upcycle_quality", "--arms", "dense", "copy", "--seeds", "2", "--steps", "50", "--lr", "0.1", "--workers", "3"]
    words += ["--first-seed", "5"]
    assert main([*words, "--json", str(tmp_path / "out.json")]) == 0
    [(setting, arms, seeds, workers)] = asked
    assert (arms, seeds, workers, setting.steps, setting.lr) == (["dense", "copy"], [5, 6], 3, 50, 0.1)
    assert "start_kl_noise" in (tmp_path / "out.json").read_text()
    assert "start of noise: KL 0.25 nats" in capsys.readouterr().out


def test_quick_is_small(asked: list[tuple[Any, ...]]) -> None:
    options: argparse.Namespace = parser_for("upcycle_quality", upcycle_quality).parse_args(["--quick"])
    upcycle_quality.run(options)
    [(setting, arms, seeds, _)] = asked
    assert arms == list(ARMS) and seeds == [0] and setting.steps == setting.pretrain_steps == 60


def test_arms_cover_the_methods_that_are_compared() -> None:
    methods = {arm.options.method for arm in ARMS.values() if arm.start == "upcycled" and arm.options is not None}
    assert methods == {"copy", "virtual_groups", "drop", "dense_shared"}
    assert ARMS["drop"].options == replace(COPY, method="drop", reinit_ratio=0.5)
