"""audit(): what the neighbours say about the data themselves, from one exact search."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from faiss_knn.measures.label_errors import label_noise
from faiss_knn.measures.novelty import detection
from faiss_knn.names import DISTANCES
from faiss_knn.offline.audit_findings import (
    accuracy_with_and_without,
    confusions_of,
    copies_of,
    facts_of,
    hubs_of,
    leaks_of,
    noise_of,
    novelty_of,
    predict_queries,
    suspects_of,
    vote_of_rows,
    with_surroundings,
)
from faiss_knn.offline.audit_inputs import AuditInputs, make_inputs
from faiss_knn.offline.audit_search import compare_sets, search_audit
from faiss_knn.offline.near_duplicates import choose_distance, group_rows
from faiss_knn.offline.report.audit_report import AuditReport
from faiss_knn.offline.search import SearchOptions
from faiss_knn.search.inputs import as_choice, as_count, as_integer, as_number, as_switch, shown

__all__ = ["AuditReport", "audit"]

_DISTANCES = ("cosine", *(name for name in DISTANCES if name not in ("cosine", "dot")))


def audit(
    features: Any,
    labels: Any = None,
    query_features: Any = None,
    query_labels: Any = None,
    *,
    k: int = 20,
    distance_metric: str = "cosine",
    duplicate_distance: float | None = None,
    outlier_labels: Any = None,
    class_names: Sequence[str] | None = None,
    ignore_index: int | None = None,
    generative: bool = True,
    sample: int | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool | None = False,
) -> AuditReport:
    """Look through a data set by its neighbours: copies, leaks, wrong labels, outliers, hubs, confusions.

    Rows that are not finite or, under cosine, zero are left out and named in `facts`. Memory is that of the features
    and of lists, O((N + Q) · k).

    Args:
        features: (N, d) tensor, ndarray, memmap, DataFrame, or `RowSource` that is read in blocks: the bank.
        labels: (N,) class ids from 0 (-1: unlabelled) or names; None: nothing is said of labels.
        query_features: (Q, d) rows that the bank is to be searched for, such as the test set.
        query_labels: (Q,) as the bank's.
        k: Neighbours of each row. They vote on its label, and the k-th is how far it is from everything else.
        distance_metric: "cosine", "euclidean", "squared_euclidean" or "manhattan".
        duplicate_distance: At most how far near-duplicates are apart; 0: equal rows alone; None: chosen from the gap
            in the distances (`faiss_knn.measures.duplicate_gap`).
        outlier_labels: (Q,) 1 for queries, or without queries for rows, that are known to be outliers, else 0.
        class_names: Names by class id, for text.
        ignore_index: A class id that means "unlabelled", beside -1.
        generative: Whether to compare the queries, as a generated set, with the bank: two more searches.
        sample: How many of the bank's rows to look at, drawn at random, each still among all others; None: all. Groups
            of near-duplicates are those of rows drawn, and nothing is said of generated sets.
        seed: Of the draw.
        device: Where to search; None: where the bank is.
        progress: Show a bar; None: if stderr is a terminal.

    Returns:
        What was found.

    Raises:
        ValueError: If an argument is out of range, or features and labels do not fit.

    Example:
        >>> rows = np.random.default_rng(0).standard_normal((60, 8))
        >>> report = audit(np.concatenate([rows, rows[:2]]), k=5)
        >>> report.duplicates
        [[0, 60], [1, 61]]
    """
    k, sample = as_count(k, "`k`"), None if sample is None else as_count(sample, "`sample`")
    as_choice(distance_metric, _DISTANCES, "`distance_metric`")
    generative, seed = as_switch(generative, "`generative`"), as_integer(seed, "`seed`")
    threshold = None if duplicate_distance is None else _as_distance(duplicate_distance)
    inputs = make_inputs(
        features, labels, query_features, query_labels,
        distance_metric=distance_metric, class_names=class_names, ignore_index=ignore_index,
    )  # fmt: skip
    outliers = None if outlier_labels is None else _as_outliers(outlier_labels, inputs)
    options = SearchOptions(distance_metric, device=device, progress=progress)
    lists = search_audit(inputs.task, k, options, sample, seed)

    rule = "given"
    if threshold is None:
        threshold, is_gap = choose_distance(lists.all_lists, distance_metric)
        rule = "gap" if is_gap else "copies"
    groups = group_rows(inputs.task.bank.rows, lists.rows, threshold, distance_metric)
    leaks = leaks_of(inputs, lists, threshold)
    vote = vote_of_rows(inputs, lists, groups)
    noise = None if vote is None else label_noise(vote, inputs.labels_of(lists.rows.rows), len(inputs.classes))
    suspects = suspects_of(inputs, lists, vote, noise)
    predictions = predict_queries(inputs, lists)
    novelty = novelty_of(inputs, lists, distance_metric)
    report = AuditReport(
        duplicates=copies_of(inputs, groups),
        leaks=leaks,
        label_suspects=suspects,
        novelty=novelty,
        hubness=hubs_of(inputs, lists),
        confusions=confusions_of(inputs, lists, vote, predictions),
        generative=compare_sets(inputs.task, lists, options) if generative else None,
        accuracy=accuracy_with_and_without(inputs, predictions, leaks),
        label_noise=noise_of(noise, suspects),
        detection=None if outliers is None else _detection(novelty, outliers),
        duplicate_distance=threshold,
        duplicate_rule=rule,
        facts=facts_of(inputs, lists, groups, distance_metric),
        class_names=None if class_names is None else [str(name) for name in class_names],
    )
    return with_surroundings(report, inputs, lists)


def _as_distance(value: Any) -> float:
    distance = as_number(value, "`duplicate_distance`")
    if not 0 <= distance < np.inf:
        raise ValueError(f"`duplicate_distance` must be a distance, 0 or more, got {shown(value)}")
    return float(np.float32(distance))  # as distances are rounded


def _as_outliers(values: Any, inputs: AuditInputs) -> npt.NDArray[np.bool_]:
    """Find the outliers among the queries that can be compared, or without queries among the rows."""
    array = np.asarray(values.cpu() if isinstance(values, torch.Tensor) else values)
    alone = inputs.task.leave_one_out
    count = inputs.sizes[0] if alone else inputs.sizes[1]
    if array.shape != (count,) or not np.isin(array, (0, 1)).all():
        raise ValueError(
            f"`outlier_labels` must be {count} entries, 1 for an outlier and else 0, one for each "
            f"{'row' if alone else 'query'}, got {shown(array)}"
        )
    return array.astype(bool)


def _detection(novelty: npt.NDArray[np.float64], outliers: npt.NDArray[np.bool_]) -> dict[str, float]:
    known = np.isfinite(novelty)
    try:
        return detection(novelty[known], outliers[known])
    except ValueError as error:
        raise ValueError(str(error).replace("is_outlier", "outlier_labels")) from error
