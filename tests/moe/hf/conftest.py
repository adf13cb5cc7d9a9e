"""A source on disk, and what writing it without an interruption gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from written import contents, make_source, write


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    out = tmp_path_factory.mktemp("whole") / "out"
    write(source, out)
    assert not out.with_name("out.partial").exists()
    return contents(out)
