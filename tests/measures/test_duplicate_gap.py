"""The gap parts planted copies from ordinary neighbours, and is not seen where there are none."""

import numpy as np
import pytest

from faiss_knn.measures.duplicate_gap import ROUNDING, duplicate_gap
from tests.measures.lists import digits, own_lists

ROWS, LABELS = digits()


def planted(noise, copies=100, seed=1):
    rng = np.random.default_rng(seed)
    source = rng.choice(len(ROWS), copies, replace=False)
    return np.concatenate([ROWS, ROWS[source] + noise * rng.standard_normal((copies, 64))]), source


@pytest.mark.parametrize("noise", [0.0, 0.01, 0.25, 0.5])
def test_copies_with_small_noise_are_below_it_and_others_above(noise):
    rows, source = planted(noise)
    distances, indices = own_lists(rows, 20)
    length = duplicate_gap(distances.ravel(), float(np.median(distances[:, -1])))
    partner = np.full(len(rows), -1)
    partner[source], partner[len(ROWS) :] = len(ROWS) + np.arange(100), source
    is_copy = indices == partner[:, None]
    below = distances <= length
    assert (below & is_copy).sum() == 200
    assert below.sum() <= 202  # two of the digits are nearly alike themselves


def test_all_rows_may_have_a_copy():
    rows = np.concatenate([ROWS, ROWS + 0.1])
    distances, _ = own_lists(rows, 20)
    length = duplicate_gap(distances.ravel(), float(np.median(distances[:, -1])))
    assert (distances[:, 0] <= length).all()
    assert (distances[:, 1] > length).sum() >= len(rows) - 4


@pytest.mark.parametrize("dim", [2, 4, 16, 64])
def test_without_copies_there_is_none(dim):
    seen = 0
    for seed in range(20):
        distances, _ = own_lists(np.random.default_rng(seed).standard_normal((150, dim)), 10)
        seen += duplicate_gap(distances.ravel(), float(np.median(distances[:, -1]))) is not None
    assert seen <= 1


def test_copies_alone_tell_nothing():
    assert duplicate_gap(np.zeros(50), 0.0) is None
    assert duplicate_gap(np.full(50, 0.5 * ROUNDING), 1.0) is None
