import numpy as np
import pytest
import torch

from faiss_knn.classify.vote import neighbor_weights, normalize_scores, vote

INF = float("inf")


def vote_by_loop(distances, labels, num_classes, temperature, weighting):
    """Slow and obvious, in float64."""
    scores = np.zeros((len(distances), num_classes))
    for b, (row, ids) in enumerate(zip(distances.double().numpy(), labels.numpy(), strict=True)):
        found = np.isfinite(row)
        weights = {
            "inverse": lambda d: 1 / (d + temperature),
            "softmax": lambda d: np.exp(-d / temperature) / np.exp(-d / temperature).sum(),
            "uniform": lambda d: np.ones_like(d),
        }[weighting](row[found])
        for weight, label in zip(weights, ids[found], strict=True):
            if np.ndim(label):
                scores[b] += weight * label
            else:
                scores[b, label] += weight
    return scores


def neighbors(b, k, num_classes, missing=0):
    generator = torch.Generator().manual_seed(b * 1000 + k)
    distances = torch.rand(b, k, generator=generator).sort(1).values
    labels = torch.randint(0, num_classes, (b, k), generator=generator)
    if missing:
        distances[:, -missing:] = INF
        labels[:, -missing:] = -1
    return distances, labels


@pytest.mark.parametrize("weighting", ["inverse", "softmax", "uniform"])
@pytest.mark.parametrize(("b", "k", "missing"), [(1, 1, 0), (7, 5, 0), (64, 20, 3), (3, 4, 4), (0, 5, 0)])
def test_equals_the_loop(weighting, b, k, missing):
    distances, labels = neighbors(b, k, 6, missing)
    scores = vote(distances, labels, 6, temperature=0.1, weighting=weighting)
    assert scores.dtype == torch.float32
    assert scores.shape == (b, 6)
    np.testing.assert_allclose(scores, vote_by_loop(distances, labels, 6, 0.1, weighting), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("weighting", ["inverse", "softmax", "uniform"])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64])
def test_multi_hot_equals_the_loop(weighting, dtype):
    distances, _ = neighbors(9, 7, 5, missing=2)
    labels = torch.rand(9, 7, 5) < 0.4
    scores = vote(distances, labels.to(dtype), 5, temperature=0.2, weighting=weighting)
    np.testing.assert_allclose(scores, vote_by_loop(distances, labels, 5, 0.2, weighting), rtol=1e-5, atol=1e-7)


def test_softmax_of_cosine_distance_is_the_rule_of_dinov2():
    cosines = torch.rand(4, 10)
    labels = torch.randint(0, 3, (4, 10))
    weights = torch.softmax(cosines / 0.07, dim=1)
    expected = torch.stack([torch.where(labels == c, weights, 0).sum(1) for c in range(3)], 1)
    torch.testing.assert_close(vote(1 - cosines, labels, 3, weighting="softmax"), expected)


@pytest.mark.parametrize("temperature", [1e-8, 1e-30, 1e8])
def test_softmax_stays_a_number_at_extreme_temperatures(temperature):
    distances = torch.tensor([[0.5, 0.5, 3e38], [1e-30, 1.0, INF], [INF, INF, INF]])
    weights = neighbor_weights(distances, temperature=temperature, weighting="softmax")
    assert weights.isfinite().all()
    torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 1.0, 0.0]))


@pytest.mark.parametrize("weighting", ["inverse", "uniform"])
def test_equal_votes_in_any_order_give_bitwise_equal_scores(weighting):
    distances = torch.rand(200, 30).sort(1).values
    labels = torch.randint(0, 4, (200, 30))
    order = torch.randperm(30)
    one = vote(distances, labels, 4, weighting=weighting)
    assert torch.equal(one, vote(distances[:, order], labels[:, order], 4, weighting=weighting))


def test_a_tie_goes_to_the_lowest_class():
    scores = vote(torch.tensor([[0.3, 0.3, 0.3, 0.3, 0.3, 0.3]]), torch.tensor([[2, 1, 2, 1, 1, 2]]), 3)
    assert scores.argmax(1).item() == 1


def test_half_precision_distances_vote_in_float32():
    distances, labels = neighbors(5, 8, 3)
    assert vote(distances.half(), labels, 3).dtype == torch.float32


def test_shares_are_in_the_unit_interval_and_sum_to_one():
    distances, labels = neighbors(300, 13, 4)
    distances[5] = INF
    labels[5] = -1
    weights = neighbor_weights(distances)
    shares = normalize_scores(vote(distances, labels, 4), weights)
    assert shares.max() <= 1
    totals = torch.ones(300)
    totals[5] = 0
    torch.testing.assert_close(shares.sum(1), totals)
    one_class = normalize_scores(vote(distances, labels.clamp(0, 0), 1), weights)
    assert (one_class <= 1).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"temperature": float("nan")}, "temperature must be positive"),
        ({"weighting": "rank"}, "`weighting` must be one of inverse, softmax, uniform, got 'rank'"),
        ({"num_classes": 0}, "num_classes must be positive, got 0"),
        ({"num_classes": 2}, r"`labels` must be in \[0, num_classes=2\).*got 2"),
        ({"distances": torch.tensor([[0.1, -0.5, 1.0]])}, "negative or NaN, got -0.5"),
        ({"distances": torch.tensor([[0.1, float("nan"), 1.0]])}, "negative or NaN, got nan"),
        ({"distances": torch.tensor([[1, 2, 3]])}, "float tensor"),
        ({"distances": torch.rand(3)}, r"\(B, k\)"),
        ({"labels": torch.tensor([[0, 1]])}, r"for distances of shape \(1, 3\)"),
        ({"labels": torch.tensor([[0.0, 1.0, 2.0]])}, "integer class ids"),
        ({"labels": torch.tensor([[0, -1, 2]])}, "got -1: give a missing neighbour the distance inf"),
        ({"labels": torch.zeros(1, 3, 4, dtype=torch.long)}, "num_classes=3 columns, got 4"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"distances": torch.rand(1, 3), "labels": torch.tensor([[0, 1, 2]]), "num_classes": 3} | change
    with pytest.raises(ValueError, match=message):
        vote(**arguments)
