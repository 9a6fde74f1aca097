"""What an evaluation got wrong: queries that large shares of the votes got wrong, and classes that are confused."""

import numpy as np
from torch import Tensor

from faiss_knn.offline.confusions import confusions_between
from faiss_knn.offline.report.content import setting
from faiss_knn.offline.report.findings import Mistakes, Wrong
from faiss_knn.offline.report.results import Outcome, Record, index_name
from faiss_knn.offline.task import EvalTask

_LISTED = 30  # queries and pairs; outcomes.npz has all
_WITH_NEIGHBORS = 12  # of these queries
_NEAR = 8  # neighbours of a query


def says_more(record: Record, other: Record | None) -> bool:
    """Tell whether a record's mistakes say more: those of exact neighbours do, of more of them (one is always sure)."""
    return other is None or _rank(record) > _rank(other)


def _rank(record: Record) -> tuple[bool, int, float]:
    return record["exact"], record["k"], record["top1"]


def mistakes_of(task: EvalTask, record: Record, outcome: Outcome, indices: Tensor) -> Mistakes:
    """Look at one record of an evaluation with single labels.

    Args:
        task: What was evaluated.
        record: Under one vote.
        outcome: What became of the queries.
        indices: (Q, K) places of their neighbours in the bank, -1 where missing.
    """
    wrong = np.flatnonzero(~outcome["correct"])
    surest = wrong[np.argsort(-outcome["score"][wrong], kind="stable")[:_LISTED]]
    columns = (outcome[name][surest].tolist() for name in ("row", "label", "prediction", "score"))
    near = indices[surest[:_WITH_NEIGHBORS].tolist(), :_NEAR].cpu().numpy()
    pairs = confusions_between(outcome["label"], outcome["prediction"], outcome["row"], task.num_classes, int)
    labels = task.bank.labels.cpu().numpy()
    return Mistakes(
        setting=f"{setting(record)} on index {index_name(record)}",
        rank=_rank(record),
        side="row" if task.leave_one_out else "query",
        queries=len(outcome["correct"]),
        wrong=len(wrong),
        surest=[Wrong(*one) for one in zip(*columns, strict=True)],
        near=[[(int(task.bank.ids[i]), int(labels[i])) for i in own if i >= 0] for own in near],
        pairs=pairs[:_LISTED],
        pair_count=len(pairs),
    )
