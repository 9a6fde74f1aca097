"""The searches of an audit: the bank's rows among themselves, the queries among the bank's, and two sets' balls."""

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from faiss_knn.measures.generative import set_scores
from faiss_knn.offline.ball_counts import count_in_balls
from faiss_knn.offline.near_duplicates import Lists
from faiss_knn.offline.search import EXACT, SearchOptions, search_task
from faiss_knn.offline.task import EvalTask, LabelledRows
from faiss_knn.search.engines.rerank import drop_self

Ids = npt.NDArray[np.int64]

_BALL = 5  # the neighbour that balls reach to, as in Naeem et al. 2020


@dataclass(frozen=True)
class AuditLists:
    """Neighbours in the bank, by place.

    Attributes:
        rows: Of the bank's rows, or of those that were drawn, themselves left out.
        queries: Of the queries, if there are any.
        k: How many places of each list are asked for; lists may be longer, or shorter where the bank is small.
        sample: How many rows were drawn; None: all rows were searched for.
    """

    rows: Lists
    queries: Lists | None
    k: int
    sample: int | None

    @property
    def all_lists(self) -> list[Lists]:
        """Those of rows, and of queries if there are any."""
        return [self.rows] if self.queries is None else [self.rows, self.queries]


def search_audit(task: EvalTask, k: int, options: SearchOptions, sample: int | None, seed: int) -> AuditLists:
    """Search for k neighbours of every row and query.

    Args:
        task: Bank and queries; with `leave_one_out` there are no queries.
        k: How many.
        options: How to search.
        sample: How many rows of the bank to search for, drawn at random; None: all.
        seed: Of the draw.
    """
    count = len(task.bank.rows)
    drawn = None
    if sample is not None and sample < count:
        drawn = np.sort(np.random.default_rng(seed).choice(count, sample, replace=False))
    depth = max(k, _BALL)
    rows = _of_rows(task, drawn, min(depth, count - 1), options)
    queries = None if task.leave_one_out else _of_queries(task, min(depth, count), options)
    return AuditLists(rows, queries, k, None if drawn is None else len(drawn))


def _of_rows(task: EvalTask, drawn: Ids | None, depth: int, options: SearchOptions) -> Lists:
    """Search the bank's own rows, each row left out of its list."""
    if drawn is None:
        result = search_task(_among_themselves(task.bank, task), depth, EXACT, options)
        return _lists(np.arange(len(task.bank.rows)), result.distances, result.indices)
    part = replace(task, queries=task.bank.pick(drawn), leave_one_out=False)
    result = search_task(part, depth + 1, EXACT, options)
    own = torch.from_numpy(drawn).to(result.indices.device)
    return _lists(drawn, *drop_self(result.distances, result.indices, own))


def _of_queries(task: EvalTask, depth: int, options: SearchOptions) -> Lists:
    result = search_task(task, depth, EXACT, options)
    return _lists(np.arange(len(task.queries.rows)), result.distances, result.indices)


def _among_themselves(rows: LabelledRows, task: EvalTask) -> EvalTask:
    return replace(task, bank=rows, queries=rows, leave_one_out=True)


def _lists(rows: Ids, distances: Tensor, indices: Tensor) -> Lists:
    return Lists(rows, distances.cpu().numpy(), indices.cpu().numpy())


def compare_sets(task: EvalTask, lists: AuditLists, options: SearchOptions) -> dict[str, float] | None:
    """Compare the queries, as a generated set, with the bank as the real one: see `faiss_knn.measures.generative`.

    Returns:
        `precision`, `recall`, `density`, `coverage` and `k`; None without queries, for rows that were drawn, and for
        sets of a single row.
    """
    k = min(_BALL, len(task.bank.rows) - 1, len(task.queries.rows) - 1)
    if lists.queries is None or lists.sample is not None or k < 1:
        return None
    among_queries = search_task(_among_themselves(task.queries, task), k, EXACT, options)
    fake_radii = among_queries.distances[:, k - 1].cpu().numpy()
    real, fake = task.bank.rows, task.queries.rows
    in_real, real_around = count_in_balls(real, lists.rows.distances[:, k - 1], fake, options.distance_metric, k)
    _, fake_around = count_in_balls(fake, fake_radii, real, options.distance_metric, k)
    return set_scores(in_real, real_around, fake_around, k) | {"k": k}
