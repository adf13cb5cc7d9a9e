"""Goals of benchmarks: met, missed, not a number, absent, and only on a GPU. The benchmarks themselves are not run here."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from sources import ROOT

BENCH = ROOT / "bench"


def load(name: str) -> ModuleType:
    """A module of bench/, which is not installed and not on the path of tests."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def result() -> ModuleType:
    return load("result")


@pytest.mark.parametrize(
    ("settings", "figures", "kept", "word"),
    [
        ({"at_most": 2}, {"x": 2.0}, True, "met"),
        ({"at_most": 2}, {"x": 2.5}, False, "MISSED"),
        ({"at_least": 2}, {"x": 2.5}, True, "met"),
        ({"at_least": 2}, {"x": 1.0}, False, "MISSED"),
        ({"at_least": 2}, {"x": float("nan")}, False, "MISSED"),
        ({"at_most": 2}, {"x": float("nan")}, False, "MISSED"),
        ({"at_most": 2}, {"y": 1.0}, False, "no such figure"),
        ({"at_most": 2, "device": "cuda"}, {"x": 9.0}, True, "not checked"),
    ],
)
def test_check(result: ModuleType, settings: dict, figures: dict, kept: bool, word: str) -> None:
    lines, all_kept = result.check([result.Goal("speed", "x", "for a reason", **settings)], figures, cuda=False)
    assert all_kept is kept
    assert word in lines[0] and "speed.x" in lines[0]


def test_a_goal_for_gpus_holds_where_there_is_one(result: ModuleType) -> None:
    goal = result.Goal("speed", "x", "for a reason", at_most=2, device="cuda")
    assert result.check([goal], {"x": 9.0}, cuda=True)[1] is False


@pytest.mark.parametrize("bounds", [{}, {"at_least": 1, "at_most": 2}], ids=["none", "both"])
def test_a_goal_has_one_bound(result: ModuleType, bounds: dict) -> None:
    with pytest.raises(ValueError, match="either at_least or at_most"):
        result.Goal("speed", "x", "", **bounds)


def test_every_stated_goal_can_be_read_and_belongs_to_a_benchmark(result: ModuleType) -> None:
    stated = tomllib.loads((BENCH / "goals.toml").read_text())
    for name in stated:
        assert (BENCH / f"{name}.py").is_file(), f"bench/goals.toml: there is no benchmark '{name}'"
        assert all(goal.why for goal in result.load_goals(name))


def test_the_table_lines_up(result: ModuleType) -> None:
    text = result.render([{"name": "a", "time_us": 1.23456}, {"name": "longer", "time_us": None}]).splitlines()
    assert text[0] == "name    time_us"
    assert text[2:] == ["a         1.235", "longer        -"]


def run_bench(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "bench", *words], cwd=cwd, capture_output=True, text=True, timeout=60)


def test_an_unknown_name_lists_the_benchmarks_and_suggests_one() -> None:
    done = run_bench("balance_mode")
    assert done.returncode == 2
    assert "did you mean 'balance_modes'?" in done.stderr
    assert "parallel_invariance" in done.stderr


def test_without_a_name_it_lists_them() -> None:
    done = run_bench("--help")
    assert done.returncode == 0
    assert "balance_modes" in done.stdout
