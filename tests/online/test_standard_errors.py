"""Standard errors of accuracies against their formulas, row by row, and against repeated draws."""

import math

import pytest
import torch
from torchmetrics.classification import (
    BinaryAccuracy,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassRecall,
)

from faiss_knn import OnlineKNN
from faiss_knn.online.standard_errors import has_standard_error, standard_error
from tests.online.test_evaluator import TRAIN, VAL, evaluator, trained, validated

RIGHT = [True] * 6 + [False] * 2 + [True, False, True] + [True] * 4  # of classes 0 (eight), 1 (three) and 2 (four)
LABELS = torch.tensor([0] * 8 + [1] * 3 + [2] * 4)
SCORES = torch.eye(4)[torch.where(torch.tensor(RIGHT), LABELS, (LABELS + 1) % 3)]


def binomial(right, n):
    return math.sqrt(right / n * (1 - right / n) / n)


EACH = [binomial(6, 8), binomial(2, 3), 0.0]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (MulticlassAccuracy(4, average="micro"), [binomial(12, 15)]),
        (MulticlassAccuracy(4, average="weighted"), [binomial(12, 15)]),
        (MulticlassAccuracy(4), [math.hypot(*EACH) / 3]),  # class 3 is nowhere
        (MulticlassRecall(4), [math.hypot(*EACH) / 3]),
        (MulticlassAccuracy(4, average=None), [*EACH, math.nan]),
        (MulticlassAccuracy(4, top_k=2, average="micro"), None),
    ],
)
def test_the_formula(metric, expected):
    metric.update(SCORES[:10], LABELS[:10])
    metric.update(SCORES[10:], LABELS[10:])
    assert has_standard_error(metric)
    if expected is None:
        in_two = (SCORES.topk(2).indices == LABELS[:, None]).any(1)
        assert metric.compute().item() == pytest.approx(in_two.double().mean().item())
        expected = [binomial(int(in_two.sum()), 15)]
    assert standard_error(metric).reshape(-1).tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_two_classes():
    metric = BinaryAccuracy()
    metric.update(torch.tensor([0.9, 0.2, 0.8, 0.4, 0.1]), torch.tensor([1, 0, 0, 1, 0]))
    assert standard_error(metric).item() == pytest.approx(binomial(3, 5), abs=1e-12)


@pytest.mark.parametrize("average", ["micro", "macro"])
def test_it_is_how_much_the_metric_varies_from_draw_to_draw(average):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat_interleave(torch.tensor([200, 60, 100]))
    chance = torch.tensor([0.9, 0.5, 0.7])[labels] if average == "macro" else torch.full((360,), 0.7)
    values, errors = [], []
    for _ in range(400):
        right = torch.rand(360, generator=generator) < chance
        metric = MulticlassAccuracy(3, average=average)
        metric.update(torch.where(right, labels, (labels + 1) % 3), labels)
        values.append(metric.compute())
        errors.append(standard_error(metric))
    assert torch.stack(errors).mean().item() == pytest.approx(torch.stack(values).std().item(), rel=0.1)


def test_they_are_returned_beside_their_metrics_and_the_others_are_named_once(logged):
    knn = trained(evaluator(standard_errors=True, k=(1, 20)))
    values, _ = validated(knn, VAL)
    validated(knn, VAL)
    for k in (1, 20):
        share = values[f"eval/knn_k{k}_acc"]
        assert values[f"eval/knn_k{k}_acc_se"] == pytest.approx(math.sqrt(share * (1 - share) / 200), abs=1e-7)
    assert {key for key in values if key.endswith("_se")} == {"eval/knn_k1_acc_se", "eval/knn_k20_acc_se"}
    assert len([line for line in logged if "no standard error is logged for auroc: Multiclass" in line]) == 1
    several, _ = validated(trained(evaluator(standard_errors=True)), TRAIN, VAL)
    assert "eval/knn_acc_se/dataloader_idx_1" in several
    each, _ = validated(
        trained(
            evaluator(
                standard_errors=True, metrics=[MulticlassAccuracy(10, average=None), MulticlassConfusionMatrix(10)]
            )
        ),
        VAL,
    )
    assert {f"eval/knn_MulticlassAccuracy_{c}_se" for c in range(10)} <= set(each)


def test_a_name_that_a_standard_error_needs_is_taken():
    metrics = {"acc": MulticlassAccuracy(10), "acc_se": MulticlassAUROC(10)}
    OnlineKNN("knn", "x", "y", 8, metrics)
    with pytest.raises(ValueError, match="names of their own, got acc_se twice"):
        OnlineKNN("knn", "x", "y", 8, metrics, standard_errors=True)


def test_seconds_are_returned_by_part(capsys):
    values, _ = validated(trained(evaluator(seconds=True)), VAL)
    parts = [values[f"eval/knn_{part}_seconds"] for part in ("build", "search", "vote")]
    assert min(parts) > 0
    assert values["eval/knn_seconds"] == pytest.approx(sum(parts))
    assert not {key for key in validated(trained(evaluator(verbose=True)), VAL)[0] if "seconds" in key}


@pytest.mark.parametrize("option", ["seconds", "standard_errors"])
def test_switches_are_switches(option):
    with pytest.raises(ValueError, match=f"{option} must be True or False"):
        evaluator(**{option: "yes"})
