"""Ranking metrics against their definitions, and against the libraries that define the same."""

import math

import numpy as np
import pytest
import torch
from torchmetrics.functional import retrieval as torchmetrics_retrieval

from faiss_knn.measures.retrieval import retrieval_by_class, retrieval_metrics


def by_definition(lists, queries, counts, ks):
    """Every metric, query by query, from the formulas alone."""
    sums: dict[str, list[float]] = {}
    for row, label, R in zip(lists.tolist(), queries.tolist(), counts.tolist(), strict=True):
        if R == 0:
            continue
        rel = [int(x == label and x >= 0) for x in row]
        precision = [sum(rel[: i + 1]) / (i + 1) for i in range(len(rel))]
        one = {}
        for k in ks:
            one[f"precision@{k}"] = sum(rel[:k]) / k
            one[f"hit_rate@{k}"] = float(any(rel[:k]))
            one[f"recall@{k}"] = sum(rel[:k]) / R
            one[f"map@{k}"] = sum(p * r for p, r in zip(precision[:k], rel[:k], strict=True)) / min(R, k)
            ideal = sum(1 / math.log2(i + 2) for i in range(min(R, k)))
            one[f"ndcg@{k}"] = sum(r / math.log2(i + 2) for i, r in enumerate(rel[:k])) / ideal
        one["mrr"] = 1 / (rel.index(1) + 1) if any(rel) else 0.0
        one["r_precision"] = sum(rel[:R]) / R
        one["map@r"] = sum(p * r for p, r in zip(precision[:R], rel[:R], strict=True)) / R
        for name, value in one.items():
            sums.setdefault(name, []).append(value)
    return {name: float(np.mean(values)) for name, values in sums.items()}


def ranked_bank(seed, n=60, num_queries=25, classes=5):
    """Whole rankings of a bank, so that R is what the lists hold; class 9 is in no bank row."""
    rng = np.random.default_rng(seed)
    bank = rng.integers(0, classes, n)
    queries = rng.integers(0, classes, num_queries)
    queries[0] = 9
    order = np.argsort(rng.random((num_queries, n)), axis=1)
    counts = (bank[None] == queries[:, None]).sum(1)
    return torch.tensor(bank[order]), torch.tensor(queries), torch.tensor(counts)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length", [8, 60])
def test_every_metric_equals_its_definition(seed, length):
    lists, queries, counts = ranked_bank(seed)
    lists = lists[:, :length].clone()
    lists[3, 2:] = -1
    got = retrieval_metrics(lists, queries, counts, ks=[1, 5, 8])
    assert got == pytest.approx(by_definition(lists, queries, counts, [1, 5, 8]), rel=1e-12)


@pytest.mark.parametrize("k", [1, 4, 20])
def test_agrees_with_torchmetrics_where_it_defines_the_same(k):
    lists, queries, counts = ranked_bank(7)
    got = retrieval_metrics(lists, queries, counts, ks=[k])
    scores = torch.arange(lists.shape[1], 0, -1).float()
    theirs = {
        f"precision@{k}": torchmetrics_retrieval.retrieval_precision,
        f"recall@{k}": torchmetrics_retrieval.retrieval_recall,
        f"hit_rate@{k}": torchmetrics_retrieval.retrieval_hit_rate,
        f"ndcg@{k}": torchmetrics_retrieval.retrieval_normalized_dcg,
    }
    judged = [i for i in range(len(lists)) if counts[i] > 0]
    for name, function in theirs.items():
        values = [function(scores, lists[i] == queries[i], top_k=k).item() for i in judged]
        assert got[name] == pytest.approx(np.mean(values), abs=1e-6), name
    whole = {
        "mrr": torchmetrics_retrieval.retrieval_reciprocal_rank,
        "r_precision": torchmetrics_retrieval.retrieval_r_precision,
    }
    for name, function in whole.items():
        values = [function(scores, lists[i] == queries[i]).item() for i in judged]
        assert got[name] == pytest.approx(np.mean(values), abs=1e-6), name
    whole_map = [torchmetrics_retrieval.retrieval_average_precision(scores, lists[i] == queries[i]) for i in judged]
    full = retrieval_metrics(lists, queries, counts, ks=[lists.shape[1]])
    assert full[f"map@{lists.shape[1]}"] == pytest.approx(np.mean(whole_map), abs=1e-6)


def test_agrees_with_pytorch_metric_learning():
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    generator = torch.Generator().manual_seed(3)
    bank, queries = (torch.randn(n, 6, generator=generator) for n in (80, 30))
    bank_labels, query_labels = (torch.randint(0, 4, (n,), generator=generator) for n in (80, 30))
    theirs = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r", "mean_reciprocal_rank"),
        k=None,
        device=torch.device("cpu"),
    ).get_accuracy(queries, query_labels, bank, bank_labels)
    order = torch.cdist(queries.double(), bank.double()).argsort(dim=1)
    counts = (bank_labels[None] == query_labels[:, None]).sum(1)
    got = retrieval_metrics(bank_labels[order], query_labels, counts, ks=[1])
    assert got["precision@1"] == pytest.approx(theirs["precision_at_1"])
    assert got["r_precision"] == pytest.approx(theirs["r_precision"])
    assert got["map@r"] == pytest.approx(theirs["mean_average_precision_at_r"])
    assert got["mrr"] == pytest.approx(theirs["mean_reciprocal_rank"])


def test_a_missing_neighbour_is_not_relevant_to_an_unlabelled_query():
    got = retrieval_metrics(torch.tensor([[-1, -1]]), torch.tensor([-1]), torch.tensor([1]), ks=[2])
    assert got["precision@2"] == 0


def test_no_query_with_relevant_rows_is_not_a_number():
    got = retrieval_metrics(torch.tensor([[1, 2]]), torch.tensor([1]), torch.tensor([0]), ks=[1])
    assert all(math.isnan(value) for value in got.values())


@pytest.mark.parametrize(
    ("lists", "queries", "counts", "ks", "message"),
    [
        ([1, 2], [1], [1], [1], r"`neighbor_labels` must be \(B, K\)"),
        ([[1, 2]], [1, 2], [1], [1], "`query_labels` must have one entry per list"),
        ([[1, 2]], [1], [1, 1], [1], "`relevant_counts` must have one entry per list"),
        ([[1.0, 2.0]], [1], [1], [1], "`neighbor_labels` must be integer"),
        ([[1, 2]], [1], [1], [3], r"`ks` must lie in \[1, K=2\], got \[3\]"),
        ([[1, 2]], [1], [1], [0], r"`ks` must lie in \[1, K=2\], got \[0\]"),
        ([[1, 1]], [1], [1], [1], "got 1 for a list that holds 2"),
        ([[1, 1]], [1], [-1], [1], "`relevant_counts` must be numbers of rows"),
        ([[1, 1]], [1], [float("nan")], [1], "`relevant_counts` must be numbers of rows"),
        ([[1, 1]], [1], [2], ["1"], "`ks` must be integers"),
        ([[1, 1]], [1], [2], 1, "`ks` must be integers"),
    ],
)
def test_bad_input_is_named(lists, queries, counts, ks, message):
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(torch.tensor(lists), torch.tensor(queries), torch.tensor(counts), ks)


def test_arrays_and_lists_are_read_like_tensors():
    lists, queries, counts = [[3, 1, -1], [2, 2, 0]], [1, 2], [2, 3]
    expected = retrieval_metrics(torch.tensor(lists), torch.tensor(queries), torch.tensor(counts), [1, 2])
    narrow = np.array(lists, np.int8), np.array(queries, np.uint16), np.array(counts, np.uint64)
    assert retrieval_metrics(*narrow, ks=np.array([2, 1], np.int32)) == expected
    assert retrieval_metrics(lists, queries, counts, ks=(1, 2)) == expected


def test_by_class_each_metric_is_that_of_the_class_alone():
    rng = np.random.default_rng(3)
    lists, truth = torch.from_numpy(rng.integers(0, 4, (60, 12))), torch.from_numpy(rng.integers(0, 4, 60))
    relevant = (lists == truth[:, None]).sum(1) + torch.from_numpy(rng.integers(0, 3, 60))
    relevant[truth == 2] = 0
    lists[truth == 2] = 0
    found = retrieval_by_class(lists, truth, relevant, [3, 12], num_classes=6)
    for c in (0, 1, 3):
        alone = retrieval_metrics(lists[truth == c], truth[truth == c], relevant[truth == c], [3, 12])
        assert {name: value[c].item() for name, value in found.items()} == pytest.approx(alone)
    assert all(value[[2, 4, 5]].isnan().all() and len(value) == 6 for value in found.values())
