"""Lists of neighbours in float64, and the digits that they are of."""

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits


def digits():
    data = load_digits()
    return data.data, data.target


def own_lists(rows, k):
    """Distances and row numbers of each row's k nearest others, equal ones by number on any machine."""
    distances = cdist(rows, rows)
    np.fill_diagonal(distances, np.inf)
    order = distances.argsort(axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), order
