"""The upcycling methods, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from ..method import Method
from .bam import Bam
from .copy import Copy
from .dense_shared import DenseShared
from .drop import Drop
from .flex_olmo import FlexOlmo
from .merge import Merge
from .noise import Noise
from .split import Split
from .virtual_groups import VirtualGroups

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        method.name: method
        for method in (Copy(), VirtualGroups(), Drop(), Noise(), DenseShared(), Split(), Merge(), Bam(), FlexOlmo())
    }
)
