"""What comes in at the public entrances: a right answer, or an error of one line that names an argument."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from faiss_knn import FeatureBank, KNNIndex, retrieval_metrics, vote
from tests.odd import ODD, odd
from tests.reference import brute_force, log_class_scores

RNG = np.random.default_rng(5)
BANK = RNG.integers(-40, 41, (30, 2)).astype(np.float32) / 8  # numbers that every dtype holds
QUERIES = RNG.integers(-40, 41, (4, 2)).astype(np.float32) / 8
LABELS = RNG.integers(0, 3, 30)
DISTANCES, NEIGHBORS = (part[:, :3] for part in brute_force(QUERIES, BANK, 3))
VOTES = {"distances": (np.round(DISTANCES * 8) / 8).astype(np.float32), "labels": LABELS[NEIGHBORS], "num_classes": 3}


@dataclass(frozen=True)
class Entrance:
    """A public call, arguments that it takes, and what it must return for any that it takes."""

    call: Callable[..., Any]
    valid: dict[str, Any]
    answer: Callable[..., Any]


def search(features: Any, queries: Any, k: Any, **options: Any) -> list[Any]:
    build = {name: options.pop(name) for name in ("expected_k", "expected_queries")}
    return list(KNNIndex(**options).build(features, **build).search(queries, k))


def search_answer(features: Any, queries: Any, k: Any, distance_metric: Any = "euclidean", **options: Any) -> list[Any]:
    stored = {torch.float16: np.float16}.get(options["storage_dtype"], features.dtype)
    distances, indices = brute_force(queries, features.astype(stored), min(k, len(features)), distance_metric)
    return [distances, indices]


def predict(features: Any, labels: Any, queries: Any, k: Any, temperature: Any, weighting: Any, **options: Any) -> Any:
    return [FeatureBank(features, labels, **options).predict(queries, k, temperature, weighting)]


def predict_answer(
    features: Any, labels: Any, queries: Any, k: Any, temperature: Any, weighting: Any, **options: Any
) -> list[Any]:
    ignored = np.isin(labels, [-1] if options["ignore_index"] is None else [-1, options["ignore_index"]])
    kept = ~ignored.reshape(len(labels), -1).any(1)
    features, labels = features[kept], labels[kept]
    distances, indices = brute_force(queries, features, min(k, len(features)))
    if labels.ndim == 2:
        return vote_answer(distances, labels[indices], labels.shape[1], temperature, weighting)
    classes = np.unique(labels) if options["renumber"] else np.arange(options["num_classes"] or labels.max() + 1)
    return vote_answer(distances, np.searchsorted(classes, labels)[indices], len(classes), temperature, weighting)


def vote_answer(distances: Any, labels: Any, num_classes: Any, temperature: Any, weighting: Any) -> list[Any]:
    shares = np.exp(log_class_scores(distances, labels, num_classes, temperature, weighting))
    found = np.isfinite(distances)
    weights = {"inverse": 1 / (distances.astype(np.longdouble) + temperature), "uniform": 1.0 * found}
    return [shares * np.where(found, weights.get(weighting, 1 / max(1, found.shape[1])), 0).sum(1, keepdims=True)]


def judge(**arguments: Any) -> list[Any]:
    found = retrieval_metrics(**arguments)
    return [found[name] for name in sorted(found) if name.startswith(("precision", "mrr"))]


def judge_answer(neighbor_labels: Any, query_labels: Any, relevant_counts: Any, ks: Any) -> list[Any]:
    kept = relevant_counts > 0
    relevant = ((neighbor_labels == query_labels[:, None]) & (neighbor_labels >= 0))[kept]
    ranks = [(1 / (np.flatnonzero(row)[0] + 1) if row.any() else 0.0) for row in relevant]
    precisions = {f"precision@{k}": relevant[:, :k].mean() for k in ks}
    return [np.mean(ranks), *(precisions[name] for name in sorted(precisions))]


ENTRANCES = {
    "KNNIndex": Entrance(
        search,
        {
            "features": BANK, "queries": QUERIES, "k": 3, "spec": "flat", "distance_metric": "euclidean",
            "device": None, "nprobe": None, "target_recall": None, "storage_dtype": None, "chunk_size": -1,
            "expected_k": 10, "expected_queries": None,
        },
        search_answer,
    ),
    "FeatureBank": Entrance(
        predict,
        {
            "features": BANK, "labels": LABELS, "queries": QUERIES, "k": 3, "temperature": 0.5,
            "weighting": "inverse", "num_classes": None, "index": "flat", "expected_k": None,
            "expected_queries": None, "ignore_index": None, "renumber": False,
        },
        predict_answer,
    ),
    "vote": Entrance(vote, {**VOTES, "temperature": 0.5, "weighting": "inverse"}, vote_answer),
    "retrieval_metrics": Entrance(
        judge,
        {
            "neighbor_labels": np.array([[0, 1, 1], [2, 2, 2], [0, 2, -1]]), "query_labels": np.array([1, 2, 1]),
            "relevant_counts": np.array([4, 3, 0]), "ks": [1, 3],
        },
        judge_answer,
    ),
}  # fmt: skip

FEATURES = {
    "tensor": torch.from_numpy,
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "bfloat16": lambda x: torch.from_numpy(x).bfloat16(),
    "with gradient": lambda x: torch.from_numpy(x).clone().requires_grad_(),
    "Fortran order": np.asfortranarray,
    "reversed strides": lambda x: x[::-1].copy()[::-1],
    "every second": lambda x: np.repeat(x, 2, axis=0)[::2],
    "transposed": lambda x: torch.from_numpy(x.T.copy()).T,
    "big-endian": lambda x: x.astype(">f4"),
    "frame": pd.DataFrame,
    "masked without a mask": lambda x: np.ma.masked_array(x, mask=False),
}
IDS = {
    "list": lambda y: y.tolist(),
    **{dtype: lambda y, dtype=dtype: y.astype(dtype) for dtype in ("i1", "u1", "u2", "u4", "u8", ">i8", "O")},
    **{str(t): lambda y, t=t: torch.from_numpy(y).to(t) for t in (torch.uint8, torch.uint16, torch.int32)},
    "reversed strides": lambda y: y[::-1].copy()[::-1],
}
COLUMNS = IDS | {
    "column": lambda y: y[:, None],
    "series": pd.Series,
    "nullable series": lambda y: pd.Series(y, dtype="Int64"),
    "categorical": pd.Categorical,
    "frame": pd.DataFrame,
}
COUNTS = {"numpy": np.int64, "small": np.uint8, "0-d": torch.tensor, "0-d array": np.array}
NUMBERS = {"float32": np.float32, "float16": np.float16, "0-d": torch.tensor, "0-d array": np.array}
FORMS: dict[str, dict[str, dict[str, Callable[[Any], Any]]]] = {
    "KNNIndex": {"features": FEATURES, "queries": FEATURES, "k": COUNTS, "chunk_size": {"numpy": np.int32}},
    "FeatureBank": {
        "features": FEATURES, "queries": FEATURES, "labels": COLUMNS, "k": COUNTS, "temperature": NUMBERS,
        "renumber": {"numpy": np.bool_},
    },
    "vote": {"distances": FEATURES, "labels": IDS, "num_classes": COUNTS, "temperature": NUMBERS},
    "retrieval_metrics": {
        "query_labels": IDS, "relevant_counts": IDS, "ks": {"array": np.array, "range": lambda ks: set(ks)},
    },
}  # fmt: skip


def plain(value: Any) -> Any:
    """The value as an ndarray, or as a number of Python."""
    if isinstance(value, torch.Tensor):
        value = value.detach().float() if value.dtype == torch.bfloat16 else value.detach()
    if isinstance(value, torch.Tensor | np.ndarray | pd.DataFrame | pd.Series | list | np.generic):
        array = np.asarray(value)
        return array.item() if array.ndim == 0 else array
    return value


def same(found: list[Any], expected: list[Any]) -> None:
    found = [found] if isinstance(found, torch.Tensor) else found
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(one, np.float64), np.asarray(other, np.float64), rtol=2e-6, atol=1e-30)


@pytest.mark.parametrize("name", ENTRANCES)
def test_plain_arguments_give_the_right_answer(name):
    entrance = ENTRANCES[name]
    same(entrance.call(**entrance.valid), entrance.answer(**entrance.valid))


@pytest.mark.parametrize("name", ENTRANCES)
@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_every_form_of_an_argument_gives_the_same_answer(name, data):
    entrance, arguments = ENTRANCES[name], dict(ENTRANCES[name].valid)
    for argument, forms in FORMS[name].items():
        form = data.draw(st.sampled_from(["as it is", *forms]), label=argument)
        arguments[argument] = forms.get(form, lambda value: value)(arguments[argument])
    same(entrance.call(**arguments), entrance.answer(**entrance.valid))


@pytest.mark.parametrize("name", ENTRANCES)
@settings(max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_odd_arguments_are_refused_by_name_or_answered_rightly(name, data):
    entrance = ENTRANCES[name]
    changed = data.draw(st.lists(st.sampled_from(list(entrance.valid)), min_size=1, max_size=2, unique=True))
    drawn = {argument: data.draw(st.sampled_from(list(ODD)), label=argument) for argument in changed}
    arguments = entrance.valid | {argument: odd(value) for argument, value in drawn.items()}
    again = entrance.valid | {argument: odd(value) for argument, value in drawn.items()}  # a generator is used up
    try:
        found = entrance.call(**arguments)
    except (ValueError, TypeError) as error:
        message = str(error)
        assert "\n" not in message
        assert any(argument in message for argument in (*entrance.valid, "spec"))
        return
    same(found, entrance.answer(**{argument: plain(value) for argument, value in again.items()}))
