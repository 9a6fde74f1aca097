"""Hubness against a loop that counts, and on real data of which it is known."""

from collections import Counter

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from faiss_knn import KNNIndex
from faiss_knn.measures import hubness as hubness_module
from faiss_knn.measures.hubness import hubness, k_occurrences, skewness

LISTS = np.random.default_rng(0).integers(-1, 40, (300, 5))


@pytest.mark.parametrize("block", [7, 1 << 22])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda lists: lists.astype(np.int32)])
def test_a_row_occurs_as_often_as_lists_hold_it(kind, block, monkeypatch):
    monkeypatch.setattr(hubness_module, "_BLOCK", block)
    counted = Counter(LISTS.ravel().tolist())
    assert k_occurrences(kind(LISTS), 45).tolist() == [counted[row] for row in range(45)]


def test_hubs_and_antihubs_are_those_of_the_counts():
    found = hubness(LISTS, 45, worst=3)
    counted = Counter(LISTS[LISTS >= 0].tolist())
    ordered = sorted(range(45), key=lambda row: (-counted[row], row))[:3]
    assert found.hubs.tolist() == ordered
    assert found.hub_counts.tolist() == [counted[row] for row in ordered]
    assert found.hub_share == sum(counted[row] for row in ordered) / counted.total()
    assert found.antihub_share == 5 / 45  # rows 40 to 44


def test_skewness_is_the_third_moment():
    counts = np.random.default_rng(1).poisson(3, 1000)
    mean = sum(counts.tolist()) / 1000
    second, third = (sum((count - mean) ** power for count in counts.tolist()) / 1000 for power in (2, 3))
    assert skewness(torch.from_numpy(counts)) == pytest.approx(third / second**1.5, rel=1e-12)


def test_equal_counts_have_no_skew():
    assert skewness(torch.full((7,), 3)) == 0.0
    ring = np.arange(10)[:, None]
    assert hubness((ring + 1) % 10, 10)[:2] == (0.0, 0.0)


def test_more_dimensions_have_more_hubs():
    random = torch.Generator().manual_seed(0)
    skews = []
    for width in (3, 100):
        rows = torch.randn(1000, width, generator=random)
        neighbors = KNNIndex().build(rows).search(rows, 11).indices[:, 1:]
        skews.append(hubness(neighbors, 1000).skewness)
    assert skews[0] < 0.5 < 2 < skews[1]  # figure 1 of Radovanović et al.: none in 3 dimensions, many in 100


def test_a_row_in_the_middle_is_the_hub_of_all():
    rows = torch.eye(50)  # all as far from each other, and nearer to their mean
    bank = torch.cat([rows, rows.mean(0, keepdim=True)])
    found = hubness(KNNIndex().build(bank).search(rows, 2).indices[:, 1:], 51, worst=1)
    assert (found.hubs.tolist(), found.hub_counts.tolist(), found.hub_share) == ([50], [50], 1.0)
    assert found.antihub_share == 50 / 51
    assert found.skewness == pytest.approx(49 / 50**0.5)  # of one number among equal others


def test_real_digits_have_few_hubs():
    digits = torch.from_numpy(load_digits().data).float()
    neighbors = KNNIndex().build(digits).search(digits, 6).indices
    own = torch.arange(len(digits))[:, None]
    assert (neighbors[:, :1] == own).all()
    counted = Counter(neighbors[:, 1:].flatten().tolist())
    found = hubness(neighbors[:, 1:], len(digits))
    assert found.hub_counts[0] == max(counted.values())
    assert 0 < found.skewness < 1.5


def test_nothing_found_has_no_hubs():
    found = hubness(np.full((4, 3), -1), 6)
    assert (found.skewness, found.antihub_share, found.hub_share, found.hubs.tolist()) == (0.0, 1.0, 0.0, [])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: k_occurrences(LISTS, 39), "`indices` must be rows of a bank of 39, or -1, got 39"),
        (lambda: k_occurrences(LISTS[0], 45), r"`indices` must be a \(B, k\) integer array of neighbours"),
        (lambda: k_occurrences(LISTS * 0.5, 45), r"`indices` must be a \(B, k\) integer array of neighbours"),
        (lambda: k_occurrences(LISTS, 0), "`rows` must be a positive integer, got 0"),
        (lambda: hubness(LISTS, 45, worst=-1), "`worst` must be how many hubs are named, 0 or more, got -1"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
