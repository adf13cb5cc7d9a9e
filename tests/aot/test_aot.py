"""Every production launch compiles for sm_90 as it should: matrix instructions, no spills, no float atomics."""

from __future__ import annotations

import json
from typing import Any

import pytest

from aot.compile import FLOAT_ATOMIC, SHARED_LIMIT, TABLE, all_calls, run

triton = pytest.importorskip("triton", reason="the kernels are written in Triton, which is not installed")
REGENERATE = "if this is meant: python tests/aot/compile.py --write, and commit tests/aot/resources.json"
CALLS = tuple(all_calls())


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, dict[str, Any]] | str]:
    return dict(run(list(CALLS)))


@pytest.fixture
def kernels(results: dict[str, dict[str, dict[str, Any]] | str], call: str) -> dict[str, dict[str, Any]]:
    result = results[call]
    if isinstance(result, str):
        pytest.fail(f"{call} does not compile: {result}")
    return result


def problems(use: dict[str, Any]) -> list[str]:
    """What a kernel must not do on sm_90, whatever it was measured at before."""
    found = []
    if use["dots_16_bit"] and not use["hgmma"]:
        found.append("a product of 16-bit tiles without warp-group matrix instructions (HGMMA)")
    if use["hmma"]:
        found.append(f"{use['hmma']} of the slower matrix instructions (HMMA)")
    if use["spills"] or use["stack_bytes"]:
        found.append(f"registers spill: {use['spills']} local loads and stores, {use['stack_bytes']} bytes of stack")
    if use["shared_bytes"] > SHARED_LIMIT:
        found.append(f"{use['shared_bytes']} bytes of shared memory, a block has {SHARED_LIMIT}: the launch would fail")
    if use["float_atomics"]:
        found.append(f"{use['float_atomics']} float atomics: reruns would differ")
    return found


@pytest.mark.parametrize("call", CALLS)
def test_machine_code(kernels: dict[str, dict[str, Any]], call: str) -> None:
    assert not (wrong := {name: found for name, use in kernels.items() if (found := problems(use))}), f"{call}: {wrong}"


@pytest.mark.parametrize("call", CALLS)
def test_resources_do_not_rise(kernels: dict[str, dict[str, Any]], call: str) -> None:
    table = json.loads(TABLE.read_text())
    if table["triton"] != triton.__version__:
        pytest.skip(f"the table is for triton {table['triton']}, installed is {triton.__version__}: {REGENERATE}")
    recorded = {name: use for name, use in table["kernels"].items() if name.startswith(f"{call}: ")}
    assert recorded.keys() == {f"{call}: {name}" for name in kernels}, f"other kernels than in the table; {REGENERATE}"
    for name, use in kernels.items():
        for key in ("registers", "shared_bytes"):
            before, now = recorded[f"{call}: {name}"][key], use[key]
            assert now <= before, f"{call}: {name}: {now} {key}, {before} before; {REGENERATE}"


def test_the_table_holds_nothing_else() -> None:
    names = {name.split(": ")[0] for name in json.loads(TABLE.read_text())["kernels"]}
    assert names == set(CALLS), REGENERATE


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dots_16_bit": 1, "hgmma": 0}, "HGMMA"),
        ({"hmma": 4}, "HMMA"),
        ({"spills": 2}, "spill"),
        ({"stack_bytes": 8}, "spill"),
        ({"shared_bytes": SHARED_LIMIT + 1}, "shared memory"),
        ({"float_atomics": 1}, "atomics"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_the_rules_see(change: dict[str, int], said: str) -> None:
    clean = {"registers": 90, "shared_bytes": 1, "warps": 8, "stack_bytes": 0, "spills": 0}
    clean |= {"hgmma": 8, "hmma": 0, "float_atomics": 0, "dots_16_bit": 1}
    assert not problems(clean)
    assert said in " ".join(problems(clean | change))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("red.global.add.f32 [%rd1], %f1;", True),
        ("atom.global.gpu.acq_rel.add.f32 %f2, [%rd1], %f1;", True),
        ("atom.global.add.noftz.bf16 %h1, [%rd1], %h2;", True),
        ("red.global.add.v4.f32 [%rd1], {%f1, %f2, %f3, %f4};", True),
        ("atom.shared.add.u32 %r1, [%r2], 1;", False),
        ("add.f32 %f1, %f2, %f3;", False),
    ],
)
def test_float_atomics_are_seen(line: str, found: bool) -> None:
    assert bool(FLOAT_ATOMIC.search(line)) is found


def test_a_process_that_dies_costs_only_its_call() -> None:
    results = dict(run(["no such call", CALLS[0]]))
    assert "KeyError" in results["no such call"]
    assert isinstance(results[CALLS[0]], dict)
