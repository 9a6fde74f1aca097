"""ShardedBank on real gloo ranks: the scores of one FeatureBank, and labels checked on every rank."""

from typing import Any

import pytest
import torch
from torch import Tensor

from faiss_knn import FeatureBank, KNNIndex
from faiss_knn.classify.sharded import ShardedBank
from faiss_knn.distributed import rank_and_size
from tests.distributed.ranks import Ranks

COUNTS = [13, 0, 27]
OPTIONS: dict[str, Any] = {"temperature": 0.3, "weighting": "softmax"}


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(40, 6, generator=generator),
        torch.randint(0, 4, (40,), generator=generator),
        torch.randn(9, 6, generator=generator),
    )


def labels_of(kind: str) -> Tensor:
    _, ids, _ = data()
    rows = torch.nn.functional.one_hot(ids, 4)
    return {"ids": ids, "narrow ids": ids.to(torch.uint8), "multi-hot": rows, "shares": 0.8 * rows.float() + 0.05}[kind]


def voted(kind: str) -> Any:
    features, _, queries = data()
    rank, _ = rank_and_size()
    own, labels = features.split(COUNTS)[rank], labels_of(kind).split(COUNTS)[rank]
    if len(own) == 0:
        labels = torch.empty(0)  # as a queue that was never filled has it
    bank = ShardedBank(own, labels, num_classes=4, index=KNNIndex())
    return tuple(bank.votes(bank.find(queries.split([4, 5, 0])[rank], 7), **OPTIONS))


@pytest.mark.parametrize("kind", ["ids", "narrow ids", "multi-hot", "shares"])
def test_votes_are_those_of_one_bank(ranks: Ranks, kind: str) -> None:
    features, _, queries = data()
    one = FeatureBank(features, labels_of(kind), num_classes=4)
    expected = one.votes(one.neighbors(queries, 7), **OPTIONS)
    for found, whole in zip(zip(*ranks.run(voted, kind, ranks=3), strict=True), expected, strict=True):
        assert torch.equal(torch.cat(found), whole)


def refused(case: str) -> str:
    features, labels, _ = data()
    rank, _ = rank_and_size()
    own, labels = features.split(COUNTS)[rank], labels.split(COUNTS)[rank].clone()
    if rank == 2:
        labels = {
            "more labels": torch.cat([labels, labels[:1]]),
            "fewer labels": labels[:-1],
            "a class beyond": labels.index_fill(0, torch.tensor([3]), 4),
            "unlabelled": labels.index_fill(0, torch.tensor([3]), -1),
            "columns": torch.nn.functional.one_hot(labels, 5),
            "two": 2 * torch.nn.functional.one_hot(labels, 4),
        }[case]
    try:
        ShardedBank(own, labels, num_classes=4, index=KNNIndex())
    except ValueError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("more labels", "`labels` must have one row per feature row, 27, got shape (28,)"),
        ("fewer labels", "got shape (26,)"),
        ("a class beyond", "num_classes=4 does not fit `labels` of 5 classes"),
        ("unlabelled", "`labels` must have no unlabelled rows"),
        ("columns", "num_classes=4 does not fit `labels` of 5 classes"),
        ("two", "multi-hot `labels` must be 0 and 1, got 2"),
    ],
)
def test_labels_that_do_not_fit_are_refused_on_every_rank(ranks: Ranks, case: str, said: str) -> None:
    first, second, third = ranks.run(refused, case, ranks=3)
    assert said in third
    assert "rank 2" in first
    assert "rank 2" in second
