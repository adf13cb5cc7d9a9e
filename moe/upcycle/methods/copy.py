"""Sparse upcycling: every expert is the dense FFN."""

from __future__ import annotations

from ..copies import Copies


class Copy(Copies):
    """Komatsuzaki et al., arXiv 2212.05055. Where weights are normalised, exact for any router, as all experts are the same."""

    name = "copy"
