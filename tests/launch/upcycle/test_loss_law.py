"""Laws fitted to points of known coefficients, what they predict, and which points are refused."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefold.launch.console import human
from moefold.launch.upcycle.advise import NO_LAW, advise
from moefold.launch.upcycle.forecast import Crossover, Forecast, Turn, find_crossover, forecast
from moefold.launch.upcycle.loss_law import Estimate, Fitted, Kind, Law, Point, fit, jackknife, read_points
from moefold.moe.config import ModelConfig
from moefold.moe.errors import ConfigError
from moefold.moe.hf.families import FAMILIES
from moefold.moe.hf.rules import copies

UPCYCLE = Law(log_scale=8.4, a1=0.2, a2=0.3, a3=0.006, floor=1.8)
SCRATCH = Law(log_scale=4.7, a1=0.0, a2=0.19, a3=0.0, floor=1.75)
DENSE = Law(log_scale=4.3, a1=0.0, a2=0.16, a3=0.0, floor=1.9)
LAWS: dict[Kind, Law] = {"upcycle": UPCYCLE, "scratch": SCRATCH, "dense": DENSE}
DENSE_TOKENS = (1e10, 4e10, 1.6e11, 6.4e11)
TOKENS = (2e9, 8e9, 3.2e10, 1.3e11, 5e11)


def points(noise: float = 0.0, seed: int = 0, laws: dict[Kind, Law] | None = None) -> list[Point]:
    """Points of every kind, with relative noise."""
    draw, found = np.random.default_rng(seed), list[Point]()
    places: list[tuple[Kind, float, float]] = [("upcycle", d, t) for d in DENSE_TOKENS for t in TOKENS]
    places += [(kind, 0.0, t) for kind in ("scratch", "dense") for t in map(float, np.geomspace(2e9, 2e12, 12))]
    for number, (kind, dense, tokens) in enumerate(places):
        loss = (laws or LAWS)[kind].loss(dense or 1.0, tokens) * (1 + noise * draw.standard_normal())
        found.append(Point(kind, dense, tokens, loss, f"points.csv:{number + 2}"))
    return found


def as_csv(found: Sequence[Point], path: Path) -> Path:
    rows = [f"{p.kind},{p.dense_tokens or ''},{p.tokens!r},{p.loss!r}" for p in found]
    path.write_text("\n".join(["kind,dense_tokens,tokens,loss", *rows]) + "\n")
    return path


@pytest.mark.parametrize("kind", ["upcycle", "scratch", "dense"])
def test_known_coefficients_come_back(kind: Kind) -> None:
    fitted = fit(kind, points())
    assert vars(fitted.law) == pytest.approx(vars(LAWS[kind]), rel=0.01)
    assert fitted.largest < 1e-6 and fitted.rms <= fitted.largest and len(fitted.without) == len(fitted.points)
    inside = fitted.predict(1e11 if kind == "upcycle" else 1.0, 1e11)
    assert inside.error < 1e-5 and inside.beyond == 1


def test_with_noise_predictions_and_their_errors_are_right() -> None:
    """0.5 % on each loss; inside and twice outside the measured range."""
    off, errors = [], []
    for seed in range(4):
        noisy = points(noise=0.005, seed=seed)
        for kind, law in LAWS.items():
            fitted = fit(kind, noisy)
            for tokens in (1e10, 3e11, 1e12):
                place = (1e11 if kind == "upcycle" else 1.0, tokens)
                predicted = fitted.predict(*place)
                off.append(predicted.value / law.loss(*place) - 1)
                errors.append(predicted.error / law.loss(*place))
            assert 0.002 < fitted.rms < 0.008
    assert np.abs(off).max() < 0.01
    # standard errors are neither blind nor afraid
    assert 0.4 < np.sqrt(np.mean(np.square(off))) / np.sqrt(np.mean(np.square(errors))) < 1.6


def test_the_interaction_has_the_sign_of_the_paper() -> None:
    """A longer dense training makes each token after upcycling count less, where a3 is positive."""
    law = fit("upcycle", points()).law
    gains = [law.loss(d, 1e10) - law.loss(d, 1e11) for d in (1e10, 1e12)]
    assert gains[0] > gains[1] > 0 and law.exponent(1e10) > law.exponent(1e12) > 0
    other = Law(log_scale=-1.5, a1=-0.1, a2=0.05, a3=-0.005, floor=1.8)
    opposite = forecast("x", points(laws={**LAWS, "upcycle": other}), dense_tokens=1e11, tokens=1e11, continued_tokens=1e11)
    assert opposite.fits["upcycle"].law.a3 == pytest.approx(-0.005, rel=0.01)
    assert any("unlike what was published" in note for note in opposite.notes())


@given(
    a1=st.floats(0.0, 0.2),
    a3=st.floats(-0.002, 0.006),
    slope=st.floats(0.1, 0.4),
    floor=st.floats(0.5, 3.0),
    excess=st.floats(0.3, 2.0),
)
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_law_is_found_and_the_unit_of_tokens_does_not_matter(
    a1: float, a3: float, slope: float, floor: float, excess: float
) -> None:
    middle = math.log(1e11)
    a2 = slope + a3 * middle
    truth = Law(math.log(excess) + (a1 + slope) * middle, a1, a2, a3, floor)
    found = points(laws={**LAWS, "upcycle": truth})
    law = fit("upcycle", found).law
    assert [law.loss(d, t) for d in DENSE_TOKENS for t in TOKENS] == pytest.approx(
        [truth.loss(d, t) for d in DENSE_TOKENS for t in TOKENS], rel=1e-4
    )
    assert law.floor == pytest.approx(floor, rel=0.01)
    in_billions = [Point(p.kind, p.dense_tokens / 1e9, p.tokens / 1e9, p.loss, p.where) for p in found]
    assert fit("upcycle", in_billions).law.loss(50, 70) == pytest.approx(law.loss(5e10, 7e10), rel=1e-6)


def test_the_crossover_is_where_both_laws_meet() -> None:
    made = forecast("x", points(), dense_tokens=4e10, tokens=2e10, continued_tokens=5e10)
    assert made.crossover is not None
    (turn,) = made.crossover.turns
    t = turn.tokens
    assert "from scratch overtakes at " in made.crossover.text and turn.to == "scratch"
    assert UPCYCLE.loss(4e10, t) == pytest.approx(SCRATCH.loss(1.0, t), rel=1e-4)
    assert UPCYCLE.loss(4e10, t / 2) < SCRATCH.loss(1.0, t / 2) and UPCYCLE.loss(4e10, t * 2) > SCRATCH.loss(1.0, t * 2)
    assert turn.times == pytest.approx(1, abs=1e-3)
    noisy = forecast("x", points(noise=0.003), dense_tokens=4e10, tokens=2e10, continued_tokens=5e10).crossover
    assert noisy is not None and len(noisy.turns) == 1
    assert noisy.turns[0].times > 1.02 and abs(math.log(noisy.turns[0].tokens / t)) < 4 * math.log(noisy.turns[0].times)
    never = forecast(
        "x", points(laws={**LAWS, "scratch": Law(4.7, 0, 0.19, 0, 3.0)}), dense_tokens=4e10, tokens=2e10, continued_tokens=5e10
    )
    always = forecast(
        "x", points(laws={**LAWS, "scratch": Law(4.7, 0, 0.4, 0, 0.5)}), dense_tokens=4e10, tokens=2e10, continued_tokens=5e10
    )
    assert never.crossover is not None and "is never ahead, up to" in never.crossover.text and never.verdict == "upcycle"
    assert always.crossover is not None and "is ahead everywhere" in always.crossover.text and always.verdict == "scratch"
    told = json.loads(json.dumps(never.to_dict()))["crossover"]
    assert (told["found"], told["tokens"], told["direction"], told["first"]) == (False, None, None, "upcycle")
    far = Crossover("upcycle", (Turn("scratch", 1e12, 1.2, 3.5),), (1, 2))
    assert "3.5 times beyond the measured range" in far.text
    assert "rests on single points" in Crossover("upcycle", (Turn("scratch", 1e12, math.inf, 1),), (1, 2)).text


def exactly(kind: Kind, law: Law) -> Fitted:
    """A law as if fitted without any error, to points of 1e9 to 1e12 tokens."""
    at = (1e9, 3e9, 1e10, 3e10, 1e11, 3e11, 1e12)
    found = tuple(Point(kind, 1e10 if kind == "upcycle" else 0, t, law.loss(1e10, t), "x") for t in at)
    return Fitted(kind, found, law, (law,) * len(found), 0.0, 0.0)


def compare(upcycled: Law, scratch: Law, tokens: float) -> Forecast:
    """At 1e10 dense tokens."""
    fits: dict[Kind, Fitted] = {"upcycle": exactly("upcycle", upcycled), "scratch": exactly("scratch", scratch)}
    losses = {kind: fitted.predict(1e10 if kind == "upcycle" else 1.0, tokens) for kind, fitted in fits.items()}
    crossover = find_crossover(fits["upcycle"], fits["scratch"], dense_tokens=1e10, tokens=tokens)
    return Forecast(path="x", fits=fits, losses=losses, crossover=crossover, dense_tokens=1e10)


def through(excess: float, exponent: float, floor: float) -> Law:
    """Of one variable; excess: of the loss over the floor at 3e10 tokens."""
    return Law(math.log(excess) + exponent * math.log(3e10), 0.0, exponent, 0.0, floor)


PHRASES = {
    "from scratch is never ahead, up to ": ["upcycle"],
    "from scratch is ahead everywhere, from ": ["scratch"],
    "from scratch overtakes at ": ["upcycle", "scratch"],
    "from scratch is ahead up to ": ["scratch", "upcycle"],
    "from scratch is ahead from ": ["upcycle", "scratch", "upcycle"],
    "upcycled is ahead from ": ["scratch", "upcycle", "scratch"],
}


@given(
    excesses=st.tuples(st.floats(0.05, 3.0), st.floats(0.05, 3.0)),
    exponents=st.tuples(st.floats(-0.1, 0.8), st.floats(-0.1, 0.8)),
    floors=st.tuples(st.sampled_from((1.5, 1.6, 1.7)), st.floats(1.5, 1.7)),
    tokens=st.floats(2, 19).map(lambda x: 10.0**x),
)
@settings(max_examples=400, deadline=None, derandomize=True)
def test_the_crossover_never_contradicts_the_laws_or_the_verdict(
    excesses: tuple[float, float], exponents: tuple[float, float], floors: tuple[float, float], tokens: float
) -> None:
    upcycled, scratch = (through(*law) for law in zip(excesses, exponents, floors, strict=True))
    made = compare(upcycled, scratch, tokens)
    assert made.crossover is not None
    told = json.loads(json.dumps(made.crossover.to_dict()))
    (leaders,) = (leaders for phrase, leaders in PHRASES.items() if told["line"].startswith(phrase))
    turns = [turn["tokens"] for turn in told["turns"]]
    assert [told["first"], *(turn["to"] for turn in told["turns"])] == leaders and turns == sorted(turns)
    assert (told["found"], told["direction"]) == (bool(turns), leaders[-1] if turns else None)
    assert told["tokens"] == (turns[-1] if turns else None) and all(human(turn) in told["line"] for turn in turns)
    for place in [tokens, *map(float, np.geomspace(*made.crossover.looked, 60))]:
        gap = scratch.loss(1.0, place) - upcycled.loss(1e10, place)
        if abs(gap) > 1e-9:
            assert leaders[sum(turn < place for turn in turns)] == ("upcycle" if gap > 0 else "scratch")
    if made.verdict != "undecided" and abs(made.losses["scratch"].value - made.losses["upcycle"].value) > 1e-9:
        assert made.verdict == leaders[sum(turn < tokens for turn in turns)]


def test_the_crossover_in_every_order() -> None:
    def text(upcycled: Law, scratch: Law) -> str:
        crossover = compare(upcycled, scratch, 3e10).crossover
        assert crossover is not None
        return crossover.text

    ahead_first = text(through(1.0, 0.4, 1.7), through(1.0, 0.2, 1.7))
    assert ahead_first == "from scratch is ahead up to 30G tokens, upcycled after (times or divided by 1)"
    assert text(through(1.0, 0.2, 1.7), through(1.0, 0.4, 1.7)) == "from scratch overtakes at 30G tokens (times or divided by 1)"
    assert text(through(1.0, 0.2, 1.6), through(0.89, 0.4, 1.7)).startswith("from scratch is ahead from ")
    assert text(through(0.89, 0.4, 1.7), through(1.0, 0.2, 1.6)).endswith(", from scratch before and after")
    # both turns are between two places of a coarse search
    close = compare(through(0.5, 0.4, 1.8), through(1.0, 0.2, 1.3 + 1e-7), 3e10).crossover
    assert close is not None and [turn.to for turn in close.turns] == ["upcycle", "scratch"]
    assert close.turns[1].tokens / close.turns[0].tokens < 1.02
    # a turn that one point decides
    fitted = exactly("scratch", through(1.0, 0.4, 1.7))
    one = replace(fitted, without=(through(1.0, 0.4, 3.0), *fitted.without[1:]))
    found = find_crossover(exactly("upcycle", through(1.0, 0.2, 1.7)), one, dense_tokens=1e10, tokens=3e10)
    assert found.text == "from scratch overtakes at 30G tokens (which rests on single points)"
    assert found.to_dict()["times"] is None
    # an asked budget far outside is within what the sentence is about
    assert find_crossover(fitted, fitted, dense_tokens=1, tokens=1e30).looked[1] == 1e30


def test_an_interaction_or_a_rising_loss_is_told_as_it_is() -> None:
    def notes(a3: float, off: float, upcycled: float = 0.2, scratch: float = 0.2) -> str:
        law = replace(through(1.0, upcycled, 1.7), a2=upcycled + a3 * math.log(1e10), a3=a3)
        made = compare(law, through(1.0, scratch, 1.7), 3e10)
        # left-out values that alternate around a3 with this jackknife error
        n = len(made.fits["upcycle"].without)
        each = off / math.sqrt(n - 1) / math.sqrt((n - 1) / n)
        laws = tuple(replace(law, a3=a3 + each * (0 if i == n - 1 else 1 - 2 * (i % 2))) for i in range(n))
        return "\n".join(replace(made, fits={**made.fits, "upcycle": replace(made.fits["upcycle"], without=laws)}).notes())

    assert "the less each counts, as was published" in notes(0.005, 0.0024)
    assert "the more each counts, unlike what was published" in notes(-0.005, 0.0024)
    for a3 in (0.005, -0.005):
        text = notes(a3, 0.0026)
        assert "published" not in text and f"do not show an interaction with the dense training ({a3:.2g} +- 0.0026)" in text
    assert "out of its range" not in notes(0.005, 0.001)
    assert "from scratch: by its law the loss does not fall with tokens: it is out of its range" in notes(0, 0, scratch=-0.01)
    assert "upcycled after 10G dense tokens: by its law the loss does not fall" in notes(0, 0, upcycled=-0.01)
    assert "to the power of -0.2 after 10G" in notes(0, 0) and "to the power of 0.01 after" in notes(0, 0, upcycled=-0.01)


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    # deviations from the mean of 4: 9 + 4 + 0 + 25 = 38; s / sqrt(n) = sqrt(38 / 3) / 2
    assert jackknife([float(np.delete(values, i).mean()) for i in range(4)]) == pytest.approx(math.sqrt(38 / 3) / 2)


def test_verdicts_need_differences_that_are_certain() -> None:
    made = forecast("x", points(), dense_tokens=4e10, tokens=2e10, continued_tokens=5e10)

    def verdict(upcycled: float, scratch: float, error: float) -> str:
        losses: dict[Kind, Estimate] = {"upcycle": Estimate(upcycled, error, 1), "scratch": Estimate(scratch, error, 1)}
        return Forecast(path="x", fits=made.fits, losses=losses, crossover=None, dense_tokens=1e10).verdict

    assert verdict(2.0, 2.1, 0.01) == "upcycle"
    assert verdict(2.1, 2.0, 0.01) == "scratch"
    assert verdict(2.0, 2.1, 0.04) == "undecided"
    assert verdict(2.0, 2.1, math.inf) == "undecided"
    assert jackknife([1.0, math.nan]) == math.inf and jackknife([1.0, 1.0]) == 0


CONFIG = ModelConfig(dim=64, num_layers=4, num_heads=4, vocab_size=256, max_seq_len=128, dense_ffn_dim=256)


def test_advice_says_what_is_the_laws_and_what_the_rules(tmp_path: Path) -> None:
    result, path = copies(CONFIG, FAMILIES["mixtral"]), as_csv(points(0.002), tmp_path / "points.csv")
    plain = advise(CONFIG, result, dense_tokens=1e11, tokens=2e10)
    assert plain.law is None and plain.to_dict()["law"] is None and plain.render().endswith(NO_LAW)
    advice = advise(CONFIG, result, dense_tokens=1e11, tokens=2e10, losses=path)
    text, told = advice.render(), json.loads(json.dumps(advice.to_dict()))
    assert text.startswith("by the fitted law: ") and f"\nby published rules: {plain.line}\n" in text and NO_LAW not in text
    assert "overtakes at" in text and "44 points" not in text and "20 points, off by 0." in text
    assert told["verdict"] == plain.verdict and told["law"]["verdict"] in ("upcycle", "undecided", "scratch", "dense")
    each = result.flops_per_token(128) / CONFIG.flops_per_token(128)
    dense = told["law"]["losses"]["dense"]
    assert dense["value"] == pytest.approx(DENSE.loss(1.0, 1e11 + 2e10 * each), rel=0.01) and dense["beyond"] == 1
    far = advise(CONFIG, result, dense_tokens=1e11, tokens=1e14, losses=path)
    assert "200 times beyond the measured range" in far.render()
    only = as_csv([p for p in points() if p.kind != "scratch"], tmp_path / "two.csv")
    without = advise(CONFIG, result, dense_tokens=1e11, tokens=2e10, losses=only)
    assert "has no points of kind scratch (5 are needed)" in without.render() and without.to_dict()["law"]["crossover"] is None


HEAD = "kind,dense_tokens,tokens,loss\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty; it needs the columns kind,dense_tokens,tokens,loss"),
        ("kind,tokens,tokens,dense_tokens,loss\n", "p.csv:1: has the column tokens more than once"),
        ("kind,tokens\n", "p.csv:1: has no column dense_tokens; needed are"),
        ("# mine\n" + HEAD + "moe,1,1,1\n", "p.csv:3: kind is 'moe', but must be one of dense, scratch, upcycle"),
        (HEAD + "upcycle,1e9,1e9,nan\n", "p.csv:2: loss is nan, but must be a finite number over 0"),
        (
            HEAD + "dense,1e9,0,2\n",
            "0, but must be a finite number over 0; it counts all that the model has seen, dense_tokens may be empty",
        ),
        (HEAD + "upcycle,1e9,inf,2\n", "p.csv:2: tokens is inf, but must be a finite number over 0"),
        (HEAD + "upcycle,,1e9,2\n", "p.csv:2: dense_tokens is '', which is no number"),
        (HEAD + "scratch,,1e9,-2\n", "p.csv:2: loss is -2"),
        (HEAD + "scratch,,many,2\n", "p.csv:2: tokens is 'many', which is no number"),
        (HEAD + "scratch,5,1e9,2\n", "a model from scratch has none: leave it empty"),
        (HEAD + "dense,0,1e9\n", "p.csv:2: has 3 cells, but the header 4"),
        (HEAD + 'dense,0,1e9,"2\ndense,0,2e9,2\n', "p.csv:2: is no line of CSV (unexpected end of data)"),
        (HEAD + 'dense,0,1e9,"2"x\n', "p.csv:2: is no line of CSV (',' expected after '\"')"),
        (HEAD[:-1] + ',run\ndense,0,1e9,2,"a\nb"\n', "p.csv:2: is no line of CSV (unexpected end of data)"),
        (HEAD[:-1] + ',"run\ndense,0,1e9,2,a\n', "p.csv:1: is no line of CSV"),
        (HEAD + "\ndense,0,1e9," + "9" * 131073 + "\n", "p.csv:3: is no line of CSV (field larger than field limit (131072))"),
    ],
)
def test_lines_that_cannot_be_used(text: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(ConfigError) as error:
        read_points(tmp_path / "p.csv")
    assert says in str(error.value)


def test_every_bad_line_is_told_at_once_and_other_columns_do_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("\ufeffrun,loss,kind,tokens,dense_tokens\na,2.5,dense,3e9,1e9\nb,0,x,1,1\nc,0,dense,1,1\n")
    with pytest.raises(ConfigError) as error:
        read_points(path)
    assert len(error.value.problems) == 2
    path.write_text("\ufeffrun,loss,kind,tokens,dense_tokens\na,2.5,dense,3e9,1e9\n")
    (point,) = read_points(path)
    assert point == Point("dense", 1e9, 3e9, 2.5, f"{path}:2") and point.place == (1.0, 4e9)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_points(tmp_path / "absent.csv")


def changed(found: list[Point], **values: Any) -> list[Point]:
    return [Point(**{**vars(p), **values}) if p.kind == "upcycle" else p for p in found]


def test_points_that_determine_no_law() -> None:
    all_points = points()
    few = [p for p in all_points if p.kind != "upcycle"] + [p for p in all_points if p.kind == "upcycle"][:6]
    together = [Point("upcycle", t, t, 2 + 1e3 / t**0.4, "x") for t in np.geomspace(1e9, 1e12, 8)]
    once = [p for p in all_points if p.kind == "upcycle" and p.dense_tokens == 1e10]
    once += [p for p in all_points if p.kind == "upcycle" and p.dense_tokens > 1e10][:2]
    last = all_points[-1]
    low = [*all_points[:-1], Point(last.kind, last.dense_tokens, last.tokens, 1.7, last.where)]
    cases: list[tuple[Kind, list[Point], str]] = [
        (
            "upcycle",
            few,
            "has 6 points of kind upcycle; a law needs at least 5 of kind dense, 5 of kind scratch, 7 of kind upcycle",
        ),
        ("upcycle", changed(all_points, dense_tokens=1e10), "dense_tokens of kind upcycle go from 10G to 10G only"),
        ("upcycle", changed(all_points, tokens=1e10), "tokens of kind upcycle go from 10G to 10G only"),
        ("upcycle", together, "change together, so their effects cannot be told apart"),
        ("upcycle", once, "is the only point that the interaction or an exponent of kind upcycle rests on"),
        ("scratch", [Point("scratch", 0, t, 2.0, "x") for t in (1, 1, 1, 9, 9)], "fewer than three different numbers of tokens"),
        ("dense", low, f"{last.where}: loss is 1.7, below the floor of 1.9 that the other points of kind dense have"),
    ]
    for kind, found, says in cases:
        with pytest.raises(ConfigError) as error:
            fit(kind, found)
        assert says in str(error.value)
    for kept in ("upcycle", "dense"):
        with pytest.raises(ConfigError, match="needed are 7 of kind upcycle and 5 of kind scratch or dense"):
            forecast("x", [p for p in all_points if p.kind == kept], dense_tokens=1, tokens=1, continued_tokens=1)


def test_the_option_is_for_advice_only() -> None:
    from moefold.launch.upcycle.verbs_upcycle import VERBS

    parser = argparse.ArgumentParser()
    VERBS["upcycle"].options(parser)
    with pytest.raises(ConfigError, match="--losses: is for --advise only"):
        VERBS["upcycle"].run(parser.parse_args(["--from", "a", "--to", "b", "--losses", "x.csv"]), {})
