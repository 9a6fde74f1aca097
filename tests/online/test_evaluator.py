"""OnlineEvaluator in a plain loop: the numbers of OnlineKNN from the same rows, to the last bit."""

import re

import pytest
import torch
from sklearn.datasets import load_digits
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

from faiss_knn import OnlineEvaluator, OnlineKNN
from faiss_knn.online import collected_queries
from tests.online.parts import Echo, loader, trainer

IMAGES, LABELS = (torch.tensor(part) for part in load_digits(return_X_y=True))
NOISY = IMAGES.float() + 5 * torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(0))
TRAIN = {"x": NOISY[:400], "label": LABELS[:400], "id": torch.arange(400) % 300}
VAL = {"x": NOISY[400:600], "label": LABELS[400:600], "id": torch.arange(200) % 150}
OTHER = {"x": NOISY[600:700], "label": LABELS[600:700], "id": torch.arange(100)}


def arguments(**options):
    metrics = {"acc": MulticlassAccuracy(10, average="micro"), "auroc": MulticlassAUROC(10)}
    return ("knn", "embedding", "label"), {"queue_length": 350, "metrics": metrics} | options


def evaluator(**options):
    names, others = arguments(**options)
    return OnlineEvaluator(*names, **others)


def of_lightning(*val, batch_size=32, **options):
    """What the callback logs, and the predictions that it leaves in the batches."""
    names, others = arguments(**options)
    seen = []

    class Watched(Echo):
        def on_validation_batch_end(self, outputs, batch, batch_idx, dataloader_idx=0):
            seen.append(batch.get("knn_preds"))

    run = trainer(OnlineKNN(*names, **others), num_sanity_val_steps=0)
    run.fit(Watched(), loader(batch_size, **TRAIN), [loader(batch_size, **columns) for columns in val])
    return {key: value.item() for key, value in run.callback_metrics.items()}, seen


def trained(knn, columns=TRAIN, batch_size=32):
    for batch in loader(batch_size, **columns):
        knn.observe(embedding=batch["x"], label=batch["label"], id=batch["id"])
    return knn


def validated(knn, *val, batch_size=32):
    loaders = [loader(batch_size, **columns) for columns in val]
    knn.start(loaders)
    predictions = [
        knn.score(number, embedding=batch["x"], label=batch["label"], id=batch["id"])
        for number, batches in enumerate(loaders)
        for batch in batches
    ]
    return knn.finish(), predictions


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": (1, 20), "weighting": "softmax", "distance_metric": "cosine"},
        {"id": "id", "protocol": "dino"},
        {"input_dim": 64, "bank_dtype": torch.float16},
        {"index": "IVF16,Flat", "nprobe": 2},
    ],
    ids=str,
)
def test_the_numbers_are_those_of_the_callback(options):
    values, predictions = of_lightning(VAL, **options)
    ours, scores = validated(trained(evaluator(**options)), VAL)
    assert ours == values
    assert all(key.startswith("eval/knn_") for key in ours)
    for score, expected in zip(scores, predictions, strict=True):
        assert torch.equal(score, expected)


@pytest.mark.parametrize("options", [{}, {"bank_dataloader_idx": 0}])
def test_several_dataloaders_are_scored_apart_or_fill_the_bank(options):
    values, _ = of_lightning(OTHER, VAL, **options)
    ours, scores = validated(trained(evaluator(**options)), OTHER, VAL)
    assert ours == values
    assert len(ours) == (2 if options else 4)
    assert (scores[0] == 0).all() == bool(options)  # nothing votes on the bank's own rows


def test_the_oracle_in_float64_agrees():
    ours, _ = validated(trained(evaluator(k=1)), VAL)
    distances = torch.cdist(VAL["x"].double(), TRAIN["x"][-350:].double())
    right = TRAIN["label"][-350:][distances.argmin(1)] == VAL["label"]
    assert ours["eval/knn_acc"] == pytest.approx(right.double().mean().item(), abs=1e-7)
    assert 0.5 < ours["eval/knn_acc"] < 0.95


def test_several_validations_see_the_newest_rows_and_may_be_named():
    knn = trained(evaluator(k=1))
    first, _ = validated(knn, VAL)
    trained(knn, VAL)
    knn.start()
    knn.observe(embedding=OTHER["x"], label=OTHER["label"], id=OTHER["id"])  # counts from the next start on
    knn.score(embedding=VAL["x"], label=VAL["label"])
    assert knn.finish("test") == {"test/knn_acc": 1.0, "test/knn_auroc": 1.0}
    assert first["eval/knn_acc"] < 1.0


def test_values_that_are_no_numbers_are_kept_aside():
    knn = trained(evaluator(metrics={"each": MulticlassAccuracy(10, average=None)}))
    assert set(validated(knn, VAL)[0]) == {f"eval/knn_each_{i}" for i in range(10)}
    assert knn.results == {}


def test_calls_out_of_order_say_which_is_missing(logged):
    knn = trained(evaluator())
    batch = {"embedding": VAL["x"], "label": VAL["label"]}
    for call in (lambda: knn.score(**batch), knn.finish):
        with pytest.raises(RuntimeError, match=r"OnlineEvaluator\[knn\]: \w+\(\) outside of a validation: call start"):
            call()
    knn.start()
    knn.score(embedding=OTHER["x"], label=OTHER["label"])
    assert not logged
    knn.start()
    assert logged == ["OnlineEvaluator[knn]: start() without finish(): the validation begun before is dropped"]
    knn.score(**batch)
    assert knn.finish() == validated(trained(evaluator()), VAL, batch_size=200)[0]
    with pytest.raises(RuntimeError, match=r"finish\(\) outside"):
        knn.finish()


def test_an_empty_queue_gives_no_score(logged):
    knn = evaluator(metrics=None)
    knn.start()
    assert knn.score(embedding=VAL["x"], label=VAL["label"]).shape == (200, 0)
    assert knn.finish() == {}
    assert len(logged) == 1
    assert "empty" in logged[0]
    knn = evaluator()
    knn.start()
    assert torch.equal(knn.score(embedding=VAL["x"], label=VAL["label"]), torch.zeros(200, 10))
    assert knn.finish() == {}


def test_rows_that_cannot_be_scored_are_counted():
    bad = {**VAL, "x": VAL["x"].clone()}
    bad["x"][3] = float("nan")
    values, predictions = validated(trained(evaluator()), bad)
    assert values["eval/knn_skipped"] == 1.0
    assert (predictions[0][3] == 0).all()
    assert values["eval/knn_acc"] == of_lightning(bad)[0]["eval/knn_acc"]


def test_in_between_the_last_values_stand():
    knn = trained(evaluator(every_n_epochs=2))
    assert validated(knn, VAL)[0] == {}
    second, _ = validated(knn, VAL)
    third, scores = validated(knn, OTHER)
    assert third == second != {}
    assert not any(part.any() for part in scores)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda knn: knn.observe(embedding=VAL["x"]), r"observe\(\) needs the tensors embedding, label by name, got"),
        (lambda knn: knn.observe(embedding=VAL["x"], label=LABELS[:3]), "as many features as labels"),
        (lambda knn: knn.observe(embedding=VAL["x"], label=LABELS[:200] + 5), "observed label 14 >= num_classes"),
        (lambda knn: knn.observe(embedding=VAL["x"][:, :5], label=LABELS[:200]), r"'embedding': `rows` must have"),
        (lambda knn: knn.observe(embedding=[1.0], label=LABELS[:1]), "'embedding' must be a tensor with one row"),
        (lambda knn: knn.start([]), r"`dataloaders` must be .* got 0"),
        (lambda knn: (knn.start(), knn.score(1, embedding=VAL["x"], label=VAL["label"])), "1 dataloaders that start"),
        (lambda knn: (knn.start(), knn.score(embedding=VAL["x"])), r"score\(\) needs the tensors .* give label=… too"),
        (lambda knn: knn.load_state_dict({}), "`state_dict` must be what state_dict"),
        (lambda knn: knn.load_state_dict({"queues": {}, "rank": 0, "ranks": 1}), "embedding, label is missing"),
        (lambda knn: knn.load_state_dict({**knn.state_dict(), "rank": 1, "ranks": 2}), "got that of rank 1"),
        (lambda knn: evaluator(strict=True), "strict=True needs the module"),
        (lambda knn: evaluator(queue_length=0), "queue_length must be positive"),
    ],
)
def test_bad_calls_are_named(call, message):
    knn = evaluator()
    if "num_classes" not in message:
        trained(knn)
    with pytest.raises(ValueError, match=message):
        call(knn)


def test_a_bank_that_comes_after_its_queries_is_refused():
    knn = evaluator(bank_dataloader_idx=0)
    with pytest.raises(ValueError, match=r"give start\(\[bank_loader, scored_loader\]\)"):
        knn.start([None])
    knn.start()
    knn.score(0, embedding=TRAIN["x"], label=TRAIN["label"])
    knn.score(1, embedding=VAL["x"], label=VAL["label"])
    with pytest.raises(ValueError, match="go through the bank's dataloader first"):
        knn.score(0, embedding=TRAIN["x"], label=TRAIN["label"])


def test_a_step_that_fails_leaves_none_of_its_rows():
    knn = trained(evaluator())
    before = validated(knn, VAL)
    with pytest.raises(ValueError, match="'label': `rows` must have shape"):
        knn.observe(embedding=VAL["x"][:10], label=torch.zeros(10, 3))
    after = {key: part["rows"][0] for key, part in knn.state_dict()["queues"].items()}
    assert len(after["embedding"]) == len(after["label"]) == 340  # a full queue: as many of the oldest went
    assert torch.equal(after["embedding"], TRAIN["x"][-340:])
    assert validated(trained(knn), VAL)[0] == before[0]


@pytest.mark.parametrize("length", [350, 500, 100])
def test_it_resumes_where_it_was_at_any_length(tmp_path, length):
    torch.save(trained(evaluator()).state_dict(), tmp_path / "state.pt")
    resumed = evaluator(queue_length=length)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    kept = min(length, 350)
    rows = resumed.state_dict()["queues"]
    assert torch.equal(rows["embedding"]["rows"][0], TRAIN["x"][-kept:])
    uninterrupted = evaluator(queue_length=length)
    uninterrupted.observe(embedding=TRAIN["x"][-kept:], label=TRAIN["label"][-kept:])
    assert validated(trained(resumed, OTHER), VAL)[0] == validated(trained(uninterrupted, OTHER), VAL)[0]


def test_what_is_left_of_a_dataloaders_bank_is_nothing():
    knn = evaluator(bank_dataloader_idx=0)
    assert knn.state_dict() == {"queues": {}, "rank": 0, "ranks": 1}
    knn.load_state_dict(trained(evaluator()).state_dict())
    validated(knn, TRAIN, VAL)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k": (1, 20)},
        {"id": "id", "standard_errors": True},
        {"bank_dataloader_idx": 0},
        {"index": "IVF16,Flat", "nprobe": 2},
        {"metrics": None, "num_classes": None},
    ],
    ids=str,
)
def test_searching_at_the_end_of_the_epoch_changes_no_number(options, monkeypatch):
    monkeypatch.setattr(collected_queries, "_ROWS", 100)  # several groups, also across the two dataloaders
    val = [{**VAL, "x": VAL["x"].clone()}, OTHER]
    val[0]["x"][17] = float("nan")
    by_batch, scores = validated(trained(evaluator(**options)), *val)
    at_the_end, none = validated(trained(evaluator(search="epoch", **options)), *val)
    assert at_the_end == by_batch
    assert len(by_batch) >= 1
    assert none == [None] * len(scores)
    values, predictions = of_lightning(*val, search="epoch", **options)
    assert values == by_batch
    assert predictions == [None] * len(scores)


def test_what_is_kept_of_a_batch_is_a_copy():
    knn = trained(evaluator(search="epoch"))
    buffer = {"embedding": VAL["x"].clone(), "label": VAL["label"].clone()}
    knn.start()
    knn.score(**buffer)
    for tensor in buffer.values():
        tensor.zero_()
    assert knn.finish() == validated(trained(evaluator()), VAL, batch_size=200)[0]


@pytest.mark.parametrize("kind", [OnlineKNN, OnlineEvaluator])
@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("knn", "embedding", "label", 64), {"queue": 3}, "got an unexpected keyword argument 'queue'"),
        (("knn",), {}, "missing 3 required positional arguments: 'input', 'target', and 'queue_length'"),
        (("knn", *range(20)), {}, "takes from 5 to 14 positional arguments but 22 were given"),
    ],
)
def test_arguments_that_are_not_taken_are_said_of_what_was_called(kind, arguments, options, message):
    with pytest.raises(TypeError, match=re.escape(f"{kind.__name__}.__init__() {message}")):
        kind(*arguments, **options)
