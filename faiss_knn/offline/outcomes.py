"""What became of each query under each vote, kept so that runs can be compared without searching again."""

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from faiss_knn.offline.accuracy import Hits
from faiss_knn.offline.options import EvalOptions
from faiss_knn.offline.report.results import Outcome
from faiss_knn.offline.task import EvalTask, LabelledRows

_BYTES = 9  # of a query under one vote of one bank: an int32, a bool and a float32
_KEPT_UNASKED = 1 << 30  # bytes


def keeps_outcomes(options: EvalOptions, draws: Sequence[EvalTask]) -> bool:
    """Tell whether outcomes are kept: if that was asked for, or else where all of them take 1 GiB at most."""
    if options.keep_outcomes is not None:
        return options.keep_outcomes
    votes = len(options.variants) * len(list(options.votes))
    return _BYTES * votes * len(draws) * len(draws[0].queries.rows) <= _KEPT_UNASKED


def describe_queries(task: EvalTask) -> Outcome:
    """Say which queries there are: the arrays that all outcomes of a task share.

    Returns:
        `row` (Q,) int64, the queries' row numbers as they were given, `label` (Q,) int32 class numbers, which multi-hot
        labels have none of, and `group` (Q,) int64, if groups were given.
    """
    labels = {} if task.multi_hot else {"label": _as_int32(task.queries.labels)}
    groups = {} if task.queries.groups is None else {"group": task.queries.groups.cpu().numpy()}
    return {"row": np.asarray(task.queries.ids, dtype=np.int64), **labels, **groups}


def outcome_of(hits: Sequence[Hits], queries: Outcome) -> Outcome:
    """Say what became of each query under one vote, in each draw if there are several; see `EvalReport.outcomes`."""
    draws = [
        {
            "prediction": _as_int32(one.prediction),
            "correct": one.top1.cpu().numpy(),
            "score": one.share.float().cpu().numpy(),
        }
        for one in hits
    ]
    answers = draws[0] if len(draws) == 1 else {name: np.stack([one[name] for one in draws]) for name in draws[0]}
    return answers | queries


def query_fingerprint(task: EvalTask) -> str:
    """Digest which rows are asked and what their labels are, whatever their features and the bank.

    Two tasks have the same one if they ask the same rows, by number, and these have the same classes, by name or id.
    """
    return _fingerprint(task, task.queries)


def bank_fingerprint(task: EvalTask) -> str:
    """Digest which rows the bank has and what their labels are, whatever their features and the queries.

    Two banks count as the same rows if equally many have a label, by the same numbers, and these have the same classes,
    by name or id. The features of two models differ for the same samples, so none of them is looked at.
    """
    return _fingerprint(task, task.bank)


def _fingerprint(task: EvalTask, rows: LabelledRows) -> str:
    labels, multi_hot = rows.labels, task.multi_hot
    everything = torch.arange(task.num_classes, device=labels.device)
    present = everything if multi_hot else everything[torch.bincount(labels, minlength=task.num_classes) > 0]
    places = labels if multi_hot else torch.searchsorted(present, labels)
    digest = blake2b(str(task.names_of(present)).encode(), digest_size=8)
    for values in (torch.from_numpy(np.asarray(rows.ids, dtype=np.int64)), places):
        digest.update(np.ascontiguousarray(values.cpu().long().numpy()).data)
    return digest.hexdigest()


def _as_int32(numbers: Tensor) -> np.ndarray:
    return numbers.int().cpu().numpy()
