"""The dense FFN as shared expert, beside routed experts that start without output."""

from __future__ import annotations

from collections.abc import Sequence

from ...config import ModelConfig
from ...hf.matrix import Matrix
from ..experts import Ffn, expert_parts, padded, router_parts, shared_parts, silent, sizes_of, take
from ..method import Method, Models, moe_model, one_model
from ..options import UpcycleOptions
from ..router_init import router
from ..sizes import find_sizes


class DenseShared(Method):
    """Exact for any router, any number of experts and any granularity, as routed experts' down projections are 0.

    Expert e has gate and up of piece e mod G of the dense FFN. Its down projection gets gradients from the first step; the
    router gets them once experts have moved.
    """

    name = "dense_shared"

    def plan(self, dense: Models, options: UpcycleOptions) -> ModelConfig:
        model = one_model(dense, self.name)
        return moe_model(model, options, find_sizes(model, options), options.num_experts or 0)

    def exact(self, dense: Models, options: UpcycleOptions) -> str | None:
        self.plan(dense, options)
        return None

    def layer(self, index: int, ffn: Sequence[Ffn], options: UpcycleOptions, config: ModelConfig) -> dict[str, Matrix]:
        sizes, N = sizes_of(ffn[0], options, config), options.num_experts or 0
        parts = router_parts(index, router(index, options, config.dim, N, 1), options)
        for e in range(N):
            piece = padded(take(ffn[0], sizes.pieces[e % options.pieces]), sizes.expert_dim)
            parts |= expert_parts(index, e, silent(piece))
        return parts | shared_parts(index, ffn[0], options, sizes)
