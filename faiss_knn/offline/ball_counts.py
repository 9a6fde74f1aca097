"""How many rows lie within balls around others, each of its own radius; measures/generative.py makes scores of that."""

import numpy as np
import numpy.typing as npt

from faiss_knn.offline.lazy_rows import RowSource, Subset, read_rows, spans
from faiss_knn.search.index import KNNIndex

Ids = npt.NDArray[np.int64]

_BLOCK = 2048  # balls that are searched at once
_PLACES = 1 << 22  # of the lists that are held at once
_GROWTH = 8


def count_in_balls(
    centres: RowSource, radii: npt.NDArray[np.float32], points: RowSource, distance_metric: str, k: int
) -> tuple[Ids, Ids]:
    """Count the points in each ball, and the balls around each point; on the edge is inside.

    Lists of the nearest points are lengthened for the balls that hold all of their list.

    Args:
        centres: (n, d).
        radii: (n,) in the unit of the distance, as `KNNIndex` measures it.
        points: (m, d).
        distance_metric: Which distance.
        k: How many points balls hold ordinarily.

    Returns:
        (n,) and (m,) counts.
    """
    index = KNNIndex(distance_metric=distance_metric).build(read_rows(points))
    in_ball, around = np.zeros(len(centres), np.int64), np.zeros(len(points), np.int64)
    waiting, depth = np.arange(len(centres)), min(4 * k, len(points))
    while len(waiting):
        full = []
        for start, stop in spans(len(waiting), min(_BLOCK, max(1, _PLACES // depth))):
            balls = waiting[start:stop]
            distances, indices = (part.cpu().numpy() for part in index.search(read_rows(Subset(centres, balls)), depth))
            inside = distances <= radii[balls, None]
            is_full = inside[:, -1] & (depth < len(points))
            in_ball[balls] = inside.sum(1)
            around += np.bincount(indices[inside & ~is_full[:, None]], minlength=len(points))
            full.append(balls[is_full])
        waiting, depth = np.concatenate(full), min(_GROWTH * depth, len(points))
    return in_ball, around
