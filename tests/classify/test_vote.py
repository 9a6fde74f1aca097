import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from faiss_knn.classify.vote import count_votes, neighbor_weights, normalize_scores, vote
from tests.reference import log_class_scores

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


def shares_of(distances, labels, num_classes, **options):
    options = {"temperature": 0.07, "weighting": "inverse"} | options
    return count_votes(distances, distances.isfinite(), labels, num_classes, **options).shares


@pytest.mark.parametrize(("weighting", "function"), [("inverse", lambda d: 1 / (d + 0.07)), ("uniform", "uniform")])
def test_shares_are_those_of_scikit_learn_rounded_once(weighting, function):
    rng = np.random.default_rng(3)
    features, labels = rng.normal(size=(400, 3)), rng.integers(0, 4, 400)
    reference = KNeighborsClassifier(15, weights=function, algorithm="brute").fit(features, labels)
    queries = rng.normal(size=(150, 3))
    distances, indices = reference.kneighbors(queries)
    shares = shares_of(torch.from_numpy(distances), torch.from_numpy(labels[indices]), 4, weighting=weighting)
    expected = reference.predict_proba(queries)
    np.testing.assert_array_max_ulp(shares.numpy(), expected.astype(np.float32), maxulp=1)
    assert (shares.numpy() == expected.astype(np.float32)).mean() > 0.999  # but for ties of the rounding


@pytest.mark.parametrize("weighting", ["inverse", "softmax", "uniform"])
def test_unanimous_votes_are_a_share_of_exactly_1(weighting):
    distances = torch.rand(500, 19).sort(1).values
    labels = torch.arange(500)[:, None].expand(-1, 19) % 7
    shares = shares_of(distances, labels, 7, weighting=weighting)
    assert torch.equal(shares, torch.nn.functional.one_hot(labels[:, 0], 7).float())
    scores = vote(distances, labels, 7, weighting=weighting)
    rounded = normalize_scores(scores, neighbor_weights(distances, weighting=weighting))
    if weighting != "softmax":
        assert torch.equal(rounded, shares)


@pytest.mark.parametrize("weighting", ["inverse", "softmax", "uniform"])
@pytest.mark.parametrize("labels_of", ["ids", "multi-hot", "soft"])
def test_shares_do_not_depend_on_the_order_of_the_neighbours(weighting, labels_of):
    distances = torch.rand(200, 30).sort(1).values * 3
    labels = torch.randint(0, 4, (200, 30))
    if labels_of != "ids":
        labels = torch.nn.functional.one_hot(labels, 4)
    if labels_of == "soft":
        labels = 0.7 * labels + 0.075
    order = torch.randperm(30)
    one = shares_of(distances, labels, 4, weighting=weighting)
    assert torch.equal(one, shares_of(distances[:, order], labels[:, order], 4, weighting=weighting))


@pytest.mark.parametrize("temperature", [1.0, 0.07, 1e-3])
@pytest.mark.parametrize("labels_of", ["ids", "multi-hot", "soft"])
def test_far_votes_rank_as_in_extended_precision(temperature, labels_of):
    generator = torch.Generator().manual_seed(4)
    distances = (torch.rand(30, 40, generator=generator, dtype=torch.float64) * 12).sort(1).values
    distances[:, 35:] = INF
    labels = torch.randint(0, 9, (30, 40), generator=generator)
    if labels_of != "ids":
        labels = (torch.rand(30, 40, 9, generator=generator) < 0.2).to(torch.uint8)
    if labels_of == "soft":
        labels = labels.float() * torch.rand(30, 40, 9, generator=generator)
    shares = shares_of(distances, labels, 9, temperature=temperature, weighting="softmax")
    expected = log_class_scores(distances.numpy(), labels.numpy(), 9, temperature, "softmax")
    assert torch.equal(vote(distances, labels, 9, temperature=temperature, weighting="softmax"), shares)
    assert torch.equal(shares > 0, torch.from_numpy(np.isfinite(expected)))
    order = np.where(np.isfinite(expected), expected, -1e9)  # without a vote last
    gaps = order[:, :, None] - order[:, None]
    larger = gaps > 1e-6 * (1 - order)[:, :, None]  # what 24 bits hold apart
    assert (shares[:, :, None] > shares[:, None]).numpy()[larger].all()
    assert (shares[:, :, None] >= shares[:, None]).numpy()[gaps >= 0].all()
    large = expected > np.log(np.longdouble(2)) * -100
    np.testing.assert_allclose(shares.numpy()[large], np.exp(expected[large]).astype(np.float64), rtol=1.2e-7)


@pytest.mark.parametrize("weighting", ["inverse", "softmax", "uniform"])
def test_neighbours_at_any_distance_vote(weighting):
    most = torch.finfo(torch.float32).max
    distances = torch.tensor([[0.0, 1e-30, 1.0, 1e30, most]])
    labels = torch.tensor([[1, 2, 3, 4, 5]])
    for temperature in (2e-38, 1.0, 3e38):
        scores = vote(distances, labels, 7, temperature=temperature, weighting=weighting)
        assert scores.isfinite().all()
        assert (scores > 0).tolist() == [[False, True, True, True, True, True, False]]
        shares = shares_of(distances, labels, 7, temperature=temperature, weighting=weighting)
        assert (shares > 0).tolist() == [[False, True, True, True, True, True, False]]
        for values in (scores, shares):
            assert (values[0, 1:5] >= values[0, 2:6]).all()


@pytest.mark.parametrize("weighting", ["inverse", "softmax", "uniform"])
def test_soft_labels_divide_a_neighbours_weight(weighting):
    distances, _ = neighbors(9, 7, 5, missing=2)
    labels = torch.rand(9, 7, 5).softmax(2)
    scores = vote(distances, labels, 5, temperature=0.2, weighting=weighting)
    np.testing.assert_allclose(scores, vote_by_loop(distances, labels, 5, 0.2, weighting), rtol=1e-5)


@pytest.mark.parametrize("temperature", [1e-46, 1e-39, float("inf"), 1e39, True, "0.1", None, [0.1]])
def test_temperatures_that_float32_does_not_hold_are_refused(temperature):
    with pytest.raises(ValueError, match="temperature must be"):
        vote(torch.rand(1, 3), torch.tensor([[0, 1, 2]]), 3, temperature=temperature)


def test_numbers_of_numpy_are_numbers():
    distances, labels = neighbors(5, 8, 3)
    expected = vote(distances, labels, 3, temperature=0.5)
    assert torch.equal(vote(distances, labels, np.int32(3), temperature=np.float32(0.5)), expected)
    assert torch.equal(vote(distances.numpy(), labels.numpy().astype(np.uint16), 3, temperature=0.5), expected)


@pytest.mark.parametrize("wrong", [2, -1, 0.5, float("nan")])
def test_multi_hot_labels_are_0_and_1(wrong):
    labels = torch.tensor([[[0, 1], [1, 0], [1, 1]]], dtype=torch.float32)
    labels[0, 1, 0] = wrong
    distances = torch.tensor([[0.1, 0.2, 0.3]])
    if wrong == 0.5:  # a share of a class
        assert vote(distances, labels, 2, weighting="uniform").tolist() == [[1.5, 2.0]]
        return
    with pytest.raises(ValueError, match=r"multi-hot `labels` must be 0 and 1, or shares in .*got"):
        vote(distances, labels, 2)
    distances[0, 1] = INF  # of a missing neighbour the labels are not looked at
    assert vote(distances, labels, 2, weighting="uniform").tolist() == [[1.0, 2.0]]


@pytest.mark.parametrize("weighting", ["inverse", "softmax", "uniform"])
def test_votes_do_not_depend_on_how_many_other_classes_there_are(weighting):
    distances, labels = neighbors(20, 9, 6, missing=2)
    few, many = (
        count_votes(distances, distances.isfinite(), labels, width, temperature=0.1, weighting=weighting)
        for width in (6, 6000)
    )
    for narrow, wide in zip(few, many, strict=True):
        assert torch.equal(wide[:, :6], narrow)
        assert not wide[:, 6:].any()
