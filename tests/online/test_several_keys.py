"""Several keys of features or labels in one callback: the numbers of one callback each."""

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from faiss_knn import OnlineEvaluator, OnlineKNN
from tests.online.parts import Echo, loader, trainer
from tests.online.test_evaluator import TRAIN, VAL

NOISE = torch.randn(600, 64, generator=torch.Generator().manual_seed(5))


def with_teacher(columns, noise):
    return {**columns, "teacher": columns["x"] + 6 * noise, "odd": columns["label"] % 2}


DATA = with_teacher(TRAIN, NOISE[:400])
QUERIES = with_teacher(VAL, NOISE[400:])
QUERIES["odd"] = torch.where(torch.arange(200) % 7 == 0, -1, QUERIES["odd"])
ACCURACY = {"acc": MulticlassAccuracy(10, average="micro")}
TWO = {"acc": MulticlassAccuracy(2, average="micro")}


def knn(name="knn", given="embedding", target="label", metrics=ACCURACY, kind=OnlineKNN, **options):
    return kind(name, given, target, **{"queue_length": 300, "metrics": metrics, "k": 3} | options)


def fitted(*callbacks, **options):
    """What is logged, and the predictions in each batch."""
    seen = []

    class Watched(Echo):
        def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
            seen.append({key: value for key, value in batch.items() if key.endswith("_preds")})

    run = trainer(*callbacks, num_sanity_val_steps=0, **options)
    run.fit(Watched(), loader(32, **DATA), loader(32, **QUERIES))
    return {key: value.item() for key, value in run.callback_metrics.items()}, seen


@pytest.mark.parametrize(
    "options", [{}, {"k": (1, 20)}, {"id": "id", "index": "IVF8,Flat"}, {"search": "epoch"}], ids=str
)
def test_several_inputs_are_scored_as_by_a_callback_each(options):
    each, seen = fitted(*(knn(f"knn_{key}", key, **options) for key in ("embedding", "teacher")))
    together, predictions = fitted(knn("knn", ("embedding", "teacher"), **options))
    assert together == each
    k = "_k1" if "k" in options else ""
    assert each[f"eval/knn_embedding{k}_acc"] > each[f"eval/knn_teacher{k}_acc"] > 0.2
    for batch, expected in zip(predictions, seen, strict=True):
        assert batch.keys() == expected.keys()
        assert len(batch) == (0 if "search" in options else 2)
        assert all(torch.equal(batch[key], expected[key]) for key in batch)


def test_several_targets_have_metrics_each():
    each, _ = fitted(knn("knn_label"), knn("knn_odd", target="odd", metrics=TWO))
    for targets, metrics in (
        ({"label": ACCURACY, "odd": TWO}, None),
        (("label", "odd"), {"label": ACCURACY, "odd": TWO}),
    ):
        together, predictions = fitted(knn(target=targets, metrics=metrics))
        assert together == each
        assert {"eval/knn_label_acc", "eval/knn_odd_acc", "eval/knn_odd_skipped"} == set(together)
        assert predictions[0]["knn_odd_preds"].shape == (32, 2)


def test_inputs_and_targets_multiply():
    together, _ = fitted(knn("knn", ("embedding", "teacher"), {"label": ACCURACY, "odd": TWO}, None))
    assert {key for key in together if key.endswith("acc")} == {
        f"eval/knn_{key}_{target}_acc" for key in ("embedding", "teacher") for target in ("label", "odd")
    }


def test_their_queues_are_saved_once_and_resume(tmp_path):
    run = trainer(callback := knn("knn", ("embedding", "teacher")), num_sanity_val_steps=0)
    run.fit(Echo(), loader(32, **DATA), loader(32, **QUERIES))
    run.save_checkpoint(tmp_path / "run.ckpt", weights_only=False)
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"]
    assert {key for key in saved if "Queue" in key} == {
        f"OnlineQueue[key={key}]" for key in ("embedding", "teacher", "label")
    }
    again = trainer(knn("knn", ("embedding", "teacher")))
    (values,) = again.validate(
        Echo(), loader(32, **QUERIES), ckpt_path=tmp_path / "run.ckpt", verbose=False, weights_only=False
    )
    assert values == {key: value.item() for key, value in run.callback_metrics.items()}
    assert callback.log_keys >= {"knn_embedding_acc", "knn_teacher_acc", "knn_teacher_skipped"}


def test_an_evaluator_hands_out_scores_by_input():
    both = knn("knn", ("x", "teacher"), kind=OnlineEvaluator)
    own = {key: knn(f"knn_{key}", key, kind=OnlineEvaluator) for key in ("x", "teacher")}
    both.start()
    assert {key: part.shape for key, part in both.score(**QUERIES).items()} == {"x": (200, 10), "teacher": (200, 10)}
    assert both.finish() == {}
    for evaluator in (both, *own.values()):
        evaluator.observe(**DATA)
        evaluator.start()
    scores = both.score(**QUERIES)
    assert list(scores) == ["x", "teacher"]
    assert all(torch.equal(scores[key], evaluator.score(**QUERIES)) for key, evaluator in own.items())
    assert both.finish() == own["x"].finish() | own["teacher"].finish()
    assert set(both.state_dict()["queues"]) == {"x", "teacher", "label"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"given": ()}, "`input` must be one key or several different ones"),
        ({"given": ("x", "x")}, "`input` must be one key or several different ones"),
        ({"given": ("x", 3)}, "input must be"),
        ({"given": ("x", "label")}, "must be keys of their own"),
        ({"target": ("label", "odd")}, "`metrics` of several targets must be a mapping from each of label, odd"),
        ({"target": {"label": ACCURACY}}, "`metrics` must be left out where `target` gives"),
        (
            {"target": {"label": ACCURACY, "odd": TWO}, "metrics": None, "num_classes": 3},
            "num_classes=3 is of one target",
        ),
        ({"target": {"label": 3}, "metrics": None}, "metrics can only be"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        knn(**options)
    assert knn(target={"label": ACCURACY}, metrics=None).log_keys == knn().log_keys


def test_callbacks_that_would_log_one_key_are_refused():
    with pytest.raises(ValueError, match=r"would both log .*knn_teacher_acc"):
        fitted(knn("knn", ("embedding", "teacher")), knn("knn_teacher", "teacher"))
