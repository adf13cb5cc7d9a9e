"""What `moefold profile comm` measures, checked: sizes, repetitions, time, operations and groups."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from ...moe.errors import ConfigError, Problem
from ...parallel.comm_ops import OPERATIONS

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class CommOptions:
    """What to measure: sizes from `begin` to `end` bytes, each `factor` times the last; `iters` repetitions after `warmup`.

    budget_s: for everything; larger sizes are left out where it is not enough. imbalance: what the hottest rank of an uneven
    all_to_all gets, in means. operations, groups: names; None = what training does, on all groups. pairs: measure every two
    ranks.
    """

    begin: int = 8 * 1024
    end: int = 64 * 1024**2
    factor: float = 2.0
    iters: int = 20
    warmup: int = 5
    budget_s: float = 60.0
    imbalance: float = 2.0
    operations: tuple[str, ...] | None = None
    groups: tuple[str, ...] | None = None
    dtype: str = "float32"
    pairs: bool = True

    def __post_init__(self) -> None:
        wrong = []
        if self.begin < 1:
            wrong.append(Problem("--begin", f"is {self.begin}, but must be at least 1 byte"))
        if self.end < self.begin:
            wrong.append(Problem("--end", f"is {self.end}, less than --begin = {self.begin}; give a larger one"))
        if not 1 < self.factor < math.inf:
            wrong.append(Problem("--factor", f"is {self.factor:g}, but must be more than 1, for instance 2"))
        if self.iters < 3:
            wrong.append(Problem("--iters", f"is {self.iters}, but a median wants at least 3"))
        if self.warmup < 0:
            wrong.append(Problem("--warmup", f"is {self.warmup}, but must not be negative"))
        if not 0 < self.budget_s < math.inf:
            wrong.append(Problem("--budget-s", f"is {self.budget_s:g}, but must be a positive number of seconds"))
        if not 1 <= self.imbalance < math.inf:
            wrong.append(Problem("--imbalance", f"is {self.imbalance:g}, but must be at least 1 (even)"))
        if self.dtype not in DTYPES:
            wrong.append(Problem("--dtype", f"is {self.dtype}, but must be one of {', '.join(DTYPES)}"))
        unknown = [name for name in self.operations or () if name not in OPERATIONS]
        if unknown or self.operations == ():
            wrong.append(Problem("--ops", f"names {', '.join(unknown) or 'nothing'}; there are {', '.join(OPERATIONS)}"))
        if wrong:
            raise ConfigError(wrong)

    def sizes(self) -> tuple[int, ...]:
        """Bytes, ascending."""
        count = int(math.log(self.end / self.begin) / math.log(self.factor) + 1e-9) + 1
        return tuple(dict.fromkeys(round(self.begin * self.factor**i) for i in range(count)))

    def to_dict(self) -> dict[str, Any]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def parse_size(text: str, where: str) -> int:
    """Bytes of '8K', '64M', '1.5G' (powers of 1024, as in nccl-tests; 'KiB' and 'KB' mean the same) or of a plain number.

    Raises:
        ConfigError: anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)(?:i?b)?", text.strip().lower())
    if match is None:
        raise ConfigError([Problem(where, f"is '{text}', which is no size; write bytes, or 8K, 64M, 1G")])
    return round(float(match[1]) * 1024 ** ("", "k", "m", "g").index(match[2]))
