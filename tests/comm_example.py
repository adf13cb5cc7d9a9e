"""A comm.json of two ranks, small, with a name in it that must not become a tag of a page."""

from __future__ import annotations

from typing import Any

TIMES = dict.fromkeys(("skew_s", "transfer_s", "hidden_s", "unseen_s", "exposed_share"), 0.1)
COMM_EXAMPLE: dict[str, Any] = {
    "ranks": 2,
    "steps": [10, 20],
    "clock_error_s": 5e-5,
    "verdicts": [{"kind": "slow_rank", "rank": 1, "share": 0.1, "text": "rank 1 <computes> more slowly"}],
    "layers": [{"layer": 1, "what": "dispatch", "axis": "ep_etp", "direction": "forward", **TIMES}],
    "by_rank": {"0": TIMES},
    "last": {"0": 7},
    "all_to_all_bytes": [[0, 1 << 20], [2 << 20, 0]],
}
