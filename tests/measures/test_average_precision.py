"""Average precision against its definition, threshold by threshold."""

import numpy as np
import pytest
import torch

from faiss_knn.measures.average_precision import average_precisions


def by_definition(scores, truth):
    value, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        above = scores >= threshold
        reached = truth[above].sum() / truth.sum()
        value += (reached - recall) * truth[above].mean()
        recall = reached
    return value


def test_queries_of_equal_score_form_one_threshold():
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 6, (50, 4)) / 8, rng.integers(0, 2, (50, 4))
    got = average_precisions(torch.from_numpy(scores), torch.from_numpy(truth))
    assert got.tolist() == pytest.approx([by_definition(scores[:, c], truth[:, c]) for c in range(4)])


def test_a_class_that_no_query_has_has_no_average_precision():
    assert average_precisions(torch.ones(3, 1), torch.zeros(3, 1)).isnan().all()
