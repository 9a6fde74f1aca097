"""Diagnostics of a bank: the values of the pure functions, on a sample that depends on the rows alone."""

import math

import lightning as L
import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from faiss_knn import OnlineKNN
from faiss_knn.measures.alignment import label_alignment
from faiss_knn.measures.duplicate_share import duplicate_share
from faiss_knn.measures.effective_rank import effective_rank
from faiss_knn.measures.uniformity import uniformity
from faiss_knn.online import diagnostics as diagnostics_module
from faiss_knn.online.diagnostics import Diagnostics
from faiss_knn.online.options import DIAGNOSTICS
from faiss_knn.online.run_memory import LabelledFeatures, RunMemory
from tests.online.parts import Echo, clusters, loader, trainer
from tests.reference import brute_force

ROWS = {**clusters(120, d=12), "id": torch.arange(120) * 7}
ALL = LabelledFeatures(ROWS["x"], ROWS["label"], ROWS["id"])


def knn(name="knn", **options):
    return OnlineKNN(name, **{"input": "embedding", "target": "label", "queue_length": 500, "id": "id"} | options)


def values(rows, *names, memory=None, **options):
    options = knn(diagnostics=names, **options)
    return Diagnostics(options, memory or RunMemory(options.new_index())).values(rows)


def lists(features, distance_metric="euclidean"):
    """The ten nearest others of each row."""
    _, found = brute_force(features.numpy(), features.numpy(), len(features), distance_metric)
    return np.array([[row for row in order if row != own][:10] for own, order in enumerate(found)])


def skew(features, distance_metric="euclidean"):
    counts = np.bincount(lists(features, distance_metric).ravel(), minlength=len(features))
    return ((counts - counts.mean()) ** 3).mean() / counts.std() ** 3


class Moving(Echo):
    """Features of the second epoch are others."""

    def step(self, batch):
        turned = batch["x"].flip(1).cumsum(1) if self.current_epoch else batch["x"]
        return {"loss": self.weight.sum(), "embedding": turned}


class Epochs(L.Callback):
    def __init__(self):
        self.epochs = []

    def on_validation_end(self, trainer, pl_module):
        self.epochs.append({key: value.item() for key, value in trainer.callback_metrics.items()})


def test_each_is_logged_under_its_name():
    seen = Epochs()
    run = trainer(knn(diagnostics=DIAGNOSTICS), seen, max_epochs=2, num_sanity_val_steps=0)
    run.fit(Moving(), loader(**ROWS), loader(**ROWS))
    x, turned = ROWS["x"], ROWS["x"].flip(1).cumsum(1)
    for features, epoch in zip((x, turned), seen.epochs, strict=True):
        expected = {
            "eval/knn_effective_rank": effective_rank(features),
            "eval/knn_alignment": label_alignment(features, ROWS["label"]),
            "eval/knn_uniformity": uniformity(features),
            "eval/knn_hubness": skew(features),
            "eval/knn_duplicate_share": 0.0,
        }
        assert {key: epoch[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert "eval/knn_neighbor_churn" not in seen.epochs[0]
    gone = [10 - len(set(before) & set(now)) for before, now in zip(lists(x), lists(turned), strict=True)]
    assert seen.epochs[1]["eval/knn_neighbor_churn"] == pytest.approx(sum(gone) / 1200)
    assert 0.1 < sum(gone) / 1200 < 0.9


def test_none_is_logged_unasked():
    run = trainer(knn(diagnostics="hubness"))
    run.fit(Echo(), loader(**ROWS), loader(**ROWS))
    assert [key for key in run.callback_metrics if key.startswith("eval/")] == ["eval/knn_hubness"]


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "manhattan"])
def test_hubs_are_those_of_the_distance(metric):
    assert values(ALL, "hubness", distance_metric=metric) == {"hubness": pytest.approx(skew(ALL.features, metric))}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("with_ids", [True, False])
def test_a_sample_depends_on_the_rows_alone(dtype, with_ids, monkeypatch):
    monkeypatch.setattr(diagnostics_module, "SAMPLE_ROWS", 50)
    monkeypatch.setattr(diagnostics_module, "_KEY_BLOCK", 32)
    order = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    rows = LabelledFeatures(ROWS["x"].to(dtype), ROWS["label"], ROWS["id"] if with_ids else None)
    other = LabelledFeatures(*(None if part is None else part[order] for part in rows))
    names = [name for name in DIAGNOSTICS if name != "neighbor_churn"]
    assert values(rows, *names) == values(other, *names)
    assert values(rows, "effective_rank") != {"effective_rank": effective_rank(rows.features)}


def test_they_are_computed_on_one_thread(monkeypatch):
    seen = []

    def measure(*_):
        seen.append(torch.get_num_threads())
        return 0.0

    monkeypatch.setitem(diagnostics_module._MEASURES, "effective_rank", measure)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        values(ALL, "effective_rank")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert seen == [1]


def test_with_ids_it_is_of_the_same_samples_each_time(monkeypatch):
    monkeypatch.setattr(diagnostics_module, "SAMPLE_ROWS", 30)
    memory = RunMemory(knn().new_index())
    assert values(ALL, "neighbor_churn", memory=memory) == {}
    first = memory.last_sample.ids
    assert values(ALL._replace(features=ALL.features * 2), "neighbor_churn", memory=memory) == {"neighbor_churn": 0.0}
    assert torch.equal(memory.last_sample.ids, first)
    assert len(set(first.tolist())) == 30


def test_churn_is_among_the_samples_that_both_banks_hold():
    memory = RunMemory(knn().new_index())
    first = LabelledFeatures(*(part[:80] for part in ALL))
    second = LabelledFeatures(*(part[30:] for part in ALL._replace(features=ALL.features.cumsum(1))))
    values(first, "neighbor_churn", memory=memory)
    found = values(second, "neighbor_churn", memory=memory)["neighbor_churn"]
    common = slice(30, 80)
    before, now = lists(ALL.features[common]), lists(ALL.features.cumsum(1)[common])
    assert found == pytest.approx(np.mean([len(set(a) - set(b)) / 10 for a, b in zip(before, now, strict=True)]))


def test_copies_are_drawn_together(monkeypatch):
    monkeypatch.setattr(diagnostics_module, "SAMPLE_ROWS", 200)
    rows = clusters(1000, d=12)
    twice = LabelledFeatures(rows["x"].repeat(2, 1), rows["label"].repeat(2), torch.arange(2000))
    assert values(twice, "duplicate_share") == {"duplicate_share": pytest.approx(0.5, abs=0.01)}
    quarter = LabelledFeatures(*(part[:1250] for part in twice))
    assert duplicate_share(quarter.features) == 0.2
    assert values(quarter, "duplicate_share")["duplicate_share"] == pytest.approx(0.2, abs=0.05)


def test_ids_that_follow_each_other_are_drawn_at_random(monkeypatch):
    monkeypatch.setattr(diagnostics_module, "SAMPLE_ROWS", 500)
    memory = RunMemory(knn().new_index())
    values(
        LabelledFeatures(torch.rand(5000, 8), torch.zeros(5000).long(), torch.arange(5000)),
        "neighbor_churn",
        memory=memory,
    )
    drawn = memory.last_sample.ids.sort().values
    assert drawn.double().mean() == pytest.approx(2500, abs=4 * 5000 / math.sqrt(12 * 500))
    assert drawn.diff().unique().numel() > 20  # a regular pattern has few gaps


def test_rows_without_direction_are_left_out_where_it_counts():
    features = torch.cat([ALL.features, torch.zeros(20, 12)])
    rows = LabelledFeatures(features, torch.cat([ALL.labels, torch.zeros(20).long()]))
    expected = {"alignment": label_alignment(*ALL[:2]), "uniformity": uniformity(ALL.features)}
    assert values(rows, "alignment", "uniformity") == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rows", "name", "why"),
    [
        (LabelledFeatures(torch.eye(12), torch.arange(12)), "alignment", "no class has two rows"),
        (LabelledFeatures(torch.eye(12), torch.eye(12).long()), "alignment", "labels are not one class id a row"),
        (LabelledFeatures(torch.eye(12) * 0, torch.arange(12)), "uniformity", "fewer than two rows have a direction"),
        (LabelledFeatures(torch.eye(10), torch.arange(10)), "hubness", "no more than 10 rows"),
    ],
)
def test_what_has_no_value_is_left_out_and_said_once(rows, name, why, logged):
    memory = RunMemory(knn().new_index())
    assert values(rows, name, memory=memory) == values(rows, name, memory=memory) == {}
    (message,) = logged
    assert message.startswith(f"OnlineKNN[knn]: {name} is left out where ")
    assert why in message


@pytest.mark.parametrize(
    ("features", "what"),
    [
        (torch.ones(200, 12) * 3, "all equal"),
        (torch.randn(200, 1) * torch.arange(1.0, 13) + 5, "all along one direction"),
    ],
)
def test_a_collapsed_network_is_named_once_unasked(features, what, logged):
    collapsed = {**clusters(200, d=12), "x": features}
    run = trainer(knn(id=None, metrics=MulticlassAccuracy(4)), max_epochs=2)
    run.fit(Echo(), loader(**collapsed), loader(**collapsed))
    (message,) = [message for message in logged if "collapsed" in message]
    assert f"the features in its bank are {what}, so that their neighbours say nothing" in message


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_one_that_has_not_is_not(offset, logged):
    rows = {**clusters(200, d=12), "x": clusters(200, d=12)["x"] + offset}
    trainer(knn(id=None)).fit(Echo(), loader(**rows), loader(**rows))
    assert not [message for message in logged if "collapsed" in message]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"diagnostics": ["hubnes"]}, "`diagnostics` must be one of effective_rank, alignment, .*, got 'hubnes'"),
        ({"diagnostics": None}, "`diagnostics` must be one of effective_rank, .*, got None"),
        ({"diagnostics": "neighbor_churn", "id": None}, "neighbor_churn needs to know .*: give `id`"),
        (
            {"diagnostics": "hubness", "metrics": {"hubness": MulticlassAccuracy(4)}},
            "`metrics` must have other names than `diagnostics`, got hubness",
        ),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        knn(**options)


def test_two_callbacks_may_not_log_one_key():
    first = knn("a", diagnostics="hubness")
    second = knn("a_k5", metrics={"hubness": MulticlassAccuracy(4)})
    assert "a_hubness" in first.log_keys
    assert not first.log_keys & second.log_keys
