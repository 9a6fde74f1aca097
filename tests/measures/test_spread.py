"""Effective rank, alignment, uniformity, churn and copies against their definitions, pair by pair."""

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from faiss_knn.measures import uniformity as uniformity_module
from faiss_knn.measures.alignment import alignment, label_alignment
from faiss_knn.measures.churn import neighbor_churn
from faiss_knn.measures.duplicate_share import duplicate_share
from faiss_knn.measures.effective_rank import effective_rank
from faiss_knn.measures.uniformity import uniformity

DATA = load_digits()
DIGITS, LABELS = torch.from_numpy(DATA.data[:300]), torch.from_numpy(DATA.target[:300]).long()


def unit(rows):
    rows = rows.numpy().astype(np.float64)
    return rows / np.sqrt((rows**2).sum(1, keepdims=True))


def rankme(rows):
    values = np.linalg.svd(rows.double().numpy(), compute_uv=False)
    shares = [value / sum(values) + 1e-7 for value in values]
    return math.exp(-sum(share * math.log(share) for share in shares))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_effective_rank_is_rankmes(dtype):
    assert effective_rank(DIGITS.to(dtype)) == pytest.approx(rankme(DIGITS.to(dtype)), rel=1e-9)
    assert 20 < effective_rank(DIGITS) < 64


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_effective_rank_counts_equal_directions_at_any_scale(scale):
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    for used in (1, 3, 12):
        rows = torch.cat([basis[:used], -basis[:used]]) * scale
        assert effective_rank(rows) == pytest.approx(used, rel=1e-4)


def test_a_collapsed_network_has_rank_one():
    assert effective_rank(DIGITS[:1].repeat(50, 1)) == pytest.approx(1.0, abs=2e-4)
    assert effective_rank(torch.zeros(5, 3)) == 0.0


def test_alignment_is_the_mean_distance_of_pairs():
    a, b = unit(DIGITS[:100]), unit(DIGITS[100:200])
    for alpha in (1.0, 2.0, 3.0):
        expected = np.mean([math.dist(x, y) ** alpha for x, y in zip(a, b, strict=True)])
        assert alignment(DIGITS[:100], DIGITS[100:200], alpha=alpha) == pytest.approx(expected, rel=1e-12)


def test_label_alignment_takes_every_pair_of_a_label():
    labels = LABELS.clone()
    labels[::7] = -1
    rows = unit(DIGITS)
    squares = [math.dist(rows[i], rows[j]) ** 2 for i, j in combinations(range(300), 2) if labels[i] == labels[j] >= 0]
    assert label_alignment(DIGITS, labels) == pytest.approx(np.mean(squares), rel=1e-12)


def test_label_alignment_of_near_copies_loses_nothing():
    rows = torch.tensor([[1.0, 0.0], [1.0, 1e-9]], dtype=torch.float64)
    assert label_alignment(rows, torch.tensor([3, 3])) == pytest.approx(1e-18, rel=1e-6)


def test_without_a_pair_there_is_no_label_alignment():
    assert math.isnan(label_alignment(DIGITS[:3], torch.tensor([0, 1, -1])))
    assert math.isnan(label_alignment(DIGITS[:2], torch.tensor([-1, -1])))


@pytest.mark.parametrize("block", [1000, 1 << 22])
def test_uniformity_is_the_papers(block, monkeypatch):
    monkeypatch.setattr(uniformity_module, "_BLOCK", block)
    rows = torch.from_numpy(unit(DIGITS))
    for t in (0.5, 2.0):
        expected = math.log(torch.pdist(rows).pow(2).mul(-t).exp().mean())
        assert uniformity(DIGITS, t=t) == pytest.approx(expected, rel=1e-12)
    assert uniformity(3 * DIGITS[:1].repeat(4, 1)) == pytest.approx(0.0, abs=1e-12)
    assert uniformity(torch.tensor([[1.0], [-1.0]])) == pytest.approx(-8.0)


def test_churn_matches_samples_by_id():
    random = np.random.default_rng(0)
    ids_a, ids_b = random.permutation(60)[:40] + 100, random.permutation(60)[:50] + 100
    lists_a, lists_b = (np.stack([random.permutation(30)[:6] for _ in ids]) for ids in (ids_a, ids_b))
    before, now = dict(zip(ids_a, lists_a, strict=True)), dict(zip(ids_b, lists_b, strict=True))
    common = before.keys() & now.keys()
    gone = [len(set(before[sample]) - set(now[sample])) / 6 for sample in common]
    assert 20 < len(common) < 40
    assert neighbor_churn(ids_a, lists_a, ids_b, lists_b) == pytest.approx(np.mean(gone))
    assert neighbor_churn(ids_a, lists_a, ids_a[::-1], lists_a[::-1, ::-1]) == 0.0
    assert math.isnan(neighbor_churn(ids_a, lists_a, ids_b + 1000, lists_b))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_copies_are_counted_after_the_first(dtype):
    rows = DIGITS[:100].to(dtype)
    assert len({tuple(row) for row in rows.tolist()}) == 100
    assert duplicate_share(rows) == 0.0
    assert duplicate_share(torch.cat([rows, rows[:50], rows[:50]])) == 0.5
    assert duplicate_share(rows[:1].repeat(8, 1)) == 7 / 8
    assert duplicate_share(torch.tensor([[0.0, 1.0], [-0.0, 1.0]], dtype=dtype)) == 0.5
    assert duplicate_share(rows[:0]) == 0.0


ROWS = torch.eye(3)
IDS, LISTS = np.arange(3), np.arange(6).reshape(3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effective_rank(ROWS[0]), r"`features` must have shape \(n, d\)"),
        (lambda: effective_rank(ROWS[:0]), "`features` must have rows, got none"),
        (lambda: effective_rank(ROWS.log()), "`features` must be finite"),
        (lambda: alignment(ROWS, ROWS[:2]), r"`second` must have the shape of `first`, \(3, 3\), got \(2, 3\)"),
        (lambda: alignment(ROWS, ROWS * 0), "`second` must have no zero rows, which lie in no direction, got 3"),
        (lambda: alignment(ROWS[:0], ROWS[:0]), "`first` must have rows, got none"),
        (lambda: label_alignment(ROWS, torch.zeros(2)), r"`labels` must be \(3,\) integer class ids"),
        (lambda: uniformity(ROWS[:1]), "`features` must have two rows or more, to make pairs, got 1"),
        (lambda: uniformity(ROWS / 0), "`features` must be finite"),
        (lambda: neighbor_churn(IDS, LISTS, IDS, LISTS[:, :1]), "`lists_now` must be as long as `lists_before`, 2"),
        (lambda: neighbor_churn(IDS, LISTS, IDS, LISTS[:2]), r"`lists_now` must be \(Q, k\) sample ids"),
        (lambda: neighbor_churn(IDS * 0.5, LISTS, IDS, LISTS), r"`ids_before` must be \(Q,\) integer sample ids"),
        (lambda: neighbor_churn(IDS * 0, LISTS, IDS, LISTS), "`ids_before` must hold each sample once"),
        (lambda: duplicate_share(ROWS[0]), r"`features` must have shape \(n, d\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
