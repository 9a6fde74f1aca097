"""Rows whose neighbours contradict their label, and how probable it is that the label is wrong."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]

_BLOCK = 1 << 22  # pairs of neighbours that are compared at once
_TINY = float(np.finfo(np.float64).tiny)


class NeighborVote(NamedTuple):
    """What the neighbours of each row say, one vote each.

    Attributes:
        first: (n,) the class of most votes, of equals the lowest, -1 without any vote.
        share: (n,) its share of the votes.
        margin: (n,) that share less the next class's.
        own_share: (n,) share of the votes for the row's own label.
        voters: (n,) how many voted.
    """

    first: npt.NDArray[np.int64]
    share: Floats
    margin: Floats
    own_share: Floats
    voters: npt.NDArray[np.int64]

    def rows(self, places: Ids) -> "NeighborVote":
        """Pick rows."""
        first, share, margin, own_share, voters = self
        return NeighborVote(first[places], share[places], margin[places], own_share[places], voters[places])


class LabelNoise(NamedTuple):
    """How far labels are to be believed.

    Attributes:
        noise: Estimated share of all labels that are wrong.
        wrong: (n,) probability that the row's label is wrong, 0 where its neighbours agree with it or do not vote.
        contradicted: (n,) whether they say something else.
    """

    noise: float
    wrong: Floats
    contradicted: npt.NDArray[np.bool_]


def one_vote_a_group(neighbor_labels: Ids, neighbor_groups: Ids, groups: Ids) -> Ids:
    """Take the votes from a row's own near-duplicates, and from all but the nearest of any other group of them.

    Copies that were labelled together, rightly or wrongly, are one witness.

    Args:
        neighbor_labels: (n, k) class numbers, nearest first, -1 for a neighbour that has no vote.
        neighbor_groups: (n, k) the neighbours' groups; any number where there is no vote.
        groups: (n,) the rows' own.

    Returns:
        (n, k) class numbers, -1 for a neighbour that has no vote.

    Example:
        >>> one_vote_a_group(np.array([[4, 2, 2, 3]]), np.array([[7, 5, 5, 6]]), np.array([7])).tolist()
        [[-1, 2, -1, 3]]
    """
    votes = neighbor_labels.copy()
    votes[neighbor_groups == groups[:, None]] = -1
    for place in range(1, votes.shape[1]):
        before = (neighbor_groups[:, :place] == neighbor_groups[:, place, None]) & (votes[:, :place] >= 0)
        votes[before.any(1), place] = -1
    return votes


def neighbor_vote(neighbor_labels: Ids, labels: Ids) -> NeighborVote:
    """Count the votes of each row's neighbours.

    Args:
        neighbor_labels: (n, k) class numbers, -1 for a neighbour that has no vote.
        labels: (n,) the rows' own, -1 where unknown.

    Example:
        >>> vote = neighbor_vote(np.array([[2, 1, 2, -1]]), np.array([1]))
        >>> vote.first.tolist(), vote.share.round(2).tolist(), vote.own_share.round(2).tolist(), vote.voters.tolist()
        ([2], [0.67], [0.33], [3])
    """
    n, k = neighbor_labels.shape
    parts = [
        _count(neighbor_labels[a : a + step], labels[a : a + step])
        for step in [max(1, _BLOCK // (k * k))]
        for a in range(0, max(n, 1), step)
    ]
    return NeighborVote(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def _count(neighbor_labels: Ids, labels: Ids) -> NeighborVote:
    votes = neighbor_labels >= 0
    counts = (neighbor_labels[:, :, None] == neighbor_labels[:, None, :]).sum(2) * votes  # of each neighbour's class
    most = counts.max(1)
    first = np.where(counts == most[:, None], neighbor_labels, np.iinfo(neighbor_labels.dtype).max).min(1)
    next_most = np.where(neighbor_labels == first[:, None], 0, counts).max(1)
    own = ((neighbor_labels == labels[:, None]) & votes).sum(1)
    voters = votes.sum(1)
    divisor = np.maximum(voters, 1)
    first = np.where(voters > 0, first, -1).astype(np.int64)
    return NeighborVote(first, most / divisor, (most - next_most) / divisor, own / divisor, voters)


def label_noise(vote: NeighborVote, labels: Ids, num_classes: int) -> LabelNoise:
    """Estimate how many labels are wrong, and for each row whose neighbours contradict it how probably its own is.

    As in confident learning (Northcutt, Jiang and Chuang 2021, "Confident Learning: Estimating Uncertainty in Dataset
    Labels", JAIR 70), the rows of clear votes say which labels are wrong: those whose first class f has at least the
    share of the votes that it has on average around the rows labelled f. There the vote is right, and where it
    contradicts the label the label is wrong: ε times of all. That gives ε(f), how often rows of class f are labelled
    otherwise, and T(f, y), how often they are labelled y. Both begin with one wrong label, of 1 / ε rows and of
    (C − 1) / ε, which is wrong labels that fall evenly on all.

    For all votes isotonic regression gives r, the share of agreement with the labels at a margin, and
    r = a (1 − ε(f)) + (1 − a) ε(f) / (C − 1) gives a, how often such a vote is right: at most 1 − ½ / (n + 1) times,
    where n votes are clear. Where it is not, the class is another: y with probability w(y), in proportion to its votes
    and one more that is spread over all others. By Bayes' rule the odds that a label y ≠ f is wrong are
    a T(f, y) + (1 − a) (1 − w(y)) ε(f) / (C − 1) to (1 − a) w(y) (1 − ε(f)).

    Args:
        vote: Of the neighbours, the row itself and its copies not among them.
        labels: (n,) class numbers, -1 where unknown.
        num_classes: C, classes that there are labels of.

    Example:
        >>> labels = np.repeat([0, 1], 50)
        >>> labels[7] = 1
        >>> around = np.repeat([[0] * 5, [1] * 5], 50, axis=0)
        >>> found = label_noise(neighbor_vote(around, labels), labels, 2)
        >>> round(found.noise, 4), found.wrong.nonzero()[0].tolist(), found.wrong[7].round(2)
        (0.01, [7], np.float64(0.73))
    """
    wrong, contradicted = np.zeros(len(labels)), np.zeros(len(labels), bool)
    known = np.flatnonzero((labels >= 0) & (vote.voters > 0))
    if not len(known) or num_classes < 2:
        return LabelNoise(0.0, wrong, contradicted)
    noise, wrong[known] = _probably_wrong(vote.rows(known), labels[known].astype(np.int64), num_classes)
    contradicted[known] = vote.first[known] != labels[known]
    return LabelNoise(noise, wrong, contradicted)


def _probably_wrong(vote: NeighborVote, labels: Ids, num_classes: int) -> tuple[float, Floats]:
    """Return the share of wrong labels, and how probably each is wrong, by the formulas of `label_noise`."""
    differs = vote.first != labels
    is_clear = vote.share >= _usual_shares(vote, labels, num_classes)[vote.first]
    flips, noise = _noise_of_classes(vote.first, labels, is_clear, num_classes)
    by_chance = noise / (num_classes - 1)
    agreement = _isotonic(vote.margin, (~differs).astype(np.float64))
    right = np.clip((agreement - by_chance) / np.maximum(1 - noise - by_chance, 1e-9), 0, 1)
    right = np.minimum(right, 1 - 0.5 / (is_clear.sum() + 1))
    of_label = (vote.own_share * vote.voters + 1 / (num_classes - 1)) / ((1 - vote.share) * vote.voters + 1)
    for_wrong = right * flips + (1 - right) * (1 - of_label) * by_chance
    for_right = (1 - right) * of_label * (1 - noise)
    return float(noise.mean()), np.where(differs, for_wrong / np.maximum(for_wrong + for_right, _TINY), 0.0)


def _usual_shares(vote: NeighborVote, labels: Ids, num_classes: int) -> Floats:
    """Return the mean share of the votes that a class has around the rows labelled so, (C,), one row of all added."""
    rows, shares = np.bincount(labels, minlength=num_classes), np.bincount(labels, vote.own_share, num_classes)
    usual: Floats = (shares + vote.own_share.mean()) / (rows + 1)
    return usual


def _noise_of_classes(
    first: Ids, labels: Ids, is_clear: npt.NDArray[np.bool_], num_classes: int
) -> tuple[Floats, Floats]:
    """Estimate by the clear rows how often a row of class `first` is labelled as this one is, and how often wrongly."""
    is_wrong = is_clear & (first != labels)
    overall = is_wrong.sum() / is_clear.sum()  # a class of the largest usual share has a clear row
    expected = overall * np.bincount(first[is_clear], minlength=num_classes)[first]
    _, pair = np.unique(first * num_classes + labels, return_inverse=True)
    flips = overall * (np.bincount(pair, is_wrong)[pair] + 1) / (expected + num_classes - 1)
    noise = overall * (np.bincount(first[is_wrong], minlength=num_classes)[first] + 1) / (expected + 1)
    return flips, noise


def _isotonic(x: Floats, y: Floats) -> Floats:
    """Fit y by least squares so that it does not fall where x rises, equal for equal x (pool adjacent violators)."""
    _, back, weights = np.unique(x, return_inverse=True, return_counts=True)
    means = np.bincount(back, y) / weights
    pools: list[tuple[float, float, int]] = []  # mean, weight, how many values of x
    for mean, weight in zip(means.tolist(), weights.tolist(), strict=True):
        pool = (mean, float(weight), 1)
        while pools and pools[-1][0] >= pool[0]:
            before = pools.pop()
            total = before[1] + pool[1]
            pool = ((before[0] * before[1] + pool[0] * pool[1]) / total, total, before[2] + pool[2])
        pools.append(pool)
    fitted: Floats = np.repeat([pool[0] for pool in pools], [pool[2] for pool in pools])[back]
    return fitted
