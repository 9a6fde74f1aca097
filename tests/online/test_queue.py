import warnings

import lightning as L
import pytest
import torch

from faiss_knn import OnlineQueue, find_or_create_queue
from faiss_knn.online.queue import RingBuffer
from tests.online.parts import Echo, clusters, loader, trainer


@pytest.mark.parametrize("length", [1, 4, 7, 64])
@pytest.mark.parametrize("sizes", [[1] * 9, [3, 4, 2, 5], [7, 7], [20, 1], [0, 2, 0], [64, 64, 3]])
def test_ring_holds_the_last_rows_in_order(length, sizes):
    ring = RingBuffer(length)
    rows = torch.arange(sum(sizes) * 2).view(-1, 2)
    done = 0
    for size in sizes:
        ring.append(rows[done : done + size])
        done += size
        assert torch.equal(ring.latest(), rows[max(0, done - length) : done])
        assert len(ring) == min(done, length)
        for n in (1, 3):
            assert torch.equal(ring.latest(n), rows[:done][-min(n, length) :])


def test_ring_keeps_the_dtype_it_is_given_rows_in():
    for dtype in (torch.int64, torch.float64, torch.float16, torch.bfloat16, torch.bool):
        ring = RingBuffer(4)
        ring.append(torch.ones(3, 2, dtype=dtype))
        assert ring.latest().dtype == dtype
    large = RingBuffer(2)
    large.append(torch.tensor([16777217, 16777219]))
    assert large.latest().tolist() == [16777217, 16777219]


def test_ring_casts_to_the_dtype_asked_for_and_detaches():
    ring = RingBuffer(4, dim=2, dtype=torch.float32)
    ring.append(torch.ones(3, 2, dtype=torch.float64, requires_grad=True))
    assert ring.latest().dtype == torch.float32
    assert not ring.latest().requires_grad


def test_ring_takes_rows_of_any_shape_and_then_only_those():
    ring = RingBuffer(5)
    assert ring.latest().shape == (0,)
    ring.append(torch.rand(2, 3, 4))
    assert ring.latest().shape == (2, 3, 4)
    with pytest.raises(ValueError, match=r"shape \(n, 3, 4\), got \(2, 4\)"):
        ring.append(torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"shape \(n, 8\), got \(2, 4\)"):
        RingBuffer(5, dim=8).append(torch.rand(2, 4))


def test_ring_copies_on_the_way_in_and_out():
    ring = RingBuffer(3)
    rows = torch.zeros(2, 1)
    ring.append(rows)
    rows += 1
    out = ring.latest()
    out += 5
    assert ring.latest().sum() == 0


def test_ring_grows_and_shrinks_without_losing_what_fits():
    ring = RingBuffer(4)
    ring.append(torch.arange(6))
    ring.resize(6)
    assert ring.latest().tolist() == [2, 3, 4, 5]
    ring.append(torch.arange(6, 9))
    assert ring.latest().tolist() == [3, 4, 5, 6, 7, 8]
    ring.resize(2)
    assert ring.latest().tolist() == [7, 8]


def test_ring_allocated_in_inference_mode_can_be_written_to_in_training():
    ring = RingBuffer(4)
    with torch.inference_mode():
        ring.append(torch.ones(1, 2))
    ring.append(torch.zeros(1, 2))
    assert ring.latest().tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("length", [0, -1])
def test_a_length_that_holds_nothing_is_refused(length):
    with pytest.raises(ValueError, match="`length` must be positive"):
        RingBuffer(length)
    with pytest.raises(ValueError, match="queue_length must be positive"):
        OnlineQueue("x", length)


class Look(L.Callback):
    """Keeps what a function of the trainer gives during validation."""

    def __init__(self, look):
        self.look, self.seen = look, []

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 0 and not trainer.sanity_checking:
            self.seen.append(self.look(trainer))


def test_snapshot_is_there_during_validation_alone(logged):
    train = clusters(40)
    queue = OnlineQueue("embedding", 24)
    look = Look(lambda t: queue.data)
    run = trainer(look, queue)
    run.fit(Echo(), loader(**train), loader(**clusters(16)))
    assert torch.equal(look.seen[0], train["x"][-24:])
    assert queue.data is None
    assert logged[-1] == "! no queue snapshot available, called outside validation?"
    run.validate(queue_module := Echo(), loader(**clusters(16)), verbose=False)
    assert queue_module is not None
    assert torch.equal(look.seen[1], train["x"][-24:])


def test_queues_of_one_key_share_rows_and_each_reads_its_own_last():
    train = clusters(40)
    short, long = OnlineQueue("embedding", 10), OnlineQueue("embedding", 30)
    look = Look(lambda t: (short.data, long.data))
    trainer(short, long, look).fit(Echo(), loader(**train), loader(**clusters(16)))
    assert torch.equal(look.seen[0][0], train["x"][-10:])
    assert torch.equal(look.seen[0][1], train["x"][-30:])


def test_a_longer_queue_found_later_grows_the_storage_without_loss():
    train = clusters(40)
    short = OnlineQueue("embedding", 10)
    run = trainer(short)
    run.fit(Echo(), loader(**train))
    long = find_or_create_queue(run, "embedding", 30)
    run.fit_loop.max_epochs = 2
    more = clusters(16, seed=5)
    run.fit(Echo(), loader(**more))
    assert torch.equal(long.snapshot(run), torch.cat([train["x"][-10:], more["x"]]))
    assert torch.equal(short.snapshot(run), more["x"][-10:])


def test_two_trainers_never_share_rows():
    queue = OnlineQueue("embedding", 30)
    first, second = trainer(queue), trainer(queue)
    one, other = clusters(16, seed=1), clusters(16, seed=2)
    first.fit(Echo(), loader(**one))
    assert len(queue.snapshot(second)) == 0
    second.fit(Echo(), loader(**other))
    assert torch.equal(queue.snapshot(first), one["x"])
    assert torch.equal(queue.snapshot(second), other["x"])


def test_int_dim_flattens_or_adds_a_column():
    class Images(Echo):
        def step(self, batch):
            return {"loss": self.weight.sum(), "embedding": batch["x"].view(-1, 2, 4)}

    train = clusters(16)
    flat, column = OnlineQueue("embedding", 16, dim=8), OnlineQueue("label", 16, dim=1)
    run = trainer(flat, column)
    run.fit(Images(), loader(**train))
    assert torch.equal(flat.snapshot(run), train["x"])
    assert torch.equal(column.snapshot(run), train["label"][:, None])


def test_missing_key_is_named_with_what_there_is(logged):
    message = (
        "OnlineQueue: Key 'nope' not found in batch or outputs. "
        "Available batch keys: ['x', 'label'], Available output keys: ['loss', 'embedding']"
    )
    with pytest.raises(ValueError, match="Key 'nope'") as caught:
        trainer(OnlineQueue("nope", 8)).fit(Echo(), loader(**clusters(16)))
    assert str(caught.value) == message
    assert message in logged


def test_a_skipped_training_step_appends_nothing():
    class Skips(Echo):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 0 else self.step(batch)

    train = clusters(32)
    queues = OnlineQueue("x", 99), OnlineQueue("embedding", 99)
    run = trainer(*queues)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*returned `None`.*")
        run.fit(Skips(), loader(**train))
    for queue in queues:
        assert torch.equal(queue.snapshot(run), train["x"][16:])


def test_fill_is_logged_when_verbose():
    run = trainer(OnlineQueue("embedding", 64, verbose=True))
    run.fit(Echo(), loader(**clusters(32)))
    assert run.callback_metrics["queue/embedding_fill_pct"] == 50


def test_checkpoint_holds_the_rows_once_and_restores_them_at_any_length(tmp_path):
    train = clusters(40)
    run = trainer(OnlineQueue("embedding", 30), OnlineQueue("embedding", 10))
    run.fit(Echo(), loader(**train))
    path = tmp_path / "run.ckpt"
    run.save_checkpoint(path)
    states = torch.load(path, weights_only=True)["callbacks"]
    assert list(states) == ["OnlineQueue[key=embedding]"]
    for length in (10, 30, 50):
        queue = OnlineQueue("embedding", length)
        again = trainer(queue)
        again.validate(Echo(), loader(**clusters(16)), ckpt_path=path, verbose=False)
        assert torch.equal(queue.snapshot(again), train["x"][-min(30, length) :])


def test_checkpoint_leaves_out_what_is_not_persistent(tmp_path):
    run = trainer(OnlineQueue("embedding", 30, persistent=False))
    run.fit(Echo(), loader(**clusters(40)))
    run.save_checkpoint(tmp_path / "run.ckpt")
    assert torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"] == {}


def test_checkpoint_without_callbacks_loads(tmp_path):
    plain = trainer()
    plain.fit(Echo(), loader(**clusters(16)))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    queue = OnlineQueue("embedding", 8)
    run = trainer(queue)
    run.validate(Echo(), loader(**clusters(16)), ckpt_path=tmp_path / "plain.ckpt", verbose=False)
    assert len(queue.snapshot(run)) == 0


class TestFindOrCreate:
    def test_creates_once_and_finds_again(self):
        run = trainer()
        queue = find_or_create_queue(run, "embedding", 16, dim=8, dtype=torch.float32)
        assert run.callbacks[-1] is queue
        assert find_or_create_queue(run, "embedding", 16) is queue

    def test_another_length_or_gather_mode_makes_another_that_takes_over_dim_and_dtype(self):
        run = trainer(OnlineQueue("embedding", 16, dim=8, dtype=torch.float16))
        longer = find_or_create_queue(run, "embedding", 32)
        gathered = find_or_create_queue(run, "embedding", 16, gather_distributed=True)
        assert (longer.dim, longer.dtype) == (gathered.dim, gathered.dtype) == (8, torch.float16)
        assert len({id(c) for c in run.callbacks if isinstance(c, OnlineQueue)}) == 3

    def test_conflicts_are_errors(self):
        run = trainer(OnlineQueue("embedding", 16, dim=8, dtype=torch.float16))
        with pytest.raises(ValueError, match=r"'embedding' has dim=\(8,\), dim=\(16,\) was asked for"):
            find_or_create_queue(run, "embedding", 16, dim=16)
        with pytest.raises(ValueError, match=r"dtype=torch.float16, dtype=torch.float32 was asked for"):
            find_or_create_queue(run, "embedding", 16, dtype=torch.float32)

    def test_nothing_is_created_where_none_may_be(self, logged):
        run = trainer(OnlineQueue("label", 16))
        with pytest.raises(
            ValueError, match=r"No OnlineQueue found for key 'embedding'. Available queues: \['label'\]"
        ):
            find_or_create_queue(run, "embedding", 16, create_if_missing=False)
        assert find_or_create_queue(run, "label", 32, create_if_missing=False).queue_length == 16
        assert "holds 16 rows, not the 32 asked for" in logged[-1]
