"""evaluate(): one search per index, then every number that follows from its neighbours."""

import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faiss_knn.classify.vote import check_vote_options
from faiss_knn.measures.retrieval import retrieval_metrics
from faiss_knn.offline.copies import Copies, count_copies
from faiss_knn.offline.lazy_rows import spans
from faiss_knn.offline.metric_names import make_metrics
from faiss_knn.offline.report.report import EvalReport
from faiss_knn.offline.report.results import Record, mean_values, record_key
from faiss_knn.offline.scores import ClassJudge, Hits, MultiHotJudge, SharesJudge, recalls
from faiss_knn.offline.search import EXACT, SearchOptions, SearchResult, Variant, has_parameter, search_task
from faiss_knn.offline.task import EvalTask, check_values, make_task, warning_facts
from faiss_knn.search.inputs import as_count, as_integer, shown

__all__ = ["EvalReport", "evaluate"]

Point = tuple[int, float, str]  # k, temperature, weighting


@dataclass(frozen=True)
class Grid:
    """What one search is scored under, and how deep it must go."""

    ks: tuple[int, ...]
    temperatures: tuple[float, ...]
    weightings: tuple[str, ...]
    depth: int

    def __iter__(self) -> Iterator[Point]:
        return product(self.ks, self.temperatures, self.weightings)


def evaluate(
    bank_features: Any,
    bank_labels: Any,
    query_features: Any = None,
    query_labels: Any = None,
    *,
    k: int | Iterable[int] = (1, 5, 10, 20),
    temperature: float | Iterable[float] = (0.07,),
    weighting: str | Iterable[str] = ("inverse",),
    distance_metric: str = "cosine",
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
    progress: bool | None = False,
    done: Iterable[Record] = (),
    on_record: Callable[[Record, list[float]], None] | None = None,
) -> EvalReport:
    """Judge features by their nearest neighbours: for each index one search, then every k, temperature and weighting.

    Where `torch.distributed` is set up, all ranks call it with the same arguments, share the searches, and get the same
    records but for times.

    Args:
        bank_features: (N, d) tensor, ndarray, memmap, DataFrame, or `Rows` that are read in blocks.
        bank_labels: (N,) class ids from 0 (-1: left out) or names, also as a pandas Series or Categorical; or (N, C)
            multi-hot of 0 and 1; or (N, C) shares of the classes, by which a neighbour's weight is divided, while the
            class of a query is its largest share. Rows with one 1 each are class ids, unless a Multilabel metric is
            asked for. Ids that are few and large are numbered anew: `EvalReport.class_ids` has them.
        query_features: (Q, d); None with leave_one_out.
        query_labels: As the bank's; None with leave_one_out.
        k: Neighbours that vote.
        temperature: Of the vote.
        weighting: "inverse", "softmax", "uniform".
        distance_metric: "cosine", "euclidean", "squared_euclidean" or "manhattan".
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
        progress: Show a bar; None: if stderr is a terminal.
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
    grid = _grid(k, temperature, weighting, depth)
    variants = list(_variants(_several(index), sweep or {}))
    latency, seed = _count_from_zero(latency, "latency"), _count_from_zero(seed, "seed")
    options = SearchOptions(distance_metric, device, nprobe, target_recall, latency, progress, storage_dtype)
    for variant in variants:
        options.index(variant)  # refuses bad options before any work
    draws = _draws(per_class, tries, leave_one_out)
    wanted = tuple(map(str, _several(metrics)))
    problem = make_task(
        bank_features, bank_labels, query_features, query_labels,
        num_classes=num_classes, class_names=class_names, leave_one_out=leave_one_out,
        ignore_index=None if ignore_index is None else as_integer(ignore_index, "`ignore_index`"),
        multi_label=any(name.startswith("Multilabel") for name in wanted),
    )  # fmt: skip
    if per_class is not None and problem.multi_hot:
        raise ValueError("per_class draws rows of each class: it does not go with multi-hot labels")
    for variant in variants:
        options.check(variant, problem.dim)
    judges = make_metrics(wanted, problem.num_classes, problem.multi_hot)
    problem = check_values(problem, distance_metric, skip_bad_rows)
    files = {"bank_file": _file_of(bank_features), "query_file": _file_of(query_features)}
    run = _Run(problem, grid, options, judges, None if per_class is None else int(per_class), draws, seed, files)
    report = EvalReport(problem.class_names, warning_facts(run.draws[0], grid.ks), class_ids=problem.class_ids)
    earlier = {record_key(record): record for record in done}
    for variant in variants:
        identities = [run.identity(variant, point) for point in grid]
        if all(record_key(identity) in earlier for identity in identities):
            report.records += [earlier[record_key(identity)] for identity in identities]
            continue
        found = run.search(variant)
        for record, by_class in run.records(variant, found):
            key = record_key(record)
            report.records.append(earlier.get(key, record))
            report.per_class[key] = by_class
            if on_record is not None and key not in earlier:
                on_record(record, by_class)
        if keep_neighbors:
            report.neighbors[variant.name] = _given_ids(run.draws[0], found[0])
    return report


class _Run:
    """The searches of one evaluate() call: the exact one is shared by all that is compared with it."""

    def __init__(
        self,
        problem: EvalTask,
        grid: Grid,
        options: SearchOptions,
        metrics: Mapping[str, Any],
        per_class: int | None,
        draws: int,
        seed: int,
        files: Record,
    ) -> None:
        self.grid = grid
        self.options = options
        self.metrics = metrics
        self.files = files
        self.draws = [problem]
        if per_class is not None:
            self.draws = [problem.few_shot(per_class, random) for random in np.random.SeedSequence(seed).spawn(draws)]
        self._exact: list[SearchResult] | None = None
        self._copies: list[Copies] = []
        self._exact_top1: dict[Point, Tensor] = {}
        self._common = {
            "distance_metric": options.distance_metric,
            "leave_one_out": problem.leave_one_out,
            "per_class": per_class,
            "tries": draws if per_class is not None else None,
            "seed": seed,
            "options": {
                "nprobe": options.nprobe,
                "target_recall": options.target_recall,
                "latency": options.latency,
                "storage_dtype": None if options.storage_dtype is None else _dtype_name(options.storage_dtype),
                "depth": grid.depth,
                "metrics": list(metrics),
            },
            "data": problem.fingerprint,
            "num_classes": problem.num_classes,
            "n_bank": len(self.draws[0].bank.rows),
            "n_queries": len(problem.queries.rows),
            "dim": problem.dim,
            "skipped_bank": problem.bank.skipped,
            "skipped_queries": problem.queries.skipped,
        }

    def identity(self, variant: Variant, point: Point) -> Record:
        """What tells a record from others, known before the search."""
        k, temperature, weighting = point
        return {
            "spec": variant.spec,
            "settings": variant.settings,
            "k": k,
            "temperature": temperature,
            "weighting": weighting,
            **self._common,
        }

    def search(self, variant: Variant) -> list[SearchResult]:
        """The neighbours in each draw."""
        if variant != EXACT:
            return [search_task(draw, self.grid.depth, variant, self.options) for draw in self.draws]
        if self._exact is None:
            options = replace(self.options, target_recall=None, nprobe=None)
            self._exact = [self._search_exactly(draw, options) for draw in self.draws]
        return self._exact

    def _search_exactly(self, draw: EvalTask, options: SearchOptions) -> SearchResult:
        """The exact neighbours of a draw; a second one always, to tell how near a copy is."""
        depth = self.grid.depth
        found = search_task(draw, max(depth, 2), EXACT, options)
        self._copies.append(count_copies(draw, found.distances, found.indices, options.distance_metric))
        return found.first(depth)

    def records(self, variant: Variant, found: list[SearchResult]) -> Iterator[tuple[Record, list[float]]]:
        """One index's records with the scores of each class, each as soon as it is there."""
        exact = self.search(EXACT)
        judges = [_judge(draw, one) for draw, one in zip(self.draws, found, strict=True)]
        exact_judges = judges if found is exact else [_judge(d, e) for d, e in zip(self.draws, exact, strict=True)]
        fixed = mean_values([one.cost for one in found])
        fixed |= self._counted_copies() | self.files
        retrieval = mean_values([_retrieval(d, f, self.grid) for d, f in zip(self.draws, found, strict=True)])
        recall = {k: mean_values([_recall(f, e, d, k) for d, f, e in zip(self.draws, found, exact, strict=True)])
                  for k in self.grid.ks}  # fmt: skip
        for point in self.grid:
            hits = [judge.judge(*point, self.metrics) for judge in judges]
            if point not in self._exact_top1:
                self._exact_top1[point] = _top1(hits if found is exact else [j.judge(*point, {}) for j in exact_judges])
            per_class = torch.stack([one.per_class for one in hits]).mean(0)
            accuracy = _accuracy(hits, self._exact_top1[point], per_class, self.draws[0].multi_hot)
            k = point[0]
            yield (
                self.identity(variant, point)
                | accuracy
                | recall[k]
                | _at(retrieval, k)
                | fixed
                | _surroundings()
                | {"created": datetime.now(UTC).isoformat(timespec="seconds")},
                per_class.tolist(),
            )

    def _counted_copies(self) -> Record:
        """Copies in the draw that has the most."""
        worst = max(self._copies, key=sum)
        return {"duplicates": worst.equal, "near_duplicates": worst.near}


def _judge(problem: EvalTask, found: SearchResult) -> ClassJudge | MultiHotJudge | SharesJudge:
    device = found.indices.device
    bank_labels, truth = problem.bank.labels.to(device), problem.queries.labels.to(device)
    if problem.bank.shares is not None:
        return SharesJudge(found.distances, found.indices, problem.bank.shares.to(device), truth)
    if problem.multi_hot:
        return MultiHotJudge(found.distances, found.indices, bank_labels, truth)
    return ClassJudge(found.distances, _labels(found.indices, bank_labels), truth, problem.num_classes)


def _given_ids(problem: EvalTask, found: SearchResult) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices that count the bank's rows as they were given."""
    indices = found.indices.cpu().numpy()
    return found.distances.cpu().numpy(), np.where(indices < 0, -1, problem.bank.ids[indices.clip(min=0)])


def _labels(indices: Tensor, bank_labels: Tensor) -> Tensor:
    return torch.where(indices < 0, -1, bank_labels[indices.clamp(min=0)])


def _top1(hits: list[Hits]) -> Tensor:
    """(Q,) share of the draws in which each query was right."""
    return torch.stack([one.top1 for one in hits]).double().mean(0)


def _accuracy(hits: list[Hits], exact: Tensor, per_class: Tensor, multi_hot: bool) -> Record:
    by_query = _top1(hits)
    by_draw = torch.stack([one.top1 for one in hits]).double().mean(1)
    top1, loss = by_query.mean().item(), exact - by_query
    mean_class = per_class.nanmean().item()
    return {
        "top1": top1,
        "top1_se": math.sqrt(top1 * (1 - top1) / len(by_query)),
        "top1_std": by_draw.std().item() if len(hits) > 1 else None,
        "top5": torch.stack([one.top5 for one in hits]).double().mean().item(),
        "macro_top1": None if multi_hot else mean_class,
        "map": mean_class if multi_hot else None,
        "accuracy_loss": loss.mean().item(),
        "accuracy_loss_se": loss.std(correction=0).item() / math.sqrt(len(loss)),
        **mean_values([one.values for one in hits]),
    }


def _recall(found: SearchResult, exact: SearchResult, problem: EvalTask, k: int) -> Record:
    k = min(k, problem.reachable)
    by_distance, by_id = recalls(
        found.distances[:, :k], found.indices[:, :k], exact.distances[:, :k], exact.indices[:, :k]
    )
    return {"recall": by_distance, "recall_ids": by_id}


def _retrieval(problem: EvalTask, found: SearchResult, grid: Grid) -> Record:
    """Retrieval metrics of all queries, in blocks; `r_precision` and `map@r` where the lists reach every R."""
    if problem.multi_hot:
        return {}
    device = found.indices.device
    wanted, truth = problem.relevant_counts.to(device), problem.queries.labels.to(device)
    labels = _labels(found.indices, problem.bank.labels.to(device))
    blocks, weights = [], []
    for a, b in spans(len(labels), 1 << 16):
        judged = int((wanted[a:b] > 0).sum())
        if judged:
            blocks.append(retrieval_metrics(labels[a:b], truth[a:b], wanted[a:b], grid.ks))
            weights.append(judged)
    means = (
        {name: float(np.average([one[name] for one in blocks], weights=weights)) for name in blocks[0]}
        if blocks
        else {}
    )
    if int(wanted.max()) > labels.shape[1]:
        means = {name: value for name, value in means.items() if name not in ("r_precision", "map@r")}
    return means


def _at(retrieval: Record, k: int) -> Record:
    """The retrieval metrics that a record of this k holds."""
    at_k = {name: retrieval.get(f"{name}@{k}") for name in ("precision", "hit_rate", "recall", "map", "ndcg")}
    whole = {name: retrieval.get(name) for name in ("mrr", "r_precision", "map@r")}
    return {f"retrieval_{name.replace('@', '_')}": value for name, value in (at_k | whole).items()}


@cache
def _surroundings() -> Record:
    names = ("faiss-knn", "torch", "numpy", "faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "faiss")
    return {"versions": {"python": platform.python_version()} | {name: v for name in names if (v := _version(name))}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _several(given: Any) -> tuple[Any, ...]:
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable) or getattr(given, "ndim", 1) == 0:
        return (given,)
    return tuple(given)


def _grid(k: Any, temperature: Any, weighting: Any, depth: int | None) -> Grid:
    given = [_several(k), _several(temperature), _several(weighting)]
    for name, values in zip(("k", "temperature", "weighting"), given, strict=True):
        if not values:
            raise ValueError(f"`{name}` needs at least one value, got none")
    counts = [_positive(one, "`k` and `depth` must be positive integers") for one in given[0]]
    deepest = [] if depth is None else [_positive(depth, "`k` and `depth` must be positive integers")]
    for one, weigh in product(given[1], given[2]):
        check_vote_options(one, weigh)
    ks, temperatures = tuple(dict.fromkeys(counts)), tuple(dict.fromkeys(float(one) for one in given[1]))
    return Grid(ks, temperatures, tuple(dict.fromkeys(given[2])), max(*ks, *deepest, 1))


def _positive(value: Any, need: str) -> int:
    try:
        return as_count(value, "it")
    except ValueError:
        raise ValueError(f"{need}, got {shown(value)}") from None


def _count_from_zero(value: Any, name: str) -> int:
    number = as_integer(value, f"`{name}`")
    if number < 0:
        raise ValueError(f"`{name}` must be 0 or a positive integer, got {number}")
    return number


def _file_of(features: Any) -> str | None:
    """The file that a memory-mapped array reads."""
    return str(features.filename) if isinstance(features, np.memmap) and features.filename else None


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _variants(specs: tuple[str, ...], sweep: Mapping[str, Iterable[int]]) -> Iterator[Variant]:
    """Each spec, or where the sweep has parameters of it each point of the sweep."""
    if not specs:
        raise ValueError("`index` needs at least one spec, got none")
    if not isinstance(sweep, Mapping):
        raise ValueError(f"`sweep` must give values by name, such as {{'nprobe': [1, 4]}}, got {sweep!r}")  # noqa: TRY004
    points = {name: _several(values) for name, values in sweep.items()}
    for name, values in points.items():
        if not values:
            raise ValueError(f"`sweep` needs at least one value of {name}, got none")
    sweep = {name: [_positive(v, f"`sweep` must give positive integers for {name}") for v in values]
             for name, values in points.items()}  # fmt: skip
    for spec in dict.fromkeys(map(str, specs)):
        names = [name for name in sweep if has_parameter(spec, name)]
        for values in product(*(sweep[name] for name in names)):
            yield Variant(spec, dict(zip(names, values, strict=True)))


def _draws(per_class: int | None, tries: int | None, leave_one_out: bool) -> int:
    if per_class is None:
        if tries is not None:
            raise ValueError("`tries` is for few-shot banks: give per_class too")
        return 1
    if leave_one_out:
        raise ValueError("per_class draws a bank for other queries: it does not go with leave_one_out")
    _positive(per_class, "`per_class` must be positive, an integer")
    return 5 if tries is None else _positive(tries, "`tries` must be positive, an integer")
