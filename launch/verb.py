"""What a verb of the command is, and the options that many have. Imports no torch."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass

Flags = dict[str, object]


@dataclass(frozen=True)
class Verb:
    """One thing that `moefold` does: `moefold NAME ...`, where NAME has one word or two."""

    summary: str
    examples: tuple[str, ...]
    common: tuple[tuple[str, str], ...]
    """Settings that are used most with this verb, and what they do."""
    options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Flags], int]
    settings: bool = True
    """Whether the verb takes dotted settings."""


def add_files(parser: argparse.ArgumentParser, nargs: str = "+") -> None:
    """FILE ...: the configuration."""
    parser.add_argument(
        "files", nargs=nargs, metavar="FILE", help="TOML files, merged left to right; or a shipped name: quickstart"
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """--json."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def print_json(value: object) -> None:
    """What --json prints."""
    print(json.dumps(value, indent=2, ensure_ascii=False))
