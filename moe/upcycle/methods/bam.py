"""One routed expert and one attention expert from each of several dense models, everything else averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...config import ModelConfig
from ...errors import ConfigError, Problem
from ...hf.matrix import Matrix
from ..method import Models
from ..options import UpcycleOptions
from ..router_init import router
from .merge import Merge


class Bam(Merge):
    """BAM: Zhang et al., arXiv 2408.08274. As `Merge`, but attention is not averaged: that of each model becomes an attention
    expert, in dense layers too, and all of them run, mixed by a router (`ModelConfig.attention_experts`).

    With attention_expert_kv = "shared", experts keep queries and output, and share the average of keys and values. Models of one
    kind give, for any router, what each of them computes where all are the same. The models of the paper have attention and
    feed-forward network side by side, so that experts of both kinds run at once; the ones that are read here have them one after
    the other, and keep that.
    """

    name = "bam"

    def plan(self, dense: Models, options: UpcycleOptions) -> ModelConfig:
        config = super().plan(dense, options)
        if config.attention_experts > 1:
            what = f"is {config.attention_experts}: bam makes attention experts of models that have none yet; use method 'merge'"
            raise ConfigError([Problem("model 0, attention_experts", what)])
        assert config.moe is not None
        return replace(config, attention_experts=config.moe.num_experts, attention_expert_kv=options.attention_expert_kv)

    def exact(self, dense: Models, options: UpcycleOptions) -> str | None:
        self.plan(dense, options)
        return (
            "experts of both kinds come from different models and the rest is averaged, so there is no one dense model to equal; "
            "train on"
        )

    def attention(
        self, index: int, attention: Sequence[Mapping[str, Matrix]], options: UpcycleOptions, config: ModelConfig
    ) -> dict[str, Matrix]:
        at, shared = f"layers.{index}.attention", options.attention_expert_kv == "shared"
        parts = {f"{at}.router": router(index, options, config.dim, len(attention), 1, of="attention")}
        for e, given in enumerate(attention):
            # shared keys and values are left to `rest`, which averages them
            parts |= {f"{at}.experts.{e}.{name}": m for name, m in given.items() if not (shared and name[0] in "kv")}
        return parts
