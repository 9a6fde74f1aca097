"""evaluate(): one search per index, then every number that follows from its neighbours."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from faiss_knn.offline.accuracy import Judge, make_judge
from faiss_knn.offline.copies import Copies, count_copies
from faiss_knn.offline.metric_names import make_metrics
from faiss_knn.offline.mistakes import mistakes_of, says_more
from faiss_knn.offline.options import EvalOptions, VoteOptions, several, vote_settings
from faiss_knn.offline.outcomes import (
    bank_fingerprint,
    describe_queries,
    keeps_outcomes,
    outcome_of,
    query_fingerprint,
)
from faiss_knn.offline.preparation import prepare
from faiss_knn.offline.quirks import make_quirks_judge
from faiss_knn.offline.record import (
    accuracy_fields,
    mean_values,
    recall_fields,
    retrieval_at,
    retrieval_classes_at,
    retrieval_of,
    setup_fields,
    surroundings,
    top1_by_query,
)
from faiss_knn.offline.report.report import EvalReport
from faiss_knn.offline.report.results import Classes, Outcome, Record, record_key
from faiss_knn.offline.search import EXACT, SearchResult, Variant, search_task
from faiss_knn.offline.task import EvalTask, Limits, check_values, few_shot_facts, make_task, warning_facts
from faiss_knn.search.inputs import as_switch, shown

__all__ = ["EvalReport", "evaluate", "evaluate_with", "task_for"]


def evaluate(
    bank_features: Any,
    bank_labels: Any,
    query_features: Any = None,
    query_labels: Any = None,
    *,
    k: int | Iterable[int] | None = None,
    temperature: float | Iterable[float] | None = None,
    weighting: str | Iterable[str] | None = None,
    distance_metric: str | None = None,
    index: str | Iterable[str] = ("flat",),
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
    leave_one_out: bool = False,
    per_class: int | None = None,
    tries: int | None = None,
    seed: int = 0,
    metrics: Iterable[str] = (),
    depth: int | None = None,
    sweep: Mapping[str, Iterable[int]] | None = None,
    nprobe: int | None = None,
    target_recall: float | None = None,
    latency: int = 0,
    device: torch.device | str | None = None,
    storage_dtype: torch.dtype | None = None,
    ignore_index: int | None = None,
    skip_bad_rows: bool = False,
    keep_neighbors: bool = False,
    keep_outcomes: bool | None = None,
    progress: bool | None = False,
    protocol: str | None = None,
    with_quirks: bool = False,
    center: bool = False,
    groups: Any = None,
    exclude_same_group: bool = False,
    own_rows: Any = None,
    ignored_rows: Any = None,
    dims: int | str | Iterable[int | str] | None = None,
    storage: str | Iterable[str] | None = None,
    pca: int | None = None,
    whiten: bool = False,
    done: Iterable[Record] = (),
    on_record: Callable[[Record, list[float]], None] | None = None,
) -> EvalReport:
    """Judge features by their nearest neighbours: for each index one search, then every k, temperature and weighting.

    Where `torch.distributed` is set up, all ranks call it with the same arguments, share the searches, and get the same
    records but for times.

    Args:
        bank_features: (N, d) tensor, ndarray, memmap, DataFrame, or `RowSource` that is read in blocks.
        bank_labels: (N,) class ids from 0 (-1: left out) or names, also as a pandas Series or Categorical; or (N, C)
            multi-hot of 0 and 1; or (N, C) shares of the classes, by which a neighbour's weight is divided, while the
            class of a query is its largest share. Rows with one 1 each are class ids, unless a Multilabel metric is
            asked for. Ids that are few and large are numbered anew: `EvalReport.class_ids` has them.
        query_features: (Q, d); None with leave_one_out.
        query_labels: As the bank's; None with leave_one_out.
        k: Neighbours that vote; None: the protocol's, or without one (1, 5, 10, 20).
        temperature: Of the vote; None: the protocol's, or 0.07.
        weighting: "inverse", "softmax", "uniform"; None: the protocol's, or "inverse".
        distance_metric: "cosine", "euclidean", "squared_euclidean", "manhattan" or "dot" (minus the inner product; with
            the weighting "softmax" or "uniform"); None: the protocol's, or "cosine".
        index: Specs of `KNNIndex`. Approximate ones are compared with the exact neighbours of the same queries.
        num_classes: None: what the labels need.
        class_names: Names by class id.
        leave_one_out: The bank's rows are the queries, and none is its own neighbour.
        per_class: Few-shot: draw a bank of this many rows per class; records hold the means over `tries` draws.
        tries: Draws, 5 if None.
        seed: Of the draws, each of which has random numbers of its own: two seeds share none.
        metrics: Names of torchmetrics.classification, such as "MulticlassF1Score", with arguments in brackets if
            wanted: "MulticlassF1Score(average=micro)".
        depth: Length of the lists for retrieval metrics; None: the largest k. `r_precision` and `map@r` are given where
            every R is within it.
        sweep: Search parameters and values to try on each index that has them: `nprobe` for inverted lists, {"nprobe":
            [1, 4, 16]}; `k_factor` for codes, candidates per neighbour that are re-ranked by exact distance.
        nprobe: For IVF indexes, as in `KNNIndex`.
        target_recall: For approximate indexes, as in `KNNIndex`.
        latency: How many queries to time one at a time.
        device: Where to search; None: where the bank is.
        storage_dtype: Of the bank's rows in the index, as in `KNNIndex`; the records say what is stored.
        ignore_index: A class id that means "unlabelled", beside -1.
        skip_bad_rows: Leave out rows that are not finite or, under cosine, zero, and count them in the records, instead
            of refusing them.
        keep_neighbors: Keep the neighbours in the report.
        keep_outcomes: Keep what became of each query in the report, 9 bytes of a query, record and few-shot draw; None:
            where all of them take 1 GiB at most.
        progress: Show a bar; None: if stderr is a terminal.
        protocol: Name of one of `protocols`, which settles k, temperature, weighting, distance and whether features are
            normalised or centred. What is given beside it counts, and is named in the records' `protocol`.
        with_quirks: Vote by the float32 rule of the protocol's own code, with its quirks, to reproduce a number that
            was made with them: top-5 counts classes without a vote, exp(s / T) overflows. Named in the records.
        center: Subtract the mean of the bank's labelled rows from all features.
        groups: (Q,) integers or names of groups that queries are of (scene, patient, product; -1: a group of its own):
            the 95 % interval of top-1 and the standard errors are then over groups, which are drawn whole. Or a pair,
            of the bank's rows and of the queries; with leave_one_out (N,).
        exclude_same_group: A query may not find rows of its own group: its neighbours are the nearest of the others.
        own_rows: (Q,) the row of the bank that each query is itself, -1 for none: for queries that are a part of the
            bank, none of which is its own neighbour.
        ignored_rows: Rows of the bank that each query may not find: a list of lists, or (Q, m) padded with -1.
        dims: What shorter rows cost, beside the indexes: 64 (the first 64 dimensions, as of Matryoshka features),
            "64:unit" (divided by their lengths when cut), "64:whole" (before), "pca64" (principal axes of the bank).
        storage: What coarser rows cost, each alone and with each of `dims`: "float16", "bfloat16", "int8" (a scale for
            each column), "binary" (signs), "binary:4" (4 k candidates by signs are scored again by the whole query).
        pca: Turn all features to so many of the bank's principal axes first.
        whiten: Divide them by the bank's deviation along its axes.
        done: Records of an earlier run: what they cover is not done again, and they stand in the report.
        on_record: Called with each new record, and its scores by class, as soon as it is there.

    Returns:
        The records, one per index × k × temperature × weighting, and what makes them suspect.

    Raises:
        ValueError: If an argument is out of range, features and labels do not fit, or an index refuses the features.

    Example:
        >>> bank, queries = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[0.9, 0.1]])
        >>> report = evaluate(bank, [0, 1], queries, [0], k=1)
        >>> report.best()["top1"]
        1.0
    """
    options = EvalOptions(
        **vote_settings(
            protocol, k=k, temperature=temperature, weighting=weighting, distance_metric=distance_metric,
            center=as_switch(center, "`center`"), pca=pca, whiten=as_switch(whiten, "`whiten`"),
            with_quirks=as_switch(with_quirks, "`with_quirks`"),
        ),
        index=several(index), num_classes=num_classes, class_names=class_names, leave_one_out=leave_one_out,
        per_class=per_class, tries=tries, seed=seed, metrics=several(metrics), depth=depth,
        sweep={} if sweep is None else sweep, nprobe=nprobe, target_recall=target_recall, latency=latency,
        device=device, storage_dtype=storage_dtype, ignore_index=ignore_index, skip_bad_rows=skip_bad_rows,
        keep_neighbors=keep_neighbors, keep_outcomes=keep_outcomes, progress=progress,
        dims=() if dims is None else several(dims), storage=() if storage is None else several(storage),
    )  # fmt: skip
    done = _checked_done(done)
    if on_record is not None and not callable(on_record):
        raise ValueError(f"`on_record` must be a function of a record and its scores, got {shown(on_record)}")
    limits = Limits(groups, as_switch(exclude_same_group, "`exclude_same_group`"), own_rows, ignored_rows)
    task = task_for(options, bank_features, bank_labels, query_features, query_labels, limits)
    files = {"bank_file": _file_of(bank_features), "query_file": _file_of(query_features)}
    told = None if on_record is None else lambda record, classes, _: on_record(record, classes.scores)
    return evaluate_with(options, task, files, done=done, on_record=told)


def task_for(
    options: EvalOptions,
    bank_features: Any,
    bank_labels: Any,
    query_features: Any,
    query_labels: Any,
    limits: Limits | None = None,
) -> EvalTask:
    """Make the task of features, labels and limits as `evaluate` takes them; see `make_task`."""
    return make_task(
        bank_features,
        bank_labels,
        query_features,
        query_labels,
        num_classes=options.num_classes,
        class_names=options.class_names,
        leave_one_out=options.leave_one_out,
        ignore_index=options.ignore_index,
        multi_label=any(name.startswith("Multilabel") for name in options.metrics),
        limits=limits,
    )


def evaluate_with(
    options: EvalOptions,
    task: EvalTask,
    files: dict[str, str | None],
    *,
    done: Iterable[Record] = (),
    on_record: Callable[[Record, Classes, Outcome | None], None] | None = None,
) -> EvalReport:
    """Evaluate a task as `evaluate` does, with options that were checked.

    Args:
        options: What to do.
        task: Bank and queries, as `make_task` returns them.
        files: `bank_file` and `query_file` of the records.
        done: As in `evaluate`.
        on_record: Called with each new record, what is known of its classes, and what became of each query, if that is
            kept, as soon as it is there.

    Raises:
        ValueError: If task and options do not fit, a row cannot be compared, or an index refuses the features.
    """
    evaluation = _Evaluation(task, options, files)
    first = evaluation.draws[0]
    report = EvalReport(task.class_names, warning_facts(first, options.k), class_ids=task.class_ids)
    if options.per_class is not None:
        report.checks |= few_shot_facts(evaluation.task, options.per_class)
    earlier = {record_key(record): record for record in done}
    telling: tuple[Record, Outcome, Tensor] | None = None  # whose mistakes say the most
    for variant in options.variants:
        setups = [setup_fields(first, options, variant, vote) for vote in options.votes]
        keys = [record_key(setup) for setup in setups]
        if all(key in earlier for key in keys):
            report.records += [earlier[key] for key in keys]
            continue
        results = evaluation.search(variant)
        for key, (record, classes, outcome) in zip(keys, evaluation.records(variant, setups, results), strict=True):
            report.records.append(earlier.get(key, record))
            report.per_class[key] = classes.scores
            report.retrieval_by_class[key] = classes.retrieval
            if outcome is not None:
                report.outcomes[key] = outcome
                if "label" in outcome and len(evaluation.draws) == 1 and says_more(record, telling and telling[0]):
                    telling = record, outcome, results[0].indices
            if on_record is not None and key not in earlier:
                on_record(record, classes, outcome)
        if options.keep_neighbors:
            report.neighbors[variant.name] = _with_given_ids(first, results[0])
    report.mistakes = None if telling is None else mistakes_of(first, *telling)
    return report


class _Evaluation:
    """One task under its options: the banks drawn from it, their searches, and the records that follow.

    The exact search is made once, when first needed, for all indexes that are compared with it.
    """

    def __init__(self, task: EvalTask, options: EvalOptions, files: dict[str, str | None]) -> None:
        if options.per_class is not None and task.multi_hot:
            raise ValueError("per_class draws rows of each class: it does not go with multi-hot labels")
        for variant in options.variants:
            options.search.check(variant, task.dim)
        self.options = options
        self.files = files
        self.metrics = make_metrics(options.metrics, task.num_classes, task.multi_hot) if options.metrics else {}
        task = prepare(task, center=options.center, unit=options.normalize, pca=options.pca, whiten=options.whiten)
        self.task = check_values(task, options.distance_metric, options.skip_bad_rows)
        self.draws = _drawn(self.task, options)
        self._exact_top1: dict[VoteOptions, Tensor] = {}
        self._fingerprints = {
            "query_fingerprint": query_fingerprint(self.draws[0]),
            "bank_fingerprint": bank_fingerprint(self.draws[0]),
        }
        self._groups = self.draws[0].queries.groups
        if self.draws[0].n_groups == 1:
            raise ValueError(
                "`groups` must name two groups of queries or more, got 1: an interval is drawn over groups"
            )
        self._queries = describe_queries(self.draws[0]) if keeps_outcomes(options, self.draws) else None

    def search(self, variant: Variant) -> list[SearchResult]:
        """Find the neighbours in each draw."""
        if variant == EXACT:
            return self._exact
        return [search_task(draw, self.options.length, variant, self.options.search) for draw in self.draws]

    def records(
        self, variant: Variant, setups: Sequence[Record], results: list[SearchResult]
    ) -> Iterator[tuple[Record, Classes, Outcome | None]]:
        """Yield one index's records, with the scores of the classes and what became of each query, when they are there.

        They come in the order of the votes, and so do `setups`, what each of them is of.
        """
        exact, multi_hot = self._exact, self.task.multi_hot
        judges = self._judges(results)
        exact_judges = judges if results is exact else self._judges(exact)
        retrieval, by_class = retrieval_of(self.draws, results, self.options.k)
        recall = recall_fields(self.draws, results, exact, self.options.k, by_id=variant.is_compressed)
        cost = mean_values([result.cost for result in results])
        for vote, setup in zip(self.options.votes, setups, strict=True):
            hits = [judge.judge(*vote, self.metrics) for judge in judges]
            if vote not in self._exact_top1:
                exact_hits = hits if results is exact else [judge.judge(*vote, {}) for judge in exact_judges]
                self._exact_top1[vote] = top1_by_query(exact_hits)
            class_scores = torch.stack([one.per_class for one in hits]).mean(0)
            fields = {
                **setup,
                **accuracy_fields(hits, self._exact_top1[vote], class_scores, multi_hot, self._groups),
                **recall[vote.k],
                **retrieval_at(retrieval, vote.k),
                **cost,
                "duplicates": self._copies.equal,
                "near_duplicates": self._copies.near,
                **self.files,
                **self._fingerprints,
                **surroundings(),
            }
            outcome = outcome_of(hits, self._queries) if self._queries is not None else None
            classes = Classes(class_scores.tolist(), retrieval_classes_at(by_class, vote.k))
            yield cast("Record", fields), classes, outcome

    def _judges(self, results: list[SearchResult]) -> list[Judge]:
        draws = zip(self.draws, results, strict=True)
        if self.options.with_quirks is not None:
            return [make_quirks_judge(draw, result, self.options) for draw, result in draws]
        return [make_judge(draw, result) for draw, result in draws]

    @property
    def _exact(self) -> list[SearchResult]:
        return self._exact_and_copies[0]

    @property
    def _copies(self) -> Copies:
        return self._exact_and_copies[1]

    @cached_property
    def _exact_and_copies(self) -> tuple[list[SearchResult], Copies]:
        """The exact neighbours in each draw, and the copies in the draw that has the most.

        A second neighbour is searched for always, to tell how near a copy is.
        """
        options = replace(self.options.search, target_recall=None, nprobe=None)
        results = [search_task(draw, max(self.options.length, 2), EXACT, options) for draw in self.draws]
        copies = [
            count_copies(draw, result.distances, result.indices, options.distance_metric)
            for draw, result in zip(self.draws, results, strict=True)
        ]
        return [result.first(self.options.length) for result in results], max(copies, key=sum)


def _drawn(task: EvalTask, options: EvalOptions) -> list[EvalTask]:
    """Return the task itself, or its few-shot banks, each drawn with random numbers of its own."""
    if options.per_class is None or options.tries is None:
        return [task]
    all_alike = int(task.bank_counts.max()) <= options.per_class  # each draw is the whole bank
    randoms = np.random.SeedSequence(options.seed).spawn(1 if all_alike else options.tries)
    return [task.few_shot(options.per_class, random) for random in randoms]


def _with_given_ids(task: EvalTask, result: SearchResult) -> tuple[np.ndarray, np.ndarray]:
    """Return distances and indices that count the bank's rows as they were given."""
    indices = result.indices.cpu().numpy()
    return result.distances.cpu().numpy(), np.where(indices < 0, -1, task.bank.ids[indices.clip(min=0)])


def _checked_done(done: Any) -> list[Record]:
    """Check records of an earlier run."""
    records: list[Any] = list(done) if isinstance(done, (list, tuple, Iterator)) else [None]
    if not all(isinstance(record, dict) for record in records):
        raise ValueError(f"`done` must be records of an earlier run, such as `EvalReport.records`, got {shown(done)}")
    return records


def _file_of(features: Any) -> str | None:
    """Name the file that a memory-mapped array reads."""
    return str(features.filename) if isinstance(features, np.memmap) and features.filename else None
