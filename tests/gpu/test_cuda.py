"""The CPU's oracles on CUDA: search, vote, queue and callback on the device."""

import pytest
import torch

from faiss_knn import KNNIndex, vote
from faiss_knn.online.queue import RingBuffer
from tests.online.parts import Echo, clusters, loader, trainer
from tests.online.test_callback import knn
from tests.reference import brute_force

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("distance", ["euclidean", "squared_euclidean", "cosine", "manhattan"])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_flat_equals_brute_force(distance, offset, dtype):
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(5000, 64, generator=generator) + offset).to(dtype)
    queries = (torch.randn(100, 64, generator=generator) + offset).to(dtype)
    found = KNNIndex(distance_metric=distance).build(rows.cuda()).search(queries.cuda(), 20)
    expected, _ = brute_force(queries.double().numpy(), rows.double().numpy(), 20, distance)
    assert found.indices.device.type == found.distances.device.type == "cuda"
    torch.testing.assert_close(
        found.distances.cpu().double(), torch.as_tensor(expected).double(), rtol=1e-5, atol=1e-30
    )


def test_a_query_gets_the_same_bits_in_any_batch():
    rows, queries = torch.randn(20_000, 128, device="cuda"), torch.randn(1024, 128, device="cuda")
    index = KNNIndex().build(rows)
    whole = index.search(queries, 20)
    for size in (1, 7, 256):
        part = index.search(queries[:size], 20)
        assert torch.equal(part.indices, whole.indices[:size])
        assert torch.equal(part.distances, whole.distances[:size])


def test_vote_equals_the_cpu():
    distances, labels = torch.rand(64, 50), torch.randint(0, 10, (64, 50))
    assert torch.equal(vote(distances.cuda(), labels.cuda(), 10).cpu(), vote(distances, labels, 10))


def test_an_append_does_not_synchronise():
    ring, rows = RingBuffer(1000, 64, torch.float32, "cuda"), torch.randn(300, 64, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            ring.append(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(ring.latest(300), rows)


def test_the_callback_scores_on_the_device():
    run = trainer(knn(), accelerator="gpu", devices=1)
    run.fit(Echo(), loader(**clusters(64)), loader(**clusters(32, seed=1)))
    assert run.callback_metrics["eval/knn_acc"] == 1.0
