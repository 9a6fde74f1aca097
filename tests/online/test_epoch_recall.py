"""The recall that is logged is that of the epoch's own queries."""

import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from faiss_knn import KNNIndex, OnlineKNN
from tests.online.parts import Echo, loader, trainer

DECAY = torch.arange(1, 65) ** -0.35


def rows(samples, count, seed):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(samples, 1, 64, generator=generator) * DECAY
    features = features + 0.1 * torch.randn(samples, count, 64, generator=generator) * DECAY
    return {"x": features.reshape(-1, 64), "label": torch.arange(samples).repeat_interleave(count) % 4}


def run(index, train, val, **options):
    metrics = {"acc": MulticlassAccuracy(4, average="micro")}
    callback = OnlineKNN("knn", "embedding", "label", len(train["x"]), metrics, k=10, index=index, **options)
    done = trainer(callback, num_sanity_val_steps=0)
    done.fit(Echo(), loader(1000, **train), loader(64, **val))
    return {key: value.item() for key, value in done.callback_metrics.items()}


@pytest.mark.parametrize("index", ["fast", "ivf", "HNSW4", "IVF64,Flat"])
def test_the_recall_of_the_epochs_own_queries_is_logged(index, logged):
    train, val = rows(1000, 6, seed=0), rows(200, 1, seed=1)
    scores = run(index, train, val, recall_queries=200)
    exact = KNNIndex().build(train["x"]).search(val["x"], 10).indices
    plain = KNNIndex(index).build(train["x"], expected_k=10)
    if index in ("HNSW4", "IVF64,Flat"):  # built alike; the others are tuned, and may differ in the last query
        found = plain.search(val["x"], 10).indices
        share = (found[:, :, None] == exact[:, None]).any(1).double().mean().item()
        assert scores["eval/knn_index_recall"] == pytest.approx(share, abs=0.02)
        assert any("of the exact neighbours" in message for message in logged) == (share < 0.88)
    else:
        assert scores["eval/knn_index_recall"] >= 0.97
        assert scores["eval/knn_acc"] == pytest.approx(run("flat", train, val)["eval/knn_acc"], abs=0.02)


def test_no_query_is_searched_twice_where_none_is_asked_for():
    assert "eval/knn_index_recall" not in run("HNSW4", rows(500, 2, seed=0), rows(50, 1, seed=1), recall_queries=0)


@pytest.mark.parametrize("index", ["ivf", "IVF64,Flat", "PQ8"])
def test_a_queue_with_too_few_rows_to_train_on_is_searched_exactly(index, logged):
    few, val = {key: values[:20] for key, values in rows(20, 1, seed=0).items()}, rows(30, 1, seed=1)
    assert run(index, few, val) == run("flat", few, val)
    assert sum("searches exactly until there are rows enough" in message for message in logged) == 1
