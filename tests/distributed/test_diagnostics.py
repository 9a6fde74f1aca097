"""Diagnostics over ranks: the same number on one and on several, for banks whole and in shards."""

import pytest

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
