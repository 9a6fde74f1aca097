"""OnlineKNN(protocol=...): the settings of another library, and the same number as offline."""

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from faiss_knn import OnlineKNN, evaluate
from tests.online.parts import Echo, clusters, loader, trainer

BANK, QUERIES = clusters(400, spread=6.0), clusters(90, spread=6.0, seed=1)


def scores(**options):
    metrics = {"acc": MulticlassAccuracy(4, average="micro")}
    knn = OnlineKNN("knn", "embedding", "label", 400, metrics, bank_dataloader_idx=0, **options)
    run = trainer(knn)
    run.validate(Echo(), [loader(**BANK), loader(**QUERIES)], verbose=False)
    return knn, {key: float(value) for key, value in run.callback_metrics.items() if key.endswith("_acc")}


@pytest.mark.parametrize("given", [{}, {"distance_metric": "euclidean"}, {"k": (5, 9), "temperature": 0.5}])
def test_scores_are_those_of_evaluate(given):
    knn, online = scores(protocol="dino", **given)
    offline = evaluate(BANK["x"], BANK["label"], QUERIES["x"], QUERIES["label"], protocol="dino", **given)
    assert online == {f"eval/knn_k{r['k']}_acc": pytest.approx(r["top1"]) for r in offline.records}
    assert knn.protocol == offline.records[0]["protocol"]
    assert (knn.temperature, knn.weighting) == (given.get("temperature", 0.07), "softmax")
    _, plain = scores(k=knn.k)
    assert plain != online


def test_products_of_features_as_they_are():
    _, online = scores(protocol="lightly-raw", k=(20, 200))
    offline = evaluate(BANK["x"], BANK["label"], QUERIES["x"], QUERIES["label"], protocol="lightly-raw", k=(20, 200))
    assert online == {f"eval/knn_k{r['k']}_acc": pytest.approx(r["top1"]) for r in offline.records}
    assert 0.3 < offline.records[0]["top1"] < 1


def test_options_that_are_not_given_stay_what_they_were():
    knn = OnlineKNN("knn", "embedding", "label", 400)
    assert (knn.k, knn.temperature, knn.distance_metric, knn.weighting) == (5, 0.07, "euclidean", "inverse")
    assert knn.protocol is None
    assert OnlineKNN("knn", "x", "y", 9, protocol="dino", k=5).protocol == "dino, k=5"
    assert OnlineKNN("knn", "x", "y", 9, protocol="dino", k=[5, 9]).protocol == "dino, k=(5, 9)"
    assert OnlineKNN("knn", "x", "y", 9, protocol="dino", k=torch.tensor([5, 9])).protocol == "dino, k=(5, 9)"
    with pytest.raises(ValueError, match=r"`protocol` must be one of dino, .*, got 'Dino'"):
        OnlineKNN("knn", "embedding", "label", 400, protocol="Dino")
