"""What evaluate() found, as data: records, scores by class, what makes them suspect; and how records are told apart."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import numpy.typing as npt

from faiss_knn.offline.report.findings import Mistakes

Outcome = dict[str, npt.NDArray[Any]]  # arrays by name, an entry per query


class Record(TypedDict, total=False):
    """What one index is worth under one vote, in the order in which it is written.

    After `accuracy_loss_se` stand the torchmetrics that were asked for, each under the name that was given, such as
    "MulticlassF1Score". `value_of` reads a field whose name is not known beforehand.
    """

    spec: str  # of the index, as given
    settings: dict[str, Any]  # its point of a sweep, such as {"nprobe": 4}, or how rows are compressed
    k: int  # neighbours that vote
    temperature: float
    weighting: str
    distance_metric: str
    protocol: str | None  # that the settings are of, and what differs from it, such as "dino, k=5"
    center: bool  # whether the bank's mean was subtracted
    pca: int | None  # how many of the bank's principal axes were kept
    whiten: bool  # whether the bank's deviation along its axes was made 1
    normalize: bool  # whether rows were divided by their lengths; cosine does so by itself
    leave_one_out: bool
    n_groups: int | None  # of the queries, if groups were given: standard errors and intervals are over them
    exclude_same_group: bool  # whether a query may not find rows of its group
    per_class: int | None  # rows of each class in a few-shot bank
    tries: int | None  # few-shot banks drawn
    seed: int
    options: dict[str, Any]  # nprobe, target_recall, latency, storage_dtype, depth and metrics, as asked for;
    # with_quirks names the protocol by whose own float32 rule neighbours voted, if they did
    data: str  # fingerprint of all features and labels
    num_classes: int
    n_bank: int
    n_queries: int
    dim: int
    skipped_bank: int  # rows left out as not finite or, under cosine, zero
    skipped_queries: int
    top1: float  # share of the queries of which the class of highest score is right
    top1_se: float  # its binomial standard error, or that over groups
    top1_low: float  # its 95 % interval: Wilson's, or a bootstrap over groups
    top1_high: float
    top1_std: float | None  # its deviation over the few-shot banks
    top5: float
    macro_top1: float | None  # mean of the classes' top-1
    map: float | None  # mean of the classes' average precision, for multi-hot labels
    accuracy_loss: float  # top-1 of the exact neighbours less this one
    accuracy_loss_se: float  # its standard error, query by query
    recall: float  # share of the exact neighbours found; another row of the same distance is no miss, but for
    # compressed rows, whose distances are others
    recall_ids: float  # the same, counted by id
    retrieval_precision: float | None  # the retrieval fields are those of `retrieval_metrics`, at k where it has a k
    retrieval_hit_rate: float | None
    retrieval_recall: float | None
    retrieval_map: float | None
    retrieval_ndcg: float | None
    retrieval_mrr: float | None
    retrieval_r_precision: float | None
    retrieval_map_r: float | None
    retrieval_macro_precision: float | None  # the same, averaged over the classes that have queries
    retrieval_macro_hit_rate: float | None
    retrieval_macro_recall: float | None
    retrieval_macro_map: float | None
    retrieval_macro_ndcg: float | None
    retrieval_macro_mrr: float | None
    retrieval_macro_r_precision: float | None
    retrieval_macro_map_r: float | None
    retrieval_micro_ap: float | None  # average precision of all pairs in lists of k, as one list
    spec_used: str  # the index that the spec came to
    exact: bool
    nprobe: int | None  # as used
    parameters: dict[str, Any]  # further ones, as used
    backend: str
    device: str
    storage_dtype: str  # of the bank's rows in the index
    bytes: int  # that the index holds
    row_bytes: float  # that a row takes as stored, without what the index holds beside it
    build_s: float  # seconds
    search_s: float  # seconds for all queries
    qps: float  # queries per second
    latency_p50_ms: float  # milliseconds of one query alone, if they were timed
    latency_p95_ms: float
    duplicates: int  # queries that are in the bank, number by number
    near_duplicates: int  # or but for rounding or, under cosine, scale
    bank_file: str | None
    query_file: str | None
    query_fingerprint: str  # of the queries' rows, by number, and their classes, whatever the features
    bank_fingerprint: str  # the same of the bank's rows
    versions: dict[str, str]
    created: str  # when, UTC


class Checks(TypedDict, total=False):
    """What makes a number suspect, as far as the labels show it; empty for a run that was cut off."""

    rows_per_class: list[float]  # the least, the median and the most, over the classes in the bank
    classes_in_bank: int
    classes_unseen: list[str]  # classes of queries that the bank has no row of
    queries_unseen: int  # queries of those
    majority_baseline: float  # top-1 of always answering with the bank's commonest class
    unlabelled_bank: int  # rows left out for want of a label
    unlabelled_queries: int
    skipped_bank: int  # rows left out as not finite or, under cosine, zero
    skipped_queries: int
    k_above_bank: list[int]  # each k that is more than the rows a query can find
    lone_queries: int  # with leave-one-out, queries whose class has no other row
    classes_short: int  # of few-shot banks, classes with fewer rows than a draw takes
    smallest_class: int  # of few-shot banks, the least rows of a class
    draws_alike: bool  # of few-shot banks, whether each draw is the whole bank


def value_of(record: Record, name: str) -> Any:
    """Read a field by name, None where it is not there."""
    return record.get(name)


_TASK = ("data", "leave_one_out", "per_class", "tries", "seed", "distance_metric", "num_classes")
_IDENTITY = (
    "spec", "settings", "k", "temperature", "weighting", "distance_metric", "leave_one_out", "per_class", "tries",
    "seed", "options", "data", "num_classes",
)  # fmt: skip

_TASK_WORDS = {
    "bank_file": "bank {}", "query_file": "queries {}", "leave_one_out": "leave-one-out: {}",
    "distance_metric": "{} distance", "per_class": "rows per class: {}", "tries": "draws: {}", "seed": "seed {}",
    "center": "centred: {}", "pca": "PCA: {}", "whiten": "whitened: {}", "normalize": "normalised: {}",
    "protocol": "protocol {}", "exclude_same_group": "own group left out: {}", "n_groups": "groups: {}",
    "num_classes": "{} classes", "storage_dtype": "stored as {}",
}  # fmt: skip


class Classes(NamedTuple):
    """What one record is worth class by class.

    Attributes:
        scores: Top-1, or average precision for multi-hot labels; NaN where no query has the class.
        retrieval: Values of the record's retrieval fields, by the fields' names.
    """

    scores: list[float]
    retrieval: dict[str, list[float]]


@dataclass
class Results:
    """What evaluate() found.

    Attributes:
        class_names: Names by class number, or None.
        checks: What makes the numbers suspect.
        records: One per index × k × temperature × weighting.
        per_class: The scores of each class by `record_key`: top-1, or average precision for multi-hot labels.
        retrieval_by_class: Retrieval metrics of each class by `record_key`, and by the name of the record's field that
            is over all queries, such as `retrieval_map`.
        neighbors: (Q, K) distances and indices by index name, if they were kept.
        class_ids: Class ids by class number, where these are not the same.
        outcomes: What became of each query by `record_key`, if that was kept.
        mistakes: What was wrong under the exact setting with the most voters, of single labels.
    """

    class_names: list[str] | None
    checks: Checks
    records: list[Record] = field(default_factory=list)
    per_class: dict[str, list[float]] = field(default_factory=dict)
    retrieval_by_class: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    neighbors: dict[str, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = field(default_factory=dict)
    class_ids: list[int] | None = None
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    mistakes: Mistakes | None = None

    def class_name(self, number: int) -> str:
        """Name a class: its name, or else its id."""
        return self.class_names_of([number])[0]

    def class_names_of(self, numbers: Iterable[int]) -> list[str]:
        """Name classes: their names, or else their ids."""
        names: Sequence[Any] | None = self.class_names or self.class_ids
        return [str(names[number] if names else number) for number in numbers]


def vote_of(record: Record) -> tuple[int, float, str]:
    """Return a record's k, temperature and weighting."""
    return record["k"], record["temperature"], record["weighting"]


def quirks_of(record: Record) -> str | None:
    """Name the protocol by whose own rule, with its quirks, the neighbours of a record voted, if they did."""
    name: str | None = (record.get("options") or {}).get("with_quirks")
    return name


def record_key(record: Record) -> str:
    """Return what a record is of, without what came out; equal for a record read back from a file."""
    return json.dumps([value_of(record, name) for name in _IDENTITY], sort_keys=True)


def task_key(record: Record) -> str:
    """Return what a record's index, k, temperature and weighting were tried on; see `record_key`."""
    stored, quirks = (record.get("options") or {}).get("storage_dtype"), quirks_of(record)
    return json.dumps([*(value_of(record, name) for name in _TASK), stored, *([] if quirks is None else [quirks])])


def best_of(records: Sequence[Record], by: str) -> Record:
    """Find the record with the highest value of a field; of equal ones the first.

    Raises:
        ValueError: If no record has that field.
    """
    scored = [record for record in records if value_of(record, by) is not None]
    if not scored:
        raise ValueError(f"`by` must be a field of the records with a value, got {by!r}")
    return max(scored, key=lambda record: float(value_of(record, by)))


def newest_of_each(records: Iterable[Record]) -> list[Record]:
    """Keep the last record of each index, k, temperature and weighting: made anew at another depth is no second row."""
    return list({(index_name(record), *vote_of(record)): record for record in records}.values())


def name_tasks(firsts: Sequence[Record]) -> list[str]:
    """Say what tells tasks apart, from a record of each: the fields in which they differ."""
    differing = [name for name in _TASK_WORDS if len({str(value_of(record, name)) for record in firsts}) > 1]
    names = [
        ", ".join(word for name in differing if (word := _TASK_WORDS[name].format(_shown(value_of(record, name)))))
        for record in firsts
    ]
    if len(set(names)) < len(names):  # other content under the same names
        names = [f"{name}, data {record['data'][:6]}" for name, record in zip(names, firsts, strict=True)]
    return [f"{number}. {name}" for number, name in enumerate(names, 1)]


def _shown(value: Any) -> str:
    return "none" if value is None else Path(value).name if isinstance(value, str) else str(value)


def index_name(record: Record) -> str:
    """Name a record's index with its point of a sweep and what else was asked of it, as tables and plots call it."""
    options = record.get("options") or {}
    asked = {"nprobe": options.get("nprobe")} if record.get("nprobe") is not None else {}
    asked |= {"target_recall": options.get("target_recall")} if record["spec"] in ("ivf", "fast", "auto") else {}
    asked = {name: value for name, value in asked.items() if value is not None}
    return " ".join([record["spec"], *(f"{name}={value}" for name, value in (asked | record["settings"]).items())])


def searches(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Group the records by index, in order."""
    by_index: dict[str, list[Record]] = {}
    for record in records:
        by_index.setdefault(index_name(record), []).append(record)
    return by_index


def pareto_names(points: dict[str, tuple[float, float]]) -> set[str]:
    """Return the names of points that no other one beats in both coordinates, higher being better.

    Example:
        >>> sorted(pareto_names({"a": (1.0, 2.0), "b": (2.0, 1.0), "c": (0.5, 1.0)}))
        ['a', 'b']
    """
    return {
        name
        for name, (x, y) in points.items()
        if not any(u >= x and v >= y and (u, v) != (x, y) for u, v in points.values())
    }


def depth_of(record: Record) -> int:
    """Tell how many neighbours the search behind a record looked for."""
    return int((record.get("options") or {}).get("depth") or record["k"])


def at_common_k(records: Iterable[Record]) -> dict[str, Record]:
    """Choose a record of each index so that recall and speed can be compared: of one k, from searches of one depth.

    These are the depth and k that the most indexes have; of equals the deepest, where recall is hardest to keep. An
    index that was only searched at other depths has no record here.
    """
    by_point: dict[tuple[int, int], dict[str, Record]] = {}
    for record in records:
        by_point.setdefault((depth_of(record), record["k"]), {}).setdefault(index_name(record), record)
    return max(by_point.items(), key=lambda item: (len(item[1]), *item[0]), default=((0, 0), {}))[1]


def pareto_front(records: Iterable[Record]) -> set[str]:
    """Index names on the Pareto front of recall against queries per second, of those that can be compared."""
    return pareto_names({name: (record["recall"], record["qps"]) for name, record in at_common_k(records).items()})
