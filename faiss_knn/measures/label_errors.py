"""Rows whose neighbours contradict their label, and how probable it is that the label is wrong."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]

_BLOCK = 1 << 22  # pairs of neighbours that are compared at once
_SURE = 0.2  # share of the rows, those of the clearest votes, that show how many labels are wrong


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
    Labels", JAIR 70), the rows of the clearest votes say how many labels are wrong: there the vote is right, and where
    it contradicts the label the label is wrong. The share ε of those is taken from the fifth of the rows with the
    widest margins. For less clear votes isotonic regression gives r, the share of agreement with the labels at a
    margin. If wrong labels fall evenly on the other C − 1 classes, whatever the features,
    r = a (1 − ε) + (1 − a) ε / (C − 1), which gives a, how often such a vote is right, and by Bayes' rule a label that
    is contradicted is wrong with probability ε (a + (1 − a) (C − 2) / (C − 1)) / (1 − r).

    Args:
        vote: Of the neighbours, the row itself and its copies not among them.
        labels: (n,) class numbers, -1 where unknown.
        num_classes: C, classes that there are labels of.

    Example:
        >>> labels = np.repeat([0, 1], 50)
        >>> labels[7] = 1
        >>> around = np.repeat([[0] * 5, [1] * 5], 50, axis=0)
        >>> found = label_noise(neighbor_vote(around, labels), labels, 2)
        >>> found.noise, found.wrong.nonzero()[0].tolist(), found.wrong[7].round(2)
        (0.01, [7], np.float64(1.0))
    """
    wrong, contradicted = np.zeros(len(labels)), np.zeros(len(labels), bool)
    known = np.flatnonzero((labels >= 0) & (vote.voters > 0))
    if not len(known) or num_classes < 2:
        return LabelNoise(0.0, wrong, contradicted)
    agrees, margin = vote.first[known] == labels[known], vote.margin[known]
    surest = margin >= np.quantile(margin, 1 - _SURE, method="lower")
    noise = float((~agrees[surest]).mean())
    agreement = _isotonic(margin, agrees.astype(np.float64))
    by_chance = noise / (num_classes - 1)
    right = np.clip((agreement - by_chance) / max(1 - noise - by_chance, 1e-9), 0, 1)
    both = noise * (right + (1 - right) * (num_classes - 2) / (num_classes - 1))
    probability = np.clip(both / np.maximum(1 - agreement, 1e-9), 0, 1)
    wrong[known] = np.where(agrees, 0.0, probability)
    contradicted[known] = ~agrees
    return LabelNoise(noise, wrong, contradicted)


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
