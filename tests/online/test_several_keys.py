"""Several keys of features or labels in one callback: the numbers of one callback each."""

import pytest
import torch
from torchmetrics import MeanAbsoluteError
from torchmetrics.classification import MulticlassAccuracy

from faiss_knn import OnlineEvaluator, OnlineKNN
from faiss_knn.online import diagnostics
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


def two_views(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return {"x": x, "other": x + 0.3 * torch.randn(n, 6, generator=generator), "label": torch.arange(n) % 3}


def of_views(columns, **options):
    evaluator = OnlineEvaluator(
        "knn", ("x", "other"), "label", 500, num_classes=3, diagnostics=("uniformity", "view_alignment"), **options
    )
    evaluator.observe(**columns)
    evaluator.start()
    return evaluator.finish()


def test_two_views_of_a_sample_are_aligned():
    views = two_views(200, 0)
    pairs = torch.nn.functional.normalize(views["x"].double()), torch.nn.functional.normalize(views["other"].double())
    expected = (pairs[0] - pairs[1]).square().sum(1)
    values = of_views(views)
    assert set(values) == {"eval/knn_x_uniformity", "eval/knn_other_uniformity", "eval/knn_view_alignment"}
    assert values["eval/knn_view_alignment"] == pytest.approx(expected.mean().item(), rel=1e-6)
    views["x"][3], views["other"][7] = torch.nan, 0.0  # no direction, in one of them
    views["label"][9] = -1
    has = torch.ones(200, dtype=torch.bool).index_fill(0, torch.tensor([3, 7]), False)
    assert of_views(views)["eval/knn_view_alignment"] == pytest.approx(expected[has].mean().item(), rel=1e-6)


def test_views_of_a_sample_are_its_newest():
    views = two_views(300, 0)
    ids = torch.arange(300) % 200
    pairs = (torch.nn.functional.normalize(views[key][100:].double()) for key in ("x", "other"))
    expected = (next(pairs) - next(pairs)).square().sum(1).mean().item()
    assert of_views({**views, "id": ids}, id="id")["eval/knn_view_alignment"] == pytest.approx(expected, rel=1e-6)


def test_of_many_views_a_sample_is_aligned(monkeypatch):
    monkeypatch.setattr(diagnostics, "SAMPLE_ROWS", 50)
    views = two_views(300, 0)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    one = of_views(views)["eval/knn_view_alignment"]
    assert of_views({key: values[order] for key, values in views.items()})["eval/knn_view_alignment"] == one
    monkeypatch.undo()
    assert of_views(views)["eval/knn_view_alignment"] == pytest.approx(one, rel=0.3)
    assert of_views(views)["eval/knn_view_alignment"] != one


def test_the_callback_logs_the_alignment_of_its_banks_views():
    train, val = two_views(200, 0), two_views(64, 1)
    names = ("alignment", "view_alignment")
    for options, loaders in (
        ({}, loader(32, **val)),
        ({"bank_dataloader_idx": 0}, [loader(32, **train), loader(32, **val)]),
    ):
        run = trainer(knn("knn", ("embedding", "other"), diagnostics=names, **options), num_sanity_val_steps=0)
        run.fit(Echo(), loader(32, **train), loaders)
        values = {key: value.item() for key, value in run.callback_metrics.items()}
        assert values["eval/knn_view_alignment"] == of_views(train)["eval/knn_view_alignment"]
        assert "eval/knn_embedding_alignment" in values


def test_what_cannot_be_aligned_is_refused():
    with pytest.raises(
        ValueError, match=r'view_alignment compares two keys .*: give input=\("first", "second"\), got x'
    ):
        knn(given="x", diagnostics="view_alignment")
    wide = knn(given=("x", "teacher"), diagnostics="view_alignment", kind=OnlineEvaluator)
    with pytest.raises(ValueError, match=r"view_alignment needs two inputs of one width, got {'x': 64, 'teacher': 3}"):
        wide.observe(**{**DATA, "teacher": DATA["teacher"][:, :3]})


def test_diagnostics_and_pictures_of_several_inputs_and_targets_are_those_of_a_callback_each():
    names = ("effective_rank", "alignment", "uniformity", "hubness", "neighbor_churn", "duplicate_share")
    options = {"diagnostics": names, "gallery": {"key": "image", "rows": 3}, "id": "id", "kind": OnlineEvaluator}
    targets = {"label": ACCURACY, "odd": TWO, "size": MeanAbsoluteError()}
    train, val = (
        {**part, "size": part["x"].norm(dim=1), "image": part["x"].view(-1, 8, 8)} for part in (DATA, QUERIES)
    )
    each = {
        f"{given}_{target}": knn(f"knn_{given}_{target}", given, target, metrics, **options)
        for given in ("x", "teacher")
        for target, metrics in targets.items()
    }
    together = knn("knn", ("x", "teacher"), targets, None, **options)
    for epoch in range(2):
        values, results = {}, {}
        for evaluator in (*each.values(), together):
            evaluator.observe(**{**train, "x": train["x"].roll(epoch, 1)})
            evaluator.start()
            evaluator.score(**val)
            if evaluator is not together:
                values |= evaluator.finish()
                results |= evaluator.results
        assert together.finish() == values
        assert len([key for key in values if key.endswith("neighbor_churn")]) == (6 if epoch else 0)
        assert "eval/knn_x_size_alignment" not in values  # which is of classes
        assert (
            list(together.results)
            == list(results)
            == [f"eval/knn_{given}_{target}_gallery" for given in ("x", "teacher") for target in ("label", "odd")]
        )
        for key, pictures in results.items():
            assert [p.caption for p in pictures] == [p.caption for p in together.results[key]]
            assert len(pictures) == 3
