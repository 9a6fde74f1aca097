"""The rows of a step stay together, in memory and in checkpoints, wherever it stops and whatever is resumed from it."""

import os
import signal
import sys
import threading

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from torchmetrics.classification import MulticlassAccuracy

from faiss_knn import OnlineKNN, OnlineQueue
from faiss_knn.online.queue import RingBuffer
from tests.online.parts import Echo, clusters, loader, trainer

# Lightning looks for the checkpoint of an earlier exception, and says that there is none
pytestmark = pytest.mark.filterwarnings("ignore:.*fit\\(ckpt_path=")


def knn(name="knn", target="label", **options):
    defaults = {"queue_length": 64, "metrics": {"acc": MulticlassAccuracy(4, average="micro")}, "k": 1}
    return OnlineKNN(name, "embedding", target, **defaults | options)


def counted(name="knn", target="label", **options):
    """One whose labels are numbers: it has no metric, and scores nothing."""
    return knn(name, target, metrics=None, **options)


def numbered(count, first=0):
    """Rows whose labels are their numbers, and features that say the number too."""
    number = torch.arange(first, first + count)
    return {"x": number[:, None].float(), "label": number, "other": number + 1000}


def rows_of(run):
    """What each queue hands out now, with numbers in place of features."""
    queues = {queue.key: queue for queue in run.callbacks if isinstance(queue, OnlineQueue)}
    return {key: (queue.snapshot(run).flatten().long() % 1000).tolist() for key, queue in queues.items()}


def saved_rows(path):
    states = torch.load(path, weights_only=True)["callbacks"]
    return [
        (states[key]["rows"][0].flatten().long() % 1000).tolist() for key in states if key.startswith("OnlineQueue")
    ]


class Stop(L.Callback):
    """Raises at the end of a step, between the queues where it stands there."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == self.step:
            raise KeyError("a logger that failed")


@pytest.mark.parametrize("step", [1, 7])  # before and after the rings are full
@pytest.mark.parametrize("between", ["label", "other"])
def test_an_error_between_two_queues_leaves_neither_ahead(tmp_path, step, between):
    queues = {key: OnlineQueue(key, 64, gather_distributed=True) for key in ("embedding", "label", "other")}
    order = [*queues.values()]
    order.insert(list(queues).index(between), Stop(step))
    run = trainer(
        *order,
        counted(),
        counted("other", "other"),
        OnExceptionCheckpoint(tmp_path),
        enable_checkpointing=True,
        num_sanity_val_steps=0,
    )
    with pytest.raises(KeyError, match="a logger that failed"):
        run.fit(Echo(), loader(**numbered(160)), loader(**numbered(48)))
    kept = rows_of(run)
    overwritten = 16 if step == 7 else 0
    assert kept["embedding"] == kept["label"] == list(range(max(0, step * 16 - 64 + overwritten), step * 16))
    assert kept["other"] == kept["label"]
    assert all(rows == kept["label"] for rows in saved_rows(tmp_path / "on_exception.ckpt"))
    fresh = trainer(counted(), counted("other", "other"), num_sanity_val_steps=0, max_epochs=1)
    fresh.fit(Echo(), loader(**numbered(160)), loader(**numbered(48)), ckpt_path=tmp_path / "on_exception.ckpt")
    again = rows_of(fresh)
    assert again["embedding"] == again["label"] == again["other"]


class Interrupted(Echo):
    """Interrupts step 6 before the `line`-th line of this package that runs in it."""

    def __init__(self, line):
        super().__init__()
        self.line, self.seen = line, 0

    def training_step(self, batch, batch_idx):
        if batch_idx == 6:
            sys.settrace(self.trace)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        sys.settrace(None)

    def trace(self, frame, event, argument):
        if "faiss_knn/online" not in frame.f_code.co_filename:
            return None
        if event == "line":
            self.seen += 1
            if self.seen == self.line:
                sys.settrace(None)
                raise KeyError("interrupted")
        return self.trace


def test_at_whichever_line_a_step_stops_its_rows_are_all_kept_or_none(tmp_path):
    for line in range(1, 1000):
        run = trainer(
            counted(), OnExceptionCheckpoint(tmp_path / str(line)), enable_checkpointing=True, num_sanity_val_steps=0
        )
        module = Interrupted(line)
        try:
            run.fit(module, loader(**numbered(112)), loader(**numbered(48)))
        except KeyError:
            kept = rows_of(run)
            assert kept["embedding"] == kept["label"], line
            assert kept["label"] in (list(range(32, 96)), list(range(48, 96)), list(range(48, 112))), line
            saved = saved_rows(tmp_path / str(line) / "on_exception.ckpt")
            assert saved[0] == saved[1] == kept["label"], line
            run.validate(module, loader(**numbered(96, 48)), verbose=False)
        finally:
            sys.settrace(None)
        if module.seen < line:
            assert line > 50
            return
    pytest.fail("the step never ended")


def test_interrupts_from_outside_leave_the_rows_together(tmp_path):
    class Stopped(Echo):
        def training_step(self, batch, batch_idx):
            if self.global_step == 10:
                self.timer = threading.Timer(0.001 * turn, os.kill, (os.getpid(), signal.SIGINT))
                self.timer.start()
            return super().training_step(batch, batch_idx)

    for turn in range(5):
        run = trainer(
            counted(queue_length=64),
            OnExceptionCheckpoint(tmp_path / str(turn)),
            enable_checkpointing=True,
            max_epochs=-1,
            num_sanity_val_steps=0,
        )
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run.fit(Stopped(), loader(**numbered(960)))
        run.lightning_module.timer.join()
        kept = rows_of(run)
        assert kept["embedding"] == kept["label"] != []
        saved = saved_rows(tmp_path / str(turn) / "on_exception.ckpt")
        assert saved[0] == saved[1]


def test_a_queue_that_a_later_callback_makes_longer_goes_on_counting():
    run = trainer(counted(), num_sanity_val_steps=0)
    run.fit(Echo(), loader(**numbered(80)), loader(**numbered(48)))
    run.callbacks.append(counted("other", "other", queue_length=128))
    run.fit_loop.max_epochs, run.limit_train_batches = 2, 1
    run.fit(run.lightning_module, loader(**numbered(16, 80)), loader(**numbered(48)))
    kept = rows_of(run)
    assert kept["label"] == list(range(32, 96))
    assert kept["embedding"][-64:] == kept["label"]
    assert kept["other"] == list(range(80, 96))


@pytest.mark.parametrize("form", ["as it was", "of another number of ranks", "without numbers"])
def test_a_checkpoint_whose_keys_have_different_lengths_keeps_their_newest_rows(tmp_path, form):
    run = trainer(counted(), counted("other", "other", queue_length=128), num_sanity_val_steps=0)
    run.fit(Echo(), loader(**numbered(112)), loader(**numbered(48)))
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    for key, state in checkpoint["callbacks"].items():
        if not key.startswith("OnlineQueue"):
            continue
        if form == "of another number of ranks":
            rows, half = state["rows"][0], len(state["rows"][0]) // 2
            state["rows"], state["totals"] = [rows[:half], rows[half:]], [56, 56]
        elif form == "without numbers":
            del state["totals"]
    torch.save(checkpoint, tmp_path / "a.ckpt")
    fresh = trainer(counted(), counted("other", "other", queue_length=128))
    fresh.validate(Echo(), loader(**numbered(48)), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    kept = rows_of(fresh)
    if form == "of another number of ranks":
        assert kept["embedding"] == kept["other"]
        assert len(kept["label"]) == 64
    else:
        assert kept["embedding"] == kept["other"] == list(range(112))
        assert kept["label"] == list(range(48, 112))


def test_queues_behind_a_checkpoint_move_before_it(tmp_path):
    checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
    run = trainer(checkpoint, enable_checkpointing=True, num_sanity_val_steps=0)
    run.callbacks += [OnlineQueue("embedding", 64, gather_distributed=True), OnlineQueue("label", 64), counted()]
    run.fit(Echo(), loader(**numbered(64)), loader(**numbered(48)))
    assert saved_rows(tmp_path / "step=2.ckpt") == [list(range(32))] * 2
    assert saved_rows(tmp_path / "step=4.ckpt") == [list(range(64))] * 2


def test_a_checkpoint_in_the_midst_of_a_step_holds_the_rows_before_it(tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")

    between = [OnlineQueue("embedding", 64, gather_distributed=True), Save(), OnlineQueue("label", 64)]
    run = trainer(*between, counted(), num_sanity_val_steps=0)
    run.fit(Echo(), loader(**numbered(64)), loader(**numbered(48)))
    assert saved_rows(tmp_path / "2.ckpt") == [list(range(32))] * 2
    assert rows_of(run)["embedding"] == list(range(64))


class Shifted(Echo):
    def step(self, batch):
        return {"loss": -self.weight.sum(), "embedding": batch["x"] + 100 * self.weight}


class TestWhoseRows:
    def test_a_fit_that_fails_before_training_changes_nothing(self, logged):
        class Fails(Shifted):
            def configure_optimizers(self):
                raise RuntimeError("no")

        run = trainer(knn(), num_sanity_val_steps=0)
        run.fit(Shifted(), loader(**clusters(64)), loader(**clusters(48, seed=1)))
        other = Fails()
        with pytest.raises(RuntimeError, match="no"):
            run.fit(other, loader(**clusters(64)), loader(**clusters(48, seed=1)))
        run.validate(other, loader(**clusters(48, seed=1)), verbose=False)
        assert sum("made by another module" in message for message in logged) == 1

    @pytest.mark.parametrize("first", [True, False])
    def test_weights_that_are_swapped_as_validation_starts_are_warned_of_in_any_order(self, logged, first):
        class Averaged(L.Callback):
            def on_validation_start(self, trainer, module):
                self.raw = module.weight.data.clone()
                module.weight.data.mul_(0.5)

            def on_validation_end(self, trainer, module):
                module.weight.data.copy_(self.raw)

        callbacks = [Averaged(), knn()] if first else [knn(), Averaged()]
        run = trainer(*callbacks, max_epochs=3, num_sanity_val_steps=0)
        run.fit(Shifted(), loader(**clusters(64)), loader(**clusters(48, seed=1)))
        assert sum("averaged weights" in message for message in logged) == 1

    def test_a_checkpoint_of_averaged_weights_with_rows_of_raw_ones_is_warned_of(self, tmp_path, logged):
        checkpoint = ModelCheckpoint(tmp_path, filename="a")
        run = trainer(EMAWeightAveraging(decay=0.5), knn(), checkpoint, enable_checkpointing=True, max_epochs=2)
        run.fit(Shifted(), loader(**clusters(64)), loader(**clusters(48, seed=1)))
        logged.clear()
        path = checkpoint.best_model_path
        with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
            trainer(knn()).validate(Shifted(), loader(**clusters(48, seed=1)), ckpt_path=path, verbose=False)
        assert sum("other weights" in message for message in logged) == 1
        logged.clear()
        resumed = trainer(EMAWeightAveraging(decay=0.5), knn(), max_epochs=3)
        with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
            resumed.fit(Shifted(), loader(**clusters(64)), loader(**clusters(48, seed=1)), ckpt_path=path)
        assert not any("dropped" in message for message in logged)

    def test_another_class_with_the_same_weights_is_another_module(self, logged):
        run = trainer(knn(), num_sanity_val_steps=0)
        run.fit(Echo(), loader(**clusters(64)), loader(**clusters(48, seed=1)))
        other = Shifted()
        other.load_state_dict(run.lightning_module.state_dict())
        run.validate(other, loader(**clusters(48, seed=1)), verbose=False)
        assert sum("made by another module" in message for message in logged) == 1


def test_ordinary_runs_are_not_suspected(logged):
    class Ordinary(Echo):
        def __init__(self, manual):
            super().__init__()
            self.norm, self.lazy = torch.nn.BatchNorm1d(8), torch.nn.LazyLinear(8)
            self.automatic_optimization = not manual

        def step(self, batch):
            features = self.lazy(self.norm(batch["x"]))
            return {"loss": features.square().mean(), "embedding": features}

        def training_step(self, batch, batch_idx):
            outputs = self.step(batch)
            if not self.automatic_optimization:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(outputs["loss"])
                optimizer.step()
            return outputs

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=0.01)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    for manual, options in ((True, {}), (False, {"accumulate_grad_batches": 3}), (False, {"val_check_interval": 2})):
        module = Ordinary(manual)
        module.lazy(torch.zeros(1, 8))
        run = trainer(knn(), max_epochs=2, **options)
        run.fit(module, loader(**clusters(64)), loader(**clusters(48, seed=1)))
        run.validate(module, loader(**clusters(48, seed=1)), verbose=False)
        run.test(module, loader(**clusters(48, seed=1)), verbose=False)
        run.fit_loop.max_epochs = 3
        run.fit(module, loader(**clusters(64)), loader(**clusters(48, seed=1)))
    assert not logged


def test_a_failed_validation_frees_the_bank_and_the_snapshots():
    class Fails(Echo):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            raise RuntimeError("no")

    callback = knn()
    run = trainer(callback, num_sanity_val_steps=0)
    with pytest.raises(RuntimeError, match="no"):
        run.fit(Fails(), loader(**clusters(64)), loader(**clusters(48, seed=1)))
    queues = [queue for queue in run.callbacks if isinstance(queue, OnlineQueue)]
    assert [queue.data for queue in queues] == [None, None]
    assert not any(value is run for queue in queues for value in vars(queue).values())


class TestDtypes:
    @pytest.mark.parametrize(
        ("first", "then", "value"),
        [
            (torch.float32, torch.int64, 2**24 + 1),
            (torch.int64, torch.float32, 2**24 + 1),
            (torch.float16, torch.int16, 2049),
            (torch.bfloat16, torch.int16, 257),
            (torch.uint8, torch.uint16, 65535),
            (torch.uint16, torch.int64, 2**40),
            (torch.bool, torch.uint8, 255),
        ],
    )
    def test_no_whole_number_changes_where_dtypes_meet(self, first, then, value):
        ring = RingBuffer(2)
        one = value if first == torch.int64 else 1
        ring.append(torch.tensor([one]).to(first))
        ring.append(torch.tensor([value if then != torch.float32 else 0.5]).to(then))
        assert ring.latest().tolist() == [one, value if then != torch.float32 else 0.5]

    def test_not_a_number_never_becomes_one(self):
        ring = RingBuffer(2)
        ring.append(torch.tensor([7]))
        ring.append(torch.tensor([float("nan")]))
        assert ring.latest()[0] == 7
        assert ring.latest()[1].isnan()

    @pytest.mark.parametrize("dim", [2.5, float("nan"), True, "8", 0, (4, 0), (2, 2.5), [None]])
    def test_a_bad_dim_is_named(self, dim):
        for make in (lambda: RingBuffer(4, dim), lambda: OnlineQueue("x", 4, dim)):
            with pytest.raises(ValueError, match="`dim` must be"):
                make()

    @pytest.mark.parametrize("length", [2.5, float("nan"), True, "8", 0, None])
    def test_a_bad_length_is_named(self, length):
        with pytest.raises(ValueError, match="`length` must be"):
            RingBuffer(length)
        with pytest.raises(ValueError, match="queue_length must be"):
            OnlineQueue("x", length)

    @pytest.mark.parametrize("dtype", ["float32", 4, float])
    def test_a_bad_dtype_is_named(self, dtype):
        for make in (lambda: RingBuffer(4, dtype=dtype), lambda: OnlineQueue("x", 4, dtype=dtype)):
            with pytest.raises(ValueError, match="`dtype` must be a torch dtype"):
                make()

    @pytest.mark.parametrize("rows", [[1, 2], None, torch.tensor(3.0), torch.eye(2).to_sparse()])
    def test_bad_rows_are_named(self, rows):
        with pytest.raises(ValueError, match="`rows` must"):
            RingBuffer(4).append(rows)


def test_rows_of_a_checkpoint_of_stable_pretraining_are_taken_over(tmp_path):
    """Its queue of 64 after 80 rows: a ring whose rows 64..79 stand in the first 16 places."""
    numbers = torch.cat([torch.arange(64, 80), torch.arange(16, 64)])
    run = trainer(counted(), num_sanity_val_steps=0)
    run.fit(Echo(), loader(**numbered(16)), loader(**numbered(48)))
    run.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    checkpoint["callbacks"] = {}
    for key, rows in (("embedding", numbers[:, None].float()), ("label", numbers.float())):
        buffers = {"out": rows, "order_indices": numbers, "pointer": torch.tensor(16), "filled": torch.tensor(True)}
        buffers |= {"global_counter": torch.tensor(80), "initialized": torch.tensor(True)}
        checkpoint["state_dict"] |= {f"callbacks_modules.ordered_queue_{key}.{n}": b for n, b in buffers.items()}
    torch.save(checkpoint, tmp_path / "a.ckpt")
    module = Echo()
    module.strict_loading = False
    fresh = trainer(counted(), max_epochs=2, num_sanity_val_steps=0)
    fresh.fit(module, loader(**numbered(16, 80)), loader(**numbered(48)), ckpt_path=tmp_path / "a.ckpt")
    assert rows_of(fresh) == {"embedding": list(range(32, 96)), "label": list(range(32, 96))}
