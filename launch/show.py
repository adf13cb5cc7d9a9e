"""A configuration as text for people. Imports no torch."""

from __future__ import annotations

import json

from .config import Loaded, flatten


def show(loaded: Loaded) -> str:
    """Every value of a configuration in TOML form, with its origin as a comment; to write a file use `config.dump`."""
    tables: dict[str, list[tuple[str, str]]] = {}
    for path, value in flatten(loaded.config).items():
        table, _, key = path.rpartition(".")
        setting = f"# {key} is not set" if value is None else f"{key} = {json.dumps(value, ensure_ascii=False)}"
        tables.setdefault(table, []).append((setting, loaded.origins[path]))
    width = min(max(len(setting) for lines in tables.values() for setting, _ in lines), 60)
    blocks = []
    for table, lines in tables.items():
        header = f"[[{table.partition('[')[0]}]]" if table.endswith("]") else f"[{table}]"
        blocks.append("\n".join([header, *(f"{setting:{width}}  # {origin}" for setting, origin in lines)]))
    return "\n\n".join(blocks)
