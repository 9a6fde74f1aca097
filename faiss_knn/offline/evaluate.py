"""evaluate(): one search per index, then every number that follows from its neighbours."""

import math
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faiss_knn.classify.vote import check_vote_options
from faiss_knn.offline.metrics import make_metrics
from faiss_knn.offline.neighbors import EXACT, Found, SearchOptions, Variant, has_parameter
from faiss_knn.offline.problem import Problem, check_values, make_problem, suspicions
from faiss_knn.offline.report import EvalReport, Record, mean_values, record_key
from faiss_knn.offline.rows import Rows, read_rows, spans
from faiss_knn.offline.scores import ClassJudge, Hits, MultiHotJudge, recalls
from faiss_knn.offline.together import find_neighbors
from faiss_knn.retrieval import retrieval_metrics

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
    bank_features: Rows,
    bank_labels: Any,
    query_features: Rows | None = None,
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
    keep_neighbors: bool = False,
    progress: bool | None = False,
    done: Iterable[Record] = (),
    on_record: Callable[[Record, list[float]], None] | None = None,
) -> EvalReport:
    """Judge features by their nearest neighbours: for each index one search, then every k, temperature and weighting.

    Where `torch.distributed` is set up, all ranks call it with the same arguments, share the searches, and get the same
    records but for times.

    Args:
        bank_features: (N, d) tensor, ndarray, memmap, or `Rows` that are read in blocks.
        bank_labels: (N,) class ids from 0 (-1: left out) or names; or (N, C) multi-hot of 0 and 1.
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
        seed: Of the draws.
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
    options = SearchOptions(distance_metric, device, nprobe, target_recall, latency, progress)
    for variant in variants:
        options.index(variant)  # refuses bad options before any work
    draws = _draws(per_class, tries, leave_one_out)
    problem = make_problem(
        bank_features, bank_labels, query_features, query_labels,
        num_classes=num_classes, class_names=class_names, leave_one_out=leave_one_out,
    )  # fmt: skip
    for variant in variants:
        options.check(variant, problem.dim)
    check_values(problem, distance_metric)
    judges = make_metrics(metrics, problem.num_classes, problem.multi_hot)
    run = _Run(problem, grid, options, judges, per_class, draws, seed)
    report = EvalReport(problem.class_names, suspicions(problem, grid.ks))
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
        problem: Problem,
        grid: Grid,
        options: SearchOptions,
        metrics: Mapping[str, Any],
        per_class: int | None,
        draws: int,
        seed: int,
    ) -> None:
        self.grid = grid
        self.options = options
        self.metrics = metrics
        self.draws = [problem] if per_class is None else [problem.few_shot(per_class, seed + i) for i in range(draws)]
        self._exact: list[Found] | None = None
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
                "depth": grid.depth,
                "metrics": list(metrics),
            },
            "data": problem.fingerprint,
            "num_classes": problem.num_classes,
            "n_bank": len(self.draws[0].bank.rows),
            "n_queries": len(problem.queries.rows),
            "dim": problem.dim,
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

    def search(self, variant: Variant) -> list[Found]:
        """The neighbours in each draw."""
        if variant != EXACT:
            return [find_neighbors(draw, self.grid.depth, variant, self.options) for draw in self.draws]
        if self._exact is None:
            options = replace(self.options, target_recall=None, nprobe=None)
            self._exact = [find_neighbors(draw, self.grid.depth, EXACT, options) for draw in self.draws]
        return self._exact

    def records(self, variant: Variant, found: list[Found]) -> Iterator[tuple[Record, list[float]]]:
        """One index's records with the scores of each class, each as soon as it is there."""
        exact = self.search(EXACT)
        judges = [_judge(draw, one) for draw, one in zip(self.draws, found, strict=True)]
        exact_judges = judges if found is exact else [_judge(d, e) for d, e in zip(self.draws, exact, strict=True)]
        fixed = mean_values([one.cost for one in found])
        fixed["duplicates"] = max(_duplicates(draw, one) for draw, one in zip(self.draws, exact, strict=True))
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
                self.identity(variant, point) | accuracy | recall[k] | _at(retrieval, k) | fixed | _surroundings(),
                per_class.tolist(),
            )


def _judge(problem: Problem, found: Found) -> ClassJudge | MultiHotJudge:
    device = found.indices.device
    bank_labels, truth = problem.bank.labels.to(device), problem.queries.labels.to(device)
    if problem.multi_hot:
        return MultiHotJudge(found.distances, found.indices, bank_labels, truth)
    return ClassJudge(found.distances, _labels(found.indices, bank_labels), truth, problem.num_classes)


def _given_ids(problem: Problem, found: Found) -> tuple[np.ndarray, np.ndarray]:
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


def _recall(found: Found, exact: Found, problem: Problem, k: int) -> Record:
    k = min(k, problem.reachable)
    by_distance, by_id = recalls(
        found.distances[:, :k], found.indices[:, :k], exact.distances[:, :k], exact.indices[:, :k]
    )
    return {"recall": by_distance, "recall_ids": by_id}


def _retrieval(problem: Problem, found: Found, grid: Grid) -> Record:
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


def _duplicates(problem: Problem, exact: Found) -> int:
    """Queries whose nearest bank row is the query itself, number by number."""
    count = 0
    for a, b in spans(len(problem.queries.rows), 4096):
        nearest = exact.indices[a:b, 0].cpu().numpy()
        order = np.argsort(nearest, kind="stable")  # files are read in ascending order
        places, back = np.unique(nearest[order], return_inverse=True)
        rows = _on_host(read_rows(problem.bank.pick(places).rows))[back]
        queries = _on_host(read_rows(problem.queries.rows, a, b))[order]
        count += int((rows == queries).all(1).sum())
    return count


def _on_host(block: np.ndarray | Tensor) -> np.ndarray:
    return np.asarray(block.float().cpu()) if isinstance(block, Tensor) else block


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
    return (given,) if isinstance(given, (str, int, float)) else tuple(given)


def _grid(k: Any, temperature: Any, weighting: Any, depth: int | None) -> Grid:
    ks, temperatures, weightings = (tuple(dict.fromkeys(_several(given))) for given in (k, temperature, weighting))
    for name, given in (("k", ks), ("temperature", temperatures), ("weighting", weightings)):
        if not given:
            raise ValueError(f"`{name}` needs at least one value, got none")
    for one in (*ks, *([] if depth is None else [depth])):
        if isinstance(one, bool) or not isinstance(one, int) or one < 1:
            raise ValueError(f"`k` and `depth` must be positive integers, got {one!r}")
    for one, weigh in product(temperatures, weightings):
        check_vote_options(one, weigh)
    return Grid(ks, tuple(float(t) for t in temperatures), weightings, max(*ks, depth or 1))


def _variants(specs: tuple[str, ...], sweep: Mapping[str, Iterable[int]]) -> Iterator[Variant]:
    """Each spec, or where the sweep has parameters of it each point of the sweep."""
    if not specs:
        raise ValueError("`index` needs at least one spec, got none")
    for spec in dict.fromkeys(specs):
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
    tries = 5 if tries is None else tries
    for name, given in (("per_class", per_class), ("tries", tries)):
        if given < 1:
            raise ValueError(f"`{name}` must be positive, got {given}")
    return tries
