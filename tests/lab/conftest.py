"""Labs for tests; a test that needs one is skipped where none can be made, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from lab.bed import Lab, LabUnavailable


@pytest.fixture(scope="module")
def make_lab() -> Iterator[Callable[..., Lab]]:
    """`make_lab(hosts=2, rate="200mbit")` opens a `Lab` that is closed after the last test of the module."""
    with ExitStack() as stack:

        def make(*args: object, **kwargs: object) -> Lab:
            try:
                return stack.enter_context(Lab(*args, **kwargs))  # type: ignore[arg-type]
            except LabUnavailable as unavailable:
                pytest.skip(f"no lab: {unavailable}")

        yield make
