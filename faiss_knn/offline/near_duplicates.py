"""Groups of near-duplicates: from lists of neighbours, also where a row has more copies than its list has places."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from faiss_knn.measures.components import Components
from faiss_knn.measures.duplicate_gap import ROUNDING, duplicate_gap
from faiss_knn.offline.lazy_rows import RowSource, Subset, read_rows, spans
from faiss_knn.search.distance import get_distance
from faiss_knn.search.index import KNNIndex

Ids = npt.NDArray[np.int64]

_BLOCK = 1 << 14  # rows that are searched for at once
_SAMPLED = 1 << 24  # distances among which the gap is looked for


@dataclass(frozen=True)
class Lists:
    """Neighbours of some rows of a bank.

    Attributes:
        rows: (n,) which rows.
        distances: (n, k) float32, ascending, inf where missing.
        indices: (n, k) int64 rows of the bank, -1 where missing.
    """

    rows: Ids
    distances: npt.NDArray[np.float32]
    indices: Ids


def choose_distance(lists: list[Lists], distance_metric: str) -> tuple[float, bool]:
    """Choose the distance below which rows are near-duplicates, from the gap that parts them from ordinary neighbours.

    Args:
        lists: Of neighbours; the last place of each of the first ones tells how far ordinary neighbours are.
        distance_metric: Of the distances.

    Returns:
        The distance, and whether a gap parts some pairs from the others. Without one it is what rounding makes of 0.
    """
    distance = get_distance(distance_metric)

    def to_lengths(distances: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        lengths: npt.NDArray[np.float64] = distance.to_norm(
            torch.from_numpy(distances[np.isfinite(distances)]).double()
        ).numpy()
        return lengths

    farthest = np.where(np.isfinite(lists[0].distances), lists[0].distances, -1).max(1)
    farthest_lengths = to_lengths(farthest[farthest >= 0])
    ordinary = float(np.median(farthest_lengths)) if len(farthest_lengths) else 0.0
    each = max(1, _SAMPLED // max(1, sum(one.distances.shape[1] for one in lists)))
    lengths = np.concatenate([to_lengths(_spread(one.distances, each)) for one in lists])
    gap = duplicate_gap(lengths, ordinary)
    length = torch.tensor(ROUNDING * ordinary if gap is None else gap, dtype=torch.float64)
    return float(distance.from_norm(length)), gap is not None


def _spread(distances: npt.NDArray[np.float32], most: int) -> npt.NDArray[np.float32]:
    """Choose at most so many lists, spread evenly over all."""
    return distances[:: -(-len(distances) // most)]


def group_rows(rows: RowSource, lists: Lists, threshold: float, distance_metric: str) -> Ids:
    """Group rows by pairs that are at most `threshold` apart, directly or by way of others.

    A list that ends within the threshold may lack some of its row's near-duplicates. Those that it lacks have such
    lists themselves, or theirs would name the row: these rows alone are searched again, across the groups found so far.

    Args:
        rows: The bank.
        lists: Neighbours of its rows, the row itself left out; of all, or of some: then of these alone it is certain
            that they are grouped right.
        threshold: At most how far near-duplicates are apart.
        distance_metric: Of the distances.

    Returns:
        (N,) the smallest row of each row's group.
    """
    components = Components(len(rows))
    for start, stop in spans(len(lists.rows), _BLOCK):
        place, column = np.nonzero(lists.distances[start:stop] <= threshold)
        components.join(lists.rows[start + place], lists.indices[start + place, column])
    is_full = lists.distances[:, -1] <= threshold
    if is_full.any() and lists.distances.shape[1] < len(rows) - 1:
        _join_across(rows, lists.rows[is_full], threshold, distance_metric, components)
    return components.roots


def _join_across(rows: RowSource, full: Ids, threshold: float, distance_metric: str, components: Components) -> None:
    """Join the groups of `full` rows that come within the threshold of each other.

    Groups are numbered, and for each bit of the numbers those with a 1 search for their nearest among those with a 0:
    any two groups differ in some bit, and of a row's pairs across it the nearest is within the threshold if one is. A
    round that joins nothing has looked at all pairs.
    """
    while True:
        _, group = np.unique(components.roots[full], return_inverse=True)
        count = int(group.max()) + 1
        joined = False
        for bit in range((count - 1).bit_length()):
            side = (group >> bit & 1).astype(bool)
            left, right = _near_pairs(rows, full[side], full[~side], threshold, distance_metric)
            joined |= len(left) > 0
            components.join(left, right)
        if not joined:
            return


def _near_pairs(rows: RowSource, left: Ids, right: Ids, threshold: float, distance_metric: str) -> tuple[Ids, Ids]:
    """Pair each row of `left` whose nearest of `right` is within the threshold with that one."""
    index = KNNIndex(distance_metric=distance_metric).build(_on_cpu(read_rows(Subset(rows, right))))
    near: list[tuple[Ids, Ids]] = []
    for start, stop in spans(len(left), _BLOCK):
        distances, indices = index.search(_on_cpu(read_rows(Subset(rows, left[start:stop]))), 1)
        is_near = (distances[:, 0] <= threshold).numpy()
        near.append((left[start:stop][is_near], right[indices[:, 0].numpy()[is_near]]))
    lefts, rights = zip(*near, strict=True)
    return np.concatenate(lefts), np.concatenate(rights)


def _on_cpu(block: npt.NDArray[np.floating] | Tensor) -> npt.NDArray[np.floating] | Tensor:
    return block.cpu() if isinstance(block, Tensor) else block
