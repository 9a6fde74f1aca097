import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from faiss_knn import OnlineKNN, evaluate
from tests.online.parts import Echo, loader, trainer


@pytest.mark.parametrize(
    ("k", "weighting", "temperature"), [(1, "inverse", 0.07), (9, "uniform", 1), (30, "softmax", 1e-3)]
)
def test_the_first_five_classes_online_are_those_of_the_records(k, weighting, temperature):
    generator = torch.Generator().manual_seed(0)
    x, label = torch.randn(300, 8, generator=generator), torch.randint(0, 10, (300,), generator=generator)
    knn = OnlineKNN(
        "knn", "embedding", "label", 200, {"top5": MulticlassAccuracy(10, top_k=5, average="micro")},
        k=k, weighting=weighting, temperature=temperature,
    )  # fmt: skip
    fit = trainer(knn)
    fit.fit(Echo(), loader(x=x[:200], label=label[:200]), loader(x=x[200:], label=label[200:]))
    (record,) = evaluate(
        x[:200], label[:200], x[200:], label[200:],
        k=k, weighting=weighting, temperature=temperature, distance_metric="euclidean",
    ).records  # fmt: skip
    assert fit.callback_metrics["eval/knn_top5"].item() == pytest.approx(record["top5"], abs=1e-6)
