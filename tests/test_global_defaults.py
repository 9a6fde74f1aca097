"""What a process sets for all of torch changes nothing that is computed here, and is as it was afterwards."""

import contextlib
import random

import numpy as np
import pytest
import torch
from torchmetrics.classification import MulticlassAccuracy

from faiss_knn import FeatureBank, KNNIndex, OnlineKNN, evaluate, retrieval_metrics, vote
from tests.online.parts import Echo, loader, trainer

CPU = torch.device("cpu")


def rows(n, seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, n)
    centres = np.random.default_rng(99).normal(size=(5, 24))
    return torch.from_numpy((centres[labels] + rng.normal(size=(n, 24))).astype(np.float32)), torch.from_numpy(labels)


BANK, LABELS = rows(600, 0)
QUERIES, TRUTH = rows(70, 1)
MULTI_HOT = torch.nn.functional.one_hot(LABELS, 5)


def search(spec, distance_metric="euclidean", queries=QUERIES, **options):
    index = KNNIndex(spec, distance_metric=distance_metric, **options).build(BANK)
    return [*index.search(queries, 9), *index.search(queries[:1], 1)]


def predictions(labels=LABELS, **options):
    bank = FeatureBank(BANK, labels, distance_metric="cosine")
    return [bank.predict(QUERIES, 9, **options), bank.votes(bank.neighbors(QUERIES, 9), **options).shares]


def votes():
    distances = torch.linspace(0, 3, 30, dtype=torch.float32, device=CPU).view(6, 5)
    return [vote(distances, LABELS[:30].view(6, 5), 5, weighting=weighting) for weighting in ("inverse", "softmax")]


def records():
    found = evaluate(
        BANK, LABELS, QUERIES, TRUTH, k=(1, 9), weighting=("inverse", "softmax"), index=("flat", "IVF8,Flat"),
        metrics=["MulticlassAUROC", "MulticlassAccuracy(top_k=2)"], seed=3,
    ).records  # fmt: skip
    timed = {"build_s", "search_s", "qps", "versions", "created"}
    return [{key: value for key, value in record.items() if key not in timed} for record in found]


def retrieval():
    counts = torch.bincount(LABELS, minlength=5)[TRUTH]
    found = KNNIndex().build(BANK).search(QUERIES, 20)
    return retrieval_metrics(LABELS[found.indices], TRUTH, counts, [1, 20])


def run():
    knn = OnlineKNN("knn", "embedding", "label", 400, {"acc": MulticlassAccuracy(5, average="micro")}, k=(1, 5))
    fit = trainer(knn)
    fit.fit(Echo(), loader(x=BANK, label=LABELS, batch_size=100), loader(x=QUERIES, label=TRUTH))
    return {key: value.item() for key, value in fit.callback_metrics.items() if key.startswith("eval/")}


CALLS = {
    **{spec: lambda spec=spec: search(spec) for spec in ("flat", "fast", "ivf", "auto", "Flat", "IVF8,Flat", "HNSW16")},
    "flat cosine": lambda: search("flat", "cosine"),
    "flat manhattan": lambda: search("flat", "manhattan"),
    "flat float64": lambda: search("flat", queries=QUERIES.double(), storage_dtype=torch.float64),
    "flat bfloat16": lambda: search("flat", storage_dtype=torch.bfloat16),
    "ivf tuned": lambda: search("ivf", target_recall=0.9),
    "bank": predictions,
    "bank of multi-hot": lambda: predictions(MULTI_HOT, weighting="softmax"),
    "bank of shares": lambda: predictions(0.9 * MULTI_HOT.float() + 0.02, weighting="uniform"),
    "vote": votes,
    "evaluate": records,
    "retrieval_metrics": retrieval,
}
RUNS = {"OnlineKNN": run}


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def default_device(name):
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def flush_denormal():
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


SETTINGS = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: default_device("meta"),
    "deterministic": deterministic,
    "flush denormal": flush_denormal,
    "inference mode": torch.inference_mode,
}


def bits(value):
    if isinstance(value, torch.Tensor):
        return str(value.dtype), value.shape, value.cpu().numpy().tobytes()
    if isinstance(value, list):
        return [bits(one) for one in value]
    return repr(value)


EXPECTED: dict[str, object] = {}


def expected(name):
    if name not in EXPECTED:
        EXPECTED[name] = bits((CALLS | RUNS)[name]())
    return EXPECTED[name]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", CALLS)
def test_a_process_wide_setting_changes_no_bit(name, setting):
    plain = expected(name)
    with SETTINGS[setting]():
        assert bits(CALLS[name]()) == plain


@pytest.mark.parametrize("setting", ["float64", "float16", "bfloat16", "deterministic", "flush denormal"])
def test_a_process_wide_setting_changes_nothing_that_a_run_logs(setting):
    plain = expected("OnlineKNN")
    with SETTINGS[setting]():
        assert bits(run()) == plain


def state():
    return (
        torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), torch.get_default_dtype(),  # noqa: NPY002
        torch.get_default_device(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
        torch.is_grad_enabled(), torch.get_float32_matmul_precision(), float(torch.tensor(1e-40) * 1),
        np.geterr(),
    )  # fmt: skip


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("name", CALLS)
def test_process_wide_settings_are_as_they_were(name):
    before = state()
    CALLS[name]()
    assert state() == before
