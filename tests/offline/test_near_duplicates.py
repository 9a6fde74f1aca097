"""Groups against all distances at once, also where a row has more copies than its list has places; balls likewise."""

import numpy as np
import pytest
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import pairwise_distances

from faiss_knn import KNNIndex
from faiss_knn.measures.generative import set_scores
from faiss_knn.offline import ball_counts, near_duplicates
from faiss_knn.offline.ball_counts import count_in_balls
from faiss_knn.offline.near_duplicates import Lists, group_rows

RNG = np.random.default_rng(0)


def own_lists(rows, k, metric="euclidean"):
    found = KNNIndex(distance_metric=metric).build(rows).search(rows, k + 1)
    distances, indices = found.distances.numpy(), found.indices.numpy()
    kept = np.argsort(indices == np.arange(len(rows))[:, None], axis=1, kind="stable")[:, :-1]
    return Lists(np.arange(len(rows)), *(np.take_along_axis(x, kept, 1) for x in (distances, indices)))


def clusters(sizes, spread, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((len(sizes), dim)) * 3
    rows = np.repeat(centres, sizes, axis=0) + spread * rng.standard_normal((sum(sizes), dim))
    return rng.permutation(rows).astype(np.float32)


@pytest.mark.parametrize("k", [1, 3, 10])
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.6, 2.0])
@pytest.mark.parametrize("block", [7, 1 << 14])
def test_groups_are_the_components_of_all_near_pairs(k, threshold, block, monkeypatch):
    monkeypatch.setattr(near_duplicates, "_BLOCK", block)
    rows = clusters([1, 2, 3, 20, 40, 5, 60, 1, 1, 30], 0.1)
    roots = group_rows(rows, own_lists(rows, k), threshold, "euclidean")
    near = pairwise_distances(rows.astype(np.float64)) <= threshold
    _, expected = connected_components(near, directed=False)
    assert roots.tolist() == [np.flatnonzero(expected == one)[0] for one in expected]


def test_a_chain_of_full_lists_is_followed_to_its_end():
    """Bunches of more rows than lists have places, each within reach of the next alone."""
    bunches = np.repeat(np.arange(9.0), 8)[:, None] + 0.01 * RNG.random((72, 1))
    rows = np.concatenate([bunches, bunches[:16] + 100]).astype(np.float32)
    roots = group_rows(rows, own_lists(rows, 3), 1.02, "euclidean")
    assert set(roots[:72]) == {0}
    assert set(roots[72:]) == {72}
    assert len(set(group_rows(rows, own_lists(rows, 3), 0.5, "euclidean"))) == 11


def test_equal_rows_are_one_group_at_distance_zero():
    rows = np.repeat(RNG.standard_normal((3, 4)), [30, 2, 1], axis=0)
    assert group_rows(rows, own_lists(rows, 2, "cosine"), 0.0, "cosine").tolist() == [0] * 30 + [30, 30, 32]


def scores_of(real, fake, k):
    """The four measures from all distances in float64, as the papers write them."""
    own = [np.sort(pairwise_distances(x), axis=1)[:, k] for x in (real, fake)]
    between = pairwise_distances(real, fake)
    in_real, in_fake = between <= own[0][:, None], between <= own[1]
    return {
        "precision": in_real.any(0).mean(),
        "recall": in_fake.any(1).mean(),
        "density": in_real.sum() / (k * len(fake)),
        "coverage": in_real.any(1).mean(),
    }


@pytest.mark.parametrize(("shift", "scale"), [(0.0, 1.0), (0.8, 1.0), (0.0, 0.2), (0.0, 0.0)])
@pytest.mark.parametrize("places", [300, 1 << 22])
def test_balls_give_precision_recall_density_and_coverage(shift, scale, places, monkeypatch):
    monkeypatch.setattr(ball_counts, "_PLACES", places)
    rng = np.random.default_rng(1)
    real = rng.integers(-8, 9, (150, 4)).astype(np.float32)  # many equal distances
    fake = np.round(scale * rng.integers(-8, 9, (90, 4)) + 8 * shift).astype(np.float32)
    found = sets(real, fake, 5)
    assert found == pytest.approx(scores_of(real.astype(np.float64), fake.astype(np.float64), 5))


def sets(real, fake, k):
    radii = [own_lists(x, k).distances[:, -1] for x in (real, fake)]
    in_real, real_around = count_in_balls(real, radii[0], fake, "euclidean", k)
    _, fake_around = count_in_balls(fake, radii[1], real, "euclidean", k)
    return set_scores(in_real, real_around, fake_around, k)


def test_a_set_covers_itself():
    rows = RNG.standard_normal((60, 5)).astype(np.float32)
    found = sets(rows, rows, 5)
    assert (found["precision"], found["recall"], found["coverage"]) == (1.0, 1.0, 1.0)
    assert found["density"] == 6 / 5  # each ball holds its centre and five more
