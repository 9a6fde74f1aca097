"""From lists of neighbours to findings: each function is one kind of them, with row numbers as they were given."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from faiss_knn.measures.components import groups_of
from faiss_knn.measures.hubness import hubness
from faiss_knn.measures.label_errors import LabelNoise, NeighborVote, neighbor_vote, one_vote_a_group
from faiss_knn.offline.accuracy import BLOCK, class_shares
from faiss_knn.offline.audit_inputs import AuditInputs
from faiss_knn.offline.audit_search import AuditLists
from faiss_knn.offline.confusions import confusions_between
from faiss_knn.offline.lazy_rows import Subset, read_rows, spans
from faiss_knn.offline.report.audit_report import AuditReport
from faiss_knn.offline.report.findings import Confusion, LabelSuspect, Leak, Side
from faiss_knn.search.distance import get_distance

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_TEMPERATURE, _WEIGHTING = 0.07, "inverse"  # of the queries' vote, as evaluate's
_DOUBTED = 0.5  # probability from which on a label is a suspect
_SHOWN = 24  # findings of each kind whose neighbours are kept, for pictures
_NEXT = 8  # neighbours of these
_COMPARED = 4096  # rows at once


def copies_of(inputs: AuditInputs, groups: Ids) -> list[list[int]]:
    """List the groups of near-duplicates, the largest first."""
    largest_first = sorted(groups_of(groups), key=lambda group: (-len(group), int(group[0])))
    return [inputs.row_ids(group) for group in largest_first]


def leaks_of(inputs: AuditInputs, lists: AuditLists, threshold: float) -> list[Leak]:
    """List the queries that have a near-duplicate in the bank, the nearest first."""
    if lists.queries is None:
        return []
    nearest, distances = lists.queries.indices[:, 0], lists.queries.distances[:, 0]
    leaked = np.flatnonzero(distances <= threshold)
    leaked = leaked[np.argsort(distances[leaked], kind="stable")]
    equal = _are_equal(inputs, nearest[leaked], leaked)
    values = zip(
        inputs.query_ids(leaked), inputs.row_ids(nearest[leaked]), distances[leaked].tolist(), equal.tolist(),
        strict=True,
    )  # fmt: skip
    return [Leak(*one) for one in values]


def _are_equal(inputs: AuditInputs, rows: Ids, queries: Ids) -> npt.NDArray[np.bool_]:
    """Tell whether rows and queries, pair by pair, are equal number by number."""
    equal = np.zeros(len(rows), bool)
    for a, b in spans(len(rows), _COMPARED):
        left, right = (
            _read(side.rows, places[a:b]) for side, places in ((inputs.task.bank, rows), (inputs.task.queries, queries))
        )
        equal[a:b] = (left == right).all(1)
    return equal


def _read(rows: Any, places: Ids) -> npt.NDArray[Any]:
    """Read rows in any order and more than once; files are read in ascending order."""
    unique, back = np.unique(places, return_inverse=True)
    block = read_rows(Subset(rows, unique))
    read: npt.NDArray[Any] = block.double().cpu().numpy() if isinstance(block, torch.Tensor) else block
    return read[back]


def vote_of_rows(inputs: AuditInputs, lists: AuditLists, groups: Ids) -> NeighborVote | None:
    """Let the neighbours of each row vote on its label, one vote for each group of near-duplicates but its own."""
    if inputs.labels is None:
        return None
    parts = []
    for a, b in spans(len(lists.rows.rows), max(1, BLOCK // lists.k**2)):
        rows, indices = lists.rows.rows[a:b], lists.rows.indices[a:b, : lists.k]
        labels = np.where(indices < 0, -1, inputs.labels[indices])
        votes = one_vote_a_group(labels, groups[indices], groups[rows])
        parts.append(neighbor_vote(votes, inputs.labels[rows]))
    return NeighborVote(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def suspects_of(
    inputs: AuditInputs, lists: AuditLists, vote: NeighborVote | None, noise: LabelNoise | None
) -> list[LabelSuspect]:
    """List the rows whose label is more probably wrong than not, the most probable first."""
    if vote is None or noise is None:
        return []
    places = np.flatnonzero(noise.wrong >= _DOUBTED)
    order = np.lexsort((places, (vote.own_share - vote.share)[places], -noise.wrong[places]))
    places = places[order]
    rows = lists.rows.rows[places]
    return [
        LabelSuspect(row, inputs.class_of(label), inputs.class_of(first), confidence, share)
        for row, label, first, confidence, share in zip(
            inputs.row_ids(rows), inputs.labels_of(rows), vote.first[places], noise.wrong[places].tolist(),
            vote.share[places].tolist(), strict=True,
        )
    ]  # fmt: skip


def noise_of(noise: LabelNoise | None, suspects: list[LabelSuspect]) -> dict[str, float] | None:
    """Estimate how many labels are wrong, and how many of the suspects probably are."""
    if noise is None:
        return None
    return {
        "noise": noise.noise,
        "suspects": len(suspects),
        "expected_wrong": sum(suspect.confidence for suspect in suspects),
        "contradicted": int(noise.contradicted.sum()),
    }


def novelty_of(inputs: AuditInputs, lists: AuditLists, distance_metric: str) -> Floats:
    """Return distances to the k-th neighbour, (Q,), or (N,) of rows without queries; NaN for those left out."""
    side, ids, size = lists.rows, inputs.task.bank.ids[lists.rows.rows], inputs.sizes[0]
    if lists.queries is not None:
        side, ids, size = lists.queries, inputs.task.queries.ids, inputs.sizes[1]
    farthest = torch.from_numpy(side.distances[:, min(lists.k, side.distances.shape[1]) - 1]).double()
    if distance_metric == "cosine":  # the length between unit vectors, as in Sun et al. 2022
        farthest = get_distance("cosine").to_norm(farthest)
    novelty = np.full(size, np.nan)
    novelty[ids] = farthest.numpy()
    return novelty


def hubs_of(inputs: AuditInputs, lists: AuditLists) -> dict[str, Any]:
    """Tell how unevenly rows occur in the lists of the bank's rows."""
    hubs = hubness(lists.rows.indices[:, : lists.k], len(inputs.task.bank.rows))
    return {
        "skewness": hubs.skewness,
        "antihub_share": hubs.antihub_share,
        "hubs": inputs.row_ids(hubs.hubs.numpy()),
        "hub_counts": hubs.hub_counts.tolist(),
        "hub_share": hubs.hub_share,
    }


def predict_queries(inputs: AuditInputs, lists: AuditLists) -> Ids | None:
    """Predict class numbers (Q,) by the vote that `evaluate` takes, -1 without any; None without labels of queries."""
    if lists.queries is None or inputs.labels is None or inputs.query_labels is None:
        return None
    classes = len(inputs.classes)
    bank_labels = torch.from_numpy(inputs.labels)
    predictions = []
    for a, b in spans(len(lists.queries.rows), max(1, BLOCK // (classes + lists.k))):
        distances, indices = (
            torch.from_numpy(part[a:b, : lists.k]) for part in (lists.queries.distances, lists.queries.indices)
        )
        labels = bank_labels[indices.clamp(min=0)]
        votes = (indices >= 0) & (labels >= 0)
        shares = class_shares(distances, votes, labels.clamp(min=0), classes, _TEMPERATURE, _WEIGHTING)
        best, prediction = shares.max(1)
        predictions.append(torch.where(best > 0, prediction, -1).numpy())
    return np.concatenate(predictions)


def accuracy_with_and_without(
    inputs: AuditInputs, predictions: Ids | None, leaks: list[Leak]
) -> dict[str, float] | None:
    """Compute top-1 of all labelled queries, and of those not in the bank (NaN if there are none)."""
    if predictions is None or inputs.query_labels is None:
        return None
    known = inputs.query_labels >= 0
    right = predictions == inputs.query_labels
    apart = known & ~np.isin(inputs.task.queries.ids, [leak.query for leak in leaks])
    return {
        "with_leaks": float(right[known].mean()),
        "without_leaks": float(right[apart].mean()) if apart.any() else float("nan"),
    }


def confusions_of(
    inputs: AuditInputs, lists: AuditLists, vote: NeighborVote | None, predictions: Ids | None
) -> list[Confusion]:
    """List pairs of classes that are confused: of the queries where they have labels, else of the rows."""
    if vote is None or inputs.labels is None:
        return []
    labels, answers, ids = inputs.labels_of(lists.rows.rows), vote.first, inputs.task.bank.ids[lists.rows.rows]
    if predictions is not None and inputs.query_labels is not None:
        labels, answers, ids = inputs.query_labels, predictions, inputs.task.queries.ids
    return confusions_between(labels, answers, ids, len(inputs.classes), inputs.class_of)


def facts_of(inputs: AuditInputs, lists: AuditLists, groups: Ids, distance_metric: str) -> dict[str, Any]:
    """Say what was audited; see `Findings.facts`."""
    is_alone = lists.queries is None
    return {
        "rows": inputs.sizes[0],
        "queries": None if is_alone else inputs.sizes[1],
        "dim": inputs.task.dim,
        "k": lists.k,
        "distance_metric": distance_metric,
        "sample": lists.sample,
        "bad_rows": inputs.bad_rows,
        "bad_queries": inputs.bad_queries,
        "conflicts": 0 if inputs.labels is None else _conflicts(groups, inputs.labels),
        "side": "row" if is_alone else "query",
        "confused_side": "row" if inputs.query_labels is None else "query",
    }


def _conflicts(groups: Ids, labels: Ids) -> int:
    """Count the groups of near-duplicates whose labels differ."""
    known = labels >= 0
    lowest, highest = np.full(len(groups), np.iinfo(np.int64).max), np.full(len(groups), -1)
    np.minimum.at(lowest, groups[known], labels[known])
    np.maximum.at(highest, groups[known], labels[known])
    return int((lowest < highest).sum())


def with_surroundings(report: AuditReport, inputs: AuditInputs, lists: AuditLists) -> AuditReport:
    """Add the neighbours of the first findings, and the labels of all rows that are named anywhere."""
    rows = {suspect.row for suspect in report.label_suspects[:_SHOWN]} | set(report.hubness["hubs"])
    queries = {leak.query for leak in report.leaks[:_SHOWN]}
    novel, confused = (rows if report.facts[side] == "row" else queries for side in ("side", "confused_side"))
    novel |= set(report.most_novel(_SHOWN))
    confused |= {row for pair in report.confusions[:_SHOWN] for row in pair.rows}
    bank_ids = inputs.task.bank.ids
    neighbors = _near("row", rows, bank_ids[lists.rows.rows], bank_ids, lists.rows.indices)
    if lists.queries is not None:
        neighbors |= _near("query", queries, inputs.task.queries.ids, bank_ids, lists.queries.indices)
    rows |= {row for group in report.duplicates for row in group} | {leak.row for leak in report.leaks}
    rows |= {row for near in neighbors.values() for row in near}
    queries |= {leak.query for leak in report.leaks}
    labels = inputs.labels_by_row(rows) | inputs.labels_by_query(queries)
    return replace(report, neighbors=neighbors, labels=labels)


def _near(side: Side, chosen: set[int], ids: Ids, bank_ids: Ids, indices: Ids) -> dict[tuple[Side, int], list[int]]:
    """Find the nearest rows of some rows or queries: all numbers, also of `ids`, whose lists these are, as given."""
    numbers = np.array(sorted(chosen), dtype=np.int64)
    places = np.searchsorted(ids, numbers)
    is_listed = (places < len(ids)) & (ids[np.minimum(places, len(ids) - 1)] == numbers)
    lists = indices[places[is_listed], :_NEXT]
    return {
        (side, number): bank_ids[near[near >= 0]].tolist()
        for number, near in zip(numbers[is_listed].tolist(), lists, strict=True)
    }
