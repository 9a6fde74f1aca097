"""Confused pairs against scikit-learn's matrix."""

import numpy as np
from sklearn.metrics import confusion_matrix

from faiss_knn.measures.confusion import confused_pairs


def test_they_are_the_matrix_off_its_diagonal():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(0, 5, 300), rng.integers(0, 5, 300)
    matrix = confusion_matrix(labels, predictions)
    pairs = confused_pairs(labels, predictions, 5)
    assert pairs.counts.tolist() == sorted(pairs.counts.tolist(), reverse=True)
    rebuilt = np.zeros((5, 5), int)
    rebuilt[pairs.labels, pairs.predictions] = pairs.counts
    assert (rebuilt == matrix - np.diag(matrix.diagonal())).all()
    assert np.allclose(pairs.shares, pairs.counts / matrix.sum(1)[pairs.labels])


def test_unknown_labels_and_predictions_are_in_no_pair():
    pairs = confused_pairs(np.array([-1, 0, 0, 1]), np.array([1, -1, 1, 1]), 2)
    assert [x.tolist() for x in pairs] == [[0], [1], [1], [0.5]]
    assert not len(confused_pairs(np.array([0, 1]), np.array([0, 1]), 2).counts)
