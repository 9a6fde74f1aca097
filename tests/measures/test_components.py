"""Components against scipy's, whatever the order and the blocks of the pairs."""

import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from faiss_knn.measures.components import Components, groups_of


@pytest.mark.parametrize("edges", [0, 1, 50, 150, 400])
@pytest.mark.parametrize("blocks", [1, 7])
def test_they_are_those_of_the_graph(edges, blocks):
    rng = np.random.default_rng(edges)
    left, right = rng.integers(0, 200, (2, edges))
    components = Components(200)
    for part in np.array_split(np.arange(edges), blocks):
        components.join(left[part], right[part])
    _, expected = connected_components(coo_matrix((np.ones(edges), (left, right)), (200, 200)), directed=False)
    smallest = [np.flatnonzero(expected == one)[0] for one in expected]
    assert components.roots.tolist() == smallest
    groups = {tuple(np.flatnonzero(expected == one)) for one in expected}
    assert [tuple(group) for group in groups_of(components.roots)] == sorted(x for x in groups if len(x) > 1)


def test_a_long_chain_is_one_component():
    order = np.random.default_rng(0).permutation(5000)
    components = Components(5000)
    components.join(order[:-1], order[1:])
    assert not components.roots.any()
