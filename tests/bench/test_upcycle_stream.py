"""The benchmark of streamed upcycling: one small run, its arithmetic by hand, and its goals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from bench.__main__ import main
from bench.result import load_goals
from bench.upcycle_stream import COPIES, WIDTHS, dense_config, kill_shares, plain_copy, row, summary

from bench import upcycle_stream


def test_a_small_run(tmp_path: Path) -> None:
    out = tmp_path / "rows.json"
    words = ["upcycle_stream", "--gib", "0.01", "--rounds", "1", "--kills", "1", "--seed", "3", "--folder", str(tmp_path)]
    assert main([*words, "--json", str(out)]) == 0
    assert list(tmp_path.iterdir()) == [out], "what it wrote is removed"
    found = json.loads(out.read_text())
    rows, figures = found["rows"], found["figures"]
    assert [line["what"] for line in rows] == ["plain copy", "copy", "virtual_groups", "killed, run again"]
    assert all(line["mib"] > 10 and line["seconds"] > 0 for line in rows)
    killed = rows[-1]
    assert killed["unchanged"] is True and killed["kept_mib"] <= killed["killed_at_mib"] <= killed["mib"]
    assert 10 < figures["peak_rss_mib"] < 200, "without torch, and in parts"
    assert figures["kills_unchanged_share"] == 1
    assert {goal.figure for goal in load_goals("upcycle_stream")} <= set(figures)


def test_figures_are_medians_of_neighbours() -> None:
    rows = []
    for number, (copy_s, ours_s, cut_s) in enumerate(((1.0, 2.0, 1.0), (2.0, 2.0, 4.0), (4.0, 5.0, 5.0))):
        rows += [row("plain copy", number, 10**9, copy_s), row("copy", number, 10**9, ours_s, peak_rss_mib=40.0 + number)]
        rows += [row("virtual_groups", number, 10**9, cut_s, peak_rss_mib=30.0)]
    assert summary(rows) == {
        "copy_ratio_to_copy": pytest.approx(0.8),
        "virtual_groups_ratio_to_copy": pytest.approx(0.8),
        "ratio_to_copy": pytest.approx(0.8),
        "peak_rss_mib": 42.0,
    }
    assert rows[0]["mb_per_s"] == pytest.approx(1000)


@pytest.mark.parametrize("gib", [0.01, 0.5, 3.0, 10.0, 40.0])
def test_the_model_has_about_the_size(gib: float) -> None:
    config = dense_config(gib)
    experts = COPIES * 3 * config.dim * (config.dense_ffn_dim or 0) * 2 * config.num_layers
    assert 0.6 < experts / (gib * 2**30) < 1.6
    assert (config.dim, config.dense_ffn_dim) in WIDTHS and (gib < 10 or config.dim == 8192), "ten GiB have the largest matrices"


def test_plain_copies_end_at_the_byte(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    for name, size in (("a", 1000), ("b", 500)):
        (tmp_path / "source" / f"{name}.safetensors").write_bytes(b"x" * size)
    plain_copy(tmp_path, 2700)
    assert [path.stat().st_size for path in sorted((tmp_path / "copies").iterdir())] == [1000, 500, 1000, 200]


def test_kills_are_drawn_from_the_seed() -> None:
    assert kill_shares(5, 1) == kill_shares(5, 1) != kill_shares(5, 2)
    assert all(0 <= share < 1 for share in kill_shares(50, 1))


def test_what_is_not_killed_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was faster than the kill shows nothing, so it must not look like a success; and damage must be seen."""
    out = tmp_path / "out"
    said = {"seconds": 1.0, "rss_mib": 1.0, "kept": 0}
    answers: list[tuple[dict[str, float], bytes]] = [(said, b"right"), (said, b"right"), ({}, b"half"), (said, b"wrong")]

    def runs(folder: Path, method: str, kill_at: int | None = None) -> dict[str, float]:
        answer, content = answers.pop(0)
        out.mkdir(exist_ok=True)
        (out / "model.safetensors").write_bytes(content)
        return answer

    monkeypatch.setattr(upcycle_stream, "upcycle", runs)
    assert upcycle_stream.kill(tmp_path, 0.5)["unchanged"] is False, "not killed"
    assert upcycle_stream.kill(tmp_path, 0.5)["unchanged"] is False, "killed, and other bytes afterwards"
    assert not answers
