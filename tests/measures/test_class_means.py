"""Means by class against a loop over the classes."""

import numpy as np
import torch

from faiss_knn.measures.class_means import class_means


def test_means_are_over_the_queries_of_each_class():
    rng = np.random.default_rng(0)
    hits, classes = rng.random(60) < 0.4, rng.integers(0, 5, 60)
    got = class_means(torch.from_numpy(hits), torch.from_numpy(classes), 6).numpy()
    np.testing.assert_array_equal(got, [*(hits[classes == c].mean() for c in range(5)), np.nan])
