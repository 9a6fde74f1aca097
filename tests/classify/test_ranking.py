import numpy as np
import pytest
import torch
from torchmetrics import BootStrapper
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassRecall, MultilabelAccuracy

from faiss_knn import FeatureBank, evaluate
from faiss_knn.classify.ranking import rank_scores, scores_for


def hits(shares, labels, n):
    """(B,) whether the true class has a vote and is among the first n, the lowest id first among equals."""
    return np.array(
        [
            row[truth] > 0 and truth in sorted(range(len(row)), key=lambda c: (-row[c], c))[:n]
            for row, truth in zip(shares, labels, strict=True)
        ]
    )


def noise(rows=400, classes=12, seed=0):
    rng = np.random.default_rng(seed)
    features, queries = rng.normal(size=(rows, 6)), rng.normal(size=(rows // 2, 6))
    return features, rng.integers(0, classes, rows), queries, rng.integers(0, classes, rows // 2)


@pytest.mark.parametrize("k", [1, 3, 20])
@pytest.mark.parametrize("weighting", ["uniform", "inverse", "softmax"])
def test_metrics_of_the_first_classes_count_hits_as_the_records_do(k, weighting):
    bank, bank_labels, queries, labels = noise()
    name = "MulticlassAccuracy(top_k=5, average='micro')"
    (record,) = evaluate(
        bank, bank_labels, queries, labels, k=k, weighting=weighting, temperature=1e-3, metrics=[name]
    ).records
    found = FeatureBank(bank, bank_labels, distance_metric="cosine").predict(queries, k, 1e-3, weighting)
    expected = hits(found.numpy(), labels, 5).mean()
    assert record["top5"] == pytest.approx(expected, abs=1e-12)
    assert record[name] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("metric", [MulticlassAccuracy(7, top_k=2, average="micro"), MulticlassRecall(7, top_k=3)])
def test_equals_and_classes_without_a_vote_are_ranked_for_metrics_of_the_first_classes(metric):
    shares = (torch.randint(0, 4, (300, 7)) / 8).clamp(max=1)
    labels = torch.randint(0, 7, (300,))
    metric.update(scores_for(metric, shares, labels), labels)
    right = hits(shares.numpy(), labels.numpy(), metric.top_k)
    by_class = [right[labels == c].mean() for c in range(7)]
    expected = right.mean() if metric.average == "micro" else np.mean(by_class)
    assert metric.compute().item() == pytest.approx(expected, abs=1e-6)


def test_the_first_rank_is_the_class_that_argmax_picks():
    shares = torch.randint(0, 3, (200, 5)) / 4
    assert torch.equal(rank_scores(shares, torch.full((200,), -1)).argmax(1), shares.argmax(1))


def test_other_metrics_see_the_shares():
    shares, labels = torch.rand(5, 4).softmax(1), torch.randint(0, 4, (5,))
    for metric in (MulticlassAccuracy(4), MulticlassAUROC(4), BootStrapper(MulticlassAccuracy(4), 2)):
        assert scores_for(metric, shares, labels) is shares
    multi_hot = torch.randint(0, 2, (5, 4))
    assert scores_for(MultilabelAccuracy(4), shares, multi_hot) is shares
    wrapped = BootStrapper(MulticlassAccuracy(4, top_k=2), 2)
    assert torch.equal(scores_for(wrapped, shares, labels), rank_scores(shares, labels))
