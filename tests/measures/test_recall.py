"""Recall of an index against sets of ids and distances, query by query."""

import numpy as np
import pytest
import torch

from faiss_knn.measures.recall import recalls


def by_definition(distances, indices, exact_distances, exact_indices):
    near = same = 0
    for row in range(len(indices)):
        limit = max(exact_distances[row]) * (1 + 1e-5)
        near += sum(d <= limit for d, i in zip(distances[row], indices[row], strict=True) if i >= 0)
        same += len(set(indices[row]) & set(exact_indices[row]))
    return near / indices.size, same / indices.size


def test_recall_is_the_share_of_exact_neighbours_that_were_found():
    rng = np.random.default_rng(0)
    table = rng.integers(1, 9, (30, 40)) / 4  # many equal distances
    exact = np.argsort(table, axis=1, kind="stable")[:, :7]
    found = np.stack([rng.permutation(40)[:7] for _ in range(30)])
    lists = [np.take_along_axis(table, found, 1), found, np.take_along_axis(table, exact, 1), exact]
    lists[0][:, 5:], lists[1][:, 5:] = np.inf, -1
    assert recalls(*map(torch.from_numpy, lists)) == pytest.approx(by_definition(*lists))


def test_another_row_of_the_same_distance_is_no_miss():
    exact = torch.tensor([[0.5, 1.0, 1.0]]), torch.tensor([[4, 1, 2]])
    assert recalls(torch.tensor([[0.5, 1.0, 1.0]]), torch.tensor([[4, 3, 7]]), *exact) == (1.0, pytest.approx(1 / 3))
    assert recalls(torch.tensor([[0.5, 1.1, float("inf")]]), torch.tensor([[4, 9, -1]]), *exact)[0] == pytest.approx(
        1 / 3
    )
    with pytest.raises(ValueError, match="a row twice"):
        recalls(torch.tensor([[0.5, 0.5, 1.0]]), torch.tensor([[4, 4, 1]]), *exact)
