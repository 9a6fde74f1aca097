"""What would stop a run, or log a wrong number, after an epoch of training is found at its first step or before."""

import re
import time

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.nn.functional import one_hot
from torchmetrics import MeanMetric, MeanSquaredError, Metric, MetricCollection
from torchmetrics.classification import BinaryAccuracy, MulticlassAccuracy, MulticlassF1Score

from faiss_knn import KNNIndex, OnlineKNN, OnlineQueue
from faiss_knn.online.queue import find_or_create_queue
from tests.online.parts import Echo, clusters, loader, trainer


def accuracy(**options):
    return MulticlassAccuracy(4, average="micro", **options)


def knn(name="knn", **options):
    return OnlineKNN(name, "embedding", "label", **{"queue_length": 64, "metrics": {"acc": accuracy()}} | options)


class Steps(Callback):
    count = 0

    def on_train_batch_start(self, *_):
        self.count += 1


def steps_until_refused(callback, message, train=None, val=None):
    steps = Steps()
    run = trainer(callback, steps, num_sanity_val_steps=0)
    val = val or loader(**clusters(48, seed=1))
    with pytest.raises(ValueError, match=message):
        run.fit(Echo(), loader(**(train or clusters(64))), val)
    return steps.count


class TestLogKeys:
    @pytest.mark.parametrize("turned", [False, True])
    def test_two_callbacks_that_would_log_one_key_are_refused(self, turned):
        callbacks = [knn(k=(1, 5)), knn("knn_k5", k=20)]
        run = trainer(*(callbacks[::-1] if turned else callbacks), num_sanity_val_steps=0)
        with pytest.raises(ValueError, match="would both log knn_k5_acc: rename one of them"):
            run.fit(Echo(), loader(**clusters(64)), loader(**clusters(48, seed=1)))

    @pytest.mark.parametrize("name", ["index_recall", "skipped"])
    def test_a_metric_is_not_named_as_what_is_logged_anyway(self, name):
        with pytest.raises(ValueError, match=f"`metrics` must have names of their own, got {name} twice"):
            knn(metrics={name: accuracy()})

    def test_nor_as_a_part_of_another(self):
        with pytest.raises(ValueError, match="got acc_0 twice"):
            knn(metrics={"acc": MulticlassAccuracy(4, average=None), "acc_0": accuracy()})

    def test_a_collection_among_metrics_adds_its_names(self):
        metrics = {"top": MetricCollection({"one": accuracy(), "f1": MulticlassF1Score(4)}), "acc": accuracy()}
        run = trainer(knn(metrics=metrics), num_sanity_val_steps=0)
        run.fit(Echo(), loader(**clusters(64)), loader(**clusters(48, seed=1)))
        assert dict(run.callback_metrics) == {"eval/knn_top_one": 1.0, "eval/knn_top_f1": 1.0, "eval/knn_acc": 1.0}


class TestMetrics:
    @pytest.mark.parametrize(("metric", "why"), [(MeanSquaredError(), "RuntimeError"), (MeanMetric(), "RuntimeError")])
    def test_one_that_cannot_judge_class_ids(self, metric, why):
        said = f"metric m cannot judge scores of 2 classes against class ids: {why}"
        assert steps_until_refused(knn(metrics={"m": metric}), said) == 1

    def test_one_that_judges_columns_judges_columns(self):
        train, val = clusters(64), clusters(48, seed=1)
        for data in (train, val):
            data["label"] = one_hot(data["label"], 4)
        run = trainer(knn(metrics={"m": MeanSquaredError()}), num_sanity_val_steps=0)
        run.fit(Echo(), loader(**train), loader(**val))
        assert run.callback_metrics["eval/knn_m"] == 0.0

    @pytest.mark.parametrize(("metric", "width"), [(MulticlassAccuracy(3), 3), (BinaryAccuracy(), 2)])
    def test_labels_that_it_was_not_made_for(self, metric, width):
        said = (
            f"configured num_classes={width} but observed label 3 >= num_classes. .* The metrics are made for {width}"
        )
        assert steps_until_refused(knn(metrics={"m": metric}), said) == 1

    def test_one_of_a_width_that_nothing_tells(self):
        class Thirty(Metric):
            def update(self, shares, labels):
                assert shares.shape[1] == 30

            def compute(self):
                return torch.tensor(0.5)

        with pytest.raises(ValueError, match=r"metric m cannot judge scores of 2 classes: .* give num_classes"):
            knn(metrics={"m": Thirty()})
        run = trainer(knn(metrics={"m": Thirty()}, num_classes=30), num_sanity_val_steps=0)
        run.fit(Echo(), loader(**clusters(64)), loader(**clusters(48, seed=1)))
        assert run.callback_metrics["eval/knn_m"] == 0.5

    def test_a_class_derived_from_one_is_known_as_that(self):
        class Own(MulticlassAccuracy):
            pass

        train, val = clusters(64), clusters(48, seed=1)
        for data in (train, val):
            data["label"] = one_hot(data["label"], 4)
        run = trainer(knn(metrics={"m": Own(4)}), num_sanity_val_steps=0)
        run.fit(Echo(), loader(**train), loader(**val))
        assert run.callback_metrics["eval/knn_m"] == 1.0


def test_a_bank_loader_in_the_wrong_place():
    val = loader(**clusters(48, seed=1))
    for callback, loaders in ((knn(bank_dataloader_idx=1), [val, val]), (knn(bank_dataloader_idx=0), [val])):
        assert steps_until_refused(callback, "must come first and others after it", val=loaders) == 0


def test_a_learning_rate_schedule_finds_a_score_at_every_epoch():
    class Scheduled(Echo):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max")
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "eval/knn_acc"}}

    run = trainer(knn(every_n_epochs=2), max_epochs=3, num_sanity_val_steps=0)
    run.fit(Scheduled(), loader(**clusters(64)), loader(**clusters(48, seed=1)))
    assert run.callback_metrics["eval/knn_acc"] == 1.0


def test_a_bank_without_a_usable_row_is_counted():
    train = clusters(64)
    train["label"][:] = -1
    run = trainer(knn(), num_sanity_val_steps=0)
    run.fit(Echo(), loader(**train), loader(**clusters(48, seed=1)))
    assert dict(run.callback_metrics) == {"eval/knn_skipped": 64.0}


class TestMessages:
    def test_rows_of_another_shape_name_their_queue(self):
        class Wider(Echo):
            def training_step(self, batch, batch_idx):
                return {"loss": self.weight.sum(), "embedding": batch["x"].repeat(1, 1 + batch_idx)}

        with pytest.raises(ValueError, match=re.escape("OnlineQueue[embedding]: `rows` must have shape (n, 8), got")):
            trainer(knn(), num_sanity_val_steps=0).fit(Wider(), loader(**clusters(64)), loader(**clusters(48, seed=1)))

    def test_queries_of_another_width_than_the_bank_name_their_key(self):
        class Wider(Echo):
            def validation_step(self, batch, batch_idx, dataloader_idx=0):
                return {"embedding": batch["x"].repeat(1, 2)}

        with pytest.raises(ValueError, match=r"OnlineKNN\[knn\]: 'embedding' has 16 values a row in validation, and 8"):
            trainer(knn(), num_sanity_val_steps=0).fit(Wider(), loader(**clusters(64)), loader(**clusters(48, seed=1)))

    @pytest.mark.parametrize("option", ["gather_distributed", "verbose", "persistent"])
    def test_switches_of_a_queue(self, option):
        with pytest.raises(ValueError, match=f"{option} must be True or False, got 'no'"):
            OnlineQueue("embedding", 8, **{option: "no"})

    def test_arguments_of_a_queue_that_exists(self):
        run = trainer(OnlineQueue("embedding", 8))
        for options, message in (
            ({"queue_length": torch.ones(3)}, "queue_length must be an integer"),
            ({"dtype": "float"}, "`dtype` must be a torch dtype"),
            ({"gather_distributed": "no"}, "gather_distributed must be True or False"),
        ):
            with pytest.raises(ValueError, match=message):
                find_or_create_queue(run, **{"key": "embedding", "queue_length": 8} | options)
        with pytest.raises(ValueError, match="recall_queries must be"):
            knn(recall_queries=torch.ones(2))

    def test_a_factory_string_of_any_length_is_read_at_once(self):
        start = time.monotonic()
        with pytest.raises(ValueError, match="at most 200 characters"):
            KNNIndex("x" * 5000)
        assert time.monotonic() - start < 10  # it took minutes
