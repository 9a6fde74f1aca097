"""Diagnostics over ranks: the same number on one and on several, for banks whole and in shards."""

from typing import Any
from unittest import mock

import pytest
import torch

from faiss_knn import OnlineEvaluator
from faiss_knn.distributed import rank_and_size
from faiss_knn.online import diagnostics
from faiss_knn.online.options import DIAGNOSTICS
from tests.distributed import runs
from tests.distributed.ranks import Ranks


@pytest.mark.parametrize("sample", [2048, 60])
def test_the_numbers_are_those_of_one_process(ranks: Ranks, sample: int) -> None:
    (expected,) = ranks.run(runs.fit_diagnosed, "replicate", sample, ranks=1)
    assert {f"eval/knn_{name}" for name in DIAGNOSTICS} < expected.keys()
    for gather in ("replicate", "shard"):
        for found in ranks.run(runs.fit_diagnosed, gather, sample):
            assert {key: found[key] for key in expected if key[9:] in DIAGNOSTICS} == {
                key: value for key, value in expected.items() if key[9:] in DIAGNOSTICS
            }


def views(options: dict[str, Any]) -> dict[str, float]:
    """Rank 1 has twice the rows of rank 0; each has copies of samples of the other."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(90, 5, generator=generator)
    second = first + torch.randn(90, 5, generator=generator)
    rank, size = rank_and_size()
    own = slice(0, 90) if size == 1 else [slice(0, 30), slice(30, 90)][rank]
    with mock.patch.object(diagnostics, "SAMPLE_ROWS", 40):
        knn = OnlineEvaluator("knn", ("a", "b"), "label", 90, num_classes=2, diagnostics="view_alignment", **options)
        knn.observe(a=first[own], b=second[own], label=torch.arange(90)[own] % 2, id=torch.arange(90)[own] % 80)
        knn.start([[]])
        return knn.finish()


@pytest.mark.parametrize("options", [{}, {"id": "id"}], ids=str)
def test_two_views_are_as_near_on_any_number_of_ranks(ranks: Ranks, options: dict[str, Any]) -> None:
    (expected,) = ranks.run(views, options, ranks=1)
    assert list(expected) == ["eval/knn_view_alignment"]
    for gather in ("replicate", "shard"):
        assert ranks.run(views, {"gather": gather} | options) == [expected] * 2
