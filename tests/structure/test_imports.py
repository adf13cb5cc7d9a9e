"""Who may import whom: launch -> parallel -> moe -> kernels, no torch.distributed below parallel, no torch for configs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import moefold
from sources import ROOMS, parsed, product_files

WITHOUT_TORCH = (
    "moefold",
    "moefold.moe.config",
    "moefold.moe.errors",
    "moefold.moe.presets",
    "moefold.parallel",
    "moefold.parallel.config",
    "moefold.parallel.topology",
    "moefold.launch",
    "moefold.launch.cli",
    "moefold.launch.config",
    "moefold.launch.settings",
)


def imported(tree: ast.Module, path: Path) -> Iterator[tuple[int, str, bool]]:
    """(line, absolute dotted name, was it relative) of every import, with relative ones resolved inside moefold."""
    package = ["moefold", *path.parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}", node.level > 0) for alias in node.names)


def upward_imports(tree: ast.Module, path: Path) -> list[str]:
    """Imports of this file that go against the direction, each with the reason."""
    room, found = path.parts[0], []
    for line, name, relative in imported(tree, path):
        parts = name.split(".")
        if parts[0] in ("moefold", "tests", "bench", *ROOMS) and not relative:
            found.append(f"{path}:{line} imports {name}: import relatively inside the package")
        elif name == "moefold.__version__" and room == "launch":
            continue  # the one thing that the public face defines itself
        elif parts[0] == "moefold" and (len(parts) < 2 or parts[1] not in ROOMS):
            found.append(f"{path}:{line} imports {name}: product code imports only from {', '.join(ROOMS)}")
        elif parts[0] == "moefold" and ROOMS.index(parts[1]) > ROOMS.index(room):
            found.append(f"{path}:{line} imports {name}: {room} may not import {parts[1]}; direction is {' <- '.join(ROOMS)}")
    return found


def distributed_uses(tree: ast.Module, path: Path) -> list[str]:
    """Imports of torch.distributed and uses of it as an attribute of torch."""
    lines = [line for line, name, _ in imported(tree, path) if f"{name}.".startswith("torch.distributed.")]
    lines += [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) == "torch.distributed"]
    return [f"{path}:{line} uses torch.distributed; ranks come in through a Dispatcher or a Peers object" for line in lines]


def environment_reads(tree: ast.Module, path: Path) -> list[str]:
    names = ("os.environ", "os.getenv", "os.environb")
    lines = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and ast.unparse(n) in names]
    lines += [line for line, name, _ in imported(tree, path) if name in names]
    return [f"{path}:{line} reads the environment; a parameter that launch fills in says what a function needs" for line in lines]


@pytest.mark.parametrize("path", [p for p in product_files() if len(p.parts) > 1], ids=str)
def test_imports_go_down(path: Path) -> None:
    assert not upward_imports(parsed(path), path)


@pytest.mark.parametrize("path", [p for p in product_files() if p.parts[0] in ("moe", "kernels")], ids=str)
def test_no_torch_distributed_in_moe_and_kernels(path: Path) -> None:
    assert not distributed_uses(parsed(path), path)


@pytest.mark.parametrize("path", [p for p in product_files() if p.parts[0] in ("moe", "kernels", "parallel")], ids=str)
def test_no_environment_below_launch(path: Path) -> None:
    assert not environment_reads(parsed(path), path)


@pytest.mark.parametrize(
    ("source", "file", "broken"),
    [
        ("from ..parallel.mesh import x", "moe/layer.py", True),
        ("from .. import launch", "moe/layer.py", True),
        ("from ...moe import config", "kernels/permute/op.py", True),
        ("from ..bench import run", "launch/cli.py", True),
        ("from .. import MoELayer", "launch/cli.py", True),
        ("import moefold", "launch/cli.py", True),
        ("from moefold.moe import config", "launch/cli.py", True),
        ("from kernels import permute", "moe/layer.py", True),
        ("def f():\n    from ..launch import cli", "parallel/mesh.py", True),
        ("from .. import __version__", "launch/cli.py", False),
        ("from ..kernels import permute\nfrom . import config\nimport torch", "moe/layer.py", False),
        ("from ..moe.config import MoEConfig\nfrom ..kernels.permute import permute", "launch/cli.py", False),
    ],
)
def test_the_direction_rule_sees(source: str, file: str, broken: bool) -> None:
    assert bool(upward_imports(ast.parse(source), Path(file))) is broken


@pytest.mark.parametrize(
    ("source", "broken"),
    [
        ("import torch.distributed as dist", True),
        ("from torch import distributed", True),
        ("from torch.distributed.tensor import DTensor", True),
        ("import torch\nrank = torch.distributed.get_rank()", True),
        ("import torch.distributions", False),
    ],
)
def test_the_distributed_rule_sees(source: str, broken: bool) -> None:
    assert bool(distributed_uses(ast.parse(source), Path("moe/layer.py"))) is broken


@pytest.mark.parametrize("source", ["import os\nx = os.environ['A']", "import os\nos.getenv('A')", "from os import environ"])
def test_the_environment_rule_sees(source: str) -> None:
    assert environment_reads(ast.parse(source), Path("moe/layer.py"))


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_imports_without_torch(module: str) -> None:
    """So that help and config errors come at once. Import torch inside the functions that need it."""
    code = f"import sys, {module}\nprint(sorted({{'torch', 'triton', 'matplotlib', 'numpy'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]", f"importing {module} imports {done.stdout.strip()}"


@pytest.mark.parametrize("name", moefold.__all__)
def test_every_public_name_loads(name: str) -> None:
    assert getattr(moefold, name).__name__ == name
    assert name in dir(moefold)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'moefold' has no attribute 'Mole'"):
        moefold.Mole  # noqa: B018
