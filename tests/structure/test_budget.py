"""Files and functions stay short enough to be read in one go, and product code keeps no state in modules."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from sources import ROOT, files_in, parsed, product_files

FILE_LINES = 400
FUNCTION_LINES = 60
CONTAINER_CALLS = frozenset({"dict", "list", "set", "bytearray", "defaultdict", "OrderedDict", "Counter", "deque", "ChainMap"})


def long_functions(tree: ast.Module) -> list[str]:
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f"line {n.lineno}: {n.name}": (n.end_lineno or n.lineno) - n.lineno + 1 for n in functions}
    return [f"{name} has {n} lines" for name, n in lengths.items() if n > FUNCTION_LINES]


def module_state(tree: ast.Module) -> list[str]:
    """Mutable containers bound at module level, and `global` statements anywhere."""
    found = [f"line {n.lineno}: global {', '.join(n.names)}" for n in ast.walk(tree) if isinstance(n, ast.Global)]
    for node in _module_level(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [ast.unparse(t) for t in targets]
            if names != ["__all__"] and _is_mutable(node.value):
                found.append(f"line {node.lineno}: {', '.join(names)} is a mutable container")
    return found


def _module_level(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements that run at import, those under if, try, with and for included."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if isinstance(child, ast.stmt):
                yield child
            yield from _module_level(child)


def _is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).rsplit(".", 1)[-1] in CONTAINER_CALLS
    return isinstance(value, ast.Dict | ast.List | ast.Set | ast.DictComp | ast.ListComp | ast.SetComp)


@pytest.mark.parametrize("path", [*product_files(), *files_in("tests", "bench")], ids=str)
def test_file_is_short(path: Path) -> None:
    lines = len((ROOT / path).read_text().splitlines())
    assert lines <= FILE_LINES, f"{path} has {lines} lines, more than {FILE_LINES}: it wants a second file"


@pytest.mark.parametrize("path", product_files(), ids=str)
def test_functions_are_short(path: Path) -> None:
    assert not long_functions(parsed(path)), f"{path}: a function over {FUNCTION_LINES} lines does more than one thing"


@pytest.mark.parametrize("path", product_files(), ids=str)
def test_no_module_state(path: Path) -> None:
    assert not module_state(parsed(path)), f"{path}: constants are tuples, frozensets or MappingProxyType; state is a parameter"


@pytest.mark.parametrize(
    ("source", "broken"),
    [
        ("cache = {}", True),
        ("NAMES: list[str] = []", True),
        ("SET = {1, 2}", True),
        ("from collections import defaultdict\nseen = defaultdict(int)", True),
        ("squares = [i * i for i in range(3)]", True),
        ("if True:\n    cache = {}", True),
        ("try:\n    import a\nexcept ImportError:\n    found = []", True),
        ("x = None\ndef f():\n    global x\n    x = 1", True),
        ("__all__ = ['a']", False),
        ("NAMES = ('a', 'b')", False),
        ("MAP = MappingProxyType({'a': 1})", False),
        ("BOTH = frozenset({'a'})", False),
        ("if True:\n    def f():\n        local = {}", False),
        ("def f():\n    local = {}\n    return local", False),
    ],
)
def test_the_state_rule_sees(source: str, broken: bool) -> None:
    assert bool(module_state(ast.parse(source))) is broken


def test_the_length_rule_sees() -> None:
    body = "\n".join(f"    x{i} = {i}" for i in range(FUNCTION_LINES))
    assert long_functions(ast.parse(f"def long():\n{body}")) == ["line 1: long has 61 lines"]
    assert not long_functions(ast.parse("def f():\n" + "\n".join(body.splitlines()[:-1])))
