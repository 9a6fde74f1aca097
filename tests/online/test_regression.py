"""Targets that are numbers, in the loop: means by scikit-learn, metrics by scikit-learn and scipy, over all queries."""

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, sem
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score
from sklearn.neighbors import KNeighborsRegressor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection, PearsonCorrCoef, R2Score
from torchmetrics.classification import MulticlassAccuracy, MultilabelAccuracy

from faiss_knn import OnlineEvaluator, OnlineKNN
from faiss_knn.online.number_metrics import NumberTable
from tests.online.parts import Echo, loader, trainer

RANDOM = torch.Generator().manual_seed(3)


def people(n):
    """Faces, with the year in which they were taken, a place and a kind; one row in nine has no year."""
    x = torch.randn(n, 5, generator=RANDOM)
    year = 2000 + 10 * x[:, 0] + torch.randn(n, generator=RANDOM)
    year[torch.arange(n) % 9 == 4] = torch.nan
    place = torch.stack([x[:, 1], x[:, 2] ** 2], 1)
    return {"x": x, "year": year, "place": place, "kind": (x[:, 0] > 0).long(), "id": torch.arange(n)}


TRAIN, VAL = people(400), people(103)
METRICS = {"mae": MeanAbsoluteError(), "mse": MeanSquaredError(), "r2": R2Score(), "r": PearsonCorrCoef()}
ACCURACY = {"acc": MulticlassAccuracy(2, average="micro")}


def knn(kind=OnlineEvaluator, given="x", target="year", metrics=METRICS, **options):
    return kind("knn", given, target, **{"queue_length": 400, "metrics": metrics, "k": 5} | options)


def scored(evaluator, train=TRAIN, val=VAL, batch=16):
    """The predictions of all batches, and the values."""
    evaluator.observe(**train)
    evaluator.start()
    found = [evaluator.score(**{k: v[a : a + batch] for k, v in val.items()}) for a in range(0, len(val["x"]), batch)]
    return found, evaluator.finish()


def expected(key="year", k=5):
    """Means and truth, of the queries that have a number."""
    has = TRAIN[key].reshape(400, -1).isfinite().all(1)
    oracle = KNeighborsRegressor(k, weights=lambda distances: 1 / (distances + 0.07)).fit(
        TRAIN["x"][has].double(), TRAIN[key][has].double()
    )
    return oracle.predict(VAL["x"].double()), VAL[key].double().numpy()


def test_means_and_metrics_are_those_of_scikit_learn_and_scipy():
    found, values = scored(knn())
    means, truth = expected()
    np.testing.assert_allclose(torch.cat(found), means, rtol=1e-6)
    has = ~np.isnan(truth)
    means, truth = means[has], truth[has]
    assert values == pytest.approx(
        {
            "eval/knn_mae": mean_absolute_error(truth, means),
            "eval/knn_mse": mean_squared_error(truth, means),
            "eval/knn_r2": r2_score(truth, means),
            "eval/knn_r": pearsonr(truth, means).statistic,
            "eval/knn_skipped": sum(int(part["year"].isnan().sum()) for part in (TRAIN, VAL)),
        },
        rel=2e-6,
    )
    assert values["eval/knn_r2"] > 0.5


def test_several_numbers_a_row():
    metrics = {"mae": MeanAbsoluteError(num_outputs=2), "r2": R2Score(multioutput="raw_values")}
    found, values = scored(knn(target="place", metrics=metrics))
    means, truth = expected("place")
    np.testing.assert_allclose(torch.cat(found), means, rtol=1e-5)
    each = {
        f"eval/knn_{name}_{i}": value
        for name, of in (("mae", mean_absolute_error), ("r2", r2_score))
        for i, value in enumerate(of(truth, means, multioutput="raw_values"))
    }
    assert values == pytest.approx(each, rel=1e-5)


@pytest.mark.parametrize("options", [{"search": "epoch"}, {"id": "id"}, {"index": "IVF1,Flat"}], ids=str)
def test_the_same_bits_in_any_batches_and_by_any_way(options):
    _, values = scored(knn())
    _, others = scored(knn(**options), batch=7)
    others.pop("eval/knn_index_recall", None)
    assert others == values


def test_the_callback_logs_and_hands_out_the_same():
    seen = []

    class Watched(Echo):
        def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
            seen.append(batch["knn_preds"])

    run = trainer(knn(OnlineKNN, "embedding"), num_sanity_val_steps=0)
    run.fit(Watched(), loader(64, **TRAIN), loader(16, **VAL))
    found, values = scored(knn())
    assert {key: value.item() for key, value in run.callback_metrics.items()} == values
    assert all(torch.equal(one, other) for one, other in zip(seen, found, strict=True))


def test_a_class_and_a_number_of_several_inputs():
    train, val = ({**part, "twice": 2 * part["x"]} for part in (TRAIN, VAL))
    both = knn(given=("x", "twice"), target={"kind": ACCURACY, "year": METRICS}, metrics=None, k=(1, 5))
    found, values = scored(both, train, val)
    alone = {}
    for given in ("x", "twice"):
        for target, metrics in (("kind", ACCURACY), ("year", METRICS)):
            one = OnlineEvaluator(f"knn_{given}_{target}", given, target, 400, metrics, k=(1, 5))
            own, own_values = scored(one, train, val)
            alone |= own_values
            assert all(torch.equal(batch[f"{given}_{target}"], part) for batch, part in zip(found, own, strict=True))
    assert values == alone
    assert values["eval/knn_x_year_k5_mae"] < values["eval/knn_x_year_k1_mae"]


def test_standard_errors_are_those_of_means():
    metrics = {"mae": MeanAbsoluteError(), "rmse": MeanSquaredError(squared=False), "mse": MeanSquaredError()}
    _, values = scored(knn(metrics=metrics, standard_errors=True))
    means, truth = expected()
    errors = (means - truth)[~np.isnan(truth)]
    assert values["eval/knn_mae_se"] == pytest.approx(sem(abs(errors)), rel=1e-5)
    assert values["eval/knn_mse_se"] == pytest.approx(sem(errors**2), rel=1e-5)
    assert values["eval/knn_rmse_se"] == pytest.approx(sem(errors**2) / (2 * np.sqrt(np.mean(errors**2))), rel=1e-5)
    _, of_places = scored(knn(target="place", metrics=MeanAbsoluteError(), standard_errors=True))
    means, truth = expected("place")
    assert of_places["eval/knn_MeanAbsoluteError_se"] == pytest.approx(sem(abs(means - truth).mean(1)), rel=1e-5)


def test_numbers_too_close_for_float32_keep_float64():
    train, val = ({**part, "year": part["year"].double() + 1e6} for part in (TRAIN, VAL))
    found, values = scored(knn(), train, val)
    assert found[0].dtype == torch.float64
    assert values["eval/knn_r2"] == pytest.approx(scored(knn())[1]["eval/knn_r2"], abs=1e-4)


def test_rows_without_neighbours_are_no_number():
    empty = knn(target="place", metrics=MeanAbsoluteError())
    empty.start()
    assert empty.score(**VAL).isnan().all()
    assert empty.score(**VAL).shape == (103, 2)
    val = {**VAL, "x": VAL["x"].index_fill(0, torch.tensor([3]), torch.inf)}
    found, _ = scored(knn(), val=val)
    assert torch.cat(found).isnan().nonzero().tolist() == [[3]]


def test_values_do_not_depend_on_the_order_of_queries():
    means, targets = torch.randn(2, 1000, generator=RANDOM) * 10 ** torch.randn(1000, generator=RANDOM)
    found = []
    for rows in (torch.arange(1000), torch.randperm(1000, generator=RANDOM)):
        table = NumberTable(METRICS, [5], [0])
        for part in rows.split(64):
            table.update(0, 5, means[part, None], targets[part])
        found.append(table.values("eval", False, standard_errors=True)[0])
    assert found[0]["eval_mae"].dtype == torch.float64
    assert found[0] == found[1]


class TestWhatDecides:
    """The metrics, never the values."""

    def test_multi_label_stays_beside_a_metric_of_classes(self, logged):
        labels = (torch.rand(400, 3, generator=RANDOM) > 0.5).float()
        both = {"acc": MultilabelAccuracy(3), "mse": MeanSquaredError()}
        (first, *_), values = scored(
            knn(metrics=both), {"x": TRAIN["x"], "year": labels}, {"x": VAL["x"], "year": labels[:103]}
        )
        assert first.sum(1).max() > 5  # raw scores, not means
        assert not logged
        (same, *_), again = scored(
            knn(metrics=MeanSquaredError(), num_classes=3),
            {"x": TRAIN["x"], "year": labels},
            {"x": VAL["x"], "year": labels[:103]},
        )
        assert torch.equal(first, same)
        assert again["eval/knn_MeanSquaredError"] == values["eval/knn_mse"]

    def test_floats_of_0_and_1_that_become_numbers_are_named(self, logged):
        labels = (torch.rand(400, 3, generator=RANDOM) > 0.5).float()
        found, _ = scored(
            knn(metrics=MeanSquaredError()), {"x": TRAIN["x"], "year": labels}, {"x": VAL["x"], "year": labels[:103]}
        )
        assert found[0].max() <= 1
        assert [
            message
            for message in logged
            if "'year' holds floats of 0 and 1 (or -1), and is taken as numbers" in message
        ]

    def test_class_ids_are_refused_at_the_first_step(self):
        with pytest.raises(
            ValueError, match=r"mae cannot judge .* against class ids: .*: 'kind' is torch.int64, .* \.float\(\)"
        ):
            knn(target="kind").observe(**TRAIN)

    def test_a_metric_of_ones_own_beside_one_of_regression(self):
        class Bias(Metric):
            def __init__(self):
                super().__init__()
                self.add_state("sum", torch.tensor(0.0), dist_reduce_fx="sum")

            def update(self, means, targets):
                self.sum += (means - targets).mean()

            def compute(self):
                return self.sum

        _, values = scored(knn(metrics=MetricCollection({"bias": Bias(), "mae": MeanAbsoluteError()})))
        means, truth = expected()
        assert values["eval/knn_bias"] == pytest.approx(np.nanmean(means - truth), rel=1e-3)

    @pytest.mark.parametrize(
        ("metrics", "target", "message"),
        [
            (
                {"r2": R2Score(), "r": PearsonCorrCoef(num_outputs=3)},
                "place",
                r"metric r cannot judge targets of shape \(n, 2\)",
            ),
            ({"r": PearsonCorrCoef()}, "place", r"metric r cannot judge targets of shape \(n, 2\)"),
            (
                {"acc": MulticlassAccuracy(2), "mae": MeanAbsoluteError()},
                "year",
                "must be integers|must hold class ids",
            ),
        ],
    )
    def test_what_does_not_fit_is_refused_at_the_first_step(self, metrics, target, message):
        with pytest.raises(ValueError, match=message):
            knn(metrics=metrics, target=target).observe(**TRAIN)

    def test_targets_of_another_width_in_validation(self):
        evaluator = knn(target="place", metrics=MeanAbsoluteError())
        with pytest.raises(ValueError, match="'place' has 3 numbers a row in validation, and 2 in the bank"):
            scored(evaluator, val={**VAL, "place": torch.rand(103, 3)})
