"""The order of candidates: by distance, equal ones by number, missing ones last."""

import numpy as np
import pytest
import torch

from faiss_knn.search.engines.rerank import nearest


def candidates(levels, missing):
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(500, generator=generator)[:24] for _ in range(200)])
    distances = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    if levels:
        distances = (distances * levels).floor()
    gone = torch.rand(ids.shape, generator=generator) < missing
    return distances.masked_fill(gone, torch.inf), ids.masked_fill(gone, -1)


@pytest.mark.parametrize("k", [1, 5, 23, 24])
@pytest.mark.parametrize(("levels", "missing"), [(0, 0.0), (1000, 0.0), (7, 0.0), (0, 0.5), (7, 1.0)])
def test_equal_distances_are_ordered_by_number_and_missing_ones_come_last(levels, missing, k):
    distances, ids = candidates(levels, missing)
    numbers = torch.where(ids < 0, 1000, ids)
    found, order = nearest(distances, ids, k)
    for row in range(len(ids)):
        expected = np.lexsort((numbers[row].numpy(), distances[row].numpy()))[:k]
        assert torch.equal(order[row], ids[row, expected])
        assert torch.equal(found[row], distances[row, expected])


def test_two_equal_ones_of_which_one_is_left_over():
    """The last that is kept and the next are compared too."""
    distances, ids = torch.tensor([[1.0, 2.0, 2.0]], dtype=torch.float64), torch.tensor([[9, 8, 4]])
    assert nearest(distances.repeat(50, 1), ids.repeat(50, 1), 2)[1].tolist() == [[9, 4]] * 50
