import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from faiss_knn import FeatureBank, KNNIndex, vote

SKLEARN = {"euclidean": "euclidean", "squared_euclidean": "sqeuclidean", "cosine": "cosine", "manhattan": "manhattan"}


def data(n=300, d=12, classes=5, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)).astype(np.float32), rng.integers(0, classes, n)


@pytest.mark.parametrize("distance", SKLEARN)
def test_scores_equal_scikit_learn(distance):
    features, labels = data()
    queries, _ = data(40, seed=1)
    reference = KNeighborsClassifier(
        7, weights=lambda d: 1 / (d + 0.07), metric=SKLEARN[distance], algorithm="brute"
    ).fit(features, labels)
    scores = FeatureBank(features, labels, distance_metric=distance).predict(queries, k=7)
    np.testing.assert_allclose(
        scores / scores.sum(1, keepdim=True), reference.predict_proba(queries), rtol=1e-4, atol=1e-6
    )


def test_unlabelled_rows_are_left_out_and_indices_count_the_rows_given():
    features, labels = data()
    labels[::3] = -1
    queries, _ = data(20, seed=2)
    bank = FeatureBank(features, labels)
    found = bank.neighbors(queries, 9)
    assert len(bank) == 200
    assert (labels[found.indices] >= 0).all()
    expected = np.linalg.norm(features[found.indices] - queries[:, None], axis=2)
    np.testing.assert_allclose(found.distances, expected, rtol=1e-5)
    without = FeatureBank(features[labels >= 0], labels[labels >= 0], num_classes=5)
    torch.testing.assert_close(bank.predict(queries), without.predict(queries), rtol=0, atol=0)


def test_missing_neighbours_of_an_approximate_index_do_not_vote():
    features, labels = data(400)
    bank = FeatureBank(features, labels, index="IVF64,Flat", nprobe=1)
    found = bank.neighbors(features[:30], 100)
    assert (found.indices == -1).any()
    scores = bank.predict(features[:30], k=100, weighting="uniform")
    assert torch.equal(scores.sum(1), (found.indices >= 0).sum(1).float())


def test_multi_hot_labels_vote_in_blocks(monkeypatch):
    features, _ = data()
    labels = (torch.rand(300, 4) < 0.3).to(torch.uint8)
    queries, _ = data(50, seed=3)
    bank = FeatureBank(features, labels)
    whole = bank.predict(queries, k=6)
    found = bank.neighbors(queries, 6)
    torch.testing.assert_close(whole, vote(found.distances, labels[found.indices], 4))
    monkeypatch.setattr("faiss_knn.classify.bank._MULTI_HOT_BLOCK", 100)
    assert torch.equal(bank.predict(queries, k=6), whole)


def test_unlabelled_multi_hot_rows_are_left_out():
    labels = torch.tensor([[1, 0], [-1, -1], [0, 1]])
    bank = FeatureBank(torch.tensor([[0.0], [1.0], [2.0]]), labels)
    assert bank.neighbors(torch.tensor([[1.0]]), 3).indices.tolist() == [[0, 2]]


def test_an_index_can_be_given_and_is_rebuilt():
    features, labels = data()
    index = KNNIndex(distance_metric="cosine")
    FeatureBank(features[:10], labels[:10], index=index)
    bank = FeatureBank(features, labels, index=index)
    assert bank.index is index
    torch.testing.assert_close(
        bank.predict(features), FeatureBank(features, labels, distance_metric="cosine").predict(features)
    )


def test_k_beyond_the_bank_takes_the_whole_bank():
    bank = FeatureBank(torch.rand(3, 2), torch.tensor([0, 1, 1]))
    scores = bank.predict(torch.rand(4, 2), k=50, weighting="uniform")
    assert torch.equal(scores, torch.tensor([[1.0, 2.0]]).expand(4, 2))


def test_no_queries_give_no_scores():
    bank = FeatureBank(torch.rand(3, 2), torch.tensor([0, 1, 1]))
    assert bank.predict(torch.empty(0, 2)).shape == (0, 2)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        (torch.tensor([0, 1]), {}, r"`labels` must be \(3,\).*got shape \(2,\)"),
        (torch.tensor([0.0, 1.0, 2.0]), {}, "must be integers, got torch.float32"),
        (torch.tensor([-1, -1, -1]), {}, "every row of `labels` is -1"),
        (torch.tensor([-2, 0, 1]), {}, "or -1 for unlabelled rows, got -2"),
        (
            torch.tensor([0, 1, 5]),
            {"num_classes": 5},
            "num_classes=5 does not fit `labels` with label 5: give num_classes=6",
        ),
        (torch.tensor([0, 1, 5]), {"num_classes": 0}, "num_classes must be positive, got 0"),
        (torch.tensor([[0, 2], [1, 0], [1, 1]]), {}, "must be 0 and 1, got 2"),
        (torch.tensor([[0, 1], [1, 0], [1, 1]]), {"num_classes": 3}, "2 multi-hot columns: give num_classes=2"),
        (torch.tensor([0, 1, 1]), {"distance_metric": "hamming"}, "`distance_metric` must be one of"),
        (torch.tensor([0, 1, 1]), {"index": KNNIndex(), "nprobe": 3}, "belong to the KNNIndex"),
    ],
)
def test_bad_arguments_are_named(labels, options, message):
    with pytest.raises(ValueError, match=message):
        FeatureBank(torch.rand(3, 2), labels, **options)


def test_an_empty_bank_is_refused():
    with pytest.raises(ValueError, match="empty"):
        FeatureBank(torch.empty(0, 2), torch.empty(0, dtype=torch.long))


def test_names_have_a_column_each_in_their_order():
    features, ids = data()
    names = np.array(["eel", "ant", "dog", "bee", "cat"])
    queries, _ = data(20, seed=2)
    bank = FeatureBank(features, names[ids])
    assert bank.classes.tolist() == sorted(names)
    predicted = FeatureBank(features, ids).predict(queries)
    assert torch.equal(bank.predict(queries), predicted[:, np.argsort(names)])
    assert bank.num_classes == 5


@pytest.mark.parametrize("step", [1, 10**4, 10**9, 2**60])
def test_sparse_class_ids_score_like_dense_ones(step):
    features, ids = data()
    queries, _ = data(20, seed=2)
    bank = FeatureBank(features, ids * step, renumber=True)
    assert bank.classes.tolist() == [step * i for i in range(5)]
    assert torch.equal(bank.predict(queries), FeatureBank(features, ids).predict(queries))


def test_ids_too_few_and_too_large_for_a_column_each_are_refused_unless_renumbered():
    features, ids = data()
    with pytest.raises(ValueError, match="5 class ids up to 4000000000 would make scores of 4000000001 columns"):
        FeatureBank(features, ids * 10**9)
    assert FeatureBank(features, ids * 10**4).predict(features[:2]).shape == (2, 40001)


def test_columns_of_multi_hot_labels_are_not_renumbered():
    with pytest.raises(ValueError, match="`renumber` is for"):
        FeatureBank(torch.rand(2, 2), torch.tensor([[0, 1], [1, 0]]), renumber=True)


def test_soft_labels_vote_by_their_shares():
    features, ids = data()
    queries, _ = data(20, seed=2)
    other = np.random.default_rng(1).permutation(ids)
    one, two = (np.eye(5, dtype=np.float32)[labels] for labels in (ids, other))
    mixed = FeatureBank(features, 0.75 * one + 0.25 * two).predict(queries)
    separate = [FeatureBank(features, labels, num_classes=5).predict(queries) for labels in (ids, other)]
    torch.testing.assert_close(mixed, 0.75 * separate[0] + 0.25 * separate[1])
    hard = FeatureBank(features, one).predict(queries)
    assert torch.equal(hard, separate[0])


def test_another_label_may_mean_unlabelled():
    features, ids = data()
    queries, _ = data(20, seed=2)
    ignored = np.where(np.arange(300) % 3 == 0, 255, ids).astype(np.uint8)
    bank = FeatureBank(features, ignored, ignore_index=255)
    assert len(bank) == 200
    expected = FeatureBank(features, np.where(np.arange(300) % 3 == 0, -1, ids))
    assert torch.equal(bank.predict(queries), expected.predict(queries))


@pytest.mark.parametrize("weighting", ["inverse", "softmax", "uniform"])
def test_a_neighbour_is_missing_by_its_index_not_by_a_distance_beyond_float32(weighting):
    labels = torch.arange(200) % 4
    features = torch.nn.functional.one_hot(labels, 8) * 3 + 0.2 * torch.randn(200, 8)
    for scale in (1e18, 1e20, 1e25):
        bank = FeatureBank(features * scale, labels, distance_metric="squared_euclidean")
        scores = bank.predict((features[:50] + 0.05) * scale, k=3, weighting=weighting)
        assert torch.equal(scores.argmax(1), labels[:50])


def test_many_classes_are_scored_in_blocks(monkeypatch):
    features, labels = data()
    bank = FeatureBank(features, labels)
    whole = bank.predict(features, k=4)
    monkeypatch.setattr("faiss_knn.classify.bank._SCORES_BLOCK", 35)
    assert torch.equal(bank.predict(features, k=4), whole)
