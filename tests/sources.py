"""The project's own source files, for tests that hold them to its rules."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "moe", "parallel", "launch")
"""From the bottom up: a room may import from those before it."""


def product_files() -> list[Path]:
    """Python files of the package, relative to the root of the repository."""
    return [Path("__init__.py"), *files_in(*ROOMS)]


def files_in(*folders: str) -> list[Path]:
    """Python files under these folders, relative to the root of the repository."""
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(path))
