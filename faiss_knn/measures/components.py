"""Groups of rows that pairs join: connected components, found without a graph in memory."""

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]


class Components:
    """The components of a graph whose edges come in blocks; a component is named by its smallest row.

    Each round hooks every root to the smallest root that an edge joins it to, and lets all rows point at their roots,
    as in Shiloach and Vishkin 1982, "An O(log n) parallel connectivity algorithm". Memory O(N), beside a block.

    Args:
        rows: N, how many rows there are; each is a component of its own at first.

    Example:
        >>> components = Components(5)
        >>> components.join(np.array([0, 3]), np.array([4, 4]))
        >>> components.roots.tolist()
        [0, 1, 2, 0, 0]
    """

    def __init__(self, rows: int) -> None:
        self.roots: Ids = np.arange(rows)

    def join(self, left: Ids, right: Ids) -> None:
        """Join rows pair by pair: (m,) row numbers each."""
        while len(left):
            a, b = self.roots[left], self.roots[right]
            differ = a != b
            left, right = left[differ], right[differ]
            low, high = np.minimum(a, b)[differ], np.maximum(a, b)[differ]
            np.minimum.at(self.roots, high, low)
            self._flatten()

    def _flatten(self) -> None:
        while True:
            above = self.roots[self.roots]
            if np.array_equal(above, self.roots):
                return
            self.roots = above


def groups_of(roots: Ids) -> list[Ids]:
    """List the components of two rows or more, each ascending, in the order of their smallest rows.

    Example:
        >>> [group.tolist() for group in groups_of(np.array([0, 1, 2, 0, 2]))]
        [[0, 3], [2, 4]]
    """
    sizes = np.bincount(roots, minlength=len(roots))
    members = np.flatnonzero(sizes[roots] > 1)
    members = members[np.argsort(roots[members], kind="stable")]
    ends = np.cumsum(sizes[sizes > 1])
    return np.split(members, ends[:-1]) if len(members) else []
