"""Votes and probabilities against loops, with scikit-learn's isotonic fit, and planted noise found and priced."""

from collections import Counter

import numpy as np
import pytest
from sklearn.isotonic import IsotonicRegression

from faiss_knn.measures import label_errors
from faiss_knn.measures.label_errors import label_noise, neighbor_vote, one_vote_a_group
from tests.measures.lists import digits, own_lists

ROWS, LABELS = digits()
_, INDICES = own_lists(ROWS, 20)
_, FEWER = own_lists(ROWS[:1347], 20)


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


def noisy(share, seed, labels=LABELS):
    """Flip a share of the labels to any other class."""
    rng = np.random.default_rng(seed)
    flipped, wrong = labels.copy(), rng.random(len(labels)) < share
    flipped[wrong] = (labels[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    return flipped, wrong


def confused(share, seed, labels=LABELS):
    """Flip labels to the next class four times of five, of class 0 none, of the last twice the share."""
    rng = np.random.default_rng(seed)
    wrong = rng.random(len(labels)) < share * np.linspace(0, 2, 10)[labels]
    steps = np.where(rng.random(len(labels)) < 0.8, 1, rng.integers(1, 10, len(labels)))
    return np.where(wrong, (labels + steps) % 10, labels), wrong


@pytest.mark.parametrize(
    ("share", "seed", "precision", "recall"),
    [
        (0.05, 0, 0.95, 0.97),
        (0.05, 1, 0.94, 0.97),
        (0.1, 0, 0.97, 0.955),
        (0.1, 1, 0.96, 0.94),
        (0.3, 0, 0.97, 0.98),
        (0.3, 1, 0.97, 0.965),
    ],
)
def test_planted_noise_is_found_and_its_share_told(share, seed, precision, recall):
    labels, wrong = noisy(share, seed)
    vote = neighbor_vote(labels[INDICES], labels)
    found = label_noise(vote, labels, 10)
    suspects = found.wrong >= 0.5
    assert wrong[suspects].mean() >= precision
    assert suspects[wrong].mean() >= recall
    assert found.noise == pytest.approx(wrong.mean(), abs=0.015)
    assert found.wrong[suspects].mean() == pytest.approx(wrong[suspects].mean(), abs=0.05)  # is told as it is
    assert (suspects & (vote.first == LABELS))[wrong].mean() >= 0.98 * recall
    assert np.array_equal(found.contradicted, vote.first != labels)


@pytest.mark.parametrize(
    ("planted", "share", "least_recall", "precision"),
    [
        (noisy, 0.01, 0.7, 0.91),
        (noisy, 0.03, 0.85, 0.94),
        (noisy, 0.1, 0.9, 0.965),
        (noisy, 0.2, 0.93, 0.97),
        (confused, 0.01, 0.3, 0.92),
        (confused, 0.03, 0.7, 0.96),
        (confused, 0.1, 0.85, 0.975),
        (confused, 0.2, 0.8, 0.965),
    ],
)
def test_of_few_rows_as_much_is_found_in_any_draw(planted, share, least_recall, precision):
    found = []
    for seed in range(10):
        labels, wrong = planted(share, seed, LABELS[:1347])
        suspects = label_noise(neighbor_vote(labels[FEWER], labels), labels, 10).wrong >= 0.5
        found.append((suspects[wrong].mean(), wrong[suspects].mean()))
    assert np.min(found, axis=0)[0] >= least_recall
    assert np.mean(found, axis=0)[1] >= precision


def test_right_labels_have_hardly_a_suspect():
    found = label_noise(neighbor_vote(LABELS[INDICES], LABELS), LABELS, 10)
    assert found.noise < 0.003
    assert (found.wrong >= 0.5).sum() == 0


def test_probabilities_are_those_of_the_formulas_row_by_row():
    labels, _ = noisy(0.2, 3)
    labels[:40] = -1
    vote = neighbor_vote(labels[INDICES], labels)
    found = label_noise(vote, labels, 10)
    rows = [i for i, label in enumerate(labels) if label >= 0]
    overall = np.mean(vote.own_share[rows])
    usual = [np.mean([*vote.own_share[labels == c], overall]) for c in range(10)]
    clear = [i for i in rows if vote.share[i] >= usual[vote.first[i]]]
    share = np.mean([vote.first[i] != labels[i] for i in clear])
    agreement = IsotonicRegression().fit_transform(vote.margin[rows], (vote.first == labels)[rows])
    noise = {}
    for c in range(10):
        of_class = [vote.first[i] != labels[i] for i in clear if vote.first[i] == c]
        noise[c] = (sum(of_class) + 1) / (len(of_class) + 1 / share)
    assert found.noise == pytest.approx(np.mean([noise[c] for c in vote.first[rows]]))
    for i, agrees in zip(rows, agreement, strict=True):
        first, label = vote.first[i], labels[i]
        if first == label:
            assert found.wrong[i] == 0
            continue
        alike = [j for j in clear if vote.first[j] == first]
        flip = (sum(labels[j] == label for j in alike) + 1) / (len(alike) + 9 / share)
        right = np.clip((agrees - noise[first] / 9) / (1 - noise[first] * 10 / 9), 0, 1 - 0.5 / (len(clear) + 1))
        voters = [x for x in labels[INDICES[i]] if x >= 0]
        others = [voters.count(c) + 1 / 9 for c in range(10) if c != first]
        is_label = (voters.count(label) + 1 / 9) / sum(others)
        for_wrong = right * flip + (1 - right) * (1 - is_label) * noise[first] / 9
        odds = for_wrong / ((1 - right) * is_label * (1 - noise[first]))
        assert found.wrong[i] == pytest.approx(odds / (1 + odds))
    assert not found.wrong[:40].any()


def test_where_all_labels_are_contradicted_a_number_comes_out():
    labels = np.array([0, 1] * 5)
    found = label_noise(neighbor_vote(np.repeat(1 - labels[:, None], 3, axis=1), labels), labels, 2)
    assert (found.noise, found.wrong.tolist(), found.contradicted.all()) == (1.0, [0.0] * 10, True)


def test_classes_that_no_row_here_is_labelled_with_have_no_clear_votes_for_it_alone():
    labels = np.repeat([0, 1], 50)
    around = np.repeat(labels[:, None], 8, axis=1)
    around[:10, 2:5], around[:10, 5:] = 2, 3  # of rows that were not drawn
    assert label_noise(neighbor_vote(around, labels), labels, 4).noise == 0


def test_without_votes_or_classes_nothing_is_said():
    none = np.full((3, 2), -1)
    assert label_noise(neighbor_vote(none, np.zeros(3, int)), np.zeros(3, int), 5).noise == 0
    one = label_noise(neighbor_vote(np.zeros((3, 2), int), np.zeros(3, int)), np.zeros(3, int), 1)
    assert (one.noise, one.wrong.tolist()) == (0.0, [0.0, 0.0, 0.0])
