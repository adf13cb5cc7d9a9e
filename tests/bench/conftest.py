"""Makes the benchmarks importable as `bench`: they are not installed, and the repository's root is not on the path of tests."""

from __future__ import annotations

import importlib.util
import sys

from sources import ROOT

if "bench" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "bench", ROOT / "bench" / "__init__.py", submodule_search_locations=[str(ROOT / "bench")]
    )
    assert _spec is not None and _spec.loader is not None
    _bench = importlib.util.module_from_spec(_spec)
    sys.modules["bench"] = _bench
    _spec.loader.exec_module(_bench)
