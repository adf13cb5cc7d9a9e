"""The bigram baseline is a proper distribution, matches hand counts, and is not weak."""

import numpy as np
import pytest

from moefold.launch.data.bigram import STRENGTHS, baseline, bits_per_byte, fit_bigram, pair_counts, probabilities
from moefold.launch.data.indexed import IndexedTokens, IndexedWriter, TokenSlice
from moefold.launch.data.loader import open_data
from moefold.launch.data.tokenizer import ByteTokenizer
from moefold.launch.settings import DataConfig, SourceConfig

BYTES = ByteTokenizer()


def stream(path, ids):
    with IndexedWriter(path, np.uint16) as w:
        w.append(np.asarray(ids))
    tokens = IndexedTokens(path)
    return TokenSlice(tokens, 0, len(tokens))


def markov(seed, n, symbols=8):
    """Text of a known first-order process, and its entropy in bits per symbol."""
    p = np.random.default_rng(0).dirichlet(np.full(symbols, 0.5), size=symbols)
    stationary = np.linalg.matrix_power(p, 200)[0]
    rng, x, out = np.random.default_rng(seed), 0, []
    for u in rng.random(n):
        x = min(int(np.searchsorted(np.cumsum(p[x]), u)), symbols - 1)
        out.append(x + 97)
    return np.array(out), float(-(stationary[:, None] * p * np.log2(p)).sum())


def test_pair_counts():
    counts = pair_counts(np.array([1, 2, 1, 2, 256, 1]))
    assert {(a, b): int(counts[a, b]) for a, b in np.argwhere(counts)} == {(1, 2): 2, (2, 1): 1, (2, 256): 1, (256, 1): 1}


@pytest.mark.parametrize("strength", [0.125, 1.0, 8.0])
def test_probabilities_are_distributions_without_zeros(strength):
    for symbols in (np.array([1, 2, 1, 3]), np.array([5]), np.arange(257)):
        p = probabilities(pair_counts(symbols), strength)
        assert np.allclose(p.sum(axis=1), 1) and p.min() > 0


def test_witten_bell_by_hand():
    counts = pair_counts(np.array([1, 2, 1, 2, 1, 3]))  # 1 is followed by 2, 2, 3; 2 by 1, 1
    p = probabilities(counts, 1.0)
    unigram = {2: (2 + 3 / 257) / 8, 1: (2 + 3 / 257) / 8, 3: (1 + 3 / 257) / 8}  # 5 followers, 3 different
    assert p[1, 2] == pytest.approx((2 + 2 * unigram[2]) / 5)
    assert p[2, 3] == pytest.approx((0 + 1 * unigram[3]) / 3)
    assert p[3, 1] == pytest.approx(unigram[1])


def test_reaches_the_entropy_of_a_first_order_process(tmp_path):
    train, entropy = markov(1, 60_000)
    heldout, _ = markov(2, 60_000)
    found = bits_per_byte([stream(tmp_path / "a", train)], stream(tmp_path / "b", heldout), BYTES)
    assert entropy - 0.02 < found < entropy + 0.02


def test_beats_the_unigram_on_little_text(tmp_path):
    train, _ = markov(1, 300)
    heldout, _ = markov(2, 20_000)
    share = np.bincount(heldout, minlength=257)[97:105] / len(heldout)
    found = bits_per_byte([stream(tmp_path / "a", train)], stream(tmp_path / "b", heldout), BYTES)
    assert found < -(share * np.log2(share)).sum()


@pytest.mark.parametrize("n", [200, 20_000])
def test_the_multiplier_is_near_the_best_one_for_unseen_text(tmp_path, n):
    train, heldout = markov(1, n, symbols=40)[0], markov(2, 20_000, symbols=40)[0]
    found = bits_per_byte([stream(tmp_path / "a", train)], stream(tmp_path / "b", heldout), BYTES)
    counts, unseen = pair_counts(train), pair_counts(heldout)
    each = [-(unseen * np.log2(probabilities(counts, s))).sum() / (len(heldout) - 1) for s in STRENGTHS]
    assert min(each) <= found < min(each) + 0.25 * (max(each) - min(each))


def test_reads_no_more_than_its_budget(tmp_path, monkeypatch):
    from moefold.launch.data import bigram

    monkeypatch.setattr(bigram, "CHUNK_TOKENS", 1000)
    read = []
    monkeypatch.setattr(TokenSlice, "read", lambda self, at, n: read.append((at, n)) or np.full(n, 65))
    fit_bigram([stream(tmp_path / "a", np.full(50_000, 65))], BYTES, max_tokens=5000)
    assert read == [(at, 1000) for at in range(0, 50_000, 10_000)]


def test_end_of_document_costs_bits_and_has_no_bytes(tmp_path):
    text = np.tile([97, 97, 97, 256], 500)
    s = stream(tmp_path / "x", text)
    p = fit_bigram([s], BYTES)
    counts = pair_counts(text)
    expected = -(counts * np.log2(p)).sum() / (text[1:] != 256).sum()
    assert bits_per_byte([s], s, BYTES) == pytest.approx(expected)


class Pairs:
    """A tokenizer of two-byte tokens: id i in 1..16 stands for two letters."""

    name, fingerprint, eos_id, vocab_size = "pairs", "pairs", 0, 17

    def decode(self, ids):
        return "".join(chr(97 + (i - 1) // 4) + chr(97 + (i - 1) % 4) for i in ids if i)


def test_other_tokenizers_are_measured_in_bytes(tmp_path):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 17, 20_000)
    as_bytes = np.concatenate([[256] if i == 0 else list(Pairs().decode([i]).encode()) for i in ids])
    a, b = stream(tmp_path / "a", ids), stream(tmp_path / "b", as_bytes)
    assert bits_per_byte([a], a, Pairs()) == pytest.approx(bits_per_byte([b], b, BYTES))


def open_text(tmp_path, **kw):
    sources = []
    for d in ("x", "y"):
        for i in range(60):
            path = tmp_path / d / f"{i}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"{d} says {i * 7919 % 1000}, then {i * 31 % 97}.\n" * 15)
        sources.append(SourceConfig(type="text", path=str(tmp_path / d), name=d))
    config = DataConfig(sources=tuple(sources), seq_len=32, holdout=0.2, **kw)
    return open_data(config, vocab_size=257, global_batch=4, cache_dir=tmp_path / "cache", eval_batches=10**6)


@pytest.mark.parametrize("document_mask", [False, True])
def test_baseline_is_measured_on_the_labels_of_the_evaluation(tmp_path, document_mask):
    data = open_text(tmp_path, document_mask=document_mask)
    found = baseline(data)
    ev, bits = data.evaluation, [0.0, 0.0]
    p = [fit_bigram([s.tokens], BYTES) for s in data.train.sources]
    for i in range(ev.num_batches):
        b = ev.batch(i)
        for d in (0, 1):
            mine = b.valid_BS & (b.domain_B == d)[:, None]
            bits[d] -= np.log2(p[d][b.tokens_BS[mine], b.labels_BS[mine]]).sum()
    assert list(found.by_domain.values()) == pytest.approx([bits[d] / ev.bytes_per_domain[d] for d in (0, 1)])
    assert found.bits_per_byte == pytest.approx(sum(bits) / sum(ev.bytes_per_domain))
    assert list(found.by_domain) == ["x", "y"]


def test_baseline_without_held_out_text(tmp_path):
    data = open_text(tmp_path)
    with pytest.raises(ValueError, match="no held-out text"):
        baseline(type(data)(data.train, None, data.tokenizer, data.domains, data.prepared))
