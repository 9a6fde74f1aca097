"""Runs as people make them, with Lightning's own defaults: none dies, and none logs another number than it says."""

import sys

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import CombinedLoader
from torch.nn.functional import one_hot
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryAccuracy,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MultilabelAccuracy,
)
from torchmetrics.retrieval import RetrievalMAP
from torchmetrics.wrappers import BootStrapper, MultioutputWrapper

from faiss_knn import OnlineKNN
from faiss_knn.online.queue import RingBuffer, find_or_create_queue, find_or_create_queue_callback
from faiss_knn.online.ring import align
from tests.online.parts import Echo, clusters, loader, trainer

QUIET = {"num_sanity_val_steps": 2}  # Lightning's default


def knn(name="knn", **options):
    defaults = {"queue_length": 64, "metrics": {"acc": MulticlassAccuracy(4, average="micro")}}
    return OnlineKNN(name, "embedding", "label", **defaults | options)


def fitted(callback, train=None, val=None, module=None, **options):
    run = trainer(callback, **QUIET | options)
    train, val = train or clusters(64), val or clusters(48, seed=1)
    run.fit(module or Echo(), loader(**train), loader(**val))
    return run


class Shifted(Echo):
    """Features that depend on its weights, which training moves."""

    def __init__(self, start=0.0):
        super().__init__()
        self.weight.data.fill_(start)

    def step(self, batch):
        return {"loss": -self.weight.sum(), "embedding": batch["x"] + 100 * self.weight}


class TestIds:
    def rows(self, count, **options):
        return clusters(count, **options) | {"id": torch.arange(count)}

    def test_the_sanity_check_and_a_validation_before_fit_find_an_empty_queue(self):
        run = fitted(knn(id="id"), self.rows(64), self.rows(48, seed=1))
        assert run.callback_metrics["eval/knn_acc"] == 1.0
        fresh = trainer(knn(id="id"))
        fresh.validate(Echo(), loader(**self.rows(48, seed=1)), verbose=False)
        fresh.test(Echo(), loader(**self.rows(48, seed=1)), verbose=False)
        assert fresh.callback_metrics == {}

    def test_the_older_row_of_a_sample_counts_where_its_newest_is_unusable(self):
        rows = self.rows(32)
        again = {key: torch.cat([values, values]) for key, values in rows.items()}
        again["x"][32:] = float("nan")
        run = fitted(knn(id="id", k=1), again, rows, num_sanity_val_steps=0)
        assert run.callback_metrics["eval/knn_acc"] == 1.0  # each sample finds itself


class TestLabels:
    @pytest.mark.parametrize("dtype", [torch.long, torch.float32])
    def test_one_hot_labels_are_class_ids_to_multiclass_metrics(self, dtype):
        train, val = clusters(64, spread=3.0), clusters(48, spread=3.0, seed=1)
        expected = fitted(knn(), train, val).callback_metrics["eval/knn_acc"]
        hot = [rows | {"label": one_hot(rows["label"], 4).to(dtype)} for rows in (train, val)]
        assert fitted(knn(), *hot).callback_metrics["eval/knn_acc"] == expected

    def test_soft_labels_vote_by_their_shares_and_are_judged_by_their_largest(self):
        train, val = clusters(64), clusters(48, seed=1)
        soft = [rows | {"label": 0.7 * one_hot(rows["label"], 4) + 0.075} for rows in (train, val)]
        soft[0]["label"] = soft[0]["label"] / soft[0]["label"].sum(1, keepdim=True)
        soft[1]["label"] = soft[1]["label"] / soft[1]["label"].sum(1, keepdim=True)
        run = fitted(knn(target_dim=4), *soft)
        assert run.callback_metrics["eval/knn_acc"] == 1.0

    def test_an_ignored_label_is_left_out(self):
        train, val = clusters(64), clusters(48, seed=1)
        val["label"][:10] = 255
        run = fitted(knn(ignore_index=255), train, val, num_sanity_val_steps=0)
        assert run.callback_metrics["eval/knn_acc"] == 1.0
        assert run.callback_metrics["eval/knn_skipped"] == 10

    @pytest.mark.parametrize("metric", [lambda: Hits(), lambda: BootStrapper(TensorHits(), num_bootstraps=2)])
    def test_a_class_that_the_queue_does_not_hold_counts_as_wrong(self, metric):
        train, val = clusters(64), clusters(40, seed=1)
        val["label"][:10] = 7
        scores = fitted(knn(metrics={"hits": metric()}), train, val, max_epochs=2).callback_metrics
        share = scores.get("eval/knn_hits", scores.get("eval/knn_hits_mean"))
        assert share == pytest.approx(0.75, abs=0.3 if "eval/knn_hits_mean" in scores else 1e-6)

    def test_the_width_of_a_wrapped_metric_is_seen(self):
        train, val = clusters(64, classes=2), clusters(40, seed=1, classes=2)
        run = fitted(
            knn(metrics={"m": BootStrapper(MulticlassAccuracy(9, average="micro"), num_bootstraps=2)}), train, val
        )
        assert run.callback_metrics["eval/knn_m_mean"] == 1.0


class Hits(Metric):
    """A metric that does not say how many classes it knows, and gives a plain float."""

    def __init__(self):
        super().__init__()
        self.add_state("hits", torch.zeros(()), "sum")
        self.add_state("rows", torch.zeros(()), "sum")

    def update(self, shares, labels):
        self.hits += (shares.argmax(1) == labels).sum()
        self.rows += len(labels)

    def compute(self):
        return float(self.hits / self.rows)


class TensorHits(Hits):
    def compute(self):
        return self.hits / self.rows


class TestMetrics:
    def test_binary_metrics_judge_the_share_of_class_1(self):
        train, val = clusters(64, classes=2, spread=9.0), clusters(48, classes=2, spread=9.0, seed=1)
        metrics = {"binary": BinaryAccuracy(), "multi": MulticlassAccuracy(2, average="micro")}
        scores = fitted(knn(metrics=metrics), train, val).callback_metrics
        assert scores["eval/knn_binary"] == scores["eval/knn_multi"] < 1

    def test_multilabel_metrics_judge_class_ids_as_sets_of_one(self):
        assert fitted(knn(metrics={"m": MultilabelAccuracy(4)})).callback_metrics["eval/knn_m"] == 1.0

    def test_what_is_no_number_is_handed_out(self):
        callback = knn(metrics={"confusion": MulticlassConfusionMatrix(4)})
        val = clusters(48, seed=1)
        run = fitted(callback, val=val)
        assert run.callback_metrics == {}
        assert torch.equal(callback.results["eval/knn_confusion"], torch.diag(val["label"].bincount(minlength=4)))

    def test_a_metric_that_cannot_work_is_refused_at_once(self):
        with pytest.raises(ValueError, match="metric m cannot judge scores of 2 classes: TypeError"):
            knn(metrics={"m": RetrievalMAP()})
        with pytest.raises(ValueError, match="metric acc cannot judge scores of 20 classes: ValueError"):
            knn(num_classes=20)
        with pytest.raises(ValueError, match="metric m cannot judge scores of 4 classes: IndexError"):
            knn(metrics={"m": MultioutputWrapper(MulticlassAccuracy(4), 1)})
        assert knn(num_classes=10, metrics={"m": BinaryAccuracy()}).num_classes == 10  # class 1 among others

    def test_metrics_may_be_left_out(self):
        run = trainer(OnlineKNN("knn", "embedding", "label", 64), **QUIET)
        run.fit(Echo(), loader(**clusters(64)), loader(**clusters(48, seed=1)))
        assert run.callback_metrics == {}


class TestLoaders:
    def test_batches_that_are_handed_out_again_hold_our_predictions_of_before(self):
        class Cached:
            def __init__(self, batches):
                self.batches = batches

            def __iter__(self):
                return iter(self.batches)

            def __len__(self):
                return len(self.batches)

        class AsTheyAre(Echo):
            def transfer_batch_to_device(self, batch, device, dataloader_idx):
                return batch

        val = Cached(list(loader(**clusters(48, seed=1))))
        for run in (trainer(knn(), max_epochs=3, **QUIET), trainer(knn(), max_epochs=3, **QUIET)):
            run.fit(AsTheyAre(), loader(**clusters(64)), val)
            assert run.callback_metrics["eval/knn_acc"] == 1.0
            run.validate(AsTheyAre(), val, verbose=False)
            assert run.callback_metrics["eval/knn_acc"] == 1.0
        val.batches[0]["knn_preds"] = val.batches[0]["knn_preds"].clone()  # the user's own now
        with pytest.raises(ValueError, match="'knn_preds' already exists in batch"):
            run.validate(AsTheyAre(), val, verbose=False)

    @pytest.mark.parametrize("mode", ["min_size", "max_size_cycle"])
    def test_loaders_that_are_read_at_once_are_one(self, mode):
        class Joined(Echo):
            def validation_step(self, batch, batch_idx, dataloader_idx=0):
                joined = {key: torch.cat([part[key] for part in batch.values()]) for key in ("x", "label")}
                return {"embedding": joined["x"], "label": joined["label"]}

        both = CombinedLoader({"a": loader(**clusters(48, seed=1)), "b": loader(**clusters(48, seed=2))}, mode)
        run = trainer(knn(), **QUIET)
        run.fit(Joined(), loader(**clusters(64)), both)
        assert list(run.callback_metrics) == ["eval/knn_acc"]
        with pytest.raises(ValueError, match="needs dataloaders that run one after the other"):
            trainer(knn(bank_dataloader_idx=0)).fit(Joined(), loader(**clusters(64)), both)

    def test_a_bank_cut_by_lightning_is_said(self, logged):
        loaders = [loader(**clusters(64)), loader(**clusters(48, seed=1))]
        run = trainer(knn(bank_dataloader_idx=0), limit_val_batches=0.5)
        run.fit(Echo(), loader(**clusters(64)), loaders)
        assert any("the bank holds 2 of the 4 batches of dataloader 0" in message for message in logged)
        logged.clear()
        trainer(knn(bank_dataloader_idx=0)).fit(Echo(), loader(**clusters(64)), loaders)
        assert not logged


class TestMonitors:
    def test_a_checkpoint_finds_a_score_at_every_epoch(self, tmp_path):
        checkpoint = ModelCheckpoint(tmp_path, monitor="eval/knn_acc", mode="max", save_top_k=-1)
        run = trainer(knn(every_n_epochs=3), checkpoint, max_epochs=4, enable_checkpointing=True, **QUIET)
        run.fit(Echo(), loader(**clusters(64)), loader(**clusters(48, seed=1)))
        assert len(checkpoint.best_k_models) == 4
        stopping = EarlyStopping("eval/knn_acc", mode="max", patience=9)
        trainer(knn(every_n_epochs=3), stopping, max_epochs=4, **QUIET).fit(
            Echo(), loader(**clusters(64)), loader(**clusters(48, seed=1))
        )


class TestWhoseRows:
    def test_another_module_is_warned_of_and_can_be_refused(self, logged):
        run = fitted(knn(), module=Shifted())
        assert not logged
        run.validate(run.lightning_module, loader(**clusters(48, seed=1)), verbose=False)
        assert not logged
        for check in (run.validate, run.test):
            logged.clear()
            check(Shifted(start=5.0), loader(**clusters(48, seed=1)), verbose=False)
            assert sum("made by another module, or by other weights" in message for message in logged) == 1
        strict = fitted(knn(strict=True), module=Shifted())
        with pytest.raises(ValueError, match="made by another module"):
            strict.validate(Shifted(start=5.0), loader(**clusters(48, seed=1)), verbose=False)

    def test_a_checkpoint_brings_its_own_rows(self, tmp_path, logged):
        run = fitted(knn(), module=Shifted())
        run.save_checkpoint(tmp_path / "a.ckpt")
        run.fit_loop.max_epochs = 3
        run.fit(run.lightning_module, loader(**clusters(64)), loader(**clusters(48, seed=1)))
        logged.clear()
        run.validate(Shifted(), loader(**clusters(48, seed=1)), ckpt_path=tmp_path / "a.ckpt", verbose=False)
        assert not logged

    def test_a_fit_of_another_module_begins_with_an_empty_queue(self, logged):
        run = fitted(knn(queue_length=640), module=Shifted())
        run.fit_loop.max_epochs = 2
        run.fit(Shifted(start=5.0), loader(**clusters(64)), loader(**clusters(48, seed=1)))
        assert any("are dropped" in message for message in logged)
        assert {len(storage.ring) for storage in vars(run)["_faiss_knn"]["queues"].values()} == {64}

    def test_averaged_weights_in_validation_are_warned_of(self, logged):
        class Averaged(L.Callback):
            def on_validation_epoch_start(self, trainer, module):
                self.raw = module.weight.data.clone()
                module.weight.data.mul_(0.5)

            def on_validation_epoch_end(self, trainer, module):
                module.weight.data.copy_(self.raw)

        run = trainer(Averaged(), knn(), max_epochs=3, num_sanity_val_steps=0)
        run.fit(Shifted(), loader(**clusters(64)), loader(**clusters(48, seed=1)))
        assert sum("averaged weights" in message for message in logged) == 1


class TestTogether:
    def keys(self, run):
        return {key: storage.ring for key, storage in vars(run)["_faiss_knn"]["queues"].items()}

    @pytest.mark.parametrize("wrap", [False, True])
    def test_wherever_a_step_is_interrupted_the_rows_stay_together(self, wrap):
        """A KeyboardInterrupt at each line of two appends, in turn; then all rows are read again."""
        lines = 0
        while True:
            features, labels = RingBuffer(6, 1), RingBuffer(6)
            for start in range(0, 8 if wrap else 2, 2):
                numbers = torch.arange(start, start + 2)
                features.append(numbers[:, None].float()), labels.append(numbers)
            lines += 1
            done = interrupted(lines, features, labels)
            align([features, labels])
            rows = min(len(features), len(labels))
            assert features.latest(rows)[:, 0].tolist() == labels.latest(rows).tolist()
            assert rows >= (3 if wrap else 2)
            further = torch.arange(100, 104)
            features.append(further[:, None].float()), labels.append(further)
            assert features.latest(4)[:, 0].tolist() == labels.latest(4).tolist() == further.tolist()
            rows = min(len(features), len(labels))
            assert features.latest(rows)[:, 0].tolist() == labels.latest(rows).tolist()
            if done:
                assert lines > 20
                return

    def test_a_checkpoint_of_an_interrupted_step_holds_the_rows_before_that_step(self, tmp_path):
        run = fitted(knn(k=1), num_sanity_val_steps=0)
        self.keys(run)["embedding"].append(torch.full((16, 8), 50.0))  # and no labels
        run.save_checkpoint(tmp_path / "a.ckpt")
        saved = torch.load(tmp_path / "a.ckpt", weights_only=True)["callbacks"]
        assert torch.equal(saved["OnlineQueue[key=embedding]"]["rows"][0], clusters(64)["x"][16:])
        assert torch.equal(saved["OnlineQueue[key=label]"]["rows"][0], clusters(64)["label"])
        fresh = trainer(knn(k=1))
        fresh.validate(Echo(), loader(**clusters(48, seed=1)), ckpt_path=tmp_path / "a.ckpt", verbose=False)
        assert fresh.callback_metrics["eval/knn_acc"] == 1.0

    def test_a_callback_that_comes_later_uses_the_rows_that_its_keys_share(self, logged):
        rows = clusters(64) | {"parity": clusters(64)["label"] % 2}
        val = clusters(48, seed=1)
        val["parity"] = val["label"] % 2
        run = trainer(knn(), num_sanity_val_steps=0)
        run.fit(Echo(), loader(**rows), loader(**val))
        run.callbacks.append(
            OnlineKNN("parity", "embedding", "parity", 64, {"acc": MulticlassAccuracy(2, average="micro")}, k=1)
        )
        run.fit_loop.max_epochs = 2
        run.limit_train_batches = 2
        run.fit(run.lightning_module, loader(**rows), loader(**val))
        assert run.callback_metrics["eval/parity_acc"] == 1.0
        assert run.callback_metrics["eval/knn_acc"] == 1.0

    def test_a_checkpoint_at_the_end_of_a_step_holds_the_rows_of_that_step(self, tmp_path):
        checkpoint = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        run = trainer(knn(), checkpoint, enable_checkpointing=True, num_sanity_val_steps=0)
        train = clusters(64)
        run.fit(Echo(), loader(**train), loader(**clusters(48, seed=1)))
        saved = torch.load(tmp_path / "step=2.ckpt", weights_only=True)["callbacks"]
        assert torch.equal(saved["OnlineQueue[key=embedding]"]["rows"][0], train["x"][:32])
        assert torch.equal(saved["OnlineQueue[key=label]"]["rows"][0], train["label"][:32])

    def test_a_failed_validation_keeps_neither_snapshot_nor_trainer(self):
        class Fails(Echo):
            def validation_step(self, batch, batch_idx, dataloader_idx=0):
                raise RuntimeError("no")

        run = trainer(knn(), num_sanity_val_steps=0)
        queue = find_or_create_queue(run, "embedding", 64)
        with pytest.raises(RuntimeError, match="no"):
            run.fit(Fails(), loader(**clusters(64)), loader(**clusters(48, seed=1)))
        assert queue.data is None

    def test_stable_pretrainings_name_of_the_finder(self):
        run = trainer()
        assert find_or_create_queue_callback(run, "x", 8) is find_or_create_queue(run, "x", 8)


def interrupted(line, features, labels):
    """Append two rows to both; KeyboardInterrupt before the `line`-th line in this package. True if none was left."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if "faiss_knn/online" not in frame.f_code.co_filename:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                raise KeyboardInterrupt
        return trace

    rows = torch.arange(50, 52)
    sys.settrace(trace)
    try:
        features.append(rows[:, None].float())
        labels.append(rows)
    except KeyboardInterrupt:
        return False
    finally:
        sys.settrace(None)
    return True


@pytest.mark.parametrize(("first", "then"), [(torch.uint8, torch.int64), (torch.int64, torch.float32)])
def test_a_ring_widens_where_its_dtype_would_lose_rows(first, then):
    ring = RingBuffer(4)
    ring.append(torch.tensor([1, 2], dtype=first))
    ring.append(torch.tensor([300, 301]).to(then))
    assert ring.latest().tolist() == [1, 2, 300, 301]
    given = RingBuffer(4, dtype=first)
    given.append(torch.tensor([1, 2], dtype=first))
    with pytest.raises(ValueError, match="must fit into the buffer's"):
        given.append(torch.tensor([300, 301]).to(then))
