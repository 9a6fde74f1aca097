"""Lists of neighbours in float64, and the digits that they are of."""

from sklearn.datasets import load_digits
from sklearn.neighbors import NearestNeighbors


def digits():
    data = load_digits()
    return data.data, data.target


def own_lists(rows, k):
    """Distances and row numbers of each row's k nearest others."""
    return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(rows).kneighbors()
