"""Batches: the same global batch for every layout, masks, evaluation windows, prefetching, and failures of the writer."""

import threading
import time

import numpy as np
import pytest
import torch

from moefold.launch.data.indexed import IndexedTokens, IndexedWriter, TokenSlice
from moefold.launch.data.loader import EvalBatches, GlobalBatches, Prefetcher, Source, open_data
from moefold.launch.data.tokenizer import ByteTokenizer
from moefold.launch.settings import DataConfig, SourceConfig
from moefold.moe.errors import DataError

S, GB = 16, 24


def stream(path, docs, start=0, stop=None):
    with IndexedWriter(path, np.uint16) as w:
        for d in docs:
            w.append(np.asarray(d))
            w.end_document()
    tokens = IndexedTokens(path)
    return TokenSlice(tokens, start, len(tokens) if stop is None else stop)


def random_documents(seed, n=60, longest=40):
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(0, 256, rng.integers(1, longest)), 256) for _ in range(n)]


@pytest.fixture
def sources(tmp_path):
    return [
        Source("a", 0.7, stream(tmp_path / "a", random_documents(0))),
        Source("b", 0.3, stream(tmp_path / "b", random_documents(1, n=20), start=13)),
    ]


def batches(sources, **kw):
    return GlobalBatches(sources, **{"seq_len": S, "global_batch": GB, "seed": 3} | kw)


FIELDS = ("tokens_BS", "labels_BS", "valid_BS", "document_BS", "domain_B", "sample_ids_B")


def assert_same(one, other):
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name


def join(parts):
    whole = {n: [getattr(p, n) for p in parts] for n in FIELDS}
    return type(parts[0])(**{n: None if v[0] is None else torch.cat(v) for n, v in whole.items()})


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize(("dp", "micro"), [(1, 24), (1, 5), (2, 12), (2, 3), (4, 6), (4, 1), (8, 3)])
def test_any_partition_gives_the_same_global_batch(sources, dp, micro, document_mask):
    data = batches(sources, document_mask=document_mask)
    per_rank = GB // dp
    for step in (0, 1, 117):
        parts = [
            data.batch(step, range(at, min(at + micro, (rank + 1) * per_rank)))
            for rank in range(dp)
            for at in range(rank * per_rank, (rank + 1) * per_rank, micro)
        ]
        assert_same(join(parts), data.batch(step))


def test_resume_needs_only_the_step(sources):
    straight = batches(sources)
    for step in range(20):
        straight.batch(step)
    assert_same(batches(sources).batch(20), straight.batch(20))


def test_a_batch_holds_its_samples(sources):
    data = batches(sources)
    for step in (0, 5):
        batch = data.batch(step)
        assert sorted(batch.sample_ids_B.tolist()) == list(range(step * GB, (step + 1) * GB))
        for r, i in enumerate(batch.sample_ids_B.tolist()):
            tokens, _ = data.sample(i)
            assert batch.tokens_BS[r].tolist() == tokens[:-1].tolist()
            assert batch.labels_BS[r].tolist() == tokens[1:].tolist()
            source = data.sources[batch.domain_B[r]].tokens
            window = int(data.blend.locate(i)[1][0])
            assert tokens.tolist() == source.read(window * S, S + 1).tolist()


def test_shapes_and_types(sources):
    batch = batches(sources, document_mask=True).batch(0, range(5))
    assert [(t.dtype, tuple(t.shape)) for t in (getattr(batch, n) for n in FIELDS)] == [
        (torch.int64, (5, S)),
        (torch.int64, (5, S)),
        (torch.bool, (5, S)),
        (torch.int32, (5, S)),
        (torch.int64, (5,)),
        (torch.int64, (5,)),
    ]
    assert batches(sources).batch(0).document_BS is None


def test_seed_changes_the_order(sources):
    one, other = (batches(sources, seed=s).batch(0) for s in (0, 1))
    assert not torch.equal(one.tokens_BS, other.tokens_BS)


def test_each_window_once_per_epoch(sources):
    data = batches(sources)
    windows = [s.tokens.windows(S) for s in sources]
    seen = [[], []]
    for step in range(8):
        for i in data.batch(step).sample_ids_B.tolist():
            source, window, _ = data.blend.locate(i)
            seen[int(source[0])].append((i, int(window[0])))
    for s, n in enumerate(windows):
        first = [w for _, w in sorted(seen[s])[:n]]
        assert sorted(first) == list(range(n))
    drawn = [len(s) / n for s, n in zip(seen, windows, strict=True)]
    assert data.epochs(8) == {"a": drawn[0], "b": drawn[1]}


def test_domains_follow_the_weights_and_reach_every_row(sources):
    data = batches(sources)
    domain = torch.stack([data.batch(step).domain_B for step in range(200)]).double()
    assert abs(domain.mean().item() - 0.3) < 0.01
    assert (domain.sum(dim=1) - 0.3 * GB).abs().max() < 2
    by_row = domain.mean(dim=0)
    assert by_row.min() > 0.15 and by_row.max() < 0.45


def test_every_step_has_an_order_of_its_own(sources):
    data = batches(sources)
    orders = {tuple((data.batch(step).sample_ids_B - step * GB).tolist()) for step in range(20)}
    assert len(orders) == 20


def test_windows_cover_every_token_but_the_last_partial_one(tmp_path):
    tokens = stream(tmp_path / "x", [np.arange(100)])
    data = GlobalBatches([Source("x", 1.0, tokens)], seq_len=9, global_batch=11, seed=0)
    assert sorted(data.batch(0).labels_BS.flatten().tolist()) == list(range(1, 100))


@pytest.mark.parametrize("rows", [range(0, GB + 1), range(-1, 3)], ids=str)
def test_rows_outside_the_batch(sources, rows):
    with pytest.raises(IndexError, match="global batch of 24"):
        batches(sources).batch(0, rows)


def test_document_mask(tmp_path):
    tokens = stream(tmp_path / "x", [[1, 2, 256], [3, 256], [256], [4, 5, 6, 7, 256]])
    source = [Source("x", 1.0, tokens)]
    masked = GlobalBatches(source, seq_len=10, global_batch=1, seed=0, document_mask=True).batch(0)
    assert masked.tokens_BS.tolist() == [[1, 2, 256, 3, 256, 256, 4, 5, 6, 7]]
    assert masked.document_BS.tolist() == [[0, 0, 0, 1, 1, 2, 3, 3, 3, 3]]
    label_of_another_document = [False, False, True, False, True, True, False, False, False, False]
    assert (~masked.valid_BS).tolist() == [label_of_another_document]
    plain = GlobalBatches(source, seq_len=10, global_batch=1, seed=0).batch(0)
    assert plain.valid_BS.all()


def evaluation(sources, **kw):
    args = {"seq_len": S, "batch_size": 8, "max_batches": 2, "document_mask": False} | kw
    return EvalBatches(sources, ByteTokenizer(), **args)


def test_evaluation_windows_do_not_overlap_and_fill_the_batches(sources):
    ev = evaluation(sources, max_batches=4)
    assert ev.windows_per_domain == (16, 16) and ev.num_batches == 4
    for d, source in enumerate(sources):
        starts = sorted(w for dd, w in ev._rows if dd == d)
        assert len(set(starts)) == 16 and starts[-1] < source.tokens.windows(S)
        assert starts[-1] > 0.7 * source.tokens.windows(S)  # spread over the text, not its beginning


def test_evaluation_pads_the_last_batch(sources):
    windows = [s.tokens.windows(S) for s in sources]
    ev = evaluation(sources, max_batches=1000)
    assert ev.windows_per_domain == tuple(windows)
    assert ev.num_batches == -(-sum(windows) // 8) and sum(windows) % 8
    last = ev.batch(ev.num_batches - 1)
    padding = last.sample_ids_B == -1
    assert padding.sum() == -sum(windows) % 8
    assert torch.equal(last.valid_BS.any(dim=1), ~padding) and last.valid_BS[~padding].all()


@pytest.mark.parametrize("dp", [2, 4, 8])
def test_evaluation_is_the_same_for_any_partition(sources, dp):
    ev = evaluation(sources, max_batches=1000, document_mask=True)
    for i in range(ev.num_batches):
        parts = [ev.batch(i, range(r * 8 // dp, (r + 1) * 8 // dp)) for r in range(dp)]
        assert_same(join(parts), ev.batch(i))


def test_evaluation_gives_a_short_domains_rows_to_the_others(tmp_path, sources):
    short = Source("short", 1.0, stream(tmp_path / "s", [np.arange(2 * S + 1)]))
    assert evaluation([short, *sources]).windows_per_domain == (2, 7, 7)
    assert evaluation([None, sources[0]]).windows_per_domain == (0, 16)


@pytest.mark.parametrize("document_mask", [False, True])
def test_evaluation_counts_the_bytes_of_the_labels_that_count(sources, document_mask):
    ev = evaluation(sources, max_batches=1000, document_mask=document_mask)
    counted = [0, 0]
    for i in range(ev.num_batches):
        b = ev.batch(i)
        for d in (0, 1):
            counted[d] += int((b.valid_BS & (b.labels_BS != 256) & (b.domain_B == d)[:, None]).sum())
    assert ev.bytes_per_domain == tuple(counted)


def test_evaluation_bytes_with_another_tokenizer(tmp_path):
    class Words:
        eos_id = 0

        def count_bytes(self, ids):
            return sum(3 for i in ids if i != 0)

    tokens = stream(tmp_path / "x", [[5, 5, 5, 0], [5, 5, 5, 5, 5, 0]])
    args = {"seq_len": 9, "batch_size": 2, "max_batches": 1}
    plain = EvalBatches([Source("x", 1.0, tokens)], Words(), **args, document_mask=False)
    masked = EvalBatches([Source("x", 1.0, tokens)], Words(), **args, document_mask=True)
    assert (plain.bytes_per_domain, masked.bytes_per_domain) == ((21,), (18,))


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == "moefold-prefetch"]


def test_prefetcher_keeps_order_and_bound():
    produced = []
    with Prefetcher(lambda i: produced.append(i) or i * i, 3, 30, depth=2) as it:
        assert next(it) == 9
        deadline = time.monotonic() + 5
        while len(produced) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        assert len(produced) == 3  # one taken, two waiting
        assert list(it) == [i * i for i in range(4, 30)]
        with pytest.raises(StopIteration):
            next(it)
    assert not prefetch_threads()


def test_prefetcher_raises_in_the_consumer_after_what_came_before():
    def produce(i):
        if i == 3:
            raise DataError("row 3")
        return i

    with Prefetcher(produce, 0, 10, depth=8) as it:
        assert [next(it) for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(DataError, match="row 3"):
                next(it)
    assert not prefetch_threads()


@pytest.mark.parametrize("taken", [0, 1])
def test_prefetcher_closes_while_full(taken):
    it = Prefetcher(lambda i: i, 0, 10**9, depth=1)
    for _ in range(taken):
        next(it)
    it.close()
    it.close()
    assert not prefetch_threads()
    with pytest.raises(StopIteration):
        next(it)


def text_config(tmp_path, **kw):
    root = tmp_path / "in"
    root.mkdir(exist_ok=True)
    for i in range(80):
        (root / f"{i}.txt").write_text(f"text number {i}\n" * 20)
    source = SourceConfig(type="text", path=str(root), name="t")
    return DataConfig(**{"sources": (source,), "seq_len": S, "holdout": 0.2} | kw)


def open_text(tmp_path, config, **kw):
    return open_data(config, **{"vocab_size": 257, "global_batch": 8, "cache_dir": tmp_path / "cache"} | kw)


def test_open_data(tmp_path):
    data = open_text(tmp_path, text_config(tmp_path), eval_batches=2)
    assert data.domains == ("t",) and data.tokenizer.name == "bytes"
    assert data.train.batch(0).tokens_BS.shape == (8, S)
    assert data.evaluation.num_batches == 2


def test_held_out_text_is_not_trained_on(tmp_path):
    data = open_text(tmp_path, text_config(tmp_path))
    numbers = [
        {w.split("\n")[0] for w in data.tokenizer.decode(t.read(0, len(t))).split("number ")[1:]}
        for t in (data.train.sources[0].tokens, data.evaluation.sources[0].tokens)
    ]
    assert len(numbers[0]) + len(numbers[1]) == 80 and not numbers[0] & numbers[1]


@pytest.mark.parametrize("kw", [{"config": {"holdout": 0.0}}, {"eval_batches": 0}], ids=["no holdout", "no batches"])
def test_no_evaluation(tmp_path, kw):
    config = text_config(tmp_path, **kw.pop("config", {}))
    assert open_text(tmp_path, config, **kw).evaluation is None


def test_a_held_out_part_too_short_to_evaluate_is_told(tmp_path):
    said = []
    (tmp_path / "one.txt").write_text("x" * 1000)
    source = SourceConfig(type="text", path=str(tmp_path / "one.txt"), name="t")
    data = open_text(tmp_path, DataConfig(sources=(source,), seq_len=100, holdout=0.05), global_batch=2, progress=said.append)
    assert data.evaluation is None and "held-out part of 't' is shorter than one window of 100" in said[-1]


def run_ranks(n, work):
    """Runs `work(is_writer, share)` on n threads; share is a broadcast from rank 0. Returns results or exceptions."""
    barrier, box, results = threading.Barrier(n, timeout=20), {}, [None] * n

    def body(rank):
        def share(value):
            if rank == 0:
                box["value"] = value
            barrier.wait()
            return box["value"]

        try:
            results[rank] = work(rank == 0, share)
        except Exception as e:
            results[rank] = e

    threads = [threading.Thread(target=body, args=(r,)) for r in range(n)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(timeout=30)
    return results


def test_every_rank_opens_what_the_writer_prepared(tmp_path):
    config = text_config(tmp_path)
    results = run_ranks(3, lambda w, share: open_text(tmp_path, config, is_writer=w, share=share))
    for data in results[1:]:
        assert_same(data.train.batch(4), results[0].train.batch(4))


def test_the_writers_mistake_reaches_every_rank(tmp_path):
    config = text_config(tmp_path)
    (tmp_path / "in/bad.txt").write_bytes(b"\xff")
    results = run_ranks(3, lambda w, share: open_text(tmp_path, config, is_writer=w, share=share))
    assert all(isinstance(r, DataError) and "bad.txt" in str(r) for r in results)
    assert len({str(r) for r in results}) == 1


def test_a_crash_of_the_writer_reaches_every_rank(tmp_path, monkeypatch):
    config = text_config(tmp_path)

    def crash(self, text):
        raise ZeroDivisionError("tokenizer broke")

    monkeypatch.setattr(ByteTokenizer, "encode", crash)
    results = run_ranks(3, lambda w, share: open_text(tmp_path, config, is_writer=w, share=share))
    assert isinstance(results[0], ZeroDivisionError)
    assert all(isinstance(r, DataError) and "ZeroDivisionError: tokenizer broke" in str(r) for r in results[1:])


@pytest.mark.parametrize(
    ("kw", "message"),
    [({"vocab_size": 200}, "model.vocab_size = 200"), ({"global_batch": 10**6}, "train.global_batch = 1000000")],
)
def test_data_that_does_not_fit_the_run(tmp_path, kw, message):
    with pytest.raises(DataError, match=message):
        open_text(tmp_path, text_config(tmp_path), **kw)


def test_batch_moves_as_a_whole(sources):
    batch = batches(sources, document_mask=True).batch(0, range(2)).to("meta")
    assert all(getattr(batch, n).device.type == "meta" for n in FIELDS)
    assert batches(sources).batch(0).to("cpu").document_BS is None
