"""scikit-learn's side: exact neighbours as a classifier and as a transformer, for pipelines and for other libraries."""

from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

try:
    from scipy.sparse import csr_matrix
    from sklearn.base import BaseEstimator, ClassifierMixin, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        f"faiss_knn.sklearn needs {error.name}: pip install 'faiss-knn-eval[sklearn]'", name=error.name
    ) from error

from faiss_knn.classify.bank import FeatureBank
from faiss_knn.classify.vote import check_vote_options
from faiss_knn.names import DISTANCES
from faiss_knn.search.engines.rerank import drop_self
from faiss_knn.search.index import KNNIndex, Neighbors
from faiss_knn.search.inputs import as_choice, as_count, named_as_index

__all__ = ["KNNClassifier", "KNNTransformer"]

_SYNONYMS = {"minkowski": "euclidean", "l2": "euclidean", "sqeuclidean": "squared_euclidean"} | dict.fromkeys(
    ("l1", "cityblock"), "manhattan"
)  # scikit-learn's names; its "minkowski" is euclidean unless p is given
_MODES = ("distance", "connectivity")
_WEIGHTS = ("uniform", "distance", "inverse", "softmax")
_DTYPES = (np.float64, np.float32, np.float16)  # the first is what others, integers say, are converted to
_NEAR_ZERO = float(np.finfo(np.float32).tiny)  # the temperature at which 1/(d + T) is 1/d, and of weight at d = 0 alone

_Array = npt.NDArray[Any]


class _FittedNeighbors(BaseEstimator):
    """What the classifier and the transformer share: an index over the fitted rows, and how it is asked."""

    n_neighbors: int
    metric: str
    index: str
    device: str | None

    def kneighbors(
        self, X: Any = None, n_neighbors: int | None = None, return_distance: bool = True
    ) -> tuple[_Array, _Array] | _Array:
        """Find the nearest fitted rows, as scikit-learn's method of that name does.

        Args:
            X: (B, d) queries; None: the fitted rows, of which none is its own neighbour.
            n_neighbors: How many; None: the estimator's.
            return_distance: Whether distances are returned too.

        Returns:
            (B, k) float64 distances, ascending, and (B, k) int64 row numbers, or the latter alone. Equal distances are
            ordered by row number. A neighbour that an approximate index did not find is (inf, -1), last.

        Raises:
            ValueError: If there are fewer rows than neighbours asked for, or X does not fit.
        """
        distances, indices = (part.cpu().numpy() for part in self._find(X, n_neighbors))
        return (distances, indices) if return_distance else indices

    def kneighbors_graph(self, X: Any = None, n_neighbors: int | None = None, mode: str = "connectivity") -> csr_matrix:
        """Find the nearest fitted rows as a sparse matrix.

        Args:
            X: (B, d) queries; None: the fitted rows, of which none is its own neighbour.
            n_neighbors: How many; None: the estimator's.
            mode: "connectivity": ones; "distance": distances.

        Returns:
            (B, N) CSR of float64, each row's entries in the order of their distances. It holds explicit zeros where a
            distance is 0.

        Raises:
            ValueError: As `kneighbors`, or for another mode.
        """
        as_choice(mode, _MODES, "`mode`")
        distances, indices = (part.cpu().numpy() for part in self._find(X, n_neighbors))
        is_found = indices >= 0
        values = distances[is_found] if mode == "distance" else np.ones(int(is_found.sum()))
        ends = np.concatenate([[0], is_found.sum(1).cumsum()])
        return csr_matrix((values, indices[is_found], ends), shape=(len(indices), self.n_samples_fit_))

    def _find(self, X: Any, n_neighbors: int | None) -> Neighbors:
        """Find neighbours with float64 distances, as scikit-learn has them."""
        check_is_fitted(self)
        k = as_count(self.n_neighbors if n_neighbors is None else n_neighbors, "`n_neighbors`")
        rows = self.n_samples_fit_ - (X is None)
        if k > rows:
            others = " beside each fitted row itself" if X is None else ""
            raise ValueError(
                f"`n_neighbors` must be at most the {rows} rows that there are{others}, got {k}: lower it or fit more"
            )
        index: KNNIndex = self._index
        if X is not None:
            return index._reported(index._nearest(validate_data(self, X, reset=False, dtype=_DTYPES), k))
        neighbors = index._reported(index._nearest(self._fit_X, k + 1))
        return Neighbors(*drop_self(*neighbors, torch.arange(len(neighbors.indices), device=neighbors.indices.device)))

    def _options(self, X: _Array) -> dict[str, Any]:
        """Choose the index's options. Rows are stored as they came, so that distances are those of the rows given."""
        metric = as_choice(_SYNONYMS.get(self.metric, self.metric), (*DISTANCES, *_SYNONYMS), "`metric`")
        dtype = {8: torch.float64, 4: torch.float32, 2: torch.float16}[X.dtype.itemsize]
        return {"distance_metric": metric, "device": self.device, "storage_dtype": dtype}

    def _remember(self, X: _Array, index: KNNIndex) -> None:
        self._fit_X, self._index, self.n_samples_fit_ = X, index, len(X)


class KNNClassifier(ClassifierMixin, _FittedNeighbors):
    """Classify by the vote of the nearest rows: scikit-learn's KNeighborsClassifier on this package's exact search.

    Predictions are those of KNeighborsClassifier with the same n_neighbors, weights and metric; where rows are equally
    near, those of lower number come first here. `predict(None)` and `score(None, y)` leave each fitted row out in turn.

    Args:
        n_neighbors: How many rows vote.
        weights: "uniform"; "distance": 1 / d, rows at distance 0 alone where there are any; "inverse": 1 / (d + T);
            "softmax": softmax of -d / T, with metric "cosine" the rule of DINO. See `vote`.
        temperature: T above, in the unit of the distances.
        metric: "euclidean", "squared_euclidean", "cosine", "manhattan" or "dot" (see `KNNIndex`), or scikit-learn's
            "minkowski" (for euclidean), "l2", "sqeuclidean", "l1", "cityblock".
        index: A spec of `KNNIndex`: "flat" is exact.
        device: Where to hold the rows and search; None: the CPU.

    Attributes:
        classes_: (C,) the class of each column of `predict_proba`.
        n_samples_fit_: Number of fitted rows.
        n_features_in_: Width of a row.

    Example:
        >>> classifier = KNNClassifier(n_neighbors=3).fit([[0.0], [1.0], [2.0], [3.0]], ["a", "a", "b", "b"])
        >>> classifier.predict([[1.1]])
        array(['a'], dtype='<U1')
        >>> classifier.predict_proba([[2.2]]).round(3)
        array([[0.333, 0.667]])
    """

    def __init__(
        self,
        n_neighbors: int = 5,
        *,
        weights: str = "uniform",
        temperature: float = 0.07,
        metric: str = "euclidean",
        index: str = "flat",
        device: str | None = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.weights = weights
        self.temperature = temperature
        self.metric = metric
        self.index = index
        self.device = device

    def fit(self, X: Any, y: Any) -> Self:
        """Index rows with their classes.

        Args:
            X: (N, d) rows.
            y: (N,) classes: numbers or names.

        Raises:
            ValueError: If X or y does not fit, or an option is out of range.
        """
        X, y = validate_data(self, X, y, dtype=_DTYPES)
        check_classification_targets(y)
        as_count(self.n_neighbors, "`n_neighbors`")
        options = self._options(X)
        check_vote_options(**self._vote_options(), distance_metric=options["distance_metric"])
        self.classes_, numbers = np.unique(y, return_inverse=True)
        self._bank = FeatureBank(X, numbers, num_classes=len(self.classes_), index=self.index, **options)
        self._remember(X, self._bank.index)
        return self

    def predict(self, X: Any) -> _Array:
        """Return the (B,) classes with the most votes, the first in `classes_` among equals.

        Args:
            X: (B, d) queries; None: the fitted rows, each left out of its own vote.
        """
        votes = self.predict_proba(X)
        return np.asarray(self.classes_[votes.argmax(axis=1)])

    def predict_proba(self, X: Any) -> _Array:
        """Return the (B, C) float64 shares of the votes of each class.

        Args:
            X: (B, d) queries; None: the fitted rows, each left out of its own vote.

        Raises:
            ValueError: As `kneighbors`.
        """
        neighbors = self._find(X, None)
        shares = self._bank.votes(neighbors, **self._vote_options()).shares.double().cpu().numpy()
        # From float32, which adds up to 1 only as closely as that; without a neighbour, which an approximate index may
        # not find, no class is likelier than another.
        total = shares.sum(axis=1, keepdims=True)
        proportions: _Array = np.full_like(shares, 1 / len(self.classes_))
        np.divide(shares, total, out=proportions, where=total > 0)
        return proportions

    def _vote_options(self) -> dict[str, Any]:
        weights = as_choice(self.weights, _WEIGHTS, "`weights`")
        if weights == "distance":
            return {"weighting": "inverse", "temperature": _NEAR_ZERO}
        return {"weighting": weights, "temperature": self.temperature}


class KNNTransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, _FittedNeighbors):
    """Make the sparse graph of nearest rows: scikit-learn's KNeighborsTransformer on this package's exact search.

    The conventions are its: in mode "distance" the graph has n_neighbors + 1 entries a row, as a row that was fitted is
    its own first neighbour, at distance 0, stored as an explicit zero. In mode "connectivity" it has n_neighbors, the
    row itself among them. `kneighbors_graph()` is the graph without the rows themselves.

    Args:
        n_neighbors: How many neighbours a row has, itself not counted in mode "distance".
        mode: "distance", or "connectivity": ones.
        metric: See `KNNClassifier`.
        index: A spec of `KNNIndex`: "flat" is exact.
        device: Where to hold the rows and search; None: the CPU.

    Attributes:
        n_samples_fit_: Number of fitted rows.
        n_features_in_: Width of a row.

    Example:
        >>> graph = KNNTransformer(n_neighbors=1).fit_transform([[0.0], [1.0], [3.0]])
        >>> graph.toarray()
        array([[0., 1., 0.],
               [1., 0., 0.],
               [0., 2., 0.]])
        >>> graph.nnz
        6
    """

    def __init__(
        self,
        n_neighbors: int = 5,
        *,
        mode: str = "distance",
        metric: str = "euclidean",
        index: str = "flat",
        device: str | None = None,
    ) -> None:
        self.n_neighbors = n_neighbors
        self.mode = mode
        self.metric = metric
        self.index = index
        self.device = device

    def fit(self, X: Any, y: Any = None) -> Self:
        """Index rows.

        Args:
            X: (N, d) rows.
            y: Not looked at.

        Raises:
            ValueError: If X does not fit, or an option is out of range.
        """
        X = validate_data(self, X, dtype=_DTYPES)
        as_count(self.n_neighbors, "`n_neighbors`")
        as_choice(self.mode, _MODES, "`mode`")
        with named_as_index():
            self._remember(X, KNNIndex(self.index, **self._options(X)).build(X))
        return self

    def transform(self, X: Any) -> csr_matrix:
        """Return the (B, N) CSR graph from queries to the fitted rows, each row's entries in the order of distance.

        Args:
            X: (B, d) queries.

        Raises:
            ValueError: As `kneighbors`.
        """
        check_is_fitted(self)
        if X is None:
            raise ValueError("`X` must be (B, d) queries, got None: kneighbors_graph() has the rows without themselves")
        return self.kneighbors_graph(X, self.n_neighbors + (self.mode == "distance"), self.mode)

    @property
    def _n_features_out(self) -> int:
        return self.n_samples_fit_
