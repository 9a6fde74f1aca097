"""How sure a metric is: the standard errors of those that are means over queries."""

from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import Metric

from faiss_knn.distributed import all_gather_object

_COUNTS = ("tp", "fp", "tn", "fn")
_PER_CLASS = ("MulticlassAccuracy", "MulticlassRecall")
WITH_ERRORS = "MulticlassAccuracy, MulticlassRecall, BinaryAccuracy, MeanAbsoluteError and MeanSquaredError"


def has_standard_error(metric: Metric) -> bool:
    """Tell whether a metric is a mean over queries of which its own counts tell the standard error.

    Example:
        >>> from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC
        >>> has_standard_error(MulticlassAccuracy(3)), has_standard_error(MulticlassAUROC(3))
        (True, False)
    """
    names = {base.__name__ for base in type(metric).__mro__}
    has_counts = all(isinstance(getattr(metric, count, None), Tensor) for count in _COUNTS)
    return has_counts and bool(names & {*_PER_CLASS, "BinaryAccuracy"})


def standard_error(metric: Metric) -> Tensor:
    """Estimate the standard error of a metric over the queries of all ranks, which must all ask.

    With p the share of n queries that are right it is sqrt(p(1 - p) / n), the binomial one (Wald), for micro and
    weighted averages, which are that share. A macro average is a mean over its C classes of such shares, drawn
    independently (stratified sampling, Cochran 1977, equation 5.6): sqrt(Σ p_c(1 - p_c) / n_c) / C. It is 0 where all
    are right or none is, and says nothing of the bank, which is as it is.

    Args:
        metric: One that `has_standard_error`, updated.

    Returns:
        float64 on the CPU: a scalar, or (C,) for a metric that averages over nothing; NaN without a query.
    """
    own = {count: getattr(metric, count).tolist() for count in _COUNTS}
    on_ranks = all_gather_object(own)
    counts = {
        count: torch.stack([torch.tensor(part[count], dtype=torch.float64, device="cpu") for part in on_ranks]).sum(0)
        for count in _COUNTS
    }
    if any(base.__name__ == "BinaryAccuracy" for base in type(metric).__mro__):
        return _binomial(counts["tp"] + counts["tn"], torch.stack(list(counts.values())).sum(0))
    return _of_classes(metric, counts)


def _of_classes(metric: Metric, counts: Mapping[str, Tensor]) -> Tensor:
    right, queries = counts["tp"], counts["tp"] + counts["fn"]
    average = getattr(metric, "average", None)
    if average in ("micro", "weighted"):
        return _binomial(right.sum(), queries.sum())
    errors = _binomial(right, queries)
    if average != "macro":
        return errors
    # A class without queries counts as 0 where it was predicted, and not at all where it was not.
    counted = queries > 0 if getattr(metric, "top_k", 1) > 1 else queries + counts["fp"] > 0
    return errors.nan_to_num(0.0).square().sum().sqrt() / counted.sum()


def _binomial(right: Tensor, queries: Tensor) -> Tensor:
    share = right / queries
    return (share * (1 - share) / queries).sqrt()
