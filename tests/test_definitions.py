"""What docs/definitions.md says of other libraries, as far as they are installed with the tests."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.retrieval import (
    retrieval_average_precision,
    retrieval_normalized_dcg,
    retrieval_precision,
)

from faiss_knn import evaluate, protocols, retrieval_metrics

PAGE = (Path(__file__).parent.parent / "docs/definitions.md").read_text()
README = (Path(__file__).parent.parent / "README.md").read_text()
RELEVANT = torch.tensor([True, False, True, False, True, True])
SCORES = torch.linspace(1, 0.1, 6)
OURS = retrieval_metrics(torch.where(RELEVANT, 0, 1)[None], torch.tensor([0]), torch.tensor([4]), [3, 6])


def stated(library: str) -> float:
    return float(re.search(rf"^\| {library}.*\| (0\.\d+) \|$", PAGE, re.MULTILINE)[1])


def test_average_precision_is_divided_by_three_different_numbers():
    gains = 1 + 2 / 3
    assert OURS["map@3"] == pytest.approx(gains / 3) == pytest.approx(stated("faiss-knn"), abs=5e-4)
    there = float(retrieval_average_precision(SCORES, RELEVANT, top_k=3))
    assert there == pytest.approx(gains / 2) == pytest.approx(stated("torchmetrics"), abs=5e-4)
    assert gains / 4 == pytest.approx(stated("pytorch-metric-learning"), abs=5e-4)


def test_precision_and_ndcg_are_torchmetrics_own():
    assert OURS["precision@3"] == pytest.approx(float(retrieval_precision(SCORES, RELEVANT, top_k=3)))
    assert float(retrieval_precision(SCORES, RELEVANT, top_k=10, adaptive_k=True)) == pytest.approx(4 / 6)
    assert OURS["ndcg@3"] == pytest.approx(float(retrieval_normalized_dcg(SCORES, RELEVANT, top_k=3)))


def test_macro_top1_is_balanced_accuracy_and_torchmetrics_counts_what_is_predicted():
    bank, queries = np.eye(5, 3), np.eye(5, 3)[[0, 1, 2]]
    record = evaluate(bank[:3], [0, 1, 2], queries, [0, 1, 0], k=1, num_classes=5).records[0]
    predicted, truth = torch.tensor([0, 1, 2]), torch.tensor([0, 1, 0])
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert record["macro_top1"] == pytest.approx(balanced_accuracy_score(truth, predicted)) == 0.75
    assert float(multiclass_accuracy(predicted, truth, 5, average="macro")) == pytest.approx(0.5)


def test_a_row_at_distance_zero_outvotes_all_others_in_scikit_learn():
    bank, labels, query = np.array([[0.0], [0.1], [0.1]]), [0, 1, 1], np.array([[0.0]])
    assert KNeighborsClassifier(3, weights="distance").fit(bank, labels).predict(query) == [0]
    report = evaluate(bank, labels, query, [1], k=3, distance_metric="euclidean", temperature=0.2)
    assert report.records[0]["top1"] == 1


def test_the_page_and_the_readme_have_a_number_for_every_protocol():
    for text, heading in ((PAGE, "## Protocols"), (README, "## Numbers that compare")):
        table = text[text.index(heading) :]
        named = {name for row in re.findall(r"^\| ([\w, -]+) \|", table, re.MULTILINE) for name in row.split(", ")}
        assert set(protocols()) <= named
