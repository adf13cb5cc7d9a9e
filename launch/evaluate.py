"""Held-out loss per domain, and text sampled from the model."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..parallel.engine import Engine, MicroBatch
from .data.loader import Batch, Data


def micro_batch(batch: Batch, device: torch.device) -> MicroBatch:
    """What the engine is fed. A mask that hides nothing is dropped, so that the layers need not apply it."""
    b = batch.to(device, non_blocking=True)
    valid = None if bool(batch.valid_BS.all()) else b.valid_BS
    return MicroBatch(b.tokens_BS, b.labels_BS, valid, b.document_BS, b.domain_B, batch.sample_ids_B)


@dataclass(frozen=True)
class Evaluation:
    """Mean loss in nats per token, and bits per byte of all held-out text and of each domain that has any. compressed: the same
    with compression, where it was asked for."""

    loss: float
    bits_per_byte: float
    by_domain: dict[str, float]
    compressed: Evaluation | None = None

    def metrics(self) -> dict[str, float]:
        values = {"eval/loss": self.loss, "eval/bits_per_byte": self.bits_per_byte}
        if self.compressed is not None:
            values["eval/loss_compressed"] = self.compressed.loss
            values["eval/bits_per_byte_compressed"] = self.compressed.bits_per_byte
        return values | {f"eval/bits_per_byte/{name}": value for name, value in self.by_domain.items()}


def evaluate(engine: Engine, data: Data, rows: int) -> Evaluation:
    """Run the model over the held-out batches. Collective; `rows` sequences per rank and forward pass, dividing its share."""
    assert data.evaluation is not None
    held, mesh = data.evaluation, engine.mesh
    per_rank = held.batch_size // mesh.topology.dp
    sums = torch.zeros(len(data.domains), 2, dtype=torch.float64, device=mesh.device)
    for index in range(held.num_batches):
        first = mesh.coordinates.dp * per_rank
        # the domains of the whole batch, not of this rank's rows: every rank must run the same passes
        domains = sorted(set(held.batch(index).domain_B.tolist()))
        for lo in range(first, first + per_rank, rows):
            batch = held.batch(index, range(lo, lo + rows))
            for domain in domains:
                mask = batch.valid_BS & (batch.domain_B == domain)[:, None]
                m = micro_batch(Batch(**{**vars(batch), "valid_BS": mask}), mesh.device)
                loss_sum, _ = engine.evaluate(m)
                sums[domain, 0] += loss_sum
                sums[domain, 1] += m.valid_tokens()
    engine.reshard()
    if mesh.topology.world > 1:
        dist.all_reduce(sums, group=mesh.world_group)
    nats_D, tokens_D = (sums / mesh.topology.tp).cpu().T.tolist()
    size_D = held.bytes_per_domain
    bits = [n / math.log(2) / size if size else math.nan for n, size in zip(nats_D, size_D, strict=True)]
    by_domain = {name: b for name, b, size in zip(data.domains, bits, size_D, strict=True) if size}
    return Evaluation(sum(nats_D) / max(1.0, sum(tokens_D)), sum(nats_D) / math.log(2) / max(1, sum(size_D)), by_domain)


@torch.no_grad()
def sample_text(engine: Engine, data: Data, *, length: int, seq_len: int, seed: int = 0, temperature: float = 0.8) -> str:
    """Continue the beginning of a held-out text by up to `length` tokens. Collective; the same on every rank."""
    mesh = engine.mesh
    prompt_len = min(32, seq_len // 2)
    stop = min(seq_len, prompt_len + length)
    tokens_S = torch.zeros(1, seq_len, dtype=torch.int64, device=mesh.device)
    source = data.evaluation.window(0)[0] if data.evaluation is not None else data.train.sample(0)[0]
    tokens_S[0, :prompt_len] = torch.from_numpy(source[:prompt_len]).to(mesh.device)
    generator = torch.Generator().manual_seed(seed)
    for position in range(prompt_len, stop):
        logits_V = engine.logits(tokens_S)[0, position - 1].float().cpu()
        probs_V = torch.softmax(logits_V[: data.tokenizer.vocab_size] / temperature, -1)
        chosen = torch.multinomial(probs_V, 1, generator=generator).to(mesh.device)
        _agree(chosen, mesh.topology.world)
        tokens_S[0, position] = chosen
        if int(chosen) == data.tokenizer.eos_id:
            stop = position
            break
    engine.reshard()
    ids = tokens_S[0, :stop].cpu().numpy()
    return data.tokenizer.decode(ids[:prompt_len]) + "⟦…⟧" + data.tokenizer.decode(ids[prompt_len:])


def _agree(token: Tensor, world: int) -> None:
    """Rank 0's choice everywhere: rounding may differ between ranks, and their sequences must not."""
    if world > 1:
        dist.broadcast(token, src=0)
