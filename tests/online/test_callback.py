"""OnlineKNN inside real Trainer runs."""

import functools
import gc
import math
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from omegaconf import OmegaConf
from sklearn.neighbors import KNeighborsClassifier
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassCalibrationError,
    MultilabelAccuracy,
)
from torchmetrics.wrappers import MetricTracker

from faiss_knn import OnlineKNN, OnlineQueue
from tests.online.parts import Echo, clusters, loader, trainer

SKLEARN = {"euclidean": "euclidean", "squared_euclidean": "sqeuclidean", "cosine": "cosine", "manhattan": "manhattan"}


def accuracy(classes=4):
    return MulticlassAccuracy(num_classes=classes, average="micro")


def knn(name="knn", **options):
    defaults = {"input": "embedding", "target": "label", "queue_length": 64, "metrics": {"acc": accuracy()}}
    return OnlineKNN(name, **defaults | options)


class Keep(L.Callback):
    """Keeps each validation batch as the callbacks before it left it, and what was logged."""

    def __init__(self):
        self.batches, self.outputs, self.scores = [], [], []

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self.batches.append(batch)
        self.outputs.append(outputs)

    def on_validation_end(self, trainer, pl_module):
        self.scores.append({k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("eval/")})


def fit(callback, train, *val, module=None, epochs=1, batch_size=16, **options):
    keep = Keep()
    run = trainer(callback, keep, max_epochs=epochs, **{"num_sanity_val_steps": 0} | options)
    run.fit(module or Echo(), loader(**train), [loader(batch_size, **v) for v in val])
    return run, keep


def reference(train, val, distance="euclidean", k=5, temperature=0.07, rows=64):
    """scikit-learn's shares (B, C) on the last `rows` training rows."""
    model = KNeighborsClassifier(
        k, weights=lambda d: 1 / (d + temperature), metric=SKLEARN[distance], algorithm="brute"
    ).fit(train["x"][-rows:].double().numpy(), train["label"][-rows:].numpy())
    return model.predict_proba(val["x"].double().numpy())


@pytest.mark.parametrize("distance", SKLEARN)
def test_scores_equal_scikit_learn(distance):
    train, val = clusters(80, spread=4.0), clusters(50, spread=4.0, seed=1)
    run, keep = fit(knn(distance_metric=distance, k=7), train, val)
    scores = torch.cat([batch["knn_preds"] for batch in keep.batches])
    expected = reference(train, val, distance, k=7)
    np.testing.assert_allclose(scores / scores.sum(1, keepdim=True), expected, rtol=1e-4, atol=1e-6)
    assert run.callback_metrics["eval/knn_acc"].item() == pytest.approx(
        (expected.argmax(1) == val["label"].numpy()).mean()
    )


def test_raw_scores_are_sums_of_weights():
    train, val = clusters(64), clusters(16, seed=1)
    _, keep = fit(knn(k=3), train, val)
    distances = torch.cdist(val["x"].double(), train["x"].double()).sort(1).values[:, :3]
    expected = (1 / (distances + 0.07)).sum(1).float()
    torch.testing.assert_close(keep.batches[0]["knn_preds"].sum(1), expected, rtol=1e-5, atol=0)


def test_validate_and_test_after_fit_score_from_the_same_queue():
    train, val = clusters(64, spread=3.0), clusters(48, spread=3.0, seed=1)
    run, keep = fit(knn(), train, val)
    run.validate(Echo(), loader(**val), verbose=False)
    assert keep.scores[1] == keep.scores[0] != {}
    (logged,) = run.test(Echo(), loader(**val), verbose=False)
    assert logged["test/knn_acc"] == pytest.approx(keep.scores[0]["eval/knn_acc"])


def test_bank_is_the_queue_at_each_epoch():
    class Moves(Echo):
        """Turns the features of class 0 into those of class 1 from the second epoch on, in training alone."""

        def training_step(self, batch, batch_idx):
            step = self.step(batch)
            if self.current_epoch:
                batch["label"] = 1 - batch["label"]
            return step

    train, val = clusters(64, classes=2), clusters(32, classes=2, seed=1)
    _, keep = fit(knn(metrics=accuracy(2)), train, val, module=Moves(), epochs=2)
    assert [s["eval/knn_MulticlassAccuracy"] for s in keep.scores] == [1.0, 0.0]


def test_several_k_come_from_one_search_and_the_largest_predicts():
    train, val = clusters(64, spread=4.0), clusters(40, spread=4.0, seed=1)
    _, several = fit(knn(k=(1, 9, 5)), train, val)
    assert set(several.scores[0]) == {"eval/knn_k1_acc", "eval/knn_k5_acc", "eval/knn_k9_acc"}
    for k in (1, 5, 9):
        _, one = fit(knn(k=k), train, val)
        assert several.scores[0][f"eval/knn_k{k}_acc"] == one.scores[0]["eval/knn_acc"]
    assert torch.equal(several.batches[0]["knn_preds"], one.batches[0]["knn_preds"])


class TestMetricForms:
    @pytest.mark.parametrize(
        ("metrics", "keys"),
        [
            (None, set()),
            (accuracy(), {"MulticlassAccuracy"}),
            ([accuracy(), MulticlassAUROC(4)], {"MulticlassAccuracy", "MulticlassAUROC"}),
            ((accuracy(),), {"MulticlassAccuracy"}),
            ({"top.1": accuracy(), "auc": MulticlassAUROC(4)}, {"top.1", "auc"}),
            ({"train": accuracy(), "val": {"acc": accuracy()}}, {"acc"}),
            ({"train": accuracy(), "val": None}, set()),
            (MetricCollection({"a": accuracy()}, prefix="p_"), {"p_a"}),
            (OmegaConf.create({"acc": accuracy()}, flags={"allow_objects": True}), {"acc"}),
            (OmegaConf.create([accuracy()], flags={"allow_objects": True}), {"MulticlassAccuracy"}),
            (
                {"acc": MulticlassAccuracy(num_classes=4, average=None)},
                {"acc_0", "acc_1", "acc_2", "acc_3"},
            ),
        ],
    )
    def test_each_form_is_logged(self, metrics, keys):
        _, keep = fit(knn(metrics=metrics), clusters(64), clusters(32, seed=1))
        assert set(keep.scores[0]) == {f"eval/knn_{key}" for key in keys}
        assert "knn_preds" in keep.batches[0]

    @pytest.mark.parametrize(
        ("metrics", "message"),
        [
            ("acc", "metrics can only be a torchmetric of list/tuple of torchmetrics.*got str"),
            (5, "metrics can only be a torchmetric of list/tuple of torchmetrics.*got int"),
            ([accuracy(), 3], r"metric metrics\[1\] is no a torchmetric, got 3"),
            ({"acc": MulticlassAccuracy}, r"metrics\['acc'\] is no a torchmetric"),
            ([accuracy(), accuracy()], "MulticlassAccuracy more than once"),
            ({"a": accuracy(4), "b": accuracy(5)}, "must agree on num_classes"),
        ],
    )
    def test_bad_metrics_are_named_at_once(self, metrics, message):
        with pytest.raises(ValueError, match=message):
            knn(metrics=metrics)

    def test_the_given_metric_is_left_alone(self):
        metric = accuracy()
        fit(knn(metrics=metric), clusters(64), clusters(32, seed=1))
        assert metric.update_count == 0

    def test_each_metric_computes_once_a_run(self):
        calls = []

        class Counting(MulticlassAccuracy):
            def compute(self):
                calls.append(1)
                return super().compute()

        fit(knn(metrics=Counting(num_classes=4)), clusters(64), clusters(64, seed=1), epochs=3)
        assert len(calls) == 1 + 3  # a rehearsal in the constructor


@pytest.mark.parametrize("metric", [MulticlassAUROC, functools.partial(MulticlassCalibrationError, n_bins=10)])
@pytest.mark.parametrize("weighting", ["inverse", "softmax", "uniform"])
def test_probability_metrics_do_not_depend_on_the_batch_size(metric, weighting):
    train, val = clusters(64, spread=5.0), clusters(64, spread=5.0, seed=1)
    values = [
        fit(knn(metrics={"m": metric(4)}, weighting=weighting), train, val, batch_size=size)[1].scores[0]["eval/knn_m"]
        for size in (1, 8, 64)
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-6) == pytest.approx(values[2], abs=1e-6)


def test_validation_loaders_are_scored_apart():
    train, good = clusters(64), clusters(40, seed=1)
    bad = {"x": good["x"], "label": (good["label"] + 1) % 4}
    _, keep = fit(knn(), train, good, bad)
    assert keep.scores[0] == {"eval/knn_acc/dataloader_idx_0": 1.0, "eval/knn_acc/dataloader_idx_1": 0.0}


class TestWhereThingsAre:
    def test_targets_only_in_outputs(self):
        class InOutputs(Echo):
            def step(self, batch):
                return {"loss": self.weight.sum(), "embedding": batch["x"], "target": batch["label"]}

        _, keep = fit(knn(target="target"), clusters(64), clusters(32, seed=1), module=InOutputs())
        assert keep.scores[0] == {"eval/knn_acc": 1.0}

    def test_outputs_come_before_the_batch_for_vote_and_metric(self):
        class Remaps(Echo):
            def step(self, batch):
                remapped = (batch["label"] + 1) % 4
                return {"loss": self.weight.sum(), "embedding": batch["x"], "label": remapped}

        _, keep = fit(knn(), clusters(64), clusters(32, seed=1), module=Remaps())
        assert keep.scores[0] == {"eval/knn_acc": 1.0}

    def test_tensor_outputs_with_keys_in_the_batch(self):
        class Plain(Echo):
            def training_step(self, batch, batch_idx):
                return self.weight.sum()

            def validation_step(self, batch, batch_idx):
                return self.weight.sum()

        _, keep = fit(knn(input="x"), clusters(64), clusters(32, seed=1), module=Plain())
        assert keep.scores[0] == {"eval/knn_acc": 1.0}
        assert keep.batches[0]["knn_preds"].shape == (16, 4)

    def test_predictions_go_to_the_outputs_where_the_batch_is_no_dict(self):
        class Tuples(Echo):
            def step(self, batch):
                x, label = batch
                return {"loss": self.weight.sum(), "embedding": x, "label": label}

        def tuples(n, seed=0):
            data = clusters(n, seed=seed)
            return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data["x"], data["label"]), 16)

        keep = Keep()
        trainer(knn(), keep).fit(Tuples(), tuples(64), tuples(32, seed=1))
        assert keep.scores[-1] == {"eval/knn_acc": 1.0}
        assert keep.outputs[-1]["knn_preds"].shape == (16, 4)

    def test_missing_key_in_validation_names_the_callback(self):
        class Forgets(Echo):
            def validation_step(self, batch, batch_idx):
                return {"loss": self.weight.sum()}

        message = r"knn: Key 'embedding' not found.*\['x', 'label'\], Available output keys: \['loss'\]"
        with pytest.raises(ValueError, match=message):
            fit(knn(), clusters(64), clusters(32, seed=1), module=Forgets())

    def test_predictions_never_overwrite(self):
        class Has(Echo):
            def validation_step(self, batch, batch_idx):
                batch["knn_preds"] = None
                return self.step(batch)

        with pytest.raises(ValueError, match="Key 'knn_preds' already exists in batch"):
            fit(knn(), clusters(64), clusters(32, seed=1), module=Has())

    def test_dots_in_keys_and_names(self):
        class Dotted(Echo):
            def step(self, batch):
                return {"loss": self.weight.sum(), "net.layer4": batch["x"]}

        _, keep = fit(knn("knn.l4", input="net.layer4"), clusters(64), clusters(32, seed=1), module=Dotted())
        assert keep.scores[0] == {"eval/knn.l4_acc": 1.0}

    def test_two_callbacks_of_one_name_are_refused(self):
        with pytest.raises(ValueError, match="2 OnlineKNN callbacks are named 'knn'"):
            trainer(knn(), knn(k=3)).fit(Echo(), loader(**clusters(64)))


def test_features_and_labels_that_drift_apart_are_an_error_at_that_step():
    class TwoViews(Echo):
        def training_step(self, batch, batch_idx):
            return {"loss": self.weight.sum(), "embedding": torch.cat([batch["x"], batch["x"]])}

    message = r"'embedding' of shape \(32, 8\) and 'label' of shape \(16,\)"
    with pytest.raises(ValueError, match=message):
        fit(knn(), clusters(64), clusters(32, seed=1), module=TwoViews())


class TestBadRows:
    def test_bank_rows_that_are_not_finite_are_left_out_counted_and_warned_of_once(self, logged):
        train, val = clusters(64), clusters(32, seed=1)
        train["x"][::4] = float("nan")
        train["x"][1, 3] = float("inf")
        _, keep = fit(knn(), train, val, epochs=3)
        assert keep.scores == [{"eval/knn_acc": 1.0, "eval/knn_skipped": 17.0}] * 3
        assert len([m for m in logged if "left out" in m]) == 1
        assert "left out 17 of 64 bank rows" in logged[-1]

    def test_queries_that_are_not_finite_are_left_out(self, logged):
        train, val = clusters(64), clusters(32, seed=1)
        val["x"][3] = float("nan")
        _, keep = fit(knn(), train, val)
        assert keep.scores == [{"eval/knn_acc": 1.0, "eval/knn_skipped": 1.0}]
        predictions = torch.cat([b["knn_preds"] for b in keep.batches])
        assert (predictions.sum(1) > 0).nonzero()[:, 0].tolist() == [i for i in range(32) if i != 3]

    def test_zero_rows_are_left_out_under_cosine_alone(self, logged):
        train, val = clusters(64), clusters(32, seed=1)
        train["x"][5] = val["x"][7] = 0
        assert fit(knn(distance_metric="cosine"), train, val)[1].scores[0]["eval/knn_skipped"] == 2
        assert "eval/knn_skipped" not in fit(knn(), train, val)[1].scores[0]

    def test_rows_that_are_zero_in_float32_are_left_out_under_cosine(self, logged):
        train, val = clusters(64), clusters(32, seed=1)
        val["x"] = val["x"].double()
        val["x"][7] = 1e-60
        _, keep = fit(knn(distance_metric="cosine"), train, val)
        assert keep.scores == [{"eval/knn_acc": 1.0, "eval/knn_skipped": 1.0}]

    def test_unlabelled_rows_are_left_out_on_both_sides(self, logged):
        train, val = clusters(64), clusters(32, seed=1)
        train["label"][:10] = -1
        val["label"][::2] = -1
        _, keep = fit(knn(), train, val)
        assert keep.scores == [{"eval/knn_acc": 1.0, "eval/knn_skipped": 26.0}]
        assert (torch.cat([b["knn_preds"] for b in keep.batches]).sum(1) > 0).all()

    def test_a_batch_or_run_of_bad_rows_alone_does_not_stop_the_run(self, logged):
        train, val = clusters(64), clusters(32, seed=1)
        val["x"][:16] = float("nan")
        _, keep = fit(knn(), train, val)
        assert keep.scores == [{"eval/knn_acc": 1.0, "eval/knn_skipped": 16.0}]
        val["x"][:] = float("nan")
        _, keep = fit(knn(), train, val)
        assert keep.scores == [{"eval/knn_skipped": 32.0}]
        train["x"][:] = float("nan")
        _, keep = fit(knn(), train, val)
        assert "eval/knn_acc" not in keep.scores[0]


class TestEmptyQueue:
    def test_sanity_check_is_quiet_and_validate_warns_once(self, logged):
        fit(knn(), clusters(64), clusters(32, seed=1), num_sanity_val_steps=2)
        assert logged == []
        run = trainer(knn())
        (scores,) = run.validate(Echo(), loader(**clusters(64)), verbose=False)
        assert scores == {}
        assert logged == ["! knn: queue data is empty, skipping KNN computation"]


class TestClassCount:
    def test_given_beats_metrics_beats_bank(self, logged):
        train, val = clusters(64), clusters(32, seed=1)
        assert fit(knn(metrics=None, num_classes=9), train, val)[1].batches[0]["knn_preds"].shape == (16, 9)
        assert fit(knn(metrics=accuracy(6)), train, val)[1].batches[0]["knn_preds"].shape == (16, 6)
        assert logged == []
        assert fit(knn(metrics=None), train, val)[1].batches[0]["knn_preds"].shape == (16, 4)

    def test_inferred_is_constant_within_a_run_and_warned_of_once(self, logged):
        train, val = clusters(64), clusters(48, seed=1)
        val = {key: column[val["label"].argsort()] for key, column in val.items()}
        _, keep = fit(knn(metrics=None), train, val, epochs=2)
        assert {batch["knn_preds"].shape[1] for batch in keep.batches} == {4}
        assert len(logged) == 1
        assert "OnlineKNN[knn]: inferring num_classes=4" in logged[0]

    @pytest.mark.parametrize("where", ["bank", "queries"])
    def test_a_label_beyond_it_is_an_error(self, where):
        train, val = clusters(64), clusters(32, seed=1)
        (train if where == "bank" else val)["label"][20] = 7
        message = (
            r"OnlineKNN\[knn\]: configured num_classes=4 but observed label 7 >= num_classes. "
            "Increase num_classes to at least 8."
        )
        with pytest.raises(ValueError, match=message):
            fit(knn(num_classes=4), train, val)


def test_multi_hot_labels():
    train, val = clusters(64), clusters(32, seed=1)
    for data in (train, val):
        data["label"] = torch.nn.functional.one_hot(data["label"], 4)
        data["label"][:, 3] |= data["label"][:, 0]
    _, keep = fit(knn(metrics={"acc": MultilabelAccuracy(4)}, target_dim=4), train, val)
    assert keep.scores[0] == {"eval/knn_acc": 1.0}


def test_labels_beyond_float32_keep_their_value():
    queue = OnlineQueue("label", 8)
    run = trainer(queue)
    run.fit(Echo(), loader(x=torch.rand(8, 2), label=torch.full((8,), 16777217)))
    assert queue.snapshot(run).unique().tolist() == [16777217]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_features_of_any_float_dtype(dtype):
    train, val = clusters(64), clusters(32, seed=1)
    for data in (train, val):
        data["x"] = data["x"].to(dtype)
    _, keep = fit(knn(), train, val)
    assert keep.scores[0] == {"eval/knn_acc": 1.0}
    assert keep.batches[0]["knn_preds"].dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_mixed_precision(precision):
    class Linear(Echo):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(8, 8)

        def step(self, batch):
            z = self.net(batch["x"])
            return {"loss": 0 * z.sum(), "embedding": z}

    _, keep = fit(knn(), clusters(64), clusters(32, seed=1), module=Linear(), precision=precision)
    assert keep.scores[0] == {"eval/knn_acc": 1.0}
    assert keep.outputs[0]["embedding"].dtype == torch.bfloat16


@pytest.mark.parametrize("input_dim", [None, 8, (2, 4), [2, 4]])
def test_features_of_more_dimensions_are_flattened(input_dim):
    train, val = clusters(64, spread=3.0), clusters(32, spread=3.0, seed=1)
    _, flat = fit(knn(), train, val)
    for data in (train, val):
        data["x"] = data["x"].view(-1, 2, 4)
    _, keep = fit(knn(input_dim=input_dim), train, val)
    assert keep.scores == flat.scores


def test_a_callback_serves_trainers_one_after_the_other_and_inside_each_other():
    train, val = clusters(64), clusters(32, seed=1)
    other = {"x": train["x"], "label": (train["label"] + 1) % 4}
    callback = knn()

    class FitsAnother(L.Callback):
        def on_train_epoch_end(self, trainer_, pl_module):
            inner = knn("inner")
            run = trainer(inner, callback)
            run.fit(Echo(), loader(**other), loader(**val))
            assert run.callback_metrics["eval/inner_acc"] == run.callback_metrics["eval/knn_acc"] == 0.0

    run = trainer(callback, FitsAnother(), max_epochs=2)
    run.fit(Echo(), loader(**train), loader(**val))
    assert run.callback_metrics["eval/knn_acc"] == 1.0
    again, _ = fit(callback, other, val)
    assert again.callback_metrics["eval/knn_acc"] == 0.0
    run.validate(Echo(), loader(**val), verbose=False)
    assert run.callback_metrics["eval/knn_acc"] == 1.0


def test_consumers_of_one_key_see_their_own_rows():
    train, val = clusters(64), clusters(32, seed=1)
    train["label"][:48] = (train["label"][:48] + 1) % 4
    short, long = knn("short", queue_length=16), knn("long", queue_length=64, k=64, weighting="uniform")
    run = trainer(short, long)
    run.fit(Echo(), loader(**train), loader(**val))
    assert run.callback_metrics["eval/short_acc"] == 1.0
    assert run.callback_metrics["eval/long_acc"] < 0.6


def test_a_users_queue_is_shared():
    queue = OnlineQueue("embedding", 200)
    run = trainer(queue, knn())
    run.fit(Echo(), loader(**clusters(80)), loader(**clusters(32, seed=1)))
    assert run.callback_metrics["eval/knn_acc"] == 1.0
    assert len(queue.snapshot(run)) == 80


@pytest.mark.parametrize("monitor_first", [True, False])
def test_model_checkpoint_and_early_stopping_see_the_key(tmp_path, monitor_first):
    train, val = clusters(64), clusters(32, seed=1)
    monitors = [
        ModelCheckpoint(tmp_path, monitor="eval/knn_acc", mode="max"),
        EarlyStopping("eval/knn_acc", mode="max", patience=2),
    ]
    callbacks = [*monitors, knn()] if monitor_first else [knn(), *monitors]
    run = trainer(*callbacks, max_epochs=9, enable_checkpointing=True)
    run.fit(Echo(), loader(**train), loader(**val))
    assert run.current_epoch == 3
    assert monitors[0].best_model_score == 1.0


class TestCheckpoint:
    def test_module_state_is_untouched_and_validate_from_a_checkpoint_gives_the_same_number(self, tmp_path):
        train, val = clusters(64, spread=4.0), clusters(64, spread=4.0, seed=1)
        module = Echo()
        run, keep = fit(knn(), train, val, module=module)
        assert list(module.state_dict()) == ["weight"]
        assert list(module.buffers()) == []
        run.save_checkpoint(tmp_path / "run.ckpt")
        fresh = trainer(knn())
        (scores,) = fresh.validate(Echo(), loader(**val), ckpt_path=tmp_path / "run.ckpt", verbose=False)
        assert scores["eval/knn_acc"] == pytest.approx(keep.scores[0]["eval/knn_acc"])
        Echo.load_from_checkpoint(tmp_path / "run.ckpt")

    @pytest.mark.parametrize("length", [16, 200])
    def test_resume_with_another_length_keeps_what_fits(self, tmp_path, length):
        train, val = clusters(64, spread=4.0), clusters(64, spread=4.0, seed=1)
        run, _ = fit(knn(), train, val)
        run.save_checkpoint(tmp_path / "run.ckpt")
        fresh = trainer(knn(queue_length=length))
        (scores,) = fresh.validate(Echo(), loader(**val), ckpt_path=tmp_path / "run.ckpt", verbose=False)
        expected = reference(train, val, rows=min(length, 64)).argmax(1) == val["label"].numpy()
        assert scores["eval/knn_acc"] == pytest.approx(expected.mean())

    def test_runs_resume_with_the_callback_added_or_left_out(self, tmp_path):
        train, val = clusters(64), clusters(32, seed=1)
        run = trainer()
        run.fit(Echo(), loader(**train))
        run.save_checkpoint(tmp_path / "without.ckpt")
        added = trainer(knn(), max_epochs=2)
        added.fit(Echo(), loader(**train), loader(**val), ckpt_path=tmp_path / "without.ckpt")
        assert added.callback_metrics["eval/knn_acc"] == 1.0
        added.save_checkpoint(tmp_path / "with.ckpt")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
            trainer(max_epochs=3).fit(Echo(), loader(**train), ckpt_path=tmp_path / "with.ckpt")


def test_state_key_and_state():
    assert knn("linear").state_key == "OnlineKNN[name=linear]"
    assert knn("linear").state_dict() == {}


def test_the_bank_is_freed_when_the_epoch_ends():
    def of_queue_length():
        gc.collect()
        return [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == (50, 8)]

    _run, _keep = fit(knn(queue_length=50), clusters(80), clusters(32, seed=1))
    assert len(of_queue_length()) == 1  # the ring buffer


def test_every_n_epochs():
    _, keep = fit(knn(every_n_epochs=2), clusters(64), clusters(32, seed=1), epochs=4)
    assert ["knn_preds" in batch for batch in keep.batches[::2]] == [False, True, False, True]


@pytest.mark.parametrize("index", ["IVF4,Flat", "HNSW8"])
def test_approximate_indexes_score_too(index):
    _, keep = fit(knn(index=index), clusters(64), clusters(32, seed=1))
    assert keep.scores[0]["eval/knn_acc"] > 0.9


def test_an_index_that_faiss_cannot_make_is_called_by_the_argument():
    with pytest.raises(ValueError, match=r"^`index` must be .*, got 'PQ3'"):
        fit(knn(index="PQ3"), clusters(64), clusters(32, seed=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k must be positive, got 0"),
        ({"k": [5, -1]}, "k must be positive, got -1"),
        ({"k": []}, r"k must be one number or several different ones, got \[\]"),
        ({"k": [5, 5]}, "k must be one number or several different ones"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"chunk_size": 0}, "chunk_size must be positive or -1, got 0"),
        ({"chunk_size": -2}, "chunk_size must be positive or -1, got -2"),
        ({"num_classes": 0}, "num_classes must be positive, got 0"),
        ({"queue_length": 0}, "queue_length must be positive, got 0"),
        ({"queue_length": -1}, "queue_length must be positive, got -1"),
        ({"every_n_epochs": 0}, "every_n_epochs must be positive, got 0"),
        ({"distance_metric": "hamming"}, "`distance_metric` must be one of .*got 'hamming'"),
        ({"weighting": "rank"}, "`weighting` must be one of .*got 'rank'"),
        ({"gather": "all"}, "`gather` must be 'replicate' or 'shard', got 'all'"),
        ({"index": ""}, "^`index` must be 'flat'"),
        ({"index": "HNSW0"}, "^`index` must have numbers above"),
        ({"nprobe": 0}, "`nprobe` must be a positive integer"),
        ({"target_recall": 2.0}, r"`target_recall` must be in \(0, 1\]"),
        ({"input_dim": -3}, "input_dim must be positive, got -3"),
        ({"target_dim": 0}, "target_dim must be positive, got 0"),
        ({"k": 2.5}, "k must be positive, got 2.5"),
        ({"k": "5"}, "k must be positive, got 5"),
        ({"temperature": math.nan}, "temperature must be positive"),
        ({"bank_dtype": torch.int8}, "bank_dtype must be None or one of .*, got torch.int8"),
        ({"bank_dataloader_idx": -1}, "bank_dataloader_idx must be 0, or None for the queue, got -1"),
        ({"metrics": 3}, "metrics can only be"),
        ({"k": {1, 5}}, "k must be an integer, got set"),
        ({"k": np.array([5, 5])}, "k must be one number or several different ones"),
        ({"k": np.array([[1, 5]])}, "k must be an integer, got ndarray of shape"),
        ({"queue_length": math.nan}, "queue_length must be an integer, got nan"),
        ({"every_n_epochs": math.nan}, "every_n_epochs must be an integer, got nan"),
        ({"name": 3}, "name must be a name, got 3"),
        ({"num_classes": 2**40}, "num_classes must be at most"),
        ({"verbose": "yes"}, "verbose must be True or False, got 'yes'"),
        ({"bank_device": "gpu"}, "bank_device must be a torch device or its name, got 'gpu'"),
        ({"bank_device": 3.5}, "bank_device must be a torch device or its name, got 3.5"),
        ({"input_dim": ()}, "input_dim must be positive, got 0"),
        ({"metrics": {"t": MetricTracker(MulticlassAccuracy(4))}}, "is no a torchmetric, got MetricTracker: give"),
    ],
)
def test_bad_arguments_are_named_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        knn(**options)


@pytest.mark.parametrize("k", [np.array([1, 5]), torch.tensor([1, 5]), (np.int64(1), np.int32(5)), range(1, 6, 4)])
def test_several_k_come_in_any_sequence(k):
    assert knn(k=k).ks == (1, 5)


def test_the_first_bad_argument_is_named():
    with pytest.raises(ValueError, match="k must be positive"):
        knn(k=0, temperature=0, chunk_size=0, num_classes=0)
    with pytest.raises(ValueError, match="temperature must be positive"):
        knn(temperature=0, chunk_size=0, num_classes=0)
    with pytest.raises(ValueError, match="chunk_size must be positive"):
        knn(chunk_size=0, num_classes=0)
