"""The ragged product on torch.nn.functional.grouped_mm, and as a loop for the dtypes that it does not take."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..permute.torch_impl import Permute
from . import reference


def has_grouped_mm(x: Tensor) -> bool:
    """Whether grouped_mm takes the dtype on the device: bf16 everywhere, fp16 and fp32 where torch has no other kernel to run."""
    return x.dtype == torch.bfloat16 or (not x.is_cuda and x.dtype in (torch.float16, torch.float32))


def grouped_gemm(
    x: Tensor, w_END: Tensor, counts_E: Tensor, order_R: Tensor | None = None, row_TK: Tensor | None = None
) -> Tensor:
    """As the public function. The loop reads the counts on the host; grouped_mm does not."""
    x_RD = x if order_R is None or row_TK is None else Permute.apply(x, order_R, row_TK, None)
    if not has_grouped_mm(x):
        return reference.grouped_gemm(x_RD, w_END, counts_E)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    beyond_R1 = (torch.arange(x_RD.shape[0], device=x.device) >= ends_E[-1])[:, None]
    # grouped_mm neither reads nor writes the rows behind the last expert's, in both directions: zeros on both sides of it.
    # It takes row-major matrices only, also as the gradient that comes back.
    x_RD = x_RD.masked_fill(beyond_R1, 0).contiguous()
    y_RN = F.grouped_mm(x_RD, w_END.contiguous().transpose(1, 2), offs=ends_E)
    return _RowMajorGradient.apply(y_RN).masked_fill(beyond_R1, 0)


class _RowMajorGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, y_RN: Tensor) -> Tensor:
        return y_RN.view_as(y_RN)

    @staticmethod
    def backward(ctx: object, grad_RN: Tensor) -> Tensor:
        return grad_RN.contiguous()
