"""KNNClassifier and KNNTransformer: scikit-learn's own checks, its estimators' results, and who takes them."""

import numpy as np
import pytest
from scipy.sparse import issparse
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KNeighborsClassifier, KNeighborsTransformer, sort_graph_by_row_values
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from faiss_knn.sklearn import KNNClassifier, KNNTransformer
from tests.reference import brute_force, log_class_scores

DIGITS, CLASSES = load_digits(return_X_y=True)
BANK, QUERIES = DIGITS[:1200], DIGITS[1200:]
NAMES = np.array([f"digit {c}" for c in CLASSES])
WITHOUT_TIES = DIGITS + 0.1 * np.random.default_rng(0).standard_normal(DIGITS.shape)


@parametrize_with_checks(
    [
        KNNClassifier(),
        KNNClassifier(weights="softmax", metric="manhattan"),
        KNNTransformer(),
        KNNTransformer(mode="connectivity"),
    ]
)
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("weights", ["uniform", "distance"])
@pytest.mark.parametrize("metric", ["euclidean", "sqeuclidean", "manhattan", "cosine", "minkowski", "l1"])
def test_the_classifier_is_scikit_learns(metric, weights):
    train, test = WITHOUT_TIES[:1200], np.concatenate([WITHOUT_TIES[1200:], WITHOUT_TIES[:20]])
    ours = KNNClassifier(7, weights=weights, metric=metric).fit(train, NAMES[:1200])
    theirs = KNeighborsClassifier(7, weights=weights, metric=metric, algorithm="brute").fit(train, NAMES[:1200])
    np.testing.assert_array_equal(ours.classes_, theirs.classes_)
    np.testing.assert_array_equal(ours.predict(test), theirs.predict(test))
    near = (
        metric == "cosine" and weights == "distance"
    )  # theirs finds a row at 1e-16 of itself, which outweighs no less
    np.testing.assert_allclose(ours.predict_proba(test), theirs.predict_proba(test), atol=1e-6 if near else 1e-7)


@pytest.mark.parametrize("weights", ["uniform", "distance"])
def test_predictions_are_scikit_learns_on_whole_numbers_too(weights):
    ours = KNNClassifier(weights=weights).fit(BANK, CLASSES[:1200])
    theirs = KNeighborsClassifier(weights=weights, algorithm="kd_tree").fit(BANK, CLASSES[:1200])
    np.testing.assert_array_equal(ours.predict(QUERIES), theirs.predict(QUERIES))


@pytest.mark.parametrize("weights", ["inverse", "softmax"])
def test_the_packages_own_weights_vote_as_defined(weights):
    classifier = KNNClassifier(20, weights=weights, temperature=0.05, metric="cosine").fit(BANK, CLASSES[:1200])
    distances, rows = brute_force(QUERIES[:50], BANK, 20, "cosine")
    expected = np.exp(log_class_scores(distances, CLASSES[rows], 10, 0.05, weights))
    np.testing.assert_allclose(classifier.predict_proba(QUERIES[:50]), expected.astype(float), atol=1e-7)


def test_equal_votes_go_to_the_first_class():
    classifier = KNNClassifier(2).fit([[0.0], [1.0], [9.0]], ["b", "a", "c"])
    assert classifier.predict([[0.2]]).tolist() == ["a"]


def test_a_row_at_no_distance_decides_alone_by_distance():
    classifier = KNNClassifier(3, weights="distance").fit([[0.0], [1e-6], [-1e-6]], [0, 1, 1])
    np.testing.assert_allclose(classifier.predict_proba([[0.0]]), [[1.0, 0.0]], atol=1e-12)


def test_fitted_rows_are_left_out_in_turn():
    few, classes = WITHOUT_TIES[:150], CLASSES[:150]
    ours = KNNClassifier(3).fit(few, classes)
    theirs = KNeighborsClassifier(3).fit(few, classes)
    assert ours.score(None, classes) == theirs.score(None, classes)
    for found, expected in zip(ours.kneighbors(), theirs.kneighbors(), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_copies_of_a_row_are_its_neighbours_and_itself_is_not():
    transformer = KNNTransformer(2).fit([[1.0], [1.0], [1.0], [5.0]])
    assert transformer.kneighbors(return_distance=False).tolist() == [[1, 2], [0, 2], [0, 1], [0, 1]]


@pytest.mark.parametrize("mode", ["distance", "connectivity"])
@pytest.mark.parametrize("metric", ["euclidean", "manhattan", "cosine"])
def test_the_graph_is_scikit_learns(metric, mode):
    ours = KNNTransformer(6, mode=mode, metric=metric)
    theirs = KNeighborsTransformer(n_neighbors=6, mode=mode, metric=metric)
    for name in ("fit_transform", "transform"):
        rows = WITHOUT_TIES[:800] if name == "fit_transform" else WITHOUT_TIES[800:1000]
        graph, expected = getattr(ours, name)(rows), getattr(theirs, name)(rows)
        assert (graph.format, graph.dtype, graph.shape) == ("csr", expected.dtype, expected.shape)
        assert graph.nnz == expected.nnz == len(rows) * (7 if mode == "distance" else 6)
        # theirs finds a row up to 3e-6 away from itself
        np.testing.assert_allclose(graph.toarray(), expected.toarray(), rtol=1e-9, atol=1e-5)


def test_entries_stand_in_the_order_of_distance():
    graph = KNNTransformer(5).fit_transform(BANK)
    assert sort_graph_by_row_values(graph, warn_when_not_sorted=True) is graph  # else it warns, which is an error here
    np.testing.assert_array_equal(graph.indices[::6], np.arange(1200))


def test_distances_are_those_of_the_rows_in_float64():
    rows = 1e6 + np.random.default_rng(0).random((60, 3))
    distances, ids = KNNTransformer(4).fit(rows).kneighbors()
    expected = np.sqrt(((rows[:, None] - rows[ids]) ** 2).sum(2))
    np.testing.assert_allclose(distances, expected, rtol=1e-14)


def test_what_an_approximate_index_does_not_find_is_left_out():
    transformer = KNNTransformer(n_neighbors=200, mode="distance", index="IVF64,Flat").fit(BANK)
    graph = transformer.transform(BANK)
    assert 1200 < graph.nnz < 1200 * 201
    assert (graph.indices >= 0).all()
    classifier = KNNClassifier(200, index="IVF64,Flat").fit(BANK, CLASSES[:1200])
    assert classifier.score(BANK, CLASSES[:1200]) > 0.8


def test_pipelines_and_searches_over_options_take_them():
    searched = GridSearchCV(
        make_pipeline(StandardScaler(), KNNClassifier()),
        {"knnclassifier__n_neighbors": [1, 5], "knnclassifier__weights": ["uniform", "inverse"]},
        cv=2,
    ).fit(BANK[:400], CLASSES[:400])
    expected = GridSearchCV(
        make_pipeline(StandardScaler(), KNeighborsClassifier()), {"kneighborsclassifier__n_neighbors": [1, 5]}, cv=2
    ).fit(BANK[:400], CLASSES[:400])
    ours = dict(zip(map(str, searched.cv_results_["params"]), searched.cv_results_["mean_test_score"], strict=True))
    for params, score in zip(expected.cv_results_["params"], expected.cv_results_["mean_test_score"], strict=True):
        k = params["kneighborsclassifier__n_neighbors"]
        assert ours[str({"knnclassifier__n_neighbors": k, "knnclassifier__weights": "uniform"})] == score


def test_a_precomputed_graph_classifies_as_features_do():
    chain = make_pipeline(KNNTransformer(5), KNeighborsClassifier(5, metric="precomputed")).fit(BANK, CLASSES[:1200])
    direct = KNNClassifier(5).fit(BANK, CLASSES[:1200])
    np.testing.assert_array_equal(chain.predict(QUERIES), direct.predict(QUERIES))
    assert issparse(chain[:-1].transform(QUERIES))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_neighbors": 0}, "`n_neighbors` must be a positive integer, got 0"),
        ({"metric": "hamming"}, "`metric` must be one of euclidean, .*, got 'hamming'"),
        ({"weights": "nearest"}, "`weights` must be one of uniform, distance, inverse, softmax, got 'nearest'"),
        ({"weights": "softmax", "temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"weights": "distance", "metric": "dot"}, "does not go with distance_metric='dot'"),
        ({"index": "IVFoops"}, "IVFoops"),
    ],
)
def test_options_that_cannot_be_are_refused_when_fitted(options, message):
    with pytest.raises(ValueError, match=message):
        KNNClassifier(**options).fit(BANK, CLASSES[:1200])


def test_more_neighbours_than_rows_are_refused():
    transformer = KNNTransformer(3).fit([[0.0], [1.0], [2.0]])
    with pytest.raises(ValueError, match="at most the 3 rows that there are, got 4: lower it or fit more"):
        transformer.transform([[0.5]])
    with pytest.raises(ValueError, match="at most the 2 rows that there are beside each fitted row itself, got 3"):
        transformer.kneighbors()
    with pytest.raises(ValueError, match="`mode` must be one of distance, connectivity, got 'both'"):
        transformer.kneighbors_graph(mode="both")
    with pytest.raises(ValueError, match="`mode` must be"):
        KNNTransformer(mode="both").fit([[0.0], [1.0]])
    with pytest.raises(ValueError, match=r"`X` must be .* got None"):
        transformer.transform(None)
