"""Router logits -> the top k experts of each token, their weights, and what the balance and z losses need."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backend import Backend, choose
from . import reference
from .rule import Gate, GateRule


def topk_gate(
    logits_TE: Tensor,
    rule: GateRule,
    bias_E: Tensor | None = None,
    valid_T: Tensor | None = None,
    backend: Backend = "auto",
) -> Gate:
    """Choose `rule.top_k` of E experts for each token.

    Args:
        logits_TE: fp32 or fp64, as narrower logits would tie and mis-rank experts.
        bias_E: added for the choice only (loss-free balancing, arXiv 2408.15664); gets no gradient.
        valid_T: bool, tokens that are counted; None = all. The others are routed all the same.
        backend: "torch" or "triton" (one kernel each way); "auto" as `backend.rule` says.

    Raises:
        ValueError: shapes, dtypes, devices or a rule that do not fit each other.
    """
    if logits_TE.ndim != 2 or logits_TE.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"topk_gate: logits are {logits_TE.dtype} {tuple(logits_TE.shape)}; need float32 or float64 [T, E]")
    T, E = logits_TE.shape
    rule.check(E)
    if bias_E is not None and bias_E.shape != (E,):
        raise ValueError(f"topk_gate: bias {tuple(bias_E.shape)} and logits {(T, E)} [T, E] differ in E")
    if valid_T is not None and (valid_T.shape != (T,) or valid_T.dtype != torch.bool):
        raise ValueError(f"topk_gate: valid is {valid_T.dtype} {tuple(valid_T.shape)}; logits {(T, E)} need bool {(T,)}")
    if choose("topk_gate", backend, logits_TE) == "triton":
        # not at the top: triton is absent on some machines without a GPU
        from . import triton_impl

        return triton_impl.topk_gate(logits_TE, rule, bias_E, valid_T)
    return reference.topk_gate(logits_TE, rule, bias_E, valid_T)


__all__ = ["Backend", "Gate", "GateRule", "topk_gate"]
