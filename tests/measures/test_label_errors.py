"""Votes against a loop, isotonic agreement against scikit-learn's, and planted noise found and priced."""

from collections import Counter

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from faiss_knn.measures import label_errors
from faiss_knn.measures.label_errors import label_noise, neighbor_vote, one_vote_a_group
from tests.measures.lists import digits, own_lists

ROWS, LABELS = digits()
_, INDICES = own_lists(ROWS, 20)


@pytest.mark.parametrize("block", [300, 1 << 22])
def test_votes_are_counted_row_by_row(block, monkeypatch):
    monkeypatch.setattr(label_errors, "_BLOCK", block)
    rng = np.random.default_rng(0)
    around, labels = rng.integers(-1, 4, (60, 7)), rng.integers(-1, 4, 60)
    around[5] = -1
    vote = neighbor_vote(around, labels)
    for i, (row, label) in enumerate(zip(around.tolist(), labels.tolist(), strict=True)):
        counts = Counter(x for x in row if x >= 0)
        voters = sum(counts.values())
        best = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
        first, most = best[0] if best else (-1, 0)
        second = best[1][1] if len(best) > 1 else 0
        assert (vote.first[i], vote.voters[i]) == (first, voters)
        assert vote.share[i] == most / max(voters, 1)
        assert vote.margin[i] == (most - second) / max(voters, 1)
        assert vote.own_share[i] == (counts[label] if label >= 0 else 0) / max(voters, 1)


def test_a_group_of_copies_votes_once_and_never_for_itself():
    labels = np.array([[1, 1, 1, 2, 0], [-1, 3, 3, 3, 3]])
    groups = np.array([[9, 9, 4, 5, 4], [8, 8, 8, 6, 7]])
    assert one_vote_a_group(labels, groups, np.array([5, 6])).tolist() == [[1, -1, 1, -1, -1], [-1, 3, -1, -1, 3]]


def noisy(share, seed):
    rng = np.random.default_rng(seed)
    labels, wrong = LABELS.copy(), rng.random(len(LABELS)) < share
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    return labels, wrong


@pytest.mark.parametrize(
    ("share", "seed", "precision", "recall"),
    [
        (0.05, 0, 0.94, 0.91),
        (0.05, 1, 0.87, 0.94),
        (0.1, 0, 0.93, 0.955),
        (0.1, 1, 0.95, 0.89),
        (0.3, 0, 0.96, 0.95),
        (0.3, 1, 0.96, 0.94),
    ],
)
def test_planted_noise_is_found_and_its_share_told(share, seed, precision, recall):
    labels, wrong = noisy(share, seed)
    vote = neighbor_vote(labels[INDICES], labels)
    found = label_noise(vote, labels, 10)
    suspects = found.wrong >= 0.5
    assert wrong[suspects].mean() >= precision
    assert suspects[wrong].mean() >= recall
    assert found.noise == pytest.approx(wrong.mean(), abs=0.05)
    assert found.wrong[suspects].mean() == pytest.approx(wrong[suspects].mean(), abs=0.1)  # is told as it is
    assert (vote.first[suspects & wrong] == LABELS[suspects & wrong]).mean() > 0.985
    assert np.array_equal(found.contradicted, vote.first != labels)


def test_right_labels_have_hardly_a_suspect():
    found = label_noise(neighbor_vote(LABELS[INDICES], LABELS), LABELS, 10)
    assert found.noise < 0.005
    assert (found.wrong >= 0.5).sum() <= 2


def test_the_agreement_is_isotonic():
    labels, _ = noisy(0.2, 3)
    vote = neighbor_vote(labels[INDICES], labels)
    agrees = vote.first == labels
    fitted = IsotonicRegression().fit(vote.margin, agrees).predict(vote.margin)
    found = label_noise(vote, labels, 10)
    chance = found.noise / 9
    right = np.clip((fitted - chance) / (1 - found.noise - chance), 0, 1)
    expected = found.noise * (right + (1 - right) * 8 / 9) / (1 - fitted).clip(1e-9)
    assert found.wrong[~agrees] == pytest.approx(expected.clip(0, 1)[~agrees])
    assert not found.wrong[agrees].any()


def test_without_votes_or_classes_nothing_is_said():
    none = np.full((3, 2), -1)
    assert label_noise(neighbor_vote(none, np.zeros(3, int)), np.zeros(3, int), 5).noise == 0
    one = label_noise(neighbor_vote(np.zeros((3, 2), int), np.zeros(3, int)), np.zeros(3, int), 1)
    assert (one.noise, one.wrong.tolist()) == (0.0, [0.0, 0.0, 0.0])
