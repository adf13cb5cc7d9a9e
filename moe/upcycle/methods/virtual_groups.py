"""Granular upcycling: every copy of the dense FFN is cut into pieces that are chosen together."""

from __future__ import annotations

from ..copies import Copies


class VirtualGroups(Copies):
    """He et al., arXiv 2410.07524. Exact with the scale in down or in the router; their cube root on all matrices is not.

    Choosing whole copies rests on equal logits of a copy's pieces. Two copies whose logits tie, as 16-bit logits do, could
    still be chosen in part; `group_limited` chooses copies first and so cannot.
    """

    name = "virtual_groups"
