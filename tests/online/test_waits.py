"""How often a GPU would be waited for, counted on the CPU."""

from collections import defaultdict

import pytest
import torch
from torchmetrics import MeanAbsoluteError

from faiss_knn import FeatureBank, OnlineKNN, OnlineQueue
from faiss_knn.search.engines import exact, matrix_product, rerank, scan, selection
from tests.online.parts import Echo, loader, trainer
from tests.online.test_callback import knn
from tests.waits import Waits


def rows(count: int, seed: int) -> dict[str, torch.Tensor]:
    features = torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))
    return {"x": features, "label": torch.arange(count) % 4, "id": torch.arange(count)}


def waits_of(monkeypatch: pytest.MonkeyPatch, train: dict, val: dict, **options) -> dict[str, list[list[str]]]:
    """Fit, and return for each hook what every call of it waited for."""
    waits: dict[str, list[list[str]]] = defaultdict(list)

    def watched(hook):
        def run(*args, **kwargs):
            with Waits() as seen:
                hook(*args, **kwargs)
            waits[hook.__name__].append(seen.lines)

        return run

    for owner in (OnlineKNN, OnlineQueue):
        for name in ("on_train_batch_end", "on_validation_batch_end"):
            if name in vars(owner):
                monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    for module in (scan, selection, exact, rerank):
        monkeypatch.setattr(module, "needs_no_wait", lambda device: False)  # the search of a GPU
    monkeypatch.setattr(matrix_product, "prefers_numpy", lambda: False)  # and its product, whichever is faster
    run = trainer(knn(queue_length=2000, **options), num_sanity_val_steps=0)
    run.fit(Echo(), loader(250, **train), loader(32, **val))
    return waits


@pytest.mark.parametrize("options", [{}, {"id": "id"}, {"input_dim": 16, "bank_dtype": torch.float16}])
def test_a_training_step_after_the_first_never_waits(monkeypatch, options):
    steps = waits_of(monkeypatch, rows(2000, 0), rows(32, 1), **options)["on_train_batch_end"]
    assert len(steps) >= 3 * 8  # the callback's, and those of its queues
    assert len(steps[0]) <= 1, steps  # the labels of a fit's first step are looked at
    assert not any(steps[1:]), steps


@pytest.mark.parametrize(
    ("most", "options"),
    [
        (2, {}),
        (2, {"distance_metric": "cosine"}),
        (2, {"distance_metric": "manhattan"}),
        (2, {"k": (1, 5, 20)}),
        (2, {"bank_dtype": torch.float16}),
        (1, {"index": "ivf"}),
    ],
)
def test_a_clean_validation_batch_waits_for_what_it_must_know_of_the_batch_and_for_the_certificate(
    monkeypatch, most, options
):
    batches = waits_of(monkeypatch, rows(2000, 0), rows(128, 1), **options)["on_validation_batch_end"]
    assert len(batches) == 4
    assert all(1 <= len(lines) <= most for lines in batches), batches


def test_numbers_are_waited_for_no_more_than_class_ids(monkeypatch):
    train, val = ({**part, "label": part["x"][:, 0]} for part in (rows(2000, 0), rows(128, 1)))
    waits = waits_of(monkeypatch, train, val, metrics=MeanAbsoluteError())
    assert not any(waits["on_train_batch_end"][1:])
    assert all(1 <= len(lines) <= 2 for lines in waits["on_validation_batch_end"]), waits


def test_bad_rows_are_found_by_the_same_look(monkeypatch):
    val = rows(128, 1)
    val["x"][40] = float("nan")
    batches = waits_of(monkeypatch, rows(2000, 0), val)["on_validation_batch_end"]
    assert [len(lines) <= 2 for lines in batches] == [True, False, True, True]


def test_queries_that_nobody_looked_at_are_looked_at():
    bank = FeatureBank(torch.randn(500, 16), torch.arange(500) % 4)
    with Waits() as seen:
        bank.predict(torch.randn(8, 16))
    assert any(line.startswith("search/inputs.py") for line in seen.lines)
