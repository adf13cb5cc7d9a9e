"""A case of the row movement that is the same for every back end."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moefold.kernels.permute import reference
from moefold.kernels.sort_tokens import sort_tokens
from numeric import assert_same


def check_missing_rows(permute: Callable[..., Tensor], unpermute: Callable[..., Tensor], share: float) -> None:
    """An order that is cut behind the kept rows gives what the whole one gives, both ways; so much of the choices is kept."""
    kept_TK, grad_TD, rows_RD, weights_TK = torch.rand(20, 3) < share, torch.randn(20, 6), torch.randn(60, 6), torch.rand(20, 3)
    order_R, row_TK, counts_E = sort_tokens(torch.rand(20, 5).argsort(-1)[:, :3], 5, kept_TK)
    end, found = int(counts_E.sum()), []
    for order in (order_R, order_R[:end]):
        x_TD, y_RD, w_TK = (x.clone().requires_grad_() for x in (grad_TD, rows_RD[: len(order)], weights_TK))
        there_RD, back_TD = permute(x_TD, order, row_TK, kept_TK), unpermute(y_RD, w_TK, order, row_TK, kept_TK)
        assert there_RD.shape == y_RD.shape
        (grad_x_TD,) = torch.autograd.grad(there_RD, x_TD, rows_RD[: len(order)])
        grad_y_RD, grad_w_TK = torch.autograd.grad(back_TD, (y_RD, w_TK), grad_TD)
        found.append({"there": there_RD[:end], "back": back_TD, "x": grad_x_TD, "y": grad_y_RD[:end], "weights": grad_w_TK})
        summed_TD = unpermute(y_RD, None, order, row_TK, kept_TK)
        found[-1] |= {"sum": summed_TD, "y of it": torch.autograd.grad(summed_TD, y_RD, grad_TD)[0][:end]}
    assert_same(found[1], found[0])
    want_TD = reference.unpermute(rows_RD[:end], weights_TK, order_R[:end], row_TK, kept_TK)
    assert_same({"back": found[1]["back"]}, {"back": want_TD}, 1e-6)
