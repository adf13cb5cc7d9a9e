"""Line numbers of the keys of a TOML text, which the parser of the standard library does not tell. Imports no torch."""

from __future__ import annotations

import re

_KEY = re.compile(r"""\s*(?:"((?:[^"\\]|\\.)*)"|'([^']*)'|([A-Za-z0-9_-]+))\s*(\.?)""")
_SKIP = re.compile(r"(?:\s+|#[^\n]*)*")
# One step through a value: a string of any kind, a comment, a bracket, or a plain character.
_VALUE = re.compile(r'"""(?:[^\\]|\\.)*?"""+|' r"'''.*?'''+|" r'"(?:[^"\\\n]|\\.)*"|' r"'[^'\n]*'|#[^\n]*|.", re.DOTALL)


def key_lines(text: str) -> dict[str, int]:
    """Line number (from 1) of every table header and key of valid TOML; elements of `[[a]]` are `a[0]`, `a[1]`."""
    lines: dict[str, int] = {}
    counts: dict[str, int] = {}
    table, position = "", 0
    while True:
        skip = _SKIP.match(text, position)
        position = skip.end() if skip else position
        if position >= len(text):
            return lines
        line = text.count("\n", 0, position) + 1
        if text[position] == "[":
            double = text.startswith("[[", position)
            parts, position = _key(text, position + (2 if double else 1))
            table = _indexed(parts, counts, double)
            lines.setdefault(table, line)
            position = _line_end(text, position)
        else:
            parts, position = _key(text, position)
            lines[".".join([table, *parts] if table else parts)] = line
            position = _value_end(text, position + 1)


def _key(text: str, position: int) -> tuple[list[str], int]:
    parts = []
    while match := _KEY.match(text, position):
        parts.append(next(part for part in match.groups()[:3] if part is not None))
        position = match.end()
        if not match[4]:
            break
    return parts, position


def _indexed(parts: list[str], counts: dict[str, int], double: bool) -> str:
    """Path of a table header; below a list of tables it means the newest element."""
    path = ""
    for i, part in enumerate(parts):
        path = f"{path}.{part}" if path else part
        if double and i == len(parts) - 1:
            counts[path] = counts.get(path, 0) + 1
        if path in counts:
            path = f"{path}[{counts[path] - 1}]"
    return path


def _line_end(text: str, position: int) -> int:
    end = text.find("\n", position)
    return len(text) if end < 0 else end + 1


def _value_end(text: str, position: int) -> int:
    depth = 0
    while position < len(text):
        match = _VALUE.match(text, position)
        assert match is not None
        token, position = match[0], match.end()
        if token in "[{":
            depth += 1
        elif token in "]}":
            depth -= 1
        elif token == "\n" and depth == 0:
            return position
    return position
