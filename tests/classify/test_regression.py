"""Means of neighbours' numbers, by scikit-learn's regressor and by a loop in float64."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsRegressor

from faiss_knn import FeatureBank
from faiss_knn.classify.regression import neighbor_means, read_targets

WEIGHTS = {
    "inverse": lambda distances: 1 / (distances + 0.3),
    "softmax": lambda distances: np.exp(-distances / 0.3),
    "uniform": "uniform",
}
RANDOM = torch.Generator().manual_seed(0)
X, QUERIES = torch.randn(300, 6, generator=RANDOM), torch.randn(40, 6, generator=RANDOM)


@pytest.mark.parametrize("weighting", WEIGHTS)
@pytest.mark.parametrize("columns", [(), (3,)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_means_are_those_of_scikit_learn(weighting, columns, dtype):
    targets = 100 * torch.randn(300, *columns, generator=RANDOM, dtype=dtype)
    bank = FeatureBank(X, targets, task="regression")
    found = bank.predict(QUERIES, k=7, temperature=0.3, weighting=weighting)
    oracle = KNeighborsRegressor(7, weights=WEIGHTS[weighting]).fit(X.double(), targets.double())
    assert found.dtype == dtype
    assert found.shape == (40, *columns)
    np.testing.assert_allclose(found, oracle.predict(QUERIES.double()), rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("weighting", WEIGHTS)
def test_sums_are_in_float64_and_the_same_in_any_batch_and_order(weighting):
    distances = torch.rand(30, 20, generator=RANDOM).round(decimals=1)  # of which many are equal
    targets = torch.randn(30, 20, 2, generator=RANDOM, dtype=torch.float64) * 10.0 ** torch.arange(20)[:, None]
    found = distances < 0.95
    options = {"temperature": 0.3, "weighting": weighting}
    means = neighbor_means(distances, found, targets, **options)
    for row in range(30):
        weights = [1 / (d + 0.3) if weighting == "inverse" else np.exp(-d / 0.3) if weighting == "softmax" else 1.0
                   for d in distances[row].double().numpy()]  # fmt: skip
        parts = [(w, t) for w, t, there in zip(weights, targets[row].numpy(), found[row], strict=True) if there]
        expected = sum(w * t for w, t in parts) / sum(w for w, _ in parts)
        np.testing.assert_allclose(means[row], expected, rtol=1e-11)
        assert torch.equal(
            means[row : row + 1], neighbor_means(*(p[row : row + 1] for p in (distances, found, targets)), **options)
        )
    order = torch.randperm(20, generator=RANDOM)
    of_equals = torch.stack([order[distances[row][order].sort(stable=True).indices] for row in range(30)])
    by_distance = distances.sort(dim=1, stable=True).indices
    moved = [
        neighbor_means(*(part[torch.arange(30)[:, None], places] for part in (distances, found, targets)), **options)
        for places in (by_distance, of_equals)
    ]
    assert torch.equal(*moved)


def test_missing_neighbours_weigh_nothing():
    distances, targets = torch.tensor([[1.0, torch.inf], [torch.inf] * 2]), torch.tensor([[4.0, torch.nan]] * 2)
    means = neighbor_means(distances, distances.isfinite(), targets, weighting="softmax", temperature=1e-4)
    assert means[0].item() == 4.0
    assert means[1].isnan().item()


def test_rows_without_a_number_are_left_out():
    labels = torch.tensor([1.0, torch.nan, 3.0, -9.0])
    bank = FeatureBank(torch.arange(4.0)[:, None], labels, task="regression", ignore_index=-9)
    assert len(bank) == 2
    assert bank.neighbors(torch.tensor([[1.1]]), 2).indices.tolist() == [[2, 0]]
    assert bank.predict(torch.tensor([[1.5]]), k=9, weighting="uniform").tolist() == [2.0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0.5], [1.5]], [0.5, 1.5]),
        (np.array([1.0, np.inf, np.nan]), [1.0, torch.nan, torch.nan]),
        (torch.tensor([[1.0, torch.nan], [2.0, 3.0]], dtype=torch.bfloat16), [[torch.nan] * 2, [2.0, 3.0]]),
        (torch.tensor([[1, 0], [-1, -1], [0, 0]]), [[1.0, 0.0], [torch.nan] * 2, [0.0, 0.0]]),
    ],
    ids=str,
)
def test_what_numbers_are(values, expected):
    torch.testing.assert_close(
        read_targets(values, "`labels`").double(), torch.tensor(expected).double(), equal_nan=True
    )


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.arange(4), {}, r"`labels` must be floats where neighbours' means are scored, got torch.int64"),
        (torch.arange(8).reshape(4, 2), {}, r"`labels` must be floats .* cast numbers with .float\(\)"),
        (torch.ones(4, 2, 2), {}, r"`labels` must be \(N,\) or \(N, D\) numbers, got shape \(4, 2, 2\)"),
        (torch.ones(3), {}, r"`labels` must be \(4,\) or \(4, D\) numbers"),
        (torch.full((4,), torch.nan), {}, "must have a finite number in one row at least, got 4 rows without"),
        (["a", "b", "c", "d"], {}, "must be numbers, got text"),
        (torch.ones(4), {"num_classes": 3}, "`num_classes` and `renumber` are of classes"),
        (torch.ones(4), {"task": "regress"}, "`task` must be one of classification, regression, got 'regress'"),
    ],
    ids=str,
)
def test_what_is_no_number_is_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        FeatureBank(torch.rand(4, 2), labels, **{"task": "regression"} | options)
