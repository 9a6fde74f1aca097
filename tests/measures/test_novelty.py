"""AUROC and FPR95 against scikit-learn's curve, ties included."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from faiss_knn.measures.novelty import detection


@pytest.mark.parametrize("levels", [4, 30, 10**6])
@pytest.mark.parametrize("ordinary", [19, 20, 21, 500])
def test_they_are_those_of_the_curve(levels, ordinary):
    rng = np.random.default_rng(levels)
    scores = np.concatenate([rng.normal(0, 1, ordinary), rng.normal(1, 1, 100)])
    scores = np.round(scores * levels) / levels
    outlier = np.arange(len(scores)) >= ordinary
    passes, accepted, _ = roc_curve(~outlier, -scores, drop_intermediate=False)
    found = detection(scores, outlier)
    assert found["auroc"] == pytest.approx(roc_auc_score(outlier, scores))
    assert found["fpr95"] == pytest.approx(passes[np.argmax(accepted >= 0.95)])


@pytest.mark.parametrize(
    ("outlier", "message"),
    [([True, False], "an entry for each of the scores"), ([True] * 3, "both outliers and others, got 3 outliers")],
)
def test_bad_input_is_named(outlier, message):
    with pytest.raises(ValueError, match=message):
        detection(np.arange(3.0), np.array(outlier))
